"""What the checkpoint stage checks of a config against a file, and what it depends on; the files are played."""

import types

import pytest
from stage_context import PREPROCESS, make_context

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.image_size import ImageRange
from vit_convert.stages import checkpoint as module
from vit_convert.stages.checkpoint import CHECKPOINT, load


@pytest.fixture
def context(tmp_path):
    found = make_context(tmp_path / "b")
    found.config.image_size = None
    return found


def given(**more):
    """A loaded checkpoint, as far as the stage reads it."""
    return types.SimpleNamespace(**{
        "path": "a.npz", "sha256": "ab", "family": types.SimpleNamespace(name="vit"), "variant": "B/16", "title": "ViT",
        "layout": types.SimpleNamespace(value="vit_jax"), "num_params": 86567656, "image_size": (224, 224),
        "patch_size": 16, "patches": None, "attentions": [(64, 197)], "source_image_size": (224, 224),
        "group_norms": [64, 256],
        "num_classes": 1000, "zero_head": False,
        "output": "logits", "judge": "top1", "text": False, "pair": None, "warnings": ["old"], "preprocess": "vit_jax",
        "takes": "texts", "resizable": True, **more,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("title", "variant", "called"),
    [("ViT", "B/16", "ViT B/16"), ("Swin", "Swin-T/7", "Swin-T/7"), ("ViT", "custom", "ViT custom")],
)
def test_what_people_call_it(title, variant, called):
    assert module._called(given(title=title, variant=variant)) == called


DYNAMIC = "dynamic:160..448@224"


def test_a_range_of_sizes(context):
    assert module._image_range(context, given()) is None
    context.config.image_size = DYNAMIC
    found = module._image_range(context, given())
    assert found == ImageRange((160, 160), (224, 224), (448, 448))


@pytest.mark.parametrize(
    ("size", "config", "checkpoint", "said"),
    [
        (DYNAMIC, {}, {"resizable": False}, "family vit has one size"),
        (DYNAMIC, {"outputs": "grid"}, {}, "a grid has one size"),
        ("dynamic:100..448@224", {}, {}, "100"),  # no whole patches
        ("dynamic:16..448@224", {}, {}, "a side of one patch"),
        ("dynamic:32..448@112x448", {}, {}, "as many rows"),  # 7 x 28 patches, as 14 x 14
    ],
)
def test_ranges_that_are_refused(context, size, config, checkpoint, said):
    context.config.image_size = size
    context.config.update(config)
    with pytest.raises(UsageError, match=said):
        module._image_range(context, given(**checkpoint))


def test_as_many_patches_in_another_grid(context):
    """Of more than 256 patches, and what is said of both grids."""
    context.config.image_size = "dynamic:64..640@160x640"
    with pytest.raises(UsageError) as caught:
        module._image_range(context, given(image_size=(320, 320)))
    assert "20x20" in str(caught.value) and "10x40" in str(caught.value)
    assert "(20, 20)" in caught.value.fix and "(10, 40)" in caught.value.fix


def test_both_grids_are_told_row_by_column(context):
    context.config.image_size = "dynamic:64..640@320x320"
    with pytest.raises(UsageError, match="as many rows for 10x40 patches as for the 20x20 of the size") as caught:
        module._image_range(context, given(image_size=(160, 640)))
    assert caught.value.fix == "Set posemb_grid to what the model was trained with: (10, 40) or (20, 20)."


@pytest.mark.parametrize(("asked", "length"), [(None, None), (16, 16), ("dynamic:4..24", 24)])
def test_a_text_tower_is_loaded_at_its_greatest_length(context, monkeypatch, asked, length):
    found = []
    monkeypatch.setattr("vit_convert.families.load.load_checkpoint", lambda path, **options: found.append(options))
    context.scratch["found"] = types.SimpleNamespace(path="a.npz", subtree="")
    context.config.text_length = asked
    module._checkpoint(context)
    assert [options["text_length"] for options in found] == [length]


@pytest.mark.parametrize(("target", "warned"), [("trt8", True), ("rtx", False)])
def test_an_engine_known_to_be_wrong_is_told_before_it_is_built(context, target, warned):
    """TensorRT 8.6 computes texts of a range wrong in batches; the graph is right, and so is a single length."""
    context.config.text_length, context.config.target = "dynamic:4..24", target
    assert module._text_range(context, given(one_length="")).largest == (24,)
    events = context.bundle.events
    said = events.read_text() if events.exists() else ""
    assert ("failed verify; a single length, such as 24, is right" in said) == warned


def test_the_code_of_families_from_outside_counts(monkeypatch):
    monkeypatch.setattr("vit_convert.families.registry.code_of", lambda families: [f"code of {families}"])
    assert module._code_of(()) == [] and module._code_of(("mine:FAMILY",)) == ["code of ('mine:FAMILY',)"]


@pytest.mark.parametrize(("outputs", "given"), [("auto", {}), ("score", {"output": "score"})])
def test_what_a_users_own_model_is_made_with(context, monkeypatch, outputs, given):
    made = []
    monkeypatch.setattr("vit_convert.families.user.call.taken_apart", lambda found: (found, "variables"))
    monkeypatch.setattr(
        "vit_convert.families.user.model.user_model", lambda *given, **options: made.append((given, options))
    )
    context.config.model, context.config.image_size, context.config.num_classes = (lambda: "module"), (32, 48), 7
    context.config.outputs = "".join(list(outputs))
    module._user_model(context)
    assert made == [(("module", "variables"), {"image_shape": (32, 48, 3), "num_classes": 7, **given})]


def test_a_table_whose_grid_is_told_may_have_any(context):
    context.config.image_size, context.config.posemb_grid = "dynamic:32..448@112x448", (14, 14)
    assert module._image_range(context, given()).optimal == (112, 448)
    context.config.image_size, context.config.posemb_grid = "dynamic:32..448@224", None
    assert module._image_range(context, given()).smallest == (32, 32)  # two patches are enough


@pytest.fixture
def loaded(context, monkeypatch):
    """Loads a checkpoint that is at hand."""

    def loaded(published=None, **more):
        hashes = []
        context.scratch["checkpoint"] = given(**more)
        context.scratch["found"] = types.SimpleNamespace(
            path="a.npz", subtree="", published=published, require_sha256=hashes.append
        )
        monkeypatch.setattr(module, "_import_exporter", lambda: None)
        found = load(context)
        assert hashes == ["ab"]
        return found

    return loaded


def test_what_is_told_of_it(context, loaded):
    found = loaded()
    assert found.summary == "ViT B/16, 86,567,656 parameters, 224x224"
    assert (found.path, found.sha256, found.family, found.layout, found.output) == (
        "a.npz",
        "ab",
        "vit",
        "vit_jax",
        "logits",
    )
    assert (found.image_size, found.image_range, found.attentions) == ((224, 224), None, ((64, 197),))
    assert found.group_norms == (64, 256)
    assert found.preprocess["mean"] == [0.5, 0.5, 0.5] and '"old"' in context.bundle.events.read_text()
    context.config.preprocess = "imagenet"
    assert loaded().preprocess["mean"] != [0.5, 0.5, 0.5]
    context.config.image_size = DYNAMIC
    again = loaded()
    assert (again.image_size, again.image_range.largest) == ((224, 224), (448, 448)) and "160" in again.summary
    context.config.image_size = None
    assert loaded(image_size=(), takes="16 tokens").summary.endswith(", 16 tokens")


def test_the_number_of_classes(context, loaded):
    context.config.num_classes = 1000
    assert loaded().num_classes == 1000
    context.config.num_classes = 21843
    with pytest.raises(UsageError, match=r"config\.num_classes=21843: the checkpoint's head has 1000 classes"):
        loaded()


def test_a_published_file_is_held_against_its_table(loaded, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "vit_convert.checkpoint.published.require_published", lambda *arguments: asked.append(arguments)
    )
    loaded()
    assert asked == []
    loaded(published="row")
    assert asked == [("row", "a.npz", (224, 224), 1000)]


def test_a_file_is_looked_for_once_and_its_absence_raised_by_the_stage(context, monkeypatch):
    looked = []

    def find(checkpoint, folders, *, progress):
        looked.append(checkpoint)
        raise CheckpointError("a.npz: no such file")

    monkeypatch.setattr("vit_convert.checkpoint.find.find_checkpoint", find)
    context.config.checkpoint = "a.npz"
    for _ in range(2):
        assert CHECKPOINT.inputs(context)[1] == "a.npz: no such file"
        with pytest.raises(CheckpointError, match="no such file"):
            load(context)
    assert looked == ["a.npz"]


def test_what_it_depends_on(context, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"a")
    context.scratch["found"] = types.SimpleNamespace(path=tmp_path / "a.npz", subtree="")
    found = [CHECKPOINT.inputs(context)]
    changes = {"family": "vit", "variant": "B/16", "outputs": "features", "num_classes": 7, "posemb_grid": (2, 3)}
    changes |= {"preprocess": "siglip", "normalize": False, "image_size": (64, 64)}
    for key, value in changes.items():
        context.config[key] = value
        found.append(CHECKPOINT.inputs(context))
    context.scratch["found"] = types.SimpleNamespace(path=tmp_path / "a.npz", subtree="img")
    found.append(CHECKPOINT.inputs(context))
    (tmp_path / "a.npz").write_bytes(b"other")
    found.append(CHECKPOINT.inputs(context))
    context.config.image_size = DYNAMIC
    found.append(CHECKPOINT.inputs(context))
    assert len({str(row) for row in found}) == len(found)


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [(lambda: None, None, "config.image_size is not"), ("no function", (32, 32), "must be a function")],
)
def test_a_users_own_model_that_is_none(context, model, size, said):
    context.config.model, context.config.image_size = model, size
    with pytest.raises(UsageError, match=said):
        module._user_model(context)


def test_a_users_own_model(context):
    context.config.model, context.config.image_size = (lambda: None), (32, 48)
    signature = types.SimpleNamespace(outputs=[types.SimpleNamespace(judge=judge) for judge in ("cosine", "top1")])
    leaf = types.SimpleNamespace(size=1200)
    context.scratch["model"] = types.SimpleNamespace(
        warnings=("slow",), params={"a": leaf, "b": leaf}, taps=("block_00", "block_01"), name="mine", identity="id",
        output="score", signature=signature,
    )  # fmt: skip
    found = load(context)
    assert (found.family, found.path, found.variant, found.num_params) == ("user", "", "mine", 2400)
    assert found.summary.startswith("own model mine, 2,400 parameters, 32x48, judged by")
    assert "score" in found.summary and found.summary.endswith("also block_00, block_01")
    assert found.model["identity"] == "id" and found.judge == "cosine" and '"slow"' in context.bundle.events.read_text()
    assert CHECKPOINT.inputs(context)[1] == "id" and found.preprocess != PREPROCESS


def test_a_model_that_fails_is_the_stages_failure(context, monkeypatch):
    """Only a stage that runs is known to have failed: what it depends on is told without."""

    def model_of(context):
        raise UsageError("config.model(): no such layer")

    monkeypatch.setattr(module, "model_of", model_of)
    context.config.model, context.config.image_size = (lambda: None), (32, 32)
    assert CHECKPOINT.inputs(context)[1] == "config.model(): no such layer"
    with pytest.raises(UsageError, match="no such layer"):
        load(context)
