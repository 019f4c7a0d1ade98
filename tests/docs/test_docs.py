"""The documentation names only what exists: links, anchors, files, commands, flags, config keys and exit codes."""

import ast
import functools
import inspect
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from vit_convert.core import errors
from vit_convert.core.config import default_config
from vit_convert.core.config_files import find_config, split_argument
from vit_convert.core.overrides import dotted_keys

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    *(page for folder in ("docs", "checkpoints", "benchmarks") for page in sorted((ROOT / folder).rglob("*.md"))),
]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
SOURCES = [*sorted((ROOT / "vit_convert").rglob("*.py")), *sorted((ROOT / "configs").glob("*.py"))]
ROOM = (
    r"(?:vit_convert|docs|tests|benchmarks|checkpoints|configs|engine|export|quantize|core|stages|checks|images|models"
    r"|serve|report)"
)
KEYS = set(dotted_keys(default_config()))
GROUPS = {key.split(".")[0] for key in KEYS if "." in key}
FILES = {
    "json",
    "jsonl",
    "html",
    "csv",
    "npz",
    "npy",
    "png",
    "zip",
    "cache",
    "plan",
    "py",
    "md",
    "pbtxt",
    "yml",
}  # config.json is no key
REPORTED = {
    "calibration.widened",
    "calibration.left_out",
    "calibration.output_share",
    "calibration.shifted",
    "calibration.rotated",
}  # nor are these parts of report.json
OF_THE_READER = {"patch_mlp_s8.py", "siglip.py"}  # config files that a page tells to write

each_page = pytest.mark.parametrize("page", TEXTS)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def slugs(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()).replace(" ", "-") for title in titles
    }


@each_page
def test_links_lead_somewhere(page):
    text = without_code(TEXTS[page])
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http://", "https://"))]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in slugs(target.read_text(encoding="utf-8")), f"{page}: {link}"


@each_page
def test_files_that_are_named_exist(page):
    named = re.findall(rf"`({ROOM}/[\w./*-]+)`", without_code(TEXTS[page]))
    for name in named:
        if "/NAME/" in name:  # the reader's to choose
            continue
        places = (ROOT, ROOT / "vit_convert", (ROOT / page).parent)
        assert any((place / name).exists() or [*place.glob(name)] for place in places), f"{page}: {name}"


def fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every command that a page shows, in blocks and in the running text."""
    blocks = [block for language, block in fenced(text) if language in ("", "bash", "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", without_code(text).replace("\\\n", " "), flags=re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", without_code(text))
    found = []
    for line in lines:
        if re.match(r"(\w+=\S+ )*(\S*python|\./run\.sh) ", line):
            found.append(shlex.split(line.split(";")[0], comments=True))
    return found


@functools.cache
def flags_of_script(path: pathlib.Path) -> set[str]:
    """The flags that a script defines, and those of the modules beside it that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_"):
            found.add(ast.literal_eval(node.args[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            found |= {word.lstrip("-") for word in map(ast.literal_eval, node.args)}
        if isinstance(node, ast.ImportFrom) and node.module and (beside := path.parent / f"{node.module}.py").is_file():
            found |= flags_of_script(beside)
    return found


def script_of(words: list[str]) -> tuple[pathlib.Path | None, list[str]]:
    """The file that a command runs, and its arguments; None for what is not ours."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0].endswith("run.sh"):
        if words[1:2] != ["convert"]:
            return None, []
        words = ["python", "-m", "vit_convert", *words[2:]]
    if words[1] == "-m":
        if not words[2].startswith("vit_convert"):
            return None, []
        place = ROOT / words[2].replace(".", "/")
        file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        assert file.is_file(), f"python -m {words[2]}: no such module"
        return file, words[3:]
    if words[1].endswith(".py") and "/" in words[1]:  # others are what the reader writes
        assert (ROOT / words[1]).is_file(), f"{words[1]}: no such file"
        return ROOT / words[1], words[2:]
    return None, []


def check_words(words: list[str], known: set[str]) -> None:
    for word, following in zip(words, [*words[1:], ""]):
        if word == "--config" and following not in OF_THE_READER:
            find_config(split_argument(following)[0])
        if match := re.match(r"--?(?:no)?(config\.[\w.{},]+)", word):
            assert match[1].removeprefix("config.") in KEYS, f"{shlex.join(words)}: {word}: no such key"
        elif match := re.match(r"--(\w+)", word):
            name = match[1]
            assert name in known or name.removeprefix("no") in known or name == "help", (
                f"{shlex.join(words)}: {word}: no such flag"
            )


@each_page
def test_commands_run_what_exists_with_flags_that_it_takes(page):
    for words in commands(TEXTS[page]):
        script, arguments = script_of(words)
        if script is not None:
            known = flags_of_script(script) | ({"config"} if script.parent.name == "vit_convert" else set())
            check_words(arguments, known)


def test_commands_are_found_at_all():
    """The search of the test above, held against a page whose commands are counted by hand."""
    text = "Run `python -m vit_convert --x` or\n```python\npython = 1\n```\nelse\n```\n./run.sh convert \\\n  --y\n"
    text += "A=b .venv/bin/python -m z  # no\n```\n    python q.py\n"
    assert sorted(commands(text)) == sorted(
        [
            ["python", "-m", "vit_convert", "--x"],
            ["./run.sh", "convert", "--y"],
            ["A=b", ".venv/bin/python", "-m", "z"],
            ["python", "q.py"],
        ]
    )


@each_page
def test_config_keys_that_are_named_exist(page):
    text = TEXTS[page]
    named = re.findall(r"--(?:no)?config\.([\w.]*\w)", text) + re.findall(r"`config\.([\w.]*\w)`", text)
    named += [key for key in re.findall(r"`([a-z]\w*\.[a-z]\w*)(?:=[^`]*)?`", text) if key.split(".")[0] in GROUPS]
    for key in named:
        file = key.rpartition(".")[2] in FILES
        assert file or key == "key" or key in KEYS or key in GROUPS or key in REPORTED, f"{page}: {key}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_messages_name_pages_that_exist(source):
    text = source.read_text(encoding="utf-8")
    for path, anchor in re.findall(r"((?:docs|checkpoints)/[\w-]+\.md)(#[\w-]+)?", text):
        assert path in TEXTS, f"{source.name}: {path}"
        assert not anchor or anchor[1:] in slugs(TEXTS[path]), f"{source.name}: {path}{anchor}"
    assert "README, '" not in text


def test_readme_is_short_and_has_the_commands_that_ci_runs():
    assert len(TEXTS["README.md"].splitlines()) <= 120
    assert "\n./run.sh\n" in TEXTS["README.md"] and "\n./run.sh test\n" in TEXTS["README.md"]


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])}
        for link in links - {""}:
            target = ((ROOT / page).parent / link).resolve()
            if (name := target.relative_to(ROOT).as_posix()) in TEXTS and name not in reached:
                waiting.append(name)
    assert set(TEXTS) == reached


def test_exit_codes_are_those_of_the_errors():
    table = TEXTS["docs/troubleshooting.md"].partition("## Messages")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)}
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.ConvertError)]
    assert listed == {0, errors.INTERRUPTED, *(cls.exit_code for cls in classes)}


def test_stages_are_those_that_run():
    from vit_convert.stages import stages

    listed = re.search(r"^Stages, in order: (.*?)\. ", TEXTS["docs/convert.md"], flags=re.DOTALL | re.MULTILINE)
    assert listed and re.findall(r"`(\w+)`", listed[1]) == [stage.name for stage in stages()]


def test_rooms_are_the_folders():
    table = TEXTS["docs/architecture.md"].partition("## Rooms")[2].partition("## From")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
        for name in re.findall(r"`(\w[\w/]*)/`", row)
    }
    package = ROOT / "vit_convert"
    assert {name for name in named if "/" not in name} == {path.parent.name for path in package.glob("*/__init__.py")}
    inner = {path.parent.name for path in package.glob("engine/*/__init__.py")}
    assert {name.removeprefix("engine/") for name in named if name.startswith("engine/")} == inner


def test_the_rule_of_the_tutorial_works(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "export"))
    rules = [block for _, block in fenced(TEXTS["docs/extending.md"]) if "NoUnitFactor" in block]
    names: dict[str, object] = {}
    for block in rules:
        exec(compile(block, "docs/extending.md", "exec"), names)
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


@pytest.mark.slow
def test_the_family_of_the_tutorial_converts(tmp_path):
    """Followed to the letter: the files that the page shows under the names that it gives, then its commands."""
    section = TEXTS["docs/extending.md"].partition("## A family")[2].partition("\n## ")[0]
    shown = re.findall(r"`(\w+\.py)`[^`]*:\n\n```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    assert len(shown) == 4
    for name, text in shown:
        (tmp_path / name).write_text(text, encoding="utf-8")
    (typed,) = (block for language, block in fenced(section) if not language)
    python = pathlib.Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-ec", typed], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "patch_mlp_s8" / "report.json").read_text())
    assert report["checkpoint"]["family"] == "patch_mlp"
    assert {name: check["passed"] for name, check in report["checks"].items()} == {
        "fp32": True,
        "fp16": True,
        "int8": True,
    }
