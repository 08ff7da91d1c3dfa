"""The losses and the method of dlip.py against independent references: loops in float64 over one
image, one head, one query, one key at a time, closed forms, and a chi-square test."""

import copy
from dataclasses import replace
from unittest import mock

import dlip
import pytest
import torch
import torch.nn.functional as F
from dlip import BLIP, DLIP, BLIPSize, TextSize, VisionSize
from torch.utils._python_dispatch import TorchDispatchMode

# --------------------------------------------------------------------------------- small models

WIDTH = 6  # of the joint embedding
TEXT = TextSize(24, 2, 2, 2, vocab=40, positions=16, dropout=0.0, cls=2, sep=3, dec=38, enc=39)
SIZE = BLIPSize(VisionSize(16, 1, 2, patch=8, image_size=16), TEXT, WIDTH)  # 5 image tokens
TEACHER = BLIPSize(replace(SIZE.vision, width=20), replace(TEXT, width=32), WIDTH)
SETTING = dict(stage="distil", task=("retrieval",), queue_size=7, momentum=0.8)
EXACT = dict(rtol=1e-9, atol=1e-11)


@pytest.fixture
def double(monkeypatch):
    """float64 throughout: .float(), which lifts bf16 features to fp32, would cut them down."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def config(**changes):
    return dlip.Config(**{**SETTING, **changes})


def finetuning(task):
    return config(stage="finetune", task=(task,))


def shake(model, seed, std=0.3):
    """Random weights, norms and biases included; a temperature of 0.2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = std * torch.randn(p.shape, generator=generator)
            norm = "norm" in name.lower() and p.ndim == 1
            p.copy_(0.2 if name == "temp" else 1 + noise if norm else noise)
    return model


def resized(**changes):
    return replace(SIZE, text=replace(TEXT, **changes))


def make(cfg, size=SIZE, dtype=torch.float64, shared=True):
    """A DLIP whose momentum encoders have fallen behind its student, and a teacher."""
    torch.manual_seed(0)
    model = DLIP(cfg, shake(BLIP(size, shared), 0), prompt_length=3)
    if model.momentum is not None:
        shake(model.momentum, 1)
    return model.to(dtype).train(), shake(BLIP(TEACHER), 2).to(dtype).eval()


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def unit_rows(*shape, seed=0):
    return F.normalize(draw(*shape, seed=seed), dim=-1)


def batch(size=4, length=7, seed=0, dtype=torch.float64):
    """Images, and texts of different lengths: first token, words, [SEP], padding."""
    ids = torch.randint(4, 38, (size, length), generator=torch.Generator().manual_seed(seed))
    for row in range(size):
        end = max(2, length - 1 - row)
        ids[row, 0], ids[row, end], ids[row, end + 1:] = 2, 3, 0
    return draw(size, 3, 16, 16, seed=seed, dtype=dtype), ids


def step(model, image, texts, teacher=None, alpha=0.4, number=None, seed=0):
    """(loss, terms) of a batch."""
    torch.manual_seed(seed)
    number = torch.arange(len(image)) if number is None else number
    loss, terms = model(image, texts, number, alpha, teacher)
    loss.backward()
    return loss.detach(), terms


# ------------------------------------------------------------------------------------ the loops


def log_softmax(row):
    """Of a list of scalars, or of a vector."""
    total = sum(x.exp() for x in row).log()
    return [x - total for x in row]


def loop_itc(query, query_m, keys, same, temp, target_temp, alpha):
    total = 0.0
    for i in range(len(query)):
        log_p = log_softmax([sum(query[i] * key) / temp for key in keys])
        soft = log_softmax([sum(query_m[i] * key) / target_temp for key in keys])
        positives = sum(bool(x) for x in same[i])
        for k in range(len(keys)):
            hard = 1 / positives if same[i][k] else 0.0
            target = alpha * soft[k].exp() + (1 - alpha) * hard
            total = total - target * log_p[k] / len(query)
    return total


def loop_lm(logits, ids, prompt=1):
    """(sum, count) over the tokens of one text: logits (N, V), ids (N,)."""
    total, count = 0.0, 0
    for n in range(1, len(ids)):
        if ids[n] != 0 and n >= prompt:
            log_p = log_softmax(logits[n - 1])
            total = total - 0.9 * log_p[ids[n]] - 0.1 * sum(log_p) / len(log_p)
            count += 1
    return total, count


def loop_attention(student, teacher, queries):
    """(sum over queries of the mean over heads, their number) of one pair: scores (H, N, M)."""
    total, heads = 0.0, len(student)
    for n in [n for n in range(len(queries)) if queries[n]]:
        for s, t in zip(student[:, n], teacher[:, n]):
            shown = [m for m in range(len(t)) if t[m] > -1e30]
            s, t = log_softmax(s[shown]), log_softmax(t[shown])
            total = total + sum(y.exp() * (y - x) for x, y in zip(s, t)) / heads
    return total, int(sum(queries))


def mean_of(pairs):
    """Of (sum, count) pairs."""
    sums, counts = zip(*pairs)
    return sum(sums) / max(1, sum(counts))


# ------------------------------------------------------------------------------------------ ITC


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_itc_equals_loops(alpha):
    """With several positives in a row; no gradient passes through the targets' temperature."""
    query, query_m = unit_rows(3, 5).requires_grad_(), unit_rows(3, 5, seed=1)
    keys, same = unit_rows(8, 5, seed=2), torch.eye(3, 8, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    same[1, 3:5] = True
    temp = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = dlip.itc_loss(query, query_m, keys, same, temp, alpha)
    wanted = loop_itc(query, query_m, keys, same, temp, temp.detach(), alpha)
    torch.testing.assert_close(found, wanted, **EXACT)
    gradients = [torch.autograd.grad(loss, [query, temp]) for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, **EXACT)


# ------------------------------------------------------------------------------- ITM's negatives


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_no_negative_is_a_positive(floor, dtype):
    """Also where positives are by far the most similar; -1 where a row has nothing else."""
    torch.manual_seed(0)
    group = torch.tensor([0, 0, 0, 1, 2, 2]).repeat(100)
    same = group[:, None] == group[:6]
    for size in (0.0, 1.0, 1e3, 1e30, -1e30):
        scores = size * (same + torch.randn(600, 6)).to(dtype)
        drawn = dlip.draw_negatives(scores, same, floor)
        assert drawn.min() >= 0 and not same.gather(1, drawn[:, None]).any()
    same[0] = True
    same[1] = torch.arange(6) > 0
    assert dlip.draw_negatives(scores, same, floor)[:2].tolist() == [-1, 0]


@pytest.mark.parametrize("floor", [0.0, 1e-4, 0.3])
def test_negatives_have_the_softmax_distribution(floor):
    """softmax over the whole row + floor, off the positives, as BLIP's loop of multinomials."""
    scipy_stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    scores, count = 1.2 * draw(4, 6, dtype=torch.float32), 20_000
    same = torch.eye(4, 6, dtype=torch.bool)
    same[0, 3] = same[0, 5] = same[2, 4] = True
    drawn = dlip.draw_negatives(scores.repeat(count, 1), same.repeat(count, 1), floor)
    weights = (scores.double().softmax(1) + floor).masked_fill(same, 0)
    observed = F.one_hot(drawn.view(count, 4), 6).sum(0)
    for row, allowed in enumerate(~same):
        expected = count * weights[row] / weights[row].sum()
        assert observed[row, ~allowed].sum() == 0 and expected[allowed].min() > 100
        assert scipy_stats.chisquare(observed[row, allowed], expected[allowed]).pvalue > 0.001


# ------------------------------------------------------------------------------- LM, L_HR, L_AT


@pytest.mark.parametrize("causal", [False, True])
def test_attention_loss_equals_loops(causal):
    """With padded queries, and keys hidden as Attention hides them; trains the student alone."""
    queries = torch.arange(6) < torch.tensor([[6], [4], [2]])
    hidden = torch.ones(6, 6).triu(1).bool() if causal else ~queries[:, None, None]
    student, teacher = (x.masked_fill(hidden, torch.finfo(torch.float32).min).requires_grad_()
                        for x in 2 * draw(2, 3, 2, 6, 6))
    found = dlip.attention_loss(student, teacher, queries)
    wanted = mean_of(loop_attention(s, t.detach(), q) for s, t, q in zip(student, teacher, queries))
    torch.testing.assert_close(found, wanted, **EXACT)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True) for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, **EXACT)
    found.backward()
    assert teacher.grad is None
    sure = 1e4 * student.detach().clamp_min(-9).float()  # probabilities that underflow
    assert dlip.attention_loss(sure, -sure, queries).isfinite()


# --------------------------------------------------------------------------------- pre-training


@torch.no_grad()
def averaged(model):
    """A copy of the momentum encoders, one step later."""
    later, m = copy.deepcopy(model.momentum), model.cfg.momentum
    for name, p in later.named_parameters():
        p.copy_(m * p + (1 - m) * model.student.get_parameter(name))
    return later


def units(vectors):
    return torch.stack([x / x.norm() for x in vectors])


@torch.no_grad()
def unimodal(blip, image, ids):
    """(image states, features of images and of texts), one at a time, without padding."""
    states = [blip.visual_encoder(x[None]) for x in image]
    v = [blip.text_proj(blip.text_encoder(row[row != 0][None]).states[0, 0]) for row in ids]
    return states, units([blip.vision_proj(x[0, 0]) for x in states]), units(v)


def reference_negatives(scores, same, floor):
    """The largest log(softmax + floor) + Gumbel noise of each row, from the generator's state."""
    noise, drawn = torch.empty_like(scores).exponential_(), []
    for i, row in enumerate(scores):
        p = [x.exp() for x in log_softmax(row)]
        sums = {j: (p[j] + floor).log() - noise[i, j].log() for j in range(len(row))
                if not same[i][j]}
        drawn.append(max(sums, key=sums.get, default=None))
    return drawn


@torch.no_grad()
def reference_terms(model, image, ids, teacher=None, alpha=0.4, number=None, seed=0):
    """Every term of a step, from the state before it, one sample at a time, without padding."""
    student, b, terms = model.student, len(ids), {}
    texts = [row[row != 0][None] for row in ids]

    def passes(blip):
        states, u, v = unimodal(blip, image, ids)
        fused = [blip.fuse(t, s, True) for t, s in zip(texts, states)]
        decoded = [blip.decoder_states(t, s, None, True) for t, s in zip(texts, states)]
        vl_e, vl_d = (units([blip.text_proj(e.states[0, 0]) for e in encoded]) for encoded in (fused, decoded))
        return states, fused, decoded, (u, v, vl_e, vl_d)

    states, fused, decoded, features = passes(student)
    u, v = features[:2]
    logits = [student.text_decoder.cls.predictions(e.states)[0] for e in decoded]
    terms["lm"] = mean_of([loop_lm(row, text[0]) for row, text in zip(logits, texts)])
    if model.momentum is not None:
        _, u_m, v_m = unimodal(averaged(model), image, ids)
        keys = torch.cat([u_m, model.image_queue]), torch.cat([v_m, model.text_queue])
        numbers = list(range(b)) if number is None else number.tolist()
        of_key = numbers + model.number_queue.tolist()
        same = [[mine == other for other in of_key] for mine in numbers]
        temp = student.temp.detach()
        terms["itc"] = (loop_itc(u, u_m, keys[1], same, temp, temp, alpha)
                        + loop_itc(v, v_m, keys[0], same, temp, temp, alpha)) / 2
        torch.manual_seed(seed)
        floor = 1e-4 if number is None else 0.0
        wrong_text = reference_negatives(u @ v_m.T / temp, same, floor)
        wrong_image = reference_negatives(v @ u_m.T / temp, same, floor)
        pairs = [(i, i, 1) for i in range(b)]  # image, text, whether they match
        pairs += [(i, text, 0) for i, text in enumerate(wrong_text) if text is not None]
        pairs += [(wrong, i, 0) for i, wrong in enumerate(wrong_image) if wrong is not None]
        losses = []
        for i, t, match in pairs:
            scores = student.match(student.fuse(texts[t], states[i]).states)[0]
            losses.append(-log_softmax(scores)[match])
        terms["itm"] = sum(losses) / len(losses)
    if teacher is not None:
        _, t_fused, t_decoded, t_features = passes(teacher)
        for part, ours, theirs in zip(("img", "text", "vl_e", "vl_d"), features, t_features):
            terms[f"hr_{part}"] = sum(1 - x @ y for x, y in zip(ours, theirs)) / b

        def maps(ours, theirs, kind):
            pairs = [(getattr(s, kind)[0], getattr(t, kind)[0]) for s, t in zip(ours, theirs)]
            return mean_of([loop_attention(s, t, [True] * s.shape[1]) for s, t in pairs])

        terms["at_self"] = maps(fused, t_fused, "self_scores")
        terms["at_self"] += maps(decoded, t_decoded, "self_scores")
        terms["at_cross"] = maps(fused, t_fused, "cross_scores")
    return terms


def assert_terms(found, loss, wanted, weights=None):
    """The terms and their weighted sum."""
    assert found.keys() == {"loss", *wanted}
    for name in wanted:
        assert wanted[name] > 1e-4, name
        torch.testing.assert_close(found[name], wanted[name], **EXACT)
    total = sum((weights or {}).get(name, 1.0) * value for name, value in wanted.items())
    torch.testing.assert_close(loss, total, **EXACT)
    assert torch.equal(found["loss"], loss)


@pytest.mark.parametrize("alpha, queue", [(0.0, 7), (0.4, 0), (0.4, 2), (0.4, 7)])
def test_blip_pretraining_equals_loops(double, queue, alpha):
    """Three steps: the momentum encoders move before they embed the batch, and the queue, of any
    size, is filled after the loss: the newest first, in the batch's order."""
    model, _ = make(config(method="blip", queue_size=queue))
    keys = [model.image_queue.clone(), model.text_queue.clone()]
    for t in range(3):
        image, ids = batch(size=3, seed=t)
        wanted, later = reference_terms(model, image, ids, alpha=alpha, seed=t), averaged(model)
        loss, terms = step(model, image, [ids], alpha=alpha, seed=t,
                              number=torch.ones(3, dtype=torch.long))
        assert_terms(terms, loss, wanted)
        torch.testing.assert_close([*model.momentum.parameters()], [*later.parameters()], **EXACT)
        keys = [torch.cat([new, past]) for new, past in zip(unimodal(later, image, ids)[1:], keys)]
        for found, past in zip((model.image_queue, model.text_queue), keys):
            torch.testing.assert_close(found, past[:queue], **EXACT)
        with torch.no_grad():
            for p in model.student.parameters():
                p += 0.05 * draw(*p.shape, seed=t)


VLP, HR, AT = {"itc", "itm", "lm"}, {"hr_img", "hr_text", "hr_vl_e", "hr_vl_d"}, {
    "at_self", "at_cross"}
SWITCHES = [
    (dict(), VLP | HR | AT), (dict(fusion_layers=1), VLP | HR | AT), (dict(vlp=False), HR | AT),
    (dict(hr=("vl_d", "text"), attn=("none",)), VLP | {"hr_text", "hr_vl_d"}),
    (dict(hr=("none",), attn=("none",)), VLP), (dict(attn=("self",)), VLP | HR | {"at_self"}),
    (dict(attn=("cross",), hr=("none",), vlp=False), {"at_cross"}),
    (dict(lambda_hr=0.3, lambda_at=2.5), VLP | HR | AT)]


@pytest.mark.parametrize("changes, names", SWITCHES, ids=[str(changes) for changes, _ in SWITCHES])
def test_every_switch_equals_loops(double, changes, names):
    cfg = config(**changes)
    (model, teacher), (image, ids) = make(cfg, resized(fusion_layers=cfg.fusion_layers or 2)), batch()
    wanted = reference_terms(model, image, ids, teacher)
    loss, terms = step(model, image, [ids], teacher)
    weights = dict.fromkeys(HR, cfg.lambda_hr) | dict.fromkeys(AT, cfg.lambda_at)
    assert_terms(terms, loss, {name: wanted[name] for name in names}, weights)


@pytest.mark.parametrize("hr, attn, runs", [
    ("none", "none", set()), ("img", "none", {"encode_image"}), ("text", "none", {"encode_text"}),
    ("vl_e", "cross", {"encode_image", "fuse"}), ("vl_d", "none", {"encode_image", "decoder_states"})])
def test_the_teacher_computes_what_is_read(hr, attn, runs):
    model, teacher = make(config(hr=(hr,), attn=(attn,)), dtype=torch.float32)
    image, ids = batch(dtype=torch.float32)
    spy = mock.Mock(wraps=teacher)
    step(model, image, [ids], spy)
    assert {call[0] for call in spy.method_calls} - {"image_feature", "text_feature"} == runs


def test_who_is_trained():
    """Never the teacher, whatever it asks for, nor the momentum encoders; all of the student."""
    model, teacher = make(config(), dtype=torch.float32)
    teacher.requires_grad_()
    image, ids = batch(dtype=torch.float32)
    step(model, image, [ids], teacher)
    assert all(p.grad is None for p in [*teacher.parameters(), *model.momentum.parameters()])
    for name, p in model.student.named_parameters():  # a key's bias does nothing
        assert p.grad is not None and (p.grad.any() or "key.bias" in name), name


def test_the_momentum_encoders_start_as_the_student_and_have_no_dropout():
    model = DLIP(config(method="blip", momentum=1.0), BLIP(resized(dropout=0.3)))
    for name, p in model.momentum.named_parameters():
        own = model.student.get_parameter(name)
        assert torch.equal(p, own) and p.data_ptr() != own.data_ptr()
    image, ids = batch(dtype=torch.float32)
    for seed in range(2):  # Q is 7: what stays of the first step is of three pairs
        step(model, image, [ids], seed=seed)
    assert torch.equal(model.text_queue[:3], model.text_queue[4:])


# ---------------------------------------------------------------------------------- fine-tuning


def test_retrieval_equals_loops(double):
    """Captions of one image are positives of each other, in the batch and in the queue; an image
    without any other in the batch has no negative and does not count."""
    model, _ = make(finetuning("retrieval"))
    for t, number in enumerate(([5, 9, 5, 2], [9, 1, 7, 9], [4, 4, 4, 4], [5, 5, 1, 3])):
        (image, ids), number = batch(seed=t), torch.tensor(number)
        wanted = reference_terms(model, image, ids, number=number, seed=t)
        loss, terms = step(model, image, [ids], number=number, seed=t)
        assert_terms(terms, loss, {name: wanted[name] for name in ("itc", "itm")})
    assert model.number_queue.tolist() == [5, 5, 1, 3, 4, 4, 4]


@pytest.mark.parametrize("prompt", [1, 3, 4])
def test_captioning_equals_loops(double, prompt):
    (model, _), (image, ids) = make(finetuning("caption")), batch()
    model.prompt_length = prompt
    pairs = []
    for x, row in zip(image, ids):
        text = row[row != 0]
        logits = model.student.decode(text[None], model.student.encode_image(x[None]))
        pairs.append(loop_lm(logits[0], text, prompt=prompt))
    loss, terms = step(model, image, [ids])
    assert_terms(terms, loss, {"lm": mean_of(pairs).detach()})


@pytest.mark.parametrize("shared", [False, True])
def test_answering_equals_loops(double, shared):
    """-sum of the smoothed log-probabilities of each answer, mean over the batch; padding of
    questions and answers does not matter."""
    model, _ = make(finetuning("vqa"), resized(width=16), shared=shared)  # the image's width
    student, (image, question) = model.student, batch(seed=3)
    answer = batch(length=5, seed=4)[1].flip(0)  # the longest answers to the shortest questions
    total = 0.0
    for x, q, a in zip(image, question, answer):
        q, a = q[q != 0], a[a != 0]
        states = student.fuse(q[None], student.encode_image(x[None])).states
        total = total + loop_lm(student.decode(a[None], states)[0], a)[0].detach()
    loss, terms = step(model, image, [F.pad(question, (0, 4)), F.pad(answer, (0, 2))])
    assert_terms(terms, loss, {"lm": total / 4})


# ------------------------------------------------------------------------ no waiting, precision

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select",
         "_unique2", "unique_dim", "multinomial"}


class NoReadBack(TorchDispatchMode):
    """Raises on the operators for which the host must wait for the device's values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS or (name == "index" and any(
                index is not None and index.dtype == torch.bool for index in args[1])):
            raise AssertionError(f"{func} reads a value back")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [dict(), dict(vlp=False), dict(stage="finetune")], ids=str)
def test_a_step_never_reads_a_value_back(changes):
    """Forward and backward, in pre-training and fine-tuning for retrieval."""
    model, teacher = make(config(**changes), dtype=torch.float32)
    image, ids = batch(dtype=torch.float32)
    with NoReadBack():
        step(model, image, [ids], teacher)
    with pytest.raises(AssertionError, match="reads a value back"), NoReadBack():
        ids.sum().item()
