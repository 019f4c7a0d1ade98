"""Judges one ONNX file: its nodes, its bytes, and its largest error against the published Linen definition in JAX.

JAX computes at highest matmul precision, once for each checkpoint: the logits are kept beside it.

    python benchmarks/judge.py MODEL.onnx CHECKPOINT.npz
"""

import json
import pathlib
import sys

import numpy as np
from common import two_images


def main(model: str, checkpoint: str) -> None:
    """Prints one line of JSON."""
    import onnx
    import onnxruntime

    path = pathlib.Path(model)
    proto = onnx.load(model, load_external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed, images = session.get_inputs()[0], two_images()
    if feed.shape[1] == 3:
        images = images.transpose(0, 3, 1, 2)
    got = session.run(None, {feed.name: np.ascontiguousarray(images)})[0]
    expected = _expected(pathlib.Path(checkpoint))
    data = path.with_name(path.name + ".data")
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    nodes = len(proto.graph.node) + sum(len(function.node) for function in proto.functions)
    error = float(np.abs(got - expected).max())
    print(
        json.dumps({"nodes": nodes, "bytes": size, "max_abs": error, "max_rel": error / float(np.abs(expected).max())})
    )


def _expected(checkpoint: pathlib.Path) -> np.ndarray:
    kept = checkpoint.with_suffix(".logits.npy")
    if not kept.exists():
        import jax
        from vit_jax_model import load

        model, params = load(str(checkpoint))
        with jax.default_matmul_precision("highest"):
            np.save(
                kept,
                jax.jit(lambda params, images: model.apply({"params": params}, images, train=False))(
                    params, two_images()
                ),
            )
    return np.load(kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
