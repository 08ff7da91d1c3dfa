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


@pytest.fixture(scope="module")
def open_clip():
    common.import_torchvision()
    return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def transformers():
    common.import_torchvision()
    return pytest.importorskip("transformers")


def randomise(module):
    """No parameter keeps a value (0, 1) under which mixing it up would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return module.eval()


def open_clip_model(open_clip, quick_gelu=True, size=32, width=128, patch=8, heads=1, embed=48,
                    **vision):
    torch.manual_seed(0)
    vision = {"layers": 2, "width": width, "patch_size": patch, "image_size": size, **vision}
    text = dict(layers=2, width=64, heads=heads, context_length=12, vocab_size=100)
    model = open_clip.model.CLIP(embed, open_clip.CLIPVisionCfg(**vision),
                                 open_clip.CLIPTextCfg(**text), quick_gelu=quick_gelu)
    return randomise(model)


def hugging_face_model(transformers, act="quick_gelu", heads=1):
    shared = dict(intermediate_size=256, num_hidden_layers=2, hidden_act=act, hidden_size=64,
                  num_attention_heads=heads)
    ids = dict(bos_token_id=98, eos_token_id=99, pad_token_id=0)
    torch.manual_seed(0)
    return randomise(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(shared, vocab_size=100, max_position_embeddings=12, **ids),
        vision_config=dict(shared, image_size=32, patch_size=8), projection_dim=48)))


def load(path, act=None, image_size=None):
    """(CLIP, Size) of a file."""
    cfg = argparse.Namespace(preset="demo", act=act, image_size=image_size)
    size, weights = common.clip_size(cfg, common.read_checkpoint(path))
    clip = eclipse.CLIP(size, eclipse.VisionTransformer(size))
    common.load_weights(clip, weights, path)
    return clip.eval(), size


@torch.no_grad()
def assert_equal(path, model, act=None, image_size=None, count=4):
    """The embeddings of a file are those of the public implementation's model; returns the Size."""
    clip, size = load(path, act, image_size)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 3, size.image_size, size.image_size, generator=generator)
    text = torch.randint(1, 98, (count, size.context_length), generator=generator)
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


SHAPES = [dict(quick_gelu=True), dict(quick_gelu=False, size=40, width=64, layers=3),
          dict(quick_gelu=False, patch=32, size=64, mlp_ratio=3.0, embed=64)]


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_and_prefixes(open_clip, tmp_path, wrapper, prefix):
    model, path = open_clip_model(open_clip), tmp_path / "model.pt"
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, path)
    assert_equal(path, model, "quick_gelu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_open_clip(open_clip, tmp_path, shape):
    model, path = open_clip_model(open_clip, **shape), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert_equal(path, model, "quick_gelu" if shape["quick_gelu"] else "gelu")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"])
def test_sizes_of_the_published_shapes(open_clip, name, tmp_path, capsys):
    """Without any json, but for the activation."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.model.CLIP(**config)
    loaded = common.Checkpoint(tmp_path / "x.pt", model.state_dict(), {}, None)
    size = common.foreign_size(loaded.path, loaded.weights, None)
    assert "gelu is assumed" in capsys.readouterr().out
    vision, text = config["vision_cfg"], config["text_cfg"]
    width = vision["width"]
    wanted = (224, vision["patch_size"], width, vision["layers"], text["heads"],
              width // vision.get("head_width", 64), int(width * vision.get("mlp_ratio", 4)))
    assert wanted == (size.image_size, size.patch_size, size.vision_width, size.vision_layers,
                      size.text_heads, size.vision_heads, size.vision_mlp)
    assert (size.context_length, size.vocab_size) == (77, 49408)


def test_preset_vit_b32(open_clip, tmp_path):
    model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).eval()
    torch.save(model.half().state_dict(), tmp_path / "b32.pt")
    size = assert_equal(tmp_path / "b32.pt", model.float(), count=2)  # half: taken as OpenAI's
    assert size == replace(PRESETS["vit_b32"], **common.OPENAI)


@pytest.mark.parametrize("size", [16, 48])
def test_resized_positions(open_clip, tmp_path, size):
    weights = open_clip_model(open_clip).state_dict()
    torch.save(weights, tmp_path / "model.pt")
    model, resized = open_clip_model(open_clip, size=size), dict(weights)
    open_clip.model.resize_pos_embed(resized, model)
    model.load_state_dict(resized)
    assert_equal(tmp_path / "model.pt", model, "quick_gelu", size)


@pytest.mark.filterwarnings("ignore")  # torch announces the end of TorchScript
def test_openai_archive(open_clip, tmp_path, capsys):
    """TorchScript, fp16, three integers beside the weights."""
    model, archive = open_clip_model(open_clip).half().float(), open_clip_model(open_clip).half()
    archive.attn_mask = archive._buffers.pop("attn_mask")  # theirs is no buffer
    extras = dict(input_resolution=32, context_length=12, vocab_size=100)
    for name, value in extras.items():
        archive.__dict__.pop(name, None)
        archive.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.script(archive), tmp_path / "openai.pt")
    size = assert_equal(tmp_path / "openai.pt", model)
    assert (size.act, size.mean) == ("quick_gelu", common.OPENAI["mean"])
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.parametrize("act, heads", [("quick_gelu", 1), ("gelu", 4)])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face(transformers, tmp_path, act, heads, file):
    model = hugging_face_model(transformers, act, heads)
    model.save_pretrained(tmp_path)
    if file.endswith("bin"):  # save_pretrained no longer writes it; old ones held position ids
        ids = {"text_model.embeddings.position_ids": torch.arange(12)[None],
               "vision_model.embeddings.position_ids": torch.arange(17)[None]}
        torch.save({**model.state_dict(), **ids}, tmp_path / file)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.75]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    size = assert_equal(tmp_path / file, model)
    assert (size.act, size.vision_heads, size.text_heads) == (act, heads, heads)
    assert (size.mean, size.std) == ((0.5, 0.4, 0.3), (0.25, 0.5, 0.75))


def test_hugging_face_config_without_its_defaults(transformers, tmp_path):
    """transformers 4 wrote only what differs from the defaults, hidden_act among them."""
    hugging_face_model(transformers).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        del content[part]["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert_equal(tmp_path / "model.safetensors", model)


def test_open_clip_config_is_used_whatever_the_file_holds(open_clip, tmp_path):
    """Mean, std, activation, head width, text heads; a foreign config does not hide them."""
    model = open_clip_model(open_clip, heads=4, head_width=16)
    torch.save({"state_dict": model.state_dict(), "config": {"act": "gelu"}, "size": 3},
               tmp_path / "model.pt")
    config = {"quick_gelu": True, "vision_cfg": {"head_width": 16}, "text_cfg": {"heads": 4}}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": pixels})
    (tmp_path / "open_clip_config.json").write_text(text)
    size = assert_equal(tmp_path / "model.pt", model)
    assert size.mean == size.std == (0.5, 0.5, 0.5)
    assert size.pixel_statistics("cpu").unique().tolist() == [127.5]


# ------------------------------------------------------------------------------- our own files


@pytest.mark.parametrize("prefix", ["", "online.", "student."])
def test_a_file_of_ours_tells_its_size(tmp_path, prefix):
    clip = randomise(eclipse.CLIP(TINY, eclipse.VisionTransformer(TINY)))
    weights = {prefix + name: tensor for name, tensor in clip.state_dict().items()}
    torch.save({"model": weights, "config": {"lr": 1}, "size": asdict(TINY)}, tmp_path / "x.pt")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    found, size, config = common.read_clip(tmp_path / "x.pt")
    assert (size, config) == (TINY, {"lr": 1})
    assert all(torch.equal(found[name], tensor) for name, tensor in clip.state_dict().items())
    assert common.read_clip(tmp_path / "x.pt", "quick_gelu")[1].act == "quick_gelu"


def test_the_shipped_teacher():
    weights, size, config = common.read_clip(common.DATA / "teacher_clip.pt")
    common.load_weights(eclipse.CLIP(size, eclipse.VisionTransformer(size)), weights, "teacher")
    assert (size.vision_heads, size.mean, config["seed"]) == (4, common.IMAGENET["mean"], 1000)


def test_safetensors_equals_the_package(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    tensors = {f"{dtype}/{shape}": torch.randint(0, 100, shape).to(dtype)
               for dtype in common.SAFETENSORS.values() for shape in ((), (3,), (2, 3, 5))}
    package.save_file(tensors, tmp_path / "x.safetensors", metadata={"note": "é"})
    found = common.read_checkpoint(tmp_path / "x.safetensors").weights
    assert found.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name


# ------------------------------------------------------------------------ what cannot be read


def write_faulty(path, weights):
    """A file whose fault its name tells."""
    kind, content = path.stem, weights
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("nothing of use")
    elif kind == "namespace":
        content = {"state_dict": weights, "args": argparse.Namespace(lr=1)}
    elif kind == "scalar":
        content = {"state_dict": weights, "loss": np.float64(1)}
    elif kind == "table":
        content = {"a": 1, "b": torch.ones(2)}
    elif kind == "resnet":
        content = {"visual.conv1.weight": torch.ones(2, 3, 3, 3)}
    elif kind == "positions":
        content = {**weights, "visual.positional_embedding": torch.ones(7, 16)}
    elif kind == "lacking":
        content = {n: tensor for n, tensor in weights.items() if n != "ln_final.bias"}
    elif kind == "shape":
        content = {**weights, "ln_final.bias": torch.ones(5)}
    if kind not in ("folder", "text", "absent"):
        torch.save(content, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])


FAULTS = {"absent.pt": "no file", "folder.pt": "no file", "text.pt": "damaged",
          "text.safetensors": "damaged", "truncated.pt": "damaged", "table.pt": "no table",
          "namespace.pt": "argparse.Namespace.*re-save", "scalar.pt": "scalar.*re-save",
          "resnet.pt": "visual.positional_embedding",
          "positions.pt": r"positional_embedding \(7, 16\)",
          "lacking.pt": "Missing key.*ln_final.bias",
          "shape.pt": r"ln_final.bias: .*\[5\].*\[64\]"}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_files_are_one_line(tmp_path, name):
    size = replace(TINY, vision_width=64, text_width=64)
    weights = eclipse.CLIP(size, eclipse.VisionTransformer(size)).state_dict()
    write_faulty(tmp_path / name, weights)
    with pytest.raises(UserError, match=f"(?s){name}.*{FAULTS[name]}") as error:
        load(tmp_path / name, "gelu")
    assert "\n" not in str(error.value)


JSONS = {"config.json": '{"vision_config": 3}', "preprocessor_config.json": '{"image_mean": "a"}',
         "open_clip_config.json": '{"model_cfg": {"vision_cfg": {"head_width": 0}}}'}


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_broken_json_beside_the_weights_is_named(open_clip, tmp_path, name, text):
    torch.save(open_clip_model(open_clip).state_dict(), tmp_path / "model.pt")
    (tmp_path / name).write_text(text or JSONS[name])
    with pytest.raises(UserError, match=name):
        load(tmp_path / "model.pt")


def test_an_activation_we_do_not_have(transformers, tmp_path):
    hugging_face_model(transformers, "gelu_pytorch_tanh").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gelu_pytorch_tanh"):
        load(tmp_path / "model.safetensors")
