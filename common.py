"""What eclipse.py, clip_cid.py and dlip.py share: command line, run folder, tokenizers, data, evaluation, plots.

The models, the losses and the training loops are not here: they stand in each script, to be read there. In order:

    errors · command line · devices and processes · run folder · published weights · tokenizers · images
    · captioned and labelled sets on disk · emoji scenes · loading · embeddings on disk · evaluation
    · captions and answers · pictures

Letters in shape comments: B batch, N images, T texts, D embedding width, K classes, S image side in pixels.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import functools
import gzip
import hashlib
import heapq
import html
import io
import itertools
import json
import math
import os
import platform
import queue
import re
import shlex
import signal
import string
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler
from tqdm import tqdm

DATA = Path(__file__).resolve().parent / "data"


# --------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user gave cannot be used: main prints this one line and exits with code 2."""


class BadSample(Exception):
    """One sample cannot be used (corrupt image, no caption): it is skipped, counted and reported."""


def run_main(main, argv=None):
    """Call main(argv) and return the exit code.

    0: done. 1: diverged. 2: UserError, one line on stderr. 130: Ctrl-C or SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream has no such method
            stream.reconfigure(errors="replace")  # a console without κ or ± must not end a run
    code, message = 0, None
    try:
        main(argv)
    except UserError as error:
        code, message = 2, error
    except FloatingPointError as error:
        code, message = 1, error
    except KeyboardInterrupt as error:
        code, message = 130, str(error) or "interrupted"
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        code = 1
        silence_stdout()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return code


def silence_stdout():
    """Nobody reads stdout any more: write to nowhere, so that no later print or flush fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@functools.cache
def import_torchvision():
    """The torchvision module, also where it is a CUDA build beside a CPU-only torch.

    PyPI has no CPU build of torchvision. Beside a CPU-only torch its compiled operators do not
    load, and Python code that only describes their shapes then fails with "operator
    torchvision::nms does not exist". Declaring the schemas it looks for is enough: this project
    calls none of those operators.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]  # the half-imported package
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # the schemas live as long as this object
        import torchvision
    return torchvision


# --------------------------------------------------------------------------------- command line


def option(default, help, allowed=None, section=None):
    """A dataclass field that is also a command-line flag.

    allowed: a list of choices, or (least, most) of a number, else from 0 on. section: opens a new
    group in --help.
    """
    metadata = {"help": help, "allowed": allowed, "section": section}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse_command_line(config_class, description, argv=None):
    """The flags given on the command line, as {field: value}; those not given are absent.

    Flags come from the fields of the dataclass: `keep_rate: float` is --keep-rate X, a bool is
    --fuse / --no-fuse, a tuple takes several values. UserError for a wrong flag or value.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    group = parser
    for field in dataclasses.fields(config_class):
        default, allowed = field.default, field.metadata["allowed"]
        if field.metadata["section"]:
            group = parser.add_argument_group(field.metadata["section"])
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        help = field.metadata["help"].replace("%", "%%")
        if shown not in (None, ""):
            help += f" [{shown}]"
        # float of `float | None` and of `tuple[float, ...]`
        kind = getattr(field.type, "__args__", (field.type,))[0]
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        else:
            settings = {"type": kind, "metavar": kind.__name__.upper()}
        if isinstance(allowed, list):
            settings = {"choices": allowed}
        if isinstance(default, tuple):
            settings["nargs"] = "+"
        group.add_argument(flag(field.name), help=help, **settings)
    given = vars(parser.parse_args(argv))
    for field in dataclasses.fields(config_class):
        if isinstance(given.get(field.name), (int, float)):
            check_range(field, given[field.name])
    return as_fields(given)


def check_range(field, value):
    """UserError when a number is outside of field's range, by default from 0 on, or not finite."""
    least, most = min(0, field.default or 0), math.inf
    if isinstance(field.metadata["allowed"], tuple):
        least, most = field.metadata["allowed"]
    if not least <= value <= most or value == math.inf:
        raise UserError(f"{flag(field.name)} {value:g}: must be from {least:g} to {most:g}")


def as_fields(saved):
    """Values from json or argparse, their lists tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in saved.items()}


# Flags that may differ when a run goes on.
FREE = {"out", "resume", "root", "cache", "device", "workers", "log_every", "seeds", "ablate",
        "jobs"}


def fill_config(config_class, recipe, given, stem):
    """The Config: defaults <- recipe <- flags given; of a run that --resume continues, as saved.

    recipe, given: {field: value}; stem: the default run folder, numbered when taken. UserError
    when a flag contradicts the run being resumed.
    """
    out = given.get("out") or run_folder(stem, newest=given.get("resume", False))
    values = {**recipe, **given, "out": out}
    if given.get("resume"):
        path = Path(out, "config.json")
        if not path.is_file():
            print(f"--resume: no run in {out} yet, starting one")
            return config_class(**values)
        saved = saved_config(config_class, path)
        for name, value in given.items():
            if name not in FREE and saved.get(name, value) != value:
                raise UserError(f"{flag(name)} {value}: the run in {out} was started with "
                                f"{saved[name]}; leave the flag out, or take another --out")
        values = {**saved, **given, "out": out}
    return config_class(**values)


def saved_config(config_class, path):
    """{field: value} of a run's config.json. UserError when the file is damaged."""
    saved = read_json(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"{path} holds no config of a run: take another --out")
    return known_fields(config_class, saved["config"])


def known_fields(config_class, saved):
    """Those of the saved values that are fields of the dataclass."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in as_fields(saved).items() if name in names}


def run_folder(stem, newest):
    """The default run folder: `stem`, stem-2, stem-3, ..., the first free or the newest taken."""
    number = 1
    name = stem
    while Path(name).exists():
        previous = name
        number += 1
        name = f"{stem}-{number}"
    return previous if newest and number > 1 else name


# ------------------------------------------------------------------------ devices and processes


def launched():
    """Whether torchrun started this process; some of its variables alone are leftovers."""
    return all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def rank():
    return int(os.environ["RANK"]) if launched() else 0


def world_size():
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def start_device(name, seed):
    """Join the processes torchrun started, pick the device ("auto": CUDA, else MPS, else CPU), seed.

    Products of float32 matrices stay exact: nothing here allows TF32, so that the logits of every
    loss are float32 also on CUDA, where the towers run in bf16 by default.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here; try --device auto") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(torch.device(name))
    if world_size() > 1 and not dist.is_initialized():
        backend = "nccl" if name.startswith("cuda") else "gloo"
        hours = datetime.timedelta(hours=3)  # the other processes wait while rank 0 evaluates
        dist.init_process_group(backend, timeout=hours)
    torch.manual_seed(seed)
    return torch.device(name)


def mixed_precision(precision, device):
    """The autocast context of --precision and a GradScaler (idle except for fp16)."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    amp = torch.autocast(device.type, dtype, enabled=dtype is not None)
    return amp, torch.amp.GradScaler(device.type, enabled=precision == "fp16")


class Gather(torch.autograd.Function):
    """(b, D) on each process -> (B, D) on all; the gradient is summed over the processes."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(x):
    """Every process's rows of x, with gradient to each of them: (b, D) -> (B, D)."""
    return Gather.apply(x) if world_size() > 1 else x


def average_gradients(parameters):
    """Replace each gradient by its mean over the processes."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
        work.wait()
    torch._foreach_div_(grads, world_size())


def mean_over_processes(terms):
    """{name: scalar tensor} -> {name: float}, their means; waits for the device once."""
    values = torch.stack([value.float() for value in terms.values()])
    values = sum_over_processes(values) / world_size()
    return dict(zip(terms, values.tolist()))


def sum_over_processes(x):
    """x, in place, summed over the processes."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def total(count):
    """The sum of an integer over the processes."""
    return sum(gather_objects(count))


def of_first(x):
    """x, in place, as rank 0 has it."""
    if world_size() > 1:
        dist.broadcast(x, 0)
    return x


def gather_objects(thing):
    """[the thing each process holds], in order of rank."""
    if world_size() == 1:
        return [thing]
    things = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def on_first(work):
    """work() on rank 0 while the others wait; all return its result. Its UserError ends them all."""
    result = None
    if rank() == 0:
        try:
            result = work()
        except UserError as error:
            result = error
    result = gather_objects(result)[0]
    if isinstance(result, UserError):
        raise result
    return result


# ----------------------------------------------------------------------------------- run folder

SAVE_EVERY = 500  # steps between checkpoints; one is also saved after every epoch


def replace_file(path, write):
    """write(temporary path), then rename: nobody ever reads half a file. UserError if it fails."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_keys(path, keys):
    """Sample keys, one a line."""
    text = "\n".join(keys) + "\n"
    replace_file(path, lambda new: new.write_text(text, "utf-8", errors="surrogateescape"))


def read_text(path, **options):
    """The text of a file in UTF-8. UserError, naming it, when it cannot be read."""
    try:
        return Path(path).read_text("utf-8-sig", **options)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8") from None


def read_json(path, **options):
    """What a json file holds. UserError, naming the file, when it is absent or damaged."""
    try:
        return json.loads(read_text(path), **options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid json: {error}") from None


def read_keys(path):
    """Sample keys, one a line."""
    return read_text(path, errors="surrogateescape").rstrip("\n").split("\n")


def read_csv(path):
    """The rows of a log.csv; what a power cut left of the last one is passed over."""
    text = read_text(path, errors="replace").replace("\0", "")
    rows = csv.DictReader(text.splitlines())
    return [row for row in rows if (row["step"] or "").isdigit() and None not in row.values()]


def environment():
    """Versions, hardware and git commit, for config.json."""
    git = ["git", "-C", str(DATA.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__,
            "platform": platform.platform(), "cpu_threads": torch.get_num_threads(), "gpu": gpu,
            "processes": world_size(), "command": " ".join(sys.argv)}


class Run:
    """A run folder: config.json, log.csv, last.pt, best.pt, results.json and pictures.

    log.csv holds only what a rerun reproduces to the digit. Only rank 0 writes.
    """

    def __init__(self, folder, columns):
        self.folder, self.columns = Path(folder), columns

    def path(self, name):
        return self.folder / name

    def check_free(self, cfg):
        """UserError when the folder holds a run that is not to be resumed."""
        if self.path("log.csv").exists() and not cfg.resume:
            raise UserError(f"{self.folder} holds a run: go on with --resume, or choose another "
                            "--out")

    def start(self, cfg, step):
        """Write config.json at step 0; later rows of an interrupted run are dropped."""
        if rank() > 0:
            return
        self.check_free(cfg)
        if step == 0:
            content = {"config": dataclasses.asdict(cfg), "environment": environment()}
            self.write_json("config.json", content)
        if self.path("log.csv").exists():
            rows = [row for row in read_csv(self.path("log.csv")) if int(row["step"]) <= step]
            self.path("log.csv").unlink()
            for row in rows:
                self.log(row)

    def log(self, row):
        """Append a row to log.csv; absent columns stay empty."""
        if rank() > 0:
            return
        path = self.path("log.csv")
        new = not path.exists()
        shown = {name: f"{v:.8g}" if isinstance(v, float) else v for name, v in row.items()}
        try:
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(shown)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error

    def write_json(self, name, content):
        if rank() == 0:
            write_json(self.path(name), content)

    def save(self, name, content):
        """torch.save, atomic: a crash while writing leaves the previous checkpoint whole."""
        if rank() == 0:
            replace_file(self.path(name), lambda temporary: torch.save(content, temporary))

    def load_state(self, cfg, samples, **parts):
        """The loop's counters at the last checkpoint, its tensors loaded into the parts.

        A run that starts, or whose first checkpoint is still to come, gets fresh counters. parts:
        model, optimiser, scaler. UserError when the checkpoint is damaged, or when the training
        set no longer has as many samples: its steps per epoch would be others.
        """
        path = self.path("last.pt")
        if not (cfg.resume and path.exists()):
            return {"step": 0, "best": -1.0, "best_step": 0, "bad": 0, "samples": samples}
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state = saved["state"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        except Exception as error:  # the reader raises errors of many types on damaged files
            raise UserError(f"{path} is damaged or of another model ({type(error).__name__}): "
                            "delete it, and this training starts anew") from error
        if state["samples"] != samples:
            raise UserError(f"--resume: the run in {self.folder} has {state['samples']:,} training "
                            f"samples, now there are {samples:,}: take another --out")
        if rank() > 0:
            state["bad"] = 0  # rank 0 holds the sum
        return state

    def keep_best(self, score, state, model, cfg, size):
        """best.pt: the model, where its validation score is the best so far."""
        if score > state["best"]:
            state["best"], state["best_step"] = score, state["step"]
            self.save("best.pt", checkpoint(model, cfg, size))

    def save_state(self, cfg, size, state, **parts):
        """last.pt: the tensors of the parts, the loop's counters and the config.

        Random numbers need no state: they are seeded by (seed, step, sample). Raises
        FloatingPointError instead when a weight is not finite, so the last good one stays.
        """
        bad = total(state["bad"])
        state["bad"] = bad if rank() == 0 else 0
        tensors = [t for t in parts["model"].state_dict().values() if t.is_floating_point()]
        if not torch.stack([t.sum() for t in tensors]).isfinite().all():
            raise FloatingPointError(diverged("a weight is not finite", state["step"]))
        states = {name: part.state_dict() for name, part in parts.items()}
        self.save("last.pt", {**checkpoint(parts["model"], cfg, size), **states, "state": state})


def checkpoint(model, cfg, size):
    """What our checkpoint files hold."""
    return {"model": model.state_dict(), "config": dataclasses.asdict(cfg),
            "size": dataclasses.asdict(size)}


def log_row(state, steps_per_epoch, now, terms, logit_scale):
    """The row of log.csv: the one place where the host waits for the device.

    now: the schedules' values; terms: {name: scalar tensor}; logit_scale: its logarithm, a
    parameter. FloatingPointError when the loss is not finite.
    """
    row = {"step": state["step"], "epoch": state["step"] / steps_per_epoch, **now}
    row.update(mean_over_processes(terms), logit_scale=logit_scale.exp().item())
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(diverged(f"the loss is {row['loss']}", state["step"]))
    return row


def diverged(what, step):
    return (f"{what} at step {step}: lower --lr or use --precision fp32 (a checkpoint saved before "
            "it diverged is kept)")


class Progress:
    """A bar that shows every step on a terminal; elsewhere a line whenever a row is logged."""

    def __init__(self, steps, step, batch_size):
        self.batch_size, self.logged, self.since = batch_size, step, time.perf_counter()
        hidden = None if rank() == 0 else True  # None: hidden unless on a terminal
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=hidden,
                        dynamic_ncols=True, smoothing=0.05)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def show(self, row, keep):
        """Show a row of log.csv and the images/s since the last; keep: as a line of its own."""
        speed = (row["step"] - self.logged) * self.batch_size / (time.perf_counter() - self.since)
        metrics = " ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
        text = f"{metrics} | {speed:.0f} images/s"
        if rank() == 0 and self.bar.disable:
            try:
                print(f"step {row['step']} {text}", flush=True)
            except BrokenPipeError:  # the reader of our output has gone: stop as after SIGTERM
                silence_stdout()
                signal.raise_signal(signal.SIGTERM)
        elif keep:
            self.bar.write(text)
        else:
            self.bar.set_postfix_str(text)
        self.logged, self.since = row["step"], time.perf_counter()


class StopRequest:
    """A first Ctrl-C or SIGTERM is noted for the end of the step, a second interrupts at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.before[signum] = signal.signal(signum, self.note)
        return self

    def note(self, signum, frame):
        if self.asked:
            raise KeyboardInterrupt("interrupted; the run is as it was at its last checkpoint")
        self.asked = True

    def agreed(self, synchronise):
        """Whether to stop now; several processes agree on it where `synchronise` is true."""
        if world_size() == 1:
            return self.asked
        return synchronise and total(self.asked) > 0

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


# ------------------------------------------------------------------------------------- ablation


def run_arms(cfg, given, arms, baselines, first=()):
    """--ablate: run each arm that is not done as a command of its own, then tabulate all that are.

    given: the flags of this command; arms: {name: {field: value}}, what an arm changes in them;
    cfg.ablate: names of arms, or "all"; first: [(folder, fields)] of commands whose work the arms
    share; baselines: the arms that all are compared with, seed by seed. Arm and seed have a folder
    of their own, so an interrupted ablation goes on. Returns {arm: [results.json of each seed]}.
    """
    unknown = set(cfg.ablate) - {"all", *arms}
    if unknown:
        raise UserError(f"--ablate {' '.join(sorted(unknown))}: no such arm; there are: all, "
                        + ", ".join(map(repr, arms)))
    folder = Path(cfg.out)
    common = {name: v for name, v in given.items() if name not in ("ablate", "seeds", "jobs", "out")}
    wanted = [name for name in arms if "all" in cfg.ablate or name in cfg.ablate]
    commands = []
    for seed in cfg.seeds:
        for name in wanted:
            out = arm_folder(folder, name, seed)
            if not (out / "results.json").is_file():
                commands.append((out, {**common, **arms[name], "seed": seed}))
    if commands:
        run_commands([(out, {**common, **fields}) for out, fields in first], cfg.jobs)
        run_commands(commands, cfg.jobs)
    found = {}
    for name in arms:
        results = sorted(arm_folder(folder, name, 0).parent.glob("seed*/results.json"))
        if results:
            found[name] = [read_json(path) for path in results]
    tabulate(found, baselines, folder)
    return found


def arm_folder(folder, name, seed):
    return folder / name.replace(" ", "_") / f"seed{seed}"


def run_commands(commands, jobs):
    """Run this script with each of [(out, {field: value})], `jobs` at a time.

    One job a GPU, or an equal share of the CPU's threads a job: the printed command carries either,
    so that typed alone it gives the same digits. UserError when a command fails, KeyboardInterrupt
    after Ctrl-C, which the running commands get as well: they save and end first.
    """
    slots = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def run(out, fields):
        slot = slots.get()
        try:
            run_command(out, fields, slot, jobs)
        finally:
            slots.put(slot)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(run, *command) for command in commands]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)


def run_command(out, fields, slot, jobs):
    """Print and run one command on a GPU or on its share of the CPU; its output in output.txt."""
    gpus = torch.cuda.device_count()
    variable, value = "OMP_NUM_THREADS", max(1, torch.get_num_threads() // jobs)
    if gpus:
        variable, value = "CUDA_VISIBLE_DEVICES", slot % gpus
    words = [sys.argv[0], *to_flags(fields), "--out", str(out), "--resume"]
    print(f"{variable}={value} {shlex.join(['python', *words])}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "w") as output:
        code = subprocess.call([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT,
                               env={**os.environ, variable: str(value)})
    if code:
        last = read_text(out / "output.txt", errors="replace").splitlines()[-1:]
        raise UserError(f"{out} failed, the rest is not run: {' '.join(last)}")


def to_flags(fields):
    """{"keep_rate": 0.7, "fuse": False} -> ["--keep-rate", "0.7", "--no-fuse"]"""
    words = []
    for name, value in fields.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        elif isinstance(value, tuple):
            words += [flag(name), *map(str, value)]
        else:
            words += [flag(name), str(value)]
    return words


def tabulate(found, baselines, folder):
    """Print and write table.md, mean ± std of every cell, and a table of differences a baseline."""
    table = {}
    for name, runs in found.items():
        for cell in runs[0]["cells"]:
            values = mean_std([run["cells"][cell] for run in runs])
            table[f"{name}: {cell}"] = {"seeds": str(len(runs)), **values}
    print_table(table, folder / "table.md")
    for baseline in baselines:
        if baseline in found:
            print(f"\ndifference to {baseline!r}, subtracted seed by seed, and in how many seeds "
                  "it is positive")
            path = folder / f"difference_to_{baseline.replace(' ', '_')}.md"
            print_table(paired_differences(found, baseline), path)


def paired_differences(found, baseline):
    """{"arm: cell": {metric: "mean ± std (positive/seeds)"}} against the baseline's first cell.

    found: {arm: [results.json]}, each with its seed; seeds that one of the two lacks are left out.
    """
    first = next(iter(found[baseline][0]["cells"]))
    base = {run["seed"]: run["cells"][first] for run in found[baseline]}
    table = {}
    for name, runs in found.items():
        for cell in runs[0]["cells"]:
            pairs = [(run["cells"][cell], base[run["seed"]]) for run in runs if run["seed"] in base]
            if (name, cell) == (baseline, first) or not pairs:
                continue
            metrics = [m for m in pairs[0][1] if m in pairs[0][0] and m != "images_per_second"]
            gains = [{m: ours[m] - theirs[m] for m in metrics} for ours, theirs in pairs]
            summary = mean_std(gains)
            for metric in metrics:
                positive = sum(gain[metric] > 0 for gain in gains)
                summary[metric] += f" ({positive}/{len(gains)})"
            table[f"{name}: {cell}"] = summary
    return table


# how the columns of log.csv that hold losses begin
LOSSES = ("loss", "nce", "kd", "cluster", "instance", "mimicry", "itc", "itm", "lm", "hr", "at_")


# ---------------------------------------------------------------------------------- checkpoints

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # SLIP's too
OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Size:
    """What a CLIP's tensors and inputs look like: all that a model is built from."""

    image_size: int  # pixels, as patch_size
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int  # hidden width of the MLPs
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int  # tokens of a text, start and end included
    vocab_size: int
    embed_dim: int  # width of the joint embedding
    act: str  # "gelu" or "quick_gelu"
    mean: tuple  # of the channels of pixels from 0 to 1, as std
    std: tuple

    def pixel_statistics(self, device):
        """Mean and standard deviation of pixels from 0 to 255, (2, 3, 1, 1)."""
        return 255 * torch.tensor([self.mean, self.std], device=device).view(2, 3, 1, 1)


DEMO = Size(image_size=40, patch_size=8, vision_width=96, vision_layers=4, vision_heads=4,
            vision_mlp=384, text_width=64, text_layers=2, text_heads=4, context_length=24,
            vocab_size=4096, embed_dim=64, act="gelu", **IMAGENET)
VIT_B32 = Size(image_size=224, patch_size=32, vision_width=768, vision_layers=12, vision_heads=12,
               vision_mlp=3072, text_width=512, text_layers=12, text_heads=8, context_length=77,
               vocab_size=49408, embed_dim=512, act="quick_gelu", **IMAGENET)
PRESETS = {
    "tiny": replace(DEMO, image_size=16, vision_width=16, vision_layers=2,
                                vision_heads=2, vision_mlp=32, text_width=16, text_layers=1,
                                text_heads=2, embed_dim=16),  # for tests
    "demo": DEMO,
    "demo64": replace(DEMO, image_size=64),
    # 0.7 of the demo's multiply-adds: the rival, not pruned, of a pruned demo
    "slim": replace(DEMO, vision_width=80, vision_mlp=320),
    "vit_b32": VIT_B32,
    "vit_b16": replace(VIT_B32, patch_size=16),
}


@dataclass
class Checkpoint:
    """A file of weights. Only a file of this project has config and size."""

    path: Path
    weights: dict  # {name: tensor}
    config: dict  # the run's Config as saved, else {}
    size: Size | dict | None  # of a CLIP a Size, of a BLIP a dict


WRAPPERS = ("model", "state_dict", "model_state_dict")


def read_checkpoint(path):
    """The Checkpoint in a .pt, .bin or .safetensors file, or in one of OpenAI's archives.

    Nothing in the file is executed. The weights are as stored, but out of their wrapper and
    without what DataParallel and torch.compile put into names. UserError: no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: name a checkpoint, such as RUN/last.pt")
    try:
        content = weights = read_content(path)
        for wrapper in WRAPPERS:
            weights = weights.get(wrapper, weights)
        plain = {}
        for name, tensor in weights.items():
            name = name.replace("_orig_mod.", "").removeprefix("module.")
            plain[name] = tensor.detach()
        config, size = {}, content.get("size")
        if isinstance(size, dict):
            config = content["config"]
            if size.keys() == Size.__annotations__.keys():
                size = Size(**size)
        else:
            size = None
    except Exception as error:  # what is damaged or no table of tensors raises many types
        reason = f"it is no table of weights, or cut off or damaged ({type(error).__name__})"
        python_object = re.search(r"GLOBAL (\S+)", str(error))
        if python_object:
            reason = (f"it also holds a {python_object[1]}, and reading that could run any code. "
                      "If you trust it, re-save the weights alone: torch.save(torch.load(FILE, "
                      "weights_only=False)['state_dict'], NEW_FILE)")
        raise UserError(f"{path} is not read: {reason}") from error
    return Checkpoint(path, plain, config, size)


def read_content(path):
    """What a file of weights holds, read without executing any of it."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if zipfile.is_zipfile(path) and "constants.pkl" in str(zipfile.ZipFile(path).namelist()):
        return torch.jit.load(path, map_location="cpu").state_dict()  # TorchScript: OpenAI's
    return torch.load(path, map_location="cpu", weights_only=True)


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8,
               "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor}. The format: the length of the header in 8 bytes, the header, a json with
    dtype, shape and place of each tensor, then the data."""
    content = torch.from_numpy(np.fromfile(path, np.uint8))
    start = 8 + content[:8].view(torch.int64).item()
    header = json.loads(bytes(content[8:start].numpy()))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = content[start + begin:start + end].clone()  # aligned
        tensors[name] = data.view(SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_clip(path, act=None):
    """clip_weights of a file."""
    return clip_weights(read_checkpoint(path), act)


def clip_weights(checkpoint, act=None):
    """(float32 weights in OpenAI's names, Size, config) of a CLIP ViT: ours (its trained towers),
    OpenAI's, OpenCLIP's or Hugging Face's. A file of ours tells its Size; act goes before all."""
    path, weights, size = checkpoint.path, checkpoint.weights, checkpoint.size
    for prefix in ("online.", "student."):
        if prefix + "logit_scale" in weights:
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()
                       if name.startswith(prefix)}
    try:
        if "vision_model.embeddings.class_embedding" in weights:
            weights = from_hugging_face(weights)
        if not isinstance(size, Size):
            size = foreign_size(path, weights, act)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no CLIP ViT ({type(error).__name__}: {error})") from None
    size = replace(size, act=act or size.act)
    if size.act not in ("gelu", "quick_gelu"):
        raise UserError(f"{path} wants the activation {size.act}: --act gelu or quick_gelu")
    weights = {name: tensor.float() for name, tensor in weights.items()
               if tensor.is_floating_point()}  # integers beside them are no parameters
    return weights, size, checkpoint.config


VISION_HEADS = {1280: 16, 1408: 16, 1664: 16}  # ViT-H, g, bigG; other CLIPs have width / 64


def foreign_size(path, weights, act):
    """The Size of published weights in OpenAI's names: the tensors tell the sizes, the json files
    that a hub keeps beside them heads, activation, mean and std."""
    width, _, _, patch = weights["visual.conv1.weight"].shape
    vocab, text_width = weights["token_embedding.weight"].shape
    grid = grid_side(weights["visual.positional_embedding"], path)
    archive = "input_resolution" in weights  # only OpenAI's have it
    half = weights["visual.conv1.weight"].dtype == torch.float16  # as OpenAI publishes
    size = Size(
        image_size=grid * patch, patch_size=patch, vision_width=width,
        vision_layers=count_blocks(weights, "visual.transformer."),
        vision_heads=VISION_HEADS.get(width, width // 64),
        vision_mlp=len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        text_width=text_width, text_layers=count_blocks(weights, "transformer."),
        text_heads=text_width // 64, context_length=len(weights["positional_embedding"]),
        vocab_size=vocab, embed_dim=weights["visual.proj"].shape[1],
        act="quick_gelu" if archive or half else "gelu", **OPENAI)
    told = {}
    for name in ("config.json", "preprocessor_config.json", "open_clip_config.json"):
        file = path.with_name(name)
        content = read_json(file) if file.is_file() else {}
        try:
            told.update(told_by(content, width))
        except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{file} does not describe a CLIP: {error}") from None
    if not archive and not act and "act" not in told and rank() == 0:
        print(f"{path}: nothing tells the activation, {size.act} is assumed; --act changes it "
              "(OpenAI's weights need quick_gelu)")
    size = replace(size, **told)
    for width, heads in (size.vision_width, size.vision_heads), (size.text_width, size.text_heads):
        if heads < 1 or width % heads:
            raise UserError(f"{path}: {heads} attention heads in a width of {width}")
    return size


def count_blocks(weights, tower):
    return sum(f"{tower}resblocks.{i}.ln_1.weight" in weights for i in range(len(weights)))


def told_by(content, width):
    """Fields of Size that a json beside weights tells, with what its library leaves out."""
    told, pixels = {}, content
    vision, text = content.get("vision_config"), content.get("text_config") or {}
    if vision:  # Hugging Face's config.json
        told["act"] = vision.get("hidden_act", "quick_gelu")
        told["vision_heads"] = int(vision.get("num_attention_heads", 12))
        told["text_heads"] = int(text.get("num_attention_heads", 8))
    model = content.get("model_cfg")
    if model:  # open_clip_config.json
        told["act"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
        if "vision_cfg" in model:
            told["vision_heads"] = width // model["vision_cfg"].get("head_width", 64)
        if "text_cfg" in model:
            told["text_heads"] = int(model["text_cfg"].get("heads", 8))
        pixels = content.get("preprocess_cfg") or {}
    for field in ("mean", "std"):
        values = pixels.get(field) or pixels.get(f"image_{field}")
        if values:
            red, green, blue = map(float, values)
            told[field] = red, green, blue
    return told


def from_hugging_face(weights):
    """Hugging Face CLIPModel's tensors in OpenAI's names: q, k, v become one in_proj."""
    renames = [
        ("encoder.layers.", "transformer.resblocks."),
        ("embeddings.", ""),
        ("vision_model.", "visual."),
        ("text_model.", ""),
        ("patch_embedding", "conv1"),
        ("position_embedding.weight", "positional_embedding"),
        ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"),
        ("final_layer_norm", "ln_final"),
        ("layer_norm", "ln_"),
        ("self_attn.", "attn."),
        ("q_proj.", "in_proj_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("visual_projection.weight", "visual.proj"),
        ("text_projection.weight", "text_projection"),
    ]
    renamed = {}
    for name, tensor in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            tensor = torch.cat([weights[part] for part in parts])
        if name.endswith("projection.weight"):
            tensor = tensor.T.contiguous()
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def grid_side(positions, where="a model"):
    """g of position embeddings (1 + g*g, D). UserError when they are no square with its CLS."""
    side = math.isqrt(len(positions) - 1)
    if side ** 2 != len(positions) - 1:
        raise UserError(f"{where}: visual.positional_embedding {tuple(positions.shape)} is no "
                        "square grid and CLS")
    return side


def resize_positions(positions, count):
    """(1 + g*g, D), a square grid with its CLS, bicubically resized to `count` rows."""
    if len(positions) == count:
        return positions
    old, new = grid_side(positions), math.isqrt(count - 1)
    grid = positions[1:].T.unflatten(1, (old, old)).unsqueeze(0)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


def clip_size(cfg, loaded=None):
    """(Size, weights or None): of the Checkpoint if there is one, else of the preset; then
    --image-size and --act. UserError when the patches do not fill the image."""
    size, weights = PRESETS[cfg.preset], None
    if loaded:
        weights, size, _ = clip_weights(loaded, cfg.act)
    size = replace(size, image_size=cfg.image_size or size.image_size, act=cfg.act or size.act)
    if size.image_size % size.patch_size:
        raise UserError(f"--image-size {size.image_size} is no multiple of the patches' "
                        f"{size.patch_size} px")
    key = "visual.positional_embedding"
    if loaded and key in weights:
        patches = (size.image_size // size.patch_size) ** 2
        weights[key] = resize_positions(weights[key], 1 + patches)
    return size, weights


def load_weights(module, weights, path):
    """load_state_dict. UserError in one line that names the tensor and both shapes."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in {**own, **found}:
        if own.get(name) != found.get(name):
            raise UserError(f"{path} does not fit: {name} is {found.get(name, 'absent')} in it, "
                            f"{own.get(name, 'absent')} in the model")
    meta = any(p.is_meta for p in module.parameters())  # made without memory
    module.load_state_dict(weights, assign=meta)


# ---------------------------------------------------------------------------------------- tokenizer

# The runs that byte pairs are merged in. `re` has no class for letters alone, but [^\W_] is exactly
# the Unicode letters and numbers: the numbers are split off later. Two quirks of CLIP's pattern,
# which ignores case in the `regex` module: the long s counts as s, and U+0345, a mark that folds to
# a letter, matches nothing.
RUNS = re.compile(
    r"<[sſ]tart_of_text>|<end_of_text>|'[sſtmd]|'re|'ve|'ll|[^\W_]+|(?:[^\w\s\u0345]|_)+"
)
SPECIALS = ["<start_of_text>", "<end_of_text>"]

# GPT-2's order of the 256 bytes: the 188 that print as Latin-1, then the others.
# A byte's place here is its token id.
BYTES = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
BYTES += [b for b in range(256) if b not in BYTES]


def read_lines(name: str, count: int) -> list[str]:
    """The first lines of a compressed text in data/. UserError where it is missing or damaged."""
    path = DATA / name
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        if len(lines) < count:
            raise EOFError
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is missing or damaged ({type(error).__name__}): "
                        "data/README.md tells its source") from error
    return lines[:count]


@functools.lru_cache(maxsize=4)
def load_merges(n_merges: int) -> tuple[dict, list[bytes]]:
    """The first n_merges byte pairs of data/bpe_simple_vocab_16e6.txt.gz, in order of rank.

    Returns {(left id, right id): id of the merged token} and each id's bytes, with a space where
    the token ends a word. Ids: 0..255 a byte, 256..511 a byte that ends a word, from 512 the
    merges, then the two specials.
    """
    # The file writes a byte as one printable character: itself where it prints, else the next one
    # from U+0100 on.
    symbols = [chr(b) for b in BYTES[:188]] + [chr(i) for i in range(256, 324)]
    symbols += [symbol + "</w>" for symbol in symbols]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    texts = [bytes([b]) for b in BYTES]
    texts += [text + b" " for text in texts]
    merges = {}
    for line in read_lines("bpe_simple_vocab_16e6.txt.gz", n_merges + 1)[1:]:  # 0: version
        left, right = line.split()
        ids[left + right] = merges[ids[left], ids[right]] = len(texts)
        texts.append(texts[ids[left]] + texts[ids[right]])
    return merges, texts + [special.encode() for special in SPECIALS]


def merge_bytes(word: bytes, merges: dict) -> list[int]:
    """Token ids of one word by byte-pair encoding, in O(n log n) for n bytes.

    The pair of lowest rank, of equal ones the leftmost, becomes one token, until no pair is in
    `merges`. The id of a merged token grows with its rank and stands for it here.
    """
    ids = [BYTES.index(b) for b in word]
    ids[-1] += 256

    # A linked list: a merged token takes its left part's place, and its right part's holds None.
    # Place n, which is also place -1, is an end that merges with nothing.
    n = len(ids)
    ids.append(None)
    before = list(range(-1, n))
    after = [*range(1, n + 1), n]
    queue = []

    def push(place):
        pair = ids[place], ids[after[place]]
        if pair in merges:
            heapq.heappush(queue, (merges[pair], place))

    for place in range(n):
        push(place)
    while queue:
        merged, left = heapq.heappop(queue)
        right = after[left]
        if merges.get((ids[left], ids[right])) != merged:
            continue  # one of the two has become part of another token since
        ids[left], ids[right] = merged, None
        after[left] = after[right]
        before[after[left]] = left
        push(before[left])
        push(left)
    return [i for i in ids if i is not None]


@functools.lru_cache(maxsize=2**16)  # web captions never stop bringing new words
def encode_run(run: str, vocab_size: int) -> list[int]:
    """Token ids of one match of RUNS: a special, or words, of which each number is one."""
    if run in SPECIALS:
        return [vocab_size - 2 + SPECIALS.index(run)]
    merges, _ = load_merges(vocab_size - 514)
    chars = [f" {c} " if c.isnumeric() and not c.isalpha() else c for c in run]
    ids = []
    for word in "".join(chars).split():
        ids += merge_bytes(word.encode(), merges)
    return ids


def token_rows(texts, encode, length, first, last):
    """Long tensor (B, length): first, the text's ids, last, zeros; a long text keeps its last."""
    texts = [texts] if isinstance(texts, str) else texts
    rows = [[first, *encode(text)[:length - 2], last] for text in texts]
    rows = [row + [0] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.long).view(len(rows), length)


class CLIPTokenizer:
    """CLIP's byte-pair encoding (Radford et al. 2021, section 2.4), id for id as in open_clip.

    One step is left out: OpenAI and open_clip first run ftfy, which repairs mis-decoded text and
    also rewrites curly quotes, ligatures, full-width forms, control characters and decomposed
    accents. Of that only surrogates are treated here. What is a letter or a number is what Python's
    own Unicode tables say; a newer `regex` knows some more scripts.

    context_length: tokens per text, start and end included. vocab_size: 49408 gives CLIP's ids; a
    smaller one keeps only the first merges (vocabulary: 512 bytes, merges, 2 specials), for a small
    embedding table. UserError for a vocab_size outside 514..49408: another tokenizer's.
    """

    def __init__(self, context_length: int = 77, vocab_size: int = 49408):
        if not 514 <= vocab_size <= 49408:
            raise UserError(f"a vocabulary of {vocab_size} tokens is not CLIP's: 514 to 49408")
        self.context_length, self.vocab_size = context_length, vocab_size
        self.sot, self.eot = vocab_size - 2, vocab_size - 1

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        """Long tensor (B, context_length): start, text, end, zeros. A long text keeps its end."""
        return token_rows(texts, self.encode, self.context_length, self.sot, self.eot)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of any length, without start and end token."""
        # A surrogate has no UTF-8: a pair becomes its character, a lone one U+FFFD, as in ftfy.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        ids = []
        for run in RUNS.findall(text):
            cached = encode_run if len(run) <= 100 else encode_run.__wrapped__
            ids += cached(run, self.vocab_size)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: a space after each word, padding (id 0) as "!", broken UTF-8 as U+FFFD."""
        _, texts = load_merges(self.vocab_size - 514)
        return b"".join(texts[i] for i in ids).decode("utf-8", "replace")


# --------------------------------------------------------------------------------- BERT's tokenizer

BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
BERT_SPECIAL = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK|DEC|ENC)\])")
IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
                       "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")
BLIP_SYMBOLS = '.!"()*#:;~'  # what BLIP takes out of captions and questions


@functools.lru_cache(maxsize=1)
def load_vocabulary() -> tuple[str, ...]:
    """The 30522 tokens of bert-base-uncased in order of their ids, from data/."""
    return tuple(read_lines("bert_base_uncased_vocab.txt.gz", 30522))


def split_words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks, without accents: BERT's basic tokenization.

    Control, format, private and unassigned characters vanish; each CJK ideograph is a word.
    """
    # One character at a time: a final Σ becomes σ and not ς, as in transformers, and the marks on
    # a letter, of which none is kept, are not sorted, which would take quadratic time.
    chars = []
    for decomposed in (unicodedata.normalize("NFD", c.lower()) for c in text):
        for c in decomposed:
            kind = unicodedata.category(c)
            if c in "\t\n\r":
                chars.append(" ")
            elif kind[0] == "C" or kind == "Mn" or c == "\ufffd":  # Mn: an accent
                continue
            elif kind[0] == "P" or c in string.punctuation or IDEOGRAPH.match(c):
                chars.append(f" {c} ")
            else:
                chars.append(c)
    return "".join(chars).split()


class BertTokenizer:
    """WordPiece of bert-base-uncased (Devlin et al. 2019), id for id as in transformers.

    As in BLIP (Li et al. 2022), [DEC] and [ENC] follow the vocabulary as ids 30522 and 30523: the
    first token of a text that is decoded, or encoded with an image. What is punctuation or an
    accent is what Python's Unicode tables say. A special token written in a text becomes that
    token, as in transformers; lower case, as in clean_blip_caption, prevents it.

    context_length: tokens per text, first and [SEP] included. words: texts whose tokens and
    characters make up a small vocabulary, for a small embedding table: they are encoded as with the
    full one, other texts into smaller pieces or [UNK]; its ids count from 0 in the same order.
    UserError for a vocabulary file that is missing or not whole.
    """

    def __init__(self, context_length: int = 30, words: Iterable[str] | None = None):
        self.context_length = context_length
        self._set_tokens([*load_vocabulary(), "[DEC]", "[ENC]"])
        if words is not None:
            kept = set(BERT_SPECIALS)
            for word in split_words(" ".join(words)):
                kept.add(word)
                kept.update("##" + c for c in word)
                kept.update(self._tokens[i] for i in self._pieces(word))
            self._set_tokens([token for token in self._tokens if token in kept])

    def _set_tokens(self, tokens: list[str]) -> None:
        self._tokens, self.vocab_size = tokens, len(tokens)
        self._ids = {token: i for i, token in enumerate(tokens)}
        specials = [self._ids[token] for token in BERT_SPECIALS]
        self.pad, self.unk, self.cls, self.sep, self.mask, self.dec, self.enc = specials

    def __call__(self, texts: str | list[str], first: str = "[CLS]") -> torch.Tensor:
        """Long tensor (B, context_length): first, text, [SEP], padding. A long text keeps [SEP]."""
        return token_rows(texts, self.encode, self.context_length, self._ids[first], self.sep)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of any length, without first token and [SEP]."""
        ids = []
        for part in BERT_SPECIAL.split(text):
            if part in BERT_SPECIALS:
                ids.append(self._ids[part])
                continue
            for word in split_words(part):
                ids += self._pieces(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text without specials, as transformers' decode with clean_up_tokenization_spaces."""
        tokens = [self._tokens[i] for i in ids]
        text = " ".join(token for token in tokens if token not in BERT_SPECIALS)
        text = text.replace(" ##", "").strip()
        for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            text = text.replace(spaced, spaced.strip())
        return text

    def _pieces(self, word: str) -> list[int]:
        """Token ids of a word: the longest piece that fits, repeated; [UNK] if none or too long."""
        ids, start = [], 0
        while start < len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = word[:end] if start == 0 else "##" + word[start:end]
                if piece in self._ids:
                    break
            else:
                return [self.unk]
            ids.append(self._ids[piece])
            start = end
        return ids or [self.unk]


def clean_blip_caption(text: str, max_words: int = 30) -> str:
    """A caption as BLIP reads it: lower case, a space for .!"()*#:;~, at most max_words words."""
    text = text.lower().translate(dict.fromkeys(map(ord, BLIP_SYMBOLS), " "))
    text = re.sub(r"\s\s+", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_blip_question(text: str, max_words: int = 50) -> str:
    """A question as BLIP reads it: lower case, .!"()*#:;~ removed, at most max_words words.

    BLIP's own limit is 50 words, then 35 tokens.
    """
    text = text.lower().translate(dict.fromkeys(map(ord, BLIP_SYMBOLS))).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])


# --------------------------------------------------------------------------------------------------------------- images

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")


def open_image(source: bytes | Image.Image, at_least: int | None = None) -> Image.Image:
    """RGB image, transparency over white; the first frame of an animation; EXIF orientation ignored.

    at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while the shorter side stays >= at_least pixels.
    Raises BadSample for whatever PIL cannot read, truncated files included.
    """
    image = _open_header(source)
    return _decode(image, min(image.size) // at_least if at_least else 1)[0]


def random_resized_crop(source: bytes | Image.Image, size: int, rng: np.random.Generator,
                        scale: tuple[float, float] = (0.5, 1.0),
                        ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> np.ndarray:
    """uint8 (3, size, size): a random crop, resized (bicubic, antialiased). Raises BadSample as open_image does.

    The crop is drawn from the size in the header, so that a JPEG need only be decoded as finely as this crop needs.
    """
    image = _open_header(source)
    left, top, width, height = random_crop_box(*image.size, rng, scale, ratio)
    image, factor = _decode(image, min(width, height) // size)
    left, top, right, bottom = (edge / factor for edge in (left, top, left + width, top + height))
    # Cut out first, so that the filter sees no pixel beyond the crop. In a reduced JPEG the edges fall between pixels:
    # rounding them would shift the crop and cost more than the reduction itself.
    x, y = math.floor(left), math.floor(top)
    image = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    return _channels_first(image.resize((size, size), Image.Resampling.BICUBIC,
                                        box=(left - x, top - y, right - x, bottom - y)))


def resize_center_crop(source: bytes | Image.Image, size: int) -> np.ndarray:
    """uint8 (3, size, size): shorter side to `size` (bicubic, antialiased), then the central square. For evaluation.

    A JPEG is decoded at a reduced size only while that leaves twice the pixels needed, so that results stay those of
    the field's full-size transform.
    """
    image = _open_header(source)
    sides, short = image.size, min(image.size)
    image, factor = _decode(image, short // (2 * size))
    width, height = (size if side == short else int(size * side / short) for side in sides)
    left, top = round((width - size) / 2), round((height - size) / 2)
    whole = (0, 0, sides[0] / factor, sides[1] / factor)  # a reduced JPEG of odd size has a padded last column or row
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=whole)
    return _channels_first(image.crop((left, top, left + size, top + size)))


def resize_whole(source: bytes | Image.Image, size: int) -> np.ndarray:
    """uint8 (3, size, size): the whole image squeezed into a square (bicubic, antialiased), as BLIP evaluates."""
    image = _open_header(source)
    sides = image.size
    image, factor = _decode(image, min(sides) // (2 * size))
    whole = (0, 0, sides[0] / factor, sides[1] / factor)
    return _channels_first(image.resize((size, size), Image.Resampling.BICUBIC, box=whole))


def random_crop_box(width: int, height: int, rng: np.random.Generator, scale: tuple[float, float],
                    ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels with the distribution of torchvision's RandomResizedCrop.

    scale: range of the crop's share of the area (uniform); ratio: range of width / height (log-uniform).
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # A very long or very tall image: its largest central crop of an allowed ratio.
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _open_header(source: bytes | Image.Image) -> Image.Image:
    """Image whose size and mode are known and whose pixels are not decoded yet (bytes), or the image itself."""
    if isinstance(source, Image.Image):
        return source
    try:
        return Image.open(io.BytesIO(source))
    except Exception as error:  # PIL's parsers raise errors of many types on damaged files
        raise BadSample("corrupt image") from error


def _decode(image: Image.Image, shrink: int) -> tuple[Image.Image, float]:
    """RGB pixels and the factor (1, 2, 4 or 8, at most `shrink`) by which the JPEG decoder has reduced both sides."""
    shrink = min(max(shrink, 1), 8)
    width, height = image.size
    try:
        draft = image.draft("RGB", (width // shrink, height // shrink))  # None: not a JPEG, or decoded before
        factor = width / draft[1][2] if draft else 1
        return _to_rgb(image), factor
    except Exception as error:
        raise BadSample("corrupt image") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits per pixel; PIL's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.float32).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies even what is RGB


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class BlipAugment:
    """BLIP's augmentation after the crop: a mirror image half of the time, then RandAugment (Cubuk et al. 2020).

    augment(uint8 (3, S, S), rng) -> uint8 (3, S, S), a function of the two alone. `operations` of OPERATIONS are drawn,
    and as in BLIP's code each is left out half of the time. randaugment: their strength, 0 to 10. None of them changes
    a hue, so that a red bus stays red. flip=False for captions that tell left from right.
    At BLIP's strength of 5 the factor of Brightness and Sharpness is 1, which changes nothing.
    Raises UserError for a strength out of range.
    """

    OPERATIONS = ("Identity", "AutoContrast", "Brightness", "Sharpness", "Equalize", "ShearX", "ShearY", "TranslateX",
                  "TranslateY", "Rotate")
    GREY = (128, 128, 128)  # what moves in from outside

    def __init__(self, flip: bool = True, randaugment: float = 5, operations: int = 2):
        if not 0 <= randaugment <= 10:
            raise UserError(f"RandAugment's strength is from 0 to 10, not {randaugment}")
        self.flip, self.strength, self.operations = flip, randaugment / 10, operations

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if self.flip and rng.random() < 0.5:
            image = image.flip(-1)
        if not self.strength:
            return image
        drawn = [self.OPERATIONS[i] for i in rng.integers(len(self.OPERATIONS), size=self.operations)]
        applied, mirrored = rng.random((2, self.operations)) < 0.5
        if not applied.any():
            return image
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        for name, sign in zip(itertools.compress(drawn, applied), np.where(mirrored, -1, 1)[applied]):
            picture = self.apply(picture, name, sign * self.strength)
        return torch.from_numpy(_channels_first(picture))

    def apply(self, picture: Image.Image, name: str, level: float) -> Image.Image:
        """One operation on an RGB image. level: -1 to 1; its sign is the direction of a shear, shift or turn."""
        if name == "Identity":
            return picture
        if name in ("AutoContrast", "Equalize"):
            return getattr(ImageOps, name.lower())(picture)
        if name in ("Brightness", "Sharpness"):
            return getattr(ImageEnhance, name)(picture).enhance(0.1 + 1.8 * abs(level))
        if name == "Rotate":
            return picture.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=self.GREY)
        shear, shift = 0.3 * level, 10 * level * min(1, picture.width / 224)  # BLIP: 10 px, from 224 px on
        across = {"ShearX": (1, shear, 0), "TranslateX": (1, 0, shift)}.get(name, (1, 0, 0))
        down = {"ShearY": (shear, 1, 0), "TranslateY": (0, 1, shift)}.get(name, (0, 1, 0))
        return picture.transform(picture.size, Image.Transform.AFFINE, (*across, *down), Image.Resampling.BILINEAR,
                                 fillcolor=self.GREY)


# ------------------------------------------------------------------------------------------------------- captioned sets

# len(d); d.key(i); d.read(i) -> (encoded image, captions); d.bad: unusable samples, counted by reason
NOT_DOWNLOADED = "not downloaded"
COMPRESSED = "{} is compressed, its samples cannot be read one by one: unpack it first (gzip -d)"


def clean_caption(text: str) -> str:
    return " ".join(text.split())


def _read_bytes(path: Path | str, start: int = 0, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise BadSample("unreadable file") from error


class TarShards:
    """Image-text pairs in all *.tar files below `root`, in the layout img2dataset and webdataset write.

    A sample is `key.jpg` (jpeg, png, webp) with `key.txt`, or `key.json` with "caption"; the key ends at the first dot
    of the file name. Samples are read by their offset, so any order is possible and workers share no open file. The
    offsets are found once and kept beside the shards in `.index-*.npz`. The folders `val` and `test` in `root` are
    left out: they are for evaluation.
    Raises UserError when there is no shard or a shard is compressed.
    """
    # Positions count tar blocks of 512 bytes. 25 bytes a sample, plus its key: 3 M samples fit in 110 MB.
    ROW = np.dtype([("shard", "u4"), ("image", "u4"), ("image_size", "u4"), ("caption", "u4"), ("caption_size", "u4"),
                    ("json", "?"), ("key_end", "u4")])

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.shards = sorted(path for path in self.root.rglob("*")
                             if path.name.endswith((".tar", ".tar.gz", ".tgz")) and not path.name.startswith(".")
                             and path.relative_to(self.root).parts[0] not in ("val", "test"))
        for path in self.shards:
            if path.suffix != ".tar":
                raise UserError(COMPRESSED.format(path))
        if not self.shards:
            raise UserError(f"no *.tar shards found in {self.root} (see data/README.md for how to make them)")
        self.rows, self.keys, self.bad = self._load_index()
        if not len(self.rows):
            raise UserError(f"no image with a caption in the {len(self.shards)} shards of {self.root}: members must be "
                            "key.jpg with key.txt, or key.json with \"caption\" (see data/README.md)")

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        """`<shard>/<key>`: keys need only be unique within a shard."""
        start = self.rows[i - 1]["key_end"] if i else 0
        shard = self.shards[self.rows[i]["shard"]].relative_to(self.root).with_suffix("").as_posix()
        return f"{shard}/{self.keys[start:self.rows[i]['key_end']].tobytes().decode(errors='surrogateescape')}"

    def read(self, i: int) -> tuple[bytes, list[str]]:
        """Raises BadSample when the caption is empty, not text, or missing in the json."""
        row = self.rows[i]
        text = self._read(row, "caption")
        try:
            text = json.loads(text).get("caption") if row["json"] else text.decode("utf-8-sig")
        except (ValueError, AttributeError) as error:
            raise BadSample("unreadable caption") from error
        if not isinstance(text, str) or not text.strip():
            raise BadSample("empty caption")
        return self._read(row, "image"), [clean_caption(text)]

    def _read(self, row: np.void, part: str) -> bytes:
        return _read_bytes(self.shards[row["shard"]], int(row[part]) * tarfile.BLOCKSIZE, int(row[f"{part}_size"]))

    def _load_index(self) -> tuple[np.ndarray, np.ndarray, collections.Counter]:
        """rows, all keys as one byte array, and the unusable samples: from the cache if it fits these shards."""
        stats = [(path.relative_to(self.root).as_posix(), path.stat()) for path in self.shards]
        # With the time: tar pads its files, so that a rewritten shard often keeps its size, and old offsets would then
        # pair images with captions wrongly.
        state = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        cache = self.root / f".index-{hashlib.sha256(state.encode()).hexdigest()[:16]}.npz"
        with contextlib.suppress(Exception):  # absent, or damaged in any way: build it again
            with np.load(cache) as index:
                return index["rows"], index["keys"], collections.Counter(json.loads(str(index["bad"])))
        rows, keys, bad = [], bytearray(), collections.Counter()
        quiet = len(self.shards) < 20 or rank() != 0
        for number, path in enumerate(tqdm(self.shards, "indexing shards", disable=quiet)):
            samples, shard_bad = _scan_shard(path)
            bad.update(shard_bad)
            rows.append(np.zeros(len(samples), self.ROW))
            for i, (key, image, caption, is_json) in enumerate(samples):
                keys += key.encode(errors="surrogateescape")
                rows[-1][i] = (number, *image, *caption, is_json, len(keys))
        rows, keys = np.concatenate(rows), np.frombuffer(bytes(keys), np.uint8)
        if rank() == 0:
            try:
                write_arrays(cache, rows=rows, keys=keys, bad=np.array(json.dumps(bad)))
            except OSError as error:
                print(f"cannot write {cache} ({error.strerror}): the shards will be indexed again at the next start")
        return rows, keys, bad


def _scan_shard(path: Path) -> tuple[list[tuple], collections.Counter]:
    """([(key, (block, size) of the image, (block, size) of the caption, caption is json)], unusable samples)."""
    parts: dict[str, dict[str, tuple[int, int] | None]] = {}  # key -> kind -> place; None: cut off
    bad, length, ended = collections.Counter(), path.stat().st_size, False
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # tarfile would keep all of them
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                extension = extension.lower()
                kind = "image" if extension in ("jpg", "jpeg", "png", "webp") else extension
                if member.isreg() and stem and kind in ("image", "txt", "json"):
                    whole = member.offset_data + member.size <= length
                    place = (member.offset_data // tarfile.BLOCKSIZE, member.size) if whole else None
                    parts.setdefault(folder + slash + stem, {}).setdefault(kind, place)
            file.seek(tar.offset)  # a sound archive ends with blocks of zeros; tarfile also stops at damage
            ended = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, ValueError) as error:
        with contextlib.suppress(BadSample):
            if _read_bytes(path, size=2) == b"\x1f\x8b":
                raise UserError(COMPRESSED.format(path)) from error
    samples = []
    for key, places in parts.items():
        image, caption = places.get("image"), places.get("txt") or places.get("json")
        if image and caption:
            samples.append((key, image, caption, not places.get("txt")))
        else:
            bad["cut off" if None in places.values() else "without caption" if image else "without image"] += 1
    if not ended and not bad["cut off"]:
        bad["in a damaged shard"] += 1  # how many is not known: at least one
    return samples, bad


class CaptionTSV:
    """Google's TSV of captions and addresses (CC3M, CC12M) with images downloaded beforehand.

    tsv: a line `caption <tab> url` per image, with or without the header line "caption<tab>url".
    images: folder, with or without sub-folders, of images named by row (`000000123.jpg` is row 123, the first is 0),
    which is what img2dataset writes with `--output_format files` and 10,000 images a shard.
    Raises UserError when there are no such images, or captions beside them contradict the TSV.
    """
    def __init__(self, tsv: str | Path, images: str | Path):
        self.tsv, self.images = Path(tsv), Path(images)
        lines = self._line_starts()
        rows, paths = self._find_images()
        known = rows < len(lines)
        self.rows, self.paths = rows[known], paths[known]
        self.starts = lines[self.rows]
        self.bad = collections.Counter({NOT_DOWNLOADED: len(lines) - len(self.rows)})
        self.bad["without caption"] = int((~known).sum())
        if not len(self.rows):
            raise UserError(f"no images named by their row in {self.tsv.name} (000000123.jpg) found in {self.images} "
                            "(see data/README.md for how to download them)")
        self._compare_captions()

    def _line_starts(self) -> np.ndarray:
        with open(self.tsv, "rb") as file:
            lengths = np.fromiter((len(line) for line in file), np.int64)
            file.seek(0)
            header = file.readline().strip().lower().startswith(b"caption\turl")
        return (np.cumsum(lengths) - lengths)[int(header):]

    def _find_images(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted row numbers and the paths of the images, relative to self.images, as bytes."""
        rows, paths = [np.zeros(0, np.int64)], [np.zeros(0, "S1")]
        for folder, _, names in os.walk(self.images):
            names = [n for n in names if n.rpartition(".")[0].isdecimal() and n.lower().endswith(IMAGE_TYPES)]
            if names:
                rows.append(np.array([int(name.rpartition(".")[0]) for name in names]))
                paths.append(np.array([os.fsencode(Path(folder, name).relative_to(self.images)) for name in names]))
        rows, first = np.unique(np.concatenate(rows), return_index=True)
        return rows, np.concatenate(paths)[first]

    def _compare_captions(self) -> None:
        """img2dataset may write key.txt beside key.jpg: with other settings its keys are not the rows of the TSV."""
        for i in np.linspace(0, len(self) - 1, 20).astype(int):
            _compare_beside(self._path(i), self._caption(i), self.rows[i], self.tsv)

    def _path(self, i: int) -> Path:
        return self.images / os.fsdecode(self.paths[i])

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        return f"{self.rows[i]:09d}"

    def _caption(self, i: int) -> str:
        with open(self.tsv, "rb") as file:
            file.seek(self.starts[i])
            return clean_caption(file.readline().split(b"\t")[0].decode("utf-8", errors="replace"))

    def read(self, i: int) -> tuple[bytes, list[str]]:
        caption = self._caption(i)
        if not caption:
            raise BadSample("empty caption")
        return _read_bytes(self._path(i)), [caption]


def _compare_beside(image: Path, caption: str, row: int, listing: Path) -> None:
    """UserError when key.txt beside an image key.jpg is not the caption of its row."""
    beside = image.with_suffix(".txt")
    if beside.is_file() and clean_caption(beside.read_text("utf-8")) != caption:
        raise UserError(f"{beside} is not the caption of row {row} of {listing}: download with "
                        "10,000 images a shard, or as tar shards (see data/README.md)")


class Packed:
    """A list of json values, kept as one block of bytes that forked workers share.

    A list of Python objects they would copy page by page: reading an object changes its reference count.
    """
    def __init__(self, values: Iterable):
        self.block, ends = bytearray(), [0]
        for value in values:
            self.block += json.dumps(value).encode()
            ends.append(len(self.block))
        self.ends = np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int):
        return json.loads(self.block[self.ends[i]:self.ends[i + 1]])


class CaptionedFiles:
    """Captioned images listed in a file; the base of COCO, Flickr30k, Visual Genome, SBU and nocaps.

    listed: (key, path or None when there is no such file, captions) of each image; listing: the file they come from;
    missing: what an absent image is counted as. Raises UserError when most images are missing, or none has a caption.
    """
    def __init__(self, listed: Iterable[tuple[str, Path | None, list[str]]], listing: Path, images: Path,
                 missing: str = "missing image file"):
        self.bad = collections.Counter()
        self.samples = Packed(self._usable(listed, missing))
        found = len(self.samples) + self.bad["without caption"]
        if self.bad["missing image file"] > found or (self.bad[missing] and not found):
            raise UserError(f"{self.bad[missing]:,} of the images listed in {listing} not found in {images} "
                            "(see data/README.md)")
        if not len(self.samples):
            raise UserError(f"{listing} lists no image with a caption for this split (see data/README.md)")

    def _usable(self, listed, missing: str) -> Iterator[tuple[str, str, list[str]]]:
        for key, path, captions in listed:
            captions = [text for text in map(clean_caption, captions) if text]
            if path and captions:
                yield key, str(path), captions
            else:
                self.bad["without caption" if path else missing] += 1

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, i: int) -> str:
        return self.samples[i][0]

    def read(self, i: int) -> tuple[bytes, list[str]]:
        _, path, captions = self.samples[i]
        return _read_bytes(path), captions


COCO_FOLDERS = ("val2014", "train2014", "val2017", "train2017")


class CocoCaptions(CaptionedFiles):
    """COCO captions, five or more an image. split: "train", "val" or "test".

    With Karpathy's `dataset_coco.json` (in root or annotations/): his splits, train with restval, test of 5,000 images.
    Without it: train2017 for training, val2017 for testing, and "val" raises UserError.
    """
    def __init__(self, root: str | Path, split: str):
        root = Path(root)
        listing = next((path for path in (root / "dataset_coco.json", root / "annotations" / "dataset_coco.json")
                        if path.is_file()), None)
        if listing:
            captions = {image["cocoid"]: texts for image, texts in _karpathy_split(listing, split)}
        elif split == "val":
            raise UserError(f"COCO has a val split only with Karpathy's dataset_coco.json, not found in {root} "
                            "(see data/README.md)")
        else:
            listing = root / "annotations" / f"captions_{'train2017' if split == 'train' else 'val2017'}.json"
            captions = _captions_by_image(_read_json(listing))
        files = _numbered_images(root, COCO_FOLDERS)
        super().__init__(((f"{i:012d}", files.get(i), texts) for i, texts in captions.items()), listing, root)


class Flickr30k(CaptionedFiles):
    """Flickr30k, five captions an image, with Karpathy's splits: "train", "val" or "test" (1,000 images)."""
    def __init__(self, root: str | Path, split: str):
        root = Path(root)
        listing = root / "dataset_flickr30k.json"
        folder = root / ("flickr30k-images" if (root / "flickr30k-images").is_dir() else "images")
        files = set(os.listdir(folder)) if folder.is_dir() else ()
        listed = ((image["filename"], folder / image["filename"] if image["filename"] in files else None, texts)
                  for image, texts in _karpathy_split(listing, split))
        super().__init__(listed, listing, folder)


def _karpathy_split(path: Path, split: str) -> Iterator[tuple[dict, list[str]]]:
    for image in _read_json(path)["images"]:
        if image["split"].replace("restval", "train") == split:
            yield image, [sentence["raw"] for sentence in image["sentences"]]


class VisualGenome(CaptionedFiles):
    """Visual Genome: the phrases of its regions as captions, about 50 an image; no splits.

    Either the official region_descriptions.json with VG_100K/<id>.jpg and VG_100K_2/<id>.jpg, in root or root/images,
    or a list as BLIP's vg_caption.json (_caption_list). Half of the images are COCO's too: with the official
    image_data.json, and Karpathy's dataset_coco.json in ../coco, those that he keeps for val and test are left out.
    """
    def __init__(self, root: str | Path):
        root = Path(root)
        listing = _find_listing(root, "region_descriptions.json", "vg_caption.json")
        # 5.4 million regions: only the phrase of each is kept, from the moment it is parsed.
        content = _read_json(listing, lambda entry: entry["phrase"] if "phrase" in entry else entry)
        if listing.name == "region_descriptions.json":
            held_out = self._held_out_by_coco(root)
            files = {number: path for folder in (root / "images", root)
                     for number, path in _numbered_images(folder, ("VG_100K", "VG_100K_2")).items()}
            listed = ((str(image["id"]), files.get(image["id"]), image["regions"]) for image in content
                      if image["id"] not in held_out)
        else:
            held_out, listed = (), _caption_list(content, listing, root)
        super().__init__(listed, listing, root)
        self.bad["in COCO's val or test"] = len(held_out)

    def _held_out_by_coco(self, root: Path) -> set[int]:
        listing = next((path for path in (root.parent / "coco" / "dataset_coco.json",
                                          root.parent / "coco" / "annotations" / "dataset_coco.json")
                        if path.is_file()), None)
        if listing is None or not (root / "image_data.json").is_file():
            return set()
        coco = {image["cocoid"] for split in ("val", "test") for image, _ in _karpathy_split(listing, split)}
        return {image["image_id"] for image in _read_json(root / "image_data.json") if image["coco_id"] in coco}


class SBU(CaptionedFiles):
    """SBU Captions: a caption an image, no splits.

    Either the official sbu-captions-all.json with images named by row (000000123.jpg is row 123, the first is 0)
    anywhere below root, as img2dataset writes them, or a list as BLIP's (_caption_list).
    Raises UserError when captions beside the images contradict the official file.
    """
    def __init__(self, root: str | Path):
        root = Path(root)
        listing = _find_listing(root, "sbu-captions-all.json", "sbu.json")
        content = _read_json(listing)
        if not isinstance(content, dict):
            super().__init__(_caption_list(content, listing, root), listing, root)
            return
        rows = {int(Path(name).stem): root / name for name in _image_files(root) if Path(name).stem.isdecimal()}
        listed = ((f"{row:09d}", rows.get(row), [text]) for row, text in enumerate(content.get("captions", ())))
        super().__init__(listed, listing, root, missing=NOT_DOWNLOADED)
        for i in np.linspace(0, len(self) - 1, 20).astype(int):
            key, path, captions = self.samples[i]
            _compare_beside(Path(path), captions[0], int(key), listing)


class NoCaps(CaptionedFiles):
    """nocaps (Agrawal et al. 2019), ten captions an image: its validation part, on which results are reported.

    nocaps_val_4500_captions.json in COCO's form with the images in root/val, root/images or root, or a list as BLIP's
    nocaps_val.json (_caption_list). domains: "in-domain", "near-domain" or "out-domain" of each sample, None where the
    file does not tell.
    """
    def __init__(self, root: str | Path):
        root = Path(root)
        listing = _find_listing(root, "nocaps_val_4500_captions.json", "nocaps_val.json")
        content, domains = _read_json(listing), {}
        if isinstance(content, dict):
            captions, files = _captions_by_image(content), set(_image_files(root))
            domains = {str(image["id"]): image.get("domain") for image in content["images"]}
            listed = ((str(image["id"]), _listed_file(image["file_name"], files, root), captions[image["id"]])
                      for image in content["images"])
        else:
            listed = _caption_list(content, listing, root)
        super().__init__(listed, listing, root)
        self.domains = [domains.get(self.key(i)) for i in range(len(self))]


def _caption_list(content: list, listing: Path, root: Path) -> Iterator[tuple[str, Path | None, list[str]]]:
    """What CaptionedFiles wants, from a list [{"image": path, "caption": text or texts}], as BLIP's.

    The captions of all entries with the same image are its captions; the key is the path as it is listed.
    """
    captions = {}
    try:
        for entry in content:
            texts = entry["caption"] or []
            captions.setdefault(entry["image"], []).extend([texts] if isinstance(texts, str) else texts)
    except (TypeError, KeyError):
        raise UserError(f'{listing} is not a list of {{"image": path, "caption": text}} (see data/README.md)') from None
    files = set(_image_files(root))
    for image, texts in captions.items():
        yield image, _listed_file(image, files, root), texts


def _listed_file(image: str, files: set[str], root: Path) -> Path | None:
    """Where a listed image is: at its absolute path, or below root, root/images or root/val.

    A path from another machine, "/there/vg/VG_100K/1.jpg", means the file below root with the longest such ending.
    """
    if image.startswith("/") and os.path.isfile(image):
        return Path(image)
    names = [name for name in image.split("/") if name not in ("", ".")]
    for first in range(len(names) if image.startswith("/") else 1):
        for folder in ((), ("images",), ("val",)):
            name = "/".join((*folder, *names[first:]))
            if name in files:
                return root / name
    return None


def _image_files(root: Path) -> Iterator[str]:
    """The images below a folder, linked folders too, as paths relative to it."""
    for folder, _, names in os.walk(root, followlinks=True):
        inside = Path(folder).relative_to(root)
        yield from ((inside / name).as_posix() for name in names if name.lower().endswith(IMAGE_TYPES))


def _numbered_images(root: Path, folders: Iterable[str]) -> dict[int, Path]:
    """{number: path} of 000000000139.jpg, 139.jpg or COCO_val2014_000000000139.jpg in these folders of root."""
    files = {}
    for folder in folders:
        if (root / folder).is_dir():
            numbers = ((name[:-4].split("_")[-1], name) for name in os.listdir(root / folder) if name.endswith(".jpg"))
            files.update((int(number), root / folder / name) for number, name in numbers if number.isdecimal())
    return files


def _captions_by_image(content: dict) -> dict[int, list[str]]:
    """{image id: captions} of a json in COCO's form, all its images."""
    captions = {image["id"]: [] for image in content["images"]}
    for annotation in content.get("annotations", ()):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return captions


def _find_listing(root: Path, *names: str) -> Path:
    """The first of these files in root, else its only json file (reports of img2dataset aside). UserError if none."""
    found = [root / name for name in names if (root / name).is_file()]
    others = [path for path in sorted(root.glob("*.json")) if not path.name.endswith("_stats.json")]
    if not found and len(others) != 1:
        raise UserError(f"no {' or '.join(names)} in {root} (see data/README.md for how to get it)")
    return (found or others)[0]


def _read_json(path: Path, object_hook=None):
    try:
        return json.loads(path.read_text("utf-8"), object_hook=object_hook)
    except FileNotFoundError:
        raise UserError(f"no file {path} (see data/README.md for how to get it)") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


class Mixture:
    """Several captioned sets as one, each seen weight times an epoch.

    parts: {name: set}; weights: {name: weight above 0}. len is the slots of an epoch, the sum of round(weight * size).
    Which sample stands in a slot depends on the epoch: at_epoch(slot, epoch) is its index for key() and read(). A part
    goes through all its samples, in a fixed random order, before it begins anew, so that after any number of epochs
    each was seen equally often, or once more. Indices below len are the samples of epoch 0 in their slots, a repeated
    one with a key of its own; the samples that epoch 0 leaves out have the indices from len on.
    Raises UserError when a weight leaves no sample of its part.
    """
    def __init__(self, parts: dict, weights: dict[str, float]):
        self.names, self.parts = list(parts), list(parts.values())
        self.weights = weights
        self.sizes = [len(part) for part in self.parts]
        self.shares = [round(weights[name] * size) for name, size in zip(self.names, self.sizes)]
        for name, size, share in zip(self.names, self.sizes, self.shares):
            if not share:
                raise UserError(f"{name}*{weights[name]:g} leaves none of the {size:,} samples of {name} in an epoch")
        # Where the slots of each part begin, then the samples of each part that epoch 0 leaves out.
        left_out = [max(0, size - share) for size, share in zip(self.sizes, self.shares)]
        self.starts = np.cumsum([0, *self.shares, *left_out])
        self.orders = [range(size) if share % size == 0 else np.random.default_rng(size).permutation(size)
                       for size, share in zip(self.sizes, self.shares)]
        self.bad = sum((part.bad for part in self.parts), collections.Counter())

    def __len__(self) -> int:
        return sum(self.shares)

    def _place(self, i: int) -> tuple[int, int]:
        """(number of the part, place in its order), the place beyond its size for a repeated sample."""
        block = int(np.searchsorted(self.starts, i, "right")) - 1
        part = block % len(self.parts)
        return part, int(i - self.starts[block]) + (self.shares[part] if block >= len(self.parts) else 0)

    def at_epoch(self, slot: int, epoch: int) -> int:
        part, place = self._place(slot)
        share = self.shares[part]
        place = (place + epoch * share) % self.sizes[part]
        return int(self.starts[part] + place if place < share
                   else self.starts[len(self.parts) + part] + place - share)

    def key(self, i: int) -> str:
        """`<name>/<key>`, with #2 after it for the second time in epoch 0."""
        part, place = self._place(i)
        again, place = divmod(place, self.sizes[part])
        key = f"{self.names[part]}/{self.parts[part].key(self.orders[part][place])}"
        return f"{key}#{again + 1}" if again else key

    def read(self, i: int) -> tuple[bytes, list[str]]:
        part, place = self._place(i)
        return self.parts[part].read(self.orders[part][place % self.sizes[part]])


class Subset:
    """The samples of a captioned set at the given indices, in that order."""
    def __init__(self, data, indices: range | np.ndarray):
        self.data, self.indices, self.bad = data, indices, data.bad

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, i: int) -> str:
        return self.data.key(self.indices[i])

    def read(self, i: int) -> tuple[bytes, list[str]]:
        return self.data.read(self.indices[i])


# ----------------------------------------------------------------------------------------------- questions about images

# len(d); d.key(i); d.read(i) -> (encoded image or PIL image, (question, human answers)); d.bad; d.answers: what may be
# answered; d.kinds[i]: what kind of question it is, or None


class VQAv2:
    """VQA v2 (Goyal et al. 2017): ten human answers a question. split: "train", "val", "trainval", "test", "test-dev".

    The official questions and annotations in root, with the images of COCO in root or ../coco: train2014 and val2014,
    or the 2017 folders, which hold the same images, and test2015. The test splits have no answers: read gives [].
    answer_list.json: the answers to choose from (BLIP's: 3,128), a json list of texts.
    Raises UserError when a file or most images are missing, or a question of train or val has no annotation.
    """
    PARTS = {"train": ("train2014",), "val": ("val2014",), "trainval": ("train2014", "val2014"),
             "test": ("test2015",), "test-dev": ("test-dev2015",)}

    def __init__(self, root: str | Path, split: str):
        if split not in self.PARTS:
            raise UserError(f"VQA v2 has the splits {', '.join(self.PARTS)}, not {split}")
        root = Path(root)
        self.answers = self._read_answers(root / "answer_list.json")
        folders = ("test2015",) if split.startswith("test") else COCO_FOLDERS
        files = _numbered_images(root.parent / "coco", folders) | _numbered_images(root, folders)
        self.bad, self.kinds = collections.Counter(), []
        self.samples = Packed(sample for part in self.PARTS[split] for sample in self._questions(root, part, files))
        if not len(self.samples) or self.bad["missing image file"] > len(self.samples):
            raise UserError(f"{self.bad['missing image file']:,} questions of VQA v2's {split} split are about images "
                            f"that are not in {', '.join(folders)} of {root} or {root.parent / 'coco'} "
                            "(see data/README.md)")

    def _read_answers(self, path: Path) -> list[str]:
        if not path.is_file():
            raise UserError(f"a question without an answer list: no file {path} (see data/README.md for how to get it)")
        answers = _read_json(path)
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"{path} is not a list of answers, [\"yes\", \"no\", ...] (see data/README.md)")
        return answers

    def _questions(self, root: Path, part: str, files: dict[int, Path]) -> Iterator[tuple[str, str, str, list[str]]]:
        """(key, path, question, answers) of each question whose image is there."""
        listing = root / f"v2_OpenEnded_mscoco_{part}_questions.json"
        questions, given = _read_json(listing)["questions"], {}
        if not part.startswith("test"):
            annotations = root / f"v2_mscoco_{part}_annotations.json"
            given = {entry["question_id"]: (entry.get("answer_type"), [answer["answer"] for answer in entry["answers"]])
                     for entry in _read_json(annotations)["annotations"]}
            without = sum(question["question_id"] not in given for question in questions)
            if without:
                raise UserError(f"{without:,} of the {len(questions):,} questions of {listing} have no annotation in "
                                f"{annotations}")
        for question in questions:
            if question["image_id"] in files:
                kind, answers = given.get(question["question_id"], (None, []))
                self.kinds.append(kind)
                yield str(question["question_id"]), str(files[question["image_id"]]), question["question"], answers
            else:
                self.bad["missing image file"] += 1

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, i: int) -> str:
        return self.samples[i][0]

    def read(self, i: int) -> tuple[bytes, tuple[str, list[str]]]:
        _, path, question, answers = self.samples[i]
        return _read_bytes(path), (question, answers)


# -------------------------------------------------------------------------------------------------------- labelled sets

# len(d); d.classes; d.templates; d.read(i) -> (encoded image or PIL image, label)
TEMPLATES = ["a photo of a {}."]


class ImageFolderSet:
    """Images in one folder per class: root/<class>/..., or root/<split>/<class>/... with split train, val or test.

    "test" falls back on val/, then on root itself; "train" needs root/train/. A class is called as its folder, with
    spaces for _ and -. Raises UserError when the split, its class folders or its images do not exist.
    """
    def __init__(self, root: str | Path, split: str):
        root, self.templates = Path(root), TEMPLATES
        folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
        folder = folders.get(split) or (folders.get("val", root) if split == "test" else None)
        if folder is None or (folder == root and folders):
            raise UserError(f"no folder {root / split} with one folder of images per class (see data/README.md)")
        # Labels must mean the same in each split, even if a class is absent from one.
        names = sorted({entry.name for parent in (folders or {split: root}).values() for entry in os.scandir(parent)
                        if entry.is_dir() and not entry.name.startswith(".")})
        if not any(entry.is_dir() for entry in os.scandir(folder)):
            raise UserError(self._no_classes(folder))
        self.classes = self._class_names(names, folder)
        self.images = [(Path(parent, file), label) for label, name in enumerate(names)
                       for parent, _, files in sorted(os.walk(folder / name))
                       for file in sorted(files) if file.lower().endswith(IMAGE_TYPES)]
        if not self.images:
            raise UserError(f"no images in the {len(names)} class folders of {folder} (see data/README.md)")

    def _class_names(self, names: list[str], folder: Path) -> list[str]:
        return [name.replace("_", " ").replace("-", " ") for name in names]

    def _no_classes(self, folder: Path) -> str:
        return f"no class folders in {folder}: one folder of images per class is needed (see data/README.md)"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> tuple[bytes, int]:
        path, label = self.images[i]
        return _read_bytes(path), label


class ImageNet(ImageFolderSet):
    """ImageNet or a part of it: root/val/<wnid or class name>/*.JPEG as split "test"; only the classes found count.

    Class names and templates come from data/imagenet_classes.tsv and data/templates_imagenet.txt.
    """
    def __init__(self, root: str | Path, split: str):
        super().__init__(root, split)
        self.templates = (DATA / "templates_imagenet.txt").read_text("utf-8").splitlines()

    def _class_names(self, names: list[str], folder: Path) -> list[str]:
        lines = (DATA / "imagenet_classes.tsv").read_text("utf-8").splitlines()
        known = dict(line.split("\t") for line in lines)
        known |= {name.replace(" ", "_"): name for name in known.values()} | {name: name for name in known.values()}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"{folder / unknown[0]} is no ImageNet class: folders are wnids (n01440764) or the names "
                            f"in {DATA / 'imagenet_classes.tsv'}")
        return [known[name] for name in names]

    def _no_classes(self, folder: Path) -> str:
        return (f"no class folders in {folder}: sort the images into one folder per wnid, with "
                "torchvision.datasets.ImageNet or as data/README.md shows")


# name -> torchvision class, its splits for training (linear probe), its splits for testing. None: there is no official
# split, every fifth image is for testing.
TORCHVISION = {
    "caltech101": ("Caltech101", [None], [None]),
    "cifar10": ("CIFAR10", [True], [False]),
    "cifar100": ("CIFAR100", [True], [False]),
    "country211": ("Country211", ["train", "valid"], ["test"]),
    "dtd": ("DTD", ["train", "val"], ["test"]),
    "eurosat": ("EuroSAT", [None], [None]),
    "fer2013": ("FER2013", ["train"], ["test"]),
    "fgvc_aircraft": ("FGVCAircraft", ["trainval"], ["test"]),
    "flowers102": ("Flowers102", ["train", "val"], ["test"]),
    "food101": ("Food101", ["train"], ["test"]),
    "gtsrb": ("GTSRB", ["train"], ["test"]),
    "mnist": ("MNIST", [True], [False]),
    "oxford_pets": ("OxfordIIITPet", ["trainval"], ["test"]),
    "pcam": ("PCAM", ["train", "val"], ["test"]),
    "rendered_sst2": ("RenderedSST2", ["train", "val"], ["test"]),
    "stanford_cars": ("StanfordCars", ["train"], ["test"]),
    "stl10": ("STL10", ["train"], ["test"]),
    "sun397": ("SUN397", [None], [None]),
    "svhn": ("SVHN", ["train"], ["test"]),
}
BY_HAND = ("fer2013", "stanford_cars")  # their addresses are gone or need an account
# Names where torchvision has none, or none that is a word. country211 keeps its two-letter country codes.
CLASS_NAMES = {
    "eurosat": ["annual crop land", "forest", "herbaceous vegetation", "highway", "industrial area", "pasture",
                "permanent crop land", "residential area", "river", "sea or lake"],
    "fer2013": ["angry face", "disgusted face", "fearful face", "happy face", "sad face", "surprised face",
                "neutral face"],
    "gtsrb": [*(f"{v} km/h speed limit sign" for v in (20, 30, 50, 60, 70, 80)), "end of 80 km/h speed limit sign",
              "100 km/h speed limit sign", "120 km/h speed limit sign", "no overtaking sign",
              "no overtaking by trucks sign", "right of way at the next crossing sign", "priority road sign",
              "yield sign", "stop sign", "no vehicles sign", "no trucks sign", "no entry sign", "general danger sign",
              "curve to the left sign", "curve to the right sign", "double curve sign", "bumpy road sign",
              "slippery road sign", "road narrows on the right sign", "road works sign", "traffic lights ahead sign",
              "pedestrians sign", "children crossing sign", "bicycles crossing sign", "ice or snow sign",
              "wild animals crossing sign", "end of all limits sign", "turn right ahead sign", "turn left ahead sign",
              "straight ahead only sign", "straight ahead or right sign", "straight ahead or left sign",
              "keep right sign", "keep left sign", "roundabout sign", "end of no overtaking sign",
              "end of no overtaking by trucks sign"],
    "mnist": [str(digit) for digit in range(10)],
    "pcam": ["healthy lymph node tissue", "lymph node tumor tissue"],
    "svhn": [str(digit) for digit in range(10)],
}


class TorchvisionSet:
    """A classification set of torchvision, downloaded beforehand into `root`. split: "train" or "test".

    Raises UserError when it is not there, or a package that this set needs (scipy, h5py) is not installed.
    """
    def __init__(self, name: str, root: str | Path, split: str):
        kind, *splits = TORCHVISION[name]
        make = getattr(import_torchvision().datasets, kind, None)
        if make is None:
            raise UserError(f"{name}: this version of torchvision has no {kind}")
        choices = [{} if part is None else {"train" if isinstance(part, bool) else "split": part}
                   for part in splits[split == "test"]]
        try:
            parts = [make(str(root), **choice) for choice in choices]
        except ImportError as error:
            raise UserError(f"{name} needs the package {error.name or error}: pip install it") from None
        except (RuntimeError, OSError) as error:
            arguments = "".join(f", {key}={value!r}" for key, value in choices[0].items())
            command = (f"get it with: python -c \"import torchvision; torchvision.datasets.{kind}('{root}'{arguments}, "
                       "download=True)\"" if name not in BY_HAND else "torchvision cannot download it")
            raise UserError(f"{name} cannot be read from {root} ({str(error).splitlines()[0]}); {command} "
                            "(see data/README.md)") from None
        self.data, self.templates = ConcatDataset(parts), TEMPLATES
        self.indices = [i for i in range(len(self.data)) if splits[0] != [None] or (i % 5 == 4) == (split == "test")]
        names = CLASS_NAMES.get(name) or getattr(parts[0], "classes", None) or parts[0].categories
        self.classes = [text.replace("_", " ").replace("/", " " if name == "sun397" else "/") for text in names]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.data[self.indices[i]]
        except (OSError, SyntaxError, ValueError) as error:
            raise BadSample("corrupt image") from error
        if label is None:  # the test part of fer2013 as first published
            raise BadSample("without label")
        return image, int(label)


# ---------------------------------------------------------------------------------------------------- data sets by name

CAPTIONED = ("cc3m", "coco", "flickr30k", "vg", "sbu", "nocaps")
QUESTIONS = ("vqav2",)
LABELLED = ("imagenet", "folder", *TORCHVISION)
HELD_OUT = 5000  # at most; the last 1 % of a set without validation split


def open_train(name: str, root: str | Path | None = None):
    """Captioned set to train on. root: its folder, default data/<name>.

    Names: "coco", "flickr30k", "cc3m", "vg", "sbu"; any other name with a root: a folder of tar shards, or TSV and
    images. Several names joined by +, each perhaps with how often it is seen an epoch ("coco*2+cc3m*0.5"): a Mixture,
    of the folders root/<name>. Raises UserError (unknown name, no folder, wrong layout, weights that are not positive
    numbers, more than 10 % unusable samples) in one line.
    """
    weights = mixture_weights(name)
    if list(weights) != [name]:
        return Mixture({part: open_train(part, part_folder(root, part, weights)) for part in weights}, weights)
    if name == "nocaps":
        raise UserError("nocaps is for evaluation only: there are no captions to train on")
    root = _find_root(name, root, CAPTIONED)
    if name in ("coco", "flickr30k"):
        data = CocoCaptions(root, "train") if name == "coco" else Flickr30k(root, "train")
    else:
        data = _without_splits(name, root)
        if not (root / "val").is_dir():
            data = Subset(data, range(len(data) - _held_out(data)))
    return _checked(data, root)


def open_retrieval(name: str, root: str | Path | None, split: str):
    """Captioned set for image-text retrieval, or None if this set has no such split. split: "val" or "test"."""
    root = _find_root(name, root, (*CAPTIONED, *LABELLED))
    if name == "coco":
        has_val = any((folder / "dataset_coco.json").is_file() for folder in (root, root / "annotations"))
        return _checked(CocoCaptions(root, split), root) if split == "test" or has_val else None
    if name == "flickr30k":
        return _checked(Flickr30k(root, split), root)
    if name == "nocaps":
        return _checked(NoCaps(root), root) if split == "test" else None
    if (root / split).is_dir():
        return _checked(_shards_or_tsv(root / split), root / split)
    data = _without_splits(name, root) if split == "val" else ()
    return Subset(data, range(len(data) - _held_out(data), len(data))) if _held_out(data) else None


def open_labelled(name: str, root: str | Path | None, split: str):
    """Labelled set, or None if this set has no such split. split: "test", "val", or "train" for a linear probe.

    Names: "imagenet" (whose val/ is the test split), those in TORCHVISION, "folder" for any folder of class folders.
    """
    root = _find_root(name, root, LABELLED)
    if split == "val" and (name in TORCHVISION or not ((root / "val").is_dir() and (root / "test").is_dir())):
        return None
    if name in TORCHVISION:
        return TorchvisionSet(name, root, split)
    return (ImageNet if name == "imagenet" else ImageFolderSet)(root, split)


def open_vqa(name: str, root: str | Path | None, split: str):
    """Set of questions about images, "vqav2". root: its folder, default data/<name>; split: see VQAv2."""
    if name not in QUESTIONS:
        raise UserError(f"unknown set of questions {name!r}: known are emoji, {', '.join(QUESTIONS)}")
    root = _find_root(name, root, QUESTIONS)
    return _checked(VQAv2(root, split), root)


def mixture_weights(name: str) -> dict[str, float]:
    """{"coco": 2.0, "cc3m": 0.5} of "coco*2+cc3m*0.5", {"coco": 1.0} of "coco". UserError for what is none of these."""
    weights = {}
    for part in name.split("+"):
        part, star, weight = part.strip().partition("*")
        with contextlib.suppress(ValueError):
            weight = float(weight) if star else 1.0
        if isinstance(weight, str) or not 0 < weight < math.inf:
            raise UserError(f"{name}: how often {part!r} is seen an epoch is a number above 0, not {weight!r}")
        if not part or (part == "emoji" and name != "emoji"):
            raise UserError(f"{name}: {part!r} is no set that can be mixed with others")
        if part in weights:
            raise UserError(f"{name}: {part!r} is named twice; to see it twice an epoch, write {part}*2")
        weights[part] = weight
    return weights


def part_folder(root: str | Path | None, part: str, weights: dict[str, float]) -> str | Path | None:
    """The folder of a part of a mixture: --root itself for a single one, else its folder in there."""
    return Path(root) / part if root and len(weights) > 1 else root


def _find_root(name: str, root: str | Path | None, known: tuple[str, ...]) -> Path:
    folder = Path(root).expanduser() if root else DATA / name
    if not root and name not in known and not folder.is_dir():
        raise UserError(f"unknown data set {name!r}: known are emoji, {', '.join(known)}; any other needs its folder")
    if not folder.is_dir():
        raise UserError(f"{name}: no folder {folder} (see data/README.md for how to get the data)")
    return folder


def _without_splits(name: str, root: Path) -> TarShards | CaptionTSV | CaptionedFiles:
    """A set that is for training as a whole, in root/train where that is a folder."""
    root = root / "train" if (root / "train").is_dir() else root
    reader = {"vg": VisualGenome, "sbu": SBU}.get(name)
    listed = reader and not any(root.glob("*.tar")) and not any(root.glob("*.tsv"))
    return reader(root) if listed else _shards_or_tsv(root)


def _shards_or_tsv(root: Path) -> TarShards | CaptionTSV:
    tables = sorted(root.glob("Train*.tsv")) or sorted(root.glob("*.tsv"))
    return CaptionTSV(tables[0], root / "images") if tables and (root / "images").is_dir() else TarShards(root)


def _held_out(data) -> int:
    return min(HELD_OUT, len(data) // 100)


def _checked(data, where: Path):
    check_bad(data.bad, len(data) + sum(data.bad.values()), str(where))
    return data


# -------------------------------------------------------------------------------------------------------------- loading


class TrainSamples(Dataset):
    """samples[(epoch, index)] -> image uint8 (3, S, S), tokens int64 (context,), 1 if unusable and replaced, else 0.

    The crop and the choice among several captions depend on (seed, epoch, index) alone, not on workers or resuming.
    An unusable sample is replaced by the next one; UserError after 100 in a row. Of a Mixture, index is a slot.
    tokenizer: list of n strings -> int64 (n, context). crop_scale: least and largest share of the image area.
    augment: what happens to the crop, (uint8 (3, S, S), rng) -> uint8 (3, S, S), such as BlipAugment().
    """
    def __init__(self, data, tokenizer, image_size: int, crop_scale: tuple[float, float], seed: int, augment=None):
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.image_size, self.crop_scale, self.augment = image_size, crop_scale, augment

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.draw(place)[:3]

    def draw(self, place: tuple[int, int], captions: int | None = None):
        """image, tokens, bad; then the index of the sample it is and the number of its caption, one of the first few.

        captions: how many of a sample's captions may be drawn (None: all).
        """
        epoch, first = place
        for bad in range(100):
            index = (first + bad) % len(self.data)
            rng = np.random.default_rng((self.seed, epoch, index))
            if isinstance(self.data, Mixture):
                index = self.data.at_epoch(index, epoch)
            try:
                source, texts = self.data.read(index)
                image = random_resized_crop(source, self.image_size, rng, self.crop_scale)
            except BadSample as error:
                reason = error
                continue
            caption = int(rng.integers(len(texts[:captions])))
            image = torch.from_numpy(image)
            if self.augment is not None:
                image = self.augment(image, rng)
            return image, self.tokenizer([texts[caption]])[0], int(bad > 0), index, caption
        raise UserError(f"100 samples in a row cannot be used, from {self.data.key(first)!r} on (last: {reason})")


class StepSampler(Sampler):
    """One rank's share of the global batches of steps start..steps - 1, each a list of (epoch, index).

    Every epoch is a new permutation of the n samples, cut into global batches; the rest is dropped. Rank r takes each
    world-th sample of a batch, so the global batch is the same for any number of ranks.
    Raises UserError when a global batch is larger than the set or not divisible by the number of ranks.
    """
    def __init__(self, n: int, batch: int, steps: int, start: int = 0, seed: int = 0, rank: int = 0, world: int = 1):
        if batch % world:
            raise UserError(f"the global batch of {batch} cannot be shared evenly by {world} processes")
        if n < batch:
            raise UserError(f"the training set has {n} samples, fewer than one batch of {batch}: lower --batch-size")
        self.n, self.batch, self.steps, self.start = n, batch, steps, start
        self.seed, self.rank, self.world = seed, rank, world

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.batch

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current = None
        for step in range(self.start, self.steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                generator = torch.Generator().manual_seed(
                    int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0]))
                order, current = torch.randperm(self.n, generator=generator), epoch
            share = order[position * self.batch + self.rank:(position + 1) * self.batch:self.world]
            yield [(epoch, index) for index in share.tolist()]


class EvalSamples(Dataset):
    """samples[i] -> (image uint8 (3, S, S), i, label or captions), or None when the sample cannot be used."""
    def __init__(self, data, image_size: int, resize=resize_center_crop):
        self.data, self.image_size, self.resize = data, image_size, resize

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int | list[str]] | None:
        try:
            source, target = self.data.read(i)
            return torch.from_numpy(self.resize(source, self.image_size)), i, target
        except BadSample:
            return None


class Loader(DataLoader):
    """DataLoader that leaves out empty batches and passes on a worker's UserError without the worker's traceback."""
    def __iter__(self) -> Iterator[tuple]:
        try:
            for batch in super().__iter__():
                if len(batch[0]):
                    yield batch
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def train_loader(samples: TrainSamples, sampler: StepSampler, workers: int, device_type: str) -> Loader:
    """Yields images uint8 (B, 3, S, S), tokens int64 (B, context), number of unusable samples skipped (int).

    What `samples` returns beyond these three follows, stacked.
    """
    return Loader(samples, batch_sampler=sampler, num_workers=workers, collate_fn=_collate_train,
                  worker_init_fn=_ignore_ctrl_c, pin_memory=device_type == "cuda", persistent_workers=workers > 0)


def eval_loader(data, image_size: int, batch_size: int, workers: int, resize=resize_center_crop) -> Loader:
    """Yields images uint8 (b, 3, S, S), their indices in `data` and their labels or captions (lists of b), in order.

    Unusable samples are left out: the evaluation sees which indices are missing. resize: or resize_whole.
    """
    return Loader(EvalSamples(data, image_size, resize), batch_size=batch_size, num_workers=workers,
                  collate_fn=_collate_eval, worker_init_fn=_ignore_ctrl_c)


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole process group; the main process ends the run


def _collate_train(batch: list[tuple]) -> tuple:
    images, tokens, bad, *more = zip(*batch)
    return torch.stack(images), trim_padding(torch.stack(tokens)), sum(bad), *map(torch.stack, more)


def trim_padding(tokens: torch.Tensor, multiple: int = 16) -> torch.Tensor:
    """(B, context) -> (B, n): without the columns of padding that none of the texts needs.

    A text tower that is causal and read at the end token, or that masks padding, gives the same features and gradients
    without them. n is a multiple of `multiple`, or the whole context: few shapes for torch.compile.
    """
    longest = int(tokens.any(0).nonzero().max()) + 1  # an end token is never 0, padding is
    return tokens[:, :math.ceil(longest / multiple) * multiple]


def _collate_eval(batch: list[tuple | None]) -> tuple:
    good = [sample for sample in batch if sample is not None]
    if not good:
        return (), (), ()
    images, indices, targets = zip(*good)
    return torch.stack(images), list(indices), list(targets)


def check_bad(bad: int | collections.Counter, seen: int, where: str) -> None:
    """Report unusable samples in one line. Raises UserError when they are more than 10 % of the samples seen.

    Images that are no longer on the web ("not downloaded") are reported and do not count.
    """
    reasons = collections.Counter({"unreadable": bad}) if isinstance(bad, int) else +bad
    lost = reasons[NOT_DOWNLOADED]
    count = sum(reasons.values()) - lost
    if not count and not lost:
        return
    line = (f"{where}: {count + lost:,} of {seen:,} samples cannot be used: "
            + ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common()))
    if count > 0.1 * (seen - lost):
        raise UserError(f"{line}; more than 10 % is too many (see data/README.md)")
    if rank() == 0:
        print(line)


# ------------------------------------------------------------------------------------------- what a configuration names


PIXELS = {  # mean and std of the channels: ImageNet's, as in SLIP, and those of OpenAI's CLIP
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def training_set(cfg):
    """The captioned training set a Config names, emoji scenes or a set on disk; with --keep, those samples of it."""
    if cfg.data == "emoji":
        data = EmojiScenes("train", cfg.scenes, cfg.image_size, cfg.seed, cfg.concepts, cfg.difficulty, cfg.noise,
                           cfg.long_tail, cfg.duplicates)
    else:
        data = open_train(cfg.data, cfg.root)
    return keep_only(data, cfg.keep) if cfg.keep else data


def vqa_set(cfg, split):
    """The questions a Config names, about emoji scenes or a set on disk; 500 scenes for "val" and "test"."""
    if cfg.data != "emoji":
        return open_vqa(cfg.data, cfg.root, split)
    if split == "train":
        return EmojiQuestions(split, cfg.scenes, cfg.image_size, cfg.seed, cfg.concepts, cfg.difficulty, cfg.long_tail,
                              cfg.duplicates)
    return EmojiQuestions(split, 500, cfg.image_size, concepts=cfg.concepts, difficulty=cfg.difficulty)


def read_keys(path):
    """Sample keys, one a line."""
    try:
        return Path(path).read_text("utf-8", errors="surrogateescape").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path}: the list of keys cannot be read ({error.strerror})") from None


def keep_only(data, path):
    """The samples of a captioned set whose keys are listed in a file, in the set's order.

    Of a mixture: those of each part, with the same weights; the keys are its own, "coco/000000000139".
    """
    if not isinstance(data, Mixture):
        return Subset(data, listed([data.key(i) for i in range(len(data))], path))
    keys = [f"{name}/{part.key(i)}" for name, part in zip(data.names, data.parts) for i in range(len(part))]
    places, ends = listed(keys, path), np.cumsum([0, *data.sizes])
    kept = [places[(places >= first) & (places < end)] - first for first, end in itertools.pairwise(ends)]
    return Mixture({name: Subset(part, rows) for name, part, rows in zip(data.names, data.parts, kept) if len(rows)},
                   data.weights)


def listed(keys, path):
    """The places in `keys` of those that a file lists, ascending. UserError when one is not among them."""
    wanted = set(read_keys(path))
    places = np.array([place for place, key in enumerate(keys) if key in wanted], int)
    if len(places) < len(wanted):
        raise UserError(f"--keep {path}: {len(wanted) - len(places):,} of its {len(wanted):,} keys are not in the "
                        "training set")
    return places


def is_captioned(cfg, name):
    """Whether a set of --eval-data is for retrieval."""
    return name in CAPTIONED or (name in mixture_weights(cfg.data) and name not in (*LABELLED, "emoji"))


def eval_folder(cfg, name):
    """The folder of a set of --eval-data: --eval-root, or NAME in it where there are several; --root for --data's."""
    weights = mixture_weights(cfg.data)
    if cfg.eval_root:
        return Path(cfg.eval_root) / name if len(evaluation_names(cfg)) > 1 else cfg.eval_root
    return part_folder(cfg.root, name, weights) if name in weights else None


def evaluation_names(cfg):
    """--eval-data, else the sets of --data: of a mixture those with splits of their own, if there are any."""
    parts = tuple(mixture_weights(cfg.data))
    return cfg.eval_data or tuple(name for name in parts if name in ("coco", "flickr30k")) or parts


def evaluation_sets(cfg, split):
    """{name: set} of --eval-data (default: what belongs to --data) in a split, "val" or "test".

    Where no set has a validation split, the part of the training set that is held out serves. UserError when a set is
    not there.
    """
    found = {}
    for name in evaluation_names(cfg):
        if name == "emoji":
            scenes = dict(concepts=cfg.concepts, difficulty=cfg.difficulty)
            found["concept"] = EmojiClasses(split, cfg.image_size, "concept", **scenes)
            if split == "test":
                found["group"] = EmojiClasses(split, cfg.image_size, "group", **scenes)
                found["retrieval"] = EmojiScenes(split, 1000, cfg.image_size, **scenes)
        else:
            open_set = open_retrieval if is_captioned(cfg, name) else open_labelled
            found[name] = open_set(name, eval_folder(cfg, name), split)
    found = {name: data for name, data in found.items() if data is not None}
    if split == "val" and not found and cfg.data not in ("emoji", *LABELLED):
        weights = mixture_weights(cfg.data)
        for name in weights:
            data = open_retrieval(name, part_folder(cfg.root, name, weights), split)
            if data is not None:
                return {name: data}
    return found


def number_of_captions(data, most=5):
    """How many captions an image of a captioned set has, judged by its first readable sample; at most `most`."""
    for i in range(len(data)):
        with contextlib.suppress(BadSample):
            return min(most, len(data.read(i)[1]))
    raise UserError("the training set holds no readable sample")


def loader_workers(cfg):
    """--workers -1: no extra process for the emoji scenes, else a share of the machine's cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return cfg.workers if cfg.workers >= 0 else 0 if cfg.data == "emoji" else min(8, max(1, os.cpu_count() // local))


def example_images(sets, image_size, count, resize=resize_center_crop):
    """(up to count, 3, S, S) uint8 and a caption each, from the first retrieval set of {name: set}; None without."""
    images, captions = [], []
    for data in sets.values():
        for index in range(0 if hasattr(data, "classes") or images else len(data)):
            if len(images) == count:
                break
            with contextlib.suppress(BadSample):
                source, texts = data.read(index)
                images.append(torch.from_numpy(resize(source, image_size)))
                captions.append(texts[0])
    return (torch.stack(images), captions) if images else None


# ---------------------------------------------------------------------------------------------- embeddings on disk


def digest(*parts):
    """Sixteen hexadecimal digits that stand for strings, bytes, or what json can write."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return found.hexdigest()[:16]


def file_digest(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            found.update(piece)
    return found.hexdigest()[:16]


def data_digest(data, keys):
    """Of all keys, and of images and captions of up to 256 samples spread over the set."""
    parts = ["\n".join(keys)]
    for i in np.unique(np.linspace(0, len(data) - 1, 256).astype(int)).tolist():
        try:
            source, captions = data.read(i)
            parts += [source if isinstance(source, bytes) else source.tobytes(), captions]
        except BadSample as error:
            parts.append(str(error))
    return digest(*parts)


def check_product(path, found, wanted):
    """UserError when the product at `path` was `found` to be made from anything but what is `wanted` now."""
    unnamed = ("teacher", "data", "embeddings", "kept images")  # digests, which say nothing to the reader
    for name, value in wanted.items():
        if found.get(name) != value:
            other = f"another {name}" if name == "teacher" else f"other {name}" if name in unnamed else \
                f"{'' if name == 'setting' else name + ' '}{found.get(name)}, not {value}"
            raise UserError(f"{path} was made from {other}: delete it, or choose another folder")


def read_product(path):
    """The json a stage has left. UserError when it is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: delete what the stage made and run it again") from error


def open_array(path, advice, mode="r"):
    """A memory map of a .npy file with a vector of floats, or several, per row. UserError, ending in advice, else."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} is missing, cut short or no .npy file{advice}") from None
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.dtype.kind != "f" or not array.size:
        what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "no .npy array"
        raise UserError(f"{path} holds {what}, not vectors of floats in rows{advice}")
    return array if mode == "r" else np.load(path, mmap_mode=mode)


class Embeddings:
    """The teacher's embeddings on disk. Row i of image.npy (n, T) and text.npy (n, C, T) belongs to line i of keys.txt.

    fp16 memory maps, not normalised again; C captions an image. A row of zeros: the image could not be read. A row of
    NaN: still to do. embeddings.json says from which teacher and data they were made. UserError when a file is damaged.
    """

    def __init__(self, folder, mode="r"):
        self.folder, info = Path(folder), read_product(Path(folder) / "embeddings.json")
        self.fingerprint, self.logit_scale = digest(info["teacher"], info["data"]), info["logit_scale"]
        self.where, self.advice = self.folder, f": delete {self.folder / 'embeddings.json'} to embed again"
        self.keys = read_keys(self.folder / "keys.txt")
        self.open(mode)
        if not len(self.keys) == len(self.image) == len(self.text):
            raise UserError(f"{self.folder} has {len(self.keys):,} keys for {len(self.image):,} images and "
                            f"{len(self.text):,} texts{self.advice}")

    def open(self, mode="r"):
        self.image = open_array(self.folder / "image.npy", self.advice, mode)
        self.text = open_array(self.folder / "text.npy", self.advice, mode)

    def __getstate__(self):  # spawned workers open the maps themselves
        return {**self.__dict__, "image": None, "text": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.open()


class ForeignEmbeddings:
    """Image embeddings (n, T) of any model in a .npy file, for --stage balance and cluster (--embeddings, --keys)."""

    text = logit_scale = None
    advice = ""

    def __init__(self, path, keys):
        self.where = path
        self.image = open_array(Path(path), self.advice)
        self.keys = read_keys(keys) if keys else [str(i) for i in range(len(self.image))]
        if len(self.keys) != len(self.image) or len(set(self.keys)) < len(self.keys):
            raise UserError(f"{keys} has {len(self.keys):,} keys, {len(set(self.keys)):,} of them different; {path} "
                            f"has {len(self.image):,} rows")
        self.fingerprint = digest(file_digest(path), self.keys)


def usable_rows(embeddings):
    """The rows that hold an embedding. UserError when one holds NaN or infinity, or none is there."""
    parts = []
    for array in filter(lambda a: a is not None, (embeddings.image, embeddings.text)):
        flat = array.reshape(len(array), -1)
        largest = np.concatenate([np.abs(np.asarray(flat[start:start + 65536], np.float32)).max(1)
                                  for start in range(0, len(flat), 65536)])
        broken = np.flatnonzero(~np.isfinite(largest))
        if len(broken):
            raise UserError(f"{len(broken):,} embeddings are NaN or infinite, the first is that of "
                            f"{embeddings.keys[broken[0]]!r}{embeddings.advice}")
        parts.append(largest > 0)
    rows = np.flatnonzero(np.all(parts, 0))
    if not len(rows):
        raise UserError(f"{embeddings.where}: every embedding is zero")
    return rows


class Rows:
    """Unit float32 vectors (m, d) on a device, read by position from one or more memory maps of embeddings.

    With several maps a vector is the normalised sum of their unit rows. rows: ascending. On CUDA all are copied there
    once, in their own precision, if they fit in half of the free memory.
    """

    def __init__(self, arrays, rows, device):
        # double precision sums and integer reductions are not to be had on MPS
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.arrays, self.rows = arrays, np.asarray(rows)
        size = sum(array.dtype.itemsize * array[0].size for array in arrays) * len(rows)
        if self.device.type == "cuda" and size < torch.cuda.mem_get_info(self.device)[0] / 2:
            self.arrays = [torch.cat([torch.from_numpy(array[part]).to(self.device) for part in
                                      np.array_split(self.rows, 1 + len(rows) // 65536)]) for array in arrays]
            self.rows = None

    def __len__(self):
        return len(self.arrays[0]) if self.rows is None else len(self.rows)

    def __getitem__(self, positions):
        """positions: a slice or an index tensor."""
        if self.rows is None:
            positions = positions if isinstance(positions, slice) else positions.to(self.device)
            parts = [F.normalize(array[positions].float(), dim=-1) for array in self.arrays]
        else:
            rows = self.rows[positions if isinstance(positions, slice) else positions.cpu().numpy()]
            if isinstance(positions, slice) and len(rows) and (np.diff(rows) == 1).all():
                rows = slice(rows[0], rows[-1] + 1)  # read faster
            parts = [F.normalize(torch.from_numpy(np.array(array[rows], np.float32)).to(self.device), dim=-1)
                     for array in self.arrays]
        return parts[0] if len(parts) == 1 else F.normalize(sum(parts), dim=-1)


def find_samples(data, embeddings, rows):
    """The index in `data` of each of these rows of the embeddings, by key."""
    index_of = {data.key(i): i for i in range(len(data))}
    return np.array([index_of[embeddings.keys[row]] for row in rows])


# ------------------------------------------------------------------------------------- evaluation


def batches(data, image_size, workers, doing, resize=resize_whole, batch_size=64):
    """eval_loader's batches, with a bar on a terminal. UserError when no image can be read."""
    loader = eval_loader(data, image_size, batch_size, workers, resize)
    empty = True
    for batch in tqdm(loader, desc=doing, leave=False, disable=None):
        yield batch
        empty = False
    if empty:
        raise UserError("the evaluation set holds no readable image")


@torch.no_grad()
def embed_images(encoders, data, image_size, workers):
    """One pass over a set: ({key: (N, D) float32}, its N targets, its N indices in `data`).

    encoders as in evaluate(). Images that cannot be read are left out; UserError if all are.
    """
    features, targets, indices = {key: [] for key in encoders}, [], []
    loader = batches(data, image_size, workers, "embedding", resize_center_crop, 128)
    for images, places, batch_targets in loader:
        for key, (encode_image, _) in encoders.items():
            features[key].append(encode_image(images).float())
        targets += batch_targets
        indices += places
    features = {key: torch.cat(parts) for key, parts in features.items()}
    return features, targets, indices


@torch.no_grad()
def embed_texts(encode_text, tokenizer, texts, block=512):
    """(T, D) float32 features of a list of strings."""
    features = []
    for start in range(0, len(texts), block):
        tokens = tokenizer(texts[start:start + block])
        features.append(encode_text(trim_padding(tokens)).float())
    return torch.cat(features)


def evaluate(encoders, tokenizer, data, image_size, workers):
    """Zero-shot classification of a set of classes, retrieval on a set of captions, in percent.

    encoders: {key: (image encoder, text encoder)}, (B, 3, S, S) uint8 -> (B, D) and (T, context)
    token ids -> (T, D), of unit length; a key is any hashable. Returns {key: {metric: percent}}.
    Images that could not be read are left out and counted as "unreadable".
    """
    features, targets, _ = embed_images(encoders, data, image_size, workers)

    @functools.cache  # encoders with the same text tower share its features
    def embed(encode_text):
        if data.kind == "classes":
            return zero_shot_classifier(encode_text, tokenizer, data.classes, data.templates)
        texts = [text for captions in targets for text in captions]
        return embed_texts(encode_text, tokenizer, texts)

    scores = {}
    for key, (_, encode_text) in encoders.items():
        text_features = embed(encode_text)
        if data.kind == "classes":
            labels = torch.tensor(targets)
            scores[key] = zero_shot(features[key], labels, text_features)
        else:
            scores[key] = retrieval(features[key], text_features, owners(targets))
        if len(targets) < len(data):
            scores[key]["unreadable"] = len(data) - len(targets)
    return scores


def score_sets(encoders, tokenizer, sets, image_size, workers):
    """evaluate() on each of {name: set}, as {key: {"<name>_<metric>": percent}}."""
    scores = {key: {} for key in encoders}
    for name, data in sets.items():
        found = evaluate(encoders, tokenizer, data, image_size, workers)
        for key, metrics in found.items():
            for metric, value in metrics.items():
                scores[key][f"{name}_{metric}"] = value
    return scores


def main_metric(metrics):
    """The number a set is judged by: top-1 accuracy, or the mean of both R@1."""
    if "top1" in metrics:
        return metrics["top1"]
    return (metrics["i2t_r1"] + metrics["t2i_r1"]) / 2


def zero_shot_classifier(encode_text, tokenizer, classes, templates):
    """(K, D): per class the templates' unit features, averaged and renormalised, as CLIP's."""
    texts = [template.format(name) for name in classes for template in templates]
    features = embed_texts(encode_text, tokenizer, texts)
    features = features.unflatten(0, (len(classes), len(templates)))
    return F.normalize(features.mean(1), dim=-1)


def zero_shot(features, labels, classifier):
    """{"top1", "top5"} in percent; features (N, D), labels (N,), classifier (K, D).

    As usual, top-1 is the argmax: of equal scores the first class wins, so two classes of one name
    (ImageNet has two such pairs) are not both lost. A score that is not a number is wrong.
    """
    scores = features @ classifier.T  # (N, K)
    labels = labels.to(scores.device)[:, None]
    best = scores.argsort(dim=1, descending=True, stable=True)
    right = (best == labels) & ~scores.gather(1, labels).isnan()
    return {"top1": percent(right[:, 0]), "top5": percent(right[:, :5].any(1))}


def percent(right):
    """Of a tensor of truths."""
    return 100 * right.float().mean().item()


def owners(captions):
    """(T,): which image each text describes, of one list of captions an image."""
    return torch.tensor([i for i, texts in enumerate(captions) for _ in texts])


def retrieval(image_features, text_features, image_of_text, block=1024):
    """Recall at 1, 5 and 10 in percent, both ways; image_of_text (T,) says whom a text describes.

    Image to text, the best of the image's own texts counts, ranked among the texts of others. This
    is conservative: ties count against the model, so one that maps everything to a point scores 0
    and not 100, and so does NaN. Memory is block x T, never N x T.
    """
    image_of_text = image_of_text.to(image_features.device)
    image = torch.arange(len(image_features), device=image_features.device)
    to_text, to_image = [], []
    for features, i in zip(image_features.split(block), image.split(block)):
        to_text.append(ranks(features @ text_features.T, image_of_text == i[:, None]))
    for features, i in zip(text_features.split(block), image_of_text.split(block)):
        to_image.append(ranks(features @ image_features.T, image == i[:, None]))
    return recalls(torch.cat(to_text), torch.cat(to_image))


def ranks(scores, own):
    """(Q,): how many foreign keys score no lower than the best own one; scores and own (Q, K)."""
    best = scores.masked_fill(~own, -math.inf).amax(1, keepdim=True)
    no_lower = ~(scores < best)  # NaN counts against the model too
    return (no_lower & ~own).sum(1)


def recalls(to_text, to_image):
    """Recall at 1, 5 and 10, both ways, from the rank of each query's best own key."""
    found = {}
    for way, rank in (("i2t", to_text), ("t2i", to_image)):
        for k in (1, 5, 10):
            found[f"{way}_r{k}"] = percent(rank < k)
    return found


@torch.no_grad()
def rerank(image_features, text_features, image_of_text, match, k):
    """Retrieval as BLIP scores it: match logit + cosine among the k best by cosine, else -100.

    Image to text, the k best texts of each image are scored, text to image the k best images of
    each text. Recalls as in retrieval(); topk chooses among equal cosines who is scored.

    image_features (N, E), text_features (T, E), of unit length; image_of_text (T,). match(i,
    texts): logits (n,) of image i with the texts of these places (n,). It is called once an image,
    in ascending order: no pair is scored twice. COCO's 5,000 x 25,000 scores take 0.5 GB.
    """
    scores = image_features @ text_features.T  # (N, T)
    N, T = scores.shape
    none = torch.zeros_like(scores, dtype=torch.bool)
    for_image = none.scatter(1, scores.topk(min(k, T), dim=1).indices, True)
    for_text = none.scatter(0, scores.topk(min(k, N), dim=0).indices, True)
    for i in tqdm(range(N), desc="re-ranking", leave=False, disable=None):
        texts = (for_image[i] | for_text[i]).nonzero()[:, 0]
        scores[i, texts] += match(i, texts).float()

    image = torch.arange(N, device=scores.device)
    own = image_of_text.to(scores.device) == image[:, None]
    to_text = ranks(scores.masked_fill(~for_image, -100.0), own)
    to_image = ranks(scores.masked_fill(~for_text, -100.0).T, own.T)
    return recalls(to_text, to_image)


@torch.no_grad()
def rerank_retrieval(data, image_size, encode_image, encode_text, match, k, workers=0, block=256,
                     dtype=torch.float32):
    """By cosine alone, {"itc_i2t_r1", ...}, and re-ranked, {"i2t_r1", ...}, in percent.

    encode_image: (B, 3, S, S) uint8 -> states (B, M, D), features (B, E). encode_text: n strings ->
    ids (n, L), features (n, E), L always the same. match: states (1, M, D), ids (n, L) -> match
    logits (n,), n at most `block`. The states wait in memory, not the device's, as `dtype`: half
    precision where autocast is on (COCO's 5,000 at 384 px: 4.4 GB). Unreadable images are left
    out and counted.
    """
    states, features, captions = [], [], []
    for images, _, targets in batches(data, image_size, workers, "encoding images"):
        batch_states, batch_features = encode_image(images)
        states += batch_states.to("cpu", dtype)
        features.append(batch_features.float())
        captions += targets

    texts = [text for group in captions for text in group]
    encoded = [encode_text(texts[start:start + block]) for start in range(0, len(texts), block)]
    ids, text_features = (torch.cat(parts) for parts in zip(*encoded))
    both = torch.cat(features), text_features.float(), owners(captions)

    def match_image(i, places):
        source = states[i][None].to(both[0].device)
        parts = ids[places.to(ids.device)].split(block)
        return torch.cat([match(source, part) for part in parts])

    scores = {f"itc_{metric}": value for metric, value in retrieval(*both).items()}
    scores.update(rerank(*both, match_image, k))
    if len(captions) < len(data):
        scores["unreadable"] = len(data) - len(captions)
    return scores


STRENGTHS = tuple(10.0 ** exponent for exponent in range(-2, 7))


def linear_probe(train, val, test, classes, strengths=STRENGTHS):
    """{"top1" in percent, "C"} of L-BFGS logistic regression on frozen features.

    A split is (features (N, D), labels (N,)). The inverse regularisation (scikit-learn's C:
    minimise C * sum of losses + |W|^2 / 2) is chosen on `val`, then train + val are fitted anew.
    UserError with the place of an image whose features are no numbers.
    """
    def accuracy(weights, features, labels):
        found = (with_bias(features) @ weights).argmax(1)
        return percent(found.cpu() == labels.cpu())

    for features, _ in (train, val, test):
        check_finite(features, range(len(features)))
    scores = {c: accuracy(fit_logistic(*train, classes, c), *val) for c in strengths}
    best = max(scores, key=scores.get)
    features, labels = (torch.cat(parts) for parts in zip(train, val))
    weights = fit_logistic(features, labels, classes, best)
    return {"top1": accuracy(weights, *test), "C": best}


def check_finite(features, keys):
    """UserError with the key of the first image whose features (N, D) are no numbers."""
    for key, finite in zip(keys, features.isfinite().all(1).tolist()):
        if not finite:
            raise UserError(f"linear probe: the features of image {key} are no finite numbers")


def with_bias(x):
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def fit_logistic(x, y, classes, c, block=65536):
    """(D + 1, K) weights of multinomial logistic regression; the bias is not regularised."""
    x, y = with_bias(x), y.to(x.device)
    weights = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=1000, history_size=10, tolerance_grad=1e-6,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        total = weights[:-1].square().sum() / (2 * c * len(x))
        total.backward()
        for xs, ys in zip(x.split(block), y.split(block)):
            loss = F.cross_entropy(xs @ weights, ys, reduction="sum") / len(x)
            loss.backward()
            total = total + loss
        return total.detach()

    optimiser.step(closure)
    return weights.detach()


def probe(encoders, cfg, image_size):
    """--linear-probe: {key: {"<set>_probe_top1", "<set>_probe_C"}} on each set of classes.

    encoders: as evaluate() takes them. Every fifth training image is the validation split.
    """
    def embed(data):
        found, labels, indices = embed_images(encoders, data, image_size, loader_workers(cfg))
        for features in found.values():
            check_finite(features, [data.key(i) for i in indices])
        return found, torch.tensor(labels)

    scores = {key: {} for key in encoders}
    tests = evaluation_sets(cfg, image_size, "test")
    for name, data in evaluation_sets(cfg, image_size, "train").items():
        if data.kind != "classes":
            continue
        (train, y), (test, test_y) = embed(data), embed(tests[name])
        held = torch.arange(len(y)) % 5 == 4
        for key, x in train.items():
            splits = (x[~held], y[~held]), (x[held], y[held]), (test[key], test_y)
            found = linear_probe(*splits, len(data.classes))
            for metric, value in found.items():
                scores[key][f"{name}_probe_{metric}"] = value
    return scores


def test_checkpoint(cfg, size, encoders):
    """--evaluate: {key: {"<set>_<metric>": value}} of the test sets, with --linear-probe.

    The means of several sets' top-1 accuracies are added.
    """
    sets = evaluation_sets(cfg, size.image_size, "test")
    tokenizer = CLIPTokenizer(size.context_length, size.vocab_size)
    cells = score_sets(encoders, tokenizer, sets, size.image_size, loader_workers(cfg))
    if cfg.linear_probe:
        for key, found in probe(encoders, cfg, size.image_size).items():
            cells[key].update(found)
    for cell in cells.values():
        for metric in ("top1", "probe_top1"):
            columns = [f"{name}_{metric}" for name in sets]
            values = [cell[column] for column in columns if column in cell]
            if len(values) > 1:
                cell[f"mean_{metric}"] = sum(values) / len(values)
    return cells


def write_results(run, cfg, cells, state):
    """results.json, the table on stdout and curves.png; returns what results.json holds.

    cells: {label: {metric: value}}; state: the training loop's counters.
    """
    rows = read_csv(run.path("log.csv"))
    validation = [float(value) for name, value in rows[-1].items()
                  if name.startswith("val_") and value]
    results = {
        "cells": cells,
        "seed": cfg.seed,
        "steps": state["step"],
        "best_step": state["best_step"],
        "best_validation": state["best"],
        "last_validation": max(validation, default=None),
    }
    run.write_json("results.json", results)
    print_table(cells)
    title = f"{cfg.method} on {cfg.data}"
    plot_curves(run.path("curves.png"), rows, math.log(cfg.batch_size), title)
    return results


def throughput(encoders, image_size, device):
    """{key: images/s} of image encoders on 256 images of noise; encoders as in evaluate()."""
    shape = (256, 3, image_size, image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    calls = {}
    for key, (encode_image, _) in encoders.items():
        calls[key] = functools.partial(encode_image, images)
    latency = compare_latency(calls, device, rounds=5)
    return {key: 1000 * len(images) / milliseconds for key, milliseconds in latency.items()}


def compare_latency(functions, device, rounds=15):
    """{key: milliseconds} of functions without arguments: the median over the rounds.

    They take turns, so that a slow moment meets all; each is warmed up first; the device is
    synchronised before every reading of the clock.
    """
    def milliseconds(function):
        start = time.perf_counter()
        function()
        if kind != "cpu":
            getattr(torch, kind).synchronize()
        return 1000 * (time.perf_counter() - start)

    kind = torch.device(device).type
    times = {key: [] for key in functions}
    with torch.inference_mode():
        for turn in range(2 + rounds):
            for key, function in functions.items():
                times[key].append(milliseconds(function))
    return {key: float(np.median(found[2:])) for key, found in times.items()}


def multiply_adds(function, *inputs):
    """Multiply-adds of a forward pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # the plain kernel: its two products are counted on every device
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        function(*inputs)
    return counter.get_total_flops() / 2


# ----------------------------------------------------------------------------- captions and answers

# Captions are strings of tokens separated by spaces, as ptb_tokenize returns them.

# What COCO's tokenizer (Stanford's PTBTokenizer 3.4.1, then a list of punctuation to drop) does,
# found by trying it.
ABBREVIATIONS = """adm adv al ala alex apr ariz assn assoc asst atty aug ave bancorp bhd bldg blvd
    brig bros calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs
    elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr
    jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms
    msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres prof profs pte pty pvt rd rep reps
    rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues
    univ va vs vt wed wis wisc wm wyo"""
ABBREVIATION = "|".join(ABBREVIATIONS.split())
# After these, and at the end of a caption, since the next one mostly begins with "A" or "The", the
# period behind a single letter ends the sentence and goes: "the letter A."
BEGINNINGS = """A About According Additionally After An As At But Earlier He Her Here However If In
    It Last Many More Mr Ms Now Once One Other Our She Since So Some Such That The Their Then There
    These They This We When While What Yet You"""
BEGINNING = "|".join(BEGINNINGS.split())
ALNUM, LETTER, CLITIC = "[^\\W_½¼¾⅓⅔]", r"[^\W\d_]", r"(?:s|m|d|re|ve|ll)\b"
WORD = rf"(?:[dlo]['’](?!{CLITIC})(?={ALNUM}{{2}}))?{ALNUM}+"
PTB_TOKEN = re.compile(rf"""
      (?:https?://|www\.)\S*{ALNUM} | (?<![\w.])[\w.]+@[\w.]*{ALNUM}        # addresses
    | [\#@][a-z]\w* | </?[a-z]+>                                            # tags, markup
    | \d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}} | \d{{1,4}}[ \xa0-]\d{{1,4}}/\d{{1,4}} | [½¼¾⅓⅔]  # 22 3/4
    | [a-z](?=\.\s*\Z|\.\s+(?-i:{BEGINNING})\b)                             # the letter A. The
    | (?:{ABBREVIATION}|[a-z](?:\.[a-z])*)\.(?!{ALNUM})                     # st. u.s.
    | (?:no|nos|fig|art|pp|op|ca|prop)\.(?=\s*\d) | {LETTER}+\.(?=[,;:])    # no. 5
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) | 't(?=is\b|was\b)
    | {LETTER}+?(?=n't) | n't{LETTER}* | '{CLITIC}                          # do n't, dog 's
    | {LETTER}+[aeiou]['’][aeiou]{LETTER}* | n?e['’]er | ma['’]ams?         # hawai'i
    | c['’](?:est|mon)\b | cap['’]n\b | nor['’]easter | s['’]mores | qu['’]il\b
    | (?:dunk|someth)in['’]
    | (?:n|(?-i:[A-CE-KMNP-XZ]))['’](?!{CLITIC}){LETTER}{{2,}}              # M'lady
    | (?-i:[A-Z][a-z]['’][A-Z][a-z]+)                                       # Po'Boy
    | ['’](?:em|till?|cause|n)\b['’]? | ['’]\d\ds?\b(?!['’"”])              # 'em, '80s
    | \d+(?:[.,]\d+)*(?:[-/]{ALNUM}+)+                                      # 3.5-inch
    | (?:(?<!-)[-+])?\d*(?:[.,:]\d+)+ | (?<!-)[-+]\d+                       # 1,000 12:30 -5
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                              # B&W
    | {LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)+                            # the.end
    | (?:j|ol|y(?=['’]{LETTER}))['’](?!{CLITIC})                   # y' all
    | [dl]['’](?!{CLITIC}|{ALNUM}{{2}})
    | {WORD}(?:[-/_‐‑]{WORD})*                                              # black-and-white
    | [:;=][-o]?[()] | [!?]{{2,}} | \*+ | _+                                # emoticons, runs
    | [^\w\s.?!,:;'`"“”‘’«»‹›—–―…\u200b-\u200d\ufe0f\U00010000-\U0010ffff-]
    """, re.VERBOSE | re.IGNORECASE)
SPELLED = str.maketrans({
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "€": "$", "£": "#", "¢": "cents", " ": "\xa0",
})


def ptb_tokenize(text: str) -> str:
    """Lower-cased tokens of a caption without punctuation: "A dog's bowl." -> "a dog 's bowl".

    An approximation, without Java, of COCO's caption tokenizer: equal to it on all 795 captions of
    coco_mini. Like it, it splits contractions (do n't, can not), keeps compounds (black-and-white,
    and/or), abbreviations (st.), symbols and runs such as !!, writes brackets as -lrb-, and joins
    "22 3/4" by a no-break space. Not treated: HTML entities, phone numbers, rare contractions.
    """
    text = re.sub(rf"’(?=(?:n’)?t\b|{CLITIC})", "'", text, flags=re.IGNORECASE)
    return " ".join(token.lower().translate(SPELLED) for token in PTB_TOKEN.findall(text))


def count_ngrams(sentence: str) -> list[collections.Counter]:
    """How often each n-gram occurs in a sentence, for n = 1, 2, 3, 4."""
    words = sentence.split()
    shifted = [words[i:] for i in range(4)]
    return [collections.Counter(zip(*shifted[:n])) for n in (1, 2, 3, 4)]


def bleu(references: list[list[str]], hypotheses: list[str]) -> list[float]:
    """BLEU-1, -2, -3 and -4 of a corpus (Papineni et al. 2002, section 2), as in pycocoevalcap.

    BLEU-n = exp(min(0, 1 - r/c)) (p_1 ... p_n)^(1/n), in 0..1. p_n: n-grams of the hypotheses that
    a reference has, each counted at most as often as in one reference, over all n-grams of the
    hypotheses. c: words of the hypotheses; r: words of the references closest in length, the
    shorter one of two. references: N lists of R strings; hypotheses: N strings.
    """
    matched, total = np.zeros(4), np.zeros(4)
    length = closest = 0
    for refs, hypothesis in zip(references, hypotheses, strict=True):
        words = len(hypothesis.split())
        length += words
        distances = [(abs(len(ref.split()) - words), len(ref.split())) for ref in refs]
        closest += min(distances)[1]
        ref_counts = [count_ngrams(ref) for ref in refs]
        for n, counts in enumerate(count_ngrams(hypothesis)):
            total[n] += counts.total()
            for gram, count in counts.items():
                matched[n] += min(count, max(c[n][gram] for c in ref_counts))

    # pycocoevalcap's 1e-15 and 1e-9 stand for zeros: nothing matched gives a score close to 0.
    precisions = (matched + 1e-15) / (total + 1e-9)
    ratio = (length + 1e-15) / (closest + 1e-9)
    means = np.cumprod(precisions) ** (1 / np.arange(1, 5))
    return (means * np.exp(min(0, 1 - 1 / ratio))).tolist()


def cider_d(references: list[list[str]], hypotheses: list[str]) -> tuple[float, np.ndarray]:
    """CIDEr-D (Vedantam et al. 2015, section 6) as in pycocoevalcap: mean over images, and (N,).

    In 0..10. Mean over n = 1..4 and the references of
    10 exp(-(difference in words)^2 / 2 sigma^2) min(h, r).r / (|h||r|), sigma = 6, where h and r
    weigh each n-gram by its count times log(N / images with the n-gram in a reference, at least 1).
    An n-gram in every image's references weighs nothing, so a single image scores 0.
    references: N lists of R strings; hypotheses: N strings.
    """
    images = [[count_ngrams(ref) for ref in refs] for refs in references]
    frequency = collections.Counter()  # images with the n-gram in a reference
    for refs in images:
        frequency.update(set().union(*itertools.chain(*refs)))

    def weigh(counts):
        rarity = {gram: math.log(len(images) / max(1, frequency[gram])) for gram in counts}
        return {gram: count * rarity[gram] for gram, count in counts.items()}

    scores = np.zeros(len(images))
    for i, (refs, hypothesis) in enumerate(zip(images, hypotheses, strict=True)):
        counts = count_ngrams(hypothesis)
        for ref in refs:
            difference = counts[0].total() - ref[0].total()
            for n in range(4):
                h, r = weigh(counts[n]), weigh(ref[n])
                dot = sum(min(h[gram], r[gram]) * r[gram] for gram in h if gram in r)
                norms = math.hypot(*h.values()) * math.hypot(*r.values())
                if norms:
                    scores[i] += dot / norms * math.exp(-difference ** 2 / 72)
        scores[i] *= 10 / (4 * len(refs))
    return float(scores.mean()), scores


# VQA answers in which an apostrophe is missing get it back: each of these words is found with any
# one of its own left out. Left as they are: I'm, I've, I'd've (answers are lower case by then), and
# what the official table does not hold.
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've"""
RESTORED = {"somebody'd": "somebodyd"}  # the wrong way round in the official table
for word in CONTRACTIONS.split():
    for i, char in enumerate(word):
        if char == "'":
            RESTORED[word[:i] + word[i + 1:]] = word
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(NUMBER_WORDS)}


def normalize_answer(answer: str) -> str:
    """An answer as VQA's official evaluation compares it: no punctuation, no articles, digits.

    A mark goes without a trace where it stands beside a space, or everywhere if the answer has a
    comma between digits; else a space takes its place. A period goes unless a digit follows.
    """
    thousands = re.search(r"\d,\d", answer)
    text = answer
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        beside_space = mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if thousands or beside_space else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    words = [NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(RESTORED.get(word, word) for word in words)


def vqa_accuracy(answer: str, human_answers: Iterable[str]) -> float:
    """Accuracy of one answer (Antol et al. 2015, section 3), 0..1: min(people who gave it / 3, 1).

    As in the official evaluation, averaged over leaving out each of the human answers (10 in VQA,
    at least one here: fewer than 4 cannot reach 1); normalised only where the humans disagree.
    """
    answer, *humans = [re.sub(r"[\n\t]", " ", a).strip() for a in (answer, *human_answers)]
    if len(set(humans)) > 1:
        answer, *humans = map(normalize_answer, (answer, *humans))
    same = humans.count(answer)
    return sum(min((same - (human == answer)) / 3, 1) for human in humans) / len(humans)


@torch.no_grad()
def caption_images(data, image_size, generate, workers=0):
    """(captions, references, indices): what generate says of each image, its captions, its place.

    generate: (B, 3, S, S) uint8 -> list of B strings. Images that cannot be read are left out.
    """
    captions, references, indices = [], [], []
    for images, places, targets in batches(data, image_size, workers, "captioning"):
        captions += generate(images)
        references += targets
        indices += places
    return captions, references, indices


def caption_scores(references, captions, domains=None):
    """{"bleu1" ... "bleu4" in percent, "cider": 100 x CIDEr-D} of N captions, by COCO's formulas.

    references: N lists of R strings; without any (a test split) nothing is scored: {}. Both are
    tokenised here. domains (nocaps): N of "in-domain", "near-domain" and "out-domain", which adds
    "cider_in", "cider_near" and "cider_out": each is scored as a set of its own, with its own
    document frequencies, as is usual for nocaps. So "cider" is not their mean.
    """
    if not any(references):
        return {}
    references = [[ptb_tokenize(text) for text in texts] for texts in references]
    captions = [ptb_tokenize(text) for text in captions]
    scores = {f"bleu{n}": 100 * value for n, value in enumerate(bleu(references, captions), 1)}
    scores["cider"] = 100 * cider_d(references, captions)[0]
    for domain in sorted(set(domains or [])):
        part = [i for i, d in enumerate(domains) if d == domain]
        mean, _ = cider_d([references[i] for i in part], [captions[i] for i in part])
        scores["cider_" + domain.removesuffix("-domain")] = 100 * mean
    return scores


@torch.no_grad()
def answer_questions(data, image_size, answer, workers=0):
    """([{"question_id", "answer"}] in order, as VQA's server takes them, {"accuracy": percent}).

    data: a set of questions; with question_kinds also {"accuracy_<kind>"}. Questions without human
    answers (a test split) are not scored. answer: (B, 3, S, S) uint8, list of B questions -> list
    of B strings. Questions whose image cannot be read are left out and counted as "unreadable".
    """
    results, accuracies = [], collections.defaultdict(list)
    for images, places, targets in batches(data, image_size, workers, "answering"):
        answers = answer(images, [question for question, _ in targets])
        for i, text, (_, humans) in zip(places, answers, targets, strict=True):
            results.append({"question_id": data.key(i), "answer": text})
            if humans:
                kind, accuracy = data.question_kinds[i], vqa_accuracy(text, humans)
                accuracies["accuracy"].append(accuracy)
                if kind:
                    accuracies["accuracy_" + kind].append(accuracy)
    scores = {name: 100 * sum(values) / len(values) for name, values in sorted(accuracies.items())}
    if len(results) < len(data):
        scores["unreadable"] = len(data) - len(results)
    return results, scores


# --------------------------------------------------------------------------------------- pictures


def print_table(cells, markdown=None):
    """{row: {column: number or text}} as a table on stdout, and as markdown in a file."""
    columns = list(dict.fromkeys(column for cell in cells.values() for column in cell))
    lines = [["", *columns]]
    for name, cell in cells.items():
        lines.append([name, *(_shown(cell.get(column)) for column in columns)])
    if len(columns) > 7:  # too wide for a terminal: turn it
        lines = [list(line) for line in zip(*lines)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="  ")
    if markdown:
        rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        markdown.write_text("".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")


def _shown(value):
    if value is None or isinstance(value, str):
        return value or ""
    if 10 <= abs(value) < 1000:
        return f"{value:.1f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.0f}"


def mean_std(runs):
    """[{metric: value}] over seeds -> {metric: "mean ± std"}; the std is the sample's."""
    table = {}
    for metric in runs[0]:
        values = np.array([run[metric] for run in runs], float)
        digits = 4 if 0 < abs(values).max() < 0.1 else 1
        spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        table[metric] = f"{values.mean():.{digits}f}{spread}"
    return table


def picture(draw):
    """Guards a function that draws into `path`: what goes wrong is a line, never a run's end."""
    @functools.wraps(draw)
    def guarded(path, *args, **kwargs):
        try:
            plain = {"text.parse_math": False}  # a `$` in a caption is no formula
            with import_matplotlib().rc_context(plain), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # letters that the font lacks
                return draw(path, *args, **kwargs)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"could not draw {Path(path).name}: {reason}")
    return guarded


def import_matplotlib():
    """matplotlib, which fails to import where MPLBACKEND names a notebook's package not here."""
    os.environ.pop("MPLBACKEND", None)  # no picture is shown: all are files
    import matplotlib
    return matplotlib


def new_figure(rows, columns, size, title):
    """A figure of `size` inches and its axes (rows, columns); no pyplot, so no backend is asked."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="compressed")
    figure.suptitle(fold(title, int(7 * size[0])), fontsize=14)
    return figure, figure.subplots(rows, columns, squeeze=False)


def fold(text, width, lines=6):
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


@picture
def plot_grid(path, rows, names, captions, title, beneath=(), side=1.6):
    """Rows of images (3, S, S) uint8, with names at the left and captions on top of the columns.

    beneath: a text below each image, in order. side: of an image, in inches.
    """
    columns = max(map(len, rows))
    below = max((text.count("\n") + 1 for text in beneath), default=0)
    size = side * columns + 2, (side + 0.2 * below) * len(rows) + 1
    figure, axes = new_figure(len(rows), columns, size, title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for line, images, name in zip(axes, rows, names):
        line[0].set_ylabel(fold(name, 24), rotation=0, ha="right", va="center", fontsize=12)
        for axis, image in zip(line, images):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy())
    for axis, caption in zip(axes[0], captions):
        axis.set_title(fold(caption, int(12 * side), 3), fontsize=10)
    for axis, text in zip(axes.flat, beneath):
        axis.set_xlabel(text, loc="left", fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_captions(path, images, captions, title):
    """Images (n, 3, S, S) uint8; beneath each its captions, of {who: n strings}."""
    beneath = []
    for texts in zip(*captions.values()):
        lines = [fold(f"{who}: {text}", 36, 4) for who, text in zip(captions, texts)]
        beneath.append("\n".join(lines))
    rows = images.split(4)
    plot_grid(path, rows, [""] * len(rows), [], title, beneath, side=2.7)


def overlay(images, attention):
    """Images (n, 3, S, S) uint8, dark but where attention (n, g, g) is, on a scale of its own."""
    light = attention[:, None].float().cpu()
    light = F.interpolate(light, images.shape[-2:], mode="bicubic", align_corners=False)
    light = light - light.amin((2, 3), keepdim=True)
    light = light / light.amax((2, 3), keepdim=True).clamp(min=1e-12)
    return (images.cpu() * (0.15 + 0.85 * light)).to(torch.uint8)


@picture
def plot_retrieval(path, images, captions, scores, texts=6, shown=5):
    """For the first captions the images a model ranks highest, the caption's own one framed.

    images (N, 3, S, S) uint8; scores (N, N), image by text.
    """
    images, shown = images.cpu(), min(shown, len(images))
    edge = max(2, images.shape[-1] // 12)
    frame = torch.ones(images.shape[-2:], dtype=torch.bool)
    frame[edge:-edge, edge:-edge] = False
    rows = []
    for text in range(len(captions[:texts])):
        best = scores[:, text].topk(shown).indices.cpu()
        row = images[best]
        edges = (best == text)[:, None, None] & frame  # (shown, S, S)
        row.permute(0, 2, 3, 1)[edges] = torch.tensor([40, 170, 60], dtype=torch.uint8)
        rows.append(row)
    ranks_shown = [f"rank {n + 1}" for n in range(shown)]
    title = f"the best of {len(images)} images for each caption, its own one framed"
    plot_grid(path, rows, captions[:texts], ranks_shown, title)


def draw_retrieval(path, encoders, tokenizer, sets, image_size):
    """plot_retrieval() of an (image encoder, text encoder) on the first captioned set, if any."""
    examples = example_images(sets, image_size, 64)
    if examples:
        images, captions = examples
        encode_image, encode_text = encoders
        with torch.no_grad():
            scores = encode_image(images) @ encode_text(tokenizer(captions)).T
        plot_retrieval(path, images, captions, scores)


@picture
def plot_curves(path, rows, chance, title):
    """Losses (with ln(batch), chance, if given) and validation metrics of log.csv, by epoch."""
    figure, axes = new_figure(1, 2, (11, 4.5), title)
    left, right = axes[0]
    for axis, wanted, marker in ((left, LOSSES, None), (right, ("val_",), "o")):
        for column in [name for name in rows[0] if name.startswith(wanted)]:
            logged = [row for row in rows if row[column] and column != "kd_weight"]
            if logged:
                epochs = [float(row["epoch"]) for row in logged]
                values = [float(row[column]) for row in logged]
                axis.plot(epochs, values, label=column, marker=marker)
        axis.grid(alpha=0.3)
        axis.set_xlabel("epoch")
    if chance:
        left.axhline(chance, color="grey", ls=":", label="chance of one NCE, ln(batch)")
    left.set_ylabel("loss")
    right.set_ylabel("validation, %")
    for axis in (left, right):
        if axis.lines:
            axis.legend(ncols=1 + (len(axis.lines) > 6), fontsize=9)
    figure.savefig(path, dpi=150)


@picture
def plot_sweet_spot(path, series, ylabel="test score, %"):
    """{label: [(κ in training, relative throughput, [score per seed])]}: means and stds.

    Left against the throughput; right, for curves that run at full cost, against κ in training.
    """
    figure, axes = new_figure(1, 2, (13, 5), "")
    left, right = axes[0]
    right.sharey(left)
    for number, (label, points) in enumerate(series.items()):
        points = sorted(points)
        full_cost = len(points) > 1 and all(speed == 1 for _, speed, _ in points)
        axis = right if full_cost else left
        x = [keep_rate if full_cost else speed for keep_rate, speed, _ in points]
        means = [np.mean(scores) for *_, scores in points]
        stds = [np.std(scores, ddof=1) if len(scores) > 1 else 0 for *_, scores in points]
        marker = "o" if len(points) > 1 else "*"
        axis.errorbar(x, means, stds, label=label, color=f"C{number}", capsize=3,
                      marker=marker, markersize=9)
        for place, mean, (keep_rate, *_) in zip(x, means, points):
            axis.annotate(f"{keep_rate:g}", (place, mean), (6, 6), textcoords="offset points")
    left.set_ylabel(ylabel)
    left.set_xlabel("measured throughput, 1 at κ = 1 (numbers: κ in training and at test)")
    right.set_xlabel("κ in training; all tokens at test")
    right.invert_xaxis()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.margins(0.08)
        if axis.containers:
            axis.legend()
    figure.savefig(path, dpi=150)


# family: colour, marker, where a label stands
FAMILIES = {"teacher": ("#6a3d9a", "*", "bottom"), "distilled": ("#1f5fa8", "o", "bottom"),
            "not distilled": ("#b8460b", "s", "top")}


@picture
def plot_efficiency(path, points, title):
    """Each metric's score against the parameters, in millions; the latency stands by the name.

    points: {label: {"parameters", "latency" in ms, "scores": {metric: (mean, std)}, "family"}}.
    """
    metrics = dict.fromkeys(metric for point in points.values() for metric in point["scores"])
    figure, axes = new_figure(1, len(metrics), (6 * len(metrics), 5), title)
    for axis, metric in zip(axes[0], metrics):
        for label, point in points.items():
            if metric not in point["scores"]:
                continue
            mean, std = point["scores"][metric]
            colour, marker, side = FAMILIES[point["family"]]
            axis.errorbar(point["parameters"], mean, std, color=colour, marker=marker,
                          markersize=9, capsize=3)
            offset = (0, 8 if side == "bottom" else -8)
            text = f"{label}\n{point['latency']:.3g} ms"
            axis.annotate(text, (point["parameters"], mean), offset, ha="center", va=side,
                          textcoords="offset points", color=colour)
        axis.set(xlabel="parameters (M)", ylabel=metric)
        axis.margins(0.2)
        # a cut axis would make little differences large
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
