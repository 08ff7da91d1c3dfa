"""What eclipse.py, clip_cid.py and dlip.py share.

The models, the losses and the training loops are not here: they stand in each script, to be read
there. In order:

    errors · command line · devices and processes · run folder · ablation · checkpoints
    · tokenizers · images · sets on disk · what a Config names · loading · evaluation
    · captions and answers · pictures

Letters in shape comments: B batch, N images, T texts, D embedding width, K classes, S image side in
pixels.
"""

import argparse
import bisect
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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler
from tqdm import tqdm

DATA = Path(__file__).resolve().parent / "data"


# --------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user gave cannot be used: run_main prints this line; exit code 2."""


class BadSample(Exception):
    """One sample cannot be used (corrupt image, no caption): it is skipped and counted."""


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
    group, fields = parser, dataclasses.fields(config_class)
    for field in fields:
        if field.metadata["section"]:
            group = parser.add_argument_group(field.metadata["section"])
        group.add_argument(flag(field.name), **argument(field))
    given = vars(parser.parse_args(argv))
    for field in fields:
        if type(given.get(field.name)) in (int, float):  # a bool is an int as well
            check_range(field, given[field.name])
    return as_fields(given)


def argument(field):
    """What argparse wants to know of a field."""
    several = isinstance(field.default, tuple)
    shown = " ".join(map(str, field.default)) if several else field.default
    help = field.metadata["help"].replace("%", "%%")
    settings = {"help": help if shown in (None, "") else f"{help} [{shown}]"}
    kind = getattr(field.type, "__args__", (field.type,))[0]  # of `float | None`, `tuple[float]`
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif isinstance(field.metadata["allowed"], list):
        settings["choices"] = field.metadata["allowed"]
    else:
        settings["type"], settings["metavar"] = kind, kind.__name__.upper()
    if several:
        settings["nargs"] = "+"
    return settings


def check_range(field, value):
    """UserError for a number outside of its range, by default from 0 on, of counts from 1."""
    least = min(field.default or 0, 1 if isinstance(value, int) else 0)
    most = math.inf
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
    try:
        return known_fields(config_class, saved["config"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} holds no config of a run: take another --out") from None


def known_fields(config_class, saved):
    """Those of the saved values that are fields of the dataclass."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in as_fields(saved).items() if name in names}


def run_folder(stem, newest):
    """The default run folder: `stem`, stem-2, stem-3, ..., the first free or the newest taken."""
    names = [stem]
    while Path(names[-1]).exists():
        names.append(f"{stem}-{len(names) + 1}")
    return names[-2] if newest and len(names) > 1 else names[-1]


# ------------------------------------------------------------------------ devices and processes


def launched():
    """Whether torchrun started this process; some of its variables alone are leftovers."""
    return all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def rank():
    return int(os.environ["RANK"]) if launched() else 0


def world_size():
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def start_device(name, seed):
    """Join the processes torchrun started, pick the device (auto: CUDA, else MPS, else CPU), seed.

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
    for parameter in parameters:
        if parameter.grad is not None and world_size() > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


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


def gather_objects(thing):
    """[the thing each process holds], in order of rank."""
    if world_size() == 1:
        return [thing]
    things = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def on_first(work):
    """work() on rank 0 while the others wait; all return its result; a UserError ends all."""
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


@contextlib.contextmanager
def disk_errors(path):
    """What goes wrong while a file is written becomes a UserError that names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written: {reason}") from error


def replace_file(path, write):
    """write(temporary path), then rename: nobody ever reads half a file. UserError if it fails."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


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
        commit = subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__,
            "platform": platform.platform(), "cpu_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "processes": world_size(), "command": " ".join(sys.argv)}


def check_free(cfg):
    """UserError when --out holds a run that is not to be resumed."""
    if Path(cfg.out, "log.csv").exists() and not cfg.resume:
        raise UserError(f"{cfg.out} holds a run: go on with --resume, or choose another --out")


class Run:
    """A run folder: config.json, log.csv, last.pt, best.pt, results.json and pictures.

    log.csv holds only what a rerun reproduces to the digit. Only rank 0 writes.
    """

    def __init__(self, folder, columns):
        self.folder, self.columns = Path(folder), columns

    def path(self, name):
        return self.folder / name

    def start(self, cfg, step):
        """Write config.json at step 0; later rows of an interrupted run are dropped.

        UserError when the folder holds a run that is not to be resumed.
        """
        if rank() > 0:
            return
        check_free(cfg)
        if step == 0:
            content = {"config": dataclasses.asdict(cfg), "environment": environment()}
            self.write_json("config.json", content)
        path = self.path("log.csv")
        lines = [",".join(self.columns)]
        for row in read_csv(path) if path.exists() else []:
            if int(row["step"]) <= step:
                lines.append(",".join(row.values()))
        text = "".join(line + "\n" for line in lines)
        replace_file(path, lambda temporary: temporary.write_text(text))

    def log(self, row):
        """Append a row to log.csv; absent columns stay empty."""
        cells = [row.get(column, "") for column in self.columns]
        line = ",".join(f"{v:.8g}" if isinstance(v, float) else str(v) for v in cells)
        if rank() == 0:
            with disk_errors(self.path("log.csv")), open(self.path("log.csv"), "a") as file:
                file.write(line + "\n")

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
    own = ("ablate", "seeds", "jobs", "out")
    flags = {name: value for name, value in given.items() if name not in own}
    wanted = [name for name in arms if "all" in cfg.ablate or name in cfg.ablate]
    commands = []
    for seed in cfg.seeds:
        for name in wanted:
            out = arm_folder(folder, name, seed)
            if not (out / "results.json").is_file():
                commands.append((out, {**flags, **arms[name], "seed": seed}))
    if commands:
        run_commands([(out, {**flags, **fields}) for out, fields in first], cfg.jobs)
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
            gains = []
            for run in runs:
                theirs = base.get(run["seed"], {})
                gains.append({metric: value - theirs[metric]
                              for metric, value in run["cells"][cell].items() if metric in theirs})
            gains = [gain for gain in gains if any(gain.values())]
            if gains:
                table[f"{name}: {cell}"] = summary = mean_std(gains)
                for metric in summary:
                    positive = sum(gain[metric] > 0 for gain in gains)
                    summary[metric] += f" ({positive}/{len(gains)})"
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
    size: dict | None  # as saved: of a CLIP the fields of its Size


def read_checkpoint(path):
    """The Checkpoint in a .pt, .bin or .safetensors file, or in one of OpenAI's archives.

    Nothing in the file is executed. The weights are as stored, but out of their wrapper and
    without what DataParallel and torch.compile put into names. UserError: no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: name a checkpoint, such as RUN/last.pt")
    try:
        if path.suffix == ".safetensors":
            content = read_safetensors(path)
        elif zipfile.is_zipfile(path) and "constants.pkl" in str(zipfile.ZipFile(path).namelist()):
            content = torch.jit.load(path, map_location="cpu").state_dict()  # OpenAI's TorchScript
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content
        for wrapper in ("model", "state_dict", "model_state_dict"):
            weights = weights.get(wrapper, weights)
        weights = {name.replace("_orig_mod.", "").removeprefix("module."): tensor.detach()
                   for name, tensor in weights.items()}
        size = content.get("size")
        if not isinstance(size, dict):
            return Checkpoint(path, weights, {}, None)
        return Checkpoint(path, weights, content["config"], size)
    except Exception as error:  # what is damaged or no table of tensors raises many types
        reason = f"it is no table of weights, or cut off or damaged ({type(error).__name__})"
        python_object = re.search(r"GLOBAL (\S+)", str(error))
        if python_object:
            reason = (f"it also holds a {python_object[1]}, and reading that could run any code. "
                      "If you trust it, re-save the weights alone: torch.save(torch.load(FILE, "
                      "weights_only=False)['state_dict'], NEW_FILE)")
        raise UserError(f"{path} is not read: {reason}") from error


SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64}


def read_safetensors(path):
    """{name: tensor}. The format: the length of the header in 8 bytes, the header, a json with
    dtype, shape and place of each tensor, then the data."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = torch.frombuffer(content[start + begin:start + end],
                                dtype=SAFETENSORS[entry["dtype"]])
        tensors[name] = data.reshape(entry["shape"])
    return tensors


def read_clip(path, act=None):
    """clip_weights of a file."""
    return clip_weights(read_checkpoint(path), act)


def clip_weights(checkpoint, act=None):
    """(float32 weights in OpenAI's names, Size, config) of a CLIP ViT: ours (its trained towers),
    OpenAI's, OpenCLIP's or Hugging Face's. A file of ours tells its Size; act goes before all."""
    path, weights = checkpoint.path, checkpoint.weights
    for prefix in ("online.", "student."):
        if prefix + "logit_scale" in weights:
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()
                       if name.startswith(prefix)}
    try:
        if "vision_model.embeddings.class_embedding" in weights:
            weights = from_hugging_face(weights)
        if checkpoint.size:
            size = Size(**checkpoint.size)
        else:
            size = foreign_size(path, weights, act)
    except UserError:
        raise
    except Exception as error:  # a name, a shape or a field that no CLIP ViT has
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
    conv, positions = weights["visual.conv1.weight"], weights["visual.positional_embedding"]
    width, _, _, patch = conv.shape
    vocab, text_width = weights["token_embedding.weight"].shape
    grid = math.isqrt(len(positions) - 1)
    if len(positions) != 1 + grid ** 2:
        raise ValueError(f"visual.positional_embedding {tuple(positions.shape)} is no square grid")
    archive = "input_resolution" in weights  # only OpenAI's have it
    size = Size(
        image_size=grid * patch, patch_size=patch, vision_width=width,
        vision_layers=count_blocks(weights, "visual.transformer."),
        vision_heads=VISION_HEADS.get(width, width // 64),
        vision_mlp=len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        text_width=text_width, text_layers=count_blocks(weights, "transformer."),
        text_heads=text_width // 64, context_length=len(weights["positional_embedding"]),
        vocab_size=vocab, embed_dim=weights["visual.proj"].shape[1],
        act="quick_gelu" if archive or conv.dtype == torch.float16 else "gelu",  # half: OpenAI's
        **OPENAI)
    told = {}
    for file in sorted(path.parent.glob("*config.json")):
        told |= told_by(file, width)
    if not archive and not act and "act" not in told and rank() == 0:
        print(f"{path}: nothing tells the activation, {size.act} is assumed; --act changes it "
              "(OpenAI's weights need quick_gelu)")
    size = replace(size, **told)
    if size.vision_width % size.vision_heads or size.text_width % size.text_heads:
        raise ValueError(f"{size.vision_heads} and {size.text_heads} heads do not divide widths")
    return size


def count_blocks(weights, tower):
    return sum(f"{tower}resblocks.{i}.ln_1.weight" in weights for i in range(len(weights)))


def told_by(file, width):
    """Fields of Size that a json beside weights tells, with what its library leaves out."""
    content = read_json(file)
    told = {}
    try:
        if "vision_config" in content:  # Hugging Face's config.json
            vision, text = content["vision_config"], content["text_config"]
            told = dict(act=vision.get("hidden_act", "quick_gelu"),
                        vision_heads=vision.get("num_attention_heads", 12),
                        text_heads=text.get("num_attention_heads", 8))
        if "model_cfg" in content:  # open_clip_config.json
            model = content["model_cfg"]
            told = dict(act="quick_gelu" if model.get("quick_gelu") else "gelu",
                        vision_heads=width // model["vision_cfg"].get("head_width", 64),
                        text_heads=model["text_cfg"]["heads"])
        pixels = content.get("preprocess_cfg", content)
        for field in ("mean", "std"):
            values = pixels.get(field) or pixels.get(f"image_{field}")
            if values:
                told[field] = tuple(map(float, values))
    except Exception as error:
        raise UserError(f"{file} does not describe a CLIP: {error}") from None
    return told


def from_hugging_face(weights):
    """Hugging Face CLIPModel's tensors in OpenAI's names: q, k, v become one in_proj."""
    renames = {
        "encoder.layers.": "transformer.resblocks.",
        "embeddings.": "",
        "vision_model.": "visual.",
        "text_model.": "",
        "patch_embedding": "conv1",
        "position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "final_layer_norm": "ln_final",
        "layer_norm": "ln_",
        "self_attn.": "attn.",
        "q_proj.": "in_proj_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "visual_projection.weight": "visual.proj",
        "text_projection.weight": "text_projection",
    }
    renamed = {}
    for name, tensor in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([weights[name.replace("q_proj", part)]
                                for part in ("q_proj", "k_proj", "v_proj")])
        if name.endswith("projection.weight"):
            tensor = tensor.T
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def clip_size(cfg, loaded=None):
    """(Size, weights or None): of the Checkpoint if there is one, else of the preset; then
    --image-size and --act. UserError when the patches do not fill the image."""
    size, weights = PRESETS[cfg.preset], None
    if loaded:
        weights, size, _ = clip_weights(loaded, cfg.act)
    pixels = cfg.image_size or size.image_size
    if pixels % size.patch_size:
        raise UserError(f"--image-size {pixels} is no multiple of the patches' {size.patch_size}")
    size = replace(size, image_size=pixels, act=cfg.act or size.act)
    if loaded:
        resize_positions(weights, "visual", size)
    return size, weights


def resize_positions(weights, tower, size):
    """Bicubically resize an image tower's position embeddings, a square grid with CLS, in place."""
    positions = weights[f"{tower}.positional_embedding"]  # (1 + g*g, D)
    old, new = math.isqrt(len(positions) - 1), size.image_size // size.patch_size
    if old != new:
        grid = positions[1:].T.unflatten(1, (old, old))[None]  # (1, D, g, g)
        grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
        positions = torch.cat([positions[:1], grid[0].flatten(1).T])
    weights[f"{tower}.positional_embedding"] = positions


def load_weights(module, weights, path):
    """load_state_dict. UserError in one line that names the tensors, with both shapes."""
    meta = next(module.parameters()).is_meta  # made without memory
    try:
        module.load_state_dict(weights, assign=meta)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)
        raise UserError(f"{path} does not fit: {reason}") from None


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


def read_lines(name):
    """The lines of a compressed text in data/."""
    return gzip.decompress((DATA / name).read_bytes()).decode().split("\n")


@functools.lru_cache(maxsize=4)
def load_merges(n_merges):
    """{(left id, right id): id of the merged token} of the first n_merges byte pairs of
    data/bpe_simple_vocab_16e6.txt.gz, in order of rank.

    Ids: 0..255 a byte, 256..511 a byte that ends a word, from 512 the merges, then the two
    specials.
    """
    # The file writes a byte as one printable character: itself where it prints, else the next one
    # from U+0100 on.
    symbols = [chr(b) for b in BYTES[:188]] + [chr(i) for i in range(256, 324)]
    symbols += [symbol + "</w>" for symbol in symbols]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    merges = {}
    for line in read_lines("bpe_simple_vocab_16e6.txt.gz")[1:1 + n_merges]:  # 0: version
        left, right = line.split()
        ids[left + right] = merges[ids[left], ids[right]] = len(ids)
    return merges


def merge_bytes(word, merges):
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
def encode_run(run, vocab_size):
    """Token ids of one match of RUNS: a special, or words, of which each number is one."""
    if run in SPECIALS:
        return [vocab_size - 2 + SPECIALS.index(run)]
    merges = load_merges(vocab_size - 514)
    chars = [f" {c} " if c.isnumeric() and not c.isalpha() else c for c in run]
    ids = []
    for word in "".join(chars).split():
        ids += merge_bytes(word.encode(), merges)
    return ids


def token_rows(texts, encode, length, first, last):
    """Long tensor (B, length): first, the text's ids, last, zeros; a long text keeps its last."""
    texts = [texts] if isinstance(texts, str) else texts
    rows = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(rows, texts):
        ids = [first, *encode(text)[:length - 2], last]
        row[:len(ids)] = torch.tensor(ids)
    return rows


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

    def __init__(self, context_length=77, vocab_size=49408):
        if not 514 <= vocab_size <= 49408:
            raise UserError(f"a vocabulary of {vocab_size} tokens is not CLIP's: 514 to 49408")
        self.context_length, self.vocab_size = context_length, vocab_size
        self.sot, self.eot = vocab_size - 2, vocab_size - 1

    def __call__(self, texts):
        """Long tensor (B, context_length): start, text, end, zeros. A long text keeps its end."""
        return token_rows(texts, self.encode, self.context_length, self.sot, self.eot)

    def encode(self, text):
        """Token ids of a text of any length, without start and end token."""
        # A surrogate has no UTF-8: a pair becomes its character, a lone one U+FFFD, as in ftfy.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        ids = []
        for run in RUNS.findall(text):
            cached = encode_run if len(run) <= 100 else encode_run.__wrapped__
            ids += cached(run, self.vocab_size)
        return ids


# --------------------------------------------------------------------------------- BERT's tokenizer

BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
BERT_SPECIAL = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK|DEC|ENC)\])")
IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
                       "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")
BLIP_SYMBOLS = r'[.!"()*#:;~]'  # what BLIP takes out of captions and questions


def split_words(text):
    """Lower-cased words and single punctuation marks, without accents: BERT's basic tokenization.

    Control, format, private and unassigned characters vanish; each CJK ideograph is a word.
    """
    # One character at a time: a final Σ becomes σ and not ς, as in transformers, and the marks on
    # a letter, of which none is kept, are not sorted, which would take quadratic time.
    chars = []
    for c in "".join(unicodedata.normalize("NFD", c.lower()) for c in text):
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
    """

    def __init__(self, context_length=30, words=None):
        self.context_length = context_length
        tokens = read_lines("bert_base_uncased_vocab.txt.gz")[:30522] + ["[DEC]", "[ENC]"]
        if words is not None:
            full, kept = BertTokenizer(), set(BERT_SPECIALS)
            for word in split_words(" ".join(words)):
                kept.update([word], word, ("##" + c for c in word))
                kept.update(full._tokens[i] for i in full._pieces(word))
            tokens = [token for token in tokens if token in kept]
        self._tokens, self.vocab_size = tokens, len(tokens)
        self._ids = {token: i for i, token in enumerate(tokens)}
        specials = map(self._ids.get, BERT_SPECIALS)
        self.pad, self.unk, self.cls, self.sep, self.mask, self.dec, self.enc = specials

    def __call__(self, texts, first="[CLS]"):
        """Long tensor (B, context_length): first, text, [SEP], padding. A long text keeps [SEP]."""
        return token_rows(texts, self.encode, self.context_length, self._ids[first], self.sep)

    def encode(self, text):
        """Token ids of a text of any length, without first token and [SEP]."""
        ids = []
        for part in BERT_SPECIAL.split(text):
            words = [part] if part in BERT_SPECIALS else split_words(part)
            for word in words:
                ids += self._pieces(word)
        return ids

    def decode(self, ids):
        """Text without specials, as transformers' decode with clean_up_tokenization_spaces."""
        tokens = [self._tokens[i] for i in ids]
        text = " ".join(token for token in tokens if token not in BERT_SPECIALS)
        text = text.replace(" ##", "").strip()
        for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            text = text.replace(spaced, spaced.strip())
        return text

    def _pieces(self, word):
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


def clean_blip_caption(text, max_words=30):
    """A caption as BLIP reads it: lower case, a space for .!"()*#:;~, at most max_words words."""
    text = re.sub(BLIP_SYMBOLS, " ", text.lower())
    text = re.sub(r"\s\s+", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_blip_question(text, max_words=50):
    """A question as BLIP reads it: lower case, .!"()*#:;~ removed, at most max_words words.

    BLIP's own limit is 50 words, then 35 tokens.
    """
    text = re.sub(BLIP_SYMBOLS, "", text.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])


# --------------------------------------------------------------------------------------- images

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")


def open_image(source):
    """A PIL image of encoded bytes, whose size is known but whose pixels are not decoded yet.

    A PIL image is returned as it is. BadSample for whatever PIL cannot read.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        return Image.open(io.BytesIO(source))
    except Image.DecompressionBombError:
        raise BadSample("image too large") from None
    except Exception as error:  # PIL's parsers raise errors of many types on damaged files
        raise BadSample("corrupt image") from error


def decode(image, shrink):
    """RGB pixels, and the factor by which a JPEG's decoder has reduced both sides.

    The factor is 1, 2, 4 or 8, at most `shrink`. Transparency lies over white; of an animation the
    first frame counts; EXIF orientation is ignored. BadSample for what PIL cannot decode.
    """
    width, height = image.size
    shrink = min(max(shrink, 1), 8)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise BadSample("image of 32 bits a pixel")
    try:
        draft = image.draft("RGB", (width // shrink, height // shrink))  # None: not a JPEG
        factor = width / draft[1][2] if draft else 1
        if image.mode.startswith("I"):  # 16 bits; PIL's own conversion clips at 255
            pixels = np.asarray(image).astype(np.float32).clip(0, 65535) / 257
            image = Image.fromarray(pixels.round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB"), factor
    except Exception as error:
        raise BadSample("corrupt image") from error


def random_resized_crop(source, size, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """uint8 (3, size, size): a random crop, resized (bicubic, antialiased).

    Distributed as torchvision's RandomResizedCrop. The crop is drawn from the size in the header,
    so that a JPEG need only be decoded as finely as this crop needs. BadSample as decode.
    """
    image = open_image(source)
    left, top, width, height = random_crop_box(*image.size, rng, scale, ratio)
    image, factor = decode(image, min(width, height) // size)
    edges = left, top, left + width, top + height
    left, top, right, bottom = (edge / factor for edge in edges)
    # Cut out first, so that the filter sees no pixel beyond the crop. In a reduced JPEG the edges
    # fall between pixels: rounding them would shift the crop and cost more than the reduction.
    x, y = math.floor(left), math.floor(top)
    image = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    box = left - x, top - y, right - x, bottom - y
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def random_crop_box(width, height, rng, scale, ratio):
    """(left, top, width, height) in pixels.

    scale: range of the crop's share of the area (uniform); ratio: range of width / height
    (log-uniform).
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


def resize_center_crop(source, size):
    """uint8 (3, size, size): shorter side to `size`, then the central square. For evaluation."""
    image = open_image(source)
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = resize(image, (width, height), short // (2 * size))
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def resize_whole(source, size):
    """uint8 (3, size, size): the whole image squeezed into a square, as BLIP evaluates."""
    image = open_image(source)
    image = resize(image, (size, size), min(image.size) // (2 * size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def resize(image, sides, shrink):
    """The whole image at these sides (bicubic, antialiased).

    A JPEG is decoded at a reduced size only while that leaves twice the pixels needed, so that
    results stay those of the field's full-size transform.
    """
    whole = image.size
    image, factor = decode(image, shrink)
    # a reduced JPEG of odd size has a padded last column or row
    box = 0, 0, whole[0] / factor, whole[1] / factor
    return image.resize(sides, Image.Resampling.BICUBIC, box=box)


# ---------------------------------------------------------------------------------- sets on disk

# Every set d: len(d); d[i] -> (encoded image or PIL image, target), or BadSample; d.key(i); d.bad,
# unusable samples by reason; d.kind says what the target is: "captions" a list of strings,
# "classes" the number of one of d.classes, "questions" (question, human answers).


def read_bytes(path, start=0, size=-1):
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise BadSample("unreadable file") from error


NOT_DOWNLOADED, HELD_BACK = "not downloaded", "in COCO's val or test"


def files_below(root, endings):
    """The files below a folder whose names end so, linked folders too, sorted within a folder."""
    seen = set()
    for folder, inside, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        inside[:] = sorted(inside) if place not in seen else []  # a link may lead back up
        for name in sorted(names) if place not in seen else []:
            if name.lower().endswith(endings) and not name.startswith("."):
                yield Path(folder, name)
        seen.add(place)


def is_held_out(path):
    """Whether a path says by itself that it is for validation or test."""
    return re.search(r"(^|[^a-z])(val|valid|validation|test)($|[^a-z])", str(path).lower())


class TarShards:
    """Image-text pairs in all *.tar files below `root`, as img2dataset and webdataset write them.

    A sample is `key.jpg` (jpeg, png, webp) with `key.txt`, or `key.json` with "caption". Samples
    are read by their offset, so any order is possible and workers share no open file. The offsets
    are found once and kept beside the shards in `.index-*.npz`. What is named for validation or
    test is left out. UserError when there is no shard, or one is compressed.
    """

    kind = "captions"
    # Positions count tar blocks of 512 bytes. 25 bytes a sample, plus its key.
    ROW = np.dtype([("shard", "u4"), ("image", "u4"), ("image_size", "u4"), ("caption", "u4"),
                    ("caption_size", "u4"), ("json", "?"), ("key_end", "u4")])

    def __init__(self, root):
        self.root = Path(root)
        shards = sorted(files_below(root, (".tar", ".tar.gz", ".tgz")))
        train = [path for path in shards if not is_held_out(path.relative_to(root))]
        self.shards = train or shards
        for path in self.shards:
            if path.suffix != ".tar":
                raise UserError(f"{path} is compressed: unpack it first (gzip -d)")
        if not self.shards:
            raise UserError(f"no *.tar shards in {root} (see data/README.md)")
        self.rows, self.keys, self.bad = self._load_index()
        if not len(self.rows):
            raise UserError(f"no image with a caption in the {len(self.shards)} shards of {root}: "
                            "key.jpg with key.txt, or key.json with \"caption\"")

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        folders = sorted({str(path.parent.relative_to(self.root)) for path in self.shards})
        return f"{len(self.shards)} shards in {self.root} (folders: {' '.join(folders)})"

    def key(self, i):
        """`<shard>/<key>`: keys need only be unique within a shard."""
        start = self.rows[i - 1]["key_end"] if i else 0
        key = self.keys[start:self.rows[i]["key_end"]].tobytes().decode(errors="surrogateescape")
        shard = self.shards[self.rows[i]["shard"]].relative_to(self.root).with_suffix("")
        return f"{shard.as_posix()}/{key}"

    def __getitem__(self, i):
        row = self.rows[i]
        text = self.read(row, "caption")
        try:
            texts = json.loads(text).get("caption") if row["json"] else text.decode("utf-8-sig")
        except (ValueError, AttributeError, RecursionError) as error:
            raise BadSample("unreadable caption") from error
        captions = clean_captions(texts)
        return self.read(row, "image"), captions

    def read(self, row, part):
        start = int(row[part]) * tarfile.BLOCKSIZE
        return read_bytes(self.shards[row["shard"]], start, int(row[f"{part}_size"]))

    def _load_index(self):
        """Rows, all keys as one byte array, and the unusable samples, from the cache if it fits."""
        # With the time: tar pads its files, so that a rewritten shard often keeps its size, and
        # old offsets would then pair images with captions wrongly.
        stats = [(str(path.relative_to(self.root)), path.stat()) for path in self.shards]
        state = str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        state += "keys end at the last dot"  # as an index of another rule must not be taken
        digest = hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest()[:16]
        cache = self.root / f".index-{digest}.npz"
        with contextlib.suppress(Exception):  # absent, or damaged in any way: build it again
            with np.load(cache) as index:
                bad = collections.Counter(json.loads(str(index["bad"])))
                return index["rows"], index["keys"], bad
        rows, keys, bad = [], bytearray(), collections.Counter()
        hidden = len(self.shards) < 20 or rank() != 0
        for number, path in enumerate(tqdm(self.shards, "indexing shards", disable=hidden)):
            for key, image, caption, is_json in scan_shard(path, bad):
                keys += key.encode(errors="surrogateescape")
                rows.append((number, *image, *caption, is_json, len(keys)))
        rows, keys = np.array(rows, self.ROW), np.frombuffer(bytes(keys), np.uint8)
        if rank() == 0:
            try:
                replace_file(cache, lambda new: save_arrays(new, rows=rows, keys=keys,
                                                            bad=np.array(json.dumps(bad))))
            except UserError as error:
                print(f"{error}: the shards will be indexed again at the next start")
        return rows, keys, bad


def save_arrays(path, **arrays):
    with open(path, "wb") as file:  # np.savez adds .npz to a name that lacks it
        np.savez(file, **arrays)


def clean_captions(texts):
    """The captions of a sample, one text or a list, their white space tidied. BadSample if none."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSample("caption is no text")
    captions = [" ".join(text.split()) for text in texts if text.strip()]
    if not captions:
        raise BadSample("empty caption")
    return captions


def scan_shard(path, bad):
    """[(key, (block, size) of the image, (block, size) of the caption, caption is json)].

    Counts in `bad` what cannot be used. The key of a member ends at the last dot of its name.
    """
    length, end = path.stat().st_size, 0
    parts = collections.defaultdict(dict)  # key -> kind -> place; None: cut off
    try:
        with open(path, "rb") as file, tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for member in tar:  # ignore_zeros: also what `cat a.tar b.tar` appended
                tar.members.clear()  # tarfile would keep all of them
                file.seek(end)
                bad["in a damaged shard"] += any(file.read(member.offset - end))
                blocks = math.ceil(member.size / tarfile.BLOCKSIZE) if member.isreg() else 0
                end = member.offset_data + blocks * tarfile.BLOCKSIZE
                key, _, extension = member.name.rpartition(".")
                kind = extension.lower()
                kind = "image" if kind in ("jpg", "jpeg", "png", "webp") else kind
                if member.isreg() and kind in ("image", "txt", "json"):
                    bad["named twice"] += kind in parts[key]
                    whole = member.offset_data + member.size <= length
                    place = member.offset_data // tarfile.BLOCKSIZE, member.size
                    parts[key].setdefault(kind, place if whole else None)
            file.seek(end)
            rest = file.read()
    except (tarfile.TarError, OSError, ValueError) as error:
        if read_bytes(path, size=2) == b"\x1f\x8b":
            raise UserError(f"{path} is compressed: unpack it first (gzip -d)") from error
        rest = b""
    samples, cut_off = [], 0
    for key, places in parts.items():
        image, caption = places.get("image"), places.get("txt") or places.get("json")
        if image and caption:
            samples.append((key, image, caption, not places.get("txt")))
        elif None in places.values():
            cut_off += 1
        elif len(parts.get(first_dot(key), ())) < 2:  # else a mask 1.seg.png beside 1.jpg, 1.txt
            bad["without caption" if image else "without image"] += 1
    # a sound archive ends with blocks of zeros; how many samples lay behind damage is not known
    if not cut_off and (not rest or any(rest)):
        bad["in a damaged shard"] += 1
    bad["cut off"] += cut_off
    return samples


def first_dot(name):
    """The name of a tar's member up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


class Listed:
    """Captions of images, or questions about them, in a list that data/prepare.py has made.

    Only the offsets of the records are kept. UserError when the list is damaged, or its sources
    have changed since.
    """

    def __init__(self, path):
        self.path, folder = Path(path), Path(path).parent
        with open(path, "rb") as file:
            lengths = np.fromiter((len(line) for line in file), np.int64)
            file.seek(0)
            try:
                head = json.loads(file.readline())
                self.name, self.kind, self.notes = head["name"], head["kind"], head["notes"]
                self.bad = collections.Counter(head["unusable"])
                self.command = prepare_command(self.name, folder / head["root"], folder)
                sources = [(folder / source["file"], source["size"], source["time"])
                           for source in head["made_from"]]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is no list of data/prepare.py") from None
        self.starts = (np.cumsum(lengths) - lengths)[1:]
        self.answers = head.get("answers")
        for file, *before in sources:
            stat = file.stat() if file.exists() else None
            if stat and [stat.st_size, stat.st_mtime_ns] != before:
                raise UserError(f"{file} has changed since {path} was made: {self.command}")
        if not len(self):
            raise UserError(f"{path} lists no sample: {self.command}")

    def __len__(self):
        return len(self.starts)

    def __str__(self):
        return "; ".join([str(self.path), *(f"{n:,} {what}" for what, n in self.notes.items())])

    def record(self, i):
        """What the list says of a sample, a dict."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError:
            raise UserError(f"{self.path}, line {i + 2}, is damaged: {self.command}") from None

    def key(self, i):
        return self.record(i)["key"]

    def __getitem__(self, i):
        record = self.record(i)
        image = read_bytes(self.path.parent / record["image"])
        if self.kind == "questions":
            return image, (record["question"], record["answers"])
        return image, record["captions"]

    def column(self, name):
        """[what the list says of every sample under this name, None where it says nothing]"""
        return [self.record(i).get(name) for i in range(len(self))]

    @functools.cached_property
    def question_kinds(self):
        return self.column("kind")


class Mixture(ConcatDataset):
    """Several captioned sets one after the other, one that is to be seen twice an epoch twice.

    Keys are NAME/key; a repeated sample has the same key again.
    """

    kind = "captions"

    def __init__(self, names, parts):
        super().__init__(parts)
        self.names = names
        self.bad = sum((part.bad for part in dict(zip(names, parts)).values()),
                       collections.Counter())

    def key(self, i):
        part = bisect.bisect_right(self.cumulative_sizes, i)
        start = self.cumulative_sizes[part - 1] if part else 0
        return f"{self.names[part]}/{self.datasets[part].key(i - start)}"


class Subset(torch.utils.data.Subset):
    """The samples of a set at the given indices, in that order."""

    def __init__(self, data, indices):
        super().__init__(data, indices)
        self.kind, self.bad = data.kind, data.bad
        self.answers = getattr(data, "answers", None)

    def key(self, i):
        return self.dataset.key(self.indices[i])

    def column(self, name):
        values = self.dataset.column(name)
        return [values[i] for i in self.indices]

    @property
    def question_kinds(self):
        kinds = self.dataset.question_kinds
        return [kinds[i] for i in self.indices]


class ImageFolder:
    """Images in one folder per class: root/<class>/..., or root/<split>/<class>/...

    split "train", "val" or "test"; "test" falls back on val/, then on root itself. A class is
    called as its folder, with spaces for _ and -. In ImageNet (or a part of it) folders are wnids
    or class names, which with the templates come from data/. UserError when there are no images.
    """

    kind, bad = "classes", collections.Counter()

    def __init__(self, root, split, imagenet=False):
        root = Path(root)
        folders = {name: root / name for name in ("train", "val", "test")
                   if (root / name).is_dir()}
        folder = folders.get(split)
        if folder is None and split == "test":
            folder = folders.get("val", root)
        if folder is None or (folder == root and folders):
            raise UserError(f"no folder {root / split} with one folder of images per class")
        # Labels must mean the same in each split, even if a class is absent from one.
        parents = folders.values() or [root]
        names = sorted({path.name for parent in parents for path in parent.iterdir()
                        if path.is_dir() and not path.name.startswith(".")})
        self.images = []
        for label, name in enumerate(names):
            files = files_below(folder / name, IMAGE_TYPES)
            self.images += [(path, label) for path in files]
        if not self.images:
            raise UserError(f"no images in class folders of {folder}: one folder of images per "
                            "class is needed (see data/README.md)")
        self.classes = [name.replace("_", " ").replace("-", " ") for name in names]
        self.templates = ["a photo of a {}."]
        if imagenet:
            self.classes = imagenet_names(names)
            self.templates = read_text(DATA / "templates_imagenet.txt").splitlines()

    def __len__(self):
        return len(self.images)

    def key(self, i):
        return str(self.images[i][0])

    def __getitem__(self, i):
        path, label = self.images[i]
        return read_bytes(path), label


def imagenet_names(folders):
    """The class names of folders that are called by wnid (n01440764) or by name."""
    lines = read_text(DATA / "imagenet_classes.tsv").splitlines()
    known = dict(line.split("\t") for line in lines)
    for name in list(known.values()):
        known[name] = known[name.replace(" ", "_")] = name
    for folder in folders:
        if folder not in known:
            raise UserError(f"{folder} is no ImageNet class: folders are wnids (n01440764) or the "
                            f"names in {DATA / 'imagenet_classes.tsv'}")
    return [known[folder] for folder in folders]


# name -> torchvision class, the arguments of its parts for training (linear probe) and for testing
TORCHVISION = {
    "cifar10": ("CIFAR10", [{"train": True}], [{"train": False}]),
    "cifar100": ("CIFAR100", [{"train": True}], [{"train": False}]),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    "food101": ("Food101", [{"split": "train"}], [{"split": "test"}]),
    "oxford_pets": ("OxfordIIITPet", [{"split": "trainval"}], [{"split": "test"}]),
    "stl10": ("STL10", [{"split": "train"}], [{"split": "test"}]),
}


class TorchvisionSet:
    """A classification set of torchvision, downloaded beforehand into `root`; "train" or "test"."""

    kind, bad = "classes", collections.Counter()

    def __init__(self, name, root, split):
        (made, train, test), parts = TORCHVISION[name], []
        try:
            make = getattr(import_torchvision().datasets, made)
            for arguments in train if split == "train" else test:
                parts.append(make(str(root), **arguments))
        except ImportError as error:
            raise UserError(f"{name} needs the package {error.name or error}") from None
        except (RuntimeError, OSError) as error:
            words = "".join(f", {key}={value!r}" for key, value in arguments.items())
            raise UserError(
                f"{name} cannot be read from {root} ({str(error).splitlines()[0]}); get it with: "
                f"python -c \"import torchvision; torchvision.datasets.{made}('{root}'{words}, "
                "download=True)\"") from None
        self.data = ConcatDataset(parts)
        self.classes = [text.replace("_", " ") for text in parts[0].classes]
        self.templates = ["a photo of a {}."]

    def __len__(self):
        return len(self.data)

    def key(self, i):
        return str(i)

    def __getitem__(self, i):
        try:
            return self.data[i]
        except (OSError, SyntaxError, ValueError) as error:
            raise BadSample("corrupt image") from error


# ------------------------------------------------------------------------- what a Config names

PREPARED = ("coco", "flickr30k", "vg", "sbu", "nocaps", "vqav2")
HELD_OUT = 5000  # at most; the last 1 % of a set without validation split


def prepare_command(name, root, out=None):
    """What makes the lists of a set: what is no known set is taken for a table as CC3M's."""
    name = name if name in PREPARED else "cc3m"
    root, out = os.path.normpath(root), os.path.normpath(out or root)
    elsewhere = f" --out {shlex.quote(out)}" if out != root else ""
    return f"run python data/prepare.py {name} {shlex.quote(root)}{elsewhere}"


def data_folder(name, root):
    """The folder of a set: root, else data/NAME. UserError when there is none."""
    folder = Path(root).expanduser() if root else DATA / name
    if not folder.is_dir():
        raise UserError(f"{name}: no folder {folder} (see data/README.md for how to get the data; "
                        "any other place with --root FOLDER)")
    return folder


def open_captions(name, root, split):
    """Captioned set in the folder of a set, or None if it has no such split.

    Lists of data/prepare.py, else tar shards: in root/train, root/val, root/test, or root itself
    for training. Without a validation split the last 1 % of the training set is held out for it.
    """
    root = data_folder(name, root)
    lists = {part: root / f"{part}.jsonl" for part in ("train", "val", "test")}
    lists = {part: path for part, path in lists.items() if path.is_file()}
    official = name in PREPARED or any(root.glob("*.tsv"))
    if official and not lists and not any(files_below(root, (".tar", ".tgz", ".tar.gz"))):
        raise UserError(f"{name} in {root} is not prepared yet: {prepare_command(name, root)}")

    def open_split(part):
        if lists:
            return Listed(lists[part]) if part in lists else None
        if part == "train":
            return TarShards(root / "train" if (root / "train").is_dir() else root)
        return TarShards(root / part) if (root / part).is_dir() else None

    data = open_split(split)
    if split in ("train", "val") and "test" not in lists and open_split("val") is None:
        whole = open_split("train")
        cut = len(whole) - min(HELD_OUT, len(whole) // 100)
        data = Subset(whole, range(cut) if split == "train" else range(cut, len(whole)))
    if data is None or not len(data):
        return None
    check_bad(data.bad, len(data) + sum(data.bad.values()), str(root))
    return data


def parts_of(data):
    """["coco", "coco", "cc3m"] of --data "coco*2+cc3m". UserError for what is none."""
    names = []
    for part in data.split("+"):
        name, star, times = part.strip().partition("*")
        if not name or (star and not (times.isdecimal() and int(times) > 0)):
            raise UserError(f"--data {data}: {part!r} is no NAME, or NAME*2 (a whole number)")
        if name in names or (name == "emoji" and data != "emoji"):
            raise UserError(f"--data {data}: {name} cannot be mixed in (again)")
        names += [name] * int(times or 1)
    return names


def training_folder(cfg, name):
    """--root, or FOLDER/NAME of several sets."""
    several = len(set(parts_of(cfg.data))) > 1
    return Path(cfg.root, name) if cfg.root and several else cfg.root


def training_set(cfg, image_size, long_tail=0.0, duplicates=0.0):
    """The captioned training set a Config names; with --keep, those samples of it."""
    if cfg.data == "emoji":
        from data.emoji import scenes
        data = scenes.EmojiScenes("train", cfg.scenes, image_size, cfg.seed, cfg.concepts,
                                  cfg.difficulty, cfg.noise, long_tail, duplicates)
    else:
        names = parts_of(cfg.data)
        parts = {name: open_captions(name, training_folder(cfg, name), "train") for name in names}
        for name, part in parts.items():
            if part is None:
                raise UserError(f"{name} has no captions to train on")
            if rank() == 0:
                whole = getattr(part, "dataset", part)
                print(f"{name}: {len(part):,} training images from {whole}")
        data = parts[names[0]] if len(names) == 1 else Mixture(names, [parts[n] for n in names])
    if not cfg.keep:
        return data
    return Subset(data, listed([data.key(i) for i in range(len(data))], cfg.keep))


def listed(keys, path):
    """The places in `keys` of those that a file lists, ascending. UserError when one is missing."""
    wanted = set(read_keys(path))
    missing = wanted - set(keys)
    if missing:
        raise UserError(f"--keep {path}: {len(missing):,} of its {len(wanted):,} keys are not in "
                        "the training set")
    return np.array([place for place, key in enumerate(keys) if key in wanted], int)


def evaluation_sets(cfg, image_size, split):
    """{name: set} of --eval-data (default: what belongs to --data); split "val", "test" or, for
    a linear probe, "train".

    Where no set has a validation split, what is held out of the training set serves.
    """
    parts = list(dict.fromkeys(parts_of(cfg.data)))
    names = cfg.eval_data or [name for name in parts if name in ("coco", "flickr30k")] or parts
    found = {}
    for name in names:
        if name == "emoji":
            found.update(emoji_sets(cfg, image_size, split))
        else:
            label = Path(name).name
            folder = training_folder(cfg, name) if name in parts else None
            if label != name or (Path(name).is_dir() and not (DATA / name).is_dir()):
                folder = name
            found[label] = open_evaluation(label, folder, split)
            if found[label] is None and folder == name and split == "test":
                raise UserError(f"--eval-data {name} has no test split: a list test.jsonl, or "
                                "shards in test/ (see data/README.md)")
    found = {name: data for name, data in found.items() if data is not None}
    if split == "val" and not found and cfg.data != "emoji":
        data = open_captions(parts[0], training_folder(cfg, parts[0]), "val")
        return {parts[0]: data} if data is not None else {}
    return found


def emoji_sets(cfg, image_size, split):
    """Zero-shot by concept; in the test also by group, and retrieval of whole scenes."""
    from data.emoji import scenes
    looks = {"concepts": cfg.concepts, "difficulty": cfg.difficulty}
    found = {"concept": scenes.EmojiClasses(split, image_size, "concept", **looks)}
    if split == "test":
        found["group"] = scenes.EmojiClasses(split, image_size, "group", **looks)
        found["retrieval"] = scenes.EmojiScenes(split, 1000, image_size, **looks)
    return found


def open_evaluation(name, root, split):
    """A set of classes or of captions in a split, None if it has no such split."""
    root = data_folder(name, root)
    if name in TORCHVISION:
        return TorchvisionSet(name, root, split) if split != "val" else None
    if name in PREPARED or any(root.glob("*.jsonl")) or any(files_below(root, ".tar")):
        return open_captions(name, root, split) if split != "train" else None
    if split == "val" and not ((root / "val").is_dir() and (root / "test").is_dir()):
        return None  # val/ serves as test
    return ImageFolder(root, split, imagenet=name == "imagenet")


def question_set(cfg, image_size, split):
    """The questions a Config names: about emoji scenes, 500 for "val" and "test", or on disk."""
    if cfg.data == "emoji":
        from data.emoji import scenes
        training = split == "train"
        return scenes.EmojiQuestions(split, cfg.scenes if training else 500, image_size,
                                     cfg.seed if training else 0, cfg.concepts, cfg.difficulty)
    root = data_folder(cfg.data, cfg.root)
    path = root / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{cfg.data}: no {path}: {prepare_command('vqav2', root)}")
    data = Listed(path)
    if data.kind != "questions":
        raise UserError(f"{path} holds no questions")
    check_bad(data.bad, len(data) + sum(data.bad.values()), str(root))
    return data


def loader_workers(cfg):
    """--workers -1: no extra process for the emoji scenes, else a share of the machine's cores."""
    if cfg.workers >= 0:
        return cfg.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return 0 if cfg.data == "emoji" else min(8, max(1, os.cpu_count() // local))


def example_images(sets, image_size, count, resize=resize_center_crop):
    """(up to count, 3, S, S) uint8 and a caption each, of the first captioned set; else None."""
    for data in sets.values():
        images, captions = [], []
        for i in range(len(data) if data.kind == "captions" else 0):
            with contextlib.suppress(BadSample):
                source, texts = data[i]
                images.append(torch.from_numpy(resize(source, image_size)))
                captions.append(texts[0])
            if len(images) == count:
                break
        if images:
            return torch.stack(images), captions
    return None


# -------------------------------------------------------------------------------------- loading


class Samples(Dataset):
    """A data set from which a whole batch is fetched at once, or a UserError in its place.

    Raised in a worker process, the error would come back as the text of a traceback.
    """

    def __getitems__(self, places):
        try:
            return [self[place] for place in places]
        except UserError as error:
            return error

    def __len__(self):
        return len(self.data)


class TrainSamples(Samples):
    """samples[(epoch, index)] -> image uint8 (3, S, S), tokens (context,), 1 if replaced, else 0.

    The crop and the choice among several captions depend on (seed, epoch, index) alone, not on
    workers or resuming. An unusable sample is replaced by the next one; UserError after 100.
    tokenizer: list of n strings -> int64 (n, context). augment: what happens to the crop, a
    function of (uint8 (3, S, S), rng).
    """

    def __init__(self, data, tokenizer, image_size, crop_scale, seed, augment=None):
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.image_size, self.crop_scale, self.augment = image_size, crop_scale, augment

    def __getitem__(self, place):
        return self.draw(place)[:3]

    def draw(self, place, captions=None):
        """image, tokens, bad; then the index of the sample it is and the number of its caption.

        captions: how many of a sample's captions may be drawn (None: all).
        """
        epoch, first = place
        for bad in range(100):
            index = (first + bad) % len(self.data)
            rng = np.random.default_rng((self.seed, epoch, index))
            try:
                source, texts = self.data[index]
                image = random_resized_crop(source, self.image_size, rng, self.crop_scale)
            except BadSample as error:
                reason = error
                continue
            caption = int(rng.integers(len(texts[:captions])))
            image = torch.from_numpy(image)
            if self.augment is not None:
                image = self.augment(image, rng)
            return image, self.tokenizer([texts[caption]])[0], int(bad > 0), index, caption
        raise UserError(f"100 samples in a row cannot be used, from {self.data.key(first)!r} on "
                        f"(last: {reason})")


class StepSampler(Sampler):
    """This rank's share of the global batches of steps start..steps - 1, lists of (epoch, index).

    Every epoch is a new permutation of the n samples, cut into global batches; the rest is
    dropped. Rank r takes each world-th sample of a batch, so the global batch is the same for any
    number of ranks. UserError when a batch is larger than the set or cannot be shared evenly.
    """

    def __init__(self, n, batch, steps, start, seed):
        if batch < 1 or batch % world_size():
            raise UserError(f"--batch-size {batch} cannot be shared evenly by {world_size()} "
                            "processes")
        if n < batch:
            raise UserError(f"the training set has {n} samples, fewer than one batch of {batch}: "
                            "lower --batch-size")
        self.n, self.batch, self.steps, self.start, self.seed = n, batch, steps, start, seed

    def __len__(self):
        return max(0, self.steps - self.start)

    def __iter__(self):
        current = None
        for step in range(self.start, self.steps):
            epoch, position = divmod(step, self.n // self.batch)
            if epoch != current:
                sequence = np.random.SeedSequence((self.seed, epoch))
                seed = int(sequence.generate_state(1, np.uint64)[0])
                generator = torch.Generator().manual_seed(seed)
                order, current = torch.randperm(self.n, generator=generator), epoch
            batch = order[position * self.batch:(position + 1) * self.batch]
            yield [(epoch, index) for index in batch[rank()::world_size()].tolist()]


class EvalSamples(Samples):
    """samples[i] -> (image uint8 (3, S, S), i, target), or None when it cannot be used."""

    def __init__(self, data, image_size, resize):
        self.data, self.image_size, self.resize = data, image_size, resize

    def __getitem__(self, i):
        try:
            source, target = self.data[i]
            return torch.from_numpy(self.resize(source, self.image_size)), i, target
        except BadSample:
            return None


class Loader(DataLoader):
    """A DataLoader that raises the UserErrors of its workers and leaves out empty batches."""

    def __iter__(self):
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            if len(batch[0]):
                yield batch


def train_loader(samples, sampler, workers, device):
    """Yields images uint8 (B, 3, S, S), tokens int64 (B, context), number of unusable samples.

    What `samples` returns beyond these three follows, stacked.
    """
    return Loader(samples, batch_sampler=sampler, num_workers=workers, collate_fn=collate_train,
                  worker_init_fn=ignore_ctrl_c, pin_memory=torch.device(device).type == "cuda",
                  persistent_workers=workers > 0)


def eval_loader(data, image_size, batch_size, workers, resize=resize_center_crop):
    """Yields images uint8 (b, 3, S, S), their indices in `data` and their targets, in order.

    Unusable samples are left out: the evaluation sees which indices are missing.
    """
    samples = EvalSamples(data, image_size, resize)
    return Loader(samples, batch_size=batch_size, num_workers=workers, collate_fn=collate_eval,
                  worker_init_fn=ignore_ctrl_c)


def ignore_ctrl_c(worker):
    """It reaches the whole process group; the main process ends the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate_train(batch):
    if isinstance(batch, UserError):
        return batch
    images, tokens, bad, *more = zip(*batch)
    tokens = trim_padding(torch.stack(tokens))
    return torch.stack(images), tokens, sum(bad), *map(torch.stack, more)


def collate_eval(batch):
    if isinstance(batch, UserError):
        return batch
    good = [sample for sample in batch if sample is not None]
    if not good:
        return (), (), ()
    images, indices, targets = zip(*good)
    return torch.stack(images), list(indices), list(targets)


def trim_padding(tokens, multiple=16):
    """(B, context) -> (B, n): without the columns of padding that none of the texts needs.

    A text tower that is causal and read at the end token, or that masks padding, gives the same
    features and gradients without them. n is a multiple: few shapes for torch.compile.
    """
    longest = int(tokens.any(0).nonzero().max()) + 1  # an end token is never 0, padding is
    return tokens[:, :math.ceil(longest / multiple) * multiple]


def check_bad(bad, seen, where):
    """Report unusable samples in one line. UserError when they are more than 10 % of those seen.

    bad: Counter by reason. What the web no longer has, or is left out on purpose, is only reported.
    """
    reasons = +bad
    lost = reasons[NOT_DOWNLOADED] + reasons[HELD_BACK]
    count = sum(reasons.values())
    if not count:
        return
    words = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
    line = f"{where}: {count:,} of {seen:,} samples cannot be used: {words}"
    if count - lost > 0.1 * (seen - lost):
        raise UserError(f"{line}; more than 10 % is too many (see data/README.md)")
    if rank() == 0:
        print(line)


def check_epoch(state, samples, name):
    """check_bad of what the processes met in an epoch; the count starts anew."""
    check_bad(collections.Counter(unreadable=total(state["bad"])), samples, name)
    state["bad"] = 0


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
    """One pass over a set: ({key: (N, D) float32}, its N targets).

    encoders as in evaluate(). Images that cannot be read are left out; UserError if all are.
    """
    features, targets = {key: [] for key in encoders}, []
    loader = batches(data, image_size, workers, "embedding", resize_center_crop, 128)
    for images, _, batch_targets in loader:
        for key, (encode_image, _) in encoders.items():
            features[key].append(encode_image(images).float())
        targets += batch_targets
    return {key: torch.cat(parts) for key, parts in features.items()}, targets


@torch.no_grad()
def embed_texts(encode_text, tokenizer, texts):
    """(T, D) float32 features of a list of strings."""
    features = []
    for tokens in tokenizer(texts).split(512):
        features.append(encode_text(trim_padding(tokens)).float())
    return torch.cat(features)


def evaluate(encoders, tokenizer, data, image_size, workers):
    """Zero-shot classification of a set of classes, retrieval on a set of captions, in percent.

    encoders: {key: (image encoder, text encoder)}, (B, 3, S, S) uint8 -> (B, D) and (T, context)
    token ids -> (T, D), of unit length; a key is any hashable. Returns {key: {metric: percent}}.
    Images that could not be read are left out and counted as "unreadable".
    """
    features, targets = embed_images(encoders, data, image_size, workers)
    scores = {}
    for key, (_, encode_text) in encoders.items():
        if data.kind == "classes":
            texts = zero_shot_classifier(encode_text, tokenizer, data.classes, data.templates)
            found = zero_shot(features[key], torch.tensor(targets), texts)
        else:
            texts = embed_texts(encode_text, tokenizer, list(itertools.chain(*targets)))
            found = retrieval(features[key], texts, owners(targets))
        scores[key] = found | unreadable(data, targets)
    return scores


def unreadable(data, read):
    """How many images of a set were left out, if any."""
    lost = len(data) - len(read)
    return {"unreadable": lost} if lost else {}


def score_sets(encoders, tokenizer, sets, image_size, workers):
    """evaluate() on each of {name: set}, as {key: {"<name>_<metric>": percent}}."""
    scores = {key: {} for key in encoders}
    for name, data in sets.items():
        for key, found in evaluate(encoders, tokenizer, data, image_size, workers).items():
            scores[key].update(prefixed(name, found))
    return scores


def prefixed(name, metrics):
    return {f"{name}_{metric}": value for metric, value in metrics.items()}


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

    texts = list(itertools.chain(*captions))
    encoded = [encode_text(texts[start:start + block]) for start in range(0, len(texts), block)]
    ids, text_features = map(torch.cat, zip(*encoded))
    both = torch.cat(features), text_features.float(), owners(captions)

    def match_image(i, places):
        source = states[i][None].to(places.device)
        return torch.cat([match(source, part) for part in ids[places].split(block)])

    by_cosine = prefixed("itc", retrieval(*both))
    return by_cosine | rerank(*both, match_image, k) | unreadable(data, captions)


STRENGTHS = tuple(10.0 ** exponent for exponent in range(-2, 7))


def linear_probe(train, test, classes, strengths=STRENGTHS):
    """{"top1" in percent, "C"} of L-BFGS logistic regression on frozen features.

    A split is (features (N, D), labels (N,)). The inverse regularisation (scikit-learn's C:
    minimise C * sum of losses + |W|^2 / 2) is chosen on every fifth training image, then all are
    fitted anew. UserError where features are no numbers.
    """
    def accuracy(model, x, y):
        return percent(model(x).argmax(1).cpu() == y)

    x, y = train
    if not x.isfinite().all():
        raise UserError("linear probe: an image has features that are no finite numbers")
    held = torch.arange(len(y)) % 5 == 4
    scores = {}
    for c in strengths:
        model = fit_logistic(x[~held], y[~held], classes, c)
        scores[c] = accuracy(model, x[held], y[held])
    best = max(scores, key=scores.get)
    return {"top1": accuracy(fit_logistic(x, y, classes, best), *test), "C": best}


def fit_logistic(x, y, classes, c):
    """Multinomial logistic regression, a torch.nn.Linear; the bias is not regularised."""
    y = y.to(x.device)
    model = torch.nn.Linear(x.shape[1], classes, device=x.device)
    model.weight.data.zero_()
    model.bias.data.zero_()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=1000,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        penalty = model.weight.square().sum() / (2 * c * len(x))
        loss = F.cross_entropy(model(x), y) + penalty
        loss.backward()
        return loss

    optimiser.step(closure)
    return model


def probe(encoders, cfg, image_size):
    """--linear-probe: {key: {"<set>_probe_top1", "<set>_probe_C"}} on each set of classes."""
    workers = loader_workers(cfg)
    scores = {key: {} for key in encoders}
    tests = evaluation_sets(cfg, image_size, "test")
    for name, data in evaluation_sets(cfg, image_size, "train").items():
        if data.kind == "classes":
            x, y = embed_images(encoders, data, image_size, workers)
            test_x, test_y = embed_images(encoders, tests[name], image_size, workers)
            for key in encoders:
                train = x[key], torch.tensor(y)
                test = test_x[key], torch.tensor(test_y)
                found = linear_probe(train, test, len(data.classes))
                scores[key].update(prefixed(f"{name}_probe", found))
    return scores


def test_checkpoint(cfg, size, encoders):
    """--evaluate: {key: {"<set>_<metric>": value}} of the test sets, with --linear-probe.

    The mean of several sets' zero-shot top-1 accuracies is added.
    """
    sets = evaluation_sets(cfg, size.image_size, "test")
    tokenizer = CLIPTokenizer(size.context_length, size.vocab_size)
    cells = score_sets(encoders, tokenizer, sets, size.image_size, loader_workers(cfg))
    for cell in cells.values():
        top1 = [value for name, value in cell.items() if name.endswith("_top1")]
        if len(top1) > 1:
            cell["mean_top1"] = sum(top1) / len(top1)
    if cfg.linear_probe:
        for key, found in probe(encoders, cfg, size.image_size).items():
            cells[key].update(found)
    return cells


def write_results(run, cfg, cells, state):
    """results.json, the table on stdout and curves.png; returns what results.json holds.

    cells: {label: {metric: value}}; state: the training loop's counters.
    """
    rows = read_csv(run.path("log.csv"))
    results = {
        "cells": cells,
        "seed": cfg.seed,
        "steps": state["step"],
        "best_step": state["best_step"],
        "best_validation": state["best"],
    }
    run.write_json("results.json", results)
    print_table(cells)
    plot_curves(run.path("curves.png"), rows, math.log(cfg.batch_size),
                f"{cfg.method} on {cfg.data}")
    return results


def throughput(encoders, image_size, device):
    """{key: images/s} of image encoders on 256 images of noise; encoders as in evaluate()."""
    shape = (256, 3, image_size, image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    functions = {key: encode_image for key, (encode_image, _) in encoders.items()}
    latency = compare_latency(functions, device, 5, images)
    return {key: 1000 * len(images) / milliseconds for key, milliseconds in latency.items()}


def compare_latency(functions, device, rounds=15, *inputs):
    """{key: milliseconds} of functions of the inputs: the median over the rounds.

    They take turns, so that a slow moment meets all; each is warmed up first; the device is
    synchronised before every reading of the clock.
    """
    device = getattr(torch, torch.device(device).type)  # torch.cuda, torch.mps or torch.cpu
    times = {key: [] for key in functions}
    with torch.inference_mode():
        for _ in range(2 + rounds):
            for key, function in functions.items():
                start = time.perf_counter()
                function(*inputs)
                device.synchronize()
                times[key].append(1000 * (time.perf_counter() - start))
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


def ptb_tokenize(text):
    """Lower-cased tokens of a caption without punctuation: "A dog's bowl." -> "a dog 's bowl".

    An approximation, without Java, of COCO's caption tokenizer: equal to it on all 795 captions of
    coco_mini. Like it, it splits contractions (do n't, can not), keeps compounds (black-and-white,
    and/or), abbreviations (st.), symbols and runs such as !!, writes brackets as -lrb-, and joins
    "22 3/4" by a no-break space. Not treated: HTML entities, phone numbers, rare contractions.
    """
    text = re.sub(rf"’(?=(?:n’)?t\b|{CLITIC})", "'", text, flags=re.IGNORECASE)
    return " ".join(token.lower().translate(SPELLED) for token in PTB_TOKEN.findall(text))


def count_ngrams(sentence):
    """How often each n-gram occurs in a sentence, for n = 1, 2, 3, 4: a list of four Counters."""
    words = sentence.split()
    shifted = [words[i:] for i in range(4)]
    return [collections.Counter(zip(*shifted[:n])) for n in (1, 2, 3, 4)]


def bleu(references, hypotheses):
    """BLEU-1, -2, -3 and -4 of a corpus (Papineni et al. 2002, section 2), as in pycocoevalcap.

    BLEU-n = exp(min(0, 1 - r/c)) (p_1 ... p_n)^(1/n), in 0..1. p_n: n-grams of the hypotheses that
    a reference has, each counted at most as often as in one reference, over all n-grams of the
    hypotheses. c: words of the hypotheses; r: words of the references closest in length, the
    shorter one of two. references: N lists of R strings; hypotheses: N strings.
    """
    matched, total = np.zeros(4), np.zeros(4)
    closest = 0
    for refs, hypothesis in zip(references, hypotheses, strict=True):
        words = len(hypothesis.split())
        distances = [(abs(len(ref.split()) - words), len(ref.split())) for ref in refs]
        closest += min(distances)[1]
        ref_counts = [count_ngrams(ref) for ref in refs]
        for n, counts in enumerate(count_ngrams(hypothesis)):
            total[n] += counts.total()
            for gram, count in counts.items():
                matched[n] += min(count, max(c[n][gram] for c in ref_counts))

    # pycocoevalcap's 1e-15 and 1e-9 stand for zeros: nothing matched gives a score close to 0.
    precisions = (matched + 1e-15) / (total + 1e-9)
    ratio = (total[0] + 1e-15) / (closest + 1e-9)
    means = np.cumprod(precisions) ** (1 / np.arange(1, 5))
    return means * np.exp(min(0, 1 - 1 / ratio))


def cider_d(references, hypotheses):
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
            penalty = math.exp(-difference ** 2 / 72)
            for h, r in zip(map(weigh, counts), map(weigh, ref)):
                dot = sum(min(h[gram], r[gram]) * r[gram] for gram in h if gram in r)
                norms = math.hypot(*h.values()) * math.hypot(*r.values())
                scores[i] += penalty * dot / (norms or 1)
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


def normalize_answer(answer):
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


def vqa_accuracy(answer, human_answers):
    """Accuracy of one answer (Antol et al. 2015, section 3), 0..1: min(people who gave it / 3, 1).

    As in the official evaluation, averaged over leaving out each of the human answers (10 in VQA,
    at least one here: fewer than 4 cannot reach 1); normalised only where the humans disagree.
    """
    answer, *humans = [text.strip() for text in (answer, *human_answers)]
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
                kind, accuracy = data.question_kinds[i], 100 * vqa_accuracy(text, humans)
                accuracies["accuracy"].append(accuracy)
                if kind:
                    accuracies[f"accuracy_{kind}"].append(accuracy)
    scores = {name: np.mean(values) for name, values in sorted(accuracies.items())}
    return results, scores | unreadable(data, results)


# --------------------------------------------------------------------------------------- pictures


def print_table(cells, markdown=None):
    """{row: {column: number or text}} as a table on stdout, and as markdown in a file."""
    columns = list(dict.fromkeys(itertools.chain(*cells.values())))
    rows = [["", *columns]]
    for name, cell in cells.items():
        rows.append([name, *(shown(cell.get(column)) for column in columns)])
    if len(columns) > 7:  # too wide for a terminal: turn it
        rows = list(zip(*rows))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(*map(str.rjust, row, widths), sep="  ")
    if markdown:
        rows.insert(1, ["---"] * len(widths))
        text = "".join("| " + " | ".join(row) + " |\n" for row in rows)
        replace_file(markdown, lambda new: new.write_text(text, "utf-8"))


def shown(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.{int(abs(value) < 1000)}f}"


def mean_std(runs):
    """[{metric: value}] over seeds -> {metric: "mean ± std"}; the std is the sample's."""
    table = {}
    for metric in runs[0]:
        values = np.array([run[metric] for run in runs], float)
        digits = 4 if 0 < abs(values).max() < 0.1 else 1
        table[metric] = f"{values.mean():.{digits}f}"
        if len(runs) > 1:
            table[metric] += f" ± {values.std(ddof=1):.{digits}f}"
    return table


# a `$` in a caption is no formula
STYLE = {"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 150,
         "savefig.bbox": "tight"}


def picture(draw):
    """Guards a function that draws into `path`: what goes wrong is a line, never a run's end."""
    @functools.wraps(draw)
    def guarded(path, *args, **kwargs):
        os.environ.pop("MPLBACKEND", None)  # a notebook's may be missing here; all are files
        try:
            import matplotlib

            with matplotlib.rc_context(STYLE), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # letters that the font lacks
                draw(path, *args, **kwargs)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"could not draw {Path(path).name}: {reason}")
    return guarded


def new_figure(rows, columns, size, title):
    """A figure of `size` inches and its axes (rows, columns); no pyplot, so no backend is asked."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="compressed")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False)


def fold(text, width):
    """The lines of a text, each over at most four lines of `width` letters."""
    lines = [textwrap.fill(line, width, max_lines=4, placeholder=" …") for line in text.split("\n")]
    return "\n".join(lines)


@picture
def plot_grid(path, rows, names, captions, title):
    """Rows of images (3, S, S) uint8, names at the left, captions above the first images.

    The captions follow the rows, one an image; a line that is broken in a caption stays so.
    """
    captions = [fold(caption, 26) for caption in captions]
    above = max((caption.count("\n") + 1 for caption in captions), default=0)
    columns = max(map(len, rows))
    size = 2 * columns + 2, (2 + 0.15 * above) * len(rows) + 1
    figure, axes = new_figure(len(rows), columns, size, title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for line, images, name in zip(axes, rows, names):
        line[0].set_ylabel(fold(name, 24), rotation=0, ha="right", va="center", fontsize=12)
        for axis, image in zip(line, images):
            axis.imshow(image.permute(1, 2, 0).cpu())
    for axis, caption in zip(axes.flat, captions):
        axis.set_title(caption, loc="left", fontsize=9)
    figure.savefig(path)


@picture
def plot_captions(path, images, captions, title):
    """Images (n, 3, S, S) uint8; above each its captions, of {who: n strings}."""
    above = []
    for texts in zip(*captions.values()):
        above.append("\n".join(f"{who}: {text}" for who, text in zip(captions, texts)))
    rows = images.split(4)
    plot_grid(path, rows, [""] * len(rows), above, title)


def overlay(images, attention):
    """Images (n, 3, S, S) uint8, dark but where attention (n, g, g) is, on a scale of its own."""
    light = F.interpolate(attention[:, None].float().cpu(), images.shape[-2:], mode="bicubic")
    light = light - light.amin((2, 3), keepdim=True)
    light = light / light.amax((2, 3), keepdim=True).clamp(min=1e-12)
    return (images.cpu() * (0.15 + 0.85 * light)).to(torch.uint8)


@picture
def draw_retrieval(path, encoders, tokenizer, sets, image_size):
    """For six captions of the first captioned set, if any, the five best of 64 images.

    encoders: (image encoder, text encoder), as evaluate() takes them.
    """
    examples = example_images(sets, image_size, 64)
    if examples:
        images, captions = examples
        encode_image, encode_text = encoders
        with torch.no_grad():
            scores = encode_text(tokenizer(captions)) @ encode_image(images).T
        rows, marks = [], []
        for text, best in enumerate(scores.topk(min(5, len(images))).indices.tolist()):
            rows.append(images[best])
            marks += ["✓ its own" if image == text else "" for image in best]
        title = f"the best of {len(images)} images for each caption"
        plot_grid(path, rows[:6], captions, marks, title)


@picture
def plot_curves(path, rows, chance, title):
    """Losses (with ln(batch), chance, if given) and validation metrics of log.csv, by epoch."""
    figure, (axes,) = new_figure(1, 2, (11, 4.5), title)
    if chance:
        axes[0].axhline(chance, color="grey", ls=":", label="chance of one NCE, ln(batch)")
    for axis, wanted, ylabel in zip(axes, (LOSSES, "val_"), ("loss", "validation, %")):
        for column in rows[0]:
            logged = [row for row in rows if row[column]]
            if logged and column.startswith(wanted) and column != "kd_weight":
                epochs = [float(row["epoch"]) for row in logged]
                values = [float(row[column]) for row in logged]
                axis.plot(epochs, values, ".-", ms=2, label=column)
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.legend(fontsize=9)
    figure.savefig(path)


@picture
def plot_sweet_spot(path, series):
    """{label: [(κ in training, relative throughput, [score per seed])]}: means and stds."""
    figure, (axes,) = new_figure(1, 2, (13, 5), "")
    for label, points in series.items():
        keep_rates, speeds, scores = zip(*sorted(points))
        means = [np.mean(values) for values in scores]
        stds = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in scores]
        for axis, x in zip(axes, (speeds, keep_rates)):
            axis.errorbar(x, means, stds, label=label, marker="o", capsize=3)
    axes[0].set(xlabel="measured throughput, 1 at κ = 1", ylabel="test score, %")
    axes[1].set(xlabel="κ in training")
    axes[1].invert_xaxis()
    axes[1].legend()
    figure.savefig(path)
