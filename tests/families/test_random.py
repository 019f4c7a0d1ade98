import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint


def write(path, *arguments):
    command = [sys.executable, "-m", "vit_convert.families.random", f"--output={path}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_seed_decides_every_byte(checkpoint):
    first = checkpoint("mu/16", name="first.npz", seed=3).read_bytes()
    assert checkpoint("mu/16", name="again.npz", seed=3).read_bytes() == first
    assert checkpoint("mu/16", name="other.npz", seed=4).read_bytes() != first


def test_memory_is_one_leaf(tmp_path):
    tracemalloc.start()
    write_random_checkpoint(tmp_path / "S16.npz", "S/16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The largest leaf has 384·1536 floats, 2.4 MB; drawing, scaling and writing it hold it a few times. The file has 88
    # MB.
    assert peak < 12 << 20
    assert load_checkpoint(tmp_path / "S16.npz").num_params == 22_050_664


@pytest.mark.parametrize(("variant", "channels"), [("S/16", 4), ("mu/16", 2)])
def test_outlier_channels_reach_their_size(checkpoint, variant, channels):
    from vit_convert.families.vit.model import vit_model

    loaded = load_checkpoint(checkpoint(variant, outlier_channels=channels))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    model = vit_model(loaded.architecture, loaded.params)
    taps = model.run(images)
    blocks = [np.abs(taps[name]) for name in model.taps if name.startswith("block")]
    assert len(blocks) == loaded.architecture.depth
    for block in blocks:
        assert 1e3 < block.max() < 2e3
        assert ((block > 500).any(axis=(0, 1))).sum() == channels
        # The rest of the model is alive: its other channels are of the size that they have without outliers.
        assert 0.3 < np.median(block) < 5
    assert 0.3 < taps["logits"].std() < 3
    assert np.abs(taps["logits"][0] - taps["logits"][1]).max() > 0.1


def test_command_line(tmp_path):
    path = tmp_path / "mu.npz"
    done = write(path, "--variant=mu/16", "--image_size=32,64", "--num_classes=7", "--layout=big_vision", "--pool=map")
    assert done.returncode == 0, done.stderr
    assert "mu/16" in done.stdout
    architecture = load_checkpoint(path, posemb_grid=(2, 4)).architecture
    assert (architecture.image_size, architecture.num_classes, architecture.pool) == ((32, 64), 7, "map")


def test_command_line_errors_leave_nothing(tmp_path):
    path = tmp_path / "none.npz"
    done = write(path, "--variant=XL/16")
    assert done.returncode == 2 and "variant 'XL/16': unknown" in done.stderr and "Traceback" not in done.stderr
    assert not list(pathlib.Path(tmp_path).iterdir())


def test_fewer_blocks_than_the_variant(checkpoint):
    short, whole = (load_checkpoint(checkpoint("Ti/16", name=f"{depth}.npz", depth=depth)) for depth in (2, None))
    assert (short.architecture.depth, whole.architecture.depth) == (
        2,
        12,
    ) and short.architecture.width == whole.architecture.width


def test_odd_number_of_outliers(tmp_path):
    with pytest.raises(UsageError, match="outlier_channels 3: odd"):
        write_random_checkpoint(tmp_path / "x.npz", "mu/16", outlier_channels=3)


def test_layout_that_always_stores_its_table(tmp_path):
    with pytest.raises(UsageError, match="always stores its position table"):
        write_random_checkpoint(tmp_path / "x.npz", "mu/16", posemb="sincos2d")
