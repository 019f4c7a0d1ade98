"""The roofline of a recorded report, and of those that have none."""

import json
import pathlib

import pytest
from recorded_axes import Axes, Line

from vit_convert.core.roofline import Ceilings, Roofline, Work, data_sheet
from vit_convert.report import roofline as roofline_module
from vit_convert.report.record import Report
from vit_convert.report.roofline import kernels, reached, roofline_figure

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
# ViT-B/16 at 224: 35.1 GFLOP an image, by the papers; 86 million weights, all but the embeddings in products. 773
# TFLOP/s is what a product of 8192 was measured at on an H200.
WORK = Work(gflop_per_image=35.1, weights=85_900_000, values_per_image=32_000_000)
CEILINGS = Ceilings(
    tflops={"fp16": 773.0, "int8": 1979.0}, memory_gb_per_s=4000.0, measured=("fp16", "memory"), sheet="NVIDIA H200"
)


@pytest.fixture(scope="module")
def recorded():
    """Of B/16 in FP16 and INT8 on an H200, from before reports had a roofline."""
    return Report.from_dict(json.loads((RESULTS / "h200-report-int8-b16-2026-11-21.json").read_text())).to_dict()


@pytest.fixture(scope="module")
def whole(recorded):
    """The same with its roofline."""
    return {**recorded, "roofline": Roofline(gpu="NVIDIA H200", work=WORK, ceilings=CEILINGS).to_dict()}


def test_what_was_reached(recorded, whole):
    fp16, int8 = reached(whole)
    (rate,) = (row["images_per_second"] for row in recorded["benchmark"] if row["precision"] == "fp16")
    assert (fp16.precision, fp16.batch, fp16.images_per_second) == ("fp16", 64, rate)
    assert fp16.tflops == pytest.approx(rate * 35.1e9 / 1e12)
    # 64 images of 35.1 GFLOP; two bytes for each weight once and each value of 64 images
    assert fp16.flop_per_byte == pytest.approx(64 * 35.1e9 / (2 * (85.9e6 + 64 * 32e6)))
    assert (fp16.attainable, fp16.bound) == (773.0, "products") and 55 < fp16.share < 65  # 13,296 images/s of 22,000
    assert fp16.share == pytest.approx(100 * fp16.tflops / 773)
    assert int8.flop_per_byte == pytest.approx(2 * fp16.flop_per_byte) and int8.attainable == 1979.0


def test_memory_bounds_a_small_batch(recorded):
    row = {**recorded["benchmark"][0], "batch": 1, "images_per_second": 1000.0}
    roofline = Roofline(gpu="x", work=WORK, ceilings=CEILINGS)
    (found,) = reached({"benchmark": [row], "roofline": roofline.to_dict()})
    intensity = 35.1e9 / (2 * (85.9e6 + 32e6))  # 149 FLOP a byte: below 773 / 4 = 193
    assert found.bound == "memory" and found.attainable == pytest.approx(intensity * 4.0)


def test_transfers_and_unknown_ceilings_are_left_out(recorded):
    bare = Roofline(gpu="x", work=WORK).to_dict()
    assert reached({**recorded, "roofline": bare}) == [] and roofline_figure({**recorded, "roofline": bare}, "") == ""
    row = {**recorded["benchmark"][0], "transfers": "images in and results out, page-locked host memory"}
    given = Roofline(gpu="x", work=WORK, ceilings=CEILINGS).to_dict()
    assert reached({"benchmark": [row], "roofline": given}) == []
    row = {**recorded["benchmark"][0], "precision": "bf16"}
    assert reached({"benchmark": [row], "roofline": given}) == []


def test_the_page_has_the_section_only_where_there_is_data(recorded, whole):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from vit_convert.report.page import render

    without, page = render([recorded]), render([whole])
    assert "What the GPU could do" not in without and "Roofline" not in without
    assert page.count("<svg") == without.count("<svg") + 1 and "Roofline, by batch" in page
    assert "35.10 GFLOP" in page and "measured: fp16, memory; from the data sheet of NVIDIA H200: int8" in page
    assert '<td>fp16<td>64<td>13,296<td>466.7<td>526<td>773<td>60 %<td class="left">products' in page


def test_kernels_are_shown_where_they_are_known(recorded):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from vit_convert.report.page import render

    assert kernels(recorded["engines"][0]) == [] and "Kernels of one run, by kind" not in render([recorded])
    kinds = [{"kind": "product", "count": 51, "names": ["gemm_a"]}, {"kind": "copy", "count": 1, "names": ["copy_b"]}]
    fused = recorded["engines"][0]["fused_attention"]
    by_kernels = {**recorded["engines"][0], "fused_attention": {**fused, "profiles": [{"batch": 1, "kinds": kinds}]}}
    by_inspector = {**recorded["engines"][0], "fused_attention": {**fused, "profiles": None, "kinds": kinds}}
    assert kernels(by_kernels) == kernels(by_inspector) == kinds
    page = render([{**recorded, "engines": [by_kernels, recorded["engines"][1]]}])
    assert page.count("Kernels of one run, by kind") == 1 and "gemm_a" in page and page.count("<td>51<td") == 1


def test_data_sheets_by_the_drivers_names():
    for name, fp16, memory in (
        ("NVIDIA H200", 989, 4800), ("NVIDIA H100 80GB HBM3", 989, 3350), ("NVIDIA H100 PCIe", 756, 2000),
        ("NVIDIA A100-SXM4-40GB", 312, 1555), ("NVIDIA A100 80GB PCIe", 312, 1935), ("Tesla T4", 65, 320),
        ("NVIDIA L40S", 362, 864), ("NVIDIA L4", 121, 300), ("NVIDIA A10", 125, 600),
    ):  # fmt: skip
        found = data_sheet(name)
        assert (found.tflops["fp16"], found.memory_gb_per_s, found.measured) == (fp16, memory, ()), name
    for name in ("NVIDIA A10G", "NVIDIA GeForce RTX 4090", "Simulated", ""):  # not those of A10, not known
        assert data_sheet(name) is None, name


@pytest.mark.parametrize(("precision", "num_bytes"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1), ("fp8", 1)])
def test_how_much_is_computed_for_each_byte(precision, num_bytes):
    """Of a product of 3 x 5 weights for 7 images: 2 * 15 operations each; 15 weights once, 3 + 5 values an image."""
    work = Work(gflop_per_image=30e-9, weights=15, values_per_image=8)
    assert work.flop_per_byte(7, precision) == pytest.approx(7 * 30 / (num_bytes * (15 + 7 * 8)), rel=1e-12)
    assert Work(gflop_per_image=0.0, weights=0, values_per_image=0).flop_per_byte(7, precision) == 0.0


def test_where_the_ceilings_come_from():
    tflops = {"fp16": 1.0, "int8": 2.0}
    for measured, sheet, words in (
        ((), "X", "from the data sheet of X: fp16, int8, memory"),
        (("fp16", "int8", "memory"), "X", "measured: fp16, int8, memory"),
        (("memory",), "X", "measured: memory; from the data sheet of X: fp16, int8"),
    ):
        found = Ceilings(tflops=tflops, memory_gb_per_s=1.0, measured=measured, sheet=sheet)
        assert found.source == words


def test_the_lower_ceiling_counts():
    found = Ceilings(tflops={"fp16": 700.0}, memory_gb_per_s=4000.0)  # they meet at 175 FLOP a byte
    reached = [found.attainable_tflops(intensity, "fp16") for intensity in (0.0, 100.0, 175.0, 176.0)]
    assert reached == pytest.approx([0.0, 400.0, 700.0, 700.0]) and found.attainable_tflops(1e3, "fp8") == 0.0


def test_every_figure_of_the_data_sheets():
    """NVIDIA's pages, dense: H100 SXM 1,979 INT8 and FP8 of 3,958 with sparsity; A100 19.5 FP32; T4 has no BF16."""
    for name, expected in {
        "NVIDIA H200": {"fp32": 67, "fp16": 989, "bf16": 989, "int8": 1979, "fp8": 1979},
        "NVIDIA H100 80GB HBM3": {"fp32": 67, "fp16": 989, "bf16": 989, "int8": 1979, "fp8": 1979},
        "NVIDIA H100 PCIe": {"fp32": 51, "fp16": 756, "bf16": 756, "int8": 1513, "fp8": 1513},
        "NVIDIA H100 NVL": {"fp32": 60, "fp16": 835, "bf16": 835, "int8": 1671, "fp8": 1671},
        "NVIDIA A100-SXM4-40GB": {"fp32": 19.5, "fp16": 312, "bf16": 312, "int8": 624},
        "NVIDIA A100-SXM4-80GB": {"fp32": 19.5, "fp16": 312, "bf16": 312, "int8": 624},
        "NVIDIA A100 80GB PCIe": {"fp32": 19.5, "fp16": 312, "bf16": 312, "int8": 624},
        "NVIDIA A10": {"fp32": 31.2, "fp16": 125, "bf16": 125, "int8": 250},
        "NVIDIA L40S": {"fp32": 91.6, "fp16": 362, "bf16": 362, "int8": 733, "fp8": 733},
        "NVIDIA L4": {"fp32": 30.3, "fp16": 121, "bf16": 121, "int8": 242, "fp8": 242},
        "Tesla T4": {"fp32": 8.1, "fp16": 65, "int8": 130},
    }.items():
        assert dict(data_sheet(name).tflops) == expected, name
    assert data_sheet("NVIDIA H100 NVL").memory_gb_per_s == 3900 and data_sheet("l4").memory_gb_per_s == 300
    assert data_sheet("NVIDIA A100-SXM4-80GB").memory_gb_per_s == 2039
    assert data_sheet("NVIDIA A100 80GB PCIe").sheet == "NVIDIA A100 PCIE 80GB"


def test_the_two_ceilings_meet_in_the_picture(whole, monkeypatch):
    """Memory bounds below the ridge, products above it: 1000 * 773 / 4000 = 193.25 FLOP a byte in FP16."""
    painted = []
    monkeypatch.setattr(roofline_module, "draw", lambda paint, title, x, y: painted.append(paint) or title)
    monkeypatch.setattr(Line, "tips", [])
    assert roofline_figure(whole, "title") == "title"
    axes = Axes()
    painted[0](axes)
    lines = [arguments for arguments, options in axes.of("plot") if options.get("linewidth")]
    for (places, heights), peak in zip(lines, (773.0, 1979.0), strict=True):
        assert places[1] == pytest.approx(1e3 * peak / 4000.0) and places[0] < places[1] < places[2]
        assert heights == pytest.approx([places[0] * 4.0, peak, peak])
    points = [arguments[:2] for arguments, options in axes.of("plot") if options.get("label")]
    found = reached(whole)
    assert points == [([row.flop_per_byte], [row.tflops]) for row in found]
    assert [arguments[0] for arguments, _ in axes.of("annotate")] == [str(row.batch) for row in found]
    assert any(f"batch {found[0].batch}: {found[0].tflops:,.1f} TFLOP/s" in text for text in Line.tips)
    assert [arguments for arguments, _ in (*axes.of("set_xscale"), *axes.of("set_yscale"))] == [("log",), ("log",)]
