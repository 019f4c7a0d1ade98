"""What a model loses when only one part of it is quantized, measured in one onnxruntime session and saved along the
way.

The session's graph holds a Q/DQ pair at every candidate and a switch after each pair, so that one run can quantize any
set of parts, with the same results as a graph of its own: what is not quantized is typed as in the pipeline.
"""

import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from vit_convert.core.bundle import read_json, write_json
from vit_convert.core.compare import compare, top1_accuracy
from vit_convert.core.errors import CheckError
from vit_convert.core.onnx_file import Batch, feeds_of, open_session, run_session, save_onnx
from vit_convert.core.progress import Progress
from vit_convert.core.record import RecordError
from vit_convert.core.sensitivity_record import DescribedUnit, Measured, SensitivityRecord
from vit_convert.images.decode import pick
from vit_convert.quantize.activations import Normalize
from vit_convert.quantize.calibrate import Calibration
from vit_convert.quantize.graph import DEQUANTIZED, initializer
from vit_convert.quantize.placement import Patterns, Site, place
from vit_convert.quantize.qdq import quantize

SCAN_IMAGES = 16  # images on which each unit is measured alone: enough to rank them
_WORST = 8  # images of each judgement on which the next set is tried first
SWITCHES = "quantized"  # name of the switched graph's second input
# TensorRT merges these three only if they have the same precision
_GROUPS = {"query": "qkv", "key": "qkv", "value": "qkv"}


@dataclasses.dataclass(frozen=True)
class Unit:
    """Sites that are quantized together or not at all.

    Attributes:
        block: "block_03".
        kind: qkv, out, fc1, fc2 or attention (both products).
        sites: of the placement.
        num_weights: number of weights quantized with it.
    """

    block: str
    kind: str
    sites: tuple[Site, ...]
    num_weights: int

    @property
    def name(self) -> str:
        """ "block_03/fc2"."""
        return f"{self.block}/{self.kind}"


def candidates(model: ir.Model, patterns: Patterns, *, attention: bool) -> list[Unit]:
    """Lists what could be quantized.

    Args:
        model: the fp32 graph.
        patterns: of what must not be quantized, or of all that may be.
        attention: include the attention products.

    Returns:
        The units, in graph order. A projection is listed with the tensor that it reads when its attention is not
        quantized.
    """
    sites = list(place(model, **patterns).sites)
    if attention:
        sites += [site for site in place(model, attention=True, **patterns).sites if site.weight is None]
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        kind = _GROUPS.get(site.kind, site.kind) if site.weight else "attention"
        groups.setdefault((site.block, kind), []).append(site)
    sizes = {
        name: value.const_value.size
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    return [Unit(*key, tuple(group), sum(sizes[s.weight] for s in group if s.weight)) for key, group in groups.items()]


def switched(
    model: ir.Model, calibration: Calibration, units: Sequence[Unit], *, target: str, precision: str
) -> ir.Model:
    """Makes a graph whose second input selects the units to quantize.

    Args:
        model: the fp32 graph; left as it is.
        calibration: ranges for every unit's tensors.
        units: from `candidates`.
        target: as for `qdq.quantize`.
        precision: int8 or fp8.

    Returns:
        The graph, which contains each weight twice. Input `quantized`: bool [units].
    """
    plain = {v.name: v for v in model.graph.initializers.values()}
    sites = [site for unit in units for site in unit.sites]
    model = quantize(model, calibration, sites, target=target, precision=precision, shift_biases=False)
    graph = model.graph
    producers = {v.name: node for node in graph for v in node.outputs}
    values = {v.name: v for node in graph for v in node.outputs} | {
        v.name: v for v in (*graph.inputs, *graph.initializers.values())
    }
    switches = ir.Value(name=SWITCHES, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([len(units)]))
    graph.inputs.append(switches)
    for number, unit in enumerate(units):
        index = initializer(graph, ir.tensor(np.array(number, np.int64), name=f"{SWITCHES}/{number}"))
        on = ir.node("Gather", [switches, index], {"axis": 0})
        graph.insert_before(graph[0], on)
        chosen: dict[str, ir.Value] = {}
        for site in unit.sites:
            node = producers[site.node]
            for name in filter(None, (site.tensor, site.weight)):
                dequantized = values[f"{name}{DEQUANTIZED}"]
                if dequantized not in node.inputs:  # an attention's projection, which reads after a reordering
                    continue
                if name not in values:
                    tensor = plain[name].const_value
                    assert tensor is not None
                    values[name] = initializer(graph, tensor)
                if name not in chosen:
                    where = ir.node("Where", [on.outputs[0], dequantized, values[name]])
                    where.outputs[0].type, where.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), dequantized.shape
                    graph.insert_after(producers[dequantized.name], where)
                    chosen[name] = where.outputs[0]
                node.replace_input_with(node.inputs.index(dequantized), chosen[name])
    return model


def _hash_images(images: np.ndarray, labels: np.ndarray | None) -> str:
    digest = hashlib.sha256(str(images.shape).encode())
    for image in images:
        digest.update(np.ascontiguousarray(image).data)
    digest.update(b"" if labels is None else np.asarray(labels, np.int64).tobytes())
    return digest.hexdigest()


class Sensitivity:
    """Measures sets of units, each once: results are kept in a file from one process to the next.

    Args:
        path: `sensitivity.json`; a file for another graph, calibration, precision or set of images is started anew.
        onnx_path: the fp32 graph.
        calibration: ranges for every unit's tensors.
        units: from `candidates`.
        images: uint8 [images, height, width, 3].
        labels: [images] class ids, or None.
        normalize: maps a batch of `images` to the graph's input.
        target: as for `qdq.quantize`.
        precision: int8 or fp8.
        rest: precision of what is not quantized, "fp16" or "fp32".
        lower: types the fp32 graph, with or without pairs, for `rest`.
        source: of the images, for people.
        batch_size: images per run.
        scan_images: maximum number of images for `measure`; `judge` uses all.
        depends_on: what else the results depend on, as plain JSON values.
        known: another such file, which is only read, if `path` does not hold fitting results.
        progress: shows the bar.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        onnx_path: str | os.PathLike[str],
        calibration: Calibration,
        units: Sequence[Unit],
        images: np.ndarray,
        labels: np.ndarray | None,
        normalize: Normalize,
        *,
        target: str,
        precision: str,
        rest: str,
        lower: Callable[[ir.Model], ir.Model],
        source: str,
        batch_size: int = 32,
        scan_images: int = SCAN_IMAGES,
        depends_on: Any = None,
        known: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ):
        self.units = list(units)
        self.calibration = calibration
        self._path, self._onnx_path, self._lower = path, pathlib.Path(onnx_path), lower
        self._images, self._labels, self._normalize = images, labels, normalize
        self._target, self._precision, self._batch_size = target, precision, batch_size
        self._progress = progress or Progress(quiet=True)
        self._session: Any = None
        self._worst = np.zeros(0, np.int64)  # indices of images
        self._fp32: np.ndarray | None = None
        key = {
            **calibration.keys,
            "target": target,
            "thresholds": calibration.thresholds,
            "shifts": {name: dataclasses.asdict(shift) for name, shift in calibration.shifts.items()},
            "images": len(images),
            "source": source,
        }
        key |= {"judged_on": _hash_images(images, labels), "depends_on": depends_on}
        self.record = SensitivityRecord(
            precision=precision,
            rest=rest,
            source=source,
            num_images=len(images),
            scan_images=min(len(images), scan_images),
            labelled=labels is not None,
            key=key,
            units={
                unit.name: DescribedUnit(sites=tuple(s.name for s in unit.sites), num_weights=unit.num_weights)
                for unit in units
            },
            measured=(),
            judged=(),
        )
        for saved in (_saved(file) for file in (known, path) if file is not None):
            if saved is not None and self.record.same_case(saved):
                self.record = saved
        self._known, self._judged = _by_set(self.record.measured), _by_set(self.record.judged)

    def measure(self, names: Collection[str]) -> Measured:
        """Measures a set of units on some of the images, unless that was done already; used to rank sets.

        Args:
            names: of units; empty for the fp32 graph.

        Returns:
            The Measured.

        Raises:
            CheckError: an output is not finite.
        """
        wanted = frozenset(names)
        if wanted not in self._known:
            result = self._known[wanted] = self._run(wanted)
            self._keep(dataclasses.replace(self.record, measured=(*self.record.measured, result)))
        return self._known[wanted]

    def judge(self, names: Collection[str]) -> Measured:
        """The same on all images; used to judge a budget."""
        wanted = frozenset(names)
        if self.record.scan_images == len(self._images):
            return self.measure(wanted)
        if wanted not in self._judged:
            result = self._judged[wanted] = self._run(wanted, np.arange(len(self._images)))
            self._keep(dataclasses.replace(self.record, judged=(*self.record.judged, result)))
        return self._judged[wanted]

    def _keep(self, record: SensitivityRecord) -> None:
        self.record = record
        write_json(self._path, record.to_dict())

    def glimpse(self, names: Collection[str]) -> Measured:
        """The same on the images that lost most in `judge` so far, without saving it: a set that misses there need not
        be judged."""
        if not len(self._worst):
            return self.measure(names)
        return self._run(frozenset(names), self._worst)

    def alone(self) -> dict[str, Measured]:
        """The results for single units so far, by their names."""
        return {
            unit.name: self._known[frozenset([unit.name])]
            for unit in self.units
            if frozenset([unit.name]) in self._known
        }

    def scan(self) -> list[Measured]:
        """Measures the graph with nothing quantized, each unit, each block as a whole, and everything, in this order; a
        block of one unit is measured once."""
        by_block: dict[str, list[str]] = {}
        for unit in self.units:
            by_block.setdefault(unit.block, []).append(unit.name)
        sets = [[], *([unit.name] for unit in self.units), *by_block.values(), [unit.name for unit in self.units]]
        results = []
        with self._progress.bar(f"{self._precision} sensitivity", total=len(sets)) as advance:
            for names in sets:
                results.append(self.measure(names))
                advance(1)
        return results

    def _run(self, wanted: frozenset[str], chosen: Any = None) -> Measured:
        """Runs a set on these images (an index of `images`), by default on those of the scan."""
        chosen = pick(len(self._images), self.record.scan_images) if chosen is None else chosen
        if self._fp32 is None:
            self._fp32 = self._outputs(open_session(self._onnx_path), self._images, {})
        labels = None if self._labels is None else self._labels[chosen]
        if not wanted:
            return self._compare(wanted, self._fp32[chosen], self._fp32[chosen], labels)
        switches = {SWITCHES: np.array([unit.name in wanted for unit in self.units])}
        if self._session is None and len(wanted) == len(self.units):  # a graph of its own, with each weight once
            session, switches = self._open(switch=False), {}
        else:
            session = self._session = self._session or self._open(switch=True)
        outputs, fp32 = self._outputs(session, self._images[chosen], switches), self._fp32[chosen]
        if len(chosen) == len(self._images):
            cosines = [compare(expected[None], got[None]).cosine for expected, got in zip(fp32, outputs)]
            self._worst = np.union1d(self._worst, np.argsort(cosines, kind="stable")[:_WORST])
        return self._compare(wanted, outputs, fp32, labels)

    def _outputs(self, session: Any, images: np.ndarray, switches: Mapping[str, np.ndarray]) -> np.ndarray:
        output = session.get_outputs()[0].name
        found = [run_session(session, {**feeds_of(session, batch), **switches}) for batch in self._batches(images)]
        return np.concatenate([values[output] for values in found])

    def _open(self, *, switch: bool) -> Any:
        """A session that quantizes what its switches say, or everything."""
        model, kind = ir.load(self._onnx_path), {"target": self._target, "precision": self._precision}
        if switch:
            model = switched(model, self.calibration, self.units, **kind)
        else:
            sites = [site for unit in self.units for site in unit.sites]
            model = quantize(model, self.calibration, sites, shift_biases=False, **kind)
        with tempfile.TemporaryDirectory(prefix=".switched.", suffix=".tmp", dir=self._onnx_path.parent) as folder:
            path = pathlib.Path(folder) / "switched.onnx"
            save_onnx(self._lower(model), path)
            return open_session(path)

    def _batches(self, images: np.ndarray) -> Iterator[Batch]:
        for start in range(0, len(images), self._batch_size):
            yield self._normalize(np.asarray(images[start : start + self._batch_size]))

    def _compare(
        self, wanted: frozenset[str], outputs: np.ndarray, fp32: np.ndarray, labels: np.ndarray | None
    ) -> Measured:
        names = tuple(unit.name for unit in self.units if unit.name in wanted)
        whole = compare(fp32, outputs)
        if not whole.finite:
            raise CheckError(
                f"{', '.join(names)} in {self._precision}: the output is NaN or infinite",
                fix="Keep it out with keep_fp16.",
            )
        errors = [1 - compare(expected[None], got[None]).cosine for expected, got in zip(fp32, outputs)]
        top1 = None if labels is None else top1_accuracy(outputs, labels)
        return Measured(
            names, float(np.mean(errors)), whole.cosine, whole.max_rel, top1_accuracy(outputs, fp32.argmax(-1)), top1
        )


def _by_set(rows: Sequence[Measured]) -> dict[frozenset[str], Measured]:
    return {frozenset(row.quantized): row for row in rows}


def _saved(path: str | os.PathLike[str]) -> SensitivityRecord | None:
    """What an earlier process measured; None if there is no file in this version's form."""
    try:
        return SensitivityRecord.from_dict(read_json(path) or {})
    except RecordError:
        return None
