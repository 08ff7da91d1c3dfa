"""BLIP as dlip.py has it, against independent references: transformers' BLIP, timm, and loops over
one image, one head, one token, one answer at a time."""

from dataclasses import asdict, replace

import common
import dlip
import pytest
import torch
from common import BertTokenizer, Checkpoint, UserError, import_torchvision
from dlip import BERT, BLIP, VIT, BLIPSize, TextSize, VisionSize, VisionTransformer

# --------------------------------------------------------------------------------- small models

VISION = VisionSize(32, 2, 4, patch=8, image_size=32)  # 17 tokens
TEXT = TextSize(48, 3, 3, 4, vocab=64, positions=40, dropout=0.0, cls=2, sep=3, dec=62, enc=63)
SMALL = BLIPSize(VISION, TEXT)
CLOSE = dict(rtol=1e-5, atol=1e-5)


def shake(model, seed, std=0.1):
    """Random weights, norms and biases included, so that no misplaced tensor goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = std * torch.randn(p.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            p.copy_(1 + noise if is_norm else noise)
    return model.eval()


def peer(kind, seed=0, std=0.1, text_width=48):
    """A small BLIP of transformers with random weights."""
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    text = dict(vocab_size=64, hidden_size=text_width, intermediate_size=4 * text_width,
                num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=40,
                bos_token_id=62, pad_token_id=0, sep_token_id=3, eos_token_id=3,
                label_smoothing=0.1)
    vision = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, image_size=32,
                  num_attention_heads=4, patch_size=8, layer_norm_eps=1e-6)  # BLIP's epsilon
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    return shake(getattr(transformers, kind)(config), seed, std)


def vit():
    """A small ViT of timm, without a head, with random weights."""
    import_torchvision()
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(32, 8, num_classes=0, embed_dim=32, depth=2, num_heads=4)
    return shake(model, 0)


def load(weights, size=SMALL, **options):
    """What load_blip makes of a state dict, with sizes as in our files."""
    return dlip.load_blip(Checkpoint("FILE", weights, {}, asdict(size)), **options).eval()


def ours(seed=0, std=0.2, size=SMALL, shared=True):
    return shake(BLIP(size, shared), seed, std)


def resized(**changes):
    return replace(SMALL, text=replace(TEXT, **changes))


def batch(size=3, length=9, seed=0, first=2):
    """Images, ids (first token, words, [SEP], padding) of different lengths, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, 32, 32, generator=generator)
    ids = torch.randint(4, 61, (size, length), generator=generator)
    ids[:, 0] = first
    for row in range(size):
        end = max(1, length - 1 - 2 * row)
        ids[row, end], ids[row, end + 1:] = 3, 0
    return image, ids, ids != 0


def begin(ids, token):
    return torch.cat([torch.full((len(ids), 1), token), ids[:, 1:]], 1)


# ------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("name, vision, text", [
    ("tiny", 5_524_416, 8_333_184), ("small", 21_665_664, 26_118_144),
    ("middle", 48_423_744, 60_432_768), ("base", 85_798_656, 137_258_496)])
def test_parameter_counts(name, vision, text):
    for shared in (True, False):
        with torch.device("meta"):
            counts = dlip.count_parameters(BLIP(BLIPSize(VIT[name], BERT[name]), shared))
        assert (counts["visual_encoder"], counts["text_encoder"]) == (vision, text)


def assert_maps(encoded, found, mask):
    """Where there are queries, the scores' softmax is the last layer's map of transformers."""
    for scores, maps in ((encoded.self_scores, found.attentions), (encoded.cross_scores, found.cross_attentions)):
        rows = mask[:, None, :, None].expand_as(scores)
        torch.testing.assert_close(scores.softmax(-1)[rows], maps[-1][rows], **CLOSE)


def test_retriever_equals_transformers():
    theirs, (image, ids, mask) = peer("BlipForImageTextRetrieval"), batch()
    need = ("text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
    model = load(theirs.state_dict(), need=need)
    with torch.no_grad():
        itc = theirs(ids, image, use_itm_head=False, attention_mask=mask.long())
        itm = theirs(begin(ids, 63), image, attention_mask=mask.long())
        states, text = model.encode_image(image), model.encode_text(ids)
        fused = model.fuse(ids, states).states
        cosines = model.image_feature(states) @ model.text_feature(text).T
        torch.testing.assert_close(states, itc.last_hidden_state, **CLOSE)
        torch.testing.assert_close(text[mask], itc.question_embeds[mask], **CLOSE)
        torch.testing.assert_close(cosines, itc.itm_score, **CLOSE)
        torch.testing.assert_close(fused[mask], itm.question_embeds[mask], **CLOSE)
        torch.testing.assert_close(model.match(fused), itm.itm_score, **CLOSE)
        encoded = model.fuse(ids, states, with_scores=True)
        found = theirs.text_encoder(begin(ids, 63), mask.long(), encoder_hidden_states=states, output_attentions=True)
    assert_maps(encoded, found, mask)
    with pytest.raises(UserError, match="lacks text_decoder"):
        load(theirs.state_dict(), need=("text_decoder.",))


def test_captioner_equals_transformers():
    """States, logits, loss with and without a prompt, and the last layer's maps."""
    theirs, (image, ids, mask) = peer("BlipForConditionalGeneration", std=0.3), batch(first=62)
    model = load(theirs.state_dict(), need=("text_decoder.",))
    with torch.no_grad():
        states = model.encode_image(image)
        logits = model.decode(begin(ids, 2), states)  # decode sets [DEC] itself
        for prompt in (1, 3):
            labels = ids.masked_fill(~mask, -100)
            labels[:, :prompt] = -100
            found = theirs(image, ids, mask.long(), labels=labels)
            torch.testing.assert_close(logits[mask], found.logits[mask], **CLOSE)
            torch.testing.assert_close(dlip.lm_loss(logits, ids, prompt), found.loss, **CLOSE)
        encoded = model.decoder_states(ids, states, with_scores=True)
        found = theirs.text_decoder(ids, mask.long(), encoder_hidden_states=states,
                                    output_attentions=True)
    assert_maps(encoded, found, mask)
    with pytest.raises(UserError, match="lacks text_encoder"):
        load(theirs.state_dict(), need=("text_encoder.", "itm_head."))


def test_vqa_equals_transformers():
    """Question by question, without padding: transformers 5 drops the mask that hides it."""
    theirs = peer("BlipForQuestionAnswering", text_width=32)
    image, question, mask = batch(first=63)
    model = load(theirs.state_dict(), resized(width=32), need=("text_encoder.", "text_decoder."))
    assert not model.shared  # encoder and decoder differ
    _, answer, answer_mask = batch(length=6, seed=1, first=62)
    labels = answer.masked_fill(~answer_mask, -100)
    with torch.no_grad():
        states = model.fuse(question, model.encode_image(image)).states
        logits = model.decode(answer, states, mask)
        sums = dlip.lm_loss(logits, answer, per_text=True)
        for i in range(3):
            row, ids, own = slice(i, i + 1), question[i:i + 1, mask[i]], answer_mask[i]
            seen = theirs.vision_model(image[row])[0]
            found = theirs.text_encoder(ids, encoder_hidden_states=seen)[0]
            torch.testing.assert_close(states[row, mask[i]], found, **CLOSE)
            found = theirs.text_decoder(answer[row], own[None].long(),
                                        encoder_hidden_states=found).logits
            torch.testing.assert_close(logits[i, own], found[0, own], **CLOSE)
            loss = theirs(ids, image[row], answer[row], own[None].long(), labels=labels[row]).loss
            torch.testing.assert_close(dlip.lm_loss(logits[row], answer[row]), loss, **CLOSE)
            torch.testing.assert_close(sums[i], loss * (own.sum() - 1), **CLOSE)


@pytest.mark.parametrize("with_scores", [False, True])
def test_dropout_only_in_training(with_scores):
    model, (image, ids, _) = ours(size=resized(dropout=0.5)), batch()
    states = model.encode_image(image)
    for part in model.text_encoder.modules():
        runs = [model.fuse(ids, states, with_scores).states for _ in range(2)]
        assert torch.equal(*runs)
        if isinstance(part, (torch.nn.Dropout, dlip.Attention)):  # its weights' dropout
            part.training = True
            runs = [model.fuse(ids, states, with_scores).states for _ in range(2)]
            assert not torch.equal(*runs)
            part.training = False


def test_heads_are_exact_under_autocast():
    """In evaluation ITC's features, ITM's and LM's logits are those of fp32."""
    model, (image, ids, _) = ours(), batch()
    with torch.no_grad():
        states, text = model.encode_image(image), model.encode_text(ids)
        heads = ((model.image_feature, states), (model.text_feature, text), (model.match, text),
                 (model.logits, text))
        for head, given in heads:
            with torch.autocast("cpu", torch.bfloat16):
                found = head(given)
            assert torch.equal(found, head(given)) and found.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert model.train().logits(text).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------- generation


def caption_model(seed):
    """A captioner whose captions differ from image to image and end at different lengths."""
    theirs = peer("BlipForConditionalGeneration", seed, std=0.35)
    with torch.no_grad():
        theirs.text_decoder.cls.predictions.bias[3] += 3 + seed % 4  # [SEP]
        theirs.text_decoder.bert.embeddings.position_embeddings.weight *= 3
        for layer in theirs.text_decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight *= 4
    return theirs, load(theirs.state_dict())


SETTINGS = [dict(num_beams=beams, min_length=low, max_length=high) for beams, low, high in
            ((1, 5, 20), (3, 5, 20), (1, 8, 14), (3, 7, 12), (3, 1, 10), (2, 0, 8), (5, 5, 16))]


@torch.no_grad()
def test_captions_equal_transformers():
    """20 models, 3 images each, under the settings in turn, with and without a prompt."""
    lengths, rules_differ = set(), 0
    for seed in range(20):
        theirs, model = caption_model(seed)
        image, prompt = batch(seed=seed)[0], ([], [11, 12, 13])[seed % 2]
        setting = SETTINGS[seed % len(SETTINGS)]
        states = model.encode_image(image)
        start = torch.tensor([[62, *prompt]] * 3)
        wanted = theirs.text_decoder.generate(
            input_ids=start, encoder_hidden_states=states, do_sample=False, eos_token_id=3,
            pad_token_id=0, attention_mask=torch.ones_like(start), **setting)
        found = model.generate(states, prompt, **setting, released=False)
        wanted = [row[:row.index(3, 1) + 1] if 3 in row else row for row in wanted.tolist()]  # up to [SEP]
        assert found == wanted, setting
        lengths |= {len(row) for row in found}
        rules_differ += found != model.generate(states, prompt, **setting)
    assert len(lengths) > 6 and rules_differ > 0


def released_beam_search(table, prompt, beams, low, high, sep=1):
    """BLIP's released rule for one text, over log-probabilities table[tokens so far, last one]."""
    running, finished = {tuple(prompt): 0.0}, {}
    for n in range(len(prompt) + 1, high + 1):
        longer = {(*ids, token): score + float(table[len(ids), ids[-1], token])
                  for ids, score in running.items() for token in range(len(table))
                  if token != sep or n > low}
        order = sorted(longer, key=longer.get, reverse=True)[:2 * beams]
        for ids in order[:beams]:
            if ids[-1] == sep:
                finished[ids] = longer[ids] / (len(ids) - 1)  # without [SEP], with the prompt
        worst_first = sorted(finished, key=finished.get)
        finished = {ids: finished[ids] for ids in worst_first[-beams:]}
        if len(finished) == beams and min(finished.values()) >= longer[order[0]] / (n - 1):
            return max(finished, key=finished.get)
        running = {ids: longer[ids] for ids in [ids for ids in order if ids[-1] != sep][:beams]}
    finished |= {ids: score / high for ids, score in running.items()}
    return max(finished, key=finished.get)


def search(table, prompts, *setting):
    """dlip.beam_search over such a table."""
    def next_log_p(texts, _):
        return torch.stack([table[len(ids), ids[-1]] for ids in texts])

    return dlip.beam_search(next_log_p, prompts, 1, *setting)


def test_beam_search_is_blips_released_one():
    """Random chains of words, each compared with a search of one text over dicts."""
    ends, changed = set(), 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        chance = 2 * torch.randn(12, 12, 12, generator=generator)
        chance[:, :, 1] += seed % 4
        table = chance.log_softmax(-1)
        setting = (1, 2, 3, 5)[seed % 4], (0, 3, 6)[seed % 3], (7, 11)[seed % 2]
        prompts = [[start, 4, start] for start in (2, 3, 7)]
        found = search(table, prompts, *setting, True)
        for prompt, ids in zip(prompts, found):
            assert tuple(ids) == released_beam_search(table, prompt, *setting)
            ends.add(len(ids))
        changed += found != search(table, prompts, *setting, False)
    assert len(ends) > 6 and changed > 10


# ------------------------------------------------------------------------------- answer ranking


def brute_force_rank(model, states, mask, answers, top):
    """One question and one answer at a time, token by token, with label smoothing 0.1."""
    best = []
    for state, seen in zip(states, mask):
        def log_probabilities(*words):
            ids = torch.tensor([words])
            return model.decode(ids, state[None, seen])[0, -1].log_softmax(0)

        first = log_probabilities(62)
        order = sorted(range(len(answers)), key=lambda a: -first[answers[a][1]])[:top]
        scores = {}
        for a in order:
            words, scores[a] = [62, *[w for w in answers[a].tolist()[1:] if w != 0]], 0.0
            for n in range(1, len(words)):
                log_p = log_probabilities(*words[:n])
                scores[a] += 0.9 * log_p[words[n]] + 0.1 * log_p.mean()
        best.append(max(scores, key=scores.get))
    return best


@torch.no_grad()
def test_ranked_answers_equal_brute_force():
    ranks = []
    for seed in range(4):
        model, generator = ours(seed, 0.3, shared=False), torch.Generator().manual_seed(seed)
        answers = torch.zeros(25, 6, dtype=torch.long)
        firsts = torch.randperm(58, generator=generator)[:25] + 4  # no ties at the last place
        for a, row in enumerate(answers):
            n = 1 + a % 4
            words = torch.randint(4, 62, (n - 1,), generator=generator)
            row[:n + 2] = torch.tensor([2, firsts[a], *words, 3])
        states, (_, _, mask) = torch.randn(3, 9, 48, generator=generator), batch()
        for top in (1, 6, 128):
            found = model.rank_answers(states, mask, answers, top).tolist()
            assert found == brute_force_rank(model, states, mask, answers, top)
            ranks += found
    assert len(set(ranks)) > 6


# -------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("shared", [True, False])
def test_names_are_blips_own(shared):
    """Those of timm's ViT and transformers' text networks, whose code BLIP's is; nothing more."""
    kind = "BlipForConditionalGeneration" if shared else "BlipForQuestionAnswering"
    width = 48 if shared else 32
    named = {"visual_encoder": vit(), "text_decoder": peer(kind, text_width=width).text_decoder,
             "text_encoder": peer("BlipForImageTextRetrieval", text_width=width).text_encoder}
    wanted = {f"{prefix}.{name}": w.shape for prefix, module in named.items()
              for name, w in module.state_dict().items() if not name.endswith("position_ids")}
    for name, inside, outside in (("vision_proj", 32, 256), ("text_proj", width, 256),
                                  ("itm_head", width, 2)):
        wanted |= {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}
    for bert in ("text_encoder", "text_decoder.bert"):  # a buffer of older versions
        wanted[f"{bert}.embeddings.position_ids"] = 1, 40
    found = BLIP(resized(width=width), shared).state_dict()
    assert {name: w.shape for name, w in found.items()} == wanted | {"temp": ()}


def test_sizes_of_published_checkpoints():
    """BLIP's two at any resolution; whether the LM head is tied is seen from the weights."""
    kernel, words = "visual_encoder.patch_embed.proj.weight", torch.randn(5, 4)
    for width, layers, head, tied in ((768, 12, words.clone(), True), (1024, 24, words + 1, False)):
        weights = {kernel: torch.zeros(width, 3, 16, 16), "visual_encoder.pos_embed": torch.zeros(1, 577, width),
                   "text_decoder.bert.embeddings.word_embeddings.weight": words,
                   "text_decoder.cls.predictions.decoder.weight": head}
        wanted = VisionSize(width, layers, width // 64, 16, 384), TextSize(768, 12, 12, tied_head=tied)
        assert dlip.blip_size(Checkpoint("FILE", weights, {}, None), weights) == BLIPSize(*wanted)
    with pytest.raises(UserError, match="no weights of a BLIP"):
        dlip.blip_size(Checkpoint("FILE", {"something": words}, {}, None), {"something": words})


@pytest.mark.parametrize("width", [32, 48])
def test_untied_decoder(width):
    """VQA's start: copies that share nothing; keys and values of another width start afresh."""
    blip = ours(size=resized(width=width))
    before = blip.state_dict()
    model = load(before, blip.size, untie=True)
    assert not model.shared
    kept = {name for name, w in model.state_dict().items() if torch.equal(w, before[name])}
    afresh = before.keys() - kept
    for name in afresh:
        assert "text_decoder" in name and "crossattention.self." in name and "query" not in name
        w = model.state_dict()[name]
        assert w.shape[-1] == 48 and abs(w.std() - (0.02 if w.ndim == 2 else 0.0)) < 0.002
    assert len(afresh) == (0 if width == 32 else 12)
    places = [w.data_ptr() for _, w in model.named_parameters(remove_duplicate=False)]
    assert len(places) - len({*places}) == 2  # the LM head's weight and bias
    assert not {*places} & {w.data_ptr() for w in before.values()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_pretraining_checkpoints_come_back_whole(tmp_path, tied, shared):
    """Through a file, with a tied LM head or one of its own, and shares what it should."""
    size = resized(tied_head=tied)
    model = ours(size=size, shared=shared)
    beside = {"visual_encoder_m.cls_token": torch.randn(1, 1, 32), "image_queue": torch.randn(256, 8),
              "queue_ptr": torch.zeros(1, dtype=torch.long)}  # momentum copies and queues
    torch.save({"model": model.state_dict() | beside, "epoch": 19}, tmp_path / "blip.pth")
    again = load(common.read_checkpoint(tmp_path / "blip.pth").weights, size)
    assert again.shared == shared
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in model.state_dict().items())
    names = f"text_encoder.{dlip.WORDS}", f"text_decoder.bert.{dlip.WORDS}", dlip.CLASSIFIER
    words = [again.get_parameter(name) for name in names]
    assert (words[0] is words[1]) == shared and (words[1] is words[2]) == tied
    torch.save({"model": model.state_dict(), "size": asdict(size), "config": {}},
               tmp_path / "ours.pt")  # ours, which knows its sizes
    ours_again = dlip.load_blip(common.read_checkpoint(tmp_path / "ours.pt"))
    assert ours_again.size == replace(size, text=replace(size.text, dropout=0.0))


def test_positions_are_resized_as_by_transformers():
    theirs = peer("BlipForConditionalGeneration")
    for side in (48, 24):
        model, image = load(theirs.state_dict(), image_size=side), torch.randn(2, 3, side, side)
        assert model.size.vision.image_size == side
        wanted = theirs.vision_model(image, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.encode_image(image), wanted, **CLOSE)


def test_timm_weights():
    theirs, model, image = vit(), VisionTransformer(VISION).eval(), torch.randn(2, 3, 32, 32)
    weights = theirs.state_dict()
    dlip.load_named(model, weights, "FILE", ("",))
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs.forward_features(image), **CLOSE)
    absent = {name: w for name, w in weights.items() if name != "norm.bias"}
    distilled = {**weights, "pos_embed": torch.zeros(1, 18, 32)}
    wide = VisionTransformer(replace(VISION, width=64))
    for network, bad, message in ((model, absent, "FILE lacks norm.bias"), (wide, weights, "FILE .*32"),
                                  (model, distilled, r"FILE .*pos_embed.*1, 18, 32.*1, 17, 32")):
        with pytest.raises(UserError, match=message):
            dlip.load_named(network, bad, "FILE", ("",))


def test_initial_weights():
    """BERT's N(0, 0.02) and zero biases; truncated N(0, 0.02) in the ViT [BLIP's code]."""
    for shared in (True, False):
        model = BLIP(BLIPSize(VIT["tiny"], BERT["tiny"]), shared)
        for name, p in model.named_parameters():
            if not name.startswith(("visual_encoder", "text_")) or "_proj" in name or "patch_embed" in name:
                continue  # torch's
            if p.ndim >= 2:
                assert abs(p.std().item() / 0.02 - 1) < (0.2 if p.numel() < 1000 else 0.03), name
            else:
                one = "norm" in name.lower() and name.endswith("weight")
                assert torch.equal(p, torch.full_like(p, float(one))), name
        assert model.temp.item() == pytest.approx(0.07)


def test_special_tokens_are_the_tokenizers():
    tokenizer, size = BertTokenizer(), TextSize(192, 4, 4)
    for name in ("pad", "cls", "sep", "dec", "enc"):
        assert getattr(size, name) == getattr(tokenizer, name)
    assert size.vocab == tokenizer.vocab_size
