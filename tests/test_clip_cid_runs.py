"""clip_cid.py as a user starts it: the stages one by one, kill and go on, several processes, wrong input, every mode.

The reference is always another way to the same thing: all stages at once, the uninterrupted run, one process, the
teacher called directly, brute force, eclipse.py. Models and pictures are tiny; what they learn is tested elsewhere.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import clip_cid
import common
import eclipse
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from test_training import (
    COCO_MINI,
    ONE_THREAD,
    REPO,
    SERVER,
    WORKERS,
    Script,
    cells_of,
    checkpoint,
    equal,
    free_port,
    log_of,
    photo,
    photo_samples,
    posix,
    write_shard,
)

SIZES = ("--vision-width 32 --vision-mlp 64 --vision-layers 1 --vision-heads 2 --text-width 32 --text-layers 1 "
         "--text-heads 2 --embed-dim 24 --image-size 32 --patch-size 8 --vocab-size 1000").split()
BASIC = "--batch-size 16 --epochs 2 --lr 1e-3 --warmup 1 --crop-scale 0.8 --device cpu --log-every 1".split()
TINY = [*SIZES, *BASIC, "--k", "8"]
EMOJI = [*TINY, "--scenes", "96", "--concepts", "10"]
COCO = REPO / COCO_MINI
coco_mini = pytest.mark.skipif(not COCO.is_dir(), reason="no COCO photographs here")


# ------------------------------------------------------------------------------------------------- starting the script


class Cid(Script):
    """clip_cid.py (or another script of this repository) in a process of its own.

    quick: pictures become one byte, and the emoji's test scenes are 100; both take seconds and are the same for all.
    pause: seconds that every batch of embeddings takes longer, so that an interruption meets it.
    """

    def __init__(self, *flags, cwd=REPO, env=(), quick=True, pause=0, script="clip_cid"):
        self.output = tempfile.TemporaryDirectory()
        self.process = SERVER.Process(target=_main, args=(script, list(map(str, flags)), str(cwd), self.output.name,
                                                          dict(env), quick, pause))
        self.process.start()

    def wait_until(self, test):
        """Until test() is true; fails when the script ends before."""
        while not test():
            assert self.process.is_alive(), f"ended before: {self.err}"
            time.sleep(0.001)
        return self


def _main(script, flags, cwd, output, env, quick, pause):
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.update(env)
    multiprocessing.set_start_method(WORKERS, force=True)
    sys.argv = [f"{script}.py", *flags]
    if quick:
        for name in [name for name in vars(common) if name.startswith("plot_")]:
            setattr(common, name, lambda path, *args, **kwargs: Path(path).write_bytes(b"p"))
        scenes = common.EmojiScenes
        common.EmojiScenes = lambda split, count, *args, **kwargs: scenes(
            split, count if split == "train" else min(count, 100), *args, **kwargs)
    if pause:
        encode = clip_cid.CLIP.encode_image
        clip_cid.CLIP.encode_image = lambda *args: [encode(*args), time.sleep(pause)][0]
    try:
        common.run_main({"clip_cid": clip_cid, "eclipse": eclipse}[script].main)
    finally:
        sys.stdout.flush()


def run(*flags, **how):
    """The script, run to its end, which must be a good one."""
    script = Cid(*flags, **how).wait()
    assert script.code == 0, script.err
    return script


def as_user(*flags, cwd=REPO, python=(), timeout=120):
    """`python clip_cid.py flags`; returns subprocess's CompletedProcess with text."""
    return subprocess.run([sys.executable, *python, str(REPO / "clip_cid.py"), *map(str, flags)], cwd=cwd,
                          env=ONE_THREAD, capture_output=True, text=True, timeout=timeout)


def together(*flags, port, **how):
    """Two processes of one run, as torchrun starts them."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Cid(*flags, env={**env, "RANK": str(place), "LOCAL_RANK": str(place)}, **how) for place in range(2)]


def one_line(text):
    """The message of an error: one line under the script's name, no traceback."""
    assert text.count("\n") == 1 and text.startswith("clip_cid.py: "), text
    return text.removeprefix("clip_cid.py: ").strip()


def keys_of(path):
    return path.read_text("utf-8").splitlines()


def hashes(*folders):
    """Of every file below: whether anything was written."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders for path in folder.rglob("*")
            if path.is_file()}


def table_of(text):
    """The numbers of a printed table of several metrics: {row: {column: text}}, whichever way it stands."""
    lines = text.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith(" ") and line.strip())
    head, *rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start:]]
    rows = [row for row in rows if len(row) == len(head) + 1]
    found = {row[0]: dict(zip(head, row[1:])) for row in rows}
    if any("_" in name for name in head):
        return found
    return {column: {row: values[column] for row, values in found.items()} for column in head}


def shown(cell):
    """What a table prints of a cell."""
    return {metric: common._shown(value) for metric, value in cell.items() if metric != "images_per_second"}


def assert_same_student(a, b):
    """Two run folders hold the same log, checkpoints and scores, to the last bit."""
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    for name in ("last.pt", "student.pt", "best.pt"):
        ours, theirs = checkpoint(a, name), checkpoint(b, name)
        assert ours.keys() == theirs.keys()
        assert all(equal(ours[key], theirs[key]) for key in ours if key != "config"), name
    assert cells_of(a) == cells_of(b)


# ----------------------------------------------------------------------------------------------------------- data, runs


def make_photos(root, train):
    for shard, samples in enumerate(train):
        write_shard(root / "train" / f"{shard:05d}.tar", samples)
    write_shard(root / "val" / "00000.tar", photo_samples(range(1000, 1008)))
    write_shard(root / "test" / "00000.tar", photo_samples(range(2000, 2024)))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tar shards of 160 small photographs, with validation and test sets."""
    return make_photos(tmp_path_factory.mktemp("photos"), [photo_samples(range(80)), photo_samples(range(80, 160))])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, root):
    """A CLIP that --stage teacher has made; its width is not the student's."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    flags = [*SIZES, *BASIC, "--embed-dim", "32", "--epochs", "4"]
    script = run("--stage", "teacher", *flags, "--data", "photos", "--root", root, "--workers", "0", "--out", out)
    assert str(out / "teacher.pt") in script.out
    weights = checkpoint(out, "teacher.pt")["model"]
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    assert equal(weights, {name: tensor.half() for name, tensor in checkpoint(out, "student.pt")["model"].items()})
    return out / "teacher.pt"


@pytest.fixture(scope="module")
def photos(root, teacher):
    """Flags to distil on the photographs."""
    return [*TINY, "--data", "photos", "--root", str(root), "--preset", "demo", "--workers", "0", "--teacher",
            str(teacher)]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The run folder of those flags, all stages at once, uninterrupted, with its pictures."""
    out = tmp_path_factory.mktemp("run") / "photos"
    run(*photos, "--out", out, quick=False)
    return out


@pytest.fixture(scope="module")
def emoji(teacher, tmp_path_factory):
    """The run folder of a run on the emoji scenes, without --out, in a folder of its own."""
    cwd = tmp_path_factory.mktemp("cwd")
    run(*EMOJI, "--teacher", teacher, cwd=cwd)
    assert [path.name for path in (cwd / "runs").iterdir()] == ["clip_cid-emoji"]
    return cwd / "runs" / "clip_cid-emoji"


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


def clip_of(path):
    """The CLIP in a checkpoint, and its Config."""
    weights, sizes = common.read_clip(path)
    cfg = clip_cid.Config(**sizes)
    clip = clip_cid.CLIP(cfg)
    clip.load_state_dict(weights)
    return clip.eval(), cfg


@torch.no_grad()
def embed_directly(clip, cfg, source, captions):
    """(image embedding (T,), text embeddings (C, T)) of one sample."""
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in common.PIXELS[cfg.pixel_stats])
    image = torch.from_numpy(common.resize_center_crop(source, cfg.image_size)) / 255
    tokens = common.CLIPTokenizer(cfg.context_length, cfg.vocab_size)(captions)
    return clip.encode_image((image - mean)[None] / std)[0].numpy(), clip.encode_text(tokens).numpy()


def assert_embedded(folder, teacher, data):
    """The embeddings in a folder are those of the teacher for the image and the captions of each key."""
    image, text, keys = np.load(folder / "image.npy"), np.load(folder / "text.npy"), keys_of(folder / "keys.txt")
    assert image.dtype == text.dtype == np.float16
    clip, cfg = clip_of(teacher)
    samples = {data.key(i): data.read(i) for i in range(len(data))}
    assert sorted(samples) == sorted(keys) and image.shape == (len(keys), cfg.embed_dim)
    assert text.shape == (len(keys), len(next(iter(samples.values()))[1]), cfg.embed_dim)
    for row, key in enumerate(keys):
        u, v = embed_directly(clip, cfg, *samples[key])
        np.testing.assert_allclose(image[row], u, atol=5e-4, err_msg=key)
        np.testing.assert_allclose(text[row], v, atol=5e-4, err_msg=key)


# --------------------------------------------------------------------------------------------------------------- stages


PRODUCTS = {
    "embed": {"image.npy", "text.npy", "keys.txt", "embeddings.json"},
    "balance": {"kept.txt", "balance.json", "groups.npz", "balance.png"},
    "cluster": {"clusters.npz", "clusters.png", "kmeans.png"},
    "distil": {"config.json", "log.csv", "timing.csv", "last.pt", "best.pt", "student.pt", "results.json",
               "curves.png", "retrieval.png"},
    "evaluate": {"evaluation.json", "similarities.png"},
}


def test_stages_one_by_one(photos, whole, tmp_path):
    out, made = tmp_path / "run", {}
    for stage in PRODUCTS:
        run(*photos, "--stage", stage, "--out", out)
        assert {path.name for path in out.iterdir()} - set(made) == PRODUCTS[stage]
        assert all((out / name).stat().st_mtime_ns == before for name, before in made.items()), "made again"
        made = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {path.name for path in whole.iterdir()} == set(made)
    assert_same_student(whole, out)
    for name in ("image.npy", "text.npy", "keys.txt", "embeddings.json", "kept.txt", "balance.json", "evaluation.json"):
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name
    for name in ("groups.npz", "clusters.npz"):
        with np.load(whole / name) as ours, np.load(out / name) as theirs:
            assert set(ours) == set(theirs) and all(np.array_equal(ours[part], theirs[part]) for part in ours), name


def test_products(whole, root, teacher):
    """What each file holds, against the others and against the teacher."""
    data = common.open_train("photos", root)
    assert_embedded(whole, teacher, data)
    info = json.loads((whole / "embeddings.json").read_text())
    assert info["complete"] is True and info["teacher_file"] == str(teacher)
    assert info["logit_scale"] == pytest.approx(clip_of(teacher)[0].logit_scale.item())
    keys, kept = keys_of(whole / "keys.txt"), keys_of(whole / "kept.txt")
    report = json.loads((whole / "balance.json").read_text())
    assert report["images"] == len(keys) == 160 and report["kept"] == len(kept) == len(set(kept))
    assert report["removed_share"] == pytest.approx(1 - len(kept) / 160) == pytest.approx(0.437, abs=0.05)
    kept_by_force = brute_force(np.load(whole / "image.npy"), report["eps"])
    assert [keys.index(key) for key in kept] == kept_by_force
    with np.load(whole / "groups.npz") as found:
        assert found["row"].tolist() == list(range(160))
        groups = [set(np.flatnonzero(found["group"] == name)) for name in np.unique(found["group"])]
    assert len(groups) == len(kept) and all(len(group & set(kept_by_force)) == 1 for group in groups)
    assert sorted(map(len, groups))[::-1][:10] == report["largest"][:len(groups)]
    with np.load(whole / "clusters.npz") as found:
        assert [keys[row] for row in found["row"]] == kept
        x = F.normalize(torch.from_numpy(np.load(whole / "image.npy")[found["row"]]).float(), dim=-1)
        centroids = torch.from_numpy(found["centroids"])
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(8))
        cosine = x @ centroids.T
        assert (cosine.gather(1, torch.from_numpy(found["label"])[:, None])[:, 0] >= cosine.amax(1) - 1e-6).all()
        assert len(found["objective"]) == 21
        assert found["objective"][-1] == pytest.approx(float(cosine.amax(1).mean()), 1e-5)
    rows = log_of(whole)
    assert len(rows) == len(kept) // 16 * 2
    assert all(float(row[name]) > 0 for row in rows for name in ("nce", "cluster_hard", "cluster_kl", "instance"))
    for row in rows:
        parts = sum(float(row[name]) for name in ("nce", "cluster_hard", "cluster_kl", "instance"))
        assert float(row["loss"]) == pytest.approx(parts, abs=1e-5)
    for picture in ("balance.png", "clusters.png", "kmeans.png", "curves.png", "retrieval.png", "similarities.png"):
        assert Image.open(whole / picture).size[0] > 300
    student = {f"student.{name}": tensor for name, tensor in checkpoint(whole, "student.pt")["model"].items()}
    trained = checkpoint(whole)["model"]
    assert all(equal(tensor, trained[name]) for name, tensor in student.items())
    assert {name.split(".")[0] for name in trained.keys() - student.keys()} == {
        "project_image", "project_text", "distil_scale", "centroids", "teacher_logit_scale"}


def test_evaluation_beside_the_teacher(whole, photos, teacher):
    """evaluation.json: the student's numbers are those of the run, the teacher's those of --evaluate."""
    found = json.loads((whole / "evaluation.json").read_text())
    assert found.keys() == {"student", "teacher"}
    assert found["student"] == cells_of(whole)["student"]
    flags = [flag for flag in photos[photos.index("--data"):] if flag not in ("--preset", "demo")]
    table = table_of(run("--evaluate", teacher, *flags[:flags.index("--teacher")]).out)
    assert table == {"teacher": shown(found["teacher"])}


def test_made_again_after_it_was_deleted(photos, whole, tmp_path):
    """What the messages about other settings ask for: the pictures are then those of the new settings."""
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=lambda _, names: PRODUCTS["distil"] | PRODUCTS["evaluate"])
    before = hashes(out)
    (out / "kept.txt").unlink(), (out / "clusters.npz").unlink()
    run(*photos, "--stage", "cluster", "--remove", "0.2", "--k", "5", "--out", out)
    changed = {path.name for path, value in hashes(out).items() if before[path] != value}
    assert changed == (PRODUCTS["balance"] | PRODUCTS["cluster"])


def test_a_cache_is_shared(photos, whole, tmp_path):
    """--cache: another run's embeddings are used, nothing is written there."""
    before = hashes(whole)
    run(*photos, "--cache", whole, "--stage", "cluster", "--out", tmp_path / "run")
    assert hashes(whole) == before
    assert not (tmp_path / "run" / "image.npy").exists()
    assert (tmp_path / "run" / "kept.txt").read_bytes() == (whole / "kept.txt").read_bytes()


# -------------------------------------------------------------------------------------------------------- interruptions


def rows_embedded(folder):
    """How many rows are written, while embeddings.json says that it is not complete."""
    try:
        if json.loads((folder / "embeddings.json").read_text())["complete"]:
            return 0
    except FileNotFoundError:
        return 0
    return int((~np.isnan(np.load(folder / "image.npy", mmap_mode="r")[:, 0])).sum())


@pytest.fixture(scope="module")
def embedded(teacher, tmp_path_factory):
    """Flags to embed 600 emoji scenes, and the folder of an uninterrupted run."""
    flags = [*EMOJI, "--scenes", "600", "--teacher", str(teacher), "--stage", "embed"]
    out = tmp_path_factory.mktemp("embedded") / "run"
    run(*flags, "--out", out)
    return flags, out


@pytest.mark.parametrize("how", ["kill", pytest.param("ctrl_c", marks=posix)])
def test_interrupted_while_embedding(embedded, tmp_path, how):
    flags, uninterrupted = embedded
    stopped = Cid(*flags, "--out", tmp_path, pause=3).wait_until(lambda: rows_embedded(tmp_path) > 0)
    getattr(stopped, how)()
    written = rows_embedded(tmp_path)
    assert 0 < written < 600
    assert how == "kill" or (stopped.code == 130 and one_line(stopped.err))
    before = np.load(tmp_path / "image.npy")
    run(*flags, "--out", tmp_path)
    done = ~np.isnan(before[:, 0])
    assert np.array_equal(np.load(tmp_path / "image.npy")[done], before[done])
    assert hashes(tmp_path).keys() == {tmp_path / path.name for path in uninterrupted.iterdir()}
    for path in uninterrupted.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_rows_that_are_there_are_not_embedded_again(embedded, tmp_path):
    """A run that was interrupted is told by its rows without a number, and only these are filled in."""
    flags, uninterrupted = embedded
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    info = json.loads((tmp_path / "embeddings.json").read_text())
    (tmp_path / "embeddings.json").write_text(json.dumps({**info, "complete": False}))
    image = np.load(tmp_path / "image.npy", mmap_mode="r+")
    image[:] = 1
    image[500:505] = np.nan
    image.flush()
    run(*flags, "--out", tmp_path)
    found, expected = np.load(tmp_path / "image.npy"), np.load(uninterrupted / "image.npy")
    assert (found[:500] == 1).all() and (found[505:] == 1).all()
    np.testing.assert_allclose(found[500:505], expected[500:505], atol=1e-3)


DISTIL = {
    "default": [],
    "learned": ["--prototypes", "learned", "--sample-rate", "0.5", "--accum", "2", "--instance", "both",
                "--text-cluster", "--k", "32", "--workers", "2"],
}


@pytest.mark.parametrize("options", DISTIL.values(), ids=DISTIL)
def test_kill_and_resume(photos, whole, tmp_path, options):
    out, reference = tmp_path / "killed", whole
    flags = [*photos, *options, "--cache", whole] if options else photos
    if options:
        reference = tmp_path / "whole"
        run(*flags, "--stage", "distil", "--out", reference)
    else:
        shutil.copytree(whole, out, ignore=lambda _, names: PRODUCTS["distil"] | PRODUCTS["evaluate"])
    killed = Cid(*flags, "--stage", "distil", "--save-every", "3", "--out", out).wait_for(out / "log.csv", 8).kill()
    assert not (out / "results.json").exists() and killed.code < 0
    assert checkpoint(out)["state"]["step"] in (5, 6, 8, 9)
    run("--resume", "--out", out)
    assert_same_student(reference, out)


@posix
def test_ctrl_c_saves_and_says_how_to_go_on(photos, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=lambda _, names: PRODUCTS["distil"] | PRODUCTS["evaluate"])
    stopped = Cid(*photos, "--out", out).wait_for(out / "log.csv", 3).ctrl_c()
    assert stopped.code == 130, stopped.err
    message, step = one_line(stopped.err), checkpoint(out)["state"]["step"]
    assert 3 <= step < 10 and f"step {step}" in message
    assert not (out / "student.pt").exists()
    run(*message[message.index("--resume"):].removesuffix(" goes on").split())
    assert_same_student(whole, out)
    assert (out / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


# ---------------------------------------------------------------------------------------------------- several processes


def test_two_processes(photos, whole, tmp_path):
    """Two processes embed, keep, cluster and learn as one does, and write each file and row once."""
    out, flags = tmp_path / "run", [*photos, "--accum", "2", "--block", "32", "--stage", "distil"]
    scripts = together(*flags, "--out", out, port=free_port())
    for script in scripts:
        assert script.wait().code == 0, script.err
    assert (out / "keys.txt").read_bytes() == (whole / "keys.txt").read_bytes()
    for name in ("image.npy", "text.npy"):
        np.testing.assert_allclose(np.load(out / name), np.load(whole / name), atol=1e-3)
    assert (out / "kept.txt").read_bytes() == (whole / "kept.txt").read_bytes()
    with np.load(whole / "clusters.npz") as one, np.load(out / "clusters.npz") as two:
        assert np.array_equal(one["label"], two["label"]) and np.array_equal(one["row"], two["row"])
        np.testing.assert_allclose(two["centroids"], one["centroids"], atol=1e-6)
        np.testing.assert_allclose(two["objective"], one["objective"], atol=1e-6)
    rows, expected = log_of(out), log_of(whole)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        for column in ("loss", "nce", "cluster_hard", "cluster_kl", "teacher_entropy", "instance", "logit_scale", "lr"):
            assert float(row[column]) == pytest.approx(float(other[column]), abs=2e-4), (row["step"], column)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()} - PRODUCTS["evaluate"]
    for words in (f"step {len(rows)} ", "balance: ", "k-means: ", "pictures, tables"):
        assert "".join(script.out for script in scripts).count(words) == 1, words
    assert json.loads((out / "config.json").read_text())["environment"]["processes"] == 2


def test_torchrun(tmp_path):
    np.save(tmp_path / "x.npy", clumps(np.float32))
    flags = ["--stage", "cluster", "--embeddings", tmp_path / "x.npy", "--k", "10", "--device", "cpu", "--block", "64"]
    run(*flags, "--out", tmp_path / "one")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    finished = as_user(*flags, "--out", tmp_path / "two", python=torchrun)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("k-means: 10 clusters") == 1
    assert_same_clusters(tmp_path / "one", tmp_path / "two")


def assert_same_clusters(a, b):
    assert (a / "kept.txt").read_bytes() == (b / "kept.txt").read_bytes()
    assert json.loads((a / "balance.json").read_text()) == json.loads((b / "balance.json").read_text())
    with np.load(a / "clusters.npz") as one, np.load(b / "clusters.npz") as two:
        assert np.array_equal(one["label"], two["label"]) and np.array_equal(one["row"], two["row"])
        np.testing.assert_allclose(two["centroids"], one["centroids"], atol=1e-6)


@pytest.mark.parametrize("arms", [["--eps", "0.1", "--block", "16"], ["--eps", "0.1"], [],
                                  ["--filter", "semdedup", "--block", "16"], ["--filter", "random"]], ids=" ".join)
def test_two_processes_balance_and_cluster_as_one(photos, whole, tmp_path, arms):
    """With blocks so small that both have several, and with one block, so that one process has none."""
    flags = [*photos, "--cache", whole, "--stage", "cluster", *arms]
    run(*flags, "--out", tmp_path / "one")
    for script in together(*flags, "--out", tmp_path / "two", port=free_port()):
        assert script.wait().code == 0, script.err
    assert_same_clusters(tmp_path / "one", tmp_path / "two")


def test_an_error_ends_both_processes(photos, whole, tmp_path):
    scripts = together(*photos, "--cache", whole, "--stage", "cluster", "--k", "1000", "--block", "32", "--out",
                       tmp_path / "run", port=free_port())
    assert [script.wait(60).code for script in scripts] == [2, 2]
    assert "--k 1000" in one_line(scripts[0].err)


GRADIENT_CASES = {
    "default": ["--k", "12"],
    "all": ["--k", "64", "--prototypes", "learned", "--sample-rate", "0.5", "--instance", "both", "--text-cluster",
            "--margin-type", "arcface", "--margin", "0.2", "--feature-weight", "10"],
    "logit-kl": ["--k", "64", "--prototypes", "learned-from-teacher", "--sample-rate", "0.4", "--instance", "logit-kl",
                 "--cluster-features", "joint"],
}


class MadeUp:
    """Embeddings without a teacher."""

    def __init__(self, n, width):
        rng = np.random.default_rng(0)
        self.image, self.text = rng.normal(size=(n, width)), rng.normal(size=(n, 1, width))


def _gradients(place, world, port, folder):
    """One process: the gradients of a step in every case, with and without --accum, averaged over the processes."""
    os.environ.update(RANK=str(place), WORLD_SIZE=str(world), LOCAL_RANK=str(place), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    device, found = common.start_device("cpu", 0), {}
    torch.Tensor.float = torch.Tensor.double  # wherever the model asks for full precision
    for case, options in GRADIENT_CASES.items():
        for accum in ("1", "2"):
            cfg, _ = clip_cid.configure([*EMOJI, *options, "--accum", accum, "--out", folder])
            torch.manual_seed(0)
            model = clip_cid.build(cfg, centroids=torch.randn(cfg.k, 20), teacher_logit_scale=3.0).double()
            data = common.training_set(cfg)
            label = torch.randint(cfg.k, (len(data),), generator=torch.Generator().manual_seed(1))
            samples = clip_cid.TaughtSamples(data, common.CLIPTokenizer(cfg.context_length, cfg.vocab_size), cfg,
                                             MadeUp(len(data), 20), np.arange(len(data)), label)
            sampler = common.StepSampler(len(samples), cfg.batch_size, 1, 0, 0, common.rank(), common.world_size())
            image, text, _, *taught = next(iter(common.train_loader(samples, sampler, 0, "cpu")))
            assert len(image) == len(taught[2]) == 16 // world
            amp, scaler = common.mixed_precision(cfg, device)
            image = clip_cid.normalise(image, torch.tensor([[0.5] * 3, [0.3] * 3]).view(2, 3, 1, 1) * 255).double()
            taught = clip_cid.to_device(taught, device)
            terms = clip_cid.backward(model, image, text, taught, amp, scaler, seed=7)
            common.average_gradients(model.parameters())
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found[case, accum] = {**grads, **{f"term {name}": torch.tensor(value, dtype=torch.float64)
                                              for name, value in common.mean_over_processes(terms).items()}}
    if place == 0:
        torch.save(found, Path(folder, f"{world}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    port = free_port()
    processes = [SERVER.Process(target=_gradients, args=(place, world, port, str(tmp_path)))
                 for world in (1, 2) for place in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert len(one) == 2 * len(GRADIENT_CASES)
    for case, accum in one:
        gradients, whole = one[case, accum], one[case, "1"]
        assert gradients.keys() == two[case, accum].keys()
        wanted = {"student.visual.proj", "student.logit_scale", "project_image.weight", "term cluster_kl"}
        wanted |= {"prototypes"} if case != "default" else set()
        wanted |= {"distil_scale", "project_text.weight"} if case != "logit-kl" else set()
        assert wanted <= gradients.keys() and all(gradients[name].abs().max() > 1e-9 for name in wanted), case
        for name, gradient in gradients.items():
            for other in (two[case, accum][name], whole[name]):
                worst = (other - gradient).abs().max() / whole[name].abs().max().clamp(min=1e-3)
                assert worst <= 1e-10, (case, accum, name, worst)


# --------------------------------------------------------------------------------------------------------- user errors


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, teacher, root):
    """Folder of things that cannot be used."""
    folder = tmp_path_factory.mktemp("wrong")
    cfg = clip_cid.Config(**{**dataclasses.asdict(clip_of(teacher)[1]), "embed_dim": 16})
    torch.save({"model": clip_cid.CLIP(cfg).state_dict(), "config": dataclasses.asdict(cfg)}, folder / "narrow.pt")
    (folder / "cut.pt").write_bytes(teacher.read_bytes()[:2000])
    torch.save({"layer.weight": torch.zeros(3, 3)}, folder / "other.pt")
    make_photos(folder / "photos", [photo_samples(range(200, 280))])
    rng = np.random.default_rng(0)
    np.save(folder / "good.npy", rng.normal(size=(20, 8)).astype(np.float32))
    np.save(folder / "flat.npy", rng.normal(size=20))
    np.save(folder / "int.npy", np.arange(40).reshape(20, 2))
    np.save(folder / "nan.npy", np.where(np.arange(20)[:, None] == 3, np.nan, rng.normal(size=(20, 8))))
    np.save(folder / "none.npy", np.zeros((0, 8)))
    np.save(folder / "zeros.npy", np.zeros((20, 8)))
    (folder / "text.npy").write_text("these are no vectors\n")
    np.savez(folder / "several.npz", a=np.zeros((2, 2)))
    (folder / "keys.txt").write_text("".join(f"k{i}\n" for i in range(19)))
    (folder / "twice.txt").write_text("".join(f"k{i // 2}\n" for i in range(20)))
    (folder / "unknown.txt").write_text("00000/000001\nnobody\nnothing\n")
    return folder


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size if size > 0 else (folder / name).stat().st_size + size)


def put_nan(name, row):
    def change(folder):
        array = np.load(folder / name, mmap_mode="r+")
        array[row] = np.nan
        array.flush()
    return change


def edit_kept(folder):
    path = folder / "kept.txt"
    path.write_text("\n".join(keys_of(path)[1:]) + "\n")


def half_embedded(folder):
    path = folder / "embeddings.json"
    path.write_text(path.read_text().replace("true", "false"))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def untouched(folder):
    pass


# Of a finished run: what is done to its folder, the flags given then, words that the message must hold.
ON_A_RUN = {
    "another teacher": (untouched, "--stage embed --teacher {wrong}/narrow.pt",
                        "{run}/embeddings.json teacher delete folder"),
    "another data set": (untouched, "--stage embed --root {wrong}/photos", "{run}/embeddings.json data delete folder"),
    "emoji for photographs": (untouched, "--stage embed --data emoji --scenes 64 --concepts 10",
                              "{run}/embeddings.json data delete folder"),
    "balanced again": (untouched, "--stage balance --keep {run}/kept.txt", "{run}/kept.txt data folder"),
    "another --remove": (untouched, "--stage balance --remove 0.3", "{run}/kept.txt remove 0.437 0.3 delete folder"),
    "--eps for --remove": (untouched, "--stage balance --eps 0.3", "{run}/kept.txt eps 0.3 delete folder"),
    "another --filter": (untouched, "--stage balance --filter random", "{run}/kept.txt filter balance random delete"),
    "kept.txt edited": (edit_kept, "--stage balance", "{run}/kept.txt changed --keep"),
    "another k": (untouched, "--stage cluster --k 4", "{run}/clusters.npz k 8 4 delete folder"),
    "other features": (untouched, "--stage cluster --cluster-features text", "{run}/clusters.npz image text delete"),
    "image.npy cut": (cut("image.npy", -100), "--stage balance", "{run}/image.npy cut"),
    "image.npy gone": (remove("image.npy"), "--stage balance", "{run}/image.npy missing"),
    "text.npy cut": (cut("text.npy", 90), "--stage balance", "{run}/text.npy cut"),
    "NaN in image.npy": (lambda folder: [remove("kept.txt", "clusters.npz")(folder), put_nan("image.npy", 7)(folder)],
                         "--stage balance", "00000/000007 NaN"),
    "NaN in image.npy of what is balanced": (put_nan("image.npy", 7), "--stage balance", "00000/000007 NaN"),
    "NaN in text.npy": (put_nan("text.npy", 7), "--stage cluster", "00000/000007 NaN"),
    "keys.txt cut": (cut("keys.txt", 100), "--stage balance", "{run}"),
    "embeddings.json cut": (cut("embeddings.json", 50), "--stage balance", "{run}/embeddings.json"),
    "balance.json gone": (remove("balance.json"), "--stage balance", "{run}"),
    "balance.json cut": (cut("balance.json", 50), "--stage balance", "{run}/balance.json"),
    "clusters.npz cut": (cut("clusters.npz", -300), "--stage cluster", "{run}/clusters.npz damaged delete"),
    "clusters.npz empty": (lambda folder: (folder / "clusters.npz").write_bytes(b""), "--stage cluster",
                           "{run}/clusters.npz damaged delete"),
    "half embedded and cut": (lambda folder: [half_embedded(folder), cut("image.npy", -100)(folder)], "--stage embed",
                              "{run}/image.npy"),
    "half embedded and gone": (lambda folder: [half_embedded(folder), remove("text.npy")(folder)], "--stage embed",
                               "{run}/text.npy"),
    "distilled already": (untouched, "--stage distil", "{run} --resume --out"),
    "resumed with another weight": (untouched, "--resume --cluster-weight 2", "--cluster-weight 2 1 {run}"),
    "evaluated without a student": (remove("student.pt"), "--stage evaluate", "{run} student distil"),
    "evaluated with a damaged one": (cut("student.pt", 2000), "--stage evaluate", "{run}/student.pt damaged"),
}


@pytest.mark.parametrize("case", ON_A_RUN)
def test_user_errors_on_a_run(case, photos, whole, wrong, tmp_path):
    """One line, and nothing in the folder is overwritten."""
    change, flags, words = ON_A_RUN[case]
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    change(out)
    before = hashes(out)
    start = [] if "--resume" in flags else photos
    script = Cid(*start, *flags.format(run=out, wrong=wrong).split(), "--out", out).wait()
    assert script.code == 2, script.err or "no error"
    message = one_line(script.err)
    missing = [word for word in words.format(run=out).split() if word not in message]
    assert not missing, message
    assert len(message) < 400
    assert hashes(out) == before


@pytest.mark.parametrize("flags", ["--scenes 90", "--noise 0.1", "--seed 1", "--concepts 11"])
def test_other_scenes_on_embeddings(flags, emoji, teacher):
    before = hashes(emoji)
    script = Cid(*EMOJI, "--teacher", teacher, "--stage", "embed", *flags.split(), "--out", emoji).wait()
    assert script.code == 2, script.err or "no error"
    assert "embeddings.json was made from other data: delete" in one_line(script.err)
    assert hashes(emoji) == before


# On an empty folder, with the embeddings of a run: the flags given, words that the message must hold.
ON_NONE = {
    "--stage cluster --k 120": "--k 120",
    "--filter semdedup --stage balance --k 161": "--k 161 160",
    "--stage balance --eps 2": "--eps 160 lower",
    "--stage balance --remove 0.999": "--remove 160 lower",
    "--stage balance --filter random --eps 0.4": "--eps --remove random",
    "--stage balance --remove 1": "--remove 1",
    "--stage balance --remove 43.7": "--remove 43.7",
    "--stage balance --eps 0": "--eps 0",
    "--k 0": "--k 0",
    "--sample-rate 0": "--sample-rate 0",
    "--sample-rate 2": "--sample-rate 2",
    "--margin 0.2": "--margin --margin-type",
    "--margin-type arcface": "--margin --margin-type",
    "--batch-size 128 --stage distil": "128 --batch-size",
    "--keep {wrong}/unknown.txt": "--keep {wrong}/unknown.txt 2 3",
    "--keep {wrong}/missing.txt": "{wrong}/missing.txt",
    "--stage evaluate": "{out} student distil",
    "--linear-probe": "--linear-probe --evaluate --stage",
    "--ablate nothing": "nothing 'clip' 'clip-cid'",
    "--ablate clip --stage distil": "--ablate --stage",
    "--embeddings {wrong}/good.npy": "--embeddings --stage balance cluster",
    "--embeddings {wrong}/good.npy --stage distil": "--embeddings --stage balance cluster",
    "--embeddings {wrong}/missing.npy --stage balance": "{wrong}/missing.npy missing",
    "--embeddings {wrong}/text.npy --stage balance": "{wrong}/text.npy .npy",
    "--embeddings {wrong}/several.npz --stage balance": "{wrong}/several.npz .npy",
    "--embeddings {wrong} --stage balance": "{wrong}",
    "--embeddings {wrong}/flat.npy --stage balance": "{wrong}/flat.npy (20,) vectors",
    "--embeddings {wrong}/int.npy --stage balance": "{wrong}/int.npy int64 floats",
    "--embeddings {wrong}/none.npy --stage balance": "{wrong}/none.npy (0, 8)",
    "--embeddings {wrong}/nan.npy --stage balance": "'3' NaN",
    "--embeddings {wrong}/zeros.npy --stage balance": "{wrong}/zeros.npy",
    "--embeddings {wrong}/good.npy --keys {wrong}/keys.txt --stage balance": "{wrong}/keys.txt 19 20",
    "--embeddings {wrong}/good.npy --keys {wrong}/twice.txt --stage balance": "{wrong}/twice.txt",
    "--embeddings {wrong}/good.npy --keys {wrong}/missing.txt --stage balance": "{wrong}/missing.txt",
    "--embeddings {wrong}/good.npy --stage cluster --k 20": "--k 20",
    "--embeddings {wrong}/good.npy --stage cluster --cluster-features joint": "--cluster-features joint",
    "--keys {wrong}/keys.txt --stage balance": "--keys --embeddings",
    "--stage embed --cache {empty} --teacher {wrong}/missing.pt": "{wrong}/missing.pt teacher",
    "--stage embed --cache {empty} --teacher {wrong}/cut.pt": "{wrong}/cut.pt damaged",
    "--stage embed --cache {empty} --teacher {wrong}/other.pt": "{wrong}/other.pt CLIP",
    "--stage embed --cache {empty} --teacher {wrong}": "{wrong}",
    "--stage embed --cache {wrong}/text.npy": "{wrong}/text.npy",
    "--stage teacher --method clip_cid": "--stage teacher --method clip",
    "--stage something": "--stage something balance",
}


@pytest.mark.parametrize("flags", ON_NONE)
def test_user_errors(flags, photos, whole, wrong, tmp_path):
    names = dict(wrong=wrong, out=tmp_path / "run", empty=tmp_path / "run")
    before = hashes(whole, wrong)
    script = Cid(*photos, *(() if "--cache" in flags else ("--cache", whole)), "--out", tmp_path / "run",
                 *flags.format(**names).split()).wait()
    assert script.code == 2, script.err or "no error"
    message = one_line(script.err)
    missing = [word for word in ON_NONE[flags].format(**names).split() if word not in message]
    assert not missing, message
    assert len(message) < 400 or "--ablate" in flags, message
    assert hashes(whole, wrong) == before
    assert not (tmp_path / "run" / "log.csv").exists()


def test_data_on_disk_need_a_teacher(root, tmp_path):
    script = Cid(*TINY, "--data", "photos", "--root", root, "--preset", "demo", cwd=tmp_path).wait()
    assert script.code == 2 and "--teacher FILE" in one_line(script.err)
    finished = as_user("--data", "cc3m", "--root", root, cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    assert "--teacher FILE" in one_line(finished.stderr)
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- balance of any embeddings


def brute_force(x, eps):
    """The rows that stay: of each component of the graph of pairs closer than ε the member nearest to the mean."""
    x = x.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = ((x[:, None] - x[None]) ** 2).sum(-1) < eps ** 2
    group = np.arange(len(x))
    for _ in range(len(x)):
        group = np.where(near, group[None], len(x)).min(1)
    kept = []
    for name in np.unique(group):
        members = np.flatnonzero(group == name)
        mean = x[members].mean(0)
        cosine = x[members] @ mean / np.linalg.norm(mean)
        kept.append(int(members[cosine >= cosine.max() - 1e-6][0]))
    return sorted(kept)


def clumps(dtype, n=300, d=16):
    """Vectors of any length: 60 centres, each with near copies at several distances."""
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(60, d))
    x = centres[rng.integers(60, size=n)] + rng.normal(size=(n, d)) * rng.choice([0.03, 0.1, 0.3], size=(n, 1))
    return (x * rng.uniform(0.5, 2, size=(n, 1))).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_balance_of_any_embeddings(tmp_path, dtype):
    """kept.txt against brute force, with keys and with row numbers; the file itself is left as it is."""
    x, keys = clumps(dtype), [f"été {i:03d}" for i in range(300)]
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "keys.txt").write_text("\n".join(keys) + "\n", "utf-8")
    before = hashes(tmp_path)
    flags = ["--stage", "balance", "--embeddings", tmp_path / "x.npy", "--device", "cpu", "--block", "64"]
    script = run(*flags, "--keys", tmp_path / "keys.txt", "--eps", "0.447", "--out", tmp_path / "a", cwd=tmp_path)
    expected = brute_force(x, 0.447)
    assert 60 < len(expected) < 280
    assert keys_of(tmp_path / "a" / "kept.txt") == [keys[row] for row in expected]
    assert f"{len(expected)} of 300 images kept" in script.out and "ε = 0.4470 (cosine distance 0.0999)" in script.out
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"kept.txt", "balance.json", "groups.npz"}
    run(*flags, "--remove", "0.4", "--out", tmp_path / "b", cwd=tmp_path)
    kept, eps = keys_of(tmp_path / "b" / "kept.txt"), json.loads((tmp_path / "b" / "balance.json").read_text())["eps"]
    assert len(kept) == 180 and list(map(int, kept)) == brute_force(x, eps)
    assert before.items() <= hashes(tmp_path).items()


def test_balance_as_the_help_shows_it(tmp_path):
    np.save(tmp_path / "FILE.npy", clumps(np.float32))
    script = run("--stage", "balance", "--embeddings", "FILE.npy", "--eps", "0.447", cwd=tmp_path)
    assert script.err == ""
    kept = keys_of(next(tmp_path.glob("runs/*/kept.txt")))
    assert list(map(int, kept)) == brute_force(clumps(np.float32), 0.447)


def test_cluster_any_embeddings(tmp_path):
    x = clumps(np.float32)
    np.save(tmp_path / "x.npy", x)
    flags = ["--stage", "cluster", "--embeddings", tmp_path / "x.npy", "--k", "10", "--device", "cpu"]
    run(*flags, "--filter", "none", "--out", tmp_path / "all")
    run(*flags, "--eps", "0.447", "--out", tmp_path / "kept")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"clusters.npz", "kmeans.png"}
    for folder, rows in (("all", list(range(300))), ("kept", brute_force(x, 0.447))):
        with np.load(tmp_path / folder / "clusters.npz") as found:
            assert found["row"].tolist() == rows and found["centroids"].shape == (10, 16)
            cosine = x[rows] / np.linalg.norm(x[rows], axis=1, keepdims=True) @ found["centroids"].T
            assert (cosine[np.arange(len(rows)), found["label"]] >= cosine.max(1) - 1e-6).all()
            assert np.all(np.diff(found["objective"]) > -1e-6) and len(np.unique(found["label"])) == 10


# ---------------------------------------------------------------------------------------------------------- real images


REAL = [*TINY, "--preset", "demo", "--workers", "2", "--epochs", "1"]


@coco_mini
def test_coco(teacher, tmp_path):
    """Five captions an image; each has its embedding, and the run ends with retrieval scores."""
    run(*REAL, "--data", "coco", "--root", COCO_MINI, "--teacher", teacher, "--out", tmp_path)
    assert np.load(tmp_path / "text.npy").shape == (80, 5, 32)
    data = common.open_train("coco", COCO)

    class FirstFive:
        def __len__(self):
            return len(data)

        def key(self, i):
            return data.key(i)

        def read(self, i):
            source, captions = data.read(i)
            return source, captions[:5]

    assert_embedded(tmp_path, teacher, FirstFive())
    assert len(log_of(tmp_path)) == len(keys_of(tmp_path / "kept.txt")) // 16 > 0
    for name in ("student", "teacher"):
        cell = json.loads((tmp_path / "evaluation.json").read_text())[name]
        assert all(0 <= cell[f"coco_{way}_r{k}"] <= 100 for way in ("i2t", "t2i") for k in (1, 5, 10))


def test_damaged_images_in_shards(teacher, tmp_path):
    """A corrupt image has a row of zeros and is not kept; the run goes on, its neighbours have their own rows."""
    photographs = sorted((COCO / "train2017").glob("*.jpg"))

    def image(i):
        return photographs[i % len(photographs)].read_bytes() if photographs else photo(i)

    train = photo_samples(range(48), image)
    train[7][1]["jpg"] = train[7][1]["jpg"][:200]
    train[31][1]["jpg"] = b"no image"
    root = tmp_path / "data"
    make_photos(root, [train[:32], train[32:]])
    out, flags = tmp_path / "run", [*REAL, "--data", "mine", "--root", root, "--teacher", teacher]
    run(*flags, "--remove", "0.2", "--out", out)
    image_rows, keys = np.load(out / "image.npy"), keys_of(out / "keys.txt")
    zero = [keys[row] for row in np.flatnonzero((image_rows == 0).all(1))]
    assert zero == ["00000/000007", "00000/000031"]
    assert (np.load(out / "text.npy")[[7, 31]] == 0).all()
    kept = keys_of(out / "kept.txt")
    assert not set(zero) & set(kept) and len(kept) == pytest.approx(46 * 0.8, abs=2)
    good = common.Subset(common.open_train("mine", root), [i for i in range(48) if i not in (7, 31)])
    clip, cfg = clip_of(teacher)
    for i in range(len(good)):
        u, _ = embed_directly(clip, cfg, *good.read(i))
        np.testing.assert_allclose(image_rows[keys.index(good.key(i))], u, atol=5e-4)
    assert len(log_of(out)) == len(kept) // 16
    run(*flags, "--filter", "none", "--cache", out, "--stage", "distil", "--out", tmp_path / "none")
    with np.load(tmp_path / "none" / "clusters.npz") as found:  # without --filter it is left out too
        assert found["row"].tolist() == [row for row in range(48) if row not in (7, 31)]


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_checkpoints_evaluate_to_the_numbers_of_the_run(whole, photos, tmp_path):
    data = photos[photos.index("--data"):photos.index("--preset")]
    expected = shown(cells_of(whole)["student"])
    assert "photos_i2t_r1" in expected
    for script in ("clip_cid", "eclipse"):
        for name in ("student", "last"):
            flags = ["--evaluate", whole / f"{name}.pt", *data, "--workers", "0"]
            found = table_of(run(*flags, script=script, cwd=tmp_path).out)
            cells = [cell for row, cell in found.items() if row in (name, "κ=1", "online κ=1")]
            assert cells, found
            for cell in cells:
                assert {metric: cell[metric] for metric in expected} == expected, (script, name)
    found = table_of(run("--evaluate", whole / "last.pt", cwd=tmp_path).out)  # it knows its own data
    assert found == {"last": expected}
    assert not any(tmp_path.iterdir())  # nothing is written


def test_linear_probe_and_means_on_emoji(emoji, teacher):
    script = run(*EMOJI, "--teacher", teacher, "--stage", "evaluate", "--linear-probe", "--out", emoji)
    found, run_cell = json.loads((emoji / "evaluation.json").read_text()), cells_of(emoji)["student"]
    for name, cell in found.items():
        assert 0 <= cell["emoji_probe_top1"] <= 100 and cell["emoji_probe_C"] > 0
        assert cell["mean_top1"] == pytest.approx((cell["concept_top1"] + cell["group_top1"]) / 2)
        assert shown(cell) == table_of(script.out)[name]
    assert {metric: found["student"][metric] for metric in run_cell} == run_cell


def test_several_evaluation_sets(whole, photos, classes, tmp_path):
    """A mean over the class folders, zero-shot and linear probe; colours are told apart by any features."""
    sets = ["--eval-data", "colours", "hues", "--eval-root", tmp_path / "sets", "--linear-probe", "--workers", "0"]
    for name in ("colours", "hues"):
        shutil.copytree(classes, tmp_path / "sets" / name)
    cell = table_of(run("--evaluate", whole / "student.pt", *sets, cwd=tmp_path).out)["student"]
    assert cell["colours_top1"] == cell["hues_top1"] == cell["mean_top1"]
    assert float(cell["colours_probe_top1"]) == float(cell["mean_probe_top1"]) >= 80
    shutil.copytree(whole, tmp_path / "run")
    run(*photos, "--stage", "evaluate", *sets, "--out", tmp_path / "run")
    for found in json.loads((tmp_path / "run" / "evaluation.json").read_text()).values():
        assert {"colours_top1", "hues_top5", "mean_top1", "hues_probe_top1", "mean_probe_top1"} <= found.keys()


def test_kept_samples_in_eclipse(whole, photos, tmp_path):
    """kept.txt as --keep of the other script: it trains on exactly these."""
    own = ("--k", "--teacher")
    flags = [flag for at, flag in enumerate(photos) if flag not in own and photos[at - 1] not in own]
    flags = [*flags, "--method", "clip", "--keep", str(whole / "kept.txt")]
    kept = keys_of(whole / "kept.txt")
    data = common.training_set(eclipse.configure([*flags, "--out", str(tmp_path / "run")])[0])
    assert [data.key(i) for i in range(len(data))] == kept
    run(*flags, "--epochs", "1", "--out", tmp_path / "run", script="eclipse")
    assert len(log_of(tmp_path / "run")) == len(kept) // 16


# -------------------------------------------------------------------------------- plain CLIP, help, profile, ablation


def test_clip_is_the_clip_of_eclipse(root, tmp_path):
    flags = [*SIZES, *BASIC, "--data", "photos", "--root", root, "--preset", "demo", "--workers", "0", "--method",
             "clip", "--weight-decay", "0.2", "--beta2", "0.98", "--accum", "2", "--act", "gelu", "--lr-end", "1e-5"]
    run(*flags, "--filter", "none", "--out", tmp_path / "cid")
    run(*flags, "--keep-rate", "1", "--out", tmp_path / "eclipse", script="eclipse")
    ours, theirs = log_of(tmp_path / "cid"), log_of(tmp_path / "eclipse")
    assert len(ours) == len(theirs) == 20
    for row, other in zip(ours, theirs):
        assert (row["loss"], row["logit_scale"], row["lr"]) == (other["loss"], other["logit_scale"], other["lr"])
    assert not (tmp_path / "cid" / "image.npy").exists()  # no teacher was needed


def test_clip_on_the_kept_images(photos, whole, tmp_path):
    """--method clip with the filter: the same images, no clusters, no terms of the teacher."""
    run(*photos, "--method", "clip", "--cache", whole, "--out", tmp_path)
    assert (tmp_path / "kept.txt").read_bytes() == (whole / "kept.txt").read_bytes()
    assert not (tmp_path / "clusters.npz").exists()
    rows, taught = log_of(tmp_path), log_of(whole)
    assert len(rows) == len(taught) and all(row["loss"] == row["nce"] and not row["instance"] for row in rows)
    assert rows[0]["nce"] == taught[0]["nce"]  # the same first batch and weights


def test_help_names_every_field(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = as_user("--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0 and finished.stderr == ""
    assert after.ru_utime - before.ru_utime < 3  # of the processor: others may be using it
    for field in dataclasses.fields(clip_cid.Config):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", finished.stdout), field.name
        words = field.metadata["help"].split()[:3]
        assert re.search(r"\s+".join(map(re.escape, words)), finished.stdout), field.name
    assert not any(tmp_path.iterdir())


def test_profile_prints_a_table(photos, tmp_path):
    finished = run(*photos, "--profile", cwd=tmp_path)
    lines = [re.split(r"\s{2,}", line.strip()) for line in finished.out.splitlines()]
    head = lines[0]
    table = {line[0]: dict(zip(head, line[1:])) for line in lines[1:3]}
    assert table.keys() == {"student", "teacher"}
    assert {"image_tower_M", "text_tower_M", "image_GMACs", "images_per_second"} == table["student"].keys()
    assert "clip_cid: 0.00 M" in finished.out and "times the time of a clip step" in finished.out
    assert not any(tmp_path.iterdir())


@posix
def test_ablation_can_be_interrupted(photos, whole, tmp_path):
    """Ctrl-C in the second arm; the same command goes on there; a third call trains nothing."""
    out = tmp_path / "ablation"
    command = [*photos, "--epochs", "1", "--cache", whole, "--ablate", "clip", "clip-cid", "--seeds", "0", "1", "--out",
               out]
    second = out / "clip-cid" / "seed0"
    stopped = Cid(*command).wait_for(second / "log.csv", 2).ctrl_c()
    assert stopped.code == 130 and "same command" in one_line(stopped.err)
    done = {path: path.stat().st_mtime_ns for path in (out / "clip" / "seed0").iterdir()}
    assert (out / "clip" / "seed0" / "results.json").exists() and not (second / "results.json").exists()
    finished = run(*command)
    assert "clip-cid, seed 0" in finished.out and "clip, seed 0" not in finished.out
    assert done == {path: path.stat().st_mtime_ns for path in done}
    steps = {name: [len(log_of(out / name / f"seed{seed}")) for seed in (0, 1)] for name in ("clip", "clip-cid")}
    assert steps == {"clip": [10, 10], "clip-cid": [10, 10]}  # as many samples, from fewer images
    table = (out / "table.md").read_text("utf-8")
    assert "clip: student" in table and "clip-cid: student" in table and "photos_i2t_r1" in table and "±" in table
    difference = (out / "difference_to_clip.md").read_text("utf-8")
    assert "clip-cid: student" in difference and re.search(r"\([012]/2\)", difference)
    assert table_of(finished.out).keys() == {"teacher"}
    again = run(*command)
    assert ", seed " not in again.out and "step " not in again.out
    wrong = Cid(*command, "--lr", "0.5").wait()
    assert wrong.code == 2 and "--lr" in one_line(wrong.err)


def test_ablation_on_emoji_without_a_cache(teacher, tmp_path):
    """The scenes of every seed are others: each arm embeds its own."""
    run(*EMOJI, "--epochs", "1", "--teacher", teacher, "--ablate", "clip + filter", "--seeds", "0", "1", "--out",
        tmp_path)
    keys = [keys_of(tmp_path / "clip_+_filter" / f"seed{seed}" / "kept.txt") for seed in (0, 1)]
    assert not set(keys[0]) & set(keys[1])
    assert "concept_top1" in (tmp_path / "table.md").read_text("utf-8")
