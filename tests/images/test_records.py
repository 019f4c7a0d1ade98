"""Each family's record as its project states it, and where an image is cut; without resizing one."""

import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.images import preprocess as module
from vit_convert.images.preprocess import Preprocess, preprocess_for

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# vit_jax's input_pipeline.py and preprocess.py; big_vision's configs and pp/ops_image.py; openai/CLIP; timm's DeiT;
# dinov3's README.
RECORDS = {
    "vit_jax": Preprocess("bilinear", False, 0, HALF, HALF, False),
    "lit": Preprocess("bilinear", False, 0, HALF, HALF, True),
    "big_vision": Preprocess("area", True, 256, HALF, HALF, True),
    "siglip": Preprocess("bilinear", False, 0, HALF, HALF, True),
    "paligemma": Preprocess("bilinear", True, 0, HALF, HALF, True),
    "clip": Preprocess("bicubic", True, 224, *CLIP, False),
    "imagenet": Preprocess("bicubic", True, 256, *IMAGENET, False),
    "tips": Preprocess("bilinear", False, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False),
    "dinov3": Preprocess("bilinear", True, 0, *IMAGENET, False),
}


@pytest.mark.parametrize("family", RECORDS)
def test_records_of_the_families(family):
    assert (
        preprocess_for(family, (224, 224)) == preprocess_for(f"{family}_of_some_layout", (224, 224)) == RECORDS[family]
    )


def test_there_is_a_record_here_for_each():
    with pytest.raises(UsageError) as error:
        preprocess_for("big_vison", (224, 224))
    assert "no preprocessing is known for family 'big_vison'. Did you mean big_vision?" in str(error.value)
    assert error.value.fix == f"Known families: {', '.join(RECORDS)}."
    with pytest.raises(UsageError):
        preprocess_for("vit", (224, 224))  # a beginning of one is none
    with pytest.raises(UsageError):
        preprocess_for("clipper", (224, 224))


@pytest.mark.parametrize(
    ("family", "image_size", "short"),
    [
        ("imagenet", (384, 384), 439),
        ("imagenet", (160, 224), 183),
        ("imagenet", (224, 160), 183),
        ("clip", (336, 448), 336),
        ("lit", (384, 384), 0),
    ],
)
def test_the_shorter_side_grows_with_the_image(family, image_size, short):
    """256 of 224 pixels: 160 * 8 / 7 = 182.9."""
    assert preprocess_for(family, image_size).resize_short == short


OFFERED = [("bilinear", False), ("bilinear", True), ("bicubic", True), ("area", True)]


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "area", "lanczos", ""])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("truncate", [False, True])
def test_what_is_offered(method, antialias, truncate):
    if (method, antialias) not in OFFERED:
        with pytest.raises(UsageError, match=f"resize='{method}' with antialias={antialias} is not offered") as error:
            Preprocess(method, antialias, 0, HALF, HALF, truncate)
        assert '"bilinear"' in error.value.fix
    elif method == "bicubic" and truncate:
        with pytest.raises(UsageError, match="resize='bicubic' with truncate=True is not offered"):
            Preprocess(method, antialias, 0, HALF, HALF, truncate)
    else:
        assert Preprocess(method, antialias, 0, HALF, HALF, truncate).truncate == truncate


@pytest.fixture
def asked(monkeypatch):
    """What `fit` asks of the resizer: (height, width, window)."""
    found = []

    def resize(image, height, width, method, antialias, *, truncate=False, window=None):
        found.append((height, width, window))
        assert (method, antialias, truncate) in {(r.resize, r.antialias, r.truncate) for r in RECORDS.values()}
        return image

    monkeypatch.setattr(module, "resize", resize)
    return found


@pytest.mark.parametrize(
    ("family", "image", "target", "expected"),
    [
        ("vit_jax", (300, 500), (224, 224), (224, 224, None)),
        ("siglip", (300, 500), (224, 160), (224, 160, None)),
        # 256 / 300 * 500 = 426.67; (256 - 224) / 2 = 16; (427 - 224) / 2 = 101.5
        ("imagenet", (300, 500), (224, 224), (256, 427, (16, 101, 224, 224))),
        ("big_vision", (500, 300), (224, 224), (427, 256, (101, 16, 224, 224))),
        ("big_vision", (256, 256), (224, 224), (256, 256, (16, 16, 224, 224))),
        ("clip", (300, 500), (224, 224), (224, 373, (0, 74, 224, 224))),
        ("clip", (100, 90), (224, 224), (249, 224, (12, 0, 224, 224))),  # 224 / 90 * 100 = 248.9
        # a target that is no square is covered on both sides: max(160 / 500, 224 / 375) = 0.5973
        ("clip", (500, 375), (160, 224), (299, 224, (69, 0, 160, 224))),
        ("clip", (375, 500), (224, 160), (224, 299, (0, 69, 224, 160))),
        # by 183 / 160 larger than that: 1.14375 * 0.5973 = 0.6832
        ("imagenet", (500, 375), (160, 224), (342, 256, (91, 16, 160, 224))),
        ("clip", (1, 1000), (224, 224), (224, 224_000, (0, 111_888, 224, 224))),
    ],
)
def test_where_an_image_is_cut(asked, family, image, target, expected):
    preprocess_for(family, target).fit(np.zeros((*image, 3), np.uint8), *target)
    assert asked == [expected]


@pytest.mark.parametrize("family", RECORDS)
def test_an_image_of_that_size_is_left_alone(asked, family):
    image = np.zeros((32, 48, 3), np.uint8)
    assert preprocess_for(family, (32, 48)).fit(image, 32, 48) is image and not asked
    preprocess_for(family, (32, 48)).fit(image.transpose(1, 0, 2), 32, 48)
    assert len(asked) == 1


def test_factor_and_summand():
    """1 / (255 std) and -mean / std, each rounded to float32 once from float64."""
    record = preprocess_for("clip", (224, 224))
    mean, std = (np.array(values, np.float64) for values in CLIP)
    assert (record.scale == (1 / (255 * std)).astype(np.float32)).all() and record.scale.dtype == np.float32
    assert (record.offset == (-mean / std).astype(np.float32)).all() and record.offset.dtype == np.float32


def test_records_as_json_spells_them():
    assert preprocess_for("imagenet", (224, 224)).to_dict() == {
        **{"resize": "bicubic", "antialias": True, "resize_short": 256, "truncate": False},
        **{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    for record in RECORDS.values():
        assert Preprocess.from_dict(record.to_dict()) == record


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_what_a_graph_takes(dtype, channels_first):
    """A uint8 graph normalises by itself; the others get (x / 255 - mean) / std, in their own type and order of
    axes."""
    record, images = (
        preprocess_for("imagenet", (4, 6)),
        np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8),
    )
    mean, std = map(np.array, IMAGENET)
    wanted = images if dtype == "uint8" else (images / 255.0 - mean) / std
    got = record.graph_input(images, dtype, channels_first=channels_first)
    assert got.dtype == np.dtype(dtype) and got.flags.c_contiguous
    back = got.transpose(0, 2, 3, 1) if channels_first else got
    # half of a unit at values below 4
    assert np.abs(back.astype(np.float64) - wanted).max() <= (2e-3 if dtype == "float16" else 2e-6)
