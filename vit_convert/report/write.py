"""report.json: everything that was found, in one file, with units in the keys."""

import shlex
import time
from collections.abc import Sequence
from typing import Any

from vit_convert.core.bundle import read_json, write_json
from vit_convert.core.manifest import FINISHED
from vit_convert.core.pipeline import Context
from vit_convert.core.proof import recommend_unmeasured
from vit_convert.core.version import __version__

_CHECKPOINT_KEYS = (
    "path",
    "sha256",
    "family",
    "variant",
    "model",
    "output",
    "layout",
    "num_params",
    "image_size",
    "image_range",
    "num_classes",
    "warnings",
    "preprocess",
)
# what engine/commands.py's add_to_report merges
_GPU_HOST_KEYS = ("engine", "engines", "verify", "benchmark", "recommended")
_CALIBRATION_KEYS = (
    "method",
    "num_images",
    "source",
    "num_tensors",
    "num_clipped",
    "widened",
    "left_out",
    "shifted",
    "smoothed",
)
_ONNX_KEYS = ("opset", "target", "num_nodes", "nodes_traced", "nodes_per_block", "num_shapes", "bytes", "rules")


def write_report(context: Context, rows: Sequence[dict[str, Any]], command: Sequence[str]) -> dict[str, Any]:
    """Gathers what the stages returned and writes `report.json`.

    Args:
        context: of the conversion, finished or failed.
        rows: of the pipeline, one per stage.
        command: the command line.

    Returns:
        The report.
    """
    results = context.results
    checks = [results["check"]] if results.get("check") else []
    checks += results.get("quantize", {}).get("checks", {}).values()
    engines = results.get("build", {}).get("engines", [])
    verdicts = results.get("quantize", {}).get("verdicts", {})
    by_precision = {check["precision"]: check for check in checks if "precision" in check}
    verified = {found["plan"]: found for found in results.get("verify", {}).get("engines", {}).values()}
    report = {
        "name": context.config.name,
        "vit_convert": __version__,
        "command": shlex.join(command),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "status": "done" if all(row["status"] in FINISHED for row in rows) else "failed",
        "checkpoint": _pick(results.get("checkpoint", {}), _CHECKPOINT_KEYS),
        "stages": [
            {key: row.get(key) for key in ("name", "status", "seconds", "peak_rss_mib", "error") if key in row}
            for row in rows
        ],
        "onnx": _pick(results.get("export", {}), _ONNX_KEYS),
        "reference": _pick(results.get("reference", {}), ("source", "num_images")),
        "check": checks[0] if checks else {},
        "checks": by_precision,
        **_pick(results.get("quantize", {}), ("max_abs_activation",)),
        "calibration": _pick(results.get("calibrate", {}), _CALIBRATION_KEYS),
        "sensitivity": results.get("sensitivity", {}),
        "plan": results.get("plan", {}),
        "accuracy": _accuracy(context, checks),
        "verdicts": verdicts,
        "engine": recommend_unmeasured(engines, verified, by_precision, verdicts, lowered=context.config.engine.tf32),
        "engines": engines,
        **_of_gpu(results),
    }
    if all(row["status"] == "fresh" for row in rows) and not engines:  # the graphs are those that a GPU host built from
        old = read_json(context.bundle.report) or {}
        report |= {key: old[key] for key in _GPU_HOST_KEYS if key in old}
    write_json(context.bundle.report, report)
    return report


def _of_gpu(results: dict[str, Any]) -> dict[str, Any]:
    """What verification and the benchmark found, where they ran on this host, and the engine that they recommend."""
    found: dict[str, Any] = {"benchmark": []}
    if verify := results.get("verify"):
        found["verify"] = verify
    if "recommended" in (benchmark := results.get("benchmark", {})):
        found |= {"benchmark": benchmark["rows"], "recommended": benchmark["recommended"]}
        found |= {"engine": engine} if (engine := benchmark.get("engine")) else {}
    return found


def _pick(source: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: source[key] for key in keys if key in source}


def _accuracy(context: Context, checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Top-1 in percent where it was measured: of JAX, and of each graph under onnxruntime."""
    accuracy = {"jax": context.results.get("reference", {}).get("top1")}
    for check in checks:
        name = {"fp32": "onnx"}.get(check.get("precision", ""), check.get("precision", ""))
        accuracy[name] = check.get("top1")
    accuracy["engine"] = context.results.get("verify", {}).get("top1")
    return {key: value for key, value in accuracy.items() if key}
