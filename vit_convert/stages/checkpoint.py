"""The checkpoint stage: finds out what to convert, and at which image size."""

import dataclasses
import math
import os
from typing import Any

from vit_convert.core import config as configs
from vit_convert.core.errors import ConvertError, UsageError
from vit_convert.core.image_size import ImageRange, check_image_size, parse_range
from vit_convert.core.pipeline import Context, Stage, file_identity
from vit_convert.core.stage_results import CheckpointResult
from vit_convert.core.text_length import TextRange, parse_text_length
from vit_convert.core.user_code import describe_function, user_code
from vit_convert.stages.common import dialect_for


def _inputs(context: Context) -> Any:
    config = context.config
    sizes = config.image_size if configs.is_dynamic(config) else configs.image_size(config)
    families = [config.family, list(config.families)]
    asked = [
        *families,
        config.variant,
        sizes,
        config.outputs,
        config.num_classes,
        config.posemb_grid,
        config.preprocess,
        config.normalize,
        config.text_length,
    ]
    if config.model is not None:
        try:
            return [asked, model_of(context).identity]
        except ConvertError as e:
            return [asked, str(e)]  # `load` raises it, as below
    try:
        found = _found(context)
        code = _code_of(config.families)
    except ConvertError as e:
        return [asked, str(e)]  # `load` raises it: a failure is only recorded for a stage that runs
    identity = file_identity(found.path) if os.path.exists(found.path) else None
    return [asked, os.fspath(found.path), found.subtree, identity, *code]


def _code_of(families: Any) -> list[str]:
    if not families:
        return []
    from vit_convert.families.registry import code_of

    return code_of(families)


def _found(context: Context) -> Any:
    """Where the checkpoint is; searched, or downloaded, only once."""
    from vit_convert.checkpoint.find import find_checkpoint

    if "found" not in context.scratch:
        try:
            context.scratch["found"] = find_checkpoint(
                context.config.checkpoint, context.checkpoints, progress=context.progress
            )
        except ConvertError as e:
            context.scratch["found"] = e
    if isinstance(context.scratch["found"], ConvertError):
        raise context.scratch["found"]
    return context.scratch["found"]


def load(context: Context) -> CheckpointResult:
    """Loads and verifies the checkpoint, or calls the user's model function."""
    config = context.config
    if config.model is not None:
        return _load_user_model(context)
    checkpoint = _checkpoint(context)
    for warning in checkpoint.warnings:
        context.progress.warn(warning)
    if _found(context).published is not None:
        from vit_convert.checkpoint.published import require_published

        require_published(
            _found(context).published, str(checkpoint.path), checkpoint.source_image_size, checkpoint.num_classes
        )
    if config.num_classes and config.num_classes != checkpoint.num_classes:
        raise UsageError(
            f"config.num_classes={config.num_classes}: the checkpoint's head has {checkpoint.num_classes} classes"
        )
    from vit_convert.images.preprocess import preprocess_for

    preprocess = checkpoint.preprocess if config.preprocess == "auto" else config.preprocess
    sizes = _image_range(context, checkpoint)
    size = sizes.optimal if sizes else checkpoint.image_size
    texts = _text_range(context, checkpoint)
    shown = str(sizes or texts or "x".join(map(str, size)) or checkpoint.takes)
    _import_exporter()
    _found(context).require_sha256(checkpoint.sha256)
    return CheckpointResult(
        path=str(checkpoint.path),
        sha256=checkpoint.sha256,
        family=checkpoint.family.name,
        variant=checkpoint.variant,
        layout=checkpoint.layout.value,
        num_params=checkpoint.num_params,
        image_size=size,
        image_range=sizes,
        text_range=texts,
        patch_size=checkpoint.patch_size,
        patches=checkpoint.patches,
        attentions=tuple(checkpoint.attentions),
        group_norms=tuple(checkpoint.group_norms),
        source_image_size=checkpoint.source_image_size,
        num_classes=checkpoint.num_classes,
        zero_head=checkpoint.zero_head,
        output=checkpoint.output,
        judge=checkpoint.judge,
        text=checkpoint.text,
        pair=dataclasses.asdict(checkpoint.pair) if checkpoint.pair else None,
        warnings=tuple(checkpoint.warnings),
        preprocess=preprocess_for(preprocess, size or (1, 1)).to_dict(),
        summary=f"{_called(checkpoint)}, {checkpoint.num_params:,} parameters, {shown}",
    )


def _called(checkpoint: Any) -> str:
    """The model's common name: "ViT B/16", "Swin-T/7"."""
    title, variant = checkpoint.title, checkpoint.variant
    return variant if variant.startswith(title) else f"{title} {variant}"


def _import_exporter() -> None:
    """Imports what the next stages need, which takes over a second, while another thread hashes the file."""
    from vit_convert.export import exporter  # noqa: F401
    from vit_convert.export.trace import load_plugins

    load_plugins()


def _image_range(context: Context, checkpoint: Any) -> ImageRange | None:
    """The requested range of image sizes, checked against the patches; None if one size is requested."""
    if not configs.is_dynamic(context.config):
        return None
    asked, patch = context.config.image_size, checkpoint.patch_size
    configs.require_resizable(
        context.config, "" if checkpoint.resizable else f"family {checkpoint.family.name} has one size"
    )
    if "grid" in configs.read_outputs(context.config.outputs):
        raise UsageError(
            f"config.outputs={context.config.outputs!r} with image_size={asked!r}: a grid has one size",
            fix="Use tokens, which are the grid row by row, or one image_size.",
        )
    sizes = parse_range(asked, checkpoint.image_size)
    for size in (sizes.smallest, sizes.optimal, sizes.largest):
        check_image_size(size, patch)
    if min(sizes.smallest) < 2 * patch:
        raise UsageError(
            f"config.image_size={asked!r}: a side of one patch ({patch} pixels)",
            fix="Start from two patches: with one, backends differ in the meaning of interpolation between corners.",
        )
    stored, best = (tuple(side // patch for side in size) for size in (checkpoint.image_size, sizes.optimal))
    if context.config.posemb_grid is None and best != stored and math.prod(best) == math.prod(stored):
        raise UsageError(
            f"config.image_size={asked!r}: the position table has as many rows for {stored[0]}x{stored[1]} patches "
            f"as for the {best[0]}x{best[1]} of the size that is tuned for, and the file does not say which is meant",
            fix=f"Set posemb_grid to what the model was trained with: {stored} or {best}.",
        )
    return sizes


def _text_range(context: Context, checkpoint: Any) -> TextRange | None:
    """The range of text lengths that the config asks for, if the tower takes one."""
    asked = parse_text_length(context.config.text_length)
    if not isinstance(asked, TextRange):
        return None
    if checkpoint.one_length:
        raise UsageError(
            f"config.text_length={context.config.text_length!r}: {checkpoint.one_length}",
            fix="Leave it out: the graph has one length.",
        )
    dialect = dialect_for(context)
    if not dialect.computes_text_ranges:
        context.progress.warn(
            f"config.text_length={context.config.text_length!r}: engines of {dialect.name} for several lengths were "
            "wrong in batches of more than one text, and failed verify; "
            f"a single length, such as {asked.largest[0]}, is right"
        )
    return asked


def _checkpoint(context: Context) -> Any:
    if "checkpoint" not in context.scratch:
        from vit_convert.families.load import load_checkpoint

        config, found = context.config, _found(context)
        length = parse_text_length(config.text_length)
        context.scratch["checkpoint"] = load_checkpoint(
            f"{found.path}:{found.subtree}" if found.subtree else found.path,
            family=config.family,
            families=config.families,
            variant=config.variant,
            image_size=configs.image_size(config),
            outputs=config.outputs,
            posemb_grid=config.posemb_grid,
            normalize=config.normalize,
            text_length=length.largest[0] if isinstance(length, TextRange) else length,
        )
    return context.scratch["checkpoint"]


def _load_user_model(context: Context) -> CheckpointResult:
    from vit_convert.images.preprocess import preprocess_for

    config = context.config
    model = model_of(context)
    size = configs.image_size(config)
    assert size is not None  # model_of asks for it
    for warning in model.warnings:
        context.progress.warn(warning)
    num_params = sum(int(leaf.size) for leaf in model.params.values())
    others = f"; also {', '.join(model.taps)}" if model.taps else ""
    family = "vit_jax" if config.preprocess == "auto" else config.preprocess
    return CheckpointResult(
        path="",
        sha256="",
        model={**describe_function(config.model), "identity": model.identity},
        family="user",
        variant=model.name,
        num_params=num_params,
        image_size=size,
        output=model.output,
        judge=model.signature.outputs[0].judge,
        warnings=tuple(model.warnings),
        preprocess=preprocess_for(family, size).to_dict(),
        summary=f"own model {model.name}, {num_params:,} parameters, {'x'.join(map(str, size))}, judged by "
        f"{model.output}{others}",
    )


def model_of(context: Context) -> Any:
    """The Flax model with its parameters, created once and kept until a stage frees it."""
    if "model" not in context.scratch:
        from vit_convert.families.backend import require_backend

        require_backend()
        context.scratch["model"] = (
            _user_model(context) if context.config.model is not None else _model_of_checkpoint(context)
        )
    return context.scratch["model"]


def _model_of_checkpoint(context: Context) -> Any:
    checkpoint = _checkpoint(context)
    return checkpoint.family.model(checkpoint)


def _user_model(context: Context) -> Any:
    from vit_convert.families.user.call import taken_apart
    from vit_convert.families.user.model import user_model

    config, size = context.config, configs.image_size(context.config)
    if size is None:
        raise UsageError(
            "config.model is given and config.image_size is not", fix="Set config.image_size = (height, width)."
        )
    if not callable(config.model):
        raise UsageError(
            f"config.model is a {type(config.model).__name__}, it must be a function that returns the model",
            fix="config.model = lambda: (module, variables).",
        )
    fix = "config.model is a function without arguments that returns the model. --debug shows the whole traceback."
    with user_code("config.model()", UsageError, fix=fix):
        made = config.model()
    output = {} if config.outputs == configs.AUTO else {"output": config.outputs}
    return user_model(*taken_apart(made), image_shape=(*size, 3), **output, num_classes=config.num_classes)


CHECKPOINT = Stage("checkpoint", (), CheckpointResult, load, _inputs)
