"""Training as a user starts it: kill and resume, Ctrl-C, several processes, wrong input, every mode of eclipse.py.

The reference is always another run: one process for two, the uninterrupted run for the resumed one, results.json for
--evaluate. Models are tiny; what they learn is tested elsewhere.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import common
import eclipse
import numpy as np
import pytest
import torch
from PIL import Image

from harness import (
    COCO_MINI,
    REPO,
    SERVER,
    Script,
    assert_same_run,
    call,
    cells_of,
    checkpoint,
    error,
    log_of,
    needs_coco,
    photo,
    photo_samples,
    posix,
    run,
    several,
    write_photos,
    write_shard,
)

TINY = ["--preset", "tiny", "--batch-size", 16, "--epochs", 2, "--log-every", 1, "--lr", "1e-3"]
EMOJI = [*TINY, "--scenes", 128, "--concepts", 10]  # 8 steps an epoch
CELLS = {"online κ=0.7", "online κ=1", "momentum κ=0.7", "momentum κ=1"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Flags to train on tar shards of 128 small photographs."""
    root = write_photos(tmp_path_factory.mktemp("photos"))
    return [*TINY, "--data", "photos", "--root", root, "--workers", 0]


@pytest.fixture(scope="module")
def photos_run(photos, tmp_path_factory):
    """The run folder of those flags, uninterrupted."""
    out = tmp_path_factory.mktemp("run") / "photos"
    run("eclipse", *photos, "--out", out)
    return out


@pytest.fixture(scope="module")
def emoji_run(tmp_path_factory):
    """The folder of a run as a user starts it, in an empty working directory, without --out."""
    cwd = tmp_path_factory.mktemp("cwd")
    command = [sys.executable, REPO / "eclipse.py", *EMOJI]
    finished = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in (cwd / "runs").iterdir()] == ["eclipse-emoji"]
    return cwd / "runs" / "eclipse-emoji"


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of classes: train/ and test/ of two colours, 10 and 5 images each."""
    root = tmp_path_factory.mktemp("classes") / "colours"
    for split, count in (("train", 10), ("test", 5)):
        for colour in (0, 4):
            folder = root / split / f"colour_{colour}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.jpg").write_bytes(photo(colour + 10 * i + (split == "test") * 1000))
    return root


# ------------------------------------------------------------------------------ results, resuming


def test_results_hold_what_a_report_needs(emoji_run):
    results = json.loads((emoji_run / "results.json").read_text())
    assert results["cells"].keys() == CELLS and results["steps"] == 16
    for cell in results["cells"].values():
        assert {"concept_top1", "group_top1", "retrieval_i2t_r1", "images_per_second"} <= cell.keys()
        assert all(np.isfinite(value) for value in cell.values())
    validated = [max(float(row["val_online"]), float(row["val_momentum"]))
                 for row in log_of(emoji_run) if row["val_online"]]
    assert len(validated) == 2  # once an epoch
    assert results["best_validation"] == pytest.approx(max(validated))
    for picture in ("curves.png", "retrieval.png", "tokens.png"):
        assert Image.open(emoji_run / picture).size[0] > 300
    config = json.loads((emoji_run / "config.json").read_text())
    assert config["config"].keys() == {field.name for field in dataclasses.fields(eclipse.Config)}
    assert config["environment"]["torch"] == torch.__version__
    assert "--scenes 128" in config["environment"]["command"]


OPTIONS = {"text teacher": ["--text-teacher", "momentum", "--no-fuse", "--accum", 2, "--workers", 2],
           "fp16": ["--precision", "fp16", "--method", "clip"]}  # its GradScaler has a state


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kill_in_an_epoch_and_resume(photos, tmp_path, monkeypatch, options):
    """Stopped at step 11 of 8 an epoch, then killed at step 13: the same bits as without."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run("eclipse", *photos, *options, "--out", whole)
    command = ["eclipse", *photos, *options, "--out", out]
    stopped = Script(*command).wait_for(out / "log.csv", 11).ctrl_c()
    assert stopped.code == 130 and not (out / "results.json").exists()
    step = checkpoint(out)["state"]["step"]
    assert 11 <= step < 16 and f"step {step}" in stopped.err
    if step < 14:
        Script(*command, "--resume").wait_for(out / "log.csv", step + 1).kill()
    with open(out / "log.csv", "ab") as file:
        file.write(b"99,1.5,0.\0\0\0\0")  # a power cut in the middle of a row
    run(*command, "--resume")
    assert_same_run(whole, out)


def test_kill_before_the_first_checkpoint(photos, photos_run, tmp_path):
    out = tmp_path / "run"
    Script("eclipse", *photos, "--out", out).wait_for(out / "log.csv", 2).kill()
    run("eclipse", "--resume", "--out", out)
    assert_same_run(photos_run, out)


def test_resume_of_a_finished_run_and_of_no_run(photos, photos_run, tmp_path):
    shutil.copytree(photos_run, tmp_path / "run")
    run("eclipse", "--resume", "--out", tmp_path / "run")
    assert_same_run(photos_run, tmp_path / "run")
    assert "starting one" in run("eclipse", *photos, "--resume", "--out", tmp_path / "new")
    assert_same_run(photos_run, tmp_path / "new")


@posix
def test_spawned_workers(emoji_run, tmp_path):
    """As on macOS and Windows: data and tokenizer travel to the workers."""
    out = tmp_path / "run"
    assert Script("eclipse", *EMOJI, "--workers", 1, "--out", out, workers_by="spawn").wait().code == 0
    assert_same_run(emoji_run, out)


def test_resume_after_samples_were_lost(photos, photos_run, tmp_path):
    shutil.copytree(photos_run, tmp_path / "run")
    root = write_photos(tmp_path / "photos")
    write_shard(root / "train" / "00001.tar", photo_samples(range(64, 100)))
    message = error("eclipse", "--resume", "--root", root, "--out", tmp_path / "run")
    assert "128" in message and "100" in message


@posix
def test_a_broken_pipe_stops_cleanly(tmp_path):
    """`python eclipse.py | head -1`"""
    command = [sys.executable, str(REPO / "eclipse.py"), *map(str, EMOJI), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    message = process.stderr.read()
    assert process.wait(300) == 130 and "Traceback" not in message, message
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_notebook(tmp_path):
    """Colab's and Kaggle's MPLBACKEND, a stdout that cannot be reconfigured, leftovers of a launcher."""
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.no_such_backend", "RANK": "1", "WORLD_SIZE": ""}
    program = ("import sys, io; out = sys.stdout\n"
               "class Stream(io.StringIO):\n    reconfigure = property()\n"
               "sys.stdout = Stream(); import common, eclipse\n"
               "code = common.run_main(eclipse.main, sys.argv[1:]); out.write(sys.stdout.getvalue()); sys.exit(code)")
    command = [sys.executable, "-c", program, *map(str, EMOJI), "--epochs", "1", "--out", str(tmp_path / "run")]
    finished = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for picture in ("curves.png", "retrieval.png", "tokens.png"):
        assert (tmp_path / "run" / picture).exists()


# ------------------------------------------------------------------------------ several processes


GRADIENT_CASES = [["--method", "clip"], ["--text-grad", "momentum"], ["--text-grad", "both"],
                  ["--text-teacher", "momentum", "--teacher-keep-rate", "0.7"]]


def _gradients(place, world, store, folder):
    """One process: the gradients of a step in every case, with and without --accum, in float64."""
    os.environ.update(RANK=str(place), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=place, world_size=world)
    torch.Tensor.float = torch.Tensor.double  # wherever the model asks for full precision
    found, size = {}, common.PRESETS["tiny"]
    for case in GRADIENT_CASES:
        for accum in ("1", "2"):
            cfg, _, _ = eclipse.configure([*map(str, EMOJI), *case, "--accum", accum, "--out", folder])
            torch.manual_seed(0)
            model = eclipse.ECLIPSE(cfg, size).double()
            for name, parameter in model.named_parameters():
                if name.startswith("momentum"):
                    parameter.data += 0.02 * torch.randn(parameter.shape)  # no copy of the student
            amp, scaler = common.mixed_precision("fp32", torch.device("cpu"))
            generator = torch.Generator().manual_seed(1)
            share = slice(place * 16 // world, (place + 1) * 16 // world)
            image = torch.randn(16, 3, size.image_size, size.image_size, generator=generator)[share].double()
            text = torch.randint(1, size.vocab_size, (16, size.context_length), generator=generator)[share]
            others = *model.teach(image, text), 2.0
            terms = eclipse.backward(model, image, text, others, amp, scaler)
            common.average_gradients(model.parameters())
            found[(*case, accum)] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found[(*case, accum)]["loss"] = torch.tensor(common.mean_over_processes(terms)["loss"])
    if place == 0:
        torch.save(found, Path(folder, f"{world}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """In float64, where 1e-10 leaves no room for another formula."""
    processes = [SERVER.Process(target=_gradients, args=(place, world, tmp_path / "store", str(tmp_path)))
                 for world in (1, 2) for place in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert len(one) == 2 * len(GRADIENT_CASES)
    for case in one:
        assert one[case].keys() == two[case].keys() and "online.logit_scale" in one[case]
        whole = one[(*case[:-1], "1")]
        for name, gradient in whole.items():
            for other in (one[case][name], two[case][name]):
                worst = (other - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
                assert worst <= (1e-6 if name == "loss" else 1e-10), (case, name, worst)  # loss: as float32


def test_two_processes_train_as_one(photos, photos_run, tmp_path):
    """They give the losses of one to what float32 leaves, and write each file and row once."""
    scripts = several("eclipse", 2, *photos, "--accum", 2, "--out", tmp_path / "run")
    rows, expected = log_of(tmp_path / "run"), log_of(photos_run)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        for column in ("loss", "nce_online", "kd", "logit_scale", "lr"):
            assert float(row[column]) == pytest.approx(float(other[column]), abs=2e-3), (row["step"], column)
    names = {path.name for path in photos_run.iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert scripts[0].out.count("step 16 ") == 1 and "step 16 " not in scripts[1].out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["processes"] == 2


# --------------------------------------------------------------------------- divergence, disk full


def finite(content):
    if isinstance(content, torch.Tensor):
        return bool(content.isfinite().all())
    if isinstance(content, dict):
        return all(map(finite, content.values()))
    return all(map(finite, content)) if isinstance(content, (list, tuple)) else True


@pytest.mark.parametrize("log_every", [1, 20])
def test_divergence_is_one_line_and_leaves_a_good_checkpoint(photos, tmp_path, monkeypatch, log_every):
    monkeypatch.setattr(common, "SAVE_EVERY", 1)
    code, _, err = call("eclipse", *photos, "--lr", "1e6", "--log-every", log_every, "--epochs", 8,
                        "--out", tmp_path / "run")
    assert code == 1 and err.count("\n") == 1 and re.search(r"at step \d+", err) and "--lr" in err
    assert not (tmp_path / "run" / "results.json").exists()
    saved = checkpoint(tmp_path / "run")
    assert finite(saved["model"]) and finite(saved["optimiser"])


def test_disk_full(photos, tmp_path, monkeypatch):
    """The last checkpoint stays whole, and the message names the file and the reason."""
    monkeypatch.setattr(common, "SAVE_EVERY", 2)
    write, calls = torch.save, []

    def save(content, path):
        calls.append(path)
        if len(calls) > 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(content, path)

    monkeypatch.setattr(torch, "save", save)
    message = error("eclipse", *photos, "--out", tmp_path / "run")
    assert "No space left on device" in message and ".pt" in message
    assert checkpoint(tmp_path / "run")["state"]["step"] > 0
    assert not list((tmp_path / "run").glob("*.tmp"))


# ------------------------------------------------------------------------------------ user errors


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, photos_run):
    """A folder of things that cannot be used."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    content = (photos_run / "last.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[:len(content) // 2])
    torch.save({"layer.weight": torch.zeros(3, 3)}, folder / "other.pt")
    (folder / "file").write_text("")
    good, corrupt = photo_samples(range(40)), photo_samples(range(40, 50), lambda i: b"?")
    write_shard(folder / "bad" / "train" / "0.tar", good + corrupt)
    write_shard(folder / "bad" / "val" / "0.tar", good[:4])
    return folder


# What is given: words that the message must hold. {wrong}, {run}: the folders above and of a finished run.
ERRORS = {
    "--keep-rat 0.5": "--keep-rat", "--epochs many": "--epochs many", "--method simclr": "--method simclr eclipse",
    "--keep-rate 0": "--keep-rate 0", "--keep-rate nan": "--keep-rate", "--noise -0.1": "--noise -0.1",
    "--ema 1.5": "--ema", "--lr nan": "--lr", "--lr -1": "--lr -1", "--seed -1": "--seed -1",
    "--batch-size 0": "--batch-size", "--kd-ramp 0.5": "--kd-ramp", "--image-size 37": "37 8",
    "--concepts 100000": "--concepts 100000", "--concepts 2 --difficulty hard": "--concepts 2",
    "--scenes 8": "8 16", "--device gpu": "--device gpu auto",
    "--data nothing": "nothing", "--data nothing --root {wrong}/missing": "{wrong}/missing",
    "--data nothing --root {wrong}/empty": "{wrong}/empty", "--data nothing --root {wrong}/file": "{wrong}/file",
    "--data coco --root {wrong}/empty": "{wrong}/empty", "--data bad --root {wrong}/bad --workers 1": "bad 10 %",
    "--eval-data nothing": "nothing", "--eval-data {wrong}/missing": "{wrong}/missing",
    "--keep {wrong}/missing": "{wrong}/missing",
    "--evaluate {wrong}/missing.pt": "{wrong}/missing.pt", "--evaluate {wrong}/empty": "{wrong}/empty",
    "--evaluate {wrong}/cut.pt": "{wrong}/cut.pt", "--init {wrong}/other.pt": "{wrong}/other.pt CLIP",
    "--evaluate {run}/last.pt --eval-data nothing": "nothing",
    "--out {run}": "{run} --resume --out", "--out {wrong}/file": "{wrong}/file",
    "--resume --out {run} --epochs 9": "--epochs 9 {run}",
    "--ablate clip nothing": "nothing eclipse",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_user_errors_are_one_line(flags, wrong, photos_run, tmp_path):
    def named(text):
        return text.format(wrong=wrong, run=photos_run)

    start = [] if flags.startswith(("--resume", "--evaluate")) else TINY if flags.startswith("--data") else EMOJI
    out = [] if "--out" in flags else ["--out", tmp_path / "run"]
    message = error("eclipse", *start, *named(flags).split(), *out)
    missing = [word for word in named(ERRORS[flags]).split() if word not in message]
    assert not missing, message
    assert len(message) < 500 or "--ablate" in flags, message
    if not flags.startswith("--data bad"):  # only training itself finds those
        assert not (tmp_path / "run" / "log.csv").exists(), "the error came after training"


def test_a_user_error_without_the_test_harness(tmp_path):
    command = [sys.executable, str(REPO / "eclipse.py"), "--evaluate", "none.pt"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("eclipse.py: ") and finished.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------- real data, evaluation


@needs_coco
def test_coco(tmp_path):
    prepared = tmp_path / "coco"
    command = [sys.executable, str(REPO / "data" / "prepare.py"), "coco", str(COCO_MINI), "--out", str(prepared)]
    subprocess.run(command, check=True, capture_output=True)
    out = run("eclipse", *TINY, "--data", "coco", "--root", prepared, "--preset", "tiny", "--epochs", 1,
              "--workers", 0, "--out", tmp_path / "run")
    assert "coco_i2t_r1" in out
    cell = cells_of(tmp_path / "run")["online κ=0.7"]
    assert all(0 <= cell[f"coco_{way}_r{k}"] <= 100 for way in ("i2t", "t2i") for k in (1, 5, 10))
    assert len(log_of(tmp_path / "run")) == 5  # 80 photographs in batches of 16


def test_unusable_samples_in_a_row_count_once_each(tmp_path):
    """4 of 64 are less than 10 %, also where they stand together and one stands in for the other."""
    samples = photo_samples(range(64))
    for _, parts in samples[20:24]:
        parts["jpg"] = b"no image"
    write_shard(tmp_path / "data" / "train" / "0.tar", samples)
    write_shard(tmp_path / "data" / "val" / "0.tar", samples[:4])
    out = run("eclipse", *TINY, "--data", "mine", "--root", tmp_path / "data", "--workers", 0,
              "--out", tmp_path / "run")
    assert out.count("mine: 4 of 64 samples cannot be used") == 2  # once an epoch


def test_evaluate_gives_the_numbers_of_the_run(emoji_run, tmp_path, monkeypatch):
    tables = []
    monkeypatch.setattr(common, "print_table", lambda cells, *_: tables.append(cells))
    run("eclipse", "--evaluate", emoji_run / "last.pt")
    for name, cell in cells_of(emoji_run).items():
        mean = (cell["concept_top1"] + cell["group_top1"]) / 2
        assert tables[0][name] == pytest.approx({**cell, "mean_top1": mean})


def test_evaluate_on_a_folder_of_classes_with_linear_probe(photos_run, classes, monkeypatch):
    tables = []
    monkeypatch.setattr(common, "print_table", lambda cells, *_: tables.append(cells))
    run("eclipse", "--evaluate", photos_run / "last.pt", "--eval-data", classes, "--linear-probe", "--workers", 0)
    assert tables[0].keys() == CELLS
    for cell in tables[0].values():
        assert cell["colours_top5"] == 100 and cell["colours_probe_top1"] >= 80  # two colours


def test_init_starts_from_the_weights(photos, photos_run, tmp_path):
    run("eclipse", *photos, "--init", photos_run / "last.pt", "--lr", 0, "--epochs", 1, "--out", tmp_path / "run")
    before, after = checkpoint(photos_run)["model"], checkpoint(tmp_path / "run")["model"]
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        source = name.replace("momentum.", "online.visual.")  # a new teacher is a copy of the student
        torch.testing.assert_close(tensor, before[source], rtol=0, atol=1e-3, msg=name)
    run("eclipse", *photos, "--init", photos_run / "last.pt", "--image-size", 24, "--epochs", 1,
        "--out", tmp_path / "larger")
    assert len(checkpoint(tmp_path / "larger")["model"]["online.visual.positional_embedding"]) == 10


# --------------------------------------------------------------------------------- help, ablation


def test_help_names_every_field():
    code, out, _ = call("eclipse", "--help")
    assert code == 0
    for field in dataclasses.fields(eclipse.Config):
        words = field.metadata["help"].split()[:3]
        assert re.search(rf"--{field.name.replace('_', '-')}\b", out), field.name
        assert re.search(r"\s+".join(map(re.escape, words)), out), field.name


@posix
def test_ablation_can_be_interrupted(tmp_path):
    """Ctrl-C in the second arm; the same command goes on there; a third call trains nothing. Each
    printed command, typed alone, gives the arm's digits."""
    out = tmp_path / "ablation"
    command = ["eclipse", *EMOJI, "--epochs", 1, "--ablate", "keep rate 0.4", "no fusion", "--seeds", 0,
               "--out", out]
    first, second = out / "keep_rate_0.4" / "seed0", out / "no_fusion" / "seed0"
    stopped = Script(*command).wait_for(second / "log.csv", 2).ctrl_c()
    assert stopped.code == 130 and "same command" in stopped.err
    assert (first / "results.json").exists() and not (second / "results.json").exists()
    out_text = run(*command)
    assert "no_fusion" in out_text and "--keep-rate 0.4" not in out_text
    table = (out / "table.md").read_text("utf-8")
    assert "keep rate 0.4: online κ=0.4" in table and "no fusion: momentum κ=1" in table
    assert Image.open(out / "sweet_spot.png").size[0] > 300
    assert [row["step"] for row in log_of(second)] == [str(step) for step in range(1, 9)]
    assert "OMP_NUM_THREADS" not in run(*command)
    printed = re.search(r"OMP_NUM_THREADS=(\d+) python \S+ (.*)", out_text)
    flags = printed[2].replace(str(second), str(tmp_path / "alone")).split()
    run("eclipse", *flags)
    assert_same_run(second, tmp_path / "alone")


def test_ablation_with_another_keep_rate_and_data(photos, classes, tmp_path):
    """A κ that is not on the curve, 1/3, and data without the emoji's zero-shot sets."""
    out = tmp_path / "ablation"
    run("eclipse", *photos, "--epochs", 1, "--keep-rate", 1 / 3, "--ablate", "eclipse", "--eval-data", classes,
        "--seeds", 0, 1, "--jobs", 2, "--out", out)
    table = (out / "table.md").read_text("utf-8")
    assert "eclipse: online κ=0.333" in table and "colours_top1" in table and "±" in table
    assert (out / "sweet_spot.png").exists()


def test_a_failing_arm_is_one_line(tmp_path):
    message = error("eclipse", *EMOJI, "--scenes", 8, "--ablate", "clip", "--seeds", 0, "--out", tmp_path)
    assert "clip" in message and "16" in message


def test_evaluate_at_another_image_size(photos_run, classes):
    """Both towers' positions are resized."""
    out = run("eclipse", "--evaluate", photos_run / "last.pt", "--image-size", 24, "--eval-data", classes,
              "--workers", 0)
    assert "momentum κ=1" in out
