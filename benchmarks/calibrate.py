"""INT8 calibration and quantization of one graph: ours against onnxruntime's quantize_static(Entropy), each in a fresh
process.

Both take the same fp32 graph, the same seeded images, the same batch size and the same linears, and end with a Q/DQ
graph on disk.

    python benchmarks/calibrate.py --checkpoint=B16.npz --workdir=/tmp/bench

On a GPU host with onnxruntime-gpu, ours on the GPU against ours on the CPU, with how far their thresholds differ:

    python benchmarks/calibrate.py --checkpoint=B16.npz --workdir=/tmp/bench --sides=vit_convert,vit_convert_cuda
    --output=benchmarks/results/calibrate-gpu-<date>.json
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import app, flags
from graphs import exported
from process import run
from results import RESULTS, ROOT, Results, first_paragraph, today

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A ViT-B/16 checkpoint (python -m vit_convert.families.random writes one).", required=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Scratch folder, a few GiB.", required=True)
_SIDES = flags.DEFINE_list("sides", ["vit_convert", "onnxruntime"], "Of vit_convert, vit_convert_cuda, onnxruntime.")
_IMAGES = flags.DEFINE_list("images", ["64", "512"], "Numbers of images for ours.")
_PEER_IMAGES = flags.DEFINE_list(
    "peer_images", ["64"], "Numbers of images for onnxruntime, which keeps all their activations in memory."
)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Images a call, for both.")
_REPEATS = flags.DEFINE_integer("repeats", 2, "Pairs of runs.")
_OUTPUT = flags.DEFINE_string(
    "output", "", "Result file; by default benchmarks/results/calibrate-<date>.json, which is continued."
)


def ours(graph: str, images: int, batch_size: int, output: str, *, device: str = "cpu") -> dict[str, Any]:
    """Our calibration, Q/DQ and saving."""
    import onnx_ir as ir

    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.quantize.calibrate import calibrate
    from vit_convert.quantize.placement import place
    from vit_convert.quantize.qdq import quantize

    model = ir.load(graph)
    placement = place(model)
    options: Any = {"batch_size": batch_size, "device": device}
    calibration = calibrate(graph, _images(images), _normalize, placement.tensors(), **options)
    save_onnx(quantize(model, calibration, placement.sites, target="rtx"), output)
    calibration.save(_ranges(output))
    return {"tensors": len(calibration.thresholds), "device": calibration.device}


def ours_on_cuda(graph: str, images: int, batch_size: int, output: str) -> dict[str, Any]:
    """The same with the graph on the GPU."""
    return ours(graph, images, batch_size, output, device="cuda")


def onnxruntime(graph: str, images: int, batch_size: int, output: str) -> dict[str, float]:
    """onnxruntime's quantize_static, for the linears that ours quantizes."""
    import onnx_ir as ir
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    from vit_convert.quantize.placement import place

    model = ir.load(graph)
    sites = place(model).sites
    readers = {
        node.name
        for node in model.graph
        for value in node.inputs
        if value is not None and value.name in {site.weight for site in sites}
    }

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(range(0, images, batch_size))
            self._images = _images(images)

        def get_next(self):
            start = next(self._batches, None)
            return None if start is None else {"images": _normalize(self._images[start : start + batch_size])}

    quantize_static(
        graph,
        output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.Entropy,
        nodes_to_quantize=sorted(readers),
        op_types_to_quantize=["MatMul", "Gemm"],
        use_external_data_format=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return {"tensors": len(readers)}


def _images(count):
    from vit_convert.images.noise import seeded_noise

    return seeded_noise(count, 224, 224)


def _normalize(batch):
    import numpy as np

    return batch.astype(np.float32) / 127.5 - 1


def _ranges(output: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(output).with_suffix(".json")


def _largest_difference(one: pathlib.Path, other: pathlib.Path) -> float:
    """Of the thresholds of two calibrations, as a share of each."""
    a, b = (json.loads(path.read_text())["thresholds"] for path in (one, other))
    return max(abs(a[name] / b[name] - 1) for name in a)


_WORKERS = {"vit_convert": ours, "vit_convert_cuda": ours_on_cuda, "onnxruntime": onnxruntime}


def main(argv: list[str]) -> None:
    """Measures both sides in turn."""
    workdir = pathlib.Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    graph = _graph(workdir)
    results = Results(_OUTPUT.value or RESULTS / f"calibrate-{today()}.json", first_paragraph(__doc__))
    numbers = {side: _PEER_IMAGES.value if side == "onnxruntime" else _IMAGES.value for side in _SIDES.value}
    cases = [(side, int(number)) for side, found in numbers.items() for number in found]
    for repeat in range(_REPEATS.value):
        for side, images in cases:
            key = {"side": side, "images": images, "repeat": repeat, "batch_size": _BATCH.value}
            if results.has(**key):
                continue
            output = workdir / f"{side}-{images}.onnx"
            worker = [sys.executable, __file__, "worker", side, str(graph), str(images), str(_BATCH.value), str(output)]
            taken = run(worker, cwd=ROOT, errors=workdir / "errors.txt")
            found = (
                json.loads(taken.output.splitlines()[-1])
                if taken.exit_code == 0
                else {"failed": _last_line(workdir / "errors.txt")}
            )
            here = _ranges(workdir / f"vit_convert-{images}.onnx")
            if side == "vit_convert_cuda" and "failed" not in found and here.exists():
                found["largest_difference_of_thresholds"] = _largest_difference(_ranges(output), here)
            values = {name: value for name, value in dataclasses.asdict(taken).items() if name != "output"}
            results.add(**key, **values, wall_seconds_per_image=round(taken.wall_seconds / images, 4), **found)
            print(results.record["runs"][-1], flush=True)


def _graph(workdir: pathlib.Path) -> pathlib.Path:
    return exported(workdir, "calibrated", f"--config.checkpoint={_CHECKPOINT.value}")


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text().strip().splitlines()
    return lines[-1] if lines else "killed"


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        side, graph, images, batch_size, output = sys.argv[2:]
        print(json.dumps(_WORKERS[side](graph, int(images), int(batch_size), output)))
    else:
        app.run(main)
