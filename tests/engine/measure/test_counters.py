"""What the profiling script reads from Nsight Compute; the lines are as version 2025.3 prints them, with a few of their
columns."""

import importlib
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[3] / "benchmarks" / "gpu"
TENSOR, DRAM = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)
BYTES = "dram__bytes_read.sum", "dram__bytes_write.sum"
COLUMNS = ["ID", "Kernel Name", "Block Size", "Grid Size", "gpu__time_duration.sum", TENSOR, DRAM, *BYTES]


@pytest.fixture
def counters(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("counters")


def printed(*rows):
    quoted = [
        ",".join(f'"{cell}"' for cell in row)
        for row in (COLUMNS, ["", "", "", "", "ns", "%", "%", "byte", "byte"], *rows)
    ]
    return "\n".join(["==PROF== Connected to process 4472 (/usr/bin/python3)", *quoted, "==WARNING== something", ""])


LAUNCHES = [
    (
        "0",
        "void gemm<half, 4>(Args, int)",
        "(384, 1, 1)",
        "(132, 1, 1)",
        "1,000,000",
        "90.00",
        "20.00",
        "104,857,600",
        "0",
    ),
    ("1", "norm", "(32, 1, 1)", "(50432, 1, 1)", "500,000", "n/a", "80.00", "0", "n/a"),
    (
        "2",
        "void gemm<half, 4>(Args, int)",
        "(384, 1, 1)",
        "(132, 1, 1)",
        "3,000,000",
        "50.00",
        "40.00",
        "0",
        "104,857,600",
    ),
    ("3", "void gemm<half, 4>(Args, int)", "(384, 1, 1)", "(66, 2, 1)", "500,000", "10.00", "10.00", "0", "0"),
    ("4", "norm", "(32, 1, 1)", "(50432, 1, 1)", "500,000", "8.00", "60.00", "1,048,576", "1,048,576"),
]


def test_launches_are_read_between_other_lines(counters):
    launches = counters.read_csv(printed(*LAUNCHES))
    assert [launch["Kernel Name"] for launch in launches] == [row[1] for row in LAUNCHES]
    assert launches[2]["gpu__time_duration.sum"] == 3e6 and TENSOR not in launches[1] and launches[1][DRAM] == 80.0
    assert counters.read_csv("==ERROR== ERR_NVGPUCTRPERM\n") == []


def test_launches_of_a_kernel_and_grid_are_one_row(counters):
    gemm, norm, other = counters.by_kernel(counters.read_csv(printed(*LAUNCHES)))
    # 4 of 5.5 ms; shares of peak weighted by 1 and 3 ms: (90 + 3 * 50) / 4 and (20 + 3 * 40) / 4; 200 MiB in two
    # launches
    wanted = {
        "grid": "(132, 1, 1)",
        "launches": 2,
        "mean_us": 2000.0,
        "share_percent": 72.7,
        "tensor_percent": 60.0,
        "dram_percent": 35.0,
    }
    assert {key: gemm[key] for key in wanted} == wanted and gemm["dram_mib"] == 100.0
    assert (other["name"], other["grid"], other["share_percent"]) == (
        "void gemm<half, 4>(Args, int)",
        "(66, 2, 1)",
        9.1,
    )
    # What could not be read of one launch says nothing of the other.
    assert (norm["launches"], norm["tensor_percent"], norm["dram_percent"], norm["dram_mib"]) == (2, 8.0, 70.0, 2.0)
