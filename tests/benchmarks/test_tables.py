"""Tables come from the result files, and a stale one is noticed."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from vit_convert.engine.measure.benchmark import RESIDENT

MEASURED = {"precision": "fp16", "batch": 64, "streams": 1, "transfers": RESIDENT, "p50_ms": 7.0, "noise_percent": 0.4}
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
    # 3, 4 and 5 times ours
    runs += [run_of("B/32", "plain", n, seconds, 2048) for n, seconds in enumerate((3.0, 8.0, 45.0))]
    runs += [{**run_of("B/32", "plain", 3, 1.0, 1), "error": "MemoryError"}]
    write(tmp_path / "convert-2026-01-02.json", runs)
    write(tmp_path / "convert-2026-01-01.json", [run_of("B/32", "plain", 0, 77.0, 1)])
    return tmp_path


def write(path, runs):
    path.write_text(
        json.dumps(
            {
                "hardware": {"cpu": "Some CPU", "cores": 2},
                "versions": {"jax": "1.2"},
                "command": "python x",
                "runs": runs,
            }
        )
    )


def test_medians_and_paired_ratios_of_the_newest_file(tables, results):
    text = tables.fill("before\n<!-- table:convert -->\nold\n<!-- end -->\nafter\n", results)
    assert text.startswith("before\n<!-- table:convert -->\n| model") and text.endswith("<!-- end -->\nafter\n")
    assert "| B/32 **vit_convert** | 2.0 s | 4.0 s | 100 MiB | 7 | 3 MiB | 3.0e-06 |" in text
    assert "| B/32 plain | 8.0 s (4.0×) | 16.0 s (4.0×) | 2.00 GiB (20.5×) |" in text
    assert (
        "Some CPU, 2 cores; jax 1.2" in text
        and "`convert-2026-01-02.json`" in text
        and "77" not in text
        and "old" not in text
    )
    assert tables.fill(text, results) == text


def test_growth_is_the_slope_between_two_sizes(tables, tmp_path):
    runs = [run_of("S/16", "plain", 0, 2.0, 200, params=10**6), run_of("H/14", "plain", 0, 3.0, 300, params=11 * 10**6)]
    write(tmp_path / "convert-2026-01-01.json", runs)
    text = tables.fill("<!-- table:growth -->\n<!-- end -->", tmp_path)
    # 1 s, 2 s of CPU and 100 MiB for 10 million parameters more
    assert "| plain | 1.9 s + 100 ns | 3.8 s + 200 ns | 190 MiB + 10.5 B |" in text


def test_rows_of_a_gpu_file_keep_their_columns(tables, tmp_path):
    rows = [
        {"precision": "fp16", "batch": 1, "p50_ms": 0.6012345, "gpu": {"clock": 1}},
        {"precision": "int8", "batch": 64, "p50_ms": 3.0},
    ]
    (tmp_path / "h200-b16.json").write_text(json.dumps({"rows": rows}))
    text = tables.fill("<!-- table:h200-b16 -->\n<!-- end -->", tmp_path)
    assert "| precision | batch | p50 ms |" in text and "| fp16 | 1 | 0.6012 |" in text and "clock" not in text


def test_a_name_without_table_or_results_is_an_error(tables, tmp_path):
    for name, message in (("convrt", "not one of convert"), ("convert", r"no .*convert-\*\.json")):
        with pytest.raises(SystemExit, match=message):
            tables.fill(f"<!-- table:{name} -->\n<!-- end -->", tmp_path)


def test_a_side_by_side_run_names_every_version_that_its_parts_record(tables, tmp_path):
    row = {**MEASURED, "images_per_second": 9000.0}
    parts = {
        "engine": {"gpu": "Some GPU", "driver": "1.2", "rows": [row], "tensorrt": "8.6.0"},
        "jax": {"jax": "0.11", "driver": "1.2"},
    }
    model = {"variant": "B/16", "image_size": 224, **parts, "torch": {"torch": "2.11", "timm": "1.0"}}
    run = {"date": "2026-01-01T00:00:00", "command": "x", "models": {"b16": model}}
    (tmp_path / "h200-b16.json").write_text(json.dumps(run))
    text = tables.fill("<!-- table:h200 -->\n<!-- end -->", tmp_path)
    assert "<sub>Some GPU, 1.2, tensorrt 8.6.0, jax 0.11, torch 2.11, timm 1.0, 2026-01-01;" in text
    assert [part for part in tables.VERSIONS if f"{part} " not in text] == []


def test_an_engine_that_takes_uint8_has_rows_of_its_own(tables, tmp_path):
    def run_with(rate, **about):
        row = {**MEASURED, "images_per_second": rate}
        parts = {"engine": {"gpu": "Some GPU", "driver": "1.2", "rows": [row]}, "variant": "B/16", "image_size": 224}
        return {"date": about.pop("date"), "command": "x", "models": {"b16-224": {**parts, **about}}}

    (tmp_path / "h200-a.json").write_text(json.dumps(run_with(9000.0, date="2026-01-01")))
    (tmp_path / "h200-b.json").write_text(json.dumps(run_with(8000.0, date="2026-01-02", input="uint8")))
    (tmp_path / "h200-c.json").write_text(json.dumps(run_with(9500.0, date="2026-01-03", input="float32")))
    text = tables.fill("<!-- table:h200 -->\n<!-- end -->", tmp_path)
    assert "| B/16 at 224 | 64 | 9 500 images/s |" in text and "| B/16 at 224, uint8 | 64 | 8 000 images/s |" in text
    assert "9 000" not in text and "h200-a.json" not in text


def test_runs_of_different_versions_are_no_one_table(tables, tmp_path):
    parts = {"variant": "B/16", "image_size": 224}
    for name, version in (("a", "8.6.0"), ("b", "8.6.1")):
        engine = {
            "gpu": "Some GPU",
            "driver": "1.2",
            "tensorrt": version,
            "rows": [{**MEASURED, "images_per_second": 1.0}],
        }
        model = {**parts, "input": "uint8" if name == "b" else "float32", "engine": engine}
        (tmp_path / f"h200-{name}.json").write_text(
            json.dumps({"date": "2026-01-01", "command": "x", "models": {"b16": model}})
        )
    with pytest.raises(SystemExit, match=r"tensorrt 8\.6\.0 and of 8\.6\.1 are no one table"):
        tables.fill("<!-- table:h200 -->\n<!-- end -->", tmp_path)


def test_a_range_is_compared_with_the_fixed_profile_of_its_lowering(tables, tmp_path):
    def trial(lowering, rate, smallest, passed=True):
        row = {"batch": 64, "images_per_second": rate, "noise_percent": 0.5}
        sizes = {"min": smallest, "opt": 64, "max": 64}
        about = {
            "precision": "fp16",
            "profile": f"from {smallest}",
            "cosine": 0.9999,
            "fused_attention": {"text": "yes"},
        }
        return {"lowering": lowering, "sizes": sizes, "rows": [row], "passed": passed, **about}

    trials = [
        trial("plugin", 2000.0, 64),
        trial("plugin", 1900.0, 1),
        trial("default", 1000.0, 1),
        trial("matmul", 9.0, 1, passed=False),
    ]
    trials.append({"lowering": "matmul", "failed": "no kernel"})
    trials[2] |= {"fused_attention": None, "rows": [{**trials[2]["rows"][0], "noise_percent": None}]}
    (tmp_path / "h200-tune-b16.json").write_text(
        json.dumps({"gpu": "Some GPU", "tensorrt": "8.6.0", "date": "2026-01-01", "trials": trials})
    )
    text = tables.fill("<!-- table:h200-tune -->\n<!-- end -->", tmp_path)
    assert (
        "| plugin | from 64 | fp16 | 64 | 2 000 images/s | 100.0 % |" in text and "| 1 900 images/s | 95.0 % |" in text
    )
    assert (
        "| `model.onnx` | from 1 | fp16 | 64 | 1 000 images/s |  | unknown | 0.999900 |  |" in text
        and "no kernel" not in text
    )
    assert "| matmul | from 1 | fp16 | 64 | 9 images/s |  | yes | 0.999900, **missed** |" in text
    assert "<sub>Some GPU; tensorrt 8.6.0; 2026-01-01;" in text


def test_int8_is_set_beside_fp16(tables, tmp_path):
    int8 = {
        "int8_layers": 12,
        "products": {"int8": 20, "fp32": 5},
        "top1": 99.5,
        "images_per_second": {"int8": 600.0, "fp16": 1000.0},
        "recommended": {"precision": "fp16"},
    }
    record = {
        "environment": {"gpu": "Some GPU"},
        "tests": {name: {"int8": int8} for name in ("test_int8_by_qdq", "test_calibrator")},
    }
    (tmp_path / "h200-tests-digits-2026-01-01.json").write_text(json.dumps(record))
    text = tables.fill("<!-- table:h200-int8 -->\n<!-- end -->", tmp_path)
    assert "| explicit Q/DQ | 12 of 25 | 99.50 % | 600 images/s | 1 000 images/s | 0.60× | fp16 |" in text


def test_int8_by_our_kernels_beside_all_others(tables, tmp_path):
    def ours(precision, rate, **changes):
        return {**MEASURED, "precision": precision, "batch": 256, "images_per_second": rate, **changes}

    rows = [
        ours("fp16", 1000.0),
        ours("int8", 1500.0),
        ours("int8", 9000.0, streams=2),
        ours("int8", 9000.0, transfers="in and out"),
    ]
    jax = [
        {"precision": name, "batch": 256, "images_per_second": rate}
        for name, rate in (("fp32", 300.0), ("bf16", 500.0), ("bf16", 750.0))
    ]
    torch = [
        {"mode": mode, "batch": 256, "images_per_second": rate}
        for mode, rate in (("reduce-overhead", 500.0), ("max-autotune", 600.0))
    ]
    model = {
        "variant": "B/16",
        "image_size": 224,
        "engine": {"gpu": "Some GPU", "rows": rows},
        "jax": {"rows": jax},
        "torch": {"rows": torch},
    }
    record = {
        "models": {"b16-224": {**model, "verify": {"engines": {"int8": {"cosine": 0.9, "passed": False}}}}},
        "date": "2026-01-01",
    }
    (tmp_path / "int8-fused-2026-01-01.json").write_text(json.dumps(record))
    line = tables.fill("<!-- table:int8-fused -->\n<!-- end -->", tmp_path).splitlines()[3]
    rates = [f"{text} images/s" for text in ("1 000", "1 500", "300", "750", "500", "600")]
    assert line.split(" | ")[2:-1] == [*rates, "1.50×", "5.00×", "2.00×", "2.50×", "0.9000, **missed**"]


def test_a_trained_model_on_a_gpu(tables, tmp_path):
    run = {
        "case": "digits",
        "outputs": "logits",
        "options": [
            "--config.calibration.max_error=0.001",
            "--config.engine.timing_cache=t",
            "--config.keep_fp16=('block_11',)",
        ],
        "batch": 256,
        "cosine": 0.9876,
        "engines": {"int8": {"int8_layers": 38}},
    }
    run |= {
        "images_per_second": {"fp16": 1000.0, "int8": 1250.0},
        "top1": 96.0,
        "top1_jax": 96.6,
        "images": 500,
        "left_out": 4,
    }
    run |= {"passed": True, "recommended": "int8", "gpu": "Some GPU", "tensorrt": "8.6.0"}
    record = {
        "hardware": {"cpu": "A CPU"},
        "versions": {"jax": "1"},
        "command": "python a; python b; python c",
        "runs": [run],
    }
    (tmp_path / "int8-gpu-trained-2026-01-01.json").write_text(json.dumps(record))
    text = tables.fill("<!-- table:int8-gpu-trained -->\n<!-- end -->", tmp_path)
    assert (
        "| logits | `max_error=0.001`, `keep_fp16=('block_11',)` | 4 | 38 | 256 | 1 000 | 1 250 | 1.25× | 0.9876 "
        "| 96.0 % (FP32 96.6 %) of 500 | yes | int8 |"
    ) in text
    assert "<sub>Some GPU, A CPU; tensorrt 8.6.0, jax 1;" in text and "`python a`, and 2 more like it" in text


def test_check_fails_when_the_text_is_stale(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no tables\n")
    command = [sys.executable, str(BENCHMARKS / "tables.py"), "--check", str(readme)]
    assert subprocess.run(command).returncode == 0
    readme.write_text("<!-- table:convert -->\nby hand\n<!-- end -->\n")
    stale = subprocess.run(command, capture_output=True, text=True)
    assert stale.returncode == 1 and re.search(r"stale|no .*convert-", stale.stderr)
    assert "by hand" in readme.read_text()


def test_kernels_of_a_run_and_the_run(tables, tmp_path):
    shares = {"tensor_percent": 93.7, "sm_percent": 93.7, "l2_percent": 59.0, "dram_percent": 30.7}
    product = {
        "name": "sm90_gemm_tilesize256x128_cgasize1x2x1_kernel",
        "grid": "(132, 1, 1)",
        "launches": 34,
        "mean_us": 205.6,
        **shares,
    }
    copy = {
        "name": "void fill<int>(int)",
        "grid": "(1, 1, 1)",
        "launches": 3,
        "mean_us": 2.3,
        "share_percent": 1.2,
        "dram_mib": 0.0,
    }
    record = {
        "environment": {"gpu": "Some GPU", "tensorrt": "8.6.0", "date": "2026-01-01T00:00:00"},
        "command": "python x",
    }
    record |= {
        "kernels": [{**product, "share_percent": 98.8, "dram_mib": 289.6}, copy],
        "kernels_us": 15393.2,
        "run_us": 17553.7,
    }
    (tmp_path / "h200-ncu-b16.json").write_text(json.dumps(record))
    text = tables.fill("<!-- table:h200-ncu-b16 -->\n<!-- end -->", tmp_path)
    assert "| `sm90_gemm_tilesize256x128` | 34 | 206 µs | 98.8 % | 94 % | 59 % | 31 % | 290 MiB |" in text
    assert (
        "| the others | 3 |  | 1.2 % |" in text and "15 393 µs" in text and "17 554 µs" in text and "fill" not in text
    )
    assert "<sub>Some GPU; tensorrt 8.6.0; 2026-01-01; `python x`" in text


def test_precisions_of_one_benchmark(tables, tmp_path):
    row = {**MEASURED, "graph": "plugin.onnx", "images_per_second": 13296.0, "fused_attention": "yes, fp16, 12 of 12"}
    rows = [
        row,
        {**row, "transfers": "in and out"},
        {**row, "precision": "int8", "images_per_second": 6353.0, "int8_layers": 24},
    ]
    record = {"gpu": "Some GPU", "date": "2026-01-01", "rows": rows, "recommended": {"precision": "fp16"}}
    (tmp_path / "h200-int8-b16.json").write_text(json.dumps(record))
    lines = tables.fill("<!-- table:h200-int8-b16 -->\n<!-- end -->", tmp_path).splitlines()[3:5]
    assert lines == [
        "| fp16 | `plugin.onnx` | 64 | 1 |  | yes, fp16, 12 of 12 | 13 296 images/s | 0.4 | yes |",
        "| int8 | `plugin.onnx` | 64 | 1 | 24 | yes, fp16, 12 of 12 | 6 353 images/s | 0.4 |  |",
    ]


def test_what_mutants_came_to_by_the_newest_draw_of_each_module(tables, tmp_path):
    def draw(seed, killed, first, *, equivalent=0, day=1):
        row = {"mutants": 15, "killed": killed, "killed_at_first": first, "equivalent": equivalent, "seed": seed}
        return {**row, "date": f"2026-01-0{day}T00:00:00Z"}

    records = {
        "images/a": [draw(2, 9, 9, day=3), draw(4, 15, 12, equivalent=1)],  # the older was tried again later
        "images/b": [draw(3, 15, None)],
        "engine/tune/c": [draw(1, 14, 14, equivalent=1, day=2)],
    }
    (tmp_path / "mutation").mkdir()
    for name, runs in records.items():
        rows = [{**run, "module": f"vit_convert/{name}.py"} for run in runs]
        (tmp_path / "mutation" / f"{name.replace('/', '.')}.json").write_text(json.dumps({"runs": rows}))
    text = tables.fill("<!-- table:mutation -->\n<!-- end -->", tmp_path)
    assert text.splitlines()[3:6] == [
        "| `engine/tune/` | 1 | 15 | 1 | 14 of 14 (100 %) | all |",
        "| `images/` | 2 | 30 | 1 | 27 of 29 (93 %) | 12 of 14 (`a`) |",
        "| all | 3 | 45 | 2 | 41 of 43 (95 %) | 12 of 14 (`a`) |",
    ]
    assert "<sub>2026-01-01 to 2026-01-02; `benchmarks/mutation.py`" in text
    for path in (tmp_path / "mutation").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match=r"no .*/mutation/\*\.json"):
        tables.fill("<!-- table:mutation -->\n<!-- end -->", tmp_path)


def test_no_record_names_a_folder_of_whoever_measured():
    """A command is there to be typed again, on another machine."""
    folder = re.compile(r"/(?:home|root|Users|scratch|mnt)/")
    named = {
        path.name: found.group()
        for path in (BENCHMARKS / "results").rglob("*.json")
        if (found := folder.search(path.read_text(encoding="utf-8")))
    }
    assert named == {}
