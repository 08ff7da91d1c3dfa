"""CLIP-CID: Efficient CLIP Distillation via Cluster-Instance Discrimination
Yang, Gu, An, Jiang, Dai, Feng, Cai, Deng, AAAI 2025, https://arxiv.org/abs/2408.09441. No official
code.

A large CLIP, the teacher, embeds the training set once. Its image embeddings first thin the data
out: images closer than ε form groups, and only the centre of each group stays (image semantic
balance). They then cluster what is left (k-means). A small student learns by two losses against
the teacher's embeddings: cluster discrimination, which cluster an image belongs to, so that images
alike are no negatives of each other; and instance discrimination, which of the batch's teacher
embeddings is its own, for the detail that clusters lose. CLIP's own loss is a third.

    python clip_cid.py                                     # emoji scenes, a few minutes on a laptop
    python clip_cid.py --ablate all --jobs 2               # the ladder of ablations on them
    python clip_cid.py --data coco --root DIR --teacher ViT-L-14.pt
    torchrun --nproc_per_node=8 clip_cid.py --data cc3m --teacher open_clip_pytorch_model.bin \\
        --act gelu
    python clip_cid.py --evaluate ViT-B-32.pt --data coco  # OpenAI, OpenCLIP, Hugging Face

The stages run one after the other; --stage runs up to one of them ("evaluate" only scores the
student that is there). Each leaves plain files in --out, which a later command with the same --out
uses again:

    embed     image.npy (n, T), text.npy (5, n, T), float16; keys.txt, a distinct key a row (n);
              embeddings.json. With --cache DIR these four lie in a folder of DIR, for many runs
    balance   kept.txt, the keys of the images that stay (any run takes it as --keep); balance.json,
              how many groups, how large; balance.png, the largest (--filter random: no
              picture, none: no files)
    cluster   clusters.pt, the centroids (k, T), row and label of every kept image; clusters.png
    distil    config.json, log.csv, last.pt, best.pt, student.pt, results.json, pictures
    evaluate  evaluation.json, student and teacher on the test sets
    teacher   stands apart: trains a plain CLIP to be one. The files of distil, with teacher.pt, for
              --teacher, in place of student.pt

embed is done when embeddings.json says `complete`, and goes on where it was stopped; balance and
cluster are done when balance.json and clusters.pt, their last data files, are there. These three
hold the settings they were made with, and a command with others is refused: a folder of --cache
serves one teacher, --keep, --precision and --act. distil writes config.json as it starts, and goes
on with --resume.

Measured on the emoji scenes, 32,000 samples seen, 5 seeds, a CPU core, torch 2.13.0
(tests/EVIDENCE.md has tables, commands and commits): zero-shot top-1 on unseen drawings 20.3 ± 1.9,
against 13.2 ± 1.3 for the same student without a teacher and 39.5 for the teacher. Not run at the
paper's scale.

Assumptions. [paper]: CLIP-CID's abstract or a summary of it, not the full text; [figure]: its
architecture figure as published, perhaps of a draft; [sibling]: a paper or code of the same group
that follows CLIP-CID or shares its parts (DanQing, RealSyn, MLCD, UNICOM, ALIP); [choice]: ours. A
tag covers the text since the tag before.
  A1  Groups by Union-Find at a Euclidean distance ε [paper], that is connected components. A share
      of 43.7 % of LAION400M goes (--remove) [paper]; ε is set so that the same share of any data
      goes [choice], or given (--eps): the cosine distance 0.1 of DanQing is ε = 0.447 [sibling].
  A2  The centre image of a group stays [paper]: the member nearest to the normalised mean
      (DanQing) [sibling], the first of those within 1e-6, with its own caption [choice].
  A3  k-means on the image embeddings [paper], the teacher's [figure], of the images kept:
      spherical, from k of them drawn at random, 20 iterations, --k [choice].
  A4  Cluster discrimination is a softmax loss and a KL divergence [paper] over the outputs of one
      fully connected layer, the prototypes, for the student's and the teacher's image embedding;
      the layer starts at the cluster centres [figure]. It learns (--prototypes); the teacher's
      outputs get no gradient, but are those of the layer as it is now [choice]. Its rows have unit
      length (MLCD) [sibling]. L_hard is the cross-entropy with the k-means label, L_kl is
      KL(teacher || student), added 1:1; scale 32 for the student and the teacher
      (--teacher-scale); every cluster a negative, --sample-rate 1 [choice], where MLCD draws a
      tenth of its million [sibling].
  A5  Instance discrimination is a bidirectional contrastive loss of student and teacher [paper],
      crossed: student images against teacher texts, student texts against teacher images [figure].
      These two are the directions: in each softmax a student's embedding searches among the
      teacher's, not the reverse; their mean; of an image's captions the first five take part
      [choice]. A learnable scale of its own, from 1/0.07, in [1, 100] [choice].
  A6  Total: γ CLIP + α cluster + β instance, α = β = γ = 1 (--nce-weight, --cluster-weight,
      --instance-weight) [choice]; the figure draws no CLIP loss, as with --nce-weight 0. Student
      embeddings are projected linearly to the teacher's width for the two distillation losses,
      where no projection is drawn; the projections are not part of the student [choice].
  A7  The teacher's embeddings are made offline [figure], of the centre crop; the student's random
      crops are compared with them [choice].
  A8  Large data: AdamW, learning rate 1e-3, weight decay 0.2, β = (0.9, 0.98), 32 epochs, warm-up,
      then cosine [sibling]. The warm-up takes a tenth of the run, from 1e-6, the cosine ends at
      1e-5, decay is of matrices alone, prototypes included [choice]; batch 4096 and k =
      10,000, for COCO and Flickr30k 1024 and 1000; crops as in SLIP [choice]. The emoji scenes: the
      same but for 12 epochs, batch 64, k = 256 and the crops [choice].
"""

import hashlib
import itertools
import math
import os
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

# Before torch: a thread that waits for others soon sleeps; else a run on busy cores is ten times as
# slow.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import UserError, gather, normalise, on_first, option, rank, world_size

# Letters in shape comments: B images or texts in the batch a function is given (in the losses: b of
# this process against the B of all), N tokens, D width, H heads, E width of the student's joint
# embedding, T width of the teacher's (in encoder_pair: texts; in similarity_kl: its matrix), S
# image side in pixels, n images of distinct keys, k clusters, c of them.
#
# Words: the teacher is the CLIP that is distilled; --stage teacher trains one. A sample is an image
# with its captions, counted as the data set counts them. Its row is its place in image.npy and
# text.npy, one for each distinct key; in formulas rows are those of a matrix. Kept: what --filter
# leaves. Label: the number of an image's cluster. embed and cluster are stages; CLIPCID.embed is
# the towers' part of a training step.

# -------------------------------------------------------------------------------------- config

# Of the emoji scenes' teacher; data/teacher_clip.pt is what --stage teacher leaves as teacher.pt.
common.PRESETS["teacher"] = replace(
    common.PRESETS["demo"],
    vision_width=128,
    vision_layers=6,
    vision_mlp=512,
    text_width=96,
    text_layers=3,
    embed_dim=128,
)


@dataclass
class Config(common.RunConfig):  # data, out, resume, ablate, seed, device, ...
    stage: str = option("all", "run the stages up to this one; teacher: train a CLIP to be one",
                        ["all", "teacher", "embed", "balance", "cluster", "distil", "evaluate"])
    evaluate: str | None = option(None, "evaluate this checkpoint, ours or a public one, and stop")
    linear_probe: bool = option(False, "with --evaluate, --stage evaluate: a linear classifier")

    teacher: str | None = option(None, "the teacher's checkpoint: OpenAI, OpenCLIP or Hugging Face "
                                 "CLIP ViT (emoji: data/teacher_clip.pt)", section="teacher")
    cache: str | None = option(None, "folder of the teacher's embeddings, to share between runs of "
                               "one --teacher, --keep, --precision and --act: others are refused")

    filter: str = option("balance", "how the data are thinned out before training",
                         ["balance", "random", "none"], section="image semantic balance")
    remove: float = option(0.437, "share of the images to remove; ε follows from it", (0, 0.999))
    eps: float | None = option(None, "ε, in place of --remove: images closer are linked; "
                               "not with --ablate or --filter random", (1e-3, 2))

    k: int = option(256, "number of clusters", (1, math.inf), section="cluster discrimination")
    cluster_weight: float = option(1.0, "α, weight of the cluster loss")
    cluster_terms: str = option("both", "hard: softmax loss on labels; kl: KL to the teacher's",
                                ["both", "hard", "kl"])
    prototypes: str = option("learned-from-teacher", "learned-from-teacher: start at the centres, "
                             "then learn; teacher: stay there; learned: start at random",
                             ["learned-from-teacher", "teacher", "learned"])
    teacher_scale: float = option(32.0, "s_t, scale of the teacher's cosines in the KL term")
    sample_rate: float = option(1.0, "r, share of the clusters that a step contrasts", (0, 1))

    method: str = option("clip_cid", "clip: no distillation; the teacher serves --filter alone",
                         ["clip_cid", "clip"], section="distillation")
    instance: str = option("cross", "cross: student images against teacher texts and texts against "
                           "images, CLIP-KD's ICL; intra: images against images, texts against "
                           "texts; both; logit-kl: KL between the similarity matrices, its CRD and "
                           "TinyCLIP's affinity; features: its FD, mean squared differences",
                           ["cross", "intra", "both", "logit-kl", "features"])
    instance_weight: float = option(1.0, "β, weight of the instance loss")
    nce_weight: float = option(1.0, "γ, weight of the student's own CLIP loss")

    preset: str = option("demo", "sizes of both towers", list(common.PRESETS), section="student")
    image_size: int | None = option(None, "image side in pixels (default: the preset's)")
    act: str | None = option(None, "activation of the MLPs, the teacher's too, where it is wrong",
                             ["quick_gelu", "gelu"])
    init: str | None = option(None, "start from this CLIP checkpoint; the towers take its sizes")

    epochs: int = option(12, "passes over the training set", section="optimisation")
    samples: int = option(0, "train on so many samples instead of --epochs (0: --epochs)")
    batch_size: int = option(64, "pairs per step, over all processes")
    accum: int = option(1, "chunks of a process's batch, for memory; the gradient stays the same")
    lr: float = option(1e-3, "peak learning rate")
    precision: str = option("auto", "auto: bf16 autocast on CUDA, fp32 elsewhere",
                            ["auto", "fp32", "bf16", "fp16"])
    compile: bool = option(False, "torch.compile the towers")
    grad_checkpoint: bool = option(False, "recompute blocks in the backward pass, for memory")

    scenes: int = option(16000, "training scenes", section="emoji scenes (--data emoji)")
    concepts: int = option(100, "how many concepts are drawn", (4, 412))
    difficulty: str = option("easy", "objects, sizes, backgrounds", ["easy", "medium", "hard"])
    noise: float = option(0.4, "share of training scenes with another scene's caption", (0, 1))
    long_tail: float = option(1.0, "exponent z of concept frequencies 1 / rank^z")
    duplicates: float = option(0.4, "share of scenes that nearly repeat another", (0, 1))


# The sibling papers' recipe (A8) at CC3M's size; flags override it.
# Another data set: --data NAME --root FOLDER, laid out as data/README.md says; a recipe of its own
# goes into RECIPES. Another image tower: CLIPCID.__init__ and load_teacher build VisionTransformer;
# any module that maps (B, 3, S, S) to (B, E) can stand there, with its sizes in common.PRESETS.
LARGE = dict(preset="vit_b32", epochs=32, batch_size=4096, k=10000)
SMALLER = {**LARGE, "batch_size": 1024, "k": 1000}
PLAIN_CLIP = dict(method="clip", filter="none")
RECIPES = {"emoji": {}, "coco": SMALLER, "flickr30k": SMALLER}  # others: LARGE
EMOJI_TEACHER = dict(
    preset="teacher",
    scenes=50000,
    epochs=5,
    long_tail=0.0,
    duplicates=0.0,
    batch_size=128,
    seed=1000,  # other scenes than the students', whose seeds start at 0
)


def weight_decay(cfg):
    return 0.2  # the sibling papers' (A8); cfg as in eclipse.py


def crop_scale(cfg):
    """Least and largest area of the random crop, as a share of the image."""
    return (0.8 if cfg.data == "emoji" else 0.5, 1.0)  # 0.5: SLIP's


def configure(argv=None):
    """(Config, the flags given, Checkpoint or None)

    Defaults <- the data's recipe <- the config of the run that is evaluated <- flags given.
    UserError for flags that contradict each other.
    """
    given = common.parse_command_line(Config, __doc__, argv)
    asked = Config(**given)
    if asked.stage == "teacher" and PLAIN_CLIP.keys() & given.keys():
        raise UserError("--method, --filter: not with --stage teacher, which trains a plain CLIP")
    if asked.evaluate and "stage" in given:
        raise UserError("--stage: not with --evaluate, which scores that checkpoint alone")
    if asked.eps and (asked.ablate or asked.filter == "random"):
        raise UserError("--eps: not with --ablate or --filter random, which need the size of what "
                        "stays beforehand: give --remove")
    recipe = RECIPES.get(asked.data, LARGE)
    stem = "runs/ablation_cid" if asked.ablate else f"runs/{asked.method}-{asked.data}"
    if asked.stage == "teacher":
        recipe = {**(EMOJI_TEACHER if asked.data == "emoji" else recipe), **PLAIN_CLIP}
        stem = "runs/teacher"

    path = asked.evaluate
    if asked.stage == "evaluate":
        path = Path(given.get("out", stem), "student.pt")
    loaded = common.read_checkpoint(path)
    if path:  # its data and sizes; a public one has none
        recipe = {**recipe, **common.known_fields(Config, loaded.config), "stage": "all"}
    if asked.evaluate:
        recipe.update(root=None, keep=None, device="auto", workers=-1)  # not the run's
    cfg = common.fill_config(Config, recipe, given, stem)
    return cfg, given, loaded or common.read_checkpoint(cfg.init)


def settings_of(cfg, *names):
    return {name: getattr(cfg, name) for name in names}


# --------------------------------------------------------------------------------------- model
# The towers are eclipse.py's to the letter: what is not used here, queries and keys that Attention
# returns, `*view`, serves it.


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


# ---------------------------------------------------------------------- image semantic balance

BLOCK = 4096  # vectors of a block: memory grows with its square, never with n²
MANY_EDGES = 2 ** 22  # so many edges may wait to be thinned out

# x: embeddings (n, T) on any device, in any precision; they become unit vectors block by block.
# edges (3, m), a float64 array: m pairs of vectors i < j, in its rows j, i and minus their cosine.
# np.lexsort sorts by the last of these first: the best cosine first, equal ones by i, then by j.


def block_cosines(x, a, b, out):
    """Cosines of the block of vectors from a on, rows, with the block from b on, columns.

    a <= b. -inf unless the row's vector stands before the column's, so that of all such blocks each
    pair has one entry. They stand in `out` until the next call: new memory for each block would
    cost a fifth of the time.
    """
    cosine = torch.mm(unit(x[a:a + BLOCK]), unit(x[b:b + BLOCK]).T, out=out.resize_(0))
    if a == b:
        cosine += torch.full_like(cosine, -math.inf).tril()
    return cosine


def find_groups(x, eps=None, remove=None):
    """Connected components of the graph that links vectors closer than ε (A1): single linkage.

    eps: Euclidean distance, ‖a-b‖² = 2 - 2 cos; or remove: the share of vectors that goes when one
    of each group stays. Returns (the lowest member of each vector's group (n,), ε).

    Whatever ε is, the groups are the components of the maximum spanning forest of all pairs without
    its edges beyond ε, and each edge left removes one vector. So the best `count` edges of that
    forest, count = remove * n, meet `remove` exactly. Among links that are equal at this cut the
    first pairs stay, and the ε reported is just beyond the last link: as --eps it would take in all
    its equals.

    Only pairs above a floor are looked at, and this is exact. Kruskal takes the edges best first,
    so pairs below the forest's count-th edge change nothing in its first count edges. That edge is
    not known beforehand, but the count-th best edge of a maximum spanning forest is never below the
    count-th best of any other forest: its i-th best edge is as good as any forest can have. Another
    forest is cheap to find: link each vector with the nearest of those before it in its block. It
    has no cycle, as each vector adds one edge to earlier ones. Where it has fewer than count edges
    (the first of a block has none before it) the floor is -inf, and all pairs are looked at.
    """
    n, out = len(x), torch.empty(0, device=x.device)
    if eps is not None:
        count, floor = n - 1, 1 - eps ** 2 / 2
    else:
        count = min(round(remove * n), n - 1)
        if count == 0:
            return torch.arange(n), 0.0
        links = [block_cosines(x, start, start, out).amax(0) for start in range(0, n, BLOCK)]
        # slack: best_links takes what is above the floor, and of equals at the cut needs all
        floor = torch.cat(links).topk(count).values[-1].item() - 1e-5
    edges = best_links(x, count, floor, out)[:, :count]
    if eps is None:  # 1e-6 beyond the cosine of the last link: to link is to be closer than ε
        eps = math.sqrt(2 + 2 * (edges[2, -1] + 1e-6))
    _, group = spanning_forest(n, [edges])
    return group, eps


def best_links(x, count, floor, out):
    """Edges of the maximum spanning forest of all pairs whose cosine is above floor, best first.

    Those worse than the count-th may be missing. Collected edges are thinned out to a forest again
    and again: of a cycle the worst edge links nothing that the others do not. The count-th best
    edge so far is the new floor: as of any forest, it is never above the one that is sought (see
    find_groups). Processes share the blocks, and join their forests at the end. out: a matrix that
    block_cosines writes to.
    """
    n = len(x)
    waiting, many = [np.empty((3, 0))], 0
    blocks = list(itertools.combinations_with_replacement(range(0, n, BLOCK), 2))
    for a, b in blocks[rank()::world_size()]:
        cosine = block_cosines(x, a, b, out)
        i, j = (cosine > floor).nonzero(as_tuple=True)
        links = torch.stack([b + j, a + i, -cosine[i, j].double()])
        waiting.append(links.cpu().numpy())
        many += len(i)
        if many > MANY_EDGES:
            forest, _ = spanning_forest(n, waiting)
            waiting, many = [forest], 0
            if forest.shape[1] >= count:
                floor = max(floor, -forest[2, count - 1] - 1e-5)  # slack
    forest, _ = spanning_forest(n, waiting)
    return spanning_forest(n, common.gather_objects(forest))[0]


def spanning_forest(n, parts):
    """Kruskal's maximum spanning forest of n nodes by Union-Find. parts: arrays of edges (3, m).

    Returns its edges, best first, and the group of each node (n,), its lowest member. Equal ones
    come in the order of the pairs, so that the forest is the same however they were collected.
    """
    edges = np.concatenate(parts, 1)
    edges = edges[:, np.lexsort(edges)]  # by -cosine, then i, then j
    parent = list(range(n))

    def root(node):
        while parent[node] != node:
            parent[node] = parent[parent[node]]  # path halving
            node = parent[node]
        return node

    joining = []
    for edge, (a, b) in enumerate(zip(*edges[:2].astype(int).tolist())):
        a, b = root(a), root(b)
        if a != b:
            parent[max(a, b)] = min(a, b)
            joining.append(edge)
    return edges[:, joining], torch.tensor([root(node) for node in range(n)])


def centres(x, group):
    """Of each group the member nearest to its normalised mean, the first of those whose cosine is
    within 1e-6 of the nearest's (A2).

    group (n,), on the CPU: the lowest member of each vector's. Returns the nearest ones' positions,
    ascending. 1e-6: cosines of copies, or of both members of a pair, are equal but for fp32
    rounding, which must not choose between them.
    """
    lowest, sizes = group.unique(return_counts=True)
    alone, lowest = lowest[sizes == 1], lowest[sizes > 1]
    rows = torch.isin(group, lowest).nonzero().flatten()  # (m,), all members of these g groups
    number = torch.searchsorted(lowest, group[rows]).to(x.device)  # (m,), of the group
    blocks = list(zip(rows.split(BLOCK), number.split(BLOCK)))
    mean = torch.zeros(len(lowest), x.shape[1], device=x.device)
    for members, own in blocks:
        mean.index_add_(0, own, unit(x[members]))
    mean = unit(mean)
    cosine = torch.cat([(unit(x[members]) * mean[own]).sum(1) for members, own in blocks])
    best = mean.new_zeros(len(lowest)).scatter_reduce(0, number, cosine, "amax", include_self=False)
    nearest = (cosine >= best[number] - 1e-6).cpu()
    first = torch.full_like(lowest, len(x)).scatter_reduce(
        0, number.cpu()[nearest], rows[nearest], "amin")
    return torch.cat([alone, first]).sort().values


# --------------------------------------------------------------------------- spherical k-means

KMEANS_ITERATIONS = 20


def kmeans(x, k, seed):
    """Spherical k-means: k unit centroids that maximise the vectors' mean cosine with the nearest.

    They start at k vectors drawn at random, as faiss's. Returns centroids (k, T); on the CPU
    labels and cosines with the own centroid (n,); and the objective before each iteration and at
    the end. Every vector takes part in every iteration. Processes share the blocks; a block's sum
    is fp32, the blocks are added up in float64. UserError when k > n.
    """
    n = len(x)
    if k > n:
        raise UserError(f"--k {k}: there are only {n:,} images to cluster")
    x = unit(x)  # fp32 beside the caller's fp16, but normalised once for all iterations
    start = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]
    centroids, objective = x[start], []
    for iteration in range(KMEANS_ITERATIONS + 1):
        label, cosine = x.new_zeros(n, dtype=torch.int64), x.new_zeros(n)
        total = torch.zeros_like(centroids, dtype=torch.float64)
        for first in range(0, n, BLOCK)[rank()::world_size()]:
            block = slice(first, first + BLOCK)
            cosine[block], label[block] = (x[block] @ centroids.T).max(1)
            total += torch.zeros_like(centroids).index_add_(0, label[block], x[block])
        for sums in (label, cosine, total):  # the first two are 0 where other processes' blocks are
            common.sum_over_processes(sums)
        objective.append(cosine.double().mean().item())
        if iteration == KMEANS_ITERATIONS:
            return centroids, label.cpu(), cosine.cpu(), objective
        centroids = unit(total)
        # empty clusters start again at the vectors that are worst served, different ones
        empty = torch.bincount(label, minlength=k) == 0
        centroids[empty] = x[cosine.argsort(stable=True)[:empty.sum()]]


# -------------------------------------------------------------------------------------- losses
# Embeddings arrive in float32: under bf16 or fp16 autocast the logits of a large batch, up to 100,
# would lose the digits that the softmax compares.


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


def sample_clusters(label, k, rate, seed):
    """The clusters a step contrasts, r k of them: the whole batch's own and random others (A4).

    label (b,). Returns their numbers (c,), sorted, and the place of each label among them (b,).
    c = r k, but at least B, so that the own ones always fit and the host need not wait to count
    them. The same ones on every process.
    """
    everyone = gather(label)
    generator = torch.Generator(device=label.device).manual_seed(seed)
    score = torch.rand(k, generator=generator, device=label.device)
    score[everyone] = 2.0
    count = min(k, max(round(rate * k), len(everyone)))
    chosen = score.topk(count).indices.sort().values
    return chosen, torch.searchsorted(chosen, label)


def cluster_kl(teacher_logits, logits):
    """L_kl = KL(softmax(teacher_logits) || softmax(logits)), mean over the rows (b, c), and the
    entropy of the former. No gradient to the teacher."""
    target = teacher_logits.detach().log_softmax(-1)
    loss = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
    return loss, -(target.exp() * target).sum(-1).mean()


def contrast(scale, student, teacher):
    """CE(s<student_i, teacher_j>, diagonal): each of the student's b rows finds its own among the
    teacher's B."""
    return match(scale * student @ gather(teacher).T)


# -------------------------------------------------------------------------------------- method

CLUSTER_SCALE = 32.0  # s, of the student's cosines with the prototypes: fixed, ours (A4)
FEATURE_WEIGHT = 2000.0  # CLIP-KD's, of feature mimicry (--instance features)


class CLIPCID(nn.Module):
    """The student, and what only its training needs: projections P_v and P_t to the teacher's
    width, prototypes, a second scale. t^I and t^T are the teacher's embeddings. A training step:

        u, v = student(image), student(caption)                                             embed
        γ L_CLIP(u, v) + α L_cluster(P_v u, label, t^I) + β L_inst(P_v u, P_t v, t^I, t^T)    loss
    """

    def __init__(self, cfg, size, centroids=None, teacher_logit_scale=None):
        """centroids (k, T), of unit length, and the logarithm of the teacher's softmax scale; both
        None for a plain CLIP."""
        super().__init__()
        self.cfg, self.size = cfg, size
        self.student = CLIP(size, VisionTransformer(size))
        self.distil_scale = None
        if centroids is None:
            return
        k, width = centroids.shape
        self.project_image = nn.Linear(size.embed_dim, width, bias=False)  # P_v
        self.project_text = nn.Linear(size.embed_dim, width, bias=False)  # P_t
        self.distil_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("teacher_logit_scale", torch.tensor(teacher_logit_scale))
        start = unit(torch.randn(k, width)) if cfg.prototypes == "learned" else centroids
        self.prototypes = nn.Parameter(start.clone(), requires_grad=cfg.prototypes != "teacher")

    def logit_scales(self):
        return [scale for scale in (self.student.logit_scale, self.distil_scale)
                if scale is not None]

    def embed(self, image, text):
        """u (b, E) and v (b, E), with gradient."""
        return self.student.encode_image(image), self.student.encode_text(text)

    def loss(self, u, v, t_image=None, t_text=None, label=None, seed=0):
        """The loss and its terms. t_image, t_text (b, T), of unit length, label (b,); without a
        teacher the loss is CLIP's. seed: of the clusters that --sample-rate draws.

        term            weight            what gets its gradient
        nce             nce_weight        both towers, the student's logit scale
        cluster_hard    cluster_weight    image tower, P_v, prototypes; nothing of the text's side
        cluster_kl      cluster_weight    the same, through the student's softmax. The teacher's
                                          gets none, but is that of the prototypes as they are now
        instance        instance_weight   both towers, P_v, P_t, distil_scale; of --instance
                                          features no scale, of logit-kl the student's scale and
                                          no projection

        Nothing reaches the teacher's embeddings, nor, with --prototypes teacher, the prototypes.
        What --cluster-terms leaves out of the loss, or a weight of 0, is logged all the same, as is
        teacher_entropy: near 0 or log(c), the target of L_kl is one-hot or flat.

        To add a loss: a line here, which adds it to the loss and to the terms; its weight in
        Config; its name in LOG_COLUMNS. More of the teacher comes in through TaughtSamples and
        teaching_inputs; of the towers u and v are all there is, for the sake of --accum.
        """
        cfg = self.cfg
        nce = info_nce(similarities(self.student.logit_scale.exp(), u, v))
        if t_image is None:
            return nce, {"nce": nce}
        p = unit(self.project_image(u))  # P_v u, (b, T)
        q = unit(self.project_text(v))  # P_t v, (b, T)
        cluster, terms = self.cluster_loss(p, t_image, label, seed)
        instance = self.instance_loss(u, v, p, q, t_image, t_text)
        loss = cfg.nce_weight * nce + cfg.cluster_weight * cluster + cfg.instance_weight * instance
        return loss, {**terms, "nce": nce, "instance": instance}

    def cluster_loss(self, p, t_image, label, seed):
        """L_cluster = L_hard + L_kl (A4), and its terms.

        w_j: the prototypes' unit rows; p_i: P_v u_i, of unit length. L_hard = CE(s w_j·p_i, y_i),
        L_kl = KL(softmax_j(s_t w_j·t^I_i) || softmax_j(s w_j·p_i)), no gradient to the former.
        """
        cfg, prototypes = self.cfg, unit(self.prototypes)
        if cfg.sample_rate < 1:
            chosen, label = sample_clusters(label, len(prototypes), cfg.sample_rate, seed)
            prototypes = prototypes[chosen]
        logits = CLUSTER_SCALE * (p @ prototypes.T)
        teacher_logits = cfg.teacher_scale * (t_image @ prototypes.T)
        hard = F.cross_entropy(logits, label)
        kl, entropy = cluster_kl(teacher_logits, logits)
        loss = {"both": hard + kl, "hard": hard, "kl": kl}[cfg.cluster_terms]
        return loss, {"cluster_hard": hard, "cluster_kl": kl, "teacher_entropy": entropy}

    def instance_loss(self, u, v, p, q, t_image, t_text):
        """L_inst (A5): student rows against the teacher's embeddings of the whole batch; logit-kl:
        the students' similarity matrix against the teacher's; features: pair by pair."""
        mode, scale = self.cfg.instance, self.distil_scale.exp()
        if mode == "logit-kl":  # in the student's own width, no projection
            teacher = similarities(self.teacher_logit_scale.exp(), t_image, t_text)
            return similarity_kl(teacher, similarities(self.student.logit_scale.exp(), u, v))
        if mode == "features":
            return FEATURE_WEIGHT * (F.mse_loss(p, t_image) + F.mse_loss(q, t_text))
        cross = (contrast(scale, p, t_text) + contrast(scale, q, t_image)) / 2
        if mode == "cross":
            return cross
        intra = (contrast(scale, p, t_image) + contrast(scale, q, t_text)) / 2
        return intra if mode == "intra" else (cross + intra) / 2


# ---------------------------------------------------------- stages before the distillation

CAPTIONS = 5  # of an image, at most: COCO's
SHOWN, SHOWN_PIXELS = 12, 96  # pictures in a line of balance.png and clusters.png, their side
# what decides the emoji scenes
SCENE_FIELDS = "seed scenes concepts difficulty noise long_tail duplicates image_size".split()


class Embeddings:
    """The teacher's embeddings on disk: row i of both arrays belongs to keys[i].

    image.npy (n, T) and text.npy (CAPTIONS, n, T), fp16, of unit length. rows: the row of each
    sample; one that a mixture repeats has one row. Image rows of zeros: still to do or, at the end,
    images that cannot be read. Text rows that are never written, of captions that an image does not
    have, take no place on disk.
    """

    def __init__(self, cfg, data):
        self.data, row_of = data, {}
        keys = map(data.key, range(len(data)))
        self.rows = np.array([row_of.setdefault(key, len(row_of)) for key in keys])
        self.keys = list(row_of)
        self.samples = np.unique(self.rows, return_index=True)[1]  # (n,): the first of each row
        data_set = settings_of(cfg, "data", *(SCENE_FIELDS if cfg.data == "emoji" else ()))
        teacher = teacher_file(cfg)
        found = teacher.stat()  # cheaper than its content, which may be 10 GB
        digest = hashlib.md5(repr((self.keys, data.digest)).encode()).hexdigest()
        self.settings = {
            **data_set,
            "keys": f"{len(self.keys)} of digest {digest}",
            **settings_of(cfg, "keep", "precision", "act"),
            "teacher": f"{teacher}, {found.st_size} bytes, {found.st_mtime_ns}",
        }
        # one per training set, whose name may be a path
        name = "-".join(map(str, data_set.values())).replace("/", "-")
        self.folder = Path(cfg.cache, name) if cfg.cache else Path(cfg.out)

    def open(self, name, mode="c"):
        """A memory map; "c": what is changed in memory does not reach the file."""
        return read_file(self.folder / f"{name}.npy", mode)


def read_file(path, mode=None):
    """What a .npy, or a file by torch.save, holds. UserError when it is missing or damaged."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode=mode)
        return torch.load(path, weights_only=True)
    except Exception as error:  # the readers raise errors of many types on damaged files
        raise UserError(f"{path} is missing or damaged ({type(error).__name__}): delete what its "
                        "stage has left, to make it again") from None


def read_stage(path, settings, read=common.read_json):
    """What a stage has left in its last file; None where it is not done.

    UserError when the file is damaged, or was made with other settings.
    """
    found = on_first(lambda: read(path) if path.is_file() else None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else {}  # else no stage wrote it
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(f"{path} was made with {name} {found.get(name)!s:.80}, not "
                            f"{value!s:.80}: delete it, or choose another folder")
    return found


def teacher_file(cfg):
    """The checkpoint of the teacher. UserError when there is none."""
    if not cfg.teacher and cfg.data != "emoji":
        raise UserError("--teacher FILE is needed: an OpenAI, OpenCLIP or Hugging Face CLIP ViT")
    path = Path(cfg.teacher or common.DATA / "teacher_clip.pt")
    if not path.is_file():
        raise UserError(f"there is no teacher at {path} (--stage teacher makes one)")
    return path


def load_teacher(cfg, device):
    """(CLIP in eval mode, its Size) of --teacher."""
    path = teacher_file(cfg)
    weights, size = common.clip_weights(common.read_checkpoint(path), cfg.act)
    with torch.device("meta"):  # a bigG has 2.5 G parameters: no need to draw them first
        teacher = CLIP(size, VisionTransformer(size))
    common.load_weights(teacher, weights, path)
    return teacher.to(device).eval().requires_grad_(False), size


def embed(cfg, data, device):
    """--stage embed: the teacher's Embeddings of the training set; goes on where it was stopped."""
    embeddings = Embeddings(cfg, data)
    folder = embeddings.folder
    path = folder / "embeddings.json"
    report = read_stage(path, embeddings.settings) or {}
    if not report.get("complete"):
        teacher, size = load_teacher(cfg, device)
        if not report:
            report = on_first(lambda: start_embeddings(embeddings, teacher, size))
        embed_rows(cfg, embeddings, teacher, size, device)
        common.gather_objects("done")  # all processes are
        report["complete"] = True
        on_first(lambda: common.write_json(path, report))
    embeddings.logit_scale = report["logit_scale"]
    return embeddings


def start_embeddings(embeddings, teacher, size):
    """The files of Embeddings, all zeros; embeddings.json, which is returned, last."""
    folder, shape = embeddings.folder, (len(embeddings.keys), size.embed_dim)
    common.write_keys(folder / "keys.txt", embeddings.keys)
    np.lib.format.open_memmap(folder / "image.npy", "w+", np.float16, shape)
    np.lib.format.open_memmap(folder / "text.npy", "w+", np.float16, (CAPTIONS, *shape))
    report = {
        **embeddings.settings,
        "logit_scale": teacher.logit_scale.item(),
        "complete": False,
    }
    common.write_json(folder / "embeddings.json", report)
    return report


@torch.no_grad()
def embed_rows(cfg, embeddings, teacher, size, device):
    """Fill this process's share of the rows that are still to do."""
    image, text = embeddings.open("image", "r+"), embeddings.open("text", "r+")
    todo = on_first(lambda: np.flatnonzero(~image.any(1)))
    rows = np.array_split(todo, world_size())[rank()]
    subset = common.Subset(embeddings.data, embeddings.samples[rows])
    # 256 images at a time
    loader = common.eval_loader(subset, size.image_size, 256, common.loader_workers(cfg))
    tokenizer = size.tokenizer()
    amp, _ = common.mixed_precision(cfg.precision, device)
    encode_image, encode_text = encoder_pair(teacher, teacher.visual,
                                             size.pixel_statistics(device), amp)
    for images, places, captions in tqdm(loader, f"embedding, in {embeddings.folder}",
                                         disable=rank() > 0 or None):
        captions = [texts[:CAPTIONS] for texts in captions]
        tokens = common.trim_padding(tokenizer(sum(captions, [])))
        u = encode_image(images).cpu()
        v = encode_text(tokens).cpu()
        if not torch.cat([u, v]).isfinite().all():
            raise UserError(f"{teacher_file(cfg)} gives NaN: try --precision fp32")
        counts = list(map(len, captions))
        for row, own in zip(rows[places], v.half().split(counts)):
            for number, vector in enumerate(own):
                write_row(text, number * len(image) + row, vector)
        for row, vector in zip(rows[places], u.half()):
            write_row(image, row, vector)  # last: it says that the row is done


def write_row(array, row, vector):
    """Write to the file of a memory map (..., T). On a full disk this is an OSError, where writing
    to the map would end the process without a word (SIGBUS)."""
    with common.writing(array.filename), open(array.filename, "r+b") as file:
        file.seek(array.offset + row * vector.nbytes)
        file.write(vector.numpy().tobytes())


def balance(cfg, embeddings, device):
    """--stage balance: the rows of the embeddings that --filter keeps.

    kept.txt holds their keys; balance.json, written last, the settings and figures.
    """
    image, out = embeddings.open("image"), Path(cfg.out)
    rows = np.flatnonzero(image.any(1))  # the images that could be read
    common.check_bad(Counter(unreadable=len(image) - len(rows)), len(rows), cfg.data)
    if cfg.filter == "none":
        return rows
    settings = {**embeddings.settings, **settings_of(cfg, "filter", "eps", "remove", "seed")}
    if read_stage(out / "balance.json", settings) is None:
        x = torch.from_numpy(image[rows]).to(device)
        chosen, group, eps = choose(cfg, x)
        sizes = torch.bincount(group).sort(descending=True).values
        report = {
            **settings,
            "images": len(rows),
            "kept": len(chosen),
            "distance": eps,
            "groups": int((sizes > 1).sum()),
            "largest": sizes[sizes > 1][:10].tolist(),
        }
        keys = [embeddings.keys[row] for row in rows[chosen.numpy()]]
        on_first(lambda: common.write_keys(out / "kept.txt", keys))
        if rank() == 0:
            print(f"{cfg.filter}: {len(chosen):,} of {len(rows):,} images kept")
            if cfg.filter == "balance":
                print(f"ε = {eps:.4f}, {report['groups']:,} groups of two or more, the largest "
                      f"{report['largest']}. Chains of neighbours join images that are far apart: "
                      "where the largest holds much of the data, lower --eps or --remove")
                stays = torch.zeros(len(rows)).index_fill_(0, chosen, 1)
                draw_groups(out / "balance.png", embeddings, rows, group, stays,
                            "semantic balance: of the largest groups 12 each, what stays first")
        on_first(lambda: common.write_json(out / "balance.json", report))
    return common.listed(embeddings.keys, out / "kept.txt")


def choose(cfg, x):
    """What --filter keeps of x: positions, ascending; the group of each vector (n,); ε. random: so
    many as balance would keep, each a group of its own, ε = 0."""
    if cfg.filter == "random":
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(cfg.seed))
        return order[round(cfg.remove * len(x)):].sort().values, torch.arange(len(x)), 0.0
    group, eps = find_groups(x, cfg.eps, cfg.remove)
    return centres(x, group), group, eps


def cluster(cfg, embeddings, kept, device):
    """--stage cluster: the centroids (k, T) and a label for each of the kept rows (as of balance).

    clusters.pt holds them, with the rows and the settings.
    """
    path = Path(cfg.out, "clusters.pt")
    settings = {
        **embeddings.settings,
        **settings_of(cfg, "seed", "k"),
        "row": kept.tolist(),
    }
    found = read_stage(path, settings, read_file)
    if found is None:
        x = torch.from_numpy(embeddings.open("image")[kept]).to(device)
        centroids, label, cosine, objective = kmeans(x, cfg.k, cfg.seed)
        found = {**settings, "centroids": centroids.cpu(), "label": label}
        if rank() == 0:
            print(f"k-means: k = {cfg.k}, mean cosine {objective[0]:.4f} -> {objective[-1]:.4f}")
            draw_groups(path.with_suffix(".png"), embeddings, kept, label, cosine,
                        "the largest clusters, the images nearest to the centre first")
        on_first(lambda: common.replace_file(path, lambda new: torch.save(found, new)))
    return found["centroids"], found["label"]


@common.picture
def draw_groups(path, embeddings, rows, group, score, title):
    """A line of images for each of the ten largest groups: the SHOWN members of the best scores.

    group, score (n,): of the given rows (n,).
    """
    lines, names = [], []
    for number in torch.bincount(group).argsort(descending=True, stable=True)[:10]:
        members = (group == number).nonzero().flatten()
        best = score[members].argsort(descending=True, stable=True)[:SHOWN]
        places = embeddings.samples[rows[members[best].numpy()]]
        lines.append(common.load_images(embeddings.data, SHOWN_PIXELS,
                                        common.resize_center_crop, places)[0])
        names.append(f"{len(members):,} images")
    common.plot_grid(path, lines, names, [], title)


class TaughtSamples(common.TrainSamples):
    """TrainSamples, and the teacher's embeddings, fp16 (T,), of the image and of the caption drawn,
    and the label.

    rows: the embeddings' row of each kept sample, found by key; label: its cluster.
    """

    def __init__(self, embeddings, rows, label, *how):
        super().__init__(*how)
        self.embeddings, self.rows, self.label = embeddings, rows, label
        self.arrays = None  # each loader process opens the memory maps itself

    def __getitem__(self, place):
        if self.arrays is None:
            self.arrays = self.embeddings.open("image"), self.embeddings.open("text")
        image, text = self.arrays
        picture, tokens, bad, index, caption = self.draw(place, CAPTIONS)
        row = self.rows[index]
        teacher = torch.tensor(image[row]), torch.tensor(text[caption, row])
        return picture, tokens, bad, *teacher, self.label[index]


def prepare(cfg, size, device):
    """The stages before the distillation, up to --stage: (the samples that the loop trains on, what
    CLIPCID takes from the teacher); None where it ends before."""
    data = common.training_set(cfg, size.image_size, cfg.long_tail, cfg.duplicates)
    how = size.tokenizer(), size.image_size, crop_scale(cfg), cfg.seed
    if cfg.method == "clip" and cfg.filter == "none":
        return common.TrainSamples(data, *how), {}
    embeddings = embed(replace(cfg, image_size=size.image_size), data, device)
    if cfg.stage == "embed":
        return None
    if device.type == "mps":  # no sums in float64 there
        device = torch.device("cpu")
    kept = balance(cfg, embeddings, device)
    if cfg.stage == "balance":
        return None
    samples = np.flatnonzero(np.isin(embeddings.rows, kept))
    kept_data = common.Subset(data, samples)
    if cfg.method == "clip":
        return common.TrainSamples(kept_data, *how), {}
    centroids, label = cluster(cfg, embeddings, kept, device)
    rows = embeddings.rows[samples]
    taught = {"centroids": centroids, "teacher_logit_scale": embeddings.logit_scale}
    return TaughtSamples(embeddings, rows, label[np.searchsorted(kept, rows)], kept_data,
                         *how), taught


# ------------------------------------------------------------------------------------ training


def build(cfg, loaded=None, **taught):
    """CLIPCID with fresh weights, or with those of a CLIP checkpoint for the student."""
    size, weights = common.clip_size(cfg, loaded)
    model = CLIPCID(cfg, size, **taught)
    if loaded:
        common.load_weights(model.student, weights, loaded.path)
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


def schedules(cfg, step, steps):
    """{"lr"} at a step; the warm-up takes a tenth of the run (A8)."""
    return {"lr": learning_rate(cfg.lr, step, steps, warmup=steps / 10)}


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


LOG_COLUMNS = """step epoch lr loss nce cluster_hard cluster_kl teacher_entropy instance
    logit_scale distil_scale val_student""".split()


def train(cfg, loaded=None):
    """Prepare the data, distil, validate after every epoch, evaluate at the end."""
    device = common.start_device(cfg.device, cfg.seed)
    amp, scaler = common.mixed_precision(cfg.precision, device)
    size, _ = common.clip_size(cfg, loaded)
    run = common.Run(cfg, size, LOG_COLUMNS)

    statistics = size.pixel_statistics(device)
    test = common.evaluation_sets(cfg, size.image_size, "test")  # what is missing is said now
    validation = common.evaluation_sets(cfg, size.image_size, "val")
    samples, taught = prepare(cfg, size, device)

    torch.manual_seed(cfg.seed)
    model = build(cfg, loaded, **taught).to(device)
    optimiser = build_optimiser(model, cfg, device)
    state = run.load_state(samples, model=model, optimiser=optimiser, scaler=scaler)
    steps_per_epoch = len(samples) // cfg.batch_size
    steps = cfg.epochs * steps_per_epoch
    if cfg.samples:
        steps = max(1, cfg.samples // cfg.batch_size)
    loader = common.train_loader(samples, cfg, steps, state["step"], device)
    run.start(state["step"])
    prepare_towers(model, cfg)
    student = model.student
    cells = {"student": encoder_pair(student, student.visual, statistics, amp)}
    trained = {"val_student": cells["student"]}

    progress = common.Progress(cfg, state, steps, steps_per_epoch)
    with common.StopRequest() as stop, progress:
        for image, text, bad, *teaching in loader:
            now = schedules(cfg, state["step"], steps)
            image, text = normalise(image, statistics), text.to(device, non_blocking=True)
            others = teaching_inputs(teaching, cfg.seed, state["step"], device)
            terms = backward(model, image, text, others, amp, scaler)
            update(model, optimiser, scaler, now["lr"])

            epoch_ends, logs, saves = progress.count(state, bad)
            stopping = stop.agreed(synchronise=logs)
            if logs:
                row = common.log_row(state, steps_per_epoch, now, terms, student.logit_scale)
                if model.distil_scale is not None:
                    row["distil_scale"] = model.distil_scale.exp().item()
                if epoch_ends:
                    common.check_epoch(state, cfg.data)
                    row.update(common.validate(run, student, trained, validation, state))
                run.log(row)
                progress.show(row)
            if saves or stopping:
                run.save_state(state)
            if stopping:
                raise KeyboardInterrupt(f"stopped at step {state['step']}; --resume --out "
                                        f"{run.folder} goes on")
    if rank() == 0:
        common.write_results(run, cells, test, state, device)
        if cfg.stage == "teacher":
            run.save_model("teacher.pt", student.half())  # for --teacher
        else:
            run.save_model("student.pt", student)


def teaching_inputs(teaching, seed, step, device):
    """What CLIPCID.loss takes beside u and v, of a batch of TaughtSamples; () without a teacher.

    The last is a seed for sample_clusters, another one at each step of each run (no run has 10^9
    steps).
    """
    if not teaching:
        return ()
    t_image, t_text, label = (part.to(device, non_blocking=True) for part in teaching)
    return unit(t_image), unit(t_text), label, seed * 10 ** 9 + step


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


def evaluate_checkpoint(cfg, loaded):
    """--evaluate: the test scores of a checkpoint, ours or a published one, and --linear-probe.

    --stage evaluate: of the run's student beside its teacher, as evaluation.json too.
    """
    device = common.start_device(cfg.device, cfg.seed)
    amp, _ = common.mixed_precision(cfg.precision, device)
    model = build(cfg, loaded)
    clips = {loaded.path.stem: (model.student.to(device), model.size)}
    if cfg.stage == "evaluate" and cfg.method == "clip_cid":
        clips["teacher"] = load_teacher(cfg, device)
    table = {}
    for name, (clip, size) in clips.items():
        pair = encoder_pair(clip, clip.visual, size.pixel_statistics(device), amp)
        table |= common.test_checkpoint(cfg, size, {name: pair})
    common.print_table(table)
    if cfg.stage == "evaluate":
        common.write_json(Path(cfg.out, "evaluation.json"), table)


# ------------------------------------------------------------------------------------ ablation


def ablation_arms(cfg):
    """{name: the flags in which the arm differs from those given}

    Equal samples: every arm sees as many as plain CLIP on all data sees in --epochs (or --samples),
    so an arm with a filter passes over what is left more often. Arms named "equal epochs" make as
    many passes as that CLIP, over what is left, so they see fewer samples.
    """
    arms = {
        "clip": PLAIN_CLIP,
        "clip + filter": {"method": "clip"},
        "clip + filter + cluster": {"instance_weight": 0.0},
        "clip + filter + instance": {"cluster_weight": 0.0},
        "clip-cid": {},
        "clip-cid, no filter": {"filter": "none"},
        "clip-cid, no clip loss": {"nce_weight": 0.0},
        "clip, random filter": {"method": "clip", "filter": "random"},
        "clip-cid, random filter": {"filter": "random"},
        "clip-kd features": {"cluster_weight": 0.0, "instance": "features"},
        "clip-kd logits": {"cluster_weight": 0.0, "instance": "logit-kl"},
    }
    values = {
        "cluster_terms": ("hard", "kl"),
        "instance": ("intra", "both", "logit-kl"),
        "prototypes": ("teacher", "learned"),
        "k": (cfg.k // 4, cfg.k * 4),
        "sample_rate": (0.25, 0.5),
        "teacher_scale": (8.0, 100.0),
    }
    for field, choices in values.items():
        for value in choices:
            arms[f"{field.replace('_', ' ')} {value}"] = {field: value}

    size, _ = common.clip_size(cfg)
    whole = common.training_set(cfg, size.image_size)
    seen = cfg.samples or cfg.epochs * len(whole)
    fewer = round(seen * (1 - cfg.remove))  # --eps is refused
    for name in ("clip + filter", "clip-cid"):
        arms[f"{name}, equal epochs"] = {**arms[name], "samples": fewer}
    shared = {
        "samples": seen,
        "cache": cfg.cache or str(Path(cfg.out, "embeddings")),
        "stage": "distil",
        "filter": "balance",
    }
    return {name: {**shared, **fields} for name, fields in arms.items()}


def ablate(cfg, given):
    """--ablate: the teacher's embeddings, which the arms share; the arms that are not done yet;
    then the table of all that are."""
    arms = ablation_arms(cfg)
    seeds = cfg.seeds if cfg.data == "emoji" else cfg.seeds[:1]  # each has scenes of its own
    first = [{"stage": "embed", "seed": seed, "cache": arms["clip-cid"]["cache"],
              "out": Path(cfg.out, "embed", f"seed{seed}")} for seed in seeds]
    common.run_arms(cfg, given, arms, ("clip", "clip-cid"), first)


def main(argv=None):
    cfg, given, loaded = configure(argv)
    if cfg.ablate:
        ablate(cfg, given)
    elif cfg.evaluate or cfg.stage == "evaluate":
        evaluate_checkpoint(cfg, loaded)
    elif cfg.stage in ("embed", "balance", "cluster"):
        size, _ = common.clip_size(cfg, loaded)
        # these run with --method clip too
        prepare(replace(cfg, method="clip_cid"), size, common.start_device(cfg.device, cfg.seed))
    else:
        train(cfg, loaded)
        if cfg.stage == "all" and cfg.method == "clip_cid" and rank() == 0:
            main(["--stage", "evaluate", "--out", cfg.out])


if __name__ == "__main__":
    sys.exit(common.run_main(main))
