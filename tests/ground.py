"""Where does ECLIPSE win? A map on validation scenes, at 64 px, where pruning saves most.

    python tests/ground.py --seeds 0 1 2 --only "40 % wrong captions"

Each cell is a run of eclipse.py in runs/ground/, made or continued; its student is scored on 3,000 validation images of
one object and among 2,000 validation scenes: so many that the spread is the training's. The slim CLIP is the honest
rival of a pruned one. Scores are kept in tests/results/ground-*.json, the table in tests/EVIDENCE.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import eclipse
import torch
from data.emoji import scenes

import evidence
from evidence import REPO, RESULTS

LOOKS = "--preset", "demo64", "--concepts", "50"
SETTINGS = {
    "40 % wrong captions": (*LOOKS, "--difficulty", "medium", "--noise", "0.4", "--epochs", "5"),
    "60 % wrong captions, easy": (*LOOKS, "--difficulty", "easy", "--noise", "0.6", "--epochs", "5"),
}
ARMS = {
    "CLIP": ("--method", "clip"),
    "slim CLIP": ("--method", "clip", "--preset", "slim", "--image-size", "64"),
    "CLIP + EViT, κ 0.5": ("--method", "clip+evit", "--keep-rate", "0.5"),
    "ECLIPSE, κ 0.5": ("--keep-rate", "0.5"),
    "ECLIPSE, κ 0.7": (),
}
METRICS = "concept_top1", "retrieval_t2i_r5"


def stored(setting, arm, seed):
    return RESULTS / f"ground-{setting}-{arm}-{seed}.json".replace(" ", "_").replace("κ", "k")


def student(path):
    """The Config and the encoders, as trained, of the student in a run's checkpoint."""
    cfg, _, loaded = eclipse.configure(["--evaluate", str(path)])
    model = eclipse.build(cfg, loaded)
    amp, _ = common.mixed_precision("fp32", torch.device("cpu"))
    _, cells = eclipse.encoders_of(model, model.size.pixel_statistics("cpu"), amp)
    return cfg, model, cells[f"online κ={cfg.keep_rate:g}"]


def make(setting, arm, seed):
    """Train and score one cell, unless it is stored."""
    if stored(setting, arm, seed).is_file():
        return
    folder = REPO / "runs/ground" / stored(setting, arm, seed).stem
    if not (folder / "results.json").is_file():
        flags = [*SETTINGS[setting], *ARMS[arm], "--seed", str(seed), "--out", str(folder), "--resume"]
        subprocess.run([sys.executable, "eclipse.py", *flags], cwd=REPO, check=True)
    cfg, model, encoders = student(folder / "last.pt")
    looks = "val", 64, "concept", cfg.concepts, cfg.difficulty
    objects = scenes.EmojiClasses(*looks)
    objects.items *= 20  # each drawing at 60 places
    sets = {"concept": objects, "retrieval": scenes.EmojiScenes("val", 2000, 64, 0, *looks[3:])}
    scores = common.score_sets({"student": encoders}, model.size.tokenizer(), sets, 64, 0)["student"]
    content = {"scores": scores, "environment": common.environment(), "machine": evidence.machine()}
    common.write_json(stored(setting, arm, seed), content)


def throughputs():
    """{arm: images/s of the image encoder, 64 at a time, CLIP's being 1}, of random weights, in turn."""
    calls = {}
    for arm, flags in ARMS.items():
        cfg, *_ = eclipse.configure([*LOOKS, *flags])
        visual = eclipse.build(cfg, None).online.visual.eval()
        image = torch.rand(64, 3, 64, 64)
        calls[arm] = lambda visual=visual, image=image, rate=cfg.keep_rate: visual(image, rate)
    times = common.compare_latency(calls, "cpu", 60)
    return {arm: times["CLIP"] / time for arm, time in times.items()}


def table():
    """A row an arm of a setting: throughput, scores, and differences to two of the arms, seed by seed."""
    rivals = "CLIP", "slim CLIP"
    rows = [["captions", "arm", "throughput", *METRICS, *(f"against {name}" for name in rivals), "seeds"],
            ["---"] * 8]
    if not (RESULTS / "ground.json").is_file():
        return "Not measured yet.\n"
    speed = common.read_json(RESULTS / "ground.json")["throughput"]
    for setting in SETTINGS:
        found = {arm: {} for arm in ARMS}
        for arm in ARMS:
            for path in RESULTS.glob(stored(setting, arm, "*").name):
                found[arm][path.stem.rpartition("-")[2]] = common.read_json(path)["scores"]
        for arm, runs in found.items():
            if runs:
                cells = [evidence.spread([scores[name] for scores in runs.values()]) for name in METRICS]
                for name in rivals:
                    cells.append("–" if arm == name else evidence.difference(runs, found[name], METRICS[0]))
                rows.append([setting, arm, f"{speed[arm]:.2f}", *cells, str(len(runs))])
    return evidence.markdown(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    given = parser.parse_args()
    if not (RESULTS / "ground.json").is_file():
        content = {"throughput": throughputs(), "environment": common.environment(), "machine": evidence.machine()}
        common.write_json(RESULTS / "ground.json", content)
    for setting in given.only:
        for seed in given.seeds:
            for arm in ARMS:
                make(setting, arm, seed)


if __name__ == "__main__":
    main()
