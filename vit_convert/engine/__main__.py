"""Builds, verifies and measures the engines of a bundle, on a host that needs no JAX and no ONNX.

  python -m vit_convert.engine BUNDLE              the next three; an engine that misses its tolerance is still measured
  python -m vit_convert.engine build BUNDLE        engines for the TensorRT and GPU of this host
  python -m vit_convert.engine verify BUNDLE       their outputs against JAX's in the bundle, and top-1 on its labelled
  images python -m vit_convert.engine benchmark BUNDLE    latency and throughput, memory, clocks; benchmark.json, a
  table, a plot python -m vit_convert.engine tune BUNDLE         times every lowering of the graph with every profile,
  resumable; tune.json

BUNDLE is the folder that `python -m vit_convert` wrote, <workdir>/<name>, copied here as a whole. Any key of its config
can be changed by --config.key=value (--config.batch.profiles="(1, 64, 256)"). Results are merged into
BUNDLE/report.json. Needs Python 3.10 or later, numpy, absl-py, ml_collections and tensorrt; uses nvidia-ml-py and
matplotlib if they are installed.

Exit codes: 0 done, 2 usage or config, 5 an engine misses its tolerance, 6 calibration images, 7 an engine is not built
or does not load, 8 an engine does not run or nothing was measured, 130 interrupted (finished engines and rows are
kept).
"""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

import ml_collections
from absl import flags

from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle
from vit_convert.core.engine_results import EngineCheck, EngineSummary, Verification
from vit_convert.core.errors import CheckError, UsageError, nearest
from vit_convert.core.leftovers import remove_temporaries
from vit_convert.core.lock import hold
from vit_convert.core.overrides import apply_overrides, split_overrides
from vit_convert.core.pair import TOWERS, is_pair
from vit_convert.core.pair_results import PairVerification
from vit_convert.core.presets import apply_preset
from vit_convert.core.program import Program
from vit_convert.core.progress import Progress, human_bytes
from vit_convert.core.text_table import text_table
from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.handoff import open_bundle, read_config, read_facts
from vit_convert.engine.host import EngineHost
from vit_convert.report.at_end import write_at_end

_PROGRAM = Program(__doc__, when_interrupted="finished engines and rows are kept")
_FLAGS = _PROGRAM.flags
flags.DEFINE_list(
    "precision", [], "Engines to work on: fp32, fp16, bf16, int8, fp8; empty: those of the config.", flag_values=_FLAGS
)
flags.DEFINE_enum("backend", "auto", ("auto", "tensorrt", "rtx"), "Which TensorRT.", flag_values=_FLAGS)
flags.DEFINE_list(
    "for", [], "inspect: TensorRT generations, of trt8, trt10, trt11, rtx; empty: the bundle's own, all for a file.",
    flag_values=_FLAGS,
)  # fmt: skip
flags.DEFINE_list("plan", [], "verify, without a bundle: engines that were built elsewhere.", flag_values=_FLAGS)
flags.DEFINE_string("onnx", "", "verify --plan: the graph that the engines were built from.", flag_values=_FLAGS)
flags.DEFINE_bool("force", False, "build, tune: also redo what is there already.", flag_values=_FLAGS)
flags.DEFINE_list(
    "batches", [], "benchmark, tune: images per run; empty: benchmark.batches of the config.", flag_values=_FLAGS
)
flags.DEFINE_list(
    "streams", [], "benchmark: concurrent streams; empty: benchmark.streams of the config.", flag_values=_FLAGS
)
flags.DEFINE_float(
    "duration",
    0.0,
    "benchmark, tune: seconds per row and pass; 0: benchmark.seconds of the config.",
    flag_values=_FLAGS,
)
flags.DEFINE_float("warmup", 1.0, "benchmark, tune: seconds to warm up before each measurement.", flag_values=_FLAGS)
flags.DEFINE_enum(
    "cuda_graph", "on", ("on", "off", "both"), "benchmark: replay recorded CUDA graphs.", flag_values=_FLAGS
)
flags.DEFINE_bool(
    "ceilings",
    False,
    "benchmark: also time a large product and a copy, for the roofline in report.html.",
    flag_values=_FLAGS,
)
flags.DEFINE_bool(
    "end_to_end",
    True,
    "benchmark: also measure with images copied from the host and results copied back.",
    flag_values=_FLAGS,
)
flags.DEFINE_bool("quiet", False, "Print only results and errors.", flag_values=_FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command line.

    Args:
        argv: arguments, the program's name first.

    Returns:
        The exit code.
    """
    return _PROGRAM.main(argv, _run)


def _run(argv: Sequence[str]) -> int:
    names, path, overrides = parse(argv)
    if _FLAGS.plan:
        from vit_convert.engine.foreign import verify_foreign

        config = apply_overrides(configs.default_config(), overrides)
        precision = (_FLAGS.precision or ["fp16"])[0]
        verify_foreign(load_backend(_FLAGS.backend, for_this_gpu=True), _FLAGS.plan, _FLAGS.onnx, precision, config)
        return 0
    if names == (INSPECT,):
        from vit_convert.engine.inspection.command import inspect

        words = {os.path.join(path, tower): words_of_tower(overrides, tower) for tower in TOWERS if is_pair(path)}
        for folder, given in (words or {path: overrides}).items():
            config = apply_overrides(configs.default_config(), given)
            apply_preset(config)  # the rest is of no graph, and the default config names no checkpoint
            inspect(folder, list(_FLAGS["for"].value or []), _FLAGS.precision or ["fp16"], config, given)
        return 0
    line = shlex.join(["python", "-m", "vit_convert.engine", *argv[1:]])
    if is_pair(path):
        return _run_pair(Bundle(path), names, overrides, argv, line)
    bundle = open_bundle(path)
    bundle.require_writable()
    with hold(bundle, line):
        remove_temporaries(bundle)
        return _work(bundle, names, overrides, argv, line)


def _run_pair(root: Bundle, names: Sequence[str], overrides: list[str], argv: Sequence[str], line: str) -> int:
    """Works on both towers in turn; if they are verified, also verifies them as a pair."""
    from vit_convert.engine.pair_bundle import open_pair, pair_table, verify_pair

    root.require_writable()
    missed: CheckError | None = None
    with hold(root, line):
        _, bundles = open_pair(root.root)
        configs_of, words = {}, {tower: words_of_tower(overrides, tower) for tower in bundles}
        for tower, bundle in bundles.items():
            configs_of[tower] = override(read_config(bundle), words[tower])
        config = override(read_config(root), overrides)
        for tower, bundle in bundles.items():
            print(f"{root.root.name}: {tower} tower")
            with hold(bundle, line):
                remove_temporaries(bundle)
                try:
                    _work(bundle, names, words[tower], argv, line)
                except CheckError as e:  # says nothing about the other tower
                    missed = missed or e
        if missed is None and "verify" in names:
            asked = {precision for found in configs_of.values() for precision in _precisions(found)}
            precisions = [precision for precision in configs.PRECISIONS if precision in asked]
            progress = Progress(root.events, quiet=_FLAGS.quiet)
            backend = load_backend(_FLAGS.backend, for_this_gpu=True)
            try:
                result = verify_pair(backend, root, config, precisions=precisions, progress=progress)
            except CheckError as e:
                if not isinstance(e.result, PairVerification):
                    raise
                missed, result = e, e.result
            print(pair_table(result.engines))
    if missed is not None:
        raise missed
    return 0


def words_of_tower(words: Sequence[str], tower: str) -> list[str]:
    """The overrides for one tower of a pair: the common ones, followed by its own under the common names.

    Args:
        words: "--config.key=value", from `parse`.
        tower: "image" or "text".

    Example:
        >>> words_of_tower(["--config.text.batch.max=8", "--config.batch.max=2", "--config.image.taps=true"], "text")
        ['--config.batch.max=2', '--config.batch.max=8']
    """
    groups = tuple(f"--config.{name}." for name in TOWERS)
    own = [
        word.replace(f"--config.{tower}.", "--config.", 1) for word in words if word.startswith(f"--config.{tower}.")
    ]
    return [*(word for word in words if not word.startswith(groups)), *own]


def _work(bundle: Bundle, names: Sequence[str], overrides: list[str], argv: Sequence[str], line: str) -> int:
    config, facts = override(read_config(bundle), overrides), read_facts(bundle)
    progress = Progress(bundle.events, quiet=_FLAGS.quiet)
    progress.event("command", argv=list(argv), name=bundle.root.name)
    backend, missed = load_backend(_FLAGS.backend, for_this_gpu=True), None
    host = EngineHost(backend, bundle, config, facts, progress, line)
    try:
        for name in names:
            try:
                COMMANDS[name](host)
            except CheckError as e:  # an engine that failed verification is still measured, but not recommended
                missed = e
    finally:
        write_at_end(bundle, progress)
    if missed is not None:
        raise missed
    return 0


def parse(argv: Sequence[str]) -> tuple[Sequence[str], str, list[str]]:
    """Parses the command line; flags go to this module's flags.

    Args:
        argv: arguments, the program's name first.

    Returns:
        The commands to run one after the other, the bundle's path, and the `--config.key=value` words.

    Raises:
        UsageError: an unknown command or flag, a bad value, or no bundle.
    """
    overrides, others = split_overrides(argv[1:], configs.default_config())
    words = _PROGRAM.parse(others)
    first = words[0] if words else ""
    if _FLAGS.plan or _FLAGS.onnx:
        if words != ["verify"] or not _FLAGS.plan:
            raise UsageError(
                f"--plan={','.join(_FLAGS.plan)} --onnx={_FLAGS.onnx}: belong to verify without a bundle",
                fix="python -m vit_convert.engine verify --plan=FILE --onnx=FILE.onnx",
            )
        return ("verify",), "", overrides
    if first in (*COMMANDS, INSPECT):
        if len(words) != 2:
            raise UsageError(
                f"{first}: takes one bundle, given {len(words) - 1}: {shlex.join(words[1:])}", fix="--help tells more."
            )
        return (first,), words[1], overrides
    if not first or not os.path.isdir(first):
        known = f"not one of {', '.join((*COMMANDS, INSPECT))}, and no folder"
        raise UsageError(f"command {first!r}: {known}.{nearest(first, (*COMMANDS, INSPECT))}", fix="--help tells more.")
    if len(words) > 1:
        raise UsageError(
            f"{first}: one bundle and nothing else is taken, given {shlex.join(words)}", fix="The command comes first."
        )
    return ("build", "verify", "benchmark"), first, overrides


def override(config: ml_collections.ConfigDict, words: Sequence[str]) -> ml_collections.ConfigDict:
    """Applies `--config.key=value` words and the flags that stand for config keys.

    Args:
        config: the bundle's.
        words: from `parse`.

    Returns:
        The config, checked.

    Raises:
        UsageError: an unknown key or a bad value.
    """
    result = apply_overrides(config, words)
    result.precision = ",".join(_FLAGS.precision) or result.precision
    for key in ("batches", "streams"):
        result.benchmark[key] = _numbers(key) or result.benchmark[key]
    result.benchmark.seconds = _FLAGS.duration or result.benchmark.seconds
    if not 0 <= _FLAGS.warmup <= 3600:
        raise UsageError(f"--warmup={_FLAGS.warmup:g}: must be from 0 to 3600 seconds")
    configs.check_values(result)
    return result


def _numbers(flag: str) -> tuple[int, ...]:
    words = getattr(_FLAGS, flag)
    if wrong := [word for word in words if not word.isdecimal()]:
        raise UsageError(
            f"--{flag}={','.join(words)}: {wrong[0]!r} is not a whole number", fix="--help lists the flags."
        )
    try:
        return tuple(map(int, words))
    except ValueError as e:  # more digits than Python reads
        raise UsageError(f"--{flag}: {e}") from e


def build(host: EngineHost) -> None:
    """Builds the engines that are missing, and all of them with --force."""
    from vit_convert.engine.build_bundle import build_bundle
    from vit_convert.engine.commands import add_to_report

    rows = build_bundle(host, precisions=_precisions(host.config), force=_FLAGS.force)
    add_to_report(host, build=rows)
    header = ("engine", "size", "build", "fused attention")
    print(
        text_table(
            header,
            [[row.path, human_bytes(row.bytes), f"{row.build_seconds:.1f} s", _fused(row)] for row in rows],
        )
    )


def verify(host: EngineHost) -> None:
    """Verifies the engines; a miss is written to the report before it sets the exit code."""
    from vit_convert.engine.commands import add_to_report, verify_bundle

    missed: CheckError | None = None
    try:
        result = verify_bundle(host, precisions=_precisions(host.config))
    except CheckError as e:
        if not isinstance(e.result, Verification):
            raise
        missed, result = e, e.result
    add_to_report(host, verify=result)
    print(verify_table(result.engines, host.facts.output))
    if missed is not None:
        raise missed


def verify_table(engines: Mapping[str, EngineCheck], output: str) -> str:
    """The judged output of each engine at each batch as text for a terminal."""
    rows = []
    for precision, found in engines.items():
        for row in (row for row in found.rows if row.output == output):
            verdict = "passed" if row.passed else "FAILED"
            distance = (f"{row.max_abs:.2g}", f"{row.max_rel:.2g}", f"{row.cosine:.7f}")
            rows.append([precision, str(row.batch), *distance, "", verdict])
        if found.top1 is not None:
            agreement = "" if found.agreement is None else f"{found.agreement:.2f} %"
            top1 = f"{found.top1:.2f} %"
            rows.append([precision, f"{found.num_images} images", "", "", "", top1, f"agrees {agreement}".rstrip()])
    return text_table(("engine", "batch", "max abs", "of scale", "cosine", "top-1", ""), rows)


def benchmark(host: EngineHost) -> None:
    """Measures the engines and says which one to use."""
    from vit_convert.engine.commands import add_to_report, benchmark_bundle
    from vit_convert.engine.measure.benchmark import rows_table

    result = benchmark_bundle(
        host,
        precisions=_precisions(host.config),
        warmup_seconds=_FLAGS.warmup,
        cuda_graphs={"on": (True,), "off": (False,), "both": (True, False)}[_FLAGS.cuda_graph],
        end_to_end=_FLAGS.end_to_end,
        ceilings=_FLAGS.ceilings,
    )
    add_to_report(host, benchmark=result)
    print(rows_table(result.rows))
    for share in result.end_to_end:
        print(
            f"{share.precision} at batch {share.batch}: {100 * share.share:.1f} % of device-resident throughput "
            "with transfers"
        )
    chosen = result.recommended
    assert chosen is not None  # the benchmark ended
    print(
        f"{result.gpu}, noise up to {result.noise_percent} %. Recommended: {chosen.precision or 'none'} "
        f"({chosen.reason})"
    )


def tune(host: EngineHost) -> None:
    """Times lowerings × profiles and says how to get the fastest verified engine for each batch."""
    from vit_convert.engine.commands import add_to_report
    from vit_convert.engine.tune.tune import tune_bundle
    from vit_convert.engine.tune.winners import tune_table, tuned_engines

    result = tune_bundle(host, precisions=_precisions(host.config), warmup_seconds=_FLAGS.warmup, force=_FLAGS.force)
    add_to_report(host, tuning=list(tuned_engines(result)))
    print(tune_table(result))


INSPECT = "inspect"  # also takes a file, and needs no TensorRT
COMMANDS: dict[str, Callable[..., None]] = {"build": build, "verify": verify, "benchmark": benchmark, "tune": tune}


def _precisions(config: ml_collections.ConfigDict) -> list[str]:
    return (
        [word for word in configs.PRECISIONS if word in _FLAGS.precision]
        if _FLAGS.precision
        else configs.precisions(config)
    )


def _fused(row: EngineSummary) -> str:
    return row.fused_attention.text if row.fused_attention else f"unknown ({row.fused_attention_unknown})"


def run() -> None:
    """Entry point of the module."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
