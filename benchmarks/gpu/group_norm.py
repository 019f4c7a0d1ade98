"""GroupNorm's kernels by themselves, for every shape of R26+ViT-S/32: time, and how many bytes a second of those that
each has to move at least, beside a copy of as many.

    python benchmarks/gpu/group_norm.py --batches=64,256 --output=benchmarks/results/h200-group-norm.json

Needs PyTorch with CUDA and the library of `python -m vit_convert.kernels`; half a minute.
"""

import ctypes
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from vit_convert import kernels
from vit_convert.core.bundle import write_json

_BATCHES = flags.DEFINE_list("batches", ["1", "64", "256"], "Images.")
_RUNS = flags.DEFINE_integer("runs", 20, "Launches that are timed together.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file.", required=True)
_FRESH_BYTES = 256 << 20  # so many bytes lie between two uses of a buffer, more than a cache holds
# (channels, side of the map, how often in the model) by what is added before the ReLU
SHAPES = {
    "none": [
        *((64, 112, 1), (64, 56, 4), (128, 56, 1), (128, 28, 3), (256, 28, 1), (256, 14, 3)),
        *((512, 14, 1), (512, 7, 3)),
    ],
    "added": [(256, 56, 1), (512, 28, 1), (1024, 14, 1), (2048, 7, 1)],
    "normalised": [(256, 56, 1), (512, 28, 1), (1024, 14, 1), (2048, 7, 1)],
}


def least_bytes(elements: int, rest: str) -> int:
    """What is read and written once, in FP16."""
    return 2 * elements * (2 if rest == "none" else 3)


def measure(torch: Any, run: Callable[[int], None], runs: int) -> float:
    """Microseconds of one call, by the GPU's clock; run(i) launches the i-th."""
    for i in range(3):
        run(i)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(runs):
        run(i)
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / runs


def main(argv: Sequence[str]) -> None:
    """Measures every shape at every batch."""
    del argv
    import torch

    library = ctypes.CDLL(str(kernels.library()))
    rows: list[dict[str, Any]] = []
    for batch in map(int, _BATCHES.value):
        workspace = torch.empty(library.vit_group_norm_workspace(batch), dtype=torch.int8, device="cuda")
        for rest, shapes in SHAPES.items():
            for channels, side, count in shapes:
                elements = batch * side * side * channels
                sets = min(8, 1 + _FRESH_BYTES // least_bytes(elements, rest))
                x, residual, out = (
                    [torch.randn(elements, device="cuda", dtype=torch.float16) for _ in range(sets)] for _ in range(3)
                )
                parameters = [torch.randn(channels, device="cuda") for _ in range(4)]

                def run(i: int) -> None:
                    tensors = [x[i % sets], residual[i % sets] if rest != "none" else None, out[i % sets]]  # noqa: B023
                    second = parameters[2:] if rest == "normalised" else (None, None)  # noqa: B023
                    tensors += [*parameters[:2], *second]  # noqa: B023
                    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
                    sizes = (1, 1, batch, side * side, channels, ctypes.c_float(1e-6))  # noqa: B023
                    room = ctypes.c_void_p(workspace.data_ptr())  # noqa: B023
                    status = library.vit_group_norm(*pointers, *sizes, room)
                    assert status == 0, status

                def copy(i: int) -> None:
                    out[i % sets].copy_(x[i % sets])  # noqa: B023

                us, copy_us = (measure(torch, each, _RUNS.value) for each in (run, copy))
                moved = least_bytes(elements, rest)
                row: dict[str, Any] = {"batch": batch, "rest": rest, "channels": channels, "side": side}
                row |= {"times_in_model": count}
                row |= {"us": round(us, 2), "bytes": moved, "tb_per_second": round(moved / us / 1e6, 3)}
                row |= {"copy_tb_per_second": round(least_bytes(elements, "none") / copy_us / 1e6, 3)}
                rows.append(row)
                print(row, flush=True)
        total = sum(row["us"] * row["times_in_model"] for row in rows if row["batch"] == batch)
        print(f"batch {batch}: {total / 1e3:.3f} ms in all", flush=True)
    about = {"command": shlex.join(sys.argv), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    write_json(_OUTPUT.value, {**about, "rows": rows})


if __name__ == "__main__":
    app.run(main)
