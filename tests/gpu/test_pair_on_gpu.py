"""Real TensorRT on a real GPU: a pair of towers exported elsewhere is built and verified, one by one and together.

    VIT_CONVERT_PAIR=path/of/a/pair python -m pytest -m gpu tests/gpu/test_pair_on_gpu.py

Needs what tests/gpu/test_build_on_gpu.py needs. The pair's target has to be this TensorRT's, with precisions fp32 and
fp16; with evaluation images and prompts the order of the prompts is judged too.
"""

import os
import pathlib
import shutil

import numpy as np
import pytest

import vit_convert
from vit_convert.core.bundle import read_json
from vit_convert.engine import __main__ as command
from vit_convert.engine.backend import cuda
from vit_convert.engine.handoff import read_facts
from vit_convert.engine.pair_bundle import jax_embeddings, open_pair, samples_of

pytestmark = pytest.mark.gpu

if cuda.gpu() is None:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
GIVEN = os.environ.get("VIT_CONVERT_PAIR", "")
if not GIVEN:
    pytest.skip("VIT_CONVERT_PAIR names no pair", allow_module_level=True)
pytest.importorskip("tensorrt")
WORDS = ("--backend=tensorrt", "--precision=fp32,fp16", "--config.batch.opt=4", "--config.batch.max=16")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = pathlib.Path(shutil.copytree(GIVEN, tmp_path_factory.mktemp("gpu") / "pair"))
    assert command.main(["engine", "build", str(root), *WORDS]) == 0
    return root


def test_engines_give_the_similarities_of_jax(built, record_property):
    assert command.main(["engine", "verify", str(built), *WORDS]) == 0
    found = read_json(built / "report.json")["engines"]
    assert all(found[precision]["passed"] for precision in ("fp32", "fp16"))
    record_property("pair", found)


def test_a_session_runs_on_them(built):
    assert command.main(["engine", "verify", str(built), *WORDS]) == 0
    _, bundles = open_pair(built)
    with vit_convert.Session(built, backend="tensorrt") as session:
        assert session.runs_on == {"image": "tensorrt", "text": "tensorrt"}, session.reason
        for tower, bundle in bundles.items():
            facts = read_facts(bundle)
            feeds = next(samples_of(bundle, facts))
            expected = jax_embeddings(bundle, facts)[: len(next(iter(feeds.values())))]
            given = (session.image if tower == "image" else session.text)(next(iter(feeds.values())))
            cosines = (given * expected).sum(-1) / np.linalg.norm(given, axis=-1) / np.linalg.norm(expected, axis=-1)
            assert cosines.min() > 0.999  # check.fp16_cosine: the fp16 engine is preferred
