"""A family from outside the package, registered by a config alone: converted by the command line like one of the
package's own."""

import json
import math
import pathlib
import sys

import numpy as np
import onnx_ir as ir
import pytest

from vit_convert.__main__ import main
from vit_convert.core.errors import UsageError
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.families.family import RandomOptions
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import main as random_main
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.registry import code_of, families, family_named

PLACE = f"{pathlib.Path(__file__).with_name('outside_family.py')}:FAMILY"
CONFIG = """
from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.families = ({place!r},)
    config.checkpoint = {checkpoint!r}
    config.precision = "fp32,fp16,int8"
    config.keep_fp16 = ("block_01/up",)
    config.calibration.num_images = 8
    config.check.num_images = 2
    return config
"""


@pytest.fixture
def path(tmp_path):
    """GLU-mu/8 for images of 64x64, with 10 classes."""
    return written(tmp_path / "glu.npz")


def written(path, **options):
    (family,) = families([PLACE])[:1]
    family.write_random(path, "GLU-mu/8", RandomOptions(**{"num_classes": 10, **options}))
    return path


def convert(path, *flags, place=PLACE):
    config = path.with_suffix(".py")
    config.write_text(CONFIG.format(place=place, checkpoint=str(path)))
    return main(
        [
            "vit_convert",
            f"--config={config}",
            f"--workdir={path.parent / 'out'}",
            "--config.engine.backend=none",
            *flags,
        ]
    )


def changed(path, change):
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)
    return path


def report_of(path):
    return json.loads((path.parent / "out" / path.stem / "report.json").read_text())


def forward(leaves, images):
    """The model in float64 numpy, from the names on disk; one patch at a time, and GELU in its tanh form, which is
    JAX's."""
    leaves = {name: np.float64(array) for name, array in leaves.items()}
    side = leaves["glu/stem/w"].shape[0]
    depth = len({name.split("/")[1] for name in leaves if "/gate/" in name})
    results = []
    for image in np.float64(images):
        sum_of_patches, patches = 0, 0
        for top in range(0, image.shape[0], side):
            for left in range(0, image.shape[1], side):
                patch = image[top : top + side, left : left + side]
                x = np.tensordot(patch, leaves["glu/stem/w"], axes=3) + leaves["glu/stem/b"]
                for i in range(depth):
                    w = {
                        name.removeprefix(f"glu/{i}/"): array
                        for name, array in leaves.items()
                        if name.startswith(f"glu/{i}/")
                    }
                    n = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * w["norm/g"] + w["norm/b"]
                    g = n @ w["gate/w"] + w["gate/b"]
                    g = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
                    x = x + (g * (n @ w["up/w"] + w["up/b"])) @ w["down/w"] + w["down/b"]
                sum_of_patches, patches = sum_of_patches + x, patches + 1
        x = sum_of_patches / patches
        results.append(x @ leaves["glu/head/w"] + leaves["glu/head/b"] if "glu/head/w" in leaves else x)
    return np.array(results)


def assert_close(got, expected):
    """At 1e-4 of the scale: float32 in another order differs by about 1e-6."""
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_converts_with_every_block_proved(path):
    assert convert(path) == 0
    report = report_of(path)
    found = report["checkpoint"]
    assert (found["family"], found["variant"], found["layout"]) == ("glu", "GLU-mu/8", "glu")
    assert found["num_params"] == sum(array.size for array in np.load(path).values())
    proved = {row["tensor"]: row["max_rel"] for row in report["checks"]["fp32"]["blocks"]}
    assert set(proved) == {"block_00", "block_01", "block_02", "logits"}
    assert max(proved.values()) < 1e-4
    assert all(report["checks"][precision]["passed"] for precision in ("fp32", "fp16", "int8"))
    assert convert(path) == 0
    assert {stage["status"] for stage in report_of(path)["stages"]} == {"fresh"}


def test_outputs_are_those_of_a_float64_forward_pass(path):
    """The graph, of which two blocks are traced and the third repeats the second, and the JAX model that proves it."""
    assert convert(path, "--config.precision=fp32") == 0
    images = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64, 3)).astype(np.float32)
    expected = forward(np.load(path), images)
    graph = path.parent / "out" / path.stem / "model.onnx"
    assert_close(run_session(open_session(graph), images)["logits"], expected)
    loaded = load_checkpoint(path, families=[PLACE])
    model = loaded.family.model(loaded)
    assert model.repeats and model.stacks[0].depth == 3 and list(model.traced_taps) == ["block_00", "block_01"]
    assert_close(model.run(images)["logits"], expected)
    kinds = {}
    for node in ir.load(graph).graph:
        if (scope := node.name.split("/")[0]).startswith("block_"):
            kinds.setdefault(scope, []).append(node.op_type)
    assert list(kinds) == ["block_0", "block_1", "block_2"] and kinds["block_2"] == kinds["block_1"]


def test_without_its_head_and_at_another_size(path):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    loaded = load_checkpoint(path, families=[PLACE], outputs="features", image_size=(32, 48))
    headless = {name: array for name, array in np.load(path).items() if "/head/" not in name}
    assert_close(loaded.family.model(loaded).run(images)["features"], forward(headless, images))


def test_a_vit_is_still_a_vit_and_a_file_of_this_family_is_nobodys_else(path, tmp_path):
    vit = tmp_path / "vit.npz"
    write_random_checkpoint(vit, "mu/16", image_size=(32, 32), num_classes=10)
    assert load_checkpoint(vit, families=[PLACE]).family.name == "vit"
    assert load_checkpoint(path, families=[PLACE]).family.name == "glu"
    assert load_checkpoint(path, families=[PLACE], family="glu", variant="GLU-mu/8").variant == "GLU-mu/8"
    assert convert(path, "--config.families=()") == 3


def test_a_wrong_shape_is_named_with_both_values(path, capsys):
    changed(path, lambda arrays: arrays.update({"glu/1/up/w": arrays["glu/1/up/w"][:, :-1]}))
    assert convert(path) == 3
    said = capsys.readouterr().err
    assert "glu/1/up/w: checkpoint (32, 47), variant GLU-mu/8 needs (32, 48)" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays.pop("glu/1/up/b"), "glu/1/up/b: missing, variant GLU-mu/8 needs (48,)"),
        (
            lambda arrays: arrays.update({"glu/1/up/scale": np.zeros(3)}),
            "glu/1/up/scale: belongs to no part of variant GLU-mu/8",
        ),
        (
            lambda arrays: [arrays.pop(name) for name in list(arrays) if "/1/" in name],
            "GLU block 1 missing, blocks up to 2 found",
        ),
    ],
    ids=["missing", "left over", "a whole block"],
)
def test_loading_is_strict(path, capsys, change, said):
    changed(path, change)
    assert convert(path) == 3
    assert said in capsys.readouterr().err


def test_random_files_from_the_command_line(path, tmp_path, capsys):
    again = tmp_path / "again.npz"
    asked = ["random", f"--families={PLACE}", f"--output={again}", "--num_classes=10"]
    assert random_main([*asked, "--variant=GLU-mu/8", "--family=glu", "--layout=glu"]) == 0
    assert again.read_bytes() == path.read_bytes()
    assert random_main([*asked, "--variant=mu/8", "--family=vit", "--image_size=32"]) == 0
    wrong = {
        "--layout=gul": "layout 'gul': glu has glu",
        "--family=gul": "family 'gul': unknown",
        "--variant=G": "GLU-mu/8, ",
    }
    for flag, said in wrong.items():
        assert random_main([*asked, "--variant=GLU-mu/8", flag]) == 2
        assert said in capsys.readouterr().err


def test_options_without_meaning(path, tmp_path):
    (family,) = families([PLACE])[:1]
    with pytest.raises(UsageError, match="pre_logits=True: has no meaning for family glu"):
        written(tmp_path / "x.npz", pre_logits=True)
    with pytest.raises(UsageError, match="a GLU has no position table"):
        load_checkpoint(path, families=[PLACE], posemb_grid=(8, 8))
    assert family_named("glu", families([PLACE])).name == family.name == "glu"
    assert family.has_variant("GLU-mu/8") and not family.has_variant("mu/8")


def test_changed_code_converts_again(path, tmp_path):
    """The graph would otherwise stay that of the code as it was."""
    mine = tmp_path / "mine.py"
    mine.write_text(pathlib.Path(PLACE.rpartition(":")[0]).read_text())
    place = f"{mine}:FAMILY"
    assert convert(path, "--config.precision=fp32", place=place) == 0
    before = forward_of_graph(path)
    mine.write_text(mine.read_text().replace("jnp.mean(x, axis=1)", "2 * jnp.mean(x, axis=1)"))
    assert convert(path, "--config.precision=fp32", place=place) == 0
    assert np.abs(forward_of_graph(path) - before).max() > 0.1 * np.abs(before).max()


def forward_of_graph(path):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    return run_session(open_session(path.parent / "out" / path.stem / "model.onnx"), images)["logits"]


def test_code_of_a_package_is_all_files_of_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "glus_of_mine"
    folder.mkdir()
    for name in ("__init__", "family", "module"):
        (folder / f"{name}.py").write_text("")
    (tmp_path / "one_glu.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    places = ["glus_of_mine.family:FAMILY", "one_glu:FAMILY"]
    before = code_of(places)
    (folder / "module.py").write_text("changed = True\n")
    after = code_of(places)
    assert (after[0] != before[0], after[1] != before[1]) == (True, False)
    sys.modules.pop("glus_of_mine", None)
    with pytest.raises(UsageError, match="gone"):
        code_of([f"{tmp_path}/gone.py:FAMILY"])


def test_a_file_may_have_annotations_as_text(tmp_path):
    """Dataclasses and Flax modules look such a name up in the module of their class."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        + pathlib.Path(PLACE.rpartition(":")[0]).read_text().partition('"""\n\n')[2]
    )
    assert families([f"{file}:FAMILY"])[0].name == "glu"
