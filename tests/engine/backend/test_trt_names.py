"""Every TensorRT name that engine/ uses is held against the names of TensorRT 8.6, 10, 11 and TensorRT-RTX."""

import ast
import json
import pathlib

import pytest

import vit_convert.engine
from vit_convert.engine.backend.trt import OPTIONAL, load_backend

NAMES_FOLDER = pathlib.Path(__file__).parent / "trt_names"
# The convention that makes this test possible: in engine/, these variables hold these TensorRT objects and nothing
# else.
HOLDERS = {
    "builder": "Builder",
    "builder_config": "IBuilderConfig",
    "cuda_engine": "ICudaEngine",
    "execution_context": "IExecutionContext",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "tensor": "ITensor",
    "timing_cache": "ITimingCache",
}
MODULES = ("trt", "module", "backend.module", "self.module")


def names_of(backend: str) -> dict[str, set[str]]:
    listed = json.loads((NAMES_FOLDER / f"{backend}.json").read_text())["names"]
    return {cls: set(members.split()) for cls, members in listed.items()}


NAMES = {backend: names_of(backend) for backend in ("8.6", "10", "11", "rtx")}


def uses(source: str) -> set[str]:
    """The TensorRT names in a source: "BuilderFlag", "BuilderFlag.TF32", "IBuilderConfig.set_flag"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(".find")
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        holder = ast.unparse(node.value)
        root, _, member = holder.rpartition(".")
        if holder in MODULES:
            found.add(node.attr)
        elif root in MODULES:
            found.add(f"{member}.{node.attr}")
        elif holder in HOLDERS:
            found.add(f"{HOLDERS[holder]}.{node.attr}")
    return found


SOURCES = sorted(pathlib.Path(vit_convert.engine.__path__[0]).rglob("*.py"))
USES = set().union(*(uses(path.read_text()) for path in SOURCES))


def has(backend: str, name: str) -> bool:
    cls, _, member = name.partition(".")
    return cls in NAMES[backend] and (not member or member in NAMES[backend][cls])


@pytest.mark.parametrize("name", sorted(USES))
def test_name_is_in_every_backend_or_declared_optional(name):
    having = tuple(backend for backend in NAMES if has(backend, name))
    assert having == OPTIONAL.get(name, tuple(NAMES))


def test_nothing_is_declared_that_is_not_used():
    assert set(OPTIONAL) <= USES


def test_every_holder_is_seen():
    # A renamed variable would leave the test above with nothing to check.
    classes = {name.partition(".")[0] for name in USES}
    assert set(HOLDERS.values()) <= classes


def test_names_are_looked_up_in_one_place():
    # `getattr(trt, ...)` elsewhere would escape the check; the one in Backend.find takes declared names alone.
    lookups = [
        path.name for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if _is_module_getattr(node)
    ]
    assert lookups == ["trt.py"]


def _is_module_getattr(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"):
        return False
    first = ast.unparse(node.args[0])
    return (
        (first == "value" and ast.unparse(node.args[1]) == "part") or first.split(".")[0] in MODULES or first in HOLDERS
    )


def test_uses_finds_each_kind_of_use():
    source = (
        "trt.BuilderFlag.TF32\nbackend.module.Builder\nbuilder_config.set_flag(1)\n"
        "backend.find('IProgressMonitor')\ntrt.__version__"
    )
    assert uses(source) == {"BuilderFlag", "BuilderFlag.TF32", "Builder", "IBuilderConfig.set_flag", "IProgressMonitor"}


def test_rtx_list_agrees_with_the_installed_module():
    pytest.importorskip("tensorrt_rtx")
    module = load_backend("rtx").module
    for name in USES:
        cls, _, member = name.partition(".")
        there = hasattr(module, cls) and (not member or hasattr(getattr(module, cls), member))
        assert there == has("rtx", name), name


def test_undeclared_lookup_is_a_programming_error():
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(KeyError, match=r"BuilderFlag\.TF33"):
        load_backend("rtx").find("BuilderFlag.TF33")
