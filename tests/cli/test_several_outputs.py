"""Several outputs of one conversion: each is judged in every precision, and the session gives them."""

import contextlib

import numpy as np

import vit_convert
from vit_convert.core.errors import UsageError


def test_several_outputs_through_every_stage(convert):
    given = "--config.outputs=grid,logits,tokens"
    assert convert(given, "--config.precision=int8", "--config.calibration.num_images=4") == 0
    report = convert.report()
    assert report["checkpoint"]["output"] == "logits" and set(report["checks"]) == {"fp32", "fp16", "int8"}
    for check in report["checks"].values():
        judged = {row["tensor"] for row in check["blocks"] if row["passed"]}
        assert {"logits", "tokens", "grid"} <= judged
    session = vit_convert.Session(convert.bundle)
    with contextlib.closing(session), np.load(convert.bundle / "reference.npz") as reference:
        found = session.run(reference["images"])
        assert list(found) == ["logits", "tokens", "grid"] and found["grid"].shape == (2, 2, 2, 32)
        for name, values in found.items():
            assert np.abs(values - reference[name]).max() <= 1e-2 * np.abs(reference[name]).max()  # the graph is fp16


def test_a_grid_has_one_size(convert, capsys):
    flags = ("--config.outputs=logits,grid", "--config.image_size=dynamic:32..64")
    assert convert(*flags) == UsageError.exit_code
    assert "a grid has one size" in capsys.readouterr().err
