"""Evaluation of what a BLIP does (re-ranked retrieval, captions, answers) and its pictures, against brute force."""

import itertools
import time
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import dlip
from common import BadSample, UserError

RECALLS = [f"{way}_r{r}" for way in ("i2t", "t2i") for r in (1, 5, 10)]

# ------------------------------------------------------------------------------------------------------------ retrieval


def brute_force(cosines, logits, image_of_text, k):
    """Recalls from full matrices (N, T), one pair at a time, as the protocol words it."""
    N, T = cosines.shape

    def scores(row, logit):
        kept = sorted(range(len(row)), key=lambda j: -row[j])[:k]
        return [logit[j] + row[j] if j in kept else -100.0 for j in range(len(row))]

    ranks = {"i2t": [], "t2i": []}
    for i in range(N):
        found = scores(cosines[i], logits[i])
        best = max((found[t] for t in range(T) if image_of_text[t] == i), default=-np.inf)
        ranks["i2t"].append(sum(found[t] >= best for t in range(T) if image_of_text[t] != i))
    for t in range(T):
        found = scores(cosines[:, t], logits[:, t])
        ranks["t2i"].append(sum(found[i] >= found[image_of_text[t]] for i in range(N) if i != image_of_text[t]))
    return {f"{way}_r{r}": 100 * np.mean([rank < r for rank in found]) for way, found in ranks.items()
            for r in (1, 5, 10)}


def random_problem(seed, images, levels):
    """Different cosines and logits such that logit + cosine is one of `levels`, all exact in float32: many ties."""
    rng = np.random.default_rng(seed)
    captions = rng.integers(1, 6, images)
    image_of_text = rng.permutation(np.repeat(np.arange(images), captions))
    N, T = images, len(image_of_text)
    assert N * T < 2 ** 13
    cosines = (rng.permutation(2 ** 13)[:N * T] / 2 ** 12 - 1).reshape(N, T).astype(np.float32)
    own = np.arange(N)[:, None] == image_of_text
    cosines, by_rank = np.empty_like(cosines), np.sort(cosines.ravel())
    order = np.argsort((rng.standard_normal((N, T)) + 1.5 * own).ravel())  # own pairs tend to be more alike
    cosines.ravel()[order] = by_rank
    sums = np.where(own & (rng.random((N, T)) < 0.5), max(levels), rng.choice(levels, (N, T))).astype(np.float32)
    return cosines, sums - cosines, image_of_text


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 3, 8, 20, 1000])
def test_rerank_equals_a_double_loop(seed, k):
    levels = [(0, 1), (-200, -100, 0, 1), (-100, -99), (-200,), tuple(range(50)), (0,)][seed]
    cosines, logits, image_of_text = random_problem(seed, 1 if seed == 2 and k == 8 else 13, levels)
    calls = []

    def match(i, texts):
        calls.append((i, texts.tolist()))
        return torch.from_numpy(logits[i])[texts]

    found = common.rerank(torch.eye(len(cosines)), torch.from_numpy(cosines.T.copy()), torch.from_numpy(image_of_text),
                          match, k, block=[1, 5, 1024][seed % 3])
    expected = brute_force(cosines, logits, image_of_text, k)
    assert list(found) == RECALLS and found == pytest.approx(expected, abs=1e-4)
    assert [i for i, _ in calls] == list(range(len(cosines)))
    best_texts = np.argsort(-cosines, 1)[:, :k]
    best_images = np.argsort(-cosines, 0)[:k]
    wanted = {(i, t) for i, row in enumerate(best_texts) for t in row} | {
        (i, t) for row in best_images for t, i in enumerate(row)}
    scored = [(i, t) for i, texts in calls for t in texts]
    assert len(scored) == len(set(scored)) and set(scored) == wanted


def test_collapsed_models_and_nan_count_as_misses():
    N, T = 30, 60
    image_of_text = torch.arange(T) % N
    same = torch.ones(1, 4) / 2
    collapsed = common.rerank(same.expand(N, 4), same.expand(T, 4), image_of_text, lambda i, t: torch.zeros(len(t)), N)
    assert set(collapsed.values()) == {0.0}
    eye = torch.eye(N)
    broken = common.rerank(eye, eye[image_of_text], image_of_text, lambda i, t: torch.full((len(t),), torch.nan), 20)
    assert set(broken.values()) == {0.0}


def test_an_image_without_captions_is_a_miss():
    image_of_text = torch.tensor([0, 1, 1])
    eye = torch.eye(3)
    found = common.rerank(eye, eye[image_of_text], image_of_text, lambda i, t: torch.zeros(len(t)), 2)
    assert found["i2t_r1"] == pytest.approx(200 / 3) and found["t2i_r1"] == 100


class Largest(TorchDispatchMode):
    """The most elements any tensor has that an operation returns."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_rerank_stays_within_its_memory_and_time():
    N, T, k, block = 2000, 10000, 64, 100
    generator = torch.Generator().manual_seed(0)
    image_of_text = torch.arange(T) // 5
    images = torch.nn.functional.normalize(torch.randn(N, 16, generator=generator), dim=1)
    noise = 0.3 * torch.randn(T, 16, generator=generator)
    texts = torch.nn.functional.normalize(images[image_of_text] + noise, dim=1)
    start = time.process_time()
    with Largest() as largest:
        found = common.rerank(images, texts, image_of_text, lambda i, t: texts[t] @ images[i], k, block)
    assert largest.elements == block * T  # the block of cosines; N x T is 20 times that
    assert time.process_time() - start < 30  # about 2 s on one slow core
    assert 10 < found["t2i_r1"] < found["t2i_r10"] < 100


# ------------------------------------------------------------------------------------ data and a model to evaluate with


class Readable:
    """A data set of which some samples cannot be read."""

    def __init__(self, data, bad=()):
        self.data, self.bad_places = data, bad

    def __len__(self):
        return len(self.data)

    def __getattr__(self, name):
        return getattr(self.data, name)

    def read(self, i):
        if i in self.bad_places:
            raise BadSample("broken")
        return self.data.read(i)


class Questions:
    """Questions on emoji scenes, several an image, in the form a VQA set has."""

    def __init__(self, scenes, humans=True):
        self.scenes, self.humans = scenes, humans
        self.items = [(i, *pair) for i in range(len(scenes)) for pair in scenes.questions(i)]
        self.answers = sorted({answer for _, _, answer in self.items})
        self.kinds = ["yes/no" if a in ("yes", "no") else "number" if a.isdigit() else "other" for *_, a in self.items]

    def __len__(self):
        return len(self.items)

    def key(self, i):
        return 1000 + i

    def read(self, i):
        scene, question, answer = self.items[i]
        humans = [answer] * (2 + i % 9) + ["something else"] * (8 - i % 9) if self.humans else []
        return self.scenes.read(scene)[0], (question, humans)


def scenes(count=12):
    return common.EmojiScenes("test", count, 32, concepts=20)


@pytest.fixture(scope="module")
def blip():
    """A small BLIP with random weights, its tokenizer, and what rerank_retrieval asks of a model."""
    texts = [caption for i in range(12) for caption in scenes().captions(i)]
    tokenizer = common.BertTokenizer(24, words=texts)
    torch.manual_seed(0)
    special = dict(pad=tokenizer.pad, cls=tokenizer.cls, sep=tokenizer.sep, dec=tokenizer.dec, enc=tokenizer.enc)
    vision = dlip.VisionSize(32, 2, 4, patch=8, image_size=32)
    model = dlip.BLIP(vision, dlip.TextSize(48, 2, 4, vocab=tokenizer.vocab_size, positions=40, **special), 16)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval(), tokenizer


def encoders(model, tokenizer):
    def encode_image(images):
        states = model.encode_image(images / 127.5 - 1)
        return states, model.image_feature(states)

    def encode_text(texts):
        ids = tokenizer(texts)
        return ids, model.text_feature(model.encode_text(ids, ids != tokenizer.pad))

    def match(states, ids):
        return model.match(model.fuse(ids, ids != tokenizer.pad, states))[:, 1]

    return encode_image, encode_text, match


@torch.no_grad()
@pytest.mark.parametrize("bad", [(), (0, 5, 11)])
@pytest.mark.parametrize("k", [4, 500])
def test_rerank_retrieval_equals_all_pairs(blip, bad, k):
    data, (encode_image, encode_text, match) = Readable(scenes(), bad), encoders(*blip)
    sizes = []

    def counted(states, ids):
        sizes.append(len(ids))
        return match(states, ids)

    found = common.rerank_retrieval(data, 32, encode_image, encode_text, counted, k, block=7)

    samples = [data.read(i) for i in range(len(data)) if i not in bad]
    images = torch.stack([torch.from_numpy(common.resize_center_crop(source, 32)) for source, _ in samples])
    image_of_text = np.repeat(np.arange(len(samples)), [len(captions) for _, captions in samples])
    states, features = encode_image(images)
    ids, text_features = encode_text([text for _, captions in samples for text in captions])
    cosines = features @ text_features.T
    logits = torch.stack([match(state[None], ids) for state in states])
    expected = brute_force(cosines.numpy(), logits.numpy(), image_of_text, k)
    by_cosine = common.retrieval(features, text_features, torch.from_numpy(image_of_text))
    expected |= {f"itc_{name}": value for name, value in by_cosine.items()} | ({"unreadable": 3} if bad else {})
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(sizes) == 7
    if k == 500:
        assert sum(sizes) == len(samples) * len(ids)
    assert found["i2t_r1"] != found["itc_i2t_r1"] or found["t2i_r5"] != found["itc_t2i_r5"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_come_back_bit_for_bit(tmp_path, dtype):
    x = torch.randn(5, 3, 8).to(dtype)
    with open(tmp_path / "states", "w+b") as file:
        states = common.StateFile(file)
        states.append(x[:2])
        states.append(x[2:].transpose(1, 2).contiguous().transpose(1, 2))  # the same values, other strides
        for i in (0, 4, 1, 3, 2):
            assert states[i].dtype == dtype and torch.equal(states[i], x[i:i + 1])


def test_states_that_do_not_fit_are_named():
    if not common.Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(UserError, match="TMPDIR"):
        common.StateFile(file).append(torch.zeros(2, 3, 4))


def test_a_set_without_readable_images_is_refused(blip):
    data = Readable(scenes(3), range(3))
    for evaluate in (lambda: common.rerank_retrieval(data, 32, *encoders(*blip), 4),
                     lambda: common.caption_images(data, 32, None), lambda: common.answer_questions(data, 32, None)):
        with pytest.raises(UserError, match="no readable image"):
            evaluate()


# ------------------------------------------------------------------------------------------------- captions and answers


def test_captions_stand_in_order_beside_their_references(blip):
    model, tokenizer = blip

    def generate(images):
        ids = model.generate(model.encode_image(images / 127.5 - 1), max_length=12)
        return [tokenizer.decode(row) for row in ids.tolist()]

    data = Readable(scenes(70), (1, 68))  # more than one batch
    captions, references, indices = common.caption_images(data, 32, generate)
    assert indices == [i for i in range(70) if i not in (1, 68)]
    assert references == [data.captions(i) for i in indices]
    for i in (0, 40, 67):
        image = torch.from_numpy(common.resize_center_crop(data.read(indices[i])[0], 32))[None]
        assert captions[i] == generate(image)[0]
    assert common.caption_scores(references, captions)["bleu1"] < 100


def pycocoevalcap_scores(references, captions):
    bleu, cider = (pytest.importorskip(f"pycocoevalcap.{name}.{name}") for name in ("bleu", "cider"))
    references, captions = dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)}
    found = bleu.Bleu(4).compute_score(references, captions, verbose=0)[0]
    return {**{f"bleu{n}": 100 * value for n, value in enumerate(found, 1)},
            "cider": 100 * cider.Cider().compute_score(references, captions)[0]}


def test_caption_scores_equal_pycocoevalcap():
    data = scenes(40)
    references = [[f"{text.capitalize()}." for text in data.captions(i)[:4]] for i in range(40)]
    captions = [data.captions(i)[4] for i in range(40)]
    tokens = [[common.ptb_tokenize(text) for text in group] for group in references]
    hypotheses = [common.ptb_tokenize(text) for text in captions]
    expected = pycocoevalcap_scores(tokens, hypotheses)
    assert expected["bleu4"] > 10 and expected["cider"] > 50
    assert common.caption_scores(references, captions) == pytest.approx(expected)
    domains = [("in-domain", "near-domain", "out-domain")[i % 3] for i in range(40)]
    for shift, name in enumerate(("in", "near", "out")):
        own = pycocoevalcap_scores(tokens[shift::3], hypotheses[shift::3])
        expected[f"cider_{name}"] = own["cider"]
    assert common.caption_scores(references, captions, domains) == pytest.approx(expected)


def test_a_split_without_references_has_no_scores():
    assert common.caption_scores([[], []], ["a dog", "a cat"]) == {}


@pytest.mark.parametrize("kinds", [True, False])
def test_answers_are_scored_as_one_by_one(kinds):
    questions = Questions(scenes(16))
    if not kinds:
        del questions.kinds
    data, batches = Readable(questions, (3, 70)), []

    def answer(images, asked):
        batches.append((len(images), len(asked), images.dtype))
        return ["yes" if "is there" in question else "two" if "how many" in question else "white" for question in asked]

    results, scores = common.answer_questions(data, 32, answer)
    kept = [i for i in range(len(questions)) if i not in (3, 70)]
    assert len(batches) == 2 and all(n == m and dtype == torch.uint8 for n, m, dtype in batches)
    assert [result["question_id"] for result in results] == [1000 + i for i in kept]
    single = {i: common.vqa_accuracy(answer(torch.zeros(1), [questions.read(i)[1][0]])[0], questions.read(i)[1][1])
              for i in kept}
    expected = {"accuracy": 100 * np.mean(list(single.values())), "unreadable": 2}
    for kind in ("yes/no", "number", "other") if kinds else ():
        expected[f"accuracy_{kind}"] = 100 * np.mean([single[i] for i in kept if questions.kinds[i] == kind])
    assert scores == pytest.approx(expected) and 0 < scores["accuracy"] < 100


def test_questions_without_human_answers_are_answered_but_not_scored():
    data = Questions(scenes(2), humans=False)
    results, scores = common.answer_questions(data, 32, lambda images, asked: [text[:5] for text in asked])
    assert scores == {} and [r["answer"] for r in results] == [data.read(i)[1][0][:5] for i in range(len(data))]


# -------------------------------------------------------------------------------------------------------------- latency


def test_latency_and_speed_are_medians_in_turn(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    seconds = {"slow": itertools.chain([9, 9, 0.03, 0.04, 5, 0.03, 0.05]), "fast": itertools.repeat(0.005)}

    def call(name, *images):
        calls.append((name, torch.is_inference_mode_enabled(), *images))
        clock[0] += next(seconds[name])

    found = common.compare_latency({name: lambda name=name: call(name) for name in seconds}, "cpu", rounds=5)
    assert [name for name, _ in calls] == ["slow"] * 2 + ["fast"] * 2 + ["slow", "fast"] * 5
    assert found == pytest.approx({"slow": 40, "fast": 5}) and all(inference for _, inference in calls)
    images = torch.zeros(8, 3)
    speeds = common.compare_speeds({"a": lambda images: call("fast", images)}, images, rounds=3)
    assert speeds == pytest.approx({"a": 8 / 0.005}) and calls[-1][2] is images


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved; a warning is an error."""
    pytest.importorskip("matplotlib")
    plt, saved = common.pyplot(), []
    savefig = plt.Figure.savefig
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, *a, **b: (savefig(self, *a, **b), saved.append(self)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield saved
    assert not plt.get_fignums()


def pixels(count, side=48):
    data = common.EmojiScenes("test", count, side, concepts=20)
    return torch.stack([torch.from_numpy(common.resize_center_crop(data.read(i)[0], side)) for i in range(count)]), data


def draw(figure):
    figure.set_dpi(150)  # as it was saved
    figure.canvas.draw()


def boxes(figure):
    """What is written and drawn, as {text or axes: box in pixels}."""
    draw(figure)
    found = {text: text.get_window_extent() for text in figure.texts} | {
        axis: axis.get_window_extent() for axis in figure.axes}
    return {thing: (box.x0, box.y0, box.x1, box.y1) for thing, box in found.items()}


def assert_apart(figure):
    """Nothing overlaps and nothing is cut off."""
    found = boxes(figure)
    for (a, one), (b, two) in itertools.combinations(found.items(), 2):
        assert common.overlap(one, two) < 3, (a, b)  # glyphs' boxes may touch
    width, height = figure.get_size_inches() * figure.dpi
    for thing, (left, bottom, right, top) in found.items():
        assert left >= 0 and bottom >= 0 and right <= width and top <= height, thing


HARD = ["", "un café à la crème – “très” bon, Größe ½ €", "寿司 and 😀 👩‍👩‍👧", "from $5 to $10, x_1 ^ 2 \\frac{a}{b",
        "x" * 120, "a very long caption that goes on and on " * 12]


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_captions_stand_beneath_their_images(tmp_path, figures, count):
    images, data = pixels(count)
    captions = {name: [data.captions(i)[n] for i in range(count)]
                for n, name in enumerate(("reference", "teacher", "student"))}
    title = "captions of a teacher and of its student"
    common.plot_captions(tmp_path / "captions.png", images, captions, title)
    (figure,) = figures
    assert (tmp_path / "captions.png").stat().st_size > 5000 and len(figure.axes) == count
    for axis, image in zip(figure.axes, images):
        np.testing.assert_array_equal(axis.images[0].get_array(), image.permute(1, 2, 0))
    written = [text.get_text() for text in figure.texts]
    assert written[0].replace("\n", " ") == title and written[1:4] == ["■ reference", "■ teacher", "■ student"]
    in_order = [captions[name][i] for i in range(count) for name in captions]
    assert " ".join(written[4:]) == " ".join(in_order)
    assert_apart(figure)
    colours = {text.get_text()[2:]: text.get_color() for text in figure.texts[1:4]}
    by_colour = {name: " ".join(text.get_text() for text in figure.texts[4:] if text.get_color() == colours[name])
                 for name in captions}
    assert by_colour == {name: " ".join(texts) for name, texts in captions.items()}
    bottoms, found = [boxes(figure)[axis] for axis in figure.axes], boxes(figure)
    for text in figure.texts[4:]:  # each line begins below the left edge of an image
        assert any(abs(found[text][0] - left) < 5 and found[text][3] < bottom for left, bottom, *_ in bottoms)


def test_hard_captions_are_drawn_and_kept_short(tmp_path, figures):
    images, _ = pixels(6)
    common.plot_captions(tmp_path / "a.png", images, {"reference": HARD, "student": HARD[::-1]}, "$a title " * 60)
    common.plot_captions(tmp_path / "b.png", images[:1], {"teacher": HARD[1:2]}, "é")
    written = [text.get_text() for text in figures[0].texts]
    assert "from $5 to $10, x_1 ^ 2 \\frac{a}{b" in " ".join(written) and any(line.endswith(" …") for line in written)
    assert "□□ and 😀" in " ".join(written)
    for i, caption in enumerate(HARD):
        assert len(common.fit_text(caption, 37)) <= 6 and all(len(line) <= 37 for line in common.fit_text(caption, 37))
    assert_apart(figures[1])


@pytest.mark.parametrize("count", [1, 3, 4])
def test_wrong_answers_are_marked(tmp_path, figures, count):
    images, data = pixels(count)
    questions = [[question for question, _ in data.questions(i)] for i in range(count)]
    truth = [[answer for _, answer in data.questions(i)] for i in range(count)]
    teacher = [[f"The {answer}." for answer in group] for group in truth]  # right, once normalised
    student = [[answer if j % 2 else "a purple hippopotamus" for j, answer in enumerate(group)] for group in truth]
    common.plot_answers(tmp_path / "answers.png", images, questions,
                        {"truth": truth, "teacher": teacher, "student": student}, "questions")
    (figure,) = figures
    assert len(figure.axes) == count and assert_apart(figure) is None
    written = [text.get_text() for text in figure.texts]
    expected = ["questions"]
    for i in range(count):
        expected += ["truth", "teacher", "student"]
        for j, question in enumerate(questions[i]):
            expected += [question, truth[i][j], teacher[i][j], student[i][j] if j % 2 else "✗ a purple hippopotamus"]
    assert " ".join(written) == " ".join(expected)
    wrong = [text for text in figure.texts if "✗" in text.get_text()]
    right = [text for text in figure.texts if text.get_text() == "The yes."]
    assert {text.get_color() for text in wrong}.isdisjoint(text.get_color() for text in right) and right


def test_hard_answers_are_drawn(tmp_path, figures):
    images, _ = pixels(2)
    asked = [HARD, []]
    common.plot_answers(tmp_path / "a.png", images, asked, {"truth": asked, "student": [HARD[::-1], []]}, HARD[-1])
    assert len(figures[0].axes) == 2


@pytest.mark.parametrize("count", [1, 4])
def test_attention_lies_over_its_patches(tmp_path, figures, count):
    images, _ = pixels(count)
    maps = {"teacher": torch.zeros(count, 6, 6), "student": torch.full((count, 6, 6), 1 / 36, dtype=torch.bfloat16)}
    for i in range(count):
        maps["teacher"][i, i, 5 - i] = 1e-3
    words = ["tent", "寿司 $x$ é", "a word that is too long for its column to hold, " * 3, ""][:count]
    common.plot_attention(tmp_path / "attention.png", images, words, maps, "cross-attention " * 20)
    (figure,) = figures
    axes = np.array(figure.axes).reshape(3, count)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["image", "teacher", "student"]
    assert axes[0, 0].get_title() == "tent"
    for i in range(count):
        np.testing.assert_array_equal(axes[0, i].images[0].get_array(), images[i].permute(1, 2, 0))
        heat = axes[1, i].images[1].get_array()
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        assert (row // 8, column // 8) == (i, 5 - i) and heat.max() == 1 and heat.min() == 0
        assert axes[2, i].images[1].get_array().max() < 1e-6  # no place stands out


@pytest.mark.parametrize("x", ["parameters", "latency"])
def test_efficiency_labels_do_not_overlap(tmp_path, figures, x):
    table = {"BLIP base": (214, 41, "teacher", 121.8, 72.4), "BLIP mid": (108, 26, "not distilled", 121.3, 68.9),
             "DLIP mid": (108, 26, "distilled", 122.4, 73.1), "BLIP small": (48, 15, "not distilled", 119.6, 64.9),
             "DLIP small": (48, 15, "distilled", 121.9, 68.8), "again, 12M": (48, 15, "distilled", 121.9, 68.8)}
    points = {label: {"parameters": size, "latency": ms, "family": family,
                      "scores": {"CIDEr": (cider, 0.3 if ms < 20 else 0), "COCO TR@1 $": (recall, 0)}}
              for label, (size, ms, family, cider, recall) in table.items()}
    points["BLIP mid"]["scores"].pop("COCO TR@1 $")
    common.plot_efficiency(tmp_path / "efficiency.png", points, "accuracy and efficiency, 5 $ or 6 $", x)
    (figure,), Text = figures, pytest.importorskip("matplotlib.text").Text
    draw(figure)
    assert [axis.get_ylabel() for axis in figure.axes] == ["CIDEr", "COCO TR@1 $"]
    assert all(axis.get_xlabel().startswith(x) for axis in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["teacher", "distilled", "not distilled"]
    for axis, metric, bars in zip(figure.axes, ("CIDEr", "COCO TR@1 $"), (3, 0)):
        labels = {text.get_text(): text for text in axis.texts}
        assert list(labels) == [label for label in points if metric in points[label]["scores"]]
        assert sum(bool(container.has_yerr) for container in axis.containers) == bars
        room = axis.get_window_extent().extents
        extents = [Text.get_window_extent(text).extents for text in labels.values()]  # without the line to the point
        assert all(common.overlap(one, two) < 1 for one, two in itertools.combinations(extents, 2))
        assert all(common.overlap(box, room) > 0.99 * (box[2] - box[0]) * (box[3] - box[1]) for box in extents)
        scatters = [found for found in axis.collections if hasattr(found, "get_sizes")]
        for scatter, label in zip(scatters, labels, strict=True):
            assert scatter.get_offsets()[0].tolist() == [points[label][x], points[label]["scores"][metric][0]]
    scatters = [found for found in figure.axes[0].collections if hasattr(found, "get_sizes")]
    areas = {label: scatter.get_sizes()[0] for label, scatter in zip(points, scatters)}
    other = "latency" if x == "parameters" else "parameters"
    slope = (areas["DLIP mid"] - areas["DLIP small"]) / (points["DLIP mid"][other] - points["DLIP small"][other])
    assert slope == pytest.approx(225 / points["BLIP base"][other]) and areas["BLIP mid"] == areas["DLIP mid"]


def test_one_point_and_one_metric(tmp_path, figures):
    point = {"parameters": 5.0, "latency": 2.0, "scores": {"accuracy": (50.0, 0.0)}, "family": "distilled"}
    common.plot_efficiency(tmp_path / "one.png", {"a label, é": point}, "one")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["a label, é"]
