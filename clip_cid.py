"""CLIP-CID: Efficient CLIP Distillation via Cluster-Instance Discrimination
Yang, Gu, An, Jiang, Dai, Feng, Cai, Deng, AAAI 2025, https://arxiv.org/abs/2408.09441. No official code was released.

A large CLIP, the teacher, embeds the training set once. Its image embeddings first thin the data out: images closer
than ε form groups, and only the centre of each group stays (image semantic balance). They then cluster what is left
(k-means). A small student learns its own contrastive loss and two more against the teacher's embeddings: cluster
discrimination, which cluster an image belongs to, so that images alike are no negatives of each other; and instance
discrimination, which of the batch's teacher embeddings is its own, for the detail that clusters lose.

    python clip_cid.py                                        # emoji scenes, a few minutes on a laptop
    python clip_cid.py --ablate all                           # the ladder of ablations on the emoji scenes
    python clip_cid.py --data coco --root DIR --teacher ViT-L-14.pt
    torchrun --nproc_per_node=8 clip_cid.py --data cc3m --teacher open_clip_pytorch_model.bin   # bigG/14, student B/32
    python clip_cid.py --stage balance --embeddings FILE.npy --eps 0.447                        # thin out your own data

The stages embed, balance, cluster, distil and evaluate run one after the other; --stage runs up to one of them. Each
leaves plain files, which a later command with the same --out uses again; --cache shares the embeddings between runs.

Measured on the emoji scenes, 32,000 samples seen, 3 seeds, 2 CPU cores, torch 2.13.0 (README has the table and the
commands): zero-shot top-1 on unseen drawings 21.2 ± 1.2, against 12.8 ± 1.7 for the same student without a teacher and
39.5 for the teacher. Not run at the paper's scale.

Assumptions, where the public text is silent; what is marked [paper] is not ours:
  A1  Groups by Union-Find at a distance ε [paper], that is connected components. ε is set so that 43.7 % of the images
      go (--remove), the share the paper removes from LAION400M; DanQing, a later paper of the group, uses the cosine
      distance 0.1, which is ε = 0.447 (--eps).
  A2  The centre image of a group stays [paper]: the member nearest to the normalised mean, with its own caption.
  A3  k-means on image embeddings [paper]: spherical, the teacher's, of the images kept (--cluster-features, --k).
  A4  Softmax loss and KL divergence [paper]: softmax over prototypes with the k-means label, plus KL(teacher ||
      student) over the same prototypes: the frozen centroids (--prototypes), scale 32 (--cluster-scale, the teacher's:
      --teacher-scale), no margin (--margin-type), every cluster a negative (--sample-rate 1), images only
      (--text-cluster).
  A5  Bidirectional contrast between teacher and student [paper]: student images against teacher texts, student texts
      against teacher images (--instance cross), with a learnable scale of its own, from 1/0.07, at most 100.
  A6  Total: CLIP + α cluster + β instance, α = β = 1 (--cluster-weight, --instance-weight). Student embeddings are
      projected linearly to the teacher's width for these two losses; the projections are not part of the student.
  A7  The teacher sees the centre crop, once; the student's random crops are compared with that cached embedding.
  A8  Recipe (batch, epochs, learning rate) from sibling papers of the group, for CC3M with batch 4096; crops as in
      SLIP; k = 10,000.
"""

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

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
# against the B of all), N tokens, D width, H heads, E width of the student's embedding, T width of the teacher's, n
# images, k clusters, S sampled clusters.

# --------------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    data: str = option("emoji", "training data: emoji, cc3m, coco, flickr30k, or any name with --root FOLDER of tar "
                       "shards; picks preset and recipe", section="run")
    root: str | None = option(None, "folder of the data (default data/NAME)")
    keep: str | None = option(None, "train on these samples only: a file of keys, one a line (clip_cid.py writes one)")
    out: str | None = option(None, "run folder (default runs/METHOD-DATA, numbered when taken)")
    stage: str = option("all", "run the stages up to this one; teacher, no stage of theirs, trains a CLIP "
                        "that can serve as teacher",
                        ["all", "teacher", "embed", "balance", "cluster", "distil", "evaluate"])
    resume: bool = option(False, "go on from the last checkpoint in --out")
    evaluate: str | None = option(None, "evaluate this checkpoint (ours, OpenAI, OpenCLIP, Hugging Face) and stop")
    eval_data: tuple[str, ...] = option((), "evaluation sets (default: those that belong to --data)")
    eval_root: str | None = option(None, "folder of the evaluation set (default data/NAME); of several: FOLDER/NAME")
    linear_probe: bool = option(False, "with --evaluate or --stage evaluate: also fit a linear classifier on the "
                                "frozen image features")
    ablate: tuple[str, ...] = option((), "train these arms of the ablation (names in quotes, or all) and tabulate them")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the ablation")
    profile: bool = option(False, "print parameters, MACs and speed of student and teacher, and stop")
    seed: int = option(0, "seed of weights, data order and augmentation", NOT_NEGATIVE)
    device: str = option("auto", "auto, cuda, mps or cpu")
    workers: int = option(-1, "loader processes (-1: none for emoji, else up to 8 per training process)")
    log_every: int = option(20, "steps between rows of log.csv", POSITIVE)
    save_every: int = option(500, "steps between checkpoints (one is also saved after every evaluation)", POSITIVE)

    teacher: str | None = option(None, "checkpoint of the teacher: any OpenAI, OpenCLIP or Hugging Face CLIP ViT "
                                 "(emoji: data/teacher_clip.pt)", section="teacher")
    teacher_act: str | None = option(None, "activation of the teacher, where its file does not tell",
                                     ["quick_gelu", "gelu"])
    teacher_precision: str = option("fp32", "weights of the teacher", ["fp32", "bf16", "fp16"])
    cache: str | None = option(None, "folder of the teacher's embeddings, to share between runs (default --out)")
    embeddings: str | None = option(None, "with --stage balance or cluster: an (n, d) .npy file instead of --data")
    keys: str | None = option(None, "with --embeddings: the n sample keys, one a line (default: row numbers)")

    filter: str = option("balance", "how the data are thinned out before training",
                         ["balance", "semdedup", "random", "none"], section="image semantic balance")
    remove: float = option(0.437, "share of the images to remove; ε follows from it", BELOW_ONE)
    eps: float | None = option(None, "ε, Euclidean distance of unit embeddings below which images are linked; replaces "
                               "--remove", (lambda x: 0 < x <= 2, "must be above 0 and at most 2"))
    block: int = option(4096, "rows per block of the similarity matrix; memory grows with its square", POSITIVE)

    k: int = option(256, "number of clusters", POSITIVE, section="cluster discrimination")
    kmeans_iters: int = option(20, "iterations of k-means", POSITIVE)
    cluster_features: str = option("image", "the teacher's embeddings that are clustered", ["image", "text", "joint"])
    cluster_weight: float = option(1.0, "α, weight of the cluster loss", NOT_NEGATIVE)
    cluster_terms: str = option("both", "hard: softmax loss on the labels; kl: KL to the teacher's assignment",
                                ["both", "hard", "kl"])
    prototypes: str = option("teacher", "teacher: the centroids, frozen; learned-from-teacher: start there; learned: "
                             "start at random", ["teacher", "learned-from-teacher", "learned"])
    cluster_scale: float = option(32.0, "s, scale of the student's cosines with the prototypes", POSITIVE)
    teacher_scale: float = option(32.0, "s_t, the same for the teacher in the KL term", POSITIVE)
    sample_rate: float = option(1.0, "r, share of the clusters that a step contrasts; at least as many as the "
                                "batch has pairs", POSITIVE_SHARE)
    margin_type: str = option("none", "margin on the own cluster", ["none", "cosface", "arcface"])
    margin: float = option(0.0, "m, size of the margin: a cosine (cosface) or an angle in radians (arcface)", BELOW_ONE)
    text_cluster: bool = option(False, "the student's texts learn the clusters too")

    method: str = option("clip_cid", "clip: no teacher, no distillation", ["clip_cid", "clip"], section="distillation")
    instance: str = option("cross", "cross: student images against teacher texts and texts against images, CLIP-KD's "
                           "ICL; intra: images against images, texts against texts; both; logit-kl: KL between the "
                           "similarity matrices, its CRD and TinyCLIP's affinity",
                           ["cross", "intra", "both", "logit-kl"])
    instance_weight: float = option(1.0, "β, weight of the instance loss", NOT_NEGATIVE)
    feature_weight: float = option(0.0, "weight of feature mimicry, CLIP-KD's FD, there 2000", NOT_NEGATIVE)

    preset: str = option("demo", "sizes of both towers", ["demo", "vit_b32", "vit_b16"], section="student")
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
    samples: int = option(0, "stop after so many samples instead of --epochs (0: --epochs)", NOT_NEGATIVE)
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

    scenes: int = option(16000, "training scenes", POSITIVE, section="emoji scenes (--data emoji)")
    concepts: int = option(100, "how many concepts are drawn", POSITIVE)
    difficulty: str = option("easy", "objects, sizes and backgrounds", ["easy", "medium", "hard"])
    noise: float = option(0.4, "share of training scenes with another scene's caption", SHARE)
    long_tail: float = option(1.0, "exponent z of concept frequencies 1 / rank^z", NOT_NEGATIVE)
    duplicates: float = option(0.4, "share of training scenes that nearly repeat another", SHARE)


VIT_B = dict(image_size=224, vision_width=768, vision_layers=12, vision_heads=12, vision_mlp=3072, text_width=512,
             text_layers=12, text_heads=8, context_length=77, vocab_size=49408, embed_dim=512, act="quick_gelu")
PRESETS = {"demo": {}, "vit_b32": {**VIT_B, "patch_size": 32}, "vit_b16": {**VIT_B, "patch_size": 16}}
# The sibling papers' recipe (A8) at CC3M's size; every field can be overridden.
LARGE = dict(preset="vit_b32", epochs=32, batch_size=4096, lr=1e-3, crop_scale=0.5, warmup=3.2, k=10000, log_every=50)
SMALLER = {**LARGE, "batch_size": 1024, "k": 1000}
RECIPES = {"emoji": {}, "cc3m": LARGE, "yfcc15m": LARGE, "coco": SMALLER, "flickr30k": SMALLER}
# --stage teacher on the emoji scenes: the CLIP that ships as data/teacher_clip.pt, larger, trained on more scenes.
DEMO = dict(vision_width=128, vision_layers=6, vision_mlp=512, text_width=96, text_layers=3, embed_dim=128,
            scenes=50000, epochs=5, long_tail=0.0, duplicates=0.0, batch_size=128, seed=1000, log_every=100)
DEMO_TEACHER = common.DATA / "teacher_clip.pt"


def configure(argv=None):
    """(Config, weights or None): defaults <- recipe of --data <- preset <- run or checkpoint in use <- flags given."""
    given = common.parse_command_line(Config, __doc__, argv)
    recipe = RECIPES.get(given.get("data", "emoji"), LARGE)
    if given.get("stage") == "teacher":
        recipe = {**recipe, **(DEMO if given.get("data", "emoji") == "emoji" else {}), "method": "clip",
                  "filter": "none"}
    values = {**recipe, **PRESETS[given.get("preset", recipe.get("preset", "demo"))]}
    stem = f"runs/{given.get('method', 'clip_cid')}-{given.get('data', 'emoji')}"
    stem = "runs/teacher" if given.get("stage") == "teacher" else stem
    stem = f"runs/{Path(given['embeddings']).stem}" if "embeddings" in given else stem
    goes_on = given.get("resume", False) or given.get("stage", "all") not in ("all", "teacher")
    values["out"] = given.get("out") or ("runs/ablation_cid" if "ablate" in given else
                                         common.run_folder(stem, newest=goes_on))
    if given.get("resume"):
        values = common.saved_values(values, given)
    elif given.get("stage") == "evaluate" and (Path(values["out"]) / "config.json").is_file():
        saved = common.read_json(Path(values["out"]) / "config.json")["config"]
        values = {**common.as_fields(saved), "out": values["out"], "stage": "evaluate"}
    source = given.get("evaluate") or given.get("init", values.get("init"))
    weights, sizes = None, {}
    if source:
        weights, saved = common.read_weights(source)
        own = saved is not None and "prototypes" in saved  # a run of this script
        weights, found = common.clip_weights(weights, saved, source, given.get("act"))
        sizes = {name: found[name] for name in common.SIZES}
        if given.get("evaluate") and own:
            values = {**common.as_fields(saved), "out": values["out"], "stage": "all", "resume": False, "init": None,
                      "device": "auto", "workers": -1}
            if "data" in given:
                values.update(root=None, keep=None, eval_data=(), eval_root=None)
        values.update(found)
    cfg = Config(**{**values, **sizes, **given})
    check(cfg, sizes)
    return cfg, weights


def check(cfg, sizes=()):
    """UserError for values that argparse cannot judge; `sizes` are those of a checkpoint in use."""
    common.check_sizes(cfg, sizes)
    modes = [name for name in ("evaluate", "ablate", "profile") if getattr(cfg, name)]
    modes += ["stage"] if cfg.stage != "all" else []
    if len(modes) > 1:
        raise UserError(f"{common.flag(modes[0])} and {common.flag(modes[1])}: choose one")
    if cfg.linear_probe and not (cfg.evaluate or cfg.stage == "evaluate"):
        raise UserError("--linear-probe goes with --evaluate FILE or --stage evaluate")
    if cfg.ablate and (world_size() > 1 or cfg.eps):
        raise UserError(f"--ablate {'takes --remove, not --eps' if cfg.eps else 'runs in one process'}")
    if cfg.embeddings and cfg.stage not in ("balance", "cluster"):
        raise UserError("--embeddings goes with --stage balance or --stage cluster")
    if cfg.keys and not cfg.embeddings:
        raise UserError("--keys goes with --embeddings FILE")
    if cfg.eps and cfg.filter == "random":
        raise UserError("--filter random takes --remove, not --eps")
    if cfg.sample_rate < 1 and cfg.k <= cfg.batch_size:
        raise UserError(f"--sample-rate {cfg.sample_rate:g} changes nothing: --k {cfg.k} is not above --batch-size "
                        f"{cfg.batch_size}")
    if bool(cfg.margin) != (cfg.margin_type != "none"):
        raise UserError("--margin and --margin-type go together")
    if cfg.stage == "teacher" and (cfg.method, cfg.filter) != ("clip", "none"):
        raise UserError("--stage teacher trains a plain CLIP: --method clip, --filter none")
    if not cfg.embeddings and not cfg.evaluate and needs_teacher(cfg):
        teacher_file(cfg)


def needs_teacher(cfg):
    return (cfg.method == "clip_cid" or cfg.filter != "none" or cfg.profile
            or cfg.stage in ("embed", "balance", "cluster", "evaluate"))


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

    def forward(self, x, causal=False):
        """(B, N, D) -> (B, N, D)"""
        B, N, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, mlp_width, act):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("act", QuickGELU() if act == "quick_gelu" else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def forward(self, x, causal=False):
        """(B, N, D) -> (B, N, D)"""
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, initialised as CLIP's."""

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

    def forward(self, x, causal=False):
        """(B, N, D) -> (B, N, D)"""
        for block in self.resblocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, use_reentrant=False)
            else:
                x = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    """CLIP's ViT."""

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

    def forward(self, image):
        """(B, 3, S, S) -> (B, E)"""
        x = self.conv1(image).flatten(2).transpose(1, 2)  # (B, N-1, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)  # (B, N, D)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


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

    def encode_image(self, image):
        """(B, 3, S, S) normalised pixels -> (B, E) of unit length."""
        return unit(self.visual(image))

    def encode_text(self, text):
        """(B, up to context) token ids -> (B, E) of unit length, read at the end token (the largest id)."""
        x = self.token_embedding(text) + self.positional_embedding[:text.shape[1]]
        x = self.ln_final(self.transformer(x, causal=True))
        x = x[torch.arange(len(x), device=x.device), text.argmax(1)] @ self.text_projection
        return unit(x)


# ---------------------------------------------------------------------------------------------- image semantic balance


def near_pairs(x, floor, block):
    """Yields (i, j, cosine) of all pairs i < j whose cosine is above floor(), block pair by block pair, each pair once.

    x: Rows or a tensor of unit vectors (n, d). floor is asked anew for each block pair, so it may rise meanwhile.
    Exact: all n(n-1)/2 cosines are computed, in memory of the order of block². Processes share the block pairs.
    """
    starts = range(0, len(x), block)
    mine = itertools.islice(((a, b) for a in starts for b in starts if b >= a), rank(), None, world_size())
    turns, left_of, products = len(starts) * (len(starts) + 1) // 2 // world_size(), None, None
    for a, b in tqdm(mine, "comparing blocks", turns, disable=None if turns > 20 and rank() == 0 else True):
        if a != left_of:
            left, left_of = x[a:a + block], a
        right = left if a == b else x[b:b + block]
        if products is None:  # one buffer for all products: fresh memory costs a fifth of the time on a CPU
            products = left.new_empty(len(left), len(left))
        cosine = torch.mm(left, right.T, out=products.view(-1)[:len(left) * len(right)].view(len(left), len(right)))
        if a == b:
            cosine.masked_fill_(torch.ones_like(cosine, dtype=torch.bool).tril(), -2)
        rows = (cosine.amax(1) > floor()).nonzero().squeeze(1)  # few rows have a near one: look closer at these
        i, j = (cosine[rows] > floor()).nonzero(as_tuple=True)
        yield a + rows[i], b + j, cosine[rows[i], j]


def spanning_forest(n, i, j):
    """Borůvka's algorithm: the groups that Union-Find gives, in rounds of whole arrays, on a CPU or a GPU.

    i, j (e,): edges among n nodes, best first. Returns which edges the maximum spanning forest uses (e,), bool, and the
    component of each node (n,), named by its lowest member. In a round each component takes the best edge that leaves
    it, all at once.
    """
    nodes = torch.arange(n, device=i.device)
    component, used, left = nodes, torch.zeros_like(i, dtype=torch.bool), torch.arange(len(i), device=i.device)
    while True:
        a, b = component[i[left]], component[j[left]]
        leaves = a != b
        left, a, b = left[leaves], a[leaves], b[leaves]
        if not len(left):
            lowest = nodes.scatter_reduce(0, component, nodes, "amin", include_self=False)
            return used, lowest[component]
        best = torch.full_like(nodes, len(i)).scatter_reduce(0, torch.cat([a, b]), left.repeat(2), "amin")
        joining = (best < len(i)).nonzero().squeeze(1)
        edge = best[joining]
        used[edge] = True
        parent = nodes.clone()
        parent[joining] = component[i[edge]] + component[j[edge]] - joining  # the component at the other end
        mutual = parent[parent] == nodes  # two that chose the same edge: the lower one is the root
        parent = torch.where(mutual, torch.minimum(parent, nodes), parent)
        while not torch.equal(parent, parent[parent]):
            parent = parent[parent]
        component = parent[component]


def lower_bound(x, count, block, part=256):
    """A cosine that the count-th best edge of the maximum spanning tree of x cannot be below.

    A spanning forest of some of the edges is never better than that tree, so its count-th best edge is a bound. Here:
    the trees over `part` vectors each, by Prim's algorithm on all parts of a block at once.
    """
    found = []
    for start in range(0, len(x) - part + 1, max(part, block // part * part)):
        rows = x[start:min(start + max(part, block // part * part), len(x) // part * part)]
        cosine = rows.view(-1, part, rows.shape[1]) @ rows.view(-1, part, rows.shape[1]).mT  # (parts, part, part)
        parts = torch.arange(len(cosine), device=cosine.device)
        inside = torch.zeros(cosine.shape[:2], dtype=torch.bool, device=cosine.device)
        inside[:, 0], best = True, cosine[:, 0]
        for _ in range(part - 1):
            value, new = best.masked_fill(inside, -2).max(1)
            found.append(value)
            inside[parts, new] = True
            best = torch.maximum(best, cosine[parts, new])
    found = torch.cat(found) if found else torch.empty(0)
    # less a margin: another block shape rounds its products in another way
    return found.topk(count).values[-1].item() - 1e-5 if len(found) >= count else -2.0


def find_groups(x, block, eps=None, remove=None, buffer=2**22):
    """Connected components of the graph that links vectors closer than ε (A1), as single linkage.

    x: Rows or unit vectors (n, d). eps: Euclidean distance, ‖a-b‖² = 2 - 2 cos; or remove: the share of vectors that
    are to go when one of each group stays. Returns (the lowest member of each vector's group (n,), ε, number of pairs
    closer than ε or None).

    For every ε at once, the groups are the components of the maximum spanning tree without its edges beyond ε, and
    each edge left removes one vector. So `remove` is met in one pass, exactly but for ties, by the best remove * n
    edges of that tree; and the remove * n-th best edge so far is a floor: worse pairs need no look. Equal cosines go
    together, whichever of both sides is nearer to `remove`.
    """
    n = len(x)
    count = 0 if remove is None else min(round(remove * n), n - 1)
    if eps is None and count == 0:
        return torch.arange(n), 0.0, None
    floor = 1 - eps ** 2 / 2 if eps is not None else lower_bound(x, count, block)
    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    edges, waiting, size, pairs = (nothing, nothing, nothing.float()), [], 0, 0  # the forest so far, best first

    def merge(parts):
        i, j, cosine = (torch.cat(each) for each in zip(*parts))
        order = (i * n + j).argsort()  # equal cosines in the order of the pairs, so that the forest is unique
        order = order[cosine[order].argsort(descending=True, stable=True)]
        i, j, cosine = i[order], j[order], cosine[order]
        used, _ = spanning_forest(n, i, j)
        return i[used], j[used], cosine[used]

    for found in near_pairs(x, lambda: floor, block):
        waiting.append(found)
        size += len(found[0])
        pairs += len(found[0])
        if size > max(buffer, 2 * n):
            edges, waiting, size = merge([*waiting, edges]), [], 0
            if eps is None and len(edges[2]) >= count:
                floor = max(floor, edges[2][count - 1].item() - 1e-5)
    i, j, cosine = merge(common.gather_objects(tuple(part.cpu() for part in merge([*waiting, edges]))))
    if eps is None:
        count, floor = cut_at(cosine, count)
        i, j, eps, pairs = i[:count], j[:count], math.sqrt(max(0.0, 2 - 2 * floor)), None
    else:
        pairs = sum(common.gather_objects(pairs))
    return spanning_forest(n, i, j)[1], eps, pairs


def cut_at(cosine, count):
    """(how many edges, threshold): the cut nearest to `count` that separates no equal cosines, sorted best first."""
    worst = cosine[count - 1]
    better, as_good = int((cosine > worst + 1e-6).sum()), int((cosine >= worst - 1e-6).sum())
    cut = better if count - better < as_good - count else as_good
    if cut == 0:
        return 0, 1.0
    below = cosine[cut].item() if cut < len(cosine) else cosine[cut - 1].item() - 2e-6
    return cut, (cosine[cut - 1].item() + max(below, cosine[cut - 1].item() - 2e-6)) / 2


def centres(x, group, block):
    """Of each group, the member nearest to its normalised mean (A2), the first of those within 1e-6.

    Returns their positions, ascending. x: Rows or unit vectors (n, d); group: (n,), on the CPU. At most
    `block` vectors are held at a time.
    """
    sizes = torch.bincount(group, minlength=len(group))
    alone, names = (sizes == 1).nonzero().squeeze(1), (sizes > 1).nonzero().squeeze(1)
    members = group.argsort(stable=True)
    members = members[sizes[group[members]] > 1]
    ends, kept, start = sizes[names].cumsum(0), [alone], 0
    for first in range(0, len(names), block):
        last = min(first + block, len(names))
        chunk = members[start:ends[last - 1]].split(block)
        local = [torch.searchsorted(names[first:last], group[part]) for part in chunk]
        total = 0
        for part, own in zip(chunk, local):
            rows = x[part]
            total = total + rows.new_zeros(last - first, rows.shape[1]).index_add(0, own.to(rows.device), rows)
        mean = unit(total)
        cosine = torch.cat([(x[part] * mean[own.to(mean.device)]).sum(1).cpu() for part, own in zip(chunk, local)])
        local, chunk = torch.cat(local), members[start:ends[last - 1]]
        best = torch.full((last - first,), -2.0).scatter_reduce(0, local, cosine, "amax")
        near = cosine >= best[local] - 1e-6
        kept.append(torch.full((last - first,), len(group)).scatter_reduce(0, local[near], chunk[near], "amin"))
        start = ends[last - 1]
    return torch.cat(kept).sort().values


def semdedup(x, centroids, label, block):
    """SemDeDup (Abbas et al. 2023): each vector's largest cosine with one of its own cluster that is farther from the
    centroid, (n,); -1 for the farthest. Removing the scores above 1 - ε²/2 leaves the least typical of near copies."""
    score = torch.full((len(x),), -1.0)
    for cluster in label.unique().tolist():
        members = (label == cluster).nonzero().squeeze(1)
        rows = x[members]
        farthest_first = (rows @ centroids[cluster].to(rows.device)).argsort(stable=True)
        members, rows = members[farthest_first.cpu()], rows[farthest_first]
        for start in range(0, len(rows), block):
            cosine = rows[start:start + block] @ rows.T
            earlier = torch.ones_like(cosine, dtype=torch.bool).tril(start - 1)
            score[members[start:start + block]] = cosine.masked_fill(~earlier, -1).amax(1).cpu()
    return score


# ---------------------------------------------------------------------------------------------------- spherical k-means


def kmeans(x, k, iterations, seed, block):
    """Spherical k-means: k unit centroids that maximise the mean cosine of the vectors with their nearest centroid.

    x: Rows or unit vectors (n, d). Returns centroids (k, d), labels (n,), and the objective before each iteration and
    at the end. Every vector takes part in every iteration. Processes share the blocks and sum in float64. UserError if
    k > n.
    """
    if k > len(x):
        raise UserError(f"--k {k}: there are only {len(x):,} vectors to cluster")
    centroids, objective = common.of_first(seed_centroids(x, k, seed)), []
    for iteration in tqdm(range(iterations + 1), "k-means", disable=None if rank() == 0 else True):
        label, cosine = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x))
        total = centroids.new_zeros(k, centroids.shape[1], dtype=torch.float64)
        for start in range(0, len(x), block)[rank()::world_size()]:
            rows = x[start:start + block]
            nearest, near = nearest_centroid(rows, centroids, block)
            label[start:start + block], cosine[start:start + block] = nearest.cpu(), near.cpu()
            total.index_add_(0, nearest, rows.double())
        label, cosine = (common.sum_over_processes(each.to(total.device)).cpu() for each in (label, cosine))
        objective.append(cosine.double().mean().item())
        if iteration == iterations:
            return centroids, label, objective
        centroids = unit(common.sum_over_processes(total))
        empty = (torch.bincount(label, minlength=k) == 0).nonzero().squeeze(1)
        if len(empty):  # they start again at the vectors that are worst served, different ones
            centroids[empty.to(centroids.device)] = x[cosine.argsort(stable=True)[:len(empty)]]


def nearest_centroid(rows, centroids, block):
    """The nearest of k centroids to each row, and its cosine, (m,) each; ties go to the first."""
    best, nearest = rows.new_full((len(rows),), -2.0), torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, len(centroids), block):
        value, index = (rows @ centroids[start:start + block].T).max(1)
        better = value > best
        best, nearest = torch.where(better, value, best), torch.where(better, index + start, nearest)
    return nearest, best


def seed_centroids(x, k, seed):
    """k-means++ on at most 32 * k of the vectors, drawn at random: the first centroid is any of them, each next one is
    drawn with a probability proportional to 1 - its cosine with the nearest before it.

    Beyond k = 100 several are drawn at once, k / 100 a round, so that the work is matrix products.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = x[torch.randperm(len(x), generator=generator)[:32 * k].sort().values]
    chosen = torch.randint(len(rows), (1,), generator=generator)
    best = (rows @ rows[chosen].T).squeeze(1)
    while len(chosen) < k:
        chance = (1 - best.cpu().double()).clamp_min(0)
        chance[chosen] = 0
        chance = chance if (chance > 0).sum() >= k // 100 + 1 else chance + 1e-12  # copies of what is chosen
        chance[chosen] = 0
        # exponential races: the smallest of Exp(1) / weight are a weighted draw without replacement, of any length
        race = -torch.rand(len(rows), generator=generator, dtype=torch.float64).log() / chance
        new = race.topk(min(max(1, k // 100), k - len(chosen)), largest=False).indices
        best = torch.maximum(best, (rows @ rows[new].T).amax(1))
        chosen = torch.cat([chosen, new])
    return rows[chosen]


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


def sample_clusters(label, k, rate, seed):
    """The clusters a step contrasts, r k of them: the whole batch's own and random others, as in MLCD (A4).

    label (b,). Returns their numbers (S,), sorted, and the place of each label among them (b,). S = r k, but at least
    B, so that the own ones always fit and the host need not wait to count them. The same S on every process.
    """
    everyone = gather(label)
    generator = torch.Generator(device=label.device).manual_seed(seed)
    score = torch.rand(k, generator=generator, device=label.device)
    score[everyone] = 2.0
    chosen = score.topk(min(k, max(round(rate * k), len(everyone)))).indices.sort().values
    return chosen, torch.searchsorted(chosen, label)


def with_margin(cosine, margin_type, margin):
    """The cosine with the own prototype, made harder: cos θ - m (CosFace) or cos(θ + m) (ArcFace).

    ArcFace is differentiated as what it is, d cos(θ + m) / d cos θ = sin(θ + m) / sin θ. Where θ + m would pass π it
    goes on as cos θ - m sin m, so that it stays decreasing in θ.
    """
    if margin_type == "cosface":
        return cosine - margin
    sine = (1 - cosine.square()).clamp_min(1e-6).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))


def cluster_hard(cosine, target, scale, margin_type="none", margin=0.0):
    """L_hard = CE over S of s (cos_ij - m 1[j = y_i]); cosine (b, S) of student and prototypes, target (b,)."""
    if margin_type != "none":
        own = cosine.gather(1, target[:, None])
        cosine = cosine.scatter(1, target[:, None], with_margin(own, margin_type, margin))
    return F.cross_entropy(scale * cosine, target)


def cluster_kl(cosine, teacher_cosine, scale, teacher_scale):
    """L_kl = KL(softmax_S(s_t t_cos) || softmax_S(s cos)), mean over the rows (b, S), and the entropy of the former."""
    teacher = (teacher_scale * teacher_cosine).log_softmax(-1)
    loss = F.kl_div((scale * cosine).log_softmax(-1), teacher, reduction="batchmean", log_target=True)
    return loss, -(teacher.exp() * teacher).sum(-1).mean()


def contrast(scale, student, teacher):
    """CE(s<student_i, teacher_j>, diagonal): each of the student's b rows finds its own among the teacher's B."""
    b = len(student)
    target = torch.arange(rank() * b, (rank() + 1) * b, device=student.device)
    return F.cross_entropy(scale * student @ gather(teacher).T, target)


# --------------------------------------------------------------------------------------------------------------- method


class CLIPCID(nn.Module):
    """The student, and what only its training needs: projections to the teacher's width, prototypes, a second scale.

        u, v = student(image), student(caption)                                                        embed
        L_CLIP(u, v) + α L_cluster(P_v u, label, t) + β L_inst(P_v u, P_t v, t^I, t^T)                  loss
    """

    def __init__(self, cfg, centroids=None, teacher_logit_scale=None):
        """centroids (k, T): the teacher's, None for method "clip"; teacher_logit_scale: log of its softmax scale."""
        super().__init__()
        self.cfg, self.student = cfg, CLIP(cfg)
        if cfg.method == "clip":
            return
        k, width = centroids.shape
        self.project_image = nn.Linear(cfg.embed_dim, width, bias=False)  # P_v
        self.project_text = nn.Linear(cfg.embed_dim, width, bias=False)  # P_t
        self.distil_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("centroids", unit(centroids))
        self.register_buffer("teacher_logit_scale", torch.tensor(float(teacher_logit_scale)))
        if cfg.prototypes != "teacher":
            start = self.centroids.clone() if cfg.prototypes == "learned-from-teacher" else torch.randn(k, width)
            self.prototypes = nn.Parameter(unit(start))

    def embed(self, image, text):
        """u (b, E) and v (b, E), with gradient."""
        return self.student.encode_image(image), self.student.encode_text(text)

    def loss(self, u, v, targets, seed):
        """The loss and its terms. targets: the teacher's t^I and t^T (b, T) and the cluster labels (b,), or None."""
        cfg = self.cfg
        nce = info_nce(similarities(self.student.logit_scale.exp(), u, v))
        if targets is None:
            return nce, {"nce": nce.detach()}
        t_image, t_text, label = targets
        p, q = unit(self.project_image(u)), unit(self.project_text(v))  # P_v u and P_t v, (b, T)
        total, terms = nce, {"nce": nce}
        if cfg.cluster_weight:
            found = self.cluster_loss(p, q, t_image, t_text, label, seed)
            parts = {"both": ("hard", "kl"), "hard": ("hard",), "kl": ("kl",)}[cfg.cluster_terms]
            total = total + cfg.cluster_weight * sum(found[f"cluster_{part}"] for part in parts)
            terms.update(found)
        if cfg.instance_weight:
            terms["instance"] = self.instance_loss(u, v, p, q, t_image, t_text)
            total = total + cfg.instance_weight * terms["instance"]
        if cfg.feature_weight:  # CLIP-KD's FD
            terms["mimicry"] = F.mse_loss(p, t_image) + F.mse_loss(q, t_text)
            total = total + cfg.feature_weight * terms["mimicry"]
        return total, {name: term.detach() for name, term in terms.items()}

    def cluster_loss(self, p, q, t_image, t_text, label, seed):
        """L_hard and L_kl (A4) of the images, or the mean of images and texts with --text-cluster.

        The teacher's side of the KL are the features that were clustered (of the texts, the caption drawn), against
        their own frozen centroids.
        """
        cfg, centroids = self.cfg, self.centroids
        prototypes = centroids if cfg.prototypes == "teacher" else unit(self.prototypes)
        if cfg.sample_rate < 1:
            chosen, label = sample_clusters(label, len(centroids), cfg.sample_rate, seed)
            centroids, prototypes = centroids[chosen], prototypes[chosen]
        t = {"image": t_image, "text": t_text, "joint": unit(t_image + t_text)}[cfg.cluster_features]
        sides = [side @ prototypes.T for side in ((p, q) if cfg.text_cluster else (p,))]  # (b, S) each
        teacher = t @ centroids.T
        hard = sum(cluster_hard(cosine, label, cfg.cluster_scale, cfg.margin_type, cfg.margin) for cosine in sides)
        kl, entropy = zip(*(cluster_kl(cosine, teacher, cfg.cluster_scale, cfg.teacher_scale) for cosine in sides))
        return {"cluster_hard": hard / len(sides), "cluster_kl": sum(kl) / len(sides), "teacher_entropy": entropy[0]}

    def instance_loss(self, u, v, p, q, t_image, t_text):
        """L_inst (A5); every contrast is against the teacher's embeddings of the whole batch."""
        scale = self.distil_scale.exp()
        if self.cfg.instance == "logit-kl":  # in the student's own width, no projection
            return distillation(similarities(self.teacher_logit_scale.exp(), t_image, t_text),
                                similarities(self.student.logit_scale.exp(), u, v))
        cross = (contrast(scale, p, t_text) + contrast(scale, q, t_image)) / 2
        if self.cfg.instance == "cross":
            return cross
        intra = (contrast(scale, p, t_image) + contrast(scale, q, t_text)) / 2
        return intra if self.cfg.instance == "intra" else (cross + intra) / 2


# ------------------------------------------------------------------------------------- stages before the distillation


def feature_rows(embeddings, cfg, rows, device):
    """The vectors that --cluster-features names, of these rows; texts: the first caption's."""
    if cfg.cluster_features != "image" and embeddings.text is None:
        raise UserError(f"--cluster-features {cfg.cluster_features}: --embeddings holds one kind of vectors")
    image, text = embeddings.image, None if embeddings.text is None else embeddings.text[:, 0]
    return common.Rows({"image": [image], "text": [text], "joint": [image, text]}[cfg.cluster_features], rows, device)


def teacher_file(cfg):
    """The checkpoint of the teacher. UserError when there is none."""
    if not cfg.teacher and cfg.data != "emoji":
        raise UserError("--teacher FILE is needed: any OpenAI, OpenCLIP or Hugging Face CLIP ViT checkpoint")
    path = Path(cfg.teacher or DEMO_TEACHER)
    if not path.is_file():
        raise UserError(f"{path} is a folder: name the checkpoint file in it" if path.is_dir() else
                        f"no teacher at {path}; --stage teacher makes one for the emoji scenes")
    return path


def load_teacher(cfg, device):
    """(CLIP in eval mode, its Config) of --teacher, in --teacher-precision."""
    weights, sizes = common.read_clip(teacher_file(cfg), cfg.teacher_act)
    teacher_cfg = replace(cfg, **sizes, grad_checkpoint=False)
    with torch.device("meta"):  # a bigG has 2.5 G parameters: no need to draw them first
        teacher = CLIP(teacher_cfg)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.teacher_precision]
    common.load_weights(teacher, {name: tensor.to(precision) if tensor.ndim else tensor
                                  for name, tensor in weights.items()})
    return teacher.to(device).eval().requires_grad_(False), teacher_cfg


def start_embeddings(path, info, data, keys, width):
    """The files of common.Embeddings, every number NaN."""
    common.make_folder(path.parent)
    common.write_keys(path.with_name("keys.txt"), keys)
    for name, shape in (("image", (len(keys), width)), ("text", (len(keys), common.number_of_captions(data), width))):
        np.lib.format.open_memmap(path.with_name(f"{name}.npy"), "w+", np.float16, shape)[:] = np.nan
    common.write_json(path, info)


@torch.no_grad()
def embed(cfg, data, device):
    """--stage embed: the teacher's embeddings of the training set, in --cache; goes on where it was interrupted."""
    path, keys = Path(cfg.cache or cfg.out) / "embeddings.json", [data.key(i) for i in range(len(data))]
    made_from = {"teacher": common.digest(common.file_digest(teacher_file(cfg)), cfg.teacher_act, cfg.teacher_precision,
                                          common.config_beside(teacher_file(cfg))),
                 "data": common.data_digest(data, keys)}
    if common.on_first(path.is_file):
        found = common.read_product(path)
        common.check_product(path, found, made_from)
        if found["complete"]:
            return common.Embeddings(path.parent)
    teacher, teacher_cfg = load_teacher(cfg, device)
    info = {**made_from, "teacher_file": str(teacher_file(cfg)), "logit_scale": teacher.logit_scale.item(),
            "complete": False}
    common.on_first(lambda: path.is_file() or start_embeddings(path, info, data, keys, teacher_cfg.embed_dim))
    embeddings = common.Embeddings(path.parent, mode="r+")
    todo = common.on_first(lambda: np.flatnonzero(np.isnan(embeddings.image[:, 0])))
    try:
        embed_rows(cfg, data, embeddings, np.array_split(todo, world_size())[rank()], teacher, teacher_cfg, device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped while embedding; the same command with --out {cfg.out} goes on") from None
    common.gather_objects("done")
    common.on_first(lambda: common.write_json(path, {**info, "complete": True}))
    return common.Embeddings(path.parent)


def embed_rows(cfg, data, embeddings, rows, teacher, teacher_cfg, device):
    """Fill these rows of the embeddings; zeros where an image cannot be read."""
    statistics = 255 * torch.tensor(common.PIXELS[teacher_cfg.pixel_stats], device=device).view(2, 3, 1, 1)
    tokenizer = common.CLIPTokenizer(teacher_cfg.context_length, teacher_cfg.vocab_size)
    loader = common.eval_loader(common.Subset(data, rows), teacher_cfg.image_size, 256, common.loader_workers(cfg))
    captions, read = embeddings.text.shape[1], []
    with tqdm(total=len(rows), desc="embedding", unit="image", disable=None if rank() == 0 else True) as bar:
        for images, places, texts in loader:
            u = teacher.encode_image(normalise(images, statistics).to(teacher.visual.proj.dtype))
            texts = [text for own in texts for text in (own * captions)[:captions]]
            v = teacher.encode_text(common.trim_padding(tokenizer(texts)).to(device)).view(len(u), captions, -1)
            if not (u.isfinite().all() and v.isfinite().all()):
                raise UserError(f"{teacher_file(cfg)} gives embeddings that are NaN: try --teacher-precision fp32")
            read += places
            embeddings.text[rows[places]] = v.half().cpu().numpy()
            embeddings.image[rows[places]] = u.half().cpu().numpy()
            bar.update(len(u))
    unreadable = np.delete(rows, read)
    embeddings.text[unreadable], embeddings.image[unreadable] = 0, 0
    embeddings.text.flush(), embeddings.image.flush()


@common.exact_products
def balance(cfg, embeddings, device):
    """--stage balance: the rows that --filter keeps; kept.txt holds their keys, balance.json the figures."""
    rows, path = common.usable_rows(embeddings), Path(cfg.out) / "kept.txt"
    if cfg.keep:
        rows = np.intersect1d(rows, common.listed(embeddings.keys, cfg.keep))
    if cfg.filter == "none":
        return rows
    how = {"filter": cfg.filter, "setting": f"--eps {cfg.eps:g}" if cfg.eps else f"--remove {cfg.remove:g}"}
    if cfg.filter != "balance":
        how["seed"] = cfg.seed
    if cfg.filter == "semdedup":
        how.update(k=cfg.k, kmeans_iters=cfg.kmeans_iters)
    how.update({"embeddings": embeddings.fingerprint, "data": common.digest(rows.tolist())})
    if not common.on_first(path.is_file):
        chosen, group, figures = choose(cfg, common.Rows([embeddings.image], rows, device))
        if len(chosen) < 2 <= len(rows):
            raise UserError(f"one image of {len(rows):,} would be left: lower {'--eps' if cfg.eps else '--remove'}")
        keys = [embeddings.keys[row] for row in rows[chosen.numpy()]]
        report = {"images": len(rows), "kept": len(keys), "removed_share": 1 - len(keys) / len(rows), **figures,
                  "made_from": how, "digest": common.digest(keys)}
        common.on_first(lambda: write_kept(path, keys, rows, group, report))
    return read_kept(cfg, path, how, embeddings)


def choose(cfg, x):
    """What --filter keeps of x: (positions, sorted; the group of each vector or None; figures for balance.json)."""
    count = round(cfg.remove * len(x))
    if cfg.filter == "random":
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(cfg.seed))
        return order[count:].sort().values, None, {}
    if cfg.filter == "semdedup":
        centroids, label, _ = kmeans(x, cfg.k, cfg.kmeans_iters, cfg.seed, cfg.block)
        score = semdedup(x, centroids, label, cfg.block)
        if cfg.eps:
            return (score <= 1 - cfg.eps ** 2 / 2).nonzero().squeeze(1), None, {}
        return score.argsort(stable=True)[:len(x) - count].sort().values, None, {}
    group, eps, pairs = find_groups(x, cfg.block, cfg.eps, None if cfg.eps else cfg.remove)
    sizes = torch.bincount(group).sort(descending=True).values
    return centres(x, group, cfg.block), group, {
        "eps": eps, "pairs": pairs, "groups": int((sizes > 1).sum()), "largest": sizes[:10].tolist()}


def write_kept(path, keys, rows, group, report):
    common.make_folder(path.parent)
    path.with_name("balance.png").unlink(missing_ok=True)
    path.with_name("groups.npz").unlink(missing_ok=True)
    if group is not None:
        common.write_arrays(path.with_name("groups.npz"), row=rows, group=rows[group.numpy()])
    common.write_json(path.with_name("balance.json"), report)
    common.write_keys(path, keys)  # last: its presence says that the stage is done


def read_kept(cfg, path, how, embeddings):
    """The rows in kept.txt. UserError when it was made otherwise, or changed since."""
    report = common.read_product(path.with_name("balance.json"))
    common.check_product(path, report["made_from"], how)
    keys = common.read_keys(path)
    if common.digest(keys) != report["digest"]:
        raise UserError(f"{path} was changed since it was made: move it away and give it as --keep with --filter none")
    tell(report, cfg)
    row_of = {key: row for row, key in enumerate(embeddings.keys)}
    return np.array([row_of[key] for key in keys])


def tell(report, cfg):
    """What the filter did, in a few lines."""
    if rank() > 0:
        return
    share = report["removed_share"]
    print(f"{cfg.filter}: {report['kept']:,} of {report['images']:,} images kept, {share:.1%} removed")
    if "eps" not in report:
        return
    pairs = f", {report['pairs']:,} pairs closer than that" if report["pairs"] is not None else ""
    print(f"ε = {report['eps']:.4f} (cosine distance {report['eps'] ** 2 / 2:.4f}){pairs}; {report['groups']:,} groups "
          f"of two or more, the largest {' '.join(map(str, report['largest'][:5]))}")
    if not cfg.eps and abs(share - cfg.remove) > 0.005:
        print(f"--remove {cfg.remove:g} is not reachable: many pairs have the same distance; this is the nearest")
    if report["largest"][0] > 0.01 * report["images"]:
        print(f"warning: the largest group holds {report['largest'][0] / report['images']:.1%} of the images: chains "
              "of neighbours join images that are far apart; lower --eps or --remove")


@common.exact_products
def cluster(cfg, embeddings, kept, device):
    """--stage cluster: (centroids (k, T), a label per kept row); clusters.npz holds them, with rows and objective."""
    path = Path(cfg.out) / "clusters.npz"
    how = {"k": cfg.k, "kmeans_iters": cfg.kmeans_iters, "seed": cfg.seed, "cluster_features": cfg.cluster_features,
           "embeddings": embeddings.fingerprint, "kept images": common.digest(kept.tolist())}
    if common.on_first(path.is_file):
        try:
            with np.load(path) as found:
                made_from, centroids, label = json.loads(str(found["made_from"])), found["centroids"], found["label"]
        except Exception as error:  # numpy and zipfile raise errors of many types on damaged files
            raise UserError(f"{path} is damaged: delete it") from error
        common.check_product(path, made_from, how)
        return torch.from_numpy(centroids), torch.from_numpy(label)
    if cfg.k > len(kept):
        raise UserError(f"--k {cfg.k}: only {len(kept):,} images are left to cluster")
    x = feature_rows(embeddings, cfg, kept, device)
    centroids, label, objective = kmeans(x, cfg.k, cfg.kmeans_iters, cfg.seed, cfg.block)
    if rank() == 0:
        common.make_folder(path.parent)
        common.write_arrays(path, centroids=centroids.cpu().numpy(), label=label.numpy(), row=kept, objective=objective,
                            made_from=json.dumps(how))
        path.with_name("clusters.png").unlink(missing_ok=True)
        sizes = torch.bincount(label, minlength=cfg.k)
        common.plot_kmeans(path.with_name("kmeans.png"), objective, sizes.numpy())
        low, middle, high = np.quantile(sizes, [0.1, 0.5, 0.9])
        print(f"k-means: {cfg.k} clusters, mean cosine {objective[0]:.4f} -> {objective[-1]:.4f}; images per cluster: "
              f"{int(sizes.min())} to {int(sizes.max())}, median {middle:.0f}, a tenth below {low:.0f}, a tenth above "
              f"{high:.0f}")
    return centroids.cpu(), label


class TaughtSamples(common.TrainSamples):
    """TrainSamples with the teacher's embeddings of the image and of the caption drawn, fp16 (T,), and the cluster.

    row (n,): the embeddings' row of each sample, found by key; label (n,).
    """

    def __init__(self, data, tokenizer, cfg, embeddings, row, label):
        super().__init__(data, tokenizer, cfg.image_size, (cfg.crop_scale, 1.0), cfg.seed)
        self.embeddings, self.row, self.label = embeddings, row, label

    def __getitem__(self, place):
        image, tokens, bad, index, caption = self.draw(place, self.embeddings.text.shape[1])
        t_image, t_text = self.embeddings.image[self.row[index]], self.embeddings.text[self.row[index], caption]
        return image, tokens, bad, torch.from_numpy(t_image.copy()), torch.from_numpy(t_text.copy()), self.label[index]


# ------------------------------------------------------------------------------------------------------------- training


def run_stages(cfg, device, last):
    """embed, balance and cluster up to `last`, with their pictures: (data or None, embeddings, kept rows or None,
    centroids and labels or None)."""
    data = None if cfg.embeddings else common.training_set(replace(cfg, keep=None))
    embeddings = common.ForeignEmbeddings(cfg.embeddings, cfg.keys) if cfg.embeddings else embed(cfg, data, device)
    kept = clusters = None
    if last in ("balance", "cluster"):
        kept = balance(cfg, embeddings, device)
        draw_groups(cfg, data, embeddings)
    if last == "cluster":
        clusters = cluster(cfg, embeddings, kept, device)
        draw_clusters(cfg, data, embeddings, kept, *clusters)
    return data, embeddings, kept, clusters


def prepare(cfg, device, tokenizer):
    """(training samples, {"centroids", "teacher_logit_scale"} for the model): the stages before the distillation."""
    crop = (cfg.crop_scale, 1.0)
    if not needs_teacher(cfg):
        return common.TrainSamples(common.training_set(cfg), tokenizer, cfg.image_size, crop, cfg.seed), {}
    data, embeddings, kept, clusters = run_stages(cfg, device, "balance" if cfg.method == "clip" else "cluster")
    data = common.Subset(data, common.find_samples(data, embeddings, kept))
    if cfg.method == "clip":
        return common.TrainSamples(data, tokenizer, cfg.image_size, crop, cfg.seed), {}
    centroids, label = clusters
    samples = TaughtSamples(data, tokenizer, cfg, embeddings, kept, label)
    return samples, {"centroids": centroids, "teacher_logit_scale": embeddings.logit_scale}


def build(cfg, weights=None, **from_teacher):
    """CLIPCID with fresh weights, or with those of a CLIP checkpoint in OpenAI's naming for the student."""
    model = CLIPCID(cfg, **from_teacher)
    if weights:
        rows = model.student.visual.positional_embedding.shape[0]
        key = "visual.positional_embedding"
        common.load_weights(model.student, {**weights, key: common.resize_positions(weights[key], rows)})
    return model


def build_optimiser(model, cfg, device):
    """AdamW, weight decay on matrices only; fused where the device has it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), eps=cfg.adam_eps, fused=fused)


def schedules(cfg, step, steps, steps_per_epoch):
    """{"lr"} at a step."""
    def cosine(start, end, share):  # from start at share 0 to end at share 1
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    warmup = cfg.warmup * steps_per_epoch
    if step < warmup:
        lr = cfg.lr_start + (cfg.lr - cfg.lr_start) * step / warmup
    else:
        lr = cosine(cfg.lr, cfg.lr_end, (step - warmup) / max(1, steps - warmup))
    return {"lr": lr}


def backward(model, image, text, targets, amp, scaler, seed):
    """Backpropagate one batch; returns the loss and its terms, on the device.

    With --accum k > 1 the batch is embedded without graph, the loss is taken on all of it, and its gradient with
    respect to the embeddings is carried into the towers chunk by chunk: the full-batch gradient, in a chunk's memory.
    The loss is evaluated once, so scales, projections and prototypes receive their gradient once.
    """
    k = model.cfg.accum
    images, texts = image.chunk(k), text.chunk(k)

    def embed_chunk(i):
        with amp:
            return model.embed(images[i], texts[i])

    with torch.set_grad_enabled(k == 1):
        u, v = cat_features(embed_chunk(i) for i in range(k))
    if k > 1:
        u.requires_grad_(), v.requires_grad_()
    loss, terms = model.loss(u, v, targets, seed)
    scaler.scale(loss).backward()
    if k > 1:
        for i, gradients in enumerate(zip(u.grad.chunk(k), v.grad.chunk(k))):
            torch.autograd.backward(embed_chunk(i), gradients)
    return {"loss": loss.detach(), **terms}


def cat_features(chunks):
    """[(u, v), (u, v), ...] -> (u, v)"""
    return tuple(torch.cat(parts) for parts in zip(*chunks))


def normalise(image, statistics):
    """(B, 3, S, S) uint8 -> float on the device of the statistics: mean and std of the channels, (2, 3, 1, 1)."""
    mean, std = statistics
    return image.to(mean.device, non_blocking=True).float().sub_(mean).div_(std)


def update(model, optimiser, scaler, lr):
    """One optimiser step on the processes' mean gradient, then the clamp of the scales."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    average_gradients(model.parameters())
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        for scale in (model.student.logit_scale, getattr(model, "distil_scale", None)):
            if scale is not None:
                scale.clamp_(0, math.log(100))


def train(cfg, weights=None):
    """Prepare the data, distil, validate after every epoch, evaluate at the end; returns what results.json holds."""
    device = common.start_device(cfg.device, cfg.seed)
    run = Run(cfg.out, {"log.csv": LOG_COLUMNS, "timing.csv": common.TIMING_COLUMNS})
    run.check_free(cfg)
    sets = cache(partial(common.evaluation_sets, cfg))  # "val" or "test" -> {name: set}
    sets("val"), sets("test")  # what is missing is said before training
    samples, from_teacher = prepare(cfg, device, common.CLIPTokenizer(cfg.context_length, cfg.vocab_size))
    torch.manual_seed(cfg.seed)
    model = build(cfg, weights, **from_teacher).to(device)
    optimiser, (amp, scaler) = build_optimiser(model, cfg, device), common.mixed_precision(cfg, device)
    parts = {"model": model, "optimiser": optimiser, "scaler": scaler}
    state = run.load_state(**parts) if cfg.resume else {}
    state = state or {"step": 0, "best": -1.0, "best_step": 0, "bad": 0}
    prepare_towers(model, cfg)
    evaluator = Evaluator(model.student, cfg, device, amp, "student", sets)
    total = max(1, cfg.samples // cfg.batch_size) if cfg.samples else cfg.epochs * (len(samples) // cfg.batch_size)
    sampler = common.StepSampler(len(samples), cfg.batch_size, total, state["step"], cfg.seed, rank(), world_size())
    run.start(cfg, state["step"])
    loader = common.train_loader(samples, sampler, common.loader_workers(cfg), device.type)
    progress = common.Progress(sampler, state["step"], cfg.batch_size, device)
    with common.StopRequest() as stop, progress:
        for image, text, bad, *targets in progress.watch(loader):
            now = schedules(cfg, state["step"], sampler.steps, sampler.steps_per_epoch)
            image, text = normalise(image, evaluator.statistics), text.to(device, non_blocking=True)
            targets = to_device(targets, device)
            terms = backward(model, image, text, targets, amp, scaler, seed=cfg.seed * 10 ** 9 + state["step"])
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
                run.log("log.csv", row)
                progress.show(row, chance=math.log(cfg.batch_size), line=epoch_ends)
            if epoch_ends or stopping or state["step"] % cfg.save_every == 0:
                run.save_state(cfg, state, **parts)
            if stopping:
                raise KeyboardInterrupt(f"stopped at step {state['step']}; --resume --out {run.folder} goes on")
    return finish(run, evaluator, state)


def to_device(targets, device):
    """(t^I, t^T, label) of a batch: the embeddings as unit rows (b, T); None when there is no teacher."""
    if not targets:
        return None
    *embedded, label = (part.to(device, non_blocking=True) for part in targets)
    return *map(unit, embedded), label


LOG_COLUMNS = ["step", "epoch", "lr", "loss", "nce", "cluster_hard", "cluster_kl", "teacher_entropy", "instance",
               "mimicry", "logit_scale", "distil_scale", "val_student"]


def log_row(model, state, sampler, now, terms):
    """The row of log.csv: the one place where the host waits for the device. FloatingPointError when diverged."""
    values = common.mean_over_processes(terms)
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"the loss is {values['loss']} at step {state['step']}: lower --lr, lengthen --warmup "
                                 "or use --precision fp32 (a checkpoint saved before it diverged is kept)")
    row = {"step": state["step"], "epoch": state["step"] / sampler.steps_per_epoch, **now, **values,
           "logit_scale": model.student.logit_scale.exp().item()}
    if hasattr(model, "distil_scale"):
        row["distil_scale"] = model.distil_scale.exp().item()
    return row


def prepare_towers(model, cfg):
    """--grad-checkpoint and --compile, after the weights are loaded."""
    for tower in (model.student.visual.transformer, model.student.transformer):
        tower.grad_checkpoint = cfg.grad_checkpoint
    if cfg.compile:
        for tower in (model.student.visual, model.student.transformer):
            tower.compile()  # in place: the parameter names stay as they are


# ------------------------------------------------------------------------------------------------- evaluation, pictures


class Evaluator:
    """The encoders of a CLIP as functions, by a name."""

    def __init__(self, clip, cfg, device, amp, name, sets=None):
        self.clip, self.cfg, self.device, self.amp, self.name = clip, cfg, device, amp, name
        self.sets = sets or cache(partial(common.evaluation_sets, cfg))  # "val" or "test" -> {name: set}
        self.tokenizer = common.CLIPTokenizer(cfg.context_length, cfg.vocab_size)
        self.statistics = 255 * torch.tensor(common.PIXELS[cfg.pixel_stats], device=device).view(2, 3, 1, 1)

    def encoders(self):
        """{name: (image encoder, text encoder)}: (B, 3, S, S) uint8 -> (B, E); (T, context) token ids -> (T, E)."""
        return {self.name: (self.encode_image, self.encode_text)}

    def encode_image(self, image):
        with self.amp:
            return self.clip.encode_image(normalise(image, self.statistics).to(self.clip.visual.proj.dtype))

    def encode_text(self, tokens):
        with self.amp:
            return self.clip.encode_text(tokens.to(self.device))

    def scores(self, encoders, split):
        """{evaluation set: {encoder: {metric: percent}}}"""
        return {name: common.evaluate(encoders, self.tokenizer, data, self.cfg)
                for name, data in self.sets(split).items()}

    def cell(self):
        """{metric: value} of the test sets, their mean, and the linear probe when it was asked for."""
        cell = common.flatten(self.scores(self.encoders(), "test"), self.name)
        if self.cfg.linear_probe:
            cell.update(common.probe({self.name: self.encode_image}, self.cfg)[self.name])
        return common.with_means(cell)


def validate(run, evaluator, state):
    """{"val_student"}: main metric of the first validation set; keeps the best student as best.pt."""
    if rank() > 0:
        return {}
    scores = evaluator.scores(evaluator.encoders(), "val")
    if not scores:
        return {}
    value = common.main_metric(next(iter(scores.values()))["student"])
    if value > state["best"]:
        state["best"], state["best_step"] = value, state["step"]
        run.save("best.pt", exported(evaluator))
    return {"val_student": value}


def exported(evaluator):
    """The student alone, under OpenAI's parameter names: nothing of the distillation is left in it."""
    return {"model": evaluator.clip.state_dict(), "config": asdict(evaluator.cfg)}


def finish(run, evaluator, state):
    """Test scores, throughput, pictures, the student; returns what results.json holds (None on other processes)."""
    if rank() > 0:
        return None
    cfg, encoders = evaluator.cfg, evaluator.encoders()
    results = common.write_results(run, cfg, encoders, evaluator.scores(encoders, "test"), state, evaluator.device)
    run.save("student.pt", exported(evaluator))
    if cfg.stage == "teacher":
        half = {name: tensor.half() for name, tensor in evaluator.clip.state_dict().items()}
        run.save("teacher.pt", {"model": half, "config": asdict(cfg)})
        print(f"use it with --teacher {run.path('teacher.pt')}")
    examples = common.example_images(evaluator.sets("test"), cfg.image_size, 64)
    if examples is not None:
        images, captions = examples
        with torch.no_grad():
            scores = evaluator.encode_image(images) @ evaluator.encode_text(evaluator.tokenizer(captions)).T
        common.plot_retrieval(run.path("retrieval.png"), images, captions, scores)
    print(f"pictures, tables and checkpoints: {run.folder}")
    return results


def pictures_of(data, embeddings, lines, count, size):
    """[(count, 3, S, S) uint8]: for each list of rows of the embeddings their first images; the rest white."""
    indices = iter(common.find_samples(data, embeddings, [row for rows in lines for row in rows[:count]]))
    pictures = torch.full((len(lines), count, 3, size, size), 255, dtype=torch.uint8)
    for line, rows in zip(pictures, lines):
        for place in range(len(rows[:count])):
            line[place] = torch.from_numpy(common.resize_center_crop(data.read(next(indices))[0], size))
    return pictures


def draw_groups(cfg, data, embeddings, groups=10, shown=12):
    """balance.png: the largest groups, the kept image first and removed ones after it."""
    path = Path(cfg.out) / "balance.png"
    if rank() > 0 or cfg.filter != "balance" or data is None or path.exists() or not (
            path.with_name("groups.npz").is_file()):
        return
    with np.load(path.with_name("groups.npz")) as found:
        row, group = found["row"], found["group"]
    report, kept = common.read_json(path.with_name("balance.json")), set(common.read_keys(path.with_name("kept.txt")))
    names, sizes = np.unique(group, return_counts=True)
    lines, titles = [], []
    for name, size in sorted(zip(names, sizes), key=lambda pair: -pair[1])[:groups]:
        if size > 1:
            lines.append(sorted(row[group == name], key=lambda member: embeddings.keys[member] not in kept))
            titles.append(f"{size:,}\nimages")
    if lines:
        lines = pictures_of(data, embeddings, lines, shown, cfg.image_size)
        common.plot_grid(path, lines, titles, ["kept"] + ["removed"] * (shown - 1), "image semantic balance: "
                         f"{report['removed_share']:.1%} of {report['images']:,} images removed; the largest groups")


def draw_clusters(cfg, data, embeddings, kept, centroids, label, clusters=10, shown=12):
    """clusters.png: clusters from the largest to the smallest, the images nearest to the centroid first."""
    path = Path(cfg.out) / "clusters.png"
    if rank() > 0 or data is None or path.exists():
        return
    sizes = torch.bincount(label, minlength=len(centroids))
    by_size = sizes.argsort(descending=True)[:int((sizes > 0).sum())]
    lines, titles = [], []
    for number in by_size[torch.linspace(0, len(by_size) - 1, min(clusters, len(by_size))).long()].tolist():
        members = kept[(label == number).numpy()]
        cosine = feature_rows(embeddings, cfg, members, "cpu")[:] @ centroids[number]
        lines.append(members[cosine.argsort(descending=True).numpy()])
        titles.append(f"{len(members):,}\nimages")
    lines = pictures_of(data, embeddings, lines, shown, cfg.image_size)
    common.plot_grid(path, lines, titles, [""] * shown, f"{len(lines)} of {len(centroids)} clusters of "
                     f"the teacher's {cfg.cluster_features} embeddings, from the largest to the smallest; the images "
                     "nearest to the centroid first")


def evaluate_run(cfg):
    """--stage evaluate: the student of the run in --out beside its teacher; evaluation.json and similarities.png."""
    device, folder = common.start_device(cfg.device, cfg.seed), Path(cfg.out)
    if rank() > 0:
        return
    if not (folder / "student.pt").is_file():
        raise UserError(f"no trained student in {folder}: run --stage distil first")
    weights, sizes = common.read_clip(folder / "student.pt")
    student_cfg, amp = replace(cfg, **sizes), common.mixed_precision(cfg, device)[0]
    student = CLIP(student_cfg)
    common.load_weights(student, weights)
    teacher, teacher_cfg = load_teacher(cfg, device)
    evaluators = [Evaluator(student.to(device).eval(), student_cfg, device, amp, "student"),
                  Evaluator(teacher, teacher_cfg, device, amp, "teacher")]
    cells = {evaluator.name: evaluator.cell() for evaluator in evaluators}
    common.write_json(folder / "evaluation.json", cells)
    common.print_table(cells)
    matrices = {}
    for evaluator in evaluators:
        examples = common.example_images(evaluator.sets("test"), evaluator.cfg.image_size, 12)
        if examples is not None:
            with torch.no_grad():
                texts = evaluator.encode_text(evaluator.tokenizer(examples[1]))
                matrices[evaluator.name] = (evaluator.encode_image(examples[0]) @ texts.T).cpu()
    if matrices:
        common.plot_matrices(folder / "similarities.png", matrices, examples[1],
                             "cosines of test images (rows) and captions (columns)")


def evaluate_checkpoint(cfg, weights):
    """--evaluate: the test scores of a checkpoint, ours or a published one, and --linear-probe."""
    device = common.start_device(cfg.device, cfg.seed)
    clip = CLIP(cfg)
    common.load_weights(clip, weights)
    amp, name = common.mixed_precision(cfg, device)[0], Path(cfg.evaluate).stem
    common.print_table({name: Evaluator(clip.to(device).eval(), cfg, device, amp, name).cell()})


# ------------------------------------------------------------------------------------------------- profile and ablation


def profile(cfg):
    """--profile: parameters, MACs and images/s of student and teacher, and the time of a training step."""
    device = common.start_device(cfg.device, cfg.seed)
    amp, scaler = common.mixed_precision(cfg, device)
    models, cells = {"student": (CLIP(cfg).to(device).eval(), cfg), "teacher": load_teacher(cfg, device)}, {}
    for name, (clip, own) in models.items():
        encode = Evaluator(clip, own, device, amp, name).encode_image
        images = common.speed_probe(own, device)[:256 if device.type == "cuda" or own.image_size < 64 else 8]
        cells[name] = {"image_tower_M": count(clip.visual) / 1e6,
                       "text_tower_M": (count(clip) - count(clip.visual)) / 1e6,
                       "image_GMACs": macs(clip.visual, own, device) / 1e9,
                       "images_per_second": common.compare_speeds({name: encode}, images)[name]}
    common.print_table(cells)
    width, steps = models["teacher"][1].embed_dim, {}
    size = cfg.batch_size if device.type == "cuda" else min(cfg.batch_size, 64)
    images = torch.randn(size, 3, cfg.image_size, cfg.image_size, device=device)
    texts = torch.randint(1, cfg.vocab_size, (size, cfg.context_length), device=device)
    for method in ("clip", "clip_cid"):
        own, taught = replace(cfg, method=method), method == "clip_cid"
        model = build(own, **({"centroids": torch.randn(cfg.k, width), "teacher_logit_scale": 4.6} if taught else {}))
        optimiser = build_optimiser(model.to(device), own, device)
        targets = [torch.randn(size, width), torch.randn(size, width), torch.randint(cfg.k, (size,))] if taught else []
        steps[method] = partial(one_step, model, texts, to_device(targets, device), amp, scaler, optimiser)
        print(f"{method}: {(count(model) - count(model.student)) / 1e6:.2f} M parameters that only the training needs")
    speeds = common.compare_speeds(steps, images)
    print(f"training step, batch {size}: clip {speeds['clip']:.0f} images/s, clip_cid {speeds['clip_cid']:.0f} images/s"
          f", {speeds['clip'] / speeds['clip_cid']:.2f} times the time of a clip step")


def one_step(model, text, targets, amp, scaler, optimiser, images):
    with torch.inference_mode(False), torch.enable_grad():
        backward(model, images, text, targets, amp, scaler, seed=0)
        update(model, optimiser, scaler, lr=1e-4)


def count(module):
    return sum(p.numel() for p in module.parameters())


def macs(visual, cfg, device):
    """Multiply-adds of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, 3, cfg.image_size, cfg.image_size, device=device, dtype=visual.proj.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):  # the plain kernel: its two products are counted on every device
        visual(image)
    return counter.get_total_flops() / 2


def ablation_arms(cfg):
    """{name: the fields in which the arm differs from the flags given}

    Every arm sees as many samples as CLIP does in --epochs on all data, "equal epochs": as many passes over what is
    left of them. The warm-up takes as many steps everywhere.
    """
    seen = cfg.samples or cfg.epochs * len(common.training_set(cfg))
    plain, all_data = dict(method="clip"), dict(filter="none", warmup=cfg.warmup * (1 - cfg.remove))
    arms = {
        "clip": {**plain, **all_data},
        "clip + filter": plain,
        "clip + filter + cluster": dict(instance_weight=0.0),
        "clip + filter + instance": dict(cluster_weight=0.0),
        "clip-cid": {},
        **{f"clip, {name} filter": dict(plain, filter=name) for name in ("random", "semdedup")},
        **{f"clip-cid, {name} filter": dict(filter=name) for name in ("random", "semdedup")},
        "clip-cid, no filter": all_data,
        **{f"cluster {terms} only": dict(cluster_terms=terms) for terms in ("hard", "kl")},
        **{f"instance {mode}": dict(instance=mode) for mode in ("intra", "both", "logit-kl")},
        **{f"prototypes {kind}": dict(prototypes=kind) for kind in ("learned-from-teacher", "learned")},
        **{f"k {k}": dict(k=k) for k in (cfg.k // 4, cfg.k * 4)},
        **{f"sample rate {rate:g}": dict(sample_rate=rate) for rate in (0.25, 0.5) if cfg.k * rate >= cfg.batch_size},
        **{f"teacher scale {scale:g}": dict(teacher_scale=scale) for scale in (8.0, 100.0)},
        "arcface 0.3": dict(margin_type="arcface", margin=0.3),
        "cosface 0.2": dict(margin_type="cosface", margin=0.2),
        "texts clustered too": dict(text_cluster=True),
        **{f"clusters of {kind} features": dict(cluster_features=kind) for kind in ("text", "joint")},
        "clip-kd features": dict(cluster_weight=0.0, instance_weight=0.0, feature_weight=2000.0),
        "clip-kd logits": dict(cluster_weight=0.0, instance="logit-kl"),
    }
    if cfg.data == "emoji":
        regimes = {"no noise": dict(noise=0.0), "no duplicates": dict(duplicates=0.0, long_tail=0.0)}
        arms.update({f"{name}, {regime}": {**arms[name], **fields} for regime, fields in regimes.items()
                     for name in ("clip", "clip + filter", "clip-cid", "clip-cid, no filter")})
    equal_epochs = {f"{name}, equal epochs": {**arms[name], "samples": 0} for name in
                    ("clip + filter", "clip, random filter", "clip, semdedup filter", "clip-cid",
                     "clip-cid, random filter", "clip-cid, semdedup filter")}
    return {**{name: {**fields, "samples": seen} for name, fields in arms.items()}, **equal_epochs}


def ablate(cfg):
    """--ablate: train the arms that are not done yet; then the table of all that are, and the teacher's scores."""
    def train_arm(arm):  # arms on the same data share the teacher's embeddings
        source = [arm.data, arm.root, arm.seed, arm.scenes, arm.concepts, arm.difficulty, arm.noise, arm.long_tail,
                  arm.duplicates, str(teacher_file(arm))]
        return train(replace(arm, cache=cfg.cache or str(Path(cfg.out) / f"embeddings_{common.digest(source)}")))

    common.run_arms(cfg, ablation_arms(cfg), train_arm, baselines=("clip", "clip-cid"))
    device = common.start_device(cfg.device, cfg.seed)
    teacher, teacher_cfg = load_teacher(cfg, device)
    cell = Evaluator(teacher, teacher_cfg, device, common.mixed_precision(cfg, device)[0], "teacher").cell()
    common.print_table({"teacher": cell}, Path(cfg.out) / "teacher.md")


def main():
    cfg, weights = configure()
    if cfg.profile:
        profile(cfg)
    elif cfg.evaluate:
        evaluate_checkpoint(cfg, weights)
    elif cfg.ablate:
        ablate(cfg)
    elif cfg.stage in ("embed", "balance", "cluster"):
        run_stages(cfg, common.start_device(cfg.device, cfg.seed), cfg.stage)
        if rank() == 0:
            print(f"{cfg.stage} is done: {(cfg.cache if cfg.stage == 'embed' else None) or cfg.out}")
    elif cfg.stage == "evaluate":
        evaluate_run(cfg)
    else:
        train(cfg, weights)
        if cfg.stage == "all" and cfg.method == "clip_cid":
            evaluate_run(cfg)


if __name__ == "__main__":
    common.run_main(main)
