"""The engines of a bundle: which one runs here, what was proved about it, and which one to use."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from vit_convert.core.bundle import Bundle
from vit_convert.core.check_results import GraphCheck
from vit_convert.core.engine_results import EngineCheck, Proof
from vit_convert.core.errors import BuildError
from vit_convert.core.leftovers import built_from as graph_in_sidecar
from vit_convert.core.leftovers import is_of
from vit_convert.core.manifest import Manifest
from vit_convert.core.proof import doubt
from vit_convert.engine.backend.graph_file import hash_graph
from vit_convert.engine.backend.sidecar import check_sidecar, read_sidecar, write_sidecar
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.handoff import judged_by, read_facts
from vit_convert.engine.runtime.engine import Engine


def find_plan(backend: Backend, bundle: Bundle, precision: str) -> pathlib.Path:
    """Finds an engine: the one built here, or else one from another host that also runs here.

    Args:
        backend: the TensorRT to load it with.
        bundle: holds the engines.
        precision: of the engine.

    Returns:
        Its path; if none fits, the path of one built here.
    """
    own = bundle.plan(backend.name, backend.version, backend.arch, precision)
    if not own.is_file():
        for plan in sorted(bundle.root.glob(f"engines/{backend.name}-*/{precision}.plan")):
            try:
                check_sidecar(plan, backend)
            except BuildError:
                continue
            return plan
    return own


def open_engine(backend: Backend, bundle: Bundle, plan: pathlib.Path) -> Engine:
    """Loads an engine of a bundle.

    Args:
        backend: the TensorRT that runs it.
        bundle: holds it and, perhaps, the graph named in its sidecar.
        plan: the engine.

    Raises:
        BuildError: it does not belong here, or was not built from this conversion's graph.
    """
    require_conversion(bundle, plan)
    return Engine(backend, plan, onnx_path=built_from(bundle, plan))


def require_conversion(bundle: Bundle, plan: pathlib.Path) -> None:
    """Refuses an engine that was built from an earlier conversion's graph, whether or not that graph still exists.

    Raises:
        BuildError: see above.
    """
    graph = graph_in_sidecar(plan)
    if graph and bundle.manifest.exists() and not is_of(Manifest.read(bundle).files, bundle, plan):
        raise BuildError(
            f"{plan}: built from another {graph.name} ({graph.hashes['sha256'][:12]}…) than this conversion's",
            fix="Convert to the end, and build again.",
        )


def built_from(bundle: Bundle, plan: pathlib.Path) -> pathlib.Path | None:
    """The graph of the bundle that an engine's sidecar names as its source, or None if the bundle does not have it."""
    sidecar = read_sidecar(plan)
    name = sidecar.onnx.path if sidecar else ""
    return next(
        (path for path in (bundle.root / f"{name}", bundle.lowerings / f"{name}") if os.path.isfile(path)), None
    )


def require_model(bundle: Bundle, plan: pathlib.Path) -> None:
    """Refuses an engine that was not derived from the bundle's current model.onnx, which is its fallback at run time.

    Raises:
        BuildError: see above.
    """
    sidecar = read_sidecar(plan)
    model = sidecar.model if sidecar else None
    if built_from(bundle, plan) == bundle.onnx():  # `open_engine` compares that, and reading it even once takes seconds
        return
    if model is not None and bundle.onnx().is_file() and model != hash_graph(bundle.onnx()):
        raise BuildError(
            f"{plan}: built from another {bundle.onnx().name} than is there now",
            fix="Convert to the end, and build again.",
        )


def keep_proof(plan: pathlib.Path, found: EngineCheck, judge: str) -> None:
    """Writes the result of verification into the engine's sidecar, which is replaced together with the engine.

    Args:
        plan: the engine.
        found: result of `verify_session`.
        judge: what it was judged by, from `judged_by`.
    """
    sidecar = read_sidecar(plan)
    if sidecar is None:
        raise BuildError(f"{plan}: its sidecar is missing or damaged", fix="Build the engine again.")
    write_sidecar(plan, dataclasses.replace(sidecar, proof=Proof.of(found, judge)))


def proof_of(plan: pathlib.Path, judge: str) -> Proof | None:
    """What `keep_proof` wrote for this engine; None if it was not verified, or against something else.

    Args:
        plan: the engine.
        judge: what it is to be judged by, from `judged_by`.
    """
    sidecar = read_sidecar(plan)
    proof = sidecar.proof if sidecar else None
    return proof if proof is not None and proof.judge == judge else None


def require_proof(bundle: Bundle, plan: pathlib.Path) -> None:
    """Refuses to serve an engine that missed its tolerance or was never checked.

    Raises:
        BuildError: see above.
    """
    sidecar = read_sidecar(plan)
    if sidecar is None or {"precision", "onnx.path", "options.version_compatible"} & {*sidecar.missing()}:
        return  # it does not load, and `check_sidecar` says why
    checks: Mapping[str, GraphCheck] = {}
    proof = sidecar.proof
    if bundle.manifest.exists():
        checks, judge = read_facts(bundle).checks, judged_by(bundle)
        proof = proof if proof is not None and proof.judge == judge else None
    reason = doubt(sidecar.precision, sidecar.onnx.path, proof, checks, lowered=sidecar.options.tf32)
    if reason:
        raise BuildError(f"{plan}: {reason}", fix=f"python -m vit_convert.engine verify {bundle.root}")
