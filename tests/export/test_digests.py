"""Refactoring changes no byte of any graph; see digests.py, which also tells how to rewrite what is kept, on
purpose."""

import json

import pytest
from digests import CASES, FILE, QUICK, digests_of, file_digests

KEPT = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_graphs(name):
    assert digests_of(name) == KEPT[name]


def test_files(tmp_path):
    assert file_digests(tmp_path) == KEPT["files of mu/16"]
