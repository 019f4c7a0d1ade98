"""What is wrong with an own model is one message that says where in its code, with the exit code of its kind; never a
traceback."""

import pytest
from own_model import Own

from vit_convert.__main__ import main

SOURCE = """
class M(nn.Module):
    wrong: str = ""

    @nn.compact
    def __call__(self, x):
        if self.wrong == "raises":
            raise KeyError("weights of stage 3")
        if self.wrong == "exits":
            sys.exit(0)
        if self.wrong == "key":
            x = nn.Dropout(0.5, deterministic=False)(x)
        if self.wrong == "batch":
            return x.reshape(4, -1)[:, :5]
        if self.wrong == "branch" and x.sum() > 0:
            return pooled(x)
        if self.wrong == "ends":
            return nn.Dense(5)(pooled(x)).sum()
        if self.wrong == "classes":
            return nn.Dense(5)(pooled(x)).argmax(-1)
        if self.wrong == "none":
            return None
        if self.wrong == "text":
            return {"logits": nn.Dense(5)(pooled(x)), "name": "M"}
        if self.wrong == "nan":
            return nn.Dense(5)(pooled(x)) * jnp.nan
        return nn.Dense(5)(pooled(x))  # plain


class Required(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return nn.Dense(5)(pooled(x * mask))


class Equinox:
    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x @ self.w


jax.tree_util.register_pytree_node(Equinox, lambda e: ((e.w,), None), lambda _, leaves: Equinox(*leaves))
Transformed = namedtuple("Transformed", "init apply")


def f(p, x):
    return pooled(x) @ p["w"]


def lacks(p, x):
    return pooled(x) @ p["v"]


def opaque(p, x):
    return jnp.linalg.eigvals(x[:, :3, :3, 0]).real @ W


def callback(p, x):
    return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x).mean((1, 2)) @ W


def noisy(p, x):
    return pooled(x) @ W + jax.random.normal(p["key"], (x.shape[0], 5))


def raises():
    raise FileNotFoundError("/data/checkpoint_1000")


def exits():
    sys.exit(3)


good = variables(M())
wrong = lambda what: (M(what), good)
"""
# config.model: the exit code, what the message says, and what the line that it names holds ("" for none).
MISTAKES = {
    "raises": (2, "config.model(): FileNotFoundError: /data/checkpoint_1000", 'raise FileNotFoundError("/data'),
    "exits": (2, "SystemExit: it ends the process with 3", "sys.exit(3)"),
    "(M(), good)": (2, "config.model is a tuple, it must be a function that returns the model", ""),
    "f": (2, "config.model(): TypeError: f() missing 2 required positional arguments", ""),
    "lambda: None": (2, "config.model returned None: neither a Linen module, an NNX module nor a function", ""),
    "lambda: [M(), good]": (2, "config.model returned a list: neither", ""),
    "lambda: {'model': M()}": (2, "config.model returned a dict: neither", ""),
    "lambda: (M(), good, 3)": (2, "config.model returned a tuple of 3, expected (module, variables)", ""),
    "lambda: Transformed(f, f)": (2, "config.model returned a Transformed: neither", ""),
    "lambda: (M, good)": (2, "config.model returned the class M, not an instance", ""),
    "lambda: Equinox(W)": (
        2,
        "model Equinox: an object that is both its parameters and its function, as Equinox has",
        "",
    ),
    "lambda: (M(), [W])": (2, "model M: its variables are a list, not a dictionary", ""),
    "lambda: (M(), jax.eval_shape(lambda: good))": (2, "parameter Dense_0/bias is a description of (5,)", ""),
    "lambda: (Required(), good)": (2, "model Required(x, mask): needs mask as well, it is called with (images)", ""),
    "lambda: (lambda x: x, {})": (2, "model <lambda>(x): takes 1 arguments, it is called with (params, images)", ""),
    "lambda: (nnx.Linear(3, 5, rngs=nnx.Rngs(0)), {})": (2, "an NNX module holds its parameters", ""),
    "lambda: wrong('text')": (2, "the model's output 'name' is a str, not an array", ""),
    "lambda: wrong('none')": (2, "the model returns no array but a NoneType", ""),
    "lambda: (lambda p, x: {'images': pooled(x)}, {})": (
        2,
        "the model's output 'images' is called like another tensor",
        "",
    ),
    "lambda: (M(), {'params': {}})": (4, "ScopeCollectionNotFound", "return nn.Dense(5)(pooled(x))  # plain"),
    "lambda: (M(), {'params': {'Dense_0': {'kernel': W.T, 'bias': W[0]}}})": (
        4,
        "ScopeParamShapeError",
        "return nn.Dense(5)(pooled(x))  # plain",
    ),
    "lambda: (lacks, {'w': W})": (4, "KeyError: 'v'", 'p["v"]'),
    "lambda: (f, {'w': W.T})": (4, "TypeError: dot_general requires", 'p["w"]'),
    "lambda: wrong('raises')": (4, "M.apply(variables, images): KeyError: 'weights of stage 3'", "raise KeyError"),
    "lambda: wrong('exits')": (4, "SystemExit: it ends the process with 0", "sys.exit(0)"),
    "lambda: wrong('key')": (4, 'needs PRNG for "dropout"', "x = nn.Dropout(0.5, deterministic=False)(x)"),
    "lambda: wrong('branch')": (4, "TracerBoolConversionError", "x.sum() > 0"),
    "lambda: wrong('batch')": (4, "the output logits has shape (4, 5) for a batch of 1", ""),
    "lambda: wrong('ends')": (4, "the output logits is a single number", ""),
    "lambda: wrong('classes')": (4, "the output logits is int32, not floating-point", ""),
    "lambda: (opaque, {})": (4, "jax2onnx could not trace the model", ""),
    "lambda: (callback, {})": (4, "jax2onnx could not trace the model", ""),
    "lambda: wrong('nan')": (5, "logits: the JAX model itself gives NaN or infinity", ""),
}


@pytest.mark.parametrize("model", MISTAKES)
def test_mistake(tmp_path, capsys, model):
    code, said, line = MISTAKES[model]
    own = Own(tmp_path)
    assert own.convert(SOURCE, model) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and len(error.splitlines()) == 2
    assert said in error
    assert ("deterministic=True" in error) == (model == "lambda: wrong('key')")  # advice where it helps
    assert line == "" or (f"({own.config}:{own.line(line)}: " in error and line in error)


def test_random_numbers_do_not_reach_a_graph_unnoticed(tmp_path):
    """Sampled once, or each time: neither is what the model says, and a check or the export has to say so."""
    assert Own(tmp_path).convert(SOURCE, "lambda: (noisy, {'key': jax.random.key(0)})") in (4, 5)


@pytest.mark.parametrize(
    ("source", "said", "line"),
    [
        ("import torchfoo\n", "ModuleNotFoundError: No module named 'torchfoo'", "import torchfoo"),
        ("x = 1 / 0\n", "ZeroDivisionError: division by zero", "x = 1 / 0"),
        ("sys.exit(0)\n", "SystemExit: it ends the process with 0", "sys.exit(0)"),
        ("def broken(:\n", "SyntaxError", "def broken(:"),
    ],
)
def test_mistakes_of_the_file_itself(tmp_path, capsys, source, said, line):
    own = Own(tmp_path)
    assert own.convert(source, "lambda: None") == 2
    error = capsys.readouterr().err
    assert said in error and f"{own.config}:{own.line(line)}" in error


def test_interrupt_in_a_model_is_an_interrupt(tmp_path, capsys):
    for model in ("lambda: stop()", "lambda: (lambda p, x: stop(), {})"):
        assert Own(tmp_path).convert("def stop():\n    raise KeyboardInterrupt\n", model) == 130
        assert "the same command continues" in capsys.readouterr().err


def test_debug_shows_the_users_own_traceback(tmp_path):
    own = Own(tmp_path)
    own.convert(SOURCE, "raises")
    with pytest.raises(Exception, match="FileNotFoundError") as caught:
        main(["vit_convert", f"--config={own.config}", f"--workdir={tmp_path / 'out'}", "--debug"])
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint", "B_32.npz"),
        ("variant", "B/32"),
        ("family", "vit"),
        ("posemb_grid", "(7,9)"),
        ("num_classes", "10"),
    ],
)
def test_what_says_something_of_a_checkpoint_is_not_ignored(tmp_path, capsys, key, value):
    assert Own(tmp_path).convert(SOURCE, "lambda: (f, {'w': W})", f"--config.{key}={value}") == 2
    error = capsys.readouterr().err
    assert f"config.{key}=" in error and ("config.model and" in error or "has shape (1, 5)" in error)


def test_the_right_number_of_classes(tmp_path):
    assert Own(tmp_path).convert(SOURCE, "lambda: (f, {'w': W})", "--config.num_classes=5", "--until=checkpoint") == 0


def test_a_model_from_the_command_line(tmp_path, capsys):
    own = Own(tmp_path)
    assert own.convert(SOURCE, "lambda: (f, {'w': W})", "--config.model=f") == 2
    assert "config.model" in capsys.readouterr().err
