"""Checkpoints against independent references: open_clip, transformers, safetensors."""

import argparse
import json
from dataclasses import asdict, replace

import common
import eclipse
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import PRESETS, UserError

TINY = PRESETS["tiny"]


def package(name):
    common.import_torchvision()  # they import it without the remedy for a CPU-only torch
    return pytest.importorskip(name)


def randomise(module):
    """No parameter keeps a value (0, 1) under which mixing it up would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return module.eval()


def open_clip_model(quick_gelu=True, size=32, width=128, patch=8, heads=1, embed=48, **vision):
    torch.manual_seed(0)
    vision = {"layers": 2, "width": width, "patch_size": patch, "image_size": size, **vision}
    text = dict(layers=2, width=64, heads=heads, context_length=12, vocab_size=100)
    open_clip = package("open_clip").model
    return randomise(open_clip.CLIP(embed, open_clip.CLIPVisionCfg(**vision),
                                    open_clip.CLIPTextCfg(**text), quick_gelu=quick_gelu))


def hugging_face_model(act="quick_gelu", heads=1):
    shared = dict(intermediate_size=256, num_hidden_layers=2, hidden_act=act, hidden_size=64,
                  num_attention_heads=heads)
    text = dict(shared, vocab_size=100, max_position_embeddings=12, bos_token_id=98,
                eos_token_id=99, pad_token_id=0)
    vision = dict(shared, image_size=32, patch_size=8)
    torch.manual_seed(0)
    transformers = package("transformers")
    return randomise(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=48)))


def load(path, act=None, image_size=None):
    """(CLIP, Size) of a file."""
    cfg = argparse.Namespace(preset="demo", act=act, image_size=image_size)
    size, weights = common.clip_size(cfg, common.read_checkpoint(path))
    clip = eclipse.CLIP(size, eclipse.VisionTransformer(size))
    common.load_weights(clip, weights, path)
    return clip.eval(), size


@torch.no_grad()
def assert_equal(path, model, act=None, image_size=None):
    """The embeddings of a file are those of the public implementation's model; returns the Size."""
    clip, size = load(path, act, image_size)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 3, size.image_size, size.image_size, generator=generator)
    text = torch.randint(1, 98, (3, size.context_length), generator=generator)
    text[:, -3] = size.vocab_size - 1  # the end token
    text[:, -2:] = 0
    if hasattr(model, "vision_model"):
        images = model.visual_projection(model.vision_model(pixel_values=image).pooler_output)
        texts = model.text_projection(model.text_model(input_ids=text).pooler_output)
    else:
        images, texts = model.encode_image(image), model.encode_text(text)
    for found, wanted in (clip.encode_image(image), images), (clip.encode_text(text), texts):
        assert wanted.std() > 0.01  # else the tolerance would mean little
        torch.testing.assert_close(found, F.normalize(wanted, dim=-1), rtol=0, atol=1e-5)
    return size


# ------------------------------------------------------------------------- public checkpoints


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    model, path = open_clip_model(), tmp_path / "model.pt"
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, path)
    assert_equal(path, model, "quick_gelu")


@pytest.mark.parametrize("shape", [dict(size=40, width=64, layers=3),
                                   dict(patch=32, size=64, mlp_ratio=3.0, embed=64)], ids=str)
def test_shapes(tmp_path, shape):
    model, path = open_clip_model(quick_gelu=False, **shape), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert_equal(path, model, "gelu")


def test_preset_vit_b32(tmp_path):
    open_clip = package("open_clip")
    model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).eval()
    torch.save(model.half().state_dict(), tmp_path / "b32.pt")
    size = assert_equal(tmp_path / "b32.pt", model.float(), "quick_gelu")
    assert size == replace(PRESETS["vit_b32"], **common.OPENAI)


@pytest.mark.parametrize("size", [16, 48])
def test_resized_positions(tmp_path, size):
    weights = open_clip_model().state_dict()
    torch.save(weights, tmp_path / "model.pt")
    model, resized = open_clip_model(size=size), dict(weights)
    package("open_clip").model.resize_pos_embed(resized, model)
    model.load_state_dict(resized)
    assert_equal(tmp_path / "model.pt", model, "quick_gelu", size)


def test_openai_archive(tmp_path):
    """TorchScript, fp16, three integers beside the weights."""
    model, archive = open_clip_model().half().float(), open_clip_model().half()
    archive.attn_mask = archive._buffers.pop("attn_mask")  # theirs is no buffer
    for name, value in dict(input_resolution=32, context_length=12, vocab_size=100).items():
        archive.__dict__.pop(name, None)
        archive.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.script(archive), tmp_path / "openai.pt")
    size = assert_equal(tmp_path / "openai.pt", model)
    assert (size.act, size.mean) == ("quick_gelu", common.OPENAI["mean"])


@pytest.mark.parametrize("act, heads", [("quick_gelu", 1), ("gelu", 4)])
def test_hugging_face(tmp_path, act, heads):
    model = hugging_face_model(act, heads)
    model.save_pretrained(tmp_path)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.75]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    size = assert_equal(tmp_path / "model.safetensors", model)
    assert (size.act, size.vision_heads, size.text_heads) == (act, heads, heads)
    assert (size.mean, size.std) == ((0.5, 0.4, 0.3), (0.25, 0.5, 0.75))


def test_hugging_face_as_transformers_4_saved_it(tmp_path):
    """In the config only what differs from the defaults, beside old weights position ids."""
    model = hugging_face_model()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        del content[part]["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    ids = {"text_model.embeddings.position_ids": torch.arange(12)[None],
           "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    torch.save({**model.state_dict(), **ids}, tmp_path / "pytorch_model.bin")
    assert_equal(tmp_path / "pytorch_model.bin", model)


def test_open_clip_config_is_used_whatever_the_file_holds(tmp_path):
    """Mean, std, activation, head width, text heads; a foreign config does not hide them."""
    model = open_clip_model(heads=4, head_width=16)
    torch.save({"state_dict": model.state_dict(), "config": {"act": "gelu"}, "size": 3},
               tmp_path / "x.pt")
    vision = {"width": 128, "head_width": 16}
    config = {"quick_gelu": True, "vision_cfg": vision, "text_cfg": {"heads": 4}}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": pixels})
    (tmp_path / "open_clip_config.json").write_text(text)
    size = assert_equal(tmp_path / "x.pt", model)
    assert size.pixel_statistics("cpu").unique().tolist() == [127.5]
    (tmp_path / "open_clip_config.json").write_text(text.replace("128", "64"))  # of another model
    with pytest.raises(UserError, match="--act"):
        load(tmp_path / "x.pt")


# ------------------------------------------------------------------------------- our own files


@pytest.mark.parametrize("prefix", ["", "online.", "student."])
def test_a_file_of_ours_tells_its_size(tmp_path, prefix):
    wanted = randomise(eclipse.CLIP(TINY, eclipse.VisionTransformer(TINY))).state_dict()
    weights = {prefix + name: tensor for name, tensor in wanted.items()}
    torch.save({"model": weights, "config": {"lr": 1}, "size": asdict(TINY)}, tmp_path / "x.pt")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    loaded = common.read_checkpoint(tmp_path / "x.pt")
    found, size = common.clip_weights(loaded)
    assert (size, loaded.config) == (TINY, {"lr": 1})
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert common.clip_weights(loaded, "quick_gelu")[1].act == "quick_gelu"
    loaded.size["text_heads"] = 0
    with pytest.raises(UserError, match="x.pt is no CLIP"):
        common.clip_weights(loaded)


def test_safetensors_equals_the_package(tmp_path):
    tensors = {f"{dtype}/{shape}": torch.randint(0, 100, shape).to(dtype)
               for dtype in common.SAFETENSORS.values() for shape in ((), (3,), (2, 3, 5))}
    package("safetensors.torch").save_file(tensors, tmp_path / "x.safetensors", {"note": "é"})
    found = common.read_checkpoint(tmp_path / "x.safetensors").weights
    assert found.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name


# ------------------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize("changed, message", [
    ({"args": argparse.Namespace(lr=1)}, "re-save"),
    ({"loss": np.float64(1)}, "re-save"),
    ({"epoch": 1}, "no table of weights"),
    ({"visual.positional_embedding": None}, "visual.positional_embedding"),
    ({"visual.positional_embedding": torch.ones(9, 16)}, r"positional_embedding: .*\[9, .*\[5, "),
    ({"ln_final.bias": None}, "Missing key.*ln_final.bias"),
    ({"ln_final.bias": torch.ones(5)}, r"ln_final.bias: .*\[5\].*\[16\]")], ids=str)
def test_faulty_weights_are_one_line(tmp_path, changed, message):
    weights = {**eclipse.CLIP(TINY, eclipse.VisionTransformer(TINY)).state_dict(), **changed}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    torch.save({"model": weights, "config": {}, "size": asdict(TINY)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt.*{message}") as error:
        load(tmp_path / "x.pt", "gelu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_damaged_files_are_named(tmp_path, name):
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    with pytest.raises(UserError, match=f"^no file .*{name}$"):
        common.read_checkpoint(tmp_path / name)
    for content in (b"", b"nothing of use", whole[:-1000]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"^[^\n]*{name} is not read[^\n]*$"):
            common.read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content, named", [("{", "config.json"), ('{"vision_config": 3}', "x.pt")])
def test_a_broken_json_beside_the_weights_is_one_line(tmp_path, content, named):
    torch.save(open_clip_model().state_dict(), tmp_path / "x.pt")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"^[^\n]*{named}[^\n]*$"):
        load(tmp_path / "x.pt")


def test_the_activation_must_be_told_and_one_we_have(tmp_path):
    torch.save(open_clip_model().state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError, match="--act"):
        load(tmp_path / "x.pt")
    hugging_face_model("gelu_pytorch_tanh").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gelu_pytorch_tanh"):
        load(tmp_path / "model.safetensors")
