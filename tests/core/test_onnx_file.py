"""ONNX files: whole or not at all, their weights beside them, and any inner value to be seen."""

import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from vit_convert.core.errors import ExportError, UsageError
from vit_convert.core.onnx_file import external_files, open_proto, open_session, run_session, save_onnx

WIDTH = 20
KERNEL = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)  # 1 600 bytes
BIAS = np.arange(WIDTH, dtype=np.float32)  # 80


def product(kernel: np.ndarray = KERNEL, text: str = "h = MatMul (x, w) s = Add (h, b) y = Relu (s)") -> ir.Model:
    rows, columns = kernel.shape
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 20]> g (float[n, {rows}] x, float[{rows}, {columns}] w, '
        f"float[{columns}] b) "
        f"=> (float[n, {columns}] y) {{ {text} }}"
    )
    for name, value in (("w", kernel), ("b", BIAS[:columns])):
        constant = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(constant)
        constant.const_value = ir.tensor(value, name=name)
        model.graph.initializers.add(constant)
    return model


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, WIDTH)).astype(np.float32)


def test_large_weights_lie_beside_the_graph_and_small_ones_inside(tmp_path):
    path = tmp_path / "very/deep/model.onnx"
    save_onnx(product(), path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert external_files(path) == [path, path.with_name("model.onnx.data")] == external_files(str(path))
    tensors = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert (
        tensors["w"].data_location == onnx.TensorProto.EXTERNAL
        and tensors["b"].data_location == onnx.TensorProto.DEFAULT
    )
    assert {entry.value for entry in tensors["w"].external_data if entry.key == "location"} == {"model.onnx.data"}
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[list(tensors).index("w")]), KERNEL
    )


@pytest.mark.parametrize(("numbers", "beside"), [(255, False), (257, True)])
def test_a_kibibyte_is_where_weights_go_out(tmp_path, numbers, beside):
    model = product(np.ones((numbers, 1), np.float32))
    save_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").exists() is beside


def test_a_graph_without_large_weights_leaves_none_of_an_earlier_one(tmp_path):
    path = tmp_path / "model.onnx"
    save_onnx(product(), path)
    save_onnx(product(KERNEL[:2, :2]), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"] and external_files(path) == [path]


def test_weights_are_there_after_saving(tmp_path):
    """The graph goes on being used: what it holds is no reference to a temporary file."""
    model = product()
    save_onnx(model, tmp_path / "a.onnx")
    save_onnx(model, tmp_path / "b.onnx")
    for name in ("a", "b"):
        got = run_session(open_session(tmp_path / f"{name}.onnx"), images())["y"]
        np.testing.assert_allclose(got, np.maximum(images() @ KERNEL + BIAS, 0), rtol=1e-5, atol=1e-5)
    assert isinstance(model.graph.initializers["w"].const_value, ir.Tensor)


@pytest.mark.parametrize(
    "invalid",
    [
        "h = MatMul (w, b) s = Add (h, x) y = Nonsense (s)",
        "h = MatMul (x, w) s = Relu (h, b) y = Relu (s)",
        "h = MatMul (x, w) s = Add (h, b) y = Cast <to = 10> (s)",  # of another type than the graph says
    ],
)
def test_a_graph_that_the_checker_refuses_replaces_nothing(tmp_path, invalid):
    path = tmp_path / "model.onnx"
    save_onnx(product(), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ExportError, match=r"onnx\.checker refuses the graph") as caught:
        save_onnx(product(text=invalid), path)
    assert str(path) in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_stops_in_between_leaves_nothing(tmp_path):
    def explode() -> ir.TensorProtocol:
        raise OSError(28, "No space left on device")

    model = product()
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        explode, dtype=ir.DataType.FLOAT, shape=ir.Shape(KERNEL.shape), name="w"
    )
    with pytest.raises(UsageError, match="no space left on the disk"):
        save_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_folder_in_a_files_place_is_said(tmp_path, name):
    (tmp_path / name / "kept").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"model\.onnx: cannot be written \(Is a directory\)"):
        save_onnx(product(), tmp_path / "model.onnx")
    assert (tmp_path / name / "kept").is_dir() and not list(tmp_path.glob(".*"))


def test_the_weights_are_renamed_before_the_graph(tmp_path, monkeypatch):
    """A reader that finds the graph finds its weights."""
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(os.path.basename(new)), replace(old, new)))
    save_onnx(product(), tmp_path / "model.onnx")
    assert moved[-2:] == ["model.onnx.data", "model.onnx"]


def test_inner_values_and_inputs_are_outputs_when_asked_for(tmp_path):
    path = tmp_path / "model.onnx"
    save_onnx(product(), path)
    session = open_session(path, ["s", "y", "x"])
    got = run_session(session, images())
    assert list(got) == ["y", "s", "x"]
    np.testing.assert_allclose(got["s"], images() @ KERNEL + BIAS, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got["x"], images())
    assert list(run_session(session, images(), ["s"])) == ["s"]
    assert list(run_session(open_session(path), images())) == ["y"]
    with pytest.raises(ExportError, match=r"model\.onnx: no value 'z' in the graph"):
        open_session(path, ["s", "z"])


def test_weights_are_looked_for_in_the_folder_that_is_said(tmp_path):
    save_onnx(product(), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert run_session(open_proto(proto, tmp_path), images())["y"].shape == (3, WIDTH)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(Exception, match=r"model\.onnx\.data"):
        open_proto(proto, tmp_path / "elsewhere")


def test_what_onnxruntime_cannot_load_or_run(tmp_path):
    path = tmp_path / "model.onnx"
    save_onnx(product(), path)
    with pytest.raises(ExportError, match=r"onnxruntime cannot run the graph on float32 \(3, 7\): "):
        run_session(open_session(path), images()[:, :7])
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"model\.onnx: onnxruntime cannot load the graph: "):
        open_session(path)


@pytest.mark.parametrize("threads", [0, 3])
def test_sessions_take_the_threads_they_are_given_and_pack_nothing(tmp_path, monkeypatch, threads):
    """Packed copies would double the memory of a large model."""
    save_onnx(product(), tmp_path / "model.onnx")
    asked, opened = [], ort.InferenceSession

    def spy(graph, options, **rest):
        asked.append(
            (
                options.intra_op_num_threads,
                options.get_session_config_entry("session.disable_prepacking"),
                rest["providers"],
            )
        )
        return opened(graph, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    open_session(tmp_path / "model.onnx", threads=threads)
    open_proto(onnx.load(tmp_path / "model.onnx", load_external_data=False), tmp_path)
    cpu = [("CPUExecutionProvider", {})]
    assert asked == [(threads, "1", cpu), (0, "1", cpu)]
