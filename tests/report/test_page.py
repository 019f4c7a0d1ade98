"""The page that people read: all is in the file, nothing is asked of anybody, nothing in a report becomes markup."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from vit_convert.core.errors import UsageError
from vit_convert.core.roofline import data_sheet
from vit_convert.report.__main__ import main
from vit_convert.report.figures import MOST_DRAWN
from vit_convert.report.page import _consistency, _engine_row, read, read_subject, render

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
VOID = {"meta", "br", "hr", "img", "link", "input"}
OPTIONAL = {"html", "tr", "td", "th", "dt", "dd", "p", "body", "head"}  # what HTML lets stay open
TUNED = {"precision": "fp16", "lowering": "plugin", "profile": "fixed 64", "fused_attention": "yes, fp16, 12 of 12"}
EVIL = '<script>alert("x")</script>&"\''


def block(name, error):
    return {"tensor": name, "batch": 3, "max_abs": error, "max_rel": error, "cosine": 1 - error, "passed": True}


def report(name="one", **more):
    """A report with every section that the page shows."""
    check = {"passed": True, "tolerance": "cosine >= 0.999", "max_abs": 0.01, "max_rel": 0.002, "cosine": 0.99998}
    engine = {
        "path": "engines/tensorrt-8.6.1-sm90/fp16.plan",
        "precision": "fp16",
        "bytes": 3 << 20,
        "build_seconds": 4.25,
        "products": {"fp16": 50},
        "fused_attention": {
            "text": "yes, fp16, 12 of 12",
            "kinds": [{"kind": "product", "count": 51, "names": ["sm90_xmma_gemm_f16", "x" * 300]}],
        },
    }
    row = {"precision": "fp16", "streams": 1, "noise_percent": 0.4, "p50_ms": 1.5, "p95_ms": 1.6, "p99_ms": 1.7}
    row["transfers"], rules = "none: images and results stay in GPU memory", [{"rule": "Gelu", "applied": 12}]
    ranges = {"method": "entropy", "num_images": 48, "source": "images.zip", "num_tensors": 48, "num_clipped": 3}
    widened = {
        "tensor": "block/Gelu",
        "amax": 5.7,
        "entropy": 3.1,
        "threshold": 5.7,
        "error_entropy": 0.02,
        "error": 0.0003,
    }
    return {
        "name": name,
        "vit_convert": "0.1.0",
        "command": "python -m vit_convert",
        "date": "2026-11-27T00:00:00Z",
        "status": "done",
        "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
        "hashes": {"model.onnx": "ab12", "model.onnx.data": "c0ffee"},
        "checkpoint": {"family": "vit", "variant": "B/16", "num_params": 86_567_656, "path": "b.npz", "sha256": "ab"},
        "stages": [{"name": "export", "status": "done", "seconds": 2.5, "peak_rss_mib": 512.0}],
        "onnx": {"opset": 17, "target": "trt8", "num_nodes": 361, "bytes": 1 << 20, "rules": rules},
        "checks": {"fp16": {**check, "blocks": [block("block_00", 1e-4), block("block_01", 3e-4)], "top1": 84.25}},
        "verdicts": {"int8": {"text": "int8 loses 1.50 points of top-1", "accurate": False}},
        "calibration": {**ranges, "widened": [widened], "shifted": [], "left_out": []},
        "accuracy": {"jax": 84.5, "fp16": 84.25},
        "engines": [engine],
        "engine": {**engine, "recommended_because": "the fastest that passed its check"},
        "verify": {"engines": {"fp16": {"plan": engine["path"], "passed": True, "cosine": 0.99997, "top1": 84.25}}},
        "tuning": [
            {**TUNED, "batch": 64, "images_per_second": 12345.0, "note": "fastest", "words": "--config.batch.max=64"},
            {**TUNED, "batch": None, "images_per_second": None, "note": "failed: too large", "words": ""},
        ],
        "roofline": {
            "gpu": "NVIDIA H100 80GB HBM3",
            "work": {"gflop_per_image": 35.1, "weights": 86_000_000, "values_per_image": 32_000_000},
            "ceilings": data_sheet("NVIDIA H100 80GB HBM3").to_dict(),
        },
        "benchmark": [{**row, "batch": batch, "images_per_second": 1000.0 * batch} for batch in (1, 8)],
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def page():
    """Of one report."""
    return render([report()])


@pytest.fixture(scope="module")
def compared():
    """Of two reports."""
    return render([report(), report("two")])


class Reader(html.parser.HTMLParser):
    """Collects elements, ids and texts; complains of elements that are closed without being open."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.ids, self.attributes, self.texts, self._open = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        while self._open and self._open[-1] != tag:
            left = self._open.pop()
            assert left in OPTIONAL, f"<{left}> is not closed before </{tag}>"
        assert self._open, f"</{tag}> closes nothing"
        self._open.pop()

    def handle_data(self, data):
        self.texts.append(data)


def text_of(page):
    return re.sub(r"\s+", " ", " ".join(Reader(page).texts))


def test_what_is_found_is_told(page):
    said = text_of(page)
    for words in (
        "vit B/16", "86,567,656 parameters", "the fastest that passed its check", "0.9999800", "84.25 %",
        "engines/tensorrt-8.6.1-sm90/fp16.plan recommended", "3.0 MiB", "verified", "yes, fp16, 12 of 12", "8,000",
        "int8 loses 1.50 points of top-1", "block_01: 0.0003", "opset 17 for trt8, 361 nodes",
        "from the data sheet of NVIDIA H100", "sm90_xmma_gemm_f16",
        "48 tensors have a range, found by entropy over 48 images (images.zip)", "jax 0.10.2, numpy 2.4.6",
        "model.onnx.data c0ffee", "plugin fixed 64 fp16 64 12,345", "failed: too large",
        "the fastest fp16 engine for batch 64: --config.batch.max=64",
    ):  # fmt: skip
        assert words in said, words


def test_the_file_is_all_that_is_needed(compared):
    page = Reader(compared)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {*page.elements}
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), value
    assert len(page.ids) == len(set(page.ids)) > 0  # or a figure would draw with another's shapes


def test_figures_are_svg_with_tips_and_take_the_pages_colour(page):
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawn) == 6  # throughput, accuracy, roofline, blocks, thresholds, stages
    for svg in drawn:
        xml.etree.ElementTree.fromstring(svg)
        assert "currentColor" in svg and "#010203" not in svg and " height=" not in svg[: svg.index(">")]
    assert "<title>fp16, 1 stream, batch 8: 8,000 images/s, P99 1.70 ms</title>" in page


def test_references_within_a_figure_hold(compared):
    page, ids = compared, set(Reader(compared).ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= ids


def test_nothing_in_a_report_becomes_markup():
    bad = report(**dict.fromkeys(("name", "command", "date"), EVIL))
    bad["checks"]["fp16"]["blocks"] = [block(EVIL, 0.1)]
    bad["calibration"]["widened"][0]["tensor"] = EVIL
    page = render([bad])
    assert "<script" not in page and text_of(page).count('alert("x")') >= 5
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)


def test_what_is_missing_is_left_out():
    stage = {"name": "export", "status": "failed", "seconds": 0.1, "peak_rss_mib": 1, "error": "no such file"}
    page = render([{"name": "failed", "stages": [stage]}])
    assert "export failed: no such file" in text_of(page) and "none: no engine has been built" in text_of(page)
    assert "<svg" not in render([{"name": "empty"}])
    assert "Side by side" in render([{"name": "empty"}, report()])


def pair_folder(root, name="siglip", towers=("image", "text")):
    """A pair's reports, as a conversion and a GPU host leave them."""
    check = {"precision": "fp16", "image": "fp16", "text": "fp32", "passed": True, "images": 40, "texts": 6,
             "max_cosine_error": 0.00044, "max_probability_error": 0.0056, "top1": 97.5, "recall": 100.0}  # fmt: skip
    missed = {**check, "passed": False, "misses": ["same first text for 97.50 %"], "zero_shot": 70.25}
    facts = {"logit_scale": 115.5, "logit_bias": -16.5, "similarity": "sigmoid", "text": {}}
    zero_shot = {"classes": 3, "templates": 2, "num_images": 1234, "jax": 71.25}
    whole = {"name": name, "towers": {}, "pair": facts, "similarity": {"source": "evaluation data"}}
    whole |= {"checks": {"fp16": check}, "engines": {"fp16": missed}, "zero_shot": zero_shot}
    for place, content in {"": whole, **{tower: report(tower) for tower in towers}}.items():
        (root / name / place).mkdir(parents=True, exist_ok=True)
        (root / name / place / "report.json").write_text(json.dumps(content))
    return root / name


def test_a_pair_has_a_page_after_the_fact_too(tmp_path, capsys):
    """By its folder or its report: how both towers compare, and then each of them."""
    folder = pair_folder(tmp_path)
    for given in (folder, folder / "report.json"):
        assert main(["report", str(given)]) == 0
        page = (folder / "report.html").read_text(encoding="utf-8")
        said = text_of(page)
        for words in (
            "siglip: images against texts", "sigmoid of the embeddings' products times 115.5, plus -16.5",
            "71.25 % by JAX, of 1,234 images in 3 classes, 2 prompts a class", "judged on evaluation data",
            "fp16 graphs (image fp16, text fp32) passed 40 6 0.00044 0.0056 97.50 % 100.00 %",
            "fp16 engines (image fp16, text fp32) FAILED", "70.25 % same first text for 97.50 %", "siglip/image",
        ):  # fmt: skip
            assert words in said, words
        assert "<title>siglip</title>" in page and page.count("<section>") == 2
    assert main(["report", str(folder), str(pair_folder(tmp_path, "one")), f"--output={tmp_path}/both.html"]) == 0
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "<title>siglip/image, siglip/text, one/image, one/text</title>" in page and page.count("<section>") == 4
    capsys.readouterr()
    (folder / "report.json").write_text('{"towers": 3}')
    assert main(["report", str(folder)]) == 2 and "towers: 3 is not of type" in capsys.readouterr().err


def test_a_pair_whose_towers_are_not_there_is_shown_alone(tmp_path):
    found = read_subject([pair_folder(tmp_path, towers=())])
    assert not found.reports and "images against texts" in text_of(render(found.reports, found.pairs))


def test_the_same_report_gives_the_same_page(page):
    assert render([report()]) == page


@pytest.mark.slow
def test_a_report_of_a_gpu_host():
    """One that a GPU host wrote."""
    page = render([read(RESULTS / "h200-report-int8-b16-2026-11-21.json"), report()])
    assert "13,296" in text_of(page) and "Side by side" in page
    Reader(page)


def test_the_command(tmp_path, capsys, monkeypatch):
    drawn = "vit_convert.report.page.render"
    monkeypatch.setattr(drawn, lambda reports, pairs: f"<title>{', '.join(found['name'] for found in reports)}</title>")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report(name)))
    assert main(["report", str(tmp_path / "one")]) == 0
    assert "<title>one</title>" in (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), f"--output={tmp_path}/both.html"]) == 0
    assert "<title>one, two</title>" in (tmp_path / "both.html").read_text(encoding="utf-8")
    capsys.readouterr()
    for content, why in (
        ("[]", "[] is not of type mapping"),
        ("{}", "is not a report of a conversion"),
        ('{"name": "x", "checks": {"fp32": {"passed": "maybe"}}}', "checks.fp32.passed: 'maybe' is not of type bool"),
    ):
        (tmp_path / "two" / "report.json").write_text(content)
        assert main(["report", str(tmp_path / "two")]) == 2
        assert why in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2 and "cannot be read" in capsys.readouterr().err


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MEASURE = """<script>addEventListener("load", () => { parent.postMessage(JSON.stringify({
    wide: document.documentElement.scrollWidth, given: innerWidth,
    asked: performance.getEntriesByType("resource").length,
    drawn: document.querySelectorAll("svg").length,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    colours: [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor],
    }), "*") })</script>"""
# A frame, because no window of Chromium is narrower than 500 pixels.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title></title>
<script>addEventListener("message", (told) => { document.title = told.data })</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_browser_shows_it_without_errors_or_requests(tmp_path, width, dark, compared):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    (tmp_path / "page.html").write_text(compared + MEASURE, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    words += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile"]
    words += [
        "--enable-logging=stderr",
        "--v=0",
        "--window-size=1400,1000",
        "--virtual-time-budget=5000",
        "--dump-dom",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]
    done = subprocess.run(
        [browser, *words, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1].replace("&quot;", '"'))
    assert found["asked"] == 0 and found["drawn"] == 10
    assert found["wide"] <= found["given"] == width, "the page is wider than the window"
    ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in found["colours"])
    assert found["dark"] is dark and (ink - paper > 500 if dark else paper - ink > 500), found["colours"]
    assert "CONSOLE" not in done.stderr, done.stderr[-1000:]


PLAN = "engines/x/fp16.plan"


@pytest.mark.parametrize(
    ("verify", "proof", "cosine"),
    [
        ({}, "not verified", None),
        ({"engines": {"fp16": {"plan": "engines/x/int8.plan", "passed": True}}}, "not verified", None),
        ({"engines": {"fp16": {"plan": PLAN, "passed": True, "cosine": 0.5}}}, "verified", 0.5),
        ({"engines": {"a": {"plan": "b"}, "fp16": {"plan": PLAN, "passed": False, "cosine": 0.25}}}, "MISSED", 0.25),
    ],
)
def test_what_the_page_says_of_an_engine(verify, proof, cosine):
    engine = {"path": PLAN, "fused_attention": {"text": "yes, 12 of 12"}}
    found = _engine_row({"verify": verify, "engine": {"path": PLAN}}, engine)
    assert (found.proof, found.cosine, found.fused, found.recommended) == (proof, cosine, "yes, 12 of 12", True)
    unknown = _engine_row({"engine": {"path": "other"}}, {"path": PLAN, "fused_attention_unknown": "no inspector"})
    assert (unknown.fused, unknown.recommended) == ("unknown: no inspector", False)
    assert not _engine_row({}, {"path": PLAN}).recommended


def test_what_the_page_says_of_checks_without_a_reference():
    rows = [{"check": "rows", "passed": True}, {"check": "order", "passed": False}, {"check": "batch", "passed": False}]
    assert _consistency({"consistency": rows}) == "FAILED: order, batch"
    assert (
        _consistency({"consistency": rows[:1]}) == "passed"
        and _consistency({"consistency_like": "model.onnx"}) == "as model.onnx"
        and _consistency({}) == _consistency({"consistency": []}) == ""
    )


def test_the_title_of_many_models():
    names = [f"model-{i}" for i in range(MOST_DRAWN + 1)]
    assert f"<title>{', '.join(names[:-1])}" in render([{"name": name} for name in names[:-1]])
    assert f"<title>model-0 and {MOST_DRAWN} more" in render([{"name": name} for name in names])


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_what_is_not_installed_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=f"{missing} is not installed") as caught:
        render([{"name": "a", "accuracy": {"jax": 80.0}}])
    assert "vit_convert[report]" in caught.value.fix
