"""The plain recipe: load the .npz into JAX, the published Linen ViT, jax2onnx, onnx.save, onnxruntime against JAX on
two images.

What a person with these tools but without this project would write: one process, nothing clever. JAX jits the same
function that jax2onnx gets, so that XLA takes the parameters for constants; with --arguments they are passed as
arguments, as somebody who knows XLA would do.

    python benchmarks/plain.py CHECKPOINT.npz OUT.onnx [--arguments | --no_check]
"""

import os
import sys

from common import IMAGE_SIZE, Steps, two_images


def main(checkpoint: str, output: str, option: str = "") -> None:
    """Converts and checks one checkpoint."""
    steps = Steps()
    with steps.step("load"):
        import jax
        import numpy as np
        import onnx
        import onnxruntime
        from jax2onnx import to_onnx
        from vit_jax_model import load

        model, params = load(checkpoint)

    def apply(images):
        return model.apply({"params": params}, images, train=False)

    with steps.step("export"):
        proto = to_onnx(apply, [("B", IMAGE_SIZE, IMAGE_SIZE, 3)], input_names=["images"], output_names=["logits"])
    with steps.step("save"):
        onnx.save(proto, output, save_as_external_data=True, location=os.path.basename(output) + ".data")
    if option == "--no_check":
        steps.finish()
        return
    with steps.step("check"):
        images = two_images()
        if option == "--arguments":
            expected = np.asarray(
                jax.jit(lambda params, images: model.apply({"params": params}, images, train=False))(params, images)
            )
        else:
            expected = np.asarray(jax.jit(apply)(images))
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"images": images})
    error = float(np.abs(got - expected).max())
    assert error <= 1e-4 * np.abs(expected).max(), error
    steps.finish(max_abs=error)


if __name__ == "__main__":
    main(*sys.argv[1:])
