"""What a model's parameters, inputs and outputs are called is said in families/ alone: no other room would work for
another family."""

import ast
import pathlib
import re

import pytest

import vit_convert

PACKAGE = pathlib.Path(vit_convert.__file__).parent
# Of ViT's parameters anywhere; of inputs, outputs and parts of a model as whole words in a text.
NAMES = re.compile(
    r"encoderblock|pos_embedding|posembed|^images$|^logits$|^features$|^cls$|^head$|^(cls|head)/|MlpBlock|DotProduct"
)
# What people write in a config; what bundles and reports have under these names, which are no tensors; folders of
# images.
ALLOWED = {
    "config.py": {"features"},
    "core/config.py": {"logits", "features"},
    "core/defaults.py": {"logits"},
    "core/earlier.py": {"images", "logits"},  # what bundles of earlier versions have
    "core/layer_names.py": {
        "Give a block (block_03), a layer (block_03/fc2), a scope or an fnmatch pattern (*/MlpBlock_0/*)."
    },
    "export/passes/fused_encoder.py": {"head"},  # the size of an attention head
    "export/passes/window_kernels.py": {"head"},
    "images/arrays.py": {"images"},  # the member of an .npz of images
    "quantize/precision_plan.py": {"images"},  # of the record: how many, and from where
    "quantize/sensitivity.py": {"images"},
    "serve/triton/models/similarity.py": {"logits"},  # its own output
    "serve/triton/pairs.py": {"images"},  # a size of one, as "batch" is elsewhere
    "stages/images.py": {"images"},  # the stage of that name
    "stages/common.py": {"images"},
    "stages/calibrate.py": {"images"},  # a word in a message
    "stages/pair.py": {"images"},
    "stages/plan.py": {"images"},
    "stages/reference.py": {"images"},
}


def strings(source: str) -> list[tuple[int, str]]:
    """The texts of a module that are no docstrings, with their lines; of a formatted one its constant parts."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = (node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body)
    docstrings = {id(statement.value) for statement in first if isinstance(statement, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [(node.lineno, node.value) for node in constants if id(node) not in docstrings]


def test_no_other_room_names_them():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith("families/"):
            allowed = ALLOWED.get(place, set())
            found += [
                f"{place}:{line}: {text!r}"
                for line, text in strings(path.read_text())
                if NAMES.search(text) and text not in allowed
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("feed = {'images': x}", "images"),
        ('name = f"Transformer/encoderblock_{i}/"', "Transformer/encoderblock_"),
        ("def f():\n    '''Docs.'''\n    return 'head/kernel'", "head/kernel"),
    ],
)
def test_it_would_be_seen(source, text):
    assert text in [found for _, found in strings(source)] and NAMES.search(text)


def test_docstrings_may_name_them():
    assert strings('"""Of images."""\n\ndef f():\n    """A head/kernel."""\n    return 1') == []
