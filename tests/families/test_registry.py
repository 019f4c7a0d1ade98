"""Which family a file is of, those from outside the package among them, and what is refused by its name."""

import enum
import sys
import types

import pytest

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.registry import FAMILIES, families, family_named, family_of, tower_family_of

VIT = ["embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"]


class Layout(enum.Enum):
    MINE = "mine"


class Mine:
    """A family of which a file is as soon as one leaf begins with its word."""

    layouts, variants = ("mine",), ("Mine/1",)
    load = model = has_variant = write_random = None

    def __init__(self, name, word):
        self.name, self.word = name, word

    def match(self, names):
        return Layout.MINE if any(name.startswith(self.word) for name in names) else None


@pytest.fixture
def package(monkeypatch):
    """Modules of families from outside: `mine` (leaves beginning with "my/") and `img` (those of an image tower)."""
    module = types.ModuleType("outside")
    module.MINE, module.IMG, module.HALF = (
        Mine("mine", "my/"),
        Mine("towers", "img/"),
        types.SimpleNamespace(name="half", match=None),
    )
    monkeypatch.setitem(sys.modules, "outside", module)
    return module


@pytest.mark.usefixtures("package")
def test_ours_are_known_and_those_from_outside_come_first():
    assert families() == FAMILIES
    found = families(["outside:MINE", "outside:IMG"])
    assert [family.name for family in found[:2]] == ["mine", "towers"] and found[2:] == FAMILIES


def test_a_family_in_a_file(tmp_path):
    path = tmp_path / "my_family.py"
    path.write_text("import types\nparts = 'layouts variants match load model has_variant write_random'.split()\n")
    path.write_text(path.read_text() + "F = types.SimpleNamespace(name='theirs', **dict.fromkeys(parts, ()))\n")
    assert families([f"{path}:F"])[0].name == "theirs"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("outside", "config.families: 'outside' is not module:OBJECT"),
        (":MINE", "config.families: ':MINE' is not module:OBJECT"),
        ("outside:", "is not module:OBJECT"),
        ("outside:a.b", "is not module:OBJECT"),
        ("nowhere_at_all:MINE", "config.families: nowhere_at_all:MINE: ModuleNotFoundError"),
        ("outside:YOURS", "config.families: outside:YOURS: AttributeError"),
        ("/gone/family.py:F", "config.families: /gone/family.py:F: FileNotFoundError"),
        ("outside:HALF", "outside:HALF has no layouts, variants, load, model, has_variant, write_random"),
    ],
)
@pytest.mark.usefixtures("package")
def test_what_is_no_family(place, said):
    with pytest.raises(UsageError) as error:
        families([place])
    assert said in str(error.value) and error.value.fix


def test_a_family_by_its_name():
    known = (Mine("mine", "x"), Mine("other", "y"))
    assert family_named("other", known) is known[1]
    with pytest.raises(UsageError) as error:
        family_named("mines", known)
    assert (
        str(error.value) == "family 'mines': unknown. Did you mean mine?"
        and error.value.fix == "Use auto or mine, other."
    )


def test_a_vit():
    family, layout = family_of(VIT, "f.npz")
    assert (family.name, layout.value) == ("vit", "big_vision")
    assert family_of(VIT, "f.npz", asked="vit") == (family, layout)


@pytest.mark.usefixtures("package")
def test_the_first_that_matches_from_outside_is_asked_before_anything_is_refused():
    """A family of towers that somebody wrote is not refused for what ours cannot do."""
    both = families(["outside:MINE", "outside:IMG"])
    assert family_of(["my/x", *VIT], "f.npz", known=both) == (both[0], Layout.MINE)
    assert family_of(["img/x", "txt/y"], "f.npz", known=both) == (both[1], Layout.MINE)
    with pytest.raises(CheckpointError, match="an image tower and a text tower"):
        family_of(["img/x", "txt/y"], "f.npz", known=families(["outside:MINE"]))


@pytest.mark.usefixtures("package")
def test_a_family_that_is_asked_for_is_the_only_one():
    known = families(["outside:MINE"])
    assert family_of(["my/x", *VIT], "f.npz", asked="vit", known=known)[0].name == "vit"
    assert family_of(["my/x", *VIT], "f.npz", asked="mine", known=known)[0] is known[0]
    with pytest.raises(CheckpointError) as error:
        family_of(VIT, "f.npz", asked="mine", known=known)
    assert str(error.value) == f"f.npz: no layout of family mine; it holds {', '.join(sorted(VIT))}"
    with pytest.raises(UsageError, match=r"family .vitt.: unknown\. Did you mean vit"):
        family_of(VIT, "f.npz", asked="vitt")


class Both(Mine):
    """One of towers, as the leaves tell."""

    load = model = has_variant = write_random = print  # a protocol's methods are no None

    def towers(self, names, layout):
        return tuple(word for word in ("image", "text") if any(f"/{word}/" in name for name in names))


def test_a_family_of_towers_is_told_with_those_that_the_file_has():
    known = (Mine("mine", "my/"), Both("pair", "my/"), Both("other", "your/"))
    both = ["my/image/x", "my/text/y"]
    assert tower_family_of(both, known=known) == (known[1], Layout.MINE, ("image", "text"))
    assert tower_family_of(["my/text/y"], known=known) == (known[1], Layout.MINE, ("text",))
    assert tower_family_of(["your/image/x"], known=known) == (known[2], Layout.MINE, ("image",))
    assert tower_family_of(["x"], known=known) is None
    assert tower_family_of(both, asked="other", known=known) is None
    assert tower_family_of(both, asked="mine", known=known) is None  # which has no towers
    assert family_of(["my/image/x"], "f.npz", known=known) == (known[0], Layout.MINE)
    with pytest.raises(CheckpointError):
        family_of(["your/image/x"], "f.npz", known=known)


def test_of_no_family(package):
    with pytest.raises(CheckpointError) as error:
        family_of(["b", "a"], "f.npz", known=families(["outside:MINE"]))
    assert str(error.value) == "f.npz: no known layout; it holds a, b"
    assert error.value.fix.startswith("Supported: mine, hybrid, mixer, swin, vit")


@pytest.mark.parametrize(
    ("names", "said", "tower"),
    [
        (["img/x", "llm/y"], "a vision-language model (PaliGemma)", True),
        (["img/x", "txt/y"], "an image tower and a text tower (SigLIP, LiT or CLIP)", True),
        (["img/x", "t"], "an image tower under img/ (CLIPPO)", True),
        (["visual/transformer/resblocks.0/x"], "scenic's CLIP", False),
        (["vision_model/embeddings/x"], "a transformers (Hugging Face) model", False),
        (["blocks.0.attn.qkv.weight"], "a PyTorch state dict", False),
        (["cls_token", "x"], "a PyTorch state dict", False),
    ],
)
def test_other_models_are_named(names, said, tower):
    with pytest.raises(CheckpointError) as error:
        family_of(names, "f.npz")
    assert str(error.value).startswith(f"f.npz: {said}, which is not supported")
    assert ("Append ':img'" in error.value.fix and "f.npz:img" in error.value.fix) == tower
    assert tower or error.value.fix.startswith("Supported: hybrid, mixer, swin, vit")
