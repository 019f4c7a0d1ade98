"""What a JAX team runs today: `jax.jit` of the same Flax model and weights, in fp32 and bf16, with plain and with
cuDNN's attention.

python benchmarks/gpu/jax_peer.py --checkpoint=B16.npz --batches=1,64,256 --output=jax-b16.json

Images stay in GPU memory. fp32 runs at JAX's default matmul precision. With JAX_COMPILATION_CACHE_DIR set, a run with
--compile_only (and an output of its own) leaves there what the measured run needs.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import loops
from absl import app, flags
from flax import linen, traverse_util
from flax_modules import MODULES

from vit_convert.families.load import load_checkpoint

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The checkpoint of the model to time.", required=True)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Height and width in pixels.")
_BATCHES = flags.DEFINE_list("batches", ["1", "64", "256"], "Images per call.")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Of one pass over one row.")
_WARMUP = flags.DEFINE_float("warmup", 0.3, "Seconds before the first pass.")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Run each row once, to fill the compilation cache.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file, continued if it is there.", required=True)

_DTYPES = flags.DEFINE_list("dtypes", ["fp32", "bf16"], "Types of weights and images.")

_ATTENTIONS = {"fp32": ("plain",), "bf16": ("plain", "cudnn")}  # cuDNN's attention has no fp32
_PLAIN = {"fp32": ("plain",), "bf16": ("plain",)}  # of families that do not call linen's attention
_PLAIN_ATTENTION = linen.MultiHeadDotProductAttention


# each [B, S, heads, depth]
def _cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array, **_: Any) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def main(argv: Sequence[str]) -> None:
    del argv
    size = (_IMAGE_SIZE.value, _IMAGE_SIZE.value)
    text = _CHECKPOINT.value.endswith(":txt")
    checkpoint = load_checkpoint(_CHECKPOINT.value, image_size=None if text else size)
    shape = (checkpoint.architecture.length,) if text else (*size, 3)
    device = jax.devices()[0]
    about = {
        "jax": jax.__version__,
        "device": device.device_kind,
        "image_size": list(size),
        "variant": checkpoint.architecture.variant,
    }
    timing = {"seconds": _SECONDS.value, "warmup_seconds": _WARMUP.value}
    results = loops.Results(_OUTPUT.value, framework="jax", **about, **timing)
    family = checkpoint.family.name
    model = MODULES[family](checkpoint.architecture)
    # Of towers those that no mask limits call linen's attention; a text tower's inputs are tokens.
    own = family in ("vit", "hybrid") or (family in ("siglip", "clip") and checkpoint.attentions)
    attentions = _ATTENTIONS if own else _PLAIN
    for dtype_name, attention in ((dtype, attention) for dtype in _DTYPES.value for attention in attentions[dtype]):
        dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[dtype_name]
        leaves = {name: jnp.asarray(leaf, dtype) for name, leaf in checkpoint.params.items()}
        params = traverse_util.unflatten_dict(leaves, sep="/")
        # The model takes the class from flax.linen when it is called, so this alone swaps the attention function.
        swapped = functools.partial(_PLAIN_ATTENTION, attention_fn=_cudnn_attention)
        linen.MultiHeadDotProductAttention = _PLAIN_ATTENTION if attention == "plain" else swapped
        run = jax.jit(lambda variables, images: model.apply({"params": variables}, images)[0])
        for batch in (int(word) for word in _BATCHES.value):
            key = {"precision": dtype_name, "attention": attention, "batch": batch}
            results.add(key, functools.partial(_time, run, params, (batch, *shape), jnp.int32 if text else dtype))


def _time(run: Any, params: Any, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    if dtype == jnp.int32:  # tokens, which any vocabulary has
        images = jax.random.randint(jax.random.key(0), shape, 0, 90, dtype)
    else:
        images = jax.random.uniform(jax.random.key(0), shape, dtype, -1, 1)
    wait = jax.block_until_ready
    started = time.perf_counter()
    wait(run(params, images))
    if _COMPILE_ONLY.value:
        return {"first_call_seconds": round(time.perf_counter() - started, 2)}
    return loops.measure(
        lambda: run(params, images), lambda result: wait(result), shape[0], _SECONDS.value, _WARMUP.value
    )


if __name__ == "__main__":
    app.run(main)
