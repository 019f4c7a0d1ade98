"""A session with a fallback: TensorRT while it works, otherwise onnxruntime on the checked graph."""

import contextlib
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.config import QUANTIZED
from vit_convert.core.errors import BenchmarkError, BuildError, ConvertError
from vit_convert.core.ort_options import PROVIDERS, session_options
from vit_convert.core.proof import UNQUANTIZED, doubt
from vit_convert.core.text_length import wrong_lengths
from vit_convert.engine.backend.trt import Backend, load_backend
from vit_convert.engine.bundle_engines import find_plan, open_engine, require_model, require_proof
from vit_convert.engine.handoff import open_bundle, read_facts
from vit_convert.engine.runtime.session import Session
from vit_convert.serve.fitting import fitting_inputs

PREFERRED = (*UNQUANTIZED, *QUANTIZED)  # a quantized engine is not preferred unless measured to be faster


class _Runner(Protocol):
    def run(self, inputs: Any) -> dict[str, Any]: ...

    def close(self) -> None: ...


class FallbackSession:
    """Runs a converted model on whatever works here; several threads may share it.

    Args:
        bundle: of the conversion, or its folder.
        plan_path: the engine to prefer; None for the one that the benchmark on this host recommends, or else the first
            verified one in the order of `PREFERRED`.
        backend: "tensorrt", "rtx" or "auto".

    Attributes:
        runs_on: "tensorrt", "rtx" or "onnxruntime".
        reason: why the engine is not used; otherwise "".

    Raises:
        UsageError: the folder is not a bundle, or a pair of towers.
        BenchmarkError: neither the engine nor the graph can be run.

    Example, on a host without a GPU:
        >>> with vit_convert.Session("out/tiny") as session:
        ...     session.run(images)["logits"].shape, session.runs_on
        ((4, 10), 'onnxruntime')
    """

    def __init__(
        self,
        bundle: Bundle | str | os.PathLike[str],
        plan_path: str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
    ):
        self._bundle = bundle = bundle if isinstance(bundle, Bundle) else open_bundle(os.fspath(bundle))
        self.reason = ""
        self._lock = threading.Lock()  # protects the choice of the runner, not its runs
        self._runner: _Runner | None
        what = "is not proved"
        try:
            if plan_path is None:
                what = "is not there"
                plan = _best_plan(load_backend(backend, for_this_gpu=True), bundle)
            else:
                plan = pathlib.Path(plan_path)
                require_proof(bundle, plan)
            what = "does not load"
            loaded = load_backend(backend, for_this_gpu=True)
            require_model(bundle, plan)  # both must run the same weights
            self._runner, self.runs_on = Session(open_engine(loaded, bundle, plan)), loaded.name
        except ConvertError as e:
            self._runner = self._stand_in(e, what)

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        """Runs a batch; if the engine fails, this batch and all later ones run on onnxruntime.

        Args:
            inputs: an array of the graph's input type and layout, [batch, ...]; {input: array} if it has several
                inputs.

        Returns:
            {output: array [batch, ...]}.

        Raises:
            BenchmarkError: the inputs do not fit the model, onnxruntime fails as well, or the session is closed.
        """
        runner = self._open_runner()
        if not isinstance(runner, Session):
            return runner.run(inputs)
        runner.require_inputs(inputs)  # a caller's mistake is no reason to abandon the GPU
        try:
            return runner.run(inputs)
        except ConvertError as e:
            self._replace(runner, e)
            del runner
        # not above, where the error's traceback would keep the engine in GPU memory
        return self._open_runner().run(inputs)

    def close(self) -> None:
        """Releases all memory, including the engine's; the session cannot be used any more."""
        with self._lock:
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def __enter__(self) -> "FallbackSession":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open_runner(self) -> _Runner:
        runner = self._runner
        if runner is None:
            raise BenchmarkError(f"{self._bundle.root}: the session is closed", fix="Make a new one.")
        return runner

    def _replace(self, broken: Session, error: ConvertError) -> None:
        with self._lock:
            # another thread's failure or `close` closed it during this call
            if self._runner is not broken:
                return
            self._runner = self._stand_in(error, "failed in a run")
        with contextlib.suppress(ConvertError):  # a failing GPU may not even accept the release of its memory
            broken.close()

    def _stand_in(self, error: ConvertError, what: str) -> _Runner:
        reason = f"engine {what}: {error}"
        try:
            runner = _OnnxRunner(self._bundle)
        except ConvertError as e:
            raise BenchmarkError(f"{e}; {reason}", fix=e.fix) from e
        self.reason, self.runs_on = reason, "onnxruntime"
        logging.warning("%s; using onnxruntime instead", self.reason)
        return runner


def _best_plan(backend: Backend, bundle: Bundle) -> pathlib.Path:
    """The engine to run on this host.

    Raises:
        BuildError: none was verified.
    """
    recommended = ((read_json(bundle.benchmark) or {}).get("recommended") or {}).get("precision")
    refusals = []
    for precision in dict.fromkeys([*([recommended] if recommended else []), *PREFERRED]):
        plan = find_plan(backend, bundle, precision)
        if not plan.is_file():
            continue
        try:
            require_proof(bundle, plan)
        except ConvertError as e:
            refusals.append(str(e))
        else:
            return plan
    raise BuildError(
        "; ".join(refusals) or f"{bundle.root}: no engine for {backend.name} {backend.version} on this host",
        fix=f"python -m vit_convert.engine {bundle.root}",
    )


class _OnnxRunner:
    """The bundle's fp32 graph under onnxruntime, if its check against JAX passed."""

    def __init__(self, bundle: Bundle):
        facts = read_facts(bundle)
        if reason := doubt("fp32", bundle.onnx().name, None, facts.checks):
            raise BenchmarkError(
                f"{bundle.root}: {reason}, so nothing can stand in for the engine", fix="Convert again."
            )
        if wrong := facts.files.wrong_graph(bundle.onnx()):
            raise BenchmarkError(
                f"{wrong}, so nothing can stand in for the engine", fix="Copy the whole bundle from the export host."
            )
        try:
            import onnxruntime
        except ImportError as e:
            raise BenchmarkError(
                "onnxruntime is not installed, so nothing can stand in for the engine", fix="pip install onnxruntime"
            ) from e
        self._path, self._sizes = pathlib.Path(bundle.onnx()), facts.image_size
        available = onnxruntime.get_available_providers()
        self._session = _load(onnxruntime, self._path, [name for name in PROVIDERS if name in available])
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        try:
            feeds = fitting_inputs(inputs, self._session.get_inputs())
            if wrong := wrong_lengths(self._sizes, feeds):
                raise BenchmarkError(wrong, fix="Cut or pad the texts, or convert with another text_length.")
            values = self._session.run(None, feeds)
        except BenchmarkError:
            raise
        except Exception as e:  # onnxruntime's classes have no common base of their own
            raise BenchmarkError(
                f"{self._path.name}: onnxruntime: {e}", fix="Preprocess the images as the bundle's record says."
            ) from e
        return dict(zip(self._names, values))

    def close(self) -> None:
        pass  # onnxruntime frees with the last reference


def _load(onnxruntime: Any, path: pathlib.Path, providers: Sequence[str]) -> Any:
    try:
        given = [(name, PROVIDERS[name]) for name in providers]
        return onnxruntime.InferenceSession(path, session_options(onnxruntime), providers=given)
    except Exception as e:
        if len(providers) == 1:
            raise BenchmarkError(f"{path}: onnxruntime: {e}", fix="Copy the whole bundle from the export host.") from e
        logging.warning("onnxruntime: %s: %s; continuing without it", providers[0], e)
    return _load(onnxruntime, path, providers[1:])  # whatever stopped the engine may also stop onnxruntime on the GPU
