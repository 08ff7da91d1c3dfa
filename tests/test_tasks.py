"""Evaluation and pictures: zero-shot, retrieval, re-ranking, linear probe, captions, answers."""

import math

import common
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import BadSample, UserError
from dlip import overlay
from PIL import Image

KS = (1, 5, 10)


class Samples:
    """A set of plain pictures, one colour each, of which those in `lost` cannot be read."""

    def __init__(self, kind, targets, lost=(), **attributes):
        self.kind, self.targets, self.lost = kind, targets, lost
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        if i in self.lost:
            raise BadSample("broken")
        return Image.new("RGB", (16, 16), (3 * i, 255 - 3 * i, 7 * i % 256)), self.targets[i]

    def key(self, i):
        return f"image {i}"


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def colours(images):
    """A stand-in image encoder."""
    colour = images.float().mean((2, 3)) - 100
    return F.normalize(F.pad(colour, (0, 13), value=9.0), dim=-1)


def by_tokens(tokens):
    """A stand-in text encoder: unit features that depend on every token."""
    seeds = [sum((i + 1) * token for i, token in enumerate(row)) for row in tokens.tolist()]
    return torch.cat([unit(1, 16, seed=seed) for seed in seeds])


# ------------------------------------------------------------------------- retrieval


def brute_force(scores, image_of_text, k=None, outside=-100.0, cosines=None):
    """Recalls from whole matrices (N, T), one query at a time; only the k best by cosine count."""
    def rank(row, near, own):
        if k is not None:
            kept = np.argsort(-near)[:k]
            row = [row[j] if j in kept else outside for j in range(len(row))]
        best = max(value for value, mine in zip(row, own) if mine)
        return sum(not value < best for value, mine in zip(row, own) if not mine)

    own = np.arange(len(scores))[:, None] == np.asarray(image_of_text)
    cosines = scores if cosines is None else cosines
    found = {"i2t": [rank(*rows) for rows in zip(scores, cosines, own)],
             "t2i": [rank(*rows) for rows in zip(scores.T, cosines.T, own.T)]}
    return {f"{way}_r{r}": 100 * np.mean(np.array(ranks) < r)
            for way, ranks in found.items() for r in KS}


def captioned(seed, images=40, texts=130):
    """Several captions an image, in any order."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(0, images, (texts - images,), generator=generator)
    owner = torch.cat([torch.arange(images), more])
    return owner[torch.randperm(texts, generator=generator)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_equals_brute_force(seed, ties):
    owner = captioned(seed)
    images = unit(40, 16, seed=seed)
    texts = F.normalize(images[owner] + 1.5 * unit(130, 16, seed=seed + 10), dim=-1)
    if ties:
        images, texts = (4 * images).round(), (4 * texts).round()
    found = common.retrieval(images, texts, owner, block=7)
    assert found == pytest.approx(brute_force((images @ texts.T).numpy(), owner))
    assert 5 < found["t2i_r1"] < 95 and found["i2t_r1"] != found["t2i_r1"]


def test_a_collapsed_or_broken_model_retrieves_nothing():
    one, many, own = unit(1, 48).expand(20, -1), unit(20, 48, seed=1), torch.arange(20)
    nan = torch.full((20, 48), math.nan)
    for images, texts in ((one, one), (nan, nan), (nan, many), (many, nan)):
        assert set(common.retrieval(images, texts, own).values()) == {0.0}
    assert common.retrieval(many, one, own)["i2t_r10"] == 0
    assert common.retrieval(one, many, own)["t2i_r10"] == 0
    broken = common.rerank(many, many, own, own, own, lambda i, t: torch.full((len(t),), math.nan), 20)
    assert set(broken.values()) == {0.0}
    assert set(common.zero_shot(nan, own % 8, many[:8]).values()) == {0.0}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 20, 1000])
def test_rerank_equals_a_double_loop(seed, k):
    """Different cosines, and sums with the logits that are often equal, at or below -100 too."""
    levels = [(0, 1), (-200, -100, 0, 1), (-100, -99), tuple(range(50))][seed]
    rng, owner = np.random.default_rng(seed), captioned(seed, 13, 40)
    cosines = (rng.permutation(2 ** 10)[:13 * 40] / 2 ** 9 - 1).reshape(13, 40)
    sums = rng.choice(levels, cosines.shape)
    logits = torch.from_numpy(sums - cosines)  # exact in float32
    calls = []

    def match(image, texts):
        calls.append(image.item())
        return logits[image.item(), texts]

    texts = torch.from_numpy(cosines.T).float()
    found = common.rerank(torch.eye(13), texts, owner, torch.arange(13), torch.arange(40), match, k)
    assert found == pytest.approx(brute_force(sums, owner, k, cosines=cosines))
    assert calls == list(range(13))


@pytest.mark.parametrize("lost", [(), (0, 5, 69)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rerank_retrieval_equals_all_pairs(lost, dtype):
    captions = [[f"{i} is {7 * i}", "a" * (1 + i)][:1 + i % 2] for i in range(70)]
    data = Samples("captions", captions, lost)

    def encode_image(images):
        return images[:, :, :2].float().flatten(2) / 100 - 1, colours(images)

    def encode_text(texts):
        ids = torch.tensor([[len(text), ord(text[0]), ord(text[-1])] for text in texts])
        return ids, by_tokens(ids)

    def match(states, ids):
        return (states.float().mean((0, 2)) * ids).sum(1).sin()

    found = common.rerank_retrieval(data, 16, encode_image, encode_text, match, 9, 0, dtype)
    kept = [i for i in range(70) if i not in lost]
    images = np.stack([common.resize_whole(data[i][0], 16) for i in kept])
    states, features = encode_image(torch.from_numpy(images))
    ids, text_features = encode_text([text for i in kept for text in captions[i]])
    owner = [n for n, i in enumerate(kept) for _ in captions[i]]
    logits = torch.stack([match(state[None].to(dtype), ids) for state in states])
    cosines = features @ text_features.T
    wanted = brute_force((logits + cosines).numpy(), owner, 9, cosines=cosines.numpy())
    by_cosine = brute_force(cosines.numpy(), owner)
    wanted |= {f"itc_{name}": value for name, value in by_cosine.items()}
    assert found == pytest.approx(wanted | ({"unreadable": 3} if lost else {}))
    alone = common.rerank_retrieval(data, 16, encode_image, encode_text, match, 0, 0, dtype)
    assert alone == pytest.approx(by_cosine)


# ------------------------------------------------------------ classification and probe


def test_zero_shot_equals_top_k_accuracy():
    metrics = pytest.importorskip("sklearn.metrics")
    classifier = unit(12, 16)
    labels = torch.randint(0, 12, (200,), generator=torch.Generator().manual_seed(1))
    features = F.normalize(classifier[labels] + 1.5 * unit(200, 16, seed=2), dim=-1)
    scores = (features @ classifier.T).numpy()
    found = common.zero_shot(features, labels, classifier)
    for k in (1, 5):
        wanted = metrics.top_k_accuracy_score(labels.numpy(), scores, k=k, labels=range(12))
        assert found[f"top{k}"] == pytest.approx(100 * wanted)


def test_two_classes_of_one_name_are_not_both_lost():
    """As with ImageNet's two classes named missile: argmax finds one of them, top-5 both."""
    classifier = unit(10, 16)
    classifier[7] = classifier[2]
    features = classifier.clone()
    found = common.zero_shot(features, torch.arange(10), classifier)
    assert found == {"top1": pytest.approx(90), "top5": 100}
    features[:4] = math.nan
    found = common.zero_shot(features, torch.arange(10), classifier)
    assert found == {"top1": pytest.approx(50), "top5": pytest.approx(60)}


def test_zero_shot_classifier_equals_a_loop():
    tokenizer = common.CLIPTokenizer(20)
    classes, templates = ["cat", "polar bear"], ["a photo of a {}.", "{}", "art of the {}."]
    found = common.zero_shot_classifier(by_tokens, tokenizer, classes, templates)
    for row, name in zip(found, classes):
        texts = [template.format(name) for template in templates]
        mean = sum(by_tokens(tokenizer([text]))[0] for text in texts) / 3
        torch.testing.assert_close(row, mean / mean.norm())


def test_sets_are_scored_without_their_unreadable_images():
    tokenizer, kept = common.CLIPTokenizer(20), [0, 1, *range(3, 12)]
    captions = [["a", "b c"], ["d"], ["never seen"], ["e", "f", "g"], ["h"], ["i"]] * 2
    names = {"classes": ["x", "y", "z"], "templates": ["{}", "the {}"]}
    sets = {"a": Samples("captions", captions, (2,)), "b": Samples("classes", [0, 1, 1, 1, 0, 2] * 2, (2,), **names)}
    encoders = {("online", 1 / 3): (colours, by_tokens), "inverted": (lambda x: colours(255 - x), by_tokens)}
    found = common.score_sets(encoders, tokenizer, sets, 16, 0, training={"b": sets["b"]})
    images = torch.from_numpy(np.stack([common.resize_center_crop(sets["a"][i][0], 16) for i in kept]))
    texts = by_tokens(tokenizer([text for i in kept for text in captions[i]]))
    classes = common.zero_shot_classifier(by_tokens, tokenizer, *names.values())
    owners = common.owners([captions[i] for i in kept])
    for key, (encode, _) in encoders.items():
        split = encode(images), torch.tensor([0, 1, 1, 0, 2, 0, 1, 1, 1, 0, 2])
        wanted = common.prefixed("a", brute_force((split[0] @ texts.T).numpy(), owners))
        wanted |= common.prefixed("b", common.zero_shot(*split, classes) | common.linear_probe(split, split, 3))
        assert found[key] == pytest.approx(wanted | {"a_unreadable": 1, "b_unreadable": 1})


def test_evaluate_says_what_it_cannot_use():
    data = Samples("classes", [0, 1] * 5, (2,), classes=["x", "y"], templates=["{}"])
    for data.lost, words in ((range(10), "no sample"), (range(9), "more than 10 %")):
        with pytest.raises(UserError, match=words):
            common.evaluate({"": (colours, by_tokens)}, common.CLIPTokenizer(20), data, 16, 0)


def probe_data(count, seed):
    labels = torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(seed))
    return F.normalize(unit(5, 12)[labels] + unit(count, 12, seed=seed), dim=-1), labels


def scikit_learn(x, y, strength):
    linear = pytest.importorskip("sklearn.linear_model")
    model = linear.LogisticRegression(C=strength, tol=1e-8, max_iter=10000)
    return model.fit(x.double().numpy(), y.numpy())


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learn(strength):
    x, y = probe_data(400, 1)
    wanted = scikit_learn(x, y, strength).predict_proba(x.double().numpy())
    found = common.fit_logistic(x, y, 5, strength)(x).softmax(1).detach()
    np.testing.assert_allclose(found, wanted, atol=3e-4)


def test_linear_probe_chooses_on_every_fifth_image_and_refits_on_all():
    (x, y), test = probe_data(180, 1), probe_data(400, 3)
    found = common.linear_probe((x, y), test, 5)
    scores, held = {}, np.arange(180) % 5 == 4
    for c in common.STRENGTHS:
        scores[c] = scikit_learn(x[~held], y[~held], c).score(x[held], y[held])
    assert found["probe_C"] == max(scores, key=scores.get)
    wanted = scikit_learn(x, y, found["probe_C"]).score(*map(np.asarray, test))
    assert found["probe_top1"] == pytest.approx(100 * wanted, abs=0.5)


# --------------------------------------------------------------- captions and answers


def test_captions_are_scored_beside_their_references(monkeypatch):
    """Of two batches, without the unreadable; each domain as a set of its own."""
    references = [[f"thing {i} of {i % 9}", f"number {i % 7}"] for i in range(70)]
    given = [f"number {i % 8} of {i % 9}" for i in range(70)]
    domains = ["in-domain", "out-domain"] * 35
    data = Samples("captions", references, (2, 68), record=lambda i: {"domain": domains[i]})
    monkeypatch.setattr(common, "Listed", Samples)

    def generate(images):
        return [given[int(red) // 3].upper() for red in images[:, 0, 0, 0]]

    found = common.caption_scores(data, 16, generate)
    assert found["unreadable"] == 2
    even, odd = [i for i in range(0, 70, 2) if i not in data.lost], [*range(1, 70, 2)]
    for name, places in ("cider_in", even), ("cider_out", odd), ("cider", even + odd):
        pairs = [references[i] for i in places], [given[i] for i in places]
        assert found[name] == pytest.approx(100 * common.cider_d(*pairs).mean())
    assert found["bleu4"] == pytest.approx(100 * common.bleu(*pairs))


def test_answers_are_scored_as_one_by_one():
    humans = [["yes"] * (2 + i % 9) + ["no"] * (8 - i % 9) for i in range(70)]
    humans[8] = []
    kinds = [("yes/no", "other", None)[i % 3] for i in range(70)]
    data = Samples("questions", [(f"question {i}", humans[i], kinds[i]) for i in range(70)], (3, 69))

    def answer(images, asked):
        return ["no" if text.endswith("1") else "yes" for text in asked]

    results, scores = common.answer_questions(data, 16, answer)
    given = {i: "no" if i % 10 == 1 else "yes" for i in range(70) if i not in (3, 69)}
    assert results == [{"question_id": f"image {i}", "answer": text} for i, text in given.items()]
    accuracy = {i: 100 * common.vqa_accuracy(text, humans[i]) for i, text in given.items() if humans[i]}
    wanted = {"unreadable": 2, "accuracy": np.mean(list(accuracy.values()))}
    for kind in ("yes/no", "other"):
        wanted[f"accuracy_{kind}"] = np.mean([value for i, value in accuracy.items() if kinds[i] == kind])
    assert scores == pytest.approx(wanted)


# ------------------------------------------------------------------------- pictures

def test_pictures_with_hard_texts_are_drawn(tmp_path, capsys):
    hard = ["", "$$", "$50% off$ x_1^2 \\frac{a}{b", "寿司 and 😀", "x" * 300, "on and on " * 50]
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    sets = {"$": Samples("captions", [[text] for text in hard])}
    log = "step,epoch,lr,loss,kd,logit_scale,val_$\n1,0.5,1,2,,3,\n2,1,1,2,,3,4\n"
    (tmp_path / "log.csv").write_text(log)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    common.plot_grid(paths[0], [images, images[:2]], hard[:2], hard, hard[5])
    common.draw_retrieval(paths[1], (colours, by_tokens), common.CLIPTokenizer(20), sets, 16)
    common.plot_curves(paths[2], hard[2])
    assert all(np.asarray(Image.open(path)).std() > 5 for path in paths)
    common.plot_curves(tmp_path / "no folder" / "b.png", "")
    assert "b.png: " in capsys.readouterr().out


def test_light_falls_where_the_attention_is():
    images = torch.full((2, 3, 48, 48), 200, dtype=torch.uint8)
    attention = torch.zeros(2, 6, 6)
    attention[0, 1, 4] = 1e-3
    found = overlay(images, attention)
    assert found[0].max() == found[0, :, 8:16, 32:40].max() == 200
    assert found[1].max() == found[0].min() == 30  # even attention lights nothing
