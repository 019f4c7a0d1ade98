"""Each room imports what it may and nothing else, so that a GPU host needs no JAX and an export host no TensorRT."""

import pathlib
import re
import subprocess
import sys

import pytest

import vit_convert

PACKAGE = pathlib.Path(vit_convert.__file__).parent
BASE = {"numpy", "absl", "ml_collections", "yaml"}  # PyYAML is what ml_collections itself needs
# fmt: off
ONNX = {
    "onnx", "onnx_ir", "onnxruntime", "onnxscript", "google", "ml_dtypes", "typing_extensions", "sympy", "mpmath",
    "packaging", "rich",
}
ROOMS = (
    "core", "checks", "images", "text", "checkpoint", "families", "export", "quantize", "engine", "serve", "report",
    "stages", "batch",
)
# fmt: on

# room: third-party packages at hand, other rooms that it may import
WALLS = {
    "": (BASE, ("core", "report", "stages")),
    "core": (BASE, ()),
    "images": (BASE, ("core",)),
    "text": (BASE, ("core",)),
    "checkpoint": (BASE | {"ml_dtypes", "safetensors"}, ("core",)),
    "families": (BASE | {"ml_dtypes", "safetensors"}, ("core", "checkpoint", "images")),
    "checks": (BASE | ONNX, ("core",)),
    "quantize": (BASE | ONNX, ("core", "checks", "images")),
    "engine": (BASE, ("core", "images", "report")),
    "serve": (BASE, ("core", "engine", "images", "text", "report")),
    "report": (BASE, ("core",)),
    "stages": (BASE, ("core",)),
    "batch": (BASE | {"ml_dtypes", "safetensors"}, ("core", "checkpoint", "stages", "report")),
}

# What builds a model; whatever loads or writes a checkpoint does without JAX.
NEEDS_JAX = re.compile(r"vit_convert\.families\.(\w+\.(model|module)|user\.\w+|run|backend)")

IMPORT_BEHIND_A_WALL = """
import importlib, sys

allowed, rooms, modules = set({allowed!r}), {rooms!r}, {modules!r}

class Wall:
    def find_spec(self, name, path=None, target=None):
        parts = name.split(".")
        ours = parts[0] == "vit_convert" and (len(parts) == 1 or parts[1] not in rooms)
        if not (ours or parts[0] in allowed or parts[0] in sys.stdlib_module_names):
            raise ModuleNotFoundError(f"behind the wall: {{name}}", name=name)

sys.meta_path.insert(0, Wall())
for module in modules:
    importlib.import_module(module)
"""


def modules_of(room: str) -> list[str]:
    folder = PACKAGE / room
    paths = folder.glob("*.py") if room == "" else folder.rglob("*.py")
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in sorted(paths)]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("room", WALLS)
def test_room_imports_alone(room):
    allowed, neighbours = WALLS[room]
    blocked = [other for other in ROOMS if other != room and other not in neighbours]
    modules = [name for name in modules_of(room) if not NEEDS_JAX.fullmatch(name)]
    assert modules
    code = IMPORT_BEHIND_A_WALL.format(allowed=sorted(allowed), rooms=blocked, modules=modules)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_wall_stands():
    code = IMPORT_BEHIND_A_WALL.format(allowed=["numpy"], rooms=[], modules=["jax"])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "behind the wall: jax" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--config=no_such_config.py"], 2),
        (["--config=vit_b32.py", "--config.precison=int8"], 2),
        ([], 2),
    ],
    ids=["help", "unknown config", "unknown key", "nothing"],
)
def test_answers_at_once(arguments, code):
    run = (
        "import sys; from vit_convert.__main__ import main; code = main(['vit_convert', *sys.argv[1:]]); print([name "
        "for name in ('jax', 'flax', 'onnx', 'onnxruntime', 'onnx_ir', 'tensorrt', 'tensorrt_rtx') if name in "
        "sys.modules]); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", run, *arguments], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert result.returncode == code
    assert result.stdout.splitlines()[-1] == "[]"  # each of them takes seconds to import


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, and refuses the second as soon as both are collected together."""
    names = [path.name for path in pathlib.Path(__file__).parents[1].rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
