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
import csv
import dataclasses
import datetime
import functools
import gc
import gzip
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tarfile
import textwrap
import time
import traceback
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from data.emoji import scenes

DATA = Path(__file__).resolve().parent / "data"


# --------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user gave cannot be used: run_main prints this line; exit code 2."""


class BadSample(Exception):
    """One sample cannot be used (corrupt image, no caption): it is skipped and counted."""


def run_main(main, argv=None):
    """Call main(argv) and return the exit code.

    0: done. 1: diverged, or a fault of ours. 2: what the user gave, or a file, cannot be used: one
    line on stderr. 130: Ctrl-C or SIGTERM.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(errors="replace")  # a console without κ or ± must not end a run
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt
    try:
        main(argv)
        return 0
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # no later flush fails
        return 1
    except (Exception, KeyboardInterrupt) as error:
        told = isinstance(error, (UserError, OSError, FloatingPointError, KeyboardInterrupt))
        # torch's "DataLoader ...": one of its processes has died, or hangs
        if not told and not str(error).startswith("DataLoader "):
            traceback.print_exc()  # a fault of ours
            return 1
        print(f"{Path(sys.argv[0]).name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return {FloatingPointError: 1, KeyboardInterrupt: 130}.get(type(error), 2)
    finally:
        gc.collect()  # the loader that an error has left: the exit would wait for its processes
        if dist.is_initialized():
            dist.destroy_process_group()


def import_torchvision():
    """The torchvision module, also where it is a CUDA build beside a CPU-only torch.

    PyPI has no CPU build of torchvision. Beside a CPU-only torch its compiled operators do not
    load, and Python code that only describes their shapes then fails with "operator
    torchvision::nms does not exist". Declaring the schemas it looks for is enough: this project
    calls none of those operators.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # the schemas live as long as this object
        import torchvision
    return torchvision


# --------------------------------------------------------------------------------- command line


def option(default, help, allowed=None, section=None):
    """A dataclass field that is also a command-line flag.

    allowed: a list of choices, or (least, most) of a number, else from 0 on. section: opens a new
    group in --help.
    """
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed,
                                                        "section": section})


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
    given = known_fields(config_class, vars(parser.parse_args(argv)))
    for field in fields:
        values = given.get(field.name)
        for value in values if isinstance(values, tuple) else (values,):
            check_value(field, value)
    return given


def argument(field):
    """What argparse wants to know of a field."""
    default, allowed = field.default, field.metadata["allowed"]
    settings = {"help": field.metadata["help"].replace("%", "%%")}
    if isinstance(default, tuple):
        settings["nargs"], default = "+", " ".join(map(str, default))
    if default not in (None, ""):
        settings["help"] += f" [{default}]"
    kind = getattr(field.type, "__args__", (field.type,))[0]  # of `float | None`, `tuple[float]`
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif isinstance(allowed, list):
        settings["choices"] = allowed
    else:
        settings.update(type=kind, metavar=kind.__name__.upper())
    return settings


def check_value(field, value):
    """UserError for a text that is empty, as a shell variable that is not set, and for a number
    outside of its range: by default from 0 on, of counts from 1 unless the default is lower."""
    if value == "":
        raise UserError(f"{flag(field.name)} is empty")
    if type(value) not in (int, float):  # a bool is an int as well
        return
    default = 0 if isinstance(field.default, tuple) else field.default or 0
    least, most = field.metadata["allowed"] or (min(default, isinstance(value, int)), 1e12)
    if not least <= value <= most:
        raise UserError(f"{flag(field.name)} {value:g}: must be from {least:g} to {most:g}")


def known_fields(config_class, values):
    """Those of the values that are fields of the dataclass; lists of json or argparse as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items() if hasattr(config_class, name)}


@dataclass
class RunConfig:
    """The options that the three scripts have in common: on what, where and how often it runs."""

    data: str = option("emoji", "training data, with its recipe: emoji, a set of data/README.md, "
                       "several as coco*2+vg, or any name with --root FOLDER", section="run")
    root: str | None = option(None, "folder of the data (default data/NAME)")
    keep: str | None = option(None, "train on the samples of this file of keys, one a line")
    out: str | None = option(None, "run folder (default: below runs/)")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    eval_data: tuple[str, ...] = option((), "evaluation sets, names or folders (default: --data's)")
    ablate: tuple[str, ...] = option((), "train and tabulate these arms (names in quotes, or all)")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the ablation")
    jobs: int = option(1, "runs of the ablation at a time: one a core, or one a GPU")
    seed: int = option(0, "seed of weights, data order and augmentation", (0, 1e9))
    device: str = option("auto", "auto, cuda, mps or cpu")
    workers: int = option(-1, "loader processes (-1: none for emoji, else up to 8 a process)")
    log_every: int = option(20, "steps between rows of log.csv")


# Flags that may differ when a run goes on.
FREE = "out resume root cache device workers log_every seeds ablate jobs".split()


def fill_config(config_class, recipe, given, folder):
    """The Config: defaults <- recipe <- flags given; of a run that --resume continues, as saved.

    recipe, given: {field: value}; folder: the default of --out. UserError when a flag contradicts
    the run being resumed.
    """
    out, saved = given.get("out", folder), {}
    path = Path(out, "config.json")
    if given.get("resume") and path.is_file():
        try:
            config = read_json(path)["config"]
            saved = known_fields(config_class, config)
            if saved.keys() != config.keys():  # another script's, or an older one's
                raise KeyError
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path} holds no config of this script: take another --out") from None
    for name, value in given.items():
        if name not in FREE and saved.get(name, value) != value:
            raise UserError(f"{flag(name)} {value}: the run in {out} was started with "
                            f"{saved[name]}; give that, or take another --out")
    return config_class(**{**recipe, **saved, **given, "out": out})


# ------------------------------------------------------------------------ devices and processes


def world_size():
    """How many processes torchrun started; one where only some of its variables are left over."""
    launched = all(map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR")))
    return int(os.environ["WORLD_SIZE"]) if launched else 1


def rank():
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def say(text):
    """Print a line, once for all processes."""
    if rank() == 0:
        print(text)


def start_device(name, seed):
    """Join the processes torchrun started, pick the device (auto: CUDA, else MPS, else CPU), seed.

    Products of float32 matrices stay exact: nothing here allows TF32, so that the logits of every
    loss are float32 also on CUDA, where the towers run in bf16 by default.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        if name == "cuda":
            torch.cuda.set_device(rank() % torch.cuda.device_count())
        torch.empty(1, device=name)
    except Exception:  # of many types
        raise UserError(f"--device {name}: not available here; try --device auto") from None
    if world_size() > 1 and not dist.is_initialized():
        hours = datetime.timedelta(hours=3)  # the other processes wait while rank 0 evaluates
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=hours)
    torch.manual_seed(seed)
    return torch.device(name)


def mixed_precision(precision, device):
    """The autocast context of --precision and a GradScaler (idle except for fp16)."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    amp = torch.autocast(device.type, dtype, enabled=dtype is not None)
    return amp, torch.amp.GradScaler(device.type, enabled=precision == "fp16")


class Gather(torch.autograd.Function):
    """(b, D) on each process -> (B, D) on all; the gradient is summed over the processes, of which
    each takes its own rows. b is the same on all."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return sum_over_processes(grad.contiguous()).chunk(world_size())[rank()]


def gather(x):
    """Every process's rows of x, with gradient to each of them: (b, D) -> (B, D)."""
    return Gather.apply(x) if world_size() > 1 else x


def sum_over_processes(x):
    """x, in place, summed over the processes."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def average_gradients(parameters):
    """Replace each gradient by its mean over the processes. One all-reduce adds them all up, in a
    vector that the gradients then are parts of."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world_size() > 1:
        total = sum_over_processes(parameters_to_vector(gradients))
        vector_to_parameters(total / world_size(), gradients)


def mean_over_processes(terms):
    """{name: scalar tensor} -> {name: float}, their means; waits for the device once."""
    values = torch.stack([value.float() for value in terms.values()])
    values = sum_over_processes(values) / world_size()
    return dict(zip(terms, values.tolist()))


def gather_objects(thing):
    """[the thing each process holds], in order of rank."""
    things = [thing] * world_size()
    if world_size() > 1:
        dist.all_gather_object(things, thing)
    return things


def on_first(work):
    """work() on rank 0 while the others wait; all return its result."""
    return gather_objects(work() if rank() == 0 else None)[0]


# ----------------------------------------------------------------------------------- run folder

SAVE_EVERY = 500  # steps between checkpoints; one is also saved after every epoch


def replace_file(path, write):
    """write(temporary path), then rename: nobody ever reads half a file. UserError if it fails."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, RuntimeError) and shutil.disk_usage(temporary.parent).free < 2 ** 20:
            reason = "no space left"  # which torch.save does not say
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {reason}") from error


@contextmanager
def writing(path):
    """UserError, naming the file, where what happens inside cannot be written to it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def write_text(path, text):
    replace_file(path, lambda new: new.write_text(text, "utf-8", errors="surrogateescape"))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_keys(path, keys):
    """Sample keys, one a line."""
    write_text(path, "\n".join(keys) + "\n")


def read_text(path, **options):
    return Path(path).read_text("utf-8-sig", **options)


def read_json(path, **options):
    """What a json file holds. UserError, naming the file, when it is damaged."""
    try:
        return json.loads(read_text(path), **options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid json: {error}") from None


def read_keys(path):
    """Sample keys, one a line."""
    return read_text(path, errors="surrogateescape").rstrip("\n").split("\n")


def read_csv(path):
    """The rows of a log.csv; what a power cut left of the last one is passed over, as any that
    has not a cell a column."""
    text = read_text(path, errors="replace").replace("\0", "")
    return [row for row in csv.DictReader(text.splitlines(), restval="?")
            if row.get("step", "").isdecimal() and None not in row and "?" not in row.values()]


def environment():
    """git commit, version, hardware and command, for config.json."""
    return {
        "commit": subprocess.getoutput(
            f'git -C "{DATA.parent}" describe --always --dirty 2>{os.devnull}'),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": world_size(),
        "command": shlex.join(sys.argv),
    }


class Run:
    """A run folder: config.json, log.csv, last.pt, best.pt, results.json and pictures.

    log.csv holds only what a rerun reproduces to the digit. Only rank 0 writes. UserError when the
    folder holds a run that is not to be resumed. size: of the model, a dataclass.
    """

    def __init__(self, cfg, size, columns):
        self.folder, self.cfg, self.size, self.columns = Path(cfg.out), cfg, size, columns
        if rank() == 0 and (self.folder / "config.json").exists() and not cfg.resume:
            raise UserError(f"{cfg.out} holds a run: go on with --resume, or choose another --out")

    def write_config(self):
        """config.json, unless the run that goes on has left it."""
        path = self.folder / "config.json"
        if rank() == 0 and not path.exists():
            write_json(path, {"config": asdict(self.cfg), "environment": environment()})

    def start(self, step):
        """config.json and log.csv; later rows of an interrupted run are dropped."""
        self.write_config()
        if rank() > 0:
            return
        path = self.folder / "log.csv"
        rows = read_csv(path) if path.exists() else []
        lines = [self.columns, *(row.values() for row in rows if int(row["step"]) <= step)]
        write_text(path, "".join(",".join(cells) + "\n" for cells in lines))

    def log(self, row):
        """Append a row to log.csv; absent columns stay empty."""
        cells = [f"{row[name]:.8g}" if name in row else "" for name in self.columns]
        if rank() == 0:
            path = self.folder / "log.csv"
            with writing(path), open(path, "a") as file:
                file.write(",".join(cells) + "\n")

    def save(self, name, content):
        """torch.save, atomic: a crash while writing leaves the previous checkpoint whole."""
        if rank() == 0:
            replace_file(self.folder / name, lambda temporary: torch.save(content, temporary))

    def load_state(self, samples, **parts):
        """The loop's counters at the last checkpoint, its tensors loaded into the parts.

        A run that starts, or whose first checkpoint is still to come, gets fresh counters. parts:
        model, optimiser, scaler. UserError when the checkpoint is damaged, or when the samples, a
        TrainSamples, are no longer those it was trained on (so far as their number and digest say).
        """
        path, self.parts = self.folder / "last.pt", parts
        found = [len(samples), samples.data.digest]
        if not (self.cfg.resume and path.exists()):
            return {"step": 0, "best": -1.0, "best_step": 0, "bad": 0, "samples": found}
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state = saved["state"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        except Exception:  # the reader raises errors of many types on damaged files
            raise UserError(f"{path} is damaged or of another model: delete it, and this training "
                            "starts anew") from None
        if state["samples"] != found:
            raise UserError(f"--resume: the {found[0]:,} training samples are not those of the run "
                            f"in {self.folder}: take another --out")
        if rank() > 0:
            state["bad"] = 0  # rank 0 holds the sum
        return state

    def save_model(self, name, model):
        """The model alone, to load it from."""
        self.save(name, checkpoint(model, self.cfg, self.size))

    def keep_best(self, score, state, model):
        """best.pt: the model, where its validation score is the best so far."""
        if score > state["best"]:
            state["best"], state["best_step"] = score, state["step"]
            self.save_model("best.pt", model)

    def save_state(self, state):
        """last.pt: the tensors of load_state's parts, the loop's counters and the config.

        Random numbers need no state: they are seeded by (seed, step, sample). Raises
        FloatingPointError instead when a weight is not finite, so the last good one stays.
        """
        state = {**state, "bad": sum(gather_objects(state["bad"]))}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(tensor.isfinite().all() for tensor in states["model"].values()):
            raise FloatingPointError(f"a weight is not finite at step {state['step']}: {DIVERGED}")
        content = checkpoint(self.parts["model"], self.cfg, self.size)
        self.save("last.pt", {**content, **states, "state": state})


def checkpoint(model, cfg, size):
    """What our checkpoint files hold."""
    return {"model": model.state_dict(), "config": asdict(cfg), "size": asdict(size)}


DIVERGED = "lower --lr or use --precision fp32 (a checkpoint saved before it diverged is kept)"


def log_row(state, steps_per_epoch, now, terms, logit_scale):
    """The row of log.csv: the one place where the host waits for the device.

    now: the schedules' values; terms: {name: scalar tensor}; logit_scale: its logarithm, a
    parameter. FloatingPointError when the loss is not finite.
    """
    row = {"step": state["step"], "epoch": state["step"] / steps_per_epoch, **now,
           **mean_over_processes(terms), "logit_scale": logit_scale.exp().item()}
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(f"the loss is {row['loss']} at step {state['step']}: {DIVERGED}")
    return row


class Progress(tqdm):
    """Images done, images/s and the time left: on a terminal all the time, in the line of each
    logged row everywhere."""

    def __init__(self, cfg, state, steps, steps_per_epoch):
        self.cfg, self.steps, self.steps_per_epoch = cfg, steps, steps_per_epoch
        terminal = rank() == 0 and sys.stderr.isatty()
        super().__init__(total=steps * cfg.batch_size, initial=state["step"] * cfg.batch_size,
                         unit=" images", ncols=0, file=None if terminal else open(os.devnull, "w"))

    def count(self, state, bad):
        """Count a step with so many unusable samples. Returns whether an epoch ends with it,
        whether it gets a row in log.csv, and whether a checkpoint."""
        state["step"] += 1
        state["bad"] += bad
        self.update(self.cfg.batch_size)
        step = state["step"]
        epoch_ends = step % self.steps_per_epoch == 0 or step == self.steps
        logs = epoch_ends or step % self.cfg.log_every == 0
        return epoch_ends, logs, epoch_ends or step % SAVE_EVERY == 0

    def show(self, row):
        """Print a row of log.csv."""
        metrics = " ".join(f"{name} {value:.6g}" for name, value in row.items())
        if rank() == 0:
            self.write(f"{metrics} | {self}")
            sys.stdout.flush()


class StopRequest:
    """A first Ctrl-C or SIGTERM is noted for the end of the step, a second interrupts at once."""

    SIGNALS = signal.SIGINT, signal.SIGTERM

    def __enter__(self):
        self.asked = False
        for signum in self.SIGNALS:
            signal.signal(signum, self.note)
        return self

    def note(self, signum, frame):
        self.asked = True
        self.__exit__()

    def agreed(self, synchronise):
        """Whether to stop now; several processes agree on it where `synchronise` is true."""
        return (synchronise or world_size() == 1) and any(gather_objects(self.asked))

    def __exit__(self, error="", *_):  # note() calls it as well, and is no end
        for signum in self.SIGNALS:
            signal.signal(signum, signal.default_int_handler)  # raises KeyboardInterrupt
        if self.asked and error is None:  # in the last step, or behind it
            raise KeyboardInterrupt("stopped behind the last step; --resume makes the rest")


# ------------------------------------------------------------------------------------- ablation


def run_arms(cfg, given, arms, baselines, first=()):
    """--ablate: run each arm that is not done as a command of its own, then tabulate all that are.

    given: the flags of this command; arms: {name: {field: value}}, what an arm changes in them;
    cfg.ablate: names of arms, or "all"; baselines: the arms that all are compared with; first:
    [{field: value}] of commands whose work the arms share. Arm and seed have a folder of their own,
    so an interrupted ablation goes on. Writes table.md, and difference_to_BASELINE.md of each
    baseline that was run. Returns {arm: [results.json of each seed]}.
    """
    for name in "method filter stage evaluate seed".split():
        if name in given:
            raise UserError(f"{flag(name)}: not with --ablate, whose arms have one each")
    if world_size() > 1:
        raise UserError("--ablate: not under torchrun; --jobs runs several arms at a time")
    script = sys.modules[type(cfg).__module__].__file__
    for name, fields in arms.items():  # UserError where one was run with other settings
        for folder in Path(cfg.out, name.replace(" ", "_")).glob("seed*"):
            settings = {**vars(cfg), **fields, "resume": True, "out": folder}
            del settings["seed"]
            fill_config(type(cfg), {}, settings, folder)
    alone = {name: value for name, value in given.items()
             if name not in ("ablate", "seeds", "jobs")}
    commands = []
    for seed in cfg.seeds:
        for name in arms if "all" in cfg.ablate else cfg.ablate:
            if name not in arms:
                raise UserError(f"--ablate {name!r}: no such arm; there are {['all', *arms]}")
            out = Path(cfg.out, name.replace(" ", "_"), f"seed{seed}")
            fields = {**alone, **arms[name], "seed": seed, "out": out}
            if not (out / "results.json").is_file() and fields not in commands:
                commands.append(fields)
    if commands:
        run_commands(script, [{**alone, **fields} for fields in first], cfg.jobs)
        run_commands(script, commands, cfg.jobs)
    found = {}
    for name in arms:
        for path in Path(cfg.out, name.replace(" ", "_")).glob("seed*/results.json"):
            found.setdefault(name, []).append(read_json(path))

    print_table(over_seeds(found), Path(cfg.out, "table.md"))
    for arm in baselines:
        if arm in found:
            print(f"\ndifference to {arm!r}, subtracted seed by seed (in how many it is positive)")
            path = Path(cfg.out, f"difference_to_{arm.replace(' ', '_')}.md")
            print_table(over_seeds(found, found[arm]), path)
    print(f"tables and runs: {cfg.out}")
    return found


def run_commands(script, commands, jobs):
    """Run a script with each of [{field: value}], `jobs` at a time.

    One job a GPU, or an equal share of the CPU's threads a job. UserError when a command fails,
    KeyboardInterrupt after Ctrl-C, which the running commands get as well: they save and end first.
    """
    waiting, gpus = iter(commands), torch.cuda.device_count()

    def work(slot):
        variable, value = "OMP_NUM_THREADS", torch.get_num_threads() // jobs or 1
        if gpus:
            variable, value = "CUDA_VISIBLE_DEVICES", slot % gpus
        for fields in waiting:  # the threads share it: who is free takes the next
            process = start_command(script, fields, variable, value)
            try:
                end_command(process, fields)
            except UserError:
                list(waiting)  # nobody takes another
                raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(work, range(jobs)))
        finally:
            list(waiting)  # nobody takes another after Ctrl-C


def start_command(script, fields, variable, value):
    """Start a script with {field: value}, output in OUT/output.txt -> subprocess.Popen.

    variable, value: what of the machine it may use. The printed command carries them, so that typed
    alone it gives the same digits. It is none of torchrun's processes.
    """
    words = [script, *to_flags({**fields, "resume": True})]
    print(f"running {variable}={value} {shlex.join(['python', *words])}", flush=True)
    output = fields["out"] / "output.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w") as file:
        return subprocess.Popen([sys.executable, *words], stdout=file, stderr=file,
                                env={**os.environ, variable: str(value), "RANK": ""})


def end_command(process, fields):
    """Wait for a command. UserError, with the last line of its output, when it failed."""
    if process.wait():
        output = read_text(fields["out"] / "output.txt", errors="replace")
        last = output.strip().rpartition("\n")[2]
        raise UserError(f"{fields['out']} failed, the rest is not run: {last}")


def to_flags(fields):
    """{"keep_rate": 0.7, "fuse": False} -> ["--keep-rate", "0.7", "--no-fuse"]"""
    words = []
    for name, value in fields.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            values = value if isinstance(value, tuple) else [value]
            words += [flag(name), *map(str, values)]
    return words


def over_seeds(found, baseline=()):
    """{"arm: cell": {metric: "mean ± std"}}, of differences with " (positive/seeds)"; the std is
    the sample's.

    found: {arm: [results.json]}, each with its seed; baseline: the runs of the arm whose first
    cell is subtracted, seed by seed; what it lacks is left out.
    """
    base = {run["seed"]: next(iter(run["cells"].values())) for run in baseline}
    missing = math.nan if baseline else 0.0
    table = {}
    for arm, runs in found.items():
        for cell, metrics in runs[0]["cells"].items():
            table[f"{arm}: {cell}"] = row = {}
            for metric in metrics:
                x = np.array([run["cells"][cell][metric]
                              - base.get(run["seed"], {}).get(metric, missing) for run in runs])
                x = x[~np.isnan(x)]
                if len(x):
                    row[metric] = shown(x.mean())
                    if len(x) > 1:
                        row[metric] += f" ± {shown(x.std(ddof=1))}"
                    if baseline:
                        row[metric] += f" ({sum(x > 0)}/{len(x)})"
    return table


# ---------------------------------------------------------------------------------- checkpoints

@dataclass(frozen=True)
class Size:
    """What a CLIP's tensors and inputs look like: all that a model is built from. The defaults are
    the demo's."""

    image_size: int = 40  # pixels, as patch_size
    patch_size: int = 8
    vision_width: int = 96
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 384  # hidden width of the MLPs
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 4
    context_length: int = 24  # tokens of a text, start and end included
    vocab_size: int = 4096
    embed_dim: int = 64  # width of the joint embedding
    act: str = "gelu"  # or "quick_gelu"
    mean: tuple = (0.485, 0.456, 0.406)  # of the channels of pixels from 0 to 1: ImageNet's, SLIP's
    std: tuple = (0.229, 0.224, 0.225)

    def pixel_statistics(self, device):
        """Mean and standard deviation of pixels from 0 to 255, (2, 3, 1, 1)."""
        return 255 * torch.tensor([self.mean, self.std], device=device).view(2, 3, 1, 1)

    def tokenizer(self):
        return CLIPTokenizer(self.context_length, self.vocab_size)


OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
VIT_B32 = Size(image_size=224, patch_size=32, vision_width=768, vision_layers=12, vision_heads=12,
               vision_mlp=3072, text_width=512, text_layers=12, text_heads=8, context_length=77,
               vocab_size=49408, embed_dim=512, act="quick_gelu")
PRESETS = {
    "tiny": Size(image_size=16, vision_width=16, vision_layers=2, vision_heads=2, vision_mlp=32,
                 text_width=16, text_layers=1, text_heads=2, embed_dim=16),  # for tests
    "demo": Size(),
    "demo64": Size(image_size=64),
    # 0.7 of the demo's multiply-adds: the rival, not pruned, of a pruned demo
    "slim": Size(vision_width=80, vision_mlp=320),
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
    """The Checkpoint in a .pt, .bin or .safetensors file, or in one of OpenAI's archives; of None
    None.

    Nothing in the file is executed. The weights are as stored, but out of their wrapper and
    without what DataParallel and torch.compile put into names. UserError: no checkpoint.
    """
    if path is None:
        return None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        weights = content = read_content(path)
        for wrapper in ("model", "state_dict", "model_state_dict"):
            weights = weights.get(wrapper, weights)
        weights = {name.replace("_orig_mod.", "").removeprefix("module."): tensor.detach()
                   for name, tensor in weights.items()}
        size = content.get("size")
        if not isinstance(size, dict):  # of others
            size = None
        return Checkpoint(path, weights, content["config"] if size else {}, size)
    except Exception as error:  # what is damaged or no table of tensors raises many types
        reason = f"cut off, damaged or no table of weights ({type(error).__name__})"
        python_object = re.search(r"GLOBAL (\S+)", str(error))
        if python_object:
            reason = (f"it also holds a {python_object[1]}, and reading that could run any code. "
                      "If you trust it, re-save the weights alone: torch.save(torch.load(FILE, "
                      "weights_only=False)['state_dict'], NEW_FILE)")
        raise UserError(f"{path} is not read: {reason}") from error


def read_content(path):
    """What torch.save, torch.jit.save or safetensors has written."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()  # OpenAI's archives
    except RuntimeError:  # no TorchScript
        return torch.load(path, map_location="cpu", weights_only=True)


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
        data = content[start + begin:start + end]
        tensor = torch.frombuffer(data, dtype=SAFETENSORS[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors


def clip_weights(checkpoint, act=None):
    """(float32 weights in OpenAI's names, Size) of a CLIP ViT: ours (its trained towers), OpenAI's,
    OpenCLIP's or Hugging Face's. What a file of ours tells, or a json (but for OpenAI's archives),
    goes before what the tensors tell, and act before all."""
    path, weights = checkpoint.path, checkpoint.weights
    for prefix in ("online.", "student."):
        if prefix + "logit_scale" in weights:
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()
                       if name.startswith(prefix)}
    try:
        if "vision_model.embeddings.class_embedding" in weights:
            weights = from_hugging_face(weights)
        own = told_by_tensors(weights)
        told = checkpoint.size or told_by_json(path.parent)
        if own["act"] or told.get("vision_width", own["vision_width"]) != own["vision_width"]:
            told = {}  # OpenAI's own archive needs no json; that of another model tells nothing
        size = Size(**{**own, **told})
        if size.vision_width % size.vision_heads or size.text_width % size.text_heads:
            raise ValueError(f"sizes that do not divide: {size}")
    except Exception as error:  # a name, a shape or a field that no CLIP ViT has
        raise UserError(f"{path} is no CLIP ViT ({type(error).__name__}: {error})") from None
    size = replace(size, act=act or size.act)
    if size.act not in ("gelu", "quick_gelu"):
        raise UserError(f"{path}: the activation it tells is {size.act}: give --act, gelu or "
                        "quick_gelu (OpenAI's)")
    weights = {name: tensor.float() for name, tensor in weights.items()
               if tensor.is_floating_point()}  # integers beside them are no parameters
    return weights, size


def told_by_tensors(weights):
    """The fields of Size that weights in OpenAI's names tell; heads, mean and std as the published
    ones have them; the activation of OpenAI's own archives alone."""
    conv, positions = weights["visual.conv1.weight"], weights["visual.positional_embedding"]
    width, _, _, patch = conv.shape
    vocab, text_width = weights["token_embedding.weight"].shape
    layers = Counter(name.split(".")[0] for name in weights if name.endswith(".ln_1.weight"))
    return dict(
        image_size=math.isqrt(len(positions) - 1) * patch, patch_size=patch,  # CLS and a square
        vision_width=width, vision_layers=layers["visual"],
        vision_heads=min(width // 64, 16),  # ViT-H, g and bigG have 16 wider ones
        vision_mlp=len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        text_width=text_width, text_layers=layers["transformer"], text_heads=text_width // 64,
        context_length=len(weights["positional_embedding"]), vocab_size=vocab,
        embed_dim=weights["visual.proj"].shape[1],
        act="quick_gelu" if "input_resolution" in weights else None, **OPENAI)


def told_by_json(folder):
    """The fields of Size that the json files tell which a hub keeps beside weights, with what its
    library leaves out."""
    content = {}
    for file in folder.glob("*config.json"):
        content.update(read_json(file))
    told = {}
    if "vision_config" in content:  # Hugging Face's config.json
        vision = content["vision_config"]
        told = dict(act=vision.get("hidden_act", "quick_gelu"),
                    vision_width=vision.get("hidden_size", 768),
                    vision_heads=vision.get("num_attention_heads", 12),
                    text_heads=content["text_config"].get("num_attention_heads", 8))
    if "model_cfg" in content:  # open_clip_config.json
        model = content["model_cfg"]
        vision = model["vision_cfg"]
        told = dict(act="quick_gelu" if model.get("quick_gelu") else "gelu",
                    vision_width=vision["width"],
                    vision_heads=vision["width"] // vision.get("head_width", 64),
                    text_heads=model["text_cfg"]["heads"])
    pixels = content.get("preprocess_cfg", content)
    for name in ("mean", "std", "image_mean", "image_std"):  # the latter are Hugging Face's
        if name in pixels:
            told[name.removeprefix("image_")] = tuple(pixels[name])
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
            tensor = torch.cat([weights[name.replace("q_proj", f"{letter}_proj")]
                                for letter in "qkv"])
        if name.endswith("projection.weight"):
            tensor = tensor.T
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def clip_size(cfg, loaded=None):
    """(Size, weights or None): of the Checkpoint if there is one, else of the preset; then
    --image-size and --act. UserError when the patches do not fill the image."""
    weights, size = clip_weights(loaded, cfg.act) if loaded else (None, PRESETS[cfg.preset])
    side, patch = cfg.image_size or size.image_size, size.patch_size
    if side % patch:
        raise UserError(f"--image-size {side} is no multiple of the patches' {patch}")
    size = replace(size, image_size=side, act=cfg.act or size.act)
    if loaded:
        resize_positions(weights, "visual", size)
    return size, weights


def resize_positions(weights, tower, size):
    """Resize an image tower's position embeddings to a size, in place."""
    name, count = f"{tower}.positional_embedding", 1 + (size.image_size // size.patch_size) ** 2
    weights[name] = resize_grid(weights[name], count, antialias=True)


def resize_grid(positions, count, antialias):
    """Position embeddings of CLS and a square grid, (1 + g*g, D) -> (count, D), bicubic.

    What is no square, as of a distilled DeiT with its two class tokens, is returned unchanged:
    load_weights then refuses it and names both shapes.
    """
    old, new = math.isqrt(len(positions) - 1), math.isqrt(count - 1)
    if old == new or len(positions) != 1 + old ** 2:
        return positions
    grid = positions[1:].float().T.unflatten(1, (old, old))[None]  # (1, D, g, g)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=antialias)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


def load_weights(module, weights, path):
    """load_state_dict. UserError in one line that names the tensors, with both shapes."""
    meta = next(module.parameters()).is_meta  # made without memory
    try:
        module.load_state_dict(weights, assign=meta)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {textwrap.shorten(str(error), 300)}") from None


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
BYTES = sorted(range(256), key=lambda b: b == 32 or not chr(b).isprintable())


def read_lines(name):
    """The lines of a compressed text in data/."""
    return gzip.decompress((DATA / name).read_bytes()).decode().split("\n")


@functools.cache
def load_merges(n_merges):
    """{(left id, right id): id of the merged token} of the first n_merges byte pairs of
    data/bpe_simple_vocab_16e6.txt.gz, in order of rank.

    Ids: 0..255 a byte, 256..511 a byte that ends a word, from 512 the merges, then the two
    specials.
    """
    # The file writes a byte as one printable character: itself where it prints, else the next one
    # from U+0100 on.
    symbols = [chr(i) for i in [*BYTES[:188], *range(256, 324)]]
    symbols += [symbol + "</w>" for symbol in symbols]
    ids = dict(zip(symbols, range(512)))
    merges = {}
    for line in read_lines("bpe_simple_vocab_16e6.txt.gz")[1:1 + n_merges]:  # 0: version
        left, right = line.split()
        ids[left + right] = merges[ids[left], ids[right]] = len(ids)
    return merges


def merge_bytes(word, merges):
    """Token ids of one word by byte-pair encoding.

    The pair of lowest rank becomes one token, wherever it stands, until no pair is in `merges`. The
    id of a merged token grows with its rank and stands for it here.
    """
    ids = [BYTES.index(b) for b in word]
    ids[-1] += 256
    while True:
        known = [merges[pair] for pair in itertools.pairwise(ids) if pair in merges]
        if not known:
            return ids
        lowest, merged = min(known), []
        for i in ids:
            merged.append(i)
            if merges.get(tuple(merged[-2:])) == lowest:
                merged[-2:] = [lowest]
        ids = merged


@functools.lru_cache(maxsize=2**16)  # web captions never stop bringing new words
def encode_run(run, vocab_size):
    """Token ids of one match of RUNS: a special, or words, of which each number is one."""
    if run in SPECIALS:
        return [vocab_size - 2 + SPECIALS.index(run)]
    chars = [f" {c} " if c.isnumeric() and not c.isalpha() else c for c in run]
    ids = []
    for word in "".join(chars).split():  # of one without end, more than a context holds
        ids += merge_bytes(word[:2000].encode(), load_merges(vocab_size - 514))
    return ids


class Tokenizer:
    """What CLIP's and BERT's have in common. A subclass brings encode, and first and last, the
    tokens around a text."""

    def __call__(self, texts):
        """Long tensor (B, context_length): first, the text's ids, last, zeros. A long text keeps
        its last token."""
        rows = []
        for text in texts:
            ids = [self.first, *self.encode(text)[:self.context_length - 2], self.last]
            rows.append(ids + [0] * (self.context_length - len(ids)))
        return torch.tensor(rows)


class CLIPTokenizer(Tokenizer):
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
        self.first, self.last = vocab_size - 2, vocab_size - 1

    def encode(self, text):
        """Token ids of a text of any length, without first and last."""
        # A surrogate has no UTF-8: a pair becomes its character, a lone one U+FFFD, as in ftfy.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for run in RUNS.findall(html.unescape(html.unescape(text)).lower()):
            ids += encode_run(run, self.vocab_size)
        return ids


# --------------------------------------------------------------------------------- BERT's tokenizer

BERT_SPECIALS = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC]".split()
IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
                       "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")


def split_words(text):
    """Lower-cased words and single punctuation marks, without accents: BERT's basic tokenization.

    Control, format, private and unassigned characters vanish; each CJK ideograph is a word.
    """
    # One character at a time: a final Σ becomes σ and not ς, as in transformers, and the marks on
    # a letter, of which none is kept, are not sorted, which would take quadratic time.
    words = ""
    for c in "".join(unicodedata.normalize("NFD", c.lower()) for c in text):
        kind = unicodedata.category(c)
        if kind == "Mn" or c == "\ufffd" or (kind[0] == "C" and c not in "\t\n\r"):
            continue  # Mn: an accent
        if kind[0] == "P" or c in string.punctuation or IDEOGRAPH.match(c):
            c = f" {c} "
        words += c
    return words.split()


class BertTokenizer(Tokenizer):
    """WordPiece of bert-base-uncased (Devlin et al. 2019), id for id as in transformers.

    As in BLIP (Li et al. 2022), [DEC] and [ENC] follow the vocabulary as ids 30522 and 30523: the
    first token of a text that is decoded, or encoded with an image. What is punctuation or an
    accent is what Python's Unicode tables say. Unlike in transformers, a special token written in a
    text is text.

    context_length: tokens per text, first and [SEP] included. words: texts whose tokens and
    characters make up a small vocabulary, for a small embedding table: they are encoded as with the
    full one, other texts into smaller pieces or [UNK]; its ids count from 0 in the same order.
    """

    def __init__(self, context_length=30, words=None):
        self.context_length = context_length
        tokens = read_lines("bert_base_uncased_vocab.txt.gz")[:30522] + ["[DEC]", "[ENC]"]
        if words:
            full, text = BertTokenizer(), " ".join(words)
            kept = {*BERT_SPECIALS, *(full._tokens[i] for i in full.encode(text))}
            for c in "".join(split_words(text)):
                kept.update([c, "##" + c])
            tokens = [token for token in tokens if token in kept]
        self._tokens, self.vocab_size = tokens, len(tokens)
        self._ids = {token: i for i, token in enumerate(tokens)}
        specials = map(self._ids.get, BERT_SPECIALS)
        self.pad, self.unk, self.cls, self.sep, _, self.dec, self.enc = specials
        self.first, self.last = self.cls, self.sep

    def encode(self, text):
        """Token ids of a text of any length, without first and last."""
        ids = []
        for word in split_words(text):
            ids += self._pieces(word)
        return ids

    def _pieces(self, word):
        """Token ids of a word: the longest piece that fits, repeated; [UNK] if none or too long."""
        ids, mark = [], ""
        while 0 < len(word) <= 100:
            for end in range(len(word), 0, -1):
                if mark + word[:end] in self._ids:
                    break
            else:
                return [self.unk]
            ids.append(self._ids[mark + word[:end]])
            word, mark = word[end:], "##"
        return ids or [self.unk]

    def decode(self, ids):
        """Text without specials, as transformers' decode with clean_up_tokenization_spaces."""
        tokens = [self._tokens[i] for i in ids]
        text = " ".join(token for token in tokens if token not in BERT_SPECIALS)
        text = text.replace(" ##", "").strip()
        for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            text = text.replace(spaced, spaced.strip())
        return text


# --------------------------------------------------------------------------------------- images

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


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

    The factor is 1, 2, 4 or 8, at most `shrink` (or 1). Transparency lies over white; of an
    animation the first frame counts; EXIF orientation is ignored. BadSample for what PIL cannot
    decode.
    """
    width, height = image.size
    shrink = max(shrink, 1)
    if image.mode in ("F", "I") and image.format == "TIFF":
        raise BadSample("image of 32 bits a pixel")
    try:
        draft = image.draft("RGB", (width // shrink, height // shrink))  # None: not a JPEG
        factor = width / draft[1][2] if draft else 1
        if image.mode.startswith("I"):  # 16 bits; PIL's own conversion clips at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB"), factor
    except Exception as error:
        raise BadSample("corrupt image") from error


def resize(image, sides, box, shrink):
    """uint8 (3, H, W): what lies in the box, its edges left, top, right and bottom, at these sides
    (W, H); bicubic, antialiased. A JPEG is decoded at a reduced size, at most by `shrink`."""
    image, factor = decode(image, shrink)
    left, top, right, bottom = (edge / factor for edge in box)
    # Cut out first, so that the filter sees no pixel beyond the box, nor the padded last column
    # and row of a reduced JPEG of odd size. In a reduced JPEG edges fall between pixels: rounding
    # them would shift the image and cost more than the reduction.
    x, y = math.floor(left), math.floor(top)
    image = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    box = left - x, top - y, right - x, bottom - y
    image = image.resize(sides, Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def random_resized_crop(source, size, rng, scale=(0.5, 1.0)):
    """uint8 (3, size, size): a random crop, distributed as torchvision's RandomResizedCrop.

    It is drawn from the size in the header, so that a JPEG need only be decoded as finely as this
    crop needs. BadSample as decode.
    """
    image = open_image(source)
    left, top, width, height = random_crop_box(*image.size, rng, scale)
    box = left, top, left + width, top + height
    return resize(image, (size, size), box, min(width, height) // size)


def random_crop_box(width, height, rng, scale):
    """(left, top, width, height) in pixels.

    scale: range of the crop's share of the area (uniform). Its width / height is between 3/4 and
    4/3 (log-uniform).
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(width - w + 1), rng.integers(height - h + 1), w, h
    # A very long or very tall image: its largest central crop of an allowed ratio.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


# For evaluation a JPEG is decoded at a reduced size only while that leaves twice the pixels needed,
# so that results stay those of the field's full-size transforms.


def resize_center_crop(source, size):
    """uint8 (3, size, size): shorter side to `size`, then the central square."""
    image = open_image(source)
    short = min(image.size)
    if max(image.size) > 100 * short:  # resized whole, as the field does, it may fill the memory
        raise BadSample("image too thin")
    sides = [size * side // short for side in image.size]
    left, top = (round((side - size) / 2) for side in sides)
    image = resize(image, sides, (0, 0, *image.size), short // (2 * size))
    return image[:, top:top + size, left:left + size]


def resize_whole(source, size):
    """uint8 (3, size, size): the whole image squeezed into a square, as BLIP evaluates."""
    image = open_image(source)
    return resize(image, (size, size), (0, 0, *image.size), min(image.size) // (2 * size))


# ---------------------------------------------------------------------------------- sets on disk

# Every set d: len(d); d[i] -> (encoded image or PIL image, target), or BadSample; d.kind says what
# the target is: "captions" a list of strings, "classes" the number of one of d.classes (whose
# prompts are d.templates), "questions" (question, human answers, the question's kind or None).
# Captions and questions have d.key(i) and d.digest, which tells other content of the same keys (so
# far as sizes do), and what is read from lists or shards has d.bad, unusable samples by reason.

NOT_DOWNLOADED, HELD_BACK = "not downloaded", "in COCO's val or test"


def read_bytes(path, start=0, size=-1):
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    except (OSError, ValueError) as error:  # the latter: a NUL in the path
        raise BadSample("unreadable file") from error


def stamp(path):
    """[size, time of the last change] of a file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


HIDDEN = (".", "@")  # folders; @: a file server's thumbnails


def files_below(root, endings):
    """The files below a folder whose names end so, linked folders too, sorted within a folder;
    nothing hidden."""
    seen = set()
    for folder, inside, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # a link may lead back up
            inside.clear()
            continue
        seen.add(place)
        inside[:] = sorted(name for name in inside if not name.startswith(HIDDEN))
        for name in sorted(names):
            if name.lower().endswith(endings) and not name.startswith("."):
                yield Path(folder, name)


# In a path that says by itself that it is for validation or test.
HELD_OUT = re.compile(r"(?i)(^|[^a-z])(val|valid|validation|test)($|[^a-z])")


class TarShards:
    """Image-text pairs in all *.tar files below `root`, as img2dataset and webdataset write them.

    A sample is `key.jpg` (jpeg, png, webp) with `key.txt`, or `key.json` with "caption". Samples
    are read by their offset, so any order is possible and workers share no open file. The offsets
    are found once and kept beside the shards in `.index.npz`. What is named for validation or test
    is left out. UserError when a shard is compressed.
    """

    kind = "captions"

    def __init__(self, root):
        shards = sorted(files_below(root, (".tar", ".tar.gz", ".tgz")))
        train = [path for path in shards if not HELD_OUT.search(str(path.relative_to(root)))]
        if not train and root.name in ("val", "test"):
            train = shards
        self.shards = train
        self.rows, self.keys, self.bad = load_index(root, self.shards)
        self.digest = zlib.crc32(self.rows.tobytes())

    def __len__(self):
        return len(self.rows)

    def key(self, i):
        """`<shard>/<key>`: keys need only be unique within a shard."""
        return self.keys[i].decode(errors="surrogateescape")

    def __getitem__(self, i):
        shard, image, image_size, caption, caption_size, is_json = self.rows[i].tolist()
        text = read_bytes(self.shards[shard], caption, caption_size)
        try:
            texts = json.loads(text).get("caption") if is_json else text.decode("utf-8-sig")
        except (ValueError, AttributeError, RecursionError) as error:
            raise BadSample("unreadable caption") from error
        return read_bytes(self.shards[shard], image, image_size), clean_captions(texts)


ROW = np.dtype([("shard", "u4"), ("image", "i8"), ("image_size", "i8"), ("caption", "i8"),
                ("caption_size", "i8"), ("is_json", "?")])  # 37 bytes


def load_index(root, shards):
    """What can be read from tar shards, from the cache if they are as they were.

    rows (N,) of ROW: the number of the shard, and what scan_shard finds; keys (N,): as bytes; a
    Counter of the unusable samples. 52 bytes a sample of CC3M.
    """
    # With the time: tar pads its files, so that a rewritten shard often keeps its size, and old
    # offsets would then pair images with captions wrongly.
    # 2: another number when scan_shard finds other things.
    state = "2" + str([(path.relative_to(root), *stamp(path)) for path in shards])
    cache = root / ".index.npz"
    with suppress(Exception):  # absent, or damaged in any way: build it again
        with np.load(cache) as index:
            if str(index["state"]) == state:
                bad = Counter(json.loads(str(index["bad"])))
                return index["rows"], index["keys"], bad
    rows, keys, bad = [], [], Counter()
    for number, path in enumerate(tqdm(shards, "indexing shards", disable=None)):
        folder = path.relative_to(root).with_suffix("").as_posix()
        for key, *places in scan_shard(path, bad):
            rows.append((number, *places))
            keys.append(f"{folder}/{key}".encode(errors="surrogateescape"))
    rows, keys = np.array(rows, ROW), np.array(keys)
    if rank() == 0:
        content = io.BytesIO()
        np.savez(content, state=state, bad=json.dumps(bad), rows=rows, keys=keys)
        try:
            replace_file(cache, lambda new: new.write_bytes(content.getbuffer()))
        except UserError as error:
            print(f"{error}: the shards will be indexed again at the next start")
    return rows, keys, bad


def are_texts(x):
    return isinstance(x, list) and all(isinstance(text, str) for text in x)


def clean_captions(texts):
    """The captions of a sample, one text or a list, their white space tidied. BadSample if none."""
    texts = [texts] if isinstance(texts, str) else texts
    if not are_texts(texts):
        raise BadSample("caption is no text")
    captions = [" ".join(text.split()) for text in texts if text.strip()]
    if not captions:
        raise BadSample("empty caption")
    return captions


KINDS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "txt",
         "json": "json"}


# between archives and behind them; more were never downloaded
MOST_ZEROS = 2 * tarfile.RECORDSIZE


def scan_shard(path, bad):
    """[(key, start and size of the image, start and size of the caption, whether that is json)].

    Counts in `bad` what cannot be used. The key of a member ends at the last dot of its name.
    """
    length, end, sound = path.stat().st_size, 0, False
    parts = defaultdict(dict)  # key -> kind -> (start, size), or None where cut off
    with suppress(tarfile.TarError, ValueError), open(path, "rb") as file:
        if file.peek()[:2] == b"\x1f\x8b":
            raise UserError(f"{path} is compressed: unpack it (gzip -d), or move it away")
        tar = tarfile.TarFile(fileobj=file, ignore_zeros=True)  # also what `cat a.tar b.tar` gives
        for member in tar:
            tar.members.clear()  # tarfile would keep all of them
            file.seek(end)
            gap = file.read(member.offset - end)
            bad["in a damaged shard"] += len(gap) > MOST_ZEROS or any(gap)
            end = tar.offset
            key, _, extension = member.name.rpartition(".")
            kind = KINDS.get(extension.lower())
            # ._name: what macOS adds to each file
            if kind and member.isreg() and not Path(key).name.startswith("._"):
                bad["named twice"] += kind in parts[key]
                whole = member.offset_data + member.size <= length
                parts[key].setdefault(kind, (member.offset_data, member.size) if whole else None)
        file.seek(end)
        rest = file.read()
        sound = 0 < len(rest) < MOST_ZEROS and not any(rest)  # a sound archive ends with zeros
    samples = []
    for key, places in parts.items():
        image, caption = places.get("image"), places.get("txt") or places.get("json")
        if image and caption:
            samples.append((key, *image, *caption, not places.get("txt")))
        elif None in places.values():
            bad["cut off"] += 1
            sound = True  # that has been said
        elif len(parts.get(re.sub(r"\.[^/]*$", "", key), ())) < 2:
            bad["without caption" if image else "without image"] += 1
        # else a mask 1.seg.png beside 1.jpg, 1.txt
    bad["in a damaged shard"] += not sound  # how many samples lay behind is not known
    return samples


# what a record holds: texts, the last is a list of texts
RECORD = {"captions": ["key", "image", "captions"],
          "questions": ["key", "image", "question", "answers"]}


class Listed:
    """Captions of images, or questions about them, in a list that data/prepare.py has made.

    Only the offsets of the records are kept. UserError when the list is damaged, or its sources
    have changed since.
    """

    def __init__(self, path):
        self.path, folder = path, path.parent
        with open(path, "rb") as file:
            self.ends = np.cumsum([len(line) for line in file])  # of the first line, then records
        self.digest = zlib.crc32(self.ends.tobytes())
        try:
            head = json.loads(read_bytes(path, 0, self.ends[0]))
            self.kind, self.answers = head["kind"], head.get("answers")
            self.fields = RECORD[self.kind]
            self.bad = Counter(head["unusable"])
            if head["samples"] != len(self):
                raise ValueError
            if self.kind == "questions" and not (self.answers and are_texts(self.answers)):
                raise ValueError
            self.command = "mend it"
            if head["made_from"]:
                self.command = (f"run python data/prepare.py {head['name']} "
                                f"{shlex.quote(os.path.normpath(folder / head['root']))} "
                                f"--out {shlex.quote(str(folder))}")
            for source in head["made_from"]:
                file = folder / source["file"]
                if file.exists() and stamp(file) != [source["size"], source["time"]]:
                    raise UserError(f"{file} has changed since {path} was made: {self.command}")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise UserError(f"{path} is no list of data/prepare.py, or not whole") from None

    def __len__(self):
        return len(self.ends) - 1

    def record(self, i):
        """What the list says of a sample, a dict."""
        start, end = self.ends[i:i + 2]
        try:
            record = json.loads(read_bytes(self.path, start, end - start))
            *texts, last = (record[name] for name in self.fields)
            if are_texts(texts + last):
                return record
            raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.path}, line {i + 2}, is damaged: {self.command}") from None

    def key(self, i):
        return self.record(i)["key"]

    def __getitem__(self, i):
        record = self.record(i)
        image = read_bytes(self.path.parent / record["image"])
        if self.kind == "questions":
            return image, (record["question"], record["answers"], record.get("kind"))
        return image, clean_captions(record["captions"])


class Mixture(ConcatDataset):
    """Several captioned sets one after the other, one that is to be seen twice an epoch twice.

    Keys are NAME/key; a repeated sample has the same key again.
    """

    kind = "captions"

    def __init__(self, names, parts):
        super().__init__(parts)
        self.names, self.digest = names, [part.digest for part in parts]

    def key(self, i):
        part = bisect.bisect_right(self.cumulative_sizes, i)
        data = self.datasets[part]
        place = i - self.cumulative_sizes[part] + len(data)
        return f"{self.names[part]}/{data.key(place)}"


class Subset(torch.utils.data.Subset):
    """The samples of a set at the given indices, in that order."""

    def __init__(self, data, indices):
        super().__init__(data, indices)
        self.kind, self.answers, self.digest = (
            getattr(data, name, None) for name in "kind answers digest".split())

    def key(self, i):
        return self.dataset.key(self.indices[i])


class ImageFolder:
    """Images in one folder per class: root/<class>/..., or root/<split>/<class>/...

    split "train", "val" or "test"; "test" falls back on val/, then on root itself. A class is
    called as its folder, with spaces for _ and -. In a folder "imagenet", and where one is an
    ImageNet wnid, all have to be: names and templates come from data/. UserError when there are no
    images.
    """

    kind, templates = "classes", ["a photo of a {}."]

    def __init__(self, root, split):
        splits = [root / name for name in ("train", "val", "test") if (root / name).is_dir()]
        folder = root / split
        if split == "test" and folder not in splits:
            folder = root / "val" if splits else root
        # Labels must mean the same in each split, even if a class is absent from one.
        names = sorted({path.name for parent in splits or [root] for path in parent.iterdir()
                        if path.is_dir() and not path.name.startswith(HIDDEN)
                        and any(files_below(path, IMAGE_TYPES))})
        self.images = []
        for label, name in enumerate(names):
            self.images += [(path, label) for path in files_below(folder / name, IMAGE_TYPES)]
        if not self.images:
            raise UserError(f"{root} holds no list of data/prepare.py, no *.tar shard (unpack "
                            f"compressed ones) and no image {folder}/<class>/* (see "
                            "data/README.md)")
        self.classes = [name.replace("_", " ").replace("-", " ") for name in names]
        if root.name == "imagenet" or any(re.fullmatch(r"n\d{8}", name) for name in names):
            self.classes = imagenet_names(names)
            self.templates = read_text(DATA / "templates_imagenet.txt").splitlines()
        # with names: those of a folder too high are soon seen
        say(f"{split}: {len(self):,} images of {len(names):,} classes ("
            f"{', '.join(self.classes[:3])} ...) in {folder}")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        path, label = self.images[i]
        return read_bytes(path), label


def imagenet_names(folders):
    """The class names of folders that are called by wnid (n01440764)."""
    names = dict(line.split("\t") for line in read_text(DATA / "imagenet_classes.tsv").splitlines())
    for folder in folders:
        if folder not in names:
            raise UserError(f"a class {folder} beside ImageNet's wnids, or in a folder imagenet, "
                            f"is none of the 1,000 in {DATA}/imagenet_classes.tsv")
    return [names[folder] for folder in folders]


# name -> torchvision class, its splits for training (a linear probe); for testing there is "test",
# or in CIFAR's classes False, where the argument says whether it is the training split
TORCHVISION = {
    "cifar10": ("CIFAR10", True),
    "cifar100": ("CIFAR100", True),
    "flowers102": ("Flowers102", "train", "val"),
    "food101": ("Food101", "train"),
    "oxford_pets": ("OxfordIIITPet", "trainval"),
    "stl10": ("STL10", "train"),
}


class TorchvisionSet(ConcatDataset):
    """A classification set of torchvision, downloaded beforehand into `root`; "train" or "test"."""

    kind, templates = "classes", ["a photo of a {}."]

    def __init__(self, name, root, split):
        made, *parts = TORCHVISION[name]
        if split == "test":
            parts = [False] if True in parts else ["test"]
        try:
            make = getattr(import_torchvision().datasets, made)
            super().__init__([make(str(root), part) for part in parts])
        except Exception as error:  # its readers raise many types
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{name} cannot be read from {root} ({reason}); get it with: python -c \"import "
                f"torchvision; torchvision.datasets.{made}('{root}', {parts[0]!r}, download=True)\""
            ) from None
        self.classes = [text.replace("_", " ") for text in self.datasets[0].classes]

    def __getitem__(self, i):
        try:
            return super().__getitem__(i)
        except Exception as error:
            raise BadSample("corrupt image") from error


# ------------------------------------------------------------------------- what a Config names

PREPARED = "coco flickr30k vg sbu nocaps vqav2 cc3m".split()


def parts_of(data):
    """["coco", "coco", "cc3m"] of --data "coco*2+cc3m". UserError for what is none."""
    names = []
    for part in data.split("+"):
        match = re.fullmatch(r"([^*]+?)(?: *\* *([1-9]\d{0,3}))?", part.strip())
        if not match or match[1] in names or (match[1] == "emoji" and data != "emoji"):
            raise UserError(f"--data {data}: {part!r} is no NAME or NAME*2 (a whole number), or "
                            "cannot be mixed in")
        names += [match[1]] * int(match[2] or 1)
    return names


def data_folder(cfg, name):
    """data/NAME, or below --root for what --data names: FOLDER, or FOLDER/NAME of several sets.

    What is no such set is a folder itself. UserError when there is none.
    """
    parts, folder = set(parts_of(cfg.data)), DATA / name
    if cfg.root and name in parts:
        folder = Path(cfg.root, name if len(parts) > 1 else "")
    elif Path(name).name != name or not (folder.is_dir() or name in TORCHVISION):
        folder = Path(name)
    if not folder.is_dir() and name not in TORCHVISION:  # which say how they are downloaded
        raise UserError(f"no folder {folder} (a set NAME belongs into {DATA}/NAME, or "
                        "anywhere with --root FOLDER: see data/README.md)")
    return folder


def open_set(name, root, split):
    """What the folder of a set holds of a split: captions, questions or classes; None if nothing.

    Lists of data/prepare.py, else tar shards, else one folder of images per class.
    """
    if name in TORCHVISION:
        return TorchvisionSet(name, root, split) if split != "val" else None
    if any(root.glob("*.jsonl")):
        return open_captions(root, split, ".jsonl", Listed)
    if name != "imagenet" and any(files_below(root, ".tar")):
        return open_captions(root, split, "", TarShards)
    if name in PREPARED:
        raise UserError(f"{name} in {root} is not prepared yet: run python data/prepare.py {name} "
                        f"{shlex.quote(str(root))} (see data/README.md)")
    if split == "val" and not ((root / "val").is_dir() and (root / "test").is_dir()):
        return None  # val/ serves as test
    return ImageFolder(root, split)


def open_captions(root, split, ending, reader):
    """The list root/<split>.jsonl, or the shards in root/<split>/ or for training in root itself.

    Without a validation split the last 1 % of the training set (5,000 at most) is held out for it.
    """
    held_out = not any((root / part).exists() for part in ("val", "val.jsonl", "test.jsonl"))
    part = "train" if held_out and split == "val" else split
    path = root / (part + ending)
    if path.name == "train" and not path.exists():
        path = root  # shards
    if not path.exists():
        return None
    data = reader(path)
    check_bad(data.bad, len(data), path)
    if held_out and split in ("train", "val"):
        cut = len(data) - min(5000, len(data) // 100)
        data = Subset(data, range(cut) if split == "train" else range(cut, len(data)))
    say(f"{split}: {len(data):,} images with {data.kind}, of {path}")
    return data if len(data) else None


def training_set(cfg, image_size, long_tail=0.0, duplicates=0.0):
    """The captioned training set a Config names; with --keep, those samples of it."""
    if cfg.data == "emoji":
        data = scenes.EmojiScenes("train", cfg.scenes, image_size, cfg.seed, cfg.concepts,
                                  cfg.difficulty, cfg.noise, long_tail, duplicates)
    else:
        names, parts = parts_of(cfg.data), {}
        for name in dict.fromkeys(names):
            folder = data_folder(cfg, name)
            parts[name] = data = open_set(name, folder, "train")
            if data is None or data.kind != "captions":
                raise UserError(f"{name}: no captioned images to train on in {folder} (see "
                                "data/README.md)")
        if len(names) > 1:
            data = Mixture(names, [parts[name] for name in names])
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

    "val" validates by the first of them: the last, what is held out of the training set, serves
    where no other has such a split.
    """
    parts = list(dict.fromkeys(parts_of(cfg.data)))
    captioned = [name for name in parts if name in ("coco", "flickr30k")]
    names = list(cfg.eval_data or captioned or parts)
    if split == "val" and cfg.data != "emoji":
        names.append(parts[0])
    found = {}
    for name in dict.fromkeys(names):
        if name == "emoji":
            found.update(emoji_sets(cfg, image_size, split))
            continue
        label = Path(name).name
        if label in found:
            raise UserError(f"--eval-data: two sets are called {label}")
        data = open_set(label, data_folder(cfg, name), split)
        if data is not None:
            if data.kind == "questions":
                raise UserError(f"{name} holds questions: those are for dlip.py --task vqa")
            found[label] = data
        elif split == "test" and name not in parts:
            raise UserError(f"--eval-data {name} has no test split: a list test.jsonl, or shards "
                            "in test/ (see data/README.md)")
    if split == "test" and not found:
        say("no test set: nothing will be scored at the end (--eval-data names one)")
    return found


def emoji_sets(cfg, image_size, split):
    """Zero-shot by concept; in the test also by group, and retrieval of whole scenes."""
    looks = cfg.concepts, cfg.difficulty
    found = {"concept": scenes.EmojiClasses(split, image_size, "concept", *looks)}
    if split == "test":
        found["group"] = scenes.EmojiClasses(split, image_size, "group", *looks)
        found["retrieval"] = scenes.EmojiScenes(split, 1000, image_size, 0, *looks)
    return found


def question_set(cfg, image_size, split):
    """The questions a Config names: about emoji scenes, 500 for "val" and "test", or on disk."""
    if cfg.data == "emoji":
        count, seed = (cfg.scenes, cfg.seed) if split == "train" else (500, 0)
        return scenes.EmojiQuestions(split, count, image_size, seed, cfg.concepts, cfg.difficulty)
    data = open_set(cfg.data, data_folder(cfg, cfg.data), split)
    if data is None or data.kind != "questions":
        raise UserError(f"{cfg.data} has no questions in {split}.jsonl (see data/README.md)")
    return data


def loader_workers(cfg):
    """--workers -1: no extra process for the emoji scenes, else a share of the machine's cores."""
    if cfg.workers >= 0:
        return cfg.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return 0 if cfg.data == "emoji" else min(8, max(1, os.cpu_count() // local))


def example_images(sets, image_size, count, resize=resize_center_crop):
    """(up to count, 3, S, S) uint8, of each its shortest caption, of the first captioned set; else
    None."""
    for data in sets.values():
        if data.kind == "captions":
            for images, _, captions in eval_loader(data, image_size, count, 0, resize):
                return images, [min(texts, key=len) for texts in captions]
    return None


# -------------------------------------------------------------------------------------- loading


@dataclass
class TrainSamples:
    """samples[(epoch, index)] -> image uint8 (3, S, S), tokens (context,), 1 if replaced, else 0.

    The crop and the choice among several captions depend on (seed, epoch, index) alone, not on
    workers or resuming. An unusable sample is replaced by the next one; UserError after 100.
    tokenizer: list of n strings -> int64 (n, context). augment: what happens to the crop, a
    function of (uint8 (3, S, S), rng).
    """

    data: object
    tokenizer: object
    image_size: int
    crop_scale: tuple
    seed: int
    augment: object = None

    def __len__(self):
        return len(self.data)

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
                if not texts:  # captions, or questions with their answers
                    raise BadSample("without text")
                image = random_resized_crop(source, self.image_size, rng, self.crop_scale)
            except BadSample as error:
                reason = error
                continue
            image, caption = torch.from_numpy(image), int(rng.integers(len(texts[:captions])))
            if self.augment:
                image = self.augment(image, rng)
            return image, self.tokenizer([texts[caption]])[0], int(bad > 0), index, caption
        raise UserError(f"100 samples in a row cannot be used, from {self.data.key(first)!r} on "
                        f"(last: {reason})")


def step_batches(n, batch, steps, start, seed):
    """Yields this rank's share of the global batches of steps start..steps - 1, lists of
    (epoch, index).

    Every epoch is a new permutation of the n samples, cut into global batches; the rest is
    dropped. Rank r takes each world-th sample of a batch, so the global batch is the same for any
    number of ranks.
    """
    for step in range(start, steps):
        epoch, position = divmod(step, n // batch)
        if position == 0 or step == start:
            drawn = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(drawn)
            batches = torch.randperm(n, generator=generator).split(batch)
        share = batches[position][rank()::world_size()]
        yield [(epoch, index) for index in share.tolist()]


class Loader(DataLoader):
    """A DataLoader whose workers' UserErrors stay one line, and that leaves out empty batches.

    A worker that gives nothing for ten minutes ends the run.
    """

    def __init__(self, data, num_workers, **options):
        super().__init__(data, num_workers=num_workers, timeout=600 * bool(num_workers),
                         worker_init_fn=ignore_signals, **options)

    def __iter__(self):
        try:
            yield from filter(None, super().__iter__())
        except UserError as error:  # a worker's has become the text of its traceback
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def train_loader(samples, cfg, steps, start, device):
    """Yields, for the steps from `start` on, images uint8 (B, 3, S, S), tokens int64 (B, context),
    number of unusable samples.

    What `samples` returns beyond these three follows, stacked. UserError when a batch is larger
    than the set or cannot be shared evenly.
    """
    n, batch = len(samples), cfg.batch_size
    if batch % world_size():
        raise UserError(f"--batch-size {batch} cannot be shared evenly by {world_size()} processes")
    if n < batch:
        raise UserError(f"the training set has {n} samples, fewer than one batch of {batch}: lower "
                        "--batch-size")
    return Loader(samples, loader_workers(cfg), collate_fn=collate_train,
                  batch_sampler=step_batches(n, batch, steps, start, cfg.seed),
                  pin_memory=device.type == "cuda")


def eval_loader(data, image_size, batch_size, workers, resize=resize_center_crop):
    """Yields images uint8 (b, 3, S, S), their indices in `data` and their targets, in order.

    Unusable samples are left out: the evaluation sees which indices are missing.
    """
    return Loader(range(len(data)), workers, batch_size=batch_size,
                  collate_fn=functools.partial(load_images, data, image_size, resize))


def load_images(data, image_size, resize, indices):
    """A batch of eval_loader, of those of these samples that can be used; None if none can."""
    good = []
    for i in indices:
        with suppress(BadSample):
            source, target = data[i]
            good.append((torch.from_numpy(resize(source, image_size)), i, target))
    if good:
        images, places, targets = zip(*good)
        return torch.stack(images), list(places), list(targets)


def ignore_signals(worker):
    """They reach the whole process group; the main process ends the run. A second SIGTERM works."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def collate_train(batch):
    images, tokens, bad, *more = zip(*batch)
    return torch.stack(images), trim_padding(torch.stack(tokens)), sum(bad), *map(torch.stack, more)


def normalise(image, statistics):
    """(B, 3, S, S) uint8 -> float32, on the device of the statistics (2, 3, 1, 1)."""
    mean, std = statistics
    return image.to(mean.device, non_blocking=True).float().sub_(mean).div_(std)


def trim_padding(tokens, multiple=16):
    """(B, context) -> (B, n): without the columns of padding that none of the texts needs.

    A text tower that is causal and read at the end token, or that masks padding, gives the same
    features and gradients without them. n is a multiple: few shapes for torch.compile.
    """
    longest = int(tokens.any(0).nonzero().max()) + 1  # an end token is never 0, padding is
    return tokens[:, :math.ceil(longest / multiple) * multiple]


def check_bad(bad, good, where):
    """Report unusable samples in one line. UserError when they are more than 10 % of all.

    bad: Counter by reason; good: how many samples can be used. What the web no longer has, or is
    left out on purpose, is only reported.
    """
    lost = bad[NOT_DOWNLOADED] + bad[HELD_BACK]
    count = bad.total() - lost
    if bad.total():
        words = ", ".join(f"{number:,} {reason}" for reason, number in (+bad).most_common())
        line = f"{where}: {bad.total():,} of {good + bad.total():,} samples cannot be used: {words}"
        if count > 0.1 * (good + count):
            raise UserError(f"{line}; more than 10 % is too many (see data/README.md)")
        say(line)


def check_epoch(state, name):
    """check_bad of what the processes met in an epoch; the count starts anew."""
    bad = Counter(unreadable=sum(gather_objects(state["bad"])))
    check_bad(bad, state["samples"][0] - bad.total(), name)
    state["bad"] = 0


# ------------------------------------------------------------------------------------- evaluation


def batches(data, image_size, workers, doing, resize=resize_whole, batch_size=64):
    """eval_loader's batches, with a bar on a terminal. UserError when no image can be read."""
    batch, loader = None, eval_loader(data, image_size, batch_size, workers, resize)
    for batch in tqdm(loader, desc=doing, leave=False, disable=None):
        yield batch
    if batch is None:
        raise UserError("the evaluation set holds no sample that can be used")


@torch.no_grad()
def embed_images(encoders, data, image_size, workers):
    """One pass over a set: the features (E, N, D) float32 by E encoders, and N targets.

    encoders as in evaluate(). Images that cannot be read are left out; UserError if all are.
    """
    features, targets = [], []
    loader = batches(data, image_size, workers, "embedding", resize_center_crop, 128)
    for images, _, batch_targets in loader:
        features.append(torch.stack([encode(images).float() for encode, _ in encoders.values()]))
        targets += batch_targets
    return torch.cat(features, 1), targets


@torch.no_grad()
def embed_texts(encode_text, tokenizer, texts):
    """(T, D) float32 features of a list of strings."""
    parts = tokenizer(texts).split(512)
    return torch.cat([encode_text(trim_padding(tokens)).float() for tokens in parts])


def evaluate(encoders, tokenizer, data, image_size, workers, train=None):
    """Zero-shot classification of a set of classes, retrieval on a set of captions, in percent.

    encoders: {key: (image encoder, text encoder)}, (B, 3, S, S) uint8 -> (B, D) and (T, context)
    token ids -> (T, D), of unit length, one D for all. Returns {key: {metric: percent}}. train: the
    images that a linear probe of the classes learns from. Images that could not be read are left
    out and counted as "unreadable".
    """
    features, targets = embed_images(encoders, data, image_size, workers)
    missing, scores = unreadable(data, targets), {}
    for x, (key, (_, encode_text)) in zip(features, encoders.items()):
        if data.kind == "classes":
            texts = zero_shot_classifier(encode_text, tokenizer, data.classes, data.templates)
            found = zero_shot(x, torch.tensor(targets, device=x.device), texts)
        else:
            texts = embed_texts(encode_text, tokenizer, list(itertools.chain(*targets)))
            found = retrieval(x, texts, owners(targets))
        scores[key] = found | missing
    if train and data.kind == "classes":
        test = features, targets
        train = embed_images(encoders, train, image_size, workers)
        for i, key in enumerate(encoders):
            splits = [(x[i], torch.tensor(y, device=x.device)) for x, y in (train, test)]
            scores[key] |= linear_probe(*splits, len(data.classes))
    return scores


def unreadable(data, read):
    """How many samples of a set were left out, if any. UserError when they are more than 10 %, but
    for a few of a small set."""
    lost = len(data) - len(read)
    if lost > 5:
        check_bad(Counter(unreadable=lost), len(read), f"evaluation on {data.kind}")
    return {"unreadable": lost} if lost else {}


def score_sets(encoders, tokenizer, sets, image_size, workers, training={}):
    """evaluate() on each of {name: set}, as {key: {"<name>_<metric>": percent}}.

    training: {name: the training split of a set of classes}, for a linear probe.
    """
    scores = {key: {} for key in encoders}
    for name, data in sets.items():
        train = training.get(name)
        for key, found in evaluate(encoders, tokenizer, data, image_size, workers, train).items():
            scores[key] |= prefixed(name, found)
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
    features = features.unflatten(0, (len(classes), -1))
    return F.normalize(features.mean(1), dim=-1)


def zero_shot(features, labels, classifier):
    """{"top1", "top5"} in percent; features (N, D), labels (N,), classifier (K, D).

    As usual, top-1 is the argmax: of equal scores the first class wins, so two classes of one name
    (ImageNet has two such pairs) are not both lost. A score that is not a number is wrong.
    """
    scores, labels = features @ classifier.T, labels[:, None]  # (N, K), (N, 1)
    own = scores.gather(1, labels)
    earlier = torch.arange(len(classifier), device=labels.device) < labels
    # not "greater": a score that is not a number beats all, and is beaten by all
    ahead = (~(scores <= own) | (scores == own) & earlier).sum(1)
    return {"top1": percent(ahead == 0), "top5": percent(ahead < 5)}


def percent(right):
    """Of a tensor of truths."""
    return 100 * right.float().mean().item()


def owners(captions):
    """(T,): which image each text describes, of one list of captions an image."""
    return torch.tensor([i for i, texts in enumerate(captions) for _ in texts])


def retrieval(image_features, text_features, image_of_text, block=256):
    """Recall at 1, 5 and 10 in percent, both ways; image_of_text (T,) says whom a text describes.

    Image to text, the best of the image's own texts counts, ranked among the texts of others. This
    is conservative: ties count against the model, so one that maps everything to a point scores 0
    and not 100, and so does NaN. Memory is block x T, never N x T.
    """
    image = torch.arange(len(image_features), device=image_features.device)
    sides = [(image_features, image), (text_features, image_of_text.to(image.device))]
    found = []
    for (queries, query_image), (keys, key_image) in (sides, sides[::-1]):
        parts = []
        for features, i in zip(queries.split(block), query_image.split(block)):
            parts.append(ranks(features @ keys.T, i[:, None] == key_image))
        found.append(torch.cat(parts))
    return recalls(*found)


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
def rerank(image_features, text_features, image_of_text, states, ids, match, k):
    """Retrieval as BLIP scores it: match logit + cosine among the k best by cosine, else -100.

    Image to text, the k best texts of each image are scored, text to image the k best images of
    each text. Recalls as in retrieval(); topk chooses among equal cosines who is scored.

    image_features (N, E), text_features (T, E), of unit length; image_of_text (T,). match: states
    (1, M, D) of an image, ids (n, L) of up to 256 texts -> logits (n,). Images come in ascending
    order, no pair is scored twice. COCO's 5,000 x 25,000 scores take 0.5 GB.
    """
    scores = image_features @ text_features.T  # (N, T)
    N, T = scores.shape
    none = torch.zeros_like(scores, dtype=torch.bool)
    for_image = none.scatter(1, scores.topk(min(k, T), 1).indices, True)
    for_text = none.scatter(0, scores.topk(min(k, N), 0).indices, True)
    wanted = tqdm(for_image | for_text, "re-ranking", leave=False, disable=None)
    for i, row in enumerate(wanted):
        source = states[i][None].to(scores.device)
        for texts in row.nonzero()[:, 0].split(256):
            scores[i, texts] += match(source, ids[texts]).float()

    own = (image_of_text == torch.arange(N)[:, None]).to(scores.device)
    to_text = ranks(scores.masked_fill(~for_image, -100.0), own)
    to_image = ranks(scores.masked_fill(~for_text, -100.0).T, own.T)
    return recalls(to_text, to_image)


@torch.no_grad()
def rerank_retrieval(data, image_size, encode_image, encode_text, match, k, workers, dtype):
    """By cosine alone, {"itc_i2t_r1", ...}, and re-ranked, {"i2t_r1", ...}, in percent.

    k = 0: by cosine alone, as {"i2t_r1", ...}.

    encode_image: (B, 3, S, S) uint8 -> states (B, M, D), features (B, E). encode_text: n strings ->
    ids (n, L), features (n, E), L always the same. match: states (1, M, D), ids (n, L) -> match
    logits (n,). The states wait in memory, not the device's, as `dtype`: half precision where
    autocast is on (COCO's 5,000 at 384 px: 4.4 GB). Unreadable images are left out and counted.
    """
    states, features, captions = [], [], []
    for images, _, texts in batches(data, image_size, workers, "encoding"):
        batch_states, batch_features = encode_image(images)
        if k:
            states += batch_states.to("cpu", dtype)
        features.append((batch_features, *encode_text(sum(texts, []))))
        captions += texts

    image_features, ids, text_features = map(torch.cat, zip(*features))
    both = image_features, text_features, owners(captions)
    by_cosine = retrieval(*both)
    if not k:
        return by_cosine
    scores = prefixed("itc", by_cosine) | rerank(*both, states, ids, match, k)
    return scores | unreadable(data, captions)


STRENGTHS = tuple(10.0 ** exponent for exponent in range(-2, 7))


def linear_probe(train, test, classes):
    """{"probe_top1" in percent, "probe_C"} of L-BFGS logistic regression on frozen features.

    A split is (features (N, D), labels (N,)). The inverse regularisation (scikit-learn's C:
    minimise C * sum of losses + |W|^2 / 2) is chosen on every fifth training image, then all are
    fitted anew.
    """
    def accuracy(train, test, c):
        x, y = test
        return percent(fit_logistic(*train, classes, c)(x).argmax(1) == y)

    x, y = train
    held = torch.arange(len(y)) % 5 == 4
    scores = {c: accuracy((x[~held], y[~held]), (x[held], y[held]), c) for c in STRENGTHS}
    best = max(scores, key=scores.get)
    return {"probe_top1": accuracy(train, test, best), "probe_C": best}


def fit_logistic(x, y, classes, c):
    """Multinomial logistic regression, a torch.nn.Linear; the bias is not regularised."""
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


def test_checkpoint(cfg, size, encoders):
    """--evaluate, --linear-probe: {key: {"<set>_<metric>": value}} of the test sets."""
    sets = evaluation_sets(cfg, size.image_size, "test")
    training = evaluation_sets(cfg, size.image_size, "train") if cfg.linear_probe else {}
    return score_sets(encoders, size.tokenizer(), sets, size.image_size, loader_workers(cfg),
                      training)


def validate(run, model, encoders, sets, state):
    """{column: main metric} of {column: encoders} on the first of {name: set}, on rank 0; best.pt,
    the model, by the best of them. {} where there is no set."""
    if rank() > 0 or not sets:
        return {}
    size, data = run.size, next(iter(sets.values()))
    scores = evaluate(encoders, size.tokenizer(), data, size.image_size, loader_workers(run.cfg))
    row = {column: main_metric(found) for column, found in scores.items()}
    run.keep_best(max(row.values()), state, model)
    return row


def write_results(run, encoders, sets, state, device):
    """results.json, the test scores and throughput of {label: encoders}; the table on stdout,
    curves.png, retrieval.png of the first of them. state: the training loop's counters."""
    cfg, side, tokenizer = run.cfg, run.size.image_size, run.size.tokenizer()
    cells = score_sets(encoders, tokenizer, sets, side, loader_workers(cfg))
    images = torch.randint(256, (256, 3, side, side), dtype=torch.uint8, device=device)
    calls = {name: functools.partial(encode, images) for name, (encode, _) in encoders.items()}
    for name, milliseconds in compare_latency(calls, device, 5).items():
        cells[name]["images_per_second"] = 1000 * len(images) / milliseconds
    write_json(run.folder / "results.json", {
        "cells": cells,
        "seed": cfg.seed,
        "steps": state["step"],
        "best_step": state["best_step"],
        "best_validation": state["best"],
    })
    print_table(cells)
    plot_curves(run.folder / "curves.png", f"{cfg.method} on {cfg.data}: losses, validation in %")
    first, *_ = encoders.values()
    draw_retrieval(run.folder / "retrieval.png", first, tokenizer, sets, side)
    print(f"pictures, tables and checkpoints: {run.folder}")


def compare_latency(functions, device, rounds=15):
    """{key: milliseconds} of functions without arguments: the median over the rounds.

    They take turns, so that a slow moment meets all; each is warmed up first; the device is
    synchronised before every reading of the clock.
    """
    device = getattr(torch, torch.device(device).type)  # torch.cuda, torch.mps or torch.cpu
    times = defaultdict(list)
    with torch.inference_mode():
        for _ in range(2 + rounds):
            for key, function in functions.items():
                start = time.perf_counter()
                function()
                device.synchronize()
                times[key].append(time.perf_counter() - start)
    return {key: 1000 * np.median(found[2:]) for key, found in times.items()}


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
ABBREVIATION = """adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|aug|ave|bancorp|bhd|bldg|blvd
    |brig|bros|calif|capt|cf|cie|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs
    |elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|jos|jr
    |jul|jun|kan|kans|ky|lieut|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms
    |msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|pres|prof|profs|pte|pty|pvt|rd|rep|reps
    |rev|rt|sen|sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|ste|supt|sys|tel|tenn|thu|thurs|treas|tue
    |tues|univ|va|vs|vt|wed|wis|wisc|wm|wyo"""
# After these, and at the end of a caption, since the next one mostly begins with "A" or "The", the
# period behind a single letter ends the sentence and goes: "the letter A."
BEGINNING = """A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In
    |It|Last|Many|More|Mr|Ms|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There
    |These|They|This|We|When|While|What|Yet|You"""
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
SPELLED = str.maketrans(dict(zip("()[]{}½¼¾⅓⅔€£¢ ", [
    *"-lrb- -rrb- -lsb- -rsb- -lcb- -rcb- 1/2 1/4 3/4 1/3 2/3 $ # cents".split(), "\xa0"])))


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
    """How often each n-gram, n = 1 to 4, occurs in a sentence."""
    words, counts = sentence.split(), Counter()
    for n in range(1, 5):
        counts.update(zip(*(words[i:] for i in range(n))))
    return counts


def bleu(references, hypotheses):
    """BLEU-4 of a corpus (Papineni et al. 2002, section 2), as in pycocoevalcap.

    exp(min(0, 1 - r/c)) (p_1 p_2 p_3 p_4)^(1/4), in 0..1. p_n: n-grams of the hypotheses that
    a reference has, each counted at most as often as in one reference, over all n-grams of the
    hypotheses. c: words of the hypotheses; r: words of the references closest in length, the
    shorter one of two. references: N lists of R strings; hypotheses: N strings.
    """
    matched, total, closest = np.zeros(4), np.zeros(4), 0
    for refs, hypothesis in zip(references, hypotheses):
        words = len(hypothesis.split())
        lengths = [len(ref.split()) for ref in refs]
        closest += min(lengths, key=lambda length: (abs(length - words), length))
        most = Counter()
        for ref in refs:
            most |= count_ngrams(ref)  # the larger of two counts
        for gram, count in count_ngrams(hypothesis).items():
            total[len(gram) - 1] += count
            matched[len(gram) - 1] += min(count, most[gram])

    # pycocoevalcap's 1e-15 and 1e-9 stand for zeros: nothing matched gives a score close to 0.
    precisions = (matched + 1e-15) / (total + 1e-9)
    ratio = (total[0] + 1e-15) / (closest + 1e-9)
    return precisions.prod() ** (1 / 4) * math.exp(min(0, 1 - 1 / ratio))


def cider_d(references, hypotheses):
    """(N,): CIDEr-D (Vedantam et al. 2015, section 6) of each image, in 0..10, as in pycocoevalcap.

    Mean over n = 1..4 and the references of
    10 exp(-(difference in words)^2 / 2 sigma^2) min(h, r).r / (|h||r|), sigma = 6, where h and r
    weigh each n-gram by its count times log(N / images with the n-gram in a reference, at least 1).
    An n-gram in every image's references weighs nothing, so a single image scores 0.
    references: N lists of R strings; hypotheses: N strings.
    """
    frequency = Counter()  # images with the n-gram in a reference
    for refs in references:
        frequency.update(set().union(*map(count_ngrams, refs)))

    def weigh(sentence):
        weights = [{}, {}, {}, {}]
        for gram, count in count_ngrams(sentence).items():
            rarity = math.log(len(references) / max(1, frequency[gram]))
            weights[len(gram) - 1][gram] = count * rarity
        return weights

    scores = []
    for refs, hypothesis in zip(references, hypotheses):
        score = 0
        for ref in refs:
            difference = len(hypothesis.split()) - len(ref.split())
            penalty = math.exp(-difference ** 2 / 72)
            for h, r in zip(weigh(hypothesis), weigh(ref)):
                dot = sum(min(h[gram], r[gram]) * r[gram] for gram in h if gram in r)
                norms = math.hypot(*h.values()) * math.hypot(*r.values())
                score += penalty * dot / (norms or 1)
        scores.append(score * (10 / (4 * len(refs))))
    return np.array(scores)


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
REPLACED = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                    "0 0 1 2 3 4 5 6 7 8 9 10".split()))
for word in CONTRACTIONS.split():
    for mark in re.finditer("'", word):
        REPLACED[word[:mark.start()] + word[mark.end():]] = word
REPLACED["somebody'd"] = "somebodyd"  # the wrong way round in the official table


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
    return " ".join(REPLACED.get(word, word) for word in words if word not in ("a", "an", "the"))


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
def caption_scores(data, image_size, generate, workers=0):
    """{"bleu4" in percent, "cider": 100 x CIDEr-D} of a set, by COCO's formulas.

    generate: (B, 3, S, S) uint8 -> list of B captions. Images that cannot be read are left out,
    counted as "unreadable". The domains of a list (nocaps') add "cider_in", "cider_near" and
    "cider_out": each is scored as a set of its own, with its own document frequencies, as is usual
    for nocaps. So "cider" is not their mean.
    """
    captions, references, places = [], [], []
    for images, indices, targets in batches(data, image_size, workers, "captioning"):
        captions += map(ptb_tokenize, generate(images))
        references += [list(map(ptb_tokenize, texts)) for texts in targets]
        places += indices
    scores = unreadable(data, places)
    scores["bleu4"] = 100 * bleu(references, captions)
    scores["cider"] = 100 * cider_d(references, captions).mean()
    domains = [data.record(i).get("domain") for i in places] if isinstance(data, Listed) else []
    for domain in sorted(set(domains) - {None}):
        part = [n for n, d in enumerate(domains) if d == domain]
        found = cider_d([references[n] for n in part], [captions[n] for n in part])
        scores[f"cider_{domain}".removesuffix("-domain")] = 100 * found.mean()
    return scores


@torch.no_grad()
def answer_questions(data, image_size, answer, workers=0):
    """([{"question_id", "answer"}] in order, as VQA's server takes them, {"accuracy": percent}).

    data: a set of questions; of those that have a kind also {"accuracy_<kind>"}. Questions without
    human answers (a test split) are not scored. answer: (B, 3, S, S) uint8, list of B questions ->
    list of B strings. Questions whose image cannot be read are left out, counted as "unreadable".
    """
    results, accuracies = [], defaultdict(list)
    for images, places, targets in batches(data, image_size, workers, "answering"):
        answers = answer(images, [question for question, *_ in targets])
        for i, text, (_, humans, kind) in zip(places, answers, targets, strict=True):
            key = data.key(i)  # VQAv2's are numbers
            results.append({"question_id": int(key) if key.isdecimal() else key, "answer": text})
            if humans:
                accuracy = 100 * vqa_accuracy(text, humans)
                accuracies["accuracy"].append(accuracy)
                if kind:
                    accuracies[f"accuracy_{kind}"].append(accuracy)
    scores = {name: np.mean(values) for name, values in sorted(accuracies.items())}
    return results, scores | unreadable(data, results)


# --------------------------------------------------------------------------------------- pictures


def print_table(cells, path=None):
    """{row: {column: number or text}} as a markdown table on stdout, and in a file."""
    columns = list(dict.fromkeys(itertools.chain(*cells.values())))
    rows = [["", *columns]]
    for name, cell in cells.items():
        rows.append([name, *(shown(cell.get(column, "")) for column in columns)])
    if len(columns) > len(rows):  # wider than long: turn it
        rows = list(zip(*rows))
    rows.insert(1, ["---"] * len(rows[0]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = "".join("| " + " | ".join(map(str.rjust, row, widths)) + " |\n" for row in rows)
    print(text, end="")
    if path:
        write_text(path, text)


def shown(value):
    if isinstance(value, str):
        return value
    return f"{round(value, 6) + 0:.3g}" if abs(value) < 10 else f"{value:.1f}"


# a `$` in a caption is no formula
STYLE = {"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 150,
         "savefig.bbox": "tight"}


def picture(draw):
    """Guards a function that draws into `path`: what goes wrong is a line, never a run's end."""
    @functools.wraps(draw)
    def guarded(path, *args):
        try:
            os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
            import matplotlib

            with matplotlib.rc_context(STYLE), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # letters that the font lacks
                draw(path, *args)
        except Exception as error:
            print(f"could not draw {path}: {error!r}")
    return guarded


def new_figure(rows, columns, size, title):
    """A figure of `size` inches and its axes (rows, columns); no pyplot, so no backend is asked."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="compressed")
    figure.suptitle(title, fontsize=size[0])
    return figure, figure.subplots(rows, columns, squeeze=False)


def fold(text):
    """The lines of a text, each over at most four lines of 26 letters."""
    return "\n".join(textwrap.fill(line, 26, max_lines=4) for line in text.split("\n"))


@picture
def plot_grid(path, rows, names, captions, title):
    """Rows of images (3, S, S) uint8, names at the left, captions above the first images.

    The captions follow the rows, one an image; a line that is broken in a caption stays so.
    """
    columns = max(map(len, rows))  # below, what captions leave of the figure's height is cut off
    figure, axes = new_figure(len(rows), columns, (2 * columns + 2, 3 * len(rows)), title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for line, images, name in zip(axes, rows, names):
        line[0].set_ylabel(fold(name), rotation=0, ha="right", va="center", fontsize=12)
        for axis, image in zip(line, images):
            axis.imshow(image.permute(1, 2, 0))
    for axis, caption in zip(axes.flat, captions):
        axis.set_title(fold(caption), loc="left", fontsize=9)
    figure.savefig(path)


@picture
@torch.no_grad()
def draw_retrieval(path, encoders, tokenizer, sets, image_size):
    """For six captions of the first captioned set, if any, the five best of 64 images.

    encoders: (image encoder, text encoder), as evaluate() takes them.
    """
    examples = example_images(sets, image_size, 64)
    if examples:
        images, captions = examples
        encode_image, encode_text = encoders
        scores = encode_text(tokenizer(captions[:6])) @ encode_image(images).T
        best = scores.topk(min(5, len(images))).indices.cpu()
        places = 1 + (scores > scores.diag()[:, None]).sum(1)
        names = [f"{text}\n(its own image: no. {place})" for text, place in zip(captions, places)]
        plot_grid(path, images[best], names, [],
                  f"the best of {len(images)} images for each caption")


@picture
def plot_curves(path, title):
    """The losses and the validation metrics of the log.csv beside it, by epoch."""
    rows = read_csv(path.with_name("log.csv"))
    names = list(rows[0])
    figure, ((losses, scores),) = new_figure(1, 2, (11, 4.5), title)
    for name in names[names.index("loss"):]:
        logged = [(float(row["epoch"]), float(row[name])) for row in rows if row[name]]
        if logged and not name.endswith(("_scale", "_entropy")):
            axis = scores if name.startswith("val_") else losses
            axis.plot(*zip(*logged), ".-", lw=3 if name == "loss" else 1.5, label=name)
    for axis in (losses, scores):
        axis.set(xlabel="epoch", visible=bool(axis.lines))  # there may be no validation
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
