"""What a command line converts: every source of jobs, their names, and what is refused before any work."""

import pytest

from vit_convert.batch.collect import Asked, collect
from vit_convert.batch.job import Job, shard_of
from vit_convert.core.config_files import find_config
from vit_convert.core.errors import UsageError


def names(**asked: object) -> list[str]:
    return [job.name for job in collect(Asked(**asked))]  # type: ignore[arg-type]


def converted(**asked: object) -> dict[str, str]:
    return {job.name: job.checkpoint for job in collect(Asked(**asked))}  # type: ignore[arg-type]


def test_globs_folders_and_files(touch):
    touch("zoo/b.npz", "zoo/a.npz", "zoo/deep/a.safetensors", "zoo/readme.txt", "one.npz", "x,y.npz")
    assert converted(checkpoints=["zoo/*.npz"]) == {"a": "zoo/a.npz", "b": "zoo/b.npz"}
    assert converted(checkpoints=["zoo"]) == {"a": "zoo/a.npz", "b": "zoo/b.npz", "deep_a": "zoo/deep/a.safetensors"}
    assert converted(checkpoints=["zoo/**/a.*"]) == {"a": "zoo/a.npz", "deep_a": "zoo/deep/a.safetensors"}
    assert converted(checkpoints=["one.npz,zoo/a.npz", "zoo/b.npz"]) == {
        "one": "one.npz",
        "a": "zoo/a.npz",
        "b": "zoo/b.npz",
    }
    assert converted(checkpoints=["x,y.npz"]) == {"x_y": "x,y.npz"}  # a file's own comma parts nothing
    assert converted(checkpoints=["one.npz:img"]) == {"one_img": "one.npz:img"}


def test_a_file_that_is_missing_is_left_to_its_conversion(touch):
    assert converted(checkpoints=["gone.npz"]) == {"gone": "gone.npz"}


def test_lists_hold_what_the_flag_holds(touch, tmp_path):
    touch("zoo/a.npz", "zoo/b.npz")
    (tmp_path / "list.txt").write_text("# mine\n\nzoo/*.npz\ngs://bucket/c.npz\n")
    assert converted(checkpoints=["list.txt"]) == {"a": "zoo/a.npz", "b": "zoo/b.npz", "c": "gs://bucket/c.npz"}


def test_addresses():
    given = ["gs://vit_models/augreg/Ti_16-lr_0.03-res_384.npz", "https://host/f/m.safetensors#sha256=00ff"]
    assert converted(checkpoints=given) == {"Ti_16-lr_0.03-res_384": given[0], "m": given[1]}


@pytest.mark.parametrize(
    ("given", "said"),
    [("none/*.npz", "no checkpoint there"), ("empty", "no checkpoint there"), ("gs://b/*.npz", "cannot hold a *")],
)
def test_what_names_nothing_is_refused(touch, tmp_path, given, said):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=said.replace("*", r"\*")):
        names(checkpoints=[given])


def test_nothing_to_convert():
    with pytest.raises(UsageError, match="nothing to convert"):
        names()


def test_equal_names_get_digits_that_do_not_depend_on_the_others(touch):
    touch("one/vit.npz", "two/vit.npz", "three/vit.npz", "one/other.npz")
    both = converted(checkpoints=["one/vit.npz", "two/vit.npz", "one/other.npz"])
    assert list(both)[2] == "other" and all(name.startswith("vit-") for name in list(both)[:2])
    assert (
        both.items() <= converted(checkpoints=["one/vit.npz", "two/vit.npz", "three/vit.npz", "one/other.npz"]).items()
    )


def test_what_is_named_twice_is_converted_once(touch):
    touch("zoo/a.npz")
    assert names(checkpoints=["zoo/a.npz", "zoo/*.npz"]) == ["a"]


def test_a_name_has_room_in_a_file_system(touch):
    (name,) = names(checkpoints=["gs://bucket/" + "x" * 300 + ".npz"])
    assert len(name) < 200


def test_a_csv(touch, tmp_path):
    (tmp_path / "t.csv").write_text(
        'name,checkpoint,precision,config.batch.max,_note\nx,a.npz,"fp16,int8",8,hello\n,b.npz,,,\n'
    )
    first, second = collect(Asked(table="t.csv", overrides=["--config.precision=fp32", "--config.layout=NCHW"]))
    assert first == Job(
        "x", "a.npz", ("--config.precision=fp16,int8", "--config.layout=NCHW", "--config.batch.max=8"), origin="t.csv:2"
    )  # the row's own value goes over the command line's
    assert (second.name, second.overrides) == ("b", ("--config.precision=fp32", "--config.layout=NCHW"))


def test_json_lines(touch, tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"checkpoint": "a.npz", "image_size": [32, 48], "taps": true}\n\n{"name": "y", "checkpoint": "b.npz"}\n'
    )
    first, second = collect(Asked(table="t.jsonl"))
    assert (first.name, first.make_config().image_size, first.make_config().taps) == ("a", (32, 48), True)
    assert second.name == "y"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("checkpoint,precison\na.npz,fp16\n", "t.csv:2: precison: unknown key. Did you mean precision"),
        ("checkpoint,precision\na.npz\n", "t.csv:2: not as many cells"),
        ("checkpoint\n", "no row"),
        ("name,checkpoint\nx,a.npz\nx,b.npz\n", "t.csv:2 and t.csv:3: both are called 'x'"),
        ("checkpoint,precision\na.npz,fp17\n", "t.csv:2: config.precision"),
    ],
)
def test_tables_are_refused_by_line(touch, tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        names(table="t.csv")


@pytest.mark.parametrize(("line", "said"), [("[1]", "t.jsonl:1: a list"), ("{", "t.jsonl:1: no JSON")])
def test_lines_that_are_no_objects(touch, tmp_path, line, said):
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(UsageError, match=said):
        names(table="t.jsonl")


AUGREG = """name,ds,lr,adapt_ds,adapt_resolution,filename,adapt_filename
Ti/16,i1k,0.001,imagenet2012,224,Ti_16-i1k-x,Ti_16-i1k-x--imagenet2012-res_224
Ti/16,i1k,0.001,imagenet2012,384,Ti_16-i1k-x,Ti_16-i1k-x--imagenet2012-res_384
Ti/16,i21k,0.001,imagenet2012,384,Ti_16-i21k-x,Ti_16-i21k-x--imagenet2012-res_384
"""


def test_the_index_of_augreg(touch, tmp_path):
    (tmp_path / "index.csv").write_text(AUGREG)
    asked = {"table": "index.csv", "where": "ds=='i1k' and adapt_resolution==384"}
    name = "Ti_16-i1k-x--imagenet2012-res_384"
    assert converted(**asked) == {name: f"gs://vit_models/augreg/{name}.npz"}
    assert names(table="index.csv", column="filename") == ["Ti_16-i1k-x", "Ti_16-i21k-x"]  # each once


def test_a_column_of_ones_own(touch, tmp_path):
    (tmp_path / "t.csv").write_text("name,file\nx,a.npz\n")
    assert converted(table="t.csv", column="file") == {"x": "a.npz"}
    with pytest.raises(UsageError, match="no column 'fil'"):
        names(table="t.csv", column="fil")


def test_where_needs_a_table(touch):
    touch("a.npz")
    with pytest.raises(UsageError, match="without --table"):
        names(checkpoints=["a.npz"], where="x==1")


def test_a_python_file(touch, tmp_path):
    (tmp_path / "jobs.py").write_text(
        "def get_jobs():\n    return [{'name': f'n{i}', 'checkpoint': 'a.npz', 'config.batch.max': 8 + i}"
        " for i in range(2)]\n"
    )
    first, second = collect(Asked(jobs="jobs.py"))
    assert (first.name, second.name, second.make_config().batch.max) == ("n0", "n1", 9)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1", "has no get_jobs"),
        ("def get_jobs():\n    return [3]", r"get_jobs\(\)\[0\] is a int"),
        ("def get_jobs():\n    1 / 0", r"jobs.py: get_jobs\(\): ZeroDivisionError"),
        (
            "def get_jobs():\n    return [{'checkpoint': 'a.npz', 'precison': 'fp16'}]",
            r"jobs.py\[0\]: precison: unknown key",
        ),
    ],
)
def test_python_files_are_refused(touch, tmp_path, code, said):
    (tmp_path / "jobs.py").write_text(code)
    with pytest.raises(UsageError, match=said):
        names(jobs="jobs.py")


def test_sweeps_multiply(touch):
    touch("a.npz", "b.npz")
    jobs = collect(
        Asked(checkpoints=["a.npz", "b.npz"], sweep=["config.precision=fp16;fp16,int8", "config.image_size=32,64"])
    )
    assert len(jobs) == 2 * 2 * 2
    assert [job.name for job in jobs[:3]] == [
        "a-precision_fp16-image_size_32",
        "a-precision_fp16-image_size_64",
        "a-precision_fp16_int8-image_size_32",
    ]
    config = jobs[3].make_config()
    assert (config.precision, config.image_size) == ("fp16,int8", 64)


def test_a_sweep_of_tuples(touch):
    touch("a.npz")
    jobs = collect(Asked(checkpoints=["a.npz"], sweep=["config.benchmark.batches=(1,8),(1,64)"]))
    assert [job.make_config().benchmark.batches for job in jobs] == [(1, 8), (1, 64)]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (["config.precison=fp16"], "unknown key"),
        (["config.precision"], "has no values"),
        (["config.precision=fp16", "config.precision=int8"], "swept twice"),
        (["config.name=a,b"], "not a key that can be swept"),
        (["config.layout=NCHW,NHWC"], "config.layout is both swept and set"),
        (["config.precision=fp16,fp17"], "fp17"),
    ],
)
def test_sweeps_are_refused(touch, sweep, said):
    touch("a.npz")
    with pytest.raises(UsageError, match=said):
        names(checkpoints=["a.npz"], sweep=sweep, overrides=["--config.layout=NCHW"])


HYPER = """
from vit_convert.config import default_config

def get_config():
    config = default_config()
    config.checkpoint = "a.npz"
    return config

def get_hyper(hyper):
    sizes = hyper.zipit([hyper.sweep("config.image_size", [32, 64]), hyper.sweep("batch.max", [8, 16])])
    return hyper.chainit([
        hyper.product([sizes, hyper.sweep("config.precision", ["fp16", "fp32"])]),
        hyper.fixed("layout", "NCHW", length=1)
    ])
"""


def test_get_hyper_beside_get_config(touch, tmp_path):
    (tmp_path / "mine.py").write_text(HYPER)
    jobs = collect(Asked(config="mine.py"))
    assert [job.name for job in jobs][:2] == [
        "mine-image_size_32-max_8-precision_fp16",
        "mine-image_size_32-max_8-precision_fp32",
    ]
    assert [job.name for job in jobs][4:] == ["mine-layout_NCHW"]
    config = jobs[3].make_config()
    assert (config.checkpoint, config.image_size, config.batch.max, config.precision) == ("a.npz", 64, 16, "fp32")


@pytest.mark.parametrize(
    ("body", "said"), [("return 3", "returned 3"), ("return hyper.sweep('config.nme', [1])", "unknown key")]
)
def test_get_hyper_is_refused(touch, tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"{HYPER}\ndef get_hyper(hyper):\n    {body}\n")
    with pytest.raises(UsageError, match=said):
        names(config="mine.py")


def test_a_config_without_checkpoints_is_one_job():
    (job,) = collect(Asked(config="vit.py:B/16"))
    assert job.name == "vit_B_16" and job.make_config().checkpoint.endswith("ViT-B_16.npz")


def test_a_config_for_many_checkpoints(touch, tmp_path):
    touch("a.npz", "b.npz")
    (tmp_path / "mine.py").write_text(HYPER.partition("def get_hyper")[0])
    assert [
        job.make_config().checkpoint for job in collect(Asked(config="mine.py", checkpoints=["a.npz", "b.npz"]))
    ] == ["a.npz", "b.npz"]


def test_a_bad_value_is_refused_before_any_work(touch):
    touch("a.npz")
    with pytest.raises(UsageError, match=r"a\.npz: config\.layout='NWHC'"):
        names(checkpoints=["a.npz"], overrides=["--config.layout=NWHC"])


def test_a_job_is_the_single_conversion_of_its_words(touch):
    from vit_convert.__main__ import parse_config

    job = Job("x", "a.npz", ("--config.precision=fp16,int8",), find_config("vit.py"), "B/16")
    single, rest = parse_config(["vit_convert", *job.words])
    assert rest == ["vit_convert"] and single.to_dict() == job.make_config().to_dict()


def test_shards_part_the_jobs_and_are_the_same_everywhere():
    every = [f"job{i}" for i in range(200)]
    parts = [[name for name in every if shard_of(name, 4) == i] for i in (1, 2, 3, 4)]
    assert sorted(name for part in parts for name in part) == sorted(every)
    assert all(25 <= len(part) <= 75 for part in parts)
    assert [shard_of(name, 10) for name in ("ViT-B_16", "ViT-L_16", "ViT-H_14")] == [1, 4, 6]  # by sha256sum


def test_jobs_of_one_kind_share_a_config_that_is_made_once(touch, monkeypatch):
    from vit_convert.batch import job

    made = []
    complete = job.configs.complete
    monkeypatch.setattr(
        job.configs, "complete", lambda *given, **options: made.append(given) or complete(*given, **options)
    )
    words = ("--config.precision=fp32", "--config.batch.max=77")
    configs = [Job(name, f"{name}.npz", words).make_config() for name in ("a", "b")]
    assert len(made) == 1 and (configs[1].name, configs[1].checkpoint, configs[1].batch.max) == ("b", "b.npz", 77)
    assert Job("a", "a.npz", words).make_config().checkpoint == "a.npz"
    assert Job("c", "c.npz", words[:1]).make_config().batch.max == 64 and len(made) == 2


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_table_that_cannot_be_read(touch, tmp_path, content):
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"--table=t\.csv: cannot be read"):
        names(table="t.csv")


def test_a_table_without_rows_tells_the_condition(touch, tmp_path):
    (tmp_path / "t.csv").write_text("checkpoint,width\na.npz,8\n")
    with pytest.raises(UsageError, match=r"t\.csv: no row for which width > 8$"):
        names(table=str(tmp_path / "t.csv"), where="width > 8")
    (tmp_path / "t.csv").write_text("checkpoint,width\n")
    with pytest.raises(UsageError, match=r"t\.csv: no row$"):
        names(table=str(tmp_path / "t.csv"))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_list_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "list.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError, match=r"list\.txt: (cannot be read|no checkpoint there)"):
        names(checkpoints=[str(path)])
