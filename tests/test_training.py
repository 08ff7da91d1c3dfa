"""Training as a user starts it: several processes, kill and resume, Ctrl-C, wrong input, every mode of eclipse.py.

The reference is always another run: one process for two, the uninterrupted run for the resumed one, results.json for
--evaluate. Models are tiny; what they learn is tested elsewhere.
"""

import contextlib
import csv
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import eclipse

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "eclipse.py"
COCO_MINI = "../shared/data/coco_mini"  # from the root of the repository
TINY = ("--vision-width 32 --vision-mlp 64 --vision-layers 4 --vision-heads 2 --text-width 32 --text-layers 1 "
        "--text-heads 2 --embed-dim 32 --image-size 32 --patch-size 8 --vocab-size 1000 --act quick_gelu "
        "--batch-size 16 --epochs 2 --device cpu --log-every 1").split()
EMOJI = [*TINY, "--scenes", "128", "--concepts", "10"]  # 8 steps an epoch
posix = pytest.mark.skipif(os.name == "nt", reason="Windows sends no Ctrl-C to a single process")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


# ------------------------------------------------------------------------------------------------- starting the script


def as_user(*flags, cwd=REPO, python=(), timeout=120):
    """`python eclipse.py flags`; returns subprocess's CompletedProcess with text."""
    return subprocess.run([sys.executable, *python, str(SCRIPT), *map(str, flags)], cwd=cwd, env=ONE_THREAD,
                          capture_output=True, text=True, timeout=timeout)


WORKERS = "fork" if sys.platform == "linux" else "spawn"  # how the script's loader starts its workers
SERVER = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":  # Windows has no fork: its processes import torch themselves
    SERVER.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot", "pytest", "tqdm"])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the server, which starts with the first process


class Script:
    """The script with these flags in a process of its own. Forked off a server that has imported torch, which saves
    two seconds; signals, exit codes and output are the same. It has a process group of its own, as in a terminal."""

    def __init__(self, *flags, cwd=REPO, env=(), workers_by=WORKERS):
        self.output = tempfile.TemporaryDirectory()
        flags = list(map(str, flags))
        self.process = SERVER.Process(target=_main, args=(flags, str(cwd), self.output.name, dict(env), workers_by))
        self.process.start()

    def wait(self, timeout=120):
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.err)
        return self

    def kill(self):
        """kill -9: nothing is saved, its loader's workers find themselves alone."""
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


def _main(flags, cwd, output, env, workers_by):
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.update(env)
    multiprocessing.set_start_method(workers_by, force=True)
    sys.argv = ["eclipse.py", *flags]
    try:
        common.run_main(eclipse.main)
    finally:
        sys.stdout.flush()


def run(*flags, **where):
    """The script, run to its end, which must be a good one."""
    script = Script(*flags, **where).wait()
    assert script.code == 0, script.err
    return script


def one_line(text):
    """The message of an error: one line under the script's name, no traceback."""
    assert text.count("\n") == 1 and text.startswith("eclipse.py: "), text
    return text.removeprefix("eclipse.py: ").strip()


def log_of(folder):
    return list(csv.DictReader((folder / "log.csv").open(newline="")))


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def equal(a, b):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def cells_of(folder):
    """The cells of results.json without their speeds."""
    cells = json.loads((folder / "results.json").read_text())["cells"]
    return {name: {k: v for k, v in cell.items() if k != "images_per_second"} for name, cell in cells.items()}


def assert_same_run(a, b):
    """Two run folders hold the same log, weights, optimiser state and scores, to the last bit."""
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        if (a / name).exists() or (b / name).exists():
            ours, theirs = checkpoint(a, name), checkpoint(b, name)
            assert all(equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys() if key != "config"), name
    assert cells_of(a) == cells_of(b)


# ----------------------------------------------------------------------------------------------------------- data, runs


def photo(index, size=(48, 40)):
    """An encoded image of one of ten colours."""
    noise = np.random.default_rng(index).integers(0, 60, (*size[::-1], 3))
    pixels = (np.array([index % 10 * 19, index % 3 * 60, index % 5 * 39]) + noise).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path, samples):
    """samples: (key, {extension: bytes})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def photo_samples(numbers, image=photo):
    return [(f"{i:06d}", {"jpg": image(i), "txt": f"colour {i % 10} number {i}".encode()}) for i in numbers]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Flags to train on tar shards of 128 small photographs, with a validation set of 8."""
    root = tmp_path_factory.mktemp("photos")
    for shard in range(2):
        write_shard(root / "train" / f"{shard:05d}.tar", photo_samples(range(64 * shard, 64 * shard + 64)))
    write_shard(root / "val" / "00000.tar", photo_samples(range(1000, 1008)))
    return [*TINY, "--data", "photos", "--root", str(root), "--preset", "demo", "--lr", "1e-3", "--workers", "0"]


@pytest.fixture(scope="module")
def photos_run(photos, tmp_path_factory):
    """The run folder of those flags, uninterrupted."""
    out = tmp_path_factory.mktemp("run") / "photos"
    run(*photos, "--out", out)
    return out


@pytest.fixture(scope="module")
def emoji_run(tmp_path_factory):
    """The run folder of a run as a user starts it, in an empty working directory, without --out."""
    cwd = tmp_path_factory.mktemp("cwd")
    finished = as_user(*EMOJI, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    assert [p.name for p in (cwd / "runs").iterdir()] == ["eclipse-emoji"]
    return cwd / "runs" / "eclipse-emoji"


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Root of a folder of classes: train/ and test/ of two colours, 10 and 5 images each."""
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 10), ("test", 5)):
        for colour in (0, 4):
            folder = root / split / f"colour_{colour}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.jpg").write_bytes(photo(colour + 10 * i + (split == "test") * 1000))
    return root


# ----------------------------------------------------------------------------------------------------- results, folders


def test_results_hold_what_a_report_needs(emoji_run):
    results = json.loads((emoji_run / "results.json").read_text())
    cells = {"online κ=0.7", "online κ=1", "momentum κ=0.7", "momentum κ=1"}
    assert results["cells"].keys() == cells and results["steps"] == 16
    for cell in results["cells"].values():
        metrics = {"concept_top1", "group_top1", "retrieval_i2t_r1", "retrieval_t2i_r10", "images_per_second"}
        assert metrics <= cell.keys()
        assert all(np.isfinite(value) for value in cell.values())
    validated = [max(float(row["val_online"]), float(row["val_momentum"]))
                 for row in log_of(emoji_run) if row["val_online"]]
    assert len(validated) == 2  # once an epoch
    assert results["last_validation"] == pytest.approx(validated[-1])
    assert results["best_validation"] == pytest.approx(max(validated))
    for picture in ("curves.png", "retrieval.png", "tokens.png"):
        assert Image.open(emoji_run / picture).size[0] > 300
    config = json.loads((emoji_run / "config.json").read_text())
    assert config["config"].keys() == {field.name for field in dataclasses.fields(eclipse.Config)}
    assert config["config"]["vision_width"] == 32
    environment = config["environment"]
    assert environment["torch"] == torch.__version__ and environment["numpy"] == np.__version__
    assert {"commit", "python", "platform", "gpu", "cpu_threads", "processes", "command"} <= environment.keys()
    assert "--scenes 128" in environment["command"]


def test_kill_and_resume_in_default_folders(emoji_run):
    """kill -9 in the second run of a directory; --resume alone finds it. Other --workers change nothing."""
    cwd, second = emoji_run.parents[1], emoji_run.with_name("eclipse-emoji-2")
    killed = Script(*EMOJI, "--save-every", "3", "--workers", "2", cwd=cwd)
    killed.wait_for(second / "log.csv", 10).kill()
    assert checkpoint(second)["state"]["step"] in (9, 12)
    (second / "last.pt.tmp").write_bytes((second / "last.pt").read_bytes()[:1000])  # killed while it was written
    run("--resume", "--workers", "0", cwd=cwd)
    assert_same_run(emoji_run, second)
    rows = [int(row["step"]) for row in csv.DictReader((second / "timing.csv").open())]
    assert rows == list(range(1, 17))


OPTIONS = {
    "schedules": ["--accum", "2", "--prune-by", "random", "--keep-rate-warmup", "0.8", "--ema-schedule", "cosine",
                  "--kd-ramp", "0.1", "0.6", "--workers", "2"],
    "text teacher": ["--text-teacher", "momentum", "--text-grad", "online", "--no-fuse"],
    "fp16": ["--precision", "fp16", "--method", "clip"],  # its GradScaler has a state
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kill_and_resume(photos, tmp_path, options):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run(*photos, *options, "--save-every", "3", "--out", whole)
    killed = Script(*photos, *options, "--save-every", "3", "--out", out)
    killed.wait_for(out / "log.csv", 11).kill()
    assert not (out / "results.json").exists()
    run(*photos, *options, "--save-every", "3", "--out", out, "--resume")  # the same command again
    assert_same_run(whole, out)


def test_kill_before_the_first_checkpoint(photos, photos_run, tmp_path):
    Script(*photos, "--out", tmp_path / "run").wait_for(tmp_path / "run" / "log.csv", 2).kill()
    run("--resume", "--out", tmp_path / "run")
    assert_same_run(photos_run, tmp_path / "run")


def test_resume_of_a_finished_run_and_of_no_run(photos, photos_run, tmp_path):
    shutil.copytree(photos_run, tmp_path / "run")
    run("--resume", "--out", tmp_path / "run")
    assert_same_run(photos_run, tmp_path / "run")
    script = run(*photos, "--resume", "--out", tmp_path / "new")
    assert "starting one" in script.out
    assert_same_run(photos_run, tmp_path / "new")


@posix
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_saves_and_says_how_to_go_on(photos, photos_run, tmp_path, workers):
    out = tmp_path / "run"
    stopped = Script(*photos, "--workers", workers, "--out", out).wait_for(out / "log.csv", 3).ctrl_c()
    assert stopped.code == 130, stopped.err
    message, step = one_line(stopped.err), checkpoint(out)["state"]["step"]
    assert 3 <= step < 16 and f"step {step}" in message
    run(*message[message.index("--resume"):].removesuffix(" goes on").split())
    assert_same_run(photos_run, out)


@posix
def test_spawned_workers(emoji_run, tmp_path):
    """As on macOS and Windows: data and tokenizer travel to the workers, the handling of Ctrl-C does not."""
    out = tmp_path / "run"
    script = Script(*EMOJI, "--workers", "1", "--out", out, workers_by="spawn").wait_for(out / "log.csv", 1)
    for line in subprocess.check_output(["ps", "-A", "-o", "pid=,ppid="], text=True).splitlines():
        process, parent = map(int, line.split())
        if parent == script.process.pid:
            os.kill(process, signal.SIGINT)
    stopped = script.wait_for(out / "log.csv", 8).ctrl_c()  # past what the worker had prepared
    assert log_of(out) == log_of(emoji_run)[:len(log_of(out))]
    assert stopped.code == 130 and one_line(stopped.err), stopped.err
    run("--resume", "--workers", "0", "--out", out)
    assert_same_run(emoji_run, out)


# ---------------------------------------------------------------------------------------------------- several processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


GRADIENT_CASES = [["--method", "clip"], ["--text-grad", "momentum"], ["--text-grad", "online"], ["--text-grad", "both"],
                  ["--text-teacher", "momentum", "--text-grad", "online", "--teacher-keep-rate", "0.7"]]


def _gradients(place, world, port, folder, double):
    """One process: the gradients of a step in every case, with and without --accum, averaged over the processes."""
    os.environ.update(RANK=str(place), WORLD_SIZE=str(world), LOCAL_RANK=str(place), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    device, found = common.start_device("cpu", 0), {}
    if double:
        torch.Tensor.float = torch.Tensor.double  # wherever the model asks for full precision
    for case in GRADIENT_CASES:
        for accum in ("1", "2"):
            cfg, _ = eclipse.configure([*EMOJI, *case, "--accum", accum, "--out", folder])
            torch.manual_seed(0)
            method = eclipse.ECLIPSE(cfg)
            for name, parameter in method.named_parameters():
                if name.startswith("momentum"):
                    parameter.data += 0.02 * torch.randn(parameter.shape)  # a teacher that is not the student
            method = method.double() if double else method
            amp, scaler = common.mixed_precision(cfg, device)
            evaluator = eclipse.Evaluator(method, cfg, device, amp)
            samples = common.TrainSamples(common.training_set(cfg), evaluator.tokenizer, 32, (0.5, 1.0), 0)
            sampler = common.StepSampler(len(samples), cfg.batch_size, 1, 0, 0, common.rank(), common.world_size())
            image, text, _ = next(iter(common.train_loader(samples, sampler, 0, "cpu")))
            assert len(image) == 16 // world
            now = {"keep_rate": 0.7, "kd_weight": 2.0}
            image = eclipse.normalise(image, evaluator.statistics)
            terms = eclipse.backward(method, image, text, now, amp, scaler, seed=0)
            common.average_gradients(method.parameters())
            grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
            found[(*case, accum)] = {**grads, **{f"term {k}": torch.tensor(v, dtype=torch.float64)
                                                 for k, v in common.mean_over_processes(terms).items()}}
    if place == 0:
        torch.save(found, Path(folder, f"{world}-{double}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("double, tolerance", [(True, 1e-10), (False, 1e-6)], ids=["float64", "float32"])
def test_two_processes_have_the_gradients_of_one(tmp_path, double, tolerance):
    port = free_port()
    processes = [SERVER.Process(target=_gradients, args=(place, world, port, str(tmp_path), double))
                 for world in (1, 2) for place in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    one, two = (torch.load(tmp_path / f"{world}-{double}.pt") for world in (1, 2))
    assert len(one) == 2 * len(GRADIENT_CASES)
    for case in one:
        assert one[case].keys() == two[case].keys()
        assert "online.logit_scale" in one[case] and "online.visual.proj" in one[case]
        assert not any(name.startswith("momentum") for name in one[case])
        whole = one[(*case[:-1], "1")]
        for name, gradient in one[case].items():
            for other in (two[case][name], whole[name]):  # the mean losses travel as float32
                worst = (other - gradient).abs().max() / whole[name].abs().max().clamp(min=1e-3)
                assert worst <= (1e-6 if name.startswith("term") else tolerance), (case, name, worst)


def test_torchrun(photos, photos_run, tmp_path):
    """Two processes give the losses of one, and write each file and row once."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    finished = as_user(*photos, "--accum", "2", "--out", tmp_path / "run", python=torchrun)
    assert finished.returncode == 0, finished.stderr
    rows, expected = log_of(tmp_path / "run"), log_of(photos_run)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        for column in ("loss", "nce_online", "nce_momentum", "kd", "logit_scale", "lr"):
            assert float(row[column]) == pytest.approx(float(other[column]), abs=2e-4), (row["step"], column)
    names = {path.name for path in photos_run.iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert finished.stdout.count("step 16 ") == 1 and finished.stdout.count("pictures, tables") == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["environment"]["processes"] == 2


# -------------------------------------------------------------------------------------------------------- divergence


def finite(content):
    if isinstance(content, torch.Tensor):
        return bool(content.isfinite().all())
    return all(map(finite, content.values() if isinstance(content, dict) else content)) \
        if isinstance(content, (dict, list, tuple)) else True


@pytest.mark.parametrize("log_every", [1, 20])
def test_divergence_is_one_line_and_leaves_a_good_checkpoint(photos, tmp_path, log_every):
    flags = ["--lr", "1e6", "--warmup", "0", "--save-every", "1", "--log-every", log_every, "--epochs", "8"]
    script = Script(*photos, *flags, "--out", tmp_path / "run").wait()
    assert script.code == 1
    assert re.search(r"loss is (nan|inf|-inf) at step \d+", one_line(script.err)) and "--lr" in script.err
    assert not (tmp_path / "run" / "results.json").exists()
    saved = checkpoint(tmp_path / "run")
    assert finite(saved["model"]) and finite(saved["optimiser"])


def test_weights_that_are_not_finite(photos, photos_run, tmp_path):
    saved = checkpoint(photos_run)
    saved["model"]["online.visual.proj"][0, 0] = float("nan")
    torch.save(saved, tmp_path / "nan.pt")
    script = Script(*photos, "--init", tmp_path / "nan.pt", "--out", tmp_path / "run").wait()
    assert script.code == 1 and "nan" in one_line(script.err)
    assert not (tmp_path / "run" / "last.pt").exists() or finite(checkpoint(tmp_path / "run"))


# --------------------------------------------------------------------------------------------------------- user errors


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, photos_run):
    """Folder of things that cannot be used."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "text.pt").write_text("these are not weights\n")
    (folder / "text.safetensors").write_text("these are not weights\n")
    content = (photos_run / "last.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[:len(content) // 2])
    torch.save({"layer.weight": torch.zeros(3, 3)}, folder / "other.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    header = json.dumps({"visual.proj": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}).encode()
    (folder / "cut.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    (folder / "header.safetensors").write_bytes((10 ** 6).to_bytes(8, "little") + b"{")
    (folder / "gz").mkdir()
    (folder / "gz" / "00000.tar.gz").write_bytes(b"\x1f\x8b")
    (folder / "plain").mkdir()
    online = {name.removeprefix("online."): tensor for name, tensor in checkpoint(photos_run)["model"].items()
              if name.startswith("online.")}
    torch.save(online, folder / "plain" / "clip.pt")
    (folder / "file").write_text("")
    good, corrupt = photo_samples(range(40)), photo_samples(range(40, 50), lambda i: b"?")
    write_shard(folder / "bad" / "train" / "0.tar", good + corrupt)
    write_shard(folder / "bad" / "val" / "0.tar", good[:4])
    write_shard(folder / "mute" / "0.tar", good + [(f"m{i}", {"jpg": photo(i)}) for i in range(10)])
    return folder


# What is given: words that the message must hold. {wrong}, {run}: the folders above and of a finished run.
ERRORS = {
    # command line
    "--keep-rat 0.5": "--keep-rat",
    "--epochs many": "--epochs many",
    "--method simclr": "--method simclr eclipse clip",
    "--keep-rate 0": "--keep-rate 0",
    "--keep-rate 1.5": "--keep-rate 1.5",
    "--keep-rate nan": "--keep-rate nan",
    "--teacher-keep-rate 2": "--teacher-keep-rate 2",
    "--noise -0.1": "--noise -0.1",
    "--ema 1.5": "--ema",
    "--lr 0": "--lr 0",
    "--lr nan": "--lr",
    "--beta2 1.5": "--beta2 1.5",
    "--adam-eps -1": "--adam-eps",
    "--weight-decay -1": "--weight-decay",
    "--warmup -1": "--warmup",
    "--kd-weight -1": "--kd-weight",
    "--long-tail nan": "--long-tail",
    "--seed -1": "--seed -1",
    "--batch-size 0": "--batch-size 0",
    "--epochs 0": "--epochs 0",
    "--kd-ramp 0.5": "--kd-ramp",
    "--kd-ramp 0.6 0.3": "--kd-ramp",
    "--text-teacher momentum --text-grad both": "--text-teacher --text-grad online",
    "--linear-probe": "--linear-probe --evaluate",
    # sizes
    "--image-size 36": "--image-size 36 --patch-size 8",
    "--image-size 0": "--image-size 0",
    "--vision-heads 3": "--vision-width 32 --vision-heads 3",
    "--text-heads 5": "--text-width 32 --text-heads 5",
    "--vision-heads 0": "--vision-heads 0",
    "--prune-blocks 99": "--prune-blocks 0 3",
    "--prune-blocks -1": "--prune-blocks",
    "--context-length 1": "context 2",
    "--vocab-size 100": "vocab 514 49408",
    "--concepts 100000": "--concepts 100000",
    "--concepts 1": "--concepts 1",
    "--scenes 8": "8 16",
    "--accum 3": "--accum 3 16",
    "--accum 32": "--accum 16",
    "--batch-size 100000": "128 100000",
    # device
    "--device cuda": "--device cuda auto",
    "--device gpu": "--device gpu auto",
    # data
    "--data nothing": "nothing emoji coco",
    "--data nothing --root {wrong}/missing": "{wrong}/missing",
    "--data nothing --root {wrong}/empty": "{wrong}/empty shards",
    "--data nothing --root {wrong}/gz": "00000.tar.gz compressed gzip",
    "--data nothing --root {wrong}/file": "{wrong}/file",
    "--data coco --root {wrong}/empty": "{wrong}/empty captions_train2017.json",
    "--data flickr30k --root {wrong}/empty": "{wrong}/empty dataset_flickr30k.json",
    "--data bad --root {wrong}/bad --workers 1": "bad unreadable 10 %",
    "--data mute --root {wrong}/mute": "mute 10 of 50 without caption 10 %",
    "--eval-data nothing": "nothing",
    "--eval-data folder --eval-root {wrong}/missing": "{wrong}/missing",
    # checkpoints
    "--evaluate {wrong}/missing.pt": "{wrong}/missing.pt",
    "--evaluate {wrong}/empty": "{wrong}/empty",
    "--evaluate {wrong}/text.pt": "{wrong}/text.pt",
    "--evaluate {wrong}/text.safetensors": "{wrong}/text.safetensors",
    "--evaluate {wrong}/cut.pt": "{wrong}/cut.pt",
    "--evaluate {wrong}/cut.safetensors": "{wrong}/cut.safetensors",
    "--evaluate {wrong}/header.safetensors": "{wrong}/header.safetensors",
    "--evaluate {wrong}/list.pt": "{wrong}/list.pt",
    "--evaluate {wrong}/other.pt": "{wrong}/other.pt CLIP",
    "--init {wrong}/other.pt": "{wrong}/other.pt CLIP",
    "--init {run}/last.pt --embed-dim 64": "--embed-dim 64 32",
    "--evaluate {run}/last.pt --vision-width 64": "checkpoint",
    "--evaluate {run}/last.pt --vision-heads 4": "--vision-heads 4 2",
    "--evaluate {run}/last.pt --eval-data nothing": "nothing",
    # run folders
    "--out {run}": "{run} --resume --out",
    "--out {wrong}/file": "{wrong}/file",
    "--resume --out {run} --epochs 9": "--epochs 9 {run}",
    "--resume --out {run} --keep-rate 0.5": "--keep-rate 0.5 0.7 {run}",
    # ablation
    "--ablate nothing": "nothing eclipse kd",
    "--ablate clip nothing": "nothing eclipse",
}
NO_SIZES = ("--resume", "--evaluate", "--init", "--data")


@pytest.mark.parametrize("flags", ERRORS)
def test_user_errors_are_one_line(flags, wrong, photos_run, tmp_path):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    def named(text):
        return text.format(wrong=wrong, run=photos_run)

    start = [] if flags.startswith(("--resume", "--evaluate")) else \
        TINY if flags.startswith("--data") else \
        TINY[TINY.index("--batch-size"):] if flags.startswith("--init") else EMOJI
    out = [] if "--out" in flags else ["--out", tmp_path / "run"]
    script = Script(*start, *named(flags).split(), *out).wait()
    assert script.code == 2, script.err or "no error"
    message = one_line(script.err)
    missing = [word for word in named(ERRORS[flags]).split() if word not in message]
    assert not missing, message
    assert len(message) < 400 or "--ablate" in flags, message
    if not flags.startswith("--data bad"):  # only training itself finds those
        assert not (tmp_path / "run" / "log.csv").exists(), "the error came after training"


def test_errors_with_several_processes(tmp_path):
    script = Script(*EMOJI, "--batch-size", "15", env={"WORLD_SIZE": "2", "RANK": "0"}, cwd=tmp_path).wait()
    assert script.code == 2 and "--batch-size 15" in one_line(script.err)


def test_a_user_error_without_the_test_harness(tmp_path):
    finished = as_user("--evaluate", "none.pt", cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    assert "none.pt" in one_line(finished.stderr)
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not (REPO / COCO_MINI).is_dir(), reason="no COCO photographs here")
def test_coco(tmp_path):
    finished = run(*TINY, "--data", "coco", "--root", COCO_MINI, "--preset", "demo", "--epochs", "1", "--workers", "0",
                   "--out", tmp_path / "run")
    assert "coco_i2t_r1" in finished.out
    cell = cells_of(tmp_path / "run")["online κ=0.7"]
    assert all(0 <= cell[f"coco_{way}_r{k}"] <= 100 for way in ("i2t", "t2i") for k in (1, 5, 10))
    assert len(log_of(tmp_path / "run")) == 5  # 80 photographs in batches of 16
    assert {"retrieval.png", "tokens.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_damaged_shards(tmp_path):
    """One corrupt image, one sample without caption and one truncated shard: counted, reported, trained around."""
    root, photos = tmp_path / "data", sorted((REPO / COCO_MINI / "train2017").glob("*.jpg"))
    def image(i):
        return photos[i % len(photos)].read_bytes() if photos else photo(i)

    train = photo_samples(range(48), image)
    train[7][1]["jpg"] = train[7][1]["jpg"][:200]
    del train[20][1]["txt"]
    write_shard(root / "train" / "00000.tar", train[:32])
    write_shard(root / "train" / "00001.tar", train[32:])
    cut = root / "train" / "00001.tar"
    with open(cut, "r+b") as file:  # in the middle of its last image
        with tarfile.open(cut) as tar:
            place = tar.getmember("000047.jpg").offset_data + 100
        file.truncate(place)
    test = photo_samples(range(100, 112), image)
    test[3][1]["jpg"] = b"no image"
    write_shard(root / "test" / "00000.tar", test)
    flags = [*TINY, "--data", "mine", "--root", root, "--preset", "demo", "--workers", "0"]
    finished = run(*flags, "--out", tmp_path / "run")
    assert "2 of 48 samples cannot be used" in finished.out
    assert "1 without caption" in finished.out and "1 cut off" in finished.out
    assert re.search(r"mine: 1 of \d+ samples cannot be used: 1 unreadable", finished.out)
    for cell in cells_of(tmp_path / "run").values():
        assert cell["mine_unreadable"] == 1 and "mine_t2i_r10" in cell


def test_unusable_samples_in_a_row_count_once_each(tmp_path):
    """4 of 64 are less than 10 %, also where they stand together and one stands in for the other."""
    samples = photo_samples(range(64))
    for _, parts in samples[20:24]:
        parts["jpg"] = b"no image"
    write_shard(tmp_path / "data" / "train" / "0.tar", samples)
    write_shard(tmp_path / "data" / "val" / "0.tar", samples[:4])
    flags = [*TINY, "--data", "mine", "--root", tmp_path / "data", "--preset", "demo", "--workers", "0"]
    finished = run(*flags, "--out", tmp_path / "run")
    assert finished.out.count("mine: 4 of 64 samples cannot be used: 4 unreadable") == 2  # once an epoch


# ---------------------------------------------------------------------------------------------------------- evaluation


def table_of(text):
    """The numbers of a printed table: {row: {column: text}}, whichever way it stands."""
    lines = [line for line in text.splitlines() if "κ=" in line or re.search(r"_\w+ {2,}", line)]
    lines = [re.split(r"\s{2,}", line.strip()) for line in lines]
    head = lines[0]
    rows = {line[0]: dict(zip(head, line[1:])) for line in lines[1:]}
    if "κ=" in head[0]:
        return {column: {row: values[column] for row, values in rows.items()} for column in head}
    return rows


def shown(cells):
    """What the table prints of these cells."""
    buffer = io.StringIO()
    with contextlib.redirect_stdout(buffer):
        common.print_table(cells)
    return table_of(buffer.getvalue())


def test_evaluate_gives_the_numbers_of_the_run(emoji_run, tmp_path):
    finished = run("--evaluate", emoji_run / "last.pt", cwd=tmp_path)
    found, expected = table_of(finished.out), cells_of(emoji_run)
    expected = {name: {**cell, "mean_top1": (cell["concept_top1"] + cell["group_top1"]) / 2}
                for name, cell in expected.items()}
    assert found == shown(expected)
    assert not any(tmp_path.iterdir())  # nothing is written


def test_evaluate_on_a_folder_of_classes_with_linear_probe(photos_run, classes, tmp_path):
    finished = run("--evaluate", photos_run / "last.pt", "--eval-data", "colours", "--eval-root", classes,
                   "--linear-probe", "--workers", "0", cwd=tmp_path)
    found = table_of(finished.out)
    assert found.keys() == {"online κ=0.7", "online κ=1", "momentum κ=0.7", "momentum κ=1"}
    for cell in found.values():
        assert cell.keys() >= {"colours_top1", "colours_top5", "colours_probe_top1", "colours_probe_C"}
        assert float(cell["colours_top5"]) == 100  # of two classes
        assert float(cell["colours_probe_top1"]) >= 80  # colours, which any features tell apart
    finished = run(*TINY[TINY.index("--batch-size"):], "--data", "emoji", "--evaluate", photos_run / "best.pt",
                   "--eval-data", "colours", "--eval-root", classes, cwd=tmp_path)
    assert "colours_top1" in finished.out


def test_plain_weights_are_evaluated_as_the_run_was(wrong, photos_run, classes, tmp_path):
    """The online encoder as a bare CLIP state dict, as other projects store it: the sizes are read off the tensors."""
    folder = ["--eval-data", "colours", "--eval-root", classes, "--workers", "0"]
    flags = ["--vision-heads", "2", "--text-heads", "2", "--act", "quick_gelu", "--pixel-stats", "imagenet"]
    ours = table_of(run("--evaluate", photos_run / "last.pt", *folder, cwd=tmp_path).out)
    theirs = table_of(run("--evaluate", wrong / "plain" / "clip.pt", "--keep-rate", "0.7", *flags, *folder,
                          cwd=tmp_path).out)
    for cell in ("online κ=0.7", "online κ=1"):
        assert theirs[cell] == ours[cell]


def test_init_starts_from_the_weights(photos, photos_run, tmp_path):
    flags = photos[photos.index("--batch-size"):]  # the sizes come from the checkpoint
    still = ["--lr", "1e-12", "--lr-start", "0", "--lr-end", "1e-12", "--epochs", "1"]
    run(*flags, "--init", photos_run / "last.pt", *still, "--out", tmp_path / "run")
    before, after = checkpoint(photos_run)["model"], checkpoint(tmp_path / "run")["model"]
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        source = name.replace("momentum.", "online.visual.")  # a new teacher is a copy of the student
        torch.testing.assert_close(tensor, before[source], rtol=0, atol=1e-6, msg=name)
    assert float(log_of(tmp_path / "run")[0]["loss"]) < float(log_of(photos_run)[0]["loss"])


def test_init_at_another_image_size(photos, photos_run, tmp_path):
    flags = photos[photos.index("--batch-size"):]
    run(*flags, "--init", photos_run / "last.pt", "--image-size", "48", "--epochs", "1", "--out", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["model"]["online.visual.positional_embedding"].shape == (37, 32)


# ---------------------------------------------------------------------------------------------- help, profile, ablate


def test_help_names_every_field():
    start = time.monotonic()
    finished = as_user("--help")
    assert finished.returncode == 0 and finished.stderr == ""
    assert time.monotonic() - start < 10
    for field in dataclasses.fields(eclipse.Config):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", finished.stdout), field.name
        words = field.metadata["help"].split()[:3]
        assert re.search(r"\s+".join(map(re.escape, words)), finished.stdout), field.name


def test_profile_prints_a_table(tmp_path):
    finished = run(*EMOJI, "--profile", "--workers", "0", cwd=tmp_path)
    found = table_of(finished.out)
    assert list(found)[0] == "κ=1" and "κ=0.4" in found
    assert {"GMACs", "images_per_second", "train_MACs_vs_clip"} <= found["κ=0.7"].keys()
    macs = [float(row["GMACs"]) for row in found.values()]
    assert macs[-1] == min(macs) < macs[0]
    assert float(found["κ=1"]["train_MACs_vs_clip"]) == pytest.approx(4 / 3, abs=0.01)
    assert not any(tmp_path.iterdir())


@posix
def test_ablation_can_be_interrupted(tmp_path):
    """Ctrl-C in the second arm; the same command goes on there; a third call trains nothing."""
    out = tmp_path / "ablation"
    command = [*EMOJI, "--epochs", "1", "--ablate", "keep rate 0.4", "no fusion", "--seeds", "0", "--out", out]
    second = out / "no_fusion" / "seed0"
    stopped = Script(*command).wait_for(second / "log.csv", 2).ctrl_c()
    assert stopped.code == 130
    message = one_line(stopped.err)
    done = {path: path.stat().st_mtime_ns for path in (out / "keep_rate_0.4" / "seed0").iterdir()}
    assert (out / "keep_rate_0.4" / "seed0" / "results.json").exists() and not (second / "results.json").exists()
    finished = run(*command)
    assert "no fusion, seed 0" in finished.out and "keep rate 0.4, seed 0" not in finished.out
    assert done == {path: path.stat().st_mtime_ns for path in done}
    table = (out / "table.md").read_text("utf-8")
    assert "keep rate 0.4: online κ=0.4" in table and "no fusion: momentum κ=1" in table and "concept_top1" in table
    assert Image.open(out / "sweet_spot.png").size[0] > 300
    assert [row["step"] for row in log_of(second)] == [str(step) for step in range(1, 9)]
    again = run(*command)
    assert "seed 0\n" not in again.out and "step " not in again.out
    wrong = Script(*command, "--lr", "0.5").wait()
    assert wrong.code == 2 and "--lr" in one_line(wrong.err)
    assert "same command" in message  # --resume --out of the arm's folder would end with that arm


def test_ablation_with_other_keep_rate_and_data(photos, classes, tmp_path):
    """A κ that is not on the curve, and data without the emoji's zero-shot set, or without any test set."""
    out, colours = tmp_path / "ablation", ["--eval-data", "colours", "--eval-root", classes]
    flags = [*photos, "--epochs", "1", "--keep-rate", "0.25", "--ablate", "eclipse"]
    run(*flags, *colours, "--seeds", "0", "1", "--out", out)
    table = (out / "table.md").read_text("utf-8")
    assert "eclipse: online κ=0.25" in table and "colours_top1" in table and "±" in table
    assert (out / "sweet_spot.png").exists()
    run(*flags, "--seeds", "0", "--out", tmp_path / "without")
    assert "images_per_second" in (tmp_path / "without" / "table.md").read_text("utf-8")
