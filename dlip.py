"""DLIP: Distilling Language-Image Pre-training
Kuang, Wu, Zheng, Li, Xiao, Wang, Zheng, Ji, 2023, https://arxiv.org/abs/2308.12956. No official
code.

A BLIP (Li et al. 2022, https://arxiv.org/abs/2201.12086, whose code is public, [BLIP] below), the
teacher, is distilled in pre-training into one of 22 % of its parameters, which still retrieves,
captions and answers questions. Both are an image encoder (ViT) and a text network in three modes:
unimodal encoder (for image-text contrast, ITC), image-grounded "fusion" encoder (for image-text
matching, ITM, and for questions), image-grounded decoder (for language modelling, LM: captions and
answers); encoder and decoder share all but self-attention. To BLIP's three losses (together "VLP")
DLIP adds two, on the same pairs: the student's representations point where the teacher's do (L_HR),
and its last layers attend where the teacher's attend (L_AT).

    python dlip.py                               # emoji scenes: distil, fine-tune, evaluate
    python dlip.py --ablate vlp dlip --jobs 2    # without and with distillation, emoji scenes
    torchrun --nproc_per_node=8 dlip.py --stage distil --data 'coco*5+vg*8+cc3m+sbu' \\
        --teacher model_base_14M.pth --vision-init deit_small_patch16_224.pth --out runs/dlip-coco
    python dlip.py --stage finetune --data vqav2 --init runs/dlip-coco/distil/blip.pt
    python dlip.py --stage evaluate --task retrieval --data coco --init model_base_retrieval.pth

Without flags (--stage all) the teacher comes from data/teacher_blip.pt, a copy of what --stage
teacher once made. Below --out come, in this order, distil/, retrieval/, caption/ and vqa/, each a
run folder with blip.pt, the model alone; then results.json, table.md and pictures. Meanwhile a
second command, on half of the cores, fine-tunes and evaluates the teacher in teacher/. An --out
that holds a run is refused; with --resume trainings that are done are not done again, and one cut
short goes on.

Measured on 300 emoji scenes, 54,000 samples of pre-training, 3 seeds, a CPU core, torch 2.13.0
(tests/EVIDENCE.md has tables, commands and commits): TR@1 17.7 ± 0.9, IR@1 14.1 ± 1.5, CIDEr
145 ± 7, against 0.9 ± 0.5, 2.3 ± 0.5, 87 ± 6 for the same student without distillation, and
24.3 ± 0.7, 16.5 ± 0.8, 158 ± 3 for the teacher, which saw 200,000 samples. After 200,000 too the
student has 24.0 ± 0.7, 18.5 ± 0.5, 169 ± 1. Not run at the paper's scale.

Sources: [paper] its text, tables or figures; [BLIP] BLIP's paper or code; [near] a public
reimplementation that looks derived from the authors' code (jfan1256/dlip-v2); [choice] ours.

From the paper: the sizes of its Table 1; all weights 1; distillation in pre-training only; L_HR of
image, text, fusion encoder and decoder, the text's from the last layer; L_AT of the last layers'
self- and cross-attention as KL; learning rate 5e-4 times 0.85 an epoch, 20 epochs, weight decay
0.02; a larger rate of small text networks in fine-tuning for retrieval. The image encoder starts
from an ImageNet ViT (--vision-init; without, Flickr30K's TR@1 is 74.5 in place of 85.5), the text
network afresh: a BERT's weights, not offered here, made it 85.9.

Assumptions, where the public text is silent. Each is ours unless marked, none the paper's:
  A1  L_HR is the sum of four batch means of 1 - cosine [near]: at the CLS of image and text, at
      [ENC] and at [DEC], each after the ITC projection of its own model; the teacher's is frozen,
      since a learned one could agree on a constant (--hr, --lambda-hr). [DEC] comes first in a
      causal decoder: VL_D sees the image and no word.
  A2  L_AT is the sum over self-attention of fusion encoder and decoder (the decoder's: [near]), and
      cross-attention of the fusion encoder, each the mean over heads and queries without the padded
      ones (--attn, --lambda-at). L_HR and L_AT see matching pairs only.
  A3  ITC's keys are the momentum features of all processes' batches and the queue; BLIP has its own
      process's and the queue. The momentum encoders run without dropout.
  A4  ITM's negatives come from the process's own batch, as in BLIP's pre-training, drawn by the
      similarity to momentum features plus BLIP's floor of 1e-4. In fine-tuning for retrieval the
      pairs of one image, in the queue too, are positives of each other; BLIP's code computes these
      targets of ITC as well, but overwrites them by the diagonal. BLIP's fine-tuning draws by
      online features, and on COCO from all processes.
  A5  Weight decay on tensors of two and more dimensions. An epoch shows every image once, with one
      of its captions drawn, or every question, with one of its answers; BLIP counts captions, hence
      coco*5. The last epoch is evaluated (best.pt is the best on validation, which BLIP takes for
      retrieval and captions).
  A6  In the answer decoder a padded question is masked, as BLIP does in training and ranking.
  A7  Encoder and decoder are tied but for VQA, where they are two networks, as in BLIP's code
      (retrieval and captions each need one of them alone). Where image and text widths differ, the
      keys and values of the answer decoder's cross-attention start afresh.
  A8  VQA is trained on VQAv2's train split at 384 px; BLIP adds val and Visual Genome's questions,
      at 480 px. So val can measure it: its first 5,000 questions do, after every epoch. Evaluation
      takes the test split, whose answers only VQA's server has: it leaves answers_model.json for
      the server, and no accuracy. BLIP's VQA fine-tuning has drop path 0.1 in the ViT: left out.
  A9  Sizes, schedules and fine-tuning of the emoji run are ours. Its fine-tuning captions are never
      wrong, as COCO's are cleaner than the web's.
"""

import copy
import math
import os
import re
import subprocess
import sys
from collections import Counter, OrderedDict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

# Before torch: a thread that waits for others soon sleeps; else a run on busy cores is ten times as
# slow.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
from common import UserError, average_gradients, gather, normalise, option, rank, world_size
from data.emoji import scenes

# Letters in shape comments: B images or texts (in the losses: b of this process against the B of
# all), S pixels of an image's side, N tokens, M tokens attended to, D width, E width of the joint
# embedding, Q length of a queue, H heads, V vocabulary, K beams, R rows of the decoder (B, or
# several an image), P tokens of the prompt with [DEC], L of the longest text, A answers to choose
# from, T captions of B images, n any number, context the length a tokenizer pads to. "texts" are
# strings, "ids" their tokens, "states" a network's output, "scores" attention before its softmax.

# -------------------------------------------------------------------------------------- config

TASKS = ("retrieval", "caption", "vqa")
PROMPT = "a picture of "  # what every caption begins with, after pre-training [BLIP]
SIZES = ["tiny", "small", "middle", "base"]  # of VIT and BERT
HR_PARTS = ("img", "text", "vl_e", "vl_d")
# prefixes of the weights without which a teacher or a task cannot work
NEEDED = {"teacher": ("text_encoder.", "text_decoder.", "vision_proj.", "text_proj."),
          "retrieval": ("text_encoder.", "vision_proj.", "text_proj.", "itm_head."),
          "caption": ("text_decoder.",),
          "vqa": ("text_encoder.", "text_decoder.")}


@dataclass
class Config(common.RunConfig):  # data, out, resume, ablate, seed, device, ...
    stage: str = option("all", "all (emoji only): distil, finetune, evaluate; --epochs, --lr, "
                               "--warmup-steps, --alpha-ramp, --noise are then distil's alone",
                        ["all", "teacher", "distil", "finetune", "evaluate"])
    task: tuple[str, ...] = option(TASKS, "what to fine-tune for (--stage finetune: one) or to "
                                          "evaluate", [*TASKS])
    teacher: str | None = option(None, "a BLIP checkpoint (emoji: data/teacher_blip.pt)")
    with_teacher: bool = option(True, "--stage all: fine-tune and evaluate the teacher as well")
    init: str | None = option(None, "the BLIP checkpoint to fine-tune or to evaluate; with --stage "
                                   "all nothing is distilled")

    # vlp: BLIP's three losses, as the paper's ablation calls them. L_AT: --attn chooses
    # its maps, --lambda-at its weight; log.csv has at_self and at_cross.
    method: str = option("dlip", "blip: no distillation", ["dlip", "blip"], section="method")
    vlp: bool = option(True, "BLIP's own losses, ITC + ITM + LM, in pre-training")
    hr: tuple[str, ...] = option(HR_PARTS, "representations to distil", [*HR_PARTS, "none"])
    attn: tuple[str, ...] = option(("self", "cross"), "maps to distil", ["self", "cross", "none"])
    lambda_hr: float = option(1.0, "weight of L_HR")
    lambda_at: float = option(1.0, "weight of L_AT")
    queue_size: int = option(512, "Q, momentum features kept as further keys of ITC", (0, 1e9))
    momentum: float = option(0.99, "m of the momentum encoders, per step", (0, 1))
    alpha: float = option(0.4, "share of the momentum similarities in ITC's targets", (0, 1))
    alpha_ramp: float = option(2.0, "epochs over which that share rises from 0")

    vit: str = option("small", "size of the image encoder", SIZES, section="model")
    bert: str = option("small", "size of the text network", SIZES)
    fusion_layers: int = option(12, "cross-attention in the top k layers, at most in all", (1, 12))
    image_size: int = option(40, "image side in pixels")
    vision_init: str | None = option(None, "start from this ImageNet ViT (timm, DeiT)")

    epochs: float = option(6.0, "passes over the training set", section="optimisation")
    batch_size: int = option(64, "pairs per step, over all processes")
    lr: tuple[float, ...] = option((4e-3,), "peak learning rate; a second one would be that of "
                                            "small and tiny text networks")
    warmup_steps: int = option(100, "steps of linear warm-up, at most a fifth of all", (0, 1e9))
    weight_decay: float = option(0.05, "AdamW weight decay, not on vectors")
    precision: str = option("auto", "auto: bf16 autocast on CUDA, fp32 elsewhere",
                            ["auto", "fp32", "bf16", "fp16"])
    compile: bool = option(False, "torch.compile the image encoders")
    grad_checkpoint: bool = option(False, "recompute image blocks in the backward pass")

    rerank_k: int = option(16, "candidates that ITC hands to ITM", section="evaluation")
    answer_k: int = option(16, "answers that are scored whole, chosen by their first token")

    scenes: int = option(9000, "training scenes", section="emoji scenes (--data emoji)")
    concepts: int = option(50, "how many concepts are drawn", (4, 412))
    difficulty: str = option("easy", "objects, sizes, backgrounds", ["easy", "medium", "hard"])
    noise: float = option(0.2, "share of scenes with another's caption", (0, 1))


# Recipes by stage, or by task in fine-tuning: what replaces Config's defaults (weight decay 0.05 of
# fine-tuning: [BLIP]). For large data the paper's, and BLIP's where it is silent.
#
# A new set of captions needs no code: --data NAME --root FOLDER (data/README.md). One of questions
# needs its name beside vqav2's in configure() and check(). A recipe of its own goes into
# configure(), as flickr30k's rerank_k; training_samples() and task_sets() open the data.
PAPER = dict(image_size=224, queue_size=57600, momentum=0.995,  # [BLIP]
             rerank_k=256, answer_k=128)  # [BLIP]
PRETRAIN = {**PAPER, "epochs": 20, "lr": (5e-4,), "weight_decay": 0.02,  # [paper]
            "batch_size": 1152, "warmup_steps": 3000}  # [near] [BLIP]
FINETUNE = {**PAPER, "image_size": 384, "batch_size": 256, "warmup_steps": 0,
            "alpha_ramp": 5.0}  # [BLIP]; its one epoch of COCO's captions is five of ours (A5)
LARGE = {
    "distil": PRETRAIN,
    "teacher": {**PRETRAIN, "vit": "base", "bert": "base", "weight_decay": 0.05},  # [BLIP]
    # epochs: [BLIP] 6 and 5 over images x 5 captions; a small text network's rate, the second:
    # [paper]
    "retrieval": {**FINETUNE, "epochs": 30, "lr": (1e-5, 5e-5)},
    "caption": {**FINETUNE, "epochs": 25, "lr": (1e-5,)},
    "vqa": {**FINETUNE, "epochs": 10, "lr": (2e-5,)},  # [BLIP]
}
SHORT = dict(warmup_steps=20, epochs=1.0, noise=0.0, alpha_ramp=0.0,
             lr=(4e-4, 2e-3))  # [choice], as all of EMOJI
EMOJI = {  # distil: Config's defaults
    # seed 1000: other scenes than the student's, whose seeds are 0, 1, 2
    "teacher": dict(vit="base", bert="base", scenes=40000, epochs=5.0, warmup_steps=300,
                    lr=(1e-3,), seed=1000),
    "retrieval": SHORT,
    "caption": SHORT,
    "vqa": {**SHORT, "lr": (1e-3,)},
}
TEXT_LENGTH = {"retrieval": 35, "caption": 40, "vqa": 35}  # tokens [BLIP]; see tokenizer_of


def configure(argv=None):
    """(Config, the flags given)"""
    given = common.parse_command_line(Config, __doc__, argv)
    data = given.get("data", "emoji")
    stage = given.get("stage", "all" if data == "emoji" else "distil")
    tasks = {"emoji": TASKS, "vqav2": ("vqa",)}
    task = given.get("task", tasks.get(data, ("retrieval", "caption")))
    # a recipe belongs to a stage, in fine-tuning and evaluation to a task
    key = task[0] if stage in ("finetune", "evaluate") else stage
    recipe = (EMOJI if data == "emoji" else LARGE).get(key, {})
    values = {**recipe, "stage": stage, "task": task}
    if data == "flickr30k":
        values["rerank_k"] = 128  # [BLIP]

    name = given.get("method", "dlip") if stage in ("all", "distil") else stage
    if stage in ("finetune", "evaluate"):
        name = "-".join([stage, *task])
    stem = "runs/ablation_dlip" if "ablate" in given else f"runs/{name}-{data}"
    cfg = common.fill_config(Config, values, given, stem)
    check(cfg)
    return cfg, given


def check(cfg):
    """UserError for values that contradict each other."""
    tunes = cfg.stage in ("finetune", "evaluate")
    whole = cfg.stage == "all"
    if (whole or cfg.ablate) and not (whole and cfg.data == "emoji"):
        raise UserError(f"--data {cfg.data}: --stage all, and --ablate, which needs it, are for "
                        "emoji; with others the stages are run one by one, each with its data")
    if tunes and ("vqa" in cfg.task) != (cfg.data == "vqav2") and cfg.data != "emoji":
        raise UserError(f"--task {' '.join(cfg.task)} is not for --data {cfg.data}: vqav2 has "
                        "questions (yours: --data vqav2 --root FOLDER), the others captions")
    if cfg.stage == "finetune" and len(cfg.task) > 1:
        raise UserError("--stage finetune: name one --task, each has a recipe of its own")
    if not whole and bool(cfg.init) != tunes:
        raise UserError(f"--stage {cfg.stage}: --init FILE is what finetune and evaluate need, all "
                        "may have, and no other stage takes")
    if not (tunes or cfg.vlp or distils(cfg)):
        raise UserError("--no-vlp without distillation leaves no loss")


def distils(cfg):
    """Whether pre-training learns from a teacher."""
    distilled = {*cfg.hr, *cfg.attn}
    return cfg.stage != "teacher" and cfg.method == "dlip" and distilled != {"none"}


@dataclass(frozen=True)
class VisionSize:
    width: int
    layers: int
    heads: int
    patch: int = 16
    image_size: int = 224


@dataclass(frozen=True)
class TextSize:
    """Sizes and special tokens; [DEC] and [ENC] are BLIP's additions to BERT's vocabulary."""

    width: int
    layers: int
    fusion_layers: int  # how many, from the top, have cross-attention
    heads: int = 12
    vocab: int = 30524
    positions: int = 512
    dropout: float = 0.1
    tied_head: bool = True  # the LM head classifies with the word embeddings
    pad: int = 0  # of a tokenizer; never another than PAD below
    cls: int = 101
    sep: int = 102
    dec: int = 30522
    enc: int = 30523


@dataclass(frozen=True)
class BLIPSize:
    vision: VisionSize
    text: TextSize
    embed_dim: int = 256


# DLIP's Table 1. Every BERT keeps 12 heads, so that text maps match the teacher's head for head.
# Image encoder and text encoder have 223.1 (base), 108.9 (middle) and 47.8 (small) million
# parameters together; the paper says 213.6 of base, though its table adds up to 222.9.
# VisionSize(width, layers, heads), TextSize(width, layers, fusion_layers).
VIT = {"tiny": VisionSize(192, 12, 3),
       "small": VisionSize(384, 12, 6),
       "middle": VisionSize(576, 12, 9),
       "base": VisionSize(768, 12, 12)}
BERT = {"tiny": TextSize(192, 4, 4),
        "small": TextSize(384, 6, 6),
        "middle": TextSize(576, 8, 8),
        "base": TextSize(768, 12, 12)}


# The same for the emoji scenes: small + small, the student, has 22.6 % of base + base.
# VisionSize(width, layers, heads, patch),
# TextSize(width, layers, fusion_layers, heads).
DEMO_VIT = {"tiny": VisionSize(32, 4, 2, 8),
            "small": VisionSize(64, 4, 2, 8),
            "middle": VisionSize(96, 4, 3, 8),
            "base": VisionSize(128, 4, 4, 8)}
DEMO_BERT = {"tiny": TextSize(32, 2, 2, 4, positions=32),
             "small": TextSize(64, 3, 3, 4, positions=32),
             "middle": TextSize(96, 3, 3, 4, positions=32),
             "base": TextSize(128, 4, 4, 4, positions=32)}


def sizes(cfg):
    """{name: VisionSize}, {name: TextSize}"""
    return (DEMO_VIT, DEMO_BERT) if cfg.data == "emoji" else (VIT, BERT)


# ---------------------------------------------------------------------------------------- model


# [PAD], in BERT's vocabulary and in the small one of the emoji scenes. Masks and losses, which have
# ids and no TextSize, compare with it.
PAD = 0


def sequence(**layers):
    """nn.Sequential whose layers have names, those of published weights."""
    return nn.Sequential(OrderedDict(layers))


def initialise(module, fill):
    """N(0, 0.02) for matrices, by a function of nn.init, zero for biases."""
    for name, parameter in module.named_parameters():  # each once
        if parameter.ndim == 2:
            fill(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class Block(nn.Module):
    """Pre-norm transformer block of the image encoder; one matrix for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({
            "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = sequence(fc1=nn.Linear(width, 4 * width), act=nn.GELU(),
                            fc2=nn.Linear(4 * width, width))

    def forward(self, x):
        """(B, N, D) -> (B, N, D)"""
        qkv = self.attn.qkv(self.norm1(x))
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        out = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT without a head, named as timm's: all tokens, CLS first, after the final norm.

    For another image tower: a module (B, 3, S, S) -> (B, M, D) whose first token is ITC's, with a
    flag grad_checkpoint, built as visual_encoder in BLIP.__init__; its sizes in VisionSize and VIT
    (their names in Config.vit), how files name its weights in VISION_NAMES and blip_size. L_AT's
    cross-attention needs M as in the teacher: load_teacher compares the patches.
    """

    def __init__(self, size):
        super().__init__()
        width = size.width
        patch = size.patch
        if size.image_size % patch:
            raise UserError(f"image size {size.image_size} is no multiple of the patch's {patch}")
        self.patch_embed = sequence(proj=nn.Conv2d(3, width, patch, patch))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        tokens = 1 + (size.image_size // patch) ** 2
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.grad_checkpoint = False
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        initialise(self.blocks, nn.init.trunc_normal_)

    def forward(self, image):
        """(B, 3, S, S) normalised pixels -> (B, N, D)"""
        x = self.patch_embed(image).flatten(2).transpose(1, 2)  # (B, N-1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.pos_embed  # float32 under autocast
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)


class AddNorm(nn.Module):
    """How every BERT sublayer ends (post-norm): linear, dropout, add the residual, LayerNorm."""

    def __init__(self, size, inner):
        super().__init__()
        self.dense = nn.Linear(inner, size.width)
        self.dropout = nn.Dropout(size.dropout)
        self.LayerNorm = nn.LayerNorm(size.width, eps=1e-12)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """BERT's attention sublayer; keys and values come from the tokens or from a source."""

    def __init__(self, size, source_width):
        super().__init__()
        self.heads = size.heads
        self.dropout = size.dropout
        self.self = nn.ModuleDict({  # BERT's name: attention.self.query
            "query": nn.Linear(size.width, size.width),
            "key": nn.Linear(source_width, size.width),
            "value": nn.Linear(source_width, size.width),
        })
        self.output = AddNorm(size, size.width)

    def project(self, name, x):
        """(B, N, width of x) -> (B, H, N, D/H)"""
        return self.self[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source, mask=None):
        """(B, M, source width) -> keys and values, each (B, H, M, D/H), and the mask.

        mask: True where attention is allowed, broadcast to (B, H, N, M); None: everywhere.
        """
        return self.project("key", source), self.project("value", source), mask

    def forward(self, x, keys_values, with_scores=False):
        """(B, N, D) -> (B, N, D), and the scores q k^T / sqrt(D/H) (B, H, N, M) or None.

        Scores are float32, and where attention is not allowed the least finite number: with -inf
        the KL of L_AT would be 0 * (-inf + inf), not a number. The fused kernel, which keeps them
        to itself, runs where nobody asks for them.
        """
        q, (k, v, mask) = self.project("query", x), keys_values
        dropout = self.dropout if self.training else 0.0
        if with_scores:
            scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).float()
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            weights = F.dropout(scores.softmax(-1), dropout)
            out = weights.to(v.dtype) @ v
        else:
            scores = None
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.output(out.transpose(1, 2).flatten(2), x), scores


class TextLayer(nn.Module):
    """Self-attention, cross-attention to a source, feed-forward.

    source_width: None where there is no cross-attention. twin: given to a layer of the decoder in
    pre-training, the encoder's layer at the same height, with which it shares all but
    self-attention.
    """

    def __init__(self, size, source_width, twin=None):
        super().__init__()
        self.attention = Attention(size, size.width)
        if twin:
            self.crossattention = twin.crossattention
            self.intermediate = twin.intermediate
            self.output = twin.output
            return
        self.crossattention = Attention(size, source_width) if source_width else None
        inner = 4 * size.width
        self.intermediate = sequence(dense=nn.Linear(size.width, inner), act=nn.GELU())
        self.output = AddNorm(size, inner)

    def forward(self, x, mask, keys_values, with_scores, past=None):
        """x (R, N, D) -> x, and the scores (R, H, N, N) of self- and (B, H, R/B * N, M) of
        cross-attention, or None.

        keys_values: the source's, from crossattention; None: no cross-attention.
        past: keys and values of the tokens before x, [] at first; those of x are added.
        """
        k, v, mask = self.attention.keys_values(x, mask)
        if past:
            k = torch.cat([past[0], k], 2)
            v = torch.cat([past[1], v], 2)
        if past is not None:
            past[:] = k, v
        x, self_scores = self.attention(x, (k, v, mask), with_scores)
        cross_scores = None
        if keys_values:
            # Several beams or answers to one image: their queries stand side by side, so that the
            # image's keys are not copied.
            queries = x.reshape(len(keys_values[0]), -1, x.shape[-1])  # (B, R/B * N, D)
            out, cross_scores = self.crossattention(queries, keys_values, with_scores)
            x = out.view_as(x)
        return self.output(self.intermediate(x), x), self_scores, cross_scores


class Embeddings(nn.Module):
    """Words and positions; BLIP has no token types."""

    def __init__(self, size):
        super().__init__()
        self.word_embeddings = nn.Embedding(size.vocab, size.width, padding_idx=size.pad)
        self.position_embeddings = nn.Embedding(size.positions, size.width)
        self.LayerNorm = nn.LayerNorm(size.width, eps=1e-12)
        self.dropout = nn.Dropout(size.dropout)
        self.register_buffer("position_ids", torch.arange(size.positions)[None])

    def forward(self, ids, start=0):
        """ids (R, N), the first of them at place `start` of the text -> (R, N, D)"""
        positions = self.position_ids[:, start:start + ids.shape[1]]
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class Encoded(NamedTuple):
    """What a text network gives: states of all tokens and, where asked for, the attention scores
    of the last layer."""

    states: torch.Tensor  # (R, N, D)
    self_scores: torch.Tensor | None  # (R, H, N, N)
    cross_scores: torch.Tensor | None  # (B, H, R/B * N, M)


class TextModel(nn.Module):
    """BERT with cross-attention, in the top layers, to a source.

    twin: given to the decoder in pre-training, the encoder, whose embeddings and, but for
    self-attention, layers it shares.
    """

    def __init__(self, size, source_width, causal=False, twin=None):
        super().__init__()
        self.causal = causal
        self.embeddings = twin.embeddings if twin else Embeddings(size)
        layers = nn.ModuleList()
        for i in range(size.layers):
            fuses = i >= size.layers - size.fusion_layers
            twin_layer = twin.encoder.layer[i] if twin else None
            layers.append(TextLayer(size, source_width if fuses else None, twin_layer))
        self.encoder = nn.ModuleDict({"layer": layers})

    def read(self, source, mask=None):
        """What the layers attend to in a source (B, M, its width): the keys and values of each, or
        None where a layer has no cross-attention. mask (B, M): True at tokens, False at padding."""
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, M)
        crossing = [layer.crossattention for layer in self.encoder.layer]
        return [attention and attention.keys_values(source, mask) for attention in crossing]

    def forward(self, ids, read=None, with_scores=False, past=None):
        """ids (R, N) -> Encoded.

        read: what read() gives of B images; row r of R attends to image r // (R/B).
        past: of each layer the keys and values of the tokens before these, see TextLayer.
        """
        start = past[0][0].shape[2] if past and past[0] else 0
        if self.causal:  # padding comes last, where no token looks
            N = ids.shape[1]
            seen = torch.ones(N, start + N, dtype=torch.bool, device=ids.device)
            mask = seen.tril(start)
        else:
            mask = (ids != PAD)[:, None, None]  # (R, 1, 1, N)
        x = self.embeddings(ids, start)
        layers = self.encoder.layer
        nothing = [None] * len(layers)
        for layer, keys_values, before in zip(layers, read or nothing, past or nothing):
            wanted = with_scores and layer is layers[-1]
            x, *scores = layer(x, mask, keys_values, wanted, before)
        return Encoded(x, *scores)


class PredictionHead(nn.Module):
    """BERT's LM head. Its classifier is the word embeddings, but for BLIP's released pre-training
    checkpoints (tied_head=False): until 15 February 2022 its code separated the two by mistake."""

    def __init__(self, size, words):
        super().__init__()
        self.transform = sequence(dense=nn.Linear(size.width, size.width), act=nn.GELU(),
                                  LayerNorm=nn.LayerNorm(size.width, eps=1e-12))
        self.decoder = nn.Linear(size.width, size.vocab, device="meta")  # no random numbers for it
        self.decoder.weight = words if size.tied_head else copy.deepcopy(words)
        self.decoder.bias = self.bias = nn.Parameter(torch.zeros(size.vocab))

    def forward(self, states):
        return self.decoder(self.transform(states))


def exactly(head, states):
    """head(states) computed in fp32, with autocast off: in bf16 what is sorted or compared after it
    would lose digits."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float())


def init_text(encoder, decoder, head):
    """As in BERT; what the two share is drawn once.

    The order means nothing but which random numbers go where: another gives each seed, and so all
    results, other digits.
    """
    order = [encoder.embeddings]
    for layer, decoder_layer in zip(encoder.encoder.layer, decoder.encoder.layer):
        order += [layer.attention, decoder_layer, layer]
    initialise(nn.ModuleList([*order, decoder, head.transform]), nn.init.normal_)


def begin(ids, token):
    """ids (R, N) with another first token: the one of the mode."""
    return F.pad(ids[:, 1:], (1, 0), value=token)


class BLIP(nn.Module):
    """Image encoder, text encoder and decoder, projections for ITC, head for ITM.

    Modules and parameters are named as in BLIP's code, so that the files of each open in the
    other. shared: text encoder and decoder have all but self-attention and LM head in common
    (pre-training). False: they are two networks, and the decoder attends to states of the text
    encoder, not to the image, as where BLIP answers questions.
    """

    def __init__(self, size, shared=True):
        super().__init__()
        self.size, self.shared = size, shared
        vision = size.vision
        text = size.text
        E = size.embed_dim
        self.visual_encoder = VisionTransformer(vision)
        self.text_encoder = encoder = TextModel(text, vision.width)
        decoder = TextModel(text, vision.width if shared else text.width, causal=True,
                            twin=encoder if shared else None)
        head = PredictionHead(text, decoder.embeddings.word_embeddings.weight)
        self.text_decoder = nn.ModuleDict({
            "bert": decoder, "cls": nn.ModuleDict({"predictions": head})})
        init_text(encoder, decoder, head)
        self.vision_proj = nn.Linear(vision.width, E)
        self.text_proj = nn.Linear(text.width, E)
        self.itm_head = nn.Linear(text.width, 2)  # class 1: the text matches the image
        self.temp = nn.Parameter(torch.tensor(0.07))

    def encode_image(self, image):
        """(B, 3, S, S) normalised pixels -> states (B, M, vision width), CLS first."""
        return self.visual_encoder(image)

    def encode_text(self, ids):
        """Unimodal: ids (B, N) -> states (B, N, D). The first token becomes [CLS]."""
        return self.text_encoder(begin(ids, self.size.text.cls)).states

    def fuse(self, ids, image_states, with_scores=False):
        """Multimodal: ids (B, N), image states -> Encoded. The first token becomes [ENC]."""
        read = self.text_encoder.read(image_states)
        return self.text_encoder(begin(ids, self.size.text.enc), read, with_scores)

    def decoder_states(self, ids, source, source_mask=None, with_scores=False):
        """Causal: ids (R, N) -> Encoded. The first token becomes [DEC].

        source (B, M, its width): image states (captions), or states of fused questions, with their
        mask (answers).
        """
        decoder = self.text_decoder.bert
        read = decoder.read(source, source_mask)
        return decoder(begin(ids, self.size.text.dec), read, with_scores)

    def decode(self, ids, source, source_mask=None):
        """As decoder_states -> logits (R, N, V) of the token that follows each."""
        return self.logits(self.decoder_states(ids, source, source_mask).states)

    def logits(self, states):
        """Decoder states (R, N, D) -> (R, N, V), in fp32 but in training."""
        head = self.text_decoder.cls.predictions
        return head(states) if self.training else exactly(head, states)

    def image_feature(self, states):
        """Image states -> (B, E) of unit length, for ITC."""
        return F.normalize(exactly(self.vision_proj, states[:, 0]), dim=1)

    def text_feature(self, states):
        """Text states, of whatever mode -> (B, E) of unit length, for ITC and L_HR."""
        return F.normalize(exactly(self.text_proj, states[:, 0]), dim=1)

    def match(self, states):
        """Fused states -> (B, 2) logits of no match and match, of ITM."""
        return exactly(self.itm_head, states[:, 0])

    @torch.no_grad()
    def generate(self, source, prompt=(), **setting):
        """A caption of each source (B, M, its width): token ids from [DEC] to [SEP], B lists.

        prompt: token ids that follow [DEC]. setting: of beam_search, whose lengths count both.
        """
        text = self.size.text
        decoder = self.text_decoder.bert
        read = decoder.read(source)
        past = [[] for _ in read]

        def next_log_p(prefixes, rows):
            """R lists of N ids, and which rows of the last call they go on with ->
            log-probabilities (R, V) of the token that follows."""
            ids = torch.tensor(prefixes, device=source.device)
            if past[0]:  # empty at the first call; later only the last token is new
                ids = ids[:, -1:]
                for pair in past:
                    pair[:] = [x[rows] for x in pair]
            states = decoder(ids, read, past=past).states
            return self.logits(states[:, -1]).log_softmax(1)

        prompts = [[text.dec, *prompt]] * len(source)
        return beam_search(next_log_p, prompts, text.sep, **setting)

    @torch.no_grad()
    def rank_answers(self, question, question_mask, answers, top=128):
        """The places (B,) of the best of a list of answers, as in BLIP.

        question (B, M, D): fused states. answers (A, L): ids, [CLS] answer [SEP] padding. The `top`
        answers with the likeliest first token are scored whole by the training loss, with its label
        smoothing [BLIP's code].
        """
        first = answers[:1, :1].expand(len(question), 1)
        logits = self.decode(first, question, question_mask)[:, 0]  # (B, V)
        likeliest = logits[:, answers[:, 1]].topk(min(top, len(answers))).indices  # (B, top) of A
        best = []
        parts = [each.split(8) for each in (likeliest, question, question_mask)]  # for memory
        for chosen, states, mask in zip(*parts):
            ids = answers[chosen].flatten(0, 1)  # (8 top, L)
            loss = lm_loss(self.decode(ids, states, mask), ids, per_text=True).view_as(chosen)
            best.append(chosen.gather(1, loss.argmin(1, keepdim=True)))
        return torch.cat(best).squeeze(1)


def count_parameters(blip):
    """{module: number}. The paper counts visual_encoder and text_encoder, with cross-attention;
    text_decoder has only what it does not share."""
    counts = Counter()
    for name, parameter in blip.named_parameters():  # what is shared once, in text_encoder
        counts[name.split(".")[0]] += parameter.numel()
    return counts


# ----------------------------------------------------------------------------------- generation


def beam_search(next_log_p, prompts, sep, num_beams=3, min_length=5, max_length=20, released=True):
    """B prompts of P ids -> B texts: each the one with the best log-probability / length.

    Each step extends the K running beams to their 2K best continuations. One that ends, with [SEP],
    competes for the K places of finished texts if it is among the K best of these; the K best that
    do not end run on, and compete too when they have max_length tokens. An image is done once the
    best that is left scores no better than the worst of K finished texts. One beam is greedy
    search. Both lengths count [DEC] and prompt.

    released: as in BLIP's release, the length counts [DEC] and prompt and not [SEP], and the best
    that is left is that of all 2K continuations. False: as in transformers 5, the length counts
    the new tokens with [SEP], and the best that is left is a running one.
    """
    B = len(prompts)
    P = len(prompts[0])
    K = num_beams
    # of each beam its log-probability, its ids, the row of `prefixes` that it goes on with
    running = [[(0.0, prompt, 0)] for prompt in prompts]
    finished = [[] for _ in prompts]  # log-probability / length and ids of each text
    done = [False] * B
    for n in range(P + 1, max_length + 1):  # n tokens after this step
        totals, prefixes, rows = map(list, zip(*sum(running, [])))  # of R beams
        log_p = next_log_p(prefixes, rows)  # (R, V)
        if n <= min_length:
            log_p[:, sep] = -math.inf
        log_p = log_p + log_p.new_tensor(totals)[:, None]
        totals, places = log_p.view(B, -1).topk(2 * K)  # (B, 2K)
        V = log_p.shape[1]
        length = n - 1 if released else n - P
        for image, best in enumerate(zip(totals.tolist(), places.tolist())):
            beams = running[image]
            ended = finished[image]
            longer = []
            for total, place in zip(*best):
                beam, word = divmod(place, V)
                longer.append((total, [*beams[beam][1], word], image * len(beams) + beam))
            running[image] = [beam for beam in longer if beam[1][-1] != sep][:K]
            if not done[image]:
                ended += [(total / length, ids) for total, ids, _ in longer[:K] if ids[-1] == sep]
                left = longer if released else running[image]
                done[image] = len(ended) >= K and sorted(ended)[-K][0] >= left[0][0] / length
        if all(done):
            break

    length = max_length if released else max_length - P
    for image in range(B):
        if not done[image]:
            finished[image] += [(total / length, ids) for total, ids, _ in running[image]]
    return [max(ended)[1] for ended in finished]


# --------------------------------------------------------------------------------------- losses


def mean_where(x, where):
    """The mean of x over the True places of `where`, of the same shape, of all processes.

    Each process divides its sum by the mean count, so that averaging their gradients gives that of
    one process.
    """
    where = where.to(x.dtype)
    count = common.sum_over_processes(where.sum()) / world_size()
    return (x * where).sum() / count.clamp_min(1)


def scaled_cosines(queries, keys, temp):
    """Cosines / temp of unit rows, (b, n), in fp32 also under autocast."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ keys.T / temp


def itc_loss(query, query_m, keys, same, temp, alpha):
    """Image-text contrast with momentum targets [BLIP, after ALBEF], of images or of texts.

    query (b, E): this process's unit features, with gradient; query_m (b, E): those of the momentum
    encoders; keys (B + Q, E): momentum features of the other modality, of all processes' batches,
    then of the queue. same (b, B + Q): which keys are of the same image.
    Target: alpha softmax(query_m keys^T / temp) + (1 - alpha) same, each row of which sums to one.
    """
    hard = F.normalize(same.to(query.dtype), p=1, dim=1)
    soft = scaled_cosines(query_m, keys, temp.detach()).softmax(1)
    target = alpha * soft + (1 - alpha) * hard  # (b, B + Q)
    log_p = scaled_cosines(query, keys, temp).log_softmax(1)
    return -(target * log_p).sum(1).mean()


@torch.no_grad()
def draw_negatives(similarities, same, floor=0.0):
    """For each row the index of another pair, (b, b) -> (b,); -1 where all are of the same image.

    Drawn with probability softmax(similarities) + floor outside of `same`: BLIP's floor is 1e-4 in
    pre-training, which keeps easy negatives coming, and 0 in fine-tuning. The maximum of
    log-probability + Gumbel noise has this distribution, and unlike torch.multinomial it makes
    nobody wait for the device.
    """
    log_floor = torch.full_like(similarities, floor).log()
    log_p = torch.logaddexp(similarities.log_softmax(1), log_floor)
    gumbel = -torch.empty_like(similarities).exponential_().log()
    drawn = (log_p + gumbel).masked_fill(same, -math.inf).argmax(1)
    return drawn.masked_fill(same.all(1), -1)


def lm_loss(logits, ids, prompt=1, per_text=False):
    """Cross-entropy of each token given those before it, label smoothing 0.1 [BLIP].

    logits (R, N, V) and the ids (R, N) they were computed from. Not predicted are padding and the
    first `prompt` tokens, [DEC] included. The mean over the tokens of all processes; per_text: the
    sum over each text, (R,).
    """
    target = ids.clone()
    target[:, :prompt] = PAD
    target = target[:, 1:]  # (R, N-1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="none",
                           ignore_index=PAD, label_smoothing=0.1).view(target.shape)
    return loss.sum(1) if per_text else mean_where(loss, target != PAD)


def representation_loss(student, teacher):
    """L_HR [paper; form: A1]: mean of 1 - cosine of unit rows (b, E). Trains the student alone."""
    return (1 - (student * teacher.detach()).sum(-1)).mean()


def attention_loss(student, teacher, queries):
    """L_AT [paper]: KL(teacher map || student map), the mean over heads and queries.

    Scores (b, H, N, M), whose softmax is the map; queries (b, N) are True at tokens, False at
    padding. Trains the student alone.
    """
    student = student.log_softmax(-1)
    teacher = teacher.detach().log_softmax(-1)
    kl = F.kl_div(student, teacher, reduction="none", log_target=True)
    return mean_where(kl.sum(-1).mean(1), queries)  # (b, N) -> scalar


# --------------------------------------------------------------------------------------- method


@dataclass
class Forward:
    """A BLIP's forward pass over b image-text pairs; a property is computed when first read.
    with_scores: with the last layers' attention scores, for L_AT.

    img, text, vl_e and vl_d (b, E) are the paper's four representations, after the ITC projection
    of the model itself (A1): CLS of the image, CLS of the text, [ENC] of the fusion encoder, [DEC]
    of the decoder.
    """

    blip: BLIP
    image: torch.Tensor
    ids: torch.Tensor
    with_scores: bool = False

    @cached_property
    def image_states(self):
        return self.blip.encode_image(self.image)  # (b, M, D)

    @cached_property
    def fused(self):
        return self.blip.fuse(self.ids, self.image_states, self.with_scores)

    @cached_property
    def decoded(self):
        return self.blip.decoder_states(self.ids, self.image_states, None, self.with_scores)

    @cached_property
    def img(self):
        return self.blip.image_feature(self.image_states)

    @cached_property
    def text(self):
        return self.blip.text_feature(self.blip.encode_text(self.ids))

    @cached_property
    def vl_e(self):
        return self.blip.text_feature(self.fused.states)

    @cached_property
    def vl_d(self):
        return self.blip.text_feature(self.decoded.states)

    @cached_property
    def logits(self):
        return self.blip.logits(self.decoded.states)


class DLIP(nn.Module):
    """The student, a BLIP, with BLIP's momentum encoders and queues: pre-training and fine-tuning.

    "Student" is the model being trained, also in --stage teacher, where nobody teaches it. The
    teacher, another BLIP, is no part of this module: it never changes. Below, `ours` is the
    student's Forward, `theirs` the teacher's, `slow` that of the momentum encoders.
    """

    def __init__(self, cfg, student, prompt_length=1):
        super().__init__()
        self.cfg = cfg
        self.student = student
        self.prompt_length = prompt_length  # P, [DEC] included
        self.momentum = None
        contrasts = "retrieval" in cfg.task if cfg.stage == "finetune" else cfg.vlp
        if contrasts:  # ITC alone needs momentum encoders
            self.momentum = copy.deepcopy(student).requires_grad_(False)
            del self.momentum.text_decoder, self.momentum.itm_head, self.momentum.temp
            Q = cfg.queue_size
            E = student.size.embed_dim
            self.register_buffer("image_queue", F.normalize(torch.randn(Q, E), dim=1))
            self.register_buffer("text_queue", F.normalize(torch.randn(Q, E), dim=1))
            self.register_buffer("number_queue", torch.full((Q,), -1))  # of no image yet

    def forward(self, image, token_ids, number, alpha, teacher=None):
        """(loss, terms) of a batch.

        image (b, 3, S, S); token_ids [captions' (b, N)], for VQA [questions', answers']; number
        (b,) of the image in the data, which retrieval fine-tuning alone uses.
        """
        cfg = self.cfg
        with_scores = teacher and cfg.attn != ("none",)
        ours = Forward(self.student, image, token_ids[0], with_scores)
        if cfg.stage != "finetune":
            loss, terms = self.pretrain(ours, alpha, teacher)
        else:
            if "retrieval" in cfg.task:
                terms = self.contrast(ours, number, alpha, floor=0.0)
            elif "caption" in cfg.task:  # what follows the prompt
                terms = {"lm": lm_loss(ours.logits, ours.ids, self.prompt_length)}
            else:  # answers, given the states of the fused questions
                logits = self.student.decode(token_ids[1], ours.fused.states, ours.ids != PAD)
                terms = {"lm": lm_loss(logits, token_ids[1], per_text=True).mean()}
            loss = sum(terms.values())
        terms = {"loss": loss, **terms}
        return loss, {name: term.detach() for name, term in terms.items()}

    def pretrain(self, ours, alpha, teacher):
        """L = L_ITC + L_ITM + L_LM + lambda_HR L_HR + lambda_AT L_AT; the paper's lambdas are 1.

        What of the student each term trains (nothing of the teacher or the momentum encoders):
        ITC  ViT, text encoder without cross-attention, both projections, temperature
        ITM  ViT, text encoder with cross-attention, itm_head
        LM   ViT, decoder with the layers and embeddings it shares, LM head
        HR   img: ViT, vision_proj. text: text encoder without cross-attention, text_proj.
             vl_e: ViT, text encoder with cross-attention, text_proj. vl_d: ViT, decoder, text_proj
        AT   ViT, text encoder, decoder: all up to the last layers' queries and keys, no heads
        To add a loss: its function, under "losses"; its line here, in vlp, hr or at, or in a new
        dict that `loss` and `return` add; its weight, in Config (a field is a flag) and in `loss`;
        its name in LOG_COLUMNS, which makes log.csv and the curves show it.
        """
        cfg = self.cfg
        ids = ours.ids
        vlp = {}
        hr = {}
        at = {}

        if cfg.vlp:
            # a pair's image and text belong together, and no others
            number = rank() * len(ids) + torch.arange(len(ids), device=ids.device)
            vlp = self.contrast(ours, number, alpha, floor=1e-4)
            vlp["lm"] = lm_loss(ours.logits, ids)

        if teacher:
            theirs = Forward(teacher, ours.image, ids, ours.with_scores)
            for name in HR_PARTS:  # Forward has the four by name
                if name in cfg.hr:
                    hr[f"hr_{name}"] = representation_loss(getattr(ours, name),
                                                           getattr(theirs, name))
            tokens = ids != PAD
            if "self" in cfg.attn:  # of fusion encoder and decoder
                at["at_self"] = (
                    attention_loss(ours.fused.self_scores, theirs.fused.self_scores, tokens)
                    + attention_loss(ours.decoded.self_scores, theirs.decoded.self_scores, tokens)
                )
            if "cross" in cfg.attn:
                at["at_cross"] = attention_loss(
                    ours.fused.cross_scores, theirs.fused.cross_scores, tokens)

        loss = (
            sum(vlp.values())
            + cfg.lambda_hr * sum(hr.values())
            + cfg.lambda_at * sum(at.values())
        )
        return loss, {**vlp, **hr, **at}

    @torch.no_grad()
    def update_momentum(self):
        """Momentum encoders <- m themselves + (1 - m) student."""
        self.momentum.eval()  # no dropout; model.train() ends that after each validation
        for name, average in self.momentum.named_parameters():
            average.lerp_(self.student.get_parameter(name), 1 - self.cfg.momentum)

    def contrast(self, ours, number, alpha, floor):
        """{"itc", "itm"}; number (b,): pairs of the same number are positives of each other.

        The keys are momentum features of all processes' batches, then of the queue. Moves the
        momentum encoders before, the queue behind.
        """
        self.update_momentum()
        slow = Forward(self.momentum, ours.image, ours.ids)
        image_keys = torch.cat([gather(slow.img), self.image_queue])  # (B + Q, E)
        text_keys = torch.cat([gather(slow.text), self.text_queue])
        numbers = torch.cat([gather(number), self.number_queue])
        same = number[:, None] == numbers  # (b, B + Q)
        temp = self.student.temp
        # [BLIP]: an online feature against momentum features
        image_to_text = itc_loss(ours.img, slow.img, text_keys, same, temp, alpha)
        text_to_image = itc_loss(ours.text, slow.text, image_keys, same, temp, alpha)
        itc = (image_to_text + text_to_image) / 2

        # for each image a wrong text, for each text a wrong image, of this process
        same = number[:, None] == number  # (b, b)
        wrong_text = draw_negatives(scaled_cosines(ours.img, slow.text, temp), same, floor)
        wrong_image = draw_negatives(scaled_cosines(ours.text, slow.img, temp), same, floor)
        itm = self.matching(ours, wrong_text, wrong_image)

        Q = self.cfg.queue_size  # the newest keys come first, the oldest leave
        self.image_queue.copy_(image_keys[:Q])
        self.text_queue.copy_(text_keys[:Q])
        if self.cfg.stage == "finetune":  # in pre-training the queue holds no positives
            self.number_queue.copy_(numbers[:Q])
        return {"itc": itc, "itm": itm}

    def matching(self, ours, wrong_text, wrong_image):
        """L_ITM: cross-entropy on [ENC] over b pairs, b images with a wrong text, b texts with a
        wrong image; those that have no wrong one (-1) do not count."""
        ids = torch.cat([ours.ids[wrong_text], ours.ids])
        states = torch.cat([ours.image_states, ours.image_states[wrong_image]])
        negative = self.student.match(self.student.fuse(ids, states).states)
        positive = self.student.match(ours.fused.states)
        absent = torch.cat([wrong_text, wrong_image]) < 0
        target = torch.cat([torch.ones_like(wrong_text), absent * -100])
        return F.cross_entropy(torch.cat([positive, negative]), target)  # (3b, 2); leaves -100 out


# -------------------------------------------------------------------------------------- weights

# Vision names of Hugging Face's BLIP, as BLIP, timm and DeiT have them.
VISION_NAMES = {
    "vision_model.": "visual_encoder.",
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
    "post_layernorm": "norm",
    "layer_norm": "norm",
}
WORDS = "embeddings.word_embeddings.weight"
CLASSIFIER = "text_decoder.cls.predictions.decoder.weight"
# Other names of a tensor, which safetensors leave out; and a buffer that says nothing.
SPARE = "predictions.decoder.weight", "predictions.decoder.bias", "position_ids"


def load_blip(checkpoint, image_size=None, dropout=0.0, need=(), untie=False):
    """A BLIP with the weights of a common.Checkpoint (ours, BLIP's own or Hugging Face's), in which
    no name may be missing that begins with one of `need`.

    image_size: position embeddings are resized to it. A captioner has no text encoder, a retriever
    no decoder: what is missing and not needed stays random. untie: two networks also of shared
    weights, the start of BLIP's VQA fine-tuning. The decoder then reads text states instead of
    image states: where the widths differ, keys and values of its cross-attention start afresh (A7).
    """
    weights = blip_names(checkpoint.weights)
    size = blip_size(checkpoint, weights)
    vision = replace(size.vision, image_size=image_size or size.vision.image_size)
    size = replace(size, vision=vision, text=replace(size.text, dropout=dropout))
    shared = alike(weights, f"text_encoder.{WORDS}", f"text_decoder.bert.{WORDS}")
    blip = BLIP(size, shared and not untie)
    if shared and untie and vision.width != size.text.width:
        fresh = re.compile(r"text_decoder\..*crossattention\.self\.(key|value)")
        weights |= {name: w for name, w in blip.state_dict().items() if fresh.match(name)}
    load_named(blip, weights, checkpoint.path, ("visual_encoder.", *need))
    return blip


def load_named(module, weights, path, need):
    """Load those of the weights that the module has; UserError where one is missing whose name
    begins with one of `need`.

    What else it has and they lack stays as it is. Position embeddings are resized to the module's.
    """
    own = module.state_dict()  # not copies: of two names of one tensor either will do
    for name, tensor in own.items():
        if name in weights:
            own[name] = weights[name]
            if name.endswith("pos_embed"):
                own[name] = common.resize_grid(weights[name][0], tensor.shape[1], False)[None]
        elif name.startswith(need) and not name.endswith(SPARE):
            raise UserError(f"{path} lacks {name}")
    common.load_weights(module, own, path)


def blip_names(weights):
    """{BLIP's name: tensor}"""
    renamed = {}
    for name, tensor in weights.items():
        name = name.removeprefix("student.")  # of a run of ours
        if name.startswith("vision_model."):
            for old, new in VISION_NAMES.items():
                name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def alike(weights, *names):
    """Whether the tensors of these names, so far as they are there, are equal: a file does not say
    which were one parameter, but those that were are equal."""
    tensors = [weights[name] for name in names if name in weights]
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors)


# The image encoders of the BLIPs that were published, by width; their texts are BERT-Base.
PUBLISHED = {768: VIT["base"], 1024: VisionSize(1024, 24, 16)}


def blip_size(checkpoint, weights):
    """BLIPSize: as saved with ours, else that of a published BLIP."""
    saved = checkpoint.size
    positions = weights.get("visual_encoder.pos_embed")
    if saved:
        try:
            return BLIPSize(VisionSize(**saved["vision"]), TextSize(**saved["text"]),
                            saved["embed_dim"])
        except (KeyError, TypeError):
            raise UserError(f"{checkpoint.path} does not say the sizes of a BLIP") from None
    if positions is None or positions.shape[2] not in PUBLISHED:
        raise UserError(f"{checkpoint.path}: these are no weights of a BLIP")
    vision = PUBLISHED[positions.shape[2]]
    side = vision.patch * math.isqrt(positions.shape[1] - 1)
    tied = alike(weights, f"text_decoder.bert.{WORDS}", CLASSIFIER)
    return BLIPSize(replace(vision, image_size=side), replace(BERT["base"], tied_head=tied))


# ------------------------------------------------------------------------------------ training


def tokenizer_of(cfg):
    """BERT's tokens, of texts as long as the task needs, 30 in pre-training [BLIP]; of the emoji
    scenes only the words that occur, and 24 tokens always [choice]."""
    length = TEXT_LENGTH[cfg.task[0]] if cfg.init else 30
    words = None
    if cfg.data == "emoji":
        length = 24
        words = scenes.emoji_words(cfg.concepts)
    return common.BertTokenizer(length, words)


def size_of(cfg, tokenizer):
    """The BLIPSize that --vit and --bert name."""
    vits, berts = sizes(cfg)
    vision = replace(vits[cfg.vit], image_size=cfg.image_size)
    special = {name: getattr(tokenizer, name) for name in "pad cls sep dec enc".split()}
    text = berts[cfg.bert]
    fusion = min(cfg.fusion_layers, text.layers)
    text = replace(text, vocab=tokenizer.vocab_size, dropout=dropout(cfg), fusion_layers=fusion,
                   **special)
    return BLIPSize(vision, text, 64 if cfg.data == "emoji" else 256)


def dropout(cfg):
    return 0.0 if cfg.data == "emoji" else 0.1  # BERT's


def open_blip(path, cfg, tokenizer, *how):
    """A BLIP from a checkpoint at --image-size; how: what load_blip takes behind the dropout.
    UserError when it does not fit the data."""
    blip = load_blip(common.read_checkpoint(path), cfg.image_size, dropout(cfg), *how)
    vocab = blip.size.text.vocab
    if vocab != tokenizer.vocab_size:
        raise UserError(f"{path} has a vocabulary of {vocab:,} tokens, --data {cfg.data} "
                        f"{tokenizer.vocab_size:,}: it was trained on other data or --concepts")
    return blip


def build(cfg, tokenizer):
    """DLIP around a new student, or around the one of --init."""
    if cfg.stage == "finetune":
        student = open_blip(cfg.init, cfg, tokenizer, NEEDED[cfg.task[0]],
                            "vqa" in cfg.task)  # whose two text networks are untied
    else:
        student = BLIP(size_of(cfg, tokenizer))
        if cfg.vision_init:
            vit = common.read_checkpoint(cfg.vision_init)
            load_named(student.visual_encoder, vit.weights, vit.path, ("",))
    return DLIP(cfg, student, 1 + len(tokenizer.encode(PROMPT)))


def load_teacher(cfg, tokenizer, device):
    """The frozen teacher in evaluation mode; None where nothing is distilled."""
    if cfg.stage == "finetune" or not distils(cfg):
        return None
    path = teacher_file(cfg)
    teacher = open_blip(path, cfg, tokenizer, NEEDED["teacher"])
    needed, found = ([size.embed_dim, size.text.heads, size.vision.patch]
                     for size in (size_of(cfg, tokenizer), teacher.size))
    if needed != found:
        raise UserError(f"{path} does not fit the student: joint width, heads of the text network "
                        f"and pixels of a patch are {found}, not {needed}")
    return teacher.to(device).eval().requires_grad_(False)


def teacher_file(cfg):
    if not cfg.teacher and cfg.data != "emoji":
        raise UserError("--teacher: name the checkpoint of a BLIP (or --method blip for none)")
    return cfg.teacher or str(common.DATA / "teacher_blip.pt")


def build_optimiser(student, cfg, device):
    """AdamW with torch's betas and eps, weight decay on tensors of two and more
    dimensions; fused where that exists.

    Adam's steps do not shrink with the temperature: at the emoji run's learning rate it would
    collapse within a hundred steps, so there it has a share of that rate [choice], at the peak 7e-5
    in stage teacher and 8e-4 in distil.
    """
    share = 1.0
    if cfg.data == "emoji":
        share = 0.07 if cfg.stage == "teacher" else 0.2
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors},
        {"params": [student.temp], "share": share},
    ]
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)


def peak_lr(cfg, text_width):
    """--lr; of two the second where the text network is small or tiny."""
    _, berts = sizes(cfg)
    small = text_width <= berts["small"].width
    return cfg.lr[-1] if small else cfg.lr[0]


def schedules(cfg, peak, step, steps, steps_per_epoch):
    """{"lr", "alpha"} at a step.

    After the warm-up from 1e-6, in pre-training on large data times 0.85 after every epoch
    [paper], else a cosine to 1e-5 (emoji) or 0 [BLIP].
    """
    warmup = min(cfg.warmup_steps, steps / 5)
    lowest = 1e-5 if cfg.data == "emoji" else 0.0
    if step < warmup:
        lr = 1e-6 + (peak - 1e-6) * step / warmup
    elif cfg.data != "emoji" and cfg.stage != "finetune":
        lr = peak * 0.85 ** (step // steps_per_epoch)
    else:
        done = (step - warmup) / (steps - warmup)
        lr = lowest + (peak - lowest) * (1 + math.cos(math.pi * done)) / 2
    ramp = cfg.alpha_ramp * steps_per_epoch
    return {"lr": lr, "alpha": cfg.alpha * min(1.0, step / ramp if ramp else 1.0)}


def update(student, optimiser, scaler, lr):
    """One optimiser step on the processes' mean gradient, then the clamp of the temperature."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("share", 1.0)
    average_gradients(student.parameters())
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad()
    student.temp.data.clamp_(0.001, 0.5)


class Samples(common.TrainSamples):
    """TrainSamples that give a fourth thing: the image's number in the training set."""

    def __getitem__(self, place):
        *sample, index, _ = self.draw(place)
        return *sample, torch.tensor(index)


class AnsweredQuestions:
    """Questions for training: a "caption" is the question with one of its human answers (A5)."""

    def __init__(self, data):
        self.data, self.key, self.digest = data, data.key, data.digest

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, (question, answers, _) = self.data[i]
        return image, [(question, answer) for answer in answers]


SYMBOLS = r'[.!"()*#:;~]'  # what BLIP takes out of captions and questions


def clean_caption(text):
    """A caption as BLIP reads it: lower case, a space for SYMBOLS, at most 30 words."""
    return " ".join(re.sub(SYMBOLS, " ", text.lower()).split()[:30])


def clean_question(text):
    """A question as BLIP reads it: lower case, SYMBOLS removed, at most 50 words."""
    return " ".join(re.sub(SYMBOLS, "", text.lower()).split()[:50])


def encode_captions(tokenizer, prompt, texts):
    """n strings -> ids (n, context)."""
    return tokenizer([prompt + clean_caption(text) for text in texts])


def encode_pairs(tokenizer, pairs):
    """n pairs of question and answer -> ids (n, 2 context)."""
    questions, answers = zip(*pairs)
    return torch.cat([tokenizer(map(clean_question, questions)),
                      tokenizer(answers)], 1)


KEPT = """Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Sharpness AutoContrast
    Equalize""".split()


def augment(image, rng):
    """A mirror image half of the time, then two operations of torchvision's RandAugment.

    As in BLIP those in KEPT, at half of the largest magnitude, shifts of 5 of 224 pixels (BLIP's: 5
    of any size). Ours [choice]: an operation always applies (BLIP leaves half of them out), and
    brightness and sharpness change by 0.45 either way, where BLIP's do nothing. A function of the
    image, uint8 (3, S, S), and of rng.
    """
    transforms = common.import_torchvision().transforms

    class RandAugment(transforms.RandAugment):
        def _augmentation_space(self, bins, size):
            space = super()._augmentation_space(bins, size)
            shifts = torch.linspace(0.0, 10 / 224 * size[0], bins), True
            space.update(TranslateX=shifts, TranslateY=shifts)
            return {name: space[name] for name in KEPT}

    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator
        torch.manual_seed(int(rng.integers(2 ** 63)))
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return RandAugment(2, 5, num_magnitude_bins=11, fill=[128] * 3)(image)


def training_samples(cfg, tokenizer):
    """What --stage and --task train on: captions; captions after the prompt; questions, each with
    an answer."""
    if "vqa" in cfg.task:
        data = AnsweredQuestions(common.question_set(cfg, cfg.image_size, "train"))
        encode = partial(encode_pairs, tokenizer)
    else:
        data = common.training_set(cfg, cfg.image_size)
        prompt = PROMPT if "caption" in cfg.task else ""
        encode = partial(encode_captions, tokenizer, prompt)
    # least area of the random crop [BLIP]
    least = 0.5 if cfg.stage == "finetune" else 0.2
    change = augment
    if cfg.data == "emoji":  # captions tell left from right: no mirror images
        least = 0.8
        change = None
    return Samples(data, encode, cfg.image_size, (least, 1.0), cfg.seed, change)


LOG_COLUMNS = """step epoch lr alpha loss itc itm lm hr_img hr_text hr_vl_e hr_vl_d at_self at_cross
    logit_scale val_retrieval val_caption val_vqa""".split()


def train(cfg, stages):
    """Train, validate after every epoch, save the student; a run folder of its own. stages: the Run
    it is part of, whose config.json is written when all has been found to fit.

    With cfg.resume, which run_stages sets (--out itself asks for --resume), what is done is not
    done again, and what was interrupted goes on.
    """
    if Path(cfg.out, "results.json").is_file():
        return
    device = common.start_device(cfg.device, cfg.seed)
    tokenizer = tokenizer_of(cfg)
    # before the teacher, which draws random numbers: a seed's arms start from the same student
    model = build(cfg, tokenizer).to(device).train()
    student = model.student
    teacher = load_teacher(cfg, tokenizer, device)
    optimiser = build_optimiser(student, cfg, device)
    amp, scaler = common.mixed_precision(cfg.precision, device)
    samples = training_samples(cfg, tokenizer)
    asked = Predictor(student, cfg, tokenizer, device)
    validation = task_sets(cfg, cfg.task[0], "val")

    run = common.Run(cfg, student.size, LOG_COLUMNS)
    state = run.load_state(samples, model=model, optimiser=optimiser, scaler=scaler)
    steps_per_epoch = len(samples) // cfg.batch_size
    steps = max(1, round(cfg.epochs * steps_per_epoch))
    loader = common.train_loader(samples, cfg, steps, state["step"], device)
    stages.write_config()
    run.start(state["step"])
    student.visual_encoder.grad_checkpoint = cfg.grad_checkpoint
    if cfg.compile:
        for blip in filter(None, (student, model.momentum, teacher)):
            blip.visual_encoder.compile()  # in place: the parameter names stay as they are
    peak = peak_lr(cfg, student.size.text.width)
    common.say(f"\n{cfg.out}: {steps} steps, peak learning rate {peak:g}")

    progress = common.Progress(cfg, state, steps, steps_per_epoch)
    with common.StopRequest() as stop, progress:
        for image, ids, bad, number in loader:
            now = schedules(cfg, peak, state["step"], steps, steps_per_epoch)
            image = normalise(image, asked.statistics)
            number = number.to(device, non_blocking=True)
            ids = ids.split(tokenizer.context_length, 1)  # captions, or questions and answers
            # of 4 tokens, not of 16 as the loader cuts them: no text network is compiled
            ids = [common.trim_padding(each, 4).to(device, non_blocking=True) for each in ids]
            # dropout and the negatives of ITM: the same after --resume
            torch.manual_seed(cfg.seed * 10 ** 9 + state["step"] * world_size() + rank())
            with amp:
                loss, terms = model(image, ids, number, now["alpha"], teacher)
            scaler.scale(loss).backward()
            update(student, optimiser, scaler, now["lr"])

            epoch_ends, logs, saves = progress.count(state, bad)
            stopping = stop.agreed(synchronise=logs)
            if logs:
                scale = -student.temp.log()
                row = common.log_row(state, steps_per_epoch, now, terms, scale)
                if epoch_ends:
                    common.check_epoch(state, cfg.data)
                    row.update(validate(run, asked, validation, state))
                    model.train()
                run.log(row)
                progress.show(row)
            if saves or stopping:
                run.save_state(state)
            if stopping:
                raise KeyboardInterrupt(f"stopped at step {state['step']}; the same command with "
                                        f"--resume --out {Path(cfg.out).parent} goes on")
    common.on_first(partial(finish, run, student, state))


def finish(run, student, state):
    """blip.pt, the model alone; results.json; curves.png."""
    cfg = run.cfg
    if cfg.stage == "teacher":  # for data/, where half the size matters more than the digits
        student.half()
    run.save_model("blip.pt", student)
    common.write_json(run.folder / "results.json", {"seed": cfg.seed, **state})
    common.plot_curves(run.folder / "curves.png",
                       f"{run.folder.name} on {cfg.data}: losses, validation score")


# ------------------------------------------------------------------------ evaluation, pictures


class Predictor:
    """A BLIP that can be asked: pixels (B, 3, S, S) uint8 and strings go in, features, logits and
    strings come out. It has the tokenizer, the autocast and the pixel statistics for that."""

    def __init__(self, blip, cfg, tokenizer, device):
        self.blip, self.cfg, self.tokenizer = blip, cfg, tokenizer
        self.amp, _ = common.mixed_precision(cfg.precision, device)
        self.statistics = common.Size(**common.OPENAI).pixel_statistics(device)  # CLIP's [BLIP]

    def encode_image(self, image):
        """States (B, M, D) and ITC features (B, E)."""
        with self.amp:
            states = self.blip.encode_image(normalise(image, self.statistics))
            return states, self.blip.image_feature(states)

    def ids(self, texts):
        """Token ids (T, context) on the device."""
        return self.tokenizer(texts).to(self.statistics.device)

    def encode_text(self, captions):
        """Token ids (T, context) and ITC features (T, E)."""
        ids = self.ids([clean_caption(text) for text in captions])
        with self.amp:
            return ids, self.blip.text_feature(self.blip.encode_text(ids))

    def match(self, states, ids):
        """ITM logits (n,) of texts, ids (n, context), with the states (1, M, D) of one image.

        In retrieval common.rerank_retrieval adds them to the ITC cosines of the rerank_k best by
        cosine, and that sum ranks; the rest have no chance.
        """
        ids = common.trim_padding(ids, 4)
        with self.amp:
            return self.blip.match(self.blip.fuse(ids, states).states)[:, 1]

    def caption(self, image):
        """Captions by beam search, 3 beams, 5 to 20 tokens [BLIP] of which [DEC] and the prompt are
        the first; returned without them."""
        prompt = self.tokenizer.encode(PROMPT)
        states, _ = self.encode_image(image)
        with self.amp:
            found = self.blip.generate(states, prompt)
        return [self.tokenizer.decode(ids[1 + len(prompt):]) for ids in found]

    def answer(self, answers, image, questions):
        """The likeliest of a list of answers to each question."""
        ids = self.ids([clean_question(text) for text in questions])
        candidates = common.trim_padding(self.ids(answers), 4)
        states, _ = self.encode_image(image)
        with self.amp:
            fused = self.blip.fuse(ids, states).states
            best = self.blip.rank_answers(fused, ids != PAD, candidates, self.cfg.answer_k)
        return [answers[i] for i in best.tolist()]


def task_sets(cfg, task, split):
    """{name: set} that a task is evaluated on, "val" or "test"; empty where there is none."""
    if task == "vqa":
        data = common.question_set(cfg, cfg.image_size, split)
        if split == "val":  # rank 0 validates alone, after every epoch
            data = common.Subset(data, range(len(data))[:5000])
        return {cfg.data: data}
    if cfg.data == "emoji":
        # 300 scenes [choice]: few, so that every epoch of the demo can be validated
        return {"emoji": scenes.EmojiScenes(split, 300, cfg.image_size, concepts=cfg.concepts,
                                            difficulty=cfg.difficulty)}
    sets = common.evaluation_sets(cfg, cfg.image_size, split)
    return {name: data for name, data in sets.items() if data.kind == "captions"}


@torch.inference_mode()
def metrics_of(asked, data, rerank_k, answers=None):
    """{metric: value} of the task of asked.cfg on a set, in percent.

    rerank_k: candidates of re-ranking; 0: retrieval by ITC alone. answers: the file for what only
    VQA's server can score.
    """
    cfg = asked.cfg
    workers = common.loader_workers(cfg)
    asked.blip.eval()
    if "retrieval" in cfg.task:
        # of the image states that wait for re-ranking: half the bytes where autocast is on, which
        # torch.autocast tells only under this private name
        dtype = torch.float16 if asked.amp._enabled else torch.float32
        return common.rerank_retrieval(data, cfg.image_size, asked.encode_image,
                                       asked.encode_text, asked.match, rerank_k, workers, dtype)
    if "vqa" in cfg.task:
        answer = partial(asked.answer, data.answers)
        given, metrics = common.answer_questions(data, cfg.image_size, answer, workers)
        if "accuracy" not in metrics:
            common.write_json(answers, given)
        return common.prefixed("vqa", metrics)
    return common.caption_scores(data, cfg.image_size, asked.caption, workers)


def validate(run, asked, sets, state):
    """{"val_TASK"}: the main score on the first set, of retrieval by ITC alone; keeps the best as
    best.pt. {} where there is no set, and but for rank 0."""
    if rank() > 0 or not sets:
        return {}
    data = next(iter(sets.values()))
    task = asked.cfg.task[0]
    metrics = metrics_of(asked, data, rerank_k=0)
    if task == "retrieval":
        value = common.main_metric(metrics)
    else:
        value = metrics["cider" if task == "caption" else "vqa_accuracy"]
    run.keep_best(float(value), state, asked.blip)
    return {f"val_{task}": value}


# -------------------------------------------------------------------------------------- stages


def finetunings(cfg):
    """{task: Config}, of --stage evaluate too, in the order of the runs. In --stage all EMOJI[task]
    replaces the few flags that are distil's (see --stage), the others hold throughout."""
    found = {}
    for task in cfg.task:
        values = EMOJI[task] if cfg.stage == "all" else {}
        found[task] = replace(
            cfg, **values, stage="finetune", task=(task,), out=f"{cfg.out}/{task}", resume=True,
            init=cfg.init or f"{cfg.out}/distil/blip.pt")
    return found


def teacher_command(cfg):
    """{field: value} of the command that fine-tunes and evaluates the teacher beside its student;
    None where none does."""
    if cfg.stage != "all" or cfg.init or not (cfg.with_teacher and distils(cfg)):
        return None
    changed = {name: value for name, value in vars(cfg).items() if value != getattr(Config, name)}
    return {**changed, "init": teacher_file(cfg), "out": Path(cfg.out, "teacher")}


@contextmanager
def command_beside(fields):
    """Run this script with {field: value} while the body of `with` runs, then wait for it; each has
    half of the CPU's threads. UserError when it fails. When the body does, it is told to end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // 2 or 1)
    process = common.start_command(__file__, fields, "OMP_NUM_THREADS", torch.get_num_threads())
    try:
        yield
        common.end_command(process, fields)
        torch.set_num_threads(threads)
    except BaseException:
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)  # after Ctrl-C it ends by itself
        process.terminate()
        raise


def run_stages(cfg):
    """What --stage names, in folders below --out; common.Run refuses one that holds a run already,
    unless --resume."""
    device = common.start_device(cfg.device, cfg.seed)
    stages = common.Run(cfg, None, ())
    if (stages.folder / "log.csv").exists():
        raise UserError(f"{cfg.out} is a part of the run in {stages.folder.parent}: --out takes "
                        "that")
    if not cfg.init:  # what does not fit is said before the teacher's command starts
        tokenizer = tokenizer_of(cfg)
        build(cfg, tokenizer)
        load_teacher(cfg, tokenizer, device)
    beside = teacher_command(cfg) if rank() == 0 else None
    with command_beside(beside) if beside else nullcontext():
        if not cfg.init:
            stage = "teacher" if cfg.stage == "teacher" else "distil"
            # reads captions, validates by retrieval
            train(replace(cfg, stage=stage, task=("retrieval",), out=f"{cfg.out}/{stage}",
                          resume=True), stages)
        if cfg.stage in ("all", "finetune"):
            for own in finetunings(cfg).values():
                train(own, stages)
    if cfg.stage in ("all", "evaluate"):
        common.on_first(partial(evaluate, cfg, device))
        stages.write_config()


def open_predictor(path, cfg, device, need=()):
    """The Predictor of a checkpoint."""
    tokenizer = tokenizer_of(cfg)
    blip = open_blip(path, cfg, tokenizer, need).to(device).eval()
    return Predictor(blip, cfg, tokenizer, device)


def evaluate(cfg, device):
    """The test scores of the models on the tasks, their costs, the table and the pictures."""
    folder = Path(cfg.out)
    who = "model" if cfg.init else "student"
    models = {who: open_predictor(cfg.init or f"{folder}/distil/blip.pt", cfg, device)}
    if teacher_command(cfg):
        models["teacher"] = open_predictor(teacher_file(cfg), cfg, device)
    cells = costs(models, device)
    asked = {}
    for task, own in finetunings(cfg).items():
        path = f"{own.out}/blip.pt" if cfg.stage == "all" else own.init
        asked[task] = open_predictor(path, own, device, NEEDED[task])
        if task == "vqa" and asked[task].blip.shared:
            raise UserError(f"{path} was not fine-tuned for vqa")
    for task, model in asked.items():
        sets = task_sets(cfg, task, "test")
        if not sets:
            raise UserError(f"--data {cfg.data} has no test set for --task {task}: name one with "
                            "--eval-data")
        for name, data in sets.items():
            metrics = metrics_of(model, data, cfg.rerank_k, folder / f"answers_{who}.json")
            if len(sets) > 1:
                metrics = common.prefixed(name, metrics)
            cells[who].update(metrics)
    if "teacher" in models:
        scores = common.read_json(folder / "teacher/results.json")["cells"]["model"]
        whole = cells["teacher"] = {**scores, **cells["teacher"]}
        cells["kept, %"] = {name: 100 * value / whole[name]
                            for name, value in cells["student"].items() if whole.get(name)}
    common.write_json(folder / "results.json", {"cells": cells, "seed": cfg.seed})
    common.print_table(cells, folder / "table.md")
    captioners = {}
    if "caption" in asked:
        captioners[who] = asked["caption"]
        if "teacher" in models:
            captioners["teacher"] = open_predictor(folder / "teacher/caption/blip.pt",
                                               asked["caption"].cfg, device)
    if cfg.task != ("vqa",):
        draw_pictures(folder, cfg, models, captioners)
    print(f"pictures, tables and checkpoints: {folder}")


@common.picture
@torch.inference_mode()
def draw_pictures(folder, cfg, models, captioners):
    """captions.png and attention.png, on images of the first test set."""
    sets = task_sets(cfg, "caption", "test")
    images, captions = common.example_images(sets, cfg.image_size, 8, common.resize_whole)
    if captioners:
        above = [f"reference: {text}" for text in captions]
        for who, asked in captioners.items():
            above = [f"{said}\n{who}: {text}" for said, text in zip(above, asked.caption(images))]
        rows = images.split(4)
        common.plot_grid(folder / "captions.png", rows, [""] * len(rows), above,
                         "captions of test images")
    if "retrieval" in cfg.task:
        draw_attention(folder / "attention.png", models, images, captions)


def overlay(images, attention):
    """Images (n, 3, S, S) uint8, dark but where attention (n, g, g) is, on a scale of its own."""
    light = F.interpolate(attention[:, None], images.shape[-2:], mode="bicubic")
    light = light - light.amin((2, 3), keepdim=True)
    light = light / light.amax((2, 3), keepdim=True).clamp(min=1e-12)
    return (images * (0.15 + 0.85 * light)).to(torch.uint8)


def draw_attention(path, models, images, captions):
    """Where the fusion encoders look when they read the last word of a caption.

    Cross-attention of the last layer, the mean over heads; of the word's first token. Of --stage
    all the models are those before fine-tuning, else the one of --init, whatever it is.
    """
    captions = [clean_caption(text) for text in captions]
    before, words = zip(*(text.rpartition(" ")[::2] for text in captions))
    rows = [images]
    for asked in models.values():
        ids = asked.ids(captions)
        places = [1 + len(asked.tokenizer.encode(text)) for text in before]
        states, _ = asked.encode_image(images)
        scores = asked.blip.fuse(ids, states, with_scores=True).cross_scores
        maps = scores.softmax(-1).mean(1)  # (n, N, M)
        maps = maps[range(len(images)), places, 1:].cpu()  # without CLS
        side = math.isqrt(maps.shape[1])
        maps = maps.unflatten(1, (side, side))
        rows.append(overlay(images, maps))
    title = "where a word looks (bright): cross-attention, last layer of the fusion encoder"
    common.plot_grid(path, rows, ["image", *models], words, title)


# ------------------------------------------------------------------------- costs and ablation


def costs(models, device):
    """{who: {"parameters_M", "GMACs", "latency_ms"}} of {who: Predictor}.

    Parameters as the paper counts them: cross-attention included, no decoder, no heads. MACs and
    latency are those of one image at --image-size (the paper's Table 1: 224) and one unimodal text
    of the tokenizer's length (the paper's: 30).
    """
    found, calls = {}, {}
    for who, asked in models.items():
        blip, side = asked.blip, asked.cfg.image_size
        image = torch.randn(1, 3, side, side, device=device)
        ids = torch.full((1, asked.tokenizer.context_length), blip.size.text.sep, device=device)
        calls[who] = partial(encode_pair, blip, image, ids)
        count = count_parameters(blip)
        found[who] = {"parameters_M": (count["visual_encoder"] + count["text_encoder"]) / 1e6,
                      "GMACs": common.multiply_adds(calls[who]) / 1e9}
    times = common.compare_latency(calls, device)
    for who, cell in found.items():
        cell["latency_ms"] = times[who]
    return found


def encode_pair(blip, image, ids):
    return blip.encode_image(image), blip.encode_text(ids)


def ablation_arms(cfg):
    """{name: the flags in which the arm differs from those given}"""
    no_at, no_hr = dict(attn=("none",)), dict(hr=("none",))
    arms = {
        "teacher": dict(init=teacher_file(cfg)),  # as the student, from fine-tuning on
        # without a teacher the contrastive loss collapses at 4e-3; 1e-3 is the best of 1, 2 and
        # 4e-3 by retrieval on validation scenes, one seed
        "vlp": dict(method="blip", lr=(1e-3,)),
        "vlp + at": no_hr,
        "vlp + hr": no_at,
        "at + hr": dict(vlp=False),
        "dlip": {},
        "as long as the teacher": dict(epochs=22.2),  # 200,000 samples
    }
    for names in (*HR_PARTS, "img text"):
        arms[f"hr {names}"] = dict(hr=tuple(names.split()), **no_at)
    for maps in ("self", "cross"):
        arms[f"attn {maps}"] = dict(attn=(maps,), **no_hr)
    for k in range(1, DEMO_BERT[cfg.bert].layers):
        arms[f"fusion layers {k}"] = dict(fusion_layers=k)
    for vit, bert in (("tiny", "tiny"), ("middle", "middle"), ("small", "base"), ("base", "small")):
        arms[f"vit {vit}, bert {bert}"] = dict(vit=vit, bert=bert)
    return arms


def main(argv=None):
    cfg, given = configure(argv)
    if cfg.ablate:  # tests/EVIDENCE.md has the paper's numbers
        cfg.with_teacher = given["with_teacher"] = False
        common.run_arms(cfg, given, ablation_arms(cfg), baselines=("vlp", "dlip"))
    else:
        run_stages(cfg)


if __name__ == "__main__":
    sys.exit(common.run_main(main))
