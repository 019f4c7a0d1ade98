"""From a function to the graph of a target, on two blocks of a few operators: depth, taps, changes, and what is told of
it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import run

from vit_convert.core.signature import Tensor
from vit_convert.core.stack import Stack
from vit_convert.export import weights
from vit_convert.export.lower import Graph, onnx_from_apply
from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.targets import TARGETS

WIDTH, TOKENS = 3, 4
INPUTS = (Tensor("images", "float32", ("batch", 2, 2, 3), "NHWC"),)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 2, 2, 3)).astype(np.float32)


def params(depth: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {f"Transformer/encoderblock_{i}/kernel": (WIDTH, WIDTH) for i in range(depth)} | {
        "head/kernel": (WIDTH, 5)
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def apply(leaves, images):
    """Two blocks, whatever the model's depth."""
    x = images.reshape(images.shape[0], TOKENS, WIDTH)
    taps = {}
    for i in range(2):
        x = taps[f"block_0{i}"] = x + jnp.tanh(x @ leaves[f"Transformer/encoderblock_{i}/kernel"])
    normed = taps["encoder_norm"] = x * 2
    return {"logits": normed[:, 1] @ leaves["head/kernel"], "aside": jnp.sin(x), **taps}


def by_hand(leaves: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    x, taps = IMAGES.reshape(2, TOKENS, WIDTH).astype(np.float64), {}
    for i in range(depth):
        x = taps[f"block_{i:02d}"] = x + np.tanh(x @ leaves[f"Transformer/encoderblock_{i}/kernel"])
    return {"logits": 2 * x[:, 1] @ leaves["head/kernel"], "aside": np.sin(x), **taps, "encoder_norm": 2 * x}


TAPS = ["block_00", "block_01", "encoder_norm"]


def stacks(depth: int) -> tuple[Stack, ...]:
    return (Stack("Transformer/encoderblock_{}/", depth),)


def lowered(target: str = "rtx", taps=TAPS, depth=2, **options) -> Graph:
    shapes = {name: value.shape for name, value in params(2).items()}
    return onnx_from_apply(apply, shapes, INPUTS, ["logits"], taps, TARGETS[target], stacks=stacks(depth), **options)


def values(graph: Graph, depth: int) -> dict[str, np.ndarray]:
    weights.bind(graph.model, params(depth))
    results = run(graph.model, {"images": IMAGES})
    return {value.name: result for value, result in zip(graph.model.graph.outputs, results, strict=True)}


@pytest.mark.parametrize(("depth", "blocks"), [(2, 2), (4, 4)])
@pytest.mark.parametrize("prune", [True, False])
def test_depth(depth, blocks, prune):
    graph = lowered(depth=depth, prune=prune)
    assert graph.taps == [*(f"block_{i:02d}" for i in range(blocks)), "encoder_norm"]
    expected = by_hand(params(blocks), blocks)
    results = values(graph, blocks)
    assert list(results) == ["logits"]
    np.testing.assert_allclose(results["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    tokens = {
        value.name: value.shape[1] for node in graph.model.graph for value in node.outputs if value.name in graph.taps
    }
    # nothing mixes tokens here
    assert tokens[f"block_{blocks - 2:02d}"] == tokens[f"block_{blocks - 1:02d}"] == (1 if prune else TOKENS)
    assert ({rule.rule: rule.applied for rule in graph.rules}["prune_tokens"] > 0) is prune


def test_nodes_have_their_names():
    names = [node.name for node in lowered(depth=3, prune=False).model.graph]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.endswith("Tanh")] == [f"Transformer/encoderblock_{i}/Tanh" for i in range(3)]


def test_taps_are_inner_values_unless_they_are_kept():
    """Kept ones are outputs also where the model's output does not depend on them."""
    graph = lowered(taps=[*TAPS, "aside"])
    assert [value.name for value in graph.model.graph.outputs] == ["logits"] and "aside" not in graph.taps
    assert "Sin" not in [node.op_type for node in graph.model.graph]
    kept = lowered(taps=[*TAPS, "aside"], keep_taps=True, prune=False)
    assert kept.taps == [*TAPS, "aside"]
    results, expected = values(kept, 2), by_hand(params(2), 2)
    assert list(results) == ["logits", *TAPS, "aside"]
    for name, result in results.items():
        np.testing.assert_allclose(result, expected[name], rtol=1e-5, atol=1e-5)


def test_a_tap_that_a_substitution_swallowed_is_none():
    """The mean inside a LayerNorm is gone once that is one node."""

    def normed(leaves, images):
        x = images.reshape(images.shape[0], TOKENS, WIDTH)
        mean = x.mean(-1, keepdims=True)
        y = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
        return {"logits": y[:, 1] @ leaves["head/kernel"], "mean": mean, "normed": y}

    graph = onnx_from_apply(
        normed, {"head/kernel": (3, 5)}, INPUTS, ["logits"], ["mean", "normed"], TARGETS["rtx"], prune=False
    )
    assert graph.taps == ["normed"]


def test_changes_come_in_order_before_the_names():
    seen = []

    def note(name):
        return lambda model: seen.append(
            (name, [node.name for node in model.graph], [value.name for value in model.graph.outputs])
        )

    passes = {name: (GraphPass(counting(name, seen, count)),) for name, count in (("finish", 3), ("last", 4))}
    last = dataclasses.replace(TARGETS["rtx"], **passes)
    shapes = {name: value.shape for name, value in params(2).items()}
    graph = onnx_from_apply(
        apply, shapes, INPUTS, ["logits"], TAPS, last, stacks=stacks(2), changes=[note("a"), note("b")]
    )
    assert [name for name, *_ in seen] == ["a", "b", "finish", "last"]
    assert all(outputs == ["logits"] for _, _, outputs in seen)
    named = [any(str(name).startswith("Transformer/encoderblock_0/") for name in names) for _, names, _ in seen]
    assert named == [False, False, False, True]
    counts = [(rule.rule, rule.applied) for rule in graph.rules]
    assert [name for name, _ in counts[:-3]] == [rule.__name__ for rule in TARGETS["rtx"].rules]
    assert [name for name, _ in counts[-3:]] == ["prune_tokens", "finish", "last"] and [
        count for _, count in counts[-2:]
    ] == [3, 4]


def counting(name, seen, count):
    def change(model: ir.Model) -> int:
        seen.append((name, [node.name for node in model.graph], [value.name for value in model.graph.outputs]))
        return count

    change.__name__ = name
    return change


def test_what_the_file_says_of_itself():
    model = lowered("trt8").model
    assert (model.producer_name, model.doc_string, model.graph.name) == ("vit_convert", "", "vit")
    assert model.metadata_props["vit_convert.target"] == "trt8" and model.opset_imports == {"": 17}


def test_what_was_traced_is_more():
    graph = lowered()
    assert graph.nodes_traced > len(list(graph.model.graph)) > 0
    assert graph.nodes_traced == lowered(depth=5).nodes_traced  # of two blocks


def test_what_taps_alone_read_does_not_keep_the_token_from_being_chosen():
    graph = lowered(taps=[*TAPS, "aside"])
    tokens = {
        value.name: value.shape[1] for node in graph.model.graph for value in node.outputs if value.name in graph.taps
    }
    assert set(tokens.values()) == {1}


def spelt(body, shapes, target="rtx"):
    """The operators of a function of tokens, without what takes a token and the head."""

    def function(leaves, images):
        return {"logits": body(leaves, images.reshape(images.shape[0], TOKENS, WIDTH))}

    graph = onnx_from_apply(function, shapes, INPUTS, ["logits"], [], TARGETS[target], prune=False)
    return [node.op_type for node in graph.model.graph if node.op_type != "Reshape"], graph


def normalized(x):
    """Written without a name for what is used twice."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
        ((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-6
    )


def test_what_is_computed_twice_matches_too():
    assert spelt(lambda leaves, x: normalized(x), {})[0] == ["LayerNormalization"]
    root = np.float32(np.sqrt(2))
    assert spelt(lambda leaves, x: 0.5 * (x + x) * (1 + jax.lax.erf((x + x) / root)), {})[0] == ["Add", "Gelu"]


def unread(model: ir.Model) -> list[str]:
    """The operators whose results nobody reads."""
    return [
        node.op_type
        for node in model.graph
        if not any(value.uses() or value.is_graph_output() for value in node.outputs)
    ]


def test_what_a_change_leaves_unread_goes_away():
    """Before the next one looks at the graph, and before it is written."""
    seen = []

    def leave(model: ir.Model) -> int:
        seen.append(unread(model))
        model.graph.insert_before(model.graph[0], ir.node("Neg", [model.graph.inputs[0]]))
        return 0

    target = dataclasses.replace(TARGETS["rtx"], finish=(GraphPass(leave),), last=(GraphPass(leave),))
    shapes = {name: value.shape for name, value in params(2).items()}
    graph = onnx_from_apply(
        apply, shapes, INPUTS, ["logits"], TAPS, target, changes=[lambda model: seen.append(unread(model))]
    )
    assert seen == [[], [], []] and unread(graph.model) == []


def test_a_weight_that_is_reshaped_or_turned_matches_too():
    """Before the rules, which look for weights, and behind them, which leave such nodes."""
    operators, graph = spelt(lambda leaves, x: normalized(x) * leaves["a/scale"].reshape(3), {"a/scale": (3, 1)})
    assert operators == ["LayerNormalization"] and list(graph.model.graph.initializers["a/scale"].shape) == [3]
    operators, graph = spelt(lambda leaves, x: jnp.einsum("bsd,kd->bsk", x, leaves["a/kernel"]), {"a/kernel": (5, 3)})
    assert operators == ["MatMul"] and list(graph.model.graph.initializers["a/kernel"].shape) == [3, 5]


def test_a_norm_without_scale_and_bias_has_constants():
    """jax2onnx spells its ones and zeros as ConstantOfShape; folded, they are a LayerNormalization's."""
    from flax import linen

    def norm(leaves, images):
        x = images.reshape(images.shape[0], TOKENS, WIDTH)
        return {"logits": linen.LayerNorm(use_scale=False, use_bias=False).apply({}, x)[:, 0] @ leaves["head/kernel"]}

    graph = onnx_from_apply(norm, {"head/kernel": (3, 5)}, INPUTS, ["logits"], [], TARGETS["rtx"], prune=False)
    operators = [node.op_type for node in graph.model.graph]
    assert "LayerNormalization" in operators and "ConstantOfShape" not in operators
