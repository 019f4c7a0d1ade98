"""An engine that does not belong here is refused by its sidecar, in words, before TensorRT reads it."""

import dataclasses
import hashlib
import json

import pytest

from vit_convert.core.errors import BuildError
from vit_convert.engine.backend.cuda import Gpu
from vit_convert.engine.backend.graph_file import graph_hashes
from vit_convert.engine.backend.sidecar import (
    Sidecar,
    check_sidecar,
    plan_file,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from vit_convert.engine.backend.trt import Backend

H200 = Gpu("NVIDIA H200", "sm90", 150 << 30, "550.54", "12.4")
HERE = Backend("tensorrt", "8.6.1", None, H200, None)


@pytest.fixture
def plan(tmp_path):
    def write(**changes):
        path, graph = tmp_path / "fp16.plan", tmp_path / "model.onnx"
        path.write_bytes(b"engine")
        graph.write_bytes(b"graph")
        options = {"version_compatible": False, "hardware_compatible": False, **changes.pop("options", {})}
        record = {
            "backend": "tensorrt",
            "version": "8.6.1",
            "targets": ["sm90"],
            "precision": "fp16",
            "options": options,
            **changes,
        }
        record |= {"onnx": {"path": graph.name, **graph_hashes(graph)}, "plan": plan_file(path).to_dict()}
        write_sidecar(path, Sidecar.from_dict(record))
        return path

    return write


def test_accepts_its_own(plan, tmp_path):
    path = plan()
    assert check_sidecar(path, HERE, onnx_path=tmp_path / "model.onnx").precision == "fp16"
    assert check_sidecar(path, HERE).to_dict() == json.loads(sidecar_path(path).read_text())


def test_version(plan):
    with pytest.raises(BuildError, match=r"built by tensorrt 8\.6\.0, here is 8\.6\.1") as caught:
        check_sidecar(plan(version="8.6.0"), HERE)
    assert caught.value.fix == "Build fp16 again from model.onnx on this host."


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.0.1", "10.16.1", True),
        ("10.16.1", "10.16.1", True),
        ("10.16.1", "10.0.1", False),
        ("10.9.0", "10.16.1", True),  # by number: "9" is behind "16" as text
        ("10.16.1", "11.4.0", False),
        ("8.6.1.post1", "8.6.1", True),  # another package of the same TensorRT
        ("8.6.1", "8.6.1.post1", True),
        ("10.0.0b6", "10.0.1", True),
        ("beta", "10.0.1", False),
        ("10.²", "9.1", False),
    ],
)
def test_version_compatible_engines_run_on_later_versions_of_their_major(plan, built, here, fits):
    path = plan(version=built, options={"version_compatible": True})
    backend = dataclasses.replace(HERE, version=here)
    if fits:
        check_sidecar(path, backend)
    else:
        with pytest.raises(BuildError, match=f"built by tensorrt {built}, here is {here}"):
            check_sidecar(path, backend)
    # any other version, where the engine was not built for it
    with pytest.raises(BuildError, match="built by tensorrt"):
        check_sidecar(plan(version="10.9.9"), backend)


def test_backend(plan):
    with pytest.raises(BuildError, match="built by rtx, to be loaded by tensorrt"):
        check_sidecar(plan(backend="rtx"), HERE)


def test_architecture(plan):
    with pytest.raises(BuildError, match=r"built for sm80, sm86, here is sm90 \(NVIDIA H200\)"):
        check_sidecar(plan(targets=["sm80", "sm86"]), HERE)
    check_sidecar(plan(targets=["sm80"], options={"hardware_compatible": True}), HERE)
    turing = dataclasses.replace(HERE, gpu=dataclasses.replace(H200, arch="sm75"))
    with pytest.raises(BuildError, match="here is sm75"):  # before Ampere
        check_sidecar(plan(targets=["sm80"], options={"hardware_compatible": True}), turing)


@pytest.mark.parametrize(
    ("arch", "fits"),
    [("sm75", False), ("sm79", False), ("sm80", True), ("sm86", True), ("sm100", True), ("sm120", True)],
)
def test_hardware_compatible_engines_run_from_the_a100_on(plan, arch, fits):
    """TensorRT's AMPERE_PLUS: compute capability 8.0, which is the A100's own, and all later ones."""
    here = dataclasses.replace(HERE, gpu=dataclasses.replace(H200, arch=arch))
    path = plan(options={"hardware_compatible": True})
    if fits:
        check_sidecar(path, here)
    else:
        with pytest.raises(BuildError, match=f"here is {arch}"):
            check_sidecar(path, here)


def test_a_host_without_a_gpu_asks_for_none(plan):
    check_sidecar(plan(targets=["sm80"]), dataclasses.replace(HERE, gpu=None))


def test_engines_of_tensorrt_rtx_run_on_what_they_were_built_for_alone(plan):
    rtx = dataclasses.replace(HERE, name="rtx")
    with pytest.raises(BuildError, match="built for sm120, here is sm90"):
        check_sidecar(plan(backend="rtx", targets=["sm120"], options={"hardware_compatible": True}), rtx)


def test_damaged_plan(plan):
    path = plan()
    path.write_bytes(b"engine, cut or changed")
    with pytest.raises(BuildError, match=r"its sha256 is [0-9a-f]{12}…, its sidecar says [0-9a-f]{12}…"):
        check_sidecar(path, HERE)


@pytest.mark.parametrize("changed", ["model.onnx", "model.onnx.data"])
def test_graph_that_changed_since(plan, tmp_path, changed):
    path = plan()
    (tmp_path / changed).write_bytes(b"other")
    with pytest.raises(BuildError, match=r"built from another model\.onnx \([0-9a-f]{12}…, now [0-9a-f]{12}…\)"):
        check_sidecar(path, HERE, onnx_path=tmp_path / "model.onnx")


def test_missing_parts(plan, tmp_path):
    with pytest.raises(BuildError, match="no such engine"):
        check_sidecar(tmp_path / "int8.plan", HERE)
    path = plan()
    sidecar_path(path).write_text("{")
    with pytest.raises(BuildError, match=r"fp16\.plan\.json: missing or damaged"):
        check_sidecar(path, HERE)


@pytest.mark.parametrize(
    "key",
    [
        *(
            "backend",
            "version",
            "targets",
            "precision",
            "options",
            "options.hardware_compatible",
            "options.version_compatible",
        ),
        *("onnx", "onnx.path", "onnx.sha256", "plan", "plan.sha256"),
    ],
)
def test_missing_keys(plan, key):
    path = plan()
    record = json.loads(sidecar_path(path).read_text())
    *outer, last = key.split(".")
    del (record[outer[0]] if outer else record)[last]
    sidecar_path(path).write_text(json.dumps(record))
    with pytest.raises(BuildError, match=rf"fp16\.plan\.json: damaged: {key}.* not in it"):
        check_sidecar(path, HERE)


@pytest.mark.parametrize(
    ("key", "value"), [("version", 8), ("targets", "sm90"), ("options.version_compatible", "no"), ("plan", [])]
)
def test_entries_of_another_type(plan, key, value):
    path = plan()
    record = json.loads(sidecar_path(path).read_text())
    *outer, last = key.split(".")
    (record[outer[0]] if outer else record)[last] = value
    sidecar_path(path).write_text(json.dumps(record))
    with pytest.raises(BuildError, match=rf"fp16\.plan\.json: damaged: {key}.* not in it"):
        check_sidecar(path, HERE)


@pytest.mark.parametrize("text", ["[]", '"fp16"', "[" * 100_000])
def test_sidecar_that_is_no_record(plan, text):
    path = plan()
    sidecar_path(path).write_text(text)
    with pytest.raises(BuildError, match=r"fp16\.plan\.json: missing or damaged"):
        check_sidecar(path, HERE)


def test_entries_that_may_be_missing_are_as_we_write_them_or_not_there(plan):
    path = plan(model={"sha256": "0"})
    record = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps({**record, "proof": "passed", "instead_of": {"onnx": 3}, "summary": []}))
    found = read_sidecar(path)
    assert found.onnx.path == "model.onnx" and found.model == {"sha256": "0"}
    assert found.proof is found.instead_of is found.summary is None
    check_sidecar(path, HERE)
    sidecar_path(path).unlink()
    assert read_sidecar(path) is None


def test_what_is_written_of_the_files(plan):
    written = json.loads(sidecar_path(plan()).read_text())
    assert written["plan"] == {"bytes": 6, "sha256": hashlib.sha256(b"engine").hexdigest()}
    assert written["onnx"]["sha256"] == hashlib.sha256(b"graph").hexdigest()
    assert not {"summary", "model", "instead_of", "proof"} & written.keys()  # nothing is known of these yet


def test_a_sidecar_of_an_earlier_version_is_read(plan):
    """One that was written before it was a record, with an entry that no version has any more."""
    path = plan()
    record = json.loads(sidecar_path(path).read_text())
    earlier = {key: value for key, value in record.items() if key not in ("built_at", "inputs", "outputs")}
    sidecar_path(path).write_text(json.dumps({**earlier, "gone": 1, "summary": {"bytes": 3, "warnings": ["w"]}}))
    found = check_sidecar(path, HERE)
    assert found.summary.bytes == 3 and found.summary.warnings == ("w",) and found.inputs == ()
