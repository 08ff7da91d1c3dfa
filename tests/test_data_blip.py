"""What BLIP and DLIP train and are tested on: captions in json, mixtures, questions, augmentation.

References: the official layouts written here, brute force over scenes and epochs, torchvision's operations.
"""

import collections
import itertools
import json
import math
import multiprocessing
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_data import (
    COCO_MINI,
    Pictures,
    ids_of,
    one_line_error,
    picture,
    tokenize,
    write_coco,
    write_tar,
    write_tsv,
)

import common
from common import (
    BadSample,
    BlipAugment,
    Mixture,
    StepSampler,
    TrainSamples,
    eval_folder,
    evaluation_sets,
    import_torchvision,
    is_captioned,
    keep_only,
    loader_workers,
    mixture_weights,
    open_image,
    open_retrieval,
    open_train,
    open_vqa,
    random_resized_crop,
    train_loader,
    training_set,
    vqa_set,
)
from data.emoji.scenes import EmojiQuestions


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_images(root, names):
    """Photographs by these names below root; returns {name: bytes}."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return {name: (root / name).read_bytes() for name in names}


def samples_of(data):
    return {data.key(i): data.read(i) for i in range(len(data))}


def config(**given):
    """What the functions of a configuration read, with a Config's defaults."""
    return SimpleNamespace(**{**dict(data="emoji", root=None, keep=None, eval_data=(), eval_root=None, workers=-1,
                                     scenes=20, image_size=40, seed=3, concepts=30, difficulty="easy", noise=0.0,
                                     long_tail=0.0, duplicates=0.0), **given})


# ----------------------------------------------------------------------------------------------------- captions in json


def region(phrase, image):
    return {"region_id": 1, "image_id": image, "phrase": phrase, "x": 1, "y": 2, "width": 3, "height": 4}


@pytest.mark.parametrize("folder", ["", "images"])
def test_visual_genome_official(tmp_path, folder):
    found = write_images(tmp_path / folder, ["VG_100K/1.jpg", "VG_100K/2.jpg", "VG_100K_2/2317429.jpg"])
    write_json(tmp_path / "region_descriptions.json",
               [{"id": i, "regions": [region(f" phrase {r}\n of {i}", i) for r in range(r_count)]}
                for i, r_count in ((1, 3), (2, 1), (2317429, 2))])
    write_json(tmp_path / "image_data.json", [])  # other files of Visual Genome do not disturb
    data = open_train("vg", tmp_path)
    assert samples_of(data) == {
        "1": (found["VG_100K/1.jpg"], [f"phrase {r} of 1" for r in range(3)]),
        "2": (found["VG_100K/2.jpg"], ["phrase 0 of 2"]),
        "2317429": (found["VG_100K_2/2317429.jpg"], [f"phrase {r} of 2317429" for r in range(2)])}
    assert open_image(data.read(0)[0]).mode == "RGB" and not +data.bad


def test_visual_genome_leaves_out_what_coco_tests_on(tmp_path, capsys):
    write_coco(tmp_path / "coco")
    write_images(tmp_path / "vg", [f"VG_100K/{i}.jpg" for i in range(30)])
    write_json(tmp_path / "vg" / "region_descriptions.json",
               [{"id": i, "regions": [region("a thing", i)]} for i in range(30)])
    assert len(open_train("vg", tmp_path / "vg")) == 30
    coco_ids = {5: 13, 6: 14, 7: 12}  # of write_coco's images 13 is for validation, 12 for testing
    write_json(tmp_path / "vg" / "image_data.json",
               [{"image_id": i, "coco_id": coco_ids.get(i), "url": "x"} for i in range(30)])
    data = open_train("vg", tmp_path / "vg")
    assert {int(key) for key in samples_of(data)} == set(range(30)) - {5, 7}
    assert "2 in COCO's val or test" in capsys.readouterr().out


@pytest.mark.parametrize("name, file", [("vg", "vg_caption.json"), ("vg", "mine.json"), ("sbu", "sbu.json")])
def test_lists_as_blips(tmp_path, name, file):
    root, outside = tmp_path / "root", tmp_path / "outside"
    found = write_images(root, ["VG_100K/1.jpg", "images/a/2.jpg", "VG_100K_2/3.png", "4.jpg"])
    elsewhere = write_images(outside, ["5.jpg", "4.jpg"])  # the path that is listed, not the file of that name in root
    assert elsewhere["4.jpg"] != found["4.jpg"]
    write_json(root / file, [
        {"image": "VG_100K/1.jpg", "caption": "one"}, {"image": "a/2.jpg", "caption": ["two", " "], "dataset": "vg"},
        {"image": "/export/share/vg/VG_100K_2/3.png", "caption": "three"},
        {"image": f"{outside}/4.jpg", "caption": "four"}, {"image": "VG_100K/1.jpg", "caption": "one  again"}])
    assert samples_of(open_train(name, root)) == {
        "VG_100K/1.jpg": (found["VG_100K/1.jpg"], ["one", "one again"]), "a/2.jpg": (found["images/a/2.jpg"], ["two"]),
        "/export/share/vg/VG_100K_2/3.png": (found["VG_100K_2/3.png"], ["three"]),
        f"{outside}/4.jpg": (elsewhere["4.jpg"], ["four"])}


@pytest.mark.parametrize("name", ["vg", "sbu"])
def test_errors_of_lists(tmp_path, name):
    listing = tmp_path / "list.json"
    one_line_error(open_train, name, tmp_path, names=tmp_path)
    write_images(tmp_path, ["0.jpg"])
    write_json(listing, [{"image": f"{i}.jpg", "caption": "x"} for i in range(12)])
    assert "11 of the images" in one_line_error(open_train, name, tmp_path, names=listing)
    write_images(tmp_path, [f"{i}.jpg" for i in range(9)])
    assert "3 missing image file; more than 10 %" in one_line_error(open_train, name, tmp_path, names=tmp_path)
    write_images(tmp_path, [f"{i}.jpg" for i in range(11)])
    assert len(open_train(name, tmp_path)) == 11
    write_json(listing, [{"image": "0.jpg", "caption": None}])
    assert "no image with a caption" in one_line_error(open_train, name, tmp_path, names=listing)
    for content in ([{"file": "0.jpg"}], [1, 2], [{"image": ["0.jpg"], "caption": "x"}]):
        write_json(listing, content)
        assert "is not a list of" in one_line_error(open_train, name, tmp_path, names=listing)
    write_json(tmp_path / "second.json", [])
    one_line_error(open_train, name, tmp_path, names=tmp_path)
    one_line_error(open_train, name, tmp_path / "nowhere", names=tmp_path / "nowhere")


def test_sbu_official(tmp_path, capsys):
    write_json(tmp_path / "sbu-captions-all.json", {"image_urls": [f"http://x/{i}.jpg" for i in range(10)],
                                                    "captions": [f" caption  {i}" for i in range(10)], "user_ids": []})
    one_line_error(open_train, "sbu", tmp_path, names="10 of the images")
    rows = [i for i in range(10) if i not in (2, 5)]
    found = write_images(tmp_path, [f"images/{i // 4:05d}/{i:09d}.jpg" for i in rows])
    data = open_train("sbu", tmp_path)
    assert samples_of(data) == {f"{i:09d}": (picture_bytes, [f"caption {i}"])
                                for i, picture_bytes in zip(rows, found.values())}
    assert "2 not downloaded" in capsys.readouterr().out  # a fifth is gone: reported, no error
    (tmp_path / "images" / "00000" / "000000001.txt").write_text("caption 1")
    open_train("sbu", tmp_path)
    (tmp_path / "images" / "00000" / "000000001.txt").write_text("caption 7")
    one_line_error(open_train, "sbu", tmp_path, names="000000001.txt")


def test_sbu_as_shards_or_table(tmp_path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "00000.tar", [("1.jpg", b"I"), ("1.txt", b"text")])
    write_json(tmp_path / "shards" / "00000_stats.json", {"count": 1})  # img2dataset's report
    assert samples_of(open_train("sbu", tmp_path / "shards")) == {"00000/1": (b"I", ["text"])}
    write_tsv(tmp_path / "table", name="sbu.tsv")
    assert len(open_train("sbu", tmp_path / "table")) == 10


def test_the_last_percent_is_held_out(tmp_path):
    write_images(tmp_path, [f"{i}.jpg" for i in range(200)])
    write_json(tmp_path / "vg_caption.json", [{"image": f"{i}.jpg", "caption": "x"} for i in range(200)])
    train, val = open_train("vg", tmp_path), open_retrieval("vg", tmp_path, "val")
    assert [val.key(i) for i in range(len(val))] == ["198.jpg", "199.jpg"] and len(train) == 198
    assert open_retrieval("vg", tmp_path, "test") is None


@pytest.mark.parametrize("folder", ["val", "images", ""])
def test_nocaps(tmp_path, folder):
    found = write_images(tmp_path / folder, [f"{i}.jpg" for i in range(11)])
    domains = ["in-domain", "near-domain", "out-domain"]
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": domains[i % 3]} for i in range(12)]  # 11.jpg is not there
    captions = [{"image_id": i, "id": 100 * c + i, "caption": f"caption {c} of {i}"} for c in range(10)
                for i in reversed(range(12))]
    write_json(tmp_path / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    data = open_retrieval("nocaps", tmp_path, "test")
    assert samples_of(data) == {str(i): (found[f"{i}.jpg"], [f"caption {c} of {i}" for c in range(10)])
                                for i in range(11)}
    assert data.domains == [domains[i % 3] for i in range(11)]
    assert open_retrieval("nocaps", tmp_path, "val") is None
    one_line_error(open_train, "nocaps", tmp_path, names="nocaps is for evaluation")
    for image in images:
        del image["domain"]
    write_json(tmp_path / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    assert open_retrieval("nocaps", tmp_path, "test").domains == [None] * 11
    write_json(tmp_path / "nocaps_val_4500_captions.json", {"images": images})
    one_line_error(open_retrieval, "nocaps", tmp_path, "test", names="no image with a caption")


def test_nocaps_as_blips_list(tmp_path):
    found = write_images(tmp_path, ["val/a.jpg", "val/b.jpg"])
    write_json(tmp_path / "nocaps_val.json",
               [{"image": f"val/{name}.jpg", "caption": [name, name + name], "img_id": 0} for name in "ab"])
    data = open_retrieval("nocaps", tmp_path, "test")
    assert samples_of(data) == {f"val/{n}.jpg": (found[f"val/{n}.jpg"], [n, n + n]) for n in "ab"}
    assert data.domains == [None, None]
    sets = evaluation_sets(config(data="coco", eval_data=("nocaps",), eval_root=tmp_path), "test")
    assert samples_of(sets["nocaps"]) == samples_of(data)


# ------------------------------------------------------------------------------------------------------------- mixtures


class Named:
    """n samples in memory, each read as its own name; the last `bad` of them cannot be read."""
    def __init__(self, name, n, bad=0):
        self.name, self.n, self.unreadable = name, n, bad
        self.bad = collections.Counter({"missing image file": bad})

    def __len__(self):
        return self.n

    def key(self, i):
        assert 0 <= i < self.n
        return f"{i:03d}"

    def read(self, i):
        assert 0 <= i < self.n
        if i >= self.n - self.unreadable:
            raise BadSample("corrupt image")
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8))
        return image, [f"{self.name} {i}", f"{self.name} {i} again"]


def mixture(**weights):
    sizes = dict(a=30, b=17, c=40, d=1)
    return Mixture({name: Named(name, sizes[name]) for name in weights}, weights)


WEIGHTS = [dict(a=1, b=1), dict(a=2, b=0.5, c=0.3), dict(b=1.3, a=0.9), dict(c=0.025, a=1), dict(a=3), dict(d=7, b=0.7)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mixture_sees_its_parts_evenly(weights):
    data = mixture(**weights)
    sizes = dict(zip(data.names, data.sizes))
    shares = {name: round(weight * sizes[name]) for name, weight in weights.items()}
    assert len(data) == sum(shares.values())
    seen = collections.Counter({(name, i): 0 for name in weights for i in range(sizes[name])})
    for epoch in range(45):
        drawn = [data.read(data.at_epoch(slot, epoch))[1][0].split() for slot in range(len(data))]
        assert collections.Counter(name for name, _ in drawn) == shares
        seen.update((name, int(i)) for name, i in drawn)
        for name in weights:  # after every epoch, and exactly: the total fixes how often one more
            counts = [count for (part, _), count in seen.items() if part == name]
            assert max(counts) - min(counts) <= 1 and sum(counts) == (epoch + 1) * shares[name]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mixture_keys(weights):
    data = mixture(**weights)
    keys = [data.key(i) for i in range(len(data))]
    assert len(set(keys)) == len(keys)
    for i, key in enumerate(keys):
        name, number = re.fullmatch(r"(\w)/(\d+)(?:#\d)?", key).groups()
        assert data.read(i)[1][0] == f"{name} {int(number)}"
        assert data.key(data.at_epoch(i, 0)) == key.split("#")[0]
    ever = {data.key(data.at_epoch(slot, epoch)) for epoch in range(60) for slot in range(len(data))}
    assert ever == {f"{name}/{i:03d}" for name, size in zip(data.names, data.sizes) for i in range(size)}


def test_mixture_of_whole_sets_is_their_concatenation():
    data = mixture(a=1, b=1)
    assert [data.key(i) for i in range(47)] == [f"a/{i:03d}" for i in range(30)] + [f"b/{i:03d}" for i in range(17)]
    assert all(data.at_epoch(slot, epoch) == slot for slot in range(47) for epoch in range(4))


def test_mixture_adds_up_what_is_bad():
    data = Mixture({"a": Named("a", 5, 2), "b": Named("b", 4, 1)}, {"a": 1, "b": 2})
    assert data.bad == {"missing image file": 3}
    one_line_error(Mixture, {"a": Named("a", 5)}, {"a": 0.05}, names="a*0.05")


def test_mixture_weights():
    assert mixture_weights("coco") == {"coco": 1}
    assert mixture_weights("coco*2 + cc3m*0.5+sbu*1e1") == {"coco": 2, "cc3m": 0.5, "sbu": 10}
    for name in ("coco*0", "coco*-1", "coco*two", "coco*", "coco*nan", "coco*inf", "coco+coco*2", "coco+", "+coco",
                 "coco+emoji", "emoji*2", "coco*2*3"):
        one_line_error(mixture_weights, name, names=name)


def test_a_mixture_names_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stem = "runs/dlip-coco*2+cc3m*0.5"
    assert common.run_folder(stem, newest=False) == stem
    Path(stem).mkdir(parents=True)
    Path("runs/dlip-cocoa2+cc3m*0.5-2").mkdir()  # the star stands for itself
    assert common.run_folder(stem, newest=False) == f"{stem}-2" and common.run_folder(stem, newest=True) == stem


def sentence(tokens):
    return "".join(map(chr, tokens.tolist())).strip()


def test_training_on_a_mixture():
    data = mixture(a=2, c=0.5)
    samples = TrainSamples(data, tokenize, 12, (0.3, 0.6), seed=4)
    for epoch in range(3):
        drawn = [samples.draw((epoch, slot)) for slot in range(len(data))]
        names = collections.Counter(" ".join(sentence(tokens).split()[:2]) for _, tokens, *_ in drawn)
        assert {names[f"a {i}"] for i in range(30)} == {2} and sum(names[f"c {i}"] for i in range(40)) == 20
        for image, tokens, bad, index, caption in drawn:
            assert data.read(index)[1][caption] == sentence(tokens) and bad == 0
        twice = [(drawn[i][0], drawn[i + 30][0]) for i in range(30)]
        assert all((first != second).any() for first, second in twice)  # the same picture, another crop
    seen = collections.Counter()
    for batch in StepSampler(len(data), 16, 5 * 4, seed=1):
        seen.update(data.key(data.at_epoch(index, epoch)) for epoch, index in batch)
    assert max(seen.values()) <= 2 * 4 and sum(seen.values()) == 320


def test_unreadable_samples_of_a_mixture():
    data = Mixture({"a": Named("a", 6, 1), "b": Named("b", 4)}, {"a": 1, "b": 0.5})
    samples = TrainSamples(data, tokenize, 12, (0.3, 0.6), seed=4)
    drawn = [samples[0, slot] for slot in range(8)]
    assert [bad for *_, bad in drawn] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert sentence(drawn[5][1])[0] == "b" and (drawn[5][0] == drawn[6][0]).all()


def test_plain_sets_are_drawn_as_before():
    """Crop, then caption, from (seed, epoch, index): written out, for a set that is no mixture and without augment."""
    data = Pictures()
    samples = TrainSamples(data, tokenize, 32, (0.5, 1.0), seed=5)
    for epoch, index in itertools.product(range(3), (0, 1, 4, 9)):
        rng = np.random.default_rng((5, epoch, index))
        image = random_resized_crop(data.images[index], 32, rng, (0.5, 1.0))
        text = data.read(index)[1][rng.integers(2)]
        ours = samples[epoch, index]
        assert (ours[0].numpy() == image).all() and sentence(ours[1]) == text


def loaded(workers, method=None, start=0):
    samples = TrainSamples(mixture(a=2, b=0.5, c=0.3), tokenize, 12, (0.5, 1.0), seed=5, augment=BlipAugment())
    loader = train_loader(samples, StepSampler(len(samples), 16, 12, start=start, seed=5), workers, "cpu")
    if method:
        loader.multiprocessing_context = method
    return list(loader)


@pytest.mark.parametrize("workers, method, start", [(2, "fork", 0), (1, "spawn", 0), (0, None, 7)])
def test_workers_and_resuming_do_not_change_the_batches(workers, method, start):
    if method and method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    for ours, reference in zip(loaded(workers, method, start), loaded(0)[start:], strict=True):
        assert (ours[0] == reference[0]).all() and (ours[1] == reference[1]).all() and ours[2] == reference[2]


def test_keeping_some_samples_of_a_mixture(tmp_path):
    data = mixture(a=2, b=0.5, c=1)
    keys = ["a/003", "a/017", "b/016", "b/000", "b/009", "b/004"]
    (tmp_path / "keys").write_text("\n".join(keys))
    kept = keep_only(data, tmp_path / "keys")
    seen = collections.Counter(kept.key(kept.at_epoch(slot, epoch)) for epoch in range(4) for slot in range(len(kept)))
    assert seen == {key: 8 if key[0] == "a" else 2 for key in keys}
    (tmp_path / "keys").write_text("a/003\nc/040\n")
    one_line_error(keep_only, data, tmp_path / "keys", names=tmp_path / "keys")
    (tmp_path / "keys").write_text("003\n009\n")
    assert samples_of(keep_only(Named("a", 30), tmp_path / "keys")).keys() == {"003", "009"}


@pytest.fixture
def corpora(tmp_path):
    """coco (Karpathy's splits), flickr30k, sbu as a list of 200, mine as shards, each in its folder of a root."""
    write_coco(tmp_path / "coco")
    write_images(tmp_path / "flickr30k" / "images", [f"{i}.jpg" for i in range(6)])
    write_json(tmp_path / "flickr30k" / "dataset_flickr30k.json", {"images": [
        {"filename": f"{i}.jpg", "split": ("train", "val", "test")[i % 3], "sentences": [{"raw": f"text {i}"}]}
        for i in range(6)]})
    (tmp_path / "sbu" / "images").mkdir(parents=True)
    for i in range(200):
        (tmp_path / "sbu" / "images" / f"{i}.jpg").write_bytes(b"%d" % i)
    write_json(tmp_path / "sbu" / "sbu.json", [{"image": f"{i}.jpg", "caption": f"sbu {i}"} for i in range(200)])
    (tmp_path / "mine").mkdir()
    write_tar(tmp_path / "mine" / "0.tar", [(f"{i}.{kind}", b"x") for i in range(10) for kind in ("jpg", "txt")])
    return tmp_path


def test_opening_a_mixture(corpora, monkeypatch):
    data = open_train("coco*2+sbu*0.5+mine", corpora)
    assert isinstance(data, Mixture) and len(data) == 2 * 12 + 99 + 10
    keys = [data.key(i) for i in range(len(data))]
    coco = open_train("coco", corpora / "coco")
    assert keys[:12] == [f"coco/{coco.key(i)}" for i in range(12)] and keys[12] == keys[0] + "#2"
    assert data.read(3) == coco.read(3) and keys[-1] == "mine/0/9"
    monkeypatch.setattr(common, "DATA", corpora)
    assert len(open_train("coco+sbu")) == 12 + 198 == len(training_set(config(data="coco+sbu")))
    assert len(training_set(config(data="coco*3", root=corpora / "coco"))) == 36  # one name: the root is its folder
    one_line_error(open_train, "coco+sbux", None, names="sbux")
    one_line_error(open_train, "coco+vg", corpora, names=corpora / "vg")
    one_line_error(open_train, "coco+nocaps", corpora, names="nocaps")
    one_line_error(open_train, "coco*x", corpora, names="coco*x")


def test_evaluating_after_training_on_a_mixture(corpora):
    cfg = config(data="sbu+coco*2+flickr30k", root=corpora)
    val, test = evaluation_sets(cfg, "val"), evaluation_sets(cfg, "test")
    assert list(val) == list(test) == ["coco", "flickr30k"]
    assert ids_of(test["coco"]) == ids_of(open_retrieval("coco", corpora / "coco", "test"))
    assert samples_of(val["flickr30k"]) == samples_of(open_retrieval("flickr30k", corpora / "flickr30k", "val"))
    assert is_captioned(cfg, "sbu") and is_captioned(config(data="mine+coco"), "mine")
    assert not is_captioned(cfg, "imagenet") and not is_captioned(config(data="emoji"), "emoji")
    assert eval_folder(cfg, "coco") == corpora / "coco" and eval_folder(cfg, "imagenet") is None
    elsewhere = config(data="sbu+coco+flickr30k", eval_root="there")
    assert eval_folder(elsewhere, "coco") == Path("there/coco")
    assert eval_folder(config(data="sbu+coco", eval_root="there"), "coco") == "there"
    several = config(data="sbu+coco", eval_data=("coco", "dtd"), eval_root="there")
    assert eval_folder(several, "dtd") == Path("there/dtd")
    assert loader_workers(config(data="sbu+coco")) >= 1 and loader_workers(config(data="emoji")) == 0


def test_evaluation_sets_of_a_single_set_are_as_before(corpora):
    cfg = config(data="coco", root=corpora / "coco")
    for split in ("val", "test"):
        ((name, data),) = evaluation_sets(cfg, split).items()
        assert name == "coco" and ids_of(data) == ids_of(open_retrieval("coco", corpora / "coco", split))
    assert eval_folder(cfg, "coco") == corpora / "coco" and eval_folder(cfg, "flickr30k") is None
    several = config(data="coco", root="r", eval_data=("flickr30k", "sbu"), eval_root=corpora)
    assert list(evaluation_sets(several, "test")) == ["flickr30k"]  # sbu has no test part
    assert set(evaluation_sets(config(data="emoji"), "test")) == {"concept", "group", "retrieval"}
    assert is_captioned(config(data="mine"), "mine") and not is_captioned(config(data="folder"), "folder")
    held_out = evaluation_sets(config(data="sbu", root=corpora / "sbu", eval_data=("flickr30k",),
                                      eval_root=corpora / "flickr30k"), "val")
    assert list(held_out) == ["flickr30k"]


def test_validation_of_a_mixture_without_splits(corpora):
    cfg = config(data="mine+sbu", root=corpora)
    assert list(evaluation_sets(cfg, "val")) == ["sbu"] and not evaluation_sets(cfg, "test")  # mine is too small
    (corpora / "coco" / "dataset_coco.json").unlink()
    cfg = config(data="coco+sbu", root=corpora)
    assert list(evaluation_sets(cfg, "test")) == ["coco"]
    ((name, data),) = evaluation_sets(cfg, "val").items()
    assert name == "sbu" and [data.key(i) for i in range(len(data))] == ["198.jpg", "199.jpg"]


# ------------------------------------------------------------------------------------------ questions about photographs


def write_vqa(root, images, year="train2014", count=12, digits="COCO_{year}_{i:012d}.jpg", annotated=True):
    """Three questions an image, in the official layout; image i of `count` has the id 10 * i."""
    kinds = ["yes/no", "number", "other"]
    questions = [{"image_id": 10 * i, "question": f"Question {q} about {i}?", "question_id": 100 * i + q}
                 for i in range(count) for q in range(3)]
    write_json(root / f"v2_OpenEnded_mscoco_{year}_questions.json", {"questions": questions, "data_subtype": year})
    if annotated:
        annotations = [{"question_id": question["question_id"], "image_id": question["image_id"],
                        "answer_type": kinds[n % 3], "multiple_choice_answer": "yes",
                        "answers": [{"answer": f"answer {a % 3} to {question['question_id']}", "answer_id": a + 1}
                                    for a in range(10)]} for n, question in enumerate(questions)]
        write_json(root / f"v2_mscoco_{year}_annotations.json", {"annotations": annotations[::-1]})
    write_json(root / "answer_list.json", ["yes", "no", "2"])
    return write_images(images, [f"{year.replace('-dev', '')}/" + digits.format(year=year.replace("-dev", ""), i=10 * i)
                                 for i in range(count)])


@pytest.mark.parametrize("beside", [False, True])
def test_vqa_v2(tmp_path, beside):
    root = tmp_path / "vqav2"
    found = list(write_vqa(root, tmp_path / "coco" if beside else root).values())
    data = open_vqa("vqav2", root, "train")
    assert len(data) == len(data.kinds) == 36 and data.answers == ["yes", "no", "2"] and not data.bad
    for n in range(36):
        i, q = divmod(n, 3)
        assert data.key(n) == str(100 * i + q) and data.kinds[n] == ["yes/no", "number", "other"][q]
        image, (question, answers) = data.read(n)
        assert image == found[i] and question == f"Question {q} about {i}?"
        assert answers == [f"answer {a % 3} to {100 * i + q}" for a in range(10)]
    assert samples_of(vqa_set(config(data="vqav2", root=root), "train")) == samples_of(data)


@pytest.mark.parametrize("split, year", [("test", "test2015"), ("test-dev", "test-dev2015")])
def test_vqa_v2_test_has_no_answers(tmp_path, split, year):
    found = list(write_vqa(tmp_path, tmp_path, year, annotated=False).values())
    data = open_vqa("vqav2", tmp_path, split)
    assert [data.read(n) for n in range(36)] == [(found[n // 3], (f"Question {n % 3} about {n // 3}?", []))
                                                 for n in range(36)]
    assert data.kinds == [None] * 36


def test_vqa_v2_reads_the_folders_of_2017(tmp_path):
    write_vqa(tmp_path, tmp_path, "train2014", 2)
    write_vqa(tmp_path, tmp_path, "val2014", 2, digits="{i:012d}.jpg")
    for year in ("train2014", "val2014"):
        (tmp_path / year).rename(tmp_path / year.replace("14", "17"))
    assert len(open_vqa("vqav2", tmp_path, "val")) == 6
    assert len(open_vqa("vqav2", tmp_path, "trainval")) == 12


def test_vqa_errors(tmp_path):
    root = tmp_path / "vqav2"
    one_line_error(open_vqa, "vqav3", root, "val", names="vqav3")
    one_line_error(open_vqa, "vqav2", root, "val", names=root)
    write_vqa(root, root, "val2014", 12)
    assert "test-dev" in one_line_error(open_vqa, "vqav2", root, "minival")
    one_line_error(open_vqa, "vqav2", root, "train", names="v2_OpenEnded_mscoco_train2014_questions.json")
    images = sorted((root / "val2014").iterdir())
    images[0].unlink()
    assert open_vqa("vqav2", root, "val").bad == {"missing image file": 3}
    images[1].unlink()
    assert "6 missing image file; more than 10 %" in one_line_error(open_vqa, "vqav2", root, "val")
    for image in images[2:8]:
        image.unlink()
    assert "24 questions" in one_line_error(open_vqa, "vqav2", root, "val", names=root)
    annotations = root / "v2_mscoco_val2014_annotations.json"
    write_json(annotations, {"annotations": json.loads(annotations.read_text())["annotations"][5:]})
    assert "5 of the 36 questions" in one_line_error(open_vqa, "vqav2", root, "val", names=annotations)
    annotations.unlink()
    one_line_error(open_vqa, "vqav2", root, "val", names=annotations)
    write_json(root / "answer_list.json", {"yes": 1})
    one_line_error(open_vqa, "vqav2", root, "val", names=root / "answer_list.json")
    (root / "answer_list.json").unlink()
    message = one_line_error(open_vqa, "vqav2", root, "val", names=root / "answer_list.json")
    assert "a question without an answer list" in message


# ----------------------------------------------------------------------------------------- questions about emoji scenes


def test_emoji_questions_of_a_configuration():
    cfg = config(scenes=7, long_tail=1.0, duplicates=0.5)
    train, test = vqa_set(cfg, "train"), vqa_set(cfg, "test")
    assert len(train) == 42 and len(test) == len(vqa_set(cfg, "val")) == 3000
    images = training_set(cfg)
    for scene in range(7):
        assert (np.asarray(train.read(6 * scene)[0]) == np.asarray(images.read(scene)[0])).all()
    assert test.key(0) == vqa_set(config(seed=9), "test").key(0) and test.key(0) != vqa_set(cfg, "val").key(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_questions_in_order_from_the_loader(workers):
    data = EmojiQuestions("test", 3, 40, difficulty="medium")
    batches = list(common.eval_loader(data, 32, 5, workers))
    assert [i for _, indices, _ in batches for i in indices] == list(range(18))
    for images, indices, targets in batches:
        assert images.shape == (len(indices), 3, 32, 32) and targets == [data.read(i)[1] for i in indices]


# --------------------------------------------------------------------------------------------------------- augmentation


def photograph(size=224):
    """uint8 (3, size, size), of little contrast so that every operation changes it."""
    return torch.from_numpy(common.resize_center_crop(picture(5), size) // 2 + 40)


def as_picture(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def by_torchvision(image, name, level):
    """The operation on a uint8 tensor or a picture by torchvision, at the strength `level` in -1..1."""
    functional = import_torchvision().transforms.functional
    bilinear = dict(interpolation=import_torchvision().transforms.InterpolationMode.BILINEAR, fill=[128.0] * 3)
    still = dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0], **bilinear)
    slant, side = math.degrees(math.atan(0.3 * level)), functional.get_image_size(image)[0]
    return {
        "Identity": lambda: image,
        "AutoContrast": lambda: functional.autocontrast(image),
        "Equalize": lambda: functional.equalize(image),
        "Brightness": lambda: functional.adjust_brightness(image, 0.1 + 1.8 * abs(level)),
        "Sharpness": lambda: functional.adjust_sharpness(image, 0.1 + 1.8 * abs(level)),
        "ShearX": lambda: functional.affine(image, **{**still, "shear": [slant, 0.0]}, center=[0, 0]),
        "ShearY": lambda: functional.affine(image, **{**still, "shear": [0.0, slant]}, center=[0, 0]),
        "TranslateX": lambda: functional.affine(image, **{**still, "translate": [-round(10 * level * side / 224), 0]}),
        "TranslateY": lambda: functional.affine(image, **{**still, "translate": [0, -round(10 * level * side / 224)]}),
        "Rotate": lambda: functional.rotate(image, 30 * level, **bilinear),
    }[name]()


@pytest.mark.parametrize("name", BlipAugment.OPERATIONS)
@pytest.mark.parametrize("level", [0.5, -0.5, 1.0, -1.0])
def test_operations_are_torchvisions(name, level):
    image = photograph()
    ours = np.asarray(BlipAugment().apply(as_picture(image), name, level)).astype(int)
    of_picture = np.asarray(by_torchvision(as_picture(image), name, level)).astype(int)
    of_tensor = by_torchvision(image, name, level).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - of_picture).max() <= 1
    assert np.abs(ours - of_tensor).mean() < 1.5  # its own arithmetic, and another edge to what moves in
    plain = name == "Identity" or (name in ("Brightness", "Sharpness") and abs(level) == 0.5)
    assert (ours == image.permute(1, 2, 0).numpy()).all() == plain


def test_shifts_keep_their_share_of_a_small_image():
    image = photograph(112)
    ours = np.asarray(BlipAugment().apply(as_picture(image), "TranslateX", 0.8)).transpose(2, 0, 1)
    assert (ours[..., :-4] == image.numpy()[..., 4:]).all() and (ours[..., -4:] == 128).all()
    large = np.asarray(BlipAugment().apply(Image.new("RGB", (384, 384)), "TranslateY", -0.5))
    assert (large[:5] == 128).all() and not large[5:].any()


def test_augmentation_is_blips_mixture_of_operations(monkeypatch):
    image, drawn = photograph(16), collections.Counter()
    apply = BlipAugment.apply

    def record(self, picture, name, level):
        drawn[name, level] += 1
        return apply(self, picture, name, level)
    monkeypatch.setattr(BlipAugment, "apply", record)
    rng, untouched, flipped = np.random.default_rng(0), 0, 0
    for _ in range(4000):
        before = sum(drawn.values())
        found = BlipAugment()(image, rng)
        assert found.dtype == torch.uint8 and found.shape == (3, 16, 16)
        if sum(drawn.values()) == before:
            untouched += 1
            flipped += bool((found == image.flip(-1)).all())
            assert (found == image).all() or (found == image.flip(-1)).all()
    for name, sign in itertools.product(BlipAugment.OPERATIONS, (1, -1)):  # 2 draws * 1/10 * 1/2 * 1/2 = 0.05
        assert abs(drawn[name, 0.5 * sign] - 200) < 5 * 14
    assert abs(untouched - 1000) < 150 and abs(flipped / untouched - 0.5) < 0.08
    assert set(drawn) == set(itertools.product(BlipAugment.OPERATIONS, (0.5, -0.5)))


def test_augmentation_depends_on_its_generator_alone():
    image, states = photograph(40), (torch.get_rng_state(), str(np.random.get_state()), random.getstate())
    runs = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        runs.append(torch.stack([BlipAugment()(image, rng) for _ in range(40)]))
        torch.rand(1)
    assert (runs[0] == runs[1]).all() and len({frame.numpy().tobytes() for frame in runs[0]}) > 15
    torch.set_rng_state(states[0])
    before = image.clone()
    BlipAugment()(image, np.random.default_rng(0))
    assert (image == before).all() and (torch.get_rng_state() == states[0]).all()
    assert str(np.random.get_state()) == states[1] and random.getstate() == states[2]


def test_augmentation_settings():
    image, rng = photograph(40), np.random.default_rng(0)
    assert all((BlipAugment(flip=False, operations=0)(image, rng) == image).all() for _ in range(20))
    frames = [BlipAugment(operations=0)(image, rng) for _ in range(20)]
    assert {bool((frame == image.flip(-1)).all()) for frame in frames} == {True, False}
    for strength in (-1, 11):
        one_line_error(BlipAugment, True, strength, names=strength)


def test_training_samples_are_augmented_after_the_crop():
    data, augment = Named("a", 4), BlipAugment(randaugment=9)
    plain = TrainSamples(data, tokenize, 32, (0.5, 1.0), 5)
    samples = TrainSamples(data, tokenize, 32, (0.5, 1.0), 5, augment=augment)
    changed = 0
    for epoch, index in itertools.product(range(5), range(4)):
        rng = np.random.default_rng((5, epoch, index))
        crop = random_resized_crop(data.read(index)[0], 32, rng, (0.5, 1.0))
        rng.integers(2)
        image, tokens, _ = samples[epoch, index]
        assert (image == augment(torch.from_numpy(crop), rng)).all()
        assert (tokens == plain[epoch, index][1]).all()
        changed += bool((image != plain[epoch, index][0]).any())
    assert 12 <= changed <= 20


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="no COCO photographs here")
def test_photographs_through_mixture_and_augmentation():
    data = open_train("coco*1.5", COCO_MINI)
    assert len(data) == 120
    samples = TrainSamples(data, tokenize, 64, (0.2, 1.0), 0, augment=BlipAugment())
    images, tokens, bad = next(iter(train_loader(samples, StepSampler(120, 16, 1), 0, "cpu")))
    assert images.shape == (16, 3, 64, 64) and images.dtype == torch.uint8 and bad == 0 and images.float().std() > 30
