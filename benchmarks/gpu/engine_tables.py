"""Tables of what the engine's own commands and the GPU tests found, as Markdown."""

from collections.abc import Mapping
from typing import Any

from gpu.side_by_side import rate
from gpu.side_by_side import table as side_by_side
from markdown_table import markdown

from vit_convert.engine.winners import DEFAULT

Run = Mapping[str, Any]


def h200_table(record: Run) -> str:
    """GPU results: side by side where the file holds several roads, trials of `tune`, otherwise its rows as they are."""
    if "models" in record:
        return side_by_side(record)
    if "trials" in record:
        return tune_table(record)
    rows = record["rows"]
    columns = [key for key in rows[0] if all(isinstance(row.get(key), str | int | float) and len(str(row[key])) <= 40 for row in rows)]
    return markdown([column.replace("_", " ") for column in columns], [[_cell(row[column]) for column in columns] for row in rows])


def tune_table(record: Run) -> str:
    """Every engine that `tune` timed; of a range the share of what the fixed profile of the same spelling and batch has."""
    rows = [(trial, row) for trial in record["trials"] for row in trial.get("rows", ())]
    fixed = {_graph(trial, row): row["images_per_second"] for trial, row in rows if trial["sizes"]["min"] == trial["sizes"]["max"]}
    cells = [
        [
            "`model.onnx`" if trial["spelling"] == DEFAULT else trial["spelling"],
            trial["profile"],
            trial["precision"],
            f"{row['batch']}",
            rate(row["images_per_second"]),
            f"{100 * row['images_per_second'] / fixed[_graph(trial, row)]:.1f} %" if _graph(trial, row) in fixed else "",
            trial["fused_attention"]["text"] if trial["fused_attention"] else "unknown",
            f"{trial['cosine']:.6f}" + ("" if trial["passed"] else ", **missed**"),
            "" if row["noise_percent"] is None else f"{row['noise_percent']:.1f}",
        ]
        for trial, row in rows
    ]
    header = ("spelling", "profile", "precision", "batch", "throughput", "of the fixed profile", "fused attention", "cosine to JAX", "±%")
    return markdown(header, cells)


def _graph(trial: Run, row: Run) -> tuple[str, str, int]:
    return trial["spelling"], trial["precision"], row["batch"]


def int8_table(record: Run) -> str:
    """What the GPU tests found of INT8 engines."""
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
