"""Kinds of kernels by the names that real engines launched on an H200, as Nsight Compute recorded them."""

import json
import pathlib

import pytest

from vit_convert.core.engine_results import KernelKind
from vit_convert.engine.builder.kernel_kinds import kernel_kinds, kinds_of_layers

RESULTS = pathlib.Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # B/16: 12 attentions; 12 blocks of four products (the MLP's two, the output's, and queries, keys and values as
        # one), patches, class token and head; 25 LayerNorms.
        (
            "h200-ncu-model-2026-11-21",
            {"fused attention": 12, "product": 51, "normalisation": 25, "elementwise": 15, "copy": 1},
        ),
        (
            "h200-ncu-plugin-2026-11-21",
            {"fused attention": 12, "product": 51, "normalisation": 25, "elementwise": 4, "copy": 1, "other": 1},
        ),
        # kernels of our own: attention on INT8, and LayerNorm that writes INT8
        (
            "h200-ncu-b16-int8-2026-11-27",
            {"fused attention": 12, "product": 51, "normalisation": 25, "elementwise": 4, "copy": 4},
        ),
    ],
)
def test_kernels_of_real_engines(record, expected):
    rows = json.loads((RESULTS / f"{record}.json").read_text())["kernels"]
    names = [name for row in rows for name in [row["name"]] * row["launches"]]
    found = kernel_kinds(names)
    assert {row.kind: row.count for row in found} == expected
    assert sum(row.count for row in found) == len(names)
    assert [row.count for row in found] == sorted((row.count for row in found), reverse=True)
    assert all(1 <= len(row.names) <= 3 and {*row.names} <= {*names} for row in found)


def test_layers_of_the_inspector():
    layers = [
        {"Name": "__mye1_gemm_mha_v2", "LayerType": "kgen", "TacticName": ""},
        {"Name": "dense", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f16"},
        {"Name": "dense [profile 1]", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f16"},
        "a layer of an engine without detailed verbosity",
    ]
    assert kinds_of_layers({"Layers": layers}) == (
        KernelKind(kind="fused attention", count=1, names=("kgen __mye1_gemm_mha_v2",)),
        KernelKind(kind="product", count=1, names=("sm80_xmma_gemm_f16 dense",)),
    )


def test_a_few_of_the_most_frequent_names_are_shown():
    names = ["gemm_a", *["gemm_b"] * 4, *["gemm_c"] * 3, *["gemm_d"] * 2]
    assert kernel_kinds(names) == (KernelKind(kind="product", count=10, names=("gemm_b", "gemm_c", "gemm_d")),)
