"""Emoji scenes: what is held out, determinism, flaws by statistics, texts against the scene."""

import collections
import csv
import pickle
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from common import BertTokenizer, UserError, clean_blip_caption, clean_blip_question
from data.emoji import scenes
from data.emoji.scenes import (
    EmojiClasses,
    EmojiQuestions,
    EmojiScenes,
    emoji_answers,
    emoji_words,
)
from PIL import ImageColor

TABLE = Path(__file__).resolve().parents[1] / "data" / "emoji" / "emoji.tsv"
ROWS = list(csv.DictReader(TABLE.read_text("utf-8").splitlines(), delimiter="\t"))
LEVELS = ["easy", "medium", "hard"]
ASKED = {
    "number": "how many",
    "background": "what is the background",
    "presence": "is there",
    "what": "what is in",
    "where": "where is",
    "relation": "what is (above|below|left|right)",
}


def place_of(thing):
    across = "left" if thing["x"] < 1 / 3 else "right" if thing["x"] >= 2 / 3 else ""
    down = "top" if thing["y"] < 1 / 3 else "bottom" if thing["y"] >= 2 / 3 else ""
    if across and down:
        return f"in the {down} {across} corner"
    return f"at the {down}" if down else f"on the {across}" if across else "in the middle"


def truths(scene):
    """From where things stand: what can be said of them, <0> being the first, and the answers."""
    things = scene["objects"]
    rows = [ROWS[thing["concept"]] for thing in things]
    names = [row["concept"] for row in rows]
    place, group = place_of(things[0]), rows[0]["group"]
    said = {"<0>", f"<0>, {group}", f"{group}: <0>", f"<0> {place}", "<0> and <1>"}
    said |= {"<0> next to <1>", "<0>, <1> and <2>", "<2>, <0> and <1>"}
    answers = {f"is there {row['phrase']}?": "yes" if row in rows else "no" for row in ROWS}
    answers |= {"how many objects are there?": str(len(rows)), "where is it?": place}
    answers["what is the background colour?"] = scene["background"]
    answers["what is in the picture?"] = names[0]
    sides = [("x", "left of", "right of", "to the ", "on the left", "on the right")]
    sides += [("y", "above", "below", "", "at the top", "at the bottom")]
    for axis, before, after, to, first, last in sides if len(rows) > 1 else []:
        order = sorted(range(len(rows)), key=lambda i: things[i][axis])
        a, b, c = order[0], order[1], order[-1]
        answers[f"what is {before} the {names[b]}?"] = names[a]
        answers[f"what is {after} the {names[order[-2]]}?"] = names[c]
        said |= {f"<{a}> {to}{before} <{c}>", f"<{c}> {to}{after} <{a}>"}
        said |= {f"<{a}> {first} and <{c}> {last}", f"<{b}> between <{a}> and <{c}>"}
        said |= {f"<{a}> {to}{before} <{b}> and <{c}>", f"<{c}> {to}{after} <{a}> and <{b}>"}
    return said, answers


def is_true(caption, scene):
    for number, thing in enumerate(scene["objects"]):
        row = ROWS[thing["concept"]]
        names = [row["phrase"], *filter(None, row["synonyms"].split("|"))]
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        named = rf"\b({'|'.join(longest_first)})(?!\w)"
        caption = re.sub(named, f"<{number}>", caption, count=1)
    background = scene["background"]
    caption = re.sub(f" (on a {background} background|of a {background} picture)$", "", caption)
    caption = re.sub("^(a picture of|a drawing of|there is) ", "", caption)
    return re.sub(r"\ban? ", "", caption) in truths(scene)[0]


def test_no_drawing_is_in_two_splits():
    shown = collections.defaultdict(set)
    for split in ("train", "val", "test"):
        data = EmojiScenes(split, 3000, 32)
        for i in range(3000):
            things = data.scene(i)["objects"]
            shown[split].update((thing["concept"], thing["artist"]) for thing in things)
    val, test = ({item[:2] for item in EmojiClasses(s, 32).items} for s in ("val", "test"))
    assert shown["val"] <= val and shown["test"] <= test
    assert len(val) == 150 and len(test) == 300
    assert not val & test and not shown["train"] & (val | test)


@pytest.mark.parametrize("by, column, count", [("concept", "phrase", 150), ("group", "group", 10)])
def test_classes(by, column, count):
    data = EmojiClasses("test", 32, by)
    assert len({data.key(i) for i in range(900)}) == len(data) == 900
    assert len(data.classes) == count
    for i in range(0, 900, 31):
        image, label = data[i]
        assert data.classes[label].endswith(ROWS[data.items[i][0]][column])


def test_scenes_follow_from_their_index_alone():
    arguments = ("train", 50, 32, 5, 30, "hard", 0.3, 1.0, 0.5)
    data = EmojiScenes(*arguments)
    first = [data[i] for i in range(50)]
    assert EmojiScenes(*arguments)[7][0] is first[7][0]  # not drawn again
    scenes.kept_samples.cache_clear()
    again = pickle.loads(pickle.dumps(EmojiScenes(*arguments)))
    for i in reversed(range(50)):
        assert again[i] == first[i] and again[i][0] is not first[i][0]
    other = EmojiScenes("train", 50, 32, 6, *arguments[4:])
    assert not any(other.scene(i) == data.scene(i) for i in range(50))


@pytest.mark.parametrize("difficulty", LEVELS)
@pytest.mark.parametrize("split, count", [("train", 1), ("test", 5)])
def test_captions_are_true(difficulty, split, count):
    data = EmojiScenes(split, 400, 32, 3, 412, difficulty)
    for i in range(400):
        captions = data.captions(i)
        assert len(captions) == count
        assert all(is_true(caption, data.scene(i)) for caption in captions), captions


def test_shares_of_the_flaws():
    """Tolerances of four standard deviations of a share of 2,000 scenes, or more."""
    n, options = 2000, dict(concepts=412, difficulty="hard")
    data = EmojiScenes("train", n, 32, noise=0.3, **options)
    true = [is_true(data.captions(i)[0], data.scene(i)) for i in range(n)]
    assert np.mean(true) == pytest.approx(0.7, abs=0.045)

    data = EmojiScenes("train", n, 32, seed=2, long_tail=1.0)
    firsts = collections.Counter(data.scene(i)["objects"][0]["concept"] for i in range(n))
    harmonic = sum(1 / rank for rank in range(1, 151))
    for rank, (_, count) in enumerate(firsts.most_common(3), 1):
        assert count / n == pytest.approx(1 / rank / harmonic, abs=0.035)

    data, shown = EmojiScenes("train", n, 32, duplicates=0.4, **options), set()
    for i in range(n):
        scene = data.scene(i)
        drawings = [(thing["concept"], thing["artist"]) for thing in scene["objects"]]
        shown.add((scene["background"], *drawings))
    assert 1 - len(shown) / n == pytest.approx(0.4, abs=0.045)

    data = EmojiScenes("val", n, 32, noise=0.9, duplicates=0.9)
    assert all(is_true(data.captions(i)[0], data.scene(i)) for i in range(300))


@pytest.mark.parametrize("difficulty", LEVELS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_are_true(difficulty, split):
    data = EmojiQuestions(split, 100, 40, 2, 150, difficulty)
    assert len({data.key(i) for i in range(600)}) == len(data) == 600
    for i in range(600):
        image, (question, answers) = data[i]
        known = truths(data.scenes.scene(i // 6))[1]
        assert answers == [known[question]] * 10 and answers[0] in data.answers
        assert re.match(ASKED[data.question_kind(i)], question)


def test_backgrounds_look_as_they_are_called():
    data = EmojiScenes("train", 100, 40)
    for i in range(100):
        corners = np.asarray(data[i][0])[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
        distance = {}
        for name, colour in scenes.COLOURS.items():
            distance[name] = np.median(np.abs(corners - ImageColor.getrgb(colour)).sum(1))
        assert min(distance, key=distance.get) == data.scene(i)["background"]


@pytest.mark.parametrize("concepts", [4, 150, 412])
def test_small_vocabulary_covers_every_word(concepts):
    full, small = BertTokenizer(), BertTokenizer(words=emoji_words(concepts))
    data = EmojiScenes("test", 300, 40, 1, concepts, "hard")
    texts = set(emoji_answers(concepts, "hard"))
    for i in range(300):
        texts.update(map(clean_blip_caption, data.captions(i)))
        texts.update(clean_blip_question(text) for _, *pair in data.questions(i) for text in pair)
    assert small.vocab_size < 3000
    for text in texts:
        pieces = [small._tokens[i] for i in small.encode(text)]
        assert pieces == [full._tokens[i] for i in full.encode(text)]


def test_large_scenes_are_drawn_once_for_their_questions(monkeypatch):
    render = Mock(wraps=scenes.render_scene)
    monkeypatch.setattr(scenes, "render_scene", render)
    data = EmojiQuestions("test", 3, 100, seed=77)
    assert {data[i][0].size for i in range(18)} == {(112, 112)}
    assert render.call_count == 3 and len(data.scenes.samples) == 1


@pytest.mark.parametrize("kind, concepts, difficulty", [
    (EmojiScenes, 413, "easy"),
    (EmojiScenes, 2, "hard"),
    (EmojiQuestions, 3, "hard"),
])
def test_wrong_number_of_concepts(kind, concepts, difficulty):
    with pytest.raises(UserError, match=f"^--concepts {concepts}: .*$"):
        kind("test", 10, 32, concepts=concepts, difficulty=difficulty)
    assert kind("test", 10, 32, concepts=4, difficulty=difficulty)[9]
