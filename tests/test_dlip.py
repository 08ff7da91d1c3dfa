"""dlip.py against independent references.

Public implementations (transformers' four BLIP models and BERT, timm, torchvision; a test is skipped where its
reference is not installed) and brute-force versions written here: one image, one head, one token, one answer at a time.
"""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import fields, replace

import common
import dlip
import pytest
import torch
import torch.nn.functional as F
from common import BertTokenizer, UserError, import_torchvision, read_weights
from dlip import BERT, BLIP, VIT, TextSize, Trace, VisionSize, VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

# --------------------------------------------------------------------------------------------------------- small models

SPECIAL = dict(pad=0, cls=2, sep=3, dec=62, enc=63)
SMALL_VISION = VisionSize(32, 2, 4, patch=8, image_size=32)  # 17 tokens
SMALL_TEXT = TextSize(48, 3, 4, vocab=64, positions=40, dropout=0.0, **SPECIAL)
CLOSE = dict(rtol=1e-5, atol=1e-5)
WORDS = range(4, 62)


def shake(model, seed, std=0.1):
    """Random weights, norms and biases included, so that no misplaced tensor goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = std * torch.randn(p.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            p.copy_(1 + noise if is_norm else noise)
    return model.eval()


def peer(kind, seed=0, std=0.1, text_width=48, image_size=32):
    """A small BLIP of transformers with random weights."""
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    text = dict(vocab_size=64, hidden_size=text_width, intermediate_size=4 * text_width, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=40, bos_token_id=62, pad_token_id=0, sep_token_id=3,
                eos_token_id=3, label_smoothing=0.1)
    vision = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  image_size=image_size, patch_size=8, layer_norm_eps=1e-6)  # BLIP's; transformers' default is 1e-5
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    return shake(getattr(transformers, kind)(config), seed, std)


def load(theirs, **options):
    options = dict(vision_heads=4, heads=4, dropout=0.0, **SPECIAL) | options
    model, missing = dlip.load_blip(theirs.state_dict() if hasattr(theirs, "state_dict") else theirs, **options)
    return model.eval(), missing


def ours(seed=0, std=0.2, vision=SMALL_VISION, text=SMALL_TEXT, shared=True):
    return shake(BLIP(vision, text, shared=shared), seed, std)


def batch(size=3, length=9, seed=0, first=2):
    """Images, ids (first token, words, [SEP], padding) of different lengths, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, 32, 32, generator=generator)
    ids = torch.randint(min(WORDS), max(WORDS), (size, length), generator=generator)
    ids[:, 0] = first
    for row in range(size):
        end = max(1, length - 1 - 2 * row)
        ids[row, end], ids[row, end + 1:] = 3, 0
    return image, ids, ids != 0


def begin(ids, token):
    return torch.cat([torch.full((len(ids), 1), token), ids[:, 1:]], 1)


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("name, vision, text", [
    ("tiny", 5_524_416, 8_333_184), ("small", 21_665_664, 26_118_144), ("middle", 48_423_744, 60_432_768),
    ("base", 85_798_656, 137_258_496)])
def test_parameter_counts(name, vision, text):
    with torch.device("meta"):
        counts = dlip.count_parameters(BLIP(VIT[name], BERT[name]))
        untied = dlip.count_parameters(BLIP(VIT[name], BERT[name], shared=False))
    assert (counts["vision"], counts["text"]) == (vision, text) == (untied["vision"], untied["text"])
    D, layers = BERT[name].width, BERT[name].layers
    assert counts["decoder"] == layers * (4 * D * D + 6 * D) + D * D + 3 * D + 30524
    assert counts["heads"] == 256 * (VIT[name].width + D + 2) + 2 * D + 2 + 1


def test_retriever_equals_transformers():
    theirs, (image, ids, mask) = peer("BlipForImageTextRetrieval"), batch()
    model, missing = load(theirs, need=("encoder", "itc", "itm"))
    assert missing == {"decoder", "temp"}
    with torch.no_grad():
        itc = theirs(ids, image, use_itm_head=False, attention_mask=mask.long())
        itm = theirs(begin(ids, 63), image, attention_mask=mask.long())  # transformers leaves [ENC] to the caller
        states, text = model.encode_image(image), model.encode_text(ids, mask)
        fused = model.fuse(ids, mask, states)
        torch.testing.assert_close(states, itc.last_hidden_state, **CLOSE)
        torch.testing.assert_close(text[mask], itc.question_embeds[mask], **CLOSE)
        torch.testing.assert_close(model.image_feature(states) @ model.text_feature(text).T, itc.itm_score, **CLOSE)
        torch.testing.assert_close(fused[mask], itm.question_embeds[mask], **CLOSE)
        torch.testing.assert_close(model.match(fused), itm.itm_score, **CLOSE)
    assert itm.itm_score.std() > 1e-2 and (text - fused)[mask].abs().max() > 0.1


def test_padding_is_ignored():
    model, (image, ids, mask) = ours(), batch()
    longer = F.pad(ids, (0, 4))
    with torch.no_grad():
        states = model.encode_image(image)
        runs = model.encode_text, lambda i, m: model.fuse(i, m, states), lambda i, m: model.decode(i, m, states)
        for run, causal in zip(runs, (False, False, True)):
            expected, n = run(ids, mask)[mask], ids.shape[1]
            torch.testing.assert_close(run(longer, longer != 0)[:, :n][mask], expected, **CLOSE)
            without = run(longer, None)[:, :n][mask]  # padding shows, but not to a causal decoder
            assert torch.allclose(without, expected, **CLOSE) == causal


def test_encoders_equal_blip_model():
    theirs, (image, ids, mask) = peer("BlipModel"), batch()
    model, missing = load(theirs)
    assert missing == {"decoder", "itc", "itm", "temp"}
    with torch.no_grad():
        found = theirs(ids, image, attention_mask=mask.long())
        torch.testing.assert_close(model.encode_image(image), found.vision_model_output.last_hidden_state, **CLOSE)
        torch.testing.assert_close(model.encode_text(ids, mask)[mask], found.text_model_output.last_hidden_state[mask],
                                   **CLOSE)


def test_captioner_equals_transformers():
    theirs, (image, ids, mask) = peer("BlipForConditionalGeneration"), batch(first=62)
    model, missing = load(theirs, need=["decoder"])
    assert missing == {"encoder", "itc", "itm", "temp"}
    for prompt in (0, 3):
        labels = ids.masked_fill(~mask, -100)
        labels[:, :prompt] = -100
        with torch.no_grad():
            found = theirs(image, ids, mask.long(), labels=labels)
            logits = model.decode(begin(ids, 2), mask, model.encode_image(image))  # decode sets [DEC] itself
            torch.testing.assert_close(logits[mask], found.logits[mask], **CLOSE)
            torch.testing.assert_close(dlip.lm_loss(logits, ids, prompt=prompt), found.loss, **CLOSE)
            assert (dlip.lm_loss(logits, ids, prompt=prompt, label_smoothing=0.0) - found.loss).abs() > 1e-4
    with pytest.raises(UserError, match="no encoder and no itm"):
        load(theirs, need=["encoder", "itm"])


def test_vqa_equals_transformers():
    """Question by question, without padding: transformers 5.23 drops the mask that hides a padded question's end."""
    theirs, (image, question, mask) = peer("BlipForQuestionAnswering", text_width=32), batch(first=63)
    model, missing = load(theirs)
    assert missing == {"itc", "itm", "temp"} and model.text_decoder is not None  # encoder and decoder differ
    _, answer, answer_mask = batch(length=6, seed=1, first=62)
    labels = answer.masked_fill(~answer_mask, -100)
    with torch.no_grad():
        states = model.fuse(question, mask, model.encode_image(image))
        logits = model.decode(answer, answer_mask, states, mask)
        sums = dlip.lm_loss(logits, answer, reduction="none")
        for i in range(3):
            row, ids = slice(i, i + 1), question[i:i + 1, mask[i]]
            found = theirs.text_encoder(ids, encoder_hidden_states=theirs.vision_model(image[row])[0])[0]
            torch.testing.assert_close(states[row, mask[i]], found, **CLOSE)
            found = theirs.text_decoder(answer[row], answer_mask[row].long(), encoder_hidden_states=found).logits
            torch.testing.assert_close(logits[i, answer_mask[i]], found[0, answer_mask[i]], **CLOSE)
            loss = theirs(ids, image[row], answer[row], answer_mask[row].long(), labels=labels[row]).loss
            torch.testing.assert_close(dlip.lm_loss(logits[row], answer[row]), loss, **CLOSE)
            torch.testing.assert_close(sums[i], loss * (answer_mask[i].sum() - 1), **CLOSE)


def test_fusion_layers():
    """Cross-attention in the top k layers: below them nothing sees the image, as in a text network cut there."""
    model, (image, ids, mask) = ours(text=replace(SMALL_TEXT, fusion_layers=1)), batch()
    assert [layer.crossattention is not None for layer in model.text.encoder.layer] == [False, False, True]
    trace, plain = Trace(0, 1, 2), Trace(0, 1, 2)
    with torch.no_grad():
        model.fuse(ids, mask, model.encode_image(image), trace)
        model.text(begin(ids, 63), mask, trace=plain)
    assert torch.equal(trace.states[1], plain.states[1]) and not torch.allclose(trace.states[2], plain.states[2])
    assert set(trace.cross_maps) == {2} and set(trace.self_maps) == {0, 1, 2}
    again, _ = load(model.state_dict())
    assert again.text.size.fusion_layers == 1
    with pytest.raises(UserError, match="cannot have cross-attention"):
        BLIP(SMALL_VISION, replace(SMALL_TEXT, fusion_layers=4))


def test_modes_share_their_weights():
    """Each mode trains its own self-attention and the shared layers; the three first tokens are set by the mode."""
    model, (image, ids, mask) = ours(), batch()
    runs = {"attention": lambda i: model.encode_text(i, mask).sum(dim=(0, 1))[0],
            "attention, crossattention": lambda i: model.fuse(i, mask, model.encode_image(image)).sum(dim=(0, 1))[0],
            "decoder_attention, crossattention": lambda i: model.decode(i, mask, model.encode_image(image)).std()}
    for trained, run in runs.items():
        model.zero_grad()
        run(ids).backward()
        layer = model.text.encoder.layer[1]
        moved = {name for name in ("attention", "decoder_attention", "crossattention")
                 if getattr(layer, name).self.value.weight.grad is not None}
        assert moved == set(trained.split(", ")) and layer.output.dense.weight.grad.abs().sum() > 0
        assert torch.equal(run(ids), run(begin(ids, 7)))


def test_dropout_only_in_training():
    model, (image, ids, mask) = ours(text=replace(SMALL_TEXT, dropout=0.5)), batch()
    states = model.encode_image(image)
    for trace in (None, Trace(-1)):
        assert torch.equal(model.fuse(ids, mask, states, trace), model.fuse(ids, mask, states, trace))
        model.train()
        assert not torch.equal(model.fuse(ids, mask, states, trace), model.fuse(ids, mask, states, trace))
        model.eval()
    attention = model.text.encoder.layer[0].attention.train()
    attention.output.eval()  # what is left is dropout of the probabilities, in both ways of computing them
    x = torch.randn(400, 5, 48)
    for with_map in (False, True):
        first, second = (attention(x, attention.keys_values(x), None, with_map)[0] for _ in range(2))
        assert not torch.equal(first, second)
    ends = model.text.encoder.layer[0].output.train()  # what every sublayer ends with, and the embeddings
    assert not torch.equal(ends(torch.ones(2, 192), x[:2, 0]), ends(torch.ones(2, 192), x[:2, 0]))
    model.eval().text.dropout.train()
    assert not torch.equal(model.encode_text(ids, mask), model.encode_text(ids, mask))


# ------------------------------------------------------------------------------------------------------ maps and states


def explicit_map(attention, x, source, allowed):
    """Attention probabilities (B, H, N, M) with a loop over images, heads, queries and keys."""
    H = attention.heads
    query, key = (lin.weight.unflatten(0, (H, -1)) for lin in (attention.self.query, attention.self.key))
    query_bias, key_bias = (lin.bias.view(H, -1) for lin in (attention.self.query, attention.self.key))
    out = torch.zeros(len(x), H, x.shape[1], source.shape[1])
    for b, h, n in itertools.product(range(len(x)), range(H), range(x.shape[1])):
        q = query[h] @ x[b, n] + query_bias[h]
        scores = {m: float(q @ (key[h] @ source[b, m] + key_bias[h])) / math.sqrt(len(q))
                  for m in range(source.shape[1]) if allowed(b, n, m)}
        total = sum(math.exp(s) for s in scores.values())
        for m, s in scores.items():
            out[b, h, n, m] = math.exp(s) / total
    return out


@pytest.mark.parametrize("mode", ["multimodal", "decoder", "text"])
@torch.no_grad()
def test_text_maps_equal_a_loop(mode):
    model, (image, ids, mask) = ours(std=0.3), batch(length=7)
    image_states, trace, layers = model.encode_image(image), Trace(0, -1, 1), model.text.encoder.layer
    ids = begin(ids, {"multimodal": 63, "decoder": 62, "text": 2}[mode])
    out = model.text(ids, mask, mode, image_states, trace=trace)
    torch.testing.assert_close(model.text(ids, mask, mode, image_states), out, **CLOSE)  # the fused kernel
    torch.testing.assert_close(trace.states[-1], out)
    name = "decoder_attention" if mode == "decoder" else "attention"
    for i, below in ((1, trace.states[0]), (-1, trace.states[1])):
        layer = layers[i]
        expected = explicit_map(getattr(layer, name), below, below,
                                lambda b, n, m: mask[b, m] and (mode != "decoder" or m <= n))
        torch.testing.assert_close(trace.self_maps[i], expected, rtol=1e-4, atol=1e-6)
        if mode == "text":
            assert not trace.cross_maps
            continue
        attention = getattr(layer, name)
        middle = attention(below, attention.keys_values(below), trace.self_maps[i].sum(1, keepdim=True) > 0)[0]
        expected = explicit_map(layer.crossattention, middle, image_states, lambda b, n, m: True)
        torch.testing.assert_close(trace.cross_maps[i], expected, rtol=1e-4, atol=1e-6)
        assert expected.std() > 1e-3  # far from uniform
    with pytest.raises(UserError, match="no layer 3"):
        model.encode_text(ids, mask, Trace(3))


def test_maps_and_states_equal_transformers():
    theirs, (image, ids, mask) = peer("BlipForConditionalGeneration", std=0.3), batch(first=62)
    model, _ = load(theirs)
    seen, text = Trace(0, 1), Trace(0, 1, 2)
    with torch.no_grad():
        states = model.encode_image(image, seen)
        model.decode(ids, mask, states, trace=text)
        vision = theirs.vision_model(image, output_attentions=True, output_hidden_states=True)
        found = theirs.text_decoder(ids, mask.long(), encoder_hidden_states=states, output_attentions=True,
                                    output_hidden_states=True)
    for i in range(2):
        torch.testing.assert_close(seen.self_maps[i], vision.attentions[i], **CLOSE)
        torch.testing.assert_close(seen.states[i], vision.hidden_states[i + 1], **CLOSE)
    for i in range(3):
        rows = mask[:, None, :, None].expand_as(found.attentions[i])
        torch.testing.assert_close(text.self_maps[i][rows], found.attentions[i][rows], **CLOSE)
        rows = mask[:, None, :, None].expand_as(found.cross_attentions[i])
        torch.testing.assert_close(text.cross_maps[i][rows], found.cross_attentions[i][rows], **CLOSE)
        torch.testing.assert_close(text.states[i][mask], found.hidden_states[i + 1][mask], **CLOSE)


def test_maps_carry_gradient_and_can_be_left_out():
    model, (image, ids, mask) = ours(), batch()
    trace = Trace(-1)
    model.fuse(ids, mask, model.encode_image(image), trace)
    (trace.self_maps[-1].square().sum() + trace.cross_maps[-1].square().sum()).backward()
    assert all(getattr(model.text.encoder.layer[-1], name).self.query.weight.grad.abs().sum() > 0
               for name in ("attention", "crossattention"))
    trace = Trace(-1, maps=False)
    model.fuse(ids, mask, model.encode_image(image), trace)
    assert not trace.self_maps and not trace.cross_maps and trace.states[-1].shape == (3, 9, 48)


# ----------------------------------------------------------------------------------------------------------- generation


def caption_model(seed):
    """A captioner whose captions differ from image to image and end at different lengths."""
    theirs = peer("BlipForConditionalGeneration", seed, std=0.35)
    with torch.no_grad():
        theirs.text_decoder.cls.predictions.bias[3] += 3 + seed % 4  # [SEP]
        theirs.text_decoder.bert.embeddings.position_embeddings.weight *= 3
        for layer in theirs.text_decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight *= 4
    return theirs, load(theirs)[0]


def cut(ids):
    """A generated text as a tuple that ends with [SEP], if it has one: what follows is padding."""
    ids = ids.tolist()
    return tuple(ids[:ids.index(3, 1) + 1] if 3 in ids[1:] else ids)


GENERATION = [dict(num_beams=beams, min_length=low, max_length=high, repetition_penalty=penalty)
              for beams, low, high, penalty in ((1, 5, 20, 1.0), (3, 5, 20, 1.0), (1, 8, 14, 1.3), (3, 7, 12, 1.5),
                                                (3, 1, 10, 0.9), (2, 0, 8, 1.0), (5, 5, 16, 1.1))]


def test_captions_equal_transformers():
    """20 models, 3 images each, in turn under the settings above, with and without a prompt of three words."""
    texts, early, beams_matter = [], 0, 0
    for seed in range(20):
        theirs, model = caption_model(seed)
        image, prompt = batch(seed=seed)[0], [(), (5, 9, 4)][seed % 2]
        states = model.encode_image(image)
        for setting in (GENERATION[0], GENERATION[1], GENERATION[2 + seed % 5]):
            start = torch.tensor([[62, *prompt, 3]]).repeat(3, 1)  # transformers cuts the last token off
            expected = theirs.generate(image, start, length_penalty=1.0, early_stopping=False, **setting)
            found = model.generate(states, prompt, **setting)
            assert [cut(row) for row in found] == [cut(row) for row in expected], (seed, setting)
            assert all(set(row[len(cut(row)):].tolist()) <= {0} for row in found)
            texts += [cut(row) for row in found]
            early += sum(len(cut(row)) < setting["max_length"] for row in found)
        greedy, best = (model.generate(states, prompt, **setting) for setting in GENERATION[:2])
        beams_matter += sum(cut(a) != cut(b) for a, b in zip(greedy, best))
    assert len(set(texts)) > 0.5 * len(texts) and 0.2 < early / len(texts) < 0.95 and beams_matter > 8


def test_answers_equal_transformers():
    for seed in range(10):
        theirs = peer("BlipForQuestionAnswering", seed, std=0.35, text_width=32)
        image, question, _ = batch(seed=seed, first=63)
        mask = torch.ones_like(question)  # transformers' generate lets the decoder see padded question tokens
        expected = theirs.generate(question, image, mask, num_beams=3, max_length=10, min_length=1)
        model, _ = load(theirs)
        states = model.fuse(question, mask, model.encode_image(image))
        found = model.generate(states, num_beams=3, max_length=10, min_length=1)
        assert [cut(row) for row in found] == [cut(row) for row in expected]


def test_generation_with_masked_source():
    """Padded question states are invisible, and images of a batch do not touch each other."""
    model, (_, _, mask) = ours(std=0.35), batch()
    states = torch.randn(3, 9, 32)
    for setting in GENERATION[:4]:
        found = model.generate(states, (8,), source_mask=mask, **setting)
        for row, state, seen in zip(found, states, mask):
            assert cut(model.generate(state[None, seen], (8,), **setting)[0]) == cut(row)


def test_cache_in_pieces():
    """Tokens given to the decoder in pieces of 1 to 4, several rows to an image, equal one pass over the whole."""
    model, (image, _, _) = ours(std=0.3), batch()
    states, ids = model.encode_image(image), torch.randint(4, 62, (6, 10))
    with torch.no_grad():
        whole = model.decoder(ids, None, "decoder", states)
        repeated = model.decoder(ids, None, "decoder", states.repeat_interleave(2, 0))
        cache, pieces = [{} for _ in range(3)], []
        for piece in ids.split([2, 1, 4, 3], 1):
            pieces.append(model.decoder(piece, None, "decoder", states, cache=cache))
    torch.testing.assert_close(whole, repeated, **CLOSE)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)


def test_one_wait_per_token():
    """The device is waited for once per generated token, by the stop check."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    model, states = ours(std=0.35), torch.randn(3, 17, 32)
    for setting in GENERATION:
        with Waits() as waits:
            waits.count = 0
            steps = model.generate(states, **setting).shape[1] - 1
        assert waits.count <= steps


def test_generation_limits():
    model, states = ours(), torch.randn(2, 17, 32)
    for setting in (dict(max_length=41), dict(prompt=(5,) * 19)):
        with pytest.raises(UserError, match="max_length"):
            model.generate(states, **setting)


# -------------------------------------------------------------------------------------------------------------- ranking


def brute_force_rank(model, states, mask, answers, k, smoothing):
    """One question and one answer at a time, token by token."""
    best = []
    for state, seen in zip(states, mask):
        def log_probabilities(*words):
            ids = torch.tensor([words])
            return model.decode(ids, None, state[None, seen])[0, -1].log_softmax(0)

        first = log_probabilities(62)
        order = sorted(range(len(answers)), key=lambda a: -first[answers[a][1]])[:k]
        scores = {}
        for a in order:
            words, scores[a] = [62, *[w for w in answers[a].tolist()[1:] if w != 0]], 0.0
            for n in range(1, len(words)):
                log_p = log_probabilities(*words[:n])
                scores[a] += (1 - smoothing) * log_p[words[n]] + smoothing * log_p.mean()
        best.append(max(scores, key=scores.get))
    return best


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@torch.no_grad()
def test_ranked_answers_equal_brute_force(smoothing):
    ranks = []
    for seed in range(4):
        model, generator = ours(seed, std=0.3, shared=False), torch.Generator().manual_seed(seed)
        answers = torch.zeros(25, 6, dtype=torch.long)
        firsts = torch.randperm(58, generator=generator)[:25] + 4  # different first words: no ties at place k
        for a, row in enumerate(answers):
            n = 1 + a % 4
            row[:n + 2] = torch.tensor([2, firsts[a], *torch.randint(4, 62, (n - 1,), generator=generator), 3])
        states, (_, _, mask) = torch.randn(3, 9, 48, generator=generator), batch()
        for k in (1, 6, 25, 128):
            found = model.rank_answers(states, mask, answers, k, smoothing).tolist()
            assert found == brute_force_rank(model, states, mask, answers, k, smoothing)
            ranks += found
    assert len(set(ranks)) > 8


# -------------------------------------------------------------------------------------------------------------- weights


def salesforce_names(model):
    """Weights of ours under the names of BLIP's own code, shared ones twice, with momentum copies and queues."""
    found = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("text."):
            found[name] = tensor
        elif name.startswith("text.cls."):
            found[name.replace("text.", "text_decoder.", 1)] = tensor
        elif "decoder_attention" in name:
            found[name.replace("text.", "text_decoder.bert.", 1).replace("decoder_attention", "attention")] = tensor
        else:
            found[name.replace("text.", "text_encoder.", 1)] = tensor
            if ".attention." not in name:
                found[name.replace("text.", "text_decoder.bert.", 1)] = tensor.clone()
    for name in [n for n in found if n.startswith(("visual_encoder", "text_encoder", "vision_proj", "text_proj"))]:
        module, rest = name.split(".", 1)
        found[f"{module}_m.{rest}"] = torch.randn_like(found[name])
    head = "text_decoder.cls.predictions."
    found |= {f"{head}decoder.bias": found[f"{head}bias"], "image_queue": torch.randn(256, 8),
              "text_queue": torch.randn(256, 8), "queue_ptr": torch.zeros(1, dtype=torch.long),
              "text_encoder.embeddings.position_ids": torch.arange(40)[None],
              "text_decoder.bert.embeddings.position_ids": torch.arange(40)[None]}
    found.setdefault(f"{head}decoder.weight", found["text_encoder.embeddings.word_embeddings.weight"])
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_salesforce_names(tied):
    """A pre-trained checkpoint comes back whole, with a tied LM head or one of its own."""
    model, (image, ids, mask) = ours(text=replace(SMALL_TEXT, tied_head=tied)), batch()
    again, missing = load(salesforce_names(model))
    assert not missing and again.text_decoder is None and again.text.size.tied_head == tied
    assert set(again.state_dict()) == set(model.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        states = model.encode_image(image)
        logits = model.decode(ids, mask, states)
        assert torch.equal(again.decode(ids, mask, states), logits)
        model.text.cls.predictions.decoder = None
        assert torch.equal(model.decode(ids, mask, states), logits) == tied


def test_salesforce_part_names_equal_transformers():
    """BLIP's captioner and VQA files, whose text names transformers keeps: the vision names are turned back here."""
    back = (("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"), ("vision_model.post_layernorm",
             "visual_encoder.norm"), ("self_attn.projection", "attn.proj"), ("self_attn", "attn"),
            ("layer_norm", "norm"))
    for kind in ("BlipForConditionalGeneration", "BlipForQuestionAnswering"):
        theirs, weights = peer(kind, text_width=32), {}
        for name, tensor in theirs.state_dict().items():
            for new, old in back:
                name = name.replace(new, old)
            weights[name] = tensor
        assert not any("vision_model" in name for name in weights)
        (one, _), (two, missing) = load(weights), load(theirs)
        one, two = one.state_dict(), two.state_dict()
        held = [name for name in two if dlip.part_of(name) not in missing]
        assert len(held) > 60 and all(torch.equal(one[name], two[name]) for name in held)


def test_checkpoint_file(tmp_path):
    """A file as BLIP releases it, beside other things, read with common.read_weights."""
    model = ours()
    torch.save({"model": salesforce_names(model), "epoch": 19}, tmp_path / "blip.pth")
    again, missing = load(read_weights(tmp_path / "blip.pth")[0])
    assert not missing
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_untied_decoder():
    """Untying changes no output and lets the copies differ."""
    model, (image, ids, mask) = ours(vision=replace(SMALL_VISION, width=48)), batch()
    with torch.no_grad():
        states = model.encode_image(image)
        before = model.fuse(ids, mask, states), model.decode(ids, mask, states)
        model.untie_decoder()
        assert torch.equal(model.fuse(ids, mask, states), before[0])
        assert torch.equal(model.decode(ids, mask, states), before[1])
        model.text_decoder.encoder.layer[0].output.dense.weight += 1
        assert torch.equal(model.fuse(ids, mask, states), before[0])
        changed = model.decode(ids, mask, states)
    assert not torch.allclose(changed, before[1])
    again, missing = load(model.state_dict())
    assert not missing and torch.equal(again.decode(ids, mask, states), changed)


def test_untied_decoder_of_another_width():
    """ViT of 32, BERT of 48: the decoder then reads text states, and only keys and values of these are not copies."""
    model, (image, ids, mask) = ours(), batch()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        states = model.encode_image(image)
        fused = model.fuse(ids, mask, states)
        model.untie_decoder()
        assert torch.equal(model.fuse(ids, mask, states), fused)
        answer = model.decode(ids, mask, fused, mask)
    fresh = []
    for name, tensor in model.text_decoder.state_dict().items():
        if tensor.shape != old[f"text.{name}"].shape:
            assert tensor.shape == (48, 48) and abs(tensor.std() / 0.02 - 1) < 0.1
            fresh.append(name)
        elif not name.endswith("bias") or "crossattention.self" not in name:
            assert torch.equal(tensor, old[f"text.{name}"]), name
    assert fresh == [f"encoder.layer.{i}.crossattention.self.{part}.weight" for i in range(3)
                     for part in ("key", "value")]
    again, missing = load(model.state_dict())
    with torch.no_grad():
        assert not missing and torch.equal(again.decode(ids, mask, fused, mask), answer)


def test_positions_are_resized_as_by_transformers():
    theirs = peer("BlipForConditionalGeneration", image_size=32)
    for size in (48, 24):
        model, _ = load(theirs, image_size=size)
        image = torch.randn(2, 3, size, size)
        expected = theirs.vision_model(image, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.encode_image(image), expected, **CLOSE)


def test_torchvision_weights():
    torchvision = import_torchvision()
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 128).eval()
    shake(theirs, 0)
    model, image = VisionTransformer(SMALL_VISION).eval(), torch.randn(3, 3, 32, 32)
    dlip.load_vision(model, theirs.state_dict())
    with torch.no_grad():
        x = theirs._process_input(image)
        expected = theirs.encoder(torch.cat([theirs.class_token.expand(3, -1, -1), x], 1))
        torch.testing.assert_close(model(image), expected, **CLOSE)
    with torch.device("meta"):  # the real vit_b_16 has no other names or shapes
        names = torchvision.models.vit_b_16().state_dict()
        base = VisionTransformer(VIT["base"])
    found = {dlip.rename(name, dlip.VISION_NAMES): w.shape for name, w in names.items()}
    found.pop("")
    assert found == {name: w.shape for name, w in base.state_dict().items()}


@pytest.mark.parametrize("name, vision", [("deit_tiny_patch16_224", "tiny"), ("deit_small_patch16_224", "small")])
def test_timm_weights(name, vision):
    import_torchvision()
    timm = pytest.importorskip("timm")
    theirs = shake(timm.create_model(name), 0, std=0.05)
    model, image = VisionTransformer(VIT[vision]).eval(), torch.randn(2, 3, 224, 224)
    dlip.load_vision(model, theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs.forward_features(image), rtol=1e-4, atol=1e-4)
    small = VisionTransformer(replace(VIT[vision], image_size=96))
    dlip.load_vision(small, theirs.state_dict())
    assert small.pos_embed.shape[1] == 37 and torch.equal(small.pos_embed[:, 0], theirs.pos_embed[:, 0])
    for change, message in ((lambda w: w.pop("norm.bias"), "lack norm.bias"),
                            (lambda w: w.update(dist_token=torch.zeros(1)), "distilled"),
                            (lambda w: w.update(extra=torch.zeros(1)), "unknown to the model, extra")):
        weights = theirs.state_dict()
        change(weights)
        with pytest.raises(UserError, match=message):
            dlip.load_vision(model, weights)
    with pytest.raises(UserError, match="cls_token is"):
        dlip.load_vision(VisionTransformer(VIT["middle"]), theirs.state_dict())


def test_bert_weights():
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=62, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                                     intermediate_size=192, max_position_embeddings=40)
    theirs, (_, ids, mask) = shake(transformers.BertForMaskedLM(config), 0), batch()
    theirs.bert.embeddings.token_type_embeddings.weight.data.zero_()
    model = ours(1)
    fresh = {name: tensor.clone() for name, tensor in model.text.state_dict().items()}
    dlip.load_bert(model.text, theirs.state_dict())
    with torch.no_grad():
        expected = theirs.bert(ids, mask.long()).last_hidden_state
        torch.testing.assert_close(model.encode_text(ids, mask)[mask], expected[mask], **CLOSE)
        ours_logits = model.text.logits(model.encode_text(ids, mask))[..., :62]
        torch.testing.assert_close(ours_logits[mask], theirs(ids, mask.long()).logits[mask], **CLOSE)
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(model.text.state_dict()[words][62:], fresh[words][62:])
    layer = model.text.encoder.layer[1]
    assert torch.equal(layer.decoder_attention.self.key.weight, layer.attention.self.key.weight)
    cross = "encoder.layer.1.crossattention.self.key.weight"
    assert torch.equal(model.text.state_dict()[cross], fresh[cross])
    with pytest.raises(UserError, match="BERT weights"):
        dlip.load_bert(ours(text=replace(SMALL_TEXT, layers=2)).text, theirs.state_dict())


def test_bad_checkpoints():
    weights = salesforce_names(ours())
    with pytest.raises(UserError, match="no visual_encoder"):
        load({"something": torch.zeros(1)})
    for change, message in (
            ({"extra.weight": torch.zeros(1)}, "unknown to the model, extra.weight"),
            ({"itm_head.weight": torch.zeros(2, 5)}, "itm_head.weight is"),
            ({"itm_head.weight": None}, "lack itm_head.weight"),
            ({"text_encoder.encoder.layer.1.attention.self.key.bias": None}, "lack text.encoder.layer.1.attention")):
        changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        with pytest.raises(UserError, match=message):
            load(changed)


def test_initial_weights():
    """BERT's N(0, 0.02) and zero biases; truncated N(0, 0.02) in the ViT [BLIP's code]."""
    model = BLIP(VIT["tiny"], BERT["tiny"])
    for name, p in model.named_parameters():
        if name.startswith(("text.", "visual_encoder.")) and "patch_embed" not in name:
            if p.ndim >= 2:
                assert abs(p.std().item() / 0.02 - 1) < (0.2 if p.numel() < 1000 else 0.03), name
            else:
                assert torch.equal(p, torch.full_like(p, float(name.endswith(("Norm.weight", "norm.weight",
                                   "norm1.weight", "norm2.weight"))))), name
    assert model.temp.item() == pytest.approx(0.07)


# ----------------------------------------------------------------------------------------- with the rest of the project


def test_special_tokens_are_the_tokenizers():
    tokenizer, size = BertTokenizer(), TextSize(192, 4)
    assert (size.vocab, size.pad, size.cls, size.sep, size.dec, size.enc) == \
        (tokenizer.vocab_size, tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.dec, tokenizer.enc)


def test_help_is_instant_and_prints_the_assumptions():
    """Seconds of the processor, not of a clock that also counts what else the machine does."""
    before = os.times()
    finished = subprocess.run([sys.executable, dlip.__file__, "--help"], capture_output=True, text=True, timeout=120)
    after = os.times()
    assert finished.returncode == 0 and finished.stderr == ""
    assert after.children_user + after.children_system - before.children_user - before.children_system < 15
    words = " ".join(finished.stdout.split())
    assert "Assumptions, where the public text is silent." in words
    assert all(f" A{n} " in words for n in range(1, 10))
    assert all(common.flag(field.name) in words for field in fields(dlip.Config))
