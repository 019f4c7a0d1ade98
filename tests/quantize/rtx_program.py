"""What a TensorRT-RTX engine will compute, as its plan says in words.

RTX compiles its kernels on the GPU, so a plan holds the program that they are compiled from: tensors with their types,
products by name with what they read, and the kernels' sources. It can be read without a GPU, unlike what TensorRT's
inspector says of an engine, which has to be loaded for it.
"""

import dataclasses
import re
from collections.abc import Iterable

from vit_convert.quantize.placement import Site

_TENSOR = re.compile(r'tensor=\{ [^\n]*?name="([^"]+)"[^\n]*? type=(\w+)')
_PRODUCT = re.compile(r'(?:fully_connected|corrltn)=\{ name="([^"]+)" output=\{[^}]*\} input=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution, outside of attention kernels.

    Attributes:
        name: of the node in the graph, or of the values of several that became one product.
        reads: the types of its two factors.
    """

    name: str
    reads: tuple[str, ...]


def products_of(plan: bytes) -> list[Product]:
    """Reads the products of a plan.

    Args:
        plan: a serialized engine.
    """
    text = plan.decode("latin-1")
    types = dict(_TENSOR.findall(text))

    def factors(words: str) -> tuple[str, ...]:
        return tuple(types.get(name, "unknown") for name in re.findall(r'"([^"]+)"', words)[:2])

    return [Product(name, factors(words)) for name, words in _PRODUCT.findall(text)]


def check_products(plan: bytes, sites: Iterable[Site]) -> list[str]:
    """Checks that each linear with pairs is multiplied in INT8, and any other product in FP16: none in FP32, and none
    whose INT8 factors are turned into floats before.

    Args:
        plan: the engine of an INT8 graph that is typed FP16.
        sites: of the linears with pairs.

    Returns:
        The names of the products in FP16.
    """
    found = products_of(plan)
    # queries, keys and values of one tensor become one product
    merged = {(s.tensor, "qkv" if s.kind in ("query", "key", "value") else s.node) for s in sites if s.weight}
    assert {product.reads for product in found} <= {("int8", "int8"), ("half", "half")}, found
    in_fp16 = [product.name for product in found if product.reads == ("half", "half")]
    assert len(found) - len(in_fp16) == len(merged), in_fp16
    return in_fp16
