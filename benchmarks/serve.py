"""A bundle behind Triton on the CPU against our session in process: images/s and latency at 1, 8 and 32 callers.

Each caller sends one image after the other and compares every answer with JAX. Triton runs the checked graph by
onnxruntime, with and without dynamic batching, over HTTP; in process, the callers share one `vit_convert.Session`.

    python benchmarks/serve.py --bundle=out/vit_digits --environment=triton-env
"""

import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags
from results import RESULTS, hardware, today, versions
from triton_yard import Question, ask_with, questions

from vit_convert import Session
from vit_convert.serve.triton.client import infer
from vit_convert.serve.triton.models_of import models_of
from vit_convert.serve.triton.offered import Offered, read_offered
from vit_convert.serve.triton.parts import Asked
from vit_convert.serve.triton.repository import write_models
from vit_convert.serve.triton.server import find_server, running

_BUNDLE = flags.DEFINE_string("bundle", None, "A bundle.", required=True)
_ENVIRONMENT = flags.DEFINE_string("environment", None, "With the extra `triton`.", required=True)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Of each row.")
_CALLERS = flags.DEFINE_multi_integer("callers", [1, 8, 32], "At once.")
_OUTPUT = flags.DEFINE_string("output", "", "Result file; by default benchmarks/results/serve-<date>.json.")
ATOL = 1e-4
WAYS = {"batched": "Triton, dynamic batching", "single": "Triton, without", "session": "our session in process"}


def write(bundle: str, root: pathlib.Path) -> Offered:
    """Writes the graph twice: as the command does, and without its dynamic batching."""
    offered = read_offered(bundle)
    for name in ("batched", "single"):
        write_models(root, models_of(offered, Asked(name, runtime="onnxruntime"))[:1])
    config = root / "single" / "config.pbtxt"
    config.write_text(re.sub(r"dynamic_batching \{.*\}\n", "", config.read_text()))
    return offered


def measure(way: str, asked: list[Question], callers: int, answer: Callable[[Question], np.ndarray]) -> dict[str, Any]:
    """One row, after half a second to warm up."""
    ask_with(answer, asked, callers, 0.5, ATOL)
    found, wall = ask_with(answer, asked, callers, _SECONDS.value, ATOL)
    return {"way": WAYS[way], "callers": callers, **found[asked[0].model].summary(wall)}


def main(argv: list[str]) -> int:
    """Measures all rows in turns and writes them; 1 where an answer was wrong or lost."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        offered = write(_BUNDLE.value, pathlib.Path(folder))
        name, output = offered.signature.inputs[0].name, offered.signature.outputs[0].name
        one = [question for question in questions(offered, 8) if question.model == "graph"]
        session = Session(_BUNDLE.value)
        with running(find_server(_ENVIRONMENT.value), folder) as server:
            ways: dict[str, Callable[[Question], np.ndarray]] = {
                "batched": lambda question: infer(server.http, "batched", question.inputs)[output],
                "single": lambda question: infer(server.http, "single", question.inputs)[output],
                "session": lambda question: session.run(question.inputs[name])[output],
            }
            for callers in _CALLERS.value:
                for way, answer in ways.items():
                    rows.append(measure(way, one, callers, answer))
                    print(json.dumps(rows[-1]), flush=True)
        session.close()
    about = {"about": (__doc__ or "").splitlines()[0], "date": today()}
    about |= {"command": " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]])}
    found = {**about, "hardware": hardware(), "load_average": os.getloadavg()[1], "versions": versions(), "rows": rows}
    output_path = pathlib.Path(_OUTPUT.value or RESULTS / f"serve-{today()}.json")
    output_path.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(row["wrong"] or row["lost"] for row in rows) else 0


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
