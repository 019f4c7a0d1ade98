"""The guard against float64 brute force: huge values that carry the products are kept, huge values that meet no weight
are clipped."""

import numpy as np
import onnx_ir as ir
import pytest
from tiny_vit import TinyViT, normalize

from vit_convert.quantize import guard as module
from vit_convert.quantize.calibrate import Calibration, calibrate
from vit_convert.quantize.guard import Cost, Guard, as_rows, candidates, product_errors, readers
from vit_convert.quantize.histogram import Histogram, entropy_threshold, mse_threshold
from vit_convert.quantize.placement import place
from vit_convert.quantize.rows import RowSample, priorities

ROWS, CHANNELS, HUGE = 2000, 32, 60.0


def tensor(array):
    return ir.tensor(np.asarray(array, np.float32), name="weight")


def activation(rng, huge_channel: int = 5, huge_rows: int = 12) -> np.ndarray:
    """Normal values, and one channel that is huge in a few rows: the shape of a trained transformer's massive
    activations."""
    x = rng.normal(size=(ROWS, CHANNELS)).astype(np.float32)
    x[:huge_rows, huge_channel] = HUGE * rng.uniform(0.9, 1.0, huge_rows)
    return x


def brute_force(x: np.ndarray, weight: np.ndarray, threshold: float) -> float:
    """The error of a threshold over all rows in float64: products of what is exact and of what is rounded, row by
    row."""
    step, total, mean, weight = threshold / 127, 0.0, 0.0, weight.astype(np.float64)
    for row in x.astype(np.float64):
        exact, rounded = row @ weight, np.clip(np.round(row / step), -127, 127) * step @ weight
        total += float(((exact - rounded) ** 2).sum()) ** 4
        mean += float((exact**2).sum())
    return (total / len(x)) ** 0.25 / (mean / len(x))


def guarded(x: np.ndarray, weight: np.ndarray, entropy: float) -> Cost:
    sample = RowSample()
    for key, part in enumerate(np.array_split(x, 8)):
        sample.add(part, priorities([key], len(part)))
    thresholds = candidates(entropy, float(np.abs(x).max()))
    return Cost(thresholds, product_errors(*sample.rows(), [tensor(weight)], thresholds))


def test_errors_match_brute_force_where_every_row_is_kept():
    rng = np.random.default_rng(0)
    x, weight = activation(rng)[:200], rng.normal(size=(CHANNELS, 7)).astype(np.float32)
    sample = RowSample(top=50, rest=150)
    sample.add(x, priorities([3], len(x)))
    thresholds = [3.0, 17.0, HUGE]
    found = product_errors(*sample.rows(), [tensor(weight)], thresholds)
    # float32 products of 32 terms against float64 ones
    np.testing.assert_allclose(found, [brute_force(x, weight, t) for t in thresholds], rtol=1e-4)


def test_huge_values_that_carry_the_products_are_kept():
    rng = np.random.default_rng(1)
    x, weight = activation(rng), rng.normal(size=(CHANNELS, 16)).astype(np.float32)
    histogram = Histogram()
    histogram.add(x)
    entropy = entropy_threshold(histogram)
    assert entropy < 0.2 * HUGE  # the fault: 12 of 64 000 values are nothing to it
    cost = guarded(x, weight, entropy)
    exact = [brute_force(x, weight, t) for t in cost.candidates]
    assert cost.best == cost.candidates[int(np.argmin(exact))] > 0.8 * HUGE
    assert cost.errors[0] > 10 * min(cost.errors)


def test_huge_values_that_meet_no_weight_are_clipped():
    rng = np.random.default_rng(1)
    x, weight = activation(rng), rng.normal(size=(CHANNELS, 16)).astype(np.float32)
    weight[5] = 0.0
    cost = guarded(x, weight, 4.0)
    exact = [brute_force(x, weight, t) for t in cost.candidates]
    assert cost.best == cost.candidates[int(np.argmin(exact))] < 0.1 * HUGE
    assert cost.errors[-1] > 10 * min(cost.errors)  # the whole range would leave the others two steps


def test_the_sample_stands_for_all_rows():
    """32 of the largest and 128 of the others: the error of 2 000 rows to a fifth, and the same best threshold."""
    rng = np.random.default_rng(2)
    x, weight = (
        rng.standard_t(4, size=(ROWS, CHANNELS)).astype(np.float32),
        rng.normal(size=(CHANNELS, 16)).astype(np.float32),
    )
    cost = guarded(x, weight, 3.0)
    exact = [brute_force(x, weight, t) for t in cost.candidates]
    # a squared error varies by about 1.5 times itself from row to row: 1.5/√128
    np.testing.assert_allclose(cost.errors, exact, rtol=0.2)
    assert exact[cost.candidates.index(cost.best)] <= 1.05 * min(exact)


def test_some_columns_stand_for_a_wide_weight():
    rng = np.random.default_rng(6)
    x, weight = activation(rng)[:160], rng.normal(size=(CHANNELS, 1000)).astype(np.float32)
    sample = RowSample()
    sample.add(x, priorities([0], len(x)))
    thresholds = candidates(4.0, HUGE)
    found = product_errors(*sample.rows(), [tensor(weight)], thresholds)
    exact = [brute_force(x, weight, t) for t in thresholds]
    # 250 columns: a sum of 250 squares to √(2/250) = 9 %, here of few rows
    np.testing.assert_allclose(found, exact, rtol=0.25)
    assert int(np.argmin(found)) == int(np.argmin(exact))


def test_order_and_batches_do_not_matter():
    rng = np.random.default_rng(3)
    images = rng.normal(size=(24, 50, 8)).astype(np.float32)
    kept = []
    for order, size in ((range(24), 24), (range(23, -1, -1), 5), (rng.permutation(24), 1)):
        sample, order = RowSample(), list(order)
        for start in range(0, 24, size):
            keys = order[start : start + size]
            sample.add(images[keys].reshape(-1, 8), priorities(keys, 50 * len(keys)))
        rows, counts = sample.rows()
        kept.append((np.sort(rows, axis=0), counts.sum()))
    for rows, total in kept:
        np.testing.assert_array_equal(rows, kept[0][0])
        assert total == 24 * 50 and len(rows) == 160


def test_a_small_tensor_is_kept_whole():
    sample = RowSample()
    for key in range(5):
        sample.add(np.full((3, 2), key, np.float32), priorities([key], 3))
    rows, counts = sample.rows()
    assert len(rows) == 15 and (counts == 1).all()


def test_of_equal_errors_the_largest_threshold_wins():
    assert Cost([1.0, 2.0, 3.0], [0.5, 0.25, 0.25]).best == 3.0


@pytest.mark.parametrize(
    ("entropy", "amax", "number"),
    [(1.0, 1.0, 1), (1.001, 1.0, 1), (0.99, 1.0, 2), (1.0, 8.0, 10), (1.0, 1e9, 13), (1.0, 1.0001, 2)],
)
def test_candidates_reach_from_entropy_to_the_largest(entropy, amax, number):
    found = candidates(entropy, amax)
    assert len(found) == number and found == sorted(set(found)) and found[-1] == max(entropy, amax)
    assert number == 1 or found[0] == pytest.approx(entropy)


@pytest.mark.parametrize(
    ("shape", "channels", "moved"),
    [
        ((2, 5, 6), 6, lambda x: x.reshape(10, 6)),
        ((10, 6, 1, 1), 6, lambda x: x.reshape(10, 6)),
        ((2, 6, 3, 4), 6, lambda x: np.moveaxis(x, 1, 3).reshape(24, 6)),
        ((2, 3, 5, 2), 6, lambda x: np.stack([x[b, :, t].reshape(6) for b in range(2) for t in range(5)])),
        ((2, 3, 5, 2), None, lambda x: x.reshape(30, 2)),
    ],
    ids=["tokens", "beside-the-batch", "NCHW", "attended", "no-reader"],
)
def test_rows_are_what_the_weight_multiplies(shape, channels, moved):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(as_rows(x, channels), moved(x))


@pytest.mark.parametrize("fused", [True, False], ids=["qkv", "three"])
def test_readers_are_found_in_a_graph(tmp_path, fused):
    model = ir.load(TinyViT(fused_qkv=fused).save(tmp_path / "model.onnx"))
    values = {v.name: v for node in model.graph for v in node.outputs}
    for attention in (False, True):
        placed = place(model, attention=attention)
        wanted: dict[str, set[str]] = {}
        for site in placed.sites:
            wanted.setdefault(site.tensor, set()).update({site.weight} if site.weight else set())
        for name, weights in wanted.items():
            assert {weight.name for weight in readers(values[name])} == weights


def test_calibration_widens_what_the_products_need(tmp_path, images, monkeypatch):
    """A model whose fc2 reads one huge unit of few tokens: entropy cuts it, and the report says what that would have
    cost."""
    monkeypatch.setattr(TinyViT, "weight", _massive)
    path = TinyViT().save(tmp_path / "model.onnx")
    name = next(
        tensor for tensor in place(ir.load(path)).tensors() if tensor.endswith("encoderblock_0/MlpBlock_0/gelu")
    )
    plain = calibrate(path, images, normalize, [name], method="entropy_plain")
    found = calibrate(path, images, normalize, [name])
    assert plain.thresholds[name] < 0.5 * plain.amax[name] and not plain.costs
    assert found.thresholds[name] > 2 * plain.thresholds[name] and list(found.widened()) == [name]
    cost = found.costs[name]
    assert cost.candidates[0] == plain.thresholds[name] and cost.candidates[-1] == plain.amax[name]
    assert cost.errors[0] > 3 * min(cost.errors)
    found.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == found


def _massive(vit, name, value):
    """TinyViT.weight, but for one unit of the first MLP that few tokens drive, and those far."""
    value = np.array(value)
    if name == "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel":
        value[:, 7] *= 14.0
    if name == "Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias":
        value[7] -= 25.0
    vit.weights[name] = value
    return name


def test_a_tensor_that_no_linear_reads_is_judged_by_itself(tmp_path, images):
    path = TinyViT().save(tmp_path / "model.onnx")
    model, pixels = ir.load(path), normalize(images[:4])
    judge = Guard(model, ["images"])
    judge.add("images", pixels, [0, 1, 2, 3])
    rows = pixels.reshape(-1, 3)
    assert len(rows) > 160  # the largest rows and some of the others
    cost = judge.cost("images", 0.5, 1.0)
    assert cost.best == 1.0 and cost.candidates[0] == pytest.approx(0.5)
    assert module.LEVELS == 127


def test_mse_is_the_best_of_brute_force():
    rng = np.random.default_rng(4)
    x = rng.standard_t(3, size=100_000).astype(np.float32)
    histogram = Histogram()
    histogram.add(x)

    def error(threshold):
        step = threshold / 127
        return float(((x - np.clip(np.rint(x.astype(np.float64) / step), -127, 127) * step) ** 2).mean())

    found = mse_threshold(histogram)
    tried = np.linspace(histogram.amax / 40, histogram.amax, 400)
    # the histogram knows a value to a bin, a step is some bins wide
    assert error(found) <= 1.02 * min(map(error, tried))
    assert found < histogram.amax


def test_mse_does_not_clip_a_uniform():
    histogram = Histogram()
    histogram.add(np.random.default_rng(5).uniform(-4, 4, 200_000).astype(np.float32))
    assert mse_threshold(histogram) > 0.98 * histogram.amax
