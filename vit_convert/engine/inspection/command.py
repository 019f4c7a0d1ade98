"""`python -m vit_convert.engine inspect`: what each TensorRT will make of a graph, before hours of building."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from vit_convert.core.bundle import Bundle
from vit_convert.core.config import check_values
from vit_convert.core.dialect import DIALECTS
from vit_convert.core.errors import BuildError, ConvertError, UnbuildableError, UsageError, nearest
from vit_convert.core.overrides import apply_overrides
from vit_convert.core.presets import preset_named
from vit_convert.core.progress import human_bytes
from vit_convert.core.text_length import sides_of
from vit_convert.core.text_table import text_table
from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.builder.network import parse_graph, refused_nodes
from vit_convert.engine.handoff import open_bundle, read_config, read_facts
from vit_convert.engine.inspection.dla import dla_refusals
from vit_convert.engine.inspection.estimate import Memory, estimate
from vit_convert.engine.inspection.findings import REFUSED, Finding, findings
from vit_convert.engine.inspection.fusions import Fusion, fusions
from vit_convert.engine.inspection.onnx_wire import Graph, read_graph
from vit_convert.engine.inspection.trtexec import Asked, Shapes, trtexec_line
from vit_convert.engine.runtime.profiles import batch_profiles

_SHOWN = 3  # maximum number of findings of one kind to print


@dataclasses.dataclass(frozen=True)
class Subject:
    """One graph to look at.

    Attributes:
        path: of its file.
        name: what to call it.
        targets: generations to inspect it for.
        config: for batches and the builder's options.
        sizes: largest sizes of the dimensions that vary.
        shapes: one profile, for trtexec; None if the size of some dimension is unknown.
    """

    path: pathlib.Path
    name: str
    targets: Sequence[str]
    config: ml_collections.ConfigDict
    sizes: Mapping[str, int]
    shapes: Shapes | None


def inspect(
    path: str,
    asked: Sequence[str],
    precisions: Sequence[str],
    config: ml_collections.ConfigDict,
    overrides: Sequence[str] = (),
) -> None:
    """Prints findings about a bundle's graphs, or about one file.

    Args:
        path: a bundle's folder, or an ONNX file.
        asked: generations; empty: a bundle's own, or all four for a file.
        precisions: to be built by TensorRT 8.6 with builder flags.
        config: for a file, which has none of its own.
        overrides: of a bundle's config: "engine.preset=jetson_orin".

    Raises:
        UsageError: an unknown generation, or a path that is neither.
        BuildError: some generation will not build a node.
    """
    for name in asked:
        if name not in DIALECTS:
            raise UsageError(f"--for={name}: not one of {', '.join(DIALECTS)}.{nearest(name, DIALECTS)}")
    if not os.path.exists(path):
        raise UsageError(f"{path}: there is no such file or folder", fix="Give an ONNX file or a bundle.")
    if os.path.isdir(path):
        subjects = _of_bundle(path, asked, overrides)
    else:
        subjects = [_of_file(path, asked or [*DIALECTS], config)]
    refused: list[str] = []
    for subject in subjects:
        graph = read_graph(subject.path)
        require_weights(subject.path, graph)
        print(f"{subject.name}: {precision_of(graph)}, opset {graph.opsets.get('')}, {len(graph.nodes)} nodes")
        for target in subject.targets:
            refused += _report(subject, graph, target, precisions)
        print()
    if refused:
        more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise BuildError(f"{refused[0]}{more}", fix="What to do is said with each above.")


def require_weights(path: pathlib.Path, graph: Graph) -> None:
    """Refuses a graph whose weights lie in a file that is not there.

    Raises:
        BuildError: see above.
    """
    missing = sorted(name for name in graph.files if not (path.parent / name).is_file())
    if missing:
        raise BuildError(
            f"{path}: its weights lie in {', '.join(missing)}, which is not beside it",
            fix="Copy it to the same folder.",
        )


def precision_of(graph: Graph) -> str:
    """The lowest precision that a graph is written in."""
    types = {graph.value(name).dtype for node in graph.nodes for name in node.outputs}
    rows = {"fp8": "float8_e4m3fn", "int8": "int8", "bf16": "bfloat16", "fp16": "float16"}
    return next((name for name, dtype in rows.items() if dtype in types), "fp32")


def _of_file(path: str, targets: Sequence[str], config: ml_collections.ConfigDict) -> Subject:
    graph, batch = read_graph(path), config.batch
    sizes: dict[str, int] = {}
    shapes: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] | None = {}
    for name in graph.inputs:
        shape = graph.value(name).shape
        if shape is None:
            shapes = None
        first, *rest = shape or (1,)
        sides = [side for side in rest if isinstance(side, int)]
        if isinstance(first, str):
            sizes[first] = batch.max
        if len(sides) < len(rest):
            shapes = None
        elif shapes is not None and isinstance(first, str):
            shapes[name] = ([batch.min, *sides], [batch.opt, *sides], [batch.max, *sides])
    return Subject(pathlib.Path(path), os.path.basename(path), targets, config, sizes, shapes)


def _of_bundle(path: str, asked: Sequence[str], overrides: Sequence[str]) -> list[Subject]:
    bundle = open_bundle(path)
    facts, config = read_facts(bundle), apply_overrides(read_config(bundle), overrides)
    check_values(config)
    targets, image = list(asked or [facts.dialect.name]), facts.image_size
    profiles = batch_profiles(facts.signature.inputs, image, config.batch)
    shapes: Any = profiles[-1] if any(isinstance(s, str) for t in facts.signature.inputs for s in t.shape) else {}
    sizes = sides_of(image, "largest")
    if isinstance(batch := facts.signature.inputs[0].shape[0], str):
        sizes[batch] = config.batch.max
    found = []
    for graph in _graphs(bundle):
        name = graph.relative_to(bundle.root).as_posix()
        own = [facts.dialect.name] if graph.parent == bundle.lowerings else targets
        found.append(Subject(graph, name, own, config, sizes, shapes))
    return found


def _graphs(bundle: Bundle) -> Iterator[pathlib.Path]:
    yield bundle.onnx()
    yield from sorted(path for path in bundle.root.glob("model.*.onnx"))
    yield from sorted(bundle.lowerings.glob("*.onnx"))


def _report(subject: Subject, graph: Graph, target: str, precisions: Sequence[str]) -> list[str]:
    """Prints one graph for one generation; returns what will not build, in words."""
    written = precision_of(graph)
    half = DIALECTS[target].precision_by_flag and written == "fp32" and "fp16" in precisions
    found, built = findings(graph, target), "fp16" if half else written
    refused = [row for row in found if row.what == REFUSED]
    parser, accepted = parser_says(subject.path, target)
    count = f"{len(refused)} nodes or values" if len(refused) > 1 else "1 node or value"
    verdict = f"{count} will not build" if refused else "no obstacle found"
    print(f"  {target}{', as fp16 by a flag' if half else ''}: {verdict}; {parser}")
    for row in _few(found):
        print(f"    {row}")
    places = fusions(graph, target, half=half)
    for line in _fusion_lines(places):
        print(f"    {line}")
    preset = subject.config.engine.preset
    if preset and preset_named(preset).dla:
        print(f"    DLA: not used: {dla_refusals(graph) or 'a build of ours is for the GPU'}")
    memory = estimate(graph, subject.sizes, half=half)
    workspace = round(subject.config.engine.workspace_gib * 2**30)
    rows = [
        ["weights in the engine", human_bytes(memory.weights)],
        [f"values at batch {subject.config.batch.max}, at most (less after fusion)", human_bytes(memory.activations)],
        [f"largest of them, {memory.largest_name}", human_bytes(memory.largest)],
        [
            f"workspace that a layer may take (engine.workspace_gib), {_verdict(memory, workspace)}",
            human_bytes(workspace),
        ],
        ["host memory while it is built, about", human_bytes(memory.building)],
    ]
    print("\n".join(f"    {line}" for line in text_table(("estimated", ""), rows).splitlines()))
    if subject.shapes is None:
        print("    no trtexec line: the sizes of the input's dimensions are unknown")
    else:
        engine = subject.config.engine
        options = {key: engine[key] for key in ("workspace_gib", "opt_level", "tf32")}
        options |= {key: engine[key] for key in ("version_compatible", "hardware_compatible")}
        print(f"    {trtexec_line(target, subject.path.name, subject.shapes, Asked(built, **options))}")
    words = [f"{subject.name} for {target}: {row.where}: {row.why}" for row in refused]
    return words or ([] if accepted is not False else [f"{subject.name} for {target}: {parser}"])


def _verdict(memory: Memory, workspace: int) -> str:
    return "less than that: kernels may be left out" if workspace < memory.largest else "enough for that"


def parser_says(path: pathlib.Path, target: str) -> tuple[str, bool | None]:
    """The answer of the parser itself, if this generation is installed and runs here.

    Returns:
        The answer in words, and whether it reads the graph; None if it was not asked.
    """
    name = "rtx" if target == "rtx" else "tensorrt"
    try:
        backend = load_backend(name)
    except ConvertError as e:
        return f"its parser was not asked ({e})", None
    if backend.dialect.name != target:
        return f"its parser was not asked ({backend.module.__name__} {backend.version} is installed)", None
    here = f"{backend.module.__name__} {backend.version}"
    try:
        with backend.logger.listening(None):
            builder = backend.module.Builder(backend.logger)
            parse_graph(backend, builder, path, strongly_typed=backend.strongly_typed)
    except UnbuildableError as e:
        with backend.logger.listening(None):
            nodes = refused_nodes(backend, builder, path)
        more = f"; in all it does not support {', '.join(nodes)}" if len(nodes) > 1 else ""
        return f"{here} refuses it: {e}{more}", False
    except BuildError as e:
        return f"{here} refuses it: {e}", False
    return f"{here} reads it", True


def _few(found: Sequence[Finding]) -> Iterator[str]:
    """Findings in words, grouped by reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in found:
        groups.setdefault((row.what, f"{row.op}: {row.why}" if row.op else row.why, row.fix), []).append(row.where)
    for (what, why, fix), where in groups.items():
        names = ", ".join(where[:_SHOWN]) + (f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else "")
        yield f"{what}: {why}: {names}{f'. {fix}' if fix else ''}"


def _fusion_lines(places: Sequence[Fusion]) -> Iterator[str]:
    for kind in dict.fromkeys(place.kind for place in places):
        rows = [place for place in places if place.kind == kind]
        whys = dict.fromkeys(place.why for place in rows if not place.fused)
        count = sum(place.fused for place in rows)
        yield f"{kind}: {count} of {len(rows)} expected to fuse" + "".join(f"; not: {why}" for why in whys)
