"""The plain recipe for one tower of a SigLIP: load the .npz into JAX, the published Linen module, jax2onnx, onnx.save,
onnxruntime against JAX on two inputs.

    python benchmarks/plain_tower.py CHECKPOINT.npz OUT.onnx image 384 [--arguments]
    python benchmarks/plain_tower.py CHECKPOINT.npz OUT.onnx text 64 [--arguments]
"""

import os
import sys

from common import Steps


def main(checkpoint: str, output: str, tower: str, size: str, option: str = "") -> None:
    """Converts and checks one tower."""
    steps = Steps()
    with steps.step("load"):
        import jax
        import numpy as np
        import onnx
        import onnxruntime
        from jax2onnx import to_onnx
        from siglip_model import load

        model, params = load(checkpoint, tower)
    side, generator = int(size), np.random.default_rng(0)
    if tower == "image":
        name, shape = "images", (side, side, 3)
        inputs = generator.uniform(-1, 1, (2, *shape)).astype(np.float32)
    else:
        name, shape = "tokens", (side,)
        inputs = generator.integers(0, model.vocabulary, (2, side)).astype(np.int32)

    def apply(inputs):
        return model.apply({"params": params}, inputs)

    with steps.step("export"):
        spec = jax.ShapeDtypeStruct(("B", *shape), inputs.dtype) if tower == "text" else ("B", *shape)
        proto = to_onnx(apply, [spec], input_names=[name], output_names=["embedding"])
    with steps.step("save"):
        onnx.save(proto, output, save_as_external_data=True, location=os.path.basename(output) + ".data")
    with steps.step("check"):
        if option == "--arguments":
            expected = np.asarray(jax.jit(lambda params, x: model.apply({"params": params}, x))(params, inputs))
        else:
            expected = np.asarray(jax.jit(apply)(inputs))
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {name: inputs})
    error = float(np.abs(got - expected).max())
    assert error <= 1e-4 * np.abs(expected).max(), error
    steps.finish(max_abs=error)


if __name__ == "__main__":
    main(*sys.argv[1:])
