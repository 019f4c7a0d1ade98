"""Which profile runs which batch."""

import itertools

import pytest

from vit_convert.engine.profiles import Choice, ShapeRange, choose_profile, describe, largest_batch
from vit_convert.errors import BenchmarkError

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


def test_dynamic_resolution():
    wide = [ShapeRange((1, 160, 160, 3), (8, 224, 224, 3), (64, 448, 448, 3))]
    assert choose_profile(wide, (64, 160, 448, 3)).index == 0
    assert largest_batch(wide, (100, 320, 320, 3)) == 64
    with pytest.raises(BenchmarkError):
        choose_profile(wide, (1, 464, 448, 3))


def test_describe():
    assert describe(ranges((1, 8, 64), (256, 256, 256))) == "[1, 8, 8, 3] to [64, 8, 8, 3], or [256, 8, 8, 3]"
