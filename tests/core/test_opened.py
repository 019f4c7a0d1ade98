"""A folder that is opened for a conversion: held while it is worked on, and clean of what killed ones left."""

import json
import sys

import pytest

from vit_convert.core.bundle import temporary_beside
from vit_convert.core.defaults import default_config
from vit_convert.core.errors import UsageError
from vit_convert.core.opened import opened


@pytest.fixture
def config():
    found = default_config()
    found.name = "tiny"
    return found


def test_it_is_held_and_clean(tmp_path, config, capsys):
    bundle = tmp_path / "tiny"
    bundle.mkdir()
    left = temporary_beside(bundle / "model.onnx")
    left.write_text("half a graph")
    (bundle / "mine.txt").write_text("a user's")
    words = ["vit_convert", "--config=my file.py"]
    with opened(config, tmp_path, words, quiet=True, checkpoints=("a", "b")) as context:
        assert context.bundle.root == bundle and context.config is config and tuple(context.checkpoints) == ("a", "b")
        assert context.command == "vit_convert '--config=my file.py'"
        context.progress.say("a line")
        assert capsys.readouterr().err == ""
        assert not left.exists() and (bundle / "mine.txt").exists()
        with pytest.raises(UsageError, match="my file"), opened(config, tmp_path, ["other"], quiet=True):
            pass
    event = json.loads((bundle / "events.jsonl").read_text().splitlines()[0])
    assert (event["event"], event["argv"], event["name"]) == ("command", words, "tiny")
    with opened(config, tmp_path, [], quiet=True):  # let go
        pass


def test_a_command_line_is_ones_own_by_default(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", "a b"])
    with opened(config, tmp_path, [], quiet=False) as context:
        assert context.command == "tool 'a b'"
        context.progress.say("a line")
        assert capsys.readouterr().err == "a line\n"
        assert tuple(context.checkpoints) == ("checkpoints",)
    assert json.loads((tmp_path / "tiny" / "events.jsonl").read_text().splitlines()[0])["argv"] == ["tool", "a b"]


def test_where_nothing_can_be_written(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"), opened(config, tmp_path / "file", ["x"], quiet=True):
        pass


def test_a_folder_whose_name_is_no_text(tmp_path, config):
    """onnxruntime and TensorRT take paths as UTF-8: refused before anything is made."""
    with pytest.raises(UsageError, match="UTF-8"), opened(config, tmp_path / "\udcff", ["x"], quiet=True):
        pass
    assert not [*tmp_path.iterdir()]
