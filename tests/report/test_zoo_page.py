"""The page of a batch: what its record says, and nothing in it becomes markup."""

import json
import re

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from vit_convert.core.errors import UsageError
from vit_convert.report import zoo
from vit_convert.report.__main__ import main
from vit_convert.report.zoo import _scatter, render_zoo

EVIL = '<script>alert("x")</script>&"\''
MODELS = (("vit", "Ti/16", 5_717_416), ("vit", "B/16", 86_567_656), ("mixer", "B/32", 60_293_428))


def job(name, status="done", model=0, **more):
    family, variant, params = MODELS[model]
    checks = [{"precision": "fp16", "passed": True, "cosine": 0.9999912 - model * 1e-6, "top1": None}]
    figures = {"family": family, "variant": variant, "num_params": params, "image_size": [224, 224], "checks": checks}
    figures["warnings"] = ["its head is all zeros"] if name == "odd" else []
    engine = {"gpu": "L4", "recommended": "fp16", "images_per_second": 4000.0 / (model + 1), "status": "done"}
    base = {"name": name, "status": status, "exit_code": 0, "seconds": 3.5 + model, "peak_rss_mib": 800.0 + model}
    words = {"attempts": 1, "error": "", "fix": "", "engines": [engine]}
    return {**base, **words, "figures": {**figures, "top1": 75.5, "onnx_bytes": 1}, **more}


def batch(*jobs):
    counts = {status: sum(job["status"] == status for job in jobs) for status in {job["status"] for job in jobs}}
    about = {"schema": "vit_convert.batch/1", "vit_convert": "0.1.0", "command": "python -m vit_convert.batch"}
    return {**about, "begun": "a", "updated": "b", "status": "failed", "counts": counts, "jobs": list(jobs)}


def failed(name, **more):
    empty = {"family": "", "variant": "", "num_params": 0, "image_size": [], "checks": [], "warnings": []}
    empty |= {"top1": None, "onnx_bytes": 0}
    words = {"error": "no zip", "fix": "Fetch it."}
    return job(name, "failed", figures=empty, engines=[], exit_code=3, **{**words, **more})


def text(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_models_failures_and_bundles_are_told():
    jobs = [
        job("a"),
        job("odd", model=2),
        job("b", "fresh", seconds=5.5),
        job("c", model=1),
        job("d", model=2),
        failed("bad"),
    ]
    said = text(render_zoo(batch(*jobs), title="my zoo"))
    for words in (
        "6 jobs", "4 done", "its head is all zeros",
        "1 fresh", "1 failed", "vit Ti/16 2 5,717,416 4.5 800 0.9999912 4,000",
        "bad 3 1 no zip Fetch it.", "c vit B/16 224x224 done 4.5 801 75.50 % 0.9999902 fp16 2,000",
        "Time of a conversion", "Memory of a conversion", "Distance of the graphs to JAX", "Fastest engine",
    ):  # fmt: skip
        assert words in said, words


def test_points_have_tips_and_precisions_their_colours():
    page = render_zoo(batch(job("a"), job("c", model=1)), title="t")
    assert "<title>c (vit B/16): 4.5 s</title>" in page and "fp16, cosine 0.9999902" in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 0


def test_nothing_becomes_markup_and_nothing_is_asked_of_anybody():
    page = render_zoo(batch(job(EVIL), failed(EVIL, error=EVIL, fix=EVIL)), title=EVIL)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)


def test_a_zoo_without_a_whole_bundle_has_no_figures():
    page = render_zoo(batch(failed("bad"), job("later", "pending", seconds=0.0, peak_rss_mib=0.0)), title="t")
    assert "<svg" not in page and "later" in text(page)


def test_very_many_jobs_are_left_to_the_table(monkeypatch):
    monkeypatch.setattr(zoo, "_MOST_ROWS", 3)
    monkeypatch.setattr(zoo, "_MOST_POINTS", 5)
    page = render_zoo(batch(*(job(f"j{i}") for i in range(9)), failed("bad")), title="t")
    assert "6 more jobs are listed in batch.csv" in page and "bad" in text(page)
    drawn = re.findall(r"<title>(j\d) [^<]*s</title>", page)
    assert 3 <= len({*drawn}) <= 5


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "batch.json").write_text(json.dumps(batch(job("a"))))
    assert main(["report", str(folder)]) == 0 and "zoo" in (folder / "batch.html").read_text()
    assert main(["report", str(folder / "batch.json"), f"--output={tmp_path / 'p.html'}"]) == 0
    assert (tmp_path / "p.html").exists()
    (folder / "batch.json").write_text('{"schema": "other"}')
    assert main(["report", str(folder)]) == 2 and "is not a record of a batch" in capsys.readouterr().err


def test_points_over_the_number_of_parameters():
    pytest.importorskip("matplotlib")
    points = [(5e6, 3.0, "vit", "small"), (86e6, 30.0, "swin", "base"), (1.2e9, 40.0, "vit", "giant")]
    svg = _scatter(points, "title", "seconds")
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"5M", "100M", "1G", "parameters", "seconds", "title"} <= {*texts}
    assert [text for text in texts if text in ("vit", "swin")] == ["vit", "swin"]  # once each, in the legend
    assert re.findall("<title>([^<]*)", svg) == ["small", "base", "giant"] and _scatter([], "title", "y") == ""


@pytest.mark.parametrize(("count", "drawn"), [(3, 3), (5, 5), (6, 3), (11, 4)])
def test_an_even_selection_of_very_many_is_drawn(monkeypatch, count, drawn):
    """No more than may be: every second of six where five may be, every third of eleven."""
    monkeypatch.setattr(zoo, "_MOST_POINTS", 5)
    points = []
    monkeypatch.setattr(zoo, "_scatter", lambda found, title, y: points.append(len(found)) or "")
    zoo.zoo_figures([job(f"job{i}", "done", engines=[]) for i in range(count)])
    assert points[0] == drawn


def test_what_is_taken_for_a_batch(tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "batch.json").write_text("{}")
    (tmp_path / "bundle").mkdir()
    taken = ("zoo", "batch.json", "batch-2.json")
    assert all(zoo.is_batch(tmp_path / name) for name in taken)
    assert not any(zoo.is_batch(tmp_path / name) for name in ("bundle", "batch.npz", "batch", "report.json"))


def test_checks_stand_under_their_precisions():
    """A model that lacks one leaves its cell empty."""
    checks = [{"precision": "bf16", "passed": True, "cosine": 0.75, "top1": None}]
    two = job("two")
    two["figures"]["checks"] += [{"precision": "int8", "passed": True, "cosine": 0.5, "top1": None}]
    said = text(render_zoo(batch(two, job("one", figures={**job("one")["figures"], "checks": checks})), title="t"))
    assert "0.9999912 0.5000000" in said and "0.7500000" in said
    assert zoo._by(checks, "precision", "int8") == {} and zoo._by(checks, "precision", "bf16") == checks[0]
    assert zoo._by([{"gpu": "A"}, {"gpu": "L4"}], "gpu", "L4") == {"gpu": "L4"}
    assert zoo._by([{"gpu": "T4"}], "gpu", "L4") == zoo._by([{"gpu": "A"}], "gpu", "L4") == {}


def test_the_distance_to_jax_of_a_graph_that_is_its_equal(monkeypatch):
    """1 - cosine, which a logarithmic axis cannot show at 0."""
    drawn = {}
    monkeypatch.setattr(zoo, "_scatter", lambda points, title, *more: drawn.update({title: points}) or "")
    same = job("same")
    same["figures"]["checks"][0]["cosine"] = 1.0
    same["figures"]["checks"] += [{"precision": "int8", "passed": True, "cosine": 0.75, "top1": None}]
    render_zoo(batch(same), title="t")
    (points,) = (rows for title, rows in drawn.items() if "Distance" in title)
    assert [(row[1], row[2]) for row in points] == [(1e-9, "fp16"), (0.25, "int8")]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null", b'{"schema": 3}', None])
def test_records_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "batch.json").write_bytes(content)
    for path in (tmp_path, tmp_path / "batch.json"):
        with pytest.raises(UsageError, match=r"batch\.json: (cannot be read|is not a record of a batch)") as caught:
            zoo.read_batch(path)
        assert caught.value.fix == "Give the workdir of a batch."


def test_a_page_with_all_jobs_points_to_no_others():
    page = text(render_zoo(batch(job("a"), failed("bad")), title="t"))
    assert "more jobs" not in page and "batch.csv" not in page


def test_speeds_stand_by_their_gpus_and_one_without_a_name_has_its_own_colour(monkeypatch):
    drawn = {}
    monkeypatch.setattr(zoo, "_scatter", lambda points, title, *more: drawn.update({title: points}) or "")
    unnamed = job("b")
    unnamed["engines"][0]["gpu"] = ""
    render_zoo(batch(job("a"), unnamed), title="t")
    (points,) = (rows for title, rows in drawn.items() if "engine" in title)
    assert [(row[1], row[2]) for row in points] == [(4000.0, "L4"), (4000.0, "GPU")]
