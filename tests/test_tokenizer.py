"""CLIPTokenizer against open_clip's SimpleTokenizer and against byte-pair encoding by definition.

open_clip runs ftfy over every text first and CLIPTokenizer does not (see its docstring), so the comparisons run with
that step switched off, but for the ones that say otherwise. Without open_clip they are skipped.
"""

import gzip
import importlib.util
import json
import pickle
import random
import sys
import types
import unicodedata
from pathlib import Path

import pytest
import torch

from common import DATA, CLIPTokenizer, UserError

COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"

EDGE_CASES = [
    "", " ", "\t\n\r\v\f", "a", "A", "!", "'", "''", "  two   spaces ",
    # What is white space differs between `re`, `regex` and str.split.
    "a\u00a0b\u2003c\u3000d\u200be\ufeff", "a\x1cb\x1dc\x1ed\x1fe\x85f", "\x1c", "\x85a\x85", "a\x00b", "a\u180eb",
    # Contractions; U+017F is the long s, which folds to s.
    "it's he'll I'm we've they're she'd can't", "IT'S HE'LL I'M WE'VE THEY'RE SHE'D CAN'T", "'LL'Ll'lL",
    "'''s", "'south 'tis 'reason", "it\u2019s", "'\u017f '\u017fo", "!'s", "a''s", "x'5", "'s's's",
    # Lower case; U+212A is the Kelvin sign, U+0345 a mark whose upper case is a letter.
    "\u0130stanbul \u0131 I i", "\u212a \u212b", "STRASSE straße ẞ", "ΑΣ ΑΣΑ Σ", "\ufb01 \ufb05 \ufb06", "ǅ ǈ",
    "\u0345", "a\u0345b", ".\u0345.", "\u1fb3 \u1fbc α\u0345", "e\u0301 \u00e9", "Ⅷ ⅷ Ⓐ ⓐ",
    # Scripts, numbers, punctuation.
    "नमस्ते", "ไทย", "한국어", "中文字符", "日本語テキスト", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚", "\U0010ffff", "\ufffd\ufffe",
    "\u0645\u0631\u062d\u0628\u0627", "\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea",
    "4k 1080p 3.14 1,000 x2y3z", "²³¹ ½ Ⅻ \u0661\u0662\u0663 \u0be7 〇 一二 ㊿ \u0bf0", "1" * 100,
    "_under_score_", "a_1_b", "__init__", "a-b/c\\d", "...!!!???", "http://a.b/c?d=e&f=g#h",
    # HTML entities, undone twice.
    "&amp; &lt;b&gt; &quot; &#39;s &#x27;s &eacute;", "&amp;amp; &amp;lt; &amp;amp;amp;", "&nbsp;a&nbsp;",
    "&#0; &#xD800; &#128;", "&notanentity; & &; &amp", "&#32;&#9;x", "&#x1c;a", "&lt;start_of_text&gt;",
    # Special tokens and the mark of a word's end, as text.
    "<start_of_text>", "<end_of_text>", "a<start_of_text>b<END_OF_TEXT>c", ".<start_of_text>", "<<start_of_text>>",
    "<start_of_text", "<\u017ftart_of_text>", "a <\u017fTART_OF_TEXT> b", "</w> a</w> </w></w>", "w</w>",
    # Long.
    "x" * 300, "é" * 100, "ab" * 200, "antidisestablishmentarianism " * 40,
]


def load_open_clip_tokenizer() -> types.ModuleType:
    """A private copy of open_clip/tokenizer.py, read by its path: the package itself would import torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not all(importlib.util.find_spec(name) for name in ("ftfy", "regex")):
        pytest.skip("open_clip is not installed")
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def open_clip_with_ftfy():
    return load_open_clip_tokenizer().SimpleTokenizer()


@pytest.fixture(scope="module")
def open_clip():
    module = load_open_clip_tokenizer()
    module.ftfy = types.SimpleNamespace(fix_text=lambda text: text)
    return module.SimpleTokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer()


@pytest.fixture(scope="module")
def captions() -> list[str]:
    files = [COCO / "annotations" / f"captions_{split}2017.json" for split in ("train", "val")]
    if not all(file.exists() for file in files):
        pytest.skip("the COCO sample is not here")
    return [a["caption"] for file in files for a in json.loads(file.read_text(encoding="utf-8"))["annotations"]]


def assert_same_ids(ours, theirs, texts):
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), ascii(text)


def assigned() -> list[str]:
    """Every character of this Python's Unicode version but surrogates; of the private ones, all alike, one in 97."""
    kinds = ((c, unicodedata.category(c)) for c in map(chr, range(sys.maxunicode + 1)))
    return [c for c, kind in kinds if kind not in ("Cn", "Cs") and (kind != "Co" or ord(c) % 97 == 0)]


def random_texts(n: int) -> list[str]:
    """Seeded mixtures of characters of all planes, white space, numbers, contractions, entities and special tokens."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    everything = assigned()
    european = [c for c in everything if 0x80 <= ord(c) < 0x600]
    sources = [
        lambda: "".join(rng.choices(letters, k=rng.randint(1, 9))),
        lambda: rng.choice(letters),
        lambda: chr(rng.randrange(128)),
        lambda: rng.choice(european),
        lambda: rng.choice(everything),
        lambda: rng.choice(" \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"),
        lambda: rng.choice("0123456789²½Ⅷ٣一〇"),
        lambda: rng.choice(["'", "'s", "'S", "'t", "'re", "'Ve", "'m", "'ll", "'D", "'\u017f", "’s", "\u0345", "_"]),
        lambda: rng.choice(["&amp;", "&amp;amp;", "&lt;", "&gt", "&#39;", "&#x27;s", "&#160;", "&nbsp;", "&#", "&"]),
        lambda: rng.choice(["<start_of_text>", "<END_OF_TEXT>", "<\u017ftart_of_text>", "<", ">", "</w>"]),
    ]
    return ["".join(rng.choice(sources)() for _ in range(rng.randint(1, 12))) for _ in range(n)]


# ---- against published ids and open_clip


def test_published_ids(tokenizer):
    assert tokenizer.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert tokenizer.encode("hello world!") == [3306, 1002, 256]
    assert (tokenizer.sot, tokenizer.eot, tokenizer.vocab_size, tokenizer.context_length) == (49406, 49407, 49408, 77)


def test_real_captions(tokenizer, open_clip_with_ftfy, captions):
    """Here ftfy is on: it changes nothing that matters in them."""
    assert len(captions) == 795
    assert torch.equal(tokenizer(captions), open_clip_with_ftfy(captions))
    assert_same_ids(tokenizer, open_clip_with_ftfy, captions)


@pytest.mark.parametrize("text", EDGE_CASES, ids=lambda text: ascii(text)[:30])
def test_edge_cases(tokenizer, open_clip, text):
    assert tokenizer.encode(text) == open_clip.encode(text)


def test_random_texts(tokenizer, open_clip):
    assert_same_ids(tokenizer, open_clip, random_texts(20_000))


def test_every_character(tokenizer, open_clip):
    assert_same_ids(tokenizer, open_clip, assigned())


def test_every_character_within_a_word(tokenizer, open_clip):
    assert_same_ids(tokenizer, open_clip, (f"a{c}b" for c in assigned()))


def test_surrogates_are_treated_as_by_ftfy(tokenizer, open_clip_with_ftfy):
    for text in ("a \ud83d cat", "\udc00", "\ud83d\ude00", "x\ud800y\udfffz", "\udc00\ud800"):
        assert tokenizer.encode(text) == open_clip_with_ftfy.encode(text), ascii(text)


def test_what_ftfy_would_repair_stays_as_it_is(tokenizer, open_clip, open_clip_with_ftfy):
    """The documented exception."""
    for text in ("it\u2019s", "caf\u00c3\u00a9", "\ufb01sh", "\uff21", "e\u0301", "\x1b[31mred"):
        assert tokenizer.encode(text) == open_clip.encode(text) != open_clip_with_ftfy.encode(text), ascii(text)


@pytest.mark.parametrize("context_length", [2, 3, 4, 8, 16, 77, 100])
def test_context_length(open_clip, context_length):
    texts = [*EDGE_CASES, *random_texts(500)]
    ours = CLIPTokenizer(context_length)(texts)
    assert ours.shape == (len(texts), context_length) and ours.dtype == torch.long
    assert torch.equal(ours, open_clip(texts, context_length=context_length))
    assert (ours == 49407).any(dim=1).all()


def test_one_text_and_no_text(tokenizer, open_clip):
    assert torch.equal(tokenizer("a cat"), open_clip("a cat"))
    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))
    assert torch.equal(tokenizer([]), open_clip([])) and tokenizer([]).shape == (0, 77)


def test_decode(tokenizer, open_clip):
    for text in [*EDGE_CASES, *random_texts(2000)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == open_clip.decode(ids), ascii(text)
    for i in range(49408):  # many of them are parts of a character
        assert tokenizer.decode([i]) == open_clip.decode([i]), i


def test_decode_of_plain_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode("Two CATS on a mat.")) == "two cats on a mat . "
    assert tokenizer.decode(CLIPTokenizer(7)("naïve cat")[0]) == "<start_of_text>naïve cat <end_of_text>!"


# ---- small vocabularies, against the definition


def bpe_by_definition(word: str, n_merges: int) -> list[str]:
    """Byte-pair encoding as it is defined: every merge of the list in turn, over the whole word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    with gzip.open(DATA / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [line.split() for line in file.read().split("\n")[1 : 1 + n_merges]]
    vocabulary = [symbol[b] for b in printable + others]
    vocabulary += [s + "</w>" for s in vocabulary] + ["".join(merge) for merge in merges]
    parts = [symbol[b] for b in word.encode()]
    parts[-1] += "</w>"
    for merge in merges:
        at = 0
        while at < len(parts) - 1:
            if parts[at : at + 2] == merge:
                parts[at : at + 2] = ["".join(merge)]
            at += 1
    return [vocabulary.index(part) for part in parts]


@pytest.mark.parametrize("n_merges", [0, 1, 2, 100, 1500, 5000])
def test_small_vocabulary(n_merges):
    tokenizer = CLIPTokenizer(vocab_size=514 + n_merges)
    rng = random.Random(n_merges)
    words = ["a", "the", "photograph", "aaaaaaa", "ananananas", "mississippi", "été", "straße", "кот", "猫", "!!??.."]
    words += ["".join(rng.choices("etaoinshr", k=rng.randint(1, 12))) for _ in range(12)]
    expected = [i for word in words for i in bpe_by_definition(word, n_merges)]
    assert tokenizer.encode(" ".join(words)) == expected
    assert tokenizer.decode(expected) == " ".join(words) + " "
    assert (tokenizer.sot, tokenizer.eot) == (512 + n_merges, 513 + n_merges)
    assert tokenizer.encode("<start_of_text> <end_of_text>") == [tokenizer.sot, tokenizer.eot]


def test_small_vocabulary_stays_in_range(captions):
    tokenizer = CLIPTokenizer(context_length=32, vocab_size=2000)
    ids = tokenizer(captions)
    assert ids.shape == (795, 32) and 0 <= ids.min() and ids.max() == tokenizer.eot == 1999
    assert (ids[:, 0] == tokenizer.sot).all() and ((ids == tokenizer.eot).sum(dim=1) == 1).all()


# ---- the object


def test_pickle(tokenizer):
    for original in (tokenizer, CLIPTokenizer(16, 1000)):
        copy = pickle.loads(pickle.dumps(original))
        assert torch.equal(copy(EDGE_CASES), original(EDGE_CASES))
        assert (copy.sot, copy.eot, copy.vocab_size, copy.context_length) == (
            original.sot, original.eot, original.vocab_size, original.context_length)


def test_cache_is_bounded_and_not_handed_out():
    tokenizer = CLIPTokenizer()
    tokenizer.encode("cat").append(-1)
    assert tokenizer.encode("cat") == [2368]
    for n in range(2**16 + 10):
        tokenizer.encode("".join(chr(ord("a") + int(digit)) for digit in str(n)))
    assert len(tokenizer._cache) <= 2**16 and tokenizer.encode("cat") == [2368]


@pytest.mark.parametrize("wrong", [{"vocab_size": 513}, {"vocab_size": 49409}, {"vocab_size": 0}, {"vocab_size": -1},
                                   {"context_length": 1}, {"context_length": 0}, {"context_length": -77}])
def test_errors_name_the_value_in_one_line(wrong):
    with pytest.raises(UserError) as error:
        CLIPTokenizer(**wrong)
    (name, value), = wrong.items()
    message = str(error.value)
    assert name.replace("_", "-") in message and str(value) in message and "\n" not in message
