"""What a bundle offers to a server: its signature, its proved engines, their benchmark, and real samples."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.config import QUANTIZED
from vit_convert.core.errors import BuildError, ConvertError, UsageError
from vit_convert.core.manifest import Manifest
from vit_convert.core.proof import UNQUANTIZED, doubt
from vit_convert.core.signature import Signature
from vit_convert.engine.backend.sidecar import Sidecar, read_sidecar
from vit_convert.engine.bundle_engines import require_conversion, require_proof
from vit_convert.engine.handoff import Facts, open_bundle, read_config, read_facts

Profiles = Sequence[
    Mapping[str, Sequence[Sequence[int]]]
]  # for each profile, by input, the smallest, optimal and largest shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """An engine of TensorRT that Triton can load.

    Attributes:
        path: of the plan.
        precision: of the engine.
        version: of the TensorRT that built it.
        archs: on which it runs: ("sm90",).
        portable: whether it runs on Ampere and every later GPU.
        profiles: in the plan's order.
        record: its sidecar; None if it has none.
    """

    path: pathlib.Path
    precision: str
    version: str
    archs: tuple[str, ...]
    portable: bool
    profiles: Profiles
    record: Sidecar | None

    def batches(self, place: int) -> list[int]:
        """By profile, the smallest (0), optimal (1) or largest (2) batch."""
        return [next(iter(profile.values()))[place][0] for profile in self.profiles]


@dataclasses.dataclass(frozen=True)
class Offered:
    """What is known about one bundle.

    Attributes:
        bundle: where its files lie.
        facts: of the conversion.
        signature: of its graphs.
        plans: engines of one precision and one TensorRT, one for each architecture; empty if none is proved.
        why_no_plan: why `plans` is empty; otherwise "".
        benchmark: the content of `benchmark.json`, if measured on these graphs; otherwise {}.
        max_batch: the largest batch for which the graphs were made.
        samples: for each input, some real values [samples, …].
        expected: for each output, JAX's values for them.
    """

    bundle: Bundle
    facts: Facts
    signature: Signature
    plans: Sequence[Plan]
    why_no_plan: str
    benchmark: Mapping[str, Any]
    max_batch: int
    samples: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]


def read_offered(path: str | os.PathLike[str], precision: str = "") -> Offered:
    """Reads a bundle.

    Args:
        path: its folder.
        precision: of the engine to serve; "" for the one that the benchmark recommends, or else the first proved one.

    Raises:
        UsageError: it is not a bundle, or not finished.
        BuildError: no engine of the requested precision is proved, or the reference is not the conversion's.
    """
    bundle = open_bundle(os.fspath(path))
    facts, config = read_facts(bundle), read_config(bundle)
    if wrong := facts.files.wrong(bundle.reference):
        raise BuildError(
            f"{wrong}, so nothing can be proved of what is served", fix="Copy the whole bundle from the export host."
        )
    benchmark = read_json(bundle.benchmark) or {}
    if benchmark.get("onnx") != Manifest.read(bundle).files.graph_hashes(bundle.onnx()):
        benchmark = {}
    plans, why = _plans(bundle, precision, benchmark)
    with np.load(bundle.reference) as file:
        known = {name: file[name] for name in file.files}
    samples = {tensor.name: known[tensor.name] for tensor in facts.signature.inputs}
    expected = {output.name: known[output.name] for output in facts.signature.outputs}
    return Offered(bundle, facts, facts.signature, plans, why, benchmark, config.batch.max, samples, expected)


def require_graph(offered: Offered, precision: str) -> pathlib.Path:
    """A precision's graph, if onnxruntime may serve it.

    Raises:
        BuildError: it is missing or changed, did not pass its check, or onnxruntime would compute it differently.
    """
    bundle, facts = offered.bundle, offered.facts
    if precision in QUANTIZED:
        raise BuildError(
            f"{bundle.onnx(precision)}: onnxruntime's {precision} kernels saturate on some processors",
            fix="Serve fp32 or fp16 with onnxruntime, or an engine.",
        )
    path = bundle.onnx(precision)
    if reason := doubt(precision, path.name, None, facts.checks):
        raise BuildError(f"{bundle.root}: {reason}", fix=f"Convert with {precision} in config.precision.")
    if wrong := facts.files.wrong_graph(path):
        raise BuildError(wrong, fix="Copy the whole bundle from the export host.")
    return path


def _plans(bundle: Bundle, precision: str, benchmark: Mapping[str, Any]) -> tuple[Sequence[Plan], str]:
    recommended = (benchmark.get("recommended") or {}).get("precision")
    order = [precision] if precision else [*([recommended] if recommended else []), *UNQUANTIZED, *QUANTIZED]
    refusals: list[str] = []
    for name in dict.fromkeys(order):
        found = [_plan(path) for path in sorted(bundle.root.glob(f"engines/tensorrt-*/{name}.plan"))]
        proved = [plan for plan in found if _is_proved(bundle, plan, refusals)]
        if proved:
            newest = max((plan.version for plan in proved), key=_version)
            return [plan for plan in proved if plan.version == newest], ""
    others = sorted(
        {
            path.parent.name
            for path in bundle.root.glob("engines/*/*.plan")
            if not path.parent.name.startswith("tensorrt-")
        }
    )
    why = "; ".join(refusals) or f"{bundle.root} has no{f' {precision}' if precision else ''} engine of TensorRT"
    return [], why + (f" ({', '.join(others)}: Triton has no backend for these)" if others else "")


def _plan(path: pathlib.Path) -> Plan:
    sidecar = read_sidecar(path)
    if sidecar is None:
        return Plan(path, path.stem, "", (), False, (), None)
    return Plan(
        path,
        sidecar.precision or path.stem,
        sidecar.version,
        sidecar.targets,
        bool(sidecar.options.hardware_compatible),
        sidecar.profiles,
        sidecar,
    )


def _is_proved(bundle: Bundle, plan: Plan, refusals: list[str]) -> bool:
    try:
        require_conversion(bundle, plan.path)
        require_proof(bundle, plan.path)
        if not plan.archs or not plan.profiles or not plan.version:
            raise BuildError(f"{plan.path}: its sidecar does not say where it runs, or what it takes")
    except ConvertError as e:
        refusals.append(str(e))
        return False
    return True


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def class_names(offered: Offered, path: str) -> list[str]:
    """A name for each class: the lines of a file, or without one the classes' numbers.

    Args:
        offered: of the bundle.
        path: of the file; "" for none.

    Returns:
        The names; [] for a model without classes.

    Raises:
        UsageError: it cannot be read, or has another number of lines.
    """
    classes = offered.signature.classes
    if classes is None:
        if path:
            raise UsageError(
                f"--labels={path}: {offered.bundle.root} gives no classes, but {classes_of(offered)}",
                fix="Leave it out.",
            )
        return []
    count = int(offered.expected[classes.name].shape[-1])
    if not path:
        return [str(number) for number in range(count)]
    try:
        names = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(
            f"--labels={path}: cannot be read ({e})",
            fix="Give a text file, one name a line, in the order of the classes.",
        ) from e
    if len(names) != count:
        raise UsageError(
            f"--labels={path}: {len(names)} lines, the model has {count} classes",
            fix="One name a line, in their order.",
        )
    return names


def classes_of(offered: Offered) -> str:
    """The names of the outputs, for a message."""
    return ", ".join(output.name for output in offered.signature.outputs)
