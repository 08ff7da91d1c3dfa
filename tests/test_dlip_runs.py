"""dlip.py as a user starts it: stages, kill and go on, several processes, wrong input, real files.

The reference is always another way to the same thing: all stages at once, the uninterrupted run,
one process, the numbers of another file. Models and data are tiny.
"""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import common
import dlip
import numpy as np
import pytest
import torch
from PIL import Image

from harness import (
    COCO_MINI,
    REPO,
    SERVER,
    Script,
    call,
    cells_of,
    checkpoint,
    equal,
    error,
    log_of,
    needs_coco,
    photo,
    run,
    several,
)

BASIC = ["--batch-size", 16, "--device", "cpu", "--log-every", 1, "--workers", 0,
         "--rerank-k", 4, "--vit", "tiny", "--bert", "tiny", "--queue-size", 32]
EMOJI = [*BASIC, "--scenes", 64, "--concepts", 10, "--epochs", 2]
WORDS = [*BASIC, "--preset", "demo"]  # sizes of the demo, BERT's whole vocabulary
STAGES = ["distil", *(f"{who}{task}" for task in dlip.TASKS for who in ("", "teacher-"))]
TRAINED = {"config.json", "log.csv", "last.pt", "blip.pt", "results.json", "curves.png"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few scenes to evaluate and no stopwatch: each takes seconds and is tested elsewhere."""
    questions, captions = common.question_set, dlip.task_sets

    def few_questions(cfg, *args):
        data = questions(cfg, *args)
        return common.Subset(data, range(12)) if cfg.data == "emoji" and "train" not in args \
            else data

    def few_captions(cfg, task, split):
        sets = captions(cfg, task, split)
        return {name: common.Subset(data, range(min(24, len(data)))) if cfg.data == "emoji"
                and task != "vqa" else data for name, data in sets.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "question_set", few_questions)
        patch.setattr(dlip, "task_sets", few_captions)
        patch.setattr(common, "compare_latency", lambda calls, *_: dict.fromkeys(calls, 2.0))
        yield


def make_blip(path, *flags, seed=0):
    """A checkpoint of ours with random weights and the sizes that these flags name."""
    flags = [*flags, "--out", path.parent / "none"]
    cfg, _ = dlip.configure(list(map(str, flags)))
    torch.manual_seed(seed)
    blip = dlip.BLIP(dlip.size_of(cfg, dlip.tokenizer_of(cfg)))
    torch.save(common.checkpoint(blip, cfg, blip.size), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dlip")


@pytest.fixture(scope="module")
def teacher(folder):
    """A teacher of the emoji scenes, larger than the student."""
    return make_blip(folder / "teacher.pt", *EMOJI, "--vit", "small", "--bert", "small")


@pytest.fixture(scope="module")
def emoji(teacher):
    return [*EMOJI, "--teacher", teacher]


@pytest.fixture(scope="module")
def words_blip(folder):
    """A BLIP with BERT's whole vocabulary, for photographs."""
    return make_blip(folder / "words.pt", *WORDS, "--stage", "distil", "--data", "coco", seed=1)


@pytest.fixture(scope="module")
def whole(emoji, folder):
    """The run folder of all stages at once, uninterrupted."""
    run("dlip", *emoji, "--out", folder / "whole")
    return folder / "whole"


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def assert_same_stage(a, b):
    """Two folders of a training hold the same log and tensors, to the last bit."""
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    for name in ("last.pt", "best.pt", "blip.pt"):
        ours, theirs = checkpoint(a, name), checkpoint(b, name)
        assert all(equal(ours[key], theirs[key]) for key in ours if key != "config"), name


# ---------------------------------------------------------------------------------------- stages


def test_all_stages(whole):
    pictures = {"captions.png", "attention.png"}
    assert names_in(whole) == {*STAGES, *pictures, "config.json", "results.json", "table.md"}
    for stage in STAGES:
        assert names_in(whole / stage) - {"best.pt"} == TRAINED, stage
        rows = log_of(whole / stage)
        steps = 8 if stage == "distil" else 12 if "vqa" in stage else 4  # 6 questions a scene
        assert [row["step"] for row in rows] == [str(step + 1) for step in range(steps)]
        task = "retrieval" if stage == "distil" else stage.removeprefix("teacher-")
        validated = [float(row[f"val_{task}"]) for row in rows if row[f"val_{task}"]]
        assert len(validated) == (2 if stage == "distil" else 1)
        results = json.loads((whole / stage / "results.json").read_text())
        assert results["best"] == pytest.approx(max(validated), rel=1e-6)
        blip = checkpoint(whole / stage, "blip.pt")["model"]
        trained = checkpoint(whole / stage)["model"]
        assert all(torch.equal(trained[f"student.{name}"], w) for name, w in blip.items())
        assert any(name.startswith("momentum.") for name in trained) == (task == "retrieval")
    for row in log_of(whole / "distil"):
        parts = [name for name in row if re.match("it[cm]|lm|hr_|at_", name) and row[name]]
        assert len(parts) == 3 + 4 + 2
        total = sum(float(row[name]) for name in parts)
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    for picture in pictures:
        assert Image.open(whole / picture).size[0] > 300, picture


def test_results(whole):
    cells = json.loads((whole / "results.json").read_text())["cells"]
    assert cells.keys() == {"student", "teacher", "kept, %"}
    for who, path in (("student", whole / "distil" / "blip.pt"),
                      ("teacher", whole.parent / "teacher.pt")):
        cell, weights = cells[who], checkpoint(path.parent, path.name)["model"]
        assert {"i2t_r1", "t2i_r10", "itc_i2t_r1", "bleu4", "cider", "vqa_accuracy"} < cell.keys()
        assert all(0 <= value <= 1000 for value in cell.values())
        counted = sum(w.numel() for name, w in weights.items()
                      if name.startswith(("visual_encoder.", "text_encoder."))
                      and w.is_floating_point())
        assert cell["parameters_M"] == pytest.approx(counted / 1e6)
    for metric, value in cells["kept, %"].items():
        theirs = cells["teacher"][metric]
        assert value == pytest.approx(100 * cells["student"][metric] / theirs)


def test_stages_one_by_one(emoji, whole, tmp_path):
    """In one folder, which the later stages find; and a task's checkpoint alone."""
    out = tmp_path / "run"
    run("dlip", *emoji, "--stage", "distil", "--out", out)
    assert_same_stage(whole / "distil", out / "distil")
    run("dlip", *EMOJI[:-2], "--stage", "finetune", "--task", "caption", "--out", out)
    assert names_in(out) == {"config.json", "distil", "caption", "teacher-caption"}
    assert_same_stage(whole / "caption", out / "caption")
    run("dlip", *EMOJI, "--stage", "evaluate", "--task", "caption", "--out", out)
    found, expected = cells_of(out)["student"], cells_of(whole)["student"]
    assert found.items() <= expected.items() and "cider" in found and "i2t_r1" not in found
    for task, metric in (("retrieval", "t2i_r10"), ("vqa", "vqa_accuracy")):
        run("dlip", *EMOJI, "--stage", "evaluate", "--task", task, "--init",
            whole / task / "blip.pt", "--out", tmp_path / task)
        cell = cells_of(tmp_path / task)["model"]
        assert cell[metric] == expected[metric]


def test_a_finished_run_is_not_trained_again(whole):
    before = {path: path.stat().st_mtime_ns for stage in STAGES for path in (whole / stage).iterdir()}
    out = run("dlip", "--resume", "--out", whole)
    assert "step " not in out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_methods(emoji, whole, tmp_path):
    """Arms are paired by seed: ITC of the first step is the same with and without a teacher."""
    run("dlip", *EMOJI, "--stage", "distil", "--method", "blip", "--out", tmp_path / "blip")
    run("dlip", *emoji, "--stage", "distil", "--no-vlp", "--hr", "img", "vl_d", "--attn", "none",
        "--lambda-hr", 3, "--out", tmp_path / "taught")
    alone, taught = log_of(tmp_path / "blip/distil"), log_of(tmp_path / "taught/distil")
    both = log_of(whole / "distil")
    assert all(row["itc"] and row["lm"] and not (row["hr_img"] or row["at_self"]) for row in alone)
    for name in ("itc", "itm", "lm"):
        assert float(alone[0][name]) == pytest.approx(float(both[0][name]), rel=1e-6), name
    assert taught[0]["hr_img"] == both[0]["hr_img"]
    for row in taught:
        assert not (row["itc"] or row["itm"] or row["lm"] or row["at_self"] or row["hr_text"])
        total = 3 * (float(row["hr_img"]) + float(row["hr_vl_d"]))
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)


# --------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("how", ["kill", "ctrl_c"])
def test_interrupted_runs_go_on(how, emoji, folder, tmp_path):
    """Byte for byte; kill -9 loses what came after the last epoch, Ctrl-C nothing."""
    flags = [*emoji, "--stage", "distil", "--epochs", 6]
    reference, out = folder / "six", tmp_path / "run"
    if not reference.exists():
        run("dlip", *flags, "--out", reference)
    script = Script("dlip", *flags, "--out", out).wait_for(out / "distil" / "log.csv", 6)
    getattr(script, how)()
    steps = checkpoint(out / "distil")["state"]["step"]
    assert 4 <= steps < 24 and not (out / "distil" / "blip.pt").exists()
    if how == "ctrl_c":
        assert script.code == 130 and f"--resume --out {out}" in script.err
    run("dlip", *flags, "--resume", "--out", out)
    ours, theirs = log_of(out / "distil"), log_of(reference / "distil")
    validated = [row.pop("val_retrieval") for rows in (ours, theirs) for row in rows]  # of 300
    assert ours == theirs and any(validated)
    for name in ("model", "optimiser"):
        assert equal(checkpoint(out / "distil")[name], checkpoint(reference / "distil")[name])


# ----------------------------------------------------------------------------- several processes


def made_up_batch():
    """Images, texts of different lengths, questions and answers, numbers of images, some the same."""
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
    "distil": ("--stage distil --alpha 0.3", ("itc", "lm", "hr_img", "hr_vl_d", "at_self", "at_cross")),
    "retrieval": ("--stage finetune --task retrieval", ("itc",)),
    "caption": ("--stage finetune --task caption", ("lm",)),
    "vqa": ("--stage finetune --task vqa", ("lm",)),
}


def gradients_of(case, init, place, world):
    """{name: gradient} of this process's share of the batch, averaged over the processes; queues.

    ITM draws its negatives within a process, so its term is left out.
    """
    flags, wanted = CASES[case]
    flags = [*EMOJI, *flags.split(), "--queue-size", 24, "--teacher", init, "--out", "none"]
    if "finetune" in flags:
        flags += ["--init", init]
    cfg, _ = dlip.configure(list(map(str, flags)))
    torch.manual_seed(0)
    tokenizer = dlip.tokenizer_of(cfg)
    model = dlip.build(cfg, tokenizer)
    teacher = dlip.load_teacher(cfg, model.student, tokenizer, torch.device("cpu"))
    model = model.double().train()
    teacher = teacher and teacher.double()
    image, (ids, answers), number = made_up_batch()
    texts = [ids, answers] if case == "vqa" else [ids]
    part = slice(place, None, world)
    texts = [each[part] for each in texts]
    loss, terms = model(image[part], texts, number[part], 0.3, teacher)
    assert set(wanted) <= terms.keys()
    return model, loss, terms, wanted


def _step(place, world, port, folder, init):
    os.environ.update(RANK=str(place), WORLD_SIZE=str(world), LOCAL_RANK=str(place),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    common.start_device("cpu", 0)
    torch.Tensor.float = torch.Tensor.double  # wherever the model asks for full precision
    dlip.F.cross_entropy, plain = partial(_without_itm, dlip.F.cross_entropy), dlip.F.cross_entropy
    found = {}
    for case in CASES:
        model, loss, terms, wanted = gradients_of(case, init, place, world)
        loss.backward()
        common.average_gradients(model.parameters())
        found[case] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        means = {f"term {name}": terms[name].detach().clone() for name in wanted}
        found[case].update({name: common.sum_over_processes(term) / world
                            for name, term in means.items()})
    dlip.F.cross_entropy = plain
    torch.save(found, Path(folder, f"{world}-{place}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


def _without_itm(plain, logits, target, **options):
    """ITM alone has two classes."""
    return logits.sum() * 0 if logits.shape[-1] == 2 else plain(logits, target, **options)


def test_two_processes_have_the_gradients_of_one(teacher, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [SERVER.Process(target=_step, args=(place, world, port, str(tmp_path), str(teacher)))
                 for world in (1, 2) for place in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    one, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for case, gradients in one.items():
        assert len(gradients) > 20
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float64
            for other in both:
                worst = (other[case][name] - gradient).abs().max()
                assert worst <= 1e-9 * gradient.abs().max().clamp(min=1e-3), (case, name, worst)


def test_two_processes_distil(emoji, whole, tmp_path):
    """Each row once; the first step is that of one process but for ITM; one of them evaluates."""
    flags = [*emoji, "--task", "retrieval", "--epochs", 1, "--no-with-teacher"]
    scripts = several("dlip", 2, *flags, "--out", tmp_path / "run")
    rows, expected = log_of(tmp_path / "run" / "distil"), log_of(whole / "distil")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    for name in set(rows[0]) - {"itm", "loss", "lr", "epoch"}:
        if rows[0][name]:
            assert float(rows[0][name]) == pytest.approx(float(expected[0][name]), rel=1e-4,
                                                         abs=1e-6), name
    assert float(rows[0]["itm"]) == pytest.approx(float(expected[0]["itm"]), rel=0.1)
    assert {"results.json", "table.md"} <= names_in(tmp_path / "run")
    assert sum("pictures, tables" in script.out for script in scripts) == 1


# ----------------------------------------------------------------------------- precision, speed


@pytest.mark.parametrize("flags", ["--precision bf16", "--precision fp16", "--grad-checkpoint",
                                   "--compile"])
def test_precision_and_speed(flags, emoji, whole, tmp_path, monkeypatch):
    """The losses of full precision, nearly; --compile traced without the C++ compiler."""
    def without_compiler(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_compiler)
    run("dlip", *emoji, "--stage", "distil", *flags.split(), "--out", tmp_path / "run")
    half = "precision" in flags
    rows, expected = log_of(tmp_path / "run" / "distil"), log_of(whole / "distil")
    for row, reference in list(zip(rows, expected, strict=True))[:1 if half else None]:
        tolerance = 0.02 if half else 1e-4
        assert float(row["loss"]) == pytest.approx(float(reference["loss"]), rel=tolerance)
    scaler = checkpoint(tmp_path / "run" / "distil")["scaler"]
    assert scaler["scale"] > 1 if "fp16" in flags else not scaler
    ours, theirs = (checkpoint(path / "distil", "blip.pt")["model"]
                    for path in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    assert {w.dtype for w in ours.values() if w.is_floating_point()} == {torch.float32}


# ----------------------------------------------------------------------------------- user errors


@pytest.fixture(scope="module")
def wrong(folder, teacher, words_blip, tmp_path_factory):
    """Folder of things that cannot be used."""
    found = tmp_path_factory.mktemp("wrong")
    content = torch.load(words_blip, weights_only=True)
    torch.save({"layer.weight": torch.zeros(3, 3)}, found / "other.pt")
    weights = {name: w for name, w in content["model"].items() if "text_decoder" not in name}
    torch.save({**content, "model": weights}, found / "no_decoder.pt")
    (found / "cut.pt").write_bytes(teacher.read_bytes()[:5000])
    (found / "file").write_text("")
    (found / "empty").mkdir()
    return found


# The flags given, words that the message must hold.
ERRORS = {
    "--task everything": "--task everything retrieval caption vqa",
    "--vit huge": "--vit huge tiny base",
    "--data nothing --method blip": "nothing",
    "--data coco --stage all": "coco emoji",
    "--hr image": "image img text vl_e vl_d none",
    "--no-vlp --method blip": "--no-vlp loss",
    "--fusion-layers 0": "--fusion-layers 0 --attn",
    "--no-vlp --hr none --attn none": "--no-vlp loss",
    "--momentum 1.5": "--momentum 1.5",
    "--image-size 42": "42 8",
    "--fusion-layers 9": "--fusion-layers 9 2",
    "--scenes 8": "8 16 --batch-size",
    "--device gpu": "--device gpu auto",
    "--out {wrong}/file": "{wrong}/file",
    "--ablate nothing": "nothing vlp all",
    "--teacher {wrong}/missing.pt": "{wrong}/missing.pt",
    "--teacher {wrong}/cut.pt": "{wrong}/cut.pt",
    "--teacher {wrong}": "{wrong}",
    "--teacher {words}": "{words} vocabulary 30,524 emoji",
    "--vision-init {wrong}/other.pt": "{wrong}/other.pt",
    "--init {words} --stage distil": "--init finetune evaluate",
    "--stage finetune --init {words}": "{words} vocabulary 30,524 emoji",
    "--stage evaluate --init {wrong}/other.pt": "{wrong}/other.pt",
    "--stage finetune": "{out} distil --init FILE",
    "--stage evaluate": "{out} distil --init FILE",
    "--data coco": "--teacher --method blip",
    "--data coco --teacher {words} --root {wrong}/empty": "{wrong}/empty",
    "--data coco --stage finetune --task vqa --init {words}": "vqa coco",
    "--data vqav2 --stage finetune --init {words} --root {wrong}/empty": "{wrong}/empty prepare.py",
    "--data coco --stage finetune --task caption --init {wrong}/no_decoder.pt": "{wrong}/no_decoder.pt",
    "--out {run}": "{run} --resume --out",
    "--resume --out {run} --lr 0.5": "--lr 0.5 {run}",
    "--resume --out {run} --hr img": "--hr {run}",
    "--stage finetune --task caption --lr 0.5 --out {run}": "{run}/caption --lr 0.5",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_user_errors_are_one_line(flags, teacher, words_blip, wrong, whole, tmp_path):
    names = dict(wrong=wrong, words=words_blip, out=tmp_path / "run", run=whole)
    start = [] if "--resume" in flags else WORDS if "--data" in flags else EMOJI[:-2]
    if not re.search("--teacher|--init|--data|--resume", flags):
        start = [*start, "--teacher", teacher]
    out = [] if "--out" in flags else ["--out", tmp_path / "run"]
    given = [word.replace(",", " ") for word in flags.format(**names).split()]
    message = error("dlip", *start, *given, *out)
    missing = [word for word in ERRORS[flags].format(**names).split() if word not in message]
    assert not missing, message
    assert len(message) < 500 or "--ablate" in flags, message
    assert not list((tmp_path / "run").glob("*/log.csv")), "the error came after training"


# ------------------------------------------------------------------------------------ real files


@needs_coco
def test_photographs(tmp_path):
    """A teacher from nothing, distilled, fine-tuned and evaluated, with the whole vocabulary."""
    command = [sys.executable, REPO / "data/prepare.py", "coco", COCO_MINI, "--out", tmp_path / "coco"]
    subprocess.run(command, check=True, capture_output=True)
    data = [*WORDS, "--data", "coco", "--root", tmp_path / "coco", "--epochs", 1, "--image-size",
            40, "--batch-size", 32]
    run("dlip", *data, "--stage", "teacher", "--out", tmp_path / "teacher")
    made = tmp_path / "teacher" / "teacher" / "blip.pt"
    weights = checkpoint(made.parent, "blip.pt")["model"]
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}
    out = tmp_path / "run"
    run("dlip", *data, "--stage", "distil", "--teacher", made, "--out", out)
    both = ["--task", "caption", "retrieval"]
    run("dlip", *data, "--stage", "finetune", *both, "--image-size", 48, "--out", out)
    for stage in ("distil", "caption", "retrieval"):
        assert all(float(row["loss"]) < 100 for row in log_of(out / stage))
    tuned = checkpoint(out / "caption", "blip.pt")["model"]
    assert tuned["visual_encoder.pos_embed"].shape == (1, 37, 32)
    run("dlip", *data, "--stage", "evaluate", *both, "--image-size", 48, "--out", out)
    cells = cells_of(out)
    assert list(cells) == ["student"] and {"i2t_r1", "cider"} < cells["student"].keys()


def write_questions(root, split, count, answers):
    """A prepared list of questions about photographs, three an image."""
    first = {"made_from": [], "unusable": {}, "notes": {}, "root": ".", "name": "vqav2",
             "kind": "questions", "answers": ["yes", "no", "red"]}
    lines = [json.dumps(first)]
    for i in range(count):
        name = f"{split}{i // 3}.jpg"
        (root / name).write_bytes(photo(i // 3))
        lines.append(json.dumps({"key": str(i), "question_id": i, "image": name, "kind": "yes/no",
                                 "question": f"is it number {i}?", "answers": answers}))
    (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def test_questions_about_photographs(words_blip, tmp_path):
    """Fine-tuned; the answers to the test's questions are written as the server takes them."""
    (tmp_path / "vqa").mkdir()
    for split, answers in (("train", ["yes"] * 10), ("val", ["no"] * 10), ("test", [])):
        write_questions(tmp_path / "vqa", split, 16, answers)
    data = [*WORDS, "--data", "vqav2", "--root", tmp_path / "vqa", "--image-size", 40,
            "--batch-size", 4, "--init", words_blip]
    run("dlip", *data, "--stage", "finetune", "--epochs", 8, "--lr", "1e-2", "--out", tmp_path / "run")
    rows = log_of(tmp_path / "run" / "vqa")
    assert len(rows) == 32 and float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 2
    assert float(rows[-1]["val_vqa"]) == 0  # it has learned to say yes
    run("dlip", *data, "--stage", "evaluate", "--out", tmp_path / "run")
    answers = json.loads((tmp_path / "run" / "answers_model.json").read_text())
    assert answers == [{"question_id": i, "answer": "yes"} for i in range(16)]


def test_augmentation_depends_on_the_sample_alone():
    """Seeded by the sample's rng, without touching torch's generator; no colour is changed."""
    import numpy as np

    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    state = torch.random.get_rng_state()
    first, again, other = (dlip.augment(image, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == image.shape and first.dtype == torch.uint8
    image[1:] = image[1:2]  # green as blue
    for seed in range(20):  # no operation changes a hue
        changed = dlip.augment(image, np.random.default_rng(seed))
        assert torch.equal(changed[1], changed[2])


# ---------------------------------------------------------------------------- profile, ablation


def test_help_has_at_most_52_options():
    code, out, _ = call("dlip", "--help")
    options = set(re.findall(r"^  --(?!no-)[a-z-]+", out, re.M)) - {"  --help"}
    assert code == 0 and 40 < len(options) <= 52


def test_an_arm_of_the_ablation(emoji, tmp_path):
    """A printed command in a folder of its own; the same command again trains nothing."""
    flags = ["dlip", *emoji, "--task", "retrieval", "--epochs", 1, "--ablate", "vlp", "--seeds", 0,
             "--out", tmp_path / "ablation"]
    script = Script(*flags).wait()
    assert script.code == 0, script.err
    assert "OMP_NUM_THREADS=1 python" in script.out and "--method blip" in script.out
    folder = tmp_path / "ablation" / "vlp" / "seed0"
    assert {"results.json", "distil", "retrieval"} <= names_in(folder)
    assert "vlp: student" in (tmp_path / "ablation" / "table.md").read_text()
    again = run(*flags)
    assert "python" not in again and "vlp: student" in again


# ------------------------------------------------------------------------------ optimiser, rates


def test_learning_rates():
    """Warm-up from 1e-6; then 0.85 an epoch in pre-training on large data, a cosine else."""
    cfg, _ = dlip.configure(["--data", "cc3m", "--method", "blip"])
    assert dlip.peak_lr(cfg, 384) == 5e-4
    rates = [dlip.schedules(cfg, 5e-4, step, 100_000, 10_000)["lr"] for step in (0, 1500, 3000, 9999, 10_000, 25_000)]
    wanted = [1e-6, (1e-6 + 5e-4) / 2, 5e-4, 5e-4, 5e-4 * 0.85, 5e-4 * 0.85 ** 2]
    np.testing.assert_allclose(rates, wanted, rtol=1e-6)
    fine = dataclasses.replace(cfg, stage="finetune", task=("retrieval",), warmup_steps=0)
    assert (dlip.peak_lr(fine, 768), dlip.peak_lr(fine, 384)) == (1e-5, 5e-5)
    half = dlip.schedules(fine, 1e-5, 50, 100, 10)["lr"]
    assert half == pytest.approx(0.5e-5)
    short = dataclasses.replace(fine, data="emoji", warmup_steps=100)
    assert dlip.schedules(short, 1e-3, 2, 10, 10)["lr"] == pytest.approx(1e-3)  # at most a fifth


def test_update_decays_matrices_and_clamps_the_temperature():
    cfg, _ = dlip.configure(["--stage", "distil", "--method", "blip", "--vit", "tiny", "--bert", "tiny"])
    model = dlip.build(cfg, dlip.tokenizer_of(cfg))
    optimiser = dlip.build_optimiser(model, cfg, torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert decay.keys() == {id(p) for p in model.student.parameters()}
    for p in model.student.parameters():
        assert decay[id(p)] == (0.05 if p.ndim > 1 else 0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for start, gradient, wanted in ((0.0011, 1.0, 0.001), (0.4999, -1.0, 0.5)):
        with torch.no_grad():
            model.student.temp.fill_(start)
        model.student.temp.grad = torch.tensor(gradient)
        dlip.update(model, optimiser, scaler, 0.1)
        assert model.student.temp.item() == pytest.approx(wanted)


def test_arms_are_paired_by_seed():
    """With and without a teacher the same seed gives the same student."""
    students = []
    for method in ("dlip", "blip"):
        cfg, _ = dlip.configure(["--stage", "distil", "--method", method, "--seed", "3"])
        torch.manual_seed(cfg.seed)
        students.append(dlip.build(cfg, dlip.tokenizer_of(cfg)).student.state_dict())
    for name, tensor in students[0].items():
        assert torch.equal(tensor, students[1][name]), name
