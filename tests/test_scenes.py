"""Emoji scenes: what is held out, determinism, flaws by statistics, texts against the scene."""

import collections
import csv
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from common import BertTokenizer
from data.emoji import scenes
from data.emoji.scenes import EmojiClasses, EmojiQuestions, EmojiScenes, emoji_answers, emoji_words
from dlip import clean_caption, clean_question

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
    answers |= {f"where is {row['phrase']}?": place_of(thing) for row, thing in zip(rows, things)}
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
    val, test = ({item[:2] for item in EmojiClasses(split, 32).items} for split in ("val", "test"))
    assert len(val) == 150 and len(test) == 300 and not val & test
    for split, others in ("train", val | test), ("val", test), ("test", val):
        data = EmojiScenes(split, 3000, 32)
        things = [thing for i in range(3000) for thing in data.scene(i)["objects"]]
        assert not others & {(thing["concept"], thing["artist"]) for thing in things}


@pytest.mark.parametrize("by, column, count", [("concept", "phrase", 150), ("group", "group", 10)])
def test_classes(by, column, count):
    data = EmojiClasses("test", 32, by)
    assert len(data) == 900 and len(data.classes) == count
    for i in range(0, 900, 31):
        assert data.classes[data[i][1]].endswith(ROWS[data.items[i][0]][column])


def test_scenes_follow_from_their_index_alone():
    def data(seed):
        return EmojiScenes("train", 50, 32, seed, 30, "hard", 0.3, 1.0, 0.5)

    first = [data(5)[i] for i in range(50)]
    scenes.kept_samples.cache_clear()
    again = pickle.loads(pickle.dumps(data(5)))
    for i in reversed(range(50)):
        assert again[i] == first[i] and again[i][0] is not first[i][0]
        assert again.scene(i) != data(6).scene(i)


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
    for split, true in ("train", 0.7), ("val", 1):
        data = EmojiScenes(split, n, 32, noise=0.3, **options)
        found = [is_true(data.captions(i)[0], data.scene(i)) for i in range(n)]
        assert np.mean(found) == pytest.approx(true, abs=0.045 if true < 1 else 0)

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


@pytest.mark.parametrize("difficulty", LEVELS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_are_true(difficulty, split):
    data = EmojiQuestions(split, 100, 40, 2, 150, difficulty)
    assert len({data.key(i) for i in range(600)}) == len(data) == 600
    for i in range(600):
        image, (question, answers, kind) = data[i]
        known = truths(data.scene(i // 6))[1]
        assert answers == [known[question]] * 10 and answers[0] in data.answers
        assert re.match(ASKED[kind], question)


def test_no_answer_about_number_or_place_is_mostly_right():
    """Nor is one of "yes" and "no": none is given to more than 60 % of a kind."""
    data, given = EmojiQuestions("train", 500, 40), collections.defaultdict(collections.Counter)
    for i in range(len(data)):
        _, (_, answers, kind) = data[i]
        given[kind][answers[0]] += 1
    for kind in ("number", "presence", "where"):
        assert given[kind].most_common(1)[0][1] <= 0.6 * given[kind].total(), kind


@pytest.mark.parametrize("concepts", [4, 150, 412])
def test_small_vocabulary_covers_every_word(concepts):
    full, small = BertTokenizer(), BertTokenizer(words=emoji_words(concepts))
    data = EmojiScenes("test", 300, 40, 1, concepts, "hard")
    texts = set(emoji_answers(concepts, "hard"))
    for i in range(300):
        texts.update(map(clean_caption, data.captions(i)))
        texts.update(clean_question(text) for _, *pair in data.captions(i) for text in pair)
    assert small.vocab_size < 3000
    for text in texts:
        pieces = [small._tokens[i] for i in small.encode(text)]
        assert pieces == [full._tokens[i] for i in full.encode(text)]
