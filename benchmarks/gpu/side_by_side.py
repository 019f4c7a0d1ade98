"""The table of side-by-side runs, as Markdown; docs/benchmarks.md has it.

python benchmarks/gpu/side_by_side.py benchmarks/results/h200-b16-*.json
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from vit_convert.engine.measure.benchmark import RESIDENT

VERSIONS = ("tensorrt", "jax", "torch", "timm")  # that the parts of a side-by-side run record, each those of its own


def best(rows: Iterable[Mapping[str, Any]], batch: int, **wanted: Any) -> Mapping[str, Any] | None:
    """The fastest row of a batch size.

    Args:
        rows: measured ones; those that failed are passed over.
        batch: images per run.
        **wanted: values that keys of the row must have.

    Returns:
        The row, None where there is none.
    """
    return max(_fitting(rows, batch, wanted), key=lambda row: row["images_per_second"], default=None)


def fastest_answer(rows: Iterable[Mapping[str, Any]], batch: int, **wanted: Any) -> Mapping[str, Any] | None:
    """The row of lowest median latency of a batch size; arguments as for `best`."""
    return min(_fitting(rows, batch, wanted), key=lambda row: row["p50_ms"], default=None)


def _fitting(rows: Iterable[Mapping[str, Any]], batch: int, wanted: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        r
        for r in rows
        if r["batch"] == batch and "failed" not in r and all(r.get(key) == value for key, value in wanted.items())
    ]


def table(results: Mapping[str, Any], precision: str = "fp16") -> str:
    """Lays a side-by-side run out.

    Args:
        results: what `h200.py` writes.
        precision: of our engines.

    Returns:
        A Markdown table: images or texts/s with runs queued ahead on one stream and, at batch 1, the median latency;
        inputs and results stay in GPU memory. The column "host" is the share of our best throughput, on as many streams
        as were measured, that is left with images from page-locked host memory and results back to it; "±%" the largest
        difference in throughput between two passes of anything in the row.
    """
    peers = ("JAX jit, fp32", "JAX jit, its best", "torch.compile, timm or transformers, fp16")
    header = [
        "model",
        "batch",
        f"ours, TensorRT {precision}",
        *peers,
        "ours / JAX fp32",
        "ours / JAX best",
        "ours / torch",
        "host",
        "±%",
    ]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for model in results["models"].values():
        ours = [row for row in model.get("engine", {}).get("rows", []) if row["precision"] == precision]
        jax_rows, torch_rows = (model.get(name, {}).get("rows", []) for name in ("jax", "torch"))
        resident = [row for row in ours if row["transfers"] == RESIDENT]
        from_host = [row for row in ours if row["transfers"] != RESIDENT]
        for batch in sorted({row["batch"] for row in (*resident, *jax_rows, *torch_rows)}):
            pick = fastest_answer if batch == 1 else best
            mine = pick(resident, batch, streams=1)  # as the peers
            others = [pick(jax_rows, batch, precision="fp32"), pick(jax_rows, batch), pick(torch_rows, batch)]
            found = [mine, *others]
            shared = best(from_host, batch), best(resident, batch)
            noise = max(
                (row["noise_percent"] for row in (*found, *shared) if row and row.get("noise_percent") is not None),
                default=None,
            )
            cells = [_name(model), str(batch)]
            cells += [_cell(row, batch, plain=row is others[0], unit=_unit(model)) for row in found]
            cells += [_ratio(mine, other, batch) for other in others]
            cells += [_share(*shared), "" if noise is None else f"{noise:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def merge(runs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Puts several side-by-side runs together: of each model, input and batch, what the latest run with our engine has.

    Args:
        runs: what `h200.py` wrote, by name; results of another kind are passed over.

    Returns:
        One run that `table` takes, its fastest models first, and the names of the runs in it.
    """
    newest: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    side_by_side = {name: run for name, run in runs.items() if "models" in run}
    for name, run in sorted(side_by_side.items(), key=lambda item: item[1]["date"]):
        for model in run["models"].values():
            for batch in {row["batch"] for row in model.get("engine", {}).get("rows", [])}:
                newest[_name(model), batch] = (name, _of_batch(model, batch))
    rates: dict[str, float] = {}
    for (about, _), (_, model) in newest.items():
        fastest = max(row["images_per_second"] for row in model["engine"]["rows"])
        rates[about] = max(fastest, rates.get(about, 0.0))
    keys = sorted(newest, key=lambda key: (-rates[key[0]], key[1]))
    return {"models": {f"{about} {batch}": newest[about, batch][1] for about, batch in keys}}, sorted(
        {name for name, _ in newest.values()}
    )


def _name(model: Mapping[str, Any]) -> str:
    """ "B/16 at 224", "B/16 at 224, uint8", "CLIP-B/32:txt"; earlier runs, which do not say what the engine takes, were
    of float32."""
    if _unit(model) == "texts":
        return str(model["variant"])
    taken = model.get("input", "float32")
    return f"{model['variant']} at {model['image_size']}" + ("" if taken == "float32" else f", {taken}")


def _unit(model: Mapping[str, Any]) -> str:
    """What a model takes: "images", or "texts"."""
    return "texts" if str(model["variant"]).endswith(":txt") else "images"


def _of_batch(model: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """A model's entry with the rows of one batch size."""
    parts = {name: model[name] for name in ("engine", "jax", "torch") if name in model}
    return {
        **model,
        **{
            name: {**part, "rows": [row for row in part.get("rows", []) if row["batch"] == batch]}
            for name, part in parts.items()
        },
    }


def spaced(value: float) -> str:
    """ "14 679"."""
    return f"{value:,.0f}".replace(",", " ")


def rate(images_per_second: float, unit: str = "images") -> str:
    """ "14 679 images/s"."""
    return f"{spaced(images_per_second)} {unit}/s"


def _cell(row: Mapping[str, Any] | None, batch: int, *, plain: bool = False, unit: str = "images") -> str:
    if row is None:
        return "–"
    how = f" ({row['precision']}, {row['attention']})" if row.get("attention") and not plain else ""
    return (f"{row['p50_ms']:.3f} ms" if batch == 1 else rate(row["images_per_second"], unit)) + how


def _ratio(mine: Mapping[str, Any] | None, other: Mapping[str, Any] | None, batch: int) -> str:
    if mine is None or other is None:
        return "–"
    faster = other["p50_ms"] / mine["p50_ms"] if batch == 1 else mine["images_per_second"] / other["images_per_second"]
    return f"{faster:.2f}×"


def _share(part: Mapping[str, Any] | None, whole: Mapping[str, Any] | None) -> str:
    return (
        "–"
        if part is None or whole is None
        else f"{100 * part['images_per_second'] / whole['images_per_second']:.0f} %"
    )


if __name__ == "__main__":
    print(table(merge({name: json.loads(pathlib.Path(name).read_text()) for name in sys.argv[1:]})[0]))
