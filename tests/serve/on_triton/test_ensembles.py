"""Ensembles from files and pixels to the best classes: what each model of them takes and gives."""

import re
import types

import pytest

from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.image_size import ImageRange
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.serve.triton import ensembles as module
from vit_convert.serve.triton.ensembles import ensembles
from vit_convert.serve.triton.parts import Asked


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The models of a network of images, by name: their configs without comments, and themselves."""

    def made(judge="top1", layout="NHWC", size=(48, 32), dtype="float32", count=10, top_k=5):
        bundle = Bundle(tmp_path / "tiny")
        bundle.require_writable()
        write_json(bundle.manifest, {"stages": []})
        sides = ("height", "width") if isinstance(size, ImageRange) else size
        shape = ("batch", *sides, 3) if layout == "NHWC" else ("batch", 3, *sides)
        outputs = [Output("logits" if judge == "top1" else "features", "float32", ("batch", count), judge=judge)]
        outputs.append(Output("tokens", "float32", ("batch", 6, 4)))
        signature = Signature((Tensor("images", dtype, shape, layout),), tuple(outputs))
        expected = {output.name: types.SimpleNamespace(shape=(4, *output.shape[1:])) for output in outputs}
        facts = types.SimpleNamespace(image_size=size, patches=(0, 0), preprocess={"resize": "bilinear", "mean": [0.5]})
        offered = types.SimpleNamespace(
            bundle=bundle, max_batch=16, signature=signature, expected=expected, facts=facts
        )
        monkeypatch.setattr(module, "class_names", lambda offered, labels: ["cat", f"from {labels}"])
        found = ensembles(offered, Asked("m", top_k=top_k, labels="l.txt", version=7))
        assert all(model.version == 7 for model in found)
        configs = {
            model.name: "\n".join(line for line in model.config.splitlines() if line[:1] != "#") for model in found
        }
        return configs, {model.name: model for model in found}

    return made


def tensors(config, kind):
    """{name: (type, dims)} of a config's inputs or outputs."""
    rows = re.findall(rf'^{kind} \[ {{ name: "(\w+)" data_type: (\w+) dims: \[ ([^]]*) \]', config, re.MULTILINE)
    return {name: (dtype, [int(side) for side in dims.split(",")]) for name, dtype, dims in rows}


def parameters(config):
    return dict(re.findall(r'^parameters { key: "(\w+)" value { string_value: "(.*)" } }$', config, re.MULTILINE))


def test_what_a_model_needs_comes_before_it(made):
    assert [*made()[0]] == ["m_top", "m_image_preprocess", "m_image", "m_pixels_preprocess", "m_pixels"]
    assert [*made(judge="cosine")[0]] == ["m_image_preprocess", "m_image", "m_pixels_preprocess", "m_pixels"]


def test_from_a_file_or_pixels_to_the_best_classes(made):
    configs, _ = made()
    best = {"class_ids": ("TYPE_INT32", [5]), "class_names": ("TYPE_STRING", [5]), "scores": ("TYPE_FP32", [5])}
    assert tensors(configs["m_image"], "input") == {"image": ("TYPE_STRING", [1])}
    assert tensors(configs["m_pixels"], "input") == {"pixels": ("TYPE_UINT8", [-1, -1, 3])}
    for source in ("image", "pixels"):
        assert tensors(configs[f"m_{source}"], "output") == tensors(configs["m_top"], "output") == best
        asked = re.findall(r'model_name: "(\w+)"', configs[f"m_{source}"])
        assert asked == [f"m_{source}_preprocess", "m", "m_top"]
        assert tensors(configs[f"m_{source}_preprocess"], "output") == {"images": ("TYPE_FP32", [48, 32, 3])}
    assert tensors(configs["m_top"], "input") == {"logits": ("TYPE_FP32", [10])}
    assert all("max_batch_size: 16" in config for config in configs.values())


@pytest.mark.parametrize(("count", "top_k", "kept"), [(10, 5, 5), (3, 5, 3), (10, 1, 1)])
def test_no_more_classes_than_there_are(made, count, top_k, kept):
    config = made(count=count, top_k=top_k)[0]["m_top"]
    assert {dims[0] for _, dims in tensors(config, "output").values()} == {kept}
    assert parameters(config)["top_k"] == str(kept)


def test_without_classes_the_networks_own_outputs(made):
    configs, _ = made(judge="cosine")
    assert tensors(configs["m_image"], "output") == {
        "features": ("TYPE_FP32", [10]), "tokens": ("TYPE_FP32", [6, 4]),
    }  # fmt: skip
    assert "m_top" not in configs["m_image"]


@pytest.mark.parametrize(
    ("layout", "size", "dims"),
    [
        ("NHWC", (48, 32), [48, 32, 3]),
        ("NCHW", (48, 32), [3, 48, 32]),
        ("NCHW", ImageRange((16, 16), (40, 24), (64, 64)), [3, 40, 24]),  # one size, that the engine is tuned for
        ("NHWC", ImageRange((16, 16), (40, 24), (64, 64)), [40, 24, 3]),
    ],
)
def test_images_are_brought_to_the_networks_size(made, layout, size, dims):
    config = made(layout="".join(layout), size=size, dtype="uint8")[0]["m_pixels_preprocess"]
    assert tensors(config, "output") == {"images": ("TYPE_UINT8", dims)}
    height, width = dims[:2] if layout == "NHWC" else dims[1:]
    given = parameters(config)
    assert (given["height"], given["width"], given["dtype"], given["layout"]) == (
        str(height),
        str(width),
        "uint8",
        layout,
    )
    text = given["preprocess"].replace('\\"', '"')
    assert (
        text == '{"mean": [0.5], "resize": "bilinear"}'
    )  # in one order, so that a repository written again is the same


def test_the_files_beside_them(made):
    _, models = made()
    assert models["m_top"].files["labels.txt"] == "cat\nfrom l.txt\n"
    for name, model in models.items():
        assert ("model.py" in model.files) is (name.endswith(("top", "preprocess")))
    assert "models.preprocess import" in models["m_pixels_preprocess"].files["model.py"]
    assert "models.top import" in models["m_top"].files["model.py"]
