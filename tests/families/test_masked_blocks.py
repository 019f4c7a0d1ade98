"""What blocks read beside their stream, a mask, is of no block: each has the nodes that it has, and no others."""

import collections
import re

import onnx_ir as ir
import pytest

from vit_convert.export.exporter import export_model
from vit_convert.export.targets import target_named
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint

CASES = [
    ("SigLIP2-mu/16-naflex", "img", 1, 30),  # 83, and refused, with what makes the mask and the position table
    ("SigLIP2-mu/16-naflex", "img", 3, 30),
    ("LiT-mu", "txt", 1, 31),  # one more takes the pooled token
    ("CLIP-mu/16", "txt", 2, 32),
]


@pytest.mark.parametrize(("variant", "part", "depth", "nodes"), CASES)
def test_a_mask_is_in_no_block(tmp_path, variant, part, depth, nodes):
    path = tmp_path / ("a.safetensors" if variant.startswith("CLIP") else "a.npz")
    write_random_checkpoint(path, variant, depth=depth)
    found = load_checkpoint(f"{path}:{part}")
    export_model(found.family.model(found), tmp_path / "model.onnx", target=target_named("rtx"))
    graph = ir.load(tmp_path / "model.onnx").graph
    named = (re.match(r"Transformer/encoderblock_\d+/", node.name) for node in graph)
    counts = collections.Counter(match[0] for match in named if match)
    assert counts == {f"Transformer/encoderblock_{i}/": nodes for i in range(depth)}
    makers = {"Equal", "Greater", "Cast", "Where"}  # of masks
    assert not [node.name for node in graph if node.op_type in makers and node.name.startswith("Transformer/")]
