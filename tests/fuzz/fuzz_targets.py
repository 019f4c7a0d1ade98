"""What reads foreign bytes, one target each: whatever they are, a refusal is a ConvertError and memory stays within
`bound`."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import struct
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vit_convert.checkpoint.containers import read_container, verify
from vit_convert.core.bundle import Bundle
from vit_convert.core.calibration_cache import CacheKey, load_cache, parse_cache
from vit_convert.core.errors import CheckpointError, ConvertError
from vit_convert.engine.backend.cuda import Gpu
from vit_convert.engine.backend.sidecar import check_sidecar, sidecar_path
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.bundle_engines import built_from, proof_of, require_conversion, require_model, require_proof
from vit_convert.images.sources import open_images
from vit_convert.quantize.precision_plan import read_plan
from vit_convert.text.prompting import Prompting
from vit_convert.text.prompts import read_prompts
from vit_convert.text.tokenizer import open_tokenizer
from vit_convert.text.tokens import read_tokens

_TEMPORARY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # the files are made anew for every input
# larger arrays, which a deflated member of a few bytes may claim, are streamed and not asked for whole
_READ_BYTES = 1 << 20

_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)
_TEXTS = {  # file, kind of tokenizer, start and end
    b"n": ("f.npy", "clip", -1, -1),
    b"p": ("f.txt", "clip", -1, -1),
    b"v": ("vocab.txt", "bert", 2, -1),
    b"m": ("merges.txt", "clip", -1, -1),
    b"j": ("tokenizer.json", "clip", -1, -1),
    b"s": ("spiece.model", "sentencepiece", -1, 1),
}
_TENSORRT = Backend("tensorrt", "8.6.1", None, Gpu("NVIDIA H200", "sm90", 150 << 30, "550.54", "12.4"), None)
_SIDECAR = {
    "backend": "tensorrt",
    "version": "8.6.1",
    "targets": ["sm90"],
    "precision": "fp16",
    "options": {"version_compatible": False, "hardware_compatible": False},
    "onnx": {"path": "model.onnx", "sha256": hashlib.sha256(b"graph").hexdigest()},
    "model": {"sha256": hashlib.sha256(b"graph").hexdigest()},
    "proof": {"passed": True},
    "plan": {"bytes": 6, "sha256": hashlib.sha256(b"engine").hexdigest()},
}


def bound(size: int) -> int:
    """Bytes that may be allocated to read a file of `size` bytes.

    16 MiB, for buffers of 1 MiB in up to four threads, their float32 copies and masks, and for what the first call of a
    parser imports; and 64 bytes for each byte of the file, which as JSON may be a list of small objects.
    """
    return (16 << 20) + 64 * size


@contextlib.contextmanager
def refusals() -> Iterator[list[ConvertError]]:
    """Lets a refusal pass, and gives it; any other exception is a bug, and so is a refusal that would exit with 1."""
    found: list[ConvertError] = []
    try:
        yield found
    except ConvertError as e:
        assert e.exit_code > 1 and str(e).replace("\n", "").isprintable(), repr(e)
        found.append(e)


def _npz(data: bytes, folder: pathlib.Path) -> None:
    """A zip file as it is ("z"), or one member's bytes in a sound zip, stored ("s") or deflated ("d")."""
    kind, content = data[:1], data[1:]
    path = folder / "f.npz"
    if kind in (b"s", b"d"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind == b"d" else zipfile.ZIP_STORED) as archive:
            archive.writestr("a/kernel.npy", content)
    else:
        path.write_bytes(content)
    _read_all(path)


def _safetensors(data: bytes, folder: pathlib.Path) -> None:
    """A file as it is ("z"), or its header with the right length before it and a kilobyte behind."""
    kind, content = data[:1], data[1:]
    path = folder / "f.safetensors"
    path.write_bytes(content if kind == b"z" else struct.pack("<Q", len(content)) + content + bytes(1024))
    _read_all(path)


def _msgpack(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "f.msgpack"
    path.write_bytes(data)
    _read_all(path)


def _read_all(path: pathlib.Path) -> None:
    leaves = read_container(path)
    with contextlib.suppress(CheckpointError):  # a value that is not finite says nothing of the others
        verify(path, [leaf for leaf in leaves.leaves.values() if leaf.size < 1 << 26])
    for name, leaf in leaves.leaves.items():
        if leaf.size * leaf.dtype.itemsize <= _READ_BYTES:
            array = leaves[name]
            assert array.shape == leaf.shape and array.dtype == leaf.dtype, (name, array.shape, leaf.shape)


def _image_arrays(data: bytes, folder: pathlib.Path) -> None:
    """An `.npz` of images as it is ("z"), or the bytes of its member `images` or, for upper case, `labels` in a sound
    zip."""
    kind, content = data[:1], data[1:]
    path = folder / "f.npz"
    if kind in (b"s", b"d", b"S", b"D"):
        pixels = io.BytesIO()
        np.save(pixels, np.zeros((2, 2, 2, 3), np.uint8))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind in b"dD" else zipfile.ZIP_STORED) as archive:
            archive.writestr("images.npy", content if kind in b"sd" else pixels.getvalue())
            if kind in b"SD":
                archive.writestr("labels.npy", content)
    else:
        path.write_bytes(content)
    source = open_images(path)
    assert source.labels is None or (source.labels.dtype == np.int64 and source.labels.shape == (len(source),))
    assert source.read(len(source) - 1).dtype == np.uint8


def _tables(data: bytes, folder: pathlib.Path) -> None:
    """The bytes after the first are a list of images (its kind is the first byte), or the `labels.csv` of a folder
    ("l") or zip ("L")."""
    kind, content = data[:1], data[1:]
    if kind == b"L":
        path = folder / "f.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/1.png", _PNG)
            archive.writestr("2.png", _PNG)
            archive.writestr("labels.csv", content)
    else:
        path = folder / {b"c": "list.csv", b"t": "list.tsv", b"x": "list.txt"}.get(kind, "")
        for name in ("a/1.png", "2.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(_PNG)
        (folder / "labels.csv" if path == folder else path).write_bytes(content)
    source = open_images(path)
    if source.labels is not None:
        assert source.labels.dtype == np.int64 and source.labels.shape == (len(source),) and source.labels.min() >= 0


def _archive(data: bytes, folder: pathlib.Path) -> None:
    """A zip archive of images, and the images themselves."""
    path = folder / "f.zip"
    path.write_bytes(data)
    source = open_images(path)
    for i in range(min(len(source), 4)):
        assert source.read(i).shape[-1] == 3


def _calibration_cache(data: bytes, folder: pathlib.Path) -> None:
    """A cache and, after a NUL, the key beside it."""
    content, _, key = data.partition(b"\0")
    path = folder / "calibration.cache"
    path.write_bytes(content)
    if key:
        (folder / "calibration.cache.json").write_bytes(key)
    if load_cache(path, CacheKey("entropy", "8.6.1", "0" * 64)) is not None:
        scales = np.array(list(parse_cache(content)[1].values()))
        assert scales.size and np.isfinite(scales).all() and (scales >= 0).all(), scales


def _sidecar(data: bytes, folder: pathlib.Path) -> None:
    """A `.plan.json` as it is, or a dotted key, a NUL and the JSON that a sound one has there instead."""
    bundle, plan = Bundle(folder), folder / "fp16.plan"
    plan.write_bytes(b"engine")
    bundle.onnx().write_bytes(b"graph")
    key, _, value = data.partition(b"\0")
    text = _spliced(_SIDECAR, key.decode(errors="replace"), value) if value else data
    sidecar_path(plan).write_bytes(text)
    proof_of(plan, "")
    graph = built_from(bundle, plan)
    for _ in range(2):  # alone, as on a host that was given the plan, and in a bundle
        for ask in (require_proof, require_conversion):
            with refusals():
                ask(bundle, plan)
        bundle.manifest.write_text('{"stages": []}')
    for backend in (_TENSORRT, dataclasses.replace(_TENSORRT, name="rtx", version="1.2.0")):
        with refusals():
            check_sidecar(plan, backend, onnx_path=graph)
    require_model(bundle, plan)


def _precision_plan(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "plan.json"
    path.write_bytes(data)
    assert all(isinstance(name, str) for name in read_plan(path, "int8"))


def _spliced(record: dict[str, Any], key: str, value: bytes) -> bytes:
    """The JSON of a record in which the entry of a dotted key is replaced by any bytes."""
    mark, copied = "<here>", json.loads(json.dumps(record))
    *outer, last = key.split(".")
    inner = copied
    for part in outer:
        inner = inner.get(part) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        return value
    inner[last] = mark
    return json.dumps(copied).encode().replace(json.dumps(mark).encode(), value)


def _text(data: bytes, folder: pathlib.Path) -> None:
    """The bytes after the first are token ids ("n"), prompts ("p"), or a tokenizer that is given a prompt: a vocab.txt
    ("v"), merges ("m"), a tokenizer.json ("j") or a SentencePiece model ("s")."""
    kind, content = data[:1], data[1:]
    name, tokenizer, start, end = _TEXTS.get(kind, _TEXTS[b"p"])
    (folder / name).write_bytes(content)
    rule = Prompting(tokenizer, 8, 600, start=start, end=end, pad=0, lower=True, sticky_end=True)
    if kind in b"vmjs":
        ids = open_tokenizer(folder / name, rule)(["a cat's photo", ""])
    else:
        ids = read_tokens(folder / name, rule) if kind == b"n" else np.zeros((len(read_prompts(folder / name)), 8), int)
    assert ids.shape[1] == 8 and ids.min() >= 0 and ids.max() < 600


TARGETS = {
    "npz": _npz,
    "safetensors": _safetensors,
    "msgpack": _msgpack,
    "tables": _tables,
    "calibration_cache": _calibration_cache,
    "sidecar": _sidecar,
    "precision_plan": _precision_plan,
    "image_arrays": _image_arrays,
    "archive": _archive,
    "text": _text,
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What became of one input.

    Attributes:
        refused: with a ConvertError.
        peak_bytes: allocated at once, beyond what was before.
    """

    refused: bool
    peak_bytes: int


def attempt(target: Callable[[bytes, pathlib.Path], None], data: bytes) -> Attempt:
    """Gives one input to a target; tracemalloc has to be tracing.

    Raises:
        Exception: whatever is no ConvertError; AssertionError where too much was allocated.
    """
    with tempfile.TemporaryDirectory(dir=_TEMPORARY) as folder:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        with refusals() as refused:
            target(data, pathlib.Path(folder))
        peak = tracemalloc.get_traced_memory()[1] - before
    assert peak <= bound(len(data)), f"{peak} bytes allocated to read {len(data)}"
    return Attempt(bool(refused), peak)
