"""Text towers that take shorter texts, and those that do not, with the reason."""

import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.core.token_samples import sample_texts
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint


@pytest.fixture
def loaded(tmp_path):
    """Loads a tower of a random checkpoint."""

    def load(variant, suffix="npz", tower=":txt", **options):
        path = tmp_path / f"model.{suffix}"
        write_random_checkpoint(path, variant, image_size=(32, 32))
        return load_checkpoint(f"{path}{tower}", **options)

    return load


def test_a_clip_of_fewer_tokens_is_the_same_tower(loaded):
    """Its table, its pair's rule and its record end earlier; a text that fits has the embedding that it had."""
    whole = loaded("CLIP-mu/16", "safetensors")
    short = loaded("CLIP-mu/16", "safetensors", text_length=7)
    assert short.pair.length == short.architecture.length == 7 and whole.pair.length == 12 and "7 tokens" in short.takes
    assert short.params["pos_embedding"].shape == (1, 7, 24)
    assert whole.num_params - short.num_params == 5 * 24
    tokens = sample_texts(short.family.model(short).signature.inputs[0], 4, np.random.default_rng(0))
    filled = np.zeros((4, 12), np.int32)
    filled[:, :7] = tokens
    ours, theirs = (m.family.model(m).run(t)["embedding"] for m, t in ((short, tokens), (whole, filled)))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # of unit vectors; float32


@pytest.mark.parametrize(
    ("variant", "why"),
    [("SigLIP-mu/16", "its embedding is taken at token 64"), ("LiT-muV", "its embedding is taken at token 16")],
)
def test_a_tower_that_pools_its_last_token_has_one_length(loaded, variant, why):
    assert why in loaded(variant).one_length
    with pytest.raises(UsageError, match=why):
        loaded(variant, text_length=8)


def test_no_longer_texts_than_the_table_and_no_texts_of_images(loaded):
    with pytest.raises(UsageError, match="text_length=13: the position table has 12 places"):
        loaded("CLIP-mu/16", "safetensors", text_length=13)
    with pytest.raises(UsageError, match="takes no text"):
        loaded("CLIP-mu/16", "safetensors", ":img", text_length=8)
    with pytest.raises(UsageError, match="takes no text"):
        loaded("mu/16", tower="", text_length=8)
