"""The table of public files: what the listings of vit_jax and its model tables say, and which sizes pass for one."""

import pytest

from vit_convert.checkpoint.published import PUBLISHED, Published, published_at, require_published
from vit_convert.core.errors import CheckpointError

MIB, GIB = 1 << 20, 1 << 30
# vit_jax.ipynb's listing of gs://vit_models, and the pixels and classes of vit_jax's model tables: the fine-tuned ones
# are ImageNet's.
TABLE = {
    "Ti/16": (384, 1000, "", True, False),
    "S/16": (384, 1000, "", True, False),
    "S/32": (384, 1000, "", True, False),
    "B/8": (384, 1000, "334.78 MiB", True, False),
    "B/16": (384, 1000, "331.4 MiB", True, False),
    "B/32": (384, 1000, "336.89 MiB", True, False),
    "L/16": (384, 1000, "1.14 GiB", True, False),
    "L/32": (384, 1000, "1.14 GiB", True, False),
    "H/14": (224, 21843, "2.46 GiB", True, True),  # ImageNet-21k alone, its head reset
    "S/16-gap-norep": (224, 1000, "", True, False),
    "S/32-gap-norep": (224, 1000, "", True, False),
    "B/16-gap-norep": (224, 1000, "", True, False),
    "B/32-gap-norep": (224, 1000, "", True, False),
    "R+ViT-Ti/16": (384, 1000, "", True, False),
    "R26+ViT-S/32": (384, 1000, "", True, False),
    "R26+ViT-B/32": (224, 21843, "450.23 MiB", True, True),  # ImageNet-21k alone
    "R50+ViT-B/16": (384, 1000, "377.57 MiB", True, False),
    "R50+ViT-L/32": (384, 1000, "", True, False),
    "Mixer-B/16": (224, 1000, "228.47 MiB", True, False),
    "Mixer-L/16": (224, 1000, "794.29 MiB", True, False),
    "Mixer-B/32": (224, 1000, "230.04 MiB", True, False),
    "Mixer-S/8": (224, 1000, "78.79 MiB", True, False),
    "Mixer-S/16": (224, 1000, "70.71 MiB", True, False),
    "Mixer-S/32": (224, 1000, "72.91 MiB", True, False),
    # windows of 7 at 224 pixels, of 12 at 384
    **{f"Swin-{letter}/7": (224, 1000, "", True, False) for letter in "TSBL"},
    **{f"Swin-{letter}/12": (384, 1000, "", True, False) for letter in "BL"},
    "bv_s16_i1k": (224, 1000, "", False, False),  # sincos2d
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_each_file_is(name):
    file = PUBLISHED[name]
    found = (file.image_size, file.num_classes, file.size, file.stores_positions, file.zero_head)
    assert name not in TABLE or found == TABLE[name]
    assert published_at(file.address) is file and file.name == file.address.split("/")[-1]
    letters, _, patch = name.removesuffix("-gap-norep").partition("/")
    if letters.startswith("Swin-"):  # timm's, of one name in a folder each
        word = {"T": "tiny", "S": "small", "B": "base", "L": "large"}[letters[-1]]
        folder = f"https://huggingface.co/timm/swin_{word}_patch4_window{patch}_{file.image_size}"
        assert file.address.startswith(folder) and file.name == "model.safetensors"
    else:
        assert file.address.startswith("gs://") and file.name.endswith(".npz")
        assert not patch or f"{letters}_{patch}" in file.name or f"{letters.replace('+ViT-', '_')}_{patch}" in file.name


def test_all_of_the_table_is_there():
    assert set(TABLE) <= set(PUBLISHED)
    assert published_at("gs://nobody/x.npz") is published_at("") is None


@pytest.mark.parametrize(
    ("size", "middle", "rounding"), [("1.50 MiB", 1.5 * MIB, 0.005 * MIB), ("2.46 GiB", 2.46 * GIB, 0.005 * GIB)]
)
def test_sizes_are_rounded_to_two_decimals_and_headers_differ(size, middle, rounding):
    """By half of the last decimal, and by the 64 KiB that the headers of some 200 members may take."""
    file, reach = Published("gs://a/b.npz", 224, size=size), rounding + 65_536
    assert all(file.may_have(round(middle + by)) for by in (0, reach - 2, 2 - reach))
    assert not any(file.may_have(round(middle + by)) for by in (reach + 2, -2 - reach))


def test_what_nobody_listed_may_have_any_size():
    assert Published("gs://a/b.npz", 224).may_have(1)


FILE = Published("gs://a/b.npz", 384)


@pytest.mark.parametrize(
    ("file", "image_size", "num_classes", "said"),
    [
        (FILE, (384, 384), 1000, None),
        (FILE, (384, 384), 0, None),  # its head is left out
        (FILE, (384, 224), 1000, "384x224 pixels, gs://a/b.npz has 384x384 pixels"),
        (FILE, (224, 384), 0, "224x384 pixels, gs://a/b.npz has 384x384 pixels"),
        (FILE, (384, 384), 10, "10 classes, gs://a/b.npz has 1000 classes"),
        (FILE, (384, 384), 21843, "21843 classes, gs://a/b.npz has 1000 classes"),
        (FILE, (224, 224), 10, "10 classes, gs://a/b.npz has 1000 classes"),
        (Published("gs://a/b.npz", 384, stores_positions=False), (224, 224), 1000, None),  # the size that was asked for
        (
            Published("gs://a/b.npz", 384, stores_positions=False),
            (224, 224),
            10,
            "10 classes, gs://a/b.npz has 1000 classes",
        ),
        (
            Published("gs://a/b.npz", 384, num_classes=21843),
            (384, 384),
            1000,
            "1000 classes, gs://a/b.npz has 21843 classes",
        ),
    ],
)
def test_another_model_of_that_name(file, image_size, num_classes, said):
    if said is None:
        return require_published(file, "x/b.npz", image_size, num_classes)
    with pytest.raises(CheckpointError) as error:
        require_published(file, "x/b.npz", image_size, num_classes)
    assert str(error.value) == f"x/b.npz: {said}" and "--config.checkpoint=x/b.npz" in error.value.fix
