"""The runs behind the numbers of README.md and tests/EVIDENCE.md, and those numbers.

    python tests/evidence.py --jobs 2      # makes or continues the runs in order of worth, then writes
    python tests/evidence.py --write       # writes what the stored results say, and runs nothing

A run is an arm of a script's --ablate with a seed. Its scores, its commit, versions and hardware are kept in
tests/results/SCRIPT-ARM-SEED.json as soon as it is done; the tables between the markers of the two documents come from
these files alone, the pictures in data/pictures/ from the run folders in runs/evidence/.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
RESULTS, RUNS = HERE / "results", REPO / "runs/evidence"
DOCUMENTS = REPO / "README.md", HERE / "EVIDENCE.md"
PICTURES = {  # in data/pictures/, from the run folders
    "tokens.png": "eclipse/eclipse/seed0/tokens.png",
    "sweet_spot.png": "eclipse/sweet_spot.png",
    "balance.png": "clip_cid/clip-cid/seed0/balance.png",
    "clusters.png": "clip_cid/clip-cid/seed0/clusters.png",
    "captions.png": "dlip/dlip/seed0/captions.png",
    "attention.png": "dlip/dlip/seed0/attention.png",
}


class Part(NamedTuple):
    """Arms of a script that stand in one table; all are compared with the first, seed by seed."""

    script: str
    flags: tuple
    arms: tuple
    seeds: int
    metrics: tuple  # the first one is compared


ECLIPSE = "eclipse", ("--epochs", "5")
ECLIPSE_METRICS = "concept_top1", "retrieval_t2i_r5", "images_per_second"
CLIP_CID = "clip_cid", ("--epochs", "2")
CLIP_CID_METRICS = "concept_top1", "retrieval_t2i_r5"
DLIP = "dlip", ()
DLIP_METRICS = "i2t_r1", "t2i_r1", "cider", "vqa_accuracy"
PARTS = {  # in order of worth
    "eclipse": Part(*ECLIPSE, ("clip", "clip + evit", "eclipse", "full capacity"), 5, ECLIPSE_METRICS),
    "clip_cid": Part(*CLIP_CID, ("clip", "clip + filter", "clip-cid"), 5, CLIP_CID_METRICS),
    "dlip": Part(*DLIP, ("vlp", "dlip", "teacher"), 3, DLIP_METRICS),
    "eclipse_arms": Part(
        *ECLIPSE, ("eclipse", "keep rate 0.9", "keep rate 0.5", "text teacher momentum", "text grad momentum",
                   "text grad both", "kd weight 0", "kd weight 0.5", "kd weight 2", "ema 0.95", "ema 0.994",
                   "no kd ramp", "no fusion", "teacher pruned too"), 3, ECLIPSE_METRICS),
    "clip_cid_arms": Part(
        *CLIP_CID, ("clip-cid", "clip + filter + cluster", "clip + filter + instance", "clip-cid, no filter",
                    "clip-cid, random filter", "clip-cid, no clip loss", "prototypes teacher", "prototypes learned",
                    "instance intra", "instance both", "instance logit-kl", "clip-kd features", "clip-kd logits"),
        3, CLIP_CID_METRICS),
    "dlip_arms": Part(*DLIP, ("dlip", "vlp + hr", "vlp + at", "at + hr", "attn self", "attn cross"), 1, DLIP_METRICS),
    "noise_0": Part(*ECLIPSE, ("noise 0, clip", "noise 0, eclipse"), 3, ECLIPSE_METRICS),
    "noise_20": Part(*ECLIPSE, ("noise 0.2, clip", "noise 0.2, eclipse"), 3, ECLIPSE_METRICS),
    "noise_60": Part(*ECLIPSE, ("noise 0.6, clip", "noise 0.6, eclipse"), 3, ECLIPSE_METRICS),
}


# ------------------------------------------------------------------------------------------ runs


def stored(script, arm, seed):
    return RESULTS / f"{script}-{arm.replace(' ', '_')}-{seed}.json"


def keep(script, arm, seed):
    """Store the result of a run that is done."""
    folder = RUNS / script / arm.replace(" ", "_") / f"seed{seed}"
    if stored(script, arm, seed).is_file() or not (folder / "results.json").is_file():
        return
    results, config = common.read_json(folder / "results.json"), common.read_json(folder / "config.json")
    content = {"arm": arm, "seed": seed, "cells": results["cells"], "environment": config["environment"]}
    common.write_json(stored(script, arm, seed), content)


def make(part, jobs):
    """The runs of a part that are not stored yet, seed by seed."""
    for seed in range(part.seeds):
        missing = [arm for arm in part.arms if not stored(part.script, arm, seed).is_file()]
        if missing:
            command = [sys.executable, f"{part.script}.py", "--ablate", *missing, "--seeds", str(seed), *part.flags,
                       "--jobs", str(jobs), "--out", str(RUNS / part.script)]
            code = subprocess.call(command, cwd=REPO)
            for arm in missing:
                keep(part.script, arm, seed)
            if code:
                sys.exit(code)


# ---------------------------------------------------------------------------------------- tables


def results_of(part, arm):
    """{seed: {metric: value} of the first cell}, of the runs that are stored."""
    found = {}
    for seed in range(part.seeds):
        if stored(part.script, arm, seed).is_file():
            cells = common.read_json(stored(part.script, arm, seed))["cells"]
            found[seed] = next(iter(cells.values()))
    return found


def spread(values):
    """mean ± sample standard deviation"""
    mean = statistics.mean(values)
    digits = 0 if abs(mean) >= 100 else 1
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(part):
    """A row an arm: its metrics; differences to the first arm, and in how many seeds they are positive."""
    first, metric = part.arms[0], part.metrics[0]
    header = ["arm", *part.metrics, f"{metric} against {first}", "seeds"]
    rows = [header, ["---"] * len(header)]
    base = results_of(part, first)
    for arm in part.arms:
        found = results_of(part, arm)
        if not found:
            continue
        cells = [spread([scores[name] for scores in found.values()]) for name in part.metrics]
        gains = [scores[metric] - base[seed][metric] for seed, scores in found.items() if seed in base]
        against = "–"
        if gains and arm != first:
            positive = sum(gain > 0 for gain in gains)
            against = f"{spread(gains)} ({positive} of {len(gains)})"
        rows.append([arm, *cells, against, str(len(found))])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def origin(part):
    """Command, commits, versions and hardware of a part's results, in one line."""
    commits, machines = set(), set()
    for path in RESULTS.glob(f"{part.script}-*.json"):
        result = common.read_json(path)
        if result["arm"] in part.arms:
            made = result["environment"]
            commits.add(made["commit"])
            machines.add(f"torch {made['torch']}, {made['cpu_threads']} thread, {made['platform']}")
    missing = sum(part.seeds - len(results_of(part, arm)) for arm in part.arms)
    left = f"; {missing} runs still to be made" if missing else ""
    flags = " ".join(part.flags)
    return (f"`python {part.script}.py --ablate ... {flags}`, mean ± sample standard deviation over seeds; commit "
            f"{', '.join(sorted(commits))}; {'; '.join(sorted(machines))}{left}.\n")


def render(text):
    """A document with what stands between its markers made anew."""
    def fill(match):
        part = PARTS[match[2]]
        return f"{match[1]}{table(part)}\n{origin(part)}{match[3]}"

    return re.sub(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def write():
    for path in DOCUMENTS:
        text = render(path.read_text("utf-8"))
        common.replace_file(path, lambda new, text=text: new.write_text(text, "utf-8"))
    for name, source in PICTURES.items():
        if (RUNS / source).is_file():
            shutil.copy(RUNS / source, REPO / "data/pictures" / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="run nothing")
    given = parser.parse_args()
    for part in PARTS.values():
        if not given.write:
            make(part, given.jobs)
            write()
    write()


if __name__ == "__main__":
    main()
