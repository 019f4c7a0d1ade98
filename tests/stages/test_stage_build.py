"""What the build, verify and benchmark stages ask of a host, and where they run; no TensorRT is needed."""

import types

import pytest
from stage_context import make_context

from vit_convert.core.engine_results import EngineSummary
from vit_convert.stages import build as module
from vit_convert.stages.build import BENCHMARK, BUILD, VERIFY


@pytest.fixture
def context(tmp_path, monkeypatch):
    found = make_context(tmp_path / "b")
    found.config.precision, found.config.engine.backend = "fp32,fp16", "tensorrt"
    found.backend = types.SimpleNamespace(
        name="tensorrt", version="8.6.1", arch="sm90", targets=["sm90"],
        gpu=types.SimpleNamespace(name="NVIDIA H200", arch="sm90"),
    )  # fmt: skip
    monkeypatch.setattr(module, "backend_named", lambda name: found.backend if name == "tensorrt" else None)
    monkeypatch.setattr(module, "builds_here", lambda context: True)
    return found


def test_what_it_leaves(context):
    names = [path.relative_to(context.bundle.root).as_posix() for path in BUILD.outputs(context)]
    folder = "engines/tensorrt-8.6.1-sm90"
    assert sorted(names) == [f"{folder}/fp16.plan", f"{folder}/fp32.plan"]
    beside = [path.relative_to(context.bundle.root).as_posix() for path in BUILD.companions(context)]
    assert sorted(beside) == [f"{folder}/fp16.plan.json", f"{folder}/fp32.plan.json"]


def test_what_other_engines_come_of(context):
    """Another TensorRT, another GPU, other options, batches, precisions or kept blocks."""
    found = [BUILD.inputs(context)]
    for change in (
        lambda: setattr(context.backend, "version", "8.6.2"),
        lambda: setattr(context.backend, "arch", "sm89"),
        lambda: setattr(context.backend.gpu, "name", "NVIDIA H100"),
        lambda: setattr(context.backend, "gpu", None),
        lambda: setattr(context.config.engine, "opt_level", 5),
        lambda: setattr(context.config.batch, "max", 32),
        lambda: setattr(context.config, "precision", "fp32"),
        lambda: setattr(context.config, "keep_fp32", ("block_11",)),
    ):
        change()
        found.append(BUILD.inputs(context))
    assert len({str(row) for row in found}) == len(found)


@pytest.mark.parametrize(
    ("here", "gpu", "targets", "runs"),
    [
        (True, "sm90", ["sm90"], True),
        (True, "sm90", ["sm75", "sm89", "sm90"], True),
        (True, "sm90", ["sm75", "sm89"], False),  # TensorRT-RTX builds for other GPUs
        (True, None, ["sm75"], False),
        (False, "sm90", ["sm90"], False),
    ],
)
def test_engines_run_where_they_are_built_for(context, monkeypatch, here, gpu, targets, runs):
    monkeypatch.setattr(module, "builds_here", lambda context: here)
    context.backend.gpu, context.backend.targets = gpu and types.SimpleNamespace(arch=gpu), targets
    assert VERIFY.needed(context) is runs and BENCHMARK.needed(context) is runs
    assert VERIFY.inputs(context)["fp16_cosine"] == 0.999 and BENCHMARK.inputs(context)["seconds"] == 3.0


@pytest.fixture
def commands(context, monkeypatch):
    """What the engine's commands were called with."""
    called = []
    engines = [
        EngineSummary.from_dict({"precision": name, "backend": "tensorrt", "version": "8.6.1", "bytes": size})
        for name, size in (("fp32", 3 << 20), ("fp16", (3 << 19) + 52429))
    ]
    host = lambda backend, bundle, config, progress: (backend, bundle, config, progress)  # noqa: E731
    monkeypatch.setattr("vit_convert.engine.host.EngineHost.open", host)
    for name, result in (("build_bundle.build_bundle", engines), ("commands.verify_bundle", "verified"),
                         ("commands.benchmark_bundle", "measured")):  # fmt: skip
        monkeypatch.setattr(
            f"vit_convert.engine.{name}",
            lambda host, result=result, **options: called.append((host, options)) or result,
        )
    return called


def test_a_build_says_how_large_its_engines_are(context, commands):
    found = module.build(context)
    assert found.summary == "tensorrt 8.6.1: fp32 3.0 MiB, fp16 1.6 MiB"  # 1.55
    assert [engine.precision for engine in found.engines] == ["fp32", "fp16"]
    ((host, options),) = commands
    assert host == (context.backend, context.bundle, context.config, context.progress)
    assert sorted(options["precisions"]) == ["fp16", "fp32"]


def test_every_precision_is_verified_and_measured(context, commands):
    assert (module.verify(context), module.benchmark(context)) == ("verified", "measured")
    assert [sorted(options["precisions"]) for _, options in commands] == [["fp16", "fp32"]] * 2
    assert commands[1][1]["warmup_seconds"] == 1.0 and {*commands[0][1]} == {"precisions"}
