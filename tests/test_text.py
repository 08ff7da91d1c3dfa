"""Caption and answer scores against pycocoevalcap, its Java tokenizer and formulas.

Without pycocoevalcap or Java the comparisons with them are skipped.
"""

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from common import bleu, cider_d, normalize_answer, ptb_tokenize, vqa_accuracy

COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini" / "annotations"


@pytest.fixture(scope="module")
def captions():
    """{image_id: its captions} of coco_mini."""
    files, found = sorted(COCO.glob("captions_*2017.json")), {}
    if not files:
        pytest.skip("the COCO sample is not here")
    for path in files:
        for annotation in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
            found.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return found


# --------------------------------------------------------------------------------------------------------------- scores


def assert_same_scores(references, hypotheses):
    """As pycocoevalcap's."""
    scorers = pytest.importorskip("pycocoevalcap.bleu.bleu"), pytest.importorskip("pycocoevalcap.cider.cider")
    arguments = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    (*_, wanted), _ = scorers[0].Bleu(4).compute_score(*arguments, verbose=0)
    np.testing.assert_allclose(bleu(references, hypotheses), wanted, atol=1e-9)
    _, wanted = scorers[1].Cider().compute_score(*arguments)
    np.testing.assert_allclose(cider_d(references, hypotheses), wanted, atol=1e-9)


def test_scores_of_real_captions(captions):
    tokens = [list(map(ptb_tokenize, texts)) for texts in captions.values()]
    references, hypotheses = [texts[1:] for texts in tokens], [texts[0] for texts in tokens]
    assert len(tokens) > 100
    assert_same_scores(references, hypotheses)
    assert bleu(references, hypotheses) > 0.1 and cider_d(references, hypotheses).mean() > 0.5


@pytest.mark.parametrize("seed", range(40))
def test_scores_of_random_corpora(seed):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(rng.choice([2, 5, 30]))]

    def sentence(least):
        return " ".join(rng.choices(words, k=rng.randint(least, rng.choice([2, 6, 25]))))

    n = rng.randint(1, 12)
    references = [[sentence(1) for _ in range(rng.randint(1, 5))] for _ in range(n)]
    assert_same_scores(references, [rng.choice([sentence(0), rng.choice(refs)]) for refs in references])


@pytest.mark.parametrize("hypotheses", [
    ["", ""], ["a", "the"], ["a dog", "x"], ["a dog runs on grass", "the cat sat down"], ["x y z w v", ""],
    ["a a a a a a a", "the the the"], ["a dog runs on grass " * 5, "the cat sat down " * 9], ["dog", "cat"],
])
def test_scores_of_edge_cases(hypotheses):
    assert_same_scores([["a dog runs on grass", "dog"], ["the cat sat down", "a cat", "the the"]], hypotheses)


def test_scores_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4, 1 of 3; 6 words against the closest of 5 and 7: the shorter
    score = bleu([["a b c d x", "a b c d y f z"]], ["a b c d e f"])
    assert score == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    same = [["a dog runs on green grass"], ["two cats sit by the door"]]
    assert cider_d(same, [refs[0] for refs in same]) == pytest.approx([10, 10])


# What the jar of pycocoevalcap 1.2 gives.
TOKENIZED = """\
A dog's bowl. -> a dog 's bowl
The dogs' bowls -> the dogs bowls
it’s -> it 's
He can't, won't; don't! -> he ca n't wo n't do n't
I cannot, they're gonna -> i can not they 're gon na
A "black-and-white" t-shirt/cap -> a black-and-white t-shirt/cap
a (brown) dog -> a -lrb- brown -rrb- dog
St. John's St. at 8:25. -> st. john 's st. at 8:25
the U.S. tv. -> the u.s. tv
wow!!! what? -> wow !!! what
12:30pm -> 12:30 pm
a 5'10 man -> a 5 '10 man
1,000 red,blue 3.5 5'10" #5 $5 50% -> 1,000 red blue 3.5 5 10 # 5 $ 5 50 %
o'clock '80s 1990's 'n' y'all -> o'clock '80s 1990 's 'n' y' all
a dog -- a cat - b ... -> a dog a cat b
B&W b&w -> b&w b & w
the end.The start -> the end.the start
w/ w/o :) -> w / w/o :-rrb-
café 😀 ½ cup -> café 1/2 cup
the letter A. -> the letter a
plan B. The man -> plan b the man
vitamin c. is -> vitamin c. is
George W. Bush -> george w. bush
a sign "A." -> a sign a.
in the U.S. -> in the u.s.
Hawai'i Xi'an -> hawai'i xi'an
don'ts isn'tit -> do n'ts is n'tit
d'oh c'est -> d'oh c'est
M'lady m'lady -> m'lady m lady
c'mon cap'n nor'easter s'mores -> c'mon cap'n nor'easter s'mores
Dunkin' y' all ol' man -> dunkin' y all ol' man
rock'n'roll Qur'an -> rock 'n' roll qur an
a 22 3/4 inch -> a 22\xa03/4 inch
2 1/2-inch 1/2-inch -> 2\xa01/2 inch 1/2-inch
22222 3/4 and 5 1/2/3 -> 22222 3/4 and 5\xa01/2 / 3
9/11 12/25/2010 22-3/4 -> 9/11 12/25/2010 22-3/4
"""
TOKENIZED = [line.split(" -> ") for line in TOKENIZED.splitlines()]


@pytest.mark.parametrize("text, tokens", TOKENIZED)
def test_ptb_tokenize(text, tokens):
    assert ptb_tokenize(text) == tokens


def test_ptb_tokenize_equals_the_jar(captions):
    if not shutil.which("java"):
        pytest.skip("no java")
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    texts = [*itertools.chain(*captions.values()), *(text for text, _ in TOKENIZED)]
    assert len(texts) == 795 + len(TOKENIZED)
    texts = [line for text in texts for line in (text, "A cat")]  # what follows decides on periods
    theirs = ptbtokenizer.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert [(t, ptb_tokenize(t)) for t in texts] == [(t, theirs[i][0]) for i, t in enumerate(texts)]


NORMALIZED = """\
Yes. -> yes
the dog -> dog
A an the ->
two dogs -> 2 dogs
none -> 0
ten -> 10
eleven -> eleven
dont -> don't
DONT -> don't
couldntve -> couldntve
couldnt've -> couldn't've
couldn'tve -> couldn't've
somebody'd -> somebodyd
yall'll -> y'all'll
oclock -> o'clock
lets -> lets
black-and-white -> black and white
black - white -> black white
red, blue -> red blue
red,blue -> red blue
1,000 -> 1000
1,000-yard -> 1000yard
3.5 -> 3.5
u.s. -> us
a.m. 5. -> am 5
50% -> 50%
$5 -> $5
what?! -> what
big   dog -> big dog
it's -> it's
well-known -dog -> wellknown dog
well-known- dog -> wellknown dog
"""


@pytest.mark.parametrize("line", NORMALIZED.splitlines())
def test_normalize_answer(line):
    answer, normal = map(str.strip, line.split("->"))
    assert normalize_answer(answer) == normal


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
def test_vqa_accuracy_is_the_published_formula(n):
    """Mean over the subsets that leave out one human of min(number in it that gave the answer / 3, 1)."""
    for agree in range(n + 1):
        humans = ["yes"] * agree + ["no"] * (n - agree)
        others = [humans[:i] + humans[i + 1:] for i in range(n)]
        wanted = np.mean([min(part.count("yes") / 3, 1) for part in others])
        assert vqa_accuracy("yes", humans) == pytest.approx(wanted)


def test_vqa_accuracy_by_hand():
    assert vqa_accuracy("A dog.", ["dog", "the dog", "dog"] + ["cat"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0  # where all humans agree, nothing is normalised
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
