"""How the tests start the scripts, and the small data they train on.

call() runs main(argv) inside the test; Script is a process of its own, for signals and several
processes. conftest.py sees to it that everything runs on one thread of the CPU.
"""

import csv
import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tarfile
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import common
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_flatten

REPO = Path(__file__).resolve().parents[1]
COCO_MINI = REPO.parent / "shared" / "data" / "coco_mini"
needs_coco = pytest.mark.skipif(not COCO_MINI.is_dir(), reason="no COCO photographs here")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot", "tqdm"])


def call(script, *flags):
    """(exit code, stdout, stderr) of `python SCRIPT.py flags`, run inside this process."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(REPO / f"{script}.py"), *map(str, flags)]
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", words):
        try:
            code = common.run_main(importlib.import_module(script).main)
        except SystemExit as exit:  # --help
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def run(script, *flags):
    """call(), which must end well; returns stdout."""
    code, out, err = call(script, *flags)
    assert code == 0, err
    assert "could not draw" not in out, out
    return out


def error(script, *flags):
    """The one line that call() must end with: exit code 2, no traceback."""
    code, _, err = call(script, *flags)
    assert code == 2 and err.count("\n") == 1, (code, err)
    return err.strip()


class Script:
    """A script in a process of its own, forked off a server that has imported torch.

    It has a process group of its own, as in a terminal, and takes Ctrl-C also where the tests
    themselves were started in the background, where a shell lets children ignore it.
    """

    def __init__(self, script, *flags, env=()):
        self.output = tempfile.TemporaryDirectory()
        arguments = script, list(map(str, flags)), self.output.name, dict(env)
        self.process = SERVER.Process(target=_main, args=arguments)
        self.process.start()

    def wait(self):
        self.process.join(300)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.err)
        return self

    def kill(self):
        """kill -9: nothing is saved."""
        self.process.kill()
        assert self.wait().code == -signal.SIGKILL, "it had ended before"
        return self

    def ctrl_c(self):
        """As a terminal does: to the loader's workers too."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.wait()

    def wait_for(self, log, step):
        """Until log.csv has the row of this step."""
        while not (log.is_file() and re.search(f"^{step},.*\n", log.read_text(), re.M)):
            assert self.process.is_alive(), f"ended before step {step}: {self.err}"
            time.sleep(0.001)
        return self

    code = property(lambda self: self.process.exitcode)
    out = property(lambda self: Path(self.output.name, "out").read_text("utf-8"))
    err = property(lambda self: Path(self.output.name, "err").read_text("utf-8"))


def _main(script, flags, output, env):
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(env)
    sys.argv = [str(REPO / f"{script}.py"), *flags]
    code = common.run_main(importlib.import_module(script).main)
    sys.stdout.flush()
    sys.exit(code)


def environments(world):
    """The variables that torchrun sets for each of `world` processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(place)} for place in range(world)]


def several(script, world, *flags):
    """Run a script in `world` processes, as torchrun would; returns the Scripts, all ended well."""
    scripts = [Script(script, *flags, env=env) for env in environments(world)]
    for each in scripts:
        assert each.wait().code == 0, each.err
    return scripts


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def equal(a, b):
    """Bit for bit, through nested dicts and lists."""
    (ours, form), (theirs, other) = tree_flatten(a), tree_flatten(b)
    return form == other and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                                 for x, y in zip(ours, theirs))


def cells_of(folder):
    """The cells of results.json without what depends on the machine's speed."""
    cells = json.loads((folder / "results.json").read_text())["cells"]
    timed = ("images_per_second", "latency_ms")
    return {name: {key: value for key, value in cell.items() if key not in timed}
            for name, cell in cells.items()}


def assert_same_run(a, b):
    """Two run folders hold the same log, weights, optimiser state and scores, to the last bit."""
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    assert cells_of(a) == cells_of(b)
    for name in ("last.pt", "best.pt"):
        ours, theirs = checkpoint(a, name), checkpoint(b, name)
        del ours["config"], theirs["config"]
        assert equal(ours, theirs), name


def photo(index, size=(48, 40)):
    """An encoded image of one of ten colours."""
    noise = np.random.default_rng(index).integers(0, 60, (*size[::-1], 3))
    colour = np.array([index % 10 * 19, index % 3 * 60, index % 5 * 39])
    buffer = io.BytesIO()
    Image.fromarray((colour + noise).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def photo_samples(numbers, image=photo):
    return [(f"{i:06d}", {"jpg": image(i), "txt": f"colour {i % 10} number {i}".encode()})
            for i in numbers]


def write_shard(path, samples):
    """samples: (key, {extension: bytes})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_photos(root):
    """Tar shards of 128 small photographs, with a validation set of 8."""
    for shard in range(2):
        samples = photo_samples(range(64 * shard, 64 * shard + 64))
        write_shard(root / "train" / f"{shard:05d}.tar", samples)
    write_shard(root / "val" / "00000.tar", photo_samples(range(1000, 1008)))
    return root
