"""bf16 from the command line: written, checked where no processor computes in it, and nothing left over."""

import pytest


@pytest.mark.parametrize("precision", ["bf16", "fp32,bf16,fp16"])
def test_bf16_is_checked(convert, precision):
    assert convert(f"--config.precision={precision}") == 0
    check = convert.report()["checks"]["bf16"]
    assert check["passed"] and 0.999 < check["cosine"] < 0.9999999  # float32 has more nines
    assert {path.name for path in convert.bundle.iterdir() if "bf16" in path.name} == {
        "model.bf16.onnx",
        "model.bf16.onnx.data",
    }
    assert not list(convert.bundle.glob(".model.*"))


def test_bf16_that_misses(convert, capsys):
    assert convert("--config.precision=bf16", "--config.check.fp16_cosine=1.0") == 5
    assert "model.bf16.onnx: logits differs from JAX" in capsys.readouterr().err
    assert not convert.report()["checks"]["bf16"]["passed"] and not list(convert.bundle.glob(".model.*"))
