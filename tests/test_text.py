"""BertTokenizer against transformers; caption and answer scores against pycocoevalcap, its Java tokenizer and formulas.

Without transformers, pycocoevalcap or Java the comparisons with them are skipped.
"""

import gzip
import hashlib
import json
import random
import shutil
import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import (
    BERT_SPECIALS,
    BertTokenizer,
    UserError,
    bleu,
    cider_d,
    clean_blip_caption,
    clean_blip_question,
    load_vocabulary,
    normalize_answer,
    ptb_tokenize,
    vqa_accuracy,
)

COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"
# In transformers 5 the tokenizer is the Rust one. Its Unicode tables are of about version 8, and it takes the first 256
# ideographs of CJK extension E for letters (and U+166D for punctuation): where it may differ from Python's tables.
RUST_MAY_DIFFER = {"Mn", "Mc", "Cf", "Po", "Ps", "Pe", "Pd"}
LETTERS = {0x166d, *range(0x2b820, 0x2b920)}


@pytest.fixture(scope="module")
def annotations() -> list[dict]:
    """Captions of coco_mini: image_id and caption."""
    files = [COCO / "annotations" / f"captions_{split}2017.json" for split in ("train", "val")]
    if not all(file.exists() for file in files):
        pytest.skip("the COCO sample is not here")
    return [a for file in files for a in json.loads(file.read_text(encoding="utf-8"))["annotations"]]


@pytest.fixture(scope="module")
def captions(annotations):
    assert len(annotations) == 795
    return [a["caption"] for a in annotations]


def load_reference(folder: Path, tokens: list[str]):
    """transformers' BertTokenizer as BLIP sets it up, with the vocabulary `tokens` (without [DEC] and [ENC])."""
    common.import_torchvision()  # transformers imports it without the remedy for a CPU-only torch
    transformers = pytest.importorskip("transformers")
    (folder / "vocab.txt").write_text("".join(token + "\n" for token in tokens), encoding="utf-8", newline="\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    reference = transformers.BertTokenizer.from_pretrained(str(folder))
    reference.add_special_tokens({"bos_token": "[DEC]"})
    reference.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return load_reference(tmp_path_factory.mktemp("bert"), list(load_vocabulary()))


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer()


def ids_of(reference, texts: list[str]) -> list[list[int]]:
    return reference(texts, add_special_tokens=False).input_ids


def differing(tokenizer, reference, texts: list[str]) -> list[int]:
    theirs = (ids for i in range(0, len(texts), 5000) for ids in ids_of(reference, texts[i:i + 5000]))
    return [i for i, (text, ids) in enumerate(zip(texts, theirs)) if tokenizer.encode(text) != ids]


@pytest.fixture(scope="module")
def assigned() -> list[str]:
    """Every character but surrogates; of the private ones, all alike, one in 97."""
    kinds = ((c, unicodedata.category(c)) for c in map(chr, range(0x110000)))
    return [c for c, kind in kinds if kind not in ("Cn", "Cs") and (kind != "Co" or ord(c) % 97 == 0)]


@pytest.fixture(scope="module")
def newer_than_rust(tokenizer, reference, assigned) -> set[str]:
    """The characters that the reference, alone or within a word, treats differently."""
    return {assigned[i] for i in differing(tokenizer, reference, [f"{c} ab{c}cd" for c in assigned])}


# ------------------------------------------------------------------------------------------------------------ WordPiece


def test_vocabulary_is_the_published_file():
    content = gzip.decompress((common.DATA / "bert_base_uncased_vocab.txt.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


def test_published_ids(tokenizer):
    assert tokenizer.vocab_size == 30524
    ids = tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.dec, tokenizer.enc
    assert ids == (0, 100, 101, 102, 103, 30522, 30523)
    assert tokenizer.encode("A picture of ") == [1037, 3861, 1997]


def test_real_captions(tokenizer, reference, captions):
    assert not differing(tokenizer, reference, captions + [clean_blip_caption(caption) for caption in captions])


def test_every_character_alone_and_within_a_word(reference, assigned, newer_than_rust):
    assert len(assigned) > 140_000
    if not reference.is_fast:
        assert not newer_than_rust
    assert len(newer_than_rust) < 1000 and all(c > "\u0600" for c in newer_than_rust)
    assert all(unicodedata.category(c) in RUST_MAY_DIFFER or ord(c) in LETTERS for c in newer_than_rust)


def random_texts(n: int, left_out: set[str]) -> list[str]:
    rng = random.Random(0)
    accents = [c for c in map(chr, [*range(0xc0, 0x250), *range(0x1e00, 0x2000)]) if c.isalpha()]
    alphabets = [string.ascii_letters, string.ascii_lowercase, string.digits, string.punctuation, " \t\n\r\v\f",
                 "\x00\x01\x1c\x7f\x85\xa0\xad\u1680\u2003\u2028\u2029\u200b\u200d\u3000\ufeff\ufffd", accents,
                 [chr(i) for i in range(0x300, 0x370)], "αβγΑΣσςабвЙй", "אבגשׁعربيةहिन्दीไทย한국어가",
                 "日本中文\u3400\uf900\uff21\uff01\U00020000\U0002f800\u3001\u3002",
                 "😀👍🏽❤\ufe0f👨\u200d👩\u200d👧©™×÷±¿¡«»…—–’“", "İıſKÅΩﬁǅẞ≠\u037e\u1fef",
                 ["[SEP]", "[PAD]", "[MASK]", "[UNK]", "[CLS]", "[DEC]", "[ENC]", "[sep]", "##"],
                 ["the", "dog", "unbelievably", "'s", "n't", "playing"], ["x" * 99, "y" * 100, "z" * 101, "é" * 100]]
    alphabets = [[c for c in alphabet if not left_out & set(c)] for alphabet in alphabets]
    texts = []
    for _ in range(n):
        some = rng.sample(alphabets, rng.randint(1, 4))
        drawn = [rng.choice(rng.choice(some)) for _ in range(rng.randint(0, 40))]
        texts.append("".join(c + " " * (rng.random() < 0.15) for c in drawn))
    return texts


def test_random_texts(tokenizer, reference, newer_than_rust):
    texts = random_texts(5000, newer_than_rust)
    assert not [ascii(texts[i]) for i in differing(tokenizer, reference, texts)]


def test_no_trace_of_control_characters(tokenizer):
    assert tokenizer.encode("a\ud800b\x00c\ufffdd\u200be\ufefff\ue000g\u0378h") == tokenizer.encode("abcdefgh")


@pytest.mark.parametrize("length", [3, 4, 8, 12, 30])
def test_batch_is_truncated_and_padded_like_the_reference(reference, captions, length):
    batch = BertTokenizer(length)(captions + [""])
    theirs = reference(captions + [""], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    assert batch.dtype == torch.long and torch.equal(batch, theirs.input_ids)


def test_first_token_and_shapes(tokenizer):
    for first, start in (("[CLS]", 101), ("[DEC]", 30522), ("[ENC]", 30523)):
        assert tokenizer("a dog", first).tolist() == [[start, 1037, 3899, 102] + [0] * 26]
    assert tokenizer([]).shape == (0, 30)


def test_decode(tokenizer, reference, captions):
    texts = captions + random_texts(2000, set()) + ["it's n't . \" ' ! x ' y ##s , ? 'm 've 're don't"]
    for text in texts:
        ids = [tokenizer.dec, *tokenizer.encode(text), tokenizer.sep, tokenizer.enc, tokenizer.pad]
        theirs = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        assert tokenizer.decode(ids) == theirs
    assert tokenizer.decode(tokenizer("A dog's bowl, isn't it?")[0]) == "a dog's bowl, isn't it?"


def test_decode_of_random_ids(tokenizer, reference):
    rng = random.Random(0)
    for _ in range(2000):
        ids = [rng.randrange(30524) for _ in range(rng.randint(0, 20))]
        theirs = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        assert tokenizer.decode(ids) == theirs


def test_small_vocabulary(tokenizer, captions, tmp_path):
    small = BertTokenizer(words=captions[:400])
    tokens = [small._tokens[i] for i in range(small.vocab_size)]
    assert tokens[:5] == list(BERT_SPECIALS[:5]) and tokens[-2:] == ["[DEC]", "[ENC]"] and small.vocab_size < 3000
    full = tokenizer._tokens
    for text in captions[:400]:
        assert [tokens[i] for i in small.encode(text)] == [full[i] for i in tokenizer.encode(text)]
    reference = load_reference(tmp_path, tokens[:-2])
    unseen = captions[400:]
    assert not differing(small, reference, captions)
    assert any(small.encode(text) and small.unk not in small.encode(text) for text in unseen)
    letters = set("".join(captions[:400]).lower()) - {" ", "\n"}
    assert letters <= set(tokens) and {"##" + c for c in letters if c.isalnum()} <= set(tokens)
    assert BertTokenizer(words=[]).vocab_size == 7 and BertTokenizer(words=["a [SEP] b"]).encode("zebra") == [1]


@pytest.mark.parametrize("content", [None, b"", b"no gzip", gzip.compress(b"[PAD]\n[UNK]\n"), gzip.compress(b"\xff\n"),
                                     gzip.compress(b"[PAD]\n" * 99)[:-9], gzip.compress(b"")[:10] + b"\xff" * 20])
def test_unusable_vocabulary(tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / "bert_base_uncased_vocab.txt.gz").write_bytes(content)
    monkeypatch.setattr(common, "DATA", tmp_path)
    load_vocabulary.cache_clear()
    with pytest.raises(UserError, match="^[^\n]*bert_base_uncased_vocab[^\n]*$"):
        BertTokenizer()


@pytest.mark.parametrize("length", [2, 0, -1])
def test_context_length_below_three(length):
    with pytest.raises(UserError, match=f"--context-length {length}:"):
        BertTokenizer(length)


def test_clean_caption():
    assert clean_blip_caption('  A "dog" (brown): #1*!~;  runs.\n') == "a dog brown 1 runs"
    assert clean_blip_caption("it's a well-known, t-shirt?") == "it's a well-known, t-shirt?"
    assert clean_blip_caption("one.two") == "one two"
    assert clean_blip_caption(" ".join(map(str, range(40)))) == " ".join(map(str, range(30)))
    assert clean_blip_caption("a b c d", max_words=2) == "a b" and clean_blip_caption("..") == ""


def test_clean_question():
    assert clean_blip_question('What "color" is the dog(s)?  ') == "what color is the dogs?"
    assert clean_blip_question("one.two") == "onetwo"
    assert clean_blip_question(" ".join(["is"] * 60)) == " ".join(["is"] * 50)


# --------------------------------------------------------------------------------------------------------------- scores


def pycocoevalcap_bleu(references, hypotheses):
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    return scorer.compute_score(dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)}, verbose=0)[0]


def pycocoevalcap_cider(references, hypotheses):
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    return scorer.compute_score(dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)})


def assert_same_scores(references, hypotheses):
    np.testing.assert_allclose(bleu(references, hypotheses), pycocoevalcap_bleu(references, hypotheses), atol=1e-9)
    mean, scores = cider_d(references, hypotheses)
    their_mean, their_scores = pycocoevalcap_cider(references, hypotheses)
    np.testing.assert_allclose(scores, their_scores, atol=1e-9)
    assert mean == pytest.approx(their_mean, abs=1e-9)


def test_scores_of_real_captions(annotations):
    images = {}
    for annotation in annotations:
        images.setdefault(annotation["image_id"], []).append(ptb_tokenize(annotation["caption"]))
    hypotheses, references = [c[0] for c in images.values()], [c[1:] for c in images.values()]
    assert len(images) > 100
    assert_same_scores(references, hypotheses)
    assert bleu(references, hypotheses)[3] > 0.1 and cider_d(references, hypotheses)[0] > 0.5


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
    same = [["a dog runs on green grass"], ["two cats sit by the door"]]
    texts = [refs[0] for refs in same]
    assert bleu(same, texts) == pytest.approx([1] * 4)
    assert cider_d(same, texts)[1] == pytest.approx([10, 10])
    assert cider_d(same[:1], texts[:1])[0] == 0
    # 3 of 4 words, 1 of 3 bigrams; 4 words against the closest of 3 and 5: the shorter.
    scores = bleu([["a b x", "p q r y d"]], ["a b c d"])
    assert scores[:2] == pytest.approx([3 / 4, (3 / 4 * 1 / 3) ** 0.5])
    assert bleu([["a b c d e f"]], ["a b c"])[0] == pytest.approx(np.exp(1 - 6 / 3))
    with pytest.raises(ValueError):
        bleu(same, texts[:1])


# What the jar of pycocoevalcap 1.2 gives.
TOKENIZED = [
    ("A dog's bowl.", "a dog 's bowl"), ("The dogs' bowls", "the dogs bowls"), ("it\u2019s", "it 's"),
    ("He can't, won't; don't!", "he ca n't wo n't do n't"), ("I cannot, they're gonna", "i can not they 're gon na"),
    ('A "black-and-white" t-shirt/cap', "a black-and-white t-shirt/cap"), ("a (brown) dog", "a -lrb- brown -rrb- dog"),
    ("St. John's St. at 8:25.", "st. john 's st. at 8:25"), ("the U.S. tv.", "the u.s. tv"),
    ("wow!!! what?", "wow !!! what"), ("12:30pm", "12:30 pm"), ("a 5'10 man", "a 5 '10 man"),
    ("1,000 red,blue 3.5 5'10\" #5 $5 50%", "1,000 red blue 3.5 5 10 # 5 $ 5 50 %"),
    ("o'clock '80s 1990's 'n' y'all", "o'clock '80s 1990 's 'n' y' all"), ("a dog -- a cat - b ...", "a dog a cat b"),
    ("B&W b&w", "b&w b & w"), ("the end.The start", "the end.the start"), ("w/ w/o :)", "w / w/o :-rrb-"), ("", ""),
    ("caf\u00e9 \U0001f600 \u00bd cup", "caf\u00e9 1/2 cup"),
]


@pytest.mark.parametrize("text, tokens", TOKENIZED)
def test_ptb_tokenize(text, tokens):
    assert ptb_tokenize(text) == tokens


def test_ptb_tokenize_equals_the_jar(captions):
    if not shutil.which("java"):
        pytest.skip("no java")
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    texts = captions + [text for text, _ in TOKENIZED if text]
    theirs = ptbtokenizer.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert [(t, ptb_tokenize(t)) for t in texts] == [(t, theirs[i][0]) for i, t in enumerate(texts)]


@pytest.mark.parametrize("answer, normal", [
    ("Yes.", "yes"), ("the dog", "dog"), ("A an the", ""), ("two dogs", "2 dogs"), ("none", "0"), ("ten", "10"),
    ("eleven", "eleven"), ("dont", "don't"), ("DONT", "don't"), ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("somebody'd", "somebodyd"), ("yall'll", "y'all'll"),
    ("oclock", "o'clock"), ("lets", "lets"), ("black-and-white", "black and white"), ("black - white", "black white"),
    ("red, blue", "red blue"), ("red,blue", "red blue"), ("1,000", "1000"), ("1,000-yard", "1000yard"), ("3.5", "3.5"),
    ("u.s.", "us"), ("a.m. 5.", "am 5"), ("50%", "50%"), ("$5", "$5"), ("what?!", "what"), ("  big   dog ", "big dog"),
    ("it's", "it's"), ("well-known -dog", "wellknown dog"), ("well-known- dog", "wellknown dog"),
])
def test_normalize_answer(answer, normal):
    assert normalize_answer(answer) == normal


def accuracy_by_definition(answer, humans):
    """Mean over the subsets that leave out one human of min(number in it that gave the answer / 3, 1)."""
    shares = []
    for i in range(len(humans)):
        others = humans[:i] + humans[i + 1:]
        shares.append(min(others.count(answer) / 3, 1))
    return np.mean(shares)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
def test_vqa_accuracy_is_the_published_formula(n):
    for agree in range(n + 1):
        humans = ["yes"] * agree + ["no"] * (n - agree)
        assert vqa_accuracy("yes", humans) == pytest.approx(accuracy_by_definition("yes", humans))


def test_vqa_accuracy_by_hand():
    def accuracy(agree):
        return vqa_accuracy("two", ["2"] * agree + ["3"] * (10 - agree))

    assert [round(accuracy(agree), 10) for agree in range(5)] == [0, 0.3, 0.6, 0.9, 1]
    assert vqa_accuracy("A dog.", ["dog", "the dog", "dog"] + ["cat"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0  # where all humans agree, nothing is normalised
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
