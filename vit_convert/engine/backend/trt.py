"""What differs between TensorRT 8.6, 10, 11 and TensorRT-RTX, all in one place: names are looked up, versions never
compared."""

import dataclasses
import functools
import importlib
from typing import Any

from vit_convert import kernels
from vit_convert.core.dialect import Dialect, dialect_of
from vit_convert.core.errors import BuildError
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.log_capture import make_logger

# Names that some backends lack, with the backends that have them; all other names used in engine/ exist in all four.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "Builder.platform_has_fast_fp16": ("8.6", "10"),
    "Builder.platform_has_fast_int8": ("8.6", "10"),
    "BuilderFlag.FP16": ("8.6", "10"),
    "BuilderFlag.INT8": ("8.6", "10"),
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": ("8.6", "10"),
    "ComputeCapability": ("rtx",),
    "DataType.BF16": ("10", "11", "rtx"),
    "ExecutionContextAllocationStrategy.USER_MANAGED": ("10", "11", "rtx"),
    "IBuilderConfig.int8_calibrator": ("8.6", "10"),
    "IBuilderConfig.progress_monitor": ("10", "11", "rtx"),
    "IBuilderConfig.set_calibration_profile": ("8.6", "10"),
    "ICudaEngine.create_execution_context_without_device_memory": ("8.6", "10"),
    "ICudaEngine.device_memory_size": ("8.6", "10"),
    "ICudaEngine.device_memory_size_v2": ("10", "11", "rtx"),
    "IExecutionContext.set_device_memory": ("10", "11", "rtx"),
    "IInt8EntropyCalibrator2": ("8.6", "10"),
    "IInt8MinMaxCalibrator": ("8.6", "10"),
    "ILayer.precision": ("8.6", "10"),
    "ITensor.set_dynamic_range": ("8.6", "10"),
    "ILayer.set_output_type": ("8.6", "10"),
    "IProgressMonitor": ("10", "11", "rtx"),
    "LayerType.ATTENTION_INPUT": ("10", "11", "rtx"),
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": ("8.6", "10"),
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": ("10", "11", "rtx"),
    "OnnxParser.supports_model_v2": ("10", "11", "rtx"),
    "ParserError.node_name": ("10", "11", "rtx"),
    "BuilderFlag.PREFER_PRECISION_CONSTRAINTS": ("8.6", "10"),
    "PreviewFeature.PROFILE_SHARING_0806": ("8.6", "10"),
}

# TensorRT's DataType names (the same in every version) and numpy's; the float ones with their precision.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
FLOAT_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
QUANTIZED_PRECISIONS = {"INT8": "int8", "FP8": "fp8"}
PRECISIONS = (*FLOAT_PRECISIONS.values(), *QUANTIZED_PRECISIONS.values())

_MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_INSTALL = {"tensorrt": "pip install tensorrt", "rtx": "pip install tensorrt-rtx"}


@dataclasses.dataclass(frozen=True)
class Backend:
    """One TensorRT, and what it can do.

    Attributes:
        name: "tensorrt" or "rtx".
        version: its own version string.
        module: the imported package.
        gpu: the GPU that it uses; None only for RTX, which builds without one.
        logger: the only logger of this process, since TensorRT keeps the first that it gets.
    """

    name: str
    version: str
    module: Any
    gpu: cuda.Gpu | None
    logger: Any

    def find(self, path: str) -> Any:
        """Looks up one of the OPTIONAL names.

        Args:
            path: "BuilderFlag.FP16", "IProgressMonitor".

        Returns:
            The object, or None if this backend does not have it.
        """
        if path not in OPTIONAL:
            raise KeyError(f"{path} is not declared in OPTIONAL")
        value = self.module
        for part in path.split("."):
            value = getattr(value, part, None)
        return value

    @property
    def weakly_typed(self) -> bool:
        """Whether precision may be a builder flag, with TensorRT choosing the type of each layer."""
        return self.find("BuilderFlag.FP16") is not None

    @property
    def strongly_typed(self) -> bool:
        """Whether a network can be built in exactly the types of its graph."""
        return self.find("NetworkDefinitionCreationFlag.STRONGLY_TYPED") is not None or not self.weakly_typed

    @property
    def dialect(self) -> Dialect:
        """Its dialect: the graphs that it reads."""
        return dialect_of(rtx=self.name == "rtx", strongly_typed=self.strongly_typed, weakly_typed=self.weakly_typed)

    @property
    def has_calibrator(self) -> bool:
        """Whether TensorRT's own INT8 calibrators exist."""
        return self.find("IInt8EntropyCalibrator2") is not None

    @property
    def has_progress_monitor(self) -> bool:
        """Whether a build reports its progress."""
        return self.find("IProgressMonitor") is not None

    @property
    def has_timing_cache(self) -> bool:
        """Whether a timing cache speeds up the next build; RTX accepts one and ignores it."""
        return self.name != "rtx"

    @property
    def targets(self) -> list[str]:
        """Compute capabilities that an engine built here runs on: the GPU's ("sm90"), or all that RTX knows."""
        if self.name == "rtx":
            known = self.find("ComputeCapability").__members__
            return sorted((name.lower() for name in known if name.startswith("SM")), key=lambda arch: int(arch[2:]))
        return [self.gpu.arch] if self.gpu else []

    @property
    def arch(self) -> str:
        """The `<arch>` of an engine's folder: the GPU's compute capability, or "all" for RTX."""
        return "all" if self.name == "rtx" else self.targets[0]

    def supports(self, precision: str) -> bool:
        """Whether engines of a precision can be built.

        Args:
            precision: one of PRECISIONS.
        """
        if precision == "bf16":
            return self.strongly_typed and self.find("DataType.BF16") is not None
        if precision == "fp8":  # 8.6 has the type and the flag, but its ONNX parser cannot read FP8
            return self.strongly_typed
        return precision in PRECISIONS

    def network_flags(self, *, strongly_typed: bool) -> int:
        """The bit mask for `create_network`.

        Args:
            strongly_typed: whether the network keeps the graph's types.
        """
        if strongly_typed:
            flag = self.find("NetworkDefinitionCreationFlag.STRONGLY_TYPED")
        else:
            flag = self.find("NetworkDefinitionCreationFlag.EXPLICIT_BATCH")
        return 0 if flag is None else 1 << int(flag)


def load_backend(name: str = "auto", *, for_this_gpu: bool = False) -> Backend:
    """Loads TensorRT.

    Args:
        name: "tensorrt", "rtx", or "auto": TensorRT if it and a GPU are present, else TensorRT-RTX.
        for_this_gpu: "auto" skips a TensorRT that cannot build for this host's GPU.

    Returns:
        The backend, the same object each time.

    Raises:
        BuildError: the requested TensorRT is not installed or has no GPU, or "auto" finds none.
    """
    if name != "auto":
        return _load(name)
    reasons = []
    for candidate in _MODULES:
        try:
            backend = _load(candidate)
        except BuildError as e:
            reasons.append(str(e))
            continue
        if not for_this_gpu or backend.gpu is None or backend.gpu.arch in backend.targets:
            return backend
        reasons.append(
            f"{candidate} {backend.version}: builds for {', '.join(backend.targets)}, here is {backend.gpu.arch}"
        )
    raise BuildError(
        f"no TensorRT can build here: {'; '.join(reasons)}",
        fix=f"{_INSTALL['rtx']} (no GPU needed) or {_INSTALL['tensorrt']}.",
    )


@functools.cache
def _load(name: str) -> Backend:
    if name not in _MODULES:
        raise BuildError(f"engine backend {name!r}: unknown", fix=f"Use auto, {' or '.join(_MODULES)}.")
    gpu = cuda.gpu()
    if name == "tensorrt" and gpu is None:
        raise BuildError(
            "tensorrt: this host has no GPU, and TensorRT builds only on one",
            fix="Use a GPU host, or engine.backend=rtx.",
        )
    try:
        module = importlib.import_module(_MODULES[name])
    except (ImportError, OSError) as e:  # OSError: the package is installed, but its libraries are not
        raise BuildError(f"{_MODULES[name]}: cannot be imported ({e})", fix=f"{_INSTALL[name]}.") from e
    backend = Backend(name, module.__version__, module, gpu, make_logger(module))
    if not backend.strongly_typed:  # graphs and engines of TensorRT 8 may hold its attention plugin
        module.init_libnvinfer_plugins(backend.logger, "")
        kernels.register()
    return backend
