"""The table of INT8 engines side by side with FP16 ones, JAX and PyTorch, as Markdown."""

from collections.abc import Mapping
from typing import Any

from gpu.side_by_side import best, rate
from markdown_table import markdown

from vit_convert.engine.measure.benchmark import RESIDENT

Run = Mapping[str, Any]


def int8_fused_table(record: Run) -> str:
    """Lays out what `h200.py --precisions=fp16,int8` wrote: images and results in GPU memory, one stream, runs queued
    ahead.

    Args:
        record: of one run, all of a model on one card.

    Returns:
        A row for each model and batch size. INT8 that missed its check says so.
    """
    rows = []
    for model in record["models"].values():
        resident = [
            row
            for row in model.get("engine", {}).get("rows", [])
            if row["transfers"] == RESIDENT and row["streams"] == 1
        ]
        jax, torch = (model.get(name, {}).get("rows", []) for name in ("jax", "torch"))
        proof = model.get("verify", {}).get("engines", {}).get("int8", {})
        for batch in sorted({row["batch"] for row in resident}):
            fp16, int8 = (best(resident, batch, precision=precision) for precision in ("fp16", "int8"))
            theirs = [best(jax, batch, precision="fp32"), best(jax, batch, precision="bf16")]
            theirs += [best(torch, batch, mode=mode) for mode in ("reduce-overhead", "max-autotune")]
            compiled = max((row for row in theirs[2:] if row), key=lambda row: row["images_per_second"], default=None)
            others = (fp16, theirs[0], theirs[1], compiled)
            found = [row for row in (fp16, int8, *theirs) if row]
            noise = max((row["noise_percent"] for row in found if row.get("noise_percent") is not None), default=None)
            cells = [
                f"{model['variant']} at {model['image_size']}",
                str(batch),
                *(_cell(row) for row in (fp16, int8, *theirs)),
            ]
            cells += [_ratio(int8, other) for other in others]
            cells += [
                f"{proof['cosine']:.4f}" + ("" if proof["passed"] else ", **missed**") if proof else "not verified"
            ]
            rows.append([*cells, "" if noise is None else f"{noise:.1f}"])
    peers = ("JAX fp32", "JAX bf16, its best", "torch reduce-overhead", "torch max-autotune")
    ratios = ("INT8 / FP16", "/ JAX fp32", "/ JAX bf16", "/ torch's best")
    return markdown(("model", "batch", "ours, FP16", "ours, INT8", *peers, *ratios, "INT8's cosine", "±%"), rows)


def _cell(row: Run | None) -> str:
    return "–" if row is None else rate(row["images_per_second"])


def _ratio(mine: Run | None, other: Run | None) -> str:
    return "–" if mine is None or other is None else f"{mine['images_per_second'] / other['images_per_second']:.2f}×"
