"""eclipse.py, and the checkpoints and evaluation of common.py it rests on, against independent references.

Public implementations (open_clip, transformers, safetensors, scikit-learn; a test is skipped where its reference is not
installed), closed forms, and brute-force versions written here: one sample, one head, one token at a time.
"""

import contextlib
import io
import itertools
import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import common
import eclipse
from common import BadSample, UserError

# --------------------------------------------------------------------------------------------------------- small models

SMALL = dict(image_size=32, patch_size=8, vision_width=64, vision_layers=4, vision_heads=2, vision_mlp=96, embed_dim=32,
             text_width=64, text_layers=2, text_heads=2, context_length=12, vocab_size=100,
             keep_rate=0.7, text_grad="both", kd_ramp=(0.0, 0.0), ema=0.995)  # whatever the defaults are tuned to
SCALER = torch.amp.GradScaler("cpu", enabled=False)
NOW = {"keep_rate": 0.7, "kd_weight": 1.0}


@pytest.fixture
def double(monkeypatch):
    """float64 throughout: .float(), which lifts bf16 features to fp32, would cut them down."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return torch.float64


def config(**changes):
    return eclipse.Config(**{**SMALL, **changes})


def randomise(module, seed=0):
    """No parameter keeps a value (0, 1) under which mixing it up with another would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return module


def make(cfg, dtype=torch.float32, seed=0):
    """A model whose teacher differs from its student and whose attention has preferences."""
    torch.manual_seed(seed)
    method = randomise(eclipse.build(cfg), seed)
    with torch.no_grad():
        for tower in filter(None, (method.online.visual, method.momentum)):
            for block in tower.transformer.resblocks:
                block.attn.in_proj_weight[:2 * cfg.vision_width] *= 2.5
    return method.to(dtype)


def batch(cfg, count, dtype=torch.float32, seed=0):
    """Random pixels, and texts whose largest token, the end, stands at a random place."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, cfg.image_size, cfg.image_size, generator=generator)
    text = torch.randint(1, cfg.vocab_size - 1, (count, cfg.context_length), generator=generator)
    for row in text:
        end = int(torch.randint(1, cfg.context_length, (1,), generator=generator))
        row[end], row[end + 1:] = cfg.vocab_size - 1, 0
    return image.to(dtype), text


def gradients(method):
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def run_backward(method, image, text, now=None, seed=7, amp=None, scaler=SCALER):
    """(loss, terms, gradients) of one batch."""
    method.zero_grad(set_to_none=True)
    terms = eclipse.backward(method, image, text, now or NOW, amp or contextlib.nullcontext(), scaler, seed)
    return terms["loss"], terms, gradients(method)


def assert_same(found, wanted, tolerance):
    """Two dicts of tensors, each within `tolerance` of the norm of its reference."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        error = (found[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


# ---------------------------------------------------------------------------------- 1. towers and published checkpoints


@pytest.fixture(scope="module")
def open_clip():
    common.import_torchvision()
    return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def transformers():
    common.import_torchvision()
    return pytest.importorskip("transformers")


def open_clip_model(open_clip, quick_gelu=True, patch=8, size=32, width=128, text=64, layers=2, embed=48, **vision):
    torch.manual_seed(0)
    vision = dict(layers=layers, width=width, head_width=64, patch_size=patch, image_size=size, **vision)
    text = dict(layers=layers, width=text, heads=text // 64, context_length=12, vocab_size=100)
    return randomise(open_clip.model.CLIP(embed, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text),
                                          quick_gelu=quick_gelu)).eval()


def load(path, act=None, **changes):
    """What --evaluate does: (method, config) of a checkpoint."""
    weights, sizes = common.read_clip(path, act)
    cfg = eclipse.Config(**{"method": "clip", "keep_rate": 1.0, **sizes, **changes})
    return eclipse.build(cfg, weights).eval(), cfg


@torch.no_grad()
def assert_towers_equal(method, cfg, image_reference, text_reference, monkeypatch, count=5):
    """Outputs before normalisation, the stricter comparison here: their coordinates are of the size of 1."""
    image, text = batch(cfg, count)
    for found, reference, source in ((method.online.encode_image, image_reference, image),
                                     (method.online.encode_text, text_reference, text)):
        wanted = reference(source)
        assert wanted.std() > 0.1  # else the tolerance would mean little
        torch.testing.assert_close(found(source), F.normalize(wanted, dim=-1), rtol=0, atol=1e-5)
        with monkeypatch.context() as patched:
            patched.setattr(F, "normalize", lambda x, dim: x)
            torch.testing.assert_close(found(source), wanted, rtol=0, atol=1e-5 * max(1, wanted.abs().max().item()))


SHAPES = [dict(quick_gelu=True, patch=8, size=32, width=128), dict(quick_gelu=False, patch=8, size=40, width=64),
          dict(quick_gelu=True, patch=16, size=64, width=192, text=128, layers=3),
          dict(quick_gelu=False, patch=32, size=64, width=128, embed=64, mlp_ratio=3.0)]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_towers_equal_open_clip(open_clip, tmp_path, monkeypatch, shape, wrapped):
    model, path = open_clip_model(open_clip, **shape), tmp_path / "model.pt"
    weights = model.state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in weights.items()}} if wrapped else weights, path)
    method, cfg = load(path, "quick_gelu" if shape["quick_gelu"] else None)
    assert (cfg.vision_heads, cfg.image_size, cfg.patch_size) == (shape["width"] // 64, shape["size"], shape["patch"])
    assert_towers_equal(method, cfg, model.encode_image, model.encode_text, monkeypatch)
    assert method.online.logit_scale.item() == model.logit_scale.item()


def test_the_activation_matters_and_comes_from_open_clip_config(open_clip, tmp_path, monkeypatch):
    model, path = open_clip_model(open_clip), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    method, cfg = load(path)
    assert cfg.act == "gelu"
    image, _ = batch(cfg, 2)
    assert (method.online.visual(image) - model.encode_image(image)).abs().max() > 1e-3
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    method, cfg = load(path)
    assert_towers_equal(method, cfg, model.encode_image, model.encode_text, monkeypatch)


@pytest.mark.parametrize("size", [16, 48])
def test_another_image_size_resizes_the_positions_as_open_clip_does(open_clip, tmp_path, monkeypatch, size):
    path = tmp_path / "model.pt"
    weights = open_clip_model(open_clip).state_dict()
    torch.save(weights, path)
    model = open_clip_model(open_clip, size=size)
    resized = dict(weights)
    open_clip.model.resize_pos_embed(resized, model)
    model.load_state_dict(resized)
    method, cfg = load(path, "quick_gelu", image_size=size)
    assert_towers_equal(method, cfg, model.encode_image, model.encode_text, monkeypatch)


@pytest.mark.filterwarnings("ignore")  # torch announces the end of TorchScript
def test_openai_archive(open_clip, tmp_path, monkeypatch):
    """TorchScript, fp16 weights, and three integers beside them; the activation is QuickGELU without being told."""
    model = open_clip_model(open_clip).half().float()
    archive = open_clip_model(open_clip).half()
    archive.attn_mask = archive._buffers.pop("attn_mask")  # theirs is no buffer
    for name, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 100)):
        archive.__dict__.pop(name, None)
        archive.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.script(archive), tmp_path / "openai.pt")
    method, cfg = load(tmp_path / "openai.pt")
    assert (cfg.act, cfg.pixel_stats) == ("quick_gelu", "clip")
    assert_towers_equal(method, cfg, model.encode_image, model.encode_text, monkeypatch)


def hugging_face_model(transformers, act, heads=1, **changes):
    shared = dict(intermediate_size=256, num_hidden_layers=2, hidden_act=act, num_attention_heads=heads)
    torch.manual_seed(0)
    return randomise(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(shared, hidden_size=64, vocab_size=100, max_position_embeddings=12, bos_token_id=98,
                         eos_token_id=99, pad_token_id=0),
        vision_config=dict(shared, hidden_size=64, image_size=32, patch_size=8), projection_dim=48, **changes))).eval()


def hugging_face_encoders(model):
    return (lambda image: model.visual_projection(model.vision_model(pixel_values=image).pooler_output),
            lambda text: model.text_projection(model.text_model(input_ids=text).pooler_output))


@pytest.mark.parametrize("act, heads", [("quick_gelu", 1), ("gelu", 1), ("quick_gelu", 4)])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_towers_equal_transformers(transformers, tmp_path, monkeypatch, act, heads, file):
    model = hugging_face_model(transformers, act, heads)
    model.save_pretrained(tmp_path)
    if file.endswith("bin"):  # save_pretrained no longer writes it; old ones held the position ids too
        ids = {f"{t}_model.embeddings.position_ids": torch.arange(n)[None] for t, n in (("text", 12), ("vision", 17))}
        torch.save({**model.state_dict(), **ids}, tmp_path / file)
    method, cfg = load(tmp_path / file)
    assert (cfg.act, cfg.vision_heads, cfg.text_heads) == (act, heads, heads)
    assert_towers_equal(method, cfg, *hugging_face_encoders(model), monkeypatch)


def test_hugging_face_config_that_leaves_out_its_defaults(transformers, tmp_path, monkeypatch):
    """transformers 4 wrote only what differs from the defaults, among them hidden_act = quick_gelu."""
    hugging_face_model(transformers, "quick_gelu").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        del content[part]["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert model.config.vision_config.hidden_act == "quick_gelu"
    method, cfg = load(tmp_path / "model.safetensors")
    assert_towers_equal(method, cfg, *hugging_face_encoders(model), monkeypatch)


def test_an_activation_we_do_not_have_is_an_error(transformers, tmp_path):
    hugging_face_model(transformers, "gelu_pytorch_tanh").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gelu_pytorch_tanh"):
        load(tmp_path / "model.safetensors")


def test_full_size_vit_b32(open_clip, tmp_path, monkeypatch):
    """The published shape, through a file of fp16 weights."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(512, open_clip.CLIPVisionCfg(layers=12, width=768, patch_size=32, image_size=224),
                                 open_clip.CLIPTextCfg(), quick_gelu=True).eval()
    weights = {n: t.half() for n, t in model.state_dict().items()}
    model.load_state_dict(weights)
    torch.save(weights, tmp_path / "b32.pt")
    method, cfg = load(tmp_path / "b32.pt", "quick_gelu")
    sizes = {**eclipse.PRESETS["vit_b32"], "act": "quick_gelu"}
    assert sizes == {name: getattr(cfg, name) for name in sizes}
    assert_towers_equal(method, cfg, model.encode_image, model.encode_text, monkeypatch, count=2)


def test_our_own_checkpoint_evaluates_as_it_was_trained(tmp_path):
    """--evaluate gives both encoders, --init the student twice."""
    cfg = config(vision_heads=4, text_heads=1, act="gelu", fuse=False, keep_rate=0.6)
    method, (image, text) = make(cfg), batch(cfg, 3)
    torch.save({"model": method.state_dict(), "config": eclipse.asdict(cfg)}, tmp_path / "best.pt")
    for flag in ("--evaluate", "--init"):
        found, weights = eclipse.configure([flag, str(tmp_path / "best.pt")])
        loaded = eclipse.build(found, weights)
        assert (found.vision_heads, found.text_heads, found.act, found.pixel_stats) == (4, 1, "gelu", "imagenet")
        assert torch.equal(loaded.online.encode_text(text), method.online.encode_text(text))
        assert torch.equal(loaded.online.visual(image), method.online.visual(image))
        teacher = method.momentum if flag == "--evaluate" else method.online.visual
        assert torch.equal(loaded.momentum(image), teacher(image))
        if flag == "--evaluate":
            assert (found.fuse, found.keep_rate) == (False, 0.6)
            assert torch.equal(loaded.online.visual(image, 0.6), method.online.visual(image, 0.6))


@pytest.mark.parametrize("name", ["no such.pt", "text.pt", "table.pt", "text.safetensors", "resnet.pt"])
def test_files_that_are_no_clip_vit_are_user_errors(tmp_path, name):
    if name.startswith("text"):
        (tmp_path / name).write_text("nothing of use")
    elif name == "table.pt":
        torch.save({"a": 1, "b": torch.ones(2)}, tmp_path / name)
    elif name == "resnet.pt":
        torch.save({"visual.conv1.weight": torch.ones(2, 3, 3, 3)}, tmp_path / name)
    with pytest.raises(UserError, match=name.split(".")[0]):
        common.read_clip(tmp_path / name)


def test_a_missing_tensor_is_a_user_error(tmp_path):
    weights = eclipse.CLIP(config(vision_width=64, vision_heads=1, text_heads=1)).state_dict()
    del weights["ln_final.bias"]
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(UserError, match="ln_final.bias"):
        load(tmp_path / "model.pt")


FORMATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
           torch.uint8, torch.bool]


def test_safetensors_reader_equals_the_package(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{dtype}/{shape}": torch.randint(0, 100, shape, generator=generator).to(dtype)
               for dtype in FORMATS for shape in ((), (3,), (0,), (2, 0, 3), (2, 3, 5))}
    package.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "é"})
    wanted = package.load_file(tmp_path / "x.safetensors")
    found, stored_config = common.read_weights(tmp_path / "x.safetensors")
    assert stored_config is None and found.keys() == wanted.keys() == tensors.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and found[name].shape == wanted[name].shape, name
        assert torch.equal(found[name], wanted[name]), name
    package.save_file({"x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="C64"):
        common.read_weights(tmp_path / "c.safetensors")


# -------------------------------------------------------------------------------------------------- 2. one InfoNCE step


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_step_equals_open_clip(open_clip, tmp_path, quick_gelu):
    from open_clip.loss import ClipLoss

    model = open_clip_model(open_clip, quick_gelu).train()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    method, cfg = load(tmp_path / "model.pt", "quick_gelu" if quick_gelu else "gelu")
    image, text = batch(cfg, 8)
    wanted = ClipLoss()(*model(image, text))
    wanted.backward()
    loss, _, found = run_backward(method, image, text, {"keep_rate": 1.0, "kd_weight": 1.0})
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=0)
    assert_same({name.removeprefix("online."): g for name, g in found.items()}, gradients(model), 1e-5)


# -------------------------------------------------------------------------------------------------------------- 3. EViT


def brute_force_block(block, x, numbers, keep_rate, fuse, quick):
    """One EViT block on the tokens (N, D) of one sample; numbers says which patch each token after CLS is."""
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
        rows, numbers = [x[0]] + [x[token] for token in kept], [numbers[token - 1] for token in kept]
        if fuse and dropped:
            rows.append(sum(score[token] * x[token] for token in dropped))
            numbers.append(-1)
        x = torch.stack(rows)
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    h = (h * block.ln_2.weight + block.ln_2.bias) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    h = h * torch.sigmoid(1.702 * h) if quick else h * (1 + torch.erf(h / math.sqrt(2))) / 2
    return x + h @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias, numbers


def brute_force_vit(tower, cfg, image, keep_rate, prune_blocks):
    """(B, E), and per pruning block and sample the numbers of the patches left, -1 for the fused token."""
    outputs, traces, P = [], [[] for _ in prune_blocks], cfg.patch_size
    for sample in image:
        patches = [sample[:, r:r + P, c:c + P].flatten() for r in range(0, cfg.image_size, P)
                   for c in range(0, cfg.image_size, P)]
        x = torch.stack([tower.class_embedding] + [tower.conv1.weight.flatten(1) @ patch for patch in patches])
        x = F.layer_norm(x + tower.positional_embedding, x.shape[-1:], tower.ln_pre.weight, tower.ln_pre.bias)
        numbers = list(range(len(patches)))
        for i, block in enumerate(tower.transformer.resblocks):
            rate = keep_rate if i in prune_blocks else 1.0
            x, numbers = brute_force_block(block, x, numbers, rate, cfg.fuse, cfg.act == "quick_gelu")
            if i in prune_blocks:
                traces[prune_blocks.index(i)].append(numbers)
        outputs.append(F.layer_norm(x[0], x[0].shape, tower.ln_post.weight, tower.ln_post.bias) @ tower.proj)
    return torch.stack(outputs), traces


EVIT = [dict(keep_rate=k, fuse=fuse) for k in (0.9, 0.7, 0.5, 0.3) for fuse in (True, False)]
EVIT += [dict(keep_rate=0.6, prune_blocks=(0, 1, 2), act="gelu"), dict(keep_rate=0.4, prune_blocks=(3,)),
         dict(keep_rate=0.97), dict(keep_rate=0.05, vision_heads=8)]


@pytest.mark.parametrize("changes", EVIT, ids=str)
def test_pruned_vit_equals_brute_force(double, changes):
    cfg = config(**changes)
    tower = make(cfg, double).online.visual
    image = batch(cfg, 4, double)[0].requires_grad_()
    direction = torch.randn(4, cfg.embed_dim, dtype=double, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (lambda: (tower(image, cfg.keep_rate, trace), trace),
                    lambda: brute_force_vit(tower, cfg, image, cfg.keep_rate, cfg.prune_blocks or (1, 2, 3))):
        trace, image.grad = [], None
        tower.zero_grad(set_to_none=True)
        output, trace = forward()
        (output * direction).sum().backward()
        results.append((output.detach(), [[sorted(map(int, row)) for row in step] for step in trace],
                        {**gradients(tower), "image": image.grad}))
    (found, found_trace, found_gradients), (wanted, wanted_trace, wanted_gradients) = results
    assert_same({"output": found}, {"output": wanted}, 1e-10)
    assert_same(found_gradients, wanted_gradients, 1e-9)
    assert found_trace == wanted_trace


def test_the_fused_token_competes():
    """Among the brute-force cases are samples whose earlier fused token is kept, and some where it is fused again."""
    cfg, kept_again = config(keep_rate=0.5), set()
    image, trace = batch(cfg, 16)[0], []
    make(cfg).online.visual(image, cfg.keep_rate, trace)
    for row in trace[1].tolist():
        assert row[-1] == -1 and row.count(-1) in (1, 2)
        kept_again.add(row.count(-1) == 2)
    assert kept_again == {True, False}


def test_fusion_closed_form(double):
    """Σ a_i x_i over the dropped tokens, not divided by Σ a_i; its gradient reaches exactly the dropped a_i."""
    x = torch.arange(12, dtype=double).view(1, 6, 2).requires_grad_()
    a = torch.tensor([[0.1, 0.4, 0.05, 0.2, 0.15]], dtype=double, requires_grad=True)  # CLS keeps 0.1 for itself
    out, kept = eclipse.reorganise_tokens(x, a, 0.6, True, "attention")
    assert kept.tolist() == [[1, 3, 4]]
    fused = 0.1 * x[0, 1] + 0.05 * x[0, 3]
    torch.testing.assert_close(out[0], torch.stack([x[0, 0], x[0, 2], x[0, 4], x[0, 5], fused]))
    out[0, -1].sum().backward()
    torch.testing.assert_close(a.grad, torch.tensor([[2 + 3, 0, 6 + 7, 0, 0]], dtype=double))
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor([0, 0.1, 0, 0.05, 0, 0], dtype=double))


@pytest.mark.parametrize("fuse", [True, False])
def test_ties_keep_the_right_number_and_lose_nothing(fuse):
    """Which of equal tokens stays is open; that exactly K stay and the others are all fused is not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 17, 8, generator=generator)
    a = torch.randint(0, 3, (5, 16), generator=generator) / 48
    a[0] = 1 / 16
    out, kept = eclipse.reorganise_tokens(x, a, 0.4, fuse, "attention")
    for sample, row in enumerate(kept.tolist()):
        dropped = sorted(set(range(16)) - set(row))
        assert len(set(row)) == len(row) == 7 and a[sample, row].min() >= a[sample, dropped].max()
        wanted = [x[sample, 0], *x[sample, 1:][row]] + [sum(a[sample, i] * x[sample, 1 + i] for i in dropped)] * fuse
        torch.testing.assert_close(out[sample], torch.stack(wanted))


def test_random_pruning_ignores_the_attention_but_fuses_by_it():
    torch.manual_seed(0)
    x, a, counts = torch.randn(400, 11, 3), torch.arange(10.0).expand(400, 10) / 45, torch.zeros(10)
    out, kept = eclipse.reorganise_tokens(x, a, 0.5, True, "random")
    for sample, row in enumerate(kept.tolist()):
        assert len(set(row)) == 5
        counts[row] += 1 / 400
        fused = sum(a[sample, i] * x[sample, 1 + i] for i in set(range(10)) - set(row))
        torch.testing.assert_close(out[sample, -1], fused)
    assert (counts - 0.5).abs().max() < 0.1  # four standard deviations


B16 = {1.0: (17.56, [197, 197, 197]), 0.9: (15.39, None), 0.8: (13.33, None), 0.7: (11.61, [140, 100, 72]),
       0.6: (10.09, None), 0.5: (8.82, [100, 52, 28]), 0.4: (7.78, None)}


def test_cost_and_token_counts_of_vit_b16():
    """GMACs of the table in the notes, which were counted by hand; the meta device computes shapes only."""
    with torch.device("meta"):
        visual = eclipse.VisionTransformer(config(**eclipse.PRESETS["vit_b16"]))
        for keep_rate, (wanted, wanted_tokens) in B16.items():
            macs, tokens = eclipse.forward_cost(visual, torch.empty(1, 3, 224, 224), keep_rate)
            assert macs / 1e9 == pytest.approx(wanted, rel=0.001)
            assert wanted_tokens is None or tokens == wanted_tokens
    assert visual.prune_blocks == (3, 6, 9)


def test_keep_rate_1_is_the_plain_vit_to_the_bit(monkeypatch):
    cfg = config()
    method, image = make(cfg), batch(cfg, 4)[0]
    tower = method.online.visual
    found, nothing_dropped = tower(image, 1.0), tower(image, 0.97)
    monkeypatch.setattr(eclipse, "reorganise_tokens", None)  # calling it would fail
    for blocks in ((), (0,), (0, 1, 2, 3)):
        tower.prune_blocks = blocks
        assert torch.equal(tower(image, 1.0), found)
    tower.prune_blocks = ()
    assert torch.equal(tower(image, 0.5), found)
    assert torch.equal(nothing_dropped, found)  # ceil(0.97 * 16) = 16


@pytest.mark.parametrize("fuse", [True, False])
def test_trace_gives_original_patch_numbers(fuse):
    """Every patch has a colour of its own and no block changes a token: the tokens left say which patches they are."""
    cfg = config(fuse=fuse, keep_rate=0.6)
    tower, image = make(cfg).online.visual, torch.empty(5, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    for row, column in itertools.product(range(4), range(4)):
        image[:, :, 8 * row:8 * row + 8, 8 * column:8 * column + 8] = torch.randn(5, 3, 1, 1, generator=generator)
    outputs, inputs, trace = [], [], []
    with torch.no_grad():
        tower.positional_embedding.zero_()
        for block in tower.transformer.resblocks:
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                layer.weight.zero_(), layer.bias.zero_()
            block.register_forward_hook(lambda _, __, result: outputs.append(result[0][:, 1:]))
        tower.ln_pre.register_forward_hook(lambda _, __, result: inputs.append(result[:, 1:]))
        tower(image, cfg.keep_rate, trace)
    assert len(trace) == 3 and [t.shape[1] for t in trace] == ([11, 8, 6] if fuse else [10, 6, 4])
    for tokens, numbers in zip(outputs[1:], trace):  # block 0 does not prune
        same = torch.cdist(tokens, inputs[0], compute_mode="donot_use_mm_for_euclid_dist") < 1e-4  # (B, K, 16)
        found = torch.where(same.any(-1), same.int().argmax(-1), -1)
        assert torch.equal(found, numbers)


# ------------------------------------------------------------------------------------------------------------ 4. losses


def two_logits(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, size, size, dtype=torch.float64, generator=generator)
    return tuple(m.clone().requires_grad_() for m in logits)


def test_info_nce_closed_form():
    """-(1/2B) Σ_i [M_ii - log Σ_j e^M_ij] for both matrices; gradient (softmax - identity) / 2B."""
    logits, wanted = two_logits(), 0
    for m in logits:
        for i in range(6):
            wanted -= (m[i, i].item() - math.log(sum(math.exp(value) for value in m[i].tolist()))) / 12
    loss = eclipse.info_nce(logits)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    for m in logits:
        torch.testing.assert_close(m.grad, (m.detach().softmax(-1) - torch.eye(6)) / 12)


def test_distillation_closed_form():
    """(1/2B) Σ p (log p - log q), the teacher's p first; student gradient (q - p) / 2B, teacher gradient none."""
    teacher, student, wanted = two_logits(1), two_logits(2), 0
    for t, s in zip(teacher, student):
        p, q = (np.exp(m.detach().numpy()) for m in (t, s))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        wanted += (p * (np.log(p) - np.log(q))).sum() / 12
    loss = eclipse.distillation(teacher, student)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    for t, s in zip(teacher, student):
        assert t.grad is None
        torch.testing.assert_close(s.grad, (s.detach().softmax(-1) - t.detach().softmax(-1)) / 12)


def test_distillation_and_its_gradient_vanish_where_student_equals_teacher():
    student = two_logits(3)
    loss = eclipse.distillation(student, student)
    loss.backward()
    assert abs(loss.item()) < 1e-14 and max(s.grad.abs().max() for s in student) < 1e-16


# Which loss trains the text encoder in each reading (the table of the notes). KD never does: there the text is sg(v).
TEXT_LOSSES = {"momentum": {"Ā"}, "online": {"A"}, "both": {"A", "Ā"}}
TOTAL_LOSSES = {"momentum": {"A", "Ā"}, "online": {"A"}, "both": {"A", "Ā"}}  # NCE(Ā) has none but the text to train
READINGS = [("momentum", "shared"), ("online", "shared"), ("both", "shared"), ("online", "momentum")]


def reference_gradients(leaves, reading, kd_weight):
    """(loss, gradients of u, v, logit_scale) with one softmax at a time, log-probabilities by logsumexp."""
    u, v, scale, u_bar, v_bar = leaves
    target = v if v_bar is None else v_bar

    def matrix(image, text, text_trains):
        return scale.exp() * image @ (text if text_trains else text.detach()).T

    def nce(m):
        return -(2 * m.diagonal() - m.logsumexp(0) - m.logsumexp(1)).mean() / 2

    def kl(p, q):
        p, q = (m - m.logsumexp(1, keepdim=True) for m in (p.detach(), q))
        return (p.exp() * (p - q)).sum() / len(p)

    losses = {name: nce(matrix(image, text, name in TEXT_LOSSES[reading]))
              for name, image, text in (("A", u, v), ("Ā", u_bar, target))}
    student, teacher = matrix(u, v, False), matrix(u_bar, target, False)
    total = sum(losses[name] for name in TOTAL_LOSSES[reading])
    total = total + kd_weight * (kl(teacher, student) + kl(teacher.T, student.T)) / 2
    return total.detach(), torch.autograd.grad(total, (u, v, scale))


def loss_gradients(method, u, v, u_bar, v_bar, kd_weight):
    total, _ = method.loss(u, v, u_bar, v_bar, kd_weight)
    return total.detach(), torch.autograd.grad(total, (u, v, method.online.logit_scale))


@pytest.fixture(params=READINGS, ids="-".join)
def leaves(request):
    """A method, its reading, and float64 embeddings u, v, scale, ū, v̄ (None when the text encoder is shared)."""
    text_grad, text_teacher = request.param
    method = make(config(text_grad=text_grad, text_teacher=text_teacher), torch.float64)
    u, v, u_bar, v_bar = F.normalize(torch.randn(4, 6, 32, dtype=torch.float64), dim=-1)
    u.requires_grad_(), v.requires_grad_()
    return method, text_grad, (u, v, method.online.logit_scale, u_bar, v_bar if text_teacher == "momentum" else None)


@pytest.mark.parametrize("kd_weight", [0.0, 1.0, 2.5])
def test_loss_and_gradients_of_each_reading(leaves, kd_weight):
    method, reading, (u, v, scale, u_bar, v_bar) = leaves
    wanted, (wanted_u, _, wanted_scale) = reference_gradients((u, v, scale, u_bar, v_bar), reading, kd_weight)
    found, (found_u, _, found_scale) = loss_gradients(method, u, v, u_bar, v_bar, kd_weight)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert_same({"u": found_u, "scale": found_scale}, {"u": wanted_u, "scale": wanted_scale}, 1e-12)


def test_contrastive_gradient_of_the_text_in_each_reading(leaves):
    method, reading, (u, v, scale, u_bar, v_bar) = leaves
    _, (_, wanted, _) = reference_gradients((u, v, scale, u_bar, v_bar), reading, 0.0)
    _, (_, found, _) = loss_gradients(method, u, v, u_bar, v_bar, 0.0)
    assert_same({"v": found}, {"v": wanted}, 1e-12)


def test_distillation_gives_the_text_encoder_no_gradient(leaves):
    """Row KD of the table: student side s<u, sg(v)>, target detached. ALBEF's arm, with v̄ as teacher, trains v too."""
    method, _, (u, v, _, u_bar, v_bar) = leaves
    without, with_kd = (loss_gradients(method, u, v, u_bar, v_bar, w)[1] for w in (0.0, 1.0))
    assert (with_kd[0] - without[0]).norm() > 1e-3
    if method.cfg.text_teacher == "momentum":
        assert (with_kd[1] - without[1]).norm() > 1e-3
    else:
        torch.testing.assert_close(with_kd[1], without[1], rtol=0, atol=1e-12)


def test_the_target_is_detached_with_its_scale(double):
    """d KD / d logit_scale counts the student's side only: Σ_ij (q - p)_ij A_ij / 2B over both directions."""
    method = make(config(text_grad="online"), double)
    u, v, u_bar = F.normalize(torch.randn(3, 6, 32, dtype=double), dim=-1)
    with torch.no_grad():
        a, target = (method.online.logit_scale.exp() * image @ v.T for image in (u, u_bar))
        wanted = sum(((s.softmax(1) - t.softmax(1)) * s).sum() for s, t in ((a, target), (a.T, target.T))) / 12
    u.requires_grad_(), v.requires_grad_()
    without, with_kd = (loss_gradients(method, u, v, u_bar, None, weight)[1][2] for weight in (0.0, 1.0))
    torch.testing.assert_close(with_kd - without, wanted)


@pytest.mark.parametrize("reading", [*READINGS, ("both", "clip")], ids="-".join)
def test_who_has_gradients_after_backward(reading):
    """Both trained towers and the scale in every parameter, the momentum encoders in none."""
    text_grad, teacher = reading
    cfg = config(method="clip") if teacher == "clip" else config(text_grad=text_grad, text_teacher=teacher)
    method = make(cfg)
    _, terms, found = run_backward(method, *batch(cfg, 6))
    assert found.keys() == {f"online.{name}" for name, _ in method.online.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    assert (method.momentum_text is not None) == (teacher == "momentum")
    assert set(terms) == {"loss", "nce_online"} | (set() if teacher == "clip" else {"nce_momentum", "kd"})


def test_text_gradient_of_reading_momentum_ignores_the_online_encoder():
    """The paper's stop-gradient, through the towers: change the online image encoder, the text gradient stays."""
    cfg, texts = config(text_grad="momentum"), []
    for seed in (0, 1):
        method = make(cfg)
        randomise(method.online.visual, seed)
        found = run_backward(method, *batch(cfg, 6))[2]
        texts.append({n: g for n, g in found.items() if "visual" not in n and "logit_scale" not in n})
    assert_same(texts[0], texts[1], 1e-6)


@pytest.mark.parametrize("text_teacher, teacher_rate", [("shared", 1.0), ("momentum", 1.0), ("shared", 0.4)])
def test_the_teacher_sees_its_own_view_and_no_gradient(double, text_teacher, teacher_rate):
    """ū is the brute-force ViT at the teacher's keep rate, whatever the student's."""
    cfg = config(text_teacher=text_teacher, text_grad="online", teacher_keep_rate=teacher_rate, keep_rate=0.5)
    method, (image, text) = make(cfg, double), batch(cfg, 3, double)
    u_bar, v_bar = method.teach(image, text)
    wanted = brute_force_vit(method.momentum, cfg, image, teacher_rate, (1, 2, 3))[0]
    assert not u_bar.requires_grad
    torch.testing.assert_close(u_bar, wanted / wanted.norm(dim=1, keepdim=True))
    if text_teacher == "shared":
        assert v_bar is None
    else:
        assert not v_bar.requires_grad and (v_bar - method.online.encode_text(text)).norm() > 1e-3


def test_momentum_text_needs_text_grad_online():
    with pytest.raises(UserError, match="text-grad"):
        eclipse.check(config(text_teacher="momentum", text_grad="both"), {})


# ---------------------------------------------------------------------------------- 5. teacher, schedules and optimiser


@pytest.mark.parametrize("text_teacher", ["shared", "momentum"])
@pytest.mark.parametrize("m", [0.0, 0.9, 0.995, 1.0])
def test_update_momentum_closed_form(m, text_teacher):
    method = make(config(text_teacher=text_teacher, text_grad="online"))
    pairs = [(method.momentum, method.online.visual)]
    if text_teacher == "momentum":
        pairs.append((method.momentum_text, method.online))
    before = [({n: p.clone() for n, p in teacher.named_parameters()}, dict(student.named_parameters()))
              for teacher, student in pairs]
    method.update_momentum(m)
    for (teacher, _), (old, student) in zip(pairs, before):
        assert "proj" in old or "text_projection" in old
        for name, p in teacher.named_parameters():
            torch.testing.assert_close(p, m * old[name] + (1 - m) * student[name], rtol=1e-6, atol=1e-7)
            assert m > 0 or torch.equal(p, student[name])


@pytest.mark.parametrize("text_teacher", ["shared", "momentum"])
def test_teacher_at_the_start(text_teacher):
    cfg = config(text_teacher=text_teacher, text_grad="online", keep_rate=1.0)
    method, (image, text) = eclipse.build(cfg), batch(cfg, 4)
    for p, q in zip(method.momentum.parameters(), method.online.visual.parameters()):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr() and not p.requires_grad and q.requires_grad
    u_bar, v_bar = method.teach(image, text)
    assert torch.equal(u_bar, method.online.encode_image(image))
    assert v_bar is None or torch.equal(v_bar, method.online.encode_text(text))
    assert not method.momentum.training
    assert any(name.startswith("momentum.") for name in method.state_dict())


def test_teacher_follows_loaded_weights():
    """--init sets the teacher too."""
    cfg = config()
    weights = make(cfg, seed=5).online.state_dict()
    teacher = eclipse.build(cfg, weights).momentum.state_dict()
    assert all(torch.equal(tensor, weights[f"visual.{name}"]) for name, tensor in teacher.items())


def test_clip_has_no_teacher():
    method = eclipse.build(config(method="clip"))
    assert method.momentum is None and method.momentum_text is None


def test_optimiser_leaves_out_the_teacher_and_decays_matrices_only():
    cfg = config(text_teacher="momentum", text_grad="online", weight_decay=0.3)
    method = eclipse.build(cfg)
    groups = eclipse.build_optimiser(method, cfg, torch.device("cpu")).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in method.named_parameters():
        if name.startswith("online."):
            vector = name.endswith(("bias", "class_embedding", "logit_scale")) or ".ln_" in name
            assert decay.pop(id(p)) == (0.0 if vector else 0.3), name
    assert not decay
    assert all(group["betas"] == (0.9, cfg.beta2) and group["eps"] == cfg.adam_eps for group in groups)


def test_update_is_adamw_then_clamp_then_ema():
    """One update against AdamW's closed first step, lr * sign of the gradient, after decay."""
    cfg = config(weight_decay=0.2, adam_eps=1e-12)
    method = make(cfg)
    optimiser = eclipse.build_optimiser(method, cfg, torch.device("cpu"))
    found = run_backward(method, *batch(cfg, 6))[2]
    old = {n: p.detach().clone() for n, p in method.named_parameters()}
    eclipse.update(method, optimiser, SCALER, lr=0.01, ema=0.9)
    new = dict(method.named_parameters())
    for name, gradient in found.items():
        decay = 0.2 if old[name].ndim >= 2 else 0.0
        wanted = old[name] * (1 - 0.01 * decay) - 0.01 * gradient.sign() * (gradient.abs() > 1e-9)
        close = torch.isclose(new[name], wanted, rtol=1e-5, atol=1e-5) | (gradient.abs() <= 1e-8)
        assert close.all(), name
    for name in (n for n in old if n.startswith("momentum.")):
        student = new[name.replace("momentum.", "online.visual.")]
        torch.testing.assert_close(new[name], 0.9 * old[name] + 0.1 * student, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize("value, gradient, wanted",
                         [(math.log(100), -1.0, math.log(100)), (0.001, 1.0, 0.0), (2.0, 1.0, 1.9)])
def test_logit_scale_is_clamped_after_the_update(value, gradient, wanted):
    cfg = config()
    method = eclipse.build(cfg)
    optimiser = eclipse.build_optimiser(method, cfg, torch.device("cpu"))
    with torch.no_grad():
        method.online.logit_scale.fill_(value)
    method.online.logit_scale.grad = torch.tensor(gradient)
    eclipse.update(method, optimiser, SCALER, lr=0.1, ema=0.9)
    assert method.online.logit_scale.item() == pytest.approx(wanted, abs=1e-6)


def test_logit_scale_starts_at_ln_1_over_007():
    assert eclipse.build(config()).online.logit_scale.item() == pytest.approx(2.65926, abs=1e-5)


def test_learning_rate_schedule():
    """Straight from lr_start to lr over 2 epochs of 10 steps, then half a cosine to lr_end at step 100."""
    cfg = config(lr=1e-3, lr_start=1e-6, lr_end=1e-5, warmup=2.0)
    lr = [eclipse.schedules(cfg, step, 100, 10)["lr"] for step in range(101)]
    assert lr[0] == pytest.approx(1e-6) and lr[20] == pytest.approx(1e-3) and lr[100] == pytest.approx(1e-5)
    assert lr[10] == pytest.approx((1e-6 + 1e-3) / 2) and lr[60] == pytest.approx((1e-3 + 1e-5) / 2)
    wanted = np.concatenate([np.linspace(1e-6, 1e-3, 21)[:-1], 5.05e-4 + 4.95e-4 * np.cos(np.linspace(0, np.pi, 81))])
    np.testing.assert_allclose(lr, wanted, rtol=1e-9)
    assert eclipse.schedules(replace(cfg, warmup=0.0), 0, 100, 10)["lr"] == pytest.approx(1e-3)
    assert math.isfinite(eclipse.schedules(replace(cfg, warmup=10.0), 100, 100, 10)["lr"])


def test_distillation_ramp():
    cfg = config(kd_weight=2.0, kd_ramp=(0.2, 0.6))
    weights = [eclipse.schedules(cfg, step, 10, 10)["kd_weight"] for step in range(11)]
    np.testing.assert_allclose(weights, [0, 0, 0, 0.5, 1, 1.5, 2, 2, 2, 2, 2], atol=1e-12)
    assert {eclipse.schedules(config(), step, 10, 10)["kd_weight"] for step in range(11)} == {1.0}


def test_distillation_ramp_of_no_length_is_a_step():
    """--kd-ramp 0.3 0.3 passes check()."""
    cfg = config(kd_weight=2.0, kd_ramp=(0.3, 0.3))
    eclipse.check(cfg, {})
    assert [eclipse.schedules(cfg, step, 10, 10)["kd_weight"] for step in (0, 2, 3, 9)] == [0, 0, 2, 2]


def test_keep_rate_warm_up():
    cfg = config(keep_rate=0.5, keep_rate_warmup=0.4)
    found = [eclipse.schedules(cfg, step, 10, 10)["keep_rate"] for step in range(11)]
    wanted = [1, *(0.75 + 0.25 * math.cos(math.pi * t / 4) for t in (1, 2, 3)), *[0.5] * 7]
    np.testing.assert_allclose(found, wanted)
    for keep_rate in np.linspace(0.01, 1, 100):  # no rounding lifts a rate above 1
        assert eclipse.schedules(replace(cfg, keep_rate=float(keep_rate)), 0, 10, 10)["keep_rate"] <= 1


def test_ema_schedule():
    const, cosine = config(ema=0.9), config(ema=0.9, ema_schedule="cosine")
    assert [eclipse.schedules(const, step, 10, 10)["ema"] for step in (0, 5, 10)] == [0.9] * 3
    found = [eclipse.schedules(cosine, step, 10, 10)["ema"] for step in (0, 5, 10)]
    np.testing.assert_allclose(found, [0.9, 0.95, 1.0])


# ---------------------------------------------------------------- 6. the same gradient: chunks, recomputation, compiler


ACCUM = [dict(text_grad=t) for t in ("momentum", "online", "both")]
ACCUM += [dict(text_grad="online", text_teacher="momentum"), dict(method="clip"), dict(grad_checkpoint=True),
          dict(teacher_keep_rate=0.5), dict(keep_rate_warmup=0.5)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("changes", ACCUM, ids=str)
def test_accumulation_gives_the_whole_batch_gradient(monkeypatch, changes, dtype, tolerance):
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    cfg = config(**changes)
    method, (image, text) = make(cfg, dtype), batch(cfg, 8, dtype)
    loss, terms, wanted = run_backward(method, image, text)
    method.cfg = replace(cfg, accum=4)
    eclipse.prepare_towers(method, method.cfg)
    chunked_loss, chunked_terms, found = run_backward(method, image, text)
    assert found["online.logit_scale"].abs() > 0
    assert_same(found, wanted, tolerance)
    assert_same({"loss": chunked_loss, **chunked_terms}, {"loss": loss, **terms}, tolerance)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_accumulation_with_random_pruning(double, grad_checkpoint):
    """The reference embeds the chunks with graph, in one pass, from the same seeds."""
    cfg = config(prune_by="random", accum=4, grad_checkpoint=grad_checkpoint)
    method, (image, text) = make(cfg, double), batch(cfg, 8, double)
    parts = []
    for i, (images, texts) in enumerate(zip(image.chunk(4), text.chunk(4))):
        torch.manual_seed(7 + i)
        parts.append(method.embed(images, texts, 0.7))
    u, v = (torch.cat(p) for p in zip(*parts))
    wanted, _ = method.loss(u, v, *method.teach(image, text), 1.0)
    wanted.backward()
    reference = gradients(method)
    eclipse.prepare_towers(method, cfg)
    loss, _, found = run_backward(method, image, text)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert_same(found, reference, 1e-10)
    assert (run_backward(method, image, text, seed=8)[0] - loss).abs() > 1e-6  # another seed, other tokens


@pytest.mark.parametrize("accum", [1, 4])
@pytest.mark.parametrize("teacher_rate", [1.0, 0.5])
def test_random_pruning_depends_on_the_seed_of_the_step_alone(accum, teacher_rate):
    """What --resume needs: random numbers drawn before the step change nothing."""
    cfg = config(prune_by="random", accum=accum, teacher_keep_rate=teacher_rate)
    method, (image, text), losses = make(cfg), batch(cfg, 8), []
    for before in (1, 2):
        torch.manual_seed(before)
        losses.append(run_backward(method, image, text)[0].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("count, accum", [(6, 4), (8, 3), (9, 4)])
def test_accumulation_of_an_uneven_batch(double, count, accum):
    """--accum that does not divide the batch: the same gradient, or a UserError that says so."""
    cfg = config(batch_size=count, accum=accum)
    try:
        eclipse.check(cfg, {})
    except UserError as error:
        assert "accum" in str(error)
        return
    method, (image, text) = make(replace(cfg, accum=1), double), batch(cfg, count, double)
    wanted = run_backward(method, image, text)[2]
    method.cfg = cfg
    assert_same(run_backward(method, image, text)[2], wanted, 1e-10)


@pytest.mark.parametrize("prune_by", ["attention", "random"])
def test_gradient_checkpointing_changes_nothing(monkeypatch, prune_by):
    cfg, calls = config(prune_by=prune_by), []
    method, (image, text) = make(cfg), batch(cfg, 6)
    wanted = run_backward(method, image, text)[2]
    recompute = eclipse.checkpoint
    monkeypatch.setattr(eclipse, "checkpoint", lambda *args, **kwargs: calls.append(1) or recompute(*args, **kwargs))
    eclipse.prepare_towers(method, replace(cfg, grad_checkpoint=True))
    assert_same(run_backward(method, image, text)[2], wanted, 1e-6)
    assert len(calls) == cfg.vision_layers + cfg.text_layers  # every online block, no block of the teacher


def compiled_and_eager(monkeypatch, backend, rates, **changes):
    """Check the compiled towers' loss and gradients against the eager ones, at each keep rate in turn."""
    cfg = config(image_size=24, vision_layers=2, text_layers=1, prune_blocks=(0,), compile=True, **changes)
    method, (image, text) = make(cfg), batch(cfg, 4)
    eager = {rate: run_backward(method, image, text, {**NOW, "keep_rate": rate}) for rate in rates}
    torch._dynamo.reset()
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_in_place(module, backend=backend))
    names = method.state_dict().keys()
    eclipse.prepare_towers(method, cfg)
    for rate, (loss, _, wanted) in eager.items():
        compiled_loss, _, found = run_backward(method, image, text, {**NOW, "keep_rate": rate})
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=0)
        assert_same(found, wanted, 1e-4)
    assert method.state_dict().keys() == names
    assert len({loss.item() for loss, _, _ in eager.values()}) == len(rates)  # the keep rate matters
    torch._dynamo.reset()


def test_traced_towers_give_the_same_gradient(monkeypatch):
    """torch.compile without its code generator: the graphs, forward and backward."""
    compiled_and_eager(monkeypatch, "aot_eager", (1.0, 0.7))


@pytest.mark.skipif("SLOW_TESTS" not in os.environ, reason="a minute or two: set SLOW_TESTS=1")
def test_compiled_towers_give_the_same_gradient(monkeypatch):
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler")
    compiled_and_eager(monkeypatch, "inductor", (1.0, 0.7))


# --------------------------------------------------------------------------- 7. mixed precision, no wait for the device


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.03), ("fp16", 0.004)])
@pytest.mark.parametrize("accum", [1, 2])
def test_mixed_precision_is_close_to_fp32(precision, tolerance, accum):
    cfg = config(precision=precision, accum=accum, keep_rate=1.0)  # at less, rounding may drop other tokens
    torch.manual_seed(0)
    method, (image, text) = eclipse.build(cfg), batch(cfg, 8)
    now = {**NOW, "keep_rate": 1.0}
    loss, _, wanted = run_backward(method, image, text, now)
    amp, scaler = common.mixed_precision(cfg, torch.device("cpu"))
    assert scaler.is_enabled() == (precision == "fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=256, enabled=scaler.is_enabled())  # past the first, skipped steps
    lower_loss, _, found = run_backward(method, image, text, now, amp=amp, scaler=scaler)
    assert lower_loss.dtype == torch.float32 and lower_loss != loss
    assert lower_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert {g.dtype for g in found.values()} == {torch.float32}
    scale = scaler.get_scale()
    for name in (n for n in found if wanted[n].ndim > 1):
        error = (found[name] / scale - wanted[name]).norm() / wanted[name].norm()
        assert error < 2 * tolerance, name


def test_precision_of_a_device():
    amp, scaler = common.mixed_precision(config(), torch.device("cpu"))
    assert isinstance(amp, contextlib.nullcontext) and not scaler.is_enabled()


READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}


class NoReadBack(TorchDispatchMode):
    """Raises on the operators for which the host must wait for the device's values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS or (func.overloadpacket.__name__ == "index" and any(
                index is not None and index.dtype == torch.bool for index in args[1])):
            raise AssertionError(f"{func} reads a value back")
        return func(*args, **(kwargs or {}))


STEPS = [dict(), dict(accum=2), dict(prune_by="random", grad_checkpoint=True), dict(method="clip", fuse=False),
         dict(text_teacher="momentum", text_grad="online", precision="bf16")]


def whole_step(method, cfg, image, text, device):
    amp, scaler = common.mixed_precision(cfg, torch.device("cpu"))
    optimiser = eclipse.build_optimiser(method, cfg, torch.device(device))
    eclipse.prepare_towers(method, cfg)
    for step in range(2):
        now = eclipse.schedules(cfg, step, 10, 5)
        yield now
        terms = eclipse.backward(method, image, text, now, amp, scaler, seed=step)
        eclipse.update(method, optimiser, scaler, now["lr"], now["ema"])
        assert all(not value.requires_grad and value.shape == () for value in terms.values())


@pytest.mark.parametrize("changes", STEPS, ids=str)
def test_a_step_never_reads_a_value_back(changes):
    cfg = config(**changes)
    method, (image, text) = make(cfg), batch(cfg, 4)
    steps = whole_step(method, cfg, image, text, "cpu")
    next(steps)
    with NoReadBack():
        assert len(list(steps)) == 1
    for reading in (lambda: image.sum().item(), lambda: image[image > 0], lambda: bool(image.sum() > 0)):
        with pytest.raises(AssertionError, match="reads a value back"), NoReadBack():
            reading()


@pytest.mark.parametrize("changes", STEPS[:4], ids=str)
def test_a_step_runs_where_there_are_no_values(changes):
    """On the meta device nothing can be read back, copied to the host, or depend on a value."""
    cfg = config(**changes)
    method, (image, text) = eclipse.build(cfg).to("meta"), batch(cfg, 4)
    assert len(list(whole_step(method, cfg, image.to("meta"), text.to("meta"), "meta"))) == 2


# -------------------------------------------------------------------------------------------------------- 8. evaluation


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force_retrieval(images, texts, image_of_text):
    """Recall from whole sorted lists, one query at a time."""
    scores, own = images.double().numpy() @ texts.double().numpy().T, image_of_text.numpy()
    hits = {f"{way}_r{k}": [] for way in ("i2t", "t2i") for k in (1, 5, 10)}
    for k in (1, 5, 10):
        for i, row in enumerate(scores):
            hits[f"i2t_r{k}"].append(any(own[text] == i for text in np.argsort(-row)[:k]))
        for t, column in enumerate(scores.T):
            hits[f"t2i_r{k}"].append(own[t] in np.argsort(-column)[:k])
    return {name: 100 * np.mean(found) for name, found in hits.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [7, 1024])
def test_retrieval_equals_brute_force(seed, block):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.cat([torch.arange(40), torch.randint(0, 40, (90,), generator=generator)])
    image_of_text = owners[torch.randperm(130, generator=generator)]
    images = unit(40, 16, seed=seed)
    texts = F.normalize(images[image_of_text] + 1.5 * unit(130, 16, seed=seed + 10), dim=-1)
    wanted = brute_force_retrieval(images, texts, image_of_text)
    assert 5 < wanted["t2i_r1"] < 95 and wanted["i2t_r1"] != wanted["t2i_r1"]
    assert common.retrieval(images, texts, image_of_text, block) == pytest.approx(wanted)


def test_retrieval_of_an_image_without_caption_is_a_miss():
    found = common.retrieval(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1]))
    assert found["i2t_r1"] == pytest.approx(200 / 3) and found["t2i_r1"] == 100


@pytest.mark.parametrize("count", [20, 33, 101, 250])
def test_collapsed_features_score_zero(count):
    """Every image, or every text, at one point: whatever the order of equal scores, nothing was retrieved."""
    one, many = unit(1, 48).expand(count, -1).contiguous(), unit(count, 48, seed=1)
    for images, texts in ((one, one), (one, many), (many, one)):
        found = common.retrieval(images, texts, torch.arange(count), block=64)
        collapsed = [way for way, of in (("t2i", images), ("i2t", texts)) if of is one]
        assert [found[f"{way}_r{k}"] for way in collapsed for k in (1, 5, 10)] == [0] * 3 * len(collapsed)
    assert common.zero_shot(many, torch.arange(count), one) == {"top1": 0, "top5": 0}


def test_features_that_are_not_numbers_score_zero():
    nan = torch.full((20, 8), math.nan)
    assert set(common.retrieval(nan, nan, torch.arange(20)).values()) == {0.0}
    assert common.zero_shot(nan, torch.arange(20), unit(20, 8)) == {"top1": 0, "top5": 0}


@pytest.mark.parametrize("block", [7, 4096])
def test_zero_shot_equals_top_k_accuracy(block):
    metrics = pytest.importorskip("sklearn.metrics")
    classifier = unit(12, 16)
    labels = torch.randint(0, 12, (200,), generator=torch.Generator().manual_seed(1))
    features = F.normalize(classifier[labels] + 1.5 * unit(200, 16, seed=2), dim=-1)
    scores = (features @ classifier.T).numpy()
    wanted = {f"top{k}": 100 * metrics.top_k_accuracy_score(labels.numpy(), scores, k=k, labels=range(12))
              for k in (1, 5)}
    assert 5 < wanted["top1"] < 95
    assert common.zero_shot(features, labels, classifier, block) == pytest.approx(wanted)


def text_features(tokens, width=16):
    """A stand-in text encoder: unit features that depend on every token."""
    seeds = [sum((i + 1) * token for i, token in enumerate(row)) for row in tokens.tolist()]
    return torch.cat([unit(1, width, seed=seed) for seed in seeds])


def test_zero_shot_classifier_equals_a_loop():
    tokenizer = common.CLIPTokenizer(20)
    classes, templates = ["cat", "polar bear", "dog"], ["a photo of a {}.", "{}", "art of the {}."]
    found = common.zero_shot_classifier(text_features, tokenizer, classes, templates)
    for row, name in zip(found, classes):
        mean = sum(text_features(tokenizer([template.format(name)]))[0] for template in templates) / 3
        torch.testing.assert_close(row, mean / mean.norm())


class Pictures:
    """Plain pictures, one colour each; number 2 cannot be read."""

    def __init__(self, targets, **attributes):
        self.targets = targets
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.targets)

    def read(self, i):
        if i == 2:
            raise BadSample("cut off")
        encoded = io.BytesIO()
        Image.new("RGB", (20, 16), (40 * i, 255 - 40 * i, 7 * i)).save(encoded, "PNG")
        return encoded.getvalue(), self.targets[i]


def colour_features(images):
    return F.normalize(torch.cat([images.float().mean((2, 3)) - 100, torch.ones(len(images), 13)], 1), dim=-1)


def test_evaluate_leaves_out_and_counts_unreadable_images():
    cfg, tokenizer = SimpleNamespace(image_size=16, workers=0, data="emoji"), common.CLIPTokenizer(20)
    captions = [["a", "b c"], ["d"], ["never seen"], ["e", "f", "g"], ["h"], ["i"]]
    encoders = {"one": colour_features, "two": lambda images: colour_features(255 - images)}
    found = common.evaluate({name: (encode, text_features) for name, encode in encoders.items()}, tokenizer,
                            Pictures(captions), cfg)
    readable = [0, 1, 3, 4, 5]
    images = torch.tensor([[40 * i, 255 - 40 * i, 7 * i] for i in readable]).view(5, 3, 1, 1).expand(5, 3, 4, 4)
    texts = [text for i in readable for text in captions[i]]
    owners = torch.tensor([n for n, i in enumerate(readable) for _ in captions[i]])
    for name, encode in encoders.items():
        wanted = brute_force_retrieval(encode(images), text_features(tokenizer(texts)), owners)
        assert found[name] == pytest.approx({**wanted, "unreadable": 1})
    labelled = Pictures([0, 1, 1, 1, 0, 2], classes=["x", "y", "z"], templates=["{}", "the {}"])
    found = common.evaluate({"one": (colour_features, text_features)}, tokenizer, labelled, cfg)["one"]
    classifier = common.zero_shot_classifier(text_features, tokenizer, ["x", "y", "z"], ["{}", "the {}"])
    right = (colour_features(images) @ classifier.T).argmax(1) == torch.tensor([0, 1, 1, 0, 2])
    assert found["top1"] == pytest.approx(100 * right.float().mean().item()) and found["unreadable"] == 1


def probe_data(count, seed, classes=5, width=12):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return F.normalize(unit(classes, width)[labels] + unit(count, width, seed=seed), dim=-1), labels


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learn(strength):
    linear = pytest.importorskip("sklearn.linear_model")
    (x, y), (x_test, y_test) = probe_data(400, 1), probe_data(400, 2)
    wanted = linear.LogisticRegression(C=strength, tol=1e-8, max_iter=10000).fit(x.double().numpy(), y.numpy())
    weights = common._fit_logistic(x, y, 5, strength, block=150)

    def objective(w, b):
        return strength * F.cross_entropy(x.double() @ w + b, y, reduction="sum") + w.square().sum() / 2

    coefficients, bias = torch.tensor(wanted.coef_.T), torch.tensor(wanted.intercept_)
    found, found_bias = weights[:-1].double(), weights[-1].double()
    torch.testing.assert_close(objective(found, found_bias), objective(coefficients, bias), rtol=1e-5, atol=0)
    assert (found - coefficients).norm() / coefficients.norm() < 0.01
    assert (found_bias - found_bias.mean() - bias + bias.mean()).norm() < 0.01 * max(1, bias.norm())
    accuracy = 100 * ((x_test @ weights[:-1] + weights[-1]).argmax(1) == y_test).float().mean().item()
    assert accuracy == pytest.approx(100 * wanted.score(x_test.numpy(), y_test.numpy()), abs=0.5)


def test_linear_probe_chooses_on_validation_and_refits_on_both():
    linear = pytest.importorskip("sklearn.linear_model")
    train, val, test = probe_data(100, 1), probe_data(80, 2), probe_data(400, 3)
    strengths = (0.01, 1.0, 100.0)
    found = common.linear_probe(train, val, test, 5, strengths)

    def fit(x, y, c):
        return linear.LogisticRegression(C=c, tol=1e-8, max_iter=10000).fit(x.numpy(), y.numpy())

    scores = {c: fit(*train, c).score(*map(torch.Tensor.numpy, val)) for c in strengths}
    assert found["C"] == max(scores, key=scores.get)
    both = fit(torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]]), found["C"])
    assert found["top1"] == pytest.approx(100 * both.score(*map(torch.Tensor.numpy, test)), abs=0.5)
