"""Engines built elsewhere, of which only the plan is known: checked by themselves, against each other, and against
their graph."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from vit_convert.core.consistency import Finding, agreement, check_consistency
from vit_convert.core.errors import BenchmarkError, CheckError, UsageError
from vit_convert.core.ort_options import session_options
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.text_table import text_table
from vit_convert.core.tolerance import tolerance_for
from vit_convert.engine.backend.sidecar import Sidecar
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.profiles import largest_batch
from vit_convert.engine.runtime.session import Session
from vit_convert.images.probes import probe_inputs

_NOTHING = {"resize": "bilinear", "antialias": False, "resize_short": 0, "mean": [0.5] * 3, "std": [0.5] * 3}


def verify_foreign(
    backend: Backend, plans: Sequence[str], onnx_path: str, precision: str, config: ml_collections.ConfigDict
) -> None:
    """Checks plans that were not built by our conversions, and prints the results.

    Args:
        backend: the TensorRT that loads them.
        plans: their files; those after the first are compared with it.
        onnx_path: the graph that they were built from, or ""; it runs under onnxruntime.
        precision: of the engines, which selects the tolerance.
        config: `check` holds the tolerances.

    Raises:
        UsageError: a file does not exist.
        BuildError: a plan does not load.
        BenchmarkError: onnxruntime is missing, or does not run the graph.
        CheckError: something does not agree.
    """
    for path in (*plans, *([onnx_path] if onnx_path else [])):
        if not pathlib.Path(path).is_file():
            raise UsageError(f"{path}: there is no such file")
    tolerance = tolerance_for(config, precision, engine=True)
    found: list[tuple[str, Finding]] = []
    first: Mapping[str, np.ndarray] | None = None
    for path in plans:
        record = Sidecar.from_dict({"precision": precision, "options": {"version_compatible": False}})
        with Session(Engine(backend, path, record=record)) as session:
            engine = session.engine
            outputs = [spec.name for spec in engine.outputs]
            probes = probe_inputs(_signature(engine), _NOTHING, _image_size(engine))
            largest = min(4, largest_batch(engine.ranges, (1, *engine.ranges[0].optimal[1:])))
            rows = check_consistency(session.run, probes, outputs, tolerance, largest=largest)
            answers = dict(session.run({name: values[:largest] for name, values in probes.items()}))
        found += [(path, row) for row in rows]
        if first is None:
            first, asked = answers, {name: values[:largest] for name, values in probes.items()}
            if onnx_path:
                exact = _graph(onnx_path, asked, outputs)
                found += [(path, row) for row in agreement("its graph", exact, answers, outputs, tolerance)]
        else:
            found += [(path, row) for row in agreement("the first build", first, answers, outputs, tolerance)]
    _tell(found, str(tolerance))


def _signature(engine: Engine) -> Signature:
    """The signature read from an engine: a 4-D input with three channels is taken for images."""
    optimal = {engine.leading.name: engine.ranges[-1].optimal}
    inputs = []
    for spec in engine.inputs:
        shape = tuple(optimal.get(spec.name, spec.shape)[1:])
        layout = "" if len(shape) != 3 else "NHWC" if shape[-1] == 3 else "NCHW" if shape[0] == 3 else ""
        inputs.append(Tensor(spec.name, spec.dtype.name, ("batch", *shape), layout))
    return Signature(tuple(inputs), tuple(Output(spec.name, spec.dtype.name, ("batch",)) for spec in engine.outputs))


def _image_size(engine: Engine) -> tuple[int, ...]:
    image = _signature(engine).image
    if image is None:
        return ()
    sides = image.shape[1:3] if image.layout == "NHWC" else image.shape[2:4]
    return tuple(side for side in sides if isinstance(side, int))


def _graph(path: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        import onnxruntime
    except ImportError as e:
        raise BenchmarkError("onnxruntime is not installed, to run --onnx", fix="pip install onnxruntime") from e
    try:
        options: Any = session_options(onnxruntime)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return dict(zip(outputs, session.run(list(outputs), dict(inputs))))
    except Exception as e:  # onnxruntime's classes have no common base of their own
        raise BenchmarkError(f"{path}: onnxruntime: {e}", fix="Give the graph that the engine was built from.") from e


def _tell(found: Sequence[tuple[str, Finding]], tolerance: str) -> None:
    rows = []
    for path, row in found:
        verdict = "passed" if row.passed else "FAILED"
        rows.append([path, row.check, row.output, f"{row.max_abs:.2g}", f"{row.cosine:.7f}", verdict])
    print(text_table(("engine", "agrees with", "output", "max abs", "cosine", ""), rows))
    if wrong := [(path, row) for path, row in found if not row.passed]:
        path, row = wrong[0]
        fix = "Build it again; if it still misses, keep more layers in fp32."
        raise CheckError(f"{path}: {row}; needed {tolerance}", fix=fix)
