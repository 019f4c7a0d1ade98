"""Which test files cover which module: what benchmarks/mutation.py mutates, and with what."""

import pathlib

import tomllib

MODULES: dict[str, tuple[str, ...]] = {
    module: tuple(tests)
    for module, tests in tomllib.loads(pathlib.Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()
}
