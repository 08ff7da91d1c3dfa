"""clip_cid.py as a user starts it: stage by stage, kill and go on, several processes, wrong input.

The reference is always another way to the same thing: all stages at once, the uninterrupted run,
one process, the teacher called directly, brute force, eclipse.py. Models and pictures are tiny.
"""

import concurrent.futures
import dataclasses
import json
import os
import shutil
import socket

import clip_cid
import common
import numpy as np
import pytest
import torch
from PIL import Image

from harness import (
    COCO_MINI,
    SERVER,
    Script,
    assert_same_run,
    cells_of,
    checkpoint,
    equal,
    error,
    log_of,
    needs_coco,
    photo_samples,
    run,
    several,
    write_photos,
    write_shard,
)

TINY = ["--preset", "tiny", "--batch-size", 16, "--epochs", 2, "--log-every", 1, "--k", 8,
        "--device", "cpu", "--workers", 0]
FILES = {
    "embed": {"image.npy", "text.npy", "keys.txt", "embeddings.json"},
    "balance": {"kept.txt", "balance.json", "balance.png"},
    "cluster": {"clusters.pt", "clusters.png"},
    "distil": {"config.json", "log.csv", "last.pt", "best.pt", "student.pt", "results.json",
               "curves.png", "retrieval.png"},
    "evaluate": {"evaluation.json"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_photos(tmp_path_factory.mktemp("photos"))
    write_shard(root / "test" / "00000.tar", photo_samples(range(2000, 2024)))
    return root


@pytest.fixture(scope="module")
def teacher(root, tmp_path_factory):
    """A CLIP that --stage teacher has made, in half precision."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    data = ["--data", "photos", "--root", root]
    run("clip_cid", *TINY, "--stage", "teacher", *data, "--out", out)
    weights = checkpoint(out, "teacher.pt")["model"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.half}
    return out / "teacher.pt"


@pytest.fixture(scope="module")
def photos(root, teacher):
    """Flags to distil on 128 small photographs."""
    return [*TINY, "--data", "photos", "--root", root, "--teacher", teacher]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The run folder of those flags: all stages at once, uninterrupted."""
    out = tmp_path_factory.mktemp("run") / "photos"
    run("clip_cid", *photos, "--out", out)
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def before_training(whole, out):
    shutil.copytree(whole, out, ignore=lambda *_: FILES["distil"] | FILES["evaluate"])
    return out


# -------------------------------------------------------------------------------------- stages


def test_stages_one_by_one(photos, whole, tmp_path):
    out, made = tmp_path / "run", {}
    for stage, names in FILES.items():
        run("clip_cid", *photos, "--stage", stage, "--out", out)
        now = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        assert now.keys() - made.keys() == names
        assert all(now[name] == before for name, before in made.items()), "made again"
        made = now
    assert contents(whole).keys() == made.keys()
    assert_same_run(whole, out)
    for name in FILES["embed"] | {"kept.txt", "balance.json", "evaluation.json"}:
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name
    assert equal(checkpoint(whole, "clusters.pt"), checkpoint(out, "clusters.pt"))


def test_what_the_stages_leave(whole, root):
    """Each file against the others: rows, keys, losses, weights."""
    data = common.open_set("photos", root, "train")
    keys = common.read_keys(whole / "keys.txt")
    assert keys == [data.key(i) for i in range(128)]
    report = json.loads((whole / "balance.json").read_text())
    kept = [keys.index(key) for key in common.read_keys(whole / "kept.txt")]
    assert len(kept) == report["kept"] == 128 - round(0.437 * 128)
    assert checkpoint(whole, "clusters.pt")["row"] == kept

    rows = log_of(whole)
    assert len(rows) == len(kept) // 16 * 2
    for row in rows:
        parts = [float(row[name]) for name in ("nce", "cluster_hard", "cluster_kl", "instance")]
        assert min(parts) > 0 and float(row["loss"]) == pytest.approx(sum(parts), abs=1e-5)
    for name in ("balance.png", "clusters.png", "curves.png", "retrieval.png"):
        assert Image.open(whole / name).size[0] > 300
    student, trained = checkpoint(whole, "student.pt")["model"], checkpoint(whole)["model"]
    assert all(equal(tensor, trained[f"student.{name}"]) for name, tensor in student.items())


def test_groups_of_one_are_drawn(photos, tmp_path):
    out = run("clip_cid", *photos, "--stage", "balance", "--remove", 0.05, "--out", tmp_path)
    assert "could not draw" not in out and (tmp_path / "balance.png").exists()


def test_evaluation(whole, photos, root, teacher, monkeypatch):
    """The student's and the teacher's numbers, through every way to them, eclipse.py's too."""
    found = json.loads((whole / "evaluation.json").read_text())
    timed = cells_of(whole)["student"]
    assert found.keys() == {"student", "teacher"} and "photos_i2t_r1" in timed
    assert {name: found["student"][name] for name in timed} == timed
    data = ["--data", "photos", "--root", root, "--workers", 0]
    for script, path, cell in (("clip_cid", whole / "last.pt", timed),
                               ("clip_cid", teacher, found["teacher"]),
                               ("eclipse", whole / "student.pt", timed)):
        tables = []
        monkeypatch.setattr(common, "print_table", lambda table, *_: tables.append(table))
        run(script, "--evaluate", path, *data)
        found_there = next(iter(tables[-1].values()))
        assert {name: found_there[name] for name in cell} == pytest.approx(cell), (script, path)
    run("clip_cid", "--evaluate", teacher, "--image-size", 32, *data)  # other positions


def test_a_cache_is_shared(photos, whole, tmp_path):
    """Two runs, one set of embeddings; a repeated sample has one row; --keep and eclipse.py."""
    cache = tmp_path / "cache"
    for name, flags in (("one", ["--filter", "random"]), ("two", ["--method", "clip"])):
        run("clip_cid", *photos, "--cache", cache, *flags, "--epochs", 1, "--out", tmp_path / name)
        assert contents(cache / "photos").keys() == FILES["embed"]
    assert (tmp_path / "two" / "kept.txt").read_bytes() == (whole / "kept.txt").read_bytes()
    rows = log_of(tmp_path / "two")
    assert all(row["loss"] == row["nce"] and not row["instance"] for row in rows)
    flags = ["--keep", whole / "kept.txt", "--method", "clip", "--epochs", 1]
    shared = [flag for flag in photos if flag not in ("--k", 8)][:-2]
    run("eclipse", *shared, *flags, "--out", tmp_path / "eclipse")
    assert len(log_of(tmp_path / "eclipse")) == len(rows)


def test_clip_is_the_clip_of_eclipse(root, tmp_path, monkeypatch):
    import eclipse
    monkeypatch.setattr(eclipse, "schedules", lambda cfg, step, steps, _: {
        **clip_cid.schedules(cfg, step, steps), "kd_weight": 0})
    monkeypatch.setattr(eclipse, "weight_decay", clip_cid.weight_decay)
    shared = [*TINY[:8], "--data", "photos", "--root", root, "--method", "clip", "--lr", 1e-3]
    run("clip_cid", *shared, "--filter", "none", "--out", tmp_path / "cid")
    run("eclipse", *shared, "--out", tmp_path / "eclipse")
    ours, theirs = log_of(tmp_path / "cid"), log_of(tmp_path / "eclipse")
    assert len(ours) == len(theirs) == 16 and not (tmp_path / "cid" / "image.npy").exists()
    for row, other in zip(ours, theirs):
        assert all(row[name] == other[name] for name in ("lr", "loss", "logit_scale")), other


@needs_coco
def test_coco_mini_has_captions_of_different_number(teacher, tmp_path):
    shutil.copytree(COCO_MINI, tmp_path / "coco")
    run("data.prepare", "coco", tmp_path / "coco")
    run("clip_cid", *TINY, "--epochs", 1, "--data", "coco", "--root", tmp_path / "coco", "--teacher",
        teacher, "--out", tmp_path / "run")
    data = common.open_set("coco", tmp_path / "coco", "train")
    text = np.load(tmp_path / "run" / "text.npy")
    for i in range(len(data)):
        written = np.linalg.norm(text[:, i].astype(np.float32), axis=1)
        wanted = [float(c < len(data[i][1])) for c in range(5)]
        assert written == pytest.approx(wanted, abs=2e-3)


def test_damaged_images_are_left_out(teacher, tmp_path):
    train = photo_samples(range(48))
    train[7][1]["jpg"] = train[7][1]["jpg"][:200]
    train[31][1]["jpg"] = b"no image"
    write_shard(tmp_path / "train" / "0.tar", train)
    write_shard(tmp_path / "val" / "0.tar", photo_samples(range(900, 908)))
    flags = ["clip_cid", *TINY, "--data", "mine", "--root", tmp_path, "--teacher", teacher, "--filter",
             "none", "--out"]
    run(*flags, tmp_path / "run")
    zero = np.flatnonzero((np.load(tmp_path / "run" / "image.npy") == 0).all(1))
    assert zero.tolist() == [7, 31]
    assert checkpoint(tmp_path / "run", "clusters.pt")["row"] == np.delete(range(48), zero).tolist()
    for _, parts in train[:6]:
        parts["jpg"] = b"?"
    write_shard(tmp_path / "train" / "0.tar", train)
    assert "8 of 48" in error(*flags, tmp_path / "bad")


# ------------------------------------------------------------------------------- interruptions


def test_interrupted_embedding_goes_on(photos, whole, tmp_path):
    """Rows that are there are not made again; those that are not are filled in."""
    for name in FILES["embed"]:
        shutil.copy(whole / name, tmp_path)
    report = json.loads((tmp_path / "embeddings.json").read_text())
    common.write_json(tmp_path / "embeddings.json", {**report, "complete": False})
    image = np.load(tmp_path / "image.npy", mmap_mode="r+")
    image[:], image[50:55] = 1, 0
    image.flush()
    run("clip_cid", *photos, "--stage", "embed", "--out", tmp_path)
    found = np.load(tmp_path / "image.npy")
    assert (np.delete(found, np.s_[50:55], 0) == 1).all()
    np.testing.assert_allclose(found[50:55], np.load(whole / "image.npy")[50:55], atol=1e-3)
    assert json.loads((tmp_path / "embeddings.json").read_text()) == {**report, "complete": True}


@pytest.mark.parametrize("flags", [[], ["--sample-rate", 0.5, "--accum", 2, "--instance", "both",
                                        "--k", 32, "--workers", 1]], ids=["default", "options"])
def test_kill_and_resume(photos, whole, tmp_path, flags):
    flags, reference = [*photos, "--stage", "distil", *flags], whole
    out = before_training(whole, tmp_path / "killed")
    if "--k" in flags[len(photos):]:
        (out / "clusters.pt").unlink()
        reference = tmp_path / "reference"
        shutil.copytree(out, reference)
        run("clip_cid", *flags, "--out", reference)
    Script("clip_cid", *flags, "--out", out).wait_for(out / "log.csv", 6).kill()
    assert checkpoint(out)["state"]["step"] in (4, 8) and not (out / "results.json").exists()
    run("clip_cid", "--resume", "--out", out)
    assert_same_run(reference, out)


# --------------------------------------------------------------------------- several processes


def test_two_processes(photos, whole, tmp_path):
    """Two processes embed, keep, cluster and learn as one does, and write each line once."""
    out = tmp_path / "run"
    scripts = several("clip_cid", 2, *photos, "--accum", 2, "--out", out)
    assert contents(out).keys() == contents(whole).keys()
    for name in ("keys.txt", "kept.txt"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    for name in ("image.npy", "text.npy"):
        np.testing.assert_allclose(np.load(out / name), np.load(whole / name), atol=1e-3)
    one, two = checkpoint(whole, "clusters.pt"), checkpoint(out, "clusters.pt")
    assert torch.equal(one["label"], two["label"])
    torch.testing.assert_close(one["centroids"], two["centroids"], rtol=0, atol=1e-5)
    for row, other in zip(log_of(out), log_of(whole), strict=True):
        for name in ("loss", "nce", "cluster_hard", "cluster_kl", "instance", "logit_scale", "lr"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=1e-3), (row, name)
    text = "".join(script.out for script in scripts)
    for words in ("balance: ", "k-means: ", "pictures, tables"):
        assert text.count(words) == 1, words


GRADIENTS = {
    "default": dict(k=12),
    "both": dict(k=64, prototypes="learned", sample_rate=0.5, instance="both", accum=2),
    "logit-kl": dict(k=64, prototypes="teacher", sample_rate=0.4, instance="logit-kl"),
}


def gradients(place, world, port):
    """In a process of its own: {case: (gradients, terms)} of a step in float64, averaged over all."""
    if world > 1:
        os.environ.update(RANK=str(place), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    torch.Tensor.float = torch.Tensor.double  # wherever the model asks for full precision
    device, size, found = common.start_device("cpu", 0), common.PRESETS["tiny"], {}
    amp, scaler = common.mixed_precision("fp32", device)
    for case, fields in GRADIENTS.items():
        cfg = clip_cid.Config(**fields)
        torch.manual_seed(0)
        model = clip_cid.CLIPCID(cfg, size, torch.randn(cfg.k, 20), 3.0).double()
        image = torch.randn(16, 3, size.image_size, size.image_size).double()
        text = torch.randint(1, size.vocab_size, (16, size.context_length))
        taught = torch.randn(16, 20), torch.randn(16, 20), torch.randint(cfg.k, (16,))
        image, text, *taught = (part.chunk(world)[place] for part in (image, text, *taught))
        others = clip_cid.teaching_inputs(taught, 0, 7, device)
        terms = clip_cid.backward(model, image, text, others, amp, scaler)
        common.average_gradients(model.parameters())
        grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
        found[case] = grads, common.mean_over_processes(terms)
    return found


def test_two_processes_have_the_gradients_of_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    one, two = [], []
    for world, found in ((1, one), (2, two)):
        with concurrent.futures.ProcessPoolExecutor(world, SERVER) as pool:
            found += pool.map(gradients, range(world), [world] * world, [port] * world)
    for case, (wanted, wanted_terms) in one[0].items():
        grads, terms = two[0][case]
        assert terms == pytest.approx(wanted_terms) and grads.keys() == wanted.keys()
        for name, gradient in wanted.items():
            worst = abs(grads[name] - gradient).max() / abs(gradient).max()
            assert worst <= 1e-10, (case, name, worst)


# --------------------------------------------------------------------------------- user errors


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def remove(name):
    return lambda folder: (folder / name).unlink()


ON_A_RUN = {  # what is done to a finished run's folder, flags, words that the message must hold
    "another teacher": (None, "--stage embed --teacher {teacher}", "embeddings.json teacher delete"),
    "another precision": (None, "--stage embed --precision bf16", "precision bf16"),
    "other samples": (None, "--stage embed --root {other}", "embeddings.json keys 128 64 delete"),
    "another --remove": (None, "--stage balance --remove 0.3", "balance.json remove 0.437 0.3"),
    "another k": (None, "--stage cluster --k 4", "clusters.pt k 8 4 delete"),
    "image.npy cut": (cut("image.npy", 300), "--stage balance", "image.npy damaged"),
    "image.npy gone": (remove("image.npy"), "--stage cluster", "image.npy missing"),
    "embeddings.json cut": (cut("embeddings.json", 50), "--stage balance", "embeddings.json"),
    "clusters.pt cut": (cut("clusters.pt", 300), "--stage cluster", "clusters.pt damaged"),
    "distilled already": (None, "--stage distil", "--resume --out"),
    "another weight": (None, "--resume --cluster-weight 2", "--cluster-weight 2 1.0"),
    "no student": (remove("student.pt"), "--stage evaluate", "student.pt"),
    "no such arm": (None, "--ablate nothing", "nothing 'clip' 'clip-cid'"),
}


@pytest.mark.parametrize("case", ON_A_RUN)
def test_stale_and_damaged_files_are_refused(case, photos, whole, tmp_path):
    """One line, and nothing in the folder is overwritten."""
    change, flags, words = ON_A_RUN[case]
    flags = flags.format(teacher=tmp_path / "teacher.pt", other=tmp_path / "other")
    out, teacher = tmp_path / "run", tmp_path / "teacher.pt"
    shutil.copytree(whole, out)
    shutil.copy(photos[-1], teacher)
    write_shard(tmp_path / "other" / "train" / "0.tar", photo_samples(range(64)))
    if change:
        change(out)
    before = contents(out)
    message = error("clip_cid", *photos, *flags.split(), "--out", out)
    missing = [word for word in words.split() if word not in message]
    assert not missing, message
    assert contents(out) == before


ON_NONE = {
    "--stage cluster --k 120": "--k 120",
    "--stage distil --batch-size 512": "512 --batch-size",
    "--keep {missing}": "{missing}",
    "--teacher {missing}": "{missing} teacher",
    "--stage teacher --filter none": "--filter --stage teacher",
    "--evaluate {missing} --stage embed": "--stage --evaluate",
}


@pytest.mark.parametrize("flags", ON_NONE)
def test_user_errors(flags, photos, tmp_path):
    names = dict(missing=tmp_path / "missing")
    message = error("clip_cid", *photos, "--out", tmp_path / "run", *flags.format(**names).split())
    missing = [word for word in ON_NONE[flags].format(**names).split() if word not in message]
    assert not missing, message


def test_data_on_disk_need_a_teacher(root, tmp_path):
    message = error("clip_cid", *TINY, "--data", "photos", "--root", root, "--out", tmp_path)
    assert "--teacher FILE" in message


# ----------------------------------------------------------------------------------- ablation


def test_ablation(photos, tmp_path):
    """Arms are commands of their own; the embeddings are made once, before; a second call is quick."""
    flags = ["--ablate", "clip", "clip-cid", "clip-cid, equal epochs", "--seeds", 0, "--jobs", 2,
             "--out", tmp_path]
    script = Script("clip_cid", *photos, "--epochs", 1, *flags).wait()
    assert script.code == 0, script.err
    assert script.out.count("--stage embed") == 1
    steps = {name: len(log_of(tmp_path / name / "seed0")) for name in
             ("clip", "clip-cid", "clip-cid,_equal_epochs")}
    assert steps == {"clip": 8, "clip-cid": 8, "clip-cid,_equal_epochs": 4}
    assert contents(tmp_path / "embeddings" / "photos").keys() == FILES["embed"]
    table = (tmp_path / "table.md").read_text("utf-8")
    assert "clip-cid: student" in table and (tmp_path / "difference_to_clip.md").exists()
    again = Script("clip_cid", *photos, "--epochs", 1, *flags).wait()
    assert again.code == 0 and "--stage" not in again.out


@pytest.mark.parametrize("given, seen", [(dict(epochs=3), 600), (dict(samples=400), 400)], ids=str)
def test_arms_of_the_ablation(given, seen):
    """Equal samples, or as many passes; every arm is a Config; --samples counts for both."""
    cfg = clip_cid.Config(out="out", scenes=200, **given)
    arms = clip_cid.ablation_arms(cfg)
    for name, fields in arms.items():
        dataclasses.replace(cfg, **fields)
        fewer = name.endswith("equal epochs")
        assert fields["samples"] == (round(seen * (1 - 0.437)) if fewer else seen), name
    assert {"clip", "clip + filter", "clip-cid, no clip loss", "prototypes teacher"} <= arms.keys()
