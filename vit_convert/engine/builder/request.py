"""A build request, and the record that tells whether an existing engine already satisfies it."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.bundle import hash_value
from vit_convert.core.version import __version__
from vit_convert.engine.backend.graph_file import graph_file
from vit_convert.engine.backend.sidecar import Asked, BuildOptions, InsteadOf
from vit_convert.engine.runtime.profiles import Profile


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """A request for an engine.

    Attributes:
        onnx_path: the graph; external weights lie beside it.
        precision: fp32, fp16, bf16, int8 or fp8; the graph must be in it, unless a builder flag lowers fp32 to it.
        profiles: for each optimization profile, {input: (smallest, optimal, largest shape)}; none for static graphs.
        workspace_gib: maximum GPU memory that a layer may use as scratch; None leaves TensorRT's default, all of it.
        opt_level: builder optimization level, 0 to 5.
        timing_cache: folder for timings kept between builds, with a file for each version and GPU; None keeps none.
        tf32: whether fp32 products may round their inputs to TF32's 10 mantissa bits.
        keep_fp32: blocks, layers, scopes or patterns of node names to keep in fp32, if precision is a builder flag.
        hardware_compatible: make an engine for Ampere and every later GPU, at some cost in speed.
        version_compatible: make an engine that later versions of the same major load.
        calibrator: what `make_calibrator` returned, for int8 from a graph without Q/DQ nodes.
        ranges: for int8 from a graph without Q/DQ nodes, for each tensor the |x| that the largest int8 value
            represents.
        preprocessing: the preprocessing record that travels with the engine.
        model: hashes of the model.onnx that the graph was made from, for the sidecar.
        instead_of: the lowering that could not be built, in place of which this is built, for the sidecar.
    """

    onnx_path: str | os.PathLike[str]
    precision: str
    profiles: Sequence[Profile] = ()
    workspace_gib: float | None = None
    opt_level: int = 3
    timing_cache: str | os.PathLike[str] | None = None
    tf32: bool = False
    keep_fp32: Sequence[str] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    calibrator: Any = None
    ranges: Mapping[str, float] = dataclasses.field(default_factory=dict)
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, str] | None = None
    instead_of: InsteadOf | None = None

    @property
    def has_calibrator(self) -> bool:
        """Whether int8 comes from a calibrator or given ranges, and not from the graph."""
        return self.calibrator is not None or bool(self.ranges)

    @functools.cached_property
    def asked(self) -> Asked:
        """The request as a sidecar records it, with the graph as it is when this is first read."""
        profiles = (
            {name: tuple(tuple(shape) for shape in shapes) for name, shapes in ranges.items()}
            for ranges in self.profiles
        )
        options = BuildOptions(
            workspace_gib=self.workspace_gib,
            opt_level=self.opt_level,
            tf32=self.tf32,
            keep_fp32=tuple(self.keep_fp32),
            hardware_compatible=self.hardware_compatible,
            version_compatible=self.version_compatible,
            ranges=hash_value(dict(self.ranges)) if self.ranges else None,
            calibrator=dataclasses.asdict(self.calibrator.key) if self.calibrator is not None else None,
        )
        return Asked(
            vit_convert=__version__,
            precision=self.precision,
            profiles=tuple(profiles),
            onnx=graph_file(self.onnx_path),
            preprocessing=dict(self.preprocessing),
            options=options,
        )
