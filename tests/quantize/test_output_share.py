"""What stays out of INT8 for its share in the output's error: by losses that add up, against all sets there are."""

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import pytest
from tiny_vit import TOKENS, WIDTH, TinyViT, normalize

from vit_convert.core.sensitivity_record import Measured
from vit_convert.quantize.output_share import choose, multiplications, units_by_tensor
from vit_convert.quantize.placement import Site, place
from vit_convert.quantize.precision_plan import Budget
from vit_convert.quantize.sensitivity import Unit

ANY = float("inf")


class Additive:
    """Stands for the sensitivity: each unit costs each image so much, and costs add up.

    Attributes:
        units: of the model.
        judged: how many sets were run over all images.
        glimpsed: the sets that were run over the images that lost most.
    """

    def __init__(self, costs, top1=None):
        self.costs = {name: np.atleast_1d(np.asarray(cost, float)) for name, cost in costs.items()}
        self.units = [Unit(*name.split("/"), (), 1) for name in costs]
        self.judged, self.glimpsed, self.worst, self.top1 = 0, [], [], top1

    def lost(self, names):
        return sum((self.costs[name] for name in names), np.zeros(len(next(iter(self.costs.values())))))

    def measured(self, names, lost):
        top1 = None if self.top1 is None else self.top1(names)
        return Measured(tuple(names), float(lost.mean()), 1 - float(lost.max()), 0.0, 100.0, top1)

    def judge(self, names):
        lost = self.lost(names)
        self.judged += 1
        if names:
            self.worst = sorted({*self.worst, int(lost.argmax())})
        return self.measured(names, lost)

    def glimpse(self, names):
        self.glimpsed.append(tuple(names))
        return self.measured(names, self.lost(names)[self.worst])


def cosine_of(sensitivity, left_out):
    return 1 - sensitivity.lost([name for name in sensitivity.costs if name not in left_out]).max()


def test_where_everything_fits_nothing_is_measured_alone():
    sensitivity = Additive({"a/fc1": 0.002, "a/fc2": 0.003})
    found = choose(sensitivity, {"a/fc1": 1.0, "a/fc2": 1.0}, Budget(0.99, ANY, 0))
    assert (found.left_out, found.shares, found.missed) == ((), {}, "")
    assert found.cosine == found.cosine_before == pytest.approx(0.995)
    assert not sensitivity.glimpsed and sensitivity.judged == 2  # fp32, and everything in INT8


@pytest.mark.parametrize("seed", range(6))
def test_as_few_as_any_set_has_where_all_take_the_same_time(seed):
    rng = np.random.default_rng(seed)
    sensitivity = Additive({f"block_{i}/fc2": rng.exponential(2e-3) for i in range(9)})
    found = choose(sensitivity, dict.fromkeys(sensitivity.costs, 1.0), Budget(0.993, ANY, 0))
    fewest = min(
        n for n in range(10) for some in itertools.combinations(sensitivity.costs, n)
        if cosine_of(sensitivity, some) >= 0.993
    )  # fmt: skip
    assert len(found.left_out) == fewest > 0 and not found.missed
    assert found.cosine == pytest.approx(cosine_of(sensitivity, found.left_out)) and found.cosine >= 0.993
    assert found.cosine_before < 0.993


def test_what_takes_no_time_goes_before_what_costs_more():
    """The last block computes one token: in FP16 it costs the output nothing, and no time."""
    sensitivity = Additive({"last/fc2": 0.004, "a/fc2": 0.006, "b/fc2": 0.003})
    times = {"last/fc2": 1 / 257, "a/fc2": 1.0, "b/fc2": 1.0}
    assert choose(sensitivity, times, Budget(0.99, ANY, 0)).left_out == ("last/fc2",)
    assert choose(sensitivity, times, Budget(0.995, ANY, 0)).left_out == ("last/fc2", "a/fc2")
    assert choose(sensitivity, dict.fromkeys(times, 1.0), Budget(0.99, ANY, 0)).left_out == ("a/fc2",)


def test_another_image_that_loses_most_afterwards_counts_too():
    """By the first image alone, "a" would be enough."""
    sensitivity = Additive({"a/fc2": [0.05, 0.0], "b/fc2": [0.0, 0.03], "c/fc2": [0.001, 0.001]})
    found = choose(sensitivity, dict.fromkeys(sensitivity.costs, 1.0), Budget(0.99, ANY, 0))
    assert {*found.left_out} >= {"a/fc2", "b/fc2"} and found.cosine >= 0.99 and not found.missed


def test_what_has_no_time_stays_and_may_be_too_much():
    sensitivity = Additive({"a/attention": 0.02, "a/fc2": 0.02})
    found = choose(sensitivity, {"a/fc2": 1.0}, Budget(0.99, ANY, 0))
    assert found.left_out == ("a/fc2",) and found.missed == "cosine 0.9800000 is below 0.99"
    assert "a/attention" not in found.shares


def test_top1_is_a_part_of_the_budget():
    gone = lambda names: 3 - sum(name in names for name in ("a/fc2", "b/fc2", "c/fc2"))  # noqa: E731
    costs = {"a/fc2": 3e-4, "b/fc2": 2e-4, "c/fc2": 1e-4, "d/fc2": 1e-5}
    sensitivity = Additive(costs, top1=lambda names: 90.0 + gone(names) if names else 93.0)
    found = choose(sensitivity, dict.fromkeys(costs, 1.0), Budget(0.99, 1.0, 0))
    assert found.left_out == ("a/fc2", "b/fc2") and not found.missed  # 92 % of 93 %


def test_equal_shares_are_told_apart_by_name():
    sensitivity = Additive(dict.fromkeys(("b/fc2", "a/fc2", "c/fc2"), 0.006))
    assert choose(sensitivity, dict.fromkeys(sensitivity.costs, 1.0), Budget(0.99, ANY, 0)).left_out == (
        "a/fc2",
        "b/fc2",
    )


def test_readers_of_one_tensor_go_together(tmp_path):
    model = ir.load(TinyViT(fused_qkv=False).save(tmp_path / "model.onnx"))
    placed = place(model).sites
    units = units_by_tensor(model, placed)
    assert [unit.name for unit in units][:4] == ["block_00/query", "block_00/out", "block_00/fc1", "block_00/fc2"]
    assert [site.kind for site in units[0].sites] == ["query", "key", "value"]
    assert units[0].num_weights == 3 * WIDTH**2 and sum(len(unit.sites) for unit in units) == len(placed)
    without = Site("block_00", "VitAttention", "qkv", "attended")
    assert units_by_tensor(model, [without])[0].num_weights == 0


def test_multiplications_of_an_image(tmp_path, images):
    path = TinyViT(fused_qkv=False).save(tmp_path / "model.onnx")
    model = ir.load(path)
    units = units_by_tensor(model, place(model).sites)
    found = multiplications(path, units, images, normalize)
    assert found == {
        f"block_0{i}/{kind}": TOKENS * WIDTH * outputs
        for i in range(2)
        for kind, outputs in (("query", 3 * WIDTH), ("out", WIDTH), ("fc1", 2 * WIDTH), ("fc2", 2 * WIDTH))
    }
    renamed = [dataclasses.replace(unit, kind=f"{unit.kind}_") for unit in units]
    assert [*multiplications(path, renamed, images[:1], normalize)] == [unit.name for unit in renamed]


def test_a_kind_that_costs_little_is_measured_once():
    costs = {f"block_{i:02d}/{kind}": cost for kind, cost in (("fc1", 1e-5), ("fc2", 0.002)) for i in range(8)}
    sensitivity = Additive({**costs, "block_03/fc2": 0.004})
    found = choose(sensitivity, dict.fromkeys(costs, 1.0), Budget(0.99, ANY, 0))
    alone = [names for names in sensitivity.glimpsed if len(names) == 1]
    assert len(alone) == 8 and all(name.endswith("fc2") for (name,) in alone)
    assert found.left_out[0] == "block_03/fc2" and len(found.left_out) == 4 and found.cosine >= 0.99
    assert found.shares["block_00/fc1"] == pytest.approx(1e-5) and len(found.shares) == 16
