"""What of a lowering stays out of INT8 for the output's sake: the budget, and what is said of the choice."""

import math
import types

import pytest
from stage_context import make_context

from vit_convert.core.errors import CheckError
from vit_convert.core.stage_results import OutputShare, ShareOfProduct
from vit_convert.quantize.output_share import Choice
from vit_convert.quantize.precision_plan import Budget
from vit_convert.stages import calibrate, lowering, plan, quantize
from vit_convert.stages.other_weights import unquantized


@pytest.fixture
def context(tmp_path):
    found = make_context(tmp_path / "b")
    found.config.precision, found.config.target = "fp32,int8", "trt8"
    return found


def test_what_the_output_may_lose(context):
    config = context.config
    assert lowering._budget(context) is None  # noise shows no accuracy
    config.calibration.data = "images.zip"
    assert lowering._budget(context) == Budget(0.99, math.inf, 0)
    config.calibration.min_cosine = 0.0
    assert lowering._budget(context) is None
    config.precision, config.calibration.data, config.check.int8_cosine = "auto", "", 0.75
    assert lowering._budget(context) == Budget(0.75, config.plan.accuracy_budget, 0)
    config.plan.cosine = 0.875
    assert lowering._budget(context) == Budget(0.875, config.plan.accuracy_budget, 0)


TIMES = {"block_00/fc1": 3.0, "block_00/fc2": 4.0, "block_01/fc2": 1.0}
SHARES = {"block_00/fc1": 0.001, "block_00/fc2": 0.03, "block_01/fc2": 0.01}


def told(context, left_out, *, cosine=0.995, missed=""):
    shares = SHARES if left_out else {}
    found = Choice(left_out, shares, 0.9, cosine, missed)
    return lowering._told(context, found, TIMES, Budget(0.99, math.inf, 0), (48, "calibration images"))


def said(context):
    return context.bundle.events.read_text() if context.bundle.events.exists() else ""


def test_a_choice_is_told_with_its_shares(context):
    assert told(context, ("block_01/fc2", "block_00/fc2")) == OutputShare(
        products=(
            ShareOfProduct(site="block_01/fc2", share=0.01, multiplications=0.125),
            ShareOfProduct(site="block_00/fc2", share=0.03, multiplications=0.5),
        ),
        min_cosine=0.99,
        cosine_before=0.9,
        cosine=0.995,
        num_images=48,
        source="calibration images",
    )
    assert "block_01/fc2, block_00/fc2: stay fp16, as they cost the output most for their time" in said(context)
    assert "cosine 0.9000" in said(context) and "0.9950, the smallest of 48 calibration images" in said(context)


def test_one_product_stays_and_none_is_not_told(context):
    told(context, ("block_01/fc2",))
    assert "block_01/fc2: stays fp16" in said(context)
    context.bundle.events.unlink()
    assert told(context, ()).products == () and said(context) == ""


def test_what_is_out_of_reach_leaves_nothing_out(context):
    found = told(context, tuple(TIMES), cosine=0.96, missed="cosine 0.96 is below 0.99")
    assert (found.products, found.cosine, found.cosine_before) == ((), 0.9, 0.9)
    assert "min_cosine=0.99 is out of reach" in said(context) and "cosine 0.96 is below 0.99" in said(context)
    context.config.precision = "auto"
    with pytest.raises(CheckError, match=r"precision=auto: with every product in fp16 that may be, cosine 0\.96"):
        told(context, tuple(TIMES), cosine=0.96, missed="cosine 0.96 is below 0.99")


def test_a_plan_of_a_lowering_is_made_while_its_ranges_are_measured(context):
    """And nowhere else; its budget and its images are among what calibration depends on then."""
    context.config.precision = "auto"
    assert unquantized(context) == "" and plan.PLAN.needed(context)
    assert quantize._plan_file(context) == context.bundle.precision_plan
    before = calibrate.CALIBRATE.inputs(context)
    context.results.put("export", types.SimpleNamespace(int8_lowering="fused"))
    assert unquantized(context) == "fused" and not plan.PLAN.needed(context)
    assert quantize._plan_file(context) is None
    depends = calibrate.CALIBRATE.inputs(context)
    assert len(depends) == len(before) + 3
    context.config.plan.cosine = 0.9375
    assert calibrate.CALIBRATE.inputs(context) != depends
