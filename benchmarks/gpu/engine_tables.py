"""Markdown tables of the results of the engine's own commands, the GPU tests and the profiler."""

import re
from collections.abc import Mapping
from typing import Any

from gpu.side_by_side import rate, spaced
from gpu.side_by_side import table as side_by_side
from markdown_table import markdown

from vit_convert.engine.measure.benchmark import RESIDENT
from vit_convert.engine.tune.winners import DEFAULT

Run = Mapping[str, Any]


def h200_table(record: Run) -> str:
    """GPU results: several tools side by side, trials of `tune`, kernels, or a benchmark; of any other file its rows as
    they are."""
    for key, table in (
        ("models", side_by_side),
        ("trials", tune_table),
        ("kernels", kernel_table),
        ("recommended", precision_table),
    ):
        if key in record:
            return table(record)
    rows = record["rows"]
    columns = [
        key
        for key in rows[0]
        if all(isinstance(row.get(key), str | int | float) and len(str(row[key])) <= 40 for row in rows)
    ]
    return markdown(
        [column.replace("_", " ") for column in columns], [[_cell(row[column]) for column in columns] for row in rows]
    )


def tune_table(record: Run) -> str:
    """Every engine that `tune` timed; of a range the share of what the fixed profile of the same lowering and batch
    has."""
    rows = [(trial, row) for trial in record["trials"] for row in trial.get("rows", ())]
    fixed = {
        _graph(trial, row): row["images_per_second"]
        for trial, row in rows
        if trial["sizes"]["min"] == trial["sizes"]["max"]
    }
    cells = [
        [
            "`model.onnx`" if _lowering(trial) == DEFAULT else _lowering(trial),
            trial["profile"],
            trial["precision"],
            f"{row['batch']}",
            rate(row["images_per_second"]),
            f"{100 * row['images_per_second'] / fixed[_graph(trial, row)]:.1f} %"
            if _graph(trial, row) in fixed
            else "",
            trial["fused_attention"]["text"] if trial["fused_attention"] else "unknown",
            f"{trial['cosine']:.6f}" + ("" if trial["passed"] else ", **missed**"),
            _noise(row),
        ]
        for trial, row in rows
    ]
    header = (
        "lowering",
        "profile",
        "precision",
        "batch",
        "throughput",
        "of the fixed profile",
        "fused attention",
        "cosine to JAX",
        "±%",
    )
    return markdown(header, cells)


def _graph(trial: Run, row: Run) -> tuple[str, str, int]:
    return _lowering(trial), trial["precision"], row["batch"]


_LEAST_PERCENT = 2.0
# What follows the tile in the names of matrix products, and the template arguments of the others.
_ENDING = re.compile(r"(_cgasize|_warpgroupsize|_stage|<).*")


def kernel_table(record: Run) -> str:
    """The kernels that take more than a fiftieth of a run, the others combined, and the whole run."""
    rows = []
    shown = [row for row in record["kernels"] if row["share_percent"] >= _LEAST_PERCENT]
    for row in shown:
        shares = [_percent(row.get(key)) for key in ("tensor_percent", "l2_percent", "dram_percent")]
        moved = f"{row['dram_mib']:.0f} MiB" if "dram_mib" in row else ""
        cells = [f"{row['launches']}", f"{row['mean_us']:.0f} µs", f"{row['share_percent']:.1f} %", *shares, moved]
        rows.append([f"`{_ENDING.sub('', row['name'].replace('<unnamed>::', ''))}`", *cells])
    others = [row for row in record["kernels"] if row not in shown]
    share = f"{sum(row['share_percent'] for row in others):.1f} %"
    rows.append(["the others", f"{sum(row['launches'] for row in others)}", "", share, "", "", "", ""])
    for name, key in (("all of them, one by one", "kernels_us"), ("a run among runs, as a CUDA graph", "run_us")):
        rows.append([name, "", f"{spaced(record[key])} µs", "", "", "", "", ""])
    return markdown(
        ("kernel", "launches", "each", "share", "tensor cores busy", "L2", "GPU memory", "moved, each"), rows
    )


def _noise(row: Run) -> str:
    return "" if row["noise_percent"] is None else f"{row['noise_percent']:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def precision_table(record: Run) -> str:
    """The precisions of one benchmark side by side, with images and results in GPU memory."""
    rows = [row for row in record["rows"] if row["transfers"] == RESIDENT]
    cells = [
        [
            row["precision"],
            f"`{row['graph']}`",
            f"{row['batch']}",
            f"{row['streams']}",
            f"{row['int8_layers']}" if "int8_layers" in row else "",
            row.get("fused_attention", "unknown"),
            rate(row["images_per_second"]),
            _noise(row),
            "yes" if row["precision"] == record["recommended"]["precision"] else "",
        ]
        for row in rows
    ]
    header = (
        "precision",
        "graph",
        "batch",
        "streams",
        "layers in INT8",
        "fused attention",
        "throughput",
        "±%",
        "recommended",
    )
    return markdown(header, cells)


def int8_table(record: Run) -> str:
    """The GPU tests' results for INT8 engines."""
    rows = []
    for road, test in (("explicit Q/DQ", "test_int8_by_qdq"), ("`IInt8EntropyCalibrator2`", "test_calibrator")):
        found = record["tests"][test]["int8"]
        rates = found["images_per_second"]
        rows.append(
            [
                road,
                f"{found['int8_layers']}" + (f" of {sum(found['products'].values())}" if "products" in found else ""),
                f"{found['top1']:.2f} %",
                rate(rates["int8"]),
                rate(rates["fp16"]),
                f"{rates['int8'] / rates['fp16']:.2f}×",
                found["recommended"]["precision"],
            ]
        )
    return markdown(("INT8 by", "layers in INT8", "top-1", "INT8", "FP16", "INT8 / FP16", "recommended"), rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _lowering(trial: dict[str, Any]) -> str:
    return trial.get("lowering") or trial["spelling"]  # as results before 2026-11-27 call it
