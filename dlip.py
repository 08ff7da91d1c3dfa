"""DLIP: Distilling Language-Image Pre-training
Kuang, Wu, Zheng, Li, Xiao, Wang, Zheng, Ji, 2023, https://arxiv.org/abs/2308.12956. No official code was released.

A BLIP (Li et al. 2022, https://arxiv.org/abs/2201.12086, whose code is public, [BLIP] below), the teacher, is distilled
into a smaller one that still retrieves, captions and answers. Both are an image encoder (ViT) and ONE text network that
runs in three modes: "text" (unimodal, for ITC), "multimodal" (cross-attends to the image, for ITM and for questions)
and "decoder" (causal and cross-attending, for captions and answers). The modes share embeddings, cross-attention and
feed-forward layers; only self-attention comes twice. Parameters are named as BLIP's, so that its checkpoints load with
a change of prefix.

    model, missing = dlip.load_blip(common.read_weights("model_base.pth")[0])      # BLIP's file, or Hugging Face's
    model.eval().generate(model.encode_image(images), prompt=common.BertTokenizer().encode("a picture of "))
    student = dlip.BLIP(dlip.VIT["small"], dlip.BERT["small"])                     # load_vision, load_bert start it

Here are the models in the paper's four sizes, the reading of published weights (BLIP's, a BERT's, an ImageNet ViT's),
generation and the ranking of answers. DLIP's losses, training and evaluation are not written yet.

Checked by the tests at small sizes with random weights: outputs, maps, losses and generated texts equal those of
transformers' BLIP models, ranked answers a brute-force version, parameter counts those of BLIP's modules. No published
BLIP checkpoint has been loaded yet, and nothing has run on a GPU.

Where BLIP's code and Hugging Face's port of it differ, or leave no trace in the weights:
  A1  A padded question is masked in the answer decoder, as BLIP does in training and ranking; transformers shows the
      padding. In generating answers BLIP shows it too: source_mask=None.
  A2  fuse, encode_text and decode put [ENC], [CLS] and [DEC] at position 0 themselves.
  A3  The LM loss has label smoothing 0.1, in ranking answers too, as in BLIP's code.
  A4  Beam search is that of transformers 5: mean log-probability of the new tokens. The version BLIP ran on divided by
      the length with the prompt, so captions can differ in near ties.
  A5  Position embeddings are resized without antialiasing. LayerNorm's eps is 1e-6 in the ViT, dropout 0.1 in the text.
  A6  Encoder and decoder are tied in pre-training only; in VQA they are two networks (shared=False, untie_decoder).
  A7  BLIP's VQA fine-tuning has drop path 0.1 in the ViT: left out.
"""

import math
import re
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError

# Letters in shape comments: B images or texts, N tokens, M tokens attended to, D width, E width of the joint embedding,
# H heads, V vocabulary, K beams or answers per image, R rows of the decoder (B, or B * K), P tokens of the prompt, L of
# the longest text, A answers to choose from.

# --------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class VisionSize:
    width: int
    layers: int
    heads: int
    patch: int = 16
    image_size: int = 224


@dataclass(frozen=True)
class TextSize:
    """Sizes and special tokens. [DEC] and [ENC] are the two that BLIP adds at the end of BERT's vocabulary."""

    width: int
    layers: int
    heads: int = 12
    vocab: int = 30524
    positions: int = 512
    fusion_layers: int | None = None  # cross-attention in the top k layers only; None: in all
    dropout: float = 0.1
    tied_head: bool = True  # the LM head classifies with the word embeddings
    pad: int = 0
    cls: int = 101
    sep: int = 102
    dec: int = 30522
    enc: int = 30523


# DLIP's Table 1. Every BERT keeps 12 heads, so that text maps match the teacher's head for head.
VIT = {"tiny": VisionSize(192, 12, 3), "small": VisionSize(384, 12, 6), "middle": VisionSize(576, 12, 9),
       "base": VisionSize(768, 12, 12)}
BERT = {"tiny": TextSize(192, 4), "small": TextSize(384, 6), "middle": TextSize(576, 8), "base": TextSize(768, 12)}


# ---------------------------------------------------------------------------------------------------------------- model


class Trace:
    """Asks a forward pass for the maps and states of some layers (negative: counted from the last), keyed as asked.

    Afterwards states[l] (B, N, D) is what layer l gave, self_maps[l] (B, H, N, N) and cross_maps[l] (B, H, N, M) its
    attention probabilities before dropout. All carry gradient. maps=False leaves the fused attention kernel on.
    """

    def __init__(self, *layers, maps=True):
        self.layers, self.maps = layers, maps
        self.states, self.self_maps, self.cross_maps = {}, {}, {}

    def keys(self, layer, depth):
        """The names under which layer `layer` of `depth` was asked for."""
        wrong = [key for key in self.layers if not -depth <= key < depth]
        if wrong:
            raise UserError(f"there is no layer {wrong[0]}: the network has {depth} layers")
        return [key for key in self.layers if key % depth == layer]

    def note(self, keys, states, self_map, cross_map=None):
        for key in keys:
            self.states[key] = states
            for maps, found in ((self.self_maps, self_map), (self.cross_maps, cross_map)):
                if found is not None:
                    maps[key] = found


def attend(q, k, v, mask=None, dropout=0.0, with_map=False):
    """softmax(q k^T / sqrt(D/H)) v and, if wanted, the softmax: the fused kernel keeps it to itself.

    q (B, H, N, D/H), k and v (B, H, M, D/H), mask True where attention is allowed, broadcast to (B, H, N, M).
    """
    if not with_map:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    found = scores.softmax(-1)
    return F.dropout(found, dropout) @ v, found


class VisionAttention(nn.Module):
    """Multi-head self-attention, one matrix for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, with_map=False):
        """(B, N, D) -> (B, N, D), and the map (B, H, N, N) or None."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        out, found = attend(q, k, v, with_map=with_map)
        return self.proj(out.transpose(1, 2).flatten(2)), found


class Block(nn.Module):
    """Pre-norm transformer block of the image encoder."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(),
                                             fc2=nn.Linear(4 * width, width)))

    def forward(self, x, with_map=False):
        out, found = self.attn(self.norm1(x), with_map)
        x = x + out
        return x + self.mlp(self.norm2(x)), found


class VisionTransformer(nn.Module):
    """ViT without a head: all tokens, CLS first, after the final norm."""

    def __init__(self, size):
        super().__init__()
        self.size, width = size, size.width
        if size.image_size % size.patch or width % size.heads:
            raise UserError(f"image size {size.image_size} and width {width} must be multiples of patch {size.patch} "
                            f"and of {size.heads} heads")
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, size.patch, size.patch)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (size.image_size // size.patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for weight in (self.cls_token, self.pos_embed, *(m.weight for m in self.modules() if isinstance(m, nn.Linear))):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.zeros_(linear.bias)

    def forward(self, image, trace=None):
        """(B, 3, S, S) normalised pixels -> (B, N, D). Traced states are the blocks' outputs, before the final norm."""
        x = self.patch_embed(image).flatten(2).transpose(1, 2)  # (B, N-1, D)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1) + self.pos_embed.to(x.dtype)
        for i, block in enumerate(self.blocks):
            keys = trace.keys(i, len(self.blocks)) if trace else ()
            x, found = block(x, bool(keys) and trace.maps)
            if keys:
                trace.note(keys, x, found)
        return self.norm(x)


class AddNorm(nn.Module):
    """How every BERT sublayer ends (post-norm): linear, dropout, add the residual, LayerNorm."""

    def __init__(self, inner, width, dropout):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """BERT's attention sublayer. Keys and values come from the tokens themselves or from a source of another width."""

    def __init__(self, width, heads, source_width, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.self = nn.ModuleDict(dict(query=nn.Linear(width, width), key=nn.Linear(source_width, width),
                                       value=nn.Linear(source_width, width)))  # BERT's name: attention.self.query
        self.output = AddNorm(width, width, dropout)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, H, N, D/H)

    def keys_values(self, source):
        """(B, M, source width) -> keys and values, each (B, H, M, D/H)."""
        return self.split(self.self.key(source)), self.split(self.self.value(source))

    def forward(self, x, keys_values, mask=None, with_map=False):
        """(B, N, D) -> (B, N, D), and the map (B, H, N, M) or None."""
        q = self.split(self.self.query(x))
        out, found = attend(q, *keys_values, mask, self.dropout if self.training else 0.0, with_map)
        return self.output(out.transpose(1, 2).flatten(2), x), found


class TextLayer(nn.Module):
    """Self-attention of the mode, then cross-attention and feed-forward, which all modes share."""

    def __init__(self, size, source_width, roles, fuses):
        super().__init__()
        width, heads, dropout = size.width, size.heads, size.dropout
        if "encoder" in roles:
            self.attention = Attention(width, heads, width, dropout)
        if "decoder" in roles:
            self.decoder_attention = Attention(width, heads, width, dropout)
        self.crossattention = Attention(width, heads, source_width, dropout) if fuses else None
        self.intermediate = nn.Sequential(OrderedDict(dense=nn.Linear(width, 4 * width), act=nn.GELU()))
        self.output = AddNorm(4 * width, width, dropout)

    def forward(self, x, mode, mask, source, source_mask, past=None, with_map=False):
        """x (R, N, D), source (B, M, source width) -> x, self map (R, H, N, M), cross map (B, H, R/B * N, M).

        `past`, a dict, keeps this layer's keys and values between the steps of a generation: those of the tokens grow,
        those of the source are computed once.
        """
        attention = self.decoder_attention if mode == "decoder" else self.attention
        keys_values = attention.keys_values(x)
        if past is not None:
            if "tokens" in past:
                keys_values = tuple(torch.cat(pair, 2) for pair in zip(past["tokens"], keys_values))
            past["tokens"] = keys_values
        x, self_map = attention(x, keys_values, mask, with_map)
        cross_map = None
        if mode != "text" and self.crossattention is not None:
            keys_values = past["source"] if past and "source" in past else self.crossattention.keys_values(source)
            if past is not None:
                past["source"] = keys_values
            # Several beams or answers to one image: their queries stand side by side, the image's keys are not copied.
            queries = x.reshape(len(keys_values[0]), -1, x.shape[-1])  # (B, R/B * N, D)
            out, cross_map = self.crossattention(queries, keys_values, source_mask, with_map)
            x = out.view_as(x)
        return self.output(self.intermediate(x), x), self_map, cross_map


class PredictionHead(nn.Module):
    """BERT's LM head: dense, GELU, LayerNorm, then the word embeddings themselves as classifier, with a bias.

    tied=False: a classifier of its own, which some BLIP checkpoints may hold (load_blip).
    """

    def __init__(self, width, vocab, tied):
        super().__init__()
        self.transform = nn.Sequential(OrderedDict(dense=nn.Linear(width, width), act=nn.GELU(),
                                                   LayerNorm=nn.LayerNorm(width, eps=1e-12)))
        self.decoder = None if tied else nn.Linear(width, vocab, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, x, word_embeddings):
        """(R, N, D), (V, D) -> (R, N, V)"""
        return F.linear(self.transform(x), self.decoder.weight if self.decoder else word_embeddings, self.bias)


class TextModel(nn.Module):
    """BLIP's MED: a BERT that is text encoder, image-grounded encoder and image-grounded decoder in one.

    With both roles (pre-training) it holds two sets of self-attention; all else is shared. source_width is the width of
    what it cross-attends to.
    """

    def __init__(self, size, source_width, roles=("encoder", "decoder")):
        super().__init__()
        self.size, self.source_width, self.roles, width = size, source_width, roles, size.width
        fusion = size.layers if size.fusion_layers is None else size.fusion_layers
        if width % size.heads or not 0 <= fusion <= size.layers:
            raise UserError(f"text width {width} must be a multiple of {size.heads} heads, and of {size.layers} layers "
                            f"{fusion} cannot have cross-attention")
        self.embeddings = nn.ModuleDict(dict(word_embeddings=nn.Embedding(size.vocab, width, padding_idx=size.pad),
                                             position_embeddings=nn.Embedding(size.positions, width),
                                             LayerNorm=nn.LayerNorm(width, eps=1e-12)))
        self.dropout = nn.Dropout(size.dropout)
        self.encoder = nn.ModuleDict(dict(layer=nn.ModuleList(
            TextLayer(size, source_width, roles, fuses=i >= size.layers - fusion) for i in range(size.layers))))
        if "decoder" in roles:
            self.cls = nn.ModuleDict(dict(predictions=PredictionHead(width, size.vocab, size.tied_head)))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids, mask=None, mode="text", source=None, source_mask=None, cache=None, trace=None):
        """ids (R, N) -> states (R, N, D).

        mask (R, N) and source_mask (B, M) are True at tokens, False at padding; None: no padding. R is a multiple of B:
        row r attends to source r // (R / B). cache: a list of one dict per layer, empty at the first call.
        """
        layers, start = self.encoder.layer, 0
        if cache and cache[0]:
            start = cache[0]["tokens"][0].shape[2]  # tokens before these
        N = ids.shape[1]
        if start + N > self.size.positions:
            raise UserError(f"a text of {start + N} tokens: the model has {self.size.positions} positions")
        x = self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings.weight[start:start + N]
        x = self.dropout(self.embeddings.LayerNorm(x))
        mask = None if mask is None else mask.bool()[:, None, None]  # (R, 1, 1, N)
        if mode == "decoder" and N > 1:
            causal = torch.ones(N, start + N, dtype=torch.bool, device=ids.device).tril(start)
            mask = causal if mask is None else causal & mask  # (R, 1, N, N)
        source_mask = None if source_mask is None else source_mask.bool()[:, None, None]  # (B, 1, 1, M)
        for i, layer in enumerate(layers):
            keys = trace.keys(i, len(layers)) if trace else ()
            x, self_map, cross_map = layer(x, mode, mask, source, source_mask, cache[i] if cache else None,
                                           bool(keys) and trace.maps)
            if keys:
                trace.note(keys, x, self_map, cross_map)
        return x

    def logits(self, states):
        """(R, N, D) -> (R, N, V)"""
        return self.cls.predictions(states, self.embeddings.word_embeddings.weight)


def unit(x):
    """float32 rows of length one."""
    return F.normalize(x.float(), dim=-1)


class BLIP(nn.Module):
    """Image encoder, text network, projections for ITC, head for ITM.

    shared=False gives the decoder embeddings, cross-attention and feed-forward of its own, as BLIP does when it
    fine-tunes VQA: the answer decoder attends to states of the text encoder, not to the image.
    """

    def __init__(self, vision, text, embed_dim=256, shared=True):
        super().__init__()
        self.visual_encoder = VisionTransformer(vision)
        self.text = TextModel(text, vision.width, ("encoder", "decoder") if shared else ("encoder",))
        self.text_decoder = None if shared else TextModel(text, text.width, ("decoder",))
        self.vision_proj = nn.Linear(vision.width, embed_dim)
        self.text_proj = nn.Linear(text.width, embed_dim)
        self.itm_head = nn.Linear(text.width, 2)  # class 1: the text matches the image
        self.temp = nn.Parameter(torch.tensor(0.07))

    @property
    def decoder(self):
        return self.text_decoder or self.text

    def encode_image(self, image, trace=None):
        """(B, 3, S, S) normalised pixels -> (B, M, vision width), CLS first."""
        return self.visual_encoder(image, trace)

    def encode_text(self, ids, mask=None, trace=None):
        """Unimodal: ids (B, N) -> states (B, N, D). The first token becomes [CLS]."""
        return self.text(begin(ids, self.text.size.cls), mask, "text", trace=trace)

    def fuse(self, ids, mask, image_states, trace=None):
        """Multimodal: ids (B, N), image_states (B, M, vision width) -> states (B, N, D). First token: [ENC]."""
        return self.text(begin(ids, self.text.size.enc), mask, "multimodal", image_states, trace=trace)

    def decode(self, ids, mask, source, source_mask=None, trace=None):
        """Causal: ids (R, N), source (B, M, its width) -> logits (R, N, V) of the token after each. First token: [DEC].

        source: image states (captions), or the states of fused questions with their mask (answers).
        """
        states = self.decoder(begin(ids, self.text.size.dec), mask, "decoder", source, source_mask, trace=trace)
        return self.decoder.logits(states)

    def image_feature(self, states):
        """Image states -> (B, E) of unit length, for ITC."""
        return unit(self.vision_proj(states[:, 0]))

    def text_feature(self, states):
        """Unimodal text states -> (B, E) of unit length, for ITC."""
        return unit(self.text_proj(states[:, 0]))

    def match(self, states):
        """Fused states -> (B, 2) logits of no match and match."""
        return self.itm_head(states[:, 0])

    @torch.no_grad()
    def generate(self, source, prompt=(), num_beams=3, min_length=5, max_length=20, repetition_penalty=1.0,
                 source_mask=None):
        """Captions (or answers) to source (B, M, its width): ids (B, L) with [DEC], prompt, [SEP], then padding.

        prompt: token ids that follow [DEC]. Both lengths count [DEC] and the prompt, as in transformers.
        """
        size = self.decoder.size
        ids = torch.tensor([size.dec, *prompt], device=source.device).expand(len(source), -1)  # (B, P)
        if not len(prompt) + 1 < max_length <= size.positions:
            raise UserError(f"max_length {max_length}: the prompt has {len(prompt) + 1} tokens, the decoder "
                            f"{size.positions} positions")
        cache = [{} for _ in range(size.layers)]

        def step(ids, rows=None):
            """Logits (R, V) of the next token. rows: which row of the last step each row of this one continues."""
            if rows is not None:
                for past in cache:
                    past["tokens"] = tuple(x.index_select(0, rows) for x in past["tokens"])
            states = self.decoder(ids, None, "decoder", source, source_mask, cache)
            return self.decoder.logits(states[:, -1]).float()

        search = greedy_search if num_beams == 1 else beam_search
        return search(step, ids, size.sep, size.pad, num_beams, min_length, max_length, repetition_penalty)

    @torch.no_grad()
    def rank_answers(self, question, question_mask, answers, k=128, label_smoothing=0.1):
        """The best of a list of answers, as in BLIP's VQA: question (B, M, D) fused states -> (B,) places in the list.

        answers (A, L) ids: [CLS] answer [SEP] padding. The k answers with the likeliest first token are scored in full
        by the training loss, with its label smoothing as in BLIP's code; 0 gives the log-likelihood.
        """
        B, k = len(question), min(k, len(answers))
        pad, start = self.decoder.size.pad, answers[:1, :1].expand(B, 1)
        first = self.decode(start, None, question, question_mask)[:, 0]  # (B, V)
        top = first[:, answers[:, 1]].topk(k).indices  # (B, K) of A
        ids = answers[top].flatten(0, 1)  # (B * K, L)
        logits = self.decode(ids, ids != pad, question, question_mask)
        loss = lm_loss(logits, ids, pad, label_smoothing, reduction="none").view(B, k)
        return top.gather(1, loss.argmin(1, keepdim=True))[:, 0]

    def untie_decoder(self):
        """Give the decoder a copy of what it shares with the encoder: the start of BLIP's VQA fine-tuning."""
        vision_width, text = self.text.source_width, self.text
        if vision_width != text.size.width:
            raise UserError(f"VQA attends to text states of width {text.size.width}, but this cross-attention was "
                            f"trained on images of width {vision_width}: take a ViT and a BERT of one width")
        weights, place = text.state_dict(), text.embeddings.word_embeddings.weight
        self.text_decoder = TextModel(text.size, text.size.width, ("decoder",)).to(place.device, place.dtype)
        self.text = TextModel(text.size, vision_width, ("encoder",)).to(place.device, place.dtype)
        for module in (self.text, self.text_decoder):
            module.load_state_dict({name: weights[name] for name in module.state_dict()})


def begin(ids, token):
    """ids (B, N) with another first token: the one of the mode."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], 1)


def count_parameters(model):
    """{"vision", "text", "decoder", "heads"}: the paper counts the first two; text has its cross-attention."""
    counts = dict(vision=0, text=0, decoder=0, heads=0)
    for name, parameter in model.named_parameters():
        part = "vision" if name.startswith("visual_encoder.") else \
            "decoder" if re.search(r"decoder_attention\.|\.cls\.predictions\.|^text_decoder\.", name) else \
            "text" if name.startswith("text.") else "heads"
        counts[part] += parameter.numel()
    return counts


# --------------------------------------------------------------------------------------------------------------- losses


def lm_loss(logits, ids, pad=0, label_smoothing=0.1, prompt=0, reduction="mean"):
    """Cross-entropy of each token given those before it [BLIP], label smoothing 0.1, padding ignored.

    logits (B, N, V) and the ids (B, N) they were computed from. The first `prompt` tokens of ids ([DEC] included) are
    not predicted. reduction "mean": over tokens; "none": the sum over each text, (B,).
    """
    target = ids.masked_fill(ids == pad, -100)[:, 1:]  # (B, N-1)
    target = target.masked_fill(torch.arange(1, ids.shape[1], device=ids.device) < prompt, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction=reduction,
                           label_smoothing=label_smoothing)
    return loss if reduction == "mean" else loss.view(target.shape).sum(1)


# ----------------------------------------------------------------------------------------------------------- generation


def adjust(scores, ids, sep, min_length, penalty):
    """scores (R, V) of the next token of ids (R, n), in place: penalise used tokens, no [SEP] before min_length."""
    if penalty != 1:
        seen = scores.gather(1, ids)
        scores.scatter_(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
    if ids.shape[1] < min_length:
        scores[:, sep] = -math.inf
    return scores


def greedy_search(step, ids, sep, pad, num_beams, min_length, max_length, penalty):
    """The likeliest token at every step: ids (B, P) -> (B, L)."""
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    logits = step(ids)
    while True:
        token = adjust(logits, ids, sep, min_length, penalty).argmax(1).masked_fill(finished, pad)  # (B,)
        ids = torch.cat([ids, token[:, None]], 1)
        finished |= token == sep
        if ids.shape[1] == max_length or finished.all():  # the one wait for the device
            return ids
        logits = step(token[:, None])


def beam_search(step, ids, sep, pad, num_beams, min_length, max_length, penalty):
    """ids (B, P) -> (B, L): the best finished text by mean log-probability of its new tokens, [SEP] included.

    transformers' beam search (length_penalty 1, early_stopping False). Each step extends the K running beams to their
    2K best continuations; the K best that do not end run on, and those of the first K that end compete for the K
    places of finished texts. An image is done once its best running beam scores below the worst of K finished texts.
    """
    B, P, K = *ids.shape, num_beams
    first_row = torch.arange(B, device=ids.device)[:, None]
    running, score = ids[:, None], torch.zeros(B, 1, device=ids.device)  # (B, beams, n), (B, beams): one beam at first
    texts = torch.full((B, K, max_length), pad, device=ids.device)
    text_score = torch.full((B, K), -math.inf, device=ids.device)
    done = torch.zeros(B, dtype=torch.bool, device=ids.device)
    logits = step(ids)
    for n in range(P + 1, max_length + 1):  # n tokens after this step
        beams, V = running.shape[1], logits.shape[1]
        new = adjust(logits.log_softmax(1), running.flatten(0, 1), sep, min_length, penalty)
        score, place = (score[:, :, None] + new.view(B, beams, V)).flatten(1).topk(2 * K)  # (B, 2K)
        beam, token = place // V, place % V
        candidates = torch.cat([running.take_along_dim(beam[:, :, None], 1), token[:, :, None]], 2)  # (B, 2K, n)
        ends = (token == sep) | (n == max_length)

        finishing = score.masked_fill(~ends | done[:, None], -math.inf)[:, :K] / (n - P)
        padded = F.pad(candidates[:, :K], (0, max_length - n), value=pad)
        text_score, best = torch.cat([text_score, finishing], 1).topk(K)
        texts = torch.cat([texts, padded], 1).take_along_dim(best[:, :, None], 1)

        score, best = score.masked_fill(ends, -math.inf).topk(K)
        running = candidates.take_along_dim(best[:, :, None], 1)  # (B, K, n)
        done = done | (score[:, 0] / (n - P) <= text_score[:, -1])
        if n == max_length or done.all():  # the one wait for the device
            return texts[:, 0, :n]
        rows = (first_row * beams + beam.gather(1, best)).flatten()  # (B * K,) among the B * beams rows so far
        logits = step(running[:, :, -1].reshape(-1, 1), rows)


# ------------------------------------------------------------------------------------------------------------- weights


# Name rules, tried in order on each name: Hugging Face's BLIP, then torchvision's ViT. timm, DeiT and BLIP need none.
VISION_NAMES = (
    (r"^embeddings\.class_embedding$", "cls_token"), (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."), (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."), (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."), (r"^post_layernorm\.", "norm."),
    (r"^class_token$", "cls_token"), (r"^encoder\.pos_embedding$", "pos_embed"), (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."), (r"^encoder\.ln\.", "norm."),
    (r"\.ln_([12])\.", r".norm\1."), (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."), (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."), (r"^(?:head|heads|head_dist|pre_logits)\..*", ""),
)
TEXT_NAMES = (
    (r"^text_model\.", "text_encoder."), (r"^text_encoder\.(?!pooler)", "text."),
    (r"^text_decoder\.bert\.(.*\.)attention\.", r"text_decoder.\1decoder_attention."),
    (r"^text_decoder\.bert\.", "text_decoder."), (r"\.predictions\.decoder\.bias$", ".predictions.bias"),
)
# Momentum copies and queues, buffers, and what belongs to the pooled features of Hugging Face's BlipModel, not to BLIP.
UNUSED = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.|^(image|text|idx|ptr)_queue$|^queue_ptr$"
                    r"|\.position_ids$|\.pooler\.|^(visual_projection|text_projection)\.|^logit_scale$")
# Parts that a checkpoint may lack as a whole. The first that matches a name of ours is its part.
PARTS = {"decoder": r"^text_decoder\.|\.decoder_attention\.|\.cls\.predictions\.", "encoder": r"^text\..*\.attention\.",
         "itc": r"^(vision|text)_proj\.", "itm": r"^itm_head\.", "temp": "^temp$"}


def rename(name, rules):
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def resize_positions(positions, count):
    """(1, 1 + g*g, D) position embeddings -> (1, count, D), bicubic as in BLIP's code (no antialiasing,
    unlike common's, which is CLIP's)."""
    if positions.shape[1] == count:
        return positions
    old, new = (math.isqrt(n - 1) for n in (positions.shape[1], count))
    if (old ** 2, new ** 2) != (positions.shape[1] - 1, count - 1):
        raise UserError(f"{positions.shape[1]} position embeddings are no square grid with one CLS token (a distilled "
                        "DeiT has two: take the plain one)")
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (old, old))  # (1, D, g, g)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def copy_weights(module, weights, what):
    """load_state_dict, with one line that names what does not fit."""
    own = module.state_dict()
    for kind, names in (("lack", [n for n in own if n not in weights]),
                        ("have, unknown to the model,", [n for n in weights if n not in own])):
        if names:
            raise UserError(f"{what} {kind} {names[0]} and {len(names) - 1} more")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise UserError(f"{what}: {name} is {tuple(weights[name].shape)}, the model's {tuple(tensor.shape)}")
    module.load_state_dict(weights)


def load_vision(visual_encoder, weights):
    """Start an image encoder from ImageNet weights (timm, DeiT, torchvision) or from those of a BLIP."""
    for prefix in ("visual_encoder.", "vision_model."):
        if any(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    weights = {rename(name, VISION_NAMES): w.float() for name, w in weights.items()}
    weights.pop("", None)  # classifiers
    if "dist_token" in weights:
        raise UserError("these are weights of a distilled DeiT, with a second class token: take the plain one")
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_positions(weights["pos_embed"], visual_encoder.pos_embed.shape[1])
    copy_weights(visual_encoder, weights, "the image weights")


def load_bert(text, weights):
    """Start a text network from a BERT: both self-attentions get BERT's, cross-attention stays random.

    So do the embeddings of [DEC] and [ENC], which BERT lacks. BERT's segment embeddings and pooler are left out.
    """
    own, found = text.state_dict(), {}
    for name, tensor in weights.items():
        name = rename(name, ((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")))
        if re.match(r"embeddings\.(word_|position_emb|LayerNorm)|encoder\.|cls\.predictions\.(bias|transform)", name):
            found[name] = tensor.float()
            if ".attention." in name:
                found[name.replace(".attention.", ".decoder_attention.")] = found[name]
    for name in ("embeddings.word_embeddings.weight", "cls.predictions.bias"):
        if name in found and name in own and len(found[name]) < len(own[name]):
            found[name] = torch.cat([found[name], own[name][len(found[name]):].cpu()])
    random = {name: tensor for name, tensor in own.items() if "crossattention." in name or name.startswith("cls.")}
    absent = r"\.attention\." if "encoder" not in text.roles else r"decoder_attention\.|^cls\."
    if len(text.roles) == 1:
        found = {name: tensor for name, tensor in found.items() if not re.search(absent, name)}
    copy_weights(text, {**random, **found}, "the BERT weights")


def load_blip(weights, image_size=None, vision_heads=None, need=(), **text):
    """A BLIP checkpoint, {name: tensor}, as Salesforce or Hugging Face released it -> (BLIP, parts it does not hold).

    Sizes are read off the weights. What leaves no trace there is BLIP's unless given: vision_heads (of width 64) and,
    as fields of TextSize, heads, dropout and special tokens. Parts are "encoder", "decoder", "itc", "itm" and "temp":
    a captioner has no encoder, a retriever no decoder; they stay random. `need` names parts that must be there.

    Encoder and decoder share weights only in pre-training: where they differ, as after VQA fine-tuning, the model has
    shared=False. An LM head that differs from the word embeddings is kept (tied_head=False): BLIP's pre-training code
    separated the two until 15 February 2022, when the arguments of its tie_encoder_decoder_weights were swapped.
    """
    weights, shared = blip_names(weights)
    vision, text = blip_sizes(weights, vision_heads, text)
    embed_dim = len(weights["vision_proj.weight"]) if "vision_proj.weight" in weights else 256
    model, missing = BLIP(vision, text, embed_dim, shared), set()
    own, held = model.state_dict(), {part_of(name) for name in weights}
    for name, tensor in own.items():
        if part_of(name) not in held:
            missing.add(part_of(name))
            weights[name] = tensor
    if missing & set(need):
        raise UserError(f"this checkpoint has no {' and no '.join(sorted(missing & set(need)))} weights")
    copy_weights(model, weights, "the BLIP weights")
    if image_size and image_size != vision.image_size:
        resized = VisionTransformer(replace(vision, image_size=image_size))
        load_vision(resized, model.visual_encoder.state_dict())
        model.visual_encoder = resized
    return model, missing


def part_of(name):
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "always there")


def blip_names(weights):
    """({our name: tensor}, whether encoder and decoder share what pre-training ties)."""
    found = {}
    for name, tensor in weights.items():
        if not UNUSED.search(name):
            if name.startswith("vision_model."):
                name = "visual_encoder." + rename(name.removeprefix("vision_model."), VISION_NAMES)
            found[rename(name, TEXT_NAMES)] = tensor.float()
    twins = {name: name.replace("text_decoder.", "text.", 1) for name in found if name.startswith("text_decoder.")}
    shared = all(torch.equal(found[name], found[twin]) for name, twin in twins.items() if twin in found)
    for name, twin in twins.items() if shared else ():
        found[twin] = found.pop(name)
    head = "cls.predictions.decoder.weight"
    for text in ("text.", "text_decoder."):
        words = found.get(f"{text}embeddings.word_embeddings.weight")
        if text + head in found and words is not None and torch.equal(found[text + head], words):
            del found[text + head]
    return found, shared


def blip_sizes(weights, vision_heads, text):
    """(VisionSize, TextSize) of weights in our names."""
    def count(pattern):
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    try:
        width, patch = (weights["visual_encoder.patch_embed.proj.weight"].shape[i] for i in (0, 3))
        grid = math.isqrt(weights["visual_encoder.pos_embed"].shape[1] - 1)
        vocab, text_width = weights["text.embeddings.word_embeddings.weight"].shape
        positions = len(weights["text.embeddings.position_embeddings.weight"])
    except KeyError as error:
        raise UserError(f"these are no BLIP weights: there is no {error.args[0]}") from None
    blocks, layers = count(r"visual_encoder\.blocks\.(\d+)\."), count(r"text\.encoder\.layer\.(\d+)\.")
    fusion = count(r"text\.encoder\.layer\.(\d+)\.crossattention\.")
    sizes = dict(vocab=vocab, positions=positions, fusion_layers=fusion, dec=vocab - 2, enc=vocab - 1,
                 tied_head=count(r"(.*)\.cls\.predictions\.decoder\.weight") == 0)
    vision = VisionSize(width, blocks, vision_heads or max(1, width // 64), patch, grid * patch)
    return vision, TextSize(text_width, layers, **{**sizes, **text})


def main():
    raise UserError("DLIP's losses, training and evaluation are not written yet: import the models from this file")


if __name__ == "__main__":
    common.run_main(main)
