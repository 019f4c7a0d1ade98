"""What lies beside a file of transformers, tables on other grids, drawn parameters, sizes by shapes: part by part."""

import json

import numpy as np
import pytest

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError
from vit_convert.families.towers.architecture import Encoder
from vit_convert.families.towers.draw import draw
from vit_convert.families.towers.hub_config import HubConfig, read_hub_config
from vit_convert.families.towers.infer import stored_encoder
from vit_convert.families.towers.tables import half_pixel_weights, resample_half_pixel, resampled

# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path):
    """What the towers of a file find in this text beside it."""

    def read(text, tower="image"):
        (tmp_path / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
        return read_hub_config(tmp_path / "model.safetensors", tower)

    return read


def test_each_tower_has_a_part(read, tmp_path):
    assert read_hub_config(tmp_path / "model.safetensors", "image") == HubConfig()  # there is none
    vision = {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    text = {"num_attention_heads": 8, "hidden_act": "gelu", "layer_norm_eps": 0}
    record = {"vision_config": vision, "text_config": text, "hidden_act": "relu"}
    assert read(record) == HubConfig(True, 12, "quick", 1e-5)
    assert read(record, "text") == HubConfig(True, 8, "erf", 0.0)
    assert read({"vision_config": {}}) == HubConfig(True, 0, "", 0.0)
    assert read({"vision_config": {"hidden_act": None}}) == HubConfig(True, 0, "", 0.0)
    for other in ({"vision_config": vision}, [], "7", {"text_config": 5}):
        assert read(other, "text") == HubConfig()


@pytest.mark.parametrize(
    ("name", "ours"),
    [("quick_gelu", "quick"), ("gelu", "erf"), ("relu", "relu"), *dict.fromkeys(
        (("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"), ("gelu_fast", "tanh")))],
)  # fmt: skip
def test_activations_as_transformers_calls_them(read, name, ours):
    assert read({"vision_config": {"hidden_act": name}}).activation == ours


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not known"),
        ({"hidden_act": ["gelu"]}, "hidden_act .'gelu'. is not known"),
        ({"hidden_act": 3}, "hidden_act 3 is not known"),
        ({"num_attention_heads": -1}, "num_attention_heads -1, layer_norm_eps 0.0: no such numbers"),
        ({"num_attention_heads": "12"}, "num_attention_heads '12'"),
        ({"num_attention_heads": 1.5}, "num_attention_heads 1.5"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps 'small'"),
        ({"layer_norm_eps": -1e-9}, "layer_norm_eps -1e-09"),
        ({"layer_norm_eps": 1}, "layer_norm_eps 1:"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps nan"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps 1000"),
    ],
)
def test_parts_that_are_none(read, part, said):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        read({"vision_config": part})


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "\udc80"])
def test_texts_that_are_no_json(read, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_hub_config(tmp_path / "model.safetensors", "image")


# --- position tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (3, 3), (5, 7), (7, 3), (1, 4), (4, 1), (16, 30)])
def test_half_pixel_weights_by_their_formula(old, new):
    """jax.image.scale_and_translate: a triangle of width max(1, old / new) around each centre, of sum 1."""
    found = half_pixel_weights(old, new)
    for i in range(new):
        centre, width = (i + 0.5) * old / new - 0.5, max(1.0, old / new)
        row = [max(0.0, 1 - abs(centre - j) / width) for j in range(old)]
        np.testing.assert_allclose(found[i], np.array(row) / sum(row), rtol=0, atol=1e-14)  # centres of tens


def test_a_table_is_resampled_along_both_sides():
    old, new = (2, 3), (4, 2)
    table = np.random.default_rng(0).standard_normal((1, 6, 5)).astype(np.float32)
    found = resample_half_pixel(table, old, new)
    rows, columns = half_pixel_weights(2, 4), half_pixel_weights(3, 2)
    for i in range(4):
        for j in range(2):
            value = sum(rows[i, h] * columns[j, w] * table[0, 3 * h + w] for h in range(2) for w in range(3))
            np.testing.assert_allclose(found[0, 2 * i + j], value, rtol=0, atol=1e-6)
    assert found.dtype == np.float32 and resample_half_pixel(table, (2, 3), (2, 3)) is table


@pytest.mark.parametrize("how", ["half_pixel", "aligned"])
def test_a_stored_table_is_read_late_and_says_its_shape(how):
    read, table = [], np.arange(12, dtype=np.float16).reshape(1, 4, 3)
    leaf = Leaf("pos", table.shape, table.dtype, lambda: read.append(1) or table)
    made = resampled(leaf, (2, 2), (3, 4), how)
    assert (made.shape, made.dtype, read) == ((1, 12, 3), np.float32, [])
    values = made.read()
    assert values.shape == (1, 12, 3) and values.dtype == np.float32
    corner = {"half_pixel": table[0, 0], "aligned": table[0, 0]}[how]
    np.testing.assert_array_equal(values[0, 0], corner)
    # a quarter of the way for half-pixel centres, a third for aligned corners: 4 columns of 2
    second = table[0, 0] + (table[0, 1] - table[0, 0]) * {"half_pixel": 0.25, "aligned": 1 / 3}[how]
    np.testing.assert_allclose(values[0, 1], second, rtol=1e-6)


# --- drawn parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "deviation"),
    [
        ("img/pos_embedding", (1, 64, 64), 0.1), ("img/cls", (1, 64, 64), 0.1), ("txt/segments", (64, 64), 0.1),
        ("img/MAPHead_0/probe", (1, 64, 64), 1.0), ("txt/Embed_0/embedding", (64, 64), 1.0),
        *((f"img/b/attention/{n}/kernel", (64, 4, 16), 1 / 8) for n in ("query", "key", "value")),
    ],
)  # fmt: skip
def test_sizes_of_drawn_parameters(name, shape, deviation):
    values = draw(0, name, shape)
    assert values.dtype == np.float32 and values.shape == shape
    # of 4096 normal values the deviation is known to 1.1 %
    assert values.std() == pytest.approx(deviation, rel=0.05) and abs(values.mean()) < 0.07 * deviation
    assert (draw(0, name, shape) == values).all()
    assert (draw(1, name, shape) != values).any() and (draw(0, name + "x/cls", shape) != values).any()


# --- sizes by shapes --------------------------------------------------------------------------------------------------


def leaves(depth=3, width=128, hidden=512, numbers=None, **more):
    shapes = {}
    for i in range(depth) if numbers is None else numbers:
        shapes |= {f"a.layers.{i}.layer_norm1.weight": (width,), f"a.layers.{i}.mlp.fc1.bias": (hidden,)}
    shapes |= {name.replace("__", "/"): shape for name, shape in more.items()}
    return {name: Leaf(name, shape, np.dtype(np.float32), lambda: None) for name, shape in shapes.items()}


def encoder(found, config=None, heads=None, tmp="m.safetensors"):
    return stored_encoder(found, tmp, config or HubConfig(), heads or {}, "tanh", 1e-6)


def test_sizes_of_a_stored_tower():
    assert encoder(leaves()) == Encoder(128, 3, 512, 2, "tanh", 1e-6)  # heads of 64 where nothing tells
    assert isinstance(encoder(leaves()).num_heads, int) and encoder(leaves(width=32)).num_heads == 1
    assert encoder(leaves(), heads={128: 16, 64: 3}).num_heads == 16
    assert encoder(leaves(), HubConfig(True, 8), {128: 16}).num_heads == 8
    own = leaves(a__encoderblock_0__attn__query__bias=(4, 32))
    assert encoder(own, HubConfig(True, 8), {128: 16}).num_heads == 4
    for other in ((128,), (2, 4, 32)):  # as flat as transformers' own, or of several blocks: says nothing of heads
        said = leaves(a__encoderblock_0__attn__query__bias=other)
        assert encoder(said, HubConfig(True, 8)).num_heads == 8
    said = encoder(leaves(), HubConfig(True, 0, "quick", 1e-5))
    assert (said.activation, said.norm_epsilon) == ("quick", 1e-5)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (leaves(numbers=[0, 2]), "block"),
        (leaves(numbers=[1, 2]), "block"),
        ({name: leaf for name, leaf in leaves().items() if "norm" not in name}, "width"),
        ({name: leaf for name, leaf in leaves().items() if "fc1" not in name}, "mlp_dim"),
    ],
)
def test_towers_that_lack_something(found, said):
    with pytest.raises(CheckpointError, match=rf"m\.safetensors.*{said}"):
        encoder(found)
