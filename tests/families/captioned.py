"""A family from outside the package, as docs/extending.md says: images with a caption, two outputs, one stack of
blocks.

A config registers it: `config.families = ("/path/captioned.py:FAMILY",)`. Its test copies this file away and imports
nothing of it.
"""

import dataclasses
import enum

import numpy as np

from vit_convert.checkpoint.containers import Leaves
from vit_convert.checkpoint.draw import draw, write_npz
from vit_convert.checkpoint.match import Expected, require_match
from vit_convert.checkpoint.vote import count_numbers
from vit_convert.core.model import Model
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.stack import Stack
from vit_convert.families.family import Loaded

SIDE, LENGTH, WORDS, WIDTH, CLASSES = 8, 5, 11, 16, 6
BLOCK = "block_"


class Layout(enum.Enum):
    """How its parameters are named on disk."""

    CAPTIONED = "captioned"
    """As here."""


@dataclasses.dataclass(frozen=True)
class Captioned:
    """The numbers that a checkpoint's shapes decide."""

    depth: int


def leaf_shapes(architecture):
    shapes = {"pixels/kernel": (3, WIDTH), "words/kernel": (WORDS, WIDTH)}
    for i in range(architecture.depth):
        shapes |= {f"{BLOCK}{i}/fc1/kernel": (WIDTH, 2 * WIDTH), f"{BLOCK}{i}/fc2/kernel": (2 * WIDTH, WIDTH)}
    return shapes | {"scores/kernel": (WIDTH, CLASSES), "projection/kernel": (WIDTH, WIDTH)}


class CaptionedFamily:
    """See `families.family.Family`."""

    name = "captioned"
    layouts = ("captioned",)
    variants = ("captioned",)

    def match(self, names):
        return Layout.CAPTIONED if "words/kernel" in names else None

    def load(self, leaves, layout, asked):
        found = Captioned(count_numbers(leaves, rf"{BLOCK}(\d+)/"))
        shapes = leaf_shapes(found)
        count = (3 + WORDS + CLASSES + WIDTH) * WIDTH + found.depth * 4 * WIDTH * WIDTH
        require_match(leaves, Expected(asked.file, "captioned", shapes, count, lambda name: asked.prefix + name))
        return Loaded(
            title="Captioned",
            variant="captioned",
            layout=layout,
            architecture=found,
            params=Leaves({name: leaves[name].as_float32() for name in shapes}),
            num_params=count,
            image_size=(SIDE, SIDE),
            source_image_size=(SIDE, SIDE),
            num_classes=CLASSES,
            preprocess="vit_jax",
            patch_size=SIDE,
            output="scores",
        )

    def model(self, loaded):
        import jax
        import jax.numpy as jnp

        stack = Stack(f"{BLOCK}{{}}/", loaded.architecture.depth)
        signature = Signature(
            (
                Tensor("images", "float32", ("batch", SIDE, SIDE, 3), "NHWC"),
                Tensor("caption", "int32", ("batch", LENGTH), below=WORDS),
            ),
            (
                Output("scores", "float32", ("batch", CLASSES), judge="top1"),
                Output("pair", "float32", ("batch", WIDTH), judge="embedding"),
            ),
        )

        def forward(depth, params, images, caption):
            x = images.mean((1, 2)) @ params["pixels/kernel"] + params["words/kernel"][caption].mean(1)
            taps = {}
            for i in range(depth):
                hidden = jnp.tanh(x @ params[f"{stack.prefix(i)}fc1/kernel"])
                x = taps[stack.tap(i)] = x + hidden @ params[f"{stack.prefix(i)}fc2/kernel"]
            pair = x @ params["projection/kernel"]
            return {
                "scores": x @ params["scores/kernel"],
                "pair": pair / jnp.sqrt((pair**2).sum(-1, keepdims=True)),
                **taps,
            }

        def run(images, caption):
            params = {name: jnp.asarray(loaded.params[name]) for name in loaded.params}
            with jax.default_matmul_precision("highest"):
                found = forward(stack.depth, params, jnp.asarray(images), jnp.asarray(caption))
            return {name: np.asarray(value) for name, value in found.items()}

        return Model(
            signature=signature,
            params=loaded.params,
            taps=[stack.tap(i) for i in range(stack.depth)],
            apply=lambda params, images, caption: forward(stack.traced, params, images, caption),
            traced_shapes=leaf_shapes(Captioned(stack.traced)),
            traced_taps=[stack.tap(i) for i in range(stack.traced)],
            run=run,
            stacks=(stack,),
        )

    def has_variant(self, variant):
        return variant == "captioned"

    def write_random(self, path, variant, options):
        shapes = leaf_shapes(Captioned(options.depth or 4))
        write_npz(
            path, ((options.prefix + name, shape, (draw(options.seed, name, shape),)) for name, shape in shapes.items())
        )
        return "captioned"


FAMILY = CaptionedFamily()
