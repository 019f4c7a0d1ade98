"""Image towers of vision-language models: where they lie, and strictness."""

import numpy as np
import pytest
from family_files import rewrite, without

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.load import load_checkpoint, towers_in
from vit_convert.families.vlm.family import VLM

MODELS = {"paligemma": "PaliGemma", "openpi": "openpi", "gemma3": "Gemma3", "gemma3_nested": "Gemma3"}


@pytest.fixture
def tiny(tmp_path):
    def write(layout, **options):
        path = tmp_path / f"{layout}.npz"
        VLM.write_random(
            path, f"{MODELS[layout]}-mu/14", RandomOptions(**{"image_size": (112, 112), "layout": layout, **options})
        )
        return path

    return write


@pytest.mark.parametrize("layout", MODELS)
def test_layouts(tiny, layout):
    path = tiny(layout, prefix="params/")
    assert towers_in(path) == ("image",)
    found = load_checkpoint(f"{path}:img")
    assert (found.layout.value, found.family.name, found.pair) == (layout, "vlm", None)
    assert found.variant == f"{MODELS[layout]}-mu/14" and found.title == MODELS[layout]
    tokens = found.family.model(found).signature.outputs[0]
    assert tokens.shape == (("batch", 64, 2048) if found.architecture.head else ("batch", 4, 32))
    assert load_checkpoint(path).params.keys() == found.params.keys()  # it has no other tower


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ({"img/a", "llm/b"}, "paligemma"),
        ({"PaliGemma/img/a"}, "openpi"),
        ({"SigLiPFromPatches_0/siglip_encoder/a"}, "gemma3"),
        ({"vision_encoder/siglip_encoder/a", "transformer/b"}, "gemma3_nested"),
        ({"img/a"}, None),  # a tower that was saved by itself
        ({"llm/b"}, None),
        ({"img/a", "txt/b"}, None),
        (set(), None),
    ],
)
def test_what_makes_a_vision_language_model(names, layout):
    found = VLM.match(names)
    assert found is None if layout is None else found.value == layout


@pytest.mark.parametrize(("layout", "stacked"), [(name, name in ("paligemma", "openpi")) for name in MODELS])
def test_blocks_lie_as_each_project_saves_them(tiny, layout, stacked):
    """big_vision's in one stack, with `scan`; Gemma 3's one by one."""
    names = np.load(tiny(layout)).files
    assert any("/encoderblock/" in name for name in names) == stacked
    assert any("/encoderblock_0/" in name for name in names) != stacked


def test_a_tower_of_no_known_size_is_called_what_it_is(tiny):
    found = load_checkpoint(tiny("paligemma", depth=3))
    assert (found.variant, found.title, found.preprocess) == ("custom", "image tower", "paligemma")


def test_names_that_end_in_value(tiny):
    path = tiny("openpi")
    expected = load_checkpoint(path).params["head/kernel"].copy()
    arrays = {f"{name}/value": array for name, array in np.load(path).items()}
    np.savez(path, **arrays)
    np.testing.assert_array_equal(load_checkpoint(path).params["head/kernel"], expected)


def test_in_bfloat16(tiny):
    assert load_checkpoint(tiny("paligemma", dtype="bfloat16")).params["head/kernel"].dtype == np.float32


@pytest.mark.parametrize(
    ("layout", "leaf"),
    [
        ("paligemma", "img/Transformer/encoderblock/LayerNorm_1/bias"),
        ("gemma3", "SigLiPFromPatches_0/siglip_encoder/Transformer/encoder_norm/scale"),
    ],
)
def test_strict(tiny, layout, leaf):
    path = rewrite(tiny(layout), lambda arrays: without(arrays, leaf))
    with pytest.raises(CheckpointError, match=f"{leaf}: missing"):
        load_checkpoint(path)


def test_variants_and_options(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="variant PaliGemma-So400m/14 needs"):
        load_checkpoint(tiny("paligemma"), variant="PaliGemma-So400m/14")
    with pytest.raises(UsageError, match="unknown"):
        load_checkpoint(tiny("paligemma"), variant="PaliGemma-B/14")
    with pytest.raises(UsageError, match="towers='text': has no meaning"):
        VLM.write_random(tmp_path / "x.npz", "PaliGemma-mu/14", RandomOptions(towers="text"))
    assert not VLM.has_variant("B/16")
