"""What several stages need: the target, the backend, the images, and the graph's input for a batch of them."""

import functools
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_convert.core import config as configs
from vit_convert.core.dialect import Dialect, dialect_named
from vit_convert.core.earlier import read_signature
from vit_convert.core.errors import BuildError
from vit_convert.core.pipeline import Context
from vit_convert.core.signature import Signature, Tensor
from vit_convert.core.token_samples import sample_texts

if TYPE_CHECKING:
    from vit_convert.images.sources import ImageSource

EVALUATION_BATCH = 32
_PATCHES = 3  # axes of samples that are cut into patches
_BACKEND_DIALECTS = {"rtx": "rtx", "none": "rtx"}


def plain(config: Any) -> dict[str, Any]:
    """A part of the config as plain JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.to_dict().items()}


def dialect_for(context: Context) -> Dialect:
    """The dialect of `config.target`; for auto, that of the backend."""
    asked = context.config.target
    if asked != configs.AUTO:
        return dialect_named(asked)
    backend = context.config.engine.backend
    if backend in _BACKEND_DIALECTS:
        return dialect_named(_BACKEND_DIALECTS[backend])
    return backend_named(backend).dialect


@functools.cache
def backend_named(name: str) -> Any:
    """The TensorRT of the config, imported once."""
    from vit_convert.engine.backend.trt import load_backend

    return load_backend(name)


def builds_here(context: Context) -> bool:
    """Whether to build engines on this host. Graphs for TensorRT 8 are built only by TensorRT 8, unless the config
    names a backend."""
    backend = context.config.engine.backend
    asked = context.config.target
    if backend == configs.AUTO and asked != configs.AUTO and dialect_named(asked).precision_by_flag:
        try:
            return not backend_named(backend).strongly_typed
        except BuildError:  # there is no TensorRT at all
            return False
    return backend != "none"


def graph_files(context: Context, precision: str) -> list[pathlib.Path]:
    """A graph and its weights."""
    return with_weights(context.bundle.onnx(precision))


def with_weights(path: pathlib.Path) -> list[pathlib.Path]:
    """An `.onnx` file and the file of its weights."""
    return [path, path.with_name(path.name + ".data")]


def source_identity(data: str, *, labelled: bool) -> Any:
    """Identifies a set of images without decoding any."""
    if not data:
        return "noise"
    from vit_convert.images.sources import open_images

    return [data, open_images(data, labelled=labelled).fingerprint]


def decode(context: Context, name: str, source: "ImageSource", limit: int) -> Any:
    """Decodes images into the bundle, at the model's size, or cut into its patches."""
    from vit_convert.images.decode import decode_split

    checkpoint = context.results.checkpoint
    height, width = checkpoint.image_size or (checkpoint.patch_size,) * 2
    return decode_split(
        source,
        context.bundle.images(name),
        context.bundle.labels(name),
        height,
        width,
        preprocess_of(context),
        patches=checkpoint.patches,
        limit=limit,
        progress=context.progress,
    )


def preprocess_of(context: Context) -> Any:
    """The preprocessing record that the checkpoint stage chose."""
    from vit_convert.images.preprocess import Preprocess

    return Preprocess.from_dict(context.results.checkpoint.preprocess)


def prepare(context: Context) -> Any:
    """Maps a uint8 batch to the graph's input; to {input: array} if the graph has further inputs, or takes no
    images."""
    preprocess, config = preprocess_of(context), context.config
    as_taken = functools.partial(preprocess.graph_input, dtype=config.input, channels_first=config.layout == "NCHW")
    inputs = signature_of(context).inputs
    if len(inputs) == 1 and inputs[0].is_image:
        return as_taken
    return lambda pixels: dict(zip((tensor.name for tensor in inputs), inputs_beside(inputs, pixels, as_taken)))


def noise(context: Context, count: int) -> np.ndarray:
    """Seeded images of the model's size: uint8 [count, height, width, 3]; of one pixel, as a seed, for a model that
    takes none."""
    from vit_convert.images.noise import seeded_noise

    height, width = context.results.checkpoint.image_size or (1, 1)
    return seeded_noise(count, height, width)


def inputs_beside(
    inputs: Sequence[Tensor], samples: np.ndarray, as_taken: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """A model's inputs for a batch, in its order: the images or tokens, and further texts and numbers drawn with these
    as seed.

    Args:
        inputs: of the model or the graph.
        samples: images uint8 [batch, height, width, 3]; or token ids int32 [batch, length], of a text tower; or patches
            of images of any aspect, as `images.patches.packed_patches` gives them.
        as_taken: maps images to what the image input takes.
    """
    if samples.ndim == _PATCHES:
        return _patches_beside(inputs, samples)
    generator, is_tokens = np.random.default_rng(zlib.crc32(samples.tobytes())), samples.ndim == 2

    def made(tensor: Tensor) -> np.ndarray:
        if tensor.is_text:
            return samples.astype(tensor.dtype) if is_tokens else sample_texts(tensor, len(samples), generator)
        shape = (len(samples), *(int(side) for side in tensor.shape[1:]))
        if np.issubdtype(tensor.dtype, np.integer):
            return generator.integers(0, tensor.below or 2, shape).astype(tensor.dtype)
        return generator.standard_normal(shape, np.float32).astype(tensor.dtype)

    return [as_taken(samples) if tensor.is_image else made(tensor) for tensor in inputs]


def _patches_beside(inputs: Sequence[Tensor], samples: np.ndarray) -> list[np.ndarray]:
    """Patches, their coordinates and their mask, in the order of a model's inputs."""
    from vit_convert.images.patches import patch_inputs

    return patch_inputs(samples, ((tensor.dtype == "float32", len(tensor.shape)) for tensor in inputs))


def signature_of(context: Context) -> Signature:
    """The graphs' inputs and outputs, as the export wrote them."""
    return read_signature(context.bundle, context.results.checkpoint, context.config)


def evaluation(context: Context) -> tuple[np.ndarray, np.ndarray] | None:
    """Labelled images; None if the config names none."""
    if not context.results.images.labelled:
        return None
    return np.load(context.bundle.images("evaluation"), mmap_mode="r"), np.load(context.bundle.labels("evaluation"))
