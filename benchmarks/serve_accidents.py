"""A Triton server under clients that compare all answers with JAX, while models are loaded again and an engine fails.

Eight clients ask the graph under onnxruntime, our session (whose engine, simulated, fails once a second, is answered by
the checked graph, and comes back) and the ensemble from image files. Ends with 1 if an answer was wrong or a request
was lost. With `--engine` the session runs this host's own engine, and that one fails.

    python benchmarks/serve_accidents.py --bundle=out/vit_digits --environment=triton-env
"""

import contextlib
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags
from results import RESULTS, hardware, today, versions
from triton_yard import FAILING, FAILING_ENGINE, ask, metrics, questions, reload, write_repository

from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.commands import environment
from vit_convert.serve.triton.server import Server, find_server, running

_FLAGS = flags.FlagValues()  # its own: tests import this beside other scripts
_BUNDLE = flags.DEFINE_string("bundle", None, "A bundle with evaluation images.", required=True, flag_values=_FLAGS)
_ENVIRONMENT = flags.DEFINE_string("environment", None, "With the extra `triton`.", required=True, flag_values=_FLAGS)
_SECONDS = flags.DEFINE_float("seconds", 60.0, "How long.", flag_values=_FLAGS)
_CLIENTS = flags.DEFINE_integer("clients", 8, "At once.", flag_values=_FLAGS)
_RELOAD = flags.DEFINE_float("reload_seconds", 5.0, "Between two loads of a model.", flag_values=_FLAGS)
_ENGINE = flags.DEFINE_bool("engine", False, "Run this host's engine instead of a simulated one.", flag_values=_FLAGS)
ATOL = 1e-4  # float32 logits of order 10, summed in another order by another batch
_ATOL = flags.DEFINE_float("atol", ATOL, "Largest difference to JAX; an FP16 engine needs more.", flag_values=_FLAGS)
_OUTPUT = flags.DEFINE_string(
    "output", "", "Result file; by default benchmarks/results/serve-accidents-<date>.json.", flag_values=_FLAGS
)


@contextlib.contextmanager
def _reloading(server: Server, root: pathlib.Path, seconds: float) -> Iterator[list[float]]:
    """Loads the models in turns while the block runs; yields the seconds that each load took."""
    done, taken, failed = threading.Event(), [], []

    def work() -> None:
        number = 0
        while not done.wait(seconds):
            started = time.perf_counter()
            try:
                reload(server.http, root, ("graph", "session")[number % 2])
            except OSError as e:
                failed.append(e)
                return
            taken.append(time.perf_counter() - started)
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()
    if failed:
        raise failed[0]


def run(
    bundle: str,
    venv: str,
    *,
    seconds: float,
    clients: int,
    reload_seconds: float,
    failing: str = FAILING,
    atol: float = ATOL,
) -> dict[str, Any]:
    """Serves, loads again, fails and compares.

    Returns:
        By model what its clients saw; loads; and by the server's own metrics how often the engine failed, and what the
        session ran on at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        offered = write_repository(bundle, root, failing=failing)
        every = ["--model-control-mode=explicit", "--load-model=*"]
        with running(find_server(venv), root, flags=every) as server:
            asked = questions(offered, 8)
            with _reloading(server, root, reload_seconds) as loads:
                found, wall = ask(server.http, asked, clients, seconds, atol)
            counted = metrics(server.metrics)
    failures = sum(value for name, value in counted.items() if name.startswith("vit_convert_engine_failures_total"))
    rows = {name: row.summary(wall) for name, row in found.items()}
    return {
        "seconds": round(wall, 1),
        "clients": clients,
        "rows": rows,
        "loads": len(loads),
        "longest_load_s": round(max(loads, default=0.0), 2),
        "engine_failures_since_last_load": failures,
        "runs_on_at_end": [name for name, value in counted.items() if name.startswith("vit_convert_runs_on") and value],
    }


def main() -> int:
    """Runs and writes the result."""
    about = {"about": (__doc__ or "").splitlines()[0], "date": today()}
    about |= {"command": " ".join(["python", "benchmarks/serve_accidents.py", *sys.argv[1:]])}
    found = run(
        _BUNDLE.value,
        _ENVIRONMENT.value,
        seconds=_SECONDS.value,
        clients=_CLIENTS.value,
        reload_seconds=_RELOAD.value,
        failing=FAILING_ENGINE if _ENGINE.value else FAILING,
        atol=_ATOL.value,
    )
    if _ENGINE.value:
        found["gpu"] = environment(load_backend("auto", for_this_gpu=True))
    output = pathlib.Path(_OUTPUT.value or RESULTS / f"serve-accidents-{today()}.json")
    output.write_text(
        json.dumps(
            {**about, "hardware": hardware(), "load_average": os.getloadavg()[0], "versions": versions(), **found},
            indent=1,
        )
        + "\n"
    )
    print(json.dumps(found, indent=1))
    return 1 if any(row["wrong"] or row["lost"] for row in found["rows"].values()) else 0


if __name__ == "__main__":
    _FLAGS(sys.argv)
    sys.exit(main())
