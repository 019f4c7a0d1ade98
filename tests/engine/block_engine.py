"""What the tests of sessions share: profiles, inputs and onnxruntime's outputs of the graph of one block, see
`engine_graphs.block`."""

import numpy as np
import onnxruntime
from engine_graphs import TOKENS, WIDTH

RANGE = ((2, TOKENS, WIDTH), (4, TOKENS, WIDTH), (6, TOKENS, WIDTH))
FIXED = ((4, TOKENS, WIDTH),) * 3


def images(batch, seed=0):
    """Seeded inputs [batch, TOKENS, WIDTH]."""
    return np.random.default_rng(seed).normal(size=(batch, TOKENS, WIDTH)).astype(np.float32)


def expected(folder, batch):
    """What onnxruntime computes with the graph in a folder."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"images": batch})[0]
