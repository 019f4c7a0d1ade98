"""The build, verify and benchmark stages, for a host with the engines' TensorRT."""

import pathlib
from typing import TYPE_CHECKING, Any

from vit_convert.core import config as configs
from vit_convert.core.benchmark_results import BenchmarkResult
from vit_convert.core.engine_results import BuildResult, Verification
from vit_convert.core.pipeline import Context, Stage
from vit_convert.stages.common import backend_named, builds_here, plain

if TYPE_CHECKING:
    from vit_convert.engine.host import EngineHost


def _plans(context: Context) -> list[pathlib.Path]:
    backend = backend_named(context.config.engine.backend)
    return [_plan(context, backend, precision) for precision in configs.precisions(context.config)]


def _plan(context: Context, backend: Any, precision: str) -> pathlib.Path:
    return context.bundle.plan(backend.name, backend.version, backend.arch, precision)


def _inputs(context: Context) -> Any:
    backend = backend_named(context.config.engine.backend)
    config = context.config
    host = [backend.name, backend.version, backend.arch, backend.gpu.name if backend.gpu else ""]
    return [*host, plain(config.engine), plain(config.batch), configs.precisions(config), list(config.keep_fp32)]


def _host(context: Context) -> "EngineHost":
    from vit_convert.engine.host import EngineHost

    backend = backend_named(context.config.engine.backend)
    return EngineHost.open(backend, context.bundle, context.config, context.progress)


def build(context: Context) -> BuildResult:
    """Builds an engine for each precision."""
    from vit_convert.engine.build_bundle import build_bundle

    engines = build_bundle(_host(context), precisions=configs.precisions(context.config))
    sizes = ", ".join(f"{engine.precision} {engine.bytes / 2**20:.1f} MiB" for engine in engines)
    return BuildResult(engines=tuple(engines), summary=f"{engines[0].backend} {engines[0].version}: {sizes}")


def _can_run(context: Context) -> bool:
    """Whether this host can run the engines it builds: TensorRT-RTX can build without a GPU, TensorRT cannot."""
    if not builds_here(context):
        return False
    backend = backend_named(context.config.engine.backend)
    return backend.gpu is not None and backend.gpu.arch in backend.targets


def verify(context: Context) -> Verification:
    """Runs the engines against the reference, as `python -m vit_convert.engine verify` does on a GPU host."""
    from vit_convert.engine.commands import verify_bundle

    return verify_bundle(_host(context), precisions=configs.precisions(context.config))


def benchmark(context: Context) -> BenchmarkResult:
    """Measures the engines and recommends one of them."""
    from vit_convert.engine.commands import benchmark_bundle

    return benchmark_bundle(_host(context), precisions=configs.precisions(context.config), warmup_seconds=1.0)


def _sidecars(context: Context) -> list[pathlib.Path]:
    return [plan.with_name(f"{plan.name}.json") for plan in _plans(context)]


BUILD = Stage("build", ("export", "calibrate", "quantize"), BuildResult, build, _inputs, _plans, builds_here, _sidecars)
VERIFY = Stage("verify", ("reference", "build"), Verification, verify, lambda c: plain(c.config.check), needed=_can_run)
BENCHMARK = Stage(
    "benchmark", ("build", "verify"), BenchmarkResult, benchmark, lambda c: plain(c.config.benchmark), needed=_can_run
)
