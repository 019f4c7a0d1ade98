"""Tables come from the result files, and a stale one is noticed."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from vit_convert.engine.benchmark import RESIDENT

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    return tables


def run_of(variant, side, repeat, seconds, mib, params=1000):
    return {
        "variant": variant,
        "side": side,
        "repeat": repeat,
        "wall_seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "peak_rss_mib": mib,
        "load_before": 0.5,
        "nodes": 7,
        "bytes": 3 << 20,
        "max_abs": 1e-6 * (1 + repeat),
        "checkpoint_bytes": 4 * params,
    }


@pytest.fixture
def results(tmp_path):
    runs = [run_of("B/32", "vit_convert", n, seconds, 100) for n, seconds in enumerate((1.0, 2.0, 9.0))]
    runs += [run_of("B/32", "plain", n, seconds, 2048) for n, seconds in enumerate((3.0, 8.0, 45.0))]  # 3, 4 and 5 times ours
    runs += [{**run_of("B/32", "plain", 3, 1.0, 1), "error": "MemoryError"}]
    write(tmp_path / "convert-2026-01-02.json", runs)
    write(tmp_path / "convert-2026-01-01.json", [run_of("B/32", "plain", 0, 77.0, 1)])
    return tmp_path


def write(path, runs):
    path.write_text(
        json.dumps({"hardware": {"cpu": "Some CPU", "cores": 2}, "versions": {"jax": "1.2"}, "command": "python x", "runs": runs})
    )


def test_medians_and_paired_ratios_of_the_newest_file(tables, results):
    text = tables.fill("before\n<!-- table:convert -->\nold\n<!-- end -->\nafter\n", results)
    assert text.startswith("before\n<!-- table:convert -->\n| model") and text.endswith("<!-- end -->\nafter\n")
    assert "| B/32 **vit_convert** | 2.0 s | 4.0 s | 100 MiB | 7 | 3 MiB | 3.0e-06 |" in text
    assert "| B/32 plain | 8.0 s (4.0×) | 16.0 s (4.0×) | 2.00 GiB (20.5×) |" in text
    assert "Some CPU, 2 cores; jax 1.2" in text and "`convert-2026-01-02.json`" in text and "77" not in text and "old" not in text
    assert tables.fill(text, results) == text


def test_growth_is_the_slope_between_two_sizes(tables, tmp_path):
    runs = [run_of("S/16", "plain", 0, 2.0, 200, params=10**6), run_of("H/14", "plain", 0, 3.0, 300, params=11 * 10**6)]
    write(tmp_path / "convert-2026-01-01.json", runs)
    text = tables.fill("<!-- table:growth -->\n<!-- end -->", tmp_path)
    # 1 s, 2 s of CPU and 100 MiB for 10 million parameters more
    assert "| plain | 1.9 s + 100 ns | 3.8 s + 200 ns | 190 MiB + 10.5 B |" in text


def test_rows_of_a_gpu_file_keep_their_columns(tables, tmp_path):
    rows = [{"precision": "fp16", "batch": 1, "p50_ms": 0.6012345, "gpu": {"clock": 1}}, {"precision": "int8", "batch": 64, "p50_ms": 3.0}]
    (tmp_path / "h200-b16.json").write_text(json.dumps({"rows": rows}))
    text = tables.fill("<!-- table:h200-b16 -->\n<!-- end -->", tmp_path)
    assert "| precision | batch | p50 ms |" in text and "| fp16 | 1 | 0.6012 |" in text and "clock" not in text


def test_a_name_without_table_or_results_is_an_error(tables, tmp_path):
    for name, message in (("convrt", "not one of convert"), ("convert", r"no .*convert-\*\.json")):
        with pytest.raises(SystemExit, match=message):
            tables.fill(f"<!-- table:{name} -->\n<!-- end -->", tmp_path)


def test_a_side_by_side_run_names_every_version_that_its_parts_record(tables, tmp_path):
    row = {"precision": "fp16", "batch": 64, "transfers": RESIDENT, "images_per_second": 9000.0, "p50_ms": 7.0, "noise_percent": 0.4}
    parts = {"engine": {"gpu": "Some GPU", "driver": "1.2", "rows": [row], "tensorrt": "8.6.0"}, "jax": {"jax": "0.11", "driver": "1.2"}}
    model = {"variant": "B/16", "image_size": 224, **parts, "torch": {"torch": "2.11", "timm": "1.0"}}
    run = {"date": "2026-01-01T00:00:00", "command": "x", "models": {"b16": model}}
    (tmp_path / "h200-b16.json").write_text(json.dumps(run))
    text = tables.fill("<!-- table:h200 -->\n<!-- end -->", tmp_path)
    assert "<sub>Some GPU, 1.2, tensorrt 8.6.0, jax 0.11, torch 2.11, timm 1.0, 2026-01-01;" in text
    assert [part for part in tables.VERSIONS if f"{part} " not in text] == []


def test_check_fails_when_the_text_is_stale(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no tables\n")
    command = [sys.executable, str(BENCHMARKS / "tables.py"), "--check", str(readme)]
    assert subprocess.run(command).returncode == 0
    readme.write_text("<!-- table:convert -->\nby hand\n<!-- end -->\n")
    stale = subprocess.run(command, capture_output=True, text=True)
    assert stale.returncode == 1 and re.search(r"stale|no .*convert-", stale.stderr)
    assert "by hand" in readme.read_text()
