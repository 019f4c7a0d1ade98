"""Writes tables from benchmarks/results/*.json into a text, between markers, so that no number in it is typed by hand.

A text names its tables: everything between `<!-- table:convert -->` and `<!-- end -->` is replaced by the table of that
name, from the newest result file `<name>-*.json` (by date in its name). Tables: convert, growth, extras (all from
convert-*.json), towers, batch, calibrate, int8-trained, int8-fused, int8-gpu-trained, fp16-kernels, serve,
serve-accidents, h200-int8 (from h200-tests-digits-*.json), mutation (from mutation/*.json), any other h200-…, and h200:
all side-by-side runs of h200-*.json together, the newest of each model, input and batch.

    python benchmarks/tables.py docs/benchmarks.md           # rewrites it
    python benchmarks/tables.py --check docs/benchmarks.md   # fails if it would change
"""

import json
import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags
from batch_table import batch_table
from gpu.engine_tables import h200_table, int8_table
from gpu.int8_table import int8_fused_table
from gpu.side_by_side import VERSIONS, merge
from gpu.side_by_side import table as side_by_side
from markdown_table import markdown
from mutation_table import mutation_table, newest_draws
from serve_tables import accidents_table, serve_table

RESULTS = pathlib.Path(__file__).parent / "results"
_CHECK = flags.DEFINE_bool("check", False, "Change nothing; fail if a table is not what the results say.")
_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Run = Mapping[str, Any]


def main(argv: list[str]) -> None:
    """Rewrites or checks the files named."""
    stale = []
    for name in argv[1:]:
        path = pathlib.Path(name)
        old = path.read_text()
        new = fill(old, RESULTS)
        if new != old:
            stale.append(name)
            if not _CHECK.value:
                path.write_text(new)
    if _CHECK.value and stale:
        raise SystemExit(f"{', '.join(stale)}: tables are stale; run: python benchmarks/tables.py {' '.join(stale)}")


def fill(text: str, results: pathlib.Path) -> str:
    """Replaces every table of a text.

    Args:
        text: with markers.
        results: folder of the result files.

    Returns:
        The text with current tables.

    Raises:
        SystemExit: a marker names no table, or there are no results for it.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{_table(found['name'], results)}\n{found[3]}", text)


def _table(name: str, results: pathlib.Path) -> str:
    if name == "h200":
        return _side_by_side(results)
    if name == "mutation":
        return _mutation(results / name)
    make, prefix = TABLES.get(name, (h200_table, name))
    if make is h200_table and not name.startswith("h200-"):
        raise SystemExit(f"table:{name}: not one of {', '.join(TABLES)}, mutation, h200, h200-…")
    files = sorted(results.glob(f"{prefix}.json")) + sorted(results.glob(f"{prefix}-*.json"))
    if not files:
        raise SystemExit(f"table:{name}: no {results}/{prefix}-*.json")
    record = json.loads(files[-1].read_text())
    return f"{make(record)}\n\n{_origin(record, files[-1])}"


def _mutation(folder: pathlib.Path) -> str:
    dates = sorted(str(run["date"])[:10] for run in newest_draws(folder))
    if not dates:
        raise SystemExit(f"table:mutation: no {folder}/*.json")
    return (
        f"{mutation_table(folder)}\n\n<sub>{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
        "`benchmarks/mutation.py`, its commands are in the files: `mutation/*.json`.</sub>"
    )


def _side_by_side(results: pathlib.Path) -> str:
    """All side-by-side runs as one table, and where each row comes from."""
    records = {path.name: json.loads(path.read_text()) for path in sorted(results.glob("h200-*.json"))}
    merged, names = merge(records)
    if not names:
        raise SystemExit(f"table:h200: no side-by-side run in {results}/h200-*.json")
    facts, known = _of_gpu(merged)
    about = [str(facts["gpu"]), str(facts["driver"]), *(f"{name} {version}" for name, version in known.items())]
    about += sorted({records[name]["date"][:10] for name in names})
    files = ", ".join(f"`{name}`" for name in names)
    return (
        f"{side_by_side(merged)}\n\n<sub>{', '.join(about)}; `benchmarks/gpu/h200.py`, its commands are in the "
        f"files: {files}.</sub>"
    )


def _origin(record: Mapping[str, Any], path: pathlib.Path) -> str:
    """One line below a table: where the numbers come from."""
    facts, known = _about(record)
    hardware = ", ".join(_hardware(key, value) for key, value in facts.items() if key in _SHOWN)
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    loads = [run["load_before"] for run in record.get("runs", []) if "load_before" in run]
    load = f" Load average before the runs: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    load = f" Load average: {record['load_average']:.1f}." if "load_average" in record else load
    date = str(record.get("date") or facts.get("date", ""))[:10]
    command, *others = str(record.get("command", "")).split("; ")
    more = f", and {len(others)} more like it" if others else ""
    return f"<sub>{hardware}; {versions}; {date}; `{command}`{more} → `{path.name}`.{load}</sub>"


def _about(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Hardware and versions, wherever a record of its kind has them."""
    if "models" in record:
        return _of_gpu(record)
    if "hardware" in record:
        run = next(iter(record.get("runs", [])), {})  # of one on a GPU it says which
        facts = {key: run[key] for key in ("gpu", "driver") if key in run}
        versions = {key: run[key] for key in ("tensorrt",) if key in run}
        return {**facts, **record["hardware"]}, {**versions, **record.get("versions", {})}
    facts = record.get("environment", record)  # what the engine's commands and the GPU tests write
    return facts, {name: facts[name] for name in ("tensorrt", "vit_convert") if name in facts}


def _of_gpu(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Hardware and versions of a side-by-side run, which each of its measurements recorded for itself.

    Raises:
        SystemExit: they differ, so that one line cannot name them.
    """
    parts = [
        model[name] for model in record["models"].values() for name in ("engine", "jax", "torch") if model.get(name)
    ]
    found: dict[str, Any] = {}
    for part in parts:
        for name in [name for name in ("gpu", "driver", *VERSIONS) if name in part]:  # in this order below a table
            if found.setdefault(name, part[name]) != part[name]:
                raise SystemExit(f"side-by-side runs of {name} {found[name]} and of {part[name]} are no one table")
    return found, {name: found[name] for name in VERSIONS if name in found}


_SHOWN = ("cpu", "cores", "memory_gib", "gpu", "driver")


def _hardware(key: str, value: Any) -> str:
    return {"cores": f"{value} cores", "memory_gib": f"{value} GiB"}.get(key, str(value))


def _groups(runs: Sequence[Run], *keys: str) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by the values of some keys, in the order of their first run; failed ones are left out."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if "error" not in run and "failed" not in run:
            groups.setdefault(tuple(run.get(key) for key in keys), []).append(run)
    return groups


def _median(runs: Sequence[Run], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def _mib(value: float) -> str:
    return f"{value / 1024:.2f} GiB" if value >= 1024 else f"{value:.0f} MiB"


def convert_table(record: Mapping[str, Any]) -> str:
    """Every model and side: medians over the rounds, and the median of the ratios to ours of the same round."""
    groups = _groups([run for run in record["runs"] if "case" not in run], "variant", "side")
    rows = []
    for (variant, side), runs in groups.items():
        ours = groups.get((variant, "vit_convert"), [])
        rows.append(
            [
                f"{variant} {'**vit_convert**' if side == 'vit_convert' else side}",
                f"{_seconds(_median(runs, 'wall_seconds'))}{_times(runs, ours, 'wall_seconds')}",
                f"{_seconds(_median(runs, 'cpu_seconds'))}{_times(runs, ours, 'cpu_seconds')}",
                f"{_mib(_median(runs, 'peak_rss_mib'))}{_times(runs, ours, 'peak_rss_mib')}",
                f"{runs[0]['nodes']}",
                f"{runs[0]['bytes'] / 2**20:,.0f} MiB",
                f"{max(run['max_abs'] for run in runs):.1e}",
            ]
        )
    return markdown(("model, tool", "wall", "CPU", "peak memory", "nodes", "file", "max error to JAX"), rows)


def _times(runs: Sequence[Run], ours: Sequence[Run], key: str) -> str:
    """ " (2.1×)": how many times ours, paired by round."""
    mine = {run["repeat"]: run[key] for run in ours}
    ratios = [run[key] / mine[run["repeat"]] for run in runs if run["repeat"] in mine]
    return f" ({statistics.median(ratios):.1f}×)" if ratios and runs is not ours else ""


def towers_table(record: Mapping[str, Any]) -> str:
    """Both towers by each side, and how many times the plain recipe's, whose towers are run one after the other: their
    times add up, and the larger peak counts."""
    totals = {}
    for side in dict.fromkeys(run["side"] for run in record["runs"]):
        towers = _groups([run for run in record["runs"] if run["side"] == side], "variant", "tower").values()
        sums = [sum(_median(runs, key) for runs in towers) for key in ("wall_seconds", "cpu_seconds")]
        totals[side] = [*sums, max(_median(runs, "peak_rss_mib") for runs in towers)]
    rows = []
    for side, found in totals.items():
        # Others load the machine more or less from run to run: only CPU times and memory are compared.
        checked = "--until" not in side and side != "plain"
        ratios = [f" ({mine / theirs:.2f}×)" if checked else "" for mine, theirs in zip(found, totals["plain"])]
        name = f"**{side}**" if side.startswith("vit_convert") else side
        rows.append([name, _seconds(found[0]), _seconds(found[1]) + ratios[1], _mib(found[2]) + ratios[2]])
    return markdown(("both towers of So400m/14 at 384", "wall", "CPU", "peak memory"), rows)


def growth_table(record: Mapping[str, Any]) -> str:
    """The cost of each further parameter between a small model and the largest, and the fixed cost of a run."""
    groups = _groups([run for run in record["runs"] if "case" not in run], "variant", "side")
    # float32, and a few names
    params = {variant: _median(runs, "checkpoint_bytes") / 4 for (variant, _), runs in groups.items()}
    small = "S/16" if "S/16" in params else min(params, key=lambda variant: params[variant])
    large = max(params, key=lambda variant: params[variant])
    rows = []
    for side in dict.fromkeys(side for _, side in groups):
        if not ((small, side) in groups and (large, side) in groups):
            continue
        cells = []
        for key, unit in (("wall_seconds", 1e9), ("cpu_seconds", 1e9), ("peak_rss_mib", 2**20)):
            ends = [unit * _median(groups[variant, side], key) for variant in (small, large)]
            slope = (ends[1] - ends[0]) / (params[large] - params[small])
            constant = (ends[0] - slope * params[small]) / unit
            cells.append(
                f"{_mib(constant)} + {slope:.1f} B"
                if key == "peak_rss_mib"
                else f"{_seconds(constant)} + {slope:.0f} ns"
            )
        rows.append([side, *cells])
    return markdown((f"{small} to {large}: fixed + per parameter", "wall", "CPU", "peak memory"), rows)


def extras_table(record: Mapping[str, Any]) -> str:
    """What only ours has."""
    groups = _groups([run for run in record["runs"] if "case" in run], "variant", "case")
    rows = [
        [
            f"{variant} {case}".strip(),
            _seconds(_median(runs, "wall_seconds")),
            _seconds(_median(runs, "cpu_seconds")),
            _mib(_median(runs, "peak_rss_mib")),
            f"{_median(runs, 'peak_rss_mib') * 2**20 / _median(runs, 'checkpoint_bytes'):.2f}×"
            if "checkpoint_bytes" in runs[0]
            else "",
        ]
        for (variant, case), runs in groups.items()
    ]
    return markdown(("what", "wall", "CPU", "peak memory", "of the checkpoint's size"), rows)


def calibrate_table(record: Mapping[str, Any]) -> str:
    """Calibration and quantization, ours and onnxruntime's."""
    rows = [
        [
            f"{'**vit_convert**' if side == 'vit_convert' else 'onnxruntime `quantize_static`'}, {images} images",
            _seconds(_median(runs, "wall_seconds")),
            f"{1e3 * _median(runs, 'wall_seconds') / images:.0f} ms",
            f"{1e3 * _median(runs, 'cpu_seconds') / images:.0f} ms",
            _mib(_median(runs, "peak_rss_mib")),
        ]
        for (side, images), runs in _groups(record["runs"], "side", "images").items()
    ]
    return markdown(("tool", "wall", "wall an image", "CPU an image", "peak memory"), rows)


def trained_table(record: Mapping[str, Any]) -> str:
    """INT8 of the trained model with each way to find thresholds; FP32 first."""
    rows = [
        [
            f"`{run['case']}`" if "tensors" in run else run["case"],
            f"{run['cosine_mean']:.4f}",
            f"{run['cosine_min']:.4f}",
            f"{run['top1']:.1f} % of {run['images']}",
            f"{run['widened']} of {run['tensors']}" if run.get("widened") else "",
            f"{run['shifted']} of {run['tensors']}" if run.get("shifted") else "",
            f"{run['left_out']} of {run['tensors']}" if run.get("left_out") else "",
            f"{run['calibration_cpu_seconds']:.0f} s" if "tensors" in run else "",
        ]
        for run in record["runs"]
    ]
    titles = (
        "calibration",
        "cosine, mean",
        "cosine, worst",
        "top-1 of digits",
        "wider than entropy",
        "shifted",
        "left in FP16",
        "calibration, CPU",
    )
    return markdown(titles, rows)


def trained_gpu_table(record: Mapping[str, Any]) -> str:
    """What trained models lose and gain with INT8 on a GPU."""
    rows = []
    for run in sorted(record["runs"], key=lambda run: (run["case"], run["left_out"])):
        fp16, int8 = (run["images_per_second"].get(precision) for precision in ("fp16", "int8"))
        top1 = (
            f"{run['top1']:.1f} % (FP32 {run['top1_jax']:.1f} %) of {run['images']}"
            if run.get("top1") is not None
            else ""
        )
        given = [word.removeprefix("--config.") for word in run["options"] if "timing_cache" not in word]
        settings = ", ".join(f"`{word.removeprefix('calibration.')}`" for word in given)
        layers = run["engines"]["int8"]["int8_layers"]
        cells = [run["outputs"], settings, f"{run['left_out']}", f"{layers}", f"{run['batch']}"]
        cells += [f"{fp16:,.0f}".replace(",", " "), f"{int8:,.0f}".replace(",", " ")]
        cells += [f"{int8 / fp16:.2f}×", f"{run['cosine']:.4f}", top1, "yes" if run["passed"] else "**no**"]
        rows.append([*cells, run["recommended"]])
    titles = (
        "judged",
        "settings",
        "left in FP16 for their error",
        "layers in INT8",
        "batch",
        "FP16, images/s",
        "INT8, images/s",
        "INT8 / FP16",
    )
    return markdown((*titles, "worst cosine", "top-1", "passed", "recommended"), rows)


TABLES: dict[str, tuple[Callable[[Mapping[str, Any]], str], str]] = {
    "convert": (convert_table, "convert"),
    "towers": (towers_table, "towers"),
    "growth": (growth_table, "convert"),
    "extras": (extras_table, "convert"),
    "calibrate": (calibrate_table, "calibrate"),
    "int8-trained": (trained_table, "int8-trained"),
    "h200-int8": (int8_table, "h200-tests-digits"),
    "int8-fused": (int8_fused_table, "int8-fused"),
    "fp16-kernels": (side_by_side, "fp16-kernels-b16-384"),
    "int8-gpu-trained": (trained_gpu_table, "int8-gpu-trained"),
    "serve": (serve_table, "serve-20*"),
    "serve-accidents": (accidents_table, "serve-accidents"),
    "batch": (batch_table, "batch"),
}


if __name__ == "__main__":
    app.run(main)
