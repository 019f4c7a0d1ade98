"""What all models of a bundle have in common: the request, and the first lines of a config."""

import dataclasses

from vit_convert.core.manifest import Manifest
from vit_convert.core.signature import Output
from vit_convert.core.version import __version__
from vit_convert.serve.triton.offered import Offered
from vit_convert.serve.triton.pbtxt import Chosen, quoted
from vit_convert.serve.triton.repository import HEADER

RUNTIMES = ("auto", "tensorrt", "onnxruntime", "python")
CALLS = "calls"  # the parameter that lists the models called by one of our models
_BACKENDS = {
    "tensorrt": ("tensorrt", "tensorrt_plan"),
    "onnxruntime": ("onnxruntime", "onnxruntime_onnx"),
    "python": ("python", ""),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        name: the beginning of the models' names.
        runtime: one of RUNTIMES.
        precision: of the engine, or of the graph under onnxruntime; "" for the default.
        version: number of the version folder.
        delay_us: maximum time that a request waits for others; None derives it.
        labels: a file with the names of the classes, or "".
        top_k: how many classes an ensemble returns.
        network: name of the network's model; "" for `name`.
        response_cache: whether the network's answers are kept, see `choices.response_cache`.
        tokenizer: files of a pair's tokenizer, or "".
    """

    name: str
    runtime: str = "auto"
    precision: str = ""
    version: int = 1
    delay_us: int | None = None
    labels: str = ""
    top_k: int = 5
    network: str = ""
    tokenizer: str = ""
    response_cache: bool = False

    @property
    def model(self) -> str:
        """The name of the network's model."""
        return self.network or self.name


def head(offered: Offered, name: str, backend: str) -> list[Chosen]:
    """The origin of the model, its name, and what runs it."""
    made = Manifest.read(offered.bundle).result("checkpoint").get("summary", "")
    kind, platform = _BACKENDS[backend]
    fields = f"name: {quoted(name)}\nbackend: {quoted(kind)}" + (f"\nplatform: {quoted(platform)}" if platform else "")
    return [
        Chosen(f"{HEADER} {__version__} from {offered.bundle.root.name}{f' ({made})' if made else ''}."),
        Chosen(fields),
    ]


def known(offered: Offered, output: Output) -> Output:
    """An output whose last dimension is taken from JAX's values if the bundle, of an earlier version, does not give
    it."""
    return dataclasses.replace(output, shape=(*output.shape[:-1], int(offered.expected[output.name].shape[-1])))
