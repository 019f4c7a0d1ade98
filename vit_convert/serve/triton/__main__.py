"""Writes bundles as models of a Triton server's repository, checks the repository, and proves it on a real server.

  python -m vit_convert.serve.triton BUNDLE [BUNDLE ...] --output=models

For each BUNDLE, the folder that `python -m vit_convert` wrote, the repository gets a model NAME (the engine, the ONNX
graph, or our session with its fallback). Models of images also get the ensembles NAME_image (JPEG or PNG files) and
NAME_pixels (pixels of any size), which preprocess as the checkpoint requires and, for a classifier, return the best
classes with their names. For a pair of towers, it gets NAME_image, NAME_pixels, NAME_text (token ids; with --tokenizer
also NAME_prompt), which return embeddings, and NAME_similarity, which compares images with texts. Other models in the
repository stay. Without BUNDLE, --check and --serve use it as it is.

  --check   reads each config as Triton does, without a server, and compares it with the files beside it
  --serve   starts a server, sends the inputs of reference.npz, and compares the answers with JAX

Exit codes: 0 done, 2 usage, 5 an answer misses its tolerance, 7 a bundle cannot be served this way, 8 the server does
not run or refuses.
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from vit_convert.core.errors import CheckError, UsageError
from vit_convert.core.pair import is_pair
from vit_convert.core.program import Program
from vit_convert.core.text_table import text_table

if TYPE_CHECKING:
    from vit_convert.serve.triton.repository import ModelFolder

_PROGRAM = Program(__doc__, when_interrupted="what was written stays")
_FLAGS = _PROGRAM.flags
flags.DEFINE_string("output", "models", "The repository's folder.", flag_values=_FLAGS)
flags.DEFINE_string(
    "name", "", "Name of the model; empty: that of the bundle's folder. Only for a single bundle.", flag_values=_FLAGS
)
flags.DEFINE_enum(
    "runtime",
    "auto",
    ("auto", "tensorrt", "onnxruntime", "python"),
    "What runs the network; auto: tensorrt if an engine is proved, otherwise onnxruntime; python: our session.",
    flag_values=_FLAGS,
)
flags.DEFINE_string("precision", "", "Of the engine or graph; empty: the recommended one.", flag_values=_FLAGS)
flags.DEFINE_integer("model_version", 1, "Number of the version folder to write.", lower_bound=1, flag_values=_FLAGS)
flags.DEFINE_string("labels", "", "A text file with one class name per line; empty: numbers.", flag_values=_FLAGS)
flags.DEFINE_string(
    "tokenizer", "", "For a pair: the tokenizer's files; empty: clients send token ids.", flag_values=_FLAGS
)
flags.DEFINE_integer("top_k", 5, "How many classes the ensembles return.", lower_bound=1, flag_values=_FLAGS)
flags.DEFINE_integer(
    "max_queue_delay_us", None, "Microseconds to wait for more requests; default: from the benchmark, at most 100.",
    lower_bound=0, flag_values=_FLAGS,
)  # fmt: skip
flags.DEFINE_bool(
    "response_cache", False, "Let a server with --cache-config keep answers to equal requests; of a pair, to texts.",
    flag_values=_FLAGS,
)  # fmt: skip
flags.DEFINE_bool("check", False, "Check the repository without a server.", flag_values=_FLAGS)
flags.DEFINE_bool("serve", False, "Start a server and compare its answers with JAX.", flag_values=_FLAGS)
flags.DEFINE_bool("stay", False, "With --serve: keep serving until Ctrl-C.", flag_values=_FLAGS)
flags.DEFINE_string(
    "environment", "", "Environment with the extra `triton`; empty: the one that runs this command.", flag_values=_FLAGS
)
flags.DEFINE_integer(
    "port", 0, "With --serve: port for HTTP; the next two are for gRPC and metrics. 0: any free ports.",
    lower_bound=0, upper_bound=65533, flag_values=_FLAGS,
)  # fmt: skip
flags.DEFINE_float("ready_seconds", 120.0, "How long to wait for the server.", lower_bound=0.0, flag_values=_FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command line.

    Args:
        argv: arguments, the program's name first.

    Returns:
        The exit code.
    """
    return _PROGRAM.main(argv, _run)


def _run(argv: Sequence[str]) -> int:
    bundles = _PROGRAM.parse(argv[1:])
    output = pathlib.Path(_FLAGS.output)
    if not bundles and not (_FLAGS.check or _FLAGS.serve):
        raise UsageError("no bundle is given", fix="--help tells more.")
    if _FLAGS.name and len(bundles) != 1:
        raise UsageError(f"--name={_FLAGS.name}: names the model of one bundle, given {len(bundles)}")
    if bundles:
        _write(bundles, output)
    elif not output.is_dir():
        raise UsageError(f"--output={output}: there is no such repository", fix="Give a bundle, to write one.")
    environment = _FLAGS.environment or sys.prefix
    if _FLAGS.check:
        _check(output, environment)
    if _FLAGS.serve:
        _serve(bundles, output, environment)
    return 0


def _write(bundles: Sequence[str], output: pathlib.Path) -> None:
    from vit_convert.serve.triton.repository import write_models

    models = [model for path in bundles for model in _models(path)]
    for folder in write_models(output, models):
        print(folder)


def _models(path: str) -> "list[ModelFolder]":
    from vit_convert.serve.triton.models_of import models_of
    from vit_convert.serve.triton.offered import read_offered
    from vit_convert.serve.triton.pairs import models_of_pair, read_pair_offered
    from vit_convert.serve.triton.parts import Asked

    asked = Asked(
        _name(path),
        _FLAGS.runtime,
        _FLAGS.precision,
        _FLAGS.model_version,
        _FLAGS.max_queue_delay_us,
        _FLAGS.labels,
        _FLAGS.top_k,
        tokenizer=_FLAGS.tokenizer,
        response_cache=_FLAGS.response_cache,
    )
    if is_pair(path):
        return models_of_pair(read_pair_offered(path, _FLAGS.precision), asked)
    if _FLAGS.tokenizer:
        raise UsageError(
            f"--tokenizer={_FLAGS.tokenizer}: {path} is not a pair of towers",
            fix="Leave it out, or write pairs by themselves.",
        )
    return models_of(read_offered(path, _FLAGS.precision), asked)


def _name(path: str) -> str:
    return _FLAGS.name or os.path.basename(os.path.abspath(path))


def _check(output: pathlib.Path, environment: str) -> None:
    from vit_convert.serve.triton.check import check_repository

    found = check_repository(output, environment)
    print(text_table(("model", "found"), [[name, "; ".join(faults) or "ok"] for name, faults in found.items()]))
    if wrong := {name: faults for name, faults in found.items() if faults}:
        name, faults = next(iter(wrong.items()))
        raise UsageError(
            f"{output}: {len(wrong)} of {len(found)} models are not as they should be; {name}: {faults[0]}",
            fix="Write it again.",
        )


def _serve(bundles: Sequence[str], output: pathlib.Path, environment: str) -> None:
    from vit_convert.serve.triton.offered import read_offered
    from vit_convert.serve.triton.pairs import read_pair_offered
    from vit_convert.serve.triton.prove import prove, prove_pair
    from vit_convert.serve.triton.server import find_server, running

    installed = find_server(environment)
    cpu = [] if os.path.exists("/dev/nvidiactl") else ["--model-config-name=cpu"]
    missed = []
    with running(installed, output, flags=cpu, seconds=_FLAGS.ready_seconds, port=_FLAGS.port) as server:
        rows = []
        for path in bundles:
            proof = (
                prove_pair(server.http, _name(path), read_pair_offered(path, _FLAGS.precision))
                if is_pair(path)
                else prove(server.http, _name(path), read_offered(path, _FLAGS.precision))
            )
            for row in proof:
                rows.append(row.cells())
                missed += [] if row.passed else [row]
        print(text_table(("model", "output", "max abs", "of scale", "cosine", ""), rows))
        if _FLAGS.stay and not missed:
            print(f"serving {server.http}, gRPC {server.grpc}, {server.metrics} until Ctrl-C", flush=True)
            server.process.wait()
    if missed:
        raise CheckError(
            f"{missed[0].model}: {missed[0].output} misses its tolerance: {missed[0].words()}", fix="Verify the engine."
        )


def run() -> None:
    """Entry point of the module."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
