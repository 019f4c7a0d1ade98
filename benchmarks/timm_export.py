"""The way from PyTorch: timm's loader of the same .npz, torch.onnx.export (dynamo), onnxruntime against PyTorch on two
images; on the CPU.

python benchmarks/timm_export.py CHECKPOINT.npz OUT.onnx
"""

import sys

from common import IMAGE_SIZE, Steps, two_images

_TORCHVISION_OPERATORS = (
    "nms",
    "qnms",
    *(
        f"{name}{suffix}"
        for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
        for suffix in ("", "_backward")
    ),
)


def main(checkpoint: str, output: str) -> None:
    """Converts and checks one checkpoint."""
    steps = Steps()
    with steps.step("load"):
        import numpy as np
        import onnxruntime
        import torch

        _declare_torchvision_operators()
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(img_size=IMAGE_SIZE, act_layer="gelu_tanh", **_shape(checkpoint)).eval()
        model.load_pretrained(checkpoint)
    images = two_images().transpose(0, 3, 1, 2).copy()
    with steps.step("export"):
        batch = torch.export.Dim("batch", min=1, max=1024)
        program = torch.onnx.export(
            model,
            (torch.from_numpy(images),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
        )
    with steps.step("save"):
        program.save(output, external_data=True)
    with steps.step("check"):
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).numpy()
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"images": images})
    error = float(np.abs(got - expected).max())
    assert error <= 1e-4 * np.abs(expected).max(), error
    steps.finish(max_abs=error)


def _shape(checkpoint: str) -> dict[str, int]:
    """What timm's model registry would say; here read from the file."""
    import numpy as np

    with np.load(checkpoint) as file:
        names = file.files
        patch, _, _, width = file["embedding/kernel"].shape
        heads = file["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias"].shape[0]
        mlp = file["Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"].shape[0]
        depth = len({name.split("/")[1] for name in names if name.startswith("Transformer/encoderblock_")})
        return {
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": mlp / width,
            "num_classes": file["head/bias"].shape[0],
        }


def _declare_torchvision_operators() -> None:
    """timm imports torchvision, whose compiled operators a CPU-only PyTorch may lack; they need to be declared, not to
    work."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _TORCHVISION_OPERATORS:
        name = f"_{name}" if name.endswith("_backward") else name
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    globals()["_library"] = library  # the declarations last as long as it does


if __name__ == "__main__":
    main(*sys.argv[1:])
