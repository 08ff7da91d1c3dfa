"""DLIP: Distilling Language-Image Pre-training
Kuang, Wu, Zheng, Li, Xiao, Wang, Zheng, Ji, 2023, https://arxiv.org/abs/2308.12956. No official code was released.

A BLIP (Li et al. 2022, https://arxiv.org/abs/2201.12086, whose code is public, [BLIP] below), the teacher, is distilled
in pre-training into one of 22 % of its parameters, which still retrieves, captions and answers questions. Both are an
image encoder (ViT) and ONE text network that runs in three modes: "text" (unimodal, for ITC), "multimodal" (attends to
the image, for ITM and for questions) and "decoder" (causal, attends to the image, for captions and answers). The modes
share all but self-attention. To BLIP's three losses DLIP adds two, on the same pairs: the student's representations
point where the teacher's do (L_HR), and its last layers attend where the teacher's attend (L_AT).

    python dlip.py                                           # emoji scenes: distil, fine-tune for three tasks, evaluate
    torchrun --nproc_per_node=8 dlip.py --stage distil --data 'coco*5+vg*8+cc3m+sbu' --teacher model_base_14M.pth
    python dlip.py --stage finetune --data vqav2 --init runs/dlip/distil/blip.pt
    python dlip.py --stage evaluate --task retrieval --data coco --init model_base_retrieval_coco.pth
    python dlip.py --profile                                 # parameters, MACs, latency beside the paper's Table 1
    python dlip.py --ablate all                              # beside the paper's ablations, emoji scenes

Measured on the emoji scenes, 54,000 samples of pre-training, 3 seeds, 2 CPU cores, torch 2.13.0 (README has the table
and the commands): TR@1 20.7 ± 1.5, IR@1 14.9 ± 0.9, CIDEr 147 ± 6, against 0.6 ± 0.4, 1.7 ± 0.8, 107 ± 9 for the same
student without distillation, and 23.7 ± 1.2, 16.2 ± 0.9, 160 ± 2 for the teacher, which saw 200,000 samples. Not run at
the paper's scale, nor on a GPU.

Assumptions, where the public text is silent. Each is ours, not the paper's:
  A1  L_HR is the mean of 1 - cosine at the CLS of image and text, at [ENC] and at [DEC], each after the ITC projection
      of its own model; the teacher's is frozen, since a learned one could collapse (--hr, --lambda-hr). [DEC] comes
      first in a causal decoder: VL_D sees the image and no word.
  A2  L_AT compares the last layers: the sum of self-attention of fusion encoder and decoder, and cross-attention of
      the fusion encoder; padded queries are left out (--attn, --attn-form, --lambda-at). L_HR and L_AT see matching
      pairs only.
  A3  Distillation of ITC and LM logits is not in the paper's equations: --kd-itc and --kd-lm, off.
  A4  ITC's keys are the momentum features of all processes' batches and the queue; BLIP has its own process's and the
      queue. The momentum encoders run without dropout. ITM's negatives come from the process's own batch, as in BLIP's
      pre-training, drawn by the similarity to momentum features without BLIP's addition of 1e-4; in fine-tuning for
      retrieval the pairs of one image, in the queue too, are positives of each other.
      BLIP's fine-tuning draws by online features, and on COCO from all processes.
  A5  Weight decay on tensors of two and more dimensions. An epoch shows every image once, with one of its captions
      drawn, or every question, with one of its answers; BLIP counts captions, hence coco*5. The last epoch is
      evaluated (best.pt is the best on validation; BLIP takes that for retrieval and captions).
  A6  In the answer decoder a padded question is masked, as BLIP does in training and ranking. LM loss and ranking of
      answers have label smoothing 0.1, as in BLIP's code. Beam search is transformers 5's: mean log-probability of the
      new tokens (BLIP's version divided by the length with the prompt).
  A7  Encoder and decoder are tied in pre-training only; for VQA they are two networks, as in BLIP's code. Where image
      and text widths differ, the keys and values of the answer decoder's cross-attention start afresh.
  A8  VQA is trained on VQAv2's train split at 384 px, so that val can measure it; BLIP adds val and Visual Genome's
      questions, at 480 px. Validation takes the first 5,000 questions. Position embeddings are resized without
      antialiasing. LayerNorm's ε is 1e-6 in the ViT; text dropout is 0.1 for large data. BLIP's VQA fine-tuning has
      drop path 0.1 in the ViT: left out.
  A9  Sizes, schedules and fine-tuning of the emoji run are ours. Its fine-tuning captions are never wrong, as COCO's
      are cleaner than the web's. The temperature starts at 0.07, and Adam's steps do not shrink with it: at the emoji
      run's learning rate it would collapse within a hundred steps, so it has a share of that rate (--temp-lr).
"""

import copy
import itertools
import math
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
from common import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SHARE,
    Run,
    UserError,
    average_gradients,
    gather,
    option,
    rank,
    world_size,
)

# Letters in shape comments: B images or texts (in the losses: b of this process against the B of
# all), N tokens, M tokens attended to, D width, E width of the joint embedding, Q length of a queue,
# H heads, V vocabulary, R rows of the decoder (B, or several beams or answers to each of B), P
# tokens of the prompt with [DEC], L of the longest text; K beams; A answers to choose from.

# --------------------------------------------------------------------------------------------------------------- config

TASKS = ("retrieval", "caption", "vqa")
HR_PARTS = ("img", "text", "vl_e", "vl_d")
# the parts of a checkpoint that a task cannot do without, the metrics the paper compares, those our tables show
NEEDED = {"retrieval": ("encoder", "itc", "itm"), "caption": ("decoder",), "vqa": ("encoder", "decoder")}
COMPARED = {"i2t_r1": "TR@1", "t2i_r1": "IR@1", "cider": "CIDEr", "vqa_accuracy": "VQA"}
SHOWN = ("i2t_r1", "t2i_r1", "itc_i2t_r1", "itc_t2i_r1", "bleu4", "cider", "vqa_accuracy")


@dataclass
class Config:
    stage: str = option("all", "all (emoji): distil, fine-tune, evaluate in turn, where optimisation flags are those "
                       "of distil; or one of them alone (other data: distil)", section="run",
                        allowed=["all", "teacher", "distil", "finetune", "evaluate"])
    task: tuple[str, ...] = option(TASKS, "what to fine-tune for and to evaluate, of what the data has")
    data: str = option("emoji", "emoji, coco, flickr30k, vg, sbu, cc3m, vqav2, nocaps, or any name with --root FOLDER "
                       "of tar shards; several corpora as coco*2+vg+sbu; picks preset and recipe")
    root: str | None = option(None, "folder of the data (default data/NAME)")
    keep: str | None = option(None, "train on these samples only: a file of keys, one a line")
    teacher: str | None = option(None, "teacher: a BLIP checkpoint, ours or a published one (default for emoji: "
                                 "data/teacher_blip.pt)")
    init: str | None = option(None, "--stage finetune and evaluate: start from this BLIP checkpoint")
    out: str | None = option(None, "run folder (default runs/METHOD-DATA, with --init runs/STAGE-DATA, numbered)")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    eval_data: tuple[str, ...] = option((), "evaluation sets (default: those that belong to --data)")
    eval_root: str | None = option(None, "folder of the evaluation set (default data/NAME); of several: FOLDER/NAME")
    ablate: tuple[str, ...] = option((), "train these arms of the ablation (names in quotes, or all) and tabulate them")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the ablation")
    profile: bool = option(False, "print parameters, MACs and latency of every size, and stop")
    seed: int = option(0, "seed of weights, data order and augmentation", NOT_NEGATIVE)
    device: str = option("auto", "auto, cuda, mps or cpu")
    workers: int = option(-1, "loader processes (-1: none for emoji, else up to 8 per training process)")
    log_every: int = option(20, "steps between rows of log.csv", POSITIVE)
    save_every: int = option(500, "steps between checkpoints (one is also saved after every evaluation)", POSITIVE)

    method: str = option("dlip", "blip: no teacher, no distillation", ["dlip", "blip"], section="method")
    vlp: bool = option(True, "BLIP's own losses, ITC + ITM + LM, in pre-training")
    hr: tuple[str, ...] = option(HR_PARTS, "representations to distil: img text vl_e vl_d, or none")
    attn: tuple[str, ...] = option(("self", "cross"), "attention maps to distil: self cross, or none")
    lambda_hr: float = option(1.0, "weight of L_HR", NOT_NEGATIVE)
    lambda_at: float = option(1.0, "weight of L_AT", NOT_NEGATIVE)
    attn_form: str = option("kl", "kl: KL(teacher map || student map); double-softmax: of softmax(map / 0.05)",
                            ["kl", "double-softmax"])
    kd_itc: float = option(0.0, "weight of the KL between the in-batch similarities of teacher and student",
                           NOT_NEGATIVE)
    kd_lm: float = option(0.0, "weight of the KL between the next-token distributions of teacher and student",
                          NOT_NEGATIVE)
    queue_size: int = option(512, "Q, momentum features kept as further keys of ITC", NOT_NEGATIVE)
    momentum: float = option(0.99, "m of the momentum encoders, per step", SHARE)
    alpha: float = option(0.4, "share of the momentum similarities in the targets of ITC", SHARE)
    alpha_ramp: float = option(2.0, "epochs over which that share rises from 0", NOT_NEGATIVE)

    preset: str = option("demo", "which table of sizes --vit and --bert choose from", ["demo", "paper"],
                         section="model")
    vit: str = option("small", "size of the image encoder", ["tiny", "small", "middle", "base"])
    bert: str = option("small", "size of the text network", ["tiny", "small", "middle", "base"])
    fusion_layers: int = option(0, "cross-attention in the top k layers of the text network only (0: in all)",
                                NOT_NEGATIVE)
    image_size: int = option(40, "image side in pixels", POSITIVE)
    context_length: int = option(24, "tokens of a text, first and [SEP] included", POSITIVE)
    embed_dim: int = option(64, "width E of the joint embedding (the teacher's, if there is one)", POSITIVE)
    dropout: float = option(0.0, "dropout in the text network", BELOW_ONE)
    vision_init: str | None = option(None, "start the image encoder from this ImageNet ViT (timm, DeiT, torchvision)")
    text_init: str | None = option(None, "start the text network from this BERT")
    pixel_stats: str = option("clip", "mean and std that normalise the pixels", ["imagenet", "clip"])

    epochs: float = option(6.0, "passes over the training set", POSITIVE, section="optimisation")
    batch_size: int = option(64, "pairs per step, over all processes", POSITIVE)
    lr: float = option(4e-3, "peak learning rate", POSITIVE)
    small_lr: float = option(5.0, "factor of --lr, given or not, in fine-tuning a small or tiny text network (the "
                             "paper's, for retrieval)", POSITIVE)
    temp_lr: float = option(0.2, "learning rate of ITC's temperature, as a share of the others'", NOT_NEGATIVE)
    lr_start: float = option(1e-6, "learning rate at the first step")
    lr_end: float = option(1e-5, "learning rate that the schedule does not go below")
    warmup_steps: int = option(100, "steps of linear warm-up", NOT_NEGATIVE)
    schedule: str = option("cosine", "step: multiplied by --lr-decay after every epoch", ["cosine", "step"])
    lr_decay: float = option(0.85, "factor of --schedule step", POSITIVE_SHARE)
    weight_decay: float = option(0.05, "AdamW weight decay, not on vectors", NOT_NEGATIVE)
    beta2: float = option(0.999, "AdamW β₂ (β₁ is 0.9)", BELOW_ONE)
    adam_eps: float = option(1e-8, "AdamW ε", POSITIVE)
    crop_scale: float = option(0.8, "smallest area of the random crop, as a share of the image", POSITIVE_SHARE)
    flip: bool = option(False, "mirror half of the training images; not with captions that tell left from right")
    randaugment: int = option(0, "magnitude of RandAugment's two operations, without those that change colours (0: "
                              "none)", NOT_NEGATIVE)
    precision: str = option("auto", "auto: bf16 autocast on CUDA, fp32 elsewhere; fp16 uses a GradScaler",
                            ["auto", "fp32", "bf16", "fp16"])
    compile: bool = option(False, "torch.compile the image encoders")
    grad_checkpoint: bool = option(False, "recompute each image block in the backward pass to save memory")

    rerank_k: int = option(16, "candidates that ITC hands to ITM", POSITIVE, section="evaluation")
    num_beams: int = option(3, "beams of captioning (1: greedy)", POSITIVE)
    min_length: int = option(5, "shortest caption in tokens, [DEC] and prompt included", NOT_NEGATIVE)
    max_length: int = option(20, "longest caption in tokens, [DEC] and prompt included", POSITIVE)
    repetition_penalty: float = option(1.0, "penalty of tokens used before in a caption", POSITIVE)
    prompt: str = option("a picture of ", "what every caption begins with, in fine-tuning and generation")
    answer_k: int = option(16, "answers of the list that are scored in full, chosen by their first token", POSITIVE)
    vqa: str = option("rank", "rank: choose from the list of answers; generate: write the answer", ["rank", "generate"])

    scenes: int = option(9000, "training scenes", POSITIVE, section="emoji scenes (--data emoji)")
    concepts: int = option(50, "how many concepts are drawn", POSITIVE)
    difficulty: str = option("easy", "objects, sizes and backgrounds", ["easy", "medium", "hard"])
    noise: float = option(0.2, "share of training scenes with another scene's caption, in pre-training", SHARE)
    long_tail: float = option(0.0, "exponent z of concept frequencies 1 / rank^z", NOT_NEGATIVE)
    duplicates: float = option(0.0, "share of training scenes that nearly repeat another", SHARE)


# By stage, or by task in fine-tuning. Large data: the paper's recipe, and BLIP's where the paper is silent.
PAPER = dict(preset="paper", image_size=224, context_length=30, embed_dim=256, dropout=0.1, queue_size=57600,
             momentum=0.995, crop_scale=0.2, flip=True, randaugment=5, log_every=50, temp_lr=1.0, lr_end=0.0,
             rerank_k=256, answer_k=128)
PRETRAIN = {**PAPER, "epochs": 20, "batch_size": 1152, "lr": 5e-4, "warmup_steps": 3000, "schedule": "step",
            "weight_decay": 0.02}
FINETUNE = {**PAPER, "image_size": 384, "batch_size": 256, "lr": 1e-5, "warmup_steps": 0, "crop_scale": 0.5}
LARGE = {
    "distil": PRETRAIN,
    "teacher": {**PRETRAIN, "vit": "base", "bert": "base", "weight_decay": 0.05},
    "retrieval": {**FINETUNE, "epochs": 30, "alpha_ramp": 5.0, "context_length": 35},  # 6 over images x 5 captions (A5)
    "caption": {**FINETUNE, "epochs": 25, "small_lr": 1.0, "context_length": 40},  # 5 over images x 5 captions
    "vqa": {**FINETUNE, "epochs": 10, "small_lr": 1.0, "lr": 2e-5, "context_length": 35},
}
SHORT = dict(lr=4e-4, warmup_steps=20, epochs=1.0, noise=0.0, alpha_ramp=0.0)
EMOJI = {
    "distil": {},
    "teacher": dict(vit="base", bert="base", scenes=40000, epochs=5.0, lr=1e-3, temp_lr=0.07, warmup_steps=300,
                    seed=1000),
    "retrieval": SHORT,
    "caption": SHORT,
    "vqa": {**SHORT, "epochs": 0.5, "lr": 1e-3, "small_lr": 1.0},
}


# Where --stage finetune and evaluate go on in a run, flags given must not contradict these. Others are their own.
DISTILLED = {"data", "method", "teacher", "preset", "vit", "bert", "fusion_layers", "embed_dim", "vision_init",
             "text_init", "pixel_stats", "concepts"}


def recipe(data, part):
    """Config fields of a stage, or of a task's fine-tuning."""
    fields = (EMOJI if data == "emoji" else LARGE)[part]
    return {**fields, "rerank_k": 128} if data == "flickr30k" else fields


def configure(argv=None):
    """(Config, the flags given): defaults <- recipe of --data and --stage <- run in use <- flags given."""
    given = common.parse_command_line(Config, __doc__, argv)
    data, emoji = given.get("data", "emoji"), given.get("data", "emoji") == "emoji"
    stage = given.setdefault("stage", "all" if emoji else "distil")
    tasks = given.get("task", TASKS if emoji else ("vqa",) if data == "vqav2" else ("retrieval", "caption"))
    if set(tasks) - set(TASKS) or len(set(tasks)) < len(tasks):
        raise UserError(f"--task {' '.join(tasks)}: choose from {', '.join(TASKS)}")
    values = {**recipe(data, "distil" if stage == "all" else stage if stage in LARGE else tasks[0]), "task": tasks}
    own = stage in ("finetune", "evaluate") and "init" not in given  # works on the products of an earlier stage
    stem = "teacher" if stage == "teacher" else stage if "init" in given else given.get("method", "dlip")
    values["out"] = given.get("out") or ("runs/ablation_dlip" if "ablate" in given else
                                         common.run_folder(f"runs/{stem}-{data}", newest=own or "resume" in given))
    if given.get("resume") or (own and Path(values["out"], "config.json").is_file()):
        of_run = DISTILLED if own else {field.name for field in fields(Config)}
        values = common.saved_values(values, {k: given[k] for k in given if k in of_run - {"stage", "task"}})
    cfg = Config(**{**values, **given})
    check(cfg)
    return cfg, given


def check(cfg):
    """UserError for values that argparse cannot judge."""
    for name, allowed in (("hr", HR_PARTS), ("attn", ("self", "cross"))):
        value = getattr(cfg, name)
        if set(value) - {*allowed, "none"} or len(set(value)) < len(value) or ("none" in value and len(value) > 1):
            raise UserError(f"{common.flag(name)} {' '.join(value)}: choose from {', '.join(allowed)}, or none")
    modes = [name for name in ("ablate", "profile") if getattr(cfg, name)]
    if len(modes) > 1:
        raise UserError("--ablate and --profile: choose one")
    if (cfg.ablate or cfg.stage == "evaluate") and world_size() > 1:
        raise UserError("--ablate and --stage evaluate run in one process")
    if cfg.stage in ("all", "finetune", "evaluate") and cfg.data != "emoji" and not cfg.profile:
        for task in [task for task in cfg.task if (task == "vqa") != (cfg.data in common.QUESTIONS)]:
            raise UserError(f"--task {task}: --data {cfg.data!r} has no {'questions' if task == 'vqa' else 'captions'} "
                            f"(questions: emoji, {', '.join(common.QUESTIONS)})")
    if cfg.keep and "vqa" in cfg.task and cfg.stage == "finetune":
        raise UserError("--keep lists captioned images: it does not go with --task vqa")
    if (cfg.ablate or cfg.stage == "all") and cfg.data != "emoji" and not cfg.profile:
        raise UserError(f"--{'ablate' if cfg.ablate else 'stage all'} is for the emoji scenes: with --data {cfg.data} "
                        "the stages are run one by one, each with its data")
    if cfg.init and cfg.stage not in ("finetune", "evaluate"):
        raise UserError(f"--init goes with --stage finetune or evaluate, not {cfg.stage} (there are --vision-init and "
                        "--text-init)")
    if cfg.batch_size % world_size() or cfg.batch_size < 2 * world_size():
        raise UserError(f"--batch-size {cfg.batch_size} is no multiple of {world_size()} processes, or leaves one of "
                        "them less than two pairs: ITM needs a wrong one")
    if cfg.stage in ("all", "teacher", "distil") and not cfg.vlp:
        if cfg.method == "blip" or cfg.stage == "teacher":
            raise UserError("--no-vlp leaves no loss without a teacher")
        if {*cfg.hr, *cfg.attn} == {"none"} and not (cfg.kd_itc or cfg.kd_lm):
            raise UserError("--no-vlp --hr none --attn none leaves no loss")


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
    pad: int = 0
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
VIT = {"tiny": VisionSize(192, 12, 3), "small": VisionSize(384, 12, 6),
       "middle": VisionSize(576, 12, 9), "base": VisionSize(768, 12, 12)}
BERT = {"tiny": TextSize(192, 4, 4), "small": TextSize(384, 6, 6),
        "middle": TextSize(576, 8, 8), "base": TextSize(768, 12, 12)}


# The same for the emoji scenes: small + small, the student, has 22.6 % of base + base.
DEMO_VIT = {"tiny": VisionSize(32, 4, 2, 8, 40), "small": VisionSize(64, 4, 2, 8, 40),
            "middle": VisionSize(96, 4, 3, 8, 40), "base": VisionSize(128, 4, 4, 8, 40)}
DEMO_BERT = {"tiny": TextSize(32, 2, 2, 4, positions=32),
             "small": TextSize(64, 3, 3, 4, positions=32),
             "middle": TextSize(96, 3, 3, 4, positions=32),
             "base": TextSize(128, 4, 4, 4, positions=32)}
SIZES = {"demo": (DEMO_VIT, DEMO_BERT), "paper": (VIT, BERT)}


# ---------------------------------------------------------------------------------------- model


def attend(q, k, v, mask=None, dropout=0.0, with_scores=False):
    """softmax(scores) v, and if wanted the scores q k^T / sqrt(D/H) themselves.

    q (B, H, N, D/H), k and v (B, H, M, D/H); mask True where attention is allowed, broadcast to
    (B, H, N, M). Scores are float32, the least number where it is not allowed; the fused kernel,
    which keeps them to itself, runs where nobody asks for them.
    """
    if not with_scores:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    scores = scores.float()
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights.to(v.dtype) @ v, scores


def sequence(**layers):
    """nn.Sequential whose layers have names, those of published weights."""
    return nn.Sequential(OrderedDict(layers))


class VisionAttention(nn.Module):
    """Multi-head self-attention, one matrix for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        """(B, N, D) -> (B, N, D)"""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block of the image encoder."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        fc1 = nn.Linear(width, 4 * width)
        self.mlp = sequence(fc1=fc1, act=nn.GELU(), fc2=nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT without a head, named as timm's: all tokens, CLS first, after the final norm."""

    def __init__(self, size):
        super().__init__()
        width, patch = size.width, size.patch
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
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

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

    def __init__(self, inner, width, dropout):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """BERT's attention sublayer; keys and values come from the tokens or from a source."""

    def __init__(self, width, heads, source_width, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.self = nn.ModuleDict(dict(  # BERT's name: attention.self.query
            query=nn.Linear(width, width), key=nn.Linear(source_width, width),
            value=nn.Linear(source_width, width)))
        self.output = AddNorm(width, width, dropout)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, H, N, D/H)

    def keys_values(self, source):
        """(B, M, source width) -> keys and values, each (B, H, M, D/H)."""
        return self.split(self.self.key(source)), self.split(self.self.value(source))

    def forward(self, x, keys_values, mask=None, with_scores=False):
        """(B, N, D) -> (B, N, D), and the scores (B, H, N, M) or None."""
        q = self.split(self.self.query(x))
        dropout = self.dropout if self.training else 0.0
        out, scores = attend(q, *keys_values, mask, dropout, with_scores)
        return self.output(out.transpose(1, 2).flatten(2), x), scores


class TextLayer(nn.Module):
    """Self-attention, cross-attention to a source, feed-forward.

    In pre-training a layer of the decoder shares all but self-attention with its `twin`, the
    encoder's layer. fuses: whether there is cross-attention.
    """

    def __init__(self, size, source_width, fuses, twin=None):
        super().__init__()
        width, heads, dropout = size.width, size.heads, size.dropout
        self.attention = Attention(width, heads, width, dropout)
        if twin is not None:
            self.crossattention = twin.crossattention
            self.intermediate = twin.intermediate
            self.output = twin.output
            return
        self.crossattention = None
        if fuses:
            self.crossattention = Attention(width, heads, source_width, dropout)
        self.intermediate = sequence(dense=nn.Linear(width, 4 * width), act=nn.GELU())
        self.output = AddNorm(4 * width, width, dropout)

    def forward(self, x, mask=None, source=None, source_mask=None, with_scores=False):
        """x (R, N, D) -> x, and the scores (R, H, N, N) of self- and (B, H, R/B * N, M) of
        cross-attention, or None.

        source: the source's keys and values, from crossattention; None: no cross-attention.
        """
        keys_values = self.attention.keys_values(x)
        x, self_scores = self.attention(x, keys_values, mask, with_scores)
        cross_scores = None
        if source is not None:
            # Several beams or answers to one image: their queries stand side by side, so that the
            # image's keys are not copied.
            queries = x.reshape(len(source[0]), -1, x.shape[-1])  # (B, R/B * N, D)
            out, cross_scores = self.crossattention(queries, source, source_mask, with_scores)
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

    def forward(self, ids):
        """ids (R, N) -> (R, N, D)"""
        positions = self.position_ids[:, :ids.shape[1]]
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class Encoded(NamedTuple):
    """What a text network gives: states of all tokens and, where asked for, the attention scores
    of the last layer."""

    states: torch.Tensor  # (R, N, D)
    self_scores: torch.Tensor | None  # (R, H, N, N)
    cross_scores: torch.Tensor | None  # (B, H, R/B * N, M)


class TextModel(nn.Module):
    """BERT with cross-attention to a source of width source_width; `twin`: see TextLayer."""

    def __init__(self, size, source_width, twin=None):
        super().__init__()
        self.embeddings = Embeddings(size) if twin is None else twin.embeddings
        twins = [None] * size.layers if twin is None else twin.encoder.layer
        first = size.layers - size.fusion_layers
        layers = [TextLayer(size, source_width, i >= first, twins[i]) for i in range(size.layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def read(self, source):
        """What the layers attend to in a source (B, M, its width): the keys and values of each, or
        None where a layer has no cross-attention."""
        layers = self.encoder.layer
        return [layer.crossattention and layer.crossattention.keys_values(source)
                for layer in layers]

    def forward(self, ids, mask=None, source=None, source_mask=None, causal=False,
                with_scores=False):
        """ids (R, N) -> Encoded.

        mask (R, N) and source_mask (B, M) are True at tokens, False at padding; None: no padding.
        source: what read() gives of B images; row r of R attends to image r // (R/B).
        """
        N, layers = ids.shape[1], self.encoder.layer
        source = source or [None] * len(layers)
        if mask is not None:
            mask = mask[:, None, None]  # (R, 1, 1, N)
        if causal:
            seen = torch.ones(N, N, dtype=torch.bool, device=ids.device).tril()
            mask = seen if mask is None else seen & mask  # (R, 1, N, N)
        if source_mask is not None:
            source_mask = source_mask[:, None, None]  # (B, 1, 1, M)
        x = self.embeddings(ids)
        for layer, keys_values in zip(layers, source):
            wanted = with_scores and layer is layers[-1]
            x, *scores = layer(x, mask, keys_values, source_mask, wanted)
        return Encoded(x, *scores)


class PredictionHead(nn.Module):
    """BERT's LM head. Its classifier is the word embeddings, but for BLIP's released pre-training
    checkpoints (tied_head=False): until 15 February 2022 its code separated the two by mistake."""

    def __init__(self, size, words):
        super().__init__()
        dense, norm = nn.Linear(size.width, size.width), nn.LayerNorm(size.width, eps=1e-12)
        self.transform = sequence(dense=dense, act=nn.GELU(), LayerNorm=norm)
        self.bias = nn.Parameter(torch.zeros(size.vocab))
        self.decoder = nn.Linear(size.width, size.vocab, device="meta")  # draws nothing
        self.decoder.weight = words if size.tied_head else nn.Parameter(torch.zeros_like(words))
        self.decoder.bias = self.bias

    def forward(self, states):
        return self.decoder(self.transform(states))


def exactly(head, states):
    """head(states) in fp32 also under autocast: what is sorted or compared would lose digits."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(next(head.parameters()).dtype))


def init_text(encoder, decoder, head):
    """N(0, 0.02) for matrices, zero for biases, as in BERT; what the two share is drawn once."""
    order = [encoder.embeddings]
    for layer, twin in zip(encoder.encoder.layer, decoder.encoder.layer):
        order += [layer.attention, twin, layer]
    order += [decoder, head.transform]
    for module in nn.ModuleList(order).modules():  # each once
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def unit(x):
    """float32 rows of length one."""
    return F.normalize(x.float(), dim=-1)


def begin(ids, token):
    """ids (R, N) with another first token: the one of the mode."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], 1)


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
        vision, text, E = size.vision, size.text, size.embed_dim
        self.visual_encoder = VisionTransformer(vision)
        self.text_encoder = TextModel(text, vision.width)
        bert = TextModel(text, vision.width if shared else text.width,
                         self.text_encoder if shared else None)
        head = PredictionHead(text, bert.embeddings.word_embeddings.weight)
        self.text_decoder = nn.ModuleDict({"bert": bert})
        self.text_decoder["cls"] = nn.ModuleDict({"predictions": head})
        init_text(self.text_encoder, bert, head)
        self.vision_proj = nn.Linear(vision.width, E)
        self.text_proj = nn.Linear(text.width, E)
        self.itm_head = nn.Linear(text.width, 2)  # class 1: the text matches the image
        self.temp = nn.Parameter(torch.tensor(0.07))

    def encode_image(self, image):
        """(B, 3, S, S) normalised pixels -> states (B, M, vision width), CLS first."""
        return self.visual_encoder(image)

    def encode_text(self, ids, mask=None):
        """Unimodal: ids (B, N) -> states (B, N, D). The first token becomes [CLS]."""
        return self.text_encoder(begin(ids, self.size.text.cls), mask).states

    def fuse(self, ids, mask, image_states, with_scores=False):
        """Multimodal: ids (B, N), image states -> Encoded. The first token becomes [ENC]."""
        ids = begin(ids, self.size.text.enc)
        source = self.text_encoder.read(image_states)
        return self.text_encoder(ids, mask, source, with_scores=with_scores)

    def decoder_states(self, ids, mask, source, source_mask=None, with_scores=False):
        """Causal: ids (R, N) -> Encoded. The first token becomes [DEC].

        source (B, M, its width): image states (captions), or states of fused questions, with their
        mask (answers).
        """
        ids, decoder = begin(ids, self.size.text.dec), self.text_decoder.bert
        return decoder(ids, mask, decoder.read(source), source_mask, True, with_scores)

    def decode(self, ids, mask, source, source_mask=None):
        """As decoder_states -> logits (R, N, V) of the token that follows each."""
        return self.logits(self.decoder_states(ids, mask, source, source_mask).states)

    def logits(self, states):
        """Decoder states (R, N, D) -> (R, N, V); follows autocast in training only."""
        head = self.text_decoder.cls.predictions
        return head(states) if self.training else exactly(head, states)

    def image_feature(self, states):
        """Image states -> (B, E) of unit length, for ITC."""
        return unit(exactly(self.vision_proj, states[:, 0]))

    def text_feature(self, states):
        """Text states -> (B, E) of unit length, for ITC."""
        return unit(exactly(self.text_proj, states[:, 0]))

    def match(self, states):
        """Fused states -> (B, 2) logits of no match and match."""
        return exactly(self.itm_head, states[:, 0])

    @torch.no_grad()
    def generate(self, source, prompt=(), num_beams=3, min_length=5, max_length=20, released=True):
        """A caption of each source (B, M, its width): token ids from [DEC] to [SEP], B lists.

        prompt: token ids that follow [DEC]. Both lengths count [DEC] and prompt. released: see
        beam_search.
        """
        decoder = self.text_decoder.bert
        read = decoder.read(source)  # once; the few tokens of a text are computed anew

        def next_log_p(texts):
            """R lists of N ids -> log-probabilities (R, V) of the token that follows."""
            ids = torch.tensor(texts, device=source.device)
            states = decoder(ids, None, read, causal=True).states
            return self.logits(states[:, -1]).float().log_softmax(1)

        text = self.size.text
        prompts = [[text.dec, *prompt]] * len(source)
        return beam_search(next_log_p, prompts, text.sep, num_beams, min_length, max_length,
                           released)

    @torch.no_grad()
    def rank_answers(self, question, question_mask, answers, top=128):
        """The best of a list of answers, as in BLIP: question (B, M, D) fused states -> (B,) of A.

        answers (A, L) ids: [CLS] answer [SEP] padding. The `top` answers with the likeliest first
        token are scored whole by the training loss, with its label smoothing [BLIP's code].
        """
        first = answers[:1, :1].expand(len(question), 1)
        logits = self.decode(first, None, question, question_mask)[:, 0]  # (B, V)
        top = min(top, len(answers))
        likeliest = logits[:, answers[:, 1]].topk(top).indices  # (B, top) of A
        losses, pad = [], self.size.text.pad
        for chosen, states, mask in zip(likeliest, question, question_mask):
            ids = answers[chosen]  # (top, L)
            logits = self.decode(ids, ids != pad, states[None], mask[None])
            losses.append(lm_loss(logits, ids, pad, reduction="none"))
        best = torch.stack(losses).argmin(1, keepdim=True)
        return likeliest.gather(1, best)[:, 0]


def untied(blip):
    """A BLIP with shared=False and the same weights: the start of BLIP's VQA fine-tuning.

    Its decoder reads text states instead of image states: where the widths differ, keys and values
    of its cross-attention start afresh (A7).
    """
    size, other = blip.size, BLIP(blip.size, shared=False)
    weights = blip.state_dict()
    if size.vision.width != size.text.width:
        fresh = re.compile(r"text_decoder\..*crossattention\.self\.(key|value)")
        weights = {name: w for name, w in weights.items() if not fresh.match(name)}
    other.load_state_dict(weights, strict=False)
    return other


def count_parameters(blip):
    """{"vision", "text", "decoder", "heads"}: the paper counts the first two; text has its
    cross-attention, decoder only what it does not share."""
    part_of = {"visual_encoder": "vision", "text_encoder": "text", "text_decoder": "decoder"}
    counts = dict(vision=0, text=0, decoder=0, heads=0)
    for name, parameter in blip.named_parameters():  # what is shared once, in text_encoder
        counts[part_of.get(name.split(".")[0], "heads")] += parameter.numel()
    return counts


# ----------------------------------------------------------------------------------- generation


def beam_search(next_log_p, prompts, sep, num_beams, min_length, max_length, released):
    """B prompts of P ids -> B texts: each the one with the best log-probability / length.

    Each step extends the K running beams to their 2K best continuations. Those of the first K that
    end, with [SEP], compete for the K places of finished texts; the K best that do not end run on,
    and compete too when they have max_length tokens. An image is done once the best that is left
    scores no better than the worst of K finished texts. One beam is greedy search.

    released: as in BLIP's release, the length counts [DEC] and prompt and not [SEP], and the best
    that is left is that of all 2K continuations. False: as in transformers 5, the length counts
    the new tokens with [SEP], and the best that is left is a running one.
    """
    B, P, K = len(prompts), len(prompts[0]), num_beams
    running = [[(0.0, prompt)] for prompt in prompts]  # log-probability and ids of each beam
    finished = [[] for _ in range(B)]  # log-probability / length and ids, the best first
    done = [False] * B
    for n in range(P + 1, max_length + 1):  # n tokens after this step
        log_p = next_log_p([ids for beams in running for _, ids in beams])  # (R, V)
        if n <= min_length:
            log_p[:, sep] = -math.inf
        V, length = log_p.shape[1], n - 1 if released else n - P
        before = torch.tensor([[score for score, _ in beams] for beams in running])
        total = before.to(log_p.device)[:, :, None] + log_p.view(B, -1, V)
        scores, places = total.flatten(1).topk(2 * K)  # (B, 2K)
        for image, found in enumerate(zip(scores.tolist(), places.tolist())):
            beams = running[image]
            longer = [(score, [*beams[place // V][1], place % V]) for score, place in zip(*found)]
            running[image] = [beam for beam in longer if beam[1][-1] != sep][:K]
            if not done[image]:
                ended = [(score / length, ids) for score, ids in longer[:K] if ids[-1] == sep]
                finished[image] = sorted(finished[image] + ended, reverse=True)[:K]
                left = longer if released else running[image]
                full = len(finished[image]) == K
                done[image] = full and finished[image][-1][0] >= left[0][0] / length
        if all(done):
            break

    length = max_length if released else max_length - P
    for image in range(B):
        if not done[image]:
            finished[image] += [(score / length, ids) for score, ids in running[image]]
    return [max(texts)[1] for texts in finished]


# --------------------------------------------------------------------------------------- losses


def mean_where(x, where):
    """The mean of x over the True places of `where`, of the same shape, of all processes.

    Each process divides its sum by the mean count, so that averaging their gradients gives that of
    one process.
    """
    where = where.to(x.dtype)
    count = common.sum_over_processes(where.sum().detach().clone()) / world_size()
    return (x * where).sum() / count.clamp_min(1)


def scaled_cosines(queries, keys, temp):
    """Cosines / temp of unit rows, (b, n), in fp32 also under autocast."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ keys.T / temp


def itc_loss(u, v, u_m, v_m, image_keys, text_keys, same, temp, alpha):
    """Image-text contrast with momentum targets [BLIP, after ALBEF], the mean of both directions.

    u, v (b, E): unit features of this process's images and texts, with gradient; u_m, v_m (b, E)
    those of the momentum encoders; keys (B + Q, E): momentum features of all processes' batches,
    then of the queue. same (b, B + Q): which keys are of the same image.
    Target: alpha softmax(u_m keys^T / temp) + (1 - alpha) same, each row of which sums to one.
    """
    hard, loss = same.to(u.dtype), 0.0
    hard = hard / hard.sum(1, keepdim=True)
    for query, query_m, keys in ((u, u_m, text_keys), (v, v_m, image_keys)):
        soft = scaled_cosines(query_m, keys, temp.detach()).softmax(1)
        target = alpha * soft + (1 - alpha) * hard  # (b, B + Q)
        log_p = scaled_cosines(query, keys, temp).log_softmax(1)
        loss = loss - (target * log_p).sum(1).mean() / 2
    return loss


@torch.no_grad()
def draw_negatives(scores, same, floor=0.0):
    """For each row the index of another pair, (b, b) -> (b,); -1 where all are of the same image.

    Drawn with probability softmax(scores) + floor outside of `same`: BLIP's floor is 1e-4 in
    pre-training, which keeps easy negatives coming, and 0 in fine-tuning. The maximum of
    log-probability + Gumbel noise has this distribution, and unlike torch.multinomial it makes
    nobody wait for the device.
    """
    log_floor = torch.full_like(scores, floor).log()
    log_p = torch.logaddexp(scores.log_softmax(1), log_floor)
    gumbel = -torch.empty_like(scores).exponential_().log()
    drawn = (log_p + gumbel).masked_fill(same, -math.inf).argmax(1)
    return drawn.masked_fill(same.all(1), -1)


def lm_loss(logits, ids, pad=0, label_smoothing=0.1, prompt=1, reduction="mean"):
    """Cross-entropy of each token given those before it [BLIP], label smoothing 0.1.

    logits (R, N, V) and the ids (R, N) they were computed from. Not predicted are padding and the
    first `prompt` tokens, [DEC] included. reduction "mean": over the tokens of all processes;
    "none": the sum over each text, (R,).
    """
    target = ids.masked_fill(ids == pad, -100)
    target[:, :prompt] = -100
    target = target[:, 1:]  # (R, N-1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="none",
                           label_smoothing=label_smoothing).view(target.shape)
    return mean_where(loss, target != -100) if reduction == "mean" else loss.sum(1)


def representation_loss(student, teacher):
    """L_HR [paper; form: A1]: mean of 1 - cosine of unit rows (b, E). Trains the student alone."""
    return (1 - (student * teacher.detach()).sum(-1)).mean()


def attention_loss(student, teacher, queries):
    """L_AT [paper]: KL(teacher map || student map), the mean over heads and queries.

    Scores (b, H, N, M), whose softmax is the map; queries (b, N) are True at tokens, False at
    padding. Trains the student alone.
    """
    student, teacher = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    kl = F.kl_div(student, teacher, reduction="none", log_target=True)
    return mean_where(kl.sum(-1).mean(1), queries)  # (b, N) -> scalar


# --------------------------------------------------------------------------------------- method


class Forward:
    """A BLIP's forward pass over b image-text pairs; a part runs when it is first asked for.

    img, text, vl_e and vl_d (b, E) are the paper's four representations, after the ITC projection
    of the model itself (A1): CLS of the image, CLS of the text, [ENC] of the fusion encoder, [DEC]
    of the decoder.
    """

    def __init__(self, blip, image, ids, mask, with_scores=False):
        self.blip, self.image, self.ids, self.mask = blip, image, ids, mask
        self.with_scores = with_scores

    @cached_property
    def image_states(self):
        return self.blip.encode_image(self.image)  # (b, M, D)

    @cached_property
    def img(self):
        return self.blip.image_feature(self.image_states)

    @cached_property
    def text(self):
        return self.blip.text_feature(self.blip.encode_text(self.ids, self.mask))

    @cached_property
    def fused(self):
        return self.blip.fuse(self.ids, self.mask, self.image_states, self.with_scores)

    @cached_property
    def decoded(self):
        source = self.image_states
        return self.blip.decoder_states(self.ids, self.mask, source, None, self.with_scores)

    @cached_property
    def vl_e(self):
        return self.blip.text_feature(self.fused.states)

    @cached_property
    def vl_d(self):
        return self.blip.text_feature(self.decoded.states)


class DLIP(nn.Module):
    """The student, a BLIP, with BLIP's momentum encoders and queues: pre-training and fine-tuning.

    The teacher, another BLIP, is no part of it: it never changes.
    """

    def __init__(self, cfg, student, prompt_length=1):
        super().__init__()
        self.cfg, self.student, self.pad = cfg, student, student.size.text.pad
        self.prompt_length = prompt_length  # P, [DEC] included
        self.momentum = None
        if cfg.task == ("retrieval",) if cfg.stage == "finetune" else cfg.vlp:
            self.momentum = frozen_copy(student)  # of what ITC reads
            del self.momentum.text_decoder, self.momentum.itm_head, self.momentum.temp
            Q, E = cfg.queue_size, student.size.embed_dim  # at first of no image
            self.register_buffer("image_queue", F.normalize(torch.randn(Q, E), dim=1))
            self.register_buffer("text_queue", F.normalize(torch.randn(Q, E), dim=1))
            self.register_buffer("number_queue", torch.full((Q,), -1))

    def train(self, mode=True):
        super().train(mode)
        if self.momentum is not None:
            self.momentum.eval()  # no dropout
        return self

    def forward(self, image, texts, number, alpha, teacher=None):
        """(loss, terms) of a batch.

        image (b, 3, S, S); texts [ids (b, N)], for VQA [questions, answers]; number (b,) of the
        image in the data.
        """
        if self.cfg.stage != "finetune":
            loss, terms = self.pretrain(image, *texts, alpha, teacher)
        elif self.cfg.task == ("retrieval",):
            loss, terms = self.retrieve(image, *texts, number, alpha)
        else:
            write = self.caption if self.cfg.task == ("caption",) else self.answer
            loss = write(image, *texts)
            terms = {"lm": loss}
        terms = {"loss": loss, **terms}
        return loss, {name: term.detach() for name, term in terms.items()}

    def pretrain(self, image, ids, alpha, teacher):
        """L = L_ITC + L_ITM + L_LM + lambda_HR L_HR + lambda_AT L_AT; the paper's lambdas are 1.

        BLIP's three losses, then the teacher's two [paper] on the same pairs. What no term reads
        is not computed.
        """
        cfg, student, mask = self.cfg, self.student, ids != self.pad
        with_scores = teacher is not None and cfg.attn != ("none",)
        ours = Forward(student, image, ids, mask, with_scores)
        vlp, hr, at = {}, {}, {}

        if cfg.vlp:
            self.update_momentum(cfg.momentum)
            slow = Forward(self.momentum, image, ids, mask)
            first = rank() * len(ids)  # a pair's image and text belong together, and no others
            number = torch.arange(first, first + len(ids), device=ids.device)
            image_keys, text_keys, numbers = self.keys(slow, number)
            same = number[:, None] == numbers  # (b, B + Q)
            vlp["itc"] = itc_loss(ours.img, ours.text, slow.img, slow.text, image_keys, text_keys,
                                  same, student.temp, alpha)
            vlp["itm"] = self.matching(ours, *self.negatives(ours, slow, number, floor=1e-4))
            logits = student.logits(ours.decoded.states)
            vlp["lm"] = lm_loss(logits, ids, self.pad)
            self.enqueue(image_keys, text_keys)

        if teacher is not None:
            theirs = Forward(teacher, image, ids, mask, with_scores)
            for part in HR_PARTS:
                if part in cfg.hr:
                    pair = getattr(ours, part), getattr(theirs, part)
                    hr[f"hr_{part}"] = representation_loss(*pair)
            if "self" in cfg.attn:  # of fusion encoder and decoder
                encoder, decoder = (
                    attention_loss(our.self_scores, their.self_scores, mask)
                    for our, their in ((ours.fused, theirs.fused), (ours.decoded, theirs.decoded)))
                at["at_self"] = encoder + decoder
            if "cross" in cfg.attn:
                pair = ours.fused.cross_scores, theirs.fused.cross_scores
                at["at_cross"] = attention_loss(*pair, mask)

        loss = sum(vlp.values())
        loss = loss + cfg.lambda_hr * sum(hr.values()) + cfg.lambda_at * sum(at.values())
        return loss, {**vlp, **hr, **at}

    @torch.no_grad()
    def update_momentum(self, m):
        """Momentum encoders <- m themselves + (1 - m) student."""
        source = dict(self.student.named_parameters())
        names, averages = zip(*self.momentum.named_parameters())
        torch._foreach_lerp_(list(averages), [source[name] for name in names], 1 - m)

    def keys(self, slow, number):
        """What ITC contrasts with: momentum features of images and of texts, (B + Q, E) each, those
        of all processes' batches, then the queue; and the numbers of their images (B + Q,)."""
        pairs = ((slow.img, self.image_queue), (slow.text, self.text_queue),
                 (number, self.number_queue))
        return [torch.cat([gather(new), queue]) for new, queue in pairs]

    @torch.no_grad()
    def enqueue(self, *keys):
        """The newest keys come first, the oldest leave. Pre-training leaves the numbers alone."""
        for queue, new in zip((self.image_queue, self.text_queue, self.number_queue), keys):
            queue.copy_(new[:len(queue)])

    def negatives(self, ours, slow, number, floor):
        """For each image a wrong text, for each text a wrong image, of this process: (b,) each."""
        same, temp = number[:, None] == number, self.student.temp
        wrong_text = draw_negatives(scaled_cosines(ours.img, slow.text, temp), same, floor)
        wrong_image = draw_negatives(scaled_cosines(ours.text, slow.img, temp), same, floor)
        return wrong_text, wrong_image

    def matching(self, ours, wrong_text, wrong_image):
        """L_ITM: cross-entropy on [ENC] over b pairs, b images with a wrong text, b texts with a
        wrong image; those that have no wrong one (-1) do not count."""
        ids, mask, image = ours.ids, ours.mask, ours.image_states
        negative = self.student.fuse(torch.cat([ids[wrong_text], ids]),
                                     torch.cat([mask[wrong_text], mask]),
                                     torch.cat([image, image[wrong_image]]))
        logits = torch.cat([self.student.match(ours.fused.states),
                            self.student.match(negative.states)])  # (3b, 2)
        absent = torch.cat([wrong_text, wrong_image]) < 0
        target = torch.cat([torch.ones_like(wrong_text), torch.where(absent, -100, 0)])
        return F.cross_entropy(logits, target)  # leaves -100 out

    def retrieve(self, image, ids, number, alpha):
        """Fine-tuning for retrieval: L_ITC and L_ITM; an image's other captions are positives."""
        ours = Forward(self.student, image, ids, ids != self.pad)
        self.update_momentum(self.cfg.momentum)
        slow = Forward(self.momentum, image, ids, ours.mask)
        image_keys, text_keys, numbers = self.keys(slow, number)
        same = number[:, None] == numbers
        itc = itc_loss(ours.img, ours.text, slow.img, slow.text, image_keys, text_keys, same,
                       self.student.temp, alpha)
        itm = self.matching(ours, *self.negatives(ours, slow, number, floor=0.0))
        self.enqueue(image_keys, text_keys, numbers)
        return itc + itm, {"itc": itc, "itm": itm}

    def caption(self, image, ids):
        """Fine-tuning for captions: L_LM of what follows the prompt."""
        logits = self.student.decode(ids, ids != self.pad, self.student.encode_image(image))
        return lm_loss(logits, ids, self.pad, prompt=self.prompt_length)

    def answer(self, image, question, answer):
        """Fine-tuning for VQA: L_LM of the answer, summed over its tokens, given the states of the
        fused question."""
        mask = question != self.pad
        states = self.student.fuse(question, mask, self.student.encode_image(image)).states
        logits = self.student.decode(answer, answer != self.pad, states, mask)
        return lm_loss(logits, answer, self.pad, reduction="none").mean()


def frozen_copy(module):
    return copy.deepcopy(module).eval().requires_grad_(False)


# -------------------------------------------------------------------------------------- weights

# Vision names of Hugging Face's BLIP, then of torchvision's ViT, as timm, DeiT and BLIP have them.
VISION_NAMES = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)
WORDS = "embeddings.word_embeddings.weight"


def load_blip(checkpoint, image_size=None, dropout=0.0, need=()):
    """A BLIP with the weights of a common.Checkpoint: ours, BLIP's own or Hugging Face's.

    image_size: position embeddings are resized to it. A captioner has no text encoder, a retriever
    no decoder: what is missing stays random, unless its name begins with one of `need`.
    """
    weights, path = blip_names(checkpoint.weights), checkpoint.path
    size = blip_size(checkpoint, weights)
    vision = replace(size.vision, image_size=image_size or size.vision.image_size)
    size = replace(size, vision=vision, text=replace(size.text, dropout=dropout))
    blip = BLIP(size, is_shared(weights))
    tensors = dict(blip.named_parameters(remove_duplicate=False))  # some have two names
    held = {id(tensor) for name, tensor in tensors.items() if name in weights}
    for name, tensor in tensors.items():
        if id(tensor) not in held and name.startswith(("visual_encoder.", *need)):
            raise UserError(f"{path} lacks {name}")
    load_named(blip, weights, path)
    return blip


def load_named(module, weights, path):
    """Those of the weights that the module has, position embeddings at its size; what else it has
    stays as it is."""
    own = module.state_dict()  # not copies: where two names have one tensor, either will do
    for name in own.keys() & weights.keys():
        own[name] = weights[name]
        if name.endswith("pos_embed"):
            count = module.state_dict()[name].shape[1]
            own[name] = resize_positions(weights[name], count, path)
    common.load_weights(module, own, path)


def blip_names(weights):
    """{BLIP's name: tensor}"""
    renamed = {}
    for name, tensor in weights.items():
        name = name.removeprefix("student.")  # of a run of ours
        if name.startswith("vision_model."):
            name = "visual_encoder." + vision_name(name.removeprefix("vision_model."))
        name = re.sub(r"^text_model\.", "text_encoder.", name)
        renamed[name] = tensor
    return renamed


def vision_name(name):
    for pattern, new in VISION_NAMES:
        name = re.sub(pattern, new, name)
    return name


def is_shared(weights):
    """Whether encoder and decoder have in common what pre-training ties."""
    for name, tensor in weights.items():
        twin = weights.get(name.replace("text_decoder.bert.", "text_encoder."))
        if twin is not None and ".attention." not in name and not torch.equal(tensor, twin):
            return False
    return True


# The image encoders of the BLIPs that were published, by width; their texts are BERT-Base.
PUBLISHED = {768: VIT["base"], 1024: VisionSize(1024, 24, 16)}


def blip_size(checkpoint, weights):
    """BLIPSize: as saved with ours, else that of a published BLIP."""
    saved, projection = checkpoint.size, weights.get("visual_encoder.patch_embed.proj.weight")
    if projection is None or (saved is None and len(projection) not in PUBLISHED):
        raise UserError(f"{checkpoint.path}: these are no weights of a BLIP")
    if saved:
        vision, text = VisionSize(**saved["vision"]), TextSize(**saved["text"])
        return BLIPSize(vision, text, saved["embed_dim"])
    vision = PUBLISHED[len(projection)]
    side = math.isqrt(weights["visual_encoder.pos_embed"].shape[1] - 1)
    words = weights.get(f"text_decoder.bert.{WORDS}")
    classifier = weights.get("text_decoder.cls.predictions.decoder.weight", words)
    tied = classifier is None or torch.equal(classifier, words)
    return BLIPSize(replace(vision, image_size=side * vision.patch),
                    replace(BERT["base"], tied_head=tied))


def resize_positions(positions, count, path):
    """(1, 1 + g*g, D) position embeddings -> (1, count, D), bicubic without antialiasing as in
    BLIP's code."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(count - 1)
    if old ** 2 != positions.shape[1] - 1:
        raise UserError(f"{path}: {positions.shape[1]} position embeddings are no square grid with "
                        "one CLS token (a distilled DeiT has two: take the plain one)")
    if old == new:
        return positions
    grid = positions[:, 1:].float().transpose(1, 2).unflatten(2, (old, old))  # (1, D, g, g)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def load_vision(visual_encoder, checkpoint):
    """Start an image encoder from an ImageNet ViT (timm, DeiT, torchvision) or from a BLIP's."""
    weights = {}
    for name, tensor in checkpoint.weights.items():
        name = re.sub(r"^(visual_encoder|vision_model)\.", "", name)
        weights[vision_name(name)] = tensor
    refuse_missing(visual_encoder.state_dict(), weights, checkpoint.path)
    load_named(visual_encoder, weights, checkpoint.path)


def load_bert(blip, checkpoint):
    """Start the text networks of a BLIP from a BERT: both self-attentions get BERT's.

    Cross-attention and the embeddings of [DEC] and [ENC], which BERT lacks, stay random; BERT's
    token types and pooler are left out.
    """
    own, weights = blip.state_dict(), {}
    for name, tensor in checkpoint.weights.items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        for place in (f"text_encoder.{name}", f"text_decoder.bert.{name}", f"text_decoder.{name}"):
            if place in own and own[place].shape[1:] == tensor.shape[1:]:
                tensor = torch.cat([tensor, own[place][len(tensor):]])
            weights[place] = tensor
    needed = [name for name in own if name.startswith("text_encoder.")
              and "crossattention" not in name and "position_ids" not in name]
    refuse_missing(needed, weights, checkpoint.path)
    load_named(blip, weights, checkpoint.path)


def refuse_missing(names, weights, path):
    for name in names:
        if name not in weights:
            raise UserError(f"{path} lacks {name}")


# ------------------------------------------------------------------------------------------------------------- training


def tokenizer_of(cfg):
    """BERT's tokens; for the emoji scenes only those that occur there."""
    words = common.emoji_words(cfg.concepts) if cfg.data == "emoji" else None
    return common.BertTokenizer(cfg.context_length, words)


def sizes_of(cfg, tokenizer):
    """(VisionSize, TextSize) that --preset, --vit and --bert name."""
    visions, texts = SIZES[cfg.preset]
    text = texts[cfg.bert]
    if cfg.context_length > text.positions:
        raise UserError(f"--context-length {cfg.context_length}: the text networks of --preset {cfg.preset} have "
                        f"{text.positions} positions")
    return (replace(visions[cfg.vit], image_size=cfg.image_size),
            replace(text, vocab=tokenizer.vocab_size, dropout=cfg.dropout, fusion_layers=cfg.fusion_layers or None,
                    **special_tokens(tokenizer)))


def special_tokens(tokenizer):
    return {name: getattr(tokenizer, name) for name in ("pad", "cls", "sep", "dec", "enc")}


def named(path, load, *args, **kwargs):
    """load(*args, **kwargs); its UserError names the file that the weights come from."""
    try:
        return load(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def open_blip(path, cfg, tokenizer, need=()):
    """A BLIP from a checkpoint of ours or a published one, at --image-size. UserError when it does not fit the data."""
    weights, config = common.read_weights(path)
    if any(name.startswith("student.") for name in weights):
        raise UserError(f"{path} is what --resume goes on from: take the blip.pt or best.pt beside it")
    config = config or {}
    if config.get("pixel_stats", cfg.pixel_stats) != cfg.pixel_stats:
        raise UserError(f"{path} was trained with --pixel-stats {config['pixel_stats']}, not {cfg.pixel_stats}")
    heads = {"heads": config["text"]["heads"]} if "text" in config else {}
    model, _ = named(path, load_blip, weights, cfg.image_size, config.get("vision", {}).get("heads"), need,
                     dropout=cfg.dropout, **heads, **special_tokens(tokenizer))
    if model.text.size.vocab != tokenizer.vocab_size:
        raise UserError(f"{path} has a vocabulary of {model.text.size.vocab:,} tokens, the tokenizer of {cfg.data} "
                        f"{tokenizer.vocab_size:,}: it was trained on other data")
    if cfg.context_length > model.text.size.positions:
        raise UserError(f"--context-length {cfg.context_length}: {path} has {model.text.size.positions} positions")
    return model


def build(cfg, tokenizer, teacher=None):
    """DLIP around a new student, or around the one of --init."""
    if cfg.stage == "finetune":
        student = open_blip(cfg.init, cfg, tokenizer, NEEDED[cfg.task[0]])
        if cfg.task == ("vqa",) and student.text_decoder is None:
            student.untie_decoder()
    else:
        embed_dim = teacher.text_proj.out_features if teacher else cfg.embed_dim
        student = BLIP(*sizes_of(cfg, tokenizer), embed_dim)
        if cfg.vision_init:
            named(cfg.vision_init, load_vision, student.visual_encoder, common.read_weights(cfg.vision_init)[0])
        if cfg.text_init:
            named(cfg.text_init, load_bert, student.text, common.read_weights(cfg.text_init)[0])
    return DLIP(cfg, student, 1 + len(tokenizer.encode(cfg.prompt)))


def load_teacher(cfg, tokenizer, device):
    """The frozen teacher of --teacher in evaluation mode; None without distillation."""
    if cfg.stage != "distil" or cfg.method == "blip":
        return None
    need = ("encoder", "decoder", "itc")
    return open_blip(teacher_file(cfg), cfg, tokenizer, need).to(device).eval().requires_grad_(False)


def teacher_file(cfg):
    if cfg.teacher or cfg.data == "emoji":
        return cfg.teacher or common.DATA / "teacher_blip.pt"
    raise UserError("--teacher: name the checkpoint of a BLIP to distil (or --method blip for none)")


def check_teacher(student, teacher, cfg):
    """UserError when maps that are to be compared have different shapes."""
    tokens = [blip.visual_encoder.pos_embed.shape[1] for blip in (student, teacher)]
    for what, ours, theirs, compared in (
            ("text heads", student.text.size.heads, teacher.text.size.heads, "none" not in cfg.attn),
            ("image tokens", *tokens, "cross" in cfg.attn)):
        if ours != theirs and compared:
            raise UserError(f"the student has {ours} {what}, the teacher {theirs}: their attention maps cannot be "
                            "compared (--attn none leaves them out)")


def build_optimiser(model, cfg, device):
    """AdamW, weight decay on matrices only; fused where the device has it."""
    trained = [p for p in model.parameters() if p.requires_grad and p is not model.student.temp]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
              {"params": [model.student.temp], "weight_decay": 0.0, "lr_scale": cfg.temp_lr}]
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), eps=cfg.adam_eps, fused=fused)


def schedules(cfg, step, steps, steps_per_epoch):
    """{"lr", "alpha"} at a step."""
    if step < cfg.warmup_steps:
        lr = cfg.lr_start + (cfg.lr - cfg.lr_start) * step / cfg.warmup_steps
    elif cfg.schedule == "step":
        lr = max(cfg.lr_end, cfg.lr * cfg.lr_decay ** (step // steps_per_epoch))
    else:
        done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
        lr = cfg.lr_end + (cfg.lr - cfg.lr_end) * (1 + math.cos(math.pi * done)) / 2
    ramp = cfg.alpha_ramp * steps_per_epoch
    return {"lr": lr, "alpha": cfg.alpha * min(1.0, step / ramp if ramp else 1.0)}


def backward(model, image, texts, index, now, teacher, amp, scaler, seed):
    """Backpropagate one batch; returns the loss and its terms, on the device."""
    torch.manual_seed(seed)  # dropout and the negatives of ITM: the same after --resume
    with amp:
        loss, terms = model(image, texts, index, now["alpha"], teacher)
    scaler.scale(loss).backward()
    return terms


def normalise(image, statistics):
    """(B, 3, S, S) uint8 -> float on the device of the statistics: mean and std of the channels, (2, 3, 1, 1)."""
    mean, std = statistics
    return image.to(mean.device, non_blocking=True).float().sub_(mean).div_(std)


def update(model, optimiser, scaler, lr):
    """One optimiser step on the processes' mean gradient, then the clamp of the temperature."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    average_gradients(model.parameters())
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.student.temp.clamp_(0.001, 0.5)


class Samples(common.TrainSamples):
    """samples[(epoch, index)] -> image, ids, bad as in common, and the image's index in the training set."""

    def __getitem__(self, place):
        image, ids, bad, index, _ = self.draw(place)
        return image, ids, bad, torch.tensor(index)


class AnsweredQuestions:
    """A VQA set for training: each "caption" of an image is the question with one of its human answers (A5)."""

    def __init__(self, data):
        self.data, self.bad = data, data.bad

    def __len__(self):
        return len(self.data)

    def key(self, i):
        return self.data.key(i)

    def read(self, i):
        image, (question, answers) = self.data.read(i)
        return image, [(question, answer) for answer in answers]


def training_samples(cfg, tokenizer):
    """What --stage and --task train on: captions; captions after the prompt; questions, each with an answer."""
    task = cfg.task[0] if cfg.stage == "finetune" else "retrieval"
    data = AnsweredQuestions(common.vqa_set(cfg, "train")) if task == "vqa" else common.training_set(cfg)

    encode = partial(encode_pairs, tokenizer) if task == "vqa" else \
        partial(encode_captions, tokenizer, cfg.prompt if task == "caption" else "")
    augment = common.BlipAugment(cfg.flip, cfg.randaugment) if cfg.flip or cfg.randaugment else None
    return Samples(data, encode, cfg.image_size, (cfg.crop_scale, 1.0), cfg.seed, augment)


def encode_captions(tokenizer, prompt, texts):
    """n strings -> ids (n, context)."""
    return tokenizer([prompt + common.clean_blip_caption(text) for text in texts])


def encode_pairs(tokenizer, pairs):
    """n pairs of question and answer -> ids (n, 2 context), for split_ids."""
    questions, answers = zip(*pairs)
    return torch.cat([tokenizer([common.clean_blip_question(text) for text in questions]), tokenizer(list(answers))], 1)


def split_ids(ids, cfg):
    """[ids], or [questions, answers] of a VQA batch, without the padding that none of their texts needs."""
    vqa = cfg.stage == "finetune" and cfg.task == ("vqa",)
    parts = (ids[:, :cfg.context_length], ids[:, cfg.context_length:]) if vqa else (ids,)
    return [common.trim_padding(part, 4) for part in parts]


def train(cfg):
    """Train, validate after every epoch, save the student; one run folder for every stage and task."""
    device, tokenizer = common.start_device(cfg.device, cfg.seed), tokenizer_of(cfg)
    run = Run(cfg.out, {"log.csv": LOG_COLUMNS, "timing.csv": common.TIMING_COLUMNS})
    samples, teacher = training_samples(cfg, tokenizer), load_teacher(cfg, tokenizer, device)
    model = build(cfg, tokenizer, teacher).to(device).train()
    if teacher:
        check_teacher(model.student, teacher, cfg)
    optimiser, (amp, scaler) = build_optimiser(model, cfg, device), common.mixed_precision(cfg, device)
    parts = {"model": model, "optimiser": optimiser, "scaler": scaler}
    small = cfg.stage == "finetune" and model.student.text.size.width <= SIZES[cfg.preset][1]["small"].width
    peak = replace(cfg, lr=cfg.lr * cfg.small_lr) if small else cfg
    state = run.load_state(**parts) if cfg.resume else {}
    state = state or {"step": 0, "best": -1.0, "best_step": 0, "bad": 0}
    prepare_encoders(model, teacher, cfg)
    evaluator = Evaluator(model.student, cfg, device, amp, tokenizer)
    evaluator.sets(cfg.task[0], "val")  # what is missing is said before training
    total = max(1, round(cfg.epochs * (len(samples) // cfg.batch_size)))
    sampler = common.StepSampler(len(samples), cfg.batch_size, total, state["step"], cfg.seed, rank(), world_size())
    run.start(cfg, state["step"])
    loader = common.train_loader(samples, sampler, common.loader_workers(cfg), device.type)
    progress = common.Progress(sampler, state["step"], cfg.batch_size, device)
    with common.StopRequest() as stop, progress:
        for image, ids, bad, index in progress.watch(loader):
            now = schedules(peak, state["step"], sampler.steps, sampler.steps_per_epoch)
            image, index = normalise(image, evaluator.statistics), index.to(device, non_blocking=True)
            texts = [part.to(device, non_blocking=True) for part in split_ids(ids, cfg)]
            seed = cfg.seed * 10 ** 9 + state["step"] * world_size() + rank()
            terms = backward(model, image, texts, index, now, teacher, amp, scaler, seed)
            update(model, optimiser, scaler, now["lr"])
            state["step"] += 1
            state["bad"] += bad
            epoch_ends, logs = state["step"] % sampler.steps_per_epoch == 0, state["step"] % cfg.log_every == 0
            epoch_ends |= state["step"] == sampler.steps
            stopping = stop.agreed(synchronise=logs or epoch_ends)
            if logs or epoch_ends:
                row = log_row(model, state, sampler, now, terms)
                run.log("timing.csv", progress.lap(state["step"]))
                if epoch_ends:
                    common.check_bad(common.total(state["bad"], device), len(samples), cfg.data)
                    state["bad"] = 0
                    row.update(validate(run, evaluator, state))
                    model.train()
                run.log("log.csv", row)
                progress.show(row, chance=None, line=epoch_ends)
            if epoch_ends or stopping or state["step"] % cfg.save_every == 0:
                run.save_state(cfg, state, **parts)
            if stopping:
                raise KeyboardInterrupt(f"stopped at step {state['step']}; --resume --out {run.folder} goes on")
    def conclude():
        run.save("blip.pt", exported(model.student, cfg))
        run.write_json("results.json", {"seed": cfg.seed, "steps": state["step"], "best_step": state["best_step"],
                                        "best_validation": state["best"]})
        rows = common.read_csv(run.path("log.csv"))
        common.plot_curves(run.path("curves.png"), rows, None, f"{cfg.stage} on {cfg.data}")

    common.on_first(conclude)


LOG_COLUMNS = ["step", "epoch", "lr", "alpha", "loss", "itc", "itm", "lm", *(f"hr_{part}" for part in HR_PARTS),
               "at_self", "at_cross", "kd_itc", "kd_lm", "logit_scale", "val_retrieval", "val_caption", "val_vqa"]


def log_row(model, state, sampler, now, terms):
    """The row of log.csv: the one place where the host waits for the device. FloatingPointError when diverged."""
    values = common.mean_over_processes(terms)
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"the loss is {values['loss']} at step {state['step']}: lower --lr, raise "
                                 "--warmup-steps or use --precision fp32 (a checkpoint saved before it diverged is "
                                 "kept)")
    return {"step": state["step"], "epoch": state["step"] / sampler.steps_per_epoch, **now, **values,
            "logit_scale": 1 / model.student.temp.item()}


def prepare_encoders(model, teacher, cfg):
    """--grad-checkpoint and --compile, after the weights are loaded."""
    model.student.visual_encoder.grad_checkpoint = cfg.grad_checkpoint
    if cfg.compile:
        for blip in filter(None, (model.student, teacher)):
            blip.visual_encoder.compile()  # in place: the parameter names stay as they are
        if model.momentum is not None:
            model.momentum["visual_encoder"].compile()


def exported(blip, cfg):
    """The BLIP alone, under BLIP's parameter names, with its sizes: what --init and --teacher take."""
    sizes = {"vision": asdict(blip.visual_encoder.size), "text": asdict(blip.text.size)}
    half = cfg.stage == "teacher"  # for data/, where half the size matters more than the fourth digit
    weights = {name: w.half() if half else w for name, w in blip.state_dict().items()}
    return {"model": weights, "config": {**asdict(cfg), **sizes}}


# ------------------------------------------------------------------------------------------------- evaluation, pictures


EVALUATION_SCENES = 300


class Evaluator:
    """A BLIP on the three tasks: images are (B, 3, S, S) uint8, texts strings."""

    def __init__(self, blip, cfg, device, amp, tokenizer):
        self.blip, self.cfg, self.device, self.amp, self.tokenizer = blip, cfg, device, amp, tokenizer
        self.sets = cache(partial(task_sets, cfg))  # (task, "val" or "test") -> {name: set}
        self.candidates = cache(lambda answers: common.trim_padding(tokenizer(list(answers)), 4).to(device))
        self.unscored = None  # answers to a test split's questions, as the server takes them that alone can score them
        self.statistics = 255 * torch.tensor(common.PIXELS[cfg.pixel_stats], device=device).view(2, 3, 1, 1)

    def encode_image(self, image):
        """States (B, M, D) and ITC features (B, E)."""
        with self.amp:
            states = self.blip.encode_image(normalise(image, self.statistics))
            return states, self.blip.image_feature(states)

    def ids(self, texts, clean):
        """Token ids of strings, (T, context) on the device, and where they are tokens."""
        ids = self.tokenizer([clean(text) for text in texts]).to(self.device)
        return ids, ids != self.tokenizer.pad

    def encode_text(self, texts):
        """Token ids (T, L) and ITC features (T, E)."""
        ids, mask = self.ids(texts, common.clean_blip_caption)
        with self.amp:
            return ids, self.blip.text_feature(self.blip.encode_text(ids, mask))

    def match(self, states, ids):
        """ITM logits (n,) of texts (n, L) with the states (1, M, D) of one image."""
        ids = common.trim_padding(ids, 4)
        with self.amp:
            return self.blip.match(self.blip.fuse(ids, ids != self.tokenizer.pad, states))[:, 1].float()

    def caption(self, image):
        """Captions by beam search, without the prompt."""
        cfg, prompt = self.cfg, self.tokenizer.encode(self.cfg.prompt)
        with self.amp:
            states = self.blip.encode_image(normalise(image, self.statistics))
            ids = self.blip.generate(states, prompt, cfg.num_beams, cfg.min_length, cfg.max_length,
                                     cfg.repetition_penalty)
        return [self.tokenizer.decode(row[1 + len(prompt):]) for row in ids.tolist()]

    def answer(self, answers, image, questions):
        """Answers: the likeliest of a list, or with --vqa generate any."""
        ids, mask = self.ids(questions, common.clean_blip_question)
        with self.amp:
            states = self.blip.fuse(ids, mask, self.blip.encode_image(normalise(image, self.statistics)))
            if self.cfg.vqa == "generate":
                found = self.blip.generate(states, (), self.cfg.num_beams, 0, 10, source_mask=mask)
                return [self.tokenizer.decode(row[1:]) for row in found.tolist()]
            best = self.blip.rank_answers(states, mask, self.candidates(tuple(answers)), self.cfg.answer_k)
            return [answers[i] for i in best.tolist()]

    @torch.inference_mode()
    def itc_scores(self, split):
        """{metric: percent} of retrieval by the ITC features alone, on the first set."""
        data, cfg = next(iter(self.sets("retrieval", split).values())), self.cfg
        images, captions = [], []
        for batch, _, targets in common.batches(data, cfg.image_size, common.loader_workers(cfg), "validating"):
            images.append(self.encode_image(batch)[1])
            captions += targets
        texts = [text for group in captions for text in group]
        features = torch.cat([self.encode_text(texts[start:start + 256])[1] for start in range(0, len(texts), 256)])
        image_of_text = torch.tensor([i for i, group in enumerate(captions) for _ in group])
        return common.retrieval(torch.cat(images), features, image_of_text)

    @torch.inference_mode()
    def scores(self, task, split):
        """{metric: percent} of a task; of several sets, prefixed by their names."""
        self.blip.eval()
        cfg, found = self.cfg, {}
        for name, data in self.sets(task, split).items():
            if task == "retrieval":
                scores = common.rerank_retrieval(data, cfg.image_size, self.encode_image, self.encode_text, self.match,
                                                 cfg.rerank_k, common.loader_workers(cfg))
            elif task == "caption":
                captions, references, places = common.caption_images(data, cfg.image_size, self.caption,
                                                                     common.loader_workers(cfg))
                domains = [data.domains[i] for i in places] if getattr(data, "domains", None) else None
                scores = common.caption_scores(references, captions, domains)
            else:
                answer = partial(self.answer, data.answers)
                results, scores = common.answer_questions(data, cfg.image_size, answer, common.loader_workers(cfg))
                if "accuracy" not in scores:
                    self.unscored = [{**given, "question_id": int(given["question_id"])} for given in results]
            prefix = f"{name}_" if len(self.sets(task, split)) > 1 else ""
            found.update({prefix + metric: value for metric, value in scores.items()})
        return found


def task_sets(cfg, task, split):
    """{name: set} that a task is evaluated on, in a split, "val" or "test"; empty where there is none."""
    if cfg.data == "emoji":
        if task == "vqa":
            return {"emoji": common.vqa_set(cfg, split)}
        scenes = common.EmojiScenes(split, EVALUATION_SCENES, cfg.image_size, concepts=cfg.concepts,
                                    difficulty=cfg.difficulty)
        return {"emoji": scenes}
    if task == "vqa":
        data = common.vqa_set(cfg, split)
        if split == "val" and data is not None:  # rank 0 validates alone, after every epoch
            part = common.Subset(data, range(min(len(data), 5000)))
            part.answers = data.answers
            return {cfg.data: part}
        return {cfg.data: data} if data is not None else {}
    return {name: data for name, data in common.evaluation_sets(cfg, split).items() if not hasattr(data, "classes")}


MAIN_METRIC = {"retrieval": ("i2t_r1", "t2i_r1"), "caption": ("cider",), "vqa": ("accuracy",)}


def main_score(task, scores):
    """The number a task is judged by: the mean of both R@1, CIDEr, or accuracy; of several sets, of the first."""
    found = [next(value for name, value in scores.items() if name.endswith(metric)) for metric in MAIN_METRIC[task]]
    return sum(found) / len(found)


def validate(run, evaluator, state):
    """{"val_TASK"}: the main score on the validation set, retrieval by ITC alone; keeps the best student as best.pt."""
    cfg, task = evaluator.cfg, evaluator.cfg.task[0]
    if rank() > 0 or not evaluator.sets(task, "val"):
        return {}
    evaluator.blip.eval()
    value = main_score(task, evaluator.itc_scores("val") if task == "retrieval" else evaluator.scores(task, "val"))
    if value > state["best"]:
        state["best"], state["best_step"] = value, state["step"]
        run.save("best.pt", exported(evaluator.blip, cfg))
    return {f"val_{task}": value}


# --------------------------------------------------------------------------------------------------------------- stages


def open_folder(cfg, given):
    """Make the run folder and note the flags; returns whether it is new. UserError when it holds another run."""
    folder = Path(cfg.out)
    going_on = cfg.resume or (cfg.stage in ("finetune", "evaluate") and "init" not in given)
    if (folder / "config.json").exists() and not going_on:
        raise UserError(f"{folder} holds a run: go on with --resume, or choose another --out")
    if not (folder / "config.json").exists():
        if going_on and not cfg.resume:
            raise UserError(f"no run in {folder}: --stage {cfg.stage} needs what --stage distil made there, or --init "
                            "FILE")
        common.make_folder(folder)
        common.write_json(folder / "config.json", {"config": asdict(cfg), "environment": common.environment()})
        return True
    return False


def leave_folder(cfg):
    """Take back what open_folder made, after an error before anything was trained: a second try is a new run."""
    folder = Path(cfg.out)
    if rank() == 0 and [path.name for path in folder.iterdir()] == ["config.json"]:
        (folder / "config.json").unlink()
        folder.rmdir()


def train_once(cfg):
    """train(cfg), unless its folder holds the result already; goes on where it stopped."""
    own = cfg.init and Path(cfg.init).parent.parent == Path(cfg.out).parent  # of the same run, which may have moved
    if not common.is_done(cfg, free=("init",) if own else ()):
        if rank() == 0:
            print(f"\n{cfg.out}", flush=True)
        train(cfg)


def starts(cfg, with_teacher=True):
    """{who: checkpoint} of the models that are fine-tuned and evaluated; the teacher only on the emoji scenes."""
    if cfg.init:
        return {"model": cfg.init}
    models = {"student": f"{cfg.out}/distil/blip.pt"}
    with_teacher = with_teacher and cfg.method == "dlip" and cfg.data == "emoji"
    return {**models, "teacher": str(teacher_file(cfg))} if with_teacher else models


def finetune_config(cfg, who, task, checkpoint, given):
    """The config of one fine-tuning. Its recipe is the task's: flags change it where --stage finetune is given."""
    chosen = {name: value for name, value in given.items() if name not in ("stage", "task", "out", "resume", "init")}
    values = {**recipe(cfg.data, task), **(chosen if cfg.stage == "finetune" else {})}
    name = task if who != "teacher" else f"teacher-{task}"
    return replace(cfg, **values, stage="finetune", task=(task,), init=checkpoint, out=f"{cfg.out}/{name}",
                   resume=True)


def check_prompt(cfg):
    """UserError when --prompt leaves no room for a caption: before the hours of training that come first."""
    length = 1 + len(tokenizer_of(cfg).encode(cfg.prompt))  # with [DEC]
    for name, room in (("max_length", cfg.max_length), ("context_length", cfg.context_length - 1)):
        if room <= length:
            raise UserError(f"{common.flag(name)} {getattr(cfg, name)}: the prompt {cfg.prompt!r} has {length} tokens "
                            "with [DEC], which leaves none for the caption")


def run_stages(cfg, given=(), with_teacher=True):
    """The stages that --stage names, in their run folder; what is done is not done again. Returns results.json's."""
    if cfg.stage in ("all", "finetune", "evaluate") and "caption" in cfg.task:
        check_prompt(cfg)
    common.start_device(cfg.device, cfg.seed)  # joins the processes: on_first needs them
    made = common.on_first(partial(open_folder, cfg, given))
    try:
        if cfg.stage in ("teacher", "distil") or (cfg.stage == "all" and not cfg.init):
            stage = "teacher" if cfg.stage == "teacher" else "distil"
            train_once(replace(cfg, stage=stage, task=("retrieval",), out=f"{cfg.out}/{stage}", resume=True))
        if cfg.stage in ("all", "finetune"):
            for task in cfg.task:
                for who, checkpoint in starts(cfg, with_teacher).items():
                    train_once(finetune_config(cfg, who, task, checkpoint, dict(given)))
        if cfg.stage in ("all", "evaluate"):
            return common.on_first(partial(evaluate, cfg, with_teacher))
    except UserError:
        if made:
            leave_folder(cfg)
        raise
    except KeyboardInterrupt as stopped:
        if not str(stopped):
            raise
        raise KeyboardInterrupt(f"stopped in --stage {cfg.stage}; the same command with --resume --out {cfg.out} goes "
                                "on") from None


def tuned_model(cfg, who, task, path):
    """(checkpoint, config) for a task: the fine-tuned model, at its own image and text sizes; else that of --init."""
    tuned = Path(finetune_config(cfg, who, task, path, {}).out) / "blip.pt"
    if tuned.exists():
        saved = common.read_config(tuned.with_name("config.json"))
        of_model = ("image_size", "context_length", "prompt", "pixel_stats")
        return tuned, replace(cfg, **{name: saved[name] for name in of_model})
    if not cfg.init:
        raise UserError(f"no {tuned}: --stage finetune --task {task} --out {cfg.out} makes it")
    return path, cfg


def evaluate(cfg, with_teacher=True):
    """The test scores of the models on the tasks, their costs, the table and the pictures; returns results.json's."""
    device, folder = common.start_device(cfg.device, cfg.seed), Path(cfg.out)
    paths = starts(cfg, with_teacher)
    tuned = {(who, task): tuned_model(cfg, who, task, paths[who]) for task in cfg.task for who in paths}

    def evaluator(path, own, need=()):
        tokenizer = tokenizer_of(own)
        blip = open_blip(path, own, tokenizer, need).to(device).eval()
        return Evaluator(blip, own, device, common.mixed_precision(cfg, device)[0], tokenizer)

    models = {who: evaluator(path, cfg).blip for who, path in paths.items()}
    found = costs(models, device, cfg.context_length)
    cells, evaluators = {who: dict(found[who]) for who in models}, {}
    for (who, task), (path, own) in tuned.items():
        evaluators[who, task] = evaluator(path, own, NEEDED[task])
        scores = evaluators[who, task].scores(task, "test")
        if not evaluators[who, task].sets(task, "test"):
            raise UserError(f"--data {cfg.data} has no test set for --task {task}: name one with --eval-data")
        cells[who].update(scores if task != "vqa" else {f"vqa_{name}": value for name, value in scores.items()})
        if evaluators[who, task].unscored:
            common.write_json(folder / f"answers_{who}.json", evaluators[who, task].unscored)
    if "teacher" in cells:
        cells["kept, %"] = {name: 100 * value / cells["teacher"][name]
                            for name, value in cells["student"].items() if cells["teacher"].get(name)}
    results = {"cells": cells, "seed": cfg.seed}
    common.write_json(folder / "results.json", results)
    scored = dict.fromkeys(name for cell in cells.values() for name in cell)
    columns = [*next(iter(found.values())), *(name for name in scored if name.endswith(SHOWN))]
    common.print_table({who: {column: cell.get(column) for column in columns} for who, cell in cells.items()},
                       folder / "table.md")
    draw(cfg, models, evaluators, cells)
    print(f"pictures, tables and checkpoints: {folder}")
    return results




def draw(cfg, models, evaluators, cells):
    """captions.png, attention.png, answers.png and efficiency.png, on the first test set of each task."""
    folder = Path(cfg.out)
    for task in cfg.task:
        found = {who: evaluators[who, task] for who in models}
        own = next(iter(found.values()))
        data = next(iter(own.sets(task, "test").values()), None)
        with torch.inference_mode():
            if task == "caption" and data is not None:
                images, captions = common.example_images({"": data}, own.cfg.image_size, 12, common.resize_whole)
                by_model = {who: evaluator.caption(images) for who, evaluator in found.items()}
                common.plot_captions(folder / "captions.png", images, {"reference": captions, **by_model},
                                     f"captions of test images of {cfg.data}")
            elif task == "retrieval" and data is not None:
                draw_attention(folder / "attention.png", cfg, models, own, data)
            elif data is not None:
                draw_answers(folder / "answers.png", own.cfg, found, data)
    if "teacher" in cells and any(metric in cells["teacher"] for metric in COMPARED):
        points = {who: efficiency_point([cells[who]], {"student": "distilled"}.get(who, who)) for who in models}
        common.plot_efficiency(folder / "efficiency.png", points, f"accuracy against size on {cfg.data}")


def efficiency_point(cells, family):
    """What plot_efficiency takes, from the cells of one model over seeds. family: teacher, distilled, not distilled."""
    scores = {metric: [cell[metric] for cell in cells] for metric in COMPARED if metric in cells[0]}
    return {"parameters": cells[0]["parameters_M"], "latency": cells[0]["latency_ms"], "family": family,
            "scores": {metric: (float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0)
                       for metric, found in scores.items()}}


PASSED_OVER = set("a an the of in on is are there this picture drawing photo image object everyday".split())


def draw_attention(path, cfg, models, evaluator, data, count=6):
    """Where the fusion encoders look when they read the first noun or so of a caption: last layer, mean over heads."""
    images, captions = common.example_images({"": data}, cfg.image_size, count, common.resize_whole)
    captions = [common.clean_blip_caption(text) for text in captions]
    found = [[match for match in re.finditer(r"\w+", text) if match[0] not in PASSED_OVER] for text in captions]
    matches = [words[0] if words else re.search("^", text) for words, text in zip(found, captions)]
    ids, mask = evaluator.ids(captions, str)
    of_word = torch.zeros(ids.shape)  # 1 / tokens at the tokens of the word
    for row, (text, match) in enumerate(zip(captions, matches)):
        start = 1 + len(evaluator.tokenizer.encode(text[:match.start()]))
        pieces = max(1, len(evaluator.tokenizer.encode(match[0])))
        of_word[row, start:start + pieces] = 1 / pieces
    maps = {}
    for who, blip in models.items():
        trace = Trace(-1)
        blip.fuse(ids, mask, blip.encode_image(normalise(images, evaluator.statistics)), trace)
        found = trace.cross_maps[-1].float().mean(1).cpu()[:, :, 1:]  # (B, N, M-1), without CLS
        side = math.isqrt(found.shape[-1])
        maps[who] = torch.einsum("bn,bnm->bm", of_word, found).unflatten(1, (side, side))
    common.plot_attention(path, images, [match[0] for match in matches], maps,
                          "cross-attention of a word to the image, last layer, before fine-tuning")


def draw_answers(path, cfg, evaluators, data, count=6, each=6):
    """The first images of a VQA set, some of their questions, and everyone's answers."""
    images, asked, truth, answers, index = [], [], [], {who: [] for who in evaluators}, 0
    while index < len(data) and len(images) < count:
        image, group = data.read(index)[0], []
        while index < len(data) and data.read(index)[0] == image:
            group.append(data.read(index)[1])
            index += 1
        images.append(torch.from_numpy(common.resize_whole(image, cfg.image_size)))
        asked.append([question for question, _ in group[:each]])
        truth.append([max(set(found), key=found.count) if found else "" for _, found in group[:each]])
        for who, evaluator in evaluators.items():
            batch = images[-1].expand(len(asked[-1]), -1, -1, -1)
            answers[who].append(evaluator.answer(data.answers, batch, asked[-1]))
    common.plot_answers(path, torch.stack(images), asked, {"truth": truth, **answers}, f"answers on {cfg.data}")


# ------------------------------------------------------------------------------------------------- profile and ablation


def forward_macs(function, *inputs):
    """Multiply-adds of a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):  # the plain kernel: its two products are counted on every device
        function(*inputs)
    return counter.get_total_flops() / 2


def costs(models, device, tokens, batch=32):
    """{name: {"parameters_M", "GMACs", "latency_ms", "batch_ms"}}: image and text encoder, a text of `tokens` tokens.

    Parameters as the paper counts them: cross-attention included, no decoder, no heads. MACs and latency are those of
    the image and of the unimodal text, one pair; batch_ms is that of `batch` pairs.
    """
    found, calls = {}, {}
    for name, blip in models.items():
        size, parameters = blip.visual_encoder.size, count_parameters(blip)
        for n in (1, batch):
            image = torch.randn(n, 3, size.image_size, size.image_size, device=device)
            ids = torch.full((n, tokens), blip.text.size.sep, device=device)
            calls[name, n] = lambda blip=blip, image=image, ids=ids: (blip.encode_image(image), blip.encode_text(ids))
        macs = forward_macs(calls[name, batch]) / batch
        found[name] = {"parameters_M": (parameters["vision"] + parameters["text"]) / 1e6, "GMACs": macs / 1e9}
    for n, column in ((1, "latency_ms"), (batch, "batch_ms")):
        times = common.compare_latency({name: calls[name, n] for name in models}, device)
        for name in models:
            found[name][column] = times[name]
    return found


# the paper's Table 1: millions of parameters, GFLOPs (one multiply-add is one), ms on a V100; at 224 px, 30 tokens
TABLE_1 = {"vit": {"base": (85.6, 16.9, 34.9), "middle": (48.3, 9.51, 22.1), "small": (21.6, 4.25, 11.4),
                   "tiny": (5.48, 1.08, 4.70)},
           "bert": {"base": (137.3, 2.25, 6.39), "middle": (59.6, 0.88, 4.03), "small": (26.1, 0.32, 3.49),
                    "tiny": (9.61, 0.10, 2.21)}}
PAPER_WHOLE = {"base": (213.6, 17.8, 41.3), "middle": (107.9, 10.4, 26.2), "small": (47.7, 4.4, 14.9)}


def profile(cfg):
    """--profile: parameters, MACs and latency of every size at 224 px and 30 tokens, beside the paper's Table 1."""
    device, cells, calls, counts = common.start_device(cfg.device, cfg.seed), {}, {}, {}
    for name in ("base", "middle", "small", "tiny"):
        blip = BLIP(VIT[name], BERT[name]).to(device).eval()
        image, ids = torch.randn(1, 3, 224, 224, device=device), torch.full((1, 30), 102, device=device)
        states, counted = blip.encode_image(image), count_parameters(blip)
        for kind, call in (("vit", partial(blip.encode_image, image)), ("bert", partial(blip.encode_text, ids)),
                           ("fusion", partial(blip.fuse, ids, None, states)),
                           ("whole", lambda blip=blip, image=image, ids=ids: (blip.encode_image(image),
                                                                              blip.encode_text(ids)))):
            calls[kind, name] = call
        counts.update({("vit", name): counted["vision"], ("bert", name): counted["text"],
                       ("whole", name): counted["vision"] + counted["text"]})
    with torch.inference_mode():
        times = common.compare_latency(calls, device)
    for kind, label in (("vit", "ViT"), ("bert", "BERT"), ("fusion", "BERT with cross-attention"), ("whole", "both")):
        for name in ("base", "middle", "small", "tiny"):
            paper = {**TABLE_1, "whole": PAPER_WHOLE}.get(kind, {}).get(name, (None,) * 3)
            count = counts.get((kind, name))
            cells[f"{label} {name}"] = {
                "M parameters": count and count / 1e6, "paper M": paper[0],
                "GMACs": forward_macs(calls[kind, name]) / 1e9, "paper G": paper[1],
                "ms": times[kind, name], "paper ms": paper[2]}
    common.print_table(cells)
    base, small = (cells[f"both {name}"] for name in ("base", "small"))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU"
    print(f"\nsmall + small against base + base: {small['M parameters'] / base['M parameters']:.1%} of the parameters, "
          f"{small['GMACs'] / base['GMACs']:.1%} of the MACs, {base['ms'] / small['ms']:.2f} times as fast\n"
          "(paper: 22.4%, 24.8%, 2.7 times; its totals for base, 213.6 M and 17.8 G, are not the sums of its Table 1, "
          f"222.9 M and 19.15 G).\nLatency: one image and one text on {where}; the paper's on a V100. Our MACs have "
          "the two products inside attention.")


# the paper's ablations: TR@1, IR@1, CIDEr, VQA of DLIP_Small
PAPER_ABLATION = {
    "vlp": (85.5, 72.1, 119.6, 71.24), "vlp + at": (88.2, 73.6, 120.8, 72.31), "vlp + hr": (88.8, 75.4, 121.6, 72.62),
    "at + hr": (87.4, 74.8, 120.9, 72.26), "dlip": (89.1, 76.0, 121.9, 72.70),
    "hr img": (86.9, 73.1, 120.2, 72.37), "hr text": (87.3, 72.9, 119.7, 72.22),
    "hr img text": (88.2, 74.6, 120.4, 72.39), "hr vl_e": (88.6, 75.2, 120.6, 72.48),
    "hr vl_d": (87.9, 74.5, 121.3, 72.61),
    "attn self": (87.2, 72.9, 120.4, None), "attn cross": (87.7, 73.2, 120.6, None),
    "teacher": (92.0, 78.5, 121.8, 75.3)}


def ablation_arms(cfg):
    """{name: the fields in which the arm differs from the flags given}"""
    no_at, no_hr, alone = dict(attn=("none",)), dict(hr=("none",)), dict(method="blip")
    layers = DEMO_BERT[cfg.bert].layers
    mixes = ("tiny tiny", "middle middle", "small base", "base small", "tiny base", "base tiny")
    sizes = {f"vit {vit}, bert {bert}": dict(vit=vit, bert=bert) for vit, bert in map(str.split, mixes)}
    return {
        "teacher": dict(init=str(teacher_file(cfg))),
        "vlp": alone,
        "vlp + at": no_hr,
        "vlp + hr": no_at,
        "at + hr": dict(vlp=False),
        "dlip": {},
        **{f"hr {' '.join(parts)}": dict(hr=parts, **no_at)
           for parts in (("img",), ("text",), ("img", "text"), ("vl_e",), ("vl_d",))},
        **{f"attn {part}": dict(attn=(part,), **no_hr) for part in ("self", "cross")},
        "attn double-softmax": dict(attn_form="double-softmax"),
        "kd itc and lm": dict(kd_itc=1.0, kd_lm=1.0),
        **{f"fusion layers {k}": dict(fusion_layers=k) for k in range(1, layers)},
        **sizes, **{f"{name}, vlp": dict(**fields, **alone) for name, fields in sizes.items()},
    }


def ablate(cfg):
    """--ablate: train the arms that are not done yet; then the tables, with the paper's numbers, and the plot."""
    found = common.run_arms(cfg, ablation_arms(cfg), partial(run_stages, with_teacher=False), baselines=("vlp", "dlip"))
    cells = {name: [next(iter(run["cells"].values())) for run in runs] for name, runs in found.items()}
    table = {}
    for name in cells:
        ours = common.mean_std([{m: cell[m] for m in COMPARED if m in cell} for cell in cells[name]])
        paper = dict(zip(COMPARED, PAPER_ABLATION.get(name, ())))
        table[name] = {key: value for m, title in COMPARED.items()
                       for key, value in ((title, ours.get(m)), (f"paper {title}", paper.get(m)))}
    print("\nemoji scenes beside the paper's Flickr30K, COCO captions and VQAv2: compare differences, not values")
    common.print_table(table, Path(cfg.out) / "beside_paper.md")
    points = {}
    for name in [name for name in cells if name in ("teacher", "vlp", "dlip") or name.startswith("vit ")]:
        family = "teacher" if name == "teacher" else "not distilled" if name.endswith("vlp") else "distilled"
        points[name] = efficiency_point(cells[name], family)
    if points:
        common.plot_efficiency(Path(cfg.out) / "efficiency.png", points, "accuracy against size, emoji scenes")


def main():
    cfg, given = configure()
    if cfg.profile:
        profile(cfg)
    elif cfg.ablate:
        ablate(cfg)
    else:
        run_stages(cfg, given)


if __name__ == "__main__":
    common.run_main(main)
