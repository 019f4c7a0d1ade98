"""The results of the stages on the export host, kept in the manifest: the model, its graph, its reference, its ranges.

Keys are fields; numbers have their unit in the name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_convert.core.image_size import ImageRange
from vit_convert.core.record import Record, StageResult, optional
from vit_convert.core.text_length import Sizes, TextRange


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Record):
    """What is converted.

    Attributes:
        path: of the file; "" for a user's own model.
        sha256: of the file, in hex.
        family: its name, "user" for a user's own model.
        variant: for example "B/16".
        model: for a user's own model: function, file, sha256 of the file, identity.
        output: the one that represents the model.
        layout: names of its leaves, for example "vit_jax".
        num_params: how many numbers its leaves hold.
        image_size: [height, width] in pixels; [] if it takes no images.
        image_range: sizes of a dynamic graph.
        text_range: lengths of the texts of a dynamic graph.
        num_classes: of its head.
        warnings: findings that are not errors.
        preprocess: how an image becomes its input (`images/preprocess.py`).
    """

    path: str
    sha256: str
    family: str
    variant: str
    model: Mapping[str, str] | None = optional()
    output: str
    layout: str | None = optional()
    num_params: int
    image_size: tuple[int, ...]
    image_range: ImageRange | None = None
    text_range: TextRange | None = optional()
    num_classes: int | None = None
    warnings: tuple[str, ...]
    preprocess: Mapping[str, Any]

    @property
    def sizes(self) -> Sizes:
        """What a model takes: images of one size, a range of sizes or of lengths, or () for texts of one length."""
        if found := self.image_range or self.text_range:
            return found
        return (self.image_size[0], self.image_size[1]) if self.image_size else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointResult(Checkpoint, StageResult):
    """What the checkpoint stage returns.

    Attributes:
        patch_size: side of a patch in pixels.
        patches: how many an image of any aspect is cut into; 0 if images have one size, or a range of sizes.
        attentions: each kind once: [channels of a head, tokens]; without those limited by a mask.
        group_norms: channels of its GroupNorms, each number once.
        source_image_size: [height, width] at which the file was trained.
        zero_head: whether the head is all zeros, so that its classes mean nothing.
        judge: how the output is judged: "top1", "cosine" or "embedding".
        text: whether the model takes the tokens of texts, and no images.
        pair: for a tower: the two towers of its checkpoint, and how prompts become tokens.
    """

    patch_size: int = 0
    patches: int = 0
    attentions: tuple[tuple[int, ...], ...] = ()
    group_norms: tuple[int, ...] = ()
    source_image_size: tuple[int, ...] = ()
    zero_head: bool = False
    judge: str
    text: bool = False
    pair: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesResult(StageResult):
    """What the images stage returns.

    Attributes:
        num_images: for evaluation; for a text tower, of prompts.
        labelled: whether they have labels.
        label_range: smallest and largest label.
        class_folders: names of the folders that represent classes.
        classes: for a text tower: number of classes of its prompts.
        templates: for a text tower: number of prompts per class.
    """

    num_images: int
    labelled: bool = False
    label_range: tuple[int, int] | None = optional()
    class_folders: tuple[str, ...] | None = optional()
    classes: int | None = optional()
    templates: int | None = optional()


@dataclasses.dataclass(frozen=True)
class RuleCount(Record):
    """What one substitution did to one graph.

    Attributes:
        rule: name of the rule or pass.
        applied: places rewritten.
        declined: places that matched the pattern but were left alone, counted by reason.
    """

    rule: str
    applied: int = 0
    declined: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxGraph(Record):
    """The graph model.onnx.

    Attributes:
        opset: of ONNX.
        target: the dialect it is for: "trt8", "trt10", "trt11" or "rtx".
        num_nodes: in the graph.
        nodes_traced: nodes that jax2onnx wrote for the traced part.
        nodes_per_block: of the largest block; 0 without blocks.
        num_shapes: Shape nodes.
        bytes: of the graph and its weights.
        rules: in the order in which they were tried.
    """

    opset: int
    target: str
    num_nodes: int
    nodes_traced: int
    nodes_per_block: int
    num_shapes: int
    bytes: int
    rules: tuple[RuleCount, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowering(Record):
    """Another lowering of the fp32 graph.

    Attributes:
        num_nodes: in the graph.
        nodes_per_block: of the largest block.
        bytes: of the graph and its weights.
    """

    num_nodes: int
    nodes_per_block: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult(OnnxGraph, StageResult):
    """What the export stage returns.

    Attributes:
        taps: inner values that the reference contains.
        pooled_token: index of the one token that the last block computes, or the name of the reference's array that has
            its index for each row; None if it computes all.
        lowerings: by name, those written beside model.onnx.
        lowering: that fp16 engines are built from with engine.lowering=auto; "" for model.onnx.
        int8_lowering: what engine.int8_lowering=auto stands for in a plan; "" for the graph with Q/DQ.
    """

    taps: tuple[str, ...]
    pooled_token: int | str | None = None
    lowerings: Mapping[str, Lowering]
    lowering: str
    int8_lowering: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(Record):
    """The images that everything is compared on.

    Attributes:
        source: "evaluation images" or "seeded noise".
        num_images: how many.
    """

    source: str
    num_images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceResult(Reference, StageResult):
    """What the reference stage returns.

    Attributes:
        tensors: names of JAX's outputs and inner values.
        top1: of JAX on the labelled images, in percent.
    """

    tensors: tuple[str, ...]
    top1: float | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widened(Record):
    """A tensor whose threshold is wider than entropy's, which cost its products too much.

    Attributes:
        tensor: its name.
        amax: its largest magnitude.
        entropy: the threshold by entropy.
        threshold: the one in use.
        error_entropy: of the products that read it, with entropy's threshold: mean squared error over mean square.
        error: with the threshold in use.
        error_minmax: with the largest magnitude as threshold.
    """

    tensor: str
    amax: float
    entropy: float
    threshold: float
    error_entropy: float
    error: float
    error_minmax: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut(Record):
    """Layers that stay out of int8, since no threshold is good enough.

    Attributes:
        sites: the layers.
        tensor: that they read.
        error: of their products with the best threshold.
        max_error: config.calibration.max_error.
    """

    sites: tuple[str, ...]
    tensor: str
    error: float
    max_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareOfProduct(Record):
    """A product that stays out of int8 for its share in the output's error.

    Attributes:
        site: its layer.
        share: what it costs the output by itself: the mean of 1 - cosine to fp32, on the images that lose most.
        multiplications: its share of those that could be int8, for one image.
    """

    site: str
    share: float
    multiplications: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputShare(Record):
    """What stays out of int8 so that the output is good enough.

    Attributes:
        products: those left out, the dearest for their time first.
        min_cosine: the smallest that is allowed on any image.
        cosine_before: the smallest, with all in int8 that products' own errors allow.
        cosine: the smallest, with what is left.
        num_images: on which the output was judged.
        source: of the images.
    """

    products: tuple[ShareOfProduct, ...]
    min_cosine: float
    cosine_before: float
    cosine: float
    num_images: int
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(Record):
    """A tensor that is quantized after a constant is subtracted.

    Attributes:
        tensor: its name.
        offset: the constant.
        threshold: after the subtraction.
        error: of the products that read it.
        error_symmetric: the same without a shift.
    """

    tensor: str
    offset: float
    threshold: float
    error: float
    error_symmetric: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smoothed(Record):
    """What SmoothQuant did.

    Attributes:
        strength: from 0 to 1.
        num_norms: LayerNorms that were smoothed.
        factors_min_max: by LayerNorm, the smallest and the largest factor of a channel.
        declined: by tensor, why it was not smoothed.
    """

    strength: float
    num_norms: int
    factors_min_max: Mapping[str, tuple[float, float]]
    declined: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotated(Record):
    """Residual streams whose channels were mixed.

    Attributes:
        widths: channels of each.
        num_norms: LayerNorms that read them.
        products: values that a product of their own turns back, since no linear reads them.
        declined: by LayerNorm, why its stream was left as it is.
    """

    widths: tuple[int, ...]
    num_norms: int
    products: tuple[str, ...]
    declined: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(Record):
    """Where the ranges of int8 and fp8 come from.

    Attributes:
        method: for example "entropy".
        device: what ran the graph, "cpu" or "cuda".
        num_images: number of images run.
        source: of the images.
        num_tensors: number of tensors with a range.
        num_clipped: number of tensors whose threshold is below their largest magnitude.
        widened: thresholds wider than entropy's, the largest error first.
        left_out: layers that stay out of int8, the worst first.
        shifted: tensors with a shift, the largest gain first.
        smoothed: None without config.calibration.smooth.
        rotated: None without config.calibration.rotate.
        output_share: None where the output was not judged.
    """

    method: str
    num_images: int
    source: str
    num_tensors: int
    num_clipped: int
    widened: tuple[Widened, ...]
    left_out: tuple[LeftOut, ...]
    shifted: tuple[Shifted, ...]
    smoothed: Smoothed | None = None
    rotated: Rotated | None = None
    device: str = "cpu"
    output_share: OutputShare | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateResult(Calibration, StageResult):
    """What the calibrate stage returns."""
