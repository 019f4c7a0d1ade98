"""Graphs as text, rules applied to them, and both versions run by onnxruntime."""

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from vit_convert.export.passes.cleanup import clean
from vit_convert.export.rules.rule import Rule, RuleCount, apply_rule
from vit_convert.export.weights import bind, describe
from vit_convert.families.vit.architecture import Architecture

# Each rule moves a few float32 roundings (2^-24 = 6e-8 each) of values of order 1; a wrong constant or axis is off by
# 1e-3 and more.
FLOAT32 = 3e-6


def graph(text: str, opset: int = 20) -> ir.Model:
    """A model from the text of its graph, shapes inferred."""
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    clean(model)
    return model


def ops(model: ir.Model) -> list[str]:
    """Operator types in the graph's order."""
    return [node.op_type for node in model.graph]


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Runs a model with every onnxruntime rewrite switched off, so that the graph is computed as it stands."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def random_feeds(model: ir.Model, batch: int = 3) -> dict[str, np.ndarray]:
    """Seeded normal inputs of the model's shapes; a dynamic axis gets `batch`."""
    rng = np.random.default_rng(0)
    return {
        value.name: rng.standard_normal([dim if isinstance(dim, int) else batch for dim in value.shape]).astype(
            np.float32
        )
        + 0.5
        for value in model.graph.inputs
    }


def rewrite(text: str, rule: Rule, opset: int = 20, *, tolerance: float = FLOAT32) -> tuple[ir.Model, RuleCount]:
    """Applies a rule and holds the result against the graph before it, numerically.

    Returns:
        The rewritten model and what the rule says it did.
    """
    model = graph(text, opset)
    feeds = random_feeds(model)
    before = run(model, feeds)
    count = apply_rule(rule, model)
    for expected, got in zip(before, run(model, feeds), strict=True):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    return model, count


def declined(text: str, rule: Rule, opset: int = 20) -> str:
    """The reason for which a rule leaves the only place of a graph alone; "" where its pattern does not match at
    all."""
    model = graph(text, opset)
    before = ops(model)
    count = apply_rule(rule, model)
    assert count.applied == 0
    assert ops(model) == before
    return "; ".join(count.declined)


def described(text: str, *weights: str, names: dict[str, str] | None = None, opset: int = 20) -> ir.Model:
    """A graph whose inputs of these names are weights without a value, as after a trace."""
    model = graph(text, opset)
    for name in weights:
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.name = (names or {}).get(name, name)
        model.graph.initializers.add(value)
    describe(model)
    return model


def computed(model: ir.Model, params: dict[str, np.ndarray], *feeds: np.ndarray) -> list[np.ndarray]:
    """The outputs of such a graph with these parameters."""
    bind(model, params)
    return run(model, {value.name: feed for value, feed in zip(model.graph.inputs, feeds, strict=True)})


def architecture(**changes: object) -> Architecture:
    """A ViT of width 32 with two heads, patches of 16 on 48x64 pixels and 7 classes; three blocks unless said
    otherwise."""
    base = Architecture(
        family="vit",
        variant="custom",
        width=32,
        depth=3,
        mlp_dim=64,
        num_heads=2,
        patch_size=16,
        image_size=(48, 64),
        num_classes=7,
        pool="tok",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def random_params(arch: Architecture) -> dict[str, np.ndarray]:
    """Seeded parameters whose every part shows in the logits: kernels keep the variance, scales are near 1, biases are
    not 0."""
    from vit_convert.families.vit.module import param_shapes

    rng = np.random.default_rng(1)
    params = {}
    for name, shape in param_shapes(arch).items():
        normal = rng.standard_normal(shape).astype(np.float32)
        fan_in = int(np.prod(shape[:-1])) if "out" in name or len(shape) < 3 else shape[0]
        params[name] = (
            1 + 0.1 * normal
            if name.endswith("scale")
            else normal / np.float32(np.sqrt(fan_in))
            if "kernel" in name
            else 0.1 * normal
        )
    return params


def random_images(arch: Architecture, count: int = 5) -> np.ndarray:
    """Seeded images in [-1, 1]: float32 [count, height, width, 3]."""
    return np.random.default_rng(2).uniform(-1, 1, (count, *arch.image_size, 3)).astype(np.float32)
