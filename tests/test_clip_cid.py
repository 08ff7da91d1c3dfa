"""clip_cid.py against independent references.

scipy (components, single linkage, spanning trees), faiss (k-means), open_clip and transformers (towers; a test is
skipped where its reference is not installed), closed forms, and loops in float64 written here.
"""

import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import clip_cid
import common
import eclipse
from common import BadSample, UserError

SMALL = dict(image_size=16, patch_size=8, vision_width=64, vision_layers=2, vision_heads=4, vision_mlp=96, embed_dim=12,
             text_width=64, text_layers=1, text_heads=4, context_length=16, vocab_size=600, k=7, data="emoji",
             method="clip_cid", cluster_terms="both", prototypes="teacher", cluster_scale=8.0, teacher_scale=5.0,
             sample_rate=1.0, margin_type="none", margin=0.0, text_cluster=False, cluster_features="image",
             instance="cross", cluster_weight=0.7, instance_weight=1.3, feature_weight=0.0, workers=0, device="cpu")
SCALER = torch.amp.GradScaler("cpu", enabled=False)
WIDTH = 10  # of the teacher's embeddings


@pytest.fixture
def double(monkeypatch):
    """float64 throughout: .float(), which lifts bf16 features to fp32, would cut them down."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return torch.float64


def config(**changes):
    return clip_cid.Config(**{**SMALL, **changes})


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit_rows(*shape, seed=0, dtype=torch.float32):
    return F.normalize(draw(*shape, seed=seed, dtype=torch.float64), dim=-1).to(dtype)


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


# --------------------------------------------------------------------------------------------------------- 1. balance


def clumps(n, d, centres, spread, seed):
    where = torch.randint(centres, (n,), generator=torch.Generator().manual_seed(seed))
    return (unit_rows(centres, d, seed=seed)[where] + spread * draw(n, d, seed=seed + 1)).numpy()


def copies(n, d, distinct, seed):
    """Each row one of a few vectors, scaled by powers of two: copies to the last bit, once they are unit vectors."""
    generator = np.random.default_rng(seed)
    return draw(distinct, d, seed=seed).numpy()[generator.integers(distinct, size=n)] * \
        2.0 ** generator.integers(-2, 3, (n, 1)).astype(np.float32)


DATA = {
    "scattered": lambda: draw(150, 6).numpy(),
    "clumps": lambda: clumps(160, 16, 12, 0.08, 1),
    "fp16": lambda: clumps(140, 24, 9, 0.1, 2).astype(np.float16),
    "copies": lambda: copies(120, 5, 30, 3),
    "near copies": lambda: np.concatenate([copies(60, 8, 20, 4), clumps(60, 8, 5, 0.02, 5)]),
    "chain": lambda: np.stack([np.cos(t := np.linspace(0.5, 3, 61) ** 2 / 3), np.sin(t)], 1).astype(np.float32),
    "all equal": lambda: np.tile(draw(1, 7).numpy(), (40, 1)),
    "all far": lambda: np.eye(33, dtype=np.float32),
    "two": lambda: draw(2, 4).numpy(),
    "one": lambda: draw(1, 4).numpy(),
}
LARGE = {"large": lambda: clumps(900, 8, 60, 0.15, 6)}  # lower_bound() needs parts of 256
BLOCKS = (1, 7, 64, 5000)


def as_rows(array):
    return common.Rows([array], np.arange(len(array)), "cpu")


def pairs_of(array):
    """i, j and cosine of all pairs i < j, float64."""
    x = array.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    i, j = np.triu_indices(len(x), 1)
    return i, j, (x @ x.T)[i, j]


def clear_floor(cosine, share):
    """A cosine that about this share of the pairs exceed, and from which all of them are at least 2e-6 away."""
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


def merging_levels(array):
    """The cosines at which single linkage joins groups, best first."""
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    x = array.astype(np.float64) / np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
    tree = hierarchy.linkage(x, "single")
    return 1 - tree[:, 2] ** 2 / 2, tree, hierarchy


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", [name for name in DATA if name != "one"])
def test_near_pairs_are_all_pairs_above_the_floor(name, block):
    array = DATA[name]()[:60 if block == 1 else None]
    i, j, cosine = pairs_of(array)
    for share in (0.0, 0.1, 1.0):
        floor = clear_floor(cosine, share)
        parts = list(clip_cid.near_pairs(as_rows(array), lambda: floor, block))
        a, b, found = (torch.cat(each).numpy() for each in zip(*parts))
        wanted = dict(zip(zip(i[cosine > floor], j[cosine > floor]), cosine[cosine > floor]))
        pairs = list(zip(a.tolist(), b.tolist()))
        assert len(pairs) == len(set(pairs)) and set(pairs) == wanted.keys()
        assert all(abs(wanted[pair] - value) < 1e-6 for pair, value in zip(pairs, found))


def test_near_pairs_asks_for_the_floor_anew():
    array = DATA["clumps"]()
    i, j, cosine = pairs_of(array)
    low, high = clear_floor(cosine, 0.3), clear_floor(cosine, 0.05)
    asked, found = [], []
    for number, part in enumerate(clip_cid.near_pairs(as_rows(array), lambda: asked.append(1) or
                                                      (low if len(asked) < 6 else high), 40)):
        found += list(zip(part[0].tolist(), part[1].tolist(), part[2].tolist()))
        assert number < 3 or not len(part[2]) or part[2].min() > high
    assert {(a, b) for a, b, value in found if value > high} == set(zip(i[cosine > high], j[cosine > high]))


class Allocations(TorchDispatchMode):
    """The largest storage that an operator returned, in elements; views of the given tensor do not count."""

    def __init__(self, x):
        super().__init__()
        self.known, self.largest = x.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() != self.known:
                self.largest = max(self.largest, part.untyped_storage().nbytes() // part.element_size())
        return out


@pytest.mark.parametrize("near", [True, False])
def test_memory_is_of_the_order_of_the_block(near):
    """Of near_pairs block², of find_groups that and a few edges a vector, also where all n² / 2 pairs are near."""
    n, block = 300, 20
    x = unit_rows(1, 20).repeat(n, 1) if near else unit_rows(n, 20)
    with Allocations(x) as seen:
        count = sum(len(i) for i, _, _ in clip_cid.near_pairs(x, lambda: 0.99, block))
    assert (count == n * (n - 1) / 2) == near and block ** 2 <= seen.largest <= 2 * block ** 2
    with Allocations(x) as seen:
        clip_cid.find_groups(x, block, eps=0.1, buffer=10)
    assert seen.largest <= 2 * (2 * n + block ** 2 + n)  # both ends of the edges: waiting, one more block, the forest


@pytest.mark.parametrize("block, buffer", [(1, 0), (7, 10), (64, 100), (5000, 2**22)])
@pytest.mark.parametrize("name", DATA)
def test_groups_are_the_components_of_the_near_pairs(name, block, buffer):
    array = DATA[name]()[:60 if block == 1 else None]
    i, j, cosine = pairs_of(array)
    for share in (0.0, 0.01, 0.1, 1.0):
        floor = clear_floor(cosine, share) if len(array) > 1 else 0.9
        eps, near = math.sqrt(2 - 2 * floor), cosine > floor
        group, found_eps, pairs = clip_cid.find_groups(as_rows(array), block, eps=eps, buffer=buffer)
        assert torch.equal(group, components(len(array), i[near], j[near]))
        assert (found_eps, pairs) == (eps, near.sum())


@pytest.mark.parametrize("block, buffer", [(7, 0), (64, 100), (5000, 2**22)])
@pytest.mark.parametrize("name", [*DATA, *LARGE])
def test_remove_meets_its_target_as_single_linkage_does(name, block, buffer):
    if (name, block) == ("large", 7):
        block = 100
    array = {**DATA, **LARGE}[name]()
    n, (i, j, cosine) = len(array), pairs_of(array)
    levels, tree, hierarchy = merging_levels(array) if n > 1 else (np.array([]), None, None)
    gaps = -np.diff(levels)
    reachable = [0, *(1 + np.flatnonzero(gaps > 1e-6)), len(levels)]
    for remove in (0.0, 0.02, 0.3, 0.437, 0.7):
        group, eps, _ = clip_cid.find_groups(as_rows(array), block, remove=remove, buffer=buffer)
        removed, target = n - len(group.unique()), round(remove * n)
        beyond = np.abs(levels - levels[target - 1]) if target and n > 1 else np.zeros(1)
        assert not ((beyond > 3e-7) & (beyond < 3e-6)).any()  # else rounding would say whether they are ties
        assert abs(removed - target) == min(abs(count - target) for count in reachable)
        near = cosine > 1 - eps ** 2 / 2
        if removed or not (cosine > 1 - 1e-6).any():  # eps 0 where not even copies are to go
            assert torch.equal(group, components(n, i[near], j[near]))
        if removed:
            assert torch.equal(group, lowest_names(hierarchy.fcluster(tree, n - removed, "maxclust")))
        if n > 1 and not (gaps < 1e-6).any():
            assert removed == target


def test_remove_takes_the_side_of_the_ties_that_is_nearer():
    """Three pairs at 0.99, ten at 0.9; half-way means more."""
    angles = torch.tensor([0.99] * 3 + [0.9] * 10).acos()
    x = torch.zeros(26, 26)
    for number, angle in enumerate(angles):
        x[2 * number, 2 * number] = 1
        x[2 * number + 1, 2 * number:2 * number + 2] = torch.stack([angle.cos(), angle.sin()])
    for target, wanted in ((1, 0), (2, 3), (3, 3), (7, 3), (8, 13), (9, 13), (12, 13), (13, 13)):
        group, eps, _ = clip_cid.find_groups(x, 8, remove=target / 26)
        assert 26 - len(group.unique()) == wanted
        assert eps == pytest.approx({0: 0, 3: math.sqrt(0.02), 13: math.sqrt(0.2)}[wanted], abs=1e-4)


@pytest.mark.parametrize("n", [2, 4, 30])
def test_removing_nearly_all_leaves_one(n):
    group, _, _ = clip_cid.find_groups(unit_rows(n, 6), 8, remove=0.99)
    assert group.tolist() == [0] * n


@pytest.mark.parametrize("seed, n, edges", [(0, 60, 150), (1, 200, 190), (2, 50, 1000), (3, 300, 60), (4, 5, 0)])
def test_spanning_forest_equals_scipy(seed, n, edges):
    sparse = pytest.importorskip("scipy.sparse")
    generator = np.random.default_rng(seed)
    every = np.stack(np.triu_indices(n, 1), 1)
    i, j = generator.permutation(every)[:edges].T
    i, j = np.where(flip := generator.random(edges) < 0.5, j, i), np.where(flip, i, j)
    weight = np.arange(1.0, edges + 1)  # best first
    used, component = clip_cid.spanning_forest(n, torch.from_numpy(i), torch.from_numpy(j))
    tree = sparse.csgraph.minimum_spanning_tree(sparse.coo_matrix((weight, (i, j)), (n, n)))
    assert weight[used.numpy()].tolist() == sorted(tree.data)
    assert torch.equal(component, components(n, i, j)) and n - len(component.unique()) == used.sum()


@pytest.mark.parametrize("name", ["scattered", "clumps", "copies", "near copies", "all equal", "all far", "large"])
@pytest.mark.parametrize("block, part", [(100, 32), (7, 16), (64, 32)])
def test_lower_bound_is_that_of_the_parts(name, block, part):
    array = {**DATA, **LARGE}[name]()
    levels, whole = merging_levels(array)[0], len(array) // part * (part - 1)
    inside = np.concatenate([merging_levels(array[start:start + part])[0]
                             for start in range(0, len(array) - part + 1, part)])
    inside = -np.sort(-inside)
    for count in {1, 2, len(array) // 4, len(array) // 2, whole, whole + 1} - {len(array)}:
        bound = clip_cid.lower_bound(as_rows(array), count, block, part)
        assert bound <= levels[count - 1]
        assert bound == pytest.approx(inside[count - 1] if count <= whole else -2, abs=2e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", DATA)
def test_the_kept_image_is_the_one_nearest_to_its_groups_mean(name, block):
    array = DATA[name]()
    x = array.astype(np.float64) / np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
    n, (i, j, cosine) = len(array), pairs_of(array)
    near = cosine > (clear_floor(cosine, 0.05) if n > 1 else 0)
    shuffled = np.random.default_rng(0).permutation(max(1, n // 4))[np.arange(n) % max(1, n // 4)]
    for group in (components(n, i[near], j[near]), lowest_names(shuffled), torch.arange(n)):
        kept = clip_cid.centres(as_rows(array), group, block)
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == len(group.unique())
        for name_of_group in group.unique().tolist():
            members = [m for m in range(n) if group[m] == name_of_group]
            mean = sum(x[m] for m in members)
            score = [x[m] @ mean / np.linalg.norm(mean) for m in members]
            (own,) = set(members) & set(kept.tolist())
            assert score[members.index(own)] > max(score) - 2e-6
            assert own <= min(m for m, value in zip(members, score) if value > max(score) - 5e-7)


class Counted:
    """Rows that remember which of them were asked for."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, positions):
        self.asked.append(torch.arange(len(self.x))[positions])
        return self.x[positions]


def test_centres_hold_one_block_at_a_time():
    x = Counted(unit_rows(500, 8))
    clip_cid.centres(x, torch.arange(500) // 100 * 100, 16)
    assert max(map(len, x.asked)) <= 16


def as_processes(count, work, monkeypatch):
    """[work() of each process]: threads that share the work and gather as processes do."""
    mine, barrier, slots = threading.local(), threading.Barrier(count, timeout=60), [None] * count

    def gather_objects(thing):
        slots[mine.rank] = thing
        barrier.wait()
        things = list(slots)
        barrier.wait()
        return things

    def process(number):
        mine.rank = number
        try:
            return work()
        except BaseException:
            barrier.abort()  # else the others would wait
            raise

    with monkeypatch.context() as patched, concurrent.futures.ThreadPoolExecutor(count) as pool:
        patched.setattr(clip_cid, "rank", lambda: mine.rank)
        patched.setattr(clip_cid, "world_size", lambda: count)
        patched.setattr(common, "gather_objects", gather_objects)
        patched.setattr(common, "sum_over_processes", lambda x: sum(gather_objects(x)))
        futures = [pool.submit(process, number) for number in range(count)]
        errors = [future.exception() for future in futures if future.exception()]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]


@pytest.mark.parametrize("processes, block", [(2, 40), (3, 64), (2, 5000), (4, 100)])
def test_processes_share_the_work(monkeypatch, processes, block):
    """Also when there are fewer blocks than processes."""
    x = as_rows(DATA["clumps"]())

    def work():
        return (clip_cid.find_groups(x, block, eps=0.3, buffer=10), clip_cid.find_groups(x, block, remove=0.4),
                clip_cid.kmeans(x, 6, 4, 0, block))

    (group, _, pairs), (share, eps, _), (centroids, label, objective) = work()
    assert pairs > 50
    for found in as_processes(processes, work, monkeypatch):
        assert torch.equal(found[0][0], group) and found[0][2] == pairs
        assert torch.equal(found[1][0], share) and found[1][1] == pytest.approx(eps, abs=1e-6)
        torch.testing.assert_close(found[2][0], centroids, rtol=0, atol=1e-6)
        assert torch.equal(found[2][1], label) and found[2][2] == pytest.approx(objective, abs=1e-6)


# --------------------------------------------------------------------------------------------------------- 2. SemDeDup


@pytest.mark.parametrize("block", [1, 13, 1000])
def test_semdedup_equals_a_loop(block):
    """Of two near ones the one nearer to the centroid goes, as in SemDeDup's code with keep_hard."""
    array = clumps(200, 8, 30, 0.05, 0)
    x = F.normalize(torch.from_numpy(array), dim=-1)
    centroids, label = unit_rows(6, 8, seed=1), torch.randint(5, (200,), generator=torch.Generator().manual_seed(2))
    wanted, x64 = torch.full((200,), -1.0, dtype=torch.float64), x.double()
    for cluster in range(6):
        members = [m for m in range(200) if label[m] == cluster]
        far = sorted(members, key=lambda m: (x64[m] @ centroids[cluster].double()).item())
        for place, member in enumerate(far[1:], 1):
            wanted[member] = max(x64[member] @ x64[other] for other in far[:place])
    found = clip_cid.semdedup(x, centroids, label, block)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
    assert (found == -1).sum() == 5 and 20 < (found > 0.95).sum() < 190


# ---------------------------------------------------------------------------------------------------------- 3. k-means

VECTORS = {"scattered": lambda: draw(1500, 12), "clumps": lambda: torch.from_numpy(clumps(1500, 24, 30, 0.1, 1)),
           "wide clumps": lambda: torch.from_numpy(clumps(2000, 16, 8, 0.3, 2)),
           "copies": lambda: torch.from_numpy(np.concatenate([copies(600, 10, 50, 3), clumps(600, 10, 20, 0.1, 4)])),
           "uneven": lambda: torch.cat([clump + centre for clump, centre in zip(
               (0.1 * draw(900, 8, seed=5)).split([600, 200, 60, 25, 10, 5]), draw(6, 8, seed=6))])}


@pytest.mark.parametrize("name, k", [("scattered", 40), ("clumps", 30), ("wide clumps", 20), ("copies", 60),
                                     ("uneven", 6)])
def test_kmeans_is_as_good_as_faiss(name, k):
    faiss = pytest.importorskip("faiss")
    x, found, wanted = F.normalize(VECTORS[name](), dim=-1), [], []
    for seed in range(3):
        reference = faiss.Kmeans(x.shape[1], k, niter=20, spherical=True, seed=seed, min_points_per_centroid=1,
                                 max_points_per_centroid=10**9)
        reference.train(x.numpy())
        wanted.append((x @ torch.from_numpy(reference.centroids).T).amax(1).mean().item())
        centroids, label, objective = clip_cid.kmeans(x, k, 20, seed, 256)
        found.append(objective[-1])
        assert objective[-1] == pytest.approx((x @ centroids.T).amax(1).mean().item(), abs=1e-6)
        assert all(later > earlier - 1e-7 for earlier, later in itertools.pairwise(objective))
        assert len(objective) == 21 and objective[-1] > objective[0]
    assert np.mean(found) > 0.99 * np.mean(wanted)


@pytest.mark.parametrize("block", [1, 17, 4096])
def test_kmeans_equals_lloyds_iterations_by_hand(block):
    """From the same start, float64; every vector is read once an iteration; ties go to the first centroid."""
    x = F.normalize(torch.from_numpy(clumps(150, 6, 9, 0.3, 1)), dim=-1)
    rows, centroids = Counted(x), clip_cid.seed_centroids(x, 8, 3).double()
    found, label, objective = clip_cid.kmeans(rows, 8, 5, 3, block)
    for iteration in range(6):
        cosine = [[(row @ centroid).item() for centroid in centroids] for row in x.double()]
        nearest = [values.index(max(values)) for values in cosine]
        assert objective[iteration] == pytest.approx(np.mean([max(values) for values in cosine]), abs=1e-6)
        if iteration < 5:
            sums = [sum(row for row, own in zip(x.double(), nearest) if own == c) for c in range(8)]
            centroids = torch.stack([total / total.norm() for total in sums])
    assert label.tolist() == nearest
    torch.testing.assert_close(found.double(), centroids, rtol=0, atol=1e-6)
    asked = torch.cat(rows.asked[1:]).bincount(minlength=150)  # the first look takes the seeds
    assert (asked == 6).all() and len(rows.asked[0]) == 150


def test_the_block_changes_nothing():
    x = F.normalize(VECTORS["clumps"](), dim=-1)
    results = [clip_cid.kmeans(x, 30, 8, 0, block) for block in (7, 100, 5000)]
    for centroids, label, objective in results[1:]:
        assert torch.equal(label, results[0][1]) and objective == pytest.approx(results[0][2], abs=1e-6)
        torch.testing.assert_close(centroids, results[0][0], rtol=0, atol=1e-5)


def test_kmeans_follows_its_seed():
    x = F.normalize(VECTORS["scattered"](), dim=-1)
    first, again, other = (clip_cid.kmeans(x, 10, 3, seed, 200) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]
    assert not torch.equal(first[0], other[0])


def test_empty_clusters_start_again_at_the_vectors_that_are_worst_served(monkeypatch):
    x = F.normalize(torch.from_numpy(clumps(200, 8, 5, 0.02, 1)), dim=-1)
    monkeypatch.setattr(clip_cid, "seed_centroids", lambda x, k, seed: x[:1].repeat(k, 1))
    worst = (x @ x[0]).argsort()[:4]
    centroids, _, _ = clip_cid.kmeans(x, 5, 1, 0, 64)
    assert torch.equal(centroids[1:], x[worst])
    torch.testing.assert_close(centroids[0], F.normalize(x.sum(0), dim=-1))
    _, label, objective = clip_cid.kmeans(x, 5, 20, 0, 64)
    assert (label.bincount(minlength=5) > 0).all()
    assert all(later > earlier - 1e-7 for earlier, later in itertools.pairwise(objective))


def test_as_many_clusters_as_vectors_and_too_many():
    x = unit_rows(30, 8)
    centroids, label, objective = clip_cid.kmeans(x, 30, 3, 0, 8)
    assert sorted(label.tolist()) == list(range(30)) and objective[0] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(centroids[label], x)
    with pytest.raises(UserError, match="--k 31.* 30 vectors"):
        clip_cid.kmeans(x, 31, 3, 0, 8)


@pytest.mark.parametrize("distinct, k", [(3, 10), (1, 6), (20, 300)])
def test_fewer_distinct_vectors_than_clusters(distinct, k):
    x = F.normalize(torch.from_numpy(copies(400, 6, distinct, 0)), dim=-1)
    centroids, label, objective = clip_cid.kmeans(x, k, 4, 0, 64)
    assert centroids.isfinite().all() and objective[-1] == pytest.approx(1, abs=1e-6)
    assert ((x * centroids[label]).sum(1) > 1 - 1e-6).all()


def test_kmeans_plus_plus_draws_in_proportion_to_the_distance():
    stats = pytest.importorskip("scipy.stats")
    x = F.normalize(torch.tensor([[1, 0.0], [1, 0.3], [0, 1], [-1, 0.2], [1, 1]]), dim=-1)
    wanted = 1 - x.double() @ x.double().T
    wanted = (wanted / wanted.sum(1, keepdim=True) / 5).numpy()
    counts, draws = np.zeros((5, 5)), 3000
    for seed in range(draws):
        first, second = ((x == row).all(1).nonzero().item() for row in clip_cid.seed_centroids(x, 2, seed))
        counts[first, second] += 1
    places = ~np.eye(5, dtype=bool)
    assert counts[~places].sum() == 0
    assert stats.chisquare(counts[places], draws * wanted[places]).pvalue > 1e-3


def test_several_seeds_a_round_are_different_vectors():
    x = unit_rows(450, 5)
    chosen = clip_cid.seed_centroids(x, 400, 0)
    assert len(chosen.unique(dim=0)) == 400


# ----------------------------------------------------------------------------------------------------------- 4. losses


def dots(a, b, scale=1.0):
    return torch.stack([torch.stack([scale * (x * y).sum() for y in b]) for x in a])


def cross_entropy(logits, targets):
    return sum(sum(z.exp() for z in row).log() - row[t] for row, t in zip(logits, targets)) / len(logits)


def kl(teacher_logits, student_logits):
    total = 0
    for t_row, s_row in zip(teacher_logits, student_logits):
        t_sum, s_sum = (sum(z.exp() for z in row) for row in (t_row, s_row))
        total = total + sum(t.exp() / t_sum * (t - t_sum.log() - s + s_sum.log()) for t, s in zip(t_row, s_row))
    return total / len(teacher_logits)


def entropy(logits):
    p = [row.exp() / row.exp().sum() for row in logits]
    return -sum((row * row.log()).sum() for row in p) / len(p)


def own_made_harder(cosine, targets, margin_type, margin):
    rows = [list(row) for row in cosine]
    for row, t in zip(rows, targets):
        if margin_type == "cosface":
            row[t] = row[t] - margin
        elif margin_type == "arcface":
            angle = row[t].acos()
            row[t] = (angle + margin).cos() if angle + margin < math.pi else row[t] - margin * math.sin(margin)
    return torch.stack([torch.stack(row) for row in rows])


def length_one(rows):
    return torch.stack([row / row.square().sum().sqrt() for row in rows])


def reference_loss(model, u, v, t_image, t_text, label, chosen):
    """(total, terms) by the formulas, one sample and one cluster at a time; chosen: the clusters contrasted."""
    cfg, diagonal = model.cfg, range(len(u))
    scale, distil = model.student.logit_scale.exp(), model.distil_scale.exp()
    p = length_one([model.project_image.weight @ row for row in u])
    q = length_one([model.project_text.weight @ row for row in v])
    terms = {"nce": (cross_entropy(dots(u, v, scale), diagonal) + cross_entropy(dots(v, u, scale), diagonal)) / 2}
    total = terms["nce"]
    if cfg.cluster_weight:
        centroids = length_one(model.centroids)
        prototypes = centroids if cfg.prototypes == "teacher" else length_one(model.prototypes)
        centroids, prototypes = ([rows[c] for c in chosen] for rows in (centroids, prototypes))
        target = [chosen.index(own) for own in label.tolist()]
        t = {"image": t_image, "text": t_text, "joint": length_one(t_image + t_text)}[cfg.cluster_features]
        sides = [dots(side, prototypes) for side in ((p, q) if cfg.text_cluster else (p,))]
        terms["cluster_hard"] = sum(cross_entropy(cfg.cluster_scale * own_made_harder(
            cosine, target, cfg.margin_type, cfg.margin), target) for cosine in sides) / len(sides)
        t_logits = dots(t, centroids, cfg.teacher_scale)
        terms["cluster_kl"] = sum(kl(t_logits, cfg.cluster_scale * cosine) for cosine in sides) / len(sides)
        terms["teacher_entropy"] = entropy(t_logits)
        used = {"both": ["cluster_hard", "cluster_kl"], "hard": ["cluster_hard"], "kl": ["cluster_kl"]}
        total = total + cfg.cluster_weight * sum(terms[name] for name in used[cfg.cluster_terms])
    if cfg.instance_weight:
        cross = (cross_entropy(dots(p, t_text, distil), diagonal) + cross_entropy(dots(q, t_image, distil), diagonal))
        intra = (cross_entropy(dots(p, t_image, distil), diagonal) + cross_entropy(dots(q, t_text, distil), diagonal))
        terms["instance"] = {"cross": cross / 2, "intra": intra / 2, "both": (cross + intra) / 4}.get(cfg.instance)
        if cfg.instance == "logit-kl":
            s_t = model.teacher_logit_scale.exp()
            terms["instance"] = (kl(dots(t_image, t_text, s_t), dots(u, v, scale)) +
                                 kl(dots(t_text, t_image, s_t), dots(v, u, scale))) / 2
        total = total + cfg.instance_weight * terms["instance"]
    if cfg.feature_weight:
        terms["mimicry"] = ((p - t_image).square().sum() + (q - t_text).square().sum()) / p.numel()
        total = total + cfg.feature_weight * terms["mimicry"]
    return total, terms


def make(cfg, seed=0):
    """A model in float64 whose parameters all have values of their own."""
    torch.manual_seed(seed)
    model = clip_cid.build(cfg, centroids=draw(cfg.k, WIDTH, seed=seed + 20), teacher_logit_scale=1.5)
    model = randomise(model, seed).double()
    model.centroids = unit_rows(cfg.k, WIDTH, seed=seed + 20, dtype=torch.float64)
    with torch.no_grad():
        model.distil_scale.fill_(1.1)
        model.student.logit_scale.fill_(1.9)
    return model


def teaching(count, k=7, seed=5):
    """t^I, t^T and labels of a batch, several of one cluster."""
    label = torch.randint(k - 2, (count,), generator=torch.Generator().manual_seed(seed))
    return (*(unit_rows(count, WIDTH, seed=seed + s, dtype=torch.float64) for s in (1, 2)), label)


def loss_and_gradients(model, function, u, v):
    """(total, terms, {name: gradient} of all that the total depends on)."""
    total, terms = function(u, v)
    inputs = {"u": u, "v": v, **dict(model.named_parameters())}
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return total, terms, {name: g for name, g in zip(inputs, found) if g is not None}


CASES = [dict(), dict(cluster_terms="hard"), dict(cluster_terms="kl"), dict(cluster_weight=0.0),
         dict(instance_weight=0.0), dict(cluster_weight=0.0, instance_weight=0.0, feature_weight=3.0),
         *(dict(instance=mode) for mode in ("intra", "both", "logit-kl")), dict(text_cluster=True),
         dict(text_cluster=True, cluster_features="text", feature_weight=0.5), dict(cluster_features="joint"),
         dict(prototypes="learned-from-teacher"), dict(prototypes="learned", text_cluster=True),
         dict(margin_type="cosface", margin=0.3), dict(margin_type="arcface", margin=0.4, text_cluster=True),
         dict(sample_rate=0.75), dict(sample_rate=0.75, prototypes="learned", margin_type="arcface", margin=0.2),
         dict(cluster_weight=0.0, instance="logit-kl")]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_loss_and_its_gradient_equal_the_formulas(double, changes):
    cfg = config(**changes)
    model, (t_image, t_text, label) = make(cfg), teaching(5)
    u, v = (unit_rows(5, cfg.embed_dim, seed=seed, dtype=double).requires_grad_() for seed in (1, 2))
    chosen = list(range(cfg.k))
    if cfg.sample_rate < 1:
        chosen = clip_cid.sample_clusters(label, cfg.k, cfg.sample_rate, 3)[0].tolist()
        assert len(chosen) == 5
    total, terms, found = loss_and_gradients(model, lambda *uv: model.loss(*uv, (t_image, t_text, label), 3), u, v)
    wanted_total, wanted_terms, wanted = loss_and_gradients(
        model, lambda *uv: reference_loss(model, *uv, t_image, t_text, label, chosen), u, v)
    torch.testing.assert_close(total, wanted_total, rtol=1e-12, atol=0)
    assert not any(term.requires_grad for term in terms.values())
    assert_same(terms, {name: term.detach() for name, term in wanted_terms.items()}, 1e-10)
    assert_same(found, wanted, 1e-9)
    clusters, contrasts = cfg.cluster_weight > 0, cfg.instance_weight > 0 and cfg.instance != "logit-kl"
    trained = {"u": True, "v": True, "student.logit_scale": True, "distil_scale": contrasts,
               "project_image.weight": clusters or contrasts or cfg.feature_weight > 0,
               "project_text.weight": clusters and cfg.text_cluster or contrasts or cfg.feature_weight > 0,
               "prototypes": clusters and cfg.prototypes != "teacher"}
    assert found.keys() == {name for name, so in trained.items() if so}  # no tower: u and v are given here
    assert {"centroids", "teacher_logit_scale"} <= dict(model.named_buffers()).keys()


def test_where_the_prototypes_start():
    centroids = 3 * draw(7, WIDTH)
    model = {kind: clip_cid.build(config(prototypes=kind), centroids=centroids, teacher_logit_scale=1)
             for kind in ("teacher", "learned-from-teacher", "learned")}
    wanted = F.normalize(centroids, dim=-1)
    assert all(torch.allclose(each.centroids, wanted) for each in model.values())
    assert not hasattr(model["teacher"], "prototypes")
    assert torch.allclose(model["learned-from-teacher"].prototypes, wanted)
    assert (model["learned"].prototypes * wanted).sum(1).abs().mean() < 0.7
    with torch.no_grad():
        model["learned-from-teacher"].prototypes.zero_()
    assert torch.allclose(model["learned-from-teacher"].centroids, wanted)  # no shared memory
    assert model["teacher"].distil_scale.exp().item() == pytest.approx(1 / 0.07)


def test_without_a_teacher_the_loss_is_clips(double):
    model = clip_cid.build(config(method="clip")).double()
    u, v = unit_rows(5, 12, seed=1, dtype=double), unit_rows(5, 12, seed=2, dtype=double)
    scale = model.student.logit_scale.exp()
    wanted = (cross_entropy(dots(u, v, scale), range(5)) + cross_entropy(dots(v, u, scale), range(5))) / 2
    total, terms = model.loss(u, v, None, 0)
    torch.testing.assert_close(total, wanted)
    assert terms.keys() == {"nce"} and {n.split(".")[0] for n, _ in model.named_parameters()} == {"student"}


def test_gradients_are_derivatives(double):
    """Finite differences of each loss on its own."""
    def cosines(*shape, seed):
        return (0.9 * torch.tanh(draw(*shape, seed=seed, dtype=double))).requires_grad_()

    target = torch.tensor([2, 0, 2, 4])
    checks = [(clip_cid.cluster_hard, (cosines(4, 5, seed=1), target, 6.0, kind, 0.4)) for kind in
              ("none", "cosface", "arcface")]
    checks += [(lambda s, t: clip_cid.cluster_kl(s, t, 6.0, 4.0)[0], (cosines(4, 5, seed=2),
                                                                   cosines(4, 5, seed=3).detach())),
               (clip_cid.contrast, (draw(1, dtype=double).requires_grad_(), cosines(4, 3, seed=4),
                                    cosines(4, 3, seed=5).detach())),
               (lambda a, b: clip_cid.info_nce((a, b)), (cosines(4, 4, seed=6), cosines(4, 4, seed=7))),
               (lambda a: clip_cid.distillation((draw(4, 4, dtype=double), draw(4, 4, seed=1, dtype=double)), (a, a.T)),
                (cosines(4, 4, seed=8),))]
    for function, inputs in checks:
        assert torch.autograd.gradcheck(function, inputs)


def test_the_teachers_side_of_a_kl_term_has_no_gradient(double):
    teacher, student = draw(3, 3, dtype=double).requires_grad_(), draw(3, 3, seed=1, dtype=double).requires_grad_()
    found = torch.autograd.grad(clip_cid.distillation((teacher, teacher.T), (student, student.T)), [teacher, student],
                                allow_unused=True)
    assert found[0] is None and found[1].norm() > 0
    loss, _ = clip_cid.cluster_kl(student, student.detach(), 3.0, 3.0)
    assert loss.abs() < 1e-12 and torch.autograd.grad(loss, student)[0].norm() < 1e-12


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_margins(double, kind, margin):
    angle = torch.linspace(0.01, math.pi - 0.01, 2001, dtype=double)
    cosine = angle.cos().requires_grad_()
    harder = clip_cid.with_margin(cosine, kind, margin)
    (slope,) = torch.autograd.grad(harder.sum(), cosine)
    turned = angle + margin < math.pi
    if kind == "cosface":
        wanted, wanted_slope = cosine - margin, torch.ones_like(angle)
    else:
        wanted = torch.where(turned, (angle + margin).cos(), angle.cos() - margin * math.sin(margin))
        wanted_slope = torch.where(turned, (angle + margin).sin() / angle.sin(), 1.0)
        assert margin < 0.1 or 0 < (~turned).sum() < 700
    torch.testing.assert_close(harder, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-9, atol=1e-9)
    step = 1e-6
    inside = (angle + margin - math.pi).abs() > 2e-3
    with torch.no_grad():
        numeric = (clip_cid.with_margin(cosine + step, kind, margin) -
                   clip_cid.with_margin(cosine - step, kind, margin)) / (2 * step)
    torch.testing.assert_close(slope[inside], numeric[inside], rtol=1e-4, atol=1e-4)
    whole = torch.linspace(1, -1, 20001, dtype=double)  # from θ = 0 to π, the ends included
    assert (clip_cid.with_margin(whole, kind, margin).diff() < 0).all()
    assert (clip_cid.with_margin(whole, kind, margin) <= whole + 1e-12).all()


@pytest.mark.parametrize("margin", [0.2, 0.8])
def test_the_gradient_of_arcface_is_the_papers(double, margin):
    """d(-log p) / dθ of the own cluster, s sin(θ + m) (p - 1) from the closed form, through everything."""
    angle, scale = torch.tensor([0.5, 1.3], dtype=double, requires_grad=True), 7.0
    others = torch.tensor([[0.2, -0.4], [0.1, 0.6]], dtype=double)
    cosine = torch.cat([angle.cos()[:, None], others], 1)
    loss = clip_cid.cluster_hard(cosine, torch.zeros(2, dtype=torch.int64), scale, "arcface", margin)
    (found,) = torch.autograd.grad(loss, angle)
    with torch.no_grad():
        own = (scale * (angle + margin).cos()).exp()
        p = own / (own + (scale * others).exp().sum(1))
        torch.testing.assert_close(found, (1 - p) * scale * (angle + margin).sin() / 2)


def test_at_angle_zero_and_pi_margins_stay_finite():
    cosine = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = clip_cid.cluster_hard(cosine, torch.tensor([0, 0]), 8.0, "arcface", 0.5)
    loss.backward()
    assert loss.isfinite() and cosine.grad.isfinite().all() and (cosine.grad[:, 0] < 0).all()


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_margin_zero_is_none(double, kind):
    cosine, target = unit_rows(4, 6, dtype=double).requires_grad_(), torch.tensor([0, 5, 2, 2])
    losses = [clip_cid.cluster_hard(cosine, target, 9.0, each, 0.0) for each in ("none", kind)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, cosine)[0] for loss in losses))


@pytest.mark.parametrize("changes", [dict(), dict(prototypes="learned", margin_type="arcface", margin=0.3)], ids=str)
def test_sampling_every_cluster_is_the_whole_softmax(double, changes):
    u, v = (unit_rows(5, 12, seed=seed, dtype=double).requires_grad_() for seed in (1, 2))
    results = []
    for rate in (1.0, 1 - 1e-9):  # the second takes the way through sample_clusters
        model = make(config(**changes, sample_rate=rate))
        results.append(loss_and_gradients(model, lambda *uv: model.loss(*uv, teaching(5), 3), u, v))
    (total, terms, found), (wanted_total, wanted_terms, wanted) = results
    torch.testing.assert_close(total, wanted_total, rtol=1e-13, atol=0)
    assert_same(terms, wanted_terms, 1e-12)
    assert_same(found, wanted, 1e-12)


@pytest.mark.parametrize("k, rate, labels", [(50, 0.3, [3, 3, 41, 7]), (50, 0.01, [3, 3, 41, 7]), (6, 0.5, [0] * 9),
                                             (10, 0.99, [9]), (8, 0.25, [5, 1]), (5, 1.0, [4, 4])])
def test_sampled_clusters(k, rate, labels):
    label = torch.tensor(labels)
    for seed in range(20):
        chosen, place = clip_cid.sample_clusters(label, k, rate, seed)
        assert len(chosen) == min(k, max(round(rate * k), len(labels)))
        assert chosen.tolist() == sorted(set(chosen.tolist())) and set(labels) <= set(chosen.tolist()) <= set(range(k))
        assert torch.equal(chosen[place], label)
        assert torch.equal(chosen, clip_cid.sample_clusters(label, k, rate, seed)[0])
    if len(set(labels)) < len(chosen) < k:
        assert len({tuple(clip_cid.sample_clusters(label, k, rate, seed)[0].tolist()) for seed in range(20)}) > 5


def test_negatives_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    k, draws, label = 20, 3000, torch.tensor([3, 7, 3])
    counts = sum(clip_cid.sample_clusters(label, k, 0.4, seed)[0].bincount(minlength=k) for seed in range(draws))
    assert counts[3] == counts[7] == draws
    others = np.delete(counts.numpy(), [3, 7])
    share = 6 / 18  # six of eighteen, without replacement
    statistic = ((others - draws * share) ** 2).sum() / (draws * share * (1 - share)) * 17 / 18
    assert 1e-3 < stats.chi2.sf(statistic, 17) < 1 - 1e-4


def batch(cfg, count, dtype=torch.float64, seed=0):
    """Random pixels, and texts whose largest token, the end, stands at a random place."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, cfg.image_size, cfg.image_size, generator=generator)
    text = torch.randint(1, cfg.vocab_size - 1, (count, cfg.context_length), generator=generator)
    for row in text:
        end = int(torch.randint(1, cfg.context_length, (1,), generator=generator))
        row[end], row[end + 1:] = cfg.vocab_size - 1, 0
    return image.to(dtype), text


ACCUM = [dict(), dict(prototypes="learned", sample_rate=0.5, text_cluster=True, margin_type="arcface", margin=0.3),
         dict(instance="logit-kl", feature_weight=2.0, grad_checkpoint=True), dict(method="clip"),
         dict(instance="both", cluster_features="joint", prototypes="learned-from-teacher")]


@pytest.mark.parametrize("changes", ACCUM, ids=str)
def test_chunks_give_the_gradient_of_the_whole_batch(double, changes):
    results = []
    for accum in (1, 4):
        cfg = config(**changes, accum=accum)
        model = make(cfg) if cfg.method == "clip_cid" else randomise(clip_cid.build(cfg), 1).double()
        if cfg.method == "clip":
            model.load_state_dict({**model.state_dict(), **(results[0][2] if results else {})})
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        clip_cid.prepare_towers(model, cfg)
        taught = teaching(8) if cfg.method == "clip_cid" else None
        terms = clip_cid.backward(model, *batch(cfg, 8), taught, contextlib.nullcontext(), SCALER, seed=4)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((terms, found, start))
    (wanted_terms, wanted, _), (terms, found, _) = results
    assert_same(terms, wanted_terms, 1e-12)
    assert_same(found, wanted, 1e-10)
    assert {"student.visual.conv1.weight", "student.token_embedding.weight", "student.logit_scale"} <= found.keys()


def test_the_teachers_embeddings_become_unit_vectors():
    assert clip_cid.to_device([], torch.device("cpu")) is None
    stored = (draw(4, 6, seed=1).half(), draw(4, 6, seed=2).half(), torch.tensor([1, 0, 2, 2]))
    *found, label = clip_cid.to_device(list(stored), torch.device("cpu"))
    for rows, half in zip(found, stored):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.double(), F.normalize(half.double(), dim=-1), rtol=0, atol=1e-6)
    assert torch.equal(label, stored[2])


def test_the_scales_are_clamped_after_a_step():
    cfg = config()
    model = clip_cid.build(cfg, centroids=draw(7, WIDTH), teacher_logit_scale=1)
    optimiser = clip_cid.build_optimiser(model, cfg, torch.device("cpu"))
    with torch.no_grad():
        model.student.logit_scale.fill_(9), model.distil_scale.fill_(-2)
    clip_cid.update(model, optimiser, SCALER, 1e-3)
    assert model.student.logit_scale.exp().item() == pytest.approx(100) and model.distil_scale.item() == 0


# ----------------------------------------------------------------------------------------------------------- 5. towers


@pytest.fixture(scope="module")
def open_clip():
    common.import_torchvision()
    return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def transformers():
    common.import_torchvision()
    return pytest.importorskip("transformers")


SHAPES = {  # width, patch, head_width, mlp_ratio; text width, heads; embed_dim; QuickGELU; layers; image size
    "ViT-B/32": (768, 32, 64, 4.0, 512, 8, 512, True, 2, 96),
    "ViT-B/32 laion": (768, 32, 64, 4.0, 512, 8, 512, False, 1, 64),
    "ViT-L/14": (1024, 14, 64, 4.0, 768, 12, 768, True, 1, 42),
    "ViT-H/14": (1280, 14, 80, 4.0, 1024, 16, 1024, False, 1, 28),
    "ViT-bigG/14": (1664, 14, 104, 4.9231, 1280, 20, 1280, False, 1, 28),
}


def open_clip_model(open_clip, shape):
    width, patch, head_width, mlp_ratio, text_width, heads, embed, quick, layers, size = SHAPES[shape]
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=layers, width=width, head_width=head_width, mlp_ratio=mlp_ratio,
                                     patch_size=patch, image_size=size)
    text = open_clip.CLIPTextCfg(layers=layers, width=text_width, heads=heads, context_length=12, vocab_size=100)
    return randomise(open_clip.model.CLIP(embed, vision, text, quick_gelu=quick), matrices=0.01).eval()


def teacher_of(path, **changes):
    return clip_cid.load_teacher(clip_cid.Config(teacher=str(path), **changes), torch.device("cpu"))


@torch.no_grad()
def assert_same_towers(teacher, cfg, encode_image, encode_text, tolerance=1e-5, dtype=torch.float32):
    image, text = batch(cfg, 3, torch.float32)
    for found, wanted in ((teacher.encode_image(image.to(dtype)), encode_image(image)),
                          (teacher.encode_text(text), encode_text(text))):
        wanted = F.normalize(wanted, dim=-1)
        assert (wanted[0] - wanted[1]).norm() > 0.05  # else the tolerance would mean little
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_teachers_equal_open_clip(open_clip, tmp_path, shape):
    model, (width, patch, head_width, _, text_width, heads, embed, quick, layers, size) = \
        open_clip_model(open_clip, shape), SHAPES[shape]
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    teacher, cfg = teacher_of(tmp_path / "open_clip_pytorch_model.bin", teacher_act="quick_gelu" if quick else None)
    assert (cfg.vision_width, cfg.patch_size, cfg.vision_heads, cfg.text_width, cfg.text_heads, cfg.embed_dim, cfg.act,
            cfg.vision_layers, cfg.image_size) == (width, patch, width // head_width, text_width, heads, embed,
                                                   "quick_gelu" if quick else "gelu", layers, size)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert teacher.logit_scale.item() == model.logit_scale.item()
    assert_same_towers(teacher, cfg, model.encode_image, model.encode_text)


def test_the_teachers_activation_is_told_or_beside_its_file(open_clip, tmp_path):
    model, path = open_clip_model(open_clip, "ViT-B/32"), tmp_path / "model.bin"
    torch.save(model.state_dict(), path)
    teacher, cfg = teacher_of(path, act="quick_gelu")  # the student's flag is not the teacher's
    assert cfg.act == "gelu"
    with pytest.raises(AssertionError, match="not close"):
        assert_same_towers(teacher, cfg, model.encode_image, model.encode_text, tolerance=1e-4)
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    assert_same_towers(*teacher_of(path), model.encode_image, model.encode_text)
    assert teacher_of(path, teacher_act="gelu")[1].act == "gelu"


@pytest.mark.parametrize("precision, dtype, tolerance", [("fp16", torch.float16, 1e-3), ("bf16", torch.bfloat16, 8e-3)])
def test_teachers_in_half_precision(open_clip, tmp_path, precision, dtype, tolerance):
    model = open_clip_model(open_clip, "ViT-B/32")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    teacher, cfg = teacher_of(tmp_path / "model.pt", teacher_act="quick_gelu", teacher_precision=precision)
    assert {p.dtype for p in teacher.parameters() if p.ndim} == {dtype}
    assert_same_towers(teacher, cfg, model.encode_image, model.encode_text, tolerance, dtype)


def test_a_teacher_from_hugging_face(transformers, tmp_path):
    """ViT-L/14's widths and heads, which config.json gives."""
    shared = dict(num_hidden_layers=1, hidden_act="quick_gelu")
    torch.manual_seed(0)
    model = randomise(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(shared, hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=100,
                         max_position_embeddings=12, bos_token_id=98, eos_token_id=99, pad_token_id=0),
        vision_config=dict(shared, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=42,
                           patch_size=14), projection_dim=768)), matrices=0.01).eval()
    model.save_pretrained(tmp_path)
    teacher, cfg = teacher_of(tmp_path / "model.safetensors")
    assert (cfg.act, cfg.vision_heads, cfg.text_heads) == ("quick_gelu", 16, 12)
    assert_same_towers(teacher, cfg, lambda x: model.visual_projection(model.vision_model(x).pooler_output),
                       lambda x: model.text_projection(model.text_model(x).pooler_output))


def test_no_teacher_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no teacher at .*nowhere.pt"):
        teacher_of(tmp_path / "nowhere.pt")


# ------------------------------------------------------------------------------------------------ 6. same to the letter

TWO_PAPERS = {  # top-level functions and classes of both scripts that differ, and why
    "Config": "other flags", "configure": "stages, --teacher", "check": "other flags",
    "Attention": "EViT reads the attention of CLS", "Block": "EViT drops tokens inside a block",
    "Transformer": "EViT runs the blocks one by one", "VisionTransformer": "EViT", "CLIP": "EViT's keep rate",
    "build": "another method", "schedules": "no keep rate, no ramp, no moving average",
    "backward": "the teacher's embeddings are given, nothing is random", "cat_features": "no momentum text encoder",
    "update": "a second scale, no moving average", "train": "stages, samples with a teacher",
    "log_row": "other columns", "prepare_towers": "no momentum tower", "Evaluator": "one CLIP, no keep rates",
    "validate": "one encoder", "finish": "student.pt, teacher.pt, no tokens to draw",
    "evaluate_checkpoint": "one encoder", "profile": "student and teacher, not keep rates",
    "ablation_arms": "other arms", "ablate": "no sweet spot, the teacher's scores", "main": "stages",
}
FIELDS = {  # fields of both Configs that differ: what, and why
    "linear_probe": ({"help"}, "--stage evaluate"), "profile": ({"help"}, "what is measured"),
    "method": ({"default", "allowed", "section"}, "its own name"),
    "preset": ({"section"}, "the student's, beside the teacher's"),
    "scenes": ({"default"}, "what is left after the balance"), "long_tail": ({"default"}, "what the balance is for"),
    "duplicates": ({"default"}, "what the balance is for"),
}
REPO = Path(__file__).resolve().parents[1]


def top_level(script):
    """{name: source} of its functions and classes, decorators included."""
    source, found = (REPO / script).read_text("utf-8"), {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min(line.lineno for line in (node, *node.decorator_list))
            found[node.name] = lines[first - 1:node.end_lineno]
    return found


def test_what_both_scripts_need_is_the_same_to_the_letter():
    ours, theirs = top_level("clip_cid.py"), top_level("eclipse.py")
    both = ours.keys() & theirs.keys()
    differ = {name for name in both if ours[name] != theirs[name]}
    assert differ == TWO_PAPERS.keys()
    assert {"QuickGELU", "unit", "similarities", "info_nce", "normalise", "build_optimiser"} <= both - differ


def test_presets_and_common_fields_are_the_same():
    assert clip_cid.VIT_B == eclipse.VIT_B and clip_cid.PRESETS == eclipse.PRESETS
    ours, theirs = ({field.name: {"type": field.type, "default": field.default, **field.metadata}
                     for field in dataclasses.fields(script.Config)} for script in (clip_cid, eclipse))
    both = [name for name in ours if name in theirs]
    assert both == [name for name in theirs if name in ours] and len(both) > 40
    differ = {name: {what for what in ours[name] if ours[name][what] != theirs[name][what]} for name in both}
    assert {name: what for name, what in differ.items() if what} == {name: what for name, (what, _) in FIELDS.items()}


# ------------------------------------------------------------------------------------- 7. samples, the exported student


class Colours:
    """Sample i is a plain colour of its own, with captions that name it; some cannot be read."""

    bad = collections.Counter()

    def __init__(self, count, captions=lambda i: 3, broken=()):
        self.count, self.captions, self.broken = count, captions, broken

    def __len__(self):
        return self.count

    def key(self, i):
        return f"colour/{i * 7919 % 1000}"

    def colour(self, i):
        return i * 53 % 256, i * 101 % 256, i * 197 % 256

    def texts(self, i):
        return [f"{'abc'[c % 3]} colour {i} view {c}" for c in range(self.captions(i))]

    def read(self, i):
        if i in self.broken:
            raise BadSample("cut off")
        encoded = io.BytesIO()
        Image.new("RGB", (20 + i % 5, 18), self.colour(i)).save(encoded, "PNG")
        return encoded.getvalue(), self.texts(i)

    def recognise(self, image, tokens, tokenizer):
        """(sample, caption) of what the loader delivered."""
        (i,) = [i for i in range(self.count) if (image == torch.tensor(self.colour(i)).view(3, 1, 1)).all()]
        (c,) = [c for c, text in enumerate(self.texts(i)) if torch.equal(tokenizer([text])[0, :len(tokens)], tokens)]
        return i, c


@pytest.mark.parametrize("broken", [(), (0, 3, 4, 19)])
def test_what_is_taught_belongs_to_the_sample_delivered(broken):
    """Embeddings in another order than the data, half of them kept, several captions, some images broken since."""
    data, generator = Colours(24, lambda i: 2 + i % 3, broken), np.random.default_rng(0)
    order = generator.permutation(24)  # row r belongs to sample order[r]
    image = np.array([[i, 1] for i in order], np.float16)
    text = np.array([[[i, c] for c in range(3)] for i in order], np.float16)
    embeddings = SimpleNamespace(image=image, text=text, keys=[data.key(i) for i in order])
    kept = np.sort(generator.permutation(24)[:15])
    label = torch.tensor([100 + order[row] for row in kept])
    subset = common.Subset(data, common.find_samples(data, embeddings, kept))
    cfg = config(crop_scale=0.3, seed=3)
    tokenizer = common.CLIPTokenizer(cfg.context_length, cfg.vocab_size)
    samples, drawn = clip_cid.TaughtSamples(subset, tokenizer, cfg, embeddings, kept, label), set()
    for epoch, place in itertools.product(range(6), range(len(samples))):
        picture, tokens, bad, t_image, t_text, own = samples[epoch, place]
        i, c = data.recognise(picture, tokens, tokenizer)
        following = itertools.islice(itertools.cycle(order[kept].tolist()), place, None)
        assert i == next(j for j in following if j not in broken) and bad == (order[kept][place] in broken)
        assert (t_image.tolist(), t_text.tolist(), own.item()) == ([i, 1], [i, c], 100 + i) and c < 3
        assert t_image.dtype == t_text.dtype == torch.float16
        drawn.add((i, c))
    assert {c for _, c in drawn} == {0, 1, 2}
    sampler = common.StepSampler(15, 5, 6, seed=1)
    plain = common.TrainSamples(subset, tokenizer, cfg.image_size, (0.3, 1.0), 3)
    for pictures, tokens, _, t_image, t_text, own in common.train_loader(samples, sampler, 0, "cpu"):
        for row in range(5):
            i, c = data.recognise(pictures[row], tokens[row], tokenizer)
            assert (t_image[row, 0], t_text[row].tolist(), own[row]) == (i, [i, c], 100 + i)
    if not broken:  # the same captions but for those beyond the embedded three
        same = [torch.equal(samples[0, place][1], plain[0, place][1]) for place in range(15) if data.captions(
            order[kept][place]) <= 3]
        assert all(same) and len(same) > 5


def small_teacher(folder):
    torch.manual_seed(1)
    sizes = {name: value for name, value in SMALL.items() if name in (*common.SIZES, *common.GUESSED)}
    cfg = clip_cid.Config(**{**sizes, "embed_dim": WIDTH, "image_size": 24, "context_length": 20})
    teacher = randomise(clip_cid.CLIP(cfg), 4).eval()
    torch.save({"model": teacher.state_dict(), "config": dataclasses.asdict(cfg)}, folder / "teacher.pt")
    return teacher, cfg


def test_stages_teach_each_sample_what_the_teacher_sees_in_it(tmp_path, monkeypatch):
    """embed, balance and cluster, then the training samples: against the teacher asked directly."""
    teacher, teacher_cfg = small_teacher(tmp_path)
    data = Colours(40, lambda i: 1 + (i + 2) % 3, broken=(5, 6, 31))  # three captions judging by the first
    monkeypatch.setattr(common, "training_set", lambda cfg: data)
    for picture in ("draw_groups", "draw_clusters"):
        monkeypatch.setattr(clip_cid, picture, lambda *args: None)
    cfg = config(teacher=str(tmp_path / "teacher.pt"), out=str(tmp_path / "run"), k=4, remove=0.3, filter="balance")
    tokenizer = common.CLIPTokenizer(cfg.context_length, cfg.vocab_size)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in common.PIXELS["imagenet"])

    @torch.no_grad()
    def seen(i):
        colour = (torch.tensor(data.colour(i)).view(3, 1, 1) / 255 - mean) / std
        texts = common.CLIPTokenizer(teacher_cfg.context_length, cfg.vocab_size)(data.texts(i))
        return teacher.encode_image(colour.expand(1, 3, 24, 24))[0], teacher.encode_text(texts)

    wanted = {i: seen(i) for i in range(40) if i not in data.broken}
    embeddings = clip_cid.embed(cfg, data, torch.device("cpu"))
    assert embeddings.keys == [data.key(i) for i in range(40)] and embeddings.text.shape == (40, 3, WIDTH)
    for i in range(40):
        image, texts = wanted.get(i, (torch.zeros(WIDTH), torch.zeros(1, WIDTH)))
        np.testing.assert_allclose(embeddings.image[i].astype(np.float32), image, atol=1e-3)
        for c in range(3):
            np.testing.assert_allclose(embeddings.text[i, c].astype(np.float32), texts[c % len(texts)], atol=1e-3)
    whole = np.array(embeddings.image), np.array(embeddings.text)
    for name in ("image", "text"):  # as after an interruption
        np.load(tmp_path / "run" / f"{name}.npy", mmap_mode="r+")[[3, 6, 17, 30]] = np.nan
    info = common.read_json(tmp_path / "run" / "embeddings.json")
    common.write_json(tmp_path / "run" / "embeddings.json", {**info, "complete": False})
    embeddings = clip_cid.embed(cfg, data, torch.device("cpu"))
    for found, before in zip((embeddings.image, embeddings.text), whole):
        np.testing.assert_allclose(found.astype(np.float32), before.astype(np.float32), atol=1e-3)
    samples, taught = clip_cid.prepare(cfg, torch.device("cpu"), tokenizer)
    again = clip_cid.prepare(cfg, torch.device("cpu"), tokenizer)[0]  # from the files
    kept_keys = common.read_keys(tmp_path / "run" / "kept.txt")
    assert len(samples) == len(kept_keys) == 37 - round(0.3 * 37) and taught["centroids"].shape == (4, WIDTH)
    assert taught["teacher_logit_scale"] == pytest.approx(teacher.logit_scale.item())
    delivered = set()
    for place in range(len(samples)):
        picture, tokens, bad, t_image, t_text, label = samples[2, place]
        i, c = data.recognise(picture, tokens, tokenizer)
        assert data.key(i) == kept_keys[place] and not bad
        torch.testing.assert_close(t_image.float(), wanted[i][0], rtol=0, atol=1e-3)
        torch.testing.assert_close(t_text.float(), wanted[i][1][c], rtol=0, atol=1e-3)
        cosine = taught["centroids"] @ wanted[i][0]
        assert cosine[label] > cosine.max() - 2e-3
        assert all(torch.equal(a, b) for a, b in zip(again[2, place][3:], (t_image, t_text, label)))
        delivered.add(data.key(i))
    assert delivered == set(kept_keys)
    distances = [(wanted[a][0] - wanted[b][0]).norm() for a, b in itertools.combinations(wanted, 2)]
    assert min(distances) > 5e-3  # else another sample's embedding would pass


def test_the_exported_student_is_a_plain_clip(open_clip, tmp_path):
    cfg = config(vision_heads=4, vision_mlp=128, prototypes="learned", act="gelu")
    model = clip_cid.build(cfg, centroids=draw(7, WIDTH), teacher_logit_scale=2.0)
    student = randomise(model.student, 2).eval()
    evaluator = clip_cid.Evaluator(student, cfg, torch.device("cpu"), contextlib.nullcontext(), None, "student")
    torch.save(clip_cid.exported(evaluator), tmp_path / "student.pt")
    weights = torch.load(tmp_path / "student.pt", weights_only=True)["model"]
    assert not any(word in name for name in weights for word in ("project_", "prototypes", "centroids", "distil",
                                                                 "teacher", "student"))
    theirs = open_clip.model.CLIP(
        12, open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, mlp_ratio=2.0, patch_size=8, image_size=16),
        open_clip.CLIPTextCfg(layers=1, width=64, heads=4, context_length=16, vocab_size=600)).eval()
    theirs.load_state_dict(weights)
    assert_same_towers(student, cfg, theirs.encode_image, theirs.encode_text)
    again, again_cfg = teacher_of(tmp_path / "student.pt")  # and it can teach
    assert (again_cfg.vision_heads, again_cfg.text_heads, again_cfg.pixel_stats) == (4, 4, "imagenet")
    assert_same_towers(again, again_cfg, theirs.encode_image, theirs.encode_text)
