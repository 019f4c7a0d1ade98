"""What is measured on labelled images, and what is refused instead of being measured on other classes."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

FP32 = "--config.check.max_top1_drop=100.0"


def write(root: pathlib.Path, *names: str) -> pathlib.Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name)
    return root


def arrays(path: pathlib.Path, *labels: int) -> pathlib.Path:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array(labels))
    return path


def measured(convert) -> dict[str, float]:
    return {name: value for name, value in convert.report()["accuracy"].items() if value is not None}


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ((1, 2, 10), "label 10"),
        ((-1, 0, 3), "label -1"),
        ((0, 10**9), "label 1000000000"),
        ((2**63 - 1, 0), f"label {2**63 - 1}"),
    ],
)
def test_labels_outside_the_head(convert, tmp_path, capsys, labels, named):
    data = arrays(tmp_path / "e.npz", *labels)
    assert convert(f"--config.evaluation.data={data}") == 6
    error = capsys.readouterr().err
    assert f"{named}, the head has classes 0 to 9" in error and "Traceback" not in error
    assert not measured(convert)


def test_a_label_of_an_image_that_is_not_taken(convert, tmp_path, capsys):
    """Labels from 1 to 10 are another numbering, whichever of the images are looked at."""
    data = arrays(tmp_path / "e.npz", 10, 1, 2)
    assert convert(f"--config.evaluation.data={data}", "--config.evaluation.num_images=1") == 6
    assert "label 10" in capsys.readouterr().err


def test_fewer_class_folders_than_classes(convert, tmp_path, capsys):
    data = write(tmp_path / "d", "ant/1.png", "bee/1.png")
    assert convert(f"--config.evaluation.data={data}") == 6
    assert "2 class folders (ant, bee), the head has 10 classes" in capsys.readouterr().err
    (data / "classes.txt").write_text("\n".join(["dog", "bee", "ant", *"defghij"]))
    assert convert(FP32, f"--config.evaluation.data={data}") == 0
    assert np.load(convert.bundle / "evaluation_labels.npy").tolist() == [2, 1]


def test_as_many_class_folders_as_classes(convert, tmp_path):
    data = write(tmp_path / "d", *(f"{name}/1.png" for name in "abcdefghij"))
    assert convert(FP32, f"--config.evaluation.data={data}") == 0
    logits = np.load(convert.bundle / "evaluation_logits.npy")
    assert measured(convert)["jax"] == 100 * np.mean(logits.argmax(axis=1) == np.arange(10))


def test_features_have_no_top1(convert, tmp_path, capsys):
    data = arrays(tmp_path / "e.npz", 0, 1, 2)
    assert convert("--config.outputs=features", f"--config.evaluation.data={data}") == 0
    captured = capsys.readouterr()
    assert "the output is features: no top-1 is measured" in captured.out + captured.err
    assert not measured(convert)
    assert not os.path.exists(convert.bundle / "evaluation_labels.npy")
    assert convert.report()["reference"]["source"] == "evaluation images"


def test_a_head_of_zeros_has_no_top1(convert, tmp_path, capsys):
    """All classes get the same logit, and the first one would be right wherever the label is 0."""
    from vit_convert.families.random import write_random_checkpoint

    path = tmp_path / "zero.npz"
    write_random_checkpoint(path, "mu/16", image_size=(32, 32), num_classes=10)
    with np.load(path) as file:
        leaves = {name: file[name] for name in file.files}
    np.savez(path, **{name: value * 0 if name.startswith("head/") else value for name, value in leaves.items()})
    data = arrays(tmp_path / "e.npz", 0, 0, 0)
    assert convert(f"--config.checkpoint={path}", f"--config.evaluation.data={data}", "--config.precision=fp16") == 0
    captured = capsys.readouterr()
    assert "the head is all zeros: no top-1 is measured" in captured.out + captured.err
    assert not measured(convert)


def test_labels_do_not_matter_for_calibration(convert, tmp_path):
    data = write(tmp_path / "d", "ant/1.png", "bee/1.png", "cat/1.png")
    (data / "empty").mkdir()
    int8 = ("--config.precision=int8", "--config.check.int8_cosine=0.5", "--config.calibration.num_images=4")
    assert convert(*int8, f"--config.calibration.data={data}") == 0
