"""Which profile runs which batch."""

import itertools

import pytest
from signatures import image_input

from vit_convert.core.errors import BenchmarkError
from vit_convert.core.image_size import ImageRange
from vit_convert.engine.runtime.profiles import (
    Choice,
    ShapeRange,
    batch_profiles,
    choose_profile,
    describe,
    largest_batch,
)

IMAGE = (8, 8, 3)


def ranges(*triples):
    return [ShapeRange(*((size, *IMAGE) for size in triple)) for triple in triples]


ALL = ranges((1, 8, 64), (1, 1, 1), (64, 64, 64), (1, 16, 256), (256, 256, 256))


@pytest.mark.parametrize(("batch", "index"), [(1, 1), (2, 0), (63, 0), (64, 2), (65, 3), (255, 3), (256, 4)])
def test_smallest_that_fits_and_fixed_before_range(batch, index):
    assert choose_profile(ALL, (batch, *IMAGE)) == Choice(index, (batch, *IMAGE))


def test_padding_goes_to_the_next_size():
    fixed = ranges((8, 8, 8), (1, 1, 1), (64, 64, 64))
    assert choose_profile(fixed, (5, *IMAGE)) == Choice(0, (8, *IMAGE))
    assert choose_profile(fixed, (9, *IMAGE)) == Choice(2, (64, *IMAGE))


@pytest.mark.parametrize("order", itertools.permutations([(4, 6, 9), (2, 4, 12), (5, 5, 5), (7, 8, 16)]))
def test_the_tightest_range_in_any_order(order):
    """The width of a range counts, not where it ends or begins; a fixed profile goes before all."""
    found = ranges(*order)
    expected = {2: (2, 4, 12), 4: (4, 6, 9), 5: (5, 5, 5), 9: (4, 6, 9), 10: (7, 8, 16), 12: (7, 8, 16), 16: (7, 8, 16)}
    for batch, triple in expected.items():
        assert choose_profile(found, (batch, *IMAGE)) == Choice(order.index(triple), (batch, *IMAGE)), batch


@pytest.mark.parametrize("order", itertools.permutations([(4, 6, 9), (3, 4, 12), (3, 3, 3), (8, 8, 8)]))
def test_padding_goes_to_the_smallest_start_and_to_a_fixed_profile_before_a_range(order):
    found = ranges(*order)
    assert choose_profile(found, (1, *IMAGE)) == Choice(order.index((3, 3, 3)), (3, *IMAGE))


def test_equals_go_to_the_first():
    assert choose_profile(ranges((1, 4, 8), (1, 8, 8)), (2, *IMAGE)).index == 0
    assert choose_profile(ranges((4, 4, 8), (4, 8, 8)), (2, *IMAGE)).index == 0


def test_every_batch_up_to_the_largest_runs_in_a_profile_that_accepts_it():
    for triples in itertools.combinations([(1, 1, 1), (2, 4, 8), (8, 8, 8), (3, 3, 5), (16, 16, 16)], 3):
        found = ranges(*triples)
        for batch in range(1, largest_batch(found, (1, *IMAGE)) + 1):
            choice = choose_profile(found, (batch, *IMAGE))
            assert found[choice.index].accepts(choice.shape) and choice.shape[0] >= batch
            if any(r.accepts((batch, *IMAGE)) for r in found):
                assert choice.shape[0] == batch


def test_other_images_are_refused():
    with pytest.raises(BenchmarkError, match=r"\[4, 9, 8, 3\]: the engine takes \[1, 8, 8, 3\] to \[64, 8, 8, 3\]"):
        choose_profile(ranges((1, 8, 64)), (4, 9, 8, 3))
    with pytest.raises(BenchmarkError, match=r"\[4, 9, 8, 3\]: the engine takes \[8, 8, 8, 3\]"):
        largest_batch(ranges((8, 8, 8)), (4, 9, 8, 3))
    with pytest.raises(BenchmarkError):
        choose_profile(ranges((1, 8, 64)), (65, *IMAGE))


@pytest.mark.parametrize("batch", [1, 7, 8, 9])
@pytest.mark.parametrize("image", [(9, 8, 3), (8, 7, 3), (8, 8, 4), (8, 8), (8, 8, 3, 1)])
def test_other_images_are_refused_at_any_batch(batch, image):
    """Also one that would be padded: its batch lies below the fixed profile, and its images are none of the
    engine's."""
    with pytest.raises(BenchmarkError, match="the engine takes"):
        choose_profile(ranges((8, 8, 8), (16, 16, 32)), (batch, *image))
    with pytest.raises(BenchmarkError, match="the engine takes"):
        largest_batch(ranges((8, 8, 8), (16, 16, 32)), (batch, *image))


BATCH = {"min": 1, "opt": 8, "max": 64, "profiles": [256, 1]}
NHWC, NCHW = "".join("NHWC"), "".join("NCHW")  # as words out of a file are: none of Python's own copies


def test_profiles_of_a_batch():
    found = batch_profiles(image_input((16, 24), NHWC), (16, 24), BATCH)
    assert [profile["images"] for profile in found] == [
        tuple((size, 16, 24, 3) for size in sizes) for sizes in [(256, 256, 256), (1, 1, 1), (1, 8, 64)]
    ]
    found = batch_profiles(image_input((16, 24), NCHW), (16, 24), {**BATCH, "profiles": []})
    assert found == [{"images": ((1, 3, 16, 24), (8, 3, 16, 24), (64, 3, 16, 24))}]


def test_a_range_that_is_one_size_is_built_once():
    assert (
        len(batch_profiles(image_input((16, 24), "NHWC"), (16, 24), {"min": 4, "opt": 4, "max": 4, "profiles": [4, 4]}))
        == 1
    )


def test_profiles_of_a_dynamic_graph_are_over_its_image_sizes():
    sizes = ImageRange((16, 32), (32, 48), (64, 96))
    found = batch_profiles(image_input(sizes, "NCHW"), sizes, {**BATCH, "profiles": [2]})
    assert found[0] == {"images": ((2, 3, 16, 32), (2, 3, 32, 48), (2, 3, 64, 96))}
    assert found[1] == {"images": ((1, 3, 16, 32), (8, 3, 32, 48), (64, 3, 64, 96))}


def test_fixed_means_one_shape():
    assert ShapeRange((2, *IMAGE), (2, *IMAGE), (2, *IMAGE)).fixed
    assert not ShapeRange((2, *IMAGE), (2, *IMAGE), (2, 8, 9, 3)).fixed


def test_dynamic_resolution():
    wide = [ShapeRange((1, 160, 160, 3), (8, 224, 224, 3), (64, 448, 448, 3))]
    assert choose_profile(wide, (64, 160, 448, 3)).index == 0
    assert largest_batch(wide, (100, 320, 320, 3)) == 64
    with pytest.raises(BenchmarkError):
        choose_profile(wide, (1, 464, 448, 3))


def test_describe():
    assert describe(ranges((1, 8, 64), (256, 256, 256))) == "[1, 8, 8, 3] to [64, 8, 8, 3], or [256, 8, 8, 3]"
