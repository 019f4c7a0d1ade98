"""What a family is asked for where nothing is said, and what a checkpoint says of itself where its family does not."""

import enum
import pathlib

import pytest

from vit_convert.checkpoint.containers import Leaves
from vit_convert.families.family import Asked, Loaded, RandomOptions


class Layout(enum.Enum):
    ONE = "one"


def loaded(**more):
    return Loaded("ViT", "B/32", Layout.ONE, None, Leaves({}), 5, (8, 8), (8, 8), **{"num_classes": 0, **more},
                  preprocess="vit_jax", patch_size=4)  # fmt: skip


def test_what_is_asked_where_nothing_is_said():
    asked = Asked(pathlib.Path("a.npz"))
    assert (asked.prefix, asked.names, asked.variant, asked.outputs, asked.tower) == ("", (), "auto", "auto", "")
    assert (asked.image_size, asked.posemb_grid, asked.normalize) == (None, None, True)


@pytest.mark.parametrize(("variant", "said"), [("auto", ""), ("B/32", "B/16"), ("", "B/16")])
def test_a_files_own_variant_is_proposed_only_where_another_is_asked_for(variant, said):
    assert Asked(pathlib.Path("a.npz"), variant=variant).instead_of("B/16") == said


@pytest.mark.parametrize(
    ("given", "output", "judge"),
    [
        ({}, "features", "cosine"),
        ({"num_classes": 1}, "logits", "top1"),
        ({"num_classes": 10}, "logits", "top1"),
        ({"num_classes": 10, "output": "tokens"}, "tokens", "top1"),
        ({"output": "embedding", "judge": "embedding"}, "embedding", "embedding"),
        ({"num_classes": 10, "judge": "cosine"}, "logits", "cosine"),
    ],
)
def test_what_a_model_gives_and_how_it_is_judged(given, output, judge):
    found = loaded(**given)
    assert (found.output, found.judge) == (output, judge)


def test_what_a_checkpoint_is_where_its_family_says_no_more():
    found = loaded()
    assert (found.resizable, found.attentions, found.zero_head, found.warnings) == (False, (), False, ())
    assert (found.unused, found.pair, found.takes, found.text) == (frozenset(), None, "", False)


def test_random_weights_of_which_nothing_is_said():
    """As docs/checkpoints.md has the flags: a whole model of the variant, with ImageNet's classes."""
    options = RandomOptions()
    assert (options.seed, options.image_size, options.num_classes, options.depth) == (0, None, 1000, None)
    assert (options.layout, options.prefix, options.dtype) == ("", "", "float32")
    assert (options.pool, options.posemb, options.pre_logits, options.outlier_channels) == (None, "learn", False, 0)
    assert (options.towers, options.length, options.text_head) == ("", None, True)


def test_what_is_said_is_kept():
    options = RandomOptions(3, (8, 16), 7, depth=2, towers="text", length=5, text_head=False)
    assert (options.seed, options.image_size, options.num_classes, options.depth) == (3, (8, 16), 7, 2)
    assert (options.towers, options.length, options.text_head) == ("text", 5, False)
    assert options == RandomOptions(3, (8, 16), 7, depth=2, towers="text", length=5, text_head=False)
    assert options != RandomOptions(4, (8, 16), 7, depth=2, towers="text", length=5, text_head=False)
