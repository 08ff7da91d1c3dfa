"""ECLIPSE: Expediting Contrastive Language-Image Pretraining via Self-distilled Encoders
Kim, Kim, Jo, Kim (LG AI Research), AAAI 2024, https://arxiv.org/abs/2312.12659. No official code.

The online image encoder is made cheap by dropping tokens (EViT): each pruning block keeps the share
κ of them, a partial view of every image. Its moving average, the momentum image encoder, sees the
full view. Both are aligned with ONE text encoder, so that the same batch has two matrices of
image-text similarities, and the online matrix learns to match the momentum matrix: soft targets
that say which captions fit an image better than its own, possibly wrong, one. At test time the
online encoder runs without any tuning, pruned for speed; or in full capacity, if trained at κ = 1
(as a summary of the paper's Figure 3 has it).

    python eclipse.py                                  # emoji scenes, a few minutes on a laptop
    python eclipse.py --ablate all --jobs 2            # the ladder of ablations on them
    python eclipse.py --data coco --root DIR --preset vit_b32
    torchrun --nproc_per_node=8 eclipse.py --data cc3m           # ViT-B/16, shards in data/cc3m
    python eclipse.py --evaluate ViT-B-32.pt --data coco         # OpenAI, OpenCLIP, Hugging Face

Measured on the emoji scenes, 40 % of the captions wrong, 5 of the demo's 12 epochs, 5 seeds, a CPU
core, torch 2.13.0 (tests/EVIDENCE.md has tables, commands and commits): zero-shot top-1 on unseen
drawings 15.6 ± 0.6 at κ = 0.7, against 14.5 ± 1.0 for the same pruned encoder without distillation
and 15.8 ± 1.4 for CLIP. Not run at the paper's scale.

From the paper (its abstract, sentences quoted elsewhere, two summaries; not the full text): the
three networks and what each sees; the KL from the momentum matrix to the online one; the
stop-gradient on the texts of the online matrix (by default in KD only: A2); momentum 0.994,
κ = 0.7, learning rate 5e-4, 40 epochs on CC3M, built on SLIP's code and EViT's pruning. EViT is
Liang et al. 2022, SLIP Mu et al. 2022, ALBEF Li et al. 2021; [code] of theirs was read.

Assumptions, where the public text is silent. Each is ours, not the paper's:
  A1  The total, NCE of both matrices (A2) + λ KD, is put together from these parts. NCE is CLIP's
      symmetric loss of a matrix. KD is half the KL(teacher || student) of the rows, images over
      texts, plus half that of the columns, with λ = 1 (--kd-weight). λ rises from 0 as ALBEF's does
      (--kd-ramp): over 10-30 % of the emoji run, over the first fortieth of the others.
  A2  Who trains the text encoder (--text-grad), where the default departs from the paper. The paper
      stops the gradient of the texts in the online matrix A, so that NCE(A) trains the images and
      NCE(Ā) the texts: --text-grad momentum. --text-grad online lets NCE(A) train both and leaves
      NCE(Ā) out; --text-grad both adds the two. The default is the best of them on the emoji
      scenes: 15.9 online, 15.6 both, 14.4 momentum (3 seeds, std 0.5 to 2). In KD the texts are
      stopped in every reading, unless the teacher has a text encoder of its own. NCE(A) always
      stays: KD's gradient vanishes where the two matrices agree, as at the start for κ = 1.
  A3  One learnable logit scale, from 1/0.07, clamped to [1, 100] as in SLIP. Every term trains it
      but for the teacher's side of KD.
  A4  The teacher starts equal to the student, its projection included, and moves after every
      optimiser step, with constant momentum (--ema: the paper's 0.994; 0.99 for the few steps of
      the emoji run).
  A5  Both image encoders see the same crop; only their tokens differ.
  A6  Pruning as in EViT's code: the blocks at a quarter, half and three quarters of the depth (3,
      6, 9 of 12, from 0), but never the last one, since only CLS is read behind it; tokens ranked
      by the CLS attention, averaged over heads; dropped ones fused into one (--fuse); κ constant.
  A7  The towers are CLIP's, QuickGELU (GELU in the demo) and the norm before the first image block
      included, so that CLIP weights load.
  A8  Recipe for large data: SLIP's CLIP recipe for CC3M; for COCO and Flickr30k the same with batch
      1024.
"""

import copy
import math
import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

# Before torch: a thread that waits for others soon sleeps; else a run on busy cores is ten times as
# slow.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
from common import UserError, gather, normalise, option, rank

# Letters in shape comments: B images or texts in the batch a function is given (in the losses: b of
# this process against the B of all), N tokens, D width, H heads, E width of the joint embedding,
# S image side in pixels, n tokens kept or images shown; s = exp(logit scale), M any matrix of
# similarities, m the momentum of the moving average. Blocks are counted from 0 everywhere.

# -------------------------------------------------------------------------------------- config


@dataclass
class Config(common.RunConfig):  # data, out, resume, ablate, seed, device, ...
    evaluate: str | None = option(None, "evaluate this checkpoint, ours or a public CLIP, and stop")
    linear_probe: bool = option(False, "with --evaluate: also a linear classifier on the features")

    method: str = option("eclipse", "clip: no teacher, no pruning; clip+evit: no teacher",
                         ["eclipse", "clip", "clip+evit"], section="method")
    keep_rate: float = option(0.7, "κ, share of tokens that a pruning block of the online encoder "
                              "keeps; 1 is the paper's full capacity", (0.05, 1))
    fuse: bool = option(True, "merge dropped tokens into one, weighted by attention")
    teacher_keep_rate: float = option(1.0, "κ of the momentum encoder in training (1: full view)",
                                      (0.05, 1))
    text_teacher: str = option("shared", "shared: one text encoder for both image encoders; "
                               "momentum: the teacher has a moving average of its own, for Ā alone "
                               "(not ALBEF's loss, whose keys are momentum features)",
                               ["shared", "momentum"])
    text_grad: str = option("online", "whose contrastive loss trains the text encoder (A2)",
                            ["momentum", "online", "both"])
    kd_weight: float = option(1.0, "λ, weight of the distillation loss")
    kd_ramp: tuple[float, ...] = option((0.1, 0.3), "λ rises between these fractions of training",
                                         (0, 1))
    ema: float = option(0.99, "momentum of the teacher per step (0: a copy of the student)", (0, 1))

    preset: str = option("demo", "sizes of both towers", list(common.PRESETS), section="model")
    image_size: int | None = option(None, "image side in pixels (default: the preset's)")
    act: str | None = option(None, "activation of the MLPs, where preset or checkpoint is wrong",
                             ["quick_gelu", "gelu"])
    init: str | None = option(None, "start from this CLIP checkpoint; the towers take its sizes")

    epochs: int = option(12, "passes over the training set", section="optimisation")
    batch_size: int = option(64, "pairs per step, over all processes")
    accum: int = option(1, "chunks that a process's batch is split into, for memory: same gradient")
    lr: float = option(1e-3, "peak learning rate")
    precision: str = option("auto", "auto: bf16 autocast on CUDA, fp32 elsewhere; fp16 uses a "
                            "GradScaler", ["auto", "fp32", "bf16", "fp16"])
    compile: bool = option(False, "torch.compile the towers")
    grad_checkpoint: bool = option(False, "recompute blocks in the backward pass, for memory")

    scenes: int = option(9000, "training scenes", section="emoji scenes (--data emoji)")
    concepts: int = option(100, "how many concepts are drawn", (4, 412))
    difficulty: str = option("easy", "objects, sizes, backgrounds", ["easy", "medium", "hard"])
    noise: float = option(0.4, "share of training scenes with another scene's caption", (0, 1))


# SLIP's CLIP recipe (A8) with the paper's learning rate, epochs and momentum (A4) and a short ramp
# (A1); flags override it. A data set of your own takes LARGE, or gets a line in RECIPES.
LARGE = dict(
    preset="vit_b16",
    epochs=40,
    batch_size=4096,
    lr=5e-4,
    ema=0.994,
    kd_ramp=(0.0, 0.025),
)
SMALLER = {**LARGE, "batch_size": 1024}
RECIPES = {  # of any other data: LARGE
    "emoji": {},
    "yfcc15m": {**LARGE, "epochs": 25},  # SLIP's
    "coco": SMALLER,
    "flickr30k": SMALLER,
}


def weight_decay(cfg):
    return 0.2 if cfg.data == "emoji" else 0.5  # 0.5: SLIP's


def crop_scale(cfg):
    """Least and largest area of the random crop, as a share of the image."""
    return (0.8 if cfg.data == "emoji" else 0.5, 1.0)  # 0.5: SLIP's


def configure(argv=None):
    """(Config, the flags given, Checkpoint or None)

    Defaults <- the data's recipe <- with --evaluate, the config of the run <- flags given.
    """
    given = common.parse_command_line(Config, __doc__, argv)
    asked = Config(**given)
    if asked.method == "clip":  # whatever --keep-rate says (also in an ablation's commands)
        given["keep_rate"] = 1.0
    recipe = RECIPES.get(asked.data, LARGE)
    loaded = common.read_checkpoint(asked.evaluate)
    if asked.evaluate:
        recipe = {
            **recipe,
            "method": "clip+evit",  # of a public CLIP
            "keep_rate": 1.0,
            **common.known_fields(Config, loaded.config),
            "root": None,
            "device": "auto",
            "workers": -1,
        }
    name = "kept_tokens" if asked.evaluate else asked.method
    stem = "runs/ablation" if asked.ablate else f"runs/{name}-{asked.data}"
    cfg = common.fill_config(Config, recipe, given, stem)
    if len(cfg.kd_ramp) != 2 or cfg.kd_ramp[0] > cfg.kd_ramp[1]:
        raise UserError("--kd-ramp takes two fractions of training, the smaller one first")
    if cfg.text_teacher == "momentum" and cfg.text_grad != "online":
        raise UserError("--text-teacher momentum needs --text-grad online: the loss of its own "
                        "matrix has no gradient to the text")
    return cfg, given, loaded or common.read_checkpoint(cfg.init)


# --------------------------------------------------------------------------------------- model


class QuickGELU(nn.Module):
    """OpenAI CLIP's approximation of GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention; parameters named and laid out as nn.MultiheadAttention's."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False):
        """(B, N, D) -> (B, N, D), and queries and keys (B, H, N, D/H)"""
        x = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2)), q, k


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, mlp_width, act):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, mlp_width),
            act=QuickGELU() if act == "quick_gelu" else nn.GELU(),
            c_proj=nn.Linear(mlp_width, width),
        ))

    def forward(self, x, causal=False):
        """(B, N, D) -> (B, N, D)"""
        x = x + self.attn(self.ln_1(x), causal)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, initialised as CLIP's."""

    def __init__(self, width, layers, heads, mlp_width, act):
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_width, act) for _ in range(layers))
        self.grad_checkpoint = False
        std = width ** -0.5
        last = std * (2 * layers) ** -0.5  # of the 2 * layers projections that are added to x
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=std)
            nn.init.normal_(block.attn.out_proj.weight, std=last)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=last)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def run(self, block, *inputs):
        """block(*inputs); --grad-checkpoint keeps nothing inside it for the backward pass."""
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(self, x, causal=False):
        """(B, N, D) -> (B, N, D)"""
        for block in self.resblocks:
            x = self.run(block, x, causal)
        return x


class VisionTransformer(nn.Module):
    """CLIP's ViT."""

    def __init__(self, size):
        super().__init__()
        width, patches = size.vision_width, (size.image_size // size.patch_size) ** 2
        std = width ** -0.5
        self.conv1 = nn.Conv2d(3, width, size.patch_size, size.patch_size, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, size.vision_layers, size.vision_heads,
                                       size.vision_mlp, size.act)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(std * torch.randn(width, size.embed_dim))

    def tokens(self, image):
        """(B, 3, S, S) -> (B, N, D): CLS, then the patches, with their positions."""
        x = self.conv1(image).flatten(2).transpose(1, 2)  # (B, N-1, D)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], 1)  # (B, N, D)
        return self.ln_pre(x + self.positional_embedding.to(x.dtype))

    def forward(self, image):
        """(B, 3, S, S) -> (B, E), read at CLS."""
        x = self.transformer(self.tokens(image))
        return self.ln_post(x[:, 0]) @ self.proj


def unit(x):
    """float32 rows of length one."""
    return F.normalize(x.float(), dim=-1)


class CLIP(nn.Module):
    """Image tower, text tower, logit scale; parameters named as OpenAI's: public weights load."""

    def __init__(self, size, visual):
        super().__init__()
        self.visual = visual
        width = size.text_width
        self.token_embedding = nn.Embedding(size.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(size.context_length, width))
        self.transformer = Transformer(width, size.text_layers, size.text_heads, 4 * width,
                                       size.act)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, size.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, image, *view):
        """(B, 3, S, S) normalised pixels -> (B, E) of unit length. view: what else visual takes."""
        return unit(self.visual(image, *view))

    def encode_text(self, text):
        """(B, up to context) token ids -> (B, E) of unit length, read at the end token, the
        largest id."""
        x = self.token_embedding(text) + self.positional_embedding[:text.shape[1]]
        x = self.ln_final(self.transformer(x, causal=True))
        x = x[torch.arange(len(x), device=x.device), text.argmax(1)] @ self.text_projection
        return unit(x)


# ------------------------------------------------------------------------------- token pruning


def reorganise_tokens(x, cls_attention, keep_rate, fuse):
    """EViT token reorganisation: keep the patches CLS attends to, merge the rest into one token.

    x (B, N, D) with CLS first, cls_attention (B, N-1). Returns (B, 1 + n [+ 1], D) and the kept
    positions (B, n), n = ceil(keep_rate * (N - 1)). The fused token, the sum of a_i x_i over the
    dropped ones, comes last; a fused token from an earlier block competes like any patch. Nothing
    dropped: x is returned as it is, with None.
    """
    cls, patches = x[:, :1], x[:, 1:]
    n = math.ceil(keep_rate * patches.shape[1])
    if n == patches.shape[1]:
        return x, None
    kept = cls_attention.topk(n, dim=1).indices  # (B, n)
    parts = [cls, patches.take_along_dim(kept.unsqueeze(-1), 1)]
    if fuse:
        weights = cls_attention.scatter(1, kept, 0.0).unsqueeze(1)  # (B, 1, N-1), zero where kept
        parts.append(weights.to(x.dtype) @ patches)  # not renormalised; gradient flows into a_i
    return torch.cat(parts, 1), kept


def pruning_block(block, x, keep_rate, fuse):
    """A block that drops tokens between attention and MLP; no parameter is added.

    (B, N, D) -> (B, N', D), and the positions kept (B, n), None when no token was dropped.
    """
    attended, q, k = block.attn(block.ln_1(x))
    x = x + attended
    # scaled_dot_product_attention hides its N x N probabilities; the CLS row alone costs O(N).
    row = q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5  # (B, H, 1, N)
    cls_attention = row.float().softmax(-1).mean(1)[:, 0, 1:]
    x, kept = reorganise_tokens(x, cls_attention, keep_rate, fuse)
    return x + block.mlp(block.ln_2(x)), kept


class PruningVisionTransformer(VisionTransformer):
    """CLIP's ViT, some blocks of which can drop tokens as in EViT (A6)."""

    def __init__(self, size, fuse):
        super().__init__(size)
        depth = size.vision_layers
        self.fuse = fuse
        self.prune_blocks = sorted({depth // 4, depth // 2, 3 * depth // 4} - {depth - 1})

    def prune(self, image, keep_rate):
        """(B, 3, S, S) -> (B, E), read at CLS, and per pruning block the positions kept."""
        x, kept_positions = self.tokens(image), []
        for i, block in enumerate(self.transformer.resblocks):
            if i in self.prune_blocks and keep_rate < 1:
                x, kept = self.transformer.run(pruning_block, block, x, keep_rate, self.fuse)
                kept_positions.append(kept)
            else:
                x = self.transformer.run(block, x)
        return self.ln_post(x[:, 0]) @ self.proj, kept_positions

    def forward(self, image, keep_rate=1.0):
        """(B, 3, S, S) -> (B, E); κ = 1 is exactly the plain ViT."""
        return self.prune(image, keep_rate)[0]


# -------------------------------------------------------------------------------------- losses
# Taken outside of autocast, on float32 embeddings: in bf16 or fp16 the logits of a large batch, up
# to 100, would lose the digits that the softmax compares.


def similarities(scale, u, v):
    """(M, M transposed), M_ij = s<u_i, v_j>: this process's rows of each, (b, B).

    u and v (b, E), of unit length. Gathered with gradient: averaging the processes' gradients
    gives the gradient of one process with the whole batch.
    """
    return scale * u @ gather(v).T, scale * v @ gather(u).T


def match(logits):
    """CE(rows, diagonal) of this process's rows (b, B) of a matrix of similarities."""
    b = len(logits)
    target = rank() * b + torch.arange(b, device=logits.device)
    return F.cross_entropy(logits, target)


def info_nce(logits):
    """NCE(M) = 1/2 [CE(rows of M, diagonal) + CE(rows of M^T, diagonal)]; (M, M^T), each (b, B)."""
    return sum(map(match, logits)) / 2


def similarity_kl(teacher, student):
    """KD = 1/2 [KL(softmax(T) || softmax(M)) + the same of the transposes], mean over the rows.

    teacher (T, T^T) and student (M, M^T), each (b, B). No gradient to the teacher.
    """
    loss = 0.0
    for t, m in zip(teacher, student):
        target = t.detach().log_softmax(-1)
        loss += F.kl_div(m.log_softmax(-1), target, reduction="batchmean", log_target=True)
    return loss / 2


# -------------------------------------------------------------------------------------- method


class ECLIPSE(nn.Module):
    """Online image encoder (partial view), momentum image encoder (full view), one text encoder.

    `online` is a whole CLIP: the online image encoder, the shared text encoder, the logit scale.
    `momentum` is the moving average of online.visual. Another image tower: replace
    PruningVisionTransformer here, with forward, prune and prune_blocks as it has them. A training
    step, as in `train`:

        u, v = online(image, κ), text(caption)        partial view, and the text       embed
        ū = momentum(image)                           full view, no gradient           teach
        A = s<u, v>, Ā = s<ū, v>; their loss; backward, optimiser step                 loss
        momentum <- m momentum + (1 - m) online                                 update_momentum
    """

    def __init__(self, cfg, size):
        super().__init__()
        self.cfg, self.size = cfg, size
        self.online = CLIP(size, PruningVisionTransformer(size, cfg.fuse))
        self.momentum = self.momentum_text = None
        if cfg.method == "eclipse":
            teacher = copy.deepcopy(self.online).eval().requires_grad_(False)
            self.momentum = teacher.visual
            if cfg.text_teacher == "momentum":  # the text side alone is left in it
                teacher.visual = nn.Identity()
                self.momentum_text = teacher

    def logit_scales(self):
        return [self.online.logit_scale]

    def embed(self, image, text):
        """u (b, E) and v (b, E), with gradient: the partial view of the images, and the texts."""
        return self.online.encode_image(image, self.cfg.keep_rate), self.online.encode_text(text)

    @torch.no_grad()
    def teach(self, image, text):
        """ū (b, E), the full view of the images, and v̄ (b, E); None without such a teacher. Chunk
        by chunk of --accum, as the student, for memory."""
        u_bar = v_bar = None
        if self.momentum is not None:
            u_bar = unit(torch.cat([self.momentum(chunk, self.cfg.teacher_keep_rate)
                                    for chunk in image.chunk(self.cfg.accum)]))
        if self.momentum_text is not None:
            v_bar = self.momentum_text.encode_text(text)
        return u_bar, v_bar

    def loss(self, u, v, u_bar, v_bar, kd_weight):
        """The loss and its terms, from A = s<u, v> and Ā = s<ū, v>; sg stops the gradient.

        text_grad  loss                                             the text is trained by (A2)
        momentum   NCE(s<u, sg v>) + NCE(Ā) + λ KD(Ā, s<u, sg v>)   NCE(Ā) (the paper's stop)
        online     NCE(A)                   + λ KD(Ā, s<u, sg v>)   NCE(A) (default)
        both       NCE(A)          + NCE(Ā) + λ KD(Ā, s<u, sg v>)   both

        The online images get gradients from every term of it with u, the scale from all; nothing
        trains ū but the moving average, and KD has no gradient to Ā. With a momentum text encoder
        Ā = s<ū, v̄>, and the student's side of KD is A: it trains both towers. Without a teacher
        the loss is NCE(A).

        To add a loss: its function above, its term here, its weight in Config, its name in the
        dict that is returned and in LOG_COLUMNS.
        """
        scale = self.online.logit_scale.exp()
        A = similarities(scale, u, v)
        if u_bar is None:
            nce = info_nce(A)
            return nce, {"nce_online": nce}
        A_stopped = similarities(scale, u, v.detach())
        A_bar = similarities(scale, u_bar, v if v_bar is None else v_bar)
        nce_online = info_nce(A_stopped if self.cfg.text_grad == "momentum" else A)
        nce_momentum = info_nce(A_bar)  # with --text-grad online logged only
        kd = similarity_kl(A_bar, A_stopped if v_bar is None else A)
        loss = nce_online + kd_weight * kd
        if self.cfg.text_grad != "online":
            loss = loss + nce_momentum
        return loss, {"nce_online": nce_online, "nce_momentum": nce_momentum, "kd": kd}

    @torch.no_grad()
    def update_momentum(self, m):
        """Teacher <- m teacher + (1 - m) student, projection included (A4)."""
        for teacher, student in ((self.momentum, self.online.visual),
                                 (self.momentum_text, self.online)):
            if teacher is not None:
                for name, average in teacher.named_parameters():
                    average.lerp_(student.get_parameter(name), 1 - m)


# ------------------------------------------------------------------------------------ training


def build(cfg, loaded=None):
    """ECLIPSE with fresh weights, with those of a run, or with those of a CLIP checkpoint."""
    size, weights = common.clip_size(cfg, loaded)
    model = ECLIPSE(cfg, size)
    if loaded:
        common.load_weights(model.online, weights, loaded.path)
        model.update_momentum(0.0)  # teacher = student, also where --init is a run of ours
    if cfg.evaluate and "momentum.proj" in loaded.weights:  # a run's: the teacher as well
        for tower in ("online.visual", "momentum"):
            common.resize_positions(loaded.weights, tower, size)
        common.load_weights(model, loaded.weights, loaded.path)
    return model


def build_optimiser(model, cfg, device):
    """AdamW, weight decay on matrices only; fused where the device has it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay(cfg)}
    vectors = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=cfg.lr, betas=(0.9, 0.98),
                             fused=device.type in ("cuda", "cpu"))


def learning_rate(peak, step, steps, warmup):
    """Linear from 1e-6 over the warm-up, at most a fifth of the run; then a cosine to 1e-5."""
    warmup = min(warmup, steps / 5)
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    done = (step - warmup) / (steps - warmup)
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * done)) / 2


def schedules(cfg, step, steps, steps_per_epoch):
    """{"lr", "kd_weight"} at a step: one epoch of warm-up, as in SLIP; λ with its ramp (A1)."""
    return {
        "lr": learning_rate(cfg.lr, step, steps, warmup=steps_per_epoch),
        "kd_weight": cfg.kd_weight * float(np.interp(step / steps, cfg.kd_ramp, (0, 1))),
    }


def backward(model, image, text, others, amp, scaler):
    """Backpropagate one batch; returns the loss and its terms, on the device.

    others: what model.loss takes beside u and v. With --accum 2 or more the batch is embedded
    without graph, the loss is taken on all of it, and its gradient with respect to the embeddings
    is carried into the towers chunk by chunk: the full-batch gradient, in a chunk's memory. The
    loss is evaluated once, so scales and whatever else it trains receive their gradient once.
    """
    accum = model.cfg.accum
    chunks = list(zip(image.chunk(accum), text.chunk(accum)))
    with amp, torch.set_grad_enabled(accum == 1):
        embedded = [model.embed(*chunk) for chunk in chunks]
    # requires_grad_ has no effect where they have a graph, accum 1
    u, v = (torch.cat(parts).requires_grad_() for parts in zip(*embedded))
    loss, terms = model.loss(u, v, *others)  # outside of autocast
    scaler.scale(loss).backward()
    if accum > 1:
        for chunk, *gradients in zip(chunks, u.grad.chunk(accum), v.grad.chunk(accum)):
            with amp:
                embedded = model.embed(*chunk)
            torch.autograd.backward(embedded, gradients)
    return {name: term.detach() for name, term in {"loss": loss, **terms}.items()}


def update(model, optimiser, scaler, lr):
    """One optimiser step on the processes' mean gradient, then the clamp of the logit scales."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    common.average_gradients(model.parameters())
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad()
    for scale in model.logit_scales():
        scale.data.clamp_(0, math.log(100))


LOG_COLUMNS = """step epoch lr kd_weight loss nce_online nce_momentum kd logit_scale val_online
    val_momentum""".split()


def train(cfg, loaded=None):
    """Train, validate after every epoch, evaluate at the end."""
    device = common.start_device(cfg.device, cfg.seed)
    model = build(cfg, loaded).to(device)
    optimiser = build_optimiser(model, cfg, device)
    amp, scaler = common.mixed_precision(cfg.precision, device)

    size = model.size
    statistics = size.pixel_statistics(device)
    data = common.training_set(cfg, size.image_size)
    test = common.evaluation_sets(cfg, size.image_size, "test")  # what is missing is said now
    validation = common.evaluation_sets(cfg, size.image_size, "val")
    samples = common.TrainSamples(data, size.tokenizer(), size.image_size, crop_scale(cfg),
                                  cfg.seed)

    run = common.Run(cfg, size, LOG_COLUMNS)
    state = run.load_state(samples, model=model, optimiser=optimiser, scaler=scaler)
    steps_per_epoch = len(samples) // cfg.batch_size
    steps = cfg.epochs * steps_per_epoch
    loader = common.train_loader(samples, cfg, steps, state["step"], device)
    run.start(state["step"])
    prepare_towers(model, cfg)
    trained, cells = encoders_of(model, statistics, amp)

    progress = common.Progress(cfg, state, steps, steps_per_epoch)
    with common.StopRequest() as stop, progress:
        for image, text, bad in loader:
            now = schedules(cfg, state["step"], steps, steps_per_epoch)
            image, text = normalise(image, statistics), text.to(device, non_blocking=True)
            with amp:
                taught = model.teach(image, text)
            others = (*taught, now["kd_weight"])
            terms = backward(model, image, text, others, amp, scaler)
            update(model, optimiser, scaler, now["lr"])
            model.update_momentum(cfg.ema)

            epoch_ends, logs, saves = progress.count(state, bad)
            stopping = stop.agreed(synchronise=logs)
            if logs:
                row = common.log_row(state, steps_per_epoch, now, terms, model.online.logit_scale)
                if epoch_ends:
                    common.check_epoch(state, cfg.data)
                    row.update(common.validate(run, model, trained, validation, state))
                run.log(row)
                progress.show(row)
            if saves or stopping:
                run.save_state(state)
            if stopping:
                raise KeyboardInterrupt(f"stopped at step {state['step']}; --resume --out "
                                        f"{run.folder} goes on")
    if rank() == 0:
        common.write_results(run, cells, test, state, device)
        if cfg.keep_rate < 1:
            draw_kept_tokens(run.folder / "tokens.png", model, statistics, test)


def prepare_towers(model, cfg):
    """--grad-checkpoint and --compile, after the weights are loaded."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.grad_checkpoint = cfg.grad_checkpoint
        if cfg.compile and isinstance(module, (Transformer, VisionTransformer)):
            module.compile()  # in place: the parameter names stay as they are


# ------------------------------------------------------------------------ evaluation, pictures


def encoder_pair(clip, visual, statistics, amp, *view):
    """Two functions: (B, 3, S, S) uint8 -> (B, E) and (T, context) token ids -> (T, E), both of
    unit length. clip has the text tower; visual is the image tower, view what else it takes."""
    def encode_image(image):
        with amp:
            return unit(visual(normalise(image, statistics), *view))

    def encode_text(tokens):
        with amp:
            return clip.encode_text(tokens.to(statistics.device))

    return encode_image, encode_text


def encoders_of(model, statistics, amp):
    """Two tables of pairs of encoders: {"val_online": a pair, ...}, each network at its κ in
    training; {"online κ=0.7": a pair, ...}, each network at each κ, online as trained first."""
    own, teachers = model.cfg.keep_rate, model.cfg.teacher_keep_rate
    networks = {"online": (own, model.online, model.online.visual)}
    if model.momentum is not None:
        networks["momentum"] = teachers, model.momentum_text or model.online, model.momentum
    trained, cells = {}, {}
    for network, (rate_in_training, *towers) in networks.items():
        for rate in (own, teachers, 1.0):
            cells[f"{network} κ={rate:g}"] = encoder_pair(*towers, statistics, amp, rate)
        trained[f"val_{network}"] = cells[f"{network} κ={rate_in_training:g}"]
    return trained, cells


@common.picture
@torch.no_grad()
def draw_kept_tokens(path, model, statistics, sets):
    """Images, and what is left of them after each pruning block: dropped patches are darkened."""
    visual, size = model.online.visual, model.size
    examples = common.example_images(sets, size.image_size, 8)
    if not examples:
        return
    images, captions = examples
    _, kept_positions = visual.prune(normalise(images, statistics), model.cfg.keep_rate)
    grid = size.image_size // size.patch_size
    number = torch.arange(grid ** 2)
    patch = number.expand(len(images), -1)  # (n, N-1): the number of the patch each token is
    rows, names = [images], ["image"]
    for block, kept in zip(visual.prune_blocks, kept_positions):
        if kept is not None:
            # -1: a fused token is no patch (with --no-fuse a place that is never kept)
            patch = F.pad(patch.gather(1, kept.cpu()), (0, 1), value=-1)
        left = (patch[:, :, None] == number).any(1).float().view(-1, 1, grid, grid)
        left = F.interpolate(left, scale_factor=size.patch_size)
        rows.append(images.where(left > 0, images // 5))
        names.append(f"after block {block}")
    common.plot_grid(path, rows, names, captions,
                     "patches kept by the online encoder (blocks counted from 0)")


def evaluate_checkpoint(cfg, loaded):
    """--evaluate: the test scores of a checkpoint, ours or a published one, and --linear-probe;
    with --keep-rate below 1 also those of the pruned encoder, and OUT/tokens.png."""
    device = common.start_device(cfg.device, cfg.seed)
    model = build(cfg, loaded).to(device)
    amp, _ = common.mixed_precision(cfg.precision, device)
    statistics = model.size.pixel_statistics(device)
    _, cells = encoders_of(model, statistics, amp)
    common.print_table(common.test_checkpoint(cfg, model.size, cells))
    if cfg.keep_rate < 1:
        test = common.evaluation_sets(cfg, model.size.image_size, "test")
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        draw_kept_tokens(Path(cfg.out, "tokens.png"), model, statistics, test)
        print(f"picture: {cfg.out}/tokens.png")


# ------------------------------------------------------------------------------------ ablation


def ablation_arms(cfg):
    """{name: the flags in which the arm differs from those given}"""
    arms = {
        "clip": {"method": "clip", "keep_rate": 1.0},
        "eclipse": {},
        "clip + evit": {"method": "clip+evit"},
        "full capacity": {"keep_rate": 1.0},
    }
    values = {
        "keep_rate": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
        "text_grad": ("momentum", "online", "both"),
        "kd_weight": (0, 0.5, 2),
        "ema": (0, 0.95, 0.994, 0.999),
    }
    for field, choices in values.items():
        for value in choices:
            if value != getattr(cfg, field):
                arms[f"{field.replace('_', ' ')} {value}"] = {field: value}
    arms |= {
        "text teacher momentum": {"text_teacher": "momentum", "text_grad": "online"},
        "no kd ramp": {"kd_ramp": (0.0, 0.0)},
        "teacher pruned too": {"teacher_keep_rate": cfg.keep_rate},
        "no fusion": {"fuse": False},
    }
    if cfg.data == "emoji":
        for noise in (0, 0.2, 0.6):
            for method in ("clip", "eclipse"):
                arms[f"noise {noise}, {method}"] = {**arms[method], "noise": noise}
    return arms


@common.picture
def draw_sweet_spot(path, arms, results):
    """Test score (mean and std over the seeds) against throughput, of online encoders as trained:
    ECLIPSE at each κ, plain CLIP, CLIP + EViT."""
    figure, ((axis,),) = common.new_figure(1, 1, (7, 4), "")
    curves = {}
    for arm, runs in results.items():
        if arms[arm].keys() <= {"method", "keep_rate"}:
            cells = [run["cells"] for run in runs]
            name, *_ = cells[0]  # as trained: "online κ=0.7"
            speeds = [cell[name]["images_per_second"] / cell["online κ=1"]["images_per_second"]
                      for cell in cells]
            scores = [next(iter(cell[name].values())) for cell in cells]  # top-1 or i2t R@1
            curve = curves.setdefault(arms[arm].get("method", "eclipse"), [])
            curve.append((np.median(speeds), np.mean(scores), np.std(scores, ddof=1),
                          name.removeprefix("online ")))
    for height, (method, points) in zip((8, -16, -30), curves.items()):
        points.sort()
        *columns, _ = zip(*points)
        line, *_ = axis.errorbar(*columns, label=method, marker="o", capsize=3)
        for i, (x, y, _, name) in enumerate(points):  # neighbours' labels apart
            axis.annotate(name, (x, y), (5, height - i % 2 * 12), textcoords="offset points",
                          color=line.get_color())
    axis.margins(x=0.1)
    axis.set(xlabel="throughput, 1 at κ = 1", ylabel="zero-shot top-1 or R@1, %")
    axis.legend()
    figure.savefig(path)


def main(argv=None):
    cfg, given, loaded = configure(argv)
    if cfg.ablate:
        arms = ablation_arms(cfg)
        results = common.run_arms(cfg, given, arms, baselines=("clip", "eclipse"))
        draw_sweet_spot(f"{cfg.out}/sweet_spot.png", arms, results)
    elif cfg.evaluate:
        evaluate_checkpoint(cfg, loaded)
    else:
        train(cfg, loaded)


if __name__ == "__main__":
    sys.exit(common.run_main(main))
