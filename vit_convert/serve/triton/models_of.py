"""The models of one bundle in a repository: the network itself, and those around it."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vit_convert.core.errors import BuildError
from vit_convert.core.signature import Tensor
from vit_convert.serve.triton import pbtxt
from vit_convert.serve.triton.choices import Batching, batching_fields, for_graph, for_plan, response_cache
from vit_convert.serve.triton.ensembles import ensembles, takes_patches
from vit_convert.serve.triton.models.classifier import BUNDLE
from vit_convert.serve.triton.models.top import LABELS
from vit_convert.serve.triton.offered import Offered, Plan, class_names, require_graph
from vit_convert.serve.triton.parts import Asked, head, known
from vit_convert.serve.triton.pbtxt import Chosen, parameter, quoted
from vit_convert.serve.triton.repository import Content, ModelFolder, shim

CPU_CONFIG = "cpu"


def models_of(offered: Offered, asked: Asked) -> list[ModelFolder]:
    """All models of a bundle, with those that others need first.

    Raises:
        BuildError: the runtime cannot serve it.
        UsageError: the labels do not fit.
    """
    network = _network(offered, asked, class_names(offered, asked.labels))
    inputs = offered.signature.inputs
    if not (takes_patches(offered) or (len(inputs) == 1 and inputs[0].is_image)) or inputs[0].shape[0] != "batch":
        return [network]  # clients prepare its inputs themselves
    return [network, *ensembles(offered, asked)]


def _network(offered: Offered, asked: Asked, names: Sequence[str]) -> ModelFolder:
    runtime = asked.runtime
    if runtime == "auto":
        runtime = "tensorrt" if offered.plans else "onnxruntime"
        if runtime == "onnxruntime" and asked.precision and asked.precision != "fp32":
            raise BuildError(f"--precision={asked.precision}: {offered.why_no_plan}", fix=_build_first(offered))
    beside: dict[str, Content] = {LABELS: "".join(f"{name}\n" for name in names)} if names else {}
    beside |= {f"warmup/{name}": np.ascontiguousarray(values[:1]).tobytes() for name, values in offered.samples.items()}
    if runtime == "python":
        return ModelFolder(
            asked.model, _python(offered, asked, names), asked.version, _bundle_files(offered, asked), {}, beside
        )
    if runtime == "onnxruntime":
        precision = asked.precision or "fp32"
        return ModelFolder(
            asked.model, _onnx(offered, asked, names, precision), asked.version, _graph(offered, precision), {}, beside
        )
    if not offered.plans:
        raise BuildError(f"--runtime=tensorrt: {offered.why_no_plan}", fix=_build_first(offered))
    files: dict[str, Content] = {}
    for plan in offered.plans:  # its sidecar comes along, for --check
        name = _plan_file(offered.plans, plan)
        files |= {name: plan.path, f"{name}.json": plan.path.with_name(f"{plan.path.name}.json")}
    configs = {CPU_CONFIG: _onnx(offered, asked, names, "fp32")}
    return ModelFolder(
        asked.model,
        _tensorrt(offered, asked, names),
        asked.version,
        {**files, **_graph(offered, "fp32")},
        configs,
        beside,
    )


def _build_first(offered: Offered) -> str:
    return f"python -m vit_convert.engine {offered.bundle.root} on the GPU, or --runtime=onnxruntime or python."


def _graph(offered: Offered, precision: str) -> dict[str, Content]:
    path = require_graph(offered, precision)
    data = path.with_name(f"{path.name}.data")
    if not data.exists():
        return {"model.onnx": path}
    # The graph contains the name of the weights' file; a graph of several files must be in a folder of this name.
    return {"model.onnx/model.onnx": path, f"model.onnx/{data.name}": data}


def _bundle_files(offered: Offered, asked: Asked) -> dict[str, Content]:
    """The files that FallbackSession reads from a bundle: no reference, no images and no other graphs."""
    bundle = offered.bundle
    require_graph(offered, "fp32")
    paths = [
        bundle.manifest,
        bundle.config,
        bundle.signature,
        bundle.benchmark,
        bundle.onnx(),
        bundle.onnx().with_name("model.onnx.data"),
    ]
    for plan in sorted(bundle.root.glob("engines/*/*.plan")):
        if not asked.precision or plan.stem == asked.precision:
            paths += [plan, plan.with_name(f"{plan.name}.json")]
    found = {f"{BUNDLE}/{path.relative_to(bundle.root).as_posix()}": path for path in paths if path.exists()}
    return {"model.py": shim("classifier"), **found}


def _tensors(offered: Offered, names: Sequence[str], batching: Batching) -> list[Chosen]:
    batched, classes = bool(batching.max_batch), offered.signature.classes
    found = [pbtxt.tensor("input", tensor, batched=batched) for tensor in offered.signature.inputs]
    for output in offered.signature.outputs:
        labelled = (
            f"label_filename: {quoted(LABELS)}" if names and classes is not None and output.name == classes.name else ""
        )
        found.append(pbtxt.tensor("output", known(offered, output), batched=batched, more=labelled))
    return found


def _warmup(offered: Offered, batches: Mapping[str, int], batching: Batching) -> list[Chosen]:
    if not batching.max_batch:
        return []
    samples = []
    for label, batch in batches.items():
        values = [_sample(offered, tensor) for tensor in offered.signature.inputs]
        samples.append(f"  {{ name: {quoted(label)} batch_size: {batch} {' '.join(values)} }}")
    why = "Until these have run, the model is not ready. The samples are the first inputs of reference.npz, not noise."
    return [Chosen("model_warmup [\n" + ",\n".join(samples) + "\n]", why)]


def _sample(offered: Offered, tensor: Tensor) -> str:
    dims = pbtxt.numbers(offered.samples[tensor.name].shape[1:])
    value = f"data_type: {pbtxt.TYPES[tensor.dtype]} dims: {dims} input_data_file: {quoted(tensor.name)}"
    return f"inputs {{ key: {quoted(tensor.name)} value {{ {value} }} }}"


def _tensorrt(offered: Offered, asked: Asked, names: Sequence[str]) -> str:
    plan = offered.plans[0]
    if min(plan.batches(0)) > 1:
        raise BuildError(
            f"{plan.path}: takes batches from {min(plan.batches(0))}, Triton sends any from 1",
            fix="Build with --config.batch.min=1, or serve it with --runtime=python, which pads.",
        )
    batching = for_plan(offered, plan, asked.delay_us)
    profiles = " ".join(["profile:", f"[ {', '.join(quoted(place) for place in range(len(plan.profiles)))} ]"])
    group = f"instance_group [ {{ count: {batching.instances} kind: KIND_GPU {profiles} }} ]"
    every = (
        f"All {len(plan.profiles)} profiles: each request takes the one whose best batch is nearest."
        if len(plan.profiles) > 1
        else ""
    )
    parts = [
        *head(offered, asked.model, "tensorrt"),
        *_plan_names(offered.plans),
        *_tensors(offered, names, batching),
        *batching_fields(batching),
        Chosen(group, f"{batching.why['instances']} {every}".strip()),
        *_cuda_graphs(offered, batching),
        *_warmup(
            offered, {f"batch_{size}": size for size in sorted({1, *plan.batches(1), batching.max_batch})}, batching
        ),
        *response_cache(offered, wanted=asked.response_cache),
        _latest(),
    ]
    return pbtxt.document(parts)


def _cuda_graphs(offered: Offered, batching: Batching) -> list[Chosen]:
    if any(not isinstance(side, int) for tensor in offered.signature.inputs for side in tensor.shape[1:]):
        return [
            Chosen(
                "optimization { cuda { graphs: false } }",
                "A CUDA graph has one image size or text length, and this engine takes a range.",
            )
        ]
    sizes = sorted({1, *batching.preferred, batching.max_batch})
    specs = " ".join(f"graph_spec {{ batch_size: {size} }}" for size in sizes)
    why = f"Recorded when the model loads, for batch {', '.join(map(str, sizes))}; other sizes run without."
    return [Chosen(f"optimization {{ cuda {{ graphs: true {specs} }} }}", why)]


def _plan_file(plans: Sequence[Plan], plan: Plan) -> str:
    return "model.plan" if len(plans) == 1 else f"model.{plan.archs[0]}.plan"


def _plan_names(plans: Sequence[Plan]) -> list[Chosen]:
    needs = (
        f"Built by TensorRT {plans[0].version} as {plans[0].precision}: the server needs the same, see docs/serving.md."
    )
    if len(plans) == 1:
        where = "Ampere and later" if plans[0].portable else ", ".join(plans[0].archs)
        return [Chosen('default_model_filename: "model.plan"', f"{needs} It runs on {where}.")]
    rows = [f"cc_model_filenames {{ key: {quoted(_capability(arch))} value: {quoted(_plan_file(plans, plan))} }}"
            for plan in plans for arch in plan.archs]  # fmt: skip
    portable = [plan for plan in plans if plan.portable]
    rows += [f"default_model_filename: {quoted(_plan_file(plans, portable[0]))}"] if portable else []
    return [Chosen("\n".join(rows), f"{needs} One plan for each compute capability.")]


def _capability(arch: str) -> str:
    """sm90 is "9.0", sm120 "12.0"."""
    digits = arch.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def _onnx(offered: Offered, asked: Asked, names: Sequence[str], precision: str) -> str:
    batching = for_graph(offered, asked.delay_us)
    graph = f"The graph {offered.bundle.onnx(precision).name}, which passed its check against JAX."
    if not offered.plans:
        graph += f" No engine: {offered.why_no_plan}."
    first, kind = head(offered, asked.model, "onnxruntime"), Chosen("instance_group [ { count: 1 kind: KIND_CPU } ]")
    parts = [
        first[0],
        dataclasses.replace(first[1], why=graph),
        Chosen('default_model_filename: "model.onnx"'),
        *_tensors(offered, names, batching),
        *batching_fields(batching),
        dataclasses.replace(kind, why=batching.why["instances"]),
        *_warmup(offered, {f"batch_{size}": size for size in sorted({1, batching.max_batch})}, batching),
        *response_cache(offered, wanted=asked.response_cache),
        _latest(),
    ]
    return pbtxt.document(parts)


def _python(offered: Offered, asked: Asked, names: Sequence[str]) -> str:
    batching = (
        for_plan(offered, offered.plans[0], asked.delay_us) if offered.plans else for_graph(offered, asked.delay_us)
    )
    why = (
        "One process, as two would load an engine twice. KIND_CPU: Triton gives it no device, it takes the GPU itself."
    )
    retry = (
        "Seconds after a failure of the engine, which onnxruntime answers, until the engine is loaded again; 0: never."
    )
    parts = [
        *head(offered, asked.model, "python"),
        *_tensors(offered, names, batching),
        *batching_fields(dataclasses.replace(batching, instances=1)),
        Chosen("instance_group [ { count: 1 kind: KIND_CPU } ]", why),
        dataclasses.replace(parameter("retry_seconds", 60), why=retry),
        *_warmup(offered, {f"batch_{size}": size for size in sorted({1, batching.max_batch})}, batching),
        *response_cache(offered, wanted=asked.response_cache),
        _latest(),
    ]
    return pbtxt.document(parts)


def _latest() -> Chosen:
    why = "The newest version folder is served. To go back: specific { versions: [ 1 ] }, or remove the newer folder."
    return Chosen("version_policy { latest { num_versions: 1 } }", why)
