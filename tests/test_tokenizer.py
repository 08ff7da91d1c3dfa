"""CLIPTokenizer against open_clip and byte-pair encoding by definition, BertTokenizer against transformers.

open_clip runs ftfy over every text first and CLIPTokenizer does not (see its docstring), so the comparisons run with
that step switched off, but for the ones that say otherwise. Without the packages the comparisons are skipped.
"""

import gzip
import hashlib
import importlib.util
import json
import random
import re
import string
import types
import unicodedata

import common
import pytest
import torch
from common import BertTokenizer, CLIPTokenizer, UserError
from dlip import clean_caption, clean_question

from harness import COCO_MINI

# In transformers 5 the tokenizer is the Rust one. Its Unicode tables are of about version 8, and it takes the first 256
# ideographs of CJK extension E for letters (and U+166D for punctuation): where it may differ from Python's tables.
RUST_MAY_DIFFER = {"Mn", "Mc", "Cf", "Po", "Ps", "Pe", "Pd"}
LETTERS = {0x166d, *range(0x2b820, 0x2b920)}

# Separated by |.
EDGE_CASES = (
    "| |\t\n\r\v\f|a|A|!|'|''|  two   spaces |"
    # What is white space differs between `re`, `regex` and str.split.
    "a\u00a0b\u2003c\u3000d\u200be\ufeff|a\x1cb\x1dc\x1ed\x1fe\x85f|\x1c|\x85a\x85|a\x00b|a\u180eb|"
    # Contractions; U+017F is the long s, which folds to s.
    "it's he'll I'm we've they're she'd can't|IT'S HE'LL I'M WE'VE THEY'RE SHE'D CAN'T|'LL'Ll'lL|"
    "'''s|'south 'tis 'reason|it\u2019s|'\u017f '\u017fo|!'s|a''s|x'5|'s's's|"
    # Lower case; U+212A is the Kelvin sign, U+0345 a mark whose upper case is a letter.
    "\u0130stanbul \u0131 I i|\u212a \u212b|STRASSE straße ẞ|ΑΣ ΑΣΑ Σ|\ufb01 \ufb05 \ufb06|ǅ ǈ|"
    "\u0345|a\u0345b|.\u0345.|\u1fb3 \u1fbc α\u0345|e\u0301 \u00e9|Ⅷ ⅷ Ⓐ ⓐ|"
    # Scripts, numbers, punctuation.
    "नमस्ते|ไทย|한국어|中文字符|日本語テキスト|𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚|\U0010ffff|\ufffd\ufffe|"
    "\u0645\u0631\u062d\u0628\u0627|\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea|"
    "_under_score_|a_1_b|__init__|a-b/c\\d|...!!!???|http://a.b/c?d=e&f=g#h|"
    # HTML entities, undone twice.
    "&amp; &lt;b&gt; &quot; &#39;s &#x27;s &eacute;|&amp;amp; &amp;lt; &amp;amp;amp;|&nbsp;a&nbsp;|"
    "&#0; &#xD800; &#128;|&notanentity; & &; &amp|&#32;&#9;x|&#x1c;a|&lt;start_of_text&gt;|"
    # Special tokens and the mark of a word's end, as text.
    "<start_of_text>|<end_of_text>|a<start_of_text>b<END_OF_TEXT>c|.<start_of_text>|<<start_of_text>>|"
    "<start_of_text|<\u017ftart_of_text>|a <\u017fTART_OF_TEXT> b|</w> a</w> </w></w>|w</w>|"
).split("|") + ["1" * 100, "x" * 300, "é" * 100, "ab" * 200, "antidisestablishmentarianism " * 40]


@pytest.fixture(scope="module")
def captions():
    if not COCO_MINI.is_dir():
        pytest.skip("no COCO captions here")
    files = (COCO_MINI / "annotations").glob("captions_*.json")
    return [a["caption"] for file in files for a in json.loads(file.read_text("utf-8"))["annotations"]]


@pytest.fixture(scope="module")
def assigned():
    """Every character but surrogates; of the private ones, all alike, one in 97."""
    kinds = ((c, unicodedata.category(c)) for c in map(chr, range(0x110000)))
    return [c for c, kind in kinds if kind not in ("Cn", "Cs") and (kind != "Co" or ord(c) % 97 == 0)]


def mixtures(n, alphabets):
    """n seeded texts, each of up to 40 entries of up to four of the alphabets, some with a space behind."""
    rng, texts = random.Random(0), []
    for _ in range(n):
        some = rng.sample(alphabets, rng.randint(1, 4))
        drawn = [rng.choice(rng.choice(some)) for _ in range(rng.randint(0, 40))]
        texts.append("".join(entry + " " * (rng.random() < 0.15) for entry in drawn))
    return texts


# ----------------------------------------------------------------------------------------------------------------- CLIP


def load_open_clip_tokenizer():
    """A private copy of its module: a change in it stays there."""
    common.import_torchvision()  # open_clip imports it without the remedy for a CPU-only torch
    pytest.importorskip("open_clip")
    spec = importlib.util.find_spec("open_clip.tokenizer")
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
def clip():
    return CLIPTokenizer()


def assert_same_ids(ours, theirs, texts):
    assert not [ascii(text) for text in texts if ours.encode(text) != theirs.encode(text)]


@pytest.fixture(scope="module")
def clip_texts(assigned):
    return mixtures(10_000, [
        string.ascii_letters, [chr(i) for i in range(128)], [c for c in assigned if 0x80 <= ord(c) < 0x600], assigned,
        " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u200b\u2028\u2029\u202f\u205f\u3000\ufeff",
        "0123456789²½Ⅷ٣一〇",
        ["'", "'s", "'S", "'t", "'re", "'Ve", "'m", "'ll", "'D", "'\u017f", "’s", "\u0345", "_", "</w>", "<", ">"],
        ["&amp;", "&amp;amp;", "&lt;", "&gt", "&#39;", "&#x27;s", "&#160;", "&nbsp;", "&#", "&"],
        ["<start_of_text>", "<END_OF_TEXT>", "<\u017ftart_of_text>"]])


def test_published_ids(clip):
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert clip.encode("hello world!") == [3306, 1002, 256]
    assert clip(["hello"])[0, :4].tolist() == [49406, 3306, 49407, 0]


def test_clip_of_real_captions(clip, open_clip_with_ftfy, captions):
    """Here ftfy is on: it changes nothing that matters in them."""
    assert torch.equal(clip(captions), open_clip_with_ftfy(captions))


def test_clip_of_edge_cases_and_random_texts(clip, open_clip, clip_texts):
    assert_same_ids(clip, open_clip, [*EDGE_CASES, *long_words(2000), *clip_texts])


def test_clip_of_every_character_alone_and_within_a_word(clip, open_clip, assigned):
    assert_same_ids(clip, open_clip, [*assigned, *(f"a{c}b" for c in assigned)])


def test_surrogates_are_treated_as_by_ftfy(clip, open_clip_with_ftfy):
    assert_same_ids(clip, open_clip_with_ftfy, ["a \ud83d cat", "\udc00", "\ud83d\ude00", "x\ud800y\udfffz"])


def test_what_ftfy_would_repair_stays_as_it_is(clip, open_clip, open_clip_with_ftfy):
    """The documented exception."""
    for text in ("it\u2019s", "caf\u00c3\u00a9", "\ufb01sh", "\uff21", "e\u0301", "\x1b[31mred"):
        assert clip.encode(text) == open_clip.encode(text) != open_clip_with_ftfy.encode(text), ascii(text)


@pytest.mark.parametrize("context_length", [2, 3, 16, 77, 100])
def test_context_length(open_clip, clip_texts, context_length):
    texts = [*EDGE_CASES, *clip_texts[:500]]
    assert torch.equal(CLIPTokenizer(context_length)(texts), open_clip(texts, context_length=context_length))


def bpe_by_definition(word, n_merges):
    """Byte-pair encoding as it is defined: every merge of the list in turn, over the whole word."""
    symbol = load_open_clip_tokenizer().bytes_to_unicode()
    content = gzip.decompress((common.DATA / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = content.split("\n")[1 : 1 + n_merges]
    vocabulary = [*symbol.values(), *(s + "</w>" for s in symbol.values()), *(m.replace(" ", "") for m in merges)]
    text = " ".join(symbol[b] for b in word.encode()) + "</w>"
    for merge in merges:
        text = re.sub(rf"(?<!\S){re.escape(merge)}(?!\S)", merge.replace(" ", "").replace("\\", "\\\\"), text)
    return [vocabulary.index(part) for part in text.split(" ")]


@pytest.mark.parametrize("n_merges", [0, 2, 1500])
def test_small_vocabulary_of_clip(n_merges):
    tokenizer = CLIPTokenizer(vocab_size=514 + n_merges)
    rng = random.Random(n_merges)
    words = ["a", "the", "photograph", "aaaaaaa", "ananananas", "mississippi", "été", "straße", "кот", "猫", "!!??.."]
    words += ["".join(rng.choices("etaoinshr", k=rng.randint(1, 12))) for _ in range(12)]
    expected = [i for word in words for i in bpe_by_definition(word, n_merges)]
    assert tokenizer.encode(" ".join(words)) == expected
    assert tokenizer.encode("<start_of_text> <end_of_text>") == [512 + n_merges, 513 + n_merges]


def long_words(length):
    rng = random.Random(0)
    return ["".join(rng.choices(letters, k=length)) for letters in (string.ascii_lowercase, "ab", "a", "é日")]


def test_a_word_without_end_costs_no_more_than_a_context_holds(clip):
    for word in long_words(20_000):
        assert torch.equal(clip([word]), clip([word[:2000]])) and len(clip.encode(word)) <= 6000


@pytest.mark.parametrize("vocab_size", [513, 49409])
def test_a_vocabulary_of_another_size(vocab_size):
    with pytest.raises(UserError, match=f"^[^\n]*{vocab_size}[^\n]*$"):
        CLIPTokenizer(vocab_size=vocab_size)


# ----------------------------------------------------------------------------------------------------------------- BERT


def load_reference(folder, tokens):
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
def reference(tmp_path_factory, bert):
    return load_reference(tmp_path_factory.mktemp("bert"), bert._tokens[:30522])


@pytest.fixture(scope="module")
def bert():
    return BertTokenizer()


def differing(bert, reference, texts):
    theirs = reference(texts, add_special_tokens=False).input_ids
    return [i for i, (text, ids) in enumerate(zip(texts, theirs)) if bert.encode(text) != ids]


@pytest.fixture(scope="module")
def newer_than_rust(bert, reference, assigned):
    """The characters that the reference, alone or within a word, treats differently."""
    return {assigned[i] for i in differing(bert, reference, [f"{c} ab{c}cd" for c in assigned])}


def test_vocabulary_is_the_published_file():
    content = gzip.decompress((common.DATA / "bert_base_uncased_vocab.txt.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


def test_published_ids_of_bert(bert):
    assert bert(["A picture of "])[0, :6].tolist() == [101, 1037, 3861, 1997, 102, 0]
    assert (bert.dec, bert.enc, bert.vocab_size) == (30522, 30523, 30524)


def test_bert_of_real_captions(bert, reference, captions):
    assert not differing(bert, reference, captions + [clean_caption(caption) for caption in captions])


def test_bert_of_every_character_alone_and_within_a_word(reference, assigned, newer_than_rust):
    assert len(newer_than_rust) < 1000 and all(c > "\u0600" for c in newer_than_rust)
    assert all(unicodedata.category(c) in RUST_MAY_DIFFER or ord(c) in LETTERS for c in newer_than_rust)


def bert_alphabets(left_out):
    accents = [c for c in map(chr, [*range(0xc0, 0x250), *range(0x1e00, 0x2000)]) if c.isalpha()]
    alphabets = [string.ascii_letters, string.ascii_lowercase, string.digits, string.punctuation, " \t\n\r\v\f",
                 "\x00\x01\x1c\x7f\x85\xa0\xad\u1680\u2003\u2028\u2029\u200b\u200d\u3000\ufeff\ufffd", accents,
                 [chr(i) for i in range(0x300, 0x370)], "αβγΑΣσςабвЙй", "אבגשׁعربيةहिन्दीไทย한국어가",
                 "日本中文\u3400\uf900\uff21\uff01\U00020000\U0002f800\u3001\u3002",
                 "😀👍🏽❤\ufe0f👨\u200d👩\u200d👧©™×÷±¿¡«»…—–’“", "İıſKÅΩﬁǅẞ≠\u037e\u1fef",
                 ["[sep]", "[dec]", "##"],
                 ["the", "dog", "unbelievably", "'s", "n't", "playing"], ["x" * 99, "y" * 100, "z" * 101, "é" * 100]]
    return [[c for c in alphabet if not left_out & set(c)] for alphabet in alphabets]


def test_bert_of_random_texts(bert, reference, newer_than_rust):
    texts = mixtures(5000, bert_alphabets(newer_than_rust))
    assert not [ascii(texts[i]) for i in differing(bert, reference, texts)]


@pytest.mark.parametrize("length", [3, 4, 8, 12, 30])
def test_batch_is_truncated_and_padded_like_the_reference(reference, captions, length):
    ours = BertTokenizer(length)(captions + [""])
    theirs = reference(captions + [""], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    assert torch.equal(ours, theirs.input_ids)


def test_bert_decode(bert, reference, captions):
    texts = captions + mixtures(2000, bert_alphabets(set())) + ["it's n't . \" ' ! x ' y ##s , ? 'm 've 're don't"]
    for text in texts:
        ids = [bert.dec, *bert.encode(text), bert.sep, bert.enc, bert.pad]
        theirs = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        assert bert.decode(ids) == theirs


def test_small_vocabulary_of_bert(bert, captions, tmp_path):
    """The texts that made it are encoded as with the full one, others as transformers does with these tokens."""
    small = BertTokenizer(words=captions[:400])
    tokens = [small._tokens[i] for i in range(small.vocab_size)]
    assert len(tokens) < 3000
    for text in captions[:400]:
        assert [tokens[i] for i in small.encode(text)] == [bert._tokens[i] for i in bert.encode(text)]
    assert not differing(small, load_reference(tmp_path, tokens[:-2]), captions)


def test_clean_caption_and_question():
    assert clean_caption('  A "dog" (brown): #1*!~;  runs.\n') == "a dog brown 1 runs"
    assert clean_caption("a " * 40) == " ".join("a" * 30)
    assert clean_question('What "color" is the dog(s)? one.two ') == "what color is the dogs? onetwo"
    assert clean_question("a " * 60) == " ".join("a" * 50)
