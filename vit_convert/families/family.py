"""The interface of a family of models: how its checkpoints are recognised, loaded, built and, for tests, written.

A family is a folder: `layouts.py` (names on disk), `architecture.py` (sizes and canonical parameters), `module.py`
(Flax), `random.py` and `family.py`, whose object implements `Family`. It is registered by a line in `registry.py`, or
from outside by `config.families`.
"""

import dataclasses
import enum
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vit_convert.checkpoint.containers import Leaf, Leaves
from vit_convert.core.image_size import NoSize, Size

if TYPE_CHECKING:
    from vit_convert.core.model import Model
    from vit_convert.families.pair import Pair


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is requested from a checkpoint.

    Attributes:
        file: for messages.
        prefix: stripped from the names of the leaves, such as "params/img/".
        names: of all leaves of the file, including those that are not the model's.
        variant: "auto" reads it from the shapes; a name such as "B/32" is checked against them.
        image_size: (height, width) in pixels; None keeps the checkpoint's.
        outputs: names of `families.outputs`, separated by commas; "auto" for the model's main purpose.
        posemb_grid: (rows, columns) of a stored position table that is not square; None if not given.
        tower: "image" or "text" for a checkpoint that has both; "" for any other.
        normalize: whether embeddings are divided by their norm.
        text_length: tokens that a text tower's texts are cut to; None keeps the checkpoint's number.
    """

    file: pathlib.Path
    prefix: str = ""
    names: Collection[str] = ()
    variant: str = "auto"
    image_size: Size | None = None
    outputs: str = "auto"
    posemb_grid: Size | None = None
    tower: str = ""
    normalize: bool = True
    text_length: int | None = None

    def instead_of(self, found: str) -> str:
        """What to propose if the file does not fit: its own variant, if another one was requested."""
        return "" if self.variant == "auto" else found


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint that was identified and compared with its model; its arrays need not have been read yet.

    Attributes:
        title: the family's common name: "ViT".
        variant: such as "B/32"; "custom" if the shapes are not those of a named variant.
        layout: how its parameters are named on disk.
        architecture: the family's own record, complete enough to build the model.
        params: float32 parameters by canonical name, read on access. `params.leaves[name].shape` gives a shape without
            reading.
        num_params: number of stored parameters that the model uses.
        image_size: (height, width) in pixels at which the model runs; () if it takes no images.
        source_image_size: (height, width) in pixels for which the checkpoint was saved; () if it takes no images.
        num_classes: outputs of the head; 0 for a model without one.
        preprocess: the rule by which its images were prepared, a key of `images.preprocess`.
        patch_size: side in pixels of the area that a token represents.
        patches: how many an image of any aspect is cut into; 0 for a model whose images have one size.
        resizable: whether a graph may take a range of image sizes, multiples of the patch: its position table is
            resampled inside.
        attentions: (head size, tokens) of each kind of self-attention over a fixed number of tokens.
        group_norms: channels of its GroupNorms over 32 groups, each number once.
        zero_head: whether every class gets the same logit.
        warnings: what the user should know, one sentence each.
        unused: names of stored leaves that are not parameters, but buffers that other projects save as well.
        output: name of the model's first output; by default "logits", or "features" for a model without classes.
        judge: how it is judged, see `core.signature.Output`; by default "top1" for classes and "cosine" for anything
            else.
        pair: for a tower, the pair that it belongs to.
        takes: the input of a model without images, in words: "64 tokens".
        text: whether it takes the tokens of texts, and no images.
        one_length: why a text tower takes texts of one length only; "" if it takes shorter ones.
    """

    title: str
    variant: str
    layout: enum.Enum
    architecture: Any
    params: Leaves
    num_params: int
    image_size: Size | NoSize
    source_image_size: Size | NoSize
    num_classes: int
    preprocess: str
    patch_size: int
    patches: int = 0
    resizable: bool = False
    attentions: tuple[tuple[int, int], ...] = ()
    group_norms: tuple[int, ...] = ()
    zero_head: bool = False
    warnings: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()
    output: str = ""
    judge: str = ""
    pair: "Pair | None" = None
    takes: str = ""
    text: bool = False
    one_length: str = ""

    def __post_init__(self) -> None:
        if not self.output:
            object.__setattr__(self, "output", "logits" if self.num_classes else "features")
        if not self.judge:
            object.__setattr__(self, "judge", "top1" if self.num_classes else "cosine")


@dataclasses.dataclass(frozen=True)
class RandomOptions:
    """Properties of a checkpoint with seeded random weights; a family refuses those that have no meaning for it.

    Attributes:
        seed: of the weights.
        image_size: (height, width) in pixels for which it is; None for the family's usual one.
        num_classes: outputs of the head; 0 leaves it out.
        depth: number of blocks; None for the variant's.
        layout: one of the family's; "" for its first.
        prefix: put in front of every name, such as "params/".
        dtype: one of `checkpoint.draw.DTYPES`.
        pool: how tokens are pooled; None for what the variant's name says.
        posemb: "learn", or "sincos2d" to store no table.
        pre_logits: add the tanh layer before the head.
        outlier_channels: even number of channels in which the residual stream is large, as in trained models.
        towers: "image" or "text" leaves the other tower out; "" writes both.
        length: tokens per text; None for the variant's.
        text_head: keep the product after the text's pooling, which some published files lack.
    """

    seed: int = 0
    image_size: Size | None = None
    num_classes: int = 1000
    depth: int | None = None
    layout: str = ""
    prefix: str = ""
    dtype: str = "float32"
    pool: str | None = None
    posemb: str = "learn"
    pre_logits: bool = False
    outlier_channels: int = 0
    towers: str = ""
    length: int | None = None
    text_head: bool = True


class Family(Protocol):
    """One family of models."""

    @property
    def name(self) -> str:
        """Its name in `config.family`."""

    @property
    def layouts(self) -> tuple[str, ...]:
        """Names of the layouts that its checkpoints have on disk, the usual one first."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the published variants."""

    def match(self, names: Collection[str]) -> enum.Enum | None:
        """Recognises the layout by the names of the leaves, without what `select` stripped; None if they are not this
        family's."""

    def load(self, leaves: Mapping[str, Leaf], layout: Any, asked: Asked) -> Loaded:
        """Identifies the model and compares the leaves with it, strictly. Does not import JAX.

        Raises:
            CheckpointError: the leaves are not exactly the parameters of the model.
            UsageError: a request has no meaning for this model.
        """

    def model(self, loaded: Loaded) -> "Model":
        """Builds the JAX model from the result of `load`."""

    def has_variant(self, variant: str) -> bool:
        """Whether a name is one of this family's variants, in any spelling."""

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """Writes a checkpoint of a variant with seeded random weights, and returns the variant's name.

        Raises:
            UsageError: an option has no meaning for this family.
        """


@runtime_checkable
class TowerFamily(Family, Protocol):
    """A family whose checkpoints hold an image tower and a text tower, or one of them; `match` sees the names of
    both."""

    def towers(self, names: Collection[str], layout: Any) -> tuple[str, ...]:
        """Which of "image" and "text" a file has."""
