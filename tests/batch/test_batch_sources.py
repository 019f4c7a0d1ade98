"""Every source of jobs by the command line, and checkpoints that a network brings."""

import http.server
import json
import pathlib
import threading

import pytest

from vit_convert.batch.__main__ import main
from vit_convert.batch.record import BatchRecord

INDEX = """name,ds,adapt_resolution,filename,adapt_filename
Ti/16,i1k,224,Ti_16-x,Ti_16-x--imagenet2012-res_224
Ti/16,i1k,384,Ti_16-x,Ti_16-x--imagenet2012-res_384
"""
FILES = {
    "t.csv": "name,checkpoint,_size\nsmall,a.npz,1\nlarge,b.npz,9\n",
    "t.jsonl": '{"name": "one", "checkpoint": "a.npz", "precision": "int8"}\n',
    "index.csv": INDEX,
    "own.csv": "name,file\nx,a.npz\n",
    "jobs.py": "def get_jobs():\n    return [{'name': 'mine', 'checkpoint': 'a.npz'}]\n",
    "hyper.py": "from vit_convert.core.config import default_config as get_config\n"
    "def get_hyper(hyper):\n    return hyper.sweep('precision', ['fp16', 'int8'])\n",
    "list.txt": "a.npz\nzoo/b.npz\n",
}


def dry(capsys, *words: str) -> list[str]:
    """The names that a dry run prints."""
    assert main(["vit_convert.batch", "--dry_run", "--jobs=2", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[0] for line in lines[1 : lines.index("")]]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--checkpoints=zoo/*.npz,a.npz"], ["b", "c", "a"]),
        (["--checkpoints=a.npz", "--checkpoints=zoo"], ["a", "b", "c"]),
        (["--checkpoints=list.txt"], ["a", "b"]),
        (["--checkpoints=gs://bucket/x/g.npz,https://host/h.npz,http://host/i.npz"], ["g", "h", "i"]),
        (["--table=t.csv"], ["small", "large"]),
        (["--table=t.csv", "--where=_size > 5"], ["large"]),
        (["--table=t.jsonl"], ["one"]),
        (["--table=own.csv", "--column=file"], ["x"]),
        (["--table=index.csv", "--where=ds=='i1k' and adapt_resolution==384"], ["Ti_16-x--imagenet2012-res_384"]),
        (["--table=index.csv", "--column=filename"], ["Ti_16-x"]),
        (["--jobs_file=jobs.py"], ["mine"]),
        (["--config=hyper.py", "--checkpoints=a.npz"], ["a-precision_fp16", "a-precision_int8"]),
        (
            ["--checkpoints=a.npz", "--sweep", "config.precision=fp16,int8", "--sweep=config.image_size=224,384"],
            [f"a-precision_{p}-image_size_{s}" for p in ("fp16", "int8") for s in (224, 384)],
        ),
        (["--checkpoints=zoo", "--table=t.csv"], ["b", "c", "small", "large"]),
    ],
)
def test_each_source_by_its_flag(touch, tmp_path, capsys, words, names):
    touch("a.npz", "b.npz", "zoo/b.npz", "zoo/c.npz")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert dry(capsys, *words) == names


def test_a_link_that_leads_nowhere_is_a_job(touch, tmp_path, capsys):
    """It fails by its name when it is converted; left out, a model would be missing from the zoo without a word."""
    touch("zoo/b.npz")
    (tmp_path / "zoo" / "a.npz").symlink_to(tmp_path / "gone.npz")
    (tmp_path / "zoo" / "c.npz").mkdir()
    assert dry(capsys, "--checkpoints=zoo") == dry(capsys, "--checkpoints=zoo/*.npz") == ["a", "b"]


def test_two_rows_of_one_name_are_refused_before_any_work(touch, tmp_path, capsys):
    touch("a.npz")
    (tmp_path / "t.csv").write_text("name,checkpoint\nx,a.npz\nx,a.npz\n")
    assert main(["vit_convert.batch", "--table=t.csv", "--workdir=out"]) == 2
    assert "t.csv:2 and t.csv:3: both are called 'x'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def network(checkpoints):
    """A server with one file, which answers 503 as often as `broken` says."""
    content, broken = checkpoints[0].read_bytes(), [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if not self.path.endswith("m.npz"):
                self.send_error(404)
                return
            if broken[0] > 0:
                broken[0] -= 1
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", broken
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_addresses_are_fetched_and_a_broken_network_is_tried_again(network, tmp_path, monkeypatch):
    """Into the folder that is asked for; a file that the server does not have is not asked for again."""
    monkeypatch.chdir(tmp_path)
    address, broken = network
    broken[0] = 3  # what one attempt to fetch takes before it gives up
    words = [f"--checkpoints={address}/m.npz,{address}/none.npz", "--until=checkpoint", "--checkpoint_folders=kept"]
    assert main(["vit_convert.batch", *words, "--workdir=out", "--quiet", "--nopage", "--jobs=1"]) == 9
    found = BatchRecord.read(pathlib.Path("out/batch.json"))
    assert found is not None
    jobs = {job.name: job for job in found.jobs}
    assert (jobs["m"].status, jobs["m"].attempts) == ("done", 2), jobs["m"]
    assert (jobs["none"].status, jobs["none"].exit_code, jobs["none"].attempts) == ("failed", 3, 1), jobs["none"]
    assert len(list(pathlib.Path("kept").glob("*.npz"))) == 1
    kinds = [json.loads(line)["event"] for line in pathlib.Path("out/batch.events.jsonl").read_text().splitlines()]
    assert kinds.count("retry") == 1
