"""The table of a side-by-side run, as Markdown; the README's copy is made by this.

python benchmarks/gpu/side_by_side.py benchmarks/results/h200-fp16.json
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def best(rows: Iterable[Mapping[str, Any]], batch: int, **wanted: Any) -> Mapping[str, Any] | None:
    """The fastest row of a batch size.

    Args:
        rows: measured ones; those that failed are passed over.
        batch: images per run.
        **wanted: values that keys of the row must have.

    Returns:
        The row, None where there is none.
    """
    fitting = [r for r in rows if r["batch"] == batch and "failed" not in r and all(r.get(key) == value for key, value in wanted.items())]
    return max(fitting, key=lambda row: row["images_per_second"], default=None)


def fastest_answer(rows: Iterable[Mapping[str, Any]], batch: int, **wanted: Any) -> Mapping[str, Any] | None:
    """The row of lowest median latency of a batch size; arguments as for `best`."""
    fitting = [r for r in rows if r["batch"] == batch and "failed" not in r and all(r.get(key) == value for key, value in wanted.items())]
    return min(fitting, key=lambda row: row["p50_ms"], default=None)


def table(results: Mapping[str, Any], precision: str = "fp16") -> str:
    """Lays a side-by-side run out.

    Args:
        results: what `h200.py` writes.
        precision: of our engines.

    Returns:
        A Markdown table: images/s with runs queued ahead and, at batch 1, the median latency; images and results stay in GPU memory.
    """
    lines = [
        f"| model | batch | ours, TensorRT {precision} | JAX jit, its best | torch.compile, timm, fp16 | ours / JAX | ours / torch | ±% |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in results["models"].values():
        ours = model.get("engine", {}).get("rows", [])
        jax_rows, torch_rows = (model.get(name, {}).get("rows", []) for name in ("jax", "torch"))
        resident = [row for row in ours if row["precision"] == precision and row["transfers"].startswith("none")]
        for batch in sorted({row["batch"] for row in (*resident, *jax_rows, *torch_rows)}):
            pick = fastest_answer if batch == 1 else best
            found = [pick(rows, batch) for rows in (resident, jax_rows, torch_rows)]
            mine, others = found[0], found[1:]
            ratios = [_ratio(mine, other, batch) for other in others]
            noise = max((row["noise_percent"] for row in found if row and row.get("noise_percent") is not None), default=None)
            name = f"{model['variant']} at {model['image_size']}"
            cells = [name, str(batch), *(_cell(row, batch) for row in found), *ratios, "" if noise is None else f"{noise:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None, batch: int) -> str:
    if row is None:
        return "–"
    detail = row.get("attention") or row.get("mode") or ""
    how = f" ({row['precision']}, {detail})" if row.get("attention") else ""
    return (f"{row['p50_ms']:.3f} ms" if batch == 1 else f"{row['images_per_second']:,.0f} images/s".replace(",", " ")) + how


def _ratio(mine: Mapping[str, Any] | None, other: Mapping[str, Any] | None, batch: int) -> str:
    if mine is None or other is None:
        return "–"
    faster = other["p50_ms"] / mine["p50_ms"] if batch == 1 else mine["images_per_second"] / other["images_per_second"]
    return f"{faster:.2f}×"


if __name__ == "__main__":
    print(table(json.loads(pathlib.Path(sys.argv[1]).read_text())))
