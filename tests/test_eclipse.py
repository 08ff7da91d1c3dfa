"""eclipse.py against independent references: open_clip, closed forms, and brute-force versions written here."""

import inspect
import math
from dataclasses import replace

import common
import eclipse
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import UserError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SIZE = replace(common.PRESETS["demo"], image_size=32, patch_size=8, vision_width=64, vision_layers=4, vision_heads=2,
               vision_mlp=96, embed_dim=32, text_width=64, text_layers=2, text_heads=2, context_length=12,
               vocab_size=600)
CONFIG = dict(keep_rate=0.7, text_grad="both", kd_ramp=(0.0, 0.0))  # whatever the defaults are tuned to
SCALER = torch.amp.GradScaler("cpu", enabled=False)
FP32 = common.mixed_precision("fp32", torch.device("cpu"))[0]


@pytest.fixture
def double(monkeypatch):
    """float64 throughout: .float(), which lifts bf16 features to fp32, would cut them down."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return torch.float64


def config(**changes):
    return eclipse.Config(**{**CONFIG, **changes})


def randomise(module, seed=0):
    """No parameter keeps a value (0, 1) under which mixing it up with another would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return module


def make(cfg, dtype=torch.float32, seed=0, size=SIZE):
    """A model whose teacher differs from its student and whose attention has preferences."""
    torch.manual_seed(seed)
    model = randomise(eclipse.ECLIPSE(cfg, size), seed)
    with torch.no_grad():
        for tower in filter(None, (model.online.visual, model.momentum)):
            for block in tower.transformer.resblocks:
                block.attn.in_proj_weight[:2 * size.vision_width] *= 2.5
    return model.to(dtype)


def batch(count, dtype=torch.float32, seed=0, size=SIZE):
    """Random pixels, and texts whose largest token, the end, stands at a random place."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, size.image_size, size.image_size, generator=generator)
    text = torch.randint(1, size.vocab_size - 1, (count, size.context_length), generator=generator)
    for row in text:
        end = int(torch.randint(1, size.context_length, (1,), generator=generator))
        row[end], row[end + 1:] = size.vocab_size - 1, 0
    return image.to(dtype), text


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_backward(model, image, text, kd_weight=1.0, amp=FP32, scaler=SCALER):
    """(loss, terms, gradients) of one batch."""
    model.zero_grad(set_to_none=True)
    with amp:
        taught = model.teach(image, text)
    terms = eclipse.backward(model, image, text, (*taught, kd_weight), amp, scaler)
    return terms["loss"], terms, gradients(model)


def assert_same(found, wanted, tolerance):
    """Two dicts of tensors, each within `tolerance` of the norm of its reference."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        difference = (found[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-12)
        assert difference <= tolerance, f"{name}: relative error {difference:.1e}"


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_clip_step_equals_open_clip(act):
    common.import_torchvision()
    open_clip = pytest.importorskip("open_clip")
    from open_clip.loss import ClipLoss
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=4, width=64, head_width=32, patch_size=8, image_size=32, mlp_ratio=1.5)
    text = open_clip.CLIPTextCfg(layers=2, width=64, heads=2, context_length=12, vocab_size=600)
    theirs = randomise(open_clip.model.CLIP(32, vision, text, quick_gelu=act == "quick_gelu")).train()
    model = eclipse.ECLIPSE(config(method="clip", keep_rate=1.0), replace(SIZE, act=act))
    common.load_weights(model.online, theirs.state_dict(), "theirs")
    image, tokens = batch(8)
    wanted = ClipLoss()(*theirs(image, tokens))
    wanted.backward()
    loss, _, found = run_backward(model, image, tokens)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=0)
    assert_same({name.removeprefix("online."): g for name, g in found.items()}, gradients(theirs), 1e-5)


# ------------------------------------------------------------------------------------------ EViT


def brute_force_block(block, x, keep_rate, fuse, quick):
    """One EViT block on the tokens (N, D) of one sample."""
    (N, D), heads = x.shape, block.attn.heads
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    h = h * block.ln_1.weight + block.ln_1.bias
    q, k, v = (h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(D, -1)
    outputs, score = [], 0
    for head in torch.arange(D).split(D // heads):
        attention = torch.softmax(q[:, head] @ k[:, head].T / math.sqrt(D // heads), -1)  # (N, N)
        outputs.append(attention @ v[:, head])
        score = score + attention[0] / heads  # what CLS pays to each token, itself included
    x = x + torch.cat(outputs, -1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    if keep_rate < 1:
        order = sorted(range(1, N), key=lambda token: -score[token].item())
        count = math.ceil(keep_rate * (N - 1))
        kept, dropped = order[:count], order[count:]
        rows = [x[0]] + [x[token] for token in kept]
        if fuse and dropped:
            rows.append(sum(score[token] * x[token] for token in dropped))
        x = torch.stack(rows)
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    h = (h * block.ln_2.weight + block.ln_2.bias) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    h = h * torch.sigmoid(1.702 * h) if quick else h * (1 + torch.erf(h / math.sqrt(2))) / 2
    return x + h @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def brute_force_vit(tower, size, image, keep_rate, fuse):
    """(B, E)"""
    outputs, P = [], size.patch_size
    for sample in image:
        patches = [sample[:, r:r + P, c:c + P].flatten() for r in range(0, size.image_size, P)
                   for c in range(0, size.image_size, P)]
        x = torch.stack([tower.class_embedding] + [tower.conv1.weight.flatten(1) @ patch for patch in patches])
        x = F.layer_norm(x + tower.positional_embedding, x.shape[-1:], tower.ln_pre.weight, tower.ln_pre.bias)
        for i, block in enumerate(tower.transformer.resblocks):
            rate = keep_rate if i in tower.prune_blocks else 1.0
            x = brute_force_block(block, x, rate, fuse, size.act == "quick_gelu")
        outputs.append(F.layer_norm(x[0], x[0].shape, tower.ln_post.weight, tower.ln_post.bias) @ tower.proj)
    return torch.stack(outputs)


EVIT = [dict(keep_rate=k, fuse=fuse) for k in (0.9, 0.7, 0.5, 0.3) for fuse in (True, False)]
EVIT += [dict(keep_rate=0.6, blocks=[0, 1, 2], act="quick_gelu"), dict(keep_rate=0.05, vision_heads=8)]


@pytest.mark.parametrize("changes", EVIT, ids=str)
def test_pruned_vit_equals_brute_force(double, changes):
    changes = dict(changes)
    keep_rate, fuse = changes.pop("keep_rate"), changes.pop("fuse", True)
    blocks = changes.pop("blocks", [1, 2])
    size = replace(SIZE, **changes)
    model = make(config(keep_rate=keep_rate, fuse=fuse), double, size=size)
    tower, image = model.online.visual, batch(4, double)[0].requires_grad_()
    tower.prune_blocks = blocks
    direction = torch.randn(4, 32, dtype=double, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (lambda: tower(image, keep_rate),
                    lambda: brute_force_vit(tower, size, image, keep_rate, fuse)):
        image.grad = None
        tower.zero_grad(set_to_none=True)
        output = forward()
        (output * direction).sum().backward()
        results.append(({"output": output.detach()}, {**gradients(tower), "image": image.grad}))
    (found, found_gradients), (wanted, wanted_gradients) = results
    assert_same(found, wanted, 1e-10)
    assert_same(found_gradients, wanted_gradients, 1e-9)


def test_the_fused_token_competes():
    """In such cases an earlier fused token, which stands last, is sometimes kept, sometimes fused again."""
    first, second = make(config()).online.visual.prune(batch(16)[0], 0.5)[1]
    kept_again = (second == first.shape[1]).any(1)
    assert kept_again.any() and not kept_again.all()


@pytest.mark.parametrize("fuse", [True, False])
def test_ties_keep_the_right_number_and_lose_nothing(fuse):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 17, 8, generator=generator)
    a = torch.randint(0, 3, (5, 16), generator=generator) / 48
    a[0] = 1 / 16
    out, kept = eclipse.reorganise_tokens(x, a, 0.4, fuse)
    for sample, row in enumerate(kept.tolist()):
        dropped = sorted(set(range(16)) - set(row))
        assert len(set(row)) == len(row) == 7 and a[sample, row].min() >= a[sample, dropped].max()
        wanted = [x[sample, 0], *x[sample, 1:][row]]
        if fuse:
            wanted.append(sum(a[sample, i] * x[sample, 1 + i] for i in dropped))
        torch.testing.assert_close(out[sample], torch.stack(wanted))


B16 = {1.0: 17.56, 0.9: 15.39, 0.8: 13.33, 0.7: 11.61, 0.6: 10.09, 0.5: 8.82, 0.4: 7.78}


def test_cost_and_token_counts_of_vit_b16():
    """GMACs of the specification; the meta device computes shapes only."""
    tokens = {}
    with torch.device("meta"):
        visual = eclipse.PruningVisionTransformer(common.PRESETS["vit_b16"], fuse=True)
        image = torch.empty(1, 3, 224, 224)
        for keep_rate, wanted in B16.items():
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                _, kept_positions = visual.prune(image, keep_rate)
            assert counter.get_total_flops() / 2e9 == pytest.approx(wanted, rel=0.001)
            tokens[keep_rate] = [2 + kept.shape[1] for kept in kept_positions]
    assert visual.prune_blocks == [3, 6, 9]
    assert tokens[0.7] == [140, 100, 72] and tokens[0.5] == [100, 52, 28]


def test_keep_rate_1_is_the_plain_vit_to_the_bit(monkeypatch):
    model, image = make(config()), batch(4)[0]
    tower = model.online.visual
    plain = eclipse.VisionTransformer(SIZE)
    plain.load_state_dict(tower.state_dict())
    assert torch.equal(tower(image, 0.97), plain(image))  # ceil(0.97 * 16) = 16
    monkeypatch.setattr(eclipse, "reorganise_tokens", None)  # calling it would fail
    assert torch.equal(tower(image), plain(image))


def test_the_last_block_never_prunes():
    """Only CLS is read behind it. In 1 to 24 blocks; 12 prune where EViT's code does."""
    for depth in range(1, 25):
        tower = eclipse.PruningVisionTransformer(replace(SIZE, vision_layers=depth), True)
        assert depth - 1 not in tower.prune_blocks and len(tower.prune_blocks) <= 3


# ---------------------------------------------------------------------------------------- losses


# Which loss trains the text in each reading of the specification's table. KD never does.
TEXT_LOSSES = {"momentum": {"A_bar"}, "online": {"A"}, "both": {"A", "A_bar"}}
TOTAL_LOSSES = {"momentum": {"A", "A_bar"}, "online": {"A"}, "both": {"A", "A_bar"}}
READINGS = [("momentum", "shared"), ("online", "shared"), ("both", "shared"), ("online", "momentum")]


def reference_gradients(u, v, scale, u_bar, v_bar, reading, kd_weight):
    """(loss, gradients of u, v, scale) with one softmax at a time, by logsumexp."""
    target = v if v_bar is None else v_bar

    def matrix(image, text, text_trains):
        return scale.exp() * image @ (text if text_trains else text.detach()).T

    def nce(m):
        return -(2 * m.diagonal() - m.logsumexp(0) - m.logsumexp(1)).mean() / 2

    def kl(p, q):
        p, q = (m - m.logsumexp(1, keepdim=True) for m in (p.detach(), q))
        return (p.exp() * (p - q)).sum() / len(p)

    losses = {name: nce(matrix(image, text, name in TEXT_LOSSES[reading]))
              for name, image, text in (("A", u, v), ("A_bar", u_bar, target))}
    student, teacher = matrix(u, v, v_bar is not None), matrix(u_bar, target, False)
    total = sum(losses[name] for name in TOTAL_LOSSES[reading])
    total = total + kd_weight * (kl(teacher, student) + kl(teacher.T, student.T)) / 2
    return total.detach(), torch.autograd.grad(total, (u, v, scale))


@pytest.mark.parametrize("kd_weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("text_grad, text_teacher", READINGS)
def test_loss_and_gradients_of_each_reading(text_grad, text_teacher, kd_weight):
    model = make(config(text_grad=text_grad, text_teacher=text_teacher), torch.float64)
    u, v, u_bar, v_bar = F.normalize(torch.randn(4, 6, 32, dtype=torch.float64), dim=-1)
    v_bar = v_bar if text_teacher == "momentum" else None
    u.requires_grad_(), v.requires_grad_()
    scale = model.online.logit_scale
    wanted, wanted_gradients = reference_gradients(u, v, scale, u_bar, v_bar, text_grad, kd_weight)
    total, _ = model.loss(u, v, u_bar, v_bar, kd_weight)
    found_gradients = torch.autograd.grad(total, (u, v, scale))
    assert total.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert_same(dict(enumerate(found_gradients)), dict(enumerate(wanted_gradients)), 1e-12)


@pytest.mark.parametrize("text_teacher, teacher_rate", [("shared", 1.0), ("momentum", 1.0), ("shared", 0.4)])
def test_the_teacher_sees_its_own_view_and_no_gradient(double, text_teacher, teacher_rate):
    """The brute-force ViT at the teacher's keep rate, whatever the student's."""
    cfg = config(text_teacher=text_teacher, text_grad="online", teacher_keep_rate=teacher_rate, keep_rate=0.5)
    model, (image, text) = make(cfg, double), batch(3, double)
    u_bar, v_bar = model.teach(image, text)
    wanted = brute_force_vit(model.momentum, SIZE, image, teacher_rate, True)
    assert not u_bar.requires_grad
    torch.testing.assert_close(u_bar, wanted / wanted.norm(dim=1, keepdim=True))
    if text_teacher == "shared":
        assert v_bar is None
    else:
        assert not v_bar.requires_grad and (v_bar - model.online.encode_text(text)).norm() > 1e-3


# ----------------------------------------------------------------- teacher, schedules, optimiser


@pytest.mark.parametrize("text_teacher", ["shared", "momentum"])
def test_update_momentum_closed_form(text_teacher):
    model = make(config(text_teacher=text_teacher, text_grad="online"))
    pairs = [(model.momentum, model.online.visual)]
    if text_teacher == "momentum":
        pairs.append((model.momentum_text, model.online))
    for m in (1.0, 0.994, 0.9, 0.0):
        before = [{n: p.clone() for n, p in teacher.named_parameters()} for teacher, _ in pairs]
        model.update_momentum(m)
        for (teacher, student), old in zip(pairs, before):
            new = dict(student.named_parameters())
            assert "proj" in old or "text_projection" in old
            for name, p in teacher.named_parameters():
                torch.testing.assert_close(p, m * old[name] + (1 - m) * new[name], rtol=1e-6, atol=1e-7)
                assert m > 0 or torch.equal(p, new[name])


@pytest.mark.parametrize("text_teacher", ["shared", "momentum"])
def test_teacher_at_the_start(text_teacher):
    model = eclipse.ECLIPSE(config(text_teacher=text_teacher, keep_rate=1.0), SIZE)
    image, text = batch(4)
    for p, q in zip(model.momentum.parameters(), model.online.visual.parameters()):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
        assert q.requires_grad and not p.requires_grad
    u_bar, v_bar = model.teach(image, text)
    assert torch.equal(u_bar, model.online.encode_image(image))
    assert v_bar is None or torch.equal(v_bar, model.online.encode_text(text))
    assert not model.momentum.training
    assert any(name.startswith("momentum.") for name in model.state_dict())


def test_update_is_adamw_then_clamp():
    """One update against AdamW's closed first step, after decay of matrices."""
    cfg = config(text_teacher="momentum", text_grad="online")
    model = make(cfg)
    optimiser = eclipse.build_optimiser(model, cfg, torch.device("cpu"))
    found = run_backward(model, *batch(6))[2]
    assert found.keys() == {f"online.{name}" for name, _ in model.online.named_parameters()}
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    eclipse.update(model, optimiser, SCALER, lr=0.01)
    for name, p in model.named_parameters():
        if name not in found:
            assert torch.equal(p, old[name])  # the teacher
            continue
        decay = 0.2 if old[name].ndim >= 2 else 0.0
        first = found[name] / (found[name].abs() + 1e-8)  # what Adam's first step is
        wanted = old[name] * (1 - 0.01 * decay) - 0.01 * first
        torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-5, msg=name)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value, gradient, wanted",
                         [(math.log(100), -1.0, math.log(100)), (0.001, 1.0, 0.0), (2.0, 1.0, 1.9)])
def test_logit_scale_is_clamped_after_the_update(value, gradient, wanted):
    model = eclipse.ECLIPSE(config(), SIZE)
    assert model.online.logit_scale.item() == pytest.approx(2.65926, abs=1e-5)  # ln 1/0.07
    optimiser = eclipse.build_optimiser(model, config(), torch.device("cpu"))
    with torch.no_grad():
        model.online.logit_scale.fill_(value)
    model.online.logit_scale.grad = torch.tensor(gradient)
    eclipse.update(model, optimiser, SCALER, lr=0.1)
    assert model.online.logit_scale.item() == pytest.approx(wanted, abs=1e-6)


def test_learning_rate_schedule():
    """Straight from 1e-6 over 2 epochs of 10 steps, then half a cosine to 1e-5 at step 100."""
    lr = [eclipse.learning_rate(1e-3, step, 100, 20) for step in range(101)]
    wanted = np.concatenate([np.linspace(1e-6, 1e-3, 21)[:-1],
                             5.05e-4 + 4.95e-4 * np.cos(np.linspace(0, np.pi, 81))])
    np.testing.assert_allclose(lr, wanted, rtol=1e-9)
    short = [eclipse.learning_rate(1e-3, step, 10, 10) for step in range(11)]  # --epochs 1
    assert short[2] == max(short) and short[-1] == pytest.approx(1e-5)


@pytest.mark.parametrize("ramp, wanted", [((0.2, 0.6), [0, 0, 0, 0.5, 1, 1.5, 2, 2, 2, 2, 2]),
                                          ((0.3, 0.3), [0, 0, 0, *[2] * 8]), ((0.0, 0.0), [2] * 11)])
def test_distillation_ramp(ramp, wanted):
    cfg = config(kd_weight=2.0, kd_ramp=ramp)
    weights = [eclipse.schedules(cfg, step, 10, 10)["kd_weight"] for step in range(11)]
    np.testing.assert_allclose(weights, wanted, atol=1e-12)


@pytest.mark.parametrize("flags", [["--text-teacher", "momentum", "--text-grad", "both"], ["--kd-ramp", "0.5"]])
def test_flags_that_contradict_each_other(flags):
    with pytest.raises(UserError, match=flags[0]):
        eclipse.configure(flags)


def test_plain_clip_is_not_pruned():
    assert eclipse.configure(["--method", "clip"])[0].keep_rate == 1.0
    assert eclipse.configure(["--method", "clip+evit"])[0].keep_rate == 0.7


# ------------------------------------------- the same gradient: chunks, recomputation, compiler


ACCUM = [dict(text_grad=t) for t in ("momentum", "online", "both")]
ACCUM += [dict(text_grad="online", text_teacher="momentum"), dict(method="clip"),
          dict(grad_checkpoint=True), dict(teacher_keep_rate=0.5)]


@pytest.mark.parametrize("count, accum", [(8, 4), (9, 4)])
@pytest.mark.parametrize("changes", ACCUM, ids=str)
def test_accumulation_gives_the_whole_batch_gradient(double, changes, count, accum):
    cfg = config(**changes)
    model, (image, text) = make(cfg, double), batch(count, double)
    loss, terms, wanted = run_backward(model, image, text)
    model.cfg = replace(cfg, accum=accum)
    eclipse.prepare_towers(model, model.cfg)
    chunked_loss, chunked_terms, found = run_backward(model, image, text)
    assert found["online.logit_scale"].abs() > 0
    assert_same(found, wanted, 1e-10)
    assert_same({"loss": chunked_loss, **chunked_terms}, {"loss": loss, **terms}, 1e-10)


def test_gradient_checkpointing_changes_nothing(monkeypatch):
    cfg, calls = config(), []
    model, (image, text) = make(cfg), batch(6)
    wanted = run_backward(model, image, text)[2]
    recompute = eclipse.checkpoint

    def counted(*args, **kwargs):
        calls.append(args)
        return recompute(*args, **kwargs)

    monkeypatch.setattr(eclipse, "checkpoint", counted)
    eclipse.prepare_towers(model, replace(cfg, grad_checkpoint=True))
    assert_same(run_backward(model, image, text)[2], wanted, 1e-6)
    assert len(calls) == SIZE.vision_layers + SIZE.text_layers  # every online block, none of the teacher


def test_compiled_towers_give_the_same_gradient(monkeypatch):
    """By aot_eager, torch.compile without its code generator: the graphs, forward and backward."""
    size = replace(SIZE, image_size=24, vision_layers=3, text_layers=1)
    cfg = config(compile=True)
    model, (image, text) = make(cfg, size=size), batch(4, size=size)
    loss, _, wanted = run_backward(model, image, text)
    names = model.state_dict().keys()
    torch._dynamo.reset()
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_in_place(module, backend="aot_eager"))
    eclipse.prepare_towers(model, cfg)
    compiled_loss, _, found = run_backward(model, image, text)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=0)
    assert_same(found, wanted, 1e-4)
    assert model.state_dict().keys() == names
    torch._dynamo.reset()


# ------------------------------------------------------ mixed precision, no wait for the device


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.03), ("fp16", 0.004)])
@pytest.mark.parametrize("accum", [1, 2])
def test_mixed_precision_is_close_to_fp32(precision, tolerance, accum):
    cfg = config(accum=accum, keep_rate=1.0)  # at less, rounding may drop other tokens
    torch.manual_seed(0)
    model, (image, text) = eclipse.ECLIPSE(cfg, SIZE), batch(8)
    loss, _, wanted = run_backward(model, image, text)
    amp, scaler = common.mixed_precision(precision, torch.device("cpu"))
    assert scaler.is_enabled() == (precision == "fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=256, enabled=scaler.is_enabled())
    lower_loss, _, found = run_backward(model, image, text, amp=amp, scaler=scaler)
    assert lower_loss.dtype == torch.float32 and lower_loss != loss
    assert lower_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert {g.dtype for g in found.values()} == {torch.float32}
    for name in (n for n in found if wanted[n].ndim > 1):
        error = (found[name] / scaler.get_scale() - wanted[name]).norm() / wanted[name].norm()
        assert error < 2 * tolerance, name


STEPS = [dict(), dict(accum=2), dict(grad_checkpoint=True), dict(method="clip+evit", fuse=False),
         dict(text_teacher="momentum", text_grad="online")]


@pytest.mark.parametrize("changes", STEPS, ids=str)
def test_a_step_never_reads_a_value_back(changes):
    """On the meta device nothing can be read back, copied to the host, or depend on a value."""
    if "grad_checkpoint" in changes and torch.__version__.startswith("2.4"):
        pytest.skip("the checkpoint function of torch 2.4 knows no meta device")
    cfg = config(**changes)
    model, image, text = (part.to("meta") for part in (eclipse.ECLIPSE(cfg, SIZE), *batch(4)))
    optimiser = eclipse.build_optimiser(model, cfg, image.device)
    eclipse.prepare_towers(model, cfg)
    _, terms, _ = run_backward(model, image, text)
    eclipse.update(model, optimiser, SCALER, 1e-3)
    model.update_momentum(0.9)
    assert all(not value.requires_grad and value.shape == () for value in terms.values())


# ------------------------------------------------------------------- one method script and another


SAME = ["QuickGELU", "Attention", "Block", "Transformer", "VisionTransformer", "unit", "CLIP", "similarities",
        "match", "info_nce", "similarity_kl", "build_optimiser", "learning_rate", "backward", "update", "crop_scale",
        "encoder_pair", "prepare_towers"]


@pytest.mark.parametrize("name", SAME)
def test_what_both_clip_scripts_need_is_the_same_to_the_letter(name):
    import clip_cid
    assert inspect.getsource(getattr(eclipse, name)) == inspect.getsource(getattr(clip_cid, name))
