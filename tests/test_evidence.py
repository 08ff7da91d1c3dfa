"""README.md and tests/EVIDENCE.md say what the stored results say; means and differences against numpy's."""

import json
import re

import numpy as np
import pytest

import evidence


@pytest.mark.parametrize("path", evidence.DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_the_stored_results_say(path):
    text = path.read_text("utf-8")
    assert "<!-- results " in text
    assert evidence.render(text) == text


def test_table_of_made_up_results(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    part = evidence.Part("eclipse", (), ("clip", "eclipse"), 3, ("top1",))
    scores = {"clip": [10.0, 12.0, 11.0], "eclipse": [13.0, 11.0, 15.0]}
    for arm, values in scores.items():
        for seed, value in enumerate(values):
            content = {"arm": arm, "seed": seed, "cells": {"first": {"top1": value}, "second": {"top1": -1}}}
            evidence.stored("eclipse", arm, seed).write_text(json.dumps(content))
    gains = np.subtract(scores["eclipse"], scores["clip"])
    row = evidence.table(part).splitlines()[-1].split(" | ")
    assert row[1] == f"{np.mean(scores['eclipse']):.1f} ± {np.std(scores['eclipse'], ddof=1):.1f}"
    assert row[2] == f"{gains.mean():+.1f} ± {gains.std(ddof=1):.1f} (2 of 3)"


@pytest.mark.parametrize("exercise", evidence.EXERCISES, ids=lambda exercise: exercise.name)
def test_an_exercise_changes_its_script(exercise, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    evidence.edited_copy(exercise)


def test_readme_names_what_there_is():
    """Every function, test and flag in README's tables and text stands somewhere in the code."""
    paths = [*evidence.REPO.glob("*.py"), *evidence.REPO.glob("data/*.py"), *evidence.REPO.glob("tests/*.py")]
    code = "".join(path.read_text("utf-8") for path in paths)
    text = (evidence.REPO / "README.md").read_text("utf-8")
    for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]\w+)`", text):
        assert re.search(rf"(def |class |^|\.){name}\b", code, re.M), name
    for flag in set(re.findall(r"--[a-z][a-z-]+", text)) - {"--nproc", "--upgrade"}:
        field = flag[2:].replace("-", "_").removeprefix("no_")
        assert re.search(rf"^    {field}: |[\"']{field}[\"']|[\"']{flag}[\"']", code, re.M), flag
