"""An encoder block as a graph of a few nodes, its weights described, and what NumPy makes of it in float64."""

import math

import numpy as np
import onnx_ir as ir
from export_graphs import described

TOKENS, WIDTH, HIDDEN, HEADS = 5, 128, 32, 2  # heads of 64, for which the kernels are
EPSILON = 0.1  # large enough to show
MLP = {
    "gamma": (WIDTH,),
    "beta": (WIDTH,),
    "fc1": (WIDTH, HIDDEN),
    "b1": (HIDDEN,),
    "fc2": (HIDDEN, WIDTH),
    "b2": (WIDTH,),
}
PROJECTIONS = ("query", "key", "value", "out")
ATTENTION = {
    "scale": (WIDTH,),
    "shift": (WIDTH,),
    **dict.fromkeys(PROJECTIONS, (WIDTH, WIDTH)),
    **{f"{part}_bias": (WIDTH,) for part in PROJECTIONS},
}
_SCOPES = {
    "gamma": "norm2/scale",
    "beta": "norm2/bias",
    "fc1": "fc1/kernel",
    "b1": "fc1/bias",
    "fc2": "fc2/kernel",
    "b2": "fc2/bias",
}
_SCOPES |= {"scale": "norm1/scale", "shift": "norm1/bias"}
_SCOPES |= {part: f"attention/{part}/kernel" for part in PROJECTIONS} | {
    f"{part}_bias": f"attention/{part}/bias" for part in PROJECTIONS
}
NAMES = {word: f"Transformer/encoderblock_0/{scope}" for word, scope in _SCOPES.items()}

MLP_TEXT = f"""
    n = LayerNormalization <axis = -1, epsilon = {EPSILON}> (z, gamma, beta)
    p1 = MatMul (n, fc1) s1 = Add (p1, b1) a = Relu (s1) p2 = MatMul (a, fc2) s2 = Add (p2, b2) y = Add (s2, z)"""
ATTENTION_TEXT = f"""
    m = LayerNormalization <axis = -1, epsilon = {EPSILON}> (x, scale, shift)
    pq = MatMul (m, query) sq = Add (pq, query_bias) rq = Reshape (sq, split) tq = Transpose <perm = [0, 2, 1, 3]> (rq)
    pk = MatMul (m, key) sk = Add (pk, key_bias) rk = Reshape (sk, split) tk = Transpose <perm = [0, 2, 3, 1]> (rk)
    pv = MatMul (m, value) sv = Add (pv, value_bias) rv = Reshape (sv, split) tv = Transpose <perm = [0, 2, 1, 3]> (rv)
    scores = MatMul (tq, tk) w = Softmax <axis = -1> (scores) o = MatMul (w, tv)
    to = Transpose <perm = [0, 2, 1, 3]> (o) ro = Reshape (to, merge) po = MatMul (ro, out) so = Add (po, out_bias)
    z = Add (so, x)"""


def text(
    body: str, shapes: dict[str, tuple[int, ...]], source: str = "z", outputs: str = f"float[n, {TOKENS}, {WIDTH}] y"
) -> str:
    """A graph of `source` [n, tokens, width] and weights of these shapes, which are its inputs."""
    weights = ", ".join(f"float{list(shape)} {name}" for name, shape in shapes.items())
    constants = (
        f"<int64[4] split = {{0, {TOKENS}, {HEADS}, {WIDTH // HEADS}}}, int64[3] merge = {{0, {TOKENS}, "
        f"{WIDTH}}}, float half = {{0.5}}>"
    )
    return f"g (float[n, {TOKENS}, {WIDTH}] {source}, {weights}) => ({outputs}) {constants} {{ {body} }}"


def block(*, attention: bool = True, edit: tuple[str, str] = ("", ""), **options: str) -> ir.Model:
    """A block, or its second half; `edit` replaces a part of its text by another."""
    shapes = {**(ATTENTION if attention else {}), **MLP}
    written = text((ATTENTION_TEXT if attention else "") + MLP_TEXT, shapes, "x" if attention else "z", **options)
    assert edit[0] in written
    return described(written.replace(*edit), *shapes, names=NAMES, opset=17)


def random_block(**more: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Parameters under the names that the checkpoint has for them: products keep the variance, scales are near 1."""
    rng = np.random.default_rng(4)
    return {
        NAMES.get(name, name): (
            rng.standard_normal(shape) / math.sqrt(shape[0] if len(shape) == 2 else 9) + (name in ("scale", "gamma"))
        ).astype(np.float32)
        for name, shape in {**ATTENTION, **MLP, **more}.items()
    }


def images(count: int = 3) -> np.ndarray:
    """Seeded input of a block."""
    return np.random.default_rng(5).standard_normal((count, TOKENS, WIDTH)).astype(np.float32)


def norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """LayerNorm over the last axis, in float64."""
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + shift


def by_hand(params: dict[str, np.ndarray], x: np.ndarray, *, attention: bool = True) -> np.ndarray:
    """The block in float64."""
    p = {word: params[name].astype(np.float64) for word, name in NAMES.items()}
    if attention:
        y = norm(x, p["scale"], p["shift"])
        q, k, v = ((y @ p[part] + p[f"{part}_bias"]).reshape(len(x), TOKENS, HEADS, -1) for part in PROJECTIONS[:3])
        scores = np.einsum("bqhd,bkhd->bhqk", q, k)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(x), TOKENS, WIDTH) @ p["out"] + p["out_bias"]
    y = np.maximum(norm(x, p["gamma"], p["beta"]) @ p["fc1"] + p["b1"], 0)
    return x + y @ p["fc2"] + p["b2"]
