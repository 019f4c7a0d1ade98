"""Several outputs, in whatever they are packed: one is judged, by name; the others are kept with theirs, or said to be
left out."""

import dataclasses
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from own_model import Own

from vit_convert.core.errors import UsageError
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.families.user.outputs import BARE, named

SOURCE = """
@flax.struct.dataclass
class Struct:
    logits: jax.Array
    hidden: jax.Array
    loss: jax.Array | None = None


@dataclasses.dataclass
class Plain:
    logits: jax.Array
    hidden: jax.Array


Named = namedtuple("Named", "hidden logits")


def both(x):
    return pooled(x) @ W, jnp.tanh(x.reshape(x.shape[0], 4, -1))


def f(pack):
    return lambda p, x: pack(*both(x))
"""
PACKS = {
    "dictionary": "lambda logits, hidden: {'hidden': hidden, 'logits': logits}",
    "named tuple": "lambda logits, hidden: Named(hidden, logits)",
    "struct": "Struct",
    "dataclass": "Plain",
    "taps": "lambda logits, hidden: (logits, {'hidden': hidden})",
    "list of taps": "lambda logits, hidden: [logits, {'hidden': hidden}]",
}


@pytest.mark.parametrize("pack", PACKS)
def test_pack(tmp_path, pack):
    own = Own(tmp_path)
    assert own.convert(SOURCE, f"lambda: (f({PACKS[pack]}), {{}})", "--config.taps=True") == 0
    checkpoint = own.stage("checkpoint")
    assert checkpoint["output"] == "logits"
    assert checkpoint["summary"].endswith("judged by logits; also hidden")
    images = np.random.default_rng(3).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    session = open_session(own.bundle / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["logits", "hidden"]
    got = run_session(session, images)
    matrix = (np.arange(15, dtype=np.float32).reshape(3, 5) - 7) / 10
    np.testing.assert_allclose(got["logits"], images.mean((1, 2)) @ matrix, atol=1e-6)
    np.testing.assert_allclose(got["hidden"], np.tanh(images.reshape(3, 4, -1)), atol=1e-6)


def test_without_taps_the_judged_output_is_the_only_one(tmp_path):
    own = Own(tmp_path)
    assert own.convert(SOURCE, f"lambda: (f({PACKS['dictionary']}), {{}})") == 0
    session = open_session(own.bundle / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["logits"]
    nodes = [node.op_type for node in onnx.load(own.bundle / "model.onnx").graph.node]
    assert "Tanh" not in nodes  # what nobody asked for is not computed


def test_another_output_is_judged_by_its_name(tmp_path, capsys):
    own = Own(tmp_path)
    tuple_of_two = "lambda: (f(lambda *both: both), {})"
    assert own.convert(SOURCE, tuple_of_two) == 2
    error = capsys.readouterr().err
    assert "the model returns output_0, output_1" in error and 'config.outputs = "output_0"' in error
    assert own.again("--config.outputs=output_1") == 0
    assert own.stage("checkpoint")["output"] == "output_1"
    assert own.convert(SOURCE, f"lambda: (f({PACKS['struct']}), {{}})", "--config.outputs=hiden") == 2
    assert "config.outputs='hiden': the model returns hidden, logits" in capsys.readouterr().err


def test_one_output_in_a_container_needs_no_name(tmp_path):
    own = Own(tmp_path)
    assert own.convert(SOURCE, "lambda: (f(lambda logits, _: {'scores': logits}), {})", "--until=check") == 0
    assert own.stage("checkpoint")["output"] == "scores"
    assert (
        own.convert(
            SOURCE, "lambda: (f(lambda logits, _: (logits,)), {})", "--until=check", "--config.outputs=features"
        )
        == 0
    )
    assert own.stage("checkpoint")["output"] == "features"


def test_what_cannot_be_compared_is_left_out_by_name(tmp_path):
    own = Own(tmp_path)
    pack = (
        "lambda logits, hidden: {'logits': logits, 'loss': logits.sum(), 'best': logits.argmax(-1), 'table': "
        "jnp.asarray(W)}"
    )
    assert own.convert(SOURCE, f"lambda: (f({pack}), {{}})", "--config.taps=True") == 0
    assert own.stage("checkpoint")["warnings"] == [
        "output best is left out: it is int32, not floating-point",
        "output loss is left out: it is a single number",
        "output table is left out: it has shape (3, 5) for a batch of 1",
    ]
    assert [output.name for output in open_session(own.bundle / "model.onnx").get_outputs()] == ["logits"]


def test_lower_precisions_keep_the_others_too(tmp_path):
    own = Own(tmp_path)
    source = SOURCE.replace(
        "both(x):\n    return pooled(x) @ W,", "both(x):\n    return jnp.tanh(pooled(x) @ W) @ W.T @ W,"
    )
    flags = ("--config.taps=True", "--config.precision=int8", "--config.calibration.num_images=4")
    assert own.convert(source, f"lambda: (f({PACKS['dictionary']}), {{}})", *flags) == 0
    for precision in ("fp16", "int8"):
        session = open_session(own.bundle / f"model.{precision}.onnx")
        assert [(output.name, output.type) for output in session.get_outputs()] == [
            ("logits", "tensor(float)"),
            ("hidden", "tensor(float)"),
        ]


def test_one_array_under_two_names(tmp_path):
    own = Own(tmp_path)
    pack = "lambda logits, hidden: {'again': logits, 'logits': logits, 'reshaped images': hidden}"
    assert own.convert(SOURCE.replace("jnp.tanh", ""), f"lambda: (f({pack}), {{}})", "--config.taps=True") == 0
    assert own.stage("checkpoint")["warnings"] == ["output again is left out: it is logits again"]
    images = np.random.default_rng(3).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    got = run_session(open_session(own.bundle / "model.onnx"), images)
    assert list(got) == ["logits", "reshaped images"]
    np.testing.assert_array_equal(got["reshaped images"], images.reshape(3, 4, -1))


def test_names_of_nested_results():
    pair = namedtuple("pair", "left right")

    @dataclasses.dataclass
    class Plain:
        inner: object

    x = jnp.zeros((1, 2))
    assert list(named({"b": pair(x, [x, {"c": x}]), "a": Plain({"d": x, "e": None})})) == [
        "b/left",
        "b/right/0",
        "b/right/1/c",
        "a/inner/d",
    ]
    assert list(named(x)) == list(named((x,))) == list(named([x])) == [BARE]
    assert list(named((x, x))) == ["output_0", "output_1"]
    assert list(named((x, {"tap": x}))) == [BARE, "tap"]
    assert list(named(jax.tree_util.Partial(lambda: None, x))) != []
    for wrong in ({"a": x, "b": "text"}, {"a": {"b": x}, "a/b": x}, None, {}, (None,), [{"a": 3}]):
        with pytest.raises(UsageError):
            named(wrong)
