"""Where conversions have their accidents: each runs in a child forked from a process that has imported everything, and
may be stopped."""

import builtins
import dataclasses
import errno
import io
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import float64_vit
import numpy as np

ACCIDENTS = ("kill", "full disk", "read-only", "two at a time")
STAGES = ("checkpoint", "images", "export", "reference", "check", "calibrate", "quantize")
# What is asked for, and the files that the answer has; the two INT8 ones differ in their graph alone, and in nothing
# that names it.
_INT8 = ("--config.precision=int8", "--config.check.int8_cosine=0.5", "--config.calibration.num_images=2")
KINDS = {
    "fp16": (("--config.precision=fp16",), ("model.onnx", "model.fp16.onnx")),
    "int8": (_INT8, ("model.onnx", "model.fp16.onnx", "model.int8.onnx")),
    "int8 attention": (
        (*_INT8, "--config.keep_fp16=('*/fc1','*/fc2')"),
        ("model.onnx", "model.fp16.onnx", "model.int8.onnx"),
    ),
    "trt8": (
        ("--config.precision=fp32", "--config.target=trt8", "--config.lowerings=('matmul','primitives')"),
        ("model.onnx", "lowerings/matmul.onnx", "lowerings/primitives.onnx"),
    ),
}
_FP32_ERROR, _FP16_ERROR = 1e-4, 2e-2  # of the scale; another model's is about 1
_INT8_COSINE = 0.9  # 8 bits of a random model; another model's is about 0
_CONFIG = """
from vit_convert.core.config import default_config


def get_config():
    config = default_config()
    config.name, config.engine.backend, config.check.num_images = "x", "none", 2
    return config
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """One conversion.

    Attributes:
        model: "a" or "b".
        kind: one of KINDS.
    """

    model: str
    kind: str


class Yard:
    """A folder with two checkpoints and one bundle.

    Args:
        folder: exists; gets everything.
        seed: of all choices.
    """

    def __init__(self, folder: pathlib.Path, seed: int):
        from vit_convert.families.random import write_random_checkpoint

        _import_everything()
        self.folder, self.random = folder, random.Random(seed)
        self.bundle, self._saying = folder / "out" / "x", list[subprocess.Popen[bytes]]()
        for number, name in enumerate("ab"):
            write_random_checkpoint(folder / f"{name}.npz", "mu/16", image_size=(32, 32), num_classes=10, seed=number)
        (folder / "x.py").write_text(_CONFIG)
        self.seconds = dict.fromkeys(STAGES, 1.0)
        self._counts: dict[str, int] = {}  # of QuantizeLinear nodes, as a conversion without accidents gives them
        for kind in KINDS:
            self.convert(Command("a", kind))
            self._counts[kind] = self._quantized(kind)
        if self._counts["int8"] <= self._counts["int8 attention"]:
            raise RuntimeError(f"the kinds are to differ: {self._counts}")

    def start(self, command: Command, before: Callable[[], None] = lambda: None) -> int:
        """Begins a conversion in a child of its own.

        Args:
            command: what to convert.
            before: called in the child first.

        Returns:
            Its process id.
        """
        flags = [
            f"--config={self.folder}/x.py",
            f"--config.checkpoint={self.folder}/{command.model}.npz",
            *KINDS[command.kind][0],
        ]
        with open(self.folder / "output.txt", "ab") as output:  # by a process that no limit of the child's reaches
            said = subprocess.Popen(["tail", "-c", "600"], stdin=subprocess.PIPE, stdout=output)
        assert said.stdin is not None
        if child := os.fork():
            said.stdin.close()
            self._saying.append(said)
            return child
        code = 1
        try:
            os.dup2(said.stdin.fileno(), 1)
            os.dup2(said.stdin.fileno(), 2)
            before()
            from vit_convert.__main__ import main

            code = main(["vit_convert", *flags, f"--workdir={self.folder}/out", "--quiet"])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def convert(self, command: Command) -> None:
        """Converts without an accident.

        Raises:
            RuntimeError: it does not end with 0.
        """
        if code := _wait(self.start(command)):
            raise RuntimeError(f"{command}: ended with {code}: {self._said()}")
        for row in self._manifest():
            if row["status"] == "done":
                self.seconds[row["name"]] = row["seconds"]

    def accident(self, kind: str) -> dict[str, Any]:
        """Has one accident, converts again, and looks at what is there.

        Args:
            kind: one of ACCIDENTS.

        Returns:
            What happened: accident, command, then (the command of the rerun), files (compared), wrong (in words), and
                more by kind.
        """
        command = Command(self.random.choice("ab"), self.random.choice(list(KINDS)))
        row = {"accident": kind, "command": f"{command.model} {command.kind}"}
        happened = {"kill": self._kill, "two at a time": self._two}.get(kind)
        found = happened(command) if happened else self._spoil(command, kind)
        again = (
            Command(self.random.choice("ab"), self.random.choice(list(KINDS)))
            if self.random.random() < 0.5
            else command
        )
        row |= found | {"then": f"{again.model} {again.kind}"}
        wrong, files = found.pop("said", []), 0
        try:
            self.convert(again)
            files = self.look(again, wrong)
        except RuntimeError as e:
            wrong.append(str(e))
        row.pop("said", None)
        return {**row, "files": files, "wrong": wrong}

    def _kill(self, command: Command) -> dict[str, Any]:
        """Kills a conversion that has something to do: one that ends before is tried again, redoing everything."""
        while True:
            aim = self.random.choice(("stage", "stage", "rename", "any moment"))
            number = signal.SIGTERM if self.random.random() < 0.25 else signal.SIGKILL
            code = self._killed(command, aim, number)
            if code == 0:
                other = Command("b" if command.model == "a" else "a", command.kind)
                command = self.random.choice([other, Command(other.model, self.random.choice(list(KINDS)))])
                continue
            wrong = [] if code in (-number, 130) else [f"{aim}, {number.name}: ended with {code}: {self._said()}"]
            return {
                "aim": aim,
                "signal": number.name,
                "stage": self._stage(),
                "said": wrong,
                "command": f"{command.model} {command.kind}",
            }

    def _killed(self, command: Command, aim: str, number: signal.Signals) -> int:
        """Starts a conversion that is to be killed, and returns how it ended."""
        stage, share = self.random.choice(STAGES), self.random.random()
        if aim == "stage":
            return _wait(self.start(command, lambda: _die_in(stage, share * self.seconds[stage], number)))
        if aim == "rename":
            count, late = self.random.randint(1, 30), self.random.random() < 0.5
            return _wait(self.start(command, lambda: _at_rename(count, lambda: os.kill(os.getpid(), number), late)))
        child = self.start(command)
        time.sleep(share * sum(self.seconds.values()))
        os.kill(child, number)  # it has not been waited for, so the number is still its own
        return _wait(child)

    def _spoil(self, command: Command, kind: str) -> dict[str, Any]:
        """Lets the disk be full, or the folder read-only, from some renaming on."""
        count = self.random.randint(0, 20)
        spoil = {"full disk": _fill, "read-only": lambda: _forbid(self.bundle)}[kind]
        code = _wait(self.start(command, lambda: _at_rename(count, spoil)))
        wrong = [] if code in (0, 2) else [f"{kind}: ended with {code}: {self._said()}"]
        return {"after_renames": count, "exit": code, "stage": self._stage() if code else "none", "said": wrong}

    def _two(self, command: Command) -> dict[str, Any]:
        """Converts another model at the same time: one may be refused, and the one that was not is what lies there."""
        other = Command("b" if command.model == "a" else "a", self.random.choice(list(KINDS)))
        first = self.start(command)
        time.sleep(self.random.random() * self.random.choice((0.0, sum(self.seconds.values()))))
        second = self.start(other)
        codes = (_wait(first), _wait(second))
        wrong: list[str] = []
        if not ({*codes} <= {0, 2} and 0 in codes):
            wrong.append(f"two at a time: ended with {codes}: {self._said()}")
        elif 2 in codes:
            self.look(command if codes[0] == 0 else other, wrong)
        return {"exits": codes, "said": wrong}

    def look(self, command: Command, wrong: list[str]) -> int:
        """Compares everything that lies there with what the command stands for.

        Args:
            command: of the last conversion.
            wrong: gets what is not right, in words.

        Returns:
            How many files were compared.
        """
        images = np.random.default_rng(7).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
        right, others = (
            float64_vit.forward(self.folder / f"{name}.npz", images) for name in (command.model, _other(command.model))
        )
        expected = KINDS[command.kind][1]
        graphs = sorted(path.relative_to(self.bundle).as_posix() for path in self.bundle.rglob("*.onnx"))
        if graphs != sorted(expected):
            wrong.append(f"{command}: there are {graphs}")
        for name in graphs:
            got = _run(self.bundle / name, images)
            error, elsewhere = (float(np.abs(got - logits).max() / np.abs(logits).max()) for logits in (right, others))
            limit = {"model.fp16.onnx": _FP16_ERROR}.get(name, _FP32_ERROR)
            cosine = float((got * right).sum() / np.sqrt((got**2).sum() * (right**2).sum()))
            if not (cosine > _INT8_COSINE and error < elsewhere if name == "model.int8.onnx" else error < limit):
                wrong.append(
                    f"{command}: {name} is off by {error:.3g} of the scale from {command.model}, by {elsewhere:.3g} "
                    "from the other"
                )
        with np.load(self.bundle / "reference.npz") as file:
            logits, of = file["logits"], float64_vit.forward(self.folder / f"{command.model}.npz", file["images"])
        if not np.abs(logits - of).max() < _FP32_ERROR * np.abs(of).max():
            wrong.append(f"{command}: reference.npz is of another model")
        if self._quantized(command.kind) != self._counts[command.kind]:
            wrong.append(f"{command}: {self._quantized(command.kind)} QuantizeLinear, not {self._counts[command.kind]}")
        report = json.loads((self.bundle / "report.json").read_text())
        if (pathlib.Path(report["checkpoint"]["path"]).stem, report["status"]) != (command.model, "done"):
            wrong.append(f"{command}: the report is of {report['checkpoint']['path']}, {report['status']}")
        page = self.bundle / "report.html"
        if page.exists() and f"{command.model}.npz" not in page.read_text(encoding="utf-8"):
            wrong.append(f"{command}: report.html is of another model")
        self._look_for_strays(wrong)
        return len(graphs) + 1

    def _look_for_strays(self, wrong: list[str]) -> None:
        """Every file but the manifest's and the record's own: there is to be none. A page needs matplotlib."""
        left = {record["path"] for row in self._manifest() for record in row["files"]}
        own = {"manifest.json", "config.json", "report.json", "events.jsonl"}
        there = {path.relative_to(self.bundle).as_posix() for path in self.bundle.rglob("*") if path.is_file()}
        there -= {"report.html"}
        if there != left | own:
            wrong.append(f"not of this conversion: {sorted(there - left - own)}; gone: {sorted((left | own) - there)}")

    def _quantized(self, kind: str) -> int:
        import onnx

        if "model.int8.onnx" not in KINDS[kind][1] or not (self.bundle / "model.int8.onnx").exists():
            return 0
        graph = onnx.load(str(self.bundle / "model.int8.onnx"), load_external_data=False).graph
        return sum(node.op_type == "QuantizeLinear" for node in graph.node)

    def _manifest(self) -> list[dict[str, Any]]:
        try:
            return json.loads((self.bundle / "manifest.json").read_text())["stages"]
        except FileNotFoundError:
            return []

    def _stage(self) -> str:
        """The stage that an accident came in."""
        return next((row["name"] for row in self._manifest() if row["status"] in ("running", "failed")), "between")

    def _said(self) -> str:
        for process in self._saying:
            process.wait()
        return (self.folder / "output.txt").read_text()[-600:]


def _import_everything() -> None:
    """What children would import; none of it starts a thread that a fork would lose (JAX's backend does, and the
    exporter's plugins)."""
    import flax
    import jax
    import jax2onnx
    import onnx
    import onnxruntime

    import vit_convert.convert
    import vit_convert.export.exporter
    import vit_convert.families.load
    import vit_convert.families.vit.model
    import vit_convert.quantize.calibrate
    import vit_convert.quantize.half_precision
    import vit_convert.quantize.qdq

    del flax, jax, jax2onnx, onnx, onnxruntime, vit_convert


def _other(model: str) -> str:
    return "b" if model == "a" else "a"


def _run(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    from vit_convert.core.ort_options import session_options

    options = session_options(onnxruntime)  # INT8 graphs among them
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # no thread that a later fork would lose
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0].astype(np.float64)


def _wait(child: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_in(stage: str, seconds: float, number: int) -> None:
    from vit_convert.core.progress import Progress

    event = Progress.event

    def told(self: Progress, kind: str, **fields: Any) -> None:
        event(self, kind, **fields)
        if kind == "start" and fields["stage"] == stage:
            timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()

    Progress.event = told  # type: ignore[method-assign]


def _at_rename(count: int, act: Callable[[], None], late: bool = False) -> None:
    replace, seen = os.replace, [0]

    def counted(*arguments: Any, **options: Any) -> None:
        seen[0] += 1
        if seen[0] == count and not late:
            act()
        os_replace = replace if os.replace is counted else os.replace
        os_replace(*arguments, **options)
        if seen[0] == count and late:
            act()

    os.replace = counted
    if count == 0:
        act()


def _fill() -> None:
    """No file gets longer than a byte any more: a stand-in for a full disk that needs no rights."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _forbid(root: pathlib.Path) -> None:
    """Every call that would write below `root` fails as on a read-only volume; the rights of a folder would not stop
    root."""

    def guard(module: Any, name: str, writes: Callable[..., bool]) -> None:
        original = getattr(module, name)

        def guarded(path: Any, *arguments: Any, **options: Any) -> Any:
            below = isinstance(path, str | os.PathLike) and pathlib.Path(path).is_relative_to(root)
            if below and writes(*arguments, **options):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
            return original(path, *arguments, **options)

        setattr(module, name, guarded)

    for name in ("replace", "mkdir", "unlink", "remove", "rmdir", "rename"):
        guard(os, name, lambda *arguments, **options: True)
    guard(os, "open", lambda flags, *arguments, **options: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
    for module in (builtins, io):
        guard(module, "open", lambda mode="r", *arguments, **options: bool({*mode} & {*"wax+"}))
