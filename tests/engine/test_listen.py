"""The fraction that TensorRT's nested build phases add up to."""

import pytest

from vit_convert.engine.listen import BuildClock


def test_nested_phases_add_up_and_only_grow():
    steps = []
    clock = BuildClock(steps.append)
    clock.start("build", None, 2)
    clock.step("build", 0)  # half of all
    assert sum(steps) == pytest.approx(1 / 2)
    clock.start("subgraph", "build", 4)
    clock.step("subgraph", 0)  # a quarter of the second half
    assert sum(steps) == pytest.approx(1 / 2 + 1 / 8)
    clock.start("tactics", "subgraph", 10)
    clock.step("tactics", 4)  # half of the second quarter of the second half
    assert sum(steps) == pytest.approx(1 / 2 + 1 / 8 + 1 / 16)
    clock.start("again", "subgraph", 1)  # a second child within the same step starts from the step's beginning: no step back
    assert sum(steps) == pytest.approx(1 / 2 + 1 / 8 + 1 / 16)
    for phase in ("again", "tactics", "subgraph", "build"):
        clock.finish(phase)
    assert sum(steps) == pytest.approx(1.0)
    assert min(steps) > 0
