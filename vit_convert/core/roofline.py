"""A roofline: what a model computes and moves, compared with the two ceilings of a GPU."""

import dataclasses
from collections.abc import Mapping

from vit_convert.core.record import Record

MEMORY = "memory"  # the name of memory bandwidth among measured values
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work(Record):
    """A model's work, counted in its graph.

    Attributes:
        gflop_per_image: of all matrix products and convolutions; a multiply-add counts as two.
        weights: number of weights in these products, each read once per run.
        values_per_image: number of values that the products with weights read and write. Attention and everything
            between these products is assumed to be fused.
    """

    gflop_per_image: float
    weights: int
    values_per_image: int

    def flop_per_byte(self, batch: int, precision: str) -> float:
        """Operations per byte moved.

        Args:
            batch: images of a run.
            precision: of weights and values.

        Example:
            >>> work = Work(gflop_per_image=2e-9 * 10 * 20, weights=10 * 20, values_per_image=10 + 20)
            >>> work.flop_per_byte(1, "fp32")  # 400 operations, 230 numbers of four bytes
            0.43478260869565216
        """
        moved = _BYTES.get(precision, 4) * (self.weights + batch * self.values_per_image)
        return 1e9 * self.gflop_per_image * batch / moved if moved else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings(Record):
    """A GPU's upper limits.

    Attributes:
        tflops: of dense products, by precision.
        memory_gb_per_s: read and written together.
        measured: the precisions, and "memory", that were measured on this GPU.
        sheet: the GPU whose data sheet gives the others; "" if there is none.
    """

    tflops: Mapping[str, float]
    memory_gb_per_s: float
    measured: tuple[str, ...] = ()
    sheet: str = ""

    @property
    def source(self) -> str:
        """The source of the limits, in words.

        Example:
            >>> tflops = {"fp16": 700.0, "int8": 1979.0}
            >>> Ceilings(tflops=tflops, memory_gb_per_s=3350.0, measured=("fp16",), sheet="H100").source
            'measured: fp16; from the data sheet of H100: int8, memory'
        """
        others = [name for name in (*self.tflops, MEMORY) if name not in self.measured]
        told = [f"measured: {', '.join(self.measured)}"] if self.measured else []
        return "; ".join([*told, *([f"from the data sheet of {self.sheet}: {', '.join(others)}"] if others else [])])

    def attainable_tflops(self, flop_per_byte: float, precision: str) -> float:
        """The lower of the two ceilings; 0 if that of the precision is unknown.

        Example:
            >>> found = Ceilings(tflops={"fp16": 700.0}, memory_gb_per_s=4000.0)
            >>> found.attainable_tflops(100.0, "fp16"), found.attainable_tflops(1000.0, "fp16")
            (400.0, 700.0)
        """
        peak = self.tflops.get(precision)
        return 0.0 if peak is None else min(peak, flop_per_byte * self.memory_gb_per_s / 1e3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline(Record):
    """What measurements are compared with.

    Attributes:
        gpu: on which they were made.
        work: of the model.
        ceilings: of the GPU; None if unknown.
    """

    gpu: str
    work: Work
    ceilings: Ceilings | None = None


# Dense products in TFLOP/s (fp32 without tensor cores; fp16 also for bf16; int8, and fp8 if available) and memory
# in GB/s. Source: NVIDIA's data sheets. The first row whose words all occur in the GPU's name is used.
_SHEETS: tuple[tuple[str, float, float, float, bool, float], ...] = (
    ("H200", 67, 989, 1979, True, 4800),
    ("H100 PCIe", 51, 756, 1513, True, 2000),
    ("H100 NVL", 60, 835, 1671, True, 3900),
    ("H100", 67, 989, 1979, True, 3350),
    ("A100 PCIE 80GB", 19.5, 312, 624, False, 1935),
    ("A100 80GB", 19.5, 312, 624, False, 2039),
    ("A100", 19.5, 312, 624, False, 1555),
    ("A10", 31.2, 125, 250, False, 600),
    ("L40S", 91.6, 362, 733, True, 864),
    ("L4", 30.3, 121, 242, True, 300),
    ("T4", 8.1, 65, 130, False, 320),
)


def data_sheet(gpu: str) -> Ceilings | None:
    """The ceilings from a GPU's data sheet; None for a GPU that is not listed.

    Args:
        gpu: its name, as the driver reports it.

    Example:
        >>> found = data_sheet("NVIDIA A100-SXM4-80GB")
        >>> found.tflops["fp16"], found.memory_gb_per_s, data_sheet("Some GPU")
        (312, 2039, None)
    """
    words = gpu.replace("-", " ").upper().split()
    for name, fp32, half, quarter, has_fp8, memory in _SHEETS:
        if {*name.upper().split()} <= {*words}:
            tflops = {"fp32": fp32, "fp16": half, "bf16": half, "int8": quarter}
            if has_fp8:
                tflops["fp8"] = quarter
            if name == "T4":
                del tflops["bf16"]  # of which it has none
            return Ceilings(tflops=tflops, memory_gb_per_s=memory, sheet=f"NVIDIA {name}")
    return None
