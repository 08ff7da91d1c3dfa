"""ECLIPSE: Expediting Contrastive Language-Image Pretraining via Self-distilled Encoders
Kim, Kim, Jo, Kim (LG AI Research), AAAI 2024, https://arxiv.org/abs/2312.12659. No official code was released.

An online image encoder is made cheap by dropping tokens (EViT): it sees a partial view of every image. Its moving
average, the momentum image encoder, sees the full view. Both are aligned with ONE text encoder, so that two matrices
of image-text similarities exist for the same batch, and the online matrix learns to match the momentum matrix: soft
targets that say which captions fit an image better than its own, possibly wrong, one. At test time either encoder
runs at any keep rate without tuning: pruned for speed, full for accuracy.

    python eclipse.py                                         # emoji scenes, a few minutes on a laptop
    python eclipse.py --ablate all                            # the ladder of ablations on the emoji scenes
    python eclipse.py --data coco --root DIR --preset vit_b32
    torchrun --nproc_per_node=8 eclipse.py --data cc3m        # ViT-B/16, shards in data/cc3m
    python eclipse.py --evaluate ViT-B-32.pt --data coco      # any OpenAI, OpenCLIP or Hugging Face CLIP ViT

Measured on the emoji scenes, 40 % of the captions wrong, 3 seeds, 2 CPU cores, torch 2.13.0 (README has the table and
the commands): zero-shot top-1 on unseen drawings 15.8 ± 0.9 at κ = 0.7, against 14.4 ± 0.7 for the same pruned encoder
without distillation and 16.2 ± 1.8 for CLIP. Not run at the paper's scale.

Assumptions, where the public text is silent. Each is ours, not the paper's:
  A1  NCE is symmetric; KD is the mean over rows and columns of KL(teacher || student), weighted by λ = 1 (--kd-weight)
      that rises from 0 (--kd-ramp, an idea of ALBEF: over 10-30 % of the emoji run, over the first of 40 epochs else).
  A2  The paper aligns the online images with texts whose gradient is stopped. NCE(A) then has to train the images alone
      and NCE(Ā) the text: --text-grad momentum. "online" lets NCE(A) train both and leaves NCE(Ā) out, "both" adds the
      two. Default: online, set before the readings were measured; three seeds do not separate them (README). KD trains
      no text, and cannot replace NCE(A): its gradient vanishes where student = teacher.
  A3  One learnable logit scale, from 1/0.07, clamped to at most 100 as in SLIP; the soft targets do not train it.
  A4  The teacher starts equal to the student, its projection included, and moves after every optimiser step with
      constant momentum (--ema: 0.995 as in ALBEF, 0.99 for the few steps of the emoji run; --ema-schedule).
  A5  Both image encoders see the same crop; only their tokens differ.
  A6  Pruning as in EViT's code: the blocks at a quarter, half and three quarters of the depth (--prune-blocks 3 6 9 of
      12, from 0), ranked by the CLS attention averaged over heads (--prune-by), dropped tokens fused (--fuse), κ
      constant (--keep-rate-warmup) and 0.7, where the saving pays for the teacher (--keep-rate).
  A7  The towers are CLIP's, QuickGELU and the norm before the first image block included, so that CLIP weights load.
  A8  Recipe for large data: SLIP's CLIP recipe for CC3M; for COCO and Flickr30k the same with batch 1024.
"""

import copy
import math
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

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

# Letters in shape comments: B images or texts in the batch a function is given (in the losses: b of this process
# against the B of all), N tokens, D width, H heads, K kept tokens, E width of the joint embedding.

# --------------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    data: str = option("emoji", "training data: emoji, cc3m, coco, flickr30k, or any name with --root FOLDER of tar "
                       "shards; picks preset and recipe", section="run")
    root: str | None = option(None, "folder of the data (default data/NAME)")
    keep: str | None = option(None, "train on these samples only: a file of keys, one a line (clip_cid.py writes one)")
    out: str | None = option(None, "run folder (default runs/METHOD-DATA, numbered when taken)")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    evaluate: str | None = option(None, "evaluate this checkpoint (ours, OpenAI, OpenCLIP, Hugging Face) and stop")
    eval_data: tuple[str, ...] = option((), "evaluation sets (default: those that belong to --data)")
    eval_root: str | None = option(None, "folder of the evaluation set (default data/NAME); of several: FOLDER/NAME")
    linear_probe: bool = option(False, "with --evaluate: also fit a linear classifier on the frozen image features")
    ablate: tuple[str, ...] = option((), "train these arms of the ablation (names in quotes, or all) and tabulate them")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the ablation")
    profile: bool = option(False, "print parameters, MACs, tokens and images/s for each keep rate, and stop")
    seed: int = option(0, "seed of weights, data order and augmentation", NOT_NEGATIVE)
    device: str = option("auto", "auto, cuda, mps or cpu")
    workers: int = option(-1, "loader processes (-1: none for emoji, else up to 8 per training process)")
    log_every: int = option(20, "steps between rows of log.csv", POSITIVE)
    save_every: int = option(500, "steps between checkpoints (one is also saved after every evaluation)", POSITIVE)

    method: str = option("eclipse", "clip: no teacher, no distillation", ["eclipse", "clip"], section="method")
    keep_rate: float = option(0.7, "κ, share of tokens the online encoder keeps in each pruning block", POSITIVE_SHARE)
    keep_rate_warmup: float = option(0.0, "share of training over which κ falls from 1 along a cosine", SHARE)
    prune_blocks: tuple[int, ...] = option((), "0-based blocks that prune (default: at a quarter, half and three "
                                           "quarters of the depth, 3 6 9 of 12)")
    prune_by: str = option("attention", "what ranks the tokens", ["attention", "random"])
    fuse: bool = option(True, "merge dropped tokens into one, weighted by attention")
    teacher_keep_rate: float = option(1.0, "κ of the momentum encoder while training (1: full view)", POSITIVE_SHARE)
    text_teacher: str = option("shared", "shared: one text encoder for both image encoders; momentum: a second, "
                               "moving-average text encoder as in ALBEF", ["shared", "momentum"])
    text_grad: str = option("online", "whose contrastive loss trains the text encoder", ["momentum", "online", "both"])
    kd_weight: float = option(1.0, "λ, weight of the distillation loss", NOT_NEGATIVE)
    kd_ramp: tuple[float, float] = option((0.1, 0.3), "λ is 0 before the first and whole after the second fraction of "
                                          "training, linear between")
    ema: float = option(0.99, "momentum of the teacher per step (0: a copy of the student)", SHARE)
    ema_schedule: str = option("const", "cosine: momentum rises to 1 at the end", ["const", "cosine"])

    preset: str = option("demo", "sizes of both towers", ["demo", "vit_b32", "vit_b16"], section="model")
    image_size: int = option(40, "image side in pixels", POSITIVE)
    patch_size: int = option(8, "patch side in pixels", POSITIVE)
    vision_width: int = option(96, "width of the image tower", POSITIVE)
    vision_layers: int = option(4, "blocks of the image tower", POSITIVE)
    vision_heads: int = option(4, "attention heads of the image tower", POSITIVE)
    vision_mlp: int = option(384, "hidden width of the image tower's MLPs", POSITIVE)
    text_width: int = option(64, "width of the text tower", POSITIVE)
    text_layers: int = option(2, "blocks of the text tower", POSITIVE)
    text_heads: int = option(4, "attention heads of the text tower", POSITIVE)
    context_length: int = option(24, "tokens of a text, start and end included")
    vocab_size: int = option(4096, "vocabulary; less than 49408 uses only the first BPE merges")
    embed_dim: int = option(64, "width E of the joint embedding", POSITIVE)
    act: str = option("gelu", "activation of the MLPs", ["quick_gelu", "gelu"])
    pixel_stats: str = option("imagenet", "mean and std that normalise the pixels", ["imagenet", "clip"])
    init: str | None = option(None, "start from this CLIP checkpoint; the towers take its sizes")

    epochs: int = option(12, "passes over the training set", POSITIVE, section="optimisation")
    batch_size: int = option(64, "pairs per step, over all processes", POSITIVE)
    accum: int = option(1, "split each process's batch into this many chunks; the gradient stays the same", POSITIVE)
    lr: float = option(1e-3, "peak learning rate", POSITIVE)
    lr_start: float = option(1e-6, "learning rate at the first step")
    lr_end: float = option(1e-5, "learning rate at the last step")
    warmup: float = option(1.0, "epochs of linear warm-up; cosine after it", NOT_NEGATIVE)
    weight_decay: float = option(0.2, "AdamW weight decay, on matrices only", NOT_NEGATIVE)
    beta2: float = option(0.98, "AdamW β₂ (β₁ is 0.9)", BELOW_ONE)
    adam_eps: float = option(1e-8, "AdamW ε", POSITIVE)
    crop_scale: float = option(0.8, "smallest area of the random crop, as a share of the image", POSITIVE_SHARE)
    precision: str = option("auto", "auto: bf16 autocast on CUDA, fp32 elsewhere; fp16 uses a GradScaler",
                            ["auto", "fp32", "bf16", "fp16"])
    compile: bool = option(False, "torch.compile the towers")
    grad_checkpoint: bool = option(False, "recompute each block in the backward pass to save memory")

    scenes: int = option(9000, "training scenes", POSITIVE, section="emoji scenes (--data emoji)")
    concepts: int = option(100, "how many concepts are drawn", POSITIVE)
    difficulty: str = option("easy", "objects, sizes and backgrounds", ["easy", "medium", "hard"])
    noise: float = option(0.4, "share of training scenes with another scene's caption", SHARE)
    long_tail: float = option(0.0, "exponent z of concept frequencies 1 / rank^z", NOT_NEGATIVE)
    duplicates: float = option(0.0, "share of training scenes that nearly repeat another", SHARE)


VIT_B = dict(image_size=224, vision_width=768, vision_layers=12, vision_heads=12, vision_mlp=3072, text_width=512,
             text_layers=12, text_heads=8, context_length=77, vocab_size=49408, embed_dim=512, act="quick_gelu")
PRESETS = {"demo": {}, "vit_b32": {**VIT_B, "patch_size": 32}, "vit_b16": {**VIT_B, "patch_size": 16}}
# SLIP's CLIP recipe (A8) with ALBEF's momentum (A4) and ramp (A1); every field can be overridden.
LARGE = dict(preset="vit_b16", epochs=40, batch_size=4096, lr=5e-4, weight_decay=0.5, crop_scale=0.5, ema=0.995,
             kd_ramp=(0.0, 0.025), log_every=50)
SMALLER = {**LARGE, "batch_size": 1024}
RECIPES = {"emoji": {}, "cc3m": LARGE, "yfcc15m": {**LARGE, "epochs": 25}, "coco": SMALLER, "flickr30k": SMALLER}


def configure(argv=None):
    """(Config, weights or None): defaults <- recipe of --data <- preset <- run or checkpoint in use <- flags given."""
    given = common.parse_command_line(Config, __doc__, argv)
    recipe = RECIPES.get(given.get("data", "emoji"), LARGE)
    values = {**recipe, **PRESETS[given.get("preset", recipe.get("preset", "demo"))]}
    stem = f"runs/{given.get('method', 'eclipse')}-{given.get('data', 'emoji')}"
    values["out"] = given.get("out") or ("runs/ablation" if "ablate" in given else
                                         common.run_folder(stem, newest=given.get("resume", False)))
    if given.get("resume"):
        values = common.saved_values(values, given)
    source = given.get("evaluate") or given.get("init", values.get("init"))
    weights, sizes = None, {}
    if source:
        weights, saved = common.read_weights(source)
        if given.get("evaluate") and "online.logit_scale" in weights:  # a run of this script: all its encoders
            values = {**common.as_fields(saved), "out": values["out"], "init": None, "device": "auto", "workers": -1}
            sizes = {name: values[name] for name in (*common.SIZES, *common.GUESSED)}
            if "data" in given:
                values.update(root=None, keep=None, eval_data=(), eval_root=None)
        else:
            weights, found = common.clip_weights(weights, saved, source, given.get("act"))
            sizes = {name: found[name] for name in common.SIZES}
            values.update(found, **(dict(method="clip", keep_rate=1.0) if given.get("evaluate") else {}))
    cfg = Config(**{**values, **sizes, **given})
    check(cfg, sizes)
    return cfg, weights


def check(cfg, sizes=()):
    """UserError for values that argparse cannot judge; `sizes` are those of a checkpoint in use."""
    common.check_sizes(cfg, sizes)
    modes = [name for name in ("evaluate", "ablate", "profile") if getattr(cfg, name)]
    if len(modes) > 1:
        raise UserError(f"{common.flag(modes[0])} and {common.flag(modes[1])}: choose one")
    if cfg.linear_probe and not cfg.evaluate:
        raise UserError("--linear-probe goes with --evaluate FILE")
    if cfg.ablate and world_size() > 1:
        raise UserError("--ablate runs in one process")
    if cfg.compile and cfg.keep_rate_warmup:
        raise UserError("--compile and --keep-rate-warmup: every new κ would be compiled anew")
    if any(not 0 <= block < cfg.vision_layers for block in cfg.prune_blocks):
        raise UserError(f"--prune-blocks: the image tower has blocks 0 to {cfg.vision_layers - 1}")
    if len(cfg.kd_ramp) != 2 or not 0 <= cfg.kd_ramp[0] <= cfg.kd_ramp[1] <= 1:
        raise UserError("--kd-ramp takes two rising fractions from 0 to 1")
    if cfg.text_teacher == "momentum" and cfg.text_grad != "online":
        raise UserError("--text-teacher momentum needs --text-grad online: its own contrastive loss has no gradient")


# ---------------------------------------------------------------------------------------------------------------- model


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

    def forward(self, x, causal=False, cls_row=False):
        """(B, N, D) -> ((B, N, D), the attention CLS pays to each other token (B, N-1), or None without cls_row)."""
        B, N, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out = self.out_proj(out.transpose(1, 2).reshape(B, N, D))
        if not cls_row:
            return out, None
        # The fused kernel keeps its N x N probabilities to itself; the CLS row alone costs O(N).
        row = q[:, :, :1] @ k.transpose(-2, -1) * (D // self.heads) ** -0.5  # (B, H, 1, N)
        return out, row.float().softmax(-1).mean(1)[:, 0, 1:]


def reorganise_tokens(x, cls_attn, keep_rate, fuse, prune_by):
    """EViT token reorganisation: keep the patches CLS attends to, merge the rest into one token.

    x (B, N, D) with CLS first, cls_attn (B, N-1). Returns (B, 1 + K [+ 1], D) and the kept positions (B, K), with
    K = ceil(keep_rate * (N - 1)). The fused token, sum of a_i x_i over the dropped ones, comes last; a fused token
    from an earlier block competes like any patch. Nothing dropped: x is returned as it is, with None.
    """
    B, N, D = x.shape
    K = math.ceil(keep_rate * (N - 1))
    if K == N - 1:
        return x, None
    score = cls_attn if prune_by == "attention" else torch.rand_like(cls_attn)
    kept = score.topk(K, dim=1).indices  # (B, K)
    cls, patches = x[:, :1], x[:, 1:]
    parts = [cls, patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, D))]
    if fuse:
        dropped_attn = cls_attn.scatter(1, kept, 0.0).unsqueeze(1).to(x.dtype)  # (B, 1, N-1), zero where kept
        parts.append(dropped_attn @ patches)  # (B, 1, D); not renormalised, gradient flows into the attention
    return torch.cat(parts, 1), kept


class Block(nn.Module):
    """Pre-norm transformer block; with a keep_rate under 1 it drops tokens between attention and MLP."""

    def __init__(self, width, heads, mlp_width, act):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("act", QuickGELU() if act == "quick_gelu" else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def forward(self, x, causal=False, keep_rate=1.0, fuse=True, prune_by="attention"):
        """(B, N, D) -> (B, N', D) and the kept positions (B, K), None when no token was dropped."""
        out, cls_attn = self.attn(self.ln_1(x), causal, cls_row=keep_rate < 1)
        x, kept = x + out, None
        if keep_rate < 1:
            x, kept = reorganise_tokens(x, cls_attn, keep_rate, fuse, prune_by)
        return x + self.mlp(self.ln_2(x)), kept


class Transformer(nn.Module):
    """A stack of blocks, initialised as CLIP's. The text tower calls it; the image tower runs its blocks one by one."""

    def __init__(self, width, layers, heads, mlp_width, act):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_width, act) for _ in range(layers))
        self.grad_checkpoint = False
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def run_block(self, i, x, *args):
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(self.resblocks[i], x, *args, use_reentrant=False)
        return self.resblocks[i](x, *args)

    def forward(self, x):
        """Causal: (B, N, D) -> (B, N, D)."""
        for i in range(len(self.resblocks)):
            x, _ = self.run_block(i, x, True)
        return x


class VisionTransformer(nn.Module):
    """CLIP's ViT; the blocks in prune_blocks drop tokens as in EViT, which adds no parameters."""

    def __init__(self, cfg):
        super().__init__()
        width, patches = cfg.vision_width, (cfg.image_size // cfg.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, cfg.patch_size, cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(1 + patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, cfg.vision_layers, cfg.vision_heads, cfg.vision_mlp, cfg.act)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, cfg.embed_dim))
        depth = cfg.vision_layers
        self.prune_blocks = tuple(cfg.prune_blocks) or tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
        self.fuse, self.prune_by = cfg.fuse, cfg.prune_by

    def forward(self, image, keep_rate=1.0, trace=None):
        """(B, 3, S, S) -> (B, E). A list given as `trace` receives per pruning block the patches kept, (B, K)."""
        x = self.conv1(image).flatten(2).transpose(1, 2)  # (B, N-1, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)  # (B, N, D)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        patch = torch.arange(x.shape[1] - 1, device=x.device).expand(len(x), -1)  # which patch each token is
        for i in range(len(self.transformer.resblocks)):
            rate = keep_rate if i in self.prune_blocks else 1.0
            x, kept = self.transformer.run_block(i, x, False, rate, self.fuse, self.prune_by)
            if trace is not None and i in self.prune_blocks:
                if kept is not None:
                    patch = patch.gather(1, kept)
                    if self.fuse:
                        patch = F.pad(patch, (0, 1), value=-1)  # the fused token is no patch
                trace.append(patch)
        return self.ln_post(x[:, 0]) @ self.proj


def unit(x):
    """float32 rows of length one."""
    return F.normalize(x.float(), dim=-1)


class CLIP(nn.Module):
    """Image tower, text tower and logit scale; parameters named as OpenAI's, so that public checkpoints load."""

    def __init__(self, cfg):
        super().__init__()
        self.visual = VisionTransformer(cfg)
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(cfg.context_length, cfg.text_width))
        self.transformer = Transformer(cfg.text_width, cfg.text_layers, cfg.text_heads, 4 * cfg.text_width, cfg.act)
        self.ln_final = nn.LayerNorm(cfg.text_width)
        self.text_projection = nn.Parameter(cfg.text_width ** -0.5 * torch.randn(cfg.text_width, cfg.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, image, keep_rate=1.0):
        """(B, 3, S, S) normalised pixels -> (B, E) of unit length."""
        return unit(self.visual(image, keep_rate))

    def encode_text(self, text):
        """(B, up to context) token ids -> (B, E) of unit length, read at the end token (the largest id)."""
        x = self.token_embedding(text) + self.positional_embedding[:text.shape[1]]
        x = self.ln_final(self.transformer(x))
        x = x[torch.arange(len(x), device=x.device), text.argmax(1)] @ self.text_projection
        return unit(x)


# --------------------------------------------------------------------------------------------------------------- losses


def similarities(scale, u, v):
    """(M, M transposed) with M_ij = s<u_i, v_j>: this process's rows of each, (b, B); u and v (b, E) of unit length.

    Gathered with gradient: averaging the processes' gradients gives the gradient of one process with the whole batch.
    """
    return scale * u @ gather(v).T, scale * v @ gather(u).T


def info_nce(logits):
    """NCE(M) = 1/2 [CE(rows of M, diagonal) + CE(rows of M^T, diagonal)], logits = (M, M^T), each (b, B)."""
    b, device = len(logits[0]), logits[0].device
    target = torch.arange(rank() * b, (rank() + 1) * b, device=device)
    return sum(F.cross_entropy(rows, target) for rows in logits) / 2


def distillation(teacher_logits, student_logits):
    """KD = 1/2 [KL(softmax(M_t) || softmax(M_s)) + the same of the transposes], mean over the rows."""
    return sum(F.kl_div(s.log_softmax(-1), t.detach().log_softmax(-1), reduction="batchmean", log_target=True)
               for t, s in zip(teacher_logits, student_logits)) / 2


# --------------------------------------------------------------------------------------------------------------- method


class ECLIPSE(nn.Module):
    """Online image encoder (partial view), momentum image encoder (full view), one text encoder.

    `online` is a whole CLIP: the online image encoder, the shared text encoder and the logit scale. `momentum` is the
    moving average of online.visual. A training step, spread over backward() and update() below:

        u, v = online(image, κ), text(caption)         partial view, and the text                      embed
        ū = momentum(image)                            full view, no gradient                          teach
        L(s<u, v>, s<ū, v>) backward, optimiser step                                                   loss
        momentum <- m momentum + (1 - m) online                                                        update_momentum
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.online = cfg, CLIP(cfg)
        self.reset_momentum()

    def reset_momentum(self):
        """Teacher = student: at the start, and again after --init."""
        def frozen(module):
            return copy.deepcopy(module).eval().requires_grad_(False)

        has_teacher = self.cfg.method == "eclipse"
        self.momentum = frozen(self.online.visual) if has_teacher else None
        self.momentum_text = frozen(self.online) if has_teacher and self.cfg.text_teacher == "momentum" else None
        if self.momentum_text:
            self.momentum_text.visual = nn.Identity()

    def embed(self, image, text, keep_rate):
        """u (b, E) and v (b, E), with gradient: the partial view of the images, and the texts."""
        return self.online.encode_image(image, keep_rate), self.online.encode_text(text)

    @torch.no_grad()
    def teach(self, image, text):
        """ū (b, E), the full view of the images, and v̄ (b, E) or None when the text encoder is shared."""
        if self.momentum is None:
            return None, None  # method "clip"
        u_bar = unit(self.momentum(image, self.cfg.teacher_keep_rate))
        return u_bar, self.momentum_text.encode_text(text) if self.momentum_text else None

    def loss(self, u, v, u_bar, v_bar, kd_weight):
        """The loss and its terms, from A = s<u, v> and Ā = s<ū, v>; sg stops the gradient.

        text_grad  loss                                          trains the text encoder (assumption A2)
        momentum   NCE(s<u, sg v>) + NCE(Ā) + λ KD(Ā, s<u, sg v>)   NCE(Ā)
        online     NCE(A)                   + λ KD(Ā, s<u, sg v>)   NCE(A)
        both       NCE(A)          + NCE(Ā) + λ KD(Ā, s<u, sg v>)   both
        Nothing trains ū but the moving average. With a momentum text encoder Ā = s<ū, v̄>, and KD trains both towers, as
        in ALBEF. Without a teacher (method "clip") the loss is NCE(A).
        """
        cfg, scale = self.cfg, self.online.logit_scale.exp()
        if u_bar is None:
            nce = info_nce(similarities(scale, u, v))
            return nce, {"nce_online": nce.detach()}
        full, stopped = similarities(scale, u, v), similarities(scale, u, v.detach())
        online = stopped if cfg.text_grad == "momentum" else full
        momentum = similarities(scale, u_bar, v if v_bar is None else v_bar)
        nce_online, nce_momentum = info_nce(online), info_nce(momentum)
        kd = distillation(momentum, stopped if v_bar is None else full)
        total = nce_online + kd_weight * kd + (nce_momentum if cfg.text_grad != "online" else 0)
        return total, {"nce_online": nce_online.detach(), "nce_momentum": nce_momentum.detach(), "kd": kd.detach()}

    @torch.no_grad()
    def update_momentum(self, m):
        """Teacher <- m teacher + (1 - m) student, projection included."""
        for teacher, student in ((self.momentum, self.online.visual), (self.momentum_text, self.online)):
            if teacher is not None:
                source = dict(student.named_parameters())
                names, averages = zip(*teacher.named_parameters())
                torch._foreach_lerp_(list(averages), [source[name] for name in names], 1 - m)


# ------------------------------------------------------------------------------------------------------------- training


def build(cfg, weights=None):
    """ECLIPSE with fresh weights, with those of a run, or with those of a CLIP checkpoint in OpenAI's naming."""
    model = ECLIPSE(cfg)
    if weights and "online.logit_scale" in weights:
        common.load_weights(model, weights)
    elif weights:
        rows = model.online.visual.positional_embedding.shape[0]
        key = "visual.positional_embedding"
        weights = {**weights, key: common.resize_positions(weights[key], rows)}
        common.load_weights(model.online, weights)
        model.reset_momentum()
    return model


def build_optimiser(model, cfg, device):
    """AdamW, weight decay on matrices only; fused where the device has it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), eps=cfg.adam_eps, fused=fused)


def schedules(cfg, step, steps, steps_per_epoch):
    """{"lr", "keep_rate", "kd_weight", "ema"} at a step."""
    def cosine(start, end, share):  # from start at share 0 to end at share 1
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    warmup, done = cfg.warmup * steps_per_epoch, step / steps
    if step < warmup:
        lr = cfg.lr_start + (cfg.lr - cfg.lr_start) * step / warmup
    else:
        lr = cosine(cfg.lr, cfg.lr_end, (step - warmup) / max(1, steps - warmup))
    keep_rate = cosine(1, cfg.keep_rate, done / cfg.keep_rate_warmup) if done < cfg.keep_rate_warmup else cfg.keep_rate
    zero_until, whole_from = cfg.kd_ramp
    ramp = 1.0 if done >= whole_from else max(0.0, done - zero_until) / max(1e-9, whole_from - zero_until)
    ema = cfg.ema if cfg.ema_schedule == "const" else cosine(cfg.ema, 1, done)
    return {"lr": lr, "keep_rate": keep_rate, "kd_weight": cfg.kd_weight * ramp, "ema": ema}


def backward(model, image, text, now, amp, scaler, seed):
    """Backpropagate one batch; returns the loss and its terms, on the device.

    With --accum k > 1 the batch is embedded without graph, the loss is taken on all of it, and its gradient with
    respect to the embeddings is carried into the towers chunk by chunk: the full-batch gradient, in a chunk's memory.
    The loss is evaluated once, so the logit scale receives its gradient once.
    """
    k = model.cfg.accum
    images, texts = image.chunk(k), text.chunk(k)

    def embed_chunk(i):
        torch.manual_seed(seed + i)  # random pruning draws the same tokens in both passes, and after --resume
        with amp:
            return model.embed(images[i], texts[i], now["keep_rate"])

    def teach_chunk(i):
        torch.manual_seed(seed + i)
        with amp:
            return model.teach(images[i], texts[i])

    u_bar, v_bar = cat_features(teach_chunk(i) for i in range(k))
    with torch.set_grad_enabled(k == 1):
        u, v = cat_features(embed_chunk(i) for i in range(k))
    if k > 1:
        u.requires_grad_(), v.requires_grad_()
    loss, terms = model.loss(u, v, u_bar, v_bar, now["kd_weight"])
    scaler.scale(loss).backward()
    if k > 1:
        for i, gradients in enumerate(zip(u.grad.chunk(k), v.grad.chunk(k))):
            torch.autograd.backward(embed_chunk(i), gradients)
    return {"loss": loss.detach(), **terms}


def cat_features(chunks):
    """[(u, v), (u, v), ...] -> (u, v); None stays None."""
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks))


def normalise(image, statistics):
    """(B, 3, S, S) uint8 -> float on the device of the statistics: mean and std of the channels, (2, 3, 1, 1)."""
    mean, std = statistics
    return image.to(mean.device, non_blocking=True).float().sub_(mean).div_(std)


def update(model, optimiser, scaler, lr, ema):
    """One optimiser step on the processes' mean gradient, then the clamp of the logit scale, then the teacher."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    average_gradients(model.parameters())
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.online.logit_scale.clamp_(0, math.log(100))
    if model.momentum is not None:
        model.update_momentum(ema)


def train(cfg, weights=None):
    """Train, validate after every epoch, evaluate at the end; returns what results.json holds."""
    device = common.start_device(cfg.device, cfg.seed)
    run, data = Run(cfg.out, {"log.csv": LOG_COLUMNS, "timing.csv": common.TIMING_COLUMNS}), common.training_set(cfg)
    model = build(cfg, weights).to(device)
    optimiser, (amp, scaler) = build_optimiser(model, cfg, device), common.mixed_precision(cfg, device)
    parts = {"model": model, "optimiser": optimiser, "scaler": scaler}
    state = run.load_state(**parts) if cfg.resume else {}
    state = state or {"step": 0, "best": -1.0, "best_step": 0, "bad": 0}
    prepare_towers(model, cfg)
    evaluator = Evaluator(model, cfg, device, amp)
    evaluator.sets("val"), evaluator.sets("test")  # what is missing is said before training
    samples = common.TrainSamples(data, evaluator.tokenizer, cfg.image_size, (cfg.crop_scale, 1.0), cfg.seed)
    total = cfg.epochs * (len(data) // cfg.batch_size)
    sampler = common.StepSampler(len(data), cfg.batch_size, total, state["step"], cfg.seed, rank(), world_size())
    run.start(cfg, state["step"])
    loader = common.train_loader(samples, sampler, common.loader_workers(cfg), device.type)
    progress = common.Progress(sampler, state["step"], cfg.batch_size, device)
    with common.StopRequest() as stop, progress:
        for image, text, bad in progress.watch(loader):
            now = schedules(cfg, state["step"], sampler.steps, sampler.steps_per_epoch)
            image, text = normalise(image, evaluator.statistics), text.to(device, non_blocking=True)
            seed = (cfg.seed * 10 ** 9 + state["step"] * world_size() + rank()) * cfg.accum
            terms = backward(model, image, text, now, amp, scaler, seed)
            update(model, optimiser, scaler, now["lr"], now["ema"])
            state["step"] += 1
            state["bad"] += bad
            epoch_ends, logs = state["step"] % sampler.steps_per_epoch == 0, state["step"] % cfg.log_every == 0
            stopping = stop.agreed(synchronise=logs or epoch_ends)
            if logs or epoch_ends:
                row = log_row(model, state, sampler, now, terms)
                run.log("timing.csv", progress.lap(state["step"]))
                if epoch_ends:
                    common.check_bad(common.total(state["bad"], device), len(data), cfg.data)
                    state["bad"] = 0
                    row.update(validate(run, evaluator, state))
                run.log("log.csv", row)
                progress.show(row, chance=math.log(cfg.batch_size), line=epoch_ends)
            if epoch_ends or stopping or state["step"] % cfg.save_every == 0:
                run.save_state(cfg, state, **parts)
            if stopping:
                raise KeyboardInterrupt(f"stopped at step {state['step']}; --resume --out {run.folder} goes on")
    return finish(run, evaluator, state)


LOG_COLUMNS = ["step", "epoch", "lr", "keep_rate", "kd_weight", "ema", "loss", "nce_online", "nce_momentum", "kd",
               "logit_scale", "val_online", "val_momentum"]


def log_row(model, state, sampler, now, terms):
    """The row of log.csv: the one place where the host waits for the device. FloatingPointError when diverged."""
    values = common.mean_over_processes(terms)
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"the loss is {values['loss']} at step {state['step']}: lower --lr, lengthen --warmup "
                                 "or use --precision fp32 (a checkpoint saved before it diverged is kept)")
    if model.momentum is None:
        now = {"lr": now["lr"], "keep_rate": now["keep_rate"]}
    return {"step": state["step"], "epoch": state["step"] / sampler.steps_per_epoch, **now, **values,
            "logit_scale": model.online.logit_scale.exp().item()}


def prepare_towers(model, cfg):
    """--grad-checkpoint and --compile, after the weights are loaded."""
    for tower in (model.online.visual.transformer, model.online.transformer):
        tower.grad_checkpoint = cfg.grad_checkpoint
    if cfg.compile:
        for tower in filter(None, (model.online.visual, model.online.transformer, model.momentum)):
            tower.compile()  # in place: the parameter names stay as they are


# ------------------------------------------------------------------------------------------------- evaluation, pictures


class Evaluator:
    """The encoders of a model as functions, by name: online or momentum, at the training keep rate or full."""

    def __init__(self, model, cfg, device, amp):
        self.model, self.cfg, self.device, self.amp = model, cfg, device, amp
        self.tokenizer = common.CLIPTokenizer(cfg.context_length, cfg.vocab_size)
        self.sets = cache(partial(common.evaluation_sets, cfg))  # "val" or "test" -> {name: set}
        self.statistics = 255 * torch.tensor(common.PIXELS[cfg.pixel_stats], device=device).view(2, 3, 1, 1)

    def encoders(self):
        """{"online κ=0.7": (image encoder, text encoder), ...}: the cells of the paper's table.

        Image encoders: (B, 3, S, S) uint8 -> (B, E); text encoders: (T, context) token ids -> (T, E).
        """
        towers = {"online": self.model.online.visual, "momentum": self.model.momentum}
        rates = {"online": {self.cfg.keep_rate, 1.0}, "momentum": {self.cfg.keep_rate, self.cfg.teacher_keep_rate, 1.0}}
        text = partial(self.encode_text, self.model.online)
        texts = {"online": text, "momentum": partial(self.encode_text, self.model.momentum_text)
                 if self.model.momentum_text else text}
        return {f"{name} κ={rate:g}": (partial(self.encode_image, tower, rate), texts[name])
                for name, tower in towers.items() if tower is not None for rate in sorted(rates[name])}

    def encode_image(self, tower, keep_rate, image):
        with self.amp:
            return unit(tower(normalise(image, self.statistics), keep_rate))

    def encode_text(self, clip, tokens):
        with self.amp:
            return clip.encode_text(tokens.to(self.device))

    def scores(self, encoders, split):
        """{evaluation set: {encoder: {metric: percent}}}"""
        return {name: common.evaluate(encoders, self.tokenizer, data, self.cfg)
                for name, data in self.sets(split).items()}


def validate(run, evaluator, state):
    """{"val_online", "val_momentum"}: main metric of the first validation set, encoders as trained; keeps best.pt."""
    if rank() > 0:
        return {}
    cfg, encoders = evaluator.cfg, evaluator.encoders()
    columns = {"val_online": f"online κ={cfg.keep_rate:g}", "val_momentum": f"momentum κ={cfg.teacher_keep_rate:g}"}
    columns = {column: name for column, name in columns.items() if name in encoders}
    scores = evaluator.scores({name: encoders[name] for name in columns.values()}, "val")
    if not scores:
        return {}
    first = next(iter(scores.values()))
    row = {column: common.main_metric(first[name]) for column, name in columns.items()}
    if max(row.values()) > state["best"]:
        state["best"], state["best_step"] = max(row.values()), state["step"]
        run.save("best.pt", {"model": evaluator.model.state_dict(), "config": asdict(cfg)})
    return row


def finish(run, evaluator, state):
    """Test scores of every cell, throughput, pictures; returns what results.json holds (None on other processes)."""
    if rank() > 0:
        return None
    cfg, encoders = evaluator.cfg, evaluator.encoders()
    results = common.write_results(run, cfg, encoders, evaluator.scores(encoders, "test"), state, evaluator.device)
    examples = common.example_images(evaluator.sets("test"), cfg.image_size, 64)
    if examples is not None:
        images, captions = examples
        encode_image, encode_text = encoders[f"online κ={cfg.keep_rate:g}"]
        with torch.no_grad():
            scores = encode_image(images) @ encode_text(evaluator.tokenizer(captions)).T
            common.plot_retrieval(run.path("retrieval.png"), images, captions, scores)
            if cfg.keep_rate < 1:
                draw_kept_tokens(run.path("tokens.png"), evaluator, images[:8], captions[:8])
    print(f"pictures, tables and checkpoints: {run.folder}")
    return results


def draw_kept_tokens(path, evaluator, images, captions):
    """The images, and what is left of them after each pruning block: dropped patches are darkened."""
    cfg, trace = evaluator.cfg, []
    evaluator.model.online.visual(normalise(images, evaluator.statistics), cfg.keep_rate, trace)
    grid = cfg.image_size // cfg.patch_size
    rows = [images.cpu()]
    for kept in trace:
        kept = kept.cpu().where(kept.cpu() >= 0, grid * grid)  # the fused token, -1, goes to one more column
        mask = torch.zeros(len(images), grid * grid + 1).scatter_(1, kept, 1.0)
        mask = F.interpolate(mask[:, :-1].view(-1, 1, grid, grid), scale_factor=cfg.patch_size)
        rows.append((images.cpu() * (0.2 + 0.8 * mask)).to(torch.uint8))
    names = [f"after block {block + 1}" for block in evaluator.model.online.visual.prune_blocks]
    title = f"patches kept by the online encoder, κ = {cfg.keep_rate:g}"
    common.plot_grid(path, rows, ["image", *names], captions, title)


def evaluate_checkpoint(cfg, weights):
    """--evaluate: the test scores of a checkpoint, ours or a published one, and --linear-probe."""
    device = common.start_device(cfg.device, cfg.seed)
    model = build(cfg, weights).to(device).eval()
    evaluator = Evaluator(model, cfg, device, common.mixed_precision(cfg, device)[0])
    encoders = evaluator.encoders()
    scores = evaluator.scores(encoders, "test")
    cells = {name: common.flatten(scores, name) for name in encoders}
    if cfg.linear_probe:
        for name, found in common.probe({name: encode for name, (encode, _) in encoders.items()}, cfg).items():
            cells[name].update(found)
    common.print_table({name: common.with_means(cell) for name, cell in cells.items()})


# ------------------------------------------------------------------------------------------------- profile and ablation


KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def profile(cfg):
    """--profile: parameters, MACs, token counts and measured images/s of the image tower, for each keep rate."""
    device = common.start_device(cfg.device, cfg.seed)
    visual = build(cfg).online.visual.to(device).eval()
    print(f"{cfg.preset}: image tower of {sum(p.numel() for p in visual.parameters()) / 1e6:.1f} M parameters, "
          f"{cfg.image_size} px, patch {cfg.patch_size}, blocks {visual.prune_blocks} (0-based) prune")
    amp = common.mixed_precision(cfg, device)[0]
    images = min(cfg.batch_size, 256 if device.type == "cuda" or cfg.preset == "demo" else 8)
    batch = torch.randn(images, 3, cfg.image_size, cfg.image_size, device=device)
    def encode(rate, images):
        with amp:
            return visual(images, rate)

    speeds = common.compare_speeds({rate: partial(encode, rate) for rate in KEEP_RATES}, batch)
    full, cells = forward_cost(visual, batch[:1], 1.0)[0], {}
    for rate in KEEP_RATES:
        macs, tokens = forward_cost(visual, batch[:1], rate)
        cells[f"κ={rate:g}"] = {
            "GMACs": macs / 1e9, "tokens": "/".join(map(str, tokens)), "MACs_x": full / macs,
            "images_per_second": speeds[rate], "measured_x": speeds[rate] / speeds[1.0],
            # the image side of ECLIPSE's step: a full teacher forward; the student's forward and backward, 3 forwards
            "train_MACs_vs_clip": (full + 3 * macs) / (3 * full)}
    common.print_table(cells)


def forward_cost(visual, image, keep_rate):
    """Multiply-adds of one image's forward pass, and the tokens (with CLS and fused) after each pruning block."""
    from torch.utils.flop_counter import FlopCounterMode

    trace = []
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):  # the plain kernel: its two products are counted on every device
        visual(image, keep_rate, trace)
    return counter.get_total_flops() / 2 / len(image), [1 + kept.shape[1] for kept in trace]


def ablation_arms(cfg):
    """{name: the fields in which the arm differs from the flags given}"""
    plain = dict(method="clip", keep_rate=1.0)
    regimes = {"noise 0": dict(noise=0.0), "noise 0.2": dict(noise=0.2), "noise 0.6": dict(noise=0.6),
               "a sixth of the scenes": dict(scenes=cfg.scenes // 6, epochs=cfg.epochs * 6),  # as many samples seen
               "constant lr": dict(lr_end=cfg.lr)} if cfg.data == "emoji" else {}
    return {
        "clip": plain,
        "eclipse": {},
        "clip + evit": dict(method="clip"),
        **{f"keep rate {k:g}": dict(keep_rate=k) for k in KEEP_RATES if k != cfg.keep_rate},
        "text teacher momentum": dict(text_teacher="momentum", text_grad="online"),
        **{f"text grad {t}": dict(text_grad=t) for t in ("momentum", "online", "both") if t != cfg.text_grad},
        **{f"kd weight {w:g}": dict(kd_weight=w) for w in (0.0, 0.5, 1.0, 2.0) if w != cfg.kd_weight},
        **{f"ema {m:g}": dict(ema=m) for m in (0.0, 0.95, 0.99, 0.995, 0.999) if m != cfg.ema},
        "no kd ramp": dict(kd_ramp=(0.0, 0.0)),
        "teacher pruned too": dict(teacher_keep_rate=cfg.keep_rate),
        "no fusion": dict(fuse=False),
        "random pruning": dict(prune_by="random"),
        **{f"{regime}, {name}": dict(**setting, **arm) for regime, setting in regimes.items()
           for name, arm in (("clip", plain), ("eclipse", {}))},
    }


def ablate(cfg):
    """--ablate: train the arms that are not done yet; then the table and the sweet-spot plot of all that are."""
    found = common.run_arms(cfg, ablation_arms(cfg), train, baselines=("clip", "eclipse"))
    draw_sweet_spot(Path(cfg.out) / "sweet_spot.png", cfg, found)


def draw_sweet_spot(path, cfg, found):
    """Accuracy against measured throughput over κ, for the four cells of ECLIPSE, with plain CLIP and CLIP + EViT."""
    arms = {name: replace(cfg, **fields) for name, fields in ablation_arms(cfg).items()
            if name in found and name.startswith(("keep rate", "eclipse", "clip"))}
    if not arms:
        return
    device = common.start_device(cfg.device, 0)
    evaluator = Evaluator(build(cfg).to(device), cfg, device, common.mixed_precision(cfg, device)[0])
    encode = partial(evaluator.encode_image, evaluator.model.online.visual)
    probe = common.speed_probe(cfg, device)
    rates = sorted({1.0, *(arm.keep_rate for arm in arms.values())})
    speed = common.compare_speeds({rate: partial(encode, rate) for rate in rates}, probe)
    cell = next(iter(found[next(iter(arms))][0]["cells"].values()))
    metric = next((m for m in cell if m.endswith(("top1", "_r1"))), None)
    if metric is None:  # data without a test set
        return
    series = {}  # label: [(keep rate in training, relative throughput at test, accuracies over seeds)]
    for name, arm in arms.items():
        for cell in found[name][0]["cells"]:
            encoder, rate = cell.split(" κ=")[0], float(cell.split(" κ=")[1])
            labels = [f"{encoder}, full view"] if rate == 1 else []
            labels += [f"{encoder}, pruned as trained"] if rate == arm.keep_rate else []
            if arm.method == "clip":
                labels = [name] if rate == arm.keep_rate else []
            for label in labels:
                series.setdefault(label, []).append((arm.keep_rate, speed[rate] / speed[1.0],
                                                     [run["cells"][cell][metric] for run in found[name]]))
    common.plot_sweet_spot(path, series, f"{metric}, %")


def main():
    cfg, weights = configure()
    if cfg.profile:
        profile(cfg)
    elif cfg.evaluate:
        evaluate_checkpoint(cfg, weights)
    elif cfg.ablate:
        ablate(cfg)
    else:
        train(cfg, weights)


if __name__ == "__main__":
    common.run_main(main)
