"""What a unit costs: what calibration measured where it did, else what a guard says of the rows of some images."""

import ml_dtypes
import numpy as np
import pytest

from vit_convert.core.progress import Progress
from vit_convert.quantize import ranking
from vit_convert.quantize.calibrate import Calibration
from vit_convert.quantize.guard import Cost, Shift
from vit_convert.quantize.placement import Site
from vit_convert.quantize.ranking import unit_costs
from vit_convert.quantize.sensitivity import Unit

QKV = tuple(Site("block_00", kind, "norm", f"{kind}_out", f"{kind}_w") for kind in ("query", "key", "value"))
FC2 = (Site("block_00", "fc2", "gelu", "fc2_out", "fc2_w"),)
ATTENTION = (
    Site("block_00", "scaled_q", "q", "scores"),
    Site("block_00", "k", "k", "scores"),
    Site("block_00", "softmax", "softmax", "attended", None, 1.0),
)
UNITS = [Unit("block_00", kind, sites, 1) for kind, sites in (("qkv", QKV), ("fc2", FC2), ("attention", ATTENTION))]
IMAGES = np.arange(64, dtype=np.uint8).reshape(64, 1, 1, 1)
THRESHOLDS = {"norm": 2.0, "gelu": 3.0, "q": 4.0, "k": 5.0}
AMAX = {name: 10 * value for name, value in THRESHOLDS.items()}
ROWS = np.array([[-3.0, 0.33, 1.26, 0.02, 7.0]], np.float32)


def calibration(**costs: Cost) -> Calibration:
    return Calibration(THRESHOLDS, AMAX, "entropy", 64, {}, costs)


@pytest.fixture
def passes(monkeypatch):
    """The passes over images that were asked for; what one finds is the threshold, and how it rounds is kept."""
    found = []

    class Rows:
        def error(self, name, threshold, rounded):
            found[-1]["rounded"][name] = rounded(ROWS, 3.0)
            return threshold

    def sample_products(path, tensors, images, normalize, **options):
        found.append({"of": (path, tensors, images.ravel().tolist(), normalize), "rounded": {}, **options})
        return Rows()

    monkeypatch.setattr(ranking, "sample_products", sample_products)
    return found


def test_what_calibration_measured_takes_no_pass(passes):
    """A tensor that three linears read is quantized once."""
    known = calibration(norm=Cost([1.0, 2.0], [0.5, 0.25]), gelu=Cost([1.0], [0.75]))
    assert unit_costs("m.onnx", known, UNITS[:2], None, None, precision="int8") == {
        "block_00/qkv": 0.25,
        "block_00/fc2": 0.75,
    }
    shifted = Calibration(**{**vars(known), "shifts": {"gelu": Shift(1.0, 1.0, 0.125)}})
    assert unit_costs("m.onnx", shifted, UNITS[1:2], None, None, precision="int8") == {"block_00/fc2": 0.125}
    assert passes == []


def test_one_pass_for_what_it_did_not(passes):
    progress = Progress(quiet=True)
    known = calibration(norm=Cost([1.0], [0.25]))
    costs = unit_costs("m.onnx", known, UNITS, IMAGES, len, precision="int8", batch_size=5, progress=progress)
    # by the thresholds of calibration, but where the largest is known without
    assert costs == {"block_00/qkv": 0.25, "block_00/fc2": 3.0, "block_00/attention": 4.0 + 5.0 + 1.0}
    ((only),) = passes
    # sixteen of the images, evenly spaced
    assert only["of"] == ("m.onnx", ["gelu", "q", "k", "softmax"], list(range(2, 64, 4)), len)
    assert (only["batch_size"], only["progress"]) == (5, progress)
    steps = np.round(ROWS.astype(np.float64) * 127 / 3).clip(-127, 127)
    for rounded in only["rounded"].values():
        np.testing.assert_allclose(rounded, steps * 3 / 127, rtol=1e-6)  # float32 of the same
        assert rounded.dtype == np.float32


def test_few_images_are_all_taken(passes):
    unit_costs("m.onnx", calibration(), UNITS[:1], IMAGES[:3], len, precision="int8")
    assert passes[0]["of"][2] == [0, 1, 2] and passes[0]["batch_size"] == 8 and passes[0]["progress"] is None


def test_fp8_keeps_the_largest_value_and_rounds_as_it_does(passes):
    """What int8 loses says nothing of it."""
    known = calibration(norm=Cost([1.0], [0.25]))
    costs = unit_costs("m.onnx", known, UNITS, IMAGES, len, precision="fp8")
    assert costs == {"block_00/qkv": 20.0, "block_00/fc2": 30.0, "block_00/attention": 40.0 + 50.0 + 1.0}
    scaled = np.clip(ROWS.astype(np.float64) * 448 / 3, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_allclose(passes[0]["rounded"]["norm"], scaled.astype(np.float64) * 3 / 448, rtol=1e-6)
