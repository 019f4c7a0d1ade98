"""Each TensorRT's row is what its own documents say, and everything that a row names exists."""

import ast
import pathlib

import pytest

import vit_convert
from vit_convert.core.dialect import DIALECTS, dialect_named, dialect_of
from vit_convert.core.errors import UsageError
from vit_convert.export.targets import LOWERINGS, TARGETS

PACKAGE = pathlib.Path(vit_convert.__file__).parent


@pytest.mark.parametrize(
    ("found", "name"),
    [
        # TensorRT 8.6 has the fp16 flag and no strongly typed networks, 10 has both, 11 dropped the flag; RTX is told
        # by its package.
        ({"rtx": False, "strongly_typed": False, "weakly_typed": True}, "trt8"),
        ({"rtx": False, "strongly_typed": True, "weakly_typed": True}, "trt10"),
        ({"rtx": False, "strongly_typed": True, "weakly_typed": False}, "trt11"),
        ({"rtx": True, "strongly_typed": True, "weakly_typed": False}, "rtx"),
    ],
    ids=["8.6", "10", "11", "rtx"],
)
def test_a_tensorrt_is_told_by_what_it_can_do(found, name):
    assert dialect_of(**found).name == name


def test_which_precisions_have_graphs_of_their_own():
    assert [p for p in DIALECTS["trt8"].precisions if DIALECTS["trt8"].has_graph(p)] == ["int8"]
    assert [p for p in DIALECTS["trt10"].precisions if DIALECTS["trt10"].has_graph(p)] == [
        "fp16",
        "bf16",
        "int8",
        "fp8",
    ]
    assert DIALECTS["trt8"].builds_from_lowerings("fp16") and not DIALECTS["trt8"].builds_from_lowerings("int8")
    assert not any(DIALECTS[name].builds_from_lowerings("fp16") for name in ("trt10", "trt11", "rtx"))


@pytest.mark.parametrize("name", ["trt8", "trt10", "trt11", "rtx"])
def test_fp32_has_no_graph_of_its_own(name):
    """Wherever the word comes from."""
    assert not DIALECTS[name].has_graph(["fp32", "int8"][0])


def test_what_each_reads():
    """TensorRT 8.6: operators up to opset 17, the fp16 flag, int8 by Q/DQ on fp32 weights or by ranges, no bf16 or fp8;
    Gelu is an operator since opset 20, which TensorRT 10.0 reads first."""
    eight, modern = DIALECTS["trt8"], [DIALECTS[name] for name in ("trt10", "trt11", "rtx")]
    assert (eight.opset, eight.max_opset, eight.precisions) == (17, 17, ("fp32", "fp16", "int8"))
    assert eight.precision_by_flag and not eight.stores_quantized_weights
    assert (eight.fp16_lowering, eight.int8_lowerings, eight.cache_version) == ("plugin", ("fused",), "8.6.1")
    for dialect in modern:
        assert (dialect.opset, dialect.max_opset) == (20, 0)
        assert dialect.precisions == ("fp32", "fp16", "bf16", "int8", "fp8")
        assert dialect.stores_quantized_weights and not dialect.precision_by_flag
        assert (dialect.fp16_lowering, dialect.int8_lowerings) == ("", ())
    # TensorRT 11 and RTX have no calibrator
    assert [dialect.cache_version for dialect in modern] == ["10.16.1", "", ""]


def test_what_a_row_names_exists():
    assert set(TARGETS) == set(DIALECTS)
    for name, dialect in DIALECTS.items():
        named = {dialect.fp16_lowering, *dialect.int8_lowerings} - {""}
        assert named <= set(LOWERINGS.get(name, {}))
        assert TARGETS[name].opset == dialect.opset <= (dialect.max_opset or dialect.opset)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"target='trt-10': not one of trt8, trt10, trt11, rtx\. Did you mean trt10,"):
        dialect_named("trt-10")


def test_no_other_place_asks_which_tensorrt_it_is():
    """A new TensorRT is a row here and a list of rules in `export/targets.py`: nobody else compares with a row's
    name."""
    asking = [
        f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        and any(
            isinstance(side, ast.Constant) and side.value in {"trt8", "trt10", "trt11"}
            for side in (node.left, *node.comparators)
        )
    ]
    assert asking == []
