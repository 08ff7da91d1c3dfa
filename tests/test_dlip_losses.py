"""The losses, the method and the training step of dlip.py against independent references.

Loops in float64 written here (one image, one head, one query, one key at a time), closed forms, and a chi-square test.
"""

import ast
import copy
import math
from dataclasses import replace
from pathlib import Path

import common
import dlip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dlip import BLIP, DLIP, TextSize, Trace, VisionSize
from torch.utils._python_dispatch import TorchDispatchMode

# --------------------------------------------------------------------------------------------------------- small models

VISION = VisionSize(16, 1, 2, patch=8, image_size=16)  # 5 tokens
TEXT = TextSize(24, 2, 2, vocab=40, positions=16, dropout=0.0, pad=0, cls=2, sep=3, dec=38, enc=39)
TEACHER = replace(VISION, width=20), replace(TEXT, width=32)  # other widths, the student's heads and tokens
WIDTH = 6  # of the joint embedding
SETTING = dict(stage="distil", task=("retrieval",), queue_size=7, momentum=0.8, alpha=0.4, embed_dim=WIDTH)
SCALER = torch.amp.GradScaler("cpu", enabled=False)
EXACT = dict(rtol=1e-9, atol=1e-11)


@pytest.fixture
def double(monkeypatch):
    """float64 throughout: .float(), which lifts bf16 features to fp32, would cut them down."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return torch.float64


def config(**changes):
    return dlip.Config(**{**SETTING, **changes})


def shake(model, seed, std=0.3):
    """Random weights, norms and biases included, so that no misplaced tensor goes unnoticed; a temperature of 0.2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = std * torch.randn(p.shape, generator=generator)
            p.copy_(0.2 if name == "temp" else 1 + noise if "norm" in name.lower() and p.ndim == 1 else noise)
    return model


def blip(seed, vision=VISION, text=TEXT, shared=True):
    return shake(BLIP(vision, text, WIDTH, shared), seed)


def make(cfg, seed=0, dtype=torch.float64, text=TEXT, shared=True):
    """A DLIP whose momentum encoders have fallen behind its student, and a teacher."""
    torch.manual_seed(seed)
    model = DLIP(cfg, blip(seed, text=text, shared=shared))
    model.prompt_length = 3
    if model.momentum is not None:
        shake(model.momentum, seed + 1)
    return model.to(dtype).train(), blip(seed + 2, *TEACHER).to(dtype).eval()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit_rows(*shape, seed=0):
    return F.normalize(draw(*shape, seed=seed), dim=-1)


def batch(size=4, length=7, seed=0, dtype=torch.float64):
    """Images, and texts of different lengths: first token, words, [SEP], padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 38, (size, length), generator=generator)
    for row in range(size):
        end = max(2, length - 1 - row)
        ids[row, 0], ids[row, end], ids[row, end + 1:] = 2, 3, 0
    return draw(size, 3, 16, 16, seed=seed, dtype=dtype), ids


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def step(model, image, texts, teacher=None, alpha=0.4, index=None, seed=0):
    """(loss, terms, gradients) of a batch."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss, terms = model(image, texts, torch.arange(len(image)) if index is None else index, alpha, teacher)
    loss.backward()
    return loss.detach(), terms, gradients(model)


# ---------------------------------------------------------------------------------------------------------- the loops


def log_softmax(row):
    """Of a list of scalars, or of a vector."""
    total = sum(x.exp() for x in row).log()
    return [x - total for x in row]


def loop_kl(teacher, student):
    """KL(teacher || student) of two lists of log-probabilities."""
    return sum(t.exp() * (t - s) for t, s in zip(teacher, student))


def loop_itc(u, v, image_keys, text_keys, same, teacher_u, teacher_v, temp, teacher_temp, alpha):
    total = 0.0
    for query, teacher, keys in ((u, teacher_u, text_keys), (v, teacher_v, image_keys)):
        for i in range(len(query)):
            log_p = log_softmax([sum(query[i] * key) / temp for key in keys])
            soft = [x.exp() for x in log_softmax([sum(teacher[i] * key) / teacher_temp for key in keys])]
            positives = [k for k in range(len(keys)) if same[i][k]]
            for k in range(len(keys)):
                target = alpha * soft[k] + (1 - alpha) * (1 / len(positives) if k in positives else 0.0)
                total = total - target * log_p[k] / len(query) / 2
    return total


def loop_lm(logits, ids, smoothing=0.1, prompt=0):
    """(sum, count) over the tokens of one text: logits (N, V), ids (N,)."""
    total, count = 0.0, 0
    for n in range(1, len(ids)):
        if ids[n] != 0 and n >= prompt:
            log_p = log_softmax(logits[n - 1])
            total = total - (1 - smoothing) * log_p[ids[n]] - smoothing * sum(log_p) / len(log_p)
            count += 1
    return total, count


def loop_attention(student, teacher, queries, keys, form="kl"):
    """(sum over queries of the mean over heads, number of queries) of one pair: maps (H, N, M)."""
    total, heads = 0.0, len(student)
    tokens = [k for k in range(len(keys)) if keys[k]]
    for n in [n for n in range(len(queries)) if queries[n]]:
        for h in range(heads):
            if form == "double-softmax":
                s, t = (log_softmax([found[h, n, k] / 0.05 for k in tokens]) for found in (student, teacher))
                total = total + loop_kl(t, s) / heads
            else:
                for k in tokens:
                    if teacher[h, n, k] > 0:
                        ratio = teacher[h, n, k].log() - student[h, n, k].log()
                        total = total + teacher[h, n, k] * ratio / heads
    return total, int(sum(queries))


def mean_of(pairs):
    """Of (sum, count) pairs."""
    sums, counts = zip(*pairs)
    return sum(sums) / max(1, sum(counts))


# --------------------------------------------------------------------------------------------------------------- 1. ITC


def itc_inputs(queue, seed=0, b=3):
    """Features, keys and several positives in some rows: in the batch, and in the queue where there is one."""
    u, v, teacher_u, teacher_v = (unit_rows(b, 5, seed=seed + i) for i in range(4))
    image_keys, text_keys = (torch.cat([x, unit_rows(queue, 5, seed=seed + 9 + i)]) for i, x in
                             enumerate((teacher_u, teacher_v)))
    same = torch.eye(b, b + queue, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    if queue:
        same[1, b + 1] = same[1, b + 3] = True
    return [u, v, image_keys, text_keys, same.double(), teacher_u, teacher_v, torch.tensor(0.3, dtype=torch.float64)]


@pytest.mark.parametrize("queue", [0, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_itc_equals_loops(alpha, queue):
    inputs = itc_inputs(queue)
    leaves = [inputs[i].requires_grad_() for i in (0, 1, 7)]
    found = dlip.itc_loss(*inputs, alpha)
    wanted = loop_itc(*inputs, inputs[7].detach(), alpha)
    torch.testing.assert_close(found, wanted, **EXACT)
    for name, ours, theirs in zip("u v temp".split(), *(torch.autograd.grad(x, leaves) for x in (found, wanted))):
        assert theirs.abs().max() > 1e-3, name
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_itc_gradient_of_the_temperature_is_that_of_the_student_alone():
    """A difference quotient in which the targets keep their temperature."""
    inputs, eps = itc_inputs(4), 1e-5
    temp = inputs.pop().requires_grad_()
    dlip.itc_loss(*inputs, temp, 0.7).backward()
    apart = [loop_itc(*inputs, temp.detach() + d, temp.detach(), 0.7).item() for d in (eps, -eps)]
    together = [loop_itc(*inputs, temp.detach() + d, temp.detach() + d, 0.7).item() for d in (eps, -eps)]
    assert temp.grad.item() == pytest.approx((apart[0] - apart[1]) / (2 * eps), rel=1e-6)
    assert temp.grad.item() != pytest.approx((together[0] - together[1]) / (2 * eps), rel=1e-3)


def test_itc_without_momentum_targets_is_info_nce():
    u, v = unit_rows(6, 5), unit_rows(6, 5, seed=1)
    temp = torch.tensor(0.1, dtype=torch.float64)
    logits, target = u @ v.T / temp, torch.arange(6)
    wanted = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(dlip.itc_loss(u, v, u, v, torch.eye(6).double(), u, v, temp, 0.0), wanted, **EXACT)


def test_itc_of_orthogonal_features():
    """Every logit 0, or 1 / temp on the diagonal: log(B), and log(1 + (B - 1) exp(-1 / temp))."""
    eye, zero = torch.eye(4).double(), torch.zeros(4, 4).double()
    temp = torch.tensor(0.5, dtype=torch.float64)
    for alpha in (0.0, 1.0):
        assert dlip.itc_loss(zero, zero, eye, eye, eye, zero, zero, temp, alpha).item() == pytest.approx(math.log(4))
    assert dlip.itc_loss(eye, eye, eye, eye, eye, eye, eye, temp, 0.0).item() == \
        pytest.approx(math.log(1 + 3 * math.exp(-2)))


# ----------------------------------------------------------------------------------------------------- 2. ITM negatives


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e3, 1e30])
def test_no_negative_is_a_positive(dtype, size):
    """Also where the positives are by far the most similar, and where a row has one negative left."""
    torch.manual_seed(0)
    group = torch.tensor([0, 0, 0, 1, 2, 2])
    same = group[:, None] == group
    for similarity in (size * torch.randn(6, 6), size * same.double(), -size * same.double()):
        for _ in range(200):
            drawn = dlip.draw_negatives(similarity.to(dtype), same)
            assert drawn.shape == (6,) and not same[torch.arange(6), drawn].any()
    alone = torch.ones(4, 4, dtype=torch.bool)
    alone[torch.arange(4), torch.tensor([3, 0, 1, 2])] = False
    assert dlip.draw_negatives(size * draw(4, 4, dtype=dtype), alone).tolist() == [3, 0, 1, 2]


CHI_SQUARE = {2: 13.82, 3: 16.27, 4: 18.47}  # exceeded with probability 0.001, by degrees of freedom


def test_negatives_have_the_softmax_distribution():
    torch.manual_seed(0)
    similarity, count = 1.2 * draw(4, 6, dtype=torch.float32), 20_000
    same = torch.zeros(4, 6, dtype=torch.bool)
    same[range(4), range(4)] = same[0, 3] = same[0, 5] = same[2, 4] = True  # 3, 1, 2 and 1 positives
    drawn = dlip.draw_negatives(similarity.repeat(count, 1), same.repeat(count, 1)).view(count, 4)
    for row in range(4):
        allowed = [k for k in range(6) if not same[row, k]]
        total = sum(math.exp(similarity[row, k]) for k in allowed)
        expected = np.array([count * math.exp(similarity[row, k]) / total for k in allowed])
        observed = np.bincount(drawn[:, row].numpy(), minlength=6)
        assert observed.sum() == observed[allowed].sum() and expected.min() > 100
        assert ((observed[allowed] - expected) ** 2 / expected).sum() < CHI_SQUARE[len(allowed) - 1]
    pairs = np.histogram2d(drawn[:, 1].numpy(), drawn[:, 3].numpy(), bins=6)[0]  # rows are drawn independently
    assert abs(pairs / count - np.outer(pairs.sum(1), pairs.sum(0)) / count ** 2).max() < 0.01


READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim",
         "multinomial"}


class NoReadBack(TorchDispatchMode):
    """Raises on the operators for which the host must wait for the device's values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS or (func.overloadpacket.__name__ == "index" and any(
                index is not None and index.dtype == torch.bool for index in args[1])):
            raise AssertionError(f"{func} reads a value back")
        return func(*args, **(kwargs or {}))


def test_nobody_waits_for_the_negatives():
    similarity, same = draw(5, 5), torch.eye(5, dtype=torch.bool)
    with NoReadBack():
        dlip.draw_negatives(similarity, same)
    for reading in (lambda: similarity.sum().item(), lambda: similarity[same], lambda: same.nonzero(),
                    lambda: similarity.softmax(1).multinomial(1), lambda: bool(same.any())):
        with pytest.raises(AssertionError, match="reads a value back"), NoReadBack():
            reading()
    meta = dlip.draw_negatives(similarity.to("meta"), same.to("meta"))  # no values there, for tolist either
    assert meta.shape == (5,) and meta.device.type == "meta"


# ---------------------------------------------------------------------------------------------------------------- 3. LM


@pytest.mark.parametrize("prompt", [0, 1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_lm_loss_equals_loops(smoothing, prompt):
    _, ids = batch(4)
    logits = draw(4, 7, 40, seed=3).requires_grad_()
    pairs = [loop_lm(row, text, smoothing, prompt) for row, text in zip(logits, ids)]
    assert len({count for _, count in pairs}) > 1
    for reduction, wanted in (("mean", mean_of(pairs)), ("none", torch.stack([total for total, _ in pairs]))):
        found = dlip.lm_loss(logits, ids, 0, smoothing, prompt, reduction)
        torch.testing.assert_close(found, wanted, **EXACT)
        ours, theirs = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (found, wanted))
        torch.testing.assert_close(ours, theirs, **EXACT)
        assert not ours[:, -1].any() and not ours[:, :max(0, prompt - 1)].any()
        assert not ours[:, :-1][ids[:, 1:] == 0].any()


def test_lm_loss_closed_forms():
    """Uniform logits cost log(V), whatever the smoothing; a text of padding costs nothing."""
    _, ids = batch(3)
    assert dlip.lm_loss(torch.zeros(3, 7, 40), ids).item() == pytest.approx(math.log(40))
    certain = 50 * F.one_hot(ids.roll(-1, 1), 40).double()  # knows every token, is punished for it by smoothing alone
    assert dlip.lm_loss(certain, ids, label_smoothing=0.0).item() == pytest.approx(0, abs=1e-12)
    assert dlip.lm_loss(certain, ids).item() == pytest.approx(0.1 * 50 * 39 / 40)
    assert dlip.lm_loss(draw(2, 5, 40), torch.tensor([[2, 0, 0, 0, 0]] * 2)).item() == 0


# ------------------------------------------------------------------------------------------------------ 4. distillation


def test_representation_loss_equals_loops():
    student, teacher = (unit_rows(5, 4, seed=i).requires_grad_() for i in range(2))
    found = dlip.representation_loss(student, teacher)
    wanted = sum(1 - sum(s * t for s, t in zip(a, b)) for a, b in zip(student, teacher.detach())) / 5
    torch.testing.assert_close(found, wanted, **EXACT)
    found.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, -teacher.detach() / 5, **EXACT)  # the closed form
    for sign, value in ((1, 0.0), (-1, 2.0)):
        assert dlip.representation_loss(student, sign * student).item() == pytest.approx(value, abs=1e-12)


LENGTHS = (6, 4, 2)


def attention_maps(kind, seed):
    """Maps (3, 2, N, M), where there are queries (3, N) and keys (3, M): padded keys have probability 0."""
    M, mask = (9 if kind == "cross" else 6), torch.ones(3, 6, dtype=torch.bool)
    scores = 2 * draw(3, 2, 6, M, seed=seed)
    for row, n in enumerate(LENGTHS):
        mask[row, n:] = False
        if kind != "cross":
            scores[row, :, :, n:] = -math.inf
    if kind == "causal":
        scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    keys = torch.ones(3, M, dtype=torch.bool) if kind == "cross" else mask
    return scores.softmax(-1), mask, keys


@pytest.mark.parametrize("form", ["kl", "double-softmax"])
@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
def test_attention_loss_equals_loops(double, kind, form):
    (student, queries, keys), (teacher, _, _) = attention_maps(kind, 0), attention_maps(kind, 1)
    student.requires_grad_(), teacher.requires_grad_()
    found = dlip.attention_loss(student, teacher, queries, keys, form)
    wanted = mean_of(loop_attention(s, t.detach(), q, k, form) for s, t, q, k in zip(student, teacher, queries, keys))
    torch.testing.assert_close(found, wanted, **EXACT)
    ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (found, wanted))
    torch.testing.assert_close(ours, theirs, **EXACT)
    found.backward()
    assert teacher.grad is None
    assert dlip.attention_loss(teacher, teacher, queries, keys, form).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", ["kl", "double-softmax"])
@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
def test_attention_loss_ignores_padded_queries(kind, form):
    (student, queries, keys), (teacher, _, _) = attention_maps(kind, 0), attention_maps(kind, 1)
    other = [torch.where(queries[:, None, :, None], x, draw(*x.shape, seed=5).softmax(-1)) for x in (student, teacher)]
    before, after = (dlip.attention_loss(*maps, queries, keys, form) for maps in ((student, teacher), other))
    assert not torch.equal(other[0], student)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-7)
    for maps, changed in ((other[0], 0), (other[1], 1)):  # while those of tokens count
        one = [student.clone(), teacher.clone()]
        one[changed][0, 0, 1] = maps[0, 0, 1].roll(1)
        assert (dlip.attention_loss(*one, queries, keys, form) - before).abs() > 1e-4


def test_double_softmax_ignores_padded_keys(double):
    (student, queries, keys), (teacher, _, _) = attention_maps("self", 0), attention_maps("self", 1)
    other = [torch.where(keys[:, None, None], x, draw(*x.shape, seed=5).softmax(-1)) for x in (student, teacher)]
    before, after = (dlip.attention_loss(*maps, queries, keys, "double-softmax")
                     for maps in ((student, teacher), other))
    torch.testing.assert_close(before, after, **EXACT)


@pytest.mark.parametrize("form", ["kl", "double-softmax"])
def test_padding_does_not_reach_the_attention_loss(double, form):
    """Through the models: another word vector for padding, and more padding, change no term of the distillation."""
    cfg = config(vlp=False, attn_form=form, kd_itc=1.0)  # (in kd_lm that vector is also the classifier's)
    (model, teacher), (image, ids) = make(cfg), batch()
    before = step(model, image, [ids], teacher)[1]
    longer = step(model, image, [F.pad(ids, (0, 3))], teacher)[1]
    with torch.no_grad():
        for one in (model.student, teacher):
            one.text.embeddings.word_embeddings.weight[0] += draw(one.text.size.width, seed=8)
    after = step(model, image, [ids], teacher)[1]
    assert before["at_self"] > 1e-3 and before["at_cross"] > 1e-3
    for name in before:
        torch.testing.assert_close(after[name], before[name], **EXACT)
        torch.testing.assert_close(longer[name], before[name], **EXACT)


def test_attention_loss_of_a_sure_teacher():
    """KL(one-hot || uniform over M) = log M."""
    teacher, every = F.one_hot(torch.randint(0, 5, (2, 3, 4)), 5).float(), torch.ones(2, 5, dtype=torch.bool)
    found = dlip.attention_loss(torch.full((2, 3, 4, 5), 0.2), teacher, every[:, :4], every)
    assert found.item() == pytest.approx(math.log(5))


def test_similarity_kd_equals_loops():
    features = [unit_rows(4, 5, seed=i).requires_grad_() for i in range(4)]
    u, v, t_u, t_v = features
    temp = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found, wanted = dlip.similarity_kd((u, v), (t_u, t_v), temp), 0.0
    for ours, theirs in (((u, v), (t_u, t_v)), ((v, u), (t_v, t_u))):
        for i in range(4):
            s, t = (log_softmax([sum(a[i] * key) / 0.3 for key in b]) for a, b in (ours, theirs))
            wanted = wanted + loop_kl([x.detach() for x in t], s) / 4 / 2
    torch.testing.assert_close(found, wanted, **EXACT)
    for x, y in zip(torch.autograd.grad(found, [u, v], retain_graph=True), torch.autograd.grad(wanted, [u, v])):
        torch.testing.assert_close(x, y, **EXACT)
    found.backward()
    assert t_u.grad is None and t_v.grad is None and temp.grad is None
    assert dlip.similarity_kd((u, v), (u, v), temp).item() == pytest.approx(0, abs=1e-12)


def test_token_kd_equals_loops(double):
    student, teacher = (2 * draw(3, 5, 11, seed=i) for i in range(2))
    student.requires_grad_(), teacher.requires_grad_()
    where = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    found, pairs = dlip.token_kd(student, teacher, where), []
    for b in range(3):
        for n in range(5):
            if where[b, n]:
                pairs.append((loop_kl(log_softmax(teacher[b, n].detach()), log_softmax(student[b, n])), 1))
    torch.testing.assert_close(found, mean_of(pairs), **EXACT)
    found.backward()
    assert teacher.grad is None and not student.grad[~where].any()
    torch.testing.assert_close(student.grad, torch.autograd.grad(mean_of(pairs), student)[0], **EXACT)


# ------------------------------------------------------------------------------------------------- 5. means over places


def test_mean_where_of_one_process():
    x = draw(3, 4).requires_grad_()
    where = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    found, wanted = dlip.mean_where(x, where), x[where].mean()
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (found, wanted)), **EXACT)
    assert dlip.mean_where(x, torch.zeros_like(where)).item() == 0


# ------------------------------------------------------------------------------------------------------ 6. pre-training


@torch.no_grad()
def averaged(model):
    """A copy of the momentum encoders, one step later."""
    later, m = copy.deepcopy(model.momentum), model.cfg.momentum
    student = dict(model.student.named_parameters())
    for name, p in later.named_parameters():
        p.copy_(m * p + (1 - m) * student[name])
    return later


@torch.no_grad()
def momentum_features(momentum, image, ids):
    """One image, one text at a time, without padding."""
    texts = [torch.tensor([[2, *[token for token in row[1:].tolist() if token != 0]]]) for row in ids]
    u = [momentum.vision_proj(momentum.visual_encoder(x[None])[0, 0]) for x in image]
    v = [momentum.text_proj(momentum.text(text)[0, 0]) for text in texts]
    return [torch.stack([x / x.norm() for x in found]) for found in (u, v)]


def reference_negatives(similarity, same):
    """For each row the largest sum of similarity and Gumbel noise, from the generator's present state."""
    noise, found = torch.empty(len(same), len(same), dtype=similarity.dtype).exponential_(), []
    for i in range(len(same)):
        sums = {j: similarity[i, j] - noise[i, j].log() for j in range(len(same)) if not same[i][j]}
        found.append(max(sums, key=sums.get))
    return found


@torch.no_grad()
def reference_terms(model, image, ids, teacher=None, alpha=0.4, index=None, seed=0):
    """Every term of a step, from the state before it, one sample at a time and without padding."""
    cfg, student, b, terms = model.cfg, model.student, len(ids), {}
    texts = [row[row != 0][None] for row in ids]
    enc, dec, t_enc, t_dec = ([Trace(-1) for _ in range(b)] for _ in range(4))
    states = [student.encode_image(x[None]) for x in image]
    fused = [student.fuse(text, None, s, trace) for text, s, trace in zip(texts, states, enc)]
    logits = [student.decode(text, None, s, trace=trace)[0] for text, s, trace in zip(texts, states, dec)]
    u = torch.cat([student.image_feature(s) for s in states])
    v = torch.cat([student.text_feature(student.encode_text(text)) for text in texts])
    terms["lm"] = mean_of([loop_lm(row, text[0]) for row, text in zip(logits, texts)])
    if model.momentum is not None:
        keys = [torch.cat([new, queue]) for new, queue in
                zip(momentum_features(averaged(model), image, ids), (model.image_queue, model.text_queue))]
        numbers = list(range(b)) if index is None else index.tolist()
        of_key = numbers + ([-1] * cfg.queue_size if index is None else model.index_queue.tolist())
        same = [[number == other for other in of_key] for number in numbers]
        temp = student.temp.detach()
        terms["itc"] = loop_itc(u, v, *keys, same, keys[0][:b], keys[1][:b], temp, temp, alpha)
        torch.manual_seed(seed)
        wrong_text = reference_negatives(u @ keys[1][:b].T / temp, same)
        wrong_image = reference_negatives(v @ keys[0][:b].T / temp, same)
        pairs = [(i, i, 1) for i in range(b)] + [(i, wrong_text[i], 0) for i in range(b)]  # image, text, do they match
        pairs += [(wrong_image[i], i, 0) for i in range(b)]
        scores = [student.match(student.fuse(texts[t], None, states[i]))[0] for i, t, _ in pairs]
        terms["itm"] = -sum(log_softmax(score)[match] for score, (_, _, match) in zip(scores, pairs)) / len(pairs)
    if teacher is not None:
        t_states = [teacher.encode_image(x[None]) for x in image]
        t_fused = [teacher.fuse(text, None, s, trace) for text, s, trace in zip(texts, t_states, t_enc)]
        t_logits = [teacher.decode(text, None, s, trace=trace)[0] for text, s, trace in zip(texts, t_states, t_dec)]
        t_u = torch.cat([teacher.image_feature(s) for s in t_states])
        t_v = torch.cat([teacher.text_feature(teacher.encode_text(text)) for text in texts])

        def projected(blip, states):
            found = [blip.text_proj.weight @ s[0, 0] + blip.text_proj.bias for s in states]
            return torch.stack([x / x.norm() for x in found])

        for name, ours, theirs in (
                ("img", u, t_u), ("text", v, t_v), ("vl_e", projected(student, fused), projected(teacher, t_fused)),
                ("vl_d", projected(student, [t.states[-1] for t in dec]),
                 projected(teacher, [t.states[-1] for t in t_dec]))):
            terms[f"hr_{name}"] = sum(1 - sum(x * y) for x, y in zip(ours, theirs)) / b

        def maps(ours, theirs, kind):
            pairs = [(getattr(s, kind)[-1][0], getattr(t, kind)[-1][0]) for s, t in zip(ours, theirs)]
            return mean_of([loop_attention(s, t, [True] * s.shape[1], [True] * s.shape[2], cfg.attn_form)
                            for s, t in pairs])

        terms["at_self"] = maps(enc, t_enc, "self_maps") + maps(dec, t_dec, "self_maps")
        terms["at_cross"] = maps(enc, t_enc, "cross_maps")
        terms["kd_itc"] = sum(
            loop_kl(log_softmax(t_a[i] @ t_b.T / student.temp), log_softmax(a[i] @ other.T / student.temp)) / (2 * b)
            for a, other, t_a, t_b in ((u, v, t_u, t_v), (v, u, t_v, t_u)) for i in range(b))
        terms["kd_lm"] = mean_of([(loop_kl(log_softmax(t), log_softmax(s)), 1)
                                  for ours, theirs in zip(logits, t_logits) for s, t in zip(ours[:-1], theirs[:-1])])
    return terms


def assert_terms(found, loss, wanted, weights=None):
    """The terms and their weighted sum."""
    assert found.keys() == {"loss", *wanted}
    for name in wanted:
        assert wanted[name] > 1e-4, name
        torch.testing.assert_close(found[name], wanted[name], **EXACT)
        assert not found[name].requires_grad and found[name].shape == ()
    total = sum((weights or {}).get(name, 1.0) * value for name, value in wanted.items())
    torch.testing.assert_close(loss, total, **EXACT)
    assert torch.equal(found["loss"], loss)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("queue", [0, 2, 7])
def test_blip_pretraining_equals_loops(double, queue, alpha):
    """Three steps: the queue, of any size, is filled by the steps before, and the momentum encoders move first."""
    model, _ = make(config(method="blip", queue_size=queue))
    for t in range(3):
        image, ids = batch(size=3, seed=t)
        wanted = reference_terms(model, image, ids, alpha=alpha, seed=t)
        loss, terms, _ = step(model, image, [ids], alpha=alpha, seed=t)
        assert_terms(terms, loss, wanted)
        with torch.no_grad():
            for p in model.student.parameters():
                p += 0.05 * draw(*p.shape, seed=t)


VLP, HR, AT = {"itc", "itm", "lm"}, {"hr_img", "hr_text", "hr_vl_e", "hr_vl_d"}, {"at_self", "at_cross"}
SWITCHES = [
    (dict(), VLP | HR | AT), (dict(vlp=False), HR | AT), (dict(hr=("img",)), VLP | AT | {"hr_img"}),
    (dict(hr=("vl_d", "text")), VLP | AT | {"hr_text", "hr_vl_d"}),
    (dict(hr=("vl_e",), attn=("none",)), VLP | {"hr_vl_e"}), (dict(hr=("none",)), VLP | AT),
    (dict(attn=("self",)), VLP | HR | {"at_self"}),
    (dict(attn=("cross",), hr=("none",), vlp=False), {"at_cross"}), (dict(attn=("none",)), VLP | HR),
    (dict(lambda_hr=0.3, lambda_at=2.5), VLP | HR | AT), (dict(attn_form="double-softmax"), VLP | HR | AT),
    (dict(kd_itc=0.7), VLP | HR | AT | {"kd_itc"}), (dict(kd_lm=1.3, hr=("none",)), VLP | AT | {"kd_lm"}),
    (dict(kd_itc=2.0, kd_lm=3.0, vlp=False, hr=("none",), attn=("none",)), {"kd_itc", "kd_lm"})]


@pytest.mark.parametrize("changes, names", SWITCHES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_every_switch_equals_loops(double, changes, names):
    cfg = config(**changes)
    dlip.check(cfg)
    (model, teacher), (image, ids) = make(cfg), batch()
    wanted = reference_terms(model, image, ids, teacher)
    loss, terms, _ = step(model, image, [ids], teacher)
    weights = {name: cfg.lambda_hr if name in HR else cfg.lambda_at if name in AT else getattr(cfg, name, 1.0)
               for name in wanted}
    assert_terms(terms, loss, {name: wanted[name] for name in names}, weights)
    assert {name for name, _ in model.named_buffers()} == (
        {"image_queue", "text_queue", "index_queue"} if cfg.vlp else set())


def test_fewer_fusion_layers_equal_loops(double):
    (model, teacher), (image, ids) = make(config(), text=replace(TEXT, fusion_layers=1)), batch()
    assert model.student.text.encoder.layer[0].crossattention is None
    wanted = reference_terms(model, image, ids, teacher)
    loss, terms, _ = step(model, image, [ids], teacher)
    assert_terms(terms, loss, {name: wanted[name] for name in VLP | HR | AT})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_distillation_dlip_is_blip(dropout):
    """To the bit, dropout and negatives included."""
    found, (image, ids) = [], batch(dtype=torch.float32)
    for changes, taught in ((dict(method="blip"), False), (dict(hr=("none",), attn=("none",)), True)):
        model, teacher = make(config(**changes), text=replace(TEXT, dropout=dropout), dtype=torch.float32)
        found += [step(model, image, [ids], teacher if taught else None)]
    (loss, terms, grads), (other_loss, other_terms, other_grads) = found
    assert torch.equal(loss, other_loss) and terms.keys() == other_terms.keys() == {"loss", *VLP}
    assert grads.keys() == other_grads.keys() and all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_weights_of_zero_leave_blips_gradient(double):
    image, ids = batch()
    blip_step = step(make(config(method="blip"))[0], image, [ids])
    model, teacher = make(config(lambda_hr=0.0, lambda_at=0.0))
    loss, _, found = step(model, image, [ids], teacher)
    torch.testing.assert_close(loss, blip_step[0], rtol=1e-6, atol=0)
    for name, gradient in blip_step[2].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_who_is_trained():
    """Never the teacher, whatever it asks for, nor the momentum encoders; the rest of the student is."""
    model, teacher = make(config(kd_itc=1.0, kd_lm=1.0), dtype=torch.float32)
    teacher.requires_grad_()
    before, (image, ids) = copy.deepcopy(teacher.state_dict()), batch(dtype=torch.float32)
    momentum = copy.deepcopy(averaged(model).state_dict())
    found = step(model, image, [ids], teacher)[2]
    assert not gradients(teacher) and all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert found.keys() == {f"student.{name}" for name, _ in model.student.named_parameters()}
    assert all(found[name].abs().max() > 0 for name in found if "key.bias" not in name)  # a key's bias does nothing
    assert not any(p.requires_grad for p in model.momentum.parameters())
    dlip.update(model, dlip.build_optimiser(model, model.cfg, torch.device("cpu")), SCALER, 1e-2)
    for name, p in model.momentum.state_dict().items():  # the optimiser leaves them alone
        torch.testing.assert_close(p, momentum[name], rtol=1e-6, atol=1e-7)


def test_distillation_alone_leaves_out_what_it_does_not_read():
    """Without BLIP's losses nothing reaches ITM's head, the LM head or the temperature, and there are no queues."""
    (model, teacher), (image, ids) = make(config(vlp=False, hr=("vl_d",), attn=("none",))), batch()
    found = step(model, image, [ids], teacher)[2]
    assert model.momentum is None
    assert not any("itm_head" in n or "temp" in n or "cls." in n or ".attention." in n for n in found)
    assert "student.text_proj.weight" in found and any("decoder_attention" in name for name in found)


def test_momentum_encoders_average_the_student(double):
    """Equal at the start and after the first step's forward; then m old + (1 - m) new, before they embed the batch."""
    cfg, (image, ids) = config(method="blip"), batch()
    model = DLIP(cfg, blip(0)).double().train()
    student = dict(model.student.named_parameters())
    for name, p in model.momentum.named_parameters():
        assert torch.equal(p, student[name]) and p.data_ptr() != student[name].data_ptr()
    optimiser = dlip.build_optimiser(model, cfg, torch.device("cpu"))
    step(model, image, [ids])
    for name, p in model.momentum.named_parameters():
        assert torch.equal(p, student[name])
    old = {name: p.clone() for name, p in model.momentum.named_parameters()}
    dlip.update(model, optimiser, SCALER, 1e-2)
    for name, p in model.momentum.named_parameters():  # not by the update
        assert torch.equal(p, old[name])
    before, after = (momentum_features(momentum, image, ids)[0] for momentum in (model.momentum, averaged(model)))
    step(model, image, [ids])
    for name, p in model.momentum.named_parameters():
        torch.testing.assert_close(p, 0.8 * old[name] + 0.2 * student[name], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.image_queue[:4], after, **EXACT)
    assert (model.image_queue[:4] - before).abs().max() > 1e-4


def test_momentum_encoders_have_no_dropout():
    cfg, (image, ids) = config(method="blip"), batch(dtype=torch.float32)
    model, _ = make(cfg, text=replace(TEXT, dropout=0.5), dtype=torch.float32)
    for _ in range(2):
        model.train()
        assert model.student.training and model.training
        assert not any(module.training for module in model.momentum.modules())
        later = averaged(model)
        step(model, image, [ids])
        for queue, wanted in zip((model.image_queue, model.text_queue), momentum_features(later, image, ids)):
            torch.testing.assert_close(queue[:4], wanted, rtol=1e-5, atol=1e-6)
        model.eval()
        assert not model.student.training


@pytest.mark.parametrize("queue", [0, 2, 4, 7, 30])
def test_queues(double, queue):
    """The newest batch first, in its order; the oldest leave; what was there at first was of no image."""
    model, _ = make(config(stage="finetune", task=("retrieval",), queue_size=queue))
    torch.testing.assert_close(model.image_queue.norm(dim=1), torch.ones(queue).double(), rtol=1e-6, atol=1e-6)
    assert model.index_queue.tolist() == [-1] * queue
    history = [model.image_queue.clone(), model.text_queue.clone(), model.index_queue.clone()]
    for t in range(4):
        (image, ids), index = batch(size=4, seed=t), torch.arange(4 * t, 4 * t + 4)
        new = (*momentum_features(averaged(model), image, ids), index)
        history = [torch.cat([x, past]) for x, past in zip(new, history)]
        step(model, image, [ids], index=index, seed=t)
        for found, wanted in zip((model.image_queue, model.text_queue, model.index_queue), history):
            assert found.shape == wanted[:queue].shape
            torch.testing.assert_close(found, wanted[:queue], **EXACT)
    assert not any(p.requires_grad for p in model.buffers())


def test_pretraining_keeps_no_image_numbers(double):
    model, _ = make(config(method="blip"))
    step(model, batch()[0], [batch()[1]], index=torch.tensor([1, 1, 1, 1]))
    assert model.index_queue.tolist() == [-1] * 7


# ------------------------------------------------------------------------------------------------------- 7. fine-tuning


def finetuning(task, **changes):
    return config(stage="finetune", task=(task,), **changes)


def test_retrieval_equals_loops(double):
    """Captions of one image are positives of each other, in the batch and in the queue."""
    model, _ = make(finetuning("retrieval"))
    for t, index in enumerate(([5, 9, 5, 2], [9, 1, 7, 9], [5, 5, 1, 3])):
        (image, ids), index = batch(seed=t), torch.tensor(index)
        wanted = reference_terms(model, image, ids, index=index, seed=t)
        alone = reference_terms(model, image, ids, seed=t)
        loss, terms, _ = step(model, image, [ids], index=index, seed=t)
        assert_terms(terms, loss, {name: wanted[name] for name in ("itc", "itm")})
        assert abs(terms["itc"] - alone["itc"]) > 1e-3
    assert model.index_queue.tolist() == [5, 5, 1, 3, 9, 1, 7]


def test_another_caption_of_the_image_is_no_negative(monkeypatch):
    drawn = []
    original = dlip.draw_negatives
    monkeypatch.setattr(dlip, "draw_negatives", lambda *args: drawn.append(original(*args)) or drawn[-1])
    (model, _), (image, ids) = make(finetuning("retrieval"), dtype=torch.float32), batch(6, dtype=torch.float32)
    index = torch.tensor([3, 3, 0, 8, 3, 8])
    for seed in range(40):
        step(model, image, [ids], index=index, seed=seed)
    assert len(drawn) == 80
    assert not any((index[found] == index).any() for found in drawn)
    for i in range(6):  # all others are drawn
        assert {int(found[i]) for found in drawn} == {j for j in range(6) if index[j] != index[i]}


@pytest.mark.parametrize("prompt", [1, 3, 4])
def test_captioning_equals_loops(double, prompt):
    (model, _), (image, ids) = make(finetuning("caption")), batch()
    model.prompt_length = prompt
    states = [model.student.encode_image(x[None]) for x in image]
    texts = [row[row != 0][None] for row in ids]
    pairs = [loop_lm(model.student.decode(text, None, s)[0], text[0], prompt=prompt) for text, s in zip(texts, states)]
    loss, terms, _ = step(model, image, [ids])
    assert_terms(terms, loss, {"lm": mean_of(pairs).detach()})
    assert model.momentum is None


def test_the_prompt_is_what_a_caption_begins_with():
    cfg = dlip.Config(vit="tiny", bert="tiny", queue_size=0)
    tokenizer = dlip.tokenizer_of(cfg)
    model, ids = dlip.build(cfg, tokenizer), tokenizer([cfg.prompt + "red apple"])[0]
    assert tokenizer.decode(ids[1:model.prompt_length].tolist()) == cfg.prompt.strip() == "a picture of"
    assert tokenizer.decode(ids[model.prompt_length:].tolist()).startswith("red")


def questions(seed=3):
    """Images, questions and answers, both of different lengths, the longest answers to the shortest questions."""
    image, question = batch(seed=seed)
    answer = batch(length=5, seed=seed + 1)[1].flip(0)
    return image, question, answer


@pytest.mark.parametrize("shared", [False, True])
def test_answering_equals_loops(double, shared):
    """-sum of the smoothed log-probabilities of each answer, mean over the batch."""
    text = replace(TEXT, width=16)  # the image's: one network can be both
    (model, _), (image, question, answer) = make(finetuning("vqa"), text=text, shared=shared), questions()
    assert len({int((row != 0).sum()) for row in answer}) > 2
    total = 0.0
    for x, q, a in zip(image, question, answer):
        states = model.student.fuse(q[q != 0][None], None, model.student.encode_image(x[None]))
        total = total + loop_lm(model.student.decode(a[a != 0][None], None, states)[0], a[a != 0])[0]
    loss, terms, _ = step(model, image, [question, answer])
    assert_terms(terms, loss, {"lm": total.detach() / 4})


def test_padded_question_tokens_do_not_matter(double):
    (model, _), (image, question, answer) = make(finetuning("vqa"), shared=False), questions()
    before, _, gradient = step(model, image, [question, answer])
    longer = step(model, image, [F.pad(question, (0, 4)), F.pad(answer, (0, 2))])[0]
    words = model.student.text.embeddings.word_embeddings.weight
    with torch.no_grad():
        words[0] += draw(words.shape[1])
    torch.testing.assert_close(longer, before, **EXACT)
    torch.testing.assert_close(step(model, image, [question, answer])[0], before, **EXACT)
    assert not gradient["student.text.embeddings.word_embeddings.weight"][0].any()
    with torch.no_grad():
        words[question[0, 1]] += draw(words.shape[1])  # while a word does
    assert abs(step(model, image, [question, answer])[0] - before) > 1e-4


# ------------------------------------------------------------------------------------------------- 8. the training step


def test_learning_rate_with_cosine():
    """Straight from lr_start to lr over 20 steps, then half a cosine to lr_end at step 100."""
    cfg = config(lr=1e-3, lr_start=1e-6, lr_end=1e-5, warmup_steps=20, schedule="cosine")
    found = [dlip.schedules(cfg, t, 100, 10)["lr"] for t in range(101)]
    wanted = np.concatenate([np.linspace(1e-6, 1e-3, 21)[:-1], 5.05e-4 + 4.95e-4 * np.cos(np.linspace(0, np.pi, 81))])
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert dlip.schedules(replace(cfg, warmup_steps=0), 0, 100, 10)["lr"] == pytest.approx(1e-3)
    assert dlip.schedules(replace(cfg, warmup_steps=100), 100, 100, 10)["lr"] == pytest.approx(1e-3)


def test_learning_rate_in_steps():
    """The paper's: 0.85 of it after every epoch, not below lr_end, after the warm-up of BLIP's code."""
    cfg = config(lr=5e-4, lr_start=1e-6, lr_end=2e-4, warmup_steps=15, schedule="step", lr_decay=0.85)
    found = [dlip.schedules(cfg, t, 100, 10)["lr"] for t in range(100)]
    wanted = [1e-6 + 499e-6 * t / 15 for t in range(15)]
    wanted += [5e-4 * 0.85] * 5 + [5e-4 * 0.85 ** 2] * 10 + [5e-4 * 0.85 ** 3] * 10 + [5e-4 * 0.85 ** 4] * 10
    wanted += [5e-4 * 0.85 ** 5] * 10 + [2e-4] * 40
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_alpha_ramp():
    cfg = config(alpha=0.4, alpha_ramp=2.0)
    found = [dlip.schedules(cfg, t, 100, 10)["alpha"] for t in (0, 5, 10, 19, 20, 99)]
    np.testing.assert_allclose(found, [0, 0.1, 0.2, 0.38, 0.4, 0.4])
    assert dlip.schedules(replace(cfg, alpha_ramp=0.0), 0, 100, 10)["alpha"] == 0.4


@pytest.mark.parametrize("changes", [dict(), dict(stage="finetune", task=("vqa",))], ids=str)
def test_the_optimiser_decays_matrices_and_slows_the_temperature(changes):
    cfg = config(weight_decay=0.3, temp_lr=0.07, lr=0.01, **changes)
    model, _ = make(cfg, dtype=torch.float32)
    optimiser = dlip.build_optimiser(model, cfg, torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    scale = {id(p): group.get("lr_scale", 1.0) for group in optimiser.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimiser.param_groups)
    for name, p in model.named_parameters():
        if name.startswith("student."):
            vector = name.endswith(("bias", "temp")) or "norm" in name.lower()
            assert decay.pop(id(p)) == (0.0 if vector else 0.3), name
            assert scale[id(p)] == (0.07 if name == "student.temp" else 1.0), name
    assert not decay
    assert all(g["betas"] == (0.9, cfg.beta2) and g["eps"] == cfg.adam_eps for g in optimiser.param_groups)


def test_update_is_adamw_with_a_rate_of_its_own_for_the_temperature(double):
    """AdamW's closed first step, lr * sign of the gradient, after decay."""
    cfg = config(weight_decay=0.2, adam_eps=1e-12, temp_lr=0.25)
    (model, teacher), (image, ids) = make(cfg), batch()
    optimiser = dlip.build_optimiser(model, cfg, torch.device("cpu"))
    found = step(model, image, [ids], teacher)[2]
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    dlip.update(model, optimiser, SCALER, 0.01)
    for name, gradient in found.items():
        lr = 0.0025 if name == "student.temp" else 0.01
        wanted = old[name] * (1 - 0.01 * (0.2 if old[name].ndim >= 2 else 0.0)) - lr * gradient.sign()
        close = torch.isclose(model.get_parameter(name), wanted, rtol=1e-5, atol=1e-5) | (gradient.abs() <= 1e-8)
        assert close.all(), name
    assert model.student.temp != old["student.temp"] and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value, gradient, wanted", [(0.0012, 1.0, 0.001), (0.495, -1.0, 0.5), (0.2, 1.0, 0.19)])
def test_the_temperature_is_clamped_after_the_update(value, gradient, wanted):
    cfg = config(temp_lr=0.1)
    model, _ = make(cfg, dtype=torch.float32)
    optimiser = dlip.build_optimiser(model, cfg, torch.device("cpu"))
    with torch.no_grad():
        model.student.temp.fill_(value)
    model.student.temp.grad = torch.tensor(gradient)
    dlip.update(model, optimiser, SCALER, 0.1)
    assert model.student.temp.item() == pytest.approx(wanted, abs=1e-6)


STEPS = [dict(), dict(kd_itc=1.0, kd_lm=1.0, attn_form="double-softmax"), dict(precision="bf16"), dict(vlp=False),
         dict(stage="finetune")]


@pytest.mark.parametrize("changes", STEPS, ids=str)
def test_a_step_never_reads_a_value_back(changes):
    """Two steps with the teacher, as train() takes them; the first makes the optimiser's states."""
    cfg = config(**changes)
    (model, teacher), (image, ids) = make(cfg, dtype=torch.float32), batch(dtype=torch.float32)
    optimiser, (amp, scaler) = (dlip.build_optimiser(model, cfg, torch.device("cpu")),
                                common.mixed_precision(cfg, torch.device("cpu")))

    def whole_step(t):
        now = dlip.schedules(cfg, t, 10, 5)
        terms = dlip.backward(model, image, [ids], torch.arange(4), now, teacher, amp, scaler, seed=t)
        dlip.update(model, optimiser, scaler, now["lr"])
        return terms

    whole_step(0)
    with NoReadBack():
        terms = whole_step(1)
    assert all(math.isfinite(term) and term.dtype == torch.float32 for term in terms.values())


def test_bf16_is_close_to_fp32():
    found = []
    for precision in ("fp32", "bf16"):
        cfg = config(precision=precision, kd_itc=1.0, kd_lm=1.0)
        (model, teacher), (image, ids) = make(cfg, dtype=torch.float32), batch(dtype=torch.float32)
        amp, scaler = common.mixed_precision(cfg, torch.device("cpu"))
        now = {"alpha": 0.4}
        found.append(dlip.backward(model, image, [ids], torch.arange(4), now, teacher, amp, scaler, seed=0))
        assert model.image_queue.dtype == torch.float32
    for name in found[0].keys() - {"loss", "itm"}:  # ITM's negatives may change
        assert found[1][name].item() == pytest.approx(found[0][name].item(), rel=0.05, abs=0.02), name


# ---------------------------------------------------------------------------------------------------- 9. untied decoder


@pytest.mark.parametrize("width", [16, 24])
def test_untying_copies_all_that_fits(width):
    """Encoder and decoder get copies of what they shared; keys and values of another width start afresh."""
    model = blip(0, text=replace(TEXT, width=width))
    before = {name: w.clone() for name, w in model.text.state_dict().items()}
    model.untie_decoder()
    encoder, decoder = model.text.state_dict(), model.text_decoder.state_dict()
    assert encoder.keys() == {n for n in before if "decoder_attention" not in n and not n.startswith("cls.")}
    assert decoder.keys() == {n for n in before if ".attention." not in n}
    assert all(torch.equal(w, before[name]) for name, w in encoder.items())
    fresh = {name for name in decoder if width != 16 and name.endswith((
        "crossattention.self.key.weight", "crossattention.self.value.weight"))}
    assert len(fresh) == (0 if width == 16 else 4)
    for name, w in decoder.items():
        if name in fresh:
            assert w.shape == (width, width) and abs(w.std() / 0.02 - 1) < 0.15  # BERT's N(0, 0.02)
        elif not (width != 16 and name.endswith(("crossattention.self.key.bias", "crossattention.self.value.bias"))):
            assert torch.equal(w, before[name]), name
    tensors = [*model.text.parameters(), *model.text_decoder.parameters()]
    assert len({p.data_ptr() for p in tensors}) == len(tensors)  # nothing is shared any more
    (image, question, answer) = questions()
    fine = DLIP(finetuning("vqa"), model)
    loss, _, found = step(fine, image.float(), [question, answer])
    assert math.isfinite(loss) and any("text_decoder" in n for n in found) and any("visual" in n for n in found)


# ----------------------------------------------------------------------------------------------- 10. same to the letter

TWO_PAPERS = {  # top-level functions and classes of dlip.py and eclipse.py that differ, and why
    "Config": "other flags", "configure": "stages and recipes", "check": "other flags",
    "Attention": "BERT's, not the ViT's", "Block": "timm's names, no pruning", "VisionTransformer": "BLIP's ViT",
    "build": "another method", "schedules": "steps of 0.85, warm-up in steps, alpha", "backward": "no chunks",
    "build_optimiser": "the temperature has its own rate", "update": "temperature, not logit scale; no moving average",
    "train": "tasks, a batch of image, texts and index", "log_row": "other columns", "Evaluator": "three tasks",
    "validate": "three tasks", "profile": "the paper's Table 1", "ablation_arms": "other arms",
    "ablate": "other tables", "main": "stages",
}


def top_level(script):
    """{name: source} of its functions and classes, decorators included."""
    source, found = (Path(__file__).resolve().parents[1] / script).read_text("utf-8"), {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min(line.lineno for line in (node, *node.decorator_list))
            found[node.name] = lines[first - 1:node.end_lineno]
    return found


@pytest.mark.parametrize("script", ["eclipse.py", "clip_cid.py"])
def test_what_the_scripts_need_is_the_same_to_the_letter(script):
    ours, theirs = top_level("dlip.py"), top_level(script)
    both = ours.keys() & theirs.keys()
    differ = {name for name in both if ours[name] != theirs[name]}
    stages = {"exported", "load_teacher", "teacher_file", "run_stages"} if script == "clip_cid.py" else set()
    assert differ == TWO_PAPERS.keys() | stages
    assert both - differ == {"unit", "normalise"}
