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
from pathlib import Path

import common
import dlip
import numpy as np
import pytest
import torch

from harness import (
    COCO_MINI,
    REPO,
    SERVER,
    Script,
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

WORDS = ["--batch-size", 16, "--device", "cpu", "--log-every", 1, "--workers", 0, "--rerank-k", 4,
         "--vit", "tiny", "--bert", "tiny", "--queue-size", 32]
EMOJI = [*WORDS, "--scenes", 64, "--concepts", 10, "--epochs", 2]
STAGES = ["distil", *dlip.TASKS, *(f"teacher/{task}" for task in dlip.TASKS)]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few samples to evaluate, demo sizes for photographs, no stopwatch: it is tested elsewhere."""
    whole = dlip.task_sets

    def few(cfg, *args):
        sets = whole(cfg, *args)
        return {name: common.Subset(data, range(24)) if cfg.data == "emoji" else data
                for name, data in sets.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dlip, "task_sets", few)
        patch.setitem(dlip.VIT, "tiny", dlip.DEMO_VIT["tiny"])
        patch.setitem(dlip.BERT, "tiny", dataclasses.replace(dlip.DEMO_BERT["tiny"], positions=40))
        patch.setattr(common, "compare_latency", lambda calls, *_: dict.fromkeys(calls, 2.0))
        yield


def make_blip(path, *flags, seed=0):
    """A checkpoint of ours with random weights and the sizes that these flags name."""
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
    return make_blip(folder / "words.pt", *WORDS, "--data", "coco", "--image-size", 40, seed=1)


@pytest.fixture(scope="module")
def whole(emoji, folder):
    """The run folder of all stages at once, uninterrupted."""
    run("dlip", *emoji, "--out", folder / "whole")
    return folder / "whole"


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def terms_of(row):
    """{name: value} of the losses in a row of log.csv."""
    return {name: float(value) for name, value in row.items() if value and re.match("it[cm]|lm|hr_|at_", name)}


def assert_same_stage(a, b):
    """Two folders of a training hold the same log and tensors, to the last bit."""
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    for name in ("last.pt", "best.pt", "blip.pt"):
        ours, theirs = checkpoint(a, name), checkpoint(b, name)
        assert all(equal(ours[key], theirs[key]) for key in ours if key != "config"), name


# ---------------------------------------------------------------------------------------- stages


def test_all_stages(whole):
    own = {*dlip.TASKS, "config.json", "results.json", "table.md", "captions.png", "attention.png"}
    assert names_in(whole) == {"distil", "teacher", *own}
    assert names_in(whole / "teacher") == {"output.txt", *own}
    for stage in STAGES:
        assert names_in(whole / stage) - {"best.pt"} == {
            "config.json", "log.csv", "last.pt", "blip.pt", "results.json", "curves.png"}
        rows = log_of(whole / stage)
        steps = 8 if stage == "distil" else 24 if "vqa" in stage else 4  # 6 questions a scene
        assert [int(row["step"]) for row in rows] == list(range(1, steps + 1))
        blip, trained = (checkpoint(whole / stage, name)["model"] for name in ("blip.pt", "last.pt"))
        assert all(torch.equal(trained[f"student.{name}"], w) for name, w in blip.items())
    for row in log_of(whole / "distil"):
        assert len(terms_of(row)) == 3 + 4 + 2
        assert float(row["loss"]) == pytest.approx(sum(terms_of(row).values()), rel=1e-5)


def test_results(whole):
    cells = cells_of(whole)
    assert cells.keys() == {"student", "teacher", "kept, %"}
    for who, path in (("student", whole / "distil" / "blip.pt"), ("teacher", whole.parent / "teacher.pt")):
        assert {"itc_i2t_r1", "t2i_r10", "bleu4", "cider", "vqa_accuracy"} < cells[who].keys()
        weights = torch.load(path, weights_only=True)["model"]
        counted = sum(w.numel() for name, w in weights.items() if w.is_floating_point()
                      and name.startswith(("visual_encoder.", "text_encoder.")))
        assert cells[who]["parameters_M"] == pytest.approx(counted / 1e6)
    for metric, value in cells["kept, %"].items():
        assert value == pytest.approx(100 * cells["student"][metric] / cells["teacher"][metric])


def test_stages_one_by_one(emoji, whole, tmp_path):
    run("dlip", *emoji, "--stage", "distil", "--out", tmp_path / "run")
    assert_same_stage(whole / "distil", tmp_path / "run" / "distil")
    start = [*EMOJI[:-2], "--task", "caption", "--init"]
    run("dlip", *start, tmp_path / "run" / "distil" / "blip.pt", "--stage", "finetune",
        "--out", tmp_path / "tuned")
    assert_same_stage(whole / "caption", tmp_path / "tuned" / "caption")
    run("dlip", *start, tmp_path / "tuned" / "caption" / "blip.pt", "--stage", "evaluate",
        "--out", tmp_path / "scores")
    found, expected = cells_of(tmp_path / "scores")["model"], cells_of(whole)["student"]
    assert found.items() <= expected.items() and "cider" in found and "i2t_r1" not in found


def test_a_finished_run_is_not_trained_again(whole):
    before = {path: path.stat().st_mtime_ns for stage in STAGES for path in (whole / stage).iterdir()}
    assert "step " not in run("dlip", "--resume", "--out", whole)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_methods(emoji, whole, tmp_path):
    """Arms are paired by seed: the first step's losses are the same with and without a teacher."""
    run("dlip", *EMOJI, "--stage", "distil", "--method", "blip", "--out", tmp_path / "blip")
    run("dlip", *emoji, "--stage", "distil", "--no-vlp", "--hr", "img", "vl_d", "--attn", "none",
        "--lambda-hr", 3, "--out", tmp_path / "taught")
    both, alone, taught = (log_of(path / "distil") for path in (whole, tmp_path / "blip", tmp_path / "taught"))
    for rows, terms in ((alone, {"itc", "itm", "lm"}), (taught, {"hr_img", "hr_vl_d"})):
        assert all(set(terms_of(row)) == terms for row in rows)
        for name in terms:
            assert terms_of(rows[0])[name] == pytest.approx(terms_of(both[0])[name], rel=1e-6), name
    for row in taught:
        assert float(row["loss"]) == pytest.approx(3 * sum(terms_of(row).values()), rel=1e-5)


# --------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("how", ["kill", "ctrl_c"])
def test_interrupted_runs_go_on(how, emoji, folder, tmp_path):
    """Byte for byte; kill -9 loses what came after the last epoch, Ctrl-C nothing."""
    flags = [*emoji, "--stage", "distil", "--epochs", 6]
    reference, out = folder / "six", tmp_path / "run"
    if not reference.exists():
        Script("dlip", *flags, "--out", reference).wait()
    script = Script("dlip", *flags, "--out", out).wait_for(out / "distil" / "log.csv", 6)
    getattr(script, how)()
    steps = checkpoint(out / "distil")["state"]["step"]
    assert 4 <= steps < 24 and not (out / "distil" / "blip.pt").exists()
    if how == "ctrl_c":
        assert script.code == 130 and f"--resume --out {out}" in script.err
    Script("dlip", *flags, "--resume", "--out", out).wait()
    assert_same_stage(reference / "distil", out / "distil")


def test_the_demo_goes_on_after_ctrl_c(emoji, whole, tmp_path):
    """The student's part and the teacher's run beside it."""
    out = tmp_path / "run"
    script = Script("dlip", *emoji, "--out", out).wait_for(out / "distil" / "log.csv", 3).ctrl_c()
    assert script.code == 130 and not (out / "results.json").exists()
    Script("dlip", "--resume", "--out", out).wait()
    for stage in STAGES:
        ours, theirs = (checkpoint(folder / stage, "blip.pt")["model"] for folder in (out, whole))
        assert equal(ours, theirs), stage
    assert cells_of(out)["teacher"]["cider"] == cells_of(whole)["teacher"]["cider"]


# ----------------------------------------------------------------------------- several processes


def made_up_batch():
    """Images, texts of different lengths, questions and answers, numbers of images, some the same."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(5, 30, (2, 8, 12), generator=generator)
    texts[..., 0] = 2
    for ids, lengths in zip(texts, ((9, 4, 7, 12, 3, 5, 8, 6), (3, 3, 4, 2, 2, 3, 2, 5))):
        for row, length in zip(ids, lengths):
            row[length - 1], row[length:] = 3, 0
    image = torch.randn(8, 3, 40, 40, generator=generator, dtype=torch.float64)
    return image, texts, torch.tensor([4, 9, 4, 7, 1, 9, 3, 4])


CASES = {"distil": ("itc", "lm", "hr_img", "hr_vl_d", "at_self", "at_cross"),
         "retrieval": ("itc",), "caption": ("lm",), "vqa": ("lm",)}


def _step(place, world, port, out, init):
    """Save gradients and terms of each case for this process's share of the batch."""
    os.environ.update(RANK=str(place), WORLD_SIZE=str(world), LOCAL_RANK=str(place),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device, found, plain = common.start_device("cpu", 0), {}, dlip.F.cross_entropy
    torch.Tensor.float = torch.Tensor.double  # wherever the model asks for full precision

    def without_itm(logits, target, **options):
        """ITM draws its negatives within a process: its two classes count nothing here."""
        return logits.sum() * 0 if logits.shape[-1] == 2 else plain(logits, target, **options)

    dlip.F.cross_entropy = without_itm
    for case, wanted in CASES.items():
        stage = ["distil"] if case == "distil" else ["finetune", "--task", case, "--init", init]
        flags = [*EMOJI, "--queue-size", 24, "--teacher", init, "--out", "none", "--stage", *stage]
        cfg, _ = dlip.configure(list(map(str, flags)))
        torch.manual_seed(0)
        tokenizer = dlip.tokenizer_of(cfg)
        model = dlip.build(cfg, tokenizer).double().train()
        teacher = dlip.load_teacher(cfg, tokenizer, device)
        (image, texts, number), part = made_up_batch(), slice(place, None, world)
        texts = list(texts[:, part])[:2 if case == "vqa" else 1]
        loss, terms = model(image[part], texts, number[part], 0.3, teacher and teacher.double())
        loss.backward()
        common.average_gradients(model.parameters())
        found[case] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name in wanted:
            found[case][f"term {name}"] = common.sum_over_processes(terms[name].clone()) / world
    torch.save(found, Path(out, f"{world}-{place}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


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
            scale = max(gradient.abs().max().item(), 1e-3)
            for other in both:
                torch.testing.assert_close(other[case][name], gradient, rtol=0, atol=1e-9 * scale)


def test_two_processes_distil(emoji, whole, tmp_path):
    """Each row once; the first step is that of one process but for ITM; one of them evaluates, and
    starts the teacher's run."""
    flags = [*emoji, "--task", "retrieval", "--epochs", 1]
    scripts = several("dlip", 2, *flags, "--out", tmp_path / "run")
    rows, expected = log_of(tmp_path / "run" / "distil"), log_of(whole / "distil")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    ours, theirs = terms_of(rows[0]), terms_of(expected[0])
    assert ours == pytest.approx({**theirs, "itm": ours["itm"]}, rel=1e-4)
    assert sum("pictures, tables" in script.out for script in scripts) == 1
    assert "teacher" in cells_of(tmp_path / "run")


# ----------------------------------------------------------------------------- precision, speed


@pytest.mark.parametrize("flags", ["--precision bf16", "--precision fp16", "--grad-checkpoint", "--compile"])
def test_precision_and_speed(flags, emoji, whole, tmp_path, monkeypatch):
    """The losses of full precision, nearly; --compile traced without the C++ compiler."""
    def without_compiler(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_compiler)
    run("dlip", *emoji, "--stage", "distil", *flags.split(), "--out", tmp_path / "run")
    half = "precision" in flags
    rows, expected = log_of(tmp_path / "run" / "distil"), log_of(whole / "distil")
    for row, reference in list(zip(rows, expected, strict=True))[:1 if half else None]:
        wanted = pytest.approx(float(reference["loss"]), rel=0.02 if half else 1e-4)
        assert float(row["loss"]) == wanted
    scaler = checkpoint(tmp_path / "run" / "distil")["scaler"]
    assert scaler["scale"] > 1 if "fp16" in flags else not scaler


# ----------------------------------------------------------------------------------- user errors


@pytest.fixture(scope="module")
def wrong(folder, teacher, words_blip):
    """Folder of things that cannot be used."""
    found = folder / "wrong"
    (found / "empty").mkdir(parents=True)
    content = torch.load(words_blip, weights_only=True)
    torch.save({"layer.weight": torch.zeros(3, 3)}, found / "other.pt")
    weights = {name: w for name, w in content["model"].items() if "text_decoder" not in name}
    torch.save({**content, "model": weights}, found / "no_decoder.pt")
    own = torch.load(teacher, weights_only=True)
    for name, part, value in (("heads", "text", {**own["size"]["text"], "heads": 2}),
                              ("patch", "vision", {**own["size"]["vision"], "patch": 4})):
        blip = dlip.BLIP(dlip.blip_size(common.Checkpoint("", {}, {}, {**own["size"], part: value}), {}))
        torch.save({**own, "model": blip.state_dict(), "size": {**own["size"], part: value}}, found / f"{name}.pt")
    (found / "cut.pt").write_bytes(teacher.read_bytes()[:5000])
    (found / "file").write_text("")
    return found


# The flags given, words that the message must hold.
ERRORS = {
    "--task everything": "--task everything retrieval caption vqa",
    "--data nothing --method blip": "nothing",
    "--data coco --stage all": "coco emoji",
    "--hr image": "image img text vl_e vl_d none",
    "--no-vlp --method blip": "--no-vlp loss",
    "--image-size 42": "42 8",
    "--scenes 8": "8 16 --batch-size",
    "--ablate vlp --stage distil": "--ablate --stage",
    "--teacher {wrong}/missing.pt": "{wrong}/missing.pt",
    "--teacher {wrong}/cut.pt": "{wrong}/cut.pt",
    "--teacher {wrong}": "{wrong}",
    "--teacher {wrong}/heads.pt": "{wrong}/heads.pt heads 2 4",
    "--teacher {wrong}/patch.pt": "{wrong}/patch.pt patch 4 8",
    "--teacher {words}": "{words} vocabulary 30,524 emoji",
    "--vision-init {wrong}/other.pt": "{wrong}/other.pt",
    "--init {words} --stage distil": "distil --init finetune evaluate",
    "--stage finetune --task vqa": "finetune --init FILE",
    "--stage finetune --init {words}": "finetune --task",
    "--stage evaluate --init {words}": "{words} vocabulary 30,524 emoji",
    "--stage evaluate --task vqa --init {run}/distil/blip.pt": "{run}/distil/blip.pt fine-tuned vqa",
    "--data coco": "--teacher --method blip",
    "--data coco --teacher {words} --root {wrong}/empty": "{wrong}/empty",
    "--data coco --stage finetune --task vqa --init {words}": "vqa coco",
    "--data vqav2 --stage finetune --init {words} --root {wrong}/empty": "{wrong}/empty prepare.py",
    "--data coco --stage finetune --task caption --init {wrong}/no_decoder.pt": "{wrong}/no_decoder.pt",
    "--out {run}": "{run} --resume --out",
    "--resume --out {run} --lr 0.5": "--lr 0.5 {run}", "--resume --out {run}/distil": "{run} distil part",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_user_errors_are_one_line(flags, teacher, words_blip, wrong, whole, tmp_path):
    names = dict(wrong=wrong, words=words_blip, run=whole)
    start = [] if "--resume" in flags else WORDS if "--data" in flags else EMOJI[:-2]
    if not re.search("--teacher|--init|--data|--resume", flags):
        start = [*start, "--teacher", teacher]
    out = [] if "--out" in flags else ["--out", tmp_path / "run"]
    message = error("dlip", *start, *flags.format(**names).split(), *out)
    missing = [word for word in ERRORS[flags].format(**names).split() if word not in message]
    assert not missing, message
    assert not list((tmp_path / "run").glob("**/*.*[nv]")), "the same --out is refused then"  # json, csv


# ------------------------------------------------------------------------------------ real files


@needs_coco
def test_photographs(tmp_path):
    """A teacher from nothing, distilled, fine-tuned and evaluated, with the whole vocabulary."""
    command = [sys.executable, REPO / "data/prepare.py", "coco", COCO_MINI, "--out", tmp_path / "coco"]
    subprocess.run(command, check=True, capture_output=True)
    data = [*WORDS, "--data", "coco", "--root", tmp_path / "coco", "--batch-size", 32]
    start = [*data, "--epochs", 1, "--image-size", 40]
    run("dlip", *start, "--stage", "teacher", "--out", tmp_path)
    made = checkpoint(tmp_path / "teacher", "blip.pt")["model"]
    assert {w.dtype for w in made.values() if w.is_floating_point()} == {torch.float16}
    run("dlip", *start, "--stage", "distil", "--teacher", tmp_path / "teacher" / "blip.pt", "--out",
        tmp_path / "run")
    for task, metric in (("caption", "cider"), ("retrieval", "i2t_r1")):
        again = [*data, "--image-size", 48, "--task", task]
        run("dlip", *again, "--stage", "finetune", "--epochs", 1, "--init",
            tmp_path / "run" / "distil" / "blip.pt", "--out", tmp_path / task)
        run("dlip", *again, "--stage", "evaluate", "--init", tmp_path / task / task / "blip.pt",
            "--out", tmp_path / metric)
        assert metric in cells_of(tmp_path / metric)["model"]


def write_questions(root, split, answers):
    """A prepared list of 16 questions about photographs, three an image."""
    lines = [{"made_from": [], "samples": 16, "unusable": {}, "notes": {}, "root": ".", "name": "vqav2",
              "kind": "questions", "answers": ["yes", "no", "red"]}]
    for i in range(16):
        name = f"{split}{i // 3}.jpg"
        (root / name).write_bytes(photo(i // 3))
        lines.append({"key": str(i), "image": name, "kind": "yes/no",
                      "question": f"is it number {i}?", "answers": answers})
    (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_questions_about_photographs(words_blip, tmp_path):
    """Fine-tuned; the answers to the test's questions are written as the server takes them."""
    for split, answers in (("train", ["yes"] * 10), ("val", ["no"] * 10), ("test", [])):
        write_questions(tmp_path, split, answers)
    data = [*WORDS, "--data", "vqav2", "--root", tmp_path, "--image-size", 40, "--batch-size", 4]
    run("dlip", *data, "--stage", "finetune", "--epochs", 8, "--lr", "1e-2", "--init", words_blip,
        "--out", tmp_path / "run")
    rows = log_of(tmp_path / "run" / "vqa")
    assert len(rows) == 32 and float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 2
    assert float(rows[-1]["val_vqa"]) == 0  # it has learned to say yes
    run("dlip", *data, "--stage", "evaluate", "--init", tmp_path / "run" / "vqa" / "blip.pt",
        "--out", tmp_path / "scores")
    answers = json.loads((tmp_path / "scores" / "answers_model.json").read_text())
    assert answers == [{"question_id": i, "answer": "yes"} for i in range(16)]


def test_augmentation_depends_on_the_sample_alone():
    """Seeded by the sample's rng, without touching torch's generator; no colour is changed."""
    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    image[1:] = image[1:2]  # green as blue
    state = torch.random.get_rng_state()
    first, again, *others = (dlip.augment(image, np.random.default_rng(seed)) for seed in (3, 3, *range(20)))
    assert torch.equal(first, again) and not torch.equal(first, others[4])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(changed[1], changed[2]) for changed in others)


# ------------------------------------------------------------------------------------- ablation


def test_an_arm_of_the_ablation(emoji, tmp_path):
    """A printed command in a folder of its own."""
    script = Script("dlip", *emoji, "--task", "retrieval", "--epochs", 1, "--ablate", "vlp", "--seeds", 0,
                    "--out", tmp_path).wait()
    assert script.code == 0, script.err
    assert "--method blip" in script.out and "vlp: student" in (tmp_path / "table.md").read_text()
    assert names_in(tmp_path / "vlp" / "seed0") >= {"results.json", "distil", "retrieval"}


# ------------------------------------------------------------------------------ optimiser, rates


def test_learning_rates():
    """Warm-up from 1e-6; then 0.85 an epoch in pre-training on large data, a cosine else."""
    cfg, _ = dlip.configure(["--data", "cc3m", "--method", "blip"])
    assert dlip.peak_lr(cfg, 384) == 5e-4
    for step, wanted in ((0, 1e-6), (1500, 2.505e-4), (3000, 5e-4), (9999, 5e-4), (10_000, 5e-4 * 0.85),
                         (25_000, 5e-4 * 0.85 ** 2)):
        assert dlip.schedules(cfg, 5e-4, step, 100_000, 10_000)["lr"] == pytest.approx(wanted)
    fine, _ = dlip.configure("--data coco --stage finetune --task retrieval --init FILE".split())
    assert (dlip.peak_lr(fine, 768), dlip.peak_lr(fine, 384)) == (1e-5, 5e-5)
    assert dlip.schedules(fine, 1e-5, 50, 100, 10)["lr"] == pytest.approx(0.5e-5)
    short = dataclasses.replace(fine, data="emoji", warmup_steps=100)
    assert dlip.schedules(short, 1e-3, 2, 10, 10)["lr"] == pytest.approx(1e-3)  # at most a fifth


def test_update_decays_matrices_and_clamps_the_temperature():
    cfg, _ = dlip.configure(["--method", "blip", "--vit", "tiny", "--bert", "tiny"])
    student = dlip.build(cfg, dlip.tokenizer_of(cfg)).student
    optimiser = dlip.build_optimiser(student, cfg, torch.device("cpu"))
    decay = {p: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert decay == {p: 0.05 if p.ndim > 1 else 0.0 for p in student.parameters()}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for start, gradient, wanted in ((0.0011, 1.0, 0.001), (0.4999, -1.0, 0.5)):
        student.temp.data.fill_(start)
        student.temp.grad = torch.tensor(gradient)
        dlip.update(student, optimiser, scaler, 0.1)
        assert student.temp.item() == pytest.approx(wanted)
