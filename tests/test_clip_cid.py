"""clip_cid.py's parts against independent references.

scipy (components, single linkage, spanning trees), faiss (k-means), open_clip and transformers
(towers; a test is skipped where its reference is not installed), closed forms, float64 loops here.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import math
import threading
from dataclasses import replace
from functools import partial

import clip_cid
import common
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import BadSample, UserError
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = replace(common.PRESETS["tiny"], vision_width=64, vision_heads=4, vision_mlp=128, embed_dim=12,
               text_width=64, text_heads=4, context_length=16, vocab_size=600)
SCALER = torch.amp.GradScaler("cpu", enabled=False)
CPU = torch.device("cpu")
WIDTH = 10  # of the teacher's embeddings


@pytest.fixture
def double(monkeypatch):
    """float64 throughout: .float(), which lifts bf16 features to fp32, would cut them down."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return torch.float64


def config(**changes):
    given = dict(k=7, teacher_scale=5.0, cluster_weight=0.7, instance_weight=1.3, nce_weight=0.6,
                 workers=0, device="cpu")
    return clip_cid.Config(**{**given, **changes})


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def unit_rows(*shape, **how):
    return F.normalize(draw(*shape, **how), dim=-1)


def randomise(module, seed=0, matrices=0.1):
    """No parameter keeps a value (0, 1) under which mixing it up with another would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += (0.1 if p.ndim < 2 else matrices) * torch.randn(p.shape, generator=generator)
    return module


def assert_same(found, wanted, tolerance):
    """Two dicts of tensors, each within `tolerance` of the norm of its reference."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        error = (found[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


# --------------------------------------------------------------------------------- 1. balance


def clumps(n, d, centres, spread, seed):
    where = torch.randint(centres, (n,), generator=torch.Generator().manual_seed(seed))
    return unit_rows(centres, d, seed=seed)[where] + spread * draw(n, d, seed=seed + 1)


def copies(n, d, distinct, seed):
    """Each row one of a few vectors, scaled by powers of two: exact copies as unit vectors."""
    generator = np.random.default_rng(seed)
    scale = torch.tensor(2.0 ** generator.integers(-2, 3, (n, 1))).float()
    return scale * draw(distinct, d, seed=seed)[generator.integers(distinct, size=n)]


DATA = {
    "scattered": draw(150, 6),
    "clumps": clumps(160, 16, 12, 0.08, 1),
    "fp16": clumps(140, 24, 9, 0.1, 2).half(),
    "near copies": torch.cat([copies(60, 8, 20, 4), clumps(60, 8, 5, 0.02, 5)]),
    "chain": torch.stack([torch.cos(t := torch.linspace(0.5, 3, 61) ** 2 / 3), torch.sin(t)], 1),
    "all equal": draw(1, 7).repeat(40, 1),
    "all far": torch.eye(33),
    "two": draw(2, 4),
    "large": clumps(900, 8, 60, 0.15, 6),
}
BLOCKS = (7, 64, 5000)


@pytest.fixture
def block(request, monkeypatch):
    monkeypatch.setattr(clip_cid, "BLOCK", request.param)
    return request.param


def pairs_of(x):
    """i, j and cosine of all pairs i < j, float64."""
    x = F.normalize(x.double(), dim=-1).numpy()
    i, j = np.triu_indices(len(x), 1)
    return i, j, (x @ x.T)[i, j]


def clear_floor(cosine, share):
    """A cosine that about this share of the pairs exceed, and that none is within 2e-6 of."""
    levels = np.sort(cosine)[::-1]
    wide = np.flatnonzero(-np.diff(levels) > 4e-6)
    options = [(levels[t] + levels[t + 1]) / 2 for t in wide] + [levels[-1] - 0.01]
    options += [levels[0] + 0.01] if levels[0] < 0.98 else []
    return min(options, key=lambda floor: abs((cosine > floor).mean() - share))


def lowest_names(label):
    """Groups under any names -> each named by its lowest member."""
    first = {}
    return torch.tensor([first.setdefault(name, place) for place, name in enumerate(label)])


def components(n, i, j):
    sparse = pytest.importorskip("scipy.sparse")
    graph = sparse.coo_matrix((np.ones(len(i)), (i, j)), (n, n))
    return lowest_names(sparse.csgraph.connected_components(graph, directed=False)[1])


class Allocations(TorchDispatchMode):
    """The largest storage that an operator returned, in elements; views of x do not count."""

    def __init__(self, x):
        super().__init__()
        self.known, self.largest = x.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() != self.known:
                size = part.untyped_storage().nbytes() // part.element_size()
                self.largest = max(self.largest, size)
        return out


def test_memory_grows_with_the_block_not_with_all_pairs(monkeypatch):
    """Also where all n² / 2 = 45,000 pairs are near: the forest and one block, three numbers an edge."""
    monkeypatch.setattr(clip_cid, "BLOCK", 20)
    monkeypatch.setattr(clip_cid, "MANY_EDGES", 0)
    x = unit_rows(1, 20).repeat(300, 1)
    with Allocations(x) as seen:
        group, _ = clip_cid.find_groups(x, eps=0.1)
    assert not group.any()
    assert seen.largest <= 3 * (300 + 20 ** 2)


@pytest.mark.parametrize("many", [0, 2 ** 22])
@pytest.mark.parametrize("block", BLOCKS, indirect=True)
@pytest.mark.parametrize("name", [name for name in DATA if name != "large"])
def test_groups_are_the_components_of_the_near_pairs(name, block, many, monkeypatch):
    monkeypatch.setattr(clip_cid, "MANY_EDGES", many)
    x = DATA[name]
    i, j, cosine = pairs_of(x)
    for share in (0.0, 0.1, 1.0):
        floor = clear_floor(cosine, share)
        eps, near = math.sqrt(2 - 2 * floor), cosine > floor
        group, found = clip_cid.find_groups(x, eps=eps)
        assert torch.equal(group, components(len(x), i[near], j[near])) and found == eps


@pytest.mark.parametrize("block", BLOCKS, indirect=True)
@pytest.mark.parametrize("name", DATA)
def test_remove_is_met_exactly_and_as_single_linkage_does(name, block, monkeypatch):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    if name == "large":
        monkeypatch.setattr(clip_cid, "BLOCK", max(block, 64))
    monkeypatch.setattr(clip_cid, "MANY_EDGES", 100)
    x = DATA[name]
    n, (i, j, cosine) = len(x), pairs_of(x)
    tree = hierarchy.linkage(F.normalize(x.double(), dim=-1).numpy(), "single")
    levels = 1 - tree[:, 2] ** 2 / 2  # the cosines at which groups join, best first
    for remove in (0.0, 0.02, 0.437, 0.7, 0.99):
        group, eps = clip_cid.find_groups(x, remove=remove)
        target = min(round(remove * n), n - 1)
        assert n - len(group.unique()) == target
        tied = 0 < target < n - 1 and levels[target - 1] - levels[target] < 3e-6
        if not tied:
            wanted = hierarchy.fcluster(tree, n - target, "maxclust")
            near = cosine > 1 - eps ** 2 / 2
            assert torch.equal(group, lowest_names(wanted))
            assert not target or torch.equal(group, components(n, i[near], j[near]))


def test_among_equal_pairs_the_first_go():
    x = torch.eye(8).repeat_interleave(2, 0)  # eight pairs of copies
    group, _ = clip_cid.find_groups(x, remove=3 / 16)
    assert group.tolist() == [0, 0, 2, 2, 4, 4, *range(6, 16)]


@pytest.mark.parametrize("name", DATA)
def test_the_kept_image_is_the_one_nearest_to_its_groups_mean(name):
    x, n = F.normalize(DATA[name].double(), dim=-1), len(DATA[name])
    shuffled = np.random.default_rng(0).integers(max(1, n // 4), size=n)
    for group in (lowest_names(shuffled), torch.arange(n), torch.zeros(n, dtype=torch.int64)):
        kept = clip_cid.centres(DATA[name], group)
        assert torch.equal(group[kept].sort().values, group.unique()) and (kept.diff() > 0).all()
        for own in kept:
            members = (group == group[own]).nonzero().squeeze(1)
            score = x[members] @ F.normalize(x[members].sum(0), dim=0)
            assert score[members == own] > score.max() - 2e-6
            assert own <= members[score > score.max() - 5e-7].min()


def as_processes(count, work, monkeypatch):
    """[work() of each process]: threads that share the work and gather as processes do."""
    mine, barrier = threading.local(), threading.Barrier(count, timeout=60)
    slots = [None] * count

    def gather_objects(thing):
        slots[mine.rank] = thing
        barrier.wait()
        things = list(slots)
        barrier.wait()
        return things

    def sum_over_processes(x):
        return x.copy_(sum(gather_objects(x.clone())))

    def process(number):
        mine.rank = number
        return work()

    with monkeypatch.context() as patched, concurrent.futures.ThreadPoolExecutor(count) as pool:
        patched.setattr(clip_cid, "rank", lambda: mine.rank)
        patched.setattr(clip_cid, "world_size", lambda: count)
        patched.setattr(common, "gather_objects", gather_objects)
        patched.setattr(common, "sum_over_processes", sum_over_processes)
        return list(pool.map(process, range(count)))


@pytest.mark.parametrize("block", [40, 64, 5000], indirect=True)  # also fewer blocks than processes
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(monkeypatch, processes, block):
    def work():
        x = DATA["clumps"]
        return (*clip_cid.find_groups(x, eps=0.3), *clip_cid.find_groups(x, remove=0.4),
                *clip_cid.kmeans(x, 6, 0))

    wanted = work()
    for found in as_processes(processes, work, monkeypatch):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------- 2. k-means

VECTORS = {
    "scattered": (draw(1500, 12), 40),
    "clumps": (clumps(1500, 24, 30, 0.1, 1), 30),
    "copies": (torch.cat([copies(600, 10, 50, 3), clumps(600, 10, 20, 0.1, 4)]), 60),
    "uneven": (torch.cat([0.1 * draw(size, 8, seed=size) + centre for size, centre in zip(
        (600, 200, 60, 25, 10, 5), draw(6, 8, seed=6))]), 6),
}


@pytest.mark.parametrize("name", VECTORS)
def test_kmeans_is_as_good_as_faiss(name):
    faiss = pytest.importorskip("faiss")
    (x, k), found, wanted = VECTORS[name], [], []
    x = F.normalize(x, dim=-1)
    for seed in range(10):
        reference = faiss.Kmeans(x.shape[1], k, niter=20, spherical=True, seed=seed,
                                 min_points_per_centroid=1, max_points_per_centroid=10**9)
        reference.train(x.numpy())
        wanted.append((x @ torch.from_numpy(reference.centroids).T).amax(1).mean().item())
        centroids, label, cosine, objective = clip_cid.kmeans(x, k, seed)
        found.append(objective[-1])
        nearest = (x @ centroids.T).max(1)
        torch.testing.assert_close(cosine, nearest.values)
        assert torch.equal(label, nearest.indices)
        assert all(later > earlier - 1e-7 for earlier, later in itertools.pairwise(objective))
    assert np.mean(found) > 0.995 * np.mean(wanted)


@pytest.mark.parametrize("block", BLOCKS, indirect=True)
def test_kmeans_equals_lloyds_iterations_by_hand(block, monkeypatch):
    """From the same start, float64; ties go to the first centroid."""
    x = F.normalize(clumps(150, 6, 9, 0.3, 1), dim=-1)
    monkeypatch.setattr(clip_cid, "KMEANS_ITERATIONS", 0)
    centroids = clip_cid.kmeans(x, 8, 3)[0].double()
    monkeypatch.setattr(clip_cid, "KMEANS_ITERATIONS", 5)
    found, label, _, objective = clip_cid.kmeans(x, 8, 3)
    for iteration in range(6):
        cosine = [[(row @ centroid).item() for centroid in centroids] for row in x.double()]
        nearest = [values.index(max(values)) for values in cosine]
        assert objective[iteration] == pytest.approx(np.mean([max(row) for row in cosine]), abs=1e-6)
        if iteration < 5:
            sums = [sum(row for row, own in zip(x.double(), nearest) if own == c) for c in range(8)]
            centroids = torch.stack([total / total.norm() for total in sums])
    assert label.tolist() == nearest
    torch.testing.assert_close(found.double(), centroids, rtol=0, atol=1e-6)
    assert not torch.equal(clip_cid.kmeans(x, 8, 4)[0], found)


def test_as_many_clusters_as_vectors_and_too_many():
    x = unit_rows(30, 8)
    centroids, label, _, objective = clip_cid.kmeans(x, 30, 0)
    assert sorted(label.tolist()) == list(range(30)) and objective[0] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(centroids[label], x)
    with pytest.raises(UserError, match="--k 31.* 30 images"):
        clip_cid.kmeans(x, 31, 0)


@pytest.mark.parametrize("distinct, k", [(3, 10), (20, 20), (20, 300)])
def test_empty_clusters_start_again_at_vectors_that_have_none(distinct, k):
    """Copies of a few vectors: a random start holds some of them twice, others never."""
    x = F.normalize(copies(400, 6, distinct, 0), dim=-1)
    centroids, label, cosine, objective = clip_cid.kmeans(x, k, 0)
    assert objective[0] < 0.9999 or k > distinct
    assert centroids.isfinite().all() and objective[-1] == pytest.approx(1, abs=1e-6)
    assert ((x * centroids[label]).sum(1) > 1 - 1e-6).all()


# ---------------------------------------------------------------------------------- 3. losses


def dots(a, b, scale=1.0):
    return torch.stack([torch.stack([scale * (x * y).sum() for y in b]) for x in a])


def cross_entropy(logits, targets):
    rows = zip(logits, targets)
    return sum(sum(z.exp() for z in row).log() - row[t] for row, t in rows) / len(logits)


def kl(teacher_logits, student_logits):
    total = 0
    for t_row, s_row in zip(teacher_logits, student_logits):
        t_sum, s_sum = (sum(z.exp() for z in row) for row in (t_row, s_row))
        total = total + sum(t.exp() / t_sum * (t - t_sum.log() - s + s_sum.log())
                            for t, s in zip(t_row, s_row))
    return total / len(teacher_logits)


def length_one(rows):
    return torch.stack([row / row.square().sum().sqrt() for row in rows])


def reference_loss(model, u, v, t_image, t_text, label, chosen):
    """(total, terms) by the formulas, one sample and one cluster at a time.

    chosen: the clusters contrasted.
    """
    cfg, diagonal = model.cfg, range(len(u))
    scale, distil = model.student.logit_scale.exp(), model.distil_scale.exp()
    p = length_one([model.project_image.weight @ row for row in u])
    q = length_one([model.project_text.weight @ row for row in v])

    def both_ways(a, b, c, d, s):
        return (cross_entropy(dots(a, b, s), diagonal) + cross_entropy(dots(c, d, s), diagonal)) / 2

    terms = {"nce": both_ways(u, v, v, u, scale)}
    total = cfg.nce_weight * terms["nce"]
    prototypes = [length_one(model.prototypes)[c] for c in chosen]
    target = [chosen.index(own) for own in label.tolist()]
    logits = dots(p, prototypes, 32.0)
    t_logits = dots(t_image, prototypes, cfg.teacher_scale).detach()
    share = [row.exp() / row.exp().sum() for row in t_logits]
    terms["cluster_hard"] = cross_entropy(logits, target)
    terms["cluster_kl"] = kl(t_logits, logits)
    terms["teacher_entropy"] = -sum((row * row.log()).sum() for row in share) / len(share)
    for name in ("hard", "kl"):
        if cfg.cluster_terms in ("both", name):
            total = total + cfg.cluster_weight * terms[f"cluster_{name}"]

    cross = both_ways(p, t_text, q, t_image, distil)
    intra = both_ways(p, t_image, q, t_text, distil)
    s_t = model.teacher_logit_scale.exp()
    squares = (p - t_image).square().sum() + (q - t_text).square().sum()
    terms["instance"] = {
        "cross": cross, "intra": intra, "both": (cross + intra) / 2,
        "logit-kl": (kl(dots(t_image, t_text, s_t), dots(u, v, scale)) +
                     kl(dots(t_text, t_image, s_t), dots(v, u, scale))) / 2,
        "features": 2000 * squares / p.numel(),
    }[cfg.instance]
    total = total + cfg.instance_weight * terms["instance"]
    return total, terms


def make(cfg, seed=0):
    """A model in float64 whose parameters all have values of their own."""
    torch.manual_seed(seed)
    if cfg.method == "clip":
        return randomise(clip_cid.CLIPCID(cfg, SIZE), seed).double()
    centroids = unit_rows(cfg.k, WIDTH, seed=seed + 20)
    model = randomise(clip_cid.CLIPCID(cfg, SIZE, centroids, 1.5), seed).double()
    with torch.no_grad():
        model.distil_scale.fill_(1.1)
        model.student.logit_scale.fill_(1.9)
    return model


def teaching(count, k=7, seed=5):
    """t^I, t^T and labels of a batch, several of one cluster."""
    label = torch.randint(k - 2, (count,), generator=torch.Generator().manual_seed(seed))
    rows = [unit_rows(count, WIDTH, seed=seed + s, dtype=torch.float64) for s in (1, 2)]
    return (*rows, label)


def loss_and_gradients(model, function, u, v):
    """(total, terms, {name: gradient} of all that the total depends on)."""
    total, terms = function(u, v)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inputs = {"u": u, "v": v, **trained}
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return total, terms, {name: g for name, g in zip(inputs, found) if g is not None}


CASES = [dict(), dict(prototypes="teacher"), dict(prototypes="learned", cluster_terms="hard"),
         dict(cluster_terms="kl"), dict(cluster_weight=0.0), dict(instance_weight=0.0),
         dict(nce_weight=0.0), dict(cluster_weight=0.0, instance="features"), dict(sample_rate=0.75),
         *(dict(instance=mode) for mode in ("intra", "both", "logit-kl")),
         dict(sample_rate=0.75, prototypes="teacher", instance="features")]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_loss_and_its_gradient_equal_the_formulas(double, changes):
    cfg = config(**changes)
    model, (t_image, t_text, label) = make(cfg), teaching(5)
    u, v = (unit_rows(5, 12, seed=seed, dtype=double).requires_grad_() for seed in (1, 2))
    chosen = list(range(cfg.k))
    if cfg.sample_rate < 1:
        chosen = clip_cid.sample_clusters(label, cfg.k, cfg.sample_rate, 3)[0].tolist()
        assert len(chosen) == 5
    total, terms, found = loss_and_gradients(
        model, lambda *uv: model.loss(*uv, t_image, t_text, label, 3), u, v)
    wanted_total, wanted_terms, wanted = loss_and_gradients(
        model, lambda *uv: reference_loss(model, *uv, t_image, t_text, label, chosen), u, v)
    torch.testing.assert_close(total, wanted_total, rtol=1e-12, atol=0)
    terms = {name: term.detach() for name, term in terms.items()}
    assert_same(terms, {name: term.detach() for name, term in wanted_terms.items()}, 1e-10)
    assert_same(found, wanted, 1e-9)

def test_where_the_prototypes_start():
    centroids = unit_rows(7, WIDTH)
    frozen, learning, random = (clip_cid.CLIPCID(config(prototypes=kind), SIZE, centroids, 1.0).prototypes
                                for kind in ("teacher", "learned-from-teacher", "learned"))
    assert torch.equal(frozen, centroids) and not frozen.requires_grad
    assert torch.equal(learning, centroids) and learning.requires_grad
    assert learning.data_ptr() != centroids.data_ptr()
    assert (random * centroids).sum(1).abs().mean() < 0.7
    torch.testing.assert_close(random.norm(dim=1), torch.ones(7))


def test_gradients_are_derivatives(double):
    """Finite differences of each loss on its own; none reaches the teacher's side of a KL."""
    def rows(*shape, seed):
        return (0.9 * torch.tanh(unit_rows(*shape, seed=seed, dtype=double))).requires_grad_()

    teacher = rows(4, 5, seed=1)
    scale = torch.ones(1, dtype=double, requires_grad=True)
    checks = [
        (lambda s: clip_cid.cluster_kl(4 * teacher, 6 * s)[0], (rows(4, 5, seed=2),)),
        (clip_cid.contrast, (scale, rows(4, 3, seed=4), rows(4, 3, seed=5).detach())),
        (lambda a, b: clip_cid.info_nce((a, b)), (rows(4, 4, seed=6), rows(4, 4, seed=7))),
        (lambda a: clip_cid.similarity_kl((teacher,), (a,)), (rows(4, 5, seed=8),)),
    ]
    for function, inputs in checks:
        assert torch.autograd.gradcheck(function, inputs)
    for loss in (clip_cid.cluster_kl(teacher, rows(4, 5, seed=2))[0],
                 clip_cid.similarity_kl((teacher,), (rows(4, 5, seed=2),))):
        assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("k, rate, labels", [(50, 0.3, [3, 3, 41, 7]), (50, 0.01, [3, 3, 41, 7]),
                                             (6, 0.5, [0] * 9), (8, 0.25, [5, 1]), (5, 1.0, [4, 4])])
def test_sampled_clusters(k, rate, labels):
    label = torch.tensor(labels)
    for seed in range(20):
        chosen, place = clip_cid.sample_clusters(label, k, rate, seed)
        assert len(chosen) == min(k, max(round(rate * k), len(labels)))
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert set(labels) <= set(chosen.tolist()) <= set(range(k))
        assert torch.equal(chosen[place], label)
        assert torch.equal(chosen, clip_cid.sample_clusters(label, k, rate, seed)[0])


def test_negatives_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    k, draws, label = 20, 2000, torch.tensor([3, 7, 3])
    counts = sum(clip_cid.sample_clusters(label, k, 0.4, seed)[0].bincount(minlength=k)
                 for seed in range(draws))
    assert counts[3] == counts[7] == draws
    others, share = np.delete(counts.numpy(), [3, 7]), 6 / 18  # six of eighteen
    statistic = ((others - draws * share) ** 2).sum() / (draws * share * (1 - share)) * 17 / 18
    assert 1e-3 < stats.chi2.sf(statistic, 17) < 1 - 1e-4


def batch(size, count, dtype=torch.float64, seed=0):
    """Random pixels, and texts whose largest token, the end, stands at a random place."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, size.image_size, size.image_size, generator=generator)
    text = torch.randint(1, size.vocab_size - 1, (count, size.context_length), generator=generator)
    for row in text:
        end = int(torch.randint(1, size.context_length, (1,), generator=generator))
        row[end], row[end + 1:] = size.vocab_size - 1, 0
    return image.to(dtype), text


@pytest.mark.parametrize("changes", [dict(), dict(method="clip"), dict(instance="logit-kl"),
                                     dict(sample_rate=0.5, instance="both", grad_checkpoint=True)],
                         ids=str)
def test_chunks_give_the_gradient_of_the_whole_batch(double, changes):
    results = []
    for accum in (1, 4):
        cfg = config(**changes, accum=accum)
        model = make(cfg)
        clip_cid.prepare_towers(model, cfg)
        others = () if cfg.method == "clip" else (*teaching(8), 4)
        amp = contextlib.nullcontext()
        terms = clip_cid.backward(model, *batch(SIZE, 8), others, amp, SCALER)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((terms, found))
    (wanted_terms, wanted), (terms, found) = results
    assert_same(terms, wanted_terms, 1e-12)
    assert_same(found, wanted, 1e-10)
    assert {"student.visual.conv1.weight", "student.token_embedding.weight"} <= found.keys()


def test_a_step_trains_what_it_should_and_clamps_the_scales():
    cfg = config(prototypes="teacher")
    model = clip_cid.CLIPCID(cfg, SIZE, unit_rows(7, WIDTH), 1.0)
    optimiser = clip_cid.build_optimiser(model, cfg, CPU)
    with torch.no_grad():
        model.student.logit_scale.fill_(9)
        model.distil_scale.fill_(-2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = draw(8, WIDTH, seed=1).half(), draw(8, WIDTH, seed=2).half(), torch.arange(8) % 7
    others = clip_cid.teaching_inputs(stored, 2, 5, CPU)
    clip_cid.backward(model, *batch(SIZE, 8, torch.float32), others, contextlib.nullcontext(), SCALER)
    clip_cid.update(model, optimiser, SCALER, 1e-3)
    after = model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {"prototypes", "teacher_logit_scale"}
    assert model.student.logit_scale.exp().item() == pytest.approx(100)
    assert model.distil_scale.item() == 0


def test_a_tenth_of_the_run_warms_up():
    cfg, steps = config(lr=1e-3), 200
    rates = [clip_cid.schedules(cfg, step, steps)["lr"] for step in range(steps)]
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * i / 180)) / 2 for i in range(180)]
    assert rates == pytest.approx([*np.linspace(1e-6, 1e-3, 21)[:20], *cosine])


# ---------------------------------------------------------------------------------- 4. towers


@pytest.fixture(scope="module")
def open_clip():
    common.import_torchvision()
    return pytest.importorskip("open_clip")


SHAPES = {  # width, patch, head_width, mlp_ratio; text width, heads; embed_dim; QuickGELU; size
    "ViT-B/32": (768, 32, 64, 4.0, 512, 8, 512, True, 64),
    "ViT-L/14": (1024, 14, 64, 4.0, 768, 12, 768, True, 42),
    "ViT-H/14": (1280, 14, 80, 4.0, 1024, 16, 1024, False, 28),
    "ViT-bigG/14": (1664, 14, 104, 4.9231, 1280, 20, 1280, False, 28),
}


def open_clip_model(open_clip, shape):
    width, patch, head, ratio, text_width, heads, embed, quick, pixels = SHAPES[shape]
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=width, head_width=head, mlp_ratio=ratio,
                                     patch_size=patch, image_size=pixels)
    text = open_clip.CLIPTextCfg(layers=1, width=text_width, heads=heads, context_length=12,
                                 vocab_size=100)
    model = open_clip.model.CLIP(embed, vision, text, quick_gelu=quick)
    return randomise(model, matrices=0.01).eval()


def teacher_of(path, **changes):
    return clip_cid.load_teacher(clip_cid.Config(teacher=str(path), **changes), CPU)


@torch.no_grad()
def assert_same_towers(teacher, size, theirs, tolerance=1e-5, amp=contextlib.nullcontext()):
    image, text = batch(size, 3, torch.float32)
    with amp:
        ours = teacher.encode_image(image), teacher.encode_text(text)
    for found, wanted in zip(ours, (theirs.encode_image(image), theirs.encode_text(text))):
        wanted = F.normalize(wanted, dim=-1)
        assert (wanted[0] - wanted[1]).norm() > 0.05  # else the tolerance would mean little
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_teachers_equal_open_clip(open_clip, tmp_path, shape):
    model, path = open_clip_model(open_clip, shape), tmp_path / "open_clip_pytorch_model.bin"
    *_, quick, pixels = SHAPES[shape]
    torch.save(model.state_dict(), path)
    teacher, size = teacher_of(path, act="quick_gelu" if quick else "gelu")
    assert size.image_size == pixels and teacher.logit_scale.item() == model.logit_scale.item()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert_same_towers(teacher, size, model)
    if shape == "ViT-B/32":
        amp, _ = common.mixed_precision("bf16", CPU)
        assert_same_towers(teacher, size, model, 2e-2, amp)
        with pytest.raises(AssertionError, match="not close"):
            assert_same_towers(*teacher_of(path, act="gelu"), model)


def test_the_exported_student_is_a_plain_clip(open_clip, tmp_path):
    model = randomise(clip_cid.CLIPCID(config(), SIZE, unit_rows(7, WIDTH), 2.0), 2).eval()
    torch.save(common.checkpoint(model.student, config(), SIZE), tmp_path / "student.pt")
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, mlp_ratio=2.0, patch_size=8,
                                     image_size=16)
    text = open_clip.CLIPTextCfg(layers=1, width=64, heads=4, context_length=16, vocab_size=600)
    theirs = open_clip.model.CLIP(12, vision, text).eval()
    theirs.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True)["model"])
    assert_same_towers(model.student, SIZE, theirs)
    again, size = teacher_of(tmp_path / "student.pt")  # and it can teach
    assert size == SIZE
    assert_same_towers(again, size, theirs)


# --------------------------------------------------------------------- 5. what is taught to whom


class Colours:
    """Sample i is a plain colour of its own, with captions that name it; some cannot be read."""

    kind, digest, bad, broken = "captions", None, collections.Counter(), (5, 6, 31)

    def __len__(self):
        return 50  # of 40: the first ten again

    def key(self, i):
        return f"colour/{i % 40 * 7919 % 1000}"

    def colour(self, i):
        return i * 53 % 256, i * 101 % 256, i * 197 % 256

    def texts(self, i):
        return [f"{'abcdefg'[c]} colour {i} view {c}" for c in range(1 + i % 7)]

    def __getitem__(self, i):
        if i % 40 in self.broken:
            raise BadSample("cut off")
        return Image.new("RGB", (20 + i % 5, 18), self.colour(i % 40)), self.texts(i % 40)


def test_stages_teach_each_sample_what_the_teacher_sees_in_it(tmp_path, monkeypatch):
    """embed, balance and cluster, then the training samples: against the teacher asked directly."""
    torch.manual_seed(1)
    size = replace(SIZE, embed_dim=WIDTH, image_size=24, context_length=20)
    teacher = randomise(clip_cid.CLIP(size, clip_cid.VisionTransformer(size)), 4).eval()
    torch.save(common.checkpoint(teacher, config(), size), tmp_path / "teacher.pt")
    data, run = Colours(), tmp_path / "run"
    monkeypatch.setattr(common, "training_set", lambda *args: data)
    cfg = config(teacher=str(tmp_path / "teacher.pt"), out=str(run), k=4, remove=0.3, data="colours")
    samples, taught = clip_cid.prepare(cfg, SIZE, CPU)
    assert taught["teacher_logit_scale"] == pytest.approx(teacher.logit_scale.item())
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-3)

    @torch.no_grad()
    def seen(i):
        pixels = torch.tensor(data.colour(i)).expand(24, 24, 3).permute(2, 0, 1)[None]
        texts = common.CLIPTokenizer(20, 600)(data.texts(i))
        (image,) = teacher.encode_image(common.normalise(pixels, size.pixel_statistics(CPU)))
        return image, teacher.encode_text(texts)

    wanted = {i: seen(i) for i in range(40) if i not in data.broken}
    pairs = itertools.combinations(wanted, 2)
    assert min((wanted[a][0] - wanted[b][0]).norm() for a, b in pairs) > 5e-3  # none is another's
    image, text = (torch.from_numpy(np.load(run / f"{name}.npy")).float() for name in ("image", "text"))
    assert common.read_keys(run / "keys.txt") == [data.key(i) for i in range(40)]
    for i in range(40):
        own, texts = wanted.get(i, (torch.zeros(WIDTH), torch.zeros(0, WIDTH)))
        close(image[i], own)
        close(text[:, i], F.pad(texts[:5], (0, 0, 0, 5 - len(texts[:5]))))

    def check(sample, i):
        picture, tokens, _, t_image, t_text, label = sample
        assert (picture == torch.tensor(data.colour(i)).view(3, 1, 1)).all()
        (caption,) = (SIZE.tokenizer()(data.texts(i)) == tokens).all(1).nonzero()
        close(t_image.float(), wanted[i][0])
        close(t_text.float(), wanted[i][1][caption.item()])
        cosine = taught["centroids"] @ wanted[i][0]
        assert cosine[label] > cosine.max() - 2e-3

    kept = common.read_keys(run / "kept.txt")
    assert len(kept) == 37 - round(0.3 * 37)
    places = [i for i in range(50) if data.key(i) in kept]
    assert len(samples) == len(places) > len(kept)  # a repeated sample is trained on twice
    for place, index in enumerate(places):
        check(samples[2, place], index % 40)
    data.broken = places[:2]  # since: the next one stands in, with what belongs to it
    check(samples[0, 0], places[2])
