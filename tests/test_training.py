"""Training as a user starts it: kill and resume, Ctrl-C, several processes, wrong input, every mode of eclipse.py.

The reference is always another run: one process for two, the uninterrupted run for the resumed one, results.json for
--evaluate. Models are tiny; what they learn is tested elsewhere.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import common
import eclipse
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from harness import (
    COCO_MINI,
    REPO,
    SERVER,
    Script,
    assert_same_run,
    call,
    cells_of,
    checkpoint,
    environments,
    error,
    log_of,
    needs_coco,
    photo,
    photo_samples,
    run,
    several,
    write_photos,
    write_shard,
)

PYTHON = [sys.executable, str(REPO / "eclipse.py")]
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
    """A run as a user starts it, without --out; a notebook's and a launcher's variables are left over."""
    cwd = tmp_path_factory.mktemp("cwd")
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "RANK": "1", "WORLD_SIZE": ""}
    finished = subprocess.run([*PYTHON, *map(str, EMOJI)], cwd=cwd, env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return cwd / "runs" / "eclipse-emoji"


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of classes: train/ and test/ with five images each of two colours."""
    root = tmp_path_factory.mktemp("classes") / "colours"
    for index in range(0, 100, 5):  # photo() has ten colours
        folder = root / ("train" if index < 50 else "test") / f"colour_{index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(photo(index))
    return root


# ------------------------------------------------------------------------------ results, resuming


def test_results_hold_what_a_report_needs(emoji_run):
    results = json.loads((emoji_run / "results.json").read_text())
    assert results["cells"].keys() == CELLS and results["steps"] == 16
    for cell in results["cells"].values():
        assert {"concept_top1", "group_top1", "retrieval_i2t_r1", "images_per_second"} <= cell.keys()
    validated = [max(float(row["val_online"]), float(row["val_momentum"]))
                 for row in log_of(emoji_run) if row["val_online"]]
    assert results["best_validation"] == pytest.approx(max(validated))
    assert {"curves.png", "retrieval.png", "tokens.png"} <= {path.name for path in emoji_run.iterdir()}
    config = json.loads((emoji_run / "config.json").read_text())
    assert config["config"].keys() == {field.name for field in dataclasses.fields(eclipse.Config)}
    assert "--scenes 128" in config["environment"]["command"]


OPTIONS = {"text teacher": ["--text-teacher", "momentum", "--no-fuse", "--accum", 2, "--workers", 2],
           "fp16": ["--precision", "fp16", "--method", "clip"]}  # its GradScaler has a state


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kill_in_an_epoch_and_resume(photos, tmp_path, options):
    """Stopped at step 9 of 8 an epoch or soon after, then killed: the same bits as without."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run("eclipse", *photos, *options, "--out", whole)
    command = ["eclipse", *photos, *options, "--out", out]
    stopped = Script(*command).wait_for(out / "log.csv", 9).ctrl_c()
    step = checkpoint(out)["state"]["step"]
    assert stopped.code == 130 and f"step {step}" in stopped.err
    Script(*command, "--resume").wait_for(out / "log.csv", step + 1).kill()
    with open(out / "log.csv", "ab") as file:
        file.write(b"99,1.5,0.\0\0\0\0")  # a power cut in the middle of a row
    run(*command, "--resume")
    assert_same_run(whole, out)


def test_signals_with_loader_processes(photos, tmp_path):
    """SIGTERM to the whole group, as a scheduler sends it, still saves; the end of a loader process is one line."""
    for name in ("group", "loader"):
        out = tmp_path / name
        script = Script("eclipse", *photos, "--epochs", 500, "--workers", 1, "--out", out).wait_for(out / "log.csv", 3)
        pid = script.process.pid
        if name == "group":
            os.killpg(pid, signal.SIGTERM)
            assert script.wait().code == 130 and "stopped at step" in script.err
            assert (out / "last.pt").is_file()
        else:
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            assert script.wait().code == 2
            assert re.fullmatch(r"eclipse\.py: DataLoader worker .*\n", script.err), script.err


def test_a_full_disk_is_named(tmp_path):
    cfg = eclipse.Config(out=str(tmp_path), resume=True)
    run_folder = common.Run(cfg, None, ["step"])
    (run_folder.folder / "log.csv").symlink_to("/dev/full")
    with pytest.raises(common.UserError, match="log.csv cannot be written: No space left"):
        run_folder.log({"step": 1})


def test_resume_without_a_checkpoint_and_of_no_run_and_of_a_finished_one(photos, photos_run, tmp_path):
    killed, new = tmp_path / "killed", tmp_path / "new"
    Script("eclipse", *photos, "--out", killed).wait_for(killed / "log.csv", 2).kill()
    run("eclipse", "--resume", "--out", killed)
    run("eclipse", *photos, "--resume", "--out", new)
    run("eclipse", "--resume", "--out", new)
    for folder in (killed, new):
        assert_same_run(photos_run, folder)


def test_spawned_workers(emoji_run, tmp_path):
    """As on macOS and Windows: data and tokenizer travel to the workers."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    run("eclipse", *EMOJI, "--workers", 1, "--out", tmp_path / "run")
    multiprocessing.set_start_method(before, force=True)
    assert_same_run(emoji_run, tmp_path / "run")


def test_resume_after_samples_were_lost(photos, photos_run, tmp_path):
    shutil.copytree(photos_run, tmp_path / "run")
    root = write_photos(tmp_path / "photos")
    for last in (100, 128):  # fewer; as many, but others
        write_shard(root / "train" / "00001.tar", photo_samples(range(64, last), lambda i: photo(0)))
        assert f"the {last} training" in error("eclipse", "--resume", "--root", root, "--out", tmp_path / "run")


def test_a_broken_pipe_stops_cleanly(tmp_path):
    """`python eclipse.py | head -1`"""
    command = [*PYTHON, *map(str, EMOJI), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 1


def test_a_fault_of_ours_in_a_loader_process_ends_the_run(photos, tmp_path):
    code = "import common, eclipse; common.random_resized_crop = None; exit(common.run_main(eclipse.main))"
    command = [sys.executable, "-c", code, *map(str, photos), "--workers", "1", "--out", str(tmp_path / "run")]
    finished = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=90)
    assert finished.returncode == 1 and "TypeError" in finished.stderr


# ------------------------------------------------------------------------------ several processes


GRADIENT_CASES = [dict(method="clip"), dict(text_grad="momentum"), dict(text_grad="both"),
                  dict(text_teacher="momentum", teacher_keep_rate=0.7)]


def _gradients(env, file):
    """One process: the gradients of a step in every case, with and without --accum, in float64."""
    os.environ.update(env)
    torch.Tensor.float = torch.Tensor.double  # wherever the model asks for full precision
    device, size, found = common.start_device("cpu", 0), common.PRESETS["tiny"], {}
    amp, scaler = common.mixed_precision("fp32", device)
    share = slice(common.rank(), 16, common.world_size())
    for number, case in enumerate(GRADIENT_CASES):
        for accum in (1, 2):
            torch.manual_seed(0)
            model = eclipse.ECLIPSE(eclipse.Config(accum=accum, **case), size).double()
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape)  # the teacher is no copy of the student
            image = torch.randn(16, 3, size.image_size, size.image_size)[share].double()
            text = torch.randint(1, size.vocab_size, (16, size.context_length))[share]
            terms = eclipse.backward(model, image, text, (*model.teach(image, text), 2.0), amp, scaler)
            common.average_gradients(model.parameters())
            found[number, accum] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            loss = common.mean_over_processes(terms)["loss"]
            found[number, accum]["loss"] = torch.tensor(loss, dtype=torch.float64)
    if common.rank() == 0:
        torch.save(found, file)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """In float64, where 1e-10 leaves no room for another formula."""
    files = {world: tmp_path / f"{world}.pt" for world in (1, 2)}
    processes = [SERVER.Process(target=_gradients, args=(env, file))
                 for world, file in files.items() for env in environments(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    one, two = map(torch.load, files.values())
    for number, accum in one:
        assert "online.logit_scale" in one[number, 1]
        for name, gradient in one[number, 1].items():
            for other in (one[number, accum][name], two[number, accum][name]):
                atol = 1e-10 * max(gradient.abs().max().item(), 1e-3)
                torch.testing.assert_close(other, gradient, rtol=0, atol=atol)


def test_two_processes_train_as_one(photos, photos_run, tmp_path):
    """They give the losses of one to what float32 leaves, and write each file and row once."""
    scripts = several("eclipse", 2, *photos, "--accum", 2, "--out", tmp_path / "run")
    columns = ("step", "loss", "nce_online", "kd", "logit_scale", "lr")
    rows, expected = ([[float(row[column]) for column in columns] for row in log_of(folder)]
                      for folder in (tmp_path / "run", photos_run))
    np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=2e-3)
    names = {path.name for path in photos_run.iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert scripts[0].out.count("step 16 ") == 1 and "step 16 " not in scripts[1].out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["processes"] == 2


# --------------------------------------------------------------------------- divergence, disk full


@pytest.mark.parametrize("log_every", [1, 20])
def test_divergence_is_one_line_and_leaves_a_good_checkpoint(photos, tmp_path, monkeypatch, log_every):
    monkeypatch.setattr(common, "SAVE_EVERY", 1)
    code, _, err = call("eclipse", *photos, "--lr", "1e6", "--log-every", log_every, "--epochs", 8,
                        "--out", tmp_path / "run")
    assert code == 1 and err.count("\n") == 1 and re.search(r"at step \d+.*--lr", err)
    assert not (tmp_path / "run" / "results.json").exists()
    saved = checkpoint(tmp_path / "run")
    tensors = tree_leaves([saved["model"], saved["optimiser"]["state"]])
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_disk_full(tmp_path):
    """The last checkpoint stays whole, and the message names the file and the reason."""
    def write(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "last.pt").write_text("whole")
    with pytest.raises(common.UserError, match="last.pt.*No space left on device"):
        common.replace_file(tmp_path / "last.pt", write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("text, steps", [
    ("step,loss\n1,2\n2\n,3\n3,4,5\n²,1\nx,1\n4,\n5,6", ["1", "4", "5"]),
    ("stop,loss\n1,2", []), ("step\n1\n2,3", ["1"]), ("\0\0\0", []), ("", []),
])
def test_damaged_rows_of_a_log_are_passed_over(tmp_path, text, steps):
    (tmp_path / "log.csv").write_text(text)
    assert [row["step"] for row in common.read_csv(tmp_path / "log.csv")] == steps


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
    for name, text in ("foreign", '{"config": {"vit": "small"}}'), ("half", '{"config": {'):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    good, corrupt = photo_samples(range(40)), photo_samples(range(40, 50), lambda i: b"?")
    write_shard(folder / "bad" / "train" / "0.tar", good + corrupt)
    write_shard(folder / "bad" / "val" / "0.tar", good[:4])
    return folder


# What is given: words that the message must hold. {wrong}, {run}: the folders above and of a finished run.
ERRORS = {
    "--keep-rat 0.5": "--keep-rat", "--method simclr": "--method simclr eclipse",
    "--keep-rate 0": "--keep-rate 0", "--keep-rate nan": "--keep-rate",
    "--lr nan": "--lr", "--lr -1": "--lr -1",
    "--kd-ramp 0.5": "--kd-ramp", "--image-size 37": "37 8",
    "--concepts 413": "--concepts 413 412",
    "--resume --out {wrong}/foreign": "foreign/config.json",
    "--resume --out {wrong}/half": "half/config.json",
    "--scenes 8": "8 16", "--device gpu": "--device gpu auto",
    "--data nothing": "nothing", "--data nothing --root {wrong}/missing": "{wrong}/missing",
    "--data nothing --root {wrong}/empty": "{wrong}/empty",
    "--data coco --root {wrong}/empty": "{wrong}/empty", "--data bad --root {wrong}/bad --workers 1": "bad 10 %",
    "--eval-data {wrong}/missing": "{wrong}/missing",
    "--keep {wrong}/missing": "{wrong}/missing",
    "--evaluate {wrong}/missing.pt": "{wrong}/missing.pt",
    "--evaluate {wrong}/cut.pt": "{wrong}/cut.pt", "--init {wrong}/other.pt": "{wrong}/other.pt CLIP",
    "--out {run}": "{run} --resume --out", "--out {wrong}/file": "{wrong}/file",
    "--resume --out {run} --epochs 9": "--epochs 9 {run}",
    "--keep=": "--keep empty",
    "--ablate clip nothing": "nothing eclipse", "--ablate clip --method clip": "--method",
}


def test_a_stop_that_comes_with_the_last_step_is_not_lost():
    with pytest.raises(KeyboardInterrupt), common.StopRequest() as stop:
        stop.note(signal.SIGTERM, None)


@pytest.mark.parametrize("flags", ERRORS)
def test_user_errors_are_one_line(flags, wrong, photos_run, tmp_path):
    start = [] if flags.startswith(("--resume", "--evaluate")) else TINY if flags.startswith("--data") else EMOJI
    given, words = (text.format(wrong=wrong, run=photos_run).split() for text in (flags, ERRORS[flags]))
    message = error("eclipse", "--out", tmp_path / "run", *start, *given)
    assert all(word in message for word in words), message
    if not flags.startswith("--data bad"):  # only training itself finds those
        assert not (tmp_path / "run" / "log.csv").exists(), "the error came after training"


def test_a_user_error_without_the_test_harness(tmp_path):
    finished = subprocess.run([*PYTHON, "--evaluate", "none.pt"], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 2 and finished.stdout == "" and not any(tmp_path.iterdir())
    assert re.fullmatch("eclipse.py: .*none.pt.*\n", finished.stderr)


# -------------------------------------------------------------------------- real data, evaluation


@needs_coco
def test_coco(tmp_path):
    prepare = [sys.executable, REPO / "data" / "prepare.py", "coco", COCO_MINI, "--out", tmp_path / "coco"]
    subprocess.run(prepare, check=True, capture_output=True)
    run("eclipse", *TINY, "--data", "coco", "--root", tmp_path / "coco", "--epochs", 1, "--workers", 0,
        "--preset", "tiny", "--out", tmp_path / "run")
    cell = cells_of(tmp_path / "run")["online κ=0.7"]
    assert {"coco_i2t_r1", "coco_t2i_r10"} <= cell.keys()
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


@pytest.fixture
def tables(monkeypatch):
    """What print_table was given."""
    tables = []
    monkeypatch.setattr(common, "print_table", lambda cells, *_: tables.append(cells))
    return tables


def test_evaluate_gives_the_numbers_and_the_picture_of_the_run(emoji_run, tables, tmp_path):
    run("eclipse", "--evaluate", emoji_run / "last.pt", "--out", tmp_path)
    assert (tmp_path / "tokens.png").read_bytes() == (emoji_run / "tokens.png").read_bytes()
    for name, cell in cells_of(emoji_run).items():
        assert tables[0][name] == pytest.approx(cell)


def test_evaluate_with_linear_probe(photos, photos_run, classes, tables, tmp_path):
    """Of classes, not captions; at another image size: both towers' positions are resized."""
    for split in ("train", "test"):
        shutil.copytree(photos[-3] / "val", tmp_path / "captions" / split)
    run("eclipse", "--evaluate", photos_run / "last.pt", "--eval-data", classes, tmp_path / "captions",
        "--linear-probe", "--image-size", 24, "--workers", 0, "--out", tmp_path)
    assert tables[0].keys() == CELLS
    for cell in tables[0].values():
        assert cell["colours_top5"] == 100 and cell["colours_probe_top1"] >= 80  # two colours


def test_init_starts_from_the_weights(photos, photos_run, tmp_path):
    run("eclipse", *photos, "--init", photos_run / "last.pt", "--lr", 0, "--epochs", 1, "--out", tmp_path / "run")
    before, after = checkpoint(photos_run)["model"], checkpoint(tmp_path / "run")["model"]
    assert len(before) == len(after)
    for name, tensor in after.items():
        source = name.replace("momentum.", "online.visual.")  # a new teacher is a copy of the student
        torch.testing.assert_close(tensor, before[source], rtol=0, atol=1e-3, msg=name)
    _, _, resumed = eclipse.configure(["--resume", "--out", str(tmp_path / "run")])
    assert resumed.path == photos_run / "last.pt"  # whose sizes hold


# --------------------------------------------------------------------------------- help, ablation


def test_ablation_can_be_interrupted(tmp_path):
    """Ctrl-C in the second arm; the same command goes on there; a third call trains nothing. Each
    printed command, typed alone, gives the arm's digits."""
    out = tmp_path / "ablation"
    command = ["eclipse", *EMOJI, "--epochs", 1, "--ablate", "keep rate 0.4", "no fusion", "no fusion",
               "--seeds", 0, "--out", out]
    first, second = out / "keep_rate_0.4" / "seed0", out / "no_fusion" / "seed0"
    assert Script(*command).wait_for(second / "log.csv", 2).ctrl_c().code == 130
    assert (first / "results.json").exists() and not (second / "results.json").exists()
    printed = run(*command)
    assert "--keep-rate 0.4" not in printed
    table = (out / "table.md").read_text("utf-8")
    assert "keep rate 0.4: online κ=0.4" in table and "no fusion: momentum κ=1" in table
    assert "OMP_NUM_THREADS" not in run(*command)
    assert "--epochs" in error("eclipse", *EMOJI, "--ablate", "clip", "--out", out)  # of arms not named
    flags = re.search(r"OMP_NUM_THREADS=1 python \S+ (.*)", printed)[1]
    run("eclipse", *flags.replace(str(second), str(tmp_path / "alone")).split())
    assert_same_run(second, tmp_path / "alone")


def test_ablation_with_another_keep_rate_and_data(photos, classes, tmp_path):
    """A κ that is not on the curve, 1/3, and data without the emoji's zero-shot sets."""
    flags = [*photos, "--epochs", 1, "--keep-rate", 1 / 3, "--ablate", "eclipse", "--eval-data", classes,
             "--seeds", 0, 1, "--jobs", 2, "--out", tmp_path]
    eclipse.main(list(map(str, flags)))  # as from a notebook
    table = (tmp_path / "table.md").read_text("utf-8")
    assert "eclipse: online κ=0.333" in table and "colours_top1" in table
    assert (tmp_path / "sweet_spot.png").exists()


def test_differences_are_paired_by_seed():
    scores = {"clip": {0: 50, 1: 60, 2: 1}, "eclipse": {1: 63, 0: 48, 7: 5}}
    found = {arm: [{"seed": seed, "cells": {"x": {"top1": score}}} for seed, score in of_seeds.items()]
             for arm, of_seeds in scores.items()}
    std = statistics.stdev([63 - 60, 48 - 50])
    assert common.over_seeds(found, found["clip"])["eclipse: x"] == {"top1": f"0.5 ± {std:.3g} (1/2)"}
    assert common.over_seeds({"": found["clip"][:1]}) == {": x": {"top1": "50.0"}}


def test_a_failing_arm_is_one_line(tmp_path):
    message = error("eclipse", *EMOJI, "--scenes", 8, "--ablate", "clip", "--seeds", 0, "--out", tmp_path)
    assert "clip" in message and "16" in message
