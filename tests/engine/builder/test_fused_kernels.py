"""Each profile's kernels, and why those of another are not known."""

import contextlib
import types

import pytest

from vit_convert.core.errors import BuildError
from vit_convert.engine.builder import fused_kernels
from vit_convert.engine.builder.fused_kernels import fused_attention_by_kernels


@pytest.fixture
def profiles(monkeypatch):
    """What is told of profiles, each by the names of its kernels, an error, or why there is no graph."""

    def tell(*each, precision="fp16"):
        def names_of(found):
            if isinstance(found, BuildError):
                raise found
            return list(found)

        def prepare(shape):
            found = each[shape[0] - 1]
            graph = None if isinstance(found, str) else types.SimpleNamespace(kernel_names=lambda: names_of(found))
            return types.SimpleNamespace(graph=graph, why_no_graph=found)

        session = contextlib.nullcontext(types.SimpleNamespace(prepare=prepare))
        monkeypatch.setattr(fused_kernels, "Session", lambda engine: session)
        ranges = [types.SimpleNamespace(optimal=(batch, 3)) for batch, _ in enumerate(each, 1)]
        record = types.SimpleNamespace(precision=precision, attentions=2)
        return fused_attention_by_kernels(types.SimpleNamespace(ranges=ranges, record=record))

    return tell


def test_one_that_is_not_known_hides_no_other(profiles):
    names = ("fmha_v2", "fmha_v2", "gemm")
    found = profiles(BuildError("an old driver"), names, "CUDA graphs are off", names[:1])
    assert [(row.batch, row.kernels, row.count, row.unknown) for row in found] == [
        (1, None, None, "an old driver"),
        (2, 3, 2, None),
        (3, None, None, "CUDA graphs are off"),
        (4, 1, 1, None),
    ]
    assert [row.text for row in found if row.text] == ["yes, fp16, 2 of 2", "in part, fp16, 1 of 2"]
    assert [(kind.kind, kind.count) for kind in found[1].kinds] == [("fused attention", 2), ("product", 1)]


@pytest.mark.parametrize(
    ("precision", "said"), [("fp16", {"fp16": 1}), ("int8", {"unknown": 1}), ("fp32", {"unknown": 1})]
)
def test_a_type_that_a_name_does_not_tell(profiles, precision, said):
    """TensorRT fuses attention in FP16 and lower only, so that an FP16 engine's has but one."""
    (found,) = profiles(["fmha_v2"], precision=precision)
    assert found.precisions == said
