"""What our table says of small ONNX files beside what a TensorRT's own parser says of them.

`engine inspect` knows from a table which operators each TensorRT reads. Where a TensorRT is installed this asks its
parser about a folder of files, of one node each, and writes down where the two disagree.

    python benchmarks/gpu/ask_parser.py --models=one_node --for=trt8
"""

import collections
import json
import pathlib
import sys
from typing import Any

from absl import flags

from vit_convert.core.errors import ConvertError
from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.inspection.command import parser_says
from vit_convert.engine.inspection.findings import REFUSED, UNKNOWN, findings
from vit_convert.engine.inspection.onnx_wire import read_graph

_FLAGS = flags.FlagValues()  # its own: tests import this beside other scripts
_MODELS = flags.DEFINE_string("models", None, "Folder of ONNX files.", required=True, flag_values=_FLAGS)
_FOR = flags.DEFINE_string("for", None, "trt8, trt10, trt11 or rtx.", required=True, flag_values=_FLAGS)
_OUTPUT = flags.DEFINE_string("output", "parser.json", "Result file.", flag_values=_FLAGS)


def asked(path: pathlib.Path, target: str) -> dict[str, Any]:
    """One file: what the table says, and what the parser says."""
    try:
        graph = read_graph(path)
    except ConvertError as e:
        return {"file": path.name, "table": f"cannot be read: {e}", "parser": None, "reads": None}
    found = findings(graph, target)
    kinds = {row.what for row in found}
    table = REFUSED if REFUSED in kinds else UNKNOWN if UNKNOWN in kinds else "reads"
    words, reads = parser_says(path, target)
    why = [str(row.why) for row in found]
    node = graph.nodes[0]
    op, opset = node.op, graph.opsets.get("")
    return {"file": path.name, "op": op, "opset": opset, "table": table, "why": why, "reads": reads, "parser": words}


def main() -> int:
    """Asks about each file; prints where table and parser disagree, operator by operator."""
    target = _FOR.value
    rows = [asked(path, target) for path in sorted(pathlib.Path(_MODELS.value).glob("*.onnx"))]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        if row["reads"] is not None:
            counts[row["op"]][f"{row['table']}/{'reads' if row['reads'] else 'refuses'}"] += 1
    backend = load_backend("rtx" if target == "rtx" else "tensorrt")
    about = {"about": (__doc__ or "").splitlines()[0], "command": " ".join(sys.argv), "tensorrt": backend.version}
    told = {**about, "for": target, "operators": {op: dict(count) for op, count in sorted(counts.items())}}
    pathlib.Path(_OUTPUT.value).write_text(json.dumps({**told, "files": rows}, indent=1) + "\n")
    total = sum(counts.values(), collections.Counter())
    print(json.dumps(dict(total), indent=1))
    for op, count in sorted(counts.items()):
        table = {key.split("/")[0] for key in count}
        reads = {key.split("/")[1] for key in count}
        if table == {"reads"} and "reads" not in reads:
            print(f"{op}: the table reads it, the parser refuses all: {count}")
        if table == {REFUSED} and "reads" in reads:
            print(f"{op}: the table refuses it, the parser reads some: {count}")
        if table == {UNKNOWN}:
            print(f"{op}: not known: {count}")
    return 0


if __name__ == "__main__":
    _FLAGS(sys.argv)
    sys.exit(main())
