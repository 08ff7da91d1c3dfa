"""The runs behind the numbers of README.md and tests/EVIDENCE.md, and those numbers.

    python tests/evidence.py --jobs 2      # makes or continues the runs in order of worth, then writes
    python tests/evidence.py --write       # writes what the stored results say, and runs nothing

A run is an arm of a script's --ablate with a seed. Its scores, its commit, versions and hardware are kept in
tests/results/SCRIPT-ARM-SEED.json as soon as it is done; the tables between the markers of the two documents come from
these files alone, the pictures in data/pictures/ from the run folders in runs/evidence/.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from PIL import Image

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
RESULTS, RUNS = HERE / "results", REPO / "runs/evidence"
DOCUMENTS = REPO / "README.md", HERE / "EVIDENCE.md"
PICTURES = {  # in data/pictures/, from the run folders
    # python eclipse.py --evaluate data/teacher_clip.pt --keep-rate 0.7 --out runs/evidence/tokens
    "tokens.png": "tokens/tokens.png",
    "sweet_spot.png": "eclipse/sweet_spot.png",
    "balance.png": "clip_cid/clip-cid/seed0/balance.png",
    "clusters.png": "clip_cid/clip-cid/seed0/clusters.png",
    # python dlip.py --out runs/evidence/demo_dlip: an arm of the ablation has no teacher beside it
    "captions.png": "demo_dlip/captions.png",
    "attention.png": "demo_dlip/attention.png",
}


class Part(NamedTuple):
    """Arms of a script that stand in one table; all are compared with the first, seed by seed."""

    script: str
    flags: tuple
    arms: tuple
    seeds: int
    metrics: tuple  # the first one is compared


ECLIPSE = "eclipse", ("--epochs", "5")
ECLIPSE_METRICS = "concept_top1", "retrieval_t2i_r5"
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
    "dlip_long": Part(*DLIP, ("teacher", "dlip", "as long as the teacher"), 3, DLIP_METRICS),
    "dlip_arms": Part(
        *DLIP, ("dlip", "vlp + hr", "vlp + at", "at + hr", "hr img", "hr text", "hr img text", "hr vl_e", "hr vl_d",
                "attn self", "attn cross"), 1, DLIP_METRICS),
    "noise_0": Part(*ECLIPSE, ("noise 0, clip", "noise 0, eclipse"), 3, ECLIPSE_METRICS),
    "noise_20": Part(*ECLIPSE, ("noise 0.2, clip", "noise 0.2, eclipse"), 3, ECLIPSE_METRICS),
    "noise_60": Part(*ECLIPSE, ("noise 0.6, clip", "noise 0.6, eclipse"), 3, ECLIPSE_METRICS),
}


HEADLINE = (  # of README.md: what is compared, its part, the arms without and with it, score and metric
    ("ECLIPSE, beside CLIP", "eclipse", "clip", "eclipse", "zero-shot, concept_top1", "concept_top1"),
    ("ECLIPSE, beside CLIP + EViT", "eclipse", "clip + evit", "eclipse", "zero-shot, concept_top1", "concept_top1"),
    ("CLIP-CID, beside CLIP", "clip_cid", "clip", "clip-cid", "zero-shot, concept_top1", "concept_top1"),
    ("DLIP, beside the same BLIP alone", "dlip", "vlp", "dlip", "image to text, i2t_r1", "i2t_r1"),
    ("", "dlip", "vlp", "dlip", "CIDEr", "cider"),
    ("", "dlip", "vlp", "dlip", "VQA accuracy", "vqa_accuracy"),
    ("DLIP, beside its teacher", "dlip", "teacher", "dlip", "image to text, i2t_r1", "i2t_r1"),
    ("", "dlip", "teacher", "dlip", "CIDEr", "cider"),
    ("", "dlip", "teacher", "dlip", "VQA accuracy", "vqa_accuracy"),
)


# ------------------------------------------------------------------------------------------ runs


def stored(script, arm, seed):
    return RESULTS / f"{script}-{arm.replace(' ', '_')}-{seed}.json"


def machine():
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"


def keep(script, arm, seed):
    """Store the result of a run that is done."""
    folder = RUNS / script / arm.replace(" ", "_") / f"seed{seed}"
    if stored(script, arm, seed).is_file() or not (folder / "results.json").is_file():
        return
    results, config = common.read_json(folder / "results.json"), common.read_json(folder / "config.json")
    content = {"arm": arm, "seed": seed, "cells": results["cells"], "environment": config["environment"],
               "machine": machine()}
    common.write_json(stored(script, arm, seed), content)


def make(part, jobs):
    """The runs of a part that are not stored yet, seed by seed."""
    for seed in range(part.seeds):
        missing = [arm for arm in part.arms if not stored(part.script, arm, seed).is_file()]
        if missing:
            command = [sys.executable, f"{part.script}.py", "--ablate", *missing, "--seeds", str(seed), *part.flags,
                       "--jobs", str(jobs), "--out", f"runs/evidence/{part.script}"]
            code = subprocess.call(command, cwd=REPO)
            for arm in missing:
                keep(part.script, arm, seed)
            if code:
                sys.exit(code)


# ------------------------------------------------------------------------------------- exercises


class Exercise(NamedTuple):
    """An edit of a script, on the run where it bites, beside an arm of PARTS without the edit."""

    name: str
    part: str
    arm: str
    flags: tuple
    old: str
    new: str
    expect: str
    processes: int = 1


AS_AN_ARM = "--samples", "32000", "--stage", "distil"  # of clip_cid.py
EXERCISES = [
    Exercise("no stop-gradient", "eclipse", "eclipse", (), "A_stopped = similarities(scale, u, v.detach())",
             "A_stopped = similarities(scale, u, v)", "the texts follow the teacher too"),
    Exercise("prune at random", "eclipse", "eclipse", (), "kept = cls_attention.topk(",
             "kept = torch.rand_like(cls_attention).topk(", "worse: what CLS attends to matters"),
    Exercise("KL turned round", "eclipse", "eclipse", (), "kd = similarity_kl(A_bar, A_stopped",
             "kd = similarity_kl(A_stopped, A_bar", "the images get none of it, the texts follow through Ā"),
    Exercise("a teacher that never moves", "eclipse", "eclipse", (), "student.get_parameter(name), 1 - m)",
             "student.get_parameter(name), 0.0)", "a random teacher pulls the student down"),
    Exercise("text read at its first token", "eclipse", "clip", ("--method", "clip"), "text.argmax(1)]",
             "0 * text.argmax(1)]", "a causal tower has seen nothing there: chance"),
    Exercise("start at scale 1000", "eclipse", "clip", ("--method", "clip"), "math.log(1 / 0.07)", "math.log(1000)",
             "the clamp brings it to 100 after one step: sharp from the start, slow, or diverges"),
    Exercise("a sigmoid loss", "eclipse", "clip", ("--method", "clip"), "    return F.cross_entropy(logits, target)",
             "    return -F.logsigmoid(logits * (2 * F.one_hot(target, logits.shape[1]) - 1)).sum(1).mean()",
             "SigLIP without its bias: b² - b easy negatives drown b positives"),
    Exercise("gather without gradient", "eclipse", "clip", ("--method", "clip"),
             "sum_over_processes(grad.contiguous())", "grad.contiguous()",
             "two processes no longer have the gradient of one", processes=2),
    Exercise("prototypes of any length", "clip_cid", "clip-cid", AS_AN_ARM, "unit(self.prototypes)", "self.prototypes",
             "starts equal, since centres have unit length, then drifts"),
    Exercise("the teacher's rows by position", "clip_cid", "clip-cid", AS_AN_ARM, "row = self.rows[index]",
             "row = index % len(image)", "everyone gets another one's teacher: the filter has moved the rows"),
]


def stored_exercise(exercise):
    return RESULTS / f"exercise-{exercise.name.replace(' ', '_')}.json"


def edited_copy(exercise):
    """The folder of a copy of the scripts with the edit. UserError where its text is not found once."""
    folder = RUNS / "exercises" / exercise.name.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "data").symlink_to(REPO / "data")
    script, found = PARTS[exercise.part].script, 0
    for name in (script, "common"):
        text = (REPO / f"{name}.py").read_text("utf-8")
        found += text.count(exercise.old)
        (folder / f"{name}.py").write_text(text.replace(exercise.old, exercise.new), "utf-8")
    if found != 1:
        raise common.UserError(f"exercise {exercise.name!r}: its text stands {found} times in {script}.py")
    return folder


def do(exercise):
    """Make the edit in a copy, run it, store the score or the last line of what went wrong."""
    folder, part = edited_copy(exercise), PARTS[exercise.part]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={exercise.processes}"]
    command = [sys.executable, *launcher * (exercise.processes > 1), f"{part.script}.py", *part.flags, *exercise.flags,
               "--seed", "0", "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    content = {"environment": common.environment(), "message": done.stderr.splitlines()[-1:], "score": None}
    if done.returncode == 0:
        cells = common.read_json(folder / "run/results.json")["cells"]
        content["score"] = next(iter(cells.values()))[part.metrics[0]]
    common.write_json(stored_exercise(exercise), content)


def exercise_table():
    rows = [["", "edit", "what to expect", "without", "with"], ["---"] * 5]
    for exercise in EXERCISES:
        part, measured = PARTS[exercise.part], "not run yet"
        base = results_of(part, exercise.arm).get(0, {}).get(part.metrics[0])
        if stored_exercise(exercise).is_file():
            found = common.read_json(stored_exercise(exercise))
            measured = f"{found['score']:.1f}" if found["score"] is not None else " ".join(found["message"])
        edit = f"`{exercise.old.strip()}` → `{exercise.new.strip() or '(nothing)'}`"
        without = "–" if base is None else f"{base:.1f}"
        rows.append([exercise.name, edit, exercise.expect, without, measured])
    return markdown(rows)


# ---------------------------------------------------------------------------------------- tables


def results_of(part, arm):
    """{seed: {metric: value} of the first cell}, of the runs that are stored."""
    found = {}
    for seed in range(part.seeds):
        if stored(part.script, arm, seed).is_file():
            cells = common.read_json(stored(part.script, arm, seed))["cells"]
            found[seed] = next(iter(cells.values()))
    return found


def spread(values, sign=""):
    """mean ± sample standard deviation; sign "+": of a difference."""
    mean = f"{statistics.mean(values):{sign}.1f}".replace("-", "−")
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def difference(found, base, metric):
    """A score minus the base's, seed by seed, and in how many seeds that is positive."""
    gains = [scores[metric] - base[seed][metric] for seed, scores in found.items() if seed in base]
    if not gains:
        return "–"
    return f"{spread(gains, '+')} ({sum(gain > 0 for gain in gains)} of {len(gains)})"


def markdown(rows):
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def headline():
    """The claims that README.md begins with, a row each."""
    header = ["method", "score", "without", "with", "difference, seed by seed (positive in)"]
    rows = [header, ["---"] * len(header)]
    for name, part, *arms, score, metric in HEADLINE:
        base, found = [results_of(PARTS[part], arm) for arm in arms]
        if base and found:
            means = [spread([scores[metric] for scores in each.values()]) for each in (base, found)]
            rows.append([name, score, *means, difference(found, base, metric)])
    return markdown(rows)


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
        against = "–" if arm == first else difference(found, base, metric)
        rows.append([arm, *cells, against, str(len(found))])
    return markdown(rows)


def origin(part):
    """Command, commits, versions and hardware of a part's results, in one line."""
    commits, machines = set(), set()
    for path in RESULTS.glob(f"{part.script}-*.json"):
        result = common.read_json(path)
        if result["arm"] in part.arms:
            made = result["environment"]
            commits.add(made["commit"])
            machines.add(f"{result['machine']}, torch {made['torch']}, threads: {made['cpu_threads']}")
    if not commits:
        return f"No run of {part.script}.py is stored for this table yet.\n"
    missing = sum(part.seeds - len(results_of(part, arm)) for arm in part.arms)
    left = f"; {missing} runs still to be made" if missing else ""
    seeds = map(str, range(part.seeds))
    command = shlex.join([f"{part.script}.py", "--ablate", *part.arms, "--seeds", *seeds, *part.flags])
    return (f"`python {command}`, mean ± sample standard deviation over seeds; commit {', '.join(sorted(commits))}; "
            f"{'; '.join(sorted(machines))}{left}.\n")


def bench_table(name):
    """Rows of tests/bench.py, of the files bench-PART-DEVICE.json; name: bench_DEVICE."""
    rows, origins = [["measured", "first", "second", "second's time / first's", "range", "wanted", "note"]], set()
    rows.append(["---"] * len(rows[0]))
    for path in sorted(RESULTS.glob(f"bench-*-{name.removeprefix('bench_')}.json")):
        found = common.read_json(path)
        made = found["environment"]
        versions = ", ".join(" ".join(pair) for pair in found["versions"].items())
        origins.add(f"commit {made['commit']}, {made['gpu'] or found['machine']}, torch {made['torch']}, threads: "
                    f"{made['cpu_threads']}, {versions}")
        for row in found["rows"]:
            figures = ["", "", "", "", ""]
            if "ratio" in row:
                figures = [row["first"], row["second"], f"{row['ratio']:.2f}",
                           f"{row['least']:.2f}–{row['most']:.2f}, {row['rounds']} rounds", row["wanted"]]
            rows.append([row["measured"], *figures, row["note"]])
    if not origins:
        return "Not measured yet.\n"
    return f"{markdown(rows)}\n`python tests/bench.py`; {'; '.join(sorted(origins))}.\n"


def render(text):
    """A document with what stands between its markers made anew."""
    def fill(match):
        if match[2] == "exercises":
            return f"{match[1]}{exercise_table()}{match[3]}"
        if match[2] == "ground":
            import ground
            return f"{match[1]}{ground.table()}{match[3]}"
        if match[2] == "headline":
            parts = [PARTS[part] for part in dict.fromkeys(part for _, part, *_ in HEADLINE)]
            return f"{match[1]}{headline()}\n{''.join(map(origin, parts))}{match[3]}"
        if match[2].startswith("bench"):
            return f"{match[1]}{bench_table(match[2])}{match[3]}"
        part = PARTS[match[2]]
        return f"{match[1]}{table(part)}\n{origin(part)}{match[3]}"

    return re.sub(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def write():
    for path in DOCUMENTS:
        text = render(path.read_text("utf-8"))
        common.replace_file(path, lambda new, text=text: new.write_text(text, "utf-8"))
    for name, source in PICTURES.items():
        if (RUNS / source).is_file():
            picture = Image.open(RUNS / source).convert("RGB")
            picture.thumbnail((1200, 1200))
            picture.save(REPO / "data/pictures" / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="run nothing")
    given = parser.parse_args()
    for part in PARTS.values():
        if not given.write:
            make(part, given.jobs)
            write()
    for exercise in EXERCISES:
        if not given.write and not stored_exercise(exercise).is_file():
            do(exercise)
    write()


if __name__ == "__main__":
    main()
