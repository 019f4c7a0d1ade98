"""Configs: partial ones, mistakes, and what the command line changes."""

import pathlib

import ml_collections
import numpy as np
import pytest

from vit_convert.__main__ import parse_config
from vit_convert.core.config import check_values, complete, default_config, image_size, precisions
from vit_convert.core.config_files import find_config
from vit_convert.core.errors import UsageError
from vit_convert.core.overrides import dotted_keys

CONFIG = """
from vit_convert.core.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = "a.npz"
    return config
"""


@pytest.fixture
def parse(tmp_path):
    """Parses a config file with overrides."""
    path = tmp_path / "mine.py"

    def parse(*overrides: str, text: str = CONFIG):
        path.write_text(text)
        return parse_config(["vit_convert", f"--config={path}", *overrides])[0]

    return parse


def given(**values):
    config = ml_collections.ConfigDict({"checkpoint": "a.npz"})
    for key, value in values.items():
        config[key] = value
    return config


def test_partial_config_takes_the_defaults():
    config = complete(given(batch=ml_collections.ConfigDict({"max": 128})), "b32")
    assert (config.name, config.checkpoint, config.batch.max, config.batch.opt) == (
        "b32",
        "a.npz",
        128,
        default_config().batch.opt,
    )
    with pytest.raises(AttributeError, match="locked"):
        config.batch.maximum = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precison": "fp16"}, r"config\.precison: unknown key\. Did you mean precision"),
        ({"batch": ml_collections.ConfigDict({"maxx": 3})}, r"config\.batch\.maxx: unknown key\. Did you mean max"),
        ({"batch": 3}, r"config\.batch: 3 is not a group of keys"),
        ({"layout": 3}, r"config\.layout: 3 is a int, expected str"),
        ({"text": {"batch": {"max": 1.5}}}, r"config\.text\.batch\.max: 1\.5 is a float, expected int"),
        ({"calibration": {"max_error": 10**400}}, r"config\.calibration\.max_error: .* too large for a float"),
        ({"text": {"calibration": {"max_error": 10**400}}}, r"config\.text\.calibration\.max_error: .* too large"),
        (
            {"engine": ml_collections.ConfigDict({"opt_level": "high"})},
            r"config\.engine\.opt_level: 'high' is a str, expected int",
        ),
    ],
)
def test_mistake_in_a_file(values, message):
    with pytest.raises(UsageError, match=message):
        complete(given(**values), "x")


def test_what_is_not_a_config():
    with pytest.raises(UsageError, match=r"get_config\(\) returned dict, it must return a ConfigDict"):
        complete({"checkpoint": "a.npz"}, "x")


def test_whole_numbers_and_lists_are_taken():
    config = complete(given(engine=ml_collections.ConfigDict({"workspace_gib": 8}), keep_fp32=["head"]), "x")
    assert config.engine.workspace_gib == 8.0
    assert isinstance(config.engine.workspace_gib, float)
    assert tuple(config.keep_fp32) == ("head",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "trt9"}, r"config\.target='trt9': not one of auto, trt8"),
        (
            {"engine": ml_collections.ConfigDict({"int8_lowering": "fuse"})},
            r"'fuse': not one of .*'' \(empty\).* Did you mean fused",
        ),
        ({"precision": "fp61"}, r"'fp61' is not one of .* Did you mean fp16"),
        ({"precision": ""}, "is not one of"),
        ({"layout": "NWHC"}, r"config\.layout='NWHC': not one of NHWC, NCHW\. Did you mean"),
        ({"name": "a/b"}, r"config\.name='a/b'"),
        ({"image_size": "224x"}, r"config\.image_size='224x'"),
        ({"image_size": (1, 2, 3)}, r"config\.image_size=\(1, 2, 3\)"),
        ({"image_size": 0}, r"config\.image_size=0"),
        ({"image_size": (223.9, 224)}, r"config\.image_size=\(223\.9, 224\)"),
        ({"image_size": True}, r"config\.image_size=True"),
        ({"batch": ml_collections.ConfigDict({"min": 9})}, "min 9, opt 8, max 64 must rise from 1"),
        (
            {"check": ml_collections.ConfigDict({"num_images": 0})},
            r"config\.check\.num_images=0: must be a whole number from 1 to 1,024",
        ),
        ({"checkpoint": ""}, r"config\.checkpoint is empty"),
        *(
            (
                {
                    "engine": ml_collections.ConfigDict({"calibrator": True}),
                    "calibration": ml_collections.ConfigDict({"method": method}),
                },
                rf"calibration\.method={method}: TensorRT calibrates by entropy or minmax",
            )
            for method in ("percentile", "mse")
        ),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(UsageError, match=message):
        complete(given(**values), "x")


@pytest.mark.parametrize("key", dotted_keys(default_config()))
def test_none(key):
    """A value of None is an empty text, is what a placeholder holds anyway, or is refused by the key's name."""
    config = default_config()
    config.checkpoint = "a.npz"
    group, _, field = key.rpartition(".")
    held = (config[group] if group else config)[field]
    (config[group] if group else config)[field] = None
    try:
        result = complete(config, "x")
    except UsageError as e:
        assert key in str(e) or key.split(".")[-1] in str(e)
    else:
        assert held is None or isinstance(held, str)
        value = (result[group] if group else result)[field]
        assert value == ("x" if key == "name" else None if held is None else "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (np.array([224, 384]), (224, 384)),
        (np.int64(224), (224, 224)),
        ("", None),
        (224, (224, 224)),
        ((224, 384), (224, 384)),
        ([224, 384], (224, 384)),
        ("224", (224, 224)),
        ("224x384", (224, 384)),
    ],
)
def test_image_size(value, expected):
    assert image_size(complete(given(image_size=value), "x")) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("fp32", ["fp32"]),
        ("int8", ["fp16", "int8"]),
        (" fp16 , fp32,fp16", ["fp32", "fp16"]),
        ("fp8,bf16", ["bf16", "fp16", "fp8"]),
    ],
)
def test_precisions(asked, expected):
    assert precisions(complete(given(precision=asked), "x")) == expected


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("--config.precision=int8", "precision", "int8"),
        ("--config.image_size=384", "image_size", (384, 384)),
        ("--config.image_size=(224,384)", "image_size", (224, 384)),
        ("--config.image_size=224x384", "image_size", (224, 384)),
        ("--config.batch.max=16", "batch.max", 16),
        ("--config.check.rtol=1e-3", "check.rtol", 1e-3),
        ("--config.engine.workspace_gib=2", "engine.workspace_gib", 2.0),
        ("--config.keep_fp32=('block_11',)", "keep_fp32", ("block_11",)),
        ("--config.keep_fp32=head*", "keep_fp32", ("head*",)),
        ("--config.keep_fp32=('block_11','head*')", "keep_fp32", ("block_11", "head*")),
        ("--config.lowerings=('matmul','primitives')", "lowerings", ("matmul", "primitives")),
        ("--config.benchmark.batches=(1,2)", "benchmark.batches", (1, 2)),
        ("--config.posemb_grid=(7,9)", "posemb_grid", (7, 9)),
        ("--config.taps=true", "taps", True),
        ("--config.taps=false", "taps", False),
        ("--config.taps", "taps", True),
        ("-config.taps", "taps", True),
        ("--noconfig.taps", "taps", False),
        ("-noconfig.taps", "taps", False),
        ("--config.engine.tf32", "engine.tf32", True),
        ("--noconfig.engine.tf32", "engine.tf32", False),
        ("--config.sensitivity", "sensitivity", True),
        ("--config.name=other", "name", "other"),
    ],
)
def test_overrides(parse, override, key, expected):
    config = parse(override)
    value = image_size(config) if key == "image_size" else config
    for part in key.split("."):
        value = value if key == "image_size" else value[part]
    assert (tuple(value) if isinstance(expected, tuple) else value) == expected


def test_override_in_two_words(parse):
    assert parse("--config.batch.max", "16").batch.max == 16


def test_a_switch_leaves_the_next_word_alone(parse):
    config = parse("--config.taps", "--config.batch.max", "16", "--noconfig.taps")
    assert (config.taps, config.batch.max) == (False, 16)  # the last word counts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.precison=int8", r"--config\.precison: unknown key\. Did you mean precision"),
        ("--config.batch.maks=3", r"--config\.batch\.maks: unknown key\. Did you mean batch\.ma"),
        ("--config.batch.max=many", r"--config\.batch\.max=many"),
        ("--config.batch.max=4", r"min 1, opt 8, max 4"),
        ("--config.check.rtol=small", r"--config\.check\.rtol=small"),
        ("--config.taps=perhaps", r"--config\.taps=perhaps"),
        ("--noconfig.taps=true", r"--noconfig\.taps=true: takes no value"),
        (
            "--noconfig.batch.max",
            r"--noconfig\.batch\.max: only a switch can be turned off this way, and batch\.max holds 64",
        ),
        ("--noconfig.tabs", r"--noconfig\.tabs: unknown key\. Did you mean taps"),
        ("--config.batch.max", r"--config\.batch\.max: no value given"),
        ("--config.batch", r"--config\.batch: unknown key"),
        ("--config.=1", r"--config\.: unknown key"),
        ("--config.name=", r"config\.name=''"),
        ("--config.name=..", r"config\.name='\.\.'"),
        ("--config.name=.hidden", r"config\.name='\.hidden'"),
        ("--config.name=../x", r"config\.name='\.\./x'"),
        ("--config.name=/tmp/x", r"config\.name='/tmp/x'"),
        ("--config.name=--quiet", r"config\.name='--quiet'"),
        ("--config.name=" + "a" * 201, r"config\.name='aaa.*at most 200"),
        ("--config.name=" + "ä" * 101, r"config\.name='äää.*at most 200"),
        ("--config.image_size=100000", r"config\.image_size='?100000'?: .*16384"),
        ("--config.image_size=dynamic:32..100000", r"config\.image_size='dynamic:32\.\.100000': .*16384"),
        ("--config.batch.profiles=" + "(" * 500, r"config\.batch\.profiles="),
        ("--config.batch.max=" + "9" * 5000, r"--config\.batch\.max="),
        ("--config.keep_fp32=(", r"config\.keep_fp32=\('\(',\): names and patterns only"),
        (
            "--config.keep_fp32=block_10,block_11",
            r"config\.keep_fp32=\('block_10,block_11',\): names and patterns only",
        ),
        (
            "--config.lowerings=matmul,primitives",
            r"config\.lowerings=\('matmul,primitives',\): names and patterns only",
        ),
        ("--config.posemb_grid=seven", r"config\.posemb_grid=\('seven',\): must be whole numbers from 1 to 4,096"),
        ("--config.posemb_grid=7", r"config\.posemb_grid=\(7,\): expected \(rows, columns\)"),
        ("--config.benchmark.batches=few", r"config\.benchmark\.batches=\('few',\): must be whole numbers"),
        ("--config.benchmark.batches=()", r"config\.benchmark\.batches=\(\): holds no number"),
        ("--config.benchmark.streams=()", r"config\.benchmark\.streams=\(\): holds no number"),
        ("--config.batch.profiles=(0,1)", r"config\.batch\.profiles=\(0, 1\): must be whole numbers"),
        ("--config.image_size=(224", r"--config\.image_size=\(224|config\.image_size="),
    ],
)
def test_bad_overrides(parse, override, message):
    with pytest.raises(UsageError, match=message):
        parse(override)


def test_switch_with_its_value_as_a_word_of_its_own(parse):
    with pytest.raises(UsageError, match=r"--config\.taps false: a switch takes its value after '='"):
        parse("--config.taps", "false")


def test_every_config_that_ships_is_complete():
    folder = pathlib.Path(__file__).parents[2] / "configs"
    names = sorted(folder.glob("*.py"))
    assert names
    for path in names:
        config, _ = parse_config(["vit_convert", f"--config={path}"])
        assert config.name == path.stem
        check_values(config)


def test_config_is_found_by_its_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(CONFIG)
    assert pathlib.Path(find_config("mine")).samefile(tmp_path / "configs/mine.py")
    (tmp_path / "mine.py").write_text(CONFIG)
    assert pathlib.Path(find_config("mine.py")).samefile(tmp_path / "mine.py")  # here comes first
    with pytest.raises(
        UsageError, match=r"--config=mina\.py: no such file here or in configs/\. Did you mean mine\.py"
    ):
        find_config("mina.py")


@pytest.mark.parametrize(
    ("words", "name", "variant"),
    [("vit.py:B/16", "vit_B_16", "B/16"), ("vit:ViT-L_32", "vit_ViT-L_32", "L/32"), ("vit.py", "vit", "B/32")],
)
def test_one_file_serves_all_published_sizes(words, name, variant):
    config, _ = parse_config(["vit_convert", f"--config={words}"])
    assert (config.name, config.variant) == (name, variant) and config.checkpoint.startswith("gs://vit_models/")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("vit.py:B/33", r"variant 'B/33': no public checkpoint is known\. Did you mean B/32"),
        ("vit_b32.py:B/16", r"vit_b32\.py:B/16: its get_config\(\) takes no argument"),
    ],
)
def test_arguments_that_mean_nothing(words, message):
    with pytest.raises(UsageError, match=message):
        parse_config(["vit_convert", f"--config={words}"])
