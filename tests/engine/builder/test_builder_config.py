"""What a build is told, setting by setting, on a builder that notes it: real ones show little of it."""

import types

import pytest

from vit_convert.core.errors import BuildError
from vit_convert.engine.builder.builder_config import configure
from vit_convert.engine.builder.network import ParsedGraph
from vit_convert.engine.builder.request import BuildRequest

TRT = types.SimpleNamespace(
    ProfilingVerbosity=types.SimpleNamespace(DETAILED="detailed"),
    MemoryPoolType=types.SimpleNamespace(WORKSPACE="workspace"),
    BuilderFlag=types.SimpleNamespace(TF32="tf32", VERSION_COMPATIBLE="versions"),
    HardwareCompatibilityLevel=types.SimpleNamespace(AMPERE_PLUS="ampere+"),
)


class Config:
    """`IBuilderConfig`: TF32 is on to begin with, as in TensorRT."""

    def __init__(self, accepts=True):
        self.flags, self.pools, self.previews, self.profiles, self.accepts = {"tf32"}, {}, {}, [], accepts
        self.hardware_compatibility_level = "none"
        self.clear_flag, self.set_flag = self.flags.discard, self.flags.add
        self.set_memory_pool_limit = self.pools.__setitem__
        self.set_preview_feature = self.previews.__setitem__

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1 if self.accepts else -1

    def set_calibration_profile(self, profile):
        self.calibration = profile.shapes


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, *shapes):
        self.shapes[name] = shapes


def told(name="tensorrt", sharing=None, inputs=None, accepts=True, **request):
    """What a config holds in the end."""
    made = Config(accepts)
    tensors = [types.SimpleNamespace(name=key, shape=shape) for key, shape in (inputs or {"x": (4, 3)}).items()]
    network = types.SimpleNamespace(num_inputs=len(tensors), get_input=tensors.__getitem__)
    backend = types.SimpleNamespace(
        name=name, module=TRT, find={"PreviewFeature.PROFILE_SHARING_0806": sharing}.get
    )  # fmt: skip
    builder = types.SimpleNamespace(create_builder_config=lambda: made, create_optimization_profile=Profile)
    asked = BuildRequest("x.onnx", "fp32", **request)
    assert configure(ParsedGraph(backend, "x.onnx", network), builder, asked) is made
    return made


def test_nothing_but_what_is_asked_for():
    found = told()
    assert (found.builder_optimization_level, found.profiling_verbosity) == (3, "detailed")
    assert (found.pools, found.previews, found.profiles) == ({}, {}, [])
    assert found.flags == set()  # products in full float32, unless TF32 is asked for
    assert found.hardware_compatibility_level == "none"
    assert not hasattr(found, "int8_calibrator") and not hasattr(found, "calibration")


def test_each_setting():
    assert told(tf32=True).flags == {"tf32"}
    assert told(version_compatible=True).flags == {"versions"}
    assert told(opt_level=5).builder_optimization_level == 5
    assert told(workspace_gib=0.5).pools == {"workspace": 536_870_912}
    assert told(workspace_gib=3).pools == {"workspace": 3_221_225_472}
    assert told(hardware_compatible=True).hardware_compatibility_level == "ampere+"
    # an engine of RTX runs on all that it knows as it is
    assert told("rtx", hardware_compatible=True).hardware_compatibility_level == "none"
    assert told(sharing="sharing").previews == {"sharing": True}


def test_profiles():
    ranges = {"x": ((1, 3), (4, 3), (8, 3))}
    fixed = {"x": ((2, 3), (2, 3), (2, 3))}
    assert told(inputs={"x": (-1, 3)}, profiles=[ranges, fixed]).profiles == [ranges, fixed]
    two = {"x": ((1, 3),) * 3, "m": ((1,),) * 3}
    assert told(inputs={"x": (-1, 3), "m": (-1,)}, profiles=[two]).profiles == [two]


def test_dynamic_sizes_want_a_profile():
    assert told(inputs={"x": (4, 3)}).profiles == []
    for inputs in ({"x": (-1, 3)}, {"x": (4, 3), "m": (4, -1)}):
        with pytest.raises(BuildError, match=r"profiles: none given, and .* has dynamic sizes \(-1\)"):
            told(inputs=inputs)


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        (((1, 3), (1, 3), (1, 3)), True),
        (((1, 3), (4, 3), (4, 3)), True),
        (((0, 3), (1, 3), (2, 3)), False),
        (((2, 3), (1, 3), (4, 3)), False),
        (((1, 3), (4, 3), (2, 3)), False),
        (((1, 2), (1, 3), (1, 3)), False),
        (((1, 3), (1, 3), (1, 4)), False),
        (((1, 2), (1, 2), (1, 2)), False),
        (((1,), (1, 3), (1, 3)), False),
        (((1, 3), (1, 3), (1, 3, 3)), False),
        (((1, 3, 3), (1, 3, 3), (1, 3, 3)), False),
    ],
)
def test_a_profile_has_to_fit_the_graph(shapes, fits):
    if fits:
        assert told(inputs={"x": (-1, 3)}, profiles=[{"x": shapes}]).profiles == [{"x": shapes}]
        return
    with pytest.raises(BuildError, match=r"profile of x: .* does not fit the graph's \(-1, 3\)"):
        told(inputs={"x": (-1, 3)}, profiles=[{"x": shapes}])


@pytest.mark.parametrize("names", [("y",), ("x", "y"), ()])
def test_a_profile_has_to_name_the_inputs(names):
    with pytest.raises(BuildError, match=r"the graph's inputs are \['x'\]"):
        told(profiles=[dict.fromkeys(names, ((4, 3),) * 3)])


def test_a_profile_that_tensorrt_rejects():
    with pytest.raises(BuildError, match="TensorRT rejects it"):
        told(accepts=False, profiles=[{"x": ((4, 3),) * 3}])


def test_calibration_has_a_profile_of_its_own():
    calibrator = types.SimpleNamespace(get_batch_size=lambda: 7)
    found = told(inputs={"x": (-1, 3, 2)}, profiles=[{"x": ((1, 3, 2),) * 3}], calibrator=calibrator)
    assert found.int8_calibrator is calibrator
    assert found.calibration == {"x": ((7, 3, 2),) * 3} and len(found.profiles) == 1
