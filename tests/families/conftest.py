"""What the tests of several families share."""

import pytest

from vit_convert.families.family import RandomOptions


@pytest.fixture
def written(tmp_path):
    def write(family, variant, suffix=".npz", **options):
        path = tmp_path / f"model{suffix}"
        family.write_random(path, variant, RandomOptions(**{"image_size": (48, 48), **options}))
        return path

    return write
