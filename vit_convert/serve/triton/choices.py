"""From measured figures to Triton's settings, each with a sentence that names its figure."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.engine.measure.benchmark import RESIDENT
from vit_convert.serve.triton.offered import Offered, Plan
from vit_convert.serve.triton.pbtxt import Chosen, numbers

DEFAULT_DELAY_US = 100
_NEARLY_ALL = 0.95  # of the best throughput: a larger batch only adds latency
_WAIT_SHARE = 0.1  # of the time for batch 1: the cost that waiting for others may add to a lone request
# Measured with 2.51: of 200 lone requests one after the other, 4 to 33 were answered after 0.5 s with a max_queue_size,
# none without a default_queue_policy. The scheduler then misses its wake-up, and checks again after that time. Of 2,490
# on a busy machine, 5 with a max_queue_size, 1 with default_timeout_microseconds and no delay, 1 with
# allow_timeout_override alone, none without a policy.
_NO_POLICY = (
    "No default_queue_policy, so no limit of the queue and no timeout: with a max_queue_size, Triton 2.51 leaves a "
    "lone request waiting for half a second now and then. A client's own timeout limits how long it waits."
)
KEPT_ANSWERS = 10_000
_ENTRY_BYTES = 1024  # about what Triton's local cache keeps beside an answer: names, shapes, its key
_MEMORY_SHARE = 0.8  # share of the GPU's memory that all instances together may use


@dataclasses.dataclass(frozen=True)
class Batching:
    """How requests become batches.

    Attributes:
        max_batch: 0 if the graph's batch does not vary.
        preferred: batch sizes to form; empty for as many as are waiting.
        delay_us: time that a request may wait for others.
        instances: of the model on each GPU, or on the CPU.
        why: by attribute, the reason in a sentence.
    """

    max_batch: int
    preferred: Sequence[int]
    delay_us: int
    instances: int
    why: Mapping[str, str]


def for_plan(offered: Offered, plan: Plan, delay_us: int | None) -> Batching:
    """The settings for a TensorRT engine.

    Args:
        offered: of the bundle.
        plan: the engine.
        delay_us: as requested; None derives it.
    """
    rows = [row for row in offered.benchmark.get("rows", []) if row.get("precision") == plan.precision]
    resident = [row for row in rows if row.get("transfers") == RESIDENT] or rows
    gpu, max_batch = offered.benchmark.get("gpu", ""), max(plan.batches(2))
    where = f"on {gpu}, {offered.benchmark.get('date', '')[:10]}" if resident else ""
    preferred, why_preferred = _preferred(plan, resident, max_batch, where)
    delay, why_delay = _delay(resident, delay_us, where)
    instances, why_instances = _instances(offered, resident, where)
    why = {
        "max_batch": f"The largest batch of the engine's profiles ({', '.join(map(str, plan.batches(2)))}).",
        "preferred": why_preferred,
        "delay_us": why_delay,
        "instances": why_instances,
    }
    return Batching(max_batch, preferred, delay, instances, why)


def for_graph(offered: Offered, delay_us: int | None) -> Batching:
    """The settings for a graph under onnxruntime, none of them measured."""
    leading = offered.signature.inputs[0].shape[0]
    fixed = isinstance(leading, int)
    delay = DEFAULT_DELAY_US if delay_us is None else delay_us
    said = (
        "As asked for."
        if delay_us is not None
        else "The default: no batch time was measured here, and more helps only at high load."
    )
    why = {
        "max_batch": f"The graph takes {leading} at once and no other number."
        if fixed
        else "config.batch.max of the conversion.",
        "preferred": "",
        "delay_us": said,
        "instances": "One, which uses all cores: onnxruntime spreads one batch over them.",
    }
    return Batching(0 if fixed else offered.max_batch, [], delay, 1, why)


def batching_fields(batching: Batching) -> list[Chosen]:
    """`max_batch_size` and `dynamic_batching`."""
    fields = [Chosen(f"max_batch_size: {batching.max_batch}", batching.why["max_batch"])]
    if not batching.max_batch:
        return fields
    preferred = f" preferred_batch_size: {numbers(batching.preferred)}" if batching.preferred else ""
    text = f"dynamic_batching {{{preferred} max_queue_delay_microseconds: {batching.delay_us} }}"
    why = filter(None, (batching.why["preferred"], batching.why["delay_us"], _NO_POLICY))
    return [*fields, Chosen(text, " ".join(why))]


def response_cache(offered: Offered, *, wanted: bool) -> list[Chosen]:
    """`response_cache`, where it is asked for: answers to equal requests come from the server's memory.

    Args:
        offered: of the bundle.
        wanted: whether it is asked for; a model that replaces another of the same version would answer as that one.
    """
    if not wanted:
        return []
    each = sum(value[0].nbytes for value in offered.expected.values())
    size = KEPT_ANSWERS * (each + _ENTRY_BYTES)
    why = (
        f"Equal requests are answered from memory: an answer has {each:,} bytes, so that tritonserver "
        f"--cache-config=local,size={size} keeps about {KEPT_ANSWERS:,}; without that flag none is kept. Answers are "
        "kept by model and version: another model needs another --model_version."
    )
    return [Chosen("response_cache { enable: true }", why)]


def _preferred(plan: Plan, rows: Sequence[Mapping[str, Any]], max_batch: int, where: str) -> tuple[list[int], str]:
    optima = sorted({size for size in plan.batches(1) if size > 1})
    best: dict[int, float] = {}
    for row in rows:
        if row["batch"] <= max_batch:
            best[row["batch"]] = max(best.get(row["batch"], 0.0), row["images_per_second"])
    if not best:
        said = "Batches that the profiles are tuned for; without a benchmark nothing tells which of them pays."
        return optima, said if optima else ""
    most = max(best.values())
    enough = min(batch for batch, rate in best.items() if rate >= _NEARLY_ALL * most)
    rates = ", ".join(f"{rate:,.0f} at {batch}" for batch, rate in sorted(best.items()))
    chosen = sorted({enough, *(size for size in optima if size < enough)} - {1})
    return (
        chosen,
        f"Measured {where}, images/s: {rates}. {enough} is the smallest batch with {_NEARLY_ALL:.0%} of the most.",
    )


def _delay(rows: Sequence[Mapping[str, Any]], asked: int | None, where: str) -> tuple[int, str]:
    if asked is not None:
        return asked, f"Waits {asked} us for others, as asked for."
    alone = [row for row in rows if row.get("batch") == 1 and row.get("p50_ms")]
    if not alone:
        return (
            DEFAULT_DELAY_US,
            f"Waits {DEFAULT_DELAY_US} us for others, the default: no time of batch 1 was measured.",
        )
    p50 = min(row["p50_ms"] for row in alone)
    delay = min(DEFAULT_DELAY_US, round(1e3 * p50 * _WAIT_SHARE))
    why = f"{_WAIT_SHARE:.0%} of the {p50:g} ms that batch 1 takes, at most {DEFAULT_DELAY_US} us."
    return delay, f"Waits {delay} us for others: {why}"


def _instances(offered: Offered, rows: Sequence[Mapping[str, Any]], where: str) -> tuple[int, str]:
    by_streams: dict[int, float] = {}
    for row in rows:
        by_streams[row["streams"]] = max(by_streams.get(row["streams"], 0.0), row["images_per_second"])
    if len(by_streams) < 2:
        return 1, "One instance: no other number of streams was measured."
    noise = max((row.get("noise_percent") or 0.0) for row in rows) / 100
    alone = by_streams[min(by_streams)]
    best = max(by_streams, key=lambda streams: by_streams[streams])
    gain = by_streams[best] / alone
    said = f"Measured {where}: {best} streams give {gain:.2f} x of {min(by_streams)}, noise {noise:.1%}"
    if best == min(by_streams) or gain <= 1 + noise:
        return 1, f"{said}: one instance is enough."
    each = max((row.get("gpu_memory_mib") or 0.0) / row["streams"] for row in rows)
    total = offered.benchmark.get("gpu_memory_total_mib") or 0
    fitting = int(_MEMORY_SHARE * total // each) if each and total else best
    count = max(1, min(best, fitting))
    memory = f"an instance takes about {each:,.0f} of {total:,.0f} MiB, of which {_MEMORY_SHARE:.0%} may be taken"
    return count, f"{said}; {memory}."
