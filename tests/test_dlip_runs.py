"""dlip.py as a user starts it: the stages one by one, kill and go on, several processes, wrong input, real files.

The reference is always another way to the same thing: all stages at once, the uninterrupted run, one process, the
numbers of another file. Models and pictures are tiny; the losses and the model itself are tested elsewhere.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import dlip
import pytest
import torch
from PIL import Image
from test_data_blip import write_images, write_json, write_vqa

from test_data import write_coco
from test_training import (
    COCO_MINI,
    ONE_THREAD,
    REPO,
    SERVER,
    WORKERS,
    Script,
    checkpoint,
    equal,
    free_port,
    log_of,
    photo,
    photo_samples,
    posix,
    write_shard,
)

SIZES = "--preset demo --vit tiny --bert tiny --image-size 40 --embed-dim 32 --context-length 30".split()
BASIC = "--batch-size 16 --device cpu --log-every 1 --workers 0".split()
EMOJI = [*BASIC, *"--vit tiny --bert tiny --embed-dim 32 --scenes 64 --concepts 10 --epochs 2 --warmup-steps 1".split()]
COCO = REPO / COCO_MINI
coco_mini = pytest.mark.skipif(not COCO.is_dir(), reason="no COCO photographs here")
TRAINED = {"config.json", "log.csv", "timing.csv", "last.pt", "blip.pt", "results.json", "curves.png"}
STAGES = ["distil", *(f"{who}{task}" for task in dlip.TASKS for who in ("", "teacher-"))]


# ------------------------------------------------------------------------------------------------- starting the script


class Dlip(Script):
    """dlip.py in a process of its own.

    pause: seconds that every step takes longer, so that an interruption meets it. plots: draw the pictures, which are
    one byte otherwise. dump: a folder in which every process of a run leaves its weights.
    """

    def __init__(self, *flags, cwd=REPO, env=(), **how):
        self.output = tempfile.TemporaryDirectory()
        self.process = SERVER.Process(target=_main, args=(list(map(str, flags)), str(cwd), self.output.name, dict(env)),
                                      kwargs=how)
        self.process.start()

    def wait(self, timeout=400):
        return super().wait(timeout)

    def stop(self, signum):
        os.kill(self.process.pid, signum)
        return self.wait()


def _main(flags, cwd, output, env, pause=0, plots=False, dump=None, eager_compiler=False):
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.update(env)
    multiprocessing.set_start_method(WORKERS, force=True)
    sys.argv = ["dlip.py", *flags]
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch, plots)
        update, scores, save_state = dlip.update, dlip.Evaluator.scores, common.Run.save_state
        patch.setattr(dlip, "update", lambda *args: [update(*args), time.sleep(pause)])
        patch.setattr(dlip.Evaluator, "scores", lambda *args: [
            pause and print("evaluating", args[2], flush=True), time.sleep(pause), scores(*args)][-1])
        if dump:
            def save_everywhere(run, config, state, model, **parts):
                torch.save(model.state_dict(), Path(dump, f"{common.rank()}.pt"))
                save_state(run, config, state, model, **parts)
            patch.setattr(common.Run, "save_state", save_everywhere)
        if eager_compiler:
            patch.setattr(torch.nn.Module, "compile", _compile_without_compiler)
        try:
            common.run_main(dlip.main)
        finally:
            sys.stdout.flush()


def _compile_without_compiler(module):
    module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")


def make_quick(patch, plots=False):
    """Few scenes to evaluate, no stopwatch, pictures of one byte: each takes seconds and is tested elsewhere."""
    questions = common.EmojiQuestions
    patch.setattr(dlip, "EVALUATION_SCENES", 24)
    patch.setattr(common, "EmojiQuestions", lambda split, scenes, *args, **kwargs: questions(
        split, scenes if split == "train" else 5, *args, **kwargs))
    patch.setattr(common, "compare_latency", lambda functions, device: {name: 2.0 for name in functions})
    for name in [name for name in vars(common) if name.startswith("plot_") and not plots]:
        patch.setattr(common, name, lambda path, *args, **kwargs: Path(path).write_bytes(b"p"))


def run(*flags, **how):
    """The script, run to its end, which must be a good one."""
    script = Dlip(*flags, **how).wait()
    assert script.code == 0, script.err
    return script


def together(*flags, **how):
    """Two processes of one run, as torchrun starts them."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Dlip(*flags, env={**env, "RANK": str(place), "LOCAL_RANK": str(place)}, **how) for place in range(2)]


def as_user(*flags, cwd=REPO, timeout=120):
    """`python dlip.py flags`; returns subprocess's CompletedProcess with text."""
    return subprocess.run([sys.executable, str(REPO / "dlip.py"), *map(str, flags)], cwd=cwd, env=ONE_THREAD,
                          capture_output=True, text=True, timeout=timeout)


def one_line(text):
    """The message of an error: one line under the script's name, no traceback."""
    assert text.count("\n") == 1 and text.startswith("dlip.py: "), text
    return text.removeprefix("dlip.py: ").strip()


@pytest.fixture
def error_of(monkeypatch, capsys, tmp_path):
    """Calls main() with flags, in this process; returns the one line that it must end with, and exit code 2."""
    make_quick(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["dlip.py", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            common.run_main(dlip.main)
        message = one_line(capsys.readouterr().err)
        assert ended.value.code == 2 and (len(message) < 400 or "--ablate" in flags), message
        return message
    return call


def hashes(*folders):
    """Of every file below: whether anything was written."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders for path in folder.rglob("*")
            if path.is_file()}


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def assert_same_stage(a, b):
    """Two folders of a training hold the same log, weights and optimiser state, to the last bit."""
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes(), a.name
    for name in ("last.pt", "best.pt", "blip.pt"):
        if (a / name).exists() or (b / name).exists():
            ours, theirs = checkpoint(a, name), checkpoint(b, name)
            assert ours.keys() == theirs.keys()
            assert all(equal(ours[key], theirs[key]) for key in ours if key != "config"), (a.name, name)
    assert (a / "results.json").read_bytes() == (b / "results.json").read_bytes()


def assert_same_run(a, b):
    for stage in STAGES:
        assert_same_stage(a / stage, b / stage)
    assert (a / "results.json").read_bytes() == (b / "results.json").read_bytes()
    assert (a / "table.md").read_bytes() == (b / "table.md").read_bytes()


def finite(log):
    return all(float(value) < 1e6 for row in log for name, value in row.items() if value and "loss" in name)


# ----------------------------------------------------------------------------------------------------------- data, runs


def make_blip(path, flags, seed=0, **sizes):
    """A checkpoint of ours with random weights, as dlip.py would make it with these flags."""
    cfg, _ = dlip.configure([*flags, "--out", str(path.parent / "none")])
    tokenizer = dlip.tokenizer_of(cfg)
    vision, text = dlip.sizes_of(cfg, tokenizer)
    vision = dataclasses.replace(vision, **{k[7:]: v for k, v in sizes.items() if k.startswith("vision_")})
    text = dataclasses.replace(text, **{k: v for k, v in sizes.items() if not k.startswith("vision_")})
    torch.manual_seed(seed)
    torch.save(dlip.exported(dlip.BLIP(vision, text, cfg.embed_dim), cfg), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dlip")


@pytest.fixture(scope="module")
def teacher(folder):
    """A teacher of the emoji scenes, larger than the student."""
    return make_blip(folder / "teacher.pt", [*EMOJI, "--vit", "small", "--bert", "small"])


@pytest.fixture(scope="module")
def emoji(teacher):
    return [*EMOJI, "--teacher", str(teacher)]


@pytest.fixture(scope="module")
def words_blip(folder):
    """A BLIP with BERT's whole vocabulary, for photographs."""
    return make_blip(folder / "words.pt", ["--stage", "distil", "--data", "coco", *SIZES], seed=1)


@pytest.fixture(scope="module")
def whole(emoji, folder):
    """The run folder of all stages at once, uninterrupted, with its pictures."""
    run(*emoji, "--out", folder / "whole", plots=True)
    return folder / "whole"


# --------------------------------------------------------------------------------------------------------------- stages


def test_all_stages(whole, teacher):
    """What each file of the run folder holds, against the others."""
    assert names_in(whole) == {*STAGES, "config.json", "results.json", "table.md", "captions.png", "attention.png",
                               "answers.png", "efficiency.png"}
    for stage in STAGES:
        assert names_in(whole / stage) - {"best.pt"} == TRAINED, stage
        rows, results = log_of(whole / stage), json.loads((whole / stage / "results.json").read_text())
        steps = 8 if stage == "distil" else 12 if "vqa" in stage else 4  # 2, 0.5 and 1 epochs, 6 questions a scene
        assert [row["step"] for row in rows] == [str(step + 1) for step in range(steps)] and results["steps"] == steps
        task = "retrieval" if stage == "distil" else stage.removeprefix("teacher-")
        validated = [float(row[f"val_{task}"]) for row in rows if row[f"val_{task}"]]
        assert len(validated) == (2 if stage == "distil" else 1)
        assert results["best_validation"] == pytest.approx(max(validated), rel=1e-6)
        assert finite(rows) and Image.open(whole / stage / "curves.png").size[0] > 300
        blip, trained = checkpoint(whole / stage, "blip.pt")["model"], checkpoint(whole / stage)["model"]
        assert all(torch.equal(trained[f"student.{name}"], weight) for name, weight in blip.items())
        assert any(name.startswith("momentum.") for name in trained) == (task == "retrieval")
    for row in log_of(whole / "distil"):
        parts = [name for name in row if name.startswith(("itc", "itm", "lm", "hr_", "at_")) and row[name]]
        assert len(parts) == 3 + 4 + 2
        assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in parts), rel=1e-5)
    for picture in ("captions", "attention", "answers", "efficiency"):
        assert Image.open(whole / f"{picture}.png").size[0] > 300, picture


def test_results_and_table(whole):
    cells = json.loads((whole / "results.json").read_text())["cells"]
    assert cells.keys() == {"student", "teacher", "kept, %"}
    for who in ("student", "teacher"):
        for metric, value in cells[who].items():
            limit = 1000 if metric == "cider" else 100
            assert 0 <= value <= limit and value == value, metric
        assert {"i2t_r1", "t2i_r10", "itc_i2t_r1", "bleu4", "cider", "vqa_accuracy"} < cells[who].keys()
        for way in ("i2t", "t2i", "itc_i2t", "itc_t2i"):
            assert cells[who][f"{way}_r1"] <= cells[who][f"{way}_r5"] <= cells[who][f"{way}_r10"]
        weights = checkpoint(whole.parent, "teacher.pt")["model"] if who == "teacher" else \
            checkpoint(whole / "distil", "blip.pt")["model"]
        counted = sum(w.numel() for name, w in weights.items() if name.startswith(("visual_encoder.", "text."))
                      and not re.search(r"decoder_attention|cls\.predictions", name))
        assert cells[who]["parameters_M"] == pytest.approx(counted / 1e6)
    for metric, value in cells["kept, %"].items():
        assert value == pytest.approx(100 * cells["student"][metric] / cells["teacher"][metric])
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")]
             for line in (whole / "table.md").read_text("utf-8").splitlines()]
    lines = [line for line in lines if "---" not in line]
    if "student" in lines[0]:
        lines = [list(column) for column in zip(*lines)]
    shown = {line[0]: dict(zip(lines[0][1:], line[1:])) for line in lines[1:]}
    assert shown.keys() == cells.keys()
    assert {"parameters_M", "GMACs", "i2t_r1", "t2i_r1", "bleu4", "cider", "vqa_accuracy"} <= shown["student"].keys()
    for who, row in shown.items():
        for metric, text in row.items():
            assert bool(text) == (metric in cells[who]), (who, metric)
            assert not text or float(text) == pytest.approx(cells[who][metric], rel=6e-3, abs=0.05), (who, metric)


def test_stages_one_by_one(emoji, whole, tmp_path):
    """In the default folder, which the later stages find; nothing is made again."""
    made = {}
    for stage in (["distil", *emoji], ["finetune"], ["evaluate"]):
        run("--stage", *stage, cwd=tmp_path)
        (out,) = (tmp_path / "runs").iterdir()
        assert all(path.stat().st_mtime_ns == before for path, before in made.items())
        made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert out.name == "dlip-emoji"
    assert_same_run(whole, out)
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(whole) for path in whole.rglob("*")}


def test_one_task_at_a_time(whole, tmp_path):
    """--task names what is fine-tuned and evaluated; --init evaluates one checkpoint to the numbers of its run."""
    out = tmp_path / "run"
    shutil.copytree(whole / "distil", out / "distil")
    shutil.copy(whole / "config.json", out)
    run("--stage", "finetune", "--task", "caption", "--out", out)
    assert names_in(out) == {"config.json", "distil", "caption", "teacher-caption"}
    assert_same_stage(whole / "caption", out / "caption")
    run("--stage", "evaluate", "--task", "caption", "--out", out)
    expected = json.loads((whole / "results.json").read_text())["cells"]
    found = json.loads((out / "results.json").read_text())["cells"]
    assert found["student"].items() <= expected["student"].items() and "cider" in found["student"]
    assert not {"i2t_r1", "vqa_accuracy"} & found["student"].keys()
    for task, metric in (("retrieval", "t2i_r10"), ("vqa", "vqa_accuracy")):
        run("--stage", "evaluate", "--task", task, "--init", whole / task / "blip.pt", "--concepts", "10", "--device",
            "cpu", "--out", tmp_path / task)
        cell = json.loads((tmp_path / task / "results.json").read_text())["cells"]["model"]
        assert cell[metric] == expected["student"][metric] and cell.items() <= expected["student"].items()


def test_flags_change_a_fine_tuning(whole, tmp_path):
    """--stage finetune in the folder of its run: its own rate and epochs, not those of the distillation."""
    shutil.copytree(whole / "distil", tmp_path / "run" / "distil")
    shutil.copy(whole / "config.json", tmp_path / "run")
    run("--stage", "finetune", "--task", "caption", "--lr", "5e-4", "--epochs", "0.5", "--out", tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "caption" / "config.json").read_text())["config"]
    assert (saved["lr"], saved["epochs"], saved["warmup_steps"]) == (5e-4, 0.5, dlip.SHORT["warmup_steps"])
    assert len(log_of(tmp_path / "run" / "caption")) == 2


def test_methods_and_arms(emoji, tmp_path):
    """--method blip needs no teacher and --no-vlp no momentum; both run all stages."""
    run(*EMOJI, "--method", "blip", "--task", "caption", "--epochs", "1", "--out", tmp_path / "blip")
    rows = log_of(tmp_path / "blip" / "distil")
    assert all(row["itc"] and row["itm"] and row["lm"] and not row["hr_img"] and not row["at_self"] for row in rows)
    assert json.loads((tmp_path / "blip" / "results.json").read_text())["cells"].keys() == {"student"}
    run(*emoji, "--stage", "distil", "--no-vlp", "--hr", "img", "vl_d", "--attn", "none", "--epochs", "1", "--out",
        tmp_path / "taught")
    for row in log_of(tmp_path / "taught" / "distil"):
        assert not (row["itc"] or row["itm"] or row["lm"] or row["at_self"]) and row["hr_img"] and row["hr_vl_d"]
        assert float(row["loss"]) == pytest.approx(float(row["hr_img"]) + float(row["hr_vl_d"]), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_and_resume(emoji, whole, tmp_path, workers):
    """kill -9 in the distillation and again in a fine-tuning."""
    out = tmp_path / "run"
    flags = [*emoji, "--workers", workers, "--save-every", "3", "--out", out]
    killed = Dlip(*flags, pause=0.2).wait_for(out / "distil" / "log.csv", 6).kill()
    assert checkpoint(out / "distil")["state"]["step"] in (4, 6)
    assert not (out / "distil" / "blip.pt").exists() and not (out / "caption").exists()
    (out / "distil" / "last.pt.1.tmp").write_bytes(b"killed while it was written")
    killed = Dlip(*flags, "--resume", pause=0.2).wait_for(out / "vqa" / "log.csv", 5).kill()
    assert "distil\n" in killed.out and checkpoint(out / "vqa")["state"]["step"] in (3, 6)
    done = hashes(out / "distil", out / "retrieval", out / "teacher-caption")
    finished = run("--resume", "--out", out)
    assert finished.out.count(str(out / "vqa")) == 1 and f"\n{out / 'distil'}\n" not in finished.out
    assert done.items() <= hashes(out).items()  # finished stages are not trained again
    (out / "distil" / "last.pt.1.tmp").unlink()
    assert_same_run(whole, out)


@posix
@pytest.mark.parametrize("signum, stage, step", [(signal.SIGINT, "distil", 3), (signal.SIGTERM, "teacher-vqa", 3)])
def test_stopped_runs_save_and_say_how_to_go_on(emoji, whole, tmp_path, signum, stage, step):
    out = tmp_path / "run"
    if stage != "distil":
        shutil.copytree(whole, out, ignore=lambda _, names: {"teacher-vqa", "results.json", "table.md"} & {*names}
                        if "distil" in names else ())
    flags = [*emoji, "--save-every", "100", "--out", out, *(["--resume"] if stage != "distil" else [])]
    stopped = Dlip(*flags, pause=0.2).wait_for(out / stage / "log.csv", step).stop(signum)
    assert stopped.code == 130, stopped.err
    message = one_line(stopped.err)
    assert "--stage all" in message and "same command" in message and f"--resume --out {out}" in message
    assert step <= checkpoint(out / stage)["state"]["step"] < 8 and not (out / stage / "results.json").exists()
    run(*emoji, *message[message.index("--resume"):].removesuffix(" goes on").split())
    assert_same_run(whole, out)


@posix
def test_ctrl_c_in_the_evaluation(emoji, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "results.json").unlink()
    before = hashes(out)
    script = Dlip("--resume", "--out", out, pause=0.5)
    printed = Path(script.output.name, "out")
    while not (printed.exists() and "evaluating test" in script.out):
        assert script.process.is_alive(), script.err
        time.sleep(0.01)
    stopped = script.ctrl_c()
    assert stopped.code == 130 and one_line(stopped.err)
    assert before.items() <= hashes(out).items()


def test_a_finished_run_is_not_trained_again(emoji, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path: path.stat().st_mtime_ns for stage in STAGES for path in (out / stage).iterdir()}
    finished = run(*emoji, "--resume", "--out", out)
    assert "step " not in finished.out
    assert {path: path.stat().st_mtime_ns for stage in STAGES for path in (out / stage).iterdir()} == before
    assert_same_run(whole, out)


# ---------------------------------------------------------------------------------------------------- several processes


def made_up_batch():
    """Images, texts of different lengths, questions and answers, and the numbers of their images, some the same."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 40, 40, generator=generator).double()
    texts = []
    for lengths in ((9, 4, 7, 12, 3, 5, 8, 6), (3, 3, 4, 2, 2, 3, 2, 5)):
        ids = torch.zeros(8, 12, dtype=torch.long)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.randint(5, 30, (length,), generator=generator)
            ids[row, 0], ids[row, length - 1] = 2, 3
        texts.append(ids)
    return image, texts, torch.tensor([4, 9, 4, 7, 1, 9, 3, 4])


CASES = {
    "distil": ("--stage distil", ("itc", "lm", "hr:img", "hr:text", "hr:vl_e", "hr:vl_d", "at:self", "at:cross",
                                  "kd_lm")),
    "double-softmax": ("--stage distil --attn-form double-softmax", ("at:self", "at:cross")),
    "itm": ("--stage distil", ("itm",)),
    "retrieval": ("--stage finetune --task retrieval", ("itc",)),
    "caption": ("--stage finetune --task caption", ("lm",)),
    "vqa": ("--stage finetune --task vqa", ("lm",)),
}


def step_of(case, folder, init, batch, seed):
    """{name: gradient} of one process for its batch, and the model after it; averaged over the processes."""
    flags, wanted = CASES[case]
    flags = [*flags.split(), *(["--init", init] if "finetune" in flags else [])]
    cfg, _ = dlip.configure([*EMOJI, *flags, "--queue-size", "24", "--kd-lm", "1", "--momentum", "0.9", "--out",
                             f"{folder}/none"])
    torch.manual_seed(0)
    tokenizer = dlip.tokenizer_of(cfg)
    teacher = dlip.open_blip(init, cfg, tokenizer).double().eval().requires_grad_(False)
    model = dlip.build(cfg, tokenizer, teacher).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("momentum."):
                parameter += 0.05 * torch.randn(parameter.shape)  # not the student
    if case == "retrieval":
        model.index_queue[::2] = torch.arange(12)
    image, (ids, answers), index = batch
    texts = [ids, answers] if case == "vqa" else [ids]
    torch.manual_seed(seed)
    if cfg.stage == "distil":
        terms = model.pretrain(image, ids, 0.3, teacher)
    elif case == "retrieval":
        terms = model.retrieve(image, ids, index, 0.3)
    else:
        terms = {"lm": (model.write if case == "caption" else model.answer)(image, *texts)}
    assert set(wanted) <= terms.keys()
    sum(terms[name] for name in wanted).backward()
    common.average_gradients(model.parameters())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in wanted:
        found[f"term {name}"] = common.sum_over_processes(terms[name].detach().clone()) / common.world_size()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("student.")}
    return found, state


def _steps(place, world, port, folder, init):
    """One process: the gradients of a step of every case on its share of the batch, every world-th sample of it."""
    os.environ.update(RANK=str(place), WORLD_SIZE=str(world), LOCAL_RANK=str(place), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    common.start_device("cpu", 0)
    torch.Tensor.float = torch.Tensor.double  # wherever the model asks for full precision
    whole = made_up_batch()
    found = {}
    for case in CASES:
        halves = range(2) if world == 1 and case == "itm" else [place]
        parts = []
        for half in halves:  # ITM draws within a process: alone, a process takes one half after the other
            first, step = (half, 2) if len(halves) > 1 else (place, world)
            image, texts, index = whole
            batch = image[first::step], [ids[first::step] for ids in texts], index[first::step]
            parts.append(step_of(case, folder, init, batch, seed=11 + half))
        gradients = {name: sum(part[0][name] for part in parts) / len(parts) for name in parts[0][0]}
        found[case] = gradients, parts[0][1]
    torch.save(found, Path(folder, f"{world}-{place}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(teacher, tmp_path):
    port = free_port()
    processes = [SERVER.Process(target=_steps, args=(place, world, port, str(tmp_path), str(teacher)))
                 for world in (1, 2) for place in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
        assert process.exitcode == 0
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for case, (_, terms) in CASES.items():
        gradients, state = one[case]
        assert gradients.keys() == two[case][0].keys()
        assert {f"term {name}" for name in terms} <= gradients.keys() and len(gradients) > 20
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float64
            for rank in (two, other):
                worst = (rank[case][0][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
                assert worst <= 1e-9, (case, name, worst)
        assert equal(two[case][1], other[case][1]), "momentum and queues on both processes"
        for name, tensor in state.items() if case in ("distil", "retrieval") else ():
            if "queue" in name:  # the batch stands in it process by process
                tensor = torch.cat([tensor[:8:2], tensor[1:8:2], tensor[8:]])
            torch.testing.assert_close(two[case][1][name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def test_two_processes_distil(emoji, whole, tmp_path):
    """The same files, each row once, the same weights on both; the first step is that of one process but for ITM."""
    out = tmp_path / "run"
    scripts = together(*emoji, "--stage", "distil", "--out", out, dump=tmp_path)
    for script in scripts:
        assert script.wait().code == 0, script.err
    assert names_in(out) == {"config.json", "distil"}
    assert names_in(out / "distil") == names_in(whole / "distil")
    rows, expected = log_of(out / "distil"), log_of(whole / "distil")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for name in set(rows[0]) - {"itm", "loss"}:
        if rows[0][name]:
            assert float(rows[0][name]) == pytest.approx(float(expected[0][name]), rel=1e-4, abs=1e-6), name
    assert float(rows[0]["itm"]) == pytest.approx(float(expected[0]["itm"]), rel=0.1)
    assert equal(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"))
    assert "".join(script.out for script in scripts).count("step 8 ") == 1
    assert json.loads((out / "distil" / "config.json").read_text())["environment"]["processes"] == 2


def test_two_processes_run_all_stages(emoji, tmp_path):
    scripts = together(*emoji, "--task", "caption", "--epochs", "1", "--out", tmp_path / "run")
    for script in scripts:
        assert script.wait().code == 0, script.err
    assert {"results.json", "table.md", "captions.png"} <= names_in(tmp_path / "run")
    assert sum("pictures, tables" in script.out for script in scripts) == 1


def test_an_error_ends_both_processes(emoji, tmp_path):
    scripts = together(*emoji, "--stage", "finetune", "--out", tmp_path / "run")
    assert [script.wait(60).code for script in scripts] == [2, 2]
    assert "--init" in one_line(scripts[0].err)


# ----------------------------------------------------------------------------------------------------- precision, speed


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(emoji, whole, tmp_path, precision):
    """Finite losses near those of full precision; a killed run goes on with the scaler's state."""
    flags = [*emoji, "--stage", "distil", "--precision", precision, "--save-every", "3"]
    run(*flags, "--out", tmp_path / "whole")
    rows = log_of(tmp_path / "whole" / "distil")
    assert float(rows[0]["loss"]) == pytest.approx(float(log_of(whole / "distil")[0]["loss"]), rel=0.02)
    assert all(math.isfinite(float(row["loss"])) for row in rows)  # fp16 leaves its first steps out: other losses
    scaler = checkpoint(tmp_path / "whole" / "distil")["scaler"]
    assert scaler["scale"] > 1 if precision == "fp16" else not scaler
    if precision == "fp16":
        out = tmp_path / "killed"
        Dlip(*flags, "--out", out, pause=0.2).wait_for(out / "distil" / "log.csv", 6).kill()
        run("--resume", "--out", out)
        assert_same_stage(tmp_path / "whole" / "distil", out / "distil")


def test_grad_checkpoint_changes_nothing(emoji, whole, tmp_path):
    run(*emoji, "--stage", "distil", "--grad-checkpoint", "--out", tmp_path / "run")
    for row, expected in zip(log_of(tmp_path / "run" / "distil"), log_of(whole / "distil"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_compile_changes_little(emoji, whole, tmp_path):
    """Traced as for --compile, but without the C++ compiler, which takes a minute: the graph is what could break."""
    run(*emoji, "--stage", "distil", "--compile", "--epochs", "1", "--out", tmp_path / "run", eager_compiler=True)
    rows = log_of(tmp_path / "run" / "distil")
    for name in ("loss", "itc", "itm", "lm", "hr_img", "at_cross"):
        assert float(rows[0][name]) == pytest.approx(float(log_of(whole / "distil")[0][name]), rel=1e-4, abs=1e-6)
    names = checkpoint(tmp_path / "run" / "distil", "blip.pt")["model"].keys()
    assert names == checkpoint(whole / "distil", "blip.pt")["model"].keys()


# --------------------------------------------------------------------------------------------------------- user errors


@pytest.fixture(scope="module")
def wrong(folder, teacher, words_blip, tmp_path_factory):
    """Folder of things that cannot be used."""
    found = tmp_path_factory.mktemp("wrong")
    make_blip(found / "heads.pt", EMOJI, heads=8)
    make_blip(found / "patches.pt", EMOJI, vision_patch=4)
    content = torch.load(words_blip, weights_only=True)
    torch.save({"layer.weight": torch.zeros(3, 3)}, found / "other.pt")
    weights = {name: w for name, w in content["model"].items()
               if not re.search("decoder_attention|cls.predictions", name)}
    torch.save({**content, "model": weights}, found / "no_decoder.pt")
    (found / "cut.pt").write_bytes(teacher.read_bytes()[:5000])
    clip = {"visual.class_embedding": torch.zeros(8), "token_embedding.weight": torch.zeros(9, 8), "text_projection":
            torch.zeros(8, 8), "logit_scale": torch.tensor(1.0)}
    torch.save({"model": clip, "config": {"embed_dim": 8}}, found / "clip.pt")
    write_coco(found / "coco")
    names = [f"{i}.jpg" for i in range(4)]
    write_images(found / "sbu", names)
    write_json(found / "sbu" / "sbu.json", [{"image": f"{i}.jpg", "caption": "a thing"} for i in range(30)])
    write_vqa(found / "no_list", found / "no_list")
    (found / "no_list" / "answer_list.json").unlink()
    write_vqa(found / "no_annotations", found / "no_annotations", annotated=False)
    (found / "empty").mkdir()
    (found / "file").write_text("")
    return found


LAID_OUT = "--data coco --root {wrong}/coco --preset demo"
VQA = "--stage finetune --task vqa --data vqav2 --init {words}"
# Of a new run: the flags given, words that the message must hold.
ERRORS = {
    "--task everything": "--task everything retrieval caption vqa",
    "--task caption caption": "--task caption caption",
    "--stage everything": "--stage everything distil finetune",
    "--vit huge": "--vit huge tiny base",
    "--preset large": "--preset large demo paper",
    "--data nothing --stage distil": "nothing coco sbu",
    "--data nothing": "nothing",
    "--data coco*0+sbu --stage distil": "coco*0+sbu above",
    "--data nocaps --root {wrong}/coco": "nocaps evaluation",
    "--hr image": "--hr image img text vl_e vl_d none",
    "--hr img img": "--hr img img",
    "--hr none img": "--hr none img",
    "--attn selfish": "--attn selfish self cross none",
    "--attn none self": "--attn none self",
    "--no-vlp --method blip": "--no-vlp loss teacher",
    "--no-vlp --stage teacher": "--no-vlp loss teacher",
    "--no-vlp --hr none --attn none": "--no-vlp --hr none --attn none loss",
    "--lambda-hr -1": "--lambda-hr -1",
    "--momentum 1.5": "--momentum 1.5",
    "--alpha 2": "--alpha 2",
    "--queue-size -1": "--queue-size -1",
    "--epochs 0": "--epochs 0",
    "--dropout 1": "--dropout 1",
    "--image-size 42": "42 8",
    "--context-length 2": "--context-length 2",
    "--fusion-layers 9": "9 2",
    "--concepts 100000": "--concepts 100000",
    "--scenes 8": "8 16 --batch-size",
    "--batch-size 1000 --stage distil": "64 1000 --batch-size",
    "--device gpu": "--device gpu auto",
    "--out {wrong}/file": "{wrong}/file",
    "--ablate nothing": "nothing vlp all",
    "--ablate vlp --profile": "--ablate --profile",
    # checkpoints
    "--teacher {wrong}/missing.pt": "{wrong}/missing.pt",
    "--teacher {wrong}/cut.pt": "{wrong}/cut.pt damaged",
    "--teacher {wrong}/other.pt": "{wrong}/other.pt BLIP",
    "--teacher {wrong}/clip.pt": "{wrong}/clip.pt BLIP",
    "--teacher {wrong}": "{wrong} folder",
    "--teacher {words}": "{words} vocabulary 30,524 emoji",
    "--teacher {wrong}/heads.pt": "4 8 heads --attn none",
    "--teacher {wrong}/no_decoder.pt": "{wrong}/no_decoder.pt decoder",
    "--vision-init {wrong}/missing.pt": "{wrong}/missing.pt",
    "--teacher {wrong}/patches.pt": "26 101 image tokens --attn none",
    "--vision-init {wrong}/other.pt": "{wrong}/other.pt image weights",
    "--text-init {wrong}/other.pt": "{wrong}/other.pt BERT weights",
    "--init {words}": "--init finetune evaluate",
    "--init {words} --stage distil": "--init finetune evaluate",
    "--stage finetune --init {wrong}/missing.pt": "{wrong}/missing.pt",
    "--stage finetune --init {wrong}/cut.pt": "{wrong}/cut.pt damaged",
    "--stage finetune --init {wrong}/clip.pt": "{wrong}/clip.pt BLIP",
    "--stage finetune --init {words}": "{words} vocabulary 30,524 emoji",
    "--stage evaluate --init {words}": "{words} vocabulary 30,524 emoji",
    "--stage evaluate --init {wrong}/other.pt": "{wrong}/other.pt BLIP",
    "--stage finetune": "{out} distil --init FILE",
    "--stage evaluate": "{out} distil --init FILE",
    "--task caption --max-length 4 --stage evaluate --init {teacher}": "--max-length 4 prompt",
    "--max-length 4": "--max-length 4 prompt",
    "--context-length 5": "--context-length 5 prompt",
    # photographs
    "--stage all " + LAID_OUT: "--stage all emoji coco",
    "--ablate all " + LAID_OUT: "--ablate emoji coco",
    LAID_OUT: "--teacher --method blip",
    "--teacher {teacher} " + LAID_OUT: "{teacher} vocabulary coco",
    "--data coco --root {wrong}/empty --teacher {words} --preset demo": "{wrong}/empty captions_train2017.json",
    "--data coco --root {wrong}/missing --teacher {words} --preset demo": "{wrong}/missing",
    "--data sbu --root {wrong}/sbu --teacher {words} --preset demo": "26 sbu.json not found",
    "--stage finetune --task caption --init {teacher} " + LAID_OUT: "{teacher} vocabulary coco",
    "--stage finetune --task caption --init {wrong}/no_decoder.pt " + LAID_OUT: "{wrong}/no_decoder.pt decoder",
    "--stage finetune --task vqa --init {words} " + LAID_OUT: "questions 'coco' vqav2",
    VQA + " --root {wrong}/no_list": "no_list/answer_list.json",
    VQA + " --root {wrong}/no_annotations": "v2_mscoco_train2014_annotations.json",
    VQA + " --root {wrong}/empty": "{wrong}/empty",
    "--stage evaluate --task vqa --init {words} " + LAID_OUT: "questions 'coco' vqav2",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_user_errors(flags, emoji, teacher, words_blip, wrong, error_of, tmp_path):
    """One line, and nothing is left behind that a second try would stumble on."""
    names = dict(wrong=wrong, words=words_blip, teacher=teacher, out=tmp_path / "run")
    photographs = any(f"--data {name}" in flags for name in ("coco", "sbu", "vqav2", "nocaps"))
    start = [*BASIC, "--vit", "tiny", "--bert", "tiny"] if photographs else EMOJI if "--teacher" in flags else emoji
    start = [flag for flag in start if flag not in ("--teacher", str(teacher))] if "--init" in flags else start
    before = hashes(wrong, teacher.parent)
    message = error_of(*start, *(() if "--out" in flags else ("--out", tmp_path / "run")),
                       *flags.format(**names).split())
    missing = [word for word in ERRORS[flags].format(**names).split() if word not in message]
    assert not missing, message
    assert hashes(wrong, teacher.parent) == before
    assert not (tmp_path / "run").exists() and not any(tmp_path.rglob("*.*")), sorted(tmp_path.rglob("*"))


def test_several_processes_share_a_batch(emoji, error_of, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = error_of(*emoji, "--out", tmp_path / "run")
    assert "--batch-size 16" in message and "3 processes" in message
    assert "--ablate" in error_of(*emoji, "--ablate", "all", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_user_error_without_the_test_harness(tmp_path):
    finished = as_user("--stage", "evaluate", "--init", "none.pt", cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    assert "none.pt" in one_line(finished.stderr)
    assert not any(path for path in tmp_path.rglob("*") if path.is_file())


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def remove(*names):
    return lambda folder: [shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
                           for name in names]


def unfinished(stage):
    """As if it had been stopped after its last checkpoint."""
    return remove(*(f"{stage}/{name}" for name in ("results.json", "blip.pt")))


def untouched(folder):
    pass


# Of a finished run: what is done to its folder, the flags given then, words that the message must hold.
ON_A_RUN = {
    "already there": (untouched, "{emoji}", "{run} --resume --out"),
    "already there, one stage": (untouched, "{emoji} --stage distil", "{run} --resume --out"),
    "already there, a checkpoint": (untouched, "--stage finetune --init {teacher}", "{run} --out"),
    "another rate": (untouched, "--resume --lr 0.5", "--lr 0.5 0.004 {run}"),
    "another teacher": (untouched, "--resume --teacher {run}/distil/blip.pt", "--teacher {run}"),
    "other parts": (untouched, "--resume --hr img", "--hr {run}"),
    "another student": (untouched, "--stage finetune --vit small", "--vit small tiny {run}"),
    "another task's rate": (untouched, "--stage finetune --task caption --lr 0.5", "{run}/caption --lr 0.5 0.0004"),
    "other data": (untouched, "--stage evaluate --data coco", "--data coco emoji {run}"),
    "no fine-tuning": (remove("caption"), "--stage evaluate", "{run}/caption/blip.pt --stage finetune --task caption"),
    "no fine-tuned teacher": (remove("teacher-vqa"), "--stage evaluate", "{run}/teacher-vqa/blip.pt finetune vqa"),
    "no distillation": (remove("distil", "caption", "teacher-caption"), "--stage finetune", "{run}/distil/blip.pt"),
    "blip.pt cut": (lambda folder: [remove("caption")(folder), cut("distil/blip.pt", 3000)(folder)],
                    "--stage finetune", "{run}/distil/blip.pt damaged"),
    "fine-tuned blip.pt cut": (cut("vqa/blip.pt", 3000), "--stage evaluate --task vqa", "{run}/vqa/blip.pt damaged"),
    "last.pt cut": (lambda folder: [unfinished("distil")(folder), cut("distil/last.pt", 3000)(folder)],
                    "--resume", "{run}/distil/last.pt damaged"),
    "fine-tuned last.pt cut": (lambda folder: [unfinished("caption")(folder), cut("caption/last.pt", 3000)(folder)],
                               "--stage finetune", "{run}/caption/last.pt damaged"),
    "config.json cut": (cut("config.json", 100), "--resume", "{run}/config.json damaged"),
    "no room in evaluation": (untouched, "--stage evaluate --max-length 4", "--max-length 4 prompt"),
    "no room after the prompt": (remove("caption"), "--stage finetune --max-length 4", "--max-length 4 prompt"),
}


@pytest.mark.parametrize("case", ON_A_RUN)
def test_user_errors_on_a_run(case, emoji, teacher, whole, error_of, tmp_path):
    """One line, and nothing in the folder is changed."""
    change, flags, words = ON_A_RUN[case]
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    change(out)
    before = hashes(out)
    message = error_of(*flags.format(run=out, teacher=teacher, emoji=" ".join(emoji)).split(), "--out", out)
    missing = [word for word in words.format(run=out).split() if word not in message]
    assert not missing, message
    assert hashes(out) == before


# ---------------------------------------------------------------------------------------------------------- real images


@coco_mini
def test_photographs(tmp_path):
    """A teacher from nothing, distilled, fine-tuned and evaluated, with the whole vocabulary."""
    data = [*BASIC, *SIZES, "--data", "coco", "--root", COCO, "--epochs", "1", "--image-size", "64", "--queue-size",
            "64", "--num-beams", "2", "--rerank-k", "4"]
    run("--stage", "teacher", *data, "--out", tmp_path / "teacher")
    made = tmp_path / "teacher" / "teacher" / "blip.pt"
    weights = checkpoint(made.parent, "blip.pt")["model"]
    assert all(w.dtype == torch.float16 for w in weights.values())
    assert weights["text.embeddings.word_embeddings.weight"].shape == (30524, 32)
    out = tmp_path / "run"
    run("--stage", "distil", *data, "--teacher", made, "--out", out)
    assert len(log_of(out / "distil")) == 5 and finite(log_of(out / "distil"))
    run("--stage", "finetune", "--task", "caption", "retrieval", *data, "--lr", "1e-3", "--image-size", "48",
        "--out", out)
    for stage in ("caption", "retrieval"):
        assert len(log_of(out / stage)) == 5 and finite(log_of(out / stage)), stage
        assert checkpoint(out / stage, "blip.pt")["model"]["visual_encoder.pos_embed"].shape == (1, 37, 32), stage
    run("--stage", "evaluate", "--task", "retrieval", "caption", "--out", out)
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert list(cells) == ["student"] and all(0 <= cells["student"][name] for name in ("i2t_r1", "cider", "bleu4"))
    for task in ("retrieval", "caption"):  # at the size of the fine-tuning, as from its checkpoint alone
        run("--stage", "evaluate", "--task", task, *data, "--image-size", "48", "--init", out / task / "blip.pt",
            "--out", tmp_path / task)
        cell = json.loads((tmp_path / task / "results.json").read_text())["cells"]["model"]
        scores = {name: value for name, value in cell.items() if name not in ("GMACs", "parameters_M")}
        assert scores.items() <= cells["student"].items() and len(scores) > 5
    assert {"captions.png", "attention.png"} <= names_in(out)


@coco_mini
def test_one_checkpoint_on_several_tasks(words_blip, tmp_path):
    """A checkpoint as it is on both tasks, without a run."""
    run("--stage", "evaluate", "--init", words_blip, "--task", "retrieval", "caption", "--data", "coco", "--root", COCO,
        *BASIC, "--image-size", "40", "--context-length", "30", "--rerank-k", "4", "--out", tmp_path)
    cell = json.loads((tmp_path / "results.json").read_text())["cells"]["model"]
    assert all(0 <= cell[name] for name in ("i2t_r1", "itc_t2i_r10", "bleu4", "cider"))
    assert {"results.json", "table.md", "captions.png", "attention.png", "config.json"} == names_in(tmp_path)


def test_damaged_shards(words_blip, tmp_path):
    """One corrupt image in training and one in the test: counted, reported, trained around."""
    photographs = sorted((COCO / "train2017").glob("*.jpg"))

    def image(i):
        return photographs[i % len(photographs)].read_bytes() if photographs else photo(i)

    for split, numbers in (("train", range(32)), ("val", range(100, 108)), ("test", range(200, 212))):
        samples = photo_samples(numbers, image)
        if split != "val":
            samples[7][1]["jpg"] = samples[7][1]["jpg"][:200]
        write_shard(tmp_path / "data" / split / "00000.tar", samples)
    data = [*BASIC, *SIZES, "--data", "mine", "--root", tmp_path / "data", "--epochs", "1", "--queue-size", "32",
            "--rerank-k", "4", "--num-beams", "1"]
    script = run("--stage", "distil", *data, "--teacher", words_blip, "--out", tmp_path / "run")
    assert "mine: 1 of 32 samples cannot be used: 1 unreadable" in script.out
    script = run("--stage", "finetune", "--task", "caption", "retrieval", *data, "--out", tmp_path / "run")
    assert script.out.count("mine: 1 of 32 samples cannot be used: 1 unreadable") == 2
    assert all(len(log_of(tmp_path / "run" / stage)) == 2 for stage in ("distil", "caption", "retrieval"))
    assert all(log_of(tmp_path / "run" / task)[-1][f"val_{task}"] for task in ("caption", "retrieval"))
    run("--stage", "evaluate", "--task", "caption", "retrieval", "--out", tmp_path / "run")
    cells = json.loads((tmp_path / "run" / "results.json").read_text())["cells"]
    assert cells["student"]["unreadable"] == 1 and "cider" in cells["student"] and "teacher" not in cells


@coco_mini
def test_overfitting_photographs(tmp_path):
    """8 photographs are learned by heart: their captions are written, and they are found by them."""
    data = common.open_train("coco", COCO)
    common.write_keys(tmp_path / "keys.txt", [f"coco/{data.key(i)}" for i in range(8)])
    small = [*BASIC, *SIZES, "--data", "coco*50", "--root", COCO, "--vit", "small", "--bert", "small",
             "--context-length", "16"]
    start = make_blip(tmp_path / "start.pt", ["--stage", "distil", *map(str, small)])
    flags = [*small, "--keep", tmp_path / "keys.txt", "--init", start, "--batch-size", "8", "--crop-scale", "1",
             "--no-flip", "--randaugment", "0", "--small-lr", "1", "--warmup-steps", "20", "--queue-size", "0",
             "--dropout", "0", "--weight-decay", "0", "--log-every", "50", "--temp-lr", "0.07", "--momentum", "0.9",
             "--rerank-k", "8"]
    scores = {}
    for task, epochs, lr in (("caption", 7, 4e-3), ("retrieval", 6, 2e-3)):  # of 50 steps
        task_flags = [*flags, "--stage", "finetune", "--task", task, "--epochs", epochs, "--lr", lr, "--out",
                      tmp_path / task]
        run(*task_flags)
        for name in (start, tmp_path / task / task / "blip.pt"):
            scores[task, name == start] = scores_on_training_images(list(map(str, task_flags)), task, name)
    assert scores["caption", False]["cider"] > max(10 * scores["caption", True]["cider"], 100), scores
    assert scores["retrieval", True]["i2t_r1"] < 40
    assert min(scores["retrieval", False][f"{way}_r1"] for way in ("i2t", "t2i")) > 80, scores


def scores_on_training_images(flags, task, path):
    """{metric: percent} of a checkpoint on what --keep left to train on."""
    cfg, _ = dlip.configure(flags)
    tokenizer = dlip.tokenizer_of(cfg)
    blip = dlip.open_blip(path, cfg, tokenizer).eval()
    evaluator = dlip.Evaluator(blip, cfg, torch.device("cpu"), contextlib.nullcontext(), tokenizer)
    kept = common.training_set(dataclasses.replace(cfg, data="coco*1.0"))  # each once
    evaluator.sets = lambda task, split: {"kept": kept}
    return evaluator.scores(task, "test")


# ----------------------------------------------------------------------------------------- questions, mixtures, weights


@pytest.fixture(scope="module")
def vqa_root(folder):
    """VQA v2's layout: 36 questions for training and for validation, 6 without answers for the test."""
    root = folder / "vqav2"
    for year, count in (("train2014", 12), ("val2014", 12), ("test2015", 2)):
        write_vqa(root, root, year, count, annotated=year != "test2015")
    answers = [f"answer {a} to {100 * i + q}" for a in range(3) for i in range(2) for q in range(3)]
    write_json(root / "answer_list.json", answers)
    return root


def test_questions_about_photographs(words_blip, vqa_root, tmp_path):
    """Fine-tuned from a checkpoint; the answers to the test questions are written as the server takes them."""
    data = [*BASIC, "--image-size", "40", "--context-length", "30", "--data", "vqav2", "--root", vqa_root, "--task",
            "vqa", "--batch-size", "8"]
    out = tmp_path / "run"
    run("--stage", "finetune", *data, "--init", words_blip, "--epochs", "1", "--lr", "1e-3", "--out", out)
    rows = log_of(out / "vqa")
    assert len(rows) == 4 and finite(rows) and 0 <= float(rows[-1]["val_vqa"]) <= 100
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    names = checkpoint(out / "vqa", "blip.pt")["model"]
    assert any(name.startswith("text_decoder.") for name in names)
    run("--stage", "evaluate", "--out", out)
    ranked = json.loads((out / "answers_model.json").read_text())
    assert [answer["question_id"] for answer in ranked] == [0, 1, 2, 100, 101, 102]
    assert {answer["answer"] for answer in ranked} <= set(json.loads((vqa_root / "answer_list.json").read_text()))
    run("--stage", "evaluate", *data, "--vqa", "generate", "--init", out / "vqa" / "blip.pt", "--out",
        tmp_path / "said")
    said = json.loads((tmp_path / "said" / "answers_model.json").read_text())
    assert [answer["question_id"] for answer in said] == [0, 1, 2, 100, 101, 102]
    assert {"answers.png", "table.md", "results.json"} < names_in(tmp_path / "said")


def test_generated_answers_on_emoji(whole, tmp_path):
    run("--stage", "evaluate", "--task", "vqa", "--vqa", "generate", "--init", whole / "vqa" / "blip.pt", "--concepts",
        "10", "--device", "cpu", "--out", tmp_path)
    cell = json.loads((tmp_path / "results.json").read_text())["cells"]["model"]
    assert 0 <= cell["vqa_accuracy"] <= 100 and not (tmp_path / "answers_model.json").exists()


def test_a_mixture(words_blip, tmp_path):
    """COCO twice an epoch and SBU once, in folders of one root; then fine-tuned on one of them, from its checkpoint."""
    write_coco(tmp_path / "data" / "coco")
    for number, path in enumerate((tmp_path / "data" / "coco").rglob("*.jpg")):
        path.write_bytes(photo(number))
    names = list(write_images(tmp_path / "data" / "sbu", [f"{i}.jpg" for i in range(12)]))
    write_json(tmp_path / "data" / "sbu" / "sbu.json",
               [{"image": name, "caption": f"a thing {name}"} for name in names])
    parts = {name: common.open_train(name, tmp_path / "data" / name) for name in ("coco", "sbu")}
    data = ["--data", "coco*2+sbu", "--root", tmp_path / "data"]
    flags = [*BASIC, *SIZES, "--batch-size", "4", "--epochs", "1", "--queue-size", "8", "--rerank-k", "4"]
    out = tmp_path / "run"
    script = run("--stage", "distil", *flags, *data, "--teacher", words_blip, "--out", out)
    rows = log_of(out / "distil")
    assert len(rows) == (2 * len(parts["coco"]) + len(parts["sbu"])) // 4 and finite(rows)
    assert rows[-1]["val_retrieval"], script.out
    run("--stage", "finetune", "--task", "caption", *flags, "--data", "coco", "--root", tmp_path / "data" / "coco",
        "--init", out / "distil" / "blip.pt", "--out", tmp_path / "tuned")
    assert len(log_of(tmp_path / "tuned" / "caption")) == len(parts["coco"]) // 4


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_public_captioner(kind, tmp_path):
    """transformers' BlipForConditionalGeneration, as it is saved: the captions are its own."""
    common.import_torchvision()
    transformers = pytest.importorskip("transformers")
    save_file = pytest.importorskip("safetensors.torch").save_file
    config = transformers.BlipConfig(
        text_config=dict(vocab_size=30524, hidden_size=24, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=12, max_position_embeddings=64, encoder_hidden_size=64, bos_token_id=30522,
                         pad_token_id=0, sep_token_id=102, eos_token_id=102),
        vision_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
                           image_size=32, patch_size=16, layer_norm_eps=1e-6))
    torch.manual_seed(0)
    theirs = transformers.BlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    path = tmp_path / f"model.{kind}"
    save_file(weights, path) if kind == "safetensors" else torch.save(weights, path)
    for split, numbers in (("train", range(4)), ("test", range(100, 106))):
        write_shard(tmp_path / "data" / split / "00000.tar", photo_samples(numbers))
    run("--stage", "evaluate", "--task", "caption", "--init", path, "--data", "mine", "--root", tmp_path / "data",
        *BASIC, "--image-size", "32", "--num-beams", "1", "--pixel-stats", "clip", "--out", tmp_path / "run")
    cell = json.loads((tmp_path / "run" / "results.json").read_text())["cells"]["model"]
    captions, references, tokenizer = [], [], common.BertTokenizer(40)
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in common.PIXELS["clip"])
    data = common.open_retrieval("mine", tmp_path / "data", "test")
    prompt = torch.tensor([[30522, *tokenizer.encode("a picture of ")]])
    for i in range(len(data)):
        source, texts = data.read(i)
        image = (torch.from_numpy(common.resize_center_crop(source, 32))[None] / 255 - mean) / std
        with torch.no_grad():  # greedy, by its own forward pass; its generate() would cut the prompt
            ids = prompt
            while ids.shape[1] < 20 and ids[0, -1] != 102:
                logits = theirs(pixel_values=image, input_ids=ids).logits[0, -1]
                logits[102] = -torch.inf if ids.shape[1] < 5 else logits[102]
                ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
        captions.append(tokenizer.decode(ids[0, prompt.shape[1]:].tolist()))
        references.append(texts)
    for metric, value in common.caption_scores(references, captions).items():
        assert cell[metric] == pytest.approx(value, rel=1e-4, abs=1e-9), metric
    assert any(captions)


def test_public_image_encoder(emoji, tmp_path):
    """--vision-init from timm's ViT and torchvision's: the image encoder starts as that one."""
    timm = pytest.importorskip("timm")
    common.import_torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    ours = timm.models.vision_transformer.VisionTransformer(40, 8, embed_dim=32, depth=4, num_heads=2, num_classes=7)
    theirs = VisionTransformer(40, 8, 4, 2, 32, 128, num_classes=7)
    frozen = ["--lr", "1e-12", "--lr-start", "0", "--lr-end", "0", "--epochs", "1", "--stage", "distil"]
    for name, model, names in (("timm", ours, ("blocks.2.mlp.fc1.weight", "blocks.2.mlp.fc1.weight")),
                               ("torchvision", theirs, ("blocks.2.mlp.fc1.weight",
                                                        "encoder.layers.encoder_layer_2.mlp.0.weight"))):
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        run(*emoji, *frozen, "--vision-init", tmp_path / f"{name}.pth", "--out", tmp_path / name)
        found = checkpoint(tmp_path / name / "distil", "blip.pt")["model"]
        weight = dict(model.state_dict())[names[1]]
        torch.testing.assert_close(found[f"visual_encoder.{names[0]}"], weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(found["visual_encoder.patch_embed.proj.weight"].flatten(), next(
            w for key, w in model.state_dict().items() if key.endswith("proj.weight") and w.ndim == 4).flatten(),
            rtol=0, atol=1e-6)
