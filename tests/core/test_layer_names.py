"""What a pattern may mean: names of parameters and nodes as real checkpoints have them, and blocks, layers and scopes
read from them."""

import pytest

from vit_convert.core.errors import UsageError
from vit_convert.core.layer_names import block_of, check_patterns, kind_of, layer_names, layer_of, matches, within_block


@pytest.mark.parametrize(
    ("name", "block", "within"),
    [
        ("Transformer/encoderblock_3/MlpBlock_0/Dense_1/kernel", "block_03", "MlpBlock_0/Dense_1/kernel"),
        ("Transformer/encoderblock_11", "block_11", ""),
        ("encoderblock_3/x", "block_03", "x"),
        ("MixerBlock_7/token_mixing/Dense_0/kernel", "block_07", "token_mixing/Dense_0/kernel"),
        ("blocks_0/attn/qkv", "block_00", "attn/qkv"),
        ("encoder/layers/12/mlp/w1", "block_12", "mlp/w1"),
        ("model/layer.5/query", "block_05", "query"),
        ("layers_0/0/w", "block_00", "0/w"),
        ("stage_2/block_5/attn/qkv/kernel", "stage_2/block_05", "attn/qkv/kernel"),
        ("image/stage_a/block_10", "stage_a/block_10", ""),
        ("Transformer/encoder_norm/scale", None, "Transformer/encoder_norm/scale"),
        ("encoderblocks/kernel", None, "encoderblocks/kernel"),
        ("superblock_3/kernel", None, "superblock_3/kernel"),
        ("block_3a/kernel", None, "block_3a/kernel"),
        ("embedding/kernel", None, "embedding/kernel"),
        ("head", None, "head"),
    ],
)
def test_the_block_of_a_name(name, block, within):
    assert block_of(name) == block
    assert within_block(name) == within


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a/MlpBlock_0/Dense_0/kernel", "fc1"),
        ("a/MlpBlock_0/Dense_1/kernel", "fc2"),
        *((f"a/attention/{part}/kernel", part) for part in ("qkv", "query", "key", "value", "out")),
        ("query/Dense_1/kernel", "fc2"),  # the innermost says it
        ("head/kernel", "head"),
        ("stage/gate/kernel", "gate"),
        ("w", "w"),
    ],
)
def test_what_a_linear_does(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *(
            (f"stage_0/fc1/{last}", "stage_0/fc1")
            for last in ("kernel", "weight", "w", "bias", "b", "scale", "embedding")
        ),
        ("stage_0/fc1/kernel.1", "stage_0/fc1"),  # a tied weight, of another form
        ("stage_0/fc1/kernel.10", "stage_0/fc1"),
        ("stage_0/fc1/kernel.a", "stage_0/fc1/kernel.a"),
        ("mlp/w1", "mlp/w1"),
        ("head", "head"),
        ("kernel", "kernel"),
    ],
)
def test_the_layer_of_a_parameter(name, layer):
    assert layer_of(name) == layer


def test_the_names_of_a_layer():
    name = "Transformer/encoderblock_3/MlpBlock_0/Dense_1/kernel"
    assert layer_names(name) == {name, "block_03", "block_03/fc2"}
    assert layer_names("head/kernel") == {"head/kernel"}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("block_03", "block_03", True),
        ("block_03", "block_03/fc2", True),  # a scope stands for all below it
        ("block_0", "block_03", False),
        ("block_0?", "block_03", True),
        ("*/MlpBlock_0/*", "a/MlpBlock_0/b", True),
        ("*/MlpBlock_0", "a/MlpBlock_0/b/c", True),
        ("Block_03", "block_03", False),  # as it is written
        ("fc2", "block_03/fc2", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches([pattern], iter([name])) is expected
    assert matches(["nothing", pattern], [name, "another"]) is expected
    assert not matches([], [name]) and not matches([pattern], [])


def test_patterns_that_match_nothing_are_refused():
    check_patterns("keep_fp32", ["block_03", "*"], iter(["block_03/fc2", "head"]))
    with pytest.raises(
        UsageError, match=r"keep_fp32: 'block_30' matches no block, layer or node\..*Did you mean block_03"
    ) as caught:
        check_patterns("keep_fp32", ["head", "block_30"], iter(["block_03", "head"]))
    assert "block_03/fc2" in caught.value.fix
