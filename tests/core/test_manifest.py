"""The manifest names the very files that stages left; whatever else lies in the bundle is not read."""

import os
import shutil

import pytest

from vit_convert.core.bundle import Bundle, as_json, write_json
from vit_convert.core.leftovers import SourceGraph, built_from, remove_leftovers, remove_temporaries
from vit_convert.core.manifest import FileRecord, Manifest, StageRecord


def write(bundle, name, data):
    path = bundle.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def conclude(bundle, status="done", *names):
    files = [FileRecord.of(bundle.root, bundle.root / name).to_dict() for name in names]
    row = {"name": "export", "status": status, "key": "k", "result": {"passed": True}, "files": files}
    write_json(bundle.manifest, {"stages": [row]})
    return Manifest.read(bundle)


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "b").mkdir()
    return Bundle(tmp_path / "b")


def test_a_file_is_known_by_its_content(bundle):
    path = write(bundle, "model.onnx", b"weights")
    record = FileRecord.of(bundle.root, path)
    assert record.found(bundle.root) == record
    before = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size, and by its date as old
    assert record.found(bundle.root) is None
    path.write_bytes(b"weights")  # the same again, at another time
    assert record.found(bundle.root).sha256 == record.sha256
    path.write_bytes(b"weight")
    assert record.found(bundle.root) is None
    path.unlink()
    assert record.found(bundle.root) is None


def test_a_copy_of_a_bundle_is_read_once_more_and_then_as_it_is(bundle, tmp_path, monkeypatch):
    record = FileRecord.of(bundle.root, write(bundle, "model.onnx", b"weights"))
    there = tmp_path / "copy"
    shutil.copytree(bundle.root, there)
    found = record.found(there)
    assert found.sha256 == record.sha256 and found.stat != record.stat

    def never(path, stat):
        raise AssertionError("read again")

    monkeypatch.setattr("vit_convert.core.manifest._hash", never)
    assert found.found(there) == found


@pytest.mark.parametrize("status", ["running", "failed", "stale"])
def test_what_an_unfinished_stage_left_is_not_read(bundle, status):
    path = write(bundle, "model.onnx", b"weights")
    manifest = conclude(bundle, status, "model.onnx")
    assert path not in manifest.files and "no finished stage of this conversion made it" in manifest.files.wrong(path)
    # a miss was measured, the rest is another's
    assert manifest.result("export") == ({"passed": True} if status == "failed" else {})
    assert not manifest.finished("export")


def test_graphs_are_judged_with_their_weights(bundle):
    path, data = write(bundle, "model.onnx", b"graph"), write(bundle, "model.onnx.data", b"weights")
    files = conclude(bundle, "done", "model.onnx", "model.onnx.data").files
    assert files.wrong_graph(path) == "" and set(files.graph_hashes(path)) == {"sha256", "data_sha256"}
    data.write_bytes(b"WEIGHTS")
    assert f"{data}: is not the file that stage export left" in files.wrong_graph(path)
    data.unlink()
    assert f"{data}: there is no such file, which stage export left" in files.wrong_graph(path)
    write(bundle, "model.int8.onnx", b"another")
    assert (
        "no finished stage" in files.wrong_graph(bundle.onnx("int8")) and files.graph_hashes(bundle.onnx("int8")) == {}
    )


@pytest.mark.parametrize(
    "rows", [None, 3, [3], [{"status": "done"}], [{"name": "export", "status": "done", "files": [{"path": 1}]}]]
)
def test_a_manifest_of_another_form_names_nothing(bundle, rows):
    write(bundle, "model.onnx", b"weights")
    write_json(bundle.manifest, {"stages": rows})
    assert bundle.onnx() not in Manifest.read(bundle).files


FILE = {"path": "model.onnx", "bytes": 7, "sha256": "ab", "stat": [1, 2, 3]}
BEGUN = {"name": "export", "status": "running", "key": "k", "files": []}
DONE = {**BEGUN, "status": "done", "files": [FILE], "result": {"summary": "s", "n": [1]}, "seconds": 1.5}
FAILED = {**BEGUN, "status": "failed", "error": "why", "result": {}, "seconds": 0.5, "peak_rss_mib": 8.0}


@pytest.mark.parametrize("row", [BEGUN, DONE, {**DONE, "peak_rss_mib": 8.0}, FAILED])
def test_a_row_is_written_as_it_was_read_key_by_key(row):
    assert as_json(StageRecord.read(row)) == as_json(row)


@pytest.mark.parametrize("files", [None, 3, [3], [{"path": "model.onnx", "sha256": "ab"}], [{**FILE, "stat": [1]}]])
def test_a_row_whose_files_have_another_form_is_read_without_them(files):
    assert StageRecord.read({**DONE, "files": files}) == StageRecord.read({**DONE, "files": None})
    assert StageRecord.read({**DONE, "files": files}).finished


@pytest.mark.parametrize("row", [None, 3, [], {**DONE, "result": "fine"}, {**DONE, "status": 1}])
def test_a_damaged_row_is_none(row):
    assert StageRecord.read(row) is None


def engine(bundle, name, graph, **hashes):
    plan = write(bundle, name, b"plan")
    write_json(f"{plan}.json", {"onnx": {"path": graph, **hashes}})
    write(bundle, f"{name}.layers.json", b"{}")
    return plan


def test_leftovers_go_and_the_rest_stays(bundle):
    made = ("model.onnx", "model.onnx.data", "lowerings/matmul.onnx")
    for name in made:
        write(bundle, name, name.encode())
    left = (
        "model.int8.onnx",
        "model.int8.onnx.data",
        "model.smooth.onnx",
        "lowerings/plugin.onnx.data",
        "lowerings/fused.ranges.json",
        "spellings/matmul.onnx",
        "reference.npz",
        "reference.32x32.npz",
        "evaluation_labels.npy",
        "evaluation_logits.npy",
        "calibration.json",
        "calibration.cache",
        "calibration.cache.json",
        "sensitivity.json",
        "sensitivity.png",
        "precision_plan.json",
        "plan_search.json",
    )
    for name in left:
        write(bundle, name, b"an earlier conversion's")
    files = conclude(bundle, "done", *made).files
    here, spelt = files.graph_hashes(bundle.onnx()), files.graph_hashes(bundle.lowering("matmul"))
    kept = [
        engine(bundle, "engines/tensorrt-8.6.0-sm90/fp32.plan", "model.onnx", **here),
        engine(bundle, "engines/tensorrt-8.6.0-sm80/fp16.plan", "matmul.onnx", **spelt),
        engine(bundle, "tune/tensorrt-8.6.0-sm90/a.plan", "model.onnx", **here),
    ]
    gone = [
        engine(bundle, "engines/tensorrt-8.6.0-sm90/int8.plan", "model.int8.onnx", sha256="0"),
        # other weights alone
        engine(bundle, "engines/tensorrt-8.6.0-sm90/fp16.plan", "model.onnx", **{**here, "data_sha256": "0"}),
        engine(bundle, "tune/tensorrt-8.6.0-sm90/b.plan", "model.onnx", sha256="0"),
        write(bundle, "engines/tensorrt-8.6.0-sm90/bf16.plan", b"without a sidecar"),
    ]
    write_json(bundle.benchmark, {"onnx": here})
    write_json(bundle.tuning, {"onnx": {**here, "sha256": "0"}})
    own = [
        write(bundle, name, b"a user's own")
        for name in ("notes.txt", "model_card.md", "timing/tensorrt.cache", "triton/x.plan")
    ]
    remove_leftovers(bundle, files)
    assert not [name for name in left if (bundle.root / name).exists()]
    assert not [path for plan in gone for path in plan.parent.glob(f"{plan.name}*")] and not bundle.tuning.exists()
    assert all(path.exists() for path in (*kept, *own, *files, bundle.benchmark, bundle.manifest))
    assert all(plan.with_name(f"{plan.name}.layers.json").exists() for plan in kept)


@pytest.mark.parametrize(
    ("onnx", "built"),
    [
        ({"path": "a.onnx", "sha256": "1"}, SourceGraph("a.onnx", {"sha256": "1"})),
        (
            {"path": "a.onnx", "sha256": "1", "data_sha256": "2"},
            SourceGraph("a.onnx", {"sha256": "1", "data_sha256": "2"}),
        ),
        (
            {"path": "a.onnx", "sha256": "1", "data_sha256": "", "other": 3},
            SourceGraph("a.onnx", {"sha256": "1"}),
        ),
        *(
            (damaged, None)
            for damaged in (
                None,
                [],
                {},
                {"path": "a.onnx"},
                {"path": "a.onnx", "sha256": 1},
                {"path": 1, "sha256": "1"},
            )
        ),
    ],
)
def test_the_graph_that_a_sidecar_names(bundle, onnx, built):
    plan = write(bundle, "engines/x/fp16.plan", b"plan")
    assert built_from(plan) is None
    write_json(f"{plan}.json", {"onnx": onnx})
    assert built_from(plan) == built
    write_json(f"{plan}.json", {})
    assert built_from(plan) is None


def test_what_killed_runs_had_begun_goes(bundle):
    for name in (
        ".manifest.json.12-ab.tmp",
        "lowerings/.a.onnx.1-2.tmp",
        "engines/rtx-1-x/.fp16.plan.1-2.tmp",
        ".model.onnx.a1b2c3_d/half",
    ):
        write(bundle, name, b"half")
    (bundle.root / ".model.fp16.onnx.3-4.tmp").mkdir()
    own = [write(bundle, name, b"") for name in (".gitignore", "x.tmp", "other/.x.tmp")]
    remove_temporaries(bundle)
    left = {path.relative_to(bundle.root).as_posix() for path in bundle.root.rglob("*") if not path.is_dir()}
    assert left == {path.relative_to(bundle.root).as_posix() for path in own}
    assert {path.name for path in bundle.root.iterdir()} == {".gitignore", "x.tmp", "other", "lowerings", "engines"}
