"""What a PyTorch team runs today: `torch.compile` of timm's model, or of transformers' tower, in fp16, with the
activation of the same checkpoints.

python benchmarks/gpu/torch_peer.py --variant=B/16 --batches=1,64,256 --output=torch-b16.json

Images stay in GPU memory; weights are random. A run with --compile_only (and an output of its own) leaves what the
measured run needs in TORCHINDUCTOR_CACHE_DIR: graphs, Triton's kernels and what its tuning found; torch keeps all of
them by default.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import loops
import timm
import torch
from absl import app, flags
from timm_models import create
from tower_models import create as create_tower
from tower_models import is_tower

_VARIANT = flags.DEFINE_string(
    "variant", None, "B/16, Mixer-B/16, R26+ViT-S/32, Swin-T/7, CLIP-B/32:img or SigLIP-B/16:txt.", required=True
)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Height and width in pixels.")
_BATCHES = flags.DEFINE_list("batches", ["1", "64", "256"], "Images per call.")
_MODES = flags.DEFINE_list("modes", ["reduce-overhead"], "torch.compile modes; max-autotune compiles for minutes.")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Of one pass over one row.")
_WARMUP = flags.DEFINE_float("warmup", 0.3, "Seconds before the first pass.")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Run each row three times, to fill the caches.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file, continued if it is there.", required=True)


def main(argv: Sequence[str]) -> None:
    del argv
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": device_name,
        "image_size": [_IMAGE_SIZE.value] * 2,
    }
    timing = {"seconds": _SECONDS.value, "warmup_seconds": _WARMUP.value}
    results = loops.Results(_OUTPUT.value, framework="torch", variant=_VARIANT.value, **about, **timing)
    torch.manual_seed(0)
    if is_tower(_VARIANT.value):
        model, inputs = create_tower(_VARIANT.value, _IMAGE_SIZE.value)
    else:
        model, inputs = create(_VARIANT.value, _IMAGE_SIZE.value), _images
    model = model.half().to(device)
    for mode in _MODES.value:
        for batch in (int(word) for word in _BATCHES.value):
            key = {"precision": "fp16", "mode": mode, "batch": batch}
            results.add(key, functools.partial(_time, model, mode, _half(inputs(batch)).to(device)))


def _images(batch: int) -> torch.Tensor:
    return 2 * torch.rand(batch, 3, _IMAGE_SIZE.value, _IMAGE_SIZE.value) - 1


def _half(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.half() if inputs.is_floating_point() else inputs


def _time(model: torch.nn.Module, mode: str, images: torch.Tensor) -> dict[str, Any]:
    torch.compiler.reset()  # one static shape each, as each of our profiles has
    compiled = torch.compile(model, mode=mode, dynamic=False)
    device, batch = images.device, len(images)

    def call() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        compiled(images)
        return _mark(device)

    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(3):  # compiles, warms up, records the CUDA graph
            _wait(call())
        if _COMPILE_ONLY.value:
            return {"first_calls_seconds": round(time.perf_counter() - started, 2)}
        return loops.measure(call, _wait, batch, _SECONDS.value, _WARMUP.value)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _wait(event: Any) -> None:
    if event is not None:
        event.synchronize()


if __name__ == "__main__":
    app.run(main)
