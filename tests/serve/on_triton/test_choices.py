"""From figures to settings, figure by figure; and the text format, as Triton's protobuf would read it."""

import types

import pytest

from vit_convert.core.errors import BuildError
from vit_convert.core.signature import Tensor
from vit_convert.engine.measure.benchmark import RESIDENT
from vit_convert.serve.triton.choices import Batching, batching_fields, for_graph, for_plan, response_cache
from vit_convert.serve.triton.offered import read_offered
from vit_convert.serve.triton.pbtxt import TYPES, Chosen, document, numbers, parameter, quoted, step, tensor

PLAN = types.SimpleNamespace(precision="fp16", batches=lambda which: [[1], [4, 1, 8], [8, 16, 32]][which])


def row(batch, rate, *, streams=1, **more):
    base = {
        "precision": "".join(("fp", "16")),
        "transfers": RESIDENT,
        "batch": batch,
        "streams": streams,
        "images_per_second": rate,
    }
    return {**base, **more}


def offered(*rows, total=None):
    about = {"gpu": "H100", "date": "2026-11-27T00:00:00", "gpu_memory_total_mib": total}
    return types.SimpleNamespace(benchmark={"rows": list(rows), **about} if rows else {})


def chosen(*rows, delay_us=None, total=None):
    return for_plan(offered(*rows, total=total), PLAN, delay_us)


def test_without_figures():
    found = chosen()
    assert (found.max_batch, found.preferred, found.delay_us, found.instances) == (32, [4, 8], 100, 1)
    assert found.why["max_batch"] == "The largest batch of the engine's profiles (8, 16, 32)."
    assert "without a benchmark nothing tells" in found.why["preferred"]
    assert "the default: no time of batch 1" in found.why["delay_us"]
    one = types.SimpleNamespace(precision="fp16", batches=lambda which: [1])
    alone = for_plan(offered(), one, None)
    assert (alone.max_batch, alone.preferred, alone.why["preferred"]) == (1, [], "")


@pytest.mark.parametrize(
    ("rates", "preferred"),
    [
        ({1: 95.0, 8: 100.0}, []),  # a batch of 1 is enough, and needs no waiting
        ({1: 94.9, 8: 100.0}, [4, 8]),
        ({1: 50.0, 8: 90.0, 16: 100.0}, [4, 8, 16]),
        ({1: 50.0, 8: 95.0, 16: 100.0}, [4, 8]),
        ({8: 90.0, 32: 100.0, 64: 500.0}, [4, 8, 32]),  # the engine takes 32
        ({2: 100.0, 32: 104.0}, [2]),
    ],
)
def test_the_smallest_batch_with_nearly_all_of_the_throughput(rates, preferred):
    found = chosen(*(row(batch, rate) for batch, rate in rates.items()), row(1, 1.0, precision="int8"))
    assert found.preferred == preferred
    shown = ", ".join(f"{rate:,.0f} at {batch}" for batch, rate in sorted(rates.items()) if batch <= 32)
    assert f"Measured on H100, 2026-11-27, images/s: {shown}. " in found.why["preferred"]
    assert found.why["preferred"].endswith("is the smallest batch with 95% of the most.")


def test_the_best_of_several_streams_counts():
    assert chosen(row(4, 10.0), row(4, 100.0, streams=2), row(8, 100.0)).preferred == [4]
    assert chosen(row(4, 100.0, streams=2), row(4, 10.0), row(8, 100.0)).preferred == [4]


def test_rows_with_transfers_count_where_there_are_no_others():
    assert chosen(row(4, 100.0, transfers="in and out"), row(8, 50.0)).preferred == [4, 8]
    assert chosen(row(4, 100.0, transfers="in and out"), row(8, 50.0, transfers="in and out")).preferred == [4]


@pytest.mark.parametrize(
    ("times", "delay"), [([0.42], 42), ([0.426], 43), ([5.0], 100), ([0.6, 0.4], 40), ([1.0], 100)]
)
def test_a_tenth_of_the_time_of_a_batch_of_one(times, delay):
    rows = [row(1, 1.0, p50_ms=time) for time in times]
    found = chosen(*rows, row(2, 1.0, p50_ms=0.1), row(1, 1.0, p50_ms=None), row(1, 1.0))
    assert found.delay_us == delay
    assert found.why["delay_us"].startswith(f"Waits {delay} us for others: 10% of the {min(times):g} ms")


def test_a_delay_that_is_asked_for():
    assert [chosen(row(1, 1.0, p50_ms=0.4), delay_us=us).delay_us for us in (0, 7, 5000)] == [0, 7, 5000]
    assert chosen(delay_us=7).why["delay_us"] == "Waits 7 us for others, as asked for."


def streams(*rates, noise=1.0, memory=0.0, **more):
    return [
        row(8, rate, streams=count, noise_percent=noise, gpu_memory_mib=memory * count, **more)
        for count, rate in enumerate(rates, 1)
    ]


@pytest.mark.parametrize(
    ("rates", "noise", "instances"),
    [
        ((100.0,), 1.0, 1), ((100.0, 101.0), 1.0, 1), ((100.0, 101.1), 1.0, 2), ((100.0, 150.0, 140.0), 1.0, 2),
        ((100.0, 150.0, 160.0), 1.0, 3), ((100.0, 90.0), 1.0, 1), ((100.0, 104.0), 5.0, 1), ((100.0, 104.0), None, 2),
    ],
)  # fmt: skip
def test_instances_that_gain_more_than_the_noise(rates, noise, instances):
    found = chosen(*streams(*rates, noise=noise))
    assert found.instances == instances
    if len(rates) == 1:
        assert found.why["instances"] == "One instance: no other number of streams was measured."
    elif instances == 1:
        assert found.why["instances"].endswith("one instance is enough.")


@pytest.mark.parametrize(
    ("memory", "total", "instances"),
    [(100.0, 1000, 4), (200.0, 1000, 4), (200.1, 1000, 3), (500.0, 1000, 1), (5000.0, 1000, 1), (5000.0, None, 4),
     (0.0, 1000, 4)],
)  # fmt: skip
def test_instances_take_four_fifths_of_the_memory_at_most(memory, total, instances):
    assert chosen(*streams(100.0, 200.0, 300.0, 400.0, memory=memory), total=total).instances == instances


def test_why_there_are_so_many_instances():
    found = chosen(*streams(100.0, 150.0, memory=300.0), total=2000)
    assert found.why["instances"] == (
        "Measured on H100, 2026-11-27: 2 streams give 1.50 x of 1, noise 1.0%; an instance takes about 300 of 2,000 "
        "MiB, of which 80% may be taken."
    )


@pytest.mark.parametrize(("leading", "most"), [("batch", 8), (4, 0)])
def test_a_graph_was_not_measured(leading, most):
    inputs = [Tensor("images", "float32", (leading, 4))]
    graph = types.SimpleNamespace(signature=types.SimpleNamespace(inputs=inputs), max_batch=8)
    found = for_graph(graph, None)
    assert (found.max_batch, found.preferred, found.delay_us, found.instances) == (most, [], 100, 1)
    assert ("takes 4 at once" in found.why["max_batch"]) is (leading == 4)
    assert found.why["delay_us"].startswith("The default")
    asked = for_graph(graph, 0)
    assert asked.delay_us == 0 and asked.why["delay_us"] == "As asked for."


def test_answers_are_kept_where_that_is_asked_for(converted):
    """With the size of the cache that they need: float32 [10] is 40 bytes."""
    offered = read_offered(converted)
    assert response_cache(offered, wanted=False) == []
    (kept,) = response_cache(offered, wanted=True)
    assert kept.text == "response_cache { enable: true }"
    assert "an answer has 40 bytes" in kept.why and f"size={10_000 * (40 + 1024)} keeps about 10,000" in kept.why


WHY = {"max_batch": "Most.", "preferred": "Sizes.", "delay_us": "Waits.", "instances": "One."}


def test_fields_of_batching():
    size, dynamic = batching_fields(Batching(8, [2, 4], 50, 1, WHY))
    assert str(size) == "# Most.\nmax_batch_size: 8"
    assert dynamic.text == "dynamic_batching { preferred_batch_size: [ 2, 4 ] max_queue_delay_microseconds: 50 }"
    assert dynamic.why.startswith("Sizes. Waits. No default_queue_policy")
    bare = batching_fields(Batching(8, [], 50, 1, {**WHY, "preferred": ""}))[1]
    assert bare.text == "dynamic_batching { max_queue_delay_microseconds: 50 }" and bare.why.startswith("Waits. No ")
    assert [part.text for part in batching_fields(Batching(0, [], 50, 1, WHY))] == ["max_batch_size: 0"]


# --- the text format --------------------------------------------------------------------------------------------------


def test_texts_of_fields():
    assert quoted('a "b"\\') == '"a \\"b\\"\\\\"' and numbers([1]) == "[ 1 ]" and numbers([]) == "[  ]"
    assert step("m", {"a": "b", "c": "d"}, {"e": "f"}) == (
        '    { model_name: "m" model_version: -1 input_map { key: "a" value: "b" } input_map { key: "c" value: "d" } '
        'output_map { key: "e" value: "f" } }'
    )
    assert parameter("k", 3).text == 'parameters { key: "k" value { string_value: "3" } }'
    assert document([Chosen("a"), Chosen("b", "why")]) == "a\n# why\nb\n"
    long = Chosen("a", "word " * 60)
    assert all(line.startswith("# word") and len(line) <= 110 for line in str(long).splitlines()[:-1])
    assert " ".join(line[2:] for line in str(long).splitlines()[:-1]) == ("word " * 60).strip()


def test_texts_of_tensors():
    images = Tensor("images", "float32", ("batch", 3, "height", 8))
    assert tensor("input", images).text == 'input [ { name: "images" data_type: TYPE_FP32 dims: [ 3, -1, 8 ] } ]'
    whole = tensor("output", images, batched=False, more="reshape: { }").text
    assert whole == 'output [ { name: "images" data_type: TYPE_FP32 dims: [ -1, 3, -1, 8 ] reshape: { } } ]'
    with pytest.raises(BuildError, match="input x: complex64: Triton has no such type"):
        tensor("input", Tensor("x", "complex64", (1,)))


def test_types_are_tritons():
    """docs.nvidia.com, "Datatypes": TYPE_ and the kind and width, STRING for bytes."""
    kinds = {"float": "FP", "bfloat": "BF", "uint": "UINT", "int": "INT"}
    for name, spelt in TYPES.items():
        letters, digits = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
        assert spelt == {"bool": "TYPE_BOOL", "bytes": "TYPE_STRING"}.get(name, f"TYPE_{kinds.get(letters)}{digits}")
