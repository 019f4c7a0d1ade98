"""What the command writes, checks and serves, in that order; with models and a server that a script plays."""

import contextlib
import os
import types

import pytest

from vit_convert.serve.triton import __main__ as command
from vit_convert.serve.triton import check, models_of, offered, pairs, prove, repository, server
from vit_convert.serve.triton.__main__ import main


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Bundles `a` and `pair`; what was done, in order."""
    done, found = [], types.SimpleNamespace(faults={"a": []}, missed=[], gpu=False)

    def note(name, result=None):
        def called(*arguments, **options):
            done.append((name, *arguments, *options.items()))
            return result(*arguments, **options) if callable(result) else result

        return called

    def proof(url, name, bundle):
        done.append(("prove", url, name, bundle))
        for model in (name, f"{name}_pixels"):
            passed = model not in found.missed
            yield types.SimpleNamespace(
                passed=passed,
                cells=lambda model=model: [model] * 6,
                model=model,
                output="logits",
                words=lambda: "far off",
            )

    @contextlib.contextmanager
    def running(installed, output, *, flags, seconds, port):
        done.append(("running", installed, str(output), flags, seconds, port))
        yield types.SimpleNamespace(
            http="localhost:1",
            grpc="localhost:2",
            metrics="localhost:3",
            process=types.SimpleNamespace(wait=note("wait")),
        )
        done.append(("stopped",))

    monkeypatch.setattr(command, "is_pair", lambda path: os.path.basename(path) == "pair")
    monkeypatch.setattr(offered, "read_offered", lambda path, precision: ("offered", path, precision))
    monkeypatch.setattr(pairs, "read_pair_offered", lambda path, precision: ("pair offered", path, precision))
    monkeypatch.setattr(models_of, "models_of", lambda offered, asked: [(offered[1], asked)])
    monkeypatch.setattr(pairs, "models_of_pair", lambda offered, asked: [(offered[1], asked)])
    monkeypatch.setattr(repository, "write_models", note("write", lambda output, models: [output / "m"]))
    monkeypatch.setattr(
        check, "check_repository", lambda output, environment: done.append(("check", environment)) or found.faults
    )
    monkeypatch.setattr(server, "find_server", note("find", "server"))
    monkeypatch.setattr(server, "running", running)
    monkeypatch.setattr(prove, "prove", proof)
    monkeypatch.setattr(prove, "prove_pair", proof)
    monkeypatch.setattr(
        os.path, "exists", lambda path, exists=os.path.exists: found.gpu if path == "/dev/nvidiactl" else exists(path)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    found.done = done
    found.run = lambda *words: main(["triton", *words])
    return found


def test_what_is_asked_for(world, capsys):
    words = ["--runtime=python", "--precision=fp16", "--model_version=3", "--max_queue_delay_us=50", "--labels=l.txt"]
    assert world.run("a", "b/", "--output=r", "--top_k=2", *words) == 0
    ((name, output, models),) = world.done
    assert (name, str(output)) == ("write", "r") and [path for path, _ in models] == ["a", "b/"]
    asked = models[1][1]
    assert (asked.name, asked.runtime, asked.precision, asked.version) == ("b", "python", "fp16", 3)
    assert (asked.delay_us, asked.labels, asked.top_k, asked.tokenizer) == (50, "l.txt", 2, "")
    assert capsys.readouterr().out == f"{os.path.join('r', 'm')}\n"


def test_a_name_and_a_tokenizer(world, capsys):
    assert world.run("pair", "--output=r", "--name=x", "--tokenizer=spiece.model") == 0
    assert (world.done[0][2][0][1].name, world.done[0][2][0][1].tokenizer) == ("x", "spiece.model")
    assert world.run("a", "--output=r", "--tokenizer=spiece.model") == 2
    assert "--tokenizer=spiece.model: a is not a pair of towers" in capsys.readouterr().err
    assert world.run("a", "b", "--output=r", "--name=x") == 2
    assert "--name=x: names the model of one bundle, given 2" in capsys.readouterr().err


def test_nothing_to_do_and_nothing_there(world, capsys):
    assert world.run("--output=r") == 2 and "no bundle is given" in capsys.readouterr().err
    for word in ("--check", "--serve"):
        assert world.run(word, "--output=r") == 2 and "there is no such repository" in capsys.readouterr().err
    assert world.run("--check", "--output=there", "--environment=env") == 0 and world.done == [("check", "env")]


def test_a_repository_is_checked_after_it_was_written(world, capsys):
    assert world.run("a", "--output=r", "--check") == 0
    assert [step[0] for step in world.done] == ["write", "check"]
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-1:]] == [["a", "ok"]]
    world.faults = {"a": [], "b": ["no plan", "no labels"], "c": ["x"]}
    assert world.run("a", "--output=r", "--check") == 2
    found = capsys.readouterr()
    assert "2 of 3 models are not as they should be; b: no plan" in found.err and "no plan; no labels" in found.out


@pytest.mark.parametrize(("gpu", "flags"), [(False, ["--model-config-name=cpu"]), (True, [])])
def test_every_bundle_is_proved_on_a_server(world, gpu, flags, capsys):
    world.gpu = gpu
    words = ("--output=r", "--serve", "--precision=fp16", "--environment=env", "--port=0", "--ready_seconds=7")
    assert world.run("a", "pair", *words) == 0
    assert world.done[1:] == [
        ("find", "env"), ("running", "server", "r", flags, 7.0, 0),
        ("prove", "localhost:1", "a", ("offered", "a", "fp16")),
        ("prove", "localhost:1", "pair", ("pair offered", "pair", "fp16")), ("stopped",),
    ]  # fmt: skip
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == [
        "a",
        "a_pixels",
        "pair",
        "pair_pixels",
    ]


def test_it_stays_if_nothing_misses(world, capsys):
    assert world.run("a", "--output=r", "--serve", "--stay") == 0
    assert [step[0] for step in world.done][-2:] == ["wait", "stopped"]
    assert "serving localhost:1, gRPC localhost:2, localhost:3 until Ctrl-C" in capsys.readouterr().out
    assert world.done[2][4:] == (120.0, 0)  # as --help has it: two minutes, and any ports
    world.done.clear()
    assert world.run("a", "--output=r", "--serve") == 0 and "wait" not in [step[0] for step in world.done]


def test_the_first_that_misses_is_told(world, capsys):
    world.missed = ["a_pixels", "pair"]
    assert world.run("a", "pair", "--output=r", "--serve", "--stay") == 5
    found = capsys.readouterr()
    assert "a_pixels: logits misses its tolerance: far off" in found.err and "until Ctrl-C" not in found.out
    assert [step[0] for step in world.done][-1] == "stopped" and "wait" not in [step[0] for step in world.done]


@pytest.mark.parametrize("word", ["--port=-1", "--port=65534", "--ready_seconds=-1", "--top_k=0", "--model_version=0"])
def test_numbers_out_of_range(world, capsys, word):
    assert world.run("a", "--output=r", word) == 2 and not world.done
