"""A family that is not the package's: gated MLPs over patches, written by following the steps of docs/extending.md.

Each patch goes through equal blocks x + down(gelu(gate(n)) · up(n)) with n = LayerNorm(x); the mean over the patches
goes to the head.
"""

import dataclasses
import enum
import re

import jax
import jax.numpy as jnp

from vit_convert.checkpoint.containers import Leaves
from vit_convert.checkpoint.draw import draw, write_npz
from vit_convert.checkpoint.match import Expected, require_blocks, require_match
from vit_convert.checkpoint.vote import count_numbers, most_common, patch_side
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.model import Model
from vit_convert.core.stack import Stack
from vit_convert.families.family import Loaded
from vit_convert.families.head import classifier_signature, settle_head
from vit_convert.families.options import refuse_options
from vit_convert.families.run import whole

WIDTHS = {"mu": (32, 48, 3)}  # width, hidden size, blocks
_ON_DISK = {"kernel": "w", "bias": "b", "scale": "g"}  # what a parameter is called in the layout "glu"
_CANONICAL = {disk: name for name, disk in _ON_DISK.items()}


class Layout(enum.Enum):
    """How the parameters are named on disk."""

    GLU = "glu"
    """`glu/0/gate/w`, `glu/0/norm/g`, `glu/stem/w`, `glu/head/w`."""


@dataclasses.dataclass(frozen=True)
class Glu:
    """One model, complete enough to build it."""

    variant: str
    width: int
    hidden: int
    depth: int
    patch_size: int
    image_size: tuple[int, int]
    num_classes: int


def leaf_shapes(arch):
    """Every canonical parameter, in the model's order."""
    d, h, p = arch.width, arch.hidden, arch.patch_size
    shapes = {"stem/kernel": (p, p, 3, d), "stem/bias": (d,)}
    for i in range(arch.depth):
        shapes |= {f"block_{i}/norm/scale": (d,), f"block_{i}/norm/bias": (d,)}
        for layer, (inputs, outputs) in {"gate": (d, h), "up": (d, h), "down": (h, d)}.items():
            shapes |= {f"block_{i}/{layer}/kernel": (inputs, outputs), f"block_{i}/{layer}/bias": (outputs,)}
    return shapes | (
        {"head/kernel": (d, arch.num_classes), "head/bias": (arch.num_classes,)} if arch.num_classes else {}
    )


def parameter_count(arch):
    """Number of parameters in closed form."""
    d, h = arch.width, arch.hidden
    block = 2 * d + 2 * (d * h + h) + h * d + d
    return 3 * arch.patch_size**2 * d + d + arch.depth * block + (d + 1) * arch.num_classes


def to_canonical(name):
    """`glu/3/gate/w` is `block_3/gate/kernel`; a name that is no parameter's stays as it is."""
    if match := re.fullmatch(r"glu/(?:(\d{1,6})/)?(\w+)/([wbg])", name):
        number, layer, kind = match.groups()
        return f"{f'block_{number}/' if number else ''}{layer}/{_CANONICAL[kind]}"
    return name


def to_disk(name):
    """The inverse of `to_canonical`."""
    scope, _, kind = name.rpartition("/")
    return f"glu/{scope.removeprefix('block_')}/{_ON_DISK[kind]}"


def parse_variant(text):
    """ "GLU-mu/8" -> row of WIDTHS, patch size in pixels."""
    match = re.fullmatch(r"GLU-(\w+)/([1-9]\d*)", text)
    if match is None or match[1] not in WIDTHS:
        raise UsageError(
            f"variant {text!r}: no GLU", fix=f"Use GLU-, one of {', '.join(WIDTHS)}, a slash and the patch size."
        )
    return WIDTHS[match[1]], int(match[2])


def infer(leaves, asked):
    """The architecture that the shapes tell, by majority, or that the asked variant says; and the name that the shapes
    have."""
    width = most_common(leaves, (r"norm/scale$", 0), (r"^stem/kernel$", -1))
    hidden = most_common(leaves, (r"(gate|up)/bias$", 0), (r"(gate|up)/kernel$", -1))
    row, patch = (width, hidden, count_numbers(leaves, r"block_(\d{1,6})/")), patch_side(leaves, "stem/kernel", width)
    found = next((f"GLU-{name}/{patch}" for name in WIDTHS if WIDTHS[name] == row), "custom")
    variant = found
    if asked.variant != "auto":
        (row, patch), variant = parse_variant(asked.variant), asked.variant
    if 0 in row:
        raise CheckpointError(
            f"{asked.file}: nothing tells the width, hidden size or depth", fix="Save the parameters whole."
        )
    size = asked.image_size or (8 * patch, 8 * patch)
    if any(side % patch or not side for side in size):
        raise UsageError(
            f"image_size {size[0]}x{size[1]}: not a multiple of the patch size {patch}", fix="Choose one that is."
        )
    classes = most_common(leaves, (r"^head/bias$", 0), (r"^head/kernel$", -1))
    return Glu(variant, *row, patch, size, classes), found


def forward(leaves, images, arch, output):
    """Images [batch, height, width, 3] -> {tap or output: array}; a tap behind every block, [batch, patches, width]."""

    def dense(x, name):
        return x @ leaves[f"{name}/kernel"] + leaves[f"{name}/bias"]

    stride = (arch.patch_size, arch.patch_size)
    x = jax.lax.conv_general_dilated(
        images, leaves["stem/kernel"], stride, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = (x + leaves["stem/bias"]).reshape(x.shape[0], -1, arch.width)
    results = {}
    for i in range(arch.depth):
        block = f"block_{i}"
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        n = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
        n = n * leaves[f"{block}/norm/scale"] + leaves[f"{block}/norm/bias"]
        x = x + dense(jax.nn.gelu(dense(n, f"{block}/gate")) * dense(n, f"{block}/up"), f"{block}/down")
        results[f"block_{i:02d}"] = x
    x = jnp.mean(x, axis=1)
    return {output: dense(x, "head") if arch.num_classes else x, **results}


class GluFamily:
    """See `vit_convert.families.family.Family` for what each part is."""

    name, layouts, variants = "glu", ("glu",), ("GLU-mu/8",)

    def match(self, names):
        return Layout.GLU if any(re.match(r"glu/\d+/gate/", name) for name in names) else None

    def load(self, leaves, layout, asked):
        if asked.posemb_grid is not None:
            raise UsageError(f"posemb_grid {asked.posemb_grid}: a GLU has no position table", fix="Leave it out.")
        renamed = {to_canonical(name): leaf for name, leaf in leaves.items()}
        require_blocks(renamed, r"block_(\d{1,6})/", "GLU block", str(asked.file))
        arch, found = infer(renamed, asked)

        def on_disk(name):
            return asked.prefix + to_disk(name)

        found = "" if asked.variant == "auto" else found
        require_match(
            renamed, Expected(asked.file, arch.variant, leaf_shapes(arch), parameter_count(arch), on_disk, found)
        )
        head = settle_head(renamed, arch.num_classes, asked.outputs, asked.file)
        arch = dataclasses.replace(arch, num_classes=head.num_classes)
        return Loaded(
            title="GLU",
            variant=arch.variant,
            layout=layout,
            architecture=arch,
            params=Leaves({name: head.leaves[name].as_float32() for name in leaf_shapes(arch)}),
            num_params=parameter_count(arch),
            image_size=arch.image_size,
            source_image_size=arch.image_size,
            num_classes=arch.num_classes,
            preprocess="vit_jax",
            patch_size=arch.patch_size,
            zero_head=head.is_zero,
            warnings=head.warnings,
        )

    def model(self, loaded):
        arch = loaded.architecture
        stack = Stack("block_{}/", arch.depth)
        traced = dataclasses.replace(arch, depth=stack.traced)
        signature = classifier_signature(arch.image_size, arch.num_classes, arch.width)
        return Model(
            signature=signature,
            params=loaded.params,
            taps=[stack.tap(i) for i in range(stack.depth)],
            apply=lambda leaves, images: forward(leaves, images, traced, loaded.output),
            traced_shapes=leaf_shapes(traced),
            traced_taps=[stack.tap(i) for i in range(stack.traced)],
            run=whole(lambda leaves, images: forward(leaves, images, arch, loaded.output), loaded.params),
            stacks=(stack,),
        )

    def has_variant(self, variant):
        return re.fullmatch(r"GLU-\w+/\d+", variant) is not None

    def write_random(self, path, variant, options):
        refuse_options("glu", options, ("pool", "posemb", "pre_logits", "outlier_channels"))
        (width, hidden, depth), patch = parse_variant(variant)
        size = options.image_size or (8 * patch, 8 * patch)
        arch = Glu(variant, width, hidden, options.depth or depth, patch, size, options.num_classes)
        drawn = (
            (options.prefix + to_disk(name), shape, (draw(options.seed, name, shape),))
            for name, shape in leaf_shapes(arch).items()
        )
        write_npz(path, drawn, options.dtype)
        return variant


FAMILY = GluFamily()
