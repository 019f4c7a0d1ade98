"""The table of batches says what the result files do."""

import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import batch_table

    return batch_table


def test_a_row_a_zoo(table):
    row = {
        "zoo": "s16",
        "files": 40,
        "loop_seconds_a_file": 9.96,
        "batch_seconds_a_file": 3.333,
        "speedup": 2.99,
        "loop_cpu_seconds_a_file": 12.34,
        "batch_cpu_seconds_a_file": 6.789,
        "batch_peak_rss_mib": 2048.0,
        "memory_gib": 8.0,
        "again_seconds": 1.25,
    }
    line = table.batch_table({"rows": [row]}).splitlines()[-1]
    assert line == "| S/16 at 224 | 40 | 10.0 s | 3.33 s | 3.0× | 12.3 / 6.79 s | 2.0 of 8 GiB | 1.2 s |"
