"""Data sets and loaders against independent references: tarfile, webdataset, torchvision, sets
written here."""

import collections
import gzip
import io
import itertools
import json
import multiprocessing
import tarfile
from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
from common import (
    BadSample,
    Mixture,
    TarShards,
    TorchvisionSet,
    TrainSamples,
    UserError,
    check_bad,
    eval_loader,
    evaluation_sets,
    import_torchvision,
    open_image,
    question_set,
    random_crop_box,
    random_resized_crop,
    resize_center_crop,
    resize_whole,
    step_batches,
    train_loader,
    training_set,
)
from PIL import Image

from harness import COCO_MINI

BICUBIC = Image.Resampling.BICUBIC


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(index, size=(640, 480), kind="JPEG", mode="RGB"):
    """Encoded picture: a COCO photograph where there are some, else smooth colours."""
    photos = sorted(COCO_MINI.glob("*2017/*.jpg"))
    if photos and kind == "JPEG" and size == (640, 480):
        return photos[index % len(photos)].read_bytes()
    small = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, BICUBIC).convert(mode)
    return encode(image, kind, **({"quality": 95} if kind == "JPEG" else {}))


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type = tarfile.REGTYPE if content is not None else tarfile.DIRTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def pairs(*keys):
    return [(f"{key}.{kind}", f"{kind} {key}".encode()) for key in keys for kind in ("jpg", "txt")]


def samples_of(data):
    return {data.key(i): data[i] for i in range(len(data))}


def refusal(function, *arguments):
    """The message of the UserError that a call raises: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tokenize(texts):
    """Stand-in tokenizer: the codes of the first characters."""
    return torch.tensor([[ord(c) for c in text.ljust(24)[:24]] for text in texts])


def sentence(tokens):
    return "".join(map(chr, tokens.tolist())).strip()


class Pictures:
    """A captioned set in memory; sample 3 is corrupt."""

    kind, digest = "captions", 0

    def __init__(self, n=10, corrupt=(3,)):
        self.images = [picture(i, (96, 64), "PNG") for i in range(n)]
        self.corrupt = corrupt

    def __len__(self):
        return len(self.images)

    def key(self, i):
        return str(i)

    def captions(self, i):
        return [f"first caption {i}", f"second caption {i}"]

    def __getitem__(self, i):
        if i in self.corrupt:
            raise BadSample("corrupt image")
        return self.images[i], self.captions(i)


def config(**given):
    """What the functions of a configuration read, with a Config's defaults."""
    return SimpleNamespace(**{**dict(
        data="emoji", root=None, keep=None, eval_data=(), workers=-1, scenes=20, seed=3,
        concepts=30, difficulty="easy", noise=0.0), **given})


# --------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("size", [(640, 480), (300, 301), (224, 500), (150, 100), (333, 224)])
def test_evaluation_images_are_torchvisions(size):
    transforms = import_torchvision().transforms
    bicubic = transforms.InterpolationMode.BICUBIC
    encoded = picture(1, size, "PNG")
    central = transforms.Compose([transforms.Resize(224, bicubic), transforms.CenterCrop(224)])
    whole = transforms.Resize((224, 224), bicubic)
    for ours, theirs in ((resize_center_crop, central), (resize_whole, whole)):
        reference = np.asarray(theirs(Image.open(io.BytesIO(encoded)))).transpose(2, 0, 1)
        image = ours(encoded, 224)
        assert image.shape == (3, 224, 224) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - reference).max() <= 1


def test_random_crop_is_torchvisions_resized_crop():
    transforms = import_torchvision().transforms
    for seed in range(20):
        encoded = picture(seed, (400, 300), "PNG")
        rng = np.random.default_rng(seed)
        left, top, width, height = random_crop_box(400, 300, rng, (0.5, 1.0))
        reference = transforms.functional.resized_crop(
            Image.open(io.BytesIO(encoded)), top, left, height, width, [224, 224],
            transforms.InterpolationMode.BICUBIC)
        ours = random_resized_crop(encoded, 224, np.random.default_rng(seed))
        assert np.abs(ours.astype(int) - np.asarray(reference).transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (900, 300), (100, 100)])
def test_crop_boxes_have_torchvisions_distribution(size):
    crop = import_torchvision().transforms.RandomResizedCrop
    rng, image, ranges = np.random.default_rng(0), Image.new("L", size), ((0.5, 1), (3 / 4, 4 / 3))
    torch.manual_seed(0)
    ours = np.array([random_crop_box(*size, rng, ranges[0]) for _ in range(4000)])
    theirs = np.array([crop.get_params(image, *ranges) for _ in range(4000)])[:, [1, 0, 3, 2]]
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        difference = np.quantile(ours, quantile, axis=0) - np.quantile(theirs, quantile, axis=0)
        assert np.abs(difference).max() < 0.03 * max(size)


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000)])
def test_crop_of_extreme_images_is_torchvisions(size):
    ranges = (0.5, 1.0), (3 / 4, 4 / 3)
    crop = import_torchvision().transforms.RandomResizedCrop
    top, left, height, width = crop.get_params(Image.new("L", size), *ranges)
    box = random_crop_box(*size, np.random.default_rng(0), ranges[0])
    assert box == (left, top, width, height)
    with pytest.raises(BadSample, match="thin"):
        resize_center_crop(Image.new("L", (1000, 2)), 8)


def decoding_difference(encoded, size, seed):
    """Mean grey levels between our crop of a JPEG and that of its full decode."""
    full = Image.open(io.BytesIO(encoded)).convert("RGB")  # as an image, it is not decoded again
    crops = []
    for source in (encoded, full):
        rng = np.random.default_rng(seed)
        crops.append(resize_center_crop(source, size) if seed is None else
                     random_resized_crop(source, size, rng))
    return np.abs(np.subtract(*crops, dtype=int)).mean()


def test_decoding_smaller_changes_little():
    # 1.1 (random) and 1.6 (central) grey levels; edges rounded to the reduced pixels would give 3.
    for seed in (None, 0):
        differences = [decoding_difference(picture(index), 112, seed) for index in range(0, 160, 8)]
        assert 0 < np.mean(differences) < 2


@pytest.mark.parametrize("size", [(641, 427), (1201, 803), (455, 901)])
def test_decoding_smaller_does_not_shift(size):
    # Without fine detail little but a shift shows: 0.3 grey levels, 0.75 with rounded edges.
    for seed in (None, 0, 1, 2):
        assert decoding_difference(picture(3, size), 64, seed) < 0.5


def test_every_mode_becomes_rgb():
    for mode in ("L", "RGB", "P", "1", "CMYK"):
        assert resize_whole(picture(0, (64, 48), "TIFF", mode), 32).shape == (3, 32, 32)
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    for kind in ("PNG", "TIFF"):  # 16 bits
        deep = encode(Image.fromarray((ramp * 257).astype(np.uint16)), kind)
        assert np.abs(resize_whole(deep, 64)[0] - np.round(ramp)).max() <= 1
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = encode(Image.new("P", (4, 4), 0), "GIF", transparency=0)
    for image in (clear, encode(clear), palette):
        assert (resize_whole(image, 4) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(int(resize_whole(half, 4)[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("encoded, reason", [
    *((damage(picture(0, (320, 240), kind)), "corrupt") for kind in ("JPEG", "PNG", "WEBP")
      for damage in (lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"<html>",
                     lambda b: b[:20], lambda b: b"\xff\xd8\xff" + bytes(500))),
    (encode(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "32 bits"),
    (encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "32 bits"),
    (encode(Image.new("1", (20000, 10000))), "too large"),
])
def test_unusable_images_are_bad_samples(encoded, reason):
    for function in (resize_center_crop, resize_whole,
                     lambda b, size: random_resized_crop(b, size, np.random.default_rng(0))):
        with pytest.raises(BadSample, match=reason):
            function(encoded, 100)


# --------------------------------------------------------------------------------------- shards


def test_shards_read_like_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    odd = "a/" + "long-" * 40 + "name"
    members = [("a", None), ("a/1.jpg", b"A"), ("a/1.txt", b"one"), ("./b.x/2.JPG", b"B"),
               ("./b.x/2.TXT", b"two"), (f"{odd}.seg.png", b"mask"), (f"{odd}.png", b"C"),
               (f"{odd}.txt", "drei\u00df".encode()), ("4.webp", b"D"),
               ("4.json", json.dumps({"caption": "four"}).encode()),
               ("\u00e9t\u00e9.jpeg", b"F"), ("\u00e9t\u00e9.txt", b"six")]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "0.tar", members, format)
        reference = {}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            image = next((sample[kind] for kind in ("jpg", "jpeg", "png", "webp")
                          if kind in sample), None)
            text = sample.get("txt") or json.loads(sample["json"])["caption"].encode()
            reference[f"0/{sample['__key__']}"] = image, [text.decode()]
        data = TarShards(tmp_path)
        assert samples_of(data) == reference and len(reference) == 5 and not +data.bad
        path.unlink()


@pytest.mark.parametrize("members, bad", [
    ([("5.jpg", b"I")], {"without caption": 1}),
    ([("6.txt", b"t")], {"without image": 1}),
    (pairs("0"), {"named twice": 2}),
    ([("notes.md", b"x")], {}),
])
def test_what_a_shard_loses_is_counted(tmp_path, members, bad):
    keys = ["0", "1", "2", "3", "shot 10.31", "shot 10.32", "a.b/c.d.e"]
    write_tar(tmp_path / "a.tar", [*pairs(*keys), *members])
    data = TarShards(tmp_path)
    assert +data.bad == bad
    assert samples_of(data) == {f"a/{key}": (f"jpg {key}".encode(), [f"txt {key}"]) for key in keys}


@pytest.mark.parametrize("name, content, captions", [
    ("json", b'{"caption": "one  two"}', ["one two"]),
    ("json", b'{"caption": ["a", " ", "b"]}', ["a", "b"]), ("txt", b"\xef\xbb\xbfmark", ["mark"]),
    ("txt", b" \n", "empty caption"), ("json", b'{"caption": []}', "empty caption"),
    ("txt", b"\xff\xfe", "unreadable caption"), ("json", b"[1]", "unreadable caption"),
    ("json", b"{}", "no text"), ("json", b'{"caption": ["a", 5]}', "no text"),
])
def test_captions_in_shards(tmp_path, name, content, captions):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"I"), (f"1.{name}", content)])
    data = TarShards(tmp_path)
    if isinstance(captions, list):
        assert data[0] == (b"I", captions)
    else:
        with pytest.raises(BadSample, match=captions):
            data[0]


@pytest.mark.parametrize("at", ["image", "caption", "header", "boundary", "end"])
def test_truncated_shard_keeps_its_whole_samples(tmp_path, at):
    path = write_tar(tmp_path / "0.tar", [(name, 100 * content) for name, content
                                          in pairs(*range(5))])
    with tarfile.open(path) as tar:
        image, caption = tar.getmember("3.jpg"), tar.getmember("3.txt")
    cut = {"image": image.offset_data + 300, "caption": caption.offset_data + 3,
           "header": caption.offset + 100, "boundary": image.offset,
           "end": path.stat().st_size}[at]
    path.write_bytes(path.read_bytes()[:cut])
    data = TarShards(tmp_path)
    assert [data.key(i) for i in range(len(data))] == [f"0/{i}" for i in range(5 if at == "end"
                                                                              else 3)]
    assert (data.bad.total() > 0) == (at != "end")
    assert all(data[i][0] == 100 * (b"jpg %d" % i) for i in range(len(data)))


def test_damaged_and_joined_shards(tmp_path):
    macos = [("._a.jpg", b""), ("._a.txt", b"")]
    parts = [write_tar(tmp_path / f"{name}.part", pairs(name) + macos).read_bytes() for name in "ab"]
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))  # cat a.tar b.tar
    data = TarShards(tmp_path)
    assert samples_of(data) == {f"joined/{n}": (f"jpg {n}".encode(), [f"txt {n}"]) for n in "ab"}
    assert not +data.bad
    for damage in (b"x" * 20, bytes(512)):
        path = write_tar(tmp_path / "joined.tar", pairs(*range(5)))
        with tarfile.open(path) as tar:
            offset = tar.getmember("3.jpg").offset
        content = bytearray(path.read_bytes())
        content[offset:offset + len(damage)] = damage
        path.write_bytes(content)
        data = TarShards(tmp_path)
        assert data.bad["in a damaged shard"] >= 1
        assert all(data[i][0][4:].decode() == data[i][1][0][4:] for i in range(len(data)))
    (tmp_path / "1.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "2.tar").write_bytes(b"")
    for name, zeros in ("3.tar", slice(10 ** 5, None)), ("4.tar", slice(10 ** 5, 2 * 10 ** 5)):
        path = write_tar(tmp_path / name, pairs(*range(500)))
        content = bytearray(path.read_bytes())  # room that a download has not filled yet
        content[zeros] = bytes(len(content[zeros]))
        path.write_bytes(content)
    assert TarShards(tmp_path).bad["in a damaged shard"] == data.bad["in a damaged shard"] + 4


def test_index_is_cached_and_follows_the_shards(tmp_path, monkeypatch):
    write_tar(tmp_path / "sub" / "0.tar", [*pairs(*range(6)), ("7.jpg", b"I")])
    first = TarShards(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(common, "scan_shard", None)  # the second opening must not scan
        second = TarShards(tmp_path)
    assert samples_of(first) == samples_of(second) and first.bad == second.bad
    path = write_tar(tmp_path / "sub" / "9.tar", [("x.jpg", b"I"), ("x.txt", b"t")])
    assert len(TarShards(tmp_path)) == 7
    before = path.stat().st_size
    write_tar(path, [("longer.jpg", b"I"), ("later.jpg", b"J"), ("later.txt", b"u")])
    assert path.stat().st_size == before  # padding: only the time tells
    assert TarShards(tmp_path)[6] == (b"J", ["u"])
    (tmp_path / ".index.npz").write_bytes(b"damaged")
    assert len(TarShards(tmp_path)) == 7


def test_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "0.tar", pairs(1))
    monkeypatch.setattr("os.replace", lambda *paths: open(tmp_path))  # an OSError
    assert len(TarShards(tmp_path)) == 1 and [p.name for p in tmp_path.iterdir()] == ["0.tar"]
    assert "indexed again" in capsys.readouterr().out


@pytest.mark.parametrize("name, words", [
    (None, "unpack"), ("a.tar.gz", "unpack"), ("a.tar", "unpack"), ("b.tar", "without caption")])
def test_shard_errors(tmp_path, name, words):
    if name == "b.tar":
        write_tar(tmp_path / name, [("x.jpg", b"I")])
    elif name:
        (tmp_path / name).write_bytes(gzip.compress(bytes(10_000)))
    message = refusal(training_set, config(data="mine", root=tmp_path), 8)
    assert str(tmp_path) in message and words in message


def test_what_is_for_validation_is_not_trained_on(tmp_path, capsys):
    root = tmp_path / "mine"
    for name in ("cc3m-train-0000", "valid/0", "test/0", "cc3m-validation-0000", "deep/val/0"):
        write_tar(root / f"{name}.tar", pairs(name.replace("/", "-")))
    write_tar(tmp_path / "elsewhere" / "latest.tar", pairs("linked"))
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "link" / "up").symlink_to(root)  # a circle
    data = training_set(config(data="mine", root=root), 8)
    keys = ["cc3m-train-0000/cc3m-train-0000", "link/latest/linked"]
    assert [data.key(i) for i in range(len(data))] == keys
    out = capsys.readouterr().out
    assert f"train: 2 images with captions, of {root}" in out
    write_tar(tmp_path / "only" / "val" / "0.tar", pairs("v"))
    assert "no captioned images" in refusal(training_set, config(data="x", root=tmp_path / "only"), 8)


# ---------------------------------------------------------------------------- classes, questions


def write_classes(root, names, count=3):
    for number, name in enumerate(names):
        (root / name / "deeper").mkdir(parents=True)
        for i in range(count):
            parent = root / name / "deeper" if i == 0 else root / name
            (parent / f"{i}.JPEG").write_bytes(b"%d" % (10 * number + i))
        (root / name / "notes.txt").write_text("no image")


def class_set(root, split="test"):
    return evaluation_sets(config(eval_data=(str(root),)), 8, split).get(root.name)


def test_image_folder(tmp_path):
    write_classes(tmp_path / "test", ["hot_dog", "apple"])
    write_classes(tmp_path / "train", ["hot_dog", "big-tree", "apple", "@eaDir", "apple/.thumbs"])
    (tmp_path / "train" / "__MACOSX").mkdir()
    test, train = class_set(tmp_path), class_set(tmp_path, "train")
    assert test.classes == train.classes == ["apple", "big tree", "hot dog"]
    assert sorted(test[i] for i in range(6)) == sorted(
        [(b"%d" % (10 * n + i), label) for n, label in ((0, 2), (1, 0)) for i in range(3)])
    assert len(train) == 9 and test.templates == ["a photo of a {}."] and test.kind == "classes"
    assert class_set(tmp_path, "val") is None
    (tmp_path / "empty" / "val" / "a").mkdir(parents=True)
    for root in (tmp_path / "c", tmp_path / "empty"):
        assert str(root) in refusal(class_set, root)


def test_imagenet(tmp_path):
    write_classes(tmp_path / "imagenet" / "val", ["n01443537", "n01440764"])
    write_tar(tmp_path / "imagenet" / "ILSVRC2012_img_val.tar", pairs("the archive"))
    data = class_set(tmp_path / "imagenet")
    assert data.classes == ["tench", "goldfish"]
    assert len(data.templates) == 80 and all(text.count("{}") == 1 for text in data.templates)
    write_classes(tmp_path / "other", ["n00000001"])
    assert "n00000001" in refusal(class_set, tmp_path / "other")


@pytest.mark.parametrize("name", sorted(common.TORCHVISION))
def test_torchvision_sets_say_what_is_missing(name, tmp_path):
    message = refusal(TorchvisionSet, name, tmp_path, "test")
    assert f"datasets.{common.TORCHVISION[name][0]}('{tmp_path}'" in message or "package" in message


def test_torchvision_set(tmp_path):
    folder = tmp_path / "food-101"
    (folder / "images" / "apple_pie").mkdir(parents=True)
    (folder / "meta").mkdir()
    image = Image.new("RGB", (8, 8), "red")
    for name in ("1", "2"):
        image.save(folder / "images" / "apple_pie" / f"{name}.jpg")
    for split, name in (("train", "1"), ("test", "2")):
        content = json.dumps({"apple_pie": [f"apple_pie/{name}"]})
        (folder / "meta" / f"{split}.json").write_text(content)
    data = TorchvisionSet("food101", tmp_path, "test")
    assert len(data) == 1 and data.classes == ["apple pie"] and data[0][1] == 0
    assert open_image(data[0][0]).size == (8, 8)
    (folder / "images" / "apple_pie" / "2.jpg").write_bytes(b"damaged")
    with pytest.raises(BadSample):
        data[0]


# ------------------------------------------------------------------------- what a Config names


def write_list(root, split, count, kind="captions", **head):
    """A list as data/prepare.py writes it, of `count` images."""
    root.mkdir(parents=True, exist_ok=True)
    head = {"name": root.name, "kind": kind, "made_from": [], "unusable": {}, "notes": {},
            "answers": ["yes"], "samples": count, "root": ".", **head}
    records = [{"key": f"{split}-{i}", "image": f"{i}.jpg", "captions": [f"{root.name} {i}"]}
               for i in range(count)]
    for i in range(count):
        (root / f"{i}.jpg").write_bytes(b"%d" % i)
    lines = [json.dumps(line) for line in (head, *records)]
    (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def corpora(tmp_path):
    """coco with three lists, sbu with one of 200, mine as shards of 250, in folders of a root."""
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        write_list(tmp_path / "coco", split, count)
    write_list(tmp_path / "sbu", "train", 200)
    write_tar(tmp_path / "mine" / "0.tar", pairs(*(f"{i:04d}" for i in range(250))))
    return tmp_path


def keys_of(data):
    return [data.key(i) for i in range(len(data))]


def test_a_mixture_is_its_parts_one_after_another(corpora, monkeypatch):
    data = training_set(config(data="coco*2+sbu + mine", root=corpora), 8)
    coco, sbu, mine = (training_set(config(data=name, root=corpora / name), 8)
                       for name in ("coco", "sbu", "mine"))
    assert len(sbu) == 198 and len(mine) == 248
    assert keys_of(data) == [f"{name}/{key}" for name, part in (("coco", coco), ("coco", coco),
                             ("sbu", sbu), ("mine", mine)) for key in keys_of(part)]
    assert data[3] == data[9] == coco[3] and data[12][1] == ["sbu 0"]
    monkeypatch.setattr(common, "DATA", corpora)
    assert keys_of(training_set(config(data="coco*2+sbu+mine"), 8)) == keys_of(data)


@pytest.mark.parametrize("name", [
    "coco*0", "coco*99999", "coco*-1", "coco*two", "coco*", "coco*0.5", "coco+coco*2", "coco+", "+coco",
    "coco+emoji", "emoji*2", "coco*2*3", "coco+vg", "nowhere"])
def test_data_that_is_none(tmp_path, name):
    refusal(training_set, config(data=name, root=tmp_path if "+" in name else None), 8)


def test_held_out_samples_are_not_trained_on(corpora):
    cfg = config(data="mine", root=corpora / "mine")
    train, val = training_set(cfg, 8), evaluation_sets(cfg, 8, "val")["mine"]
    assert keys_of(train) == [f"0/{i:04d}" for i in range(248)]
    assert keys_of(val) == ["0/0248", "0/0249"] and val[1] == (b"jpg 0249", ["txt 0249"])
    assert not evaluation_sets(cfg, 8, "test")
    write_tar(corpora / "mine" / "val" / "0.tar", pairs("v"))
    assert len(training_set(cfg, 8)) == 250
    assert keys_of(evaluation_sets(cfg, 8, "val")["mine"]) == ["0/v"]


def test_evaluation_sets(corpora):
    cfg = config(data="sbu+coco*2", root=corpora)
    for split in ("val", "test"):
        name, data = next(iter(evaluation_sets(cfg, 8, split).items()))
        assert name == "coco" and data.key(0) == f"{split}-0"
    folder = config(data="coco", root=corpora / "coco", eval_data=(str(corpora / "sbu"),))
    assert list(evaluation_sets(folder, 8, "val"))[0] == "sbu"
    assert "no test split" in refusal(evaluation_sets, folder, 8, "test")
    twice = config(eval_data=(str(corpora / "coco"), f"{corpora}/./coco"))
    assert "two sets are called coco" in refusal(evaluation_sets, twice, 8, "test")
    assert list(evaluation_sets(config(data="mine+sbu", root=corpora), 8, "val")) == ["mine", "sbu"]
    only_classes = config(data="mine", root=corpora / "mine", eval_data=(str(corpora / "classes"),))
    write_classes(corpora / "classes", ["a", "b"])
    assert list(evaluation_sets(only_classes, 8, "val")) == ["mine"]
    emoji = evaluation_sets(config(), 40, "test")
    assert {name: data.kind for name, data in emoji.items()} == {
        "concept": "classes", "group": "classes", "retrieval": "captions"}
    assert common.loader_workers(config()) == 0 and common.loader_workers(config(data="x")) >= 1


@pytest.mark.parametrize("name", ["coco", "vqav2", "cc3m", "nocaps"])
def test_unprepared_data_is_refused_with_the_command(tmp_path, name):
    (tmp_path / "annotations").mkdir()
    for opening, *split in ((training_set,), (question_set, "val"), (evaluation_sets, "test")):
        message = refusal(opening, config(data=name, root=tmp_path), 8, *split)
        assert f"python data/prepare.py {name} {tmp_path}" in message


def test_captions_and_questions_are_not_confused(corpora):
    assert "no questions" in refusal(question_set, config(data="coco", root=corpora / "coco"), 8, "val")
    write_list(corpora / "vqav2", "train", 3, kind="questions", answers="yes")
    assert "is no list" in refusal(training_set, config(data="vqav2", root=corpora / "vqav2"), 8)
    write_list(corpora / "vqav2", "train", 3, kind="questions")
    assert "holds questions" in refusal(evaluation_sets, config(data="vqav2", root=corpora / "vqav2"), 8, "train")
    assert "no captioned" in refusal(training_set, config(data="vqav2", root=corpora / "vqav2"), 8)


def test_unusable_samples_of_a_list_are_judged(tmp_path, capsys):
    cfg = config(data="coco", root=tmp_path / "coco")
    write_list(tmp_path / "coco", "train", 9, unusable={"missing image file": 1})
    training_set(cfg, 8)
    assert "1 of 10 samples cannot be used: 1 missing image file" in capsys.readouterr().out
    write_list(tmp_path / "coco", "train", 9, unusable={"missing image file": 2})
    assert "more than 10 %" in refusal(training_set, cfg, 8)


def test_keep(corpora, tmp_path):
    cfg = config(data="coco*2+sbu", root=corpora, keep=tmp_path / "keys")
    cfg.keep.write_text("coco/train-3\nsbu/train-17\n")
    data = training_set(cfg, 8)
    assert keys_of(data) == ["coco/train-3", "coco/train-3", "sbu/train-17"]
    assert data[2] == (b"17", ["sbu 17"])
    cfg.keep.write_text("coco/train-3\ncoco/train-6\n")
    assert "1 of its 2 keys" in refusal(training_set, cfg, 8)


# -------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_independent_of_the_number_of_ranks(world, monkeypatch):
    n, batch, steps = 50, 8, 14  # 6 steps an epoch: three epochs are touched
    whole, parts = list(step_batches(n, batch, steps, 0, 3)), []
    monkeypatch.setattr(common, "world_size", lambda: world)
    for place in range(world):
        monkeypatch.setattr(common, "rank", lambda: place)
        parts.append(list(step_batches(n, batch, steps, 0, 3)))
    for step in range(steps):
        shares = zip(*(part[step] for part in parts))
        assert list(itertools.chain.from_iterable(shares)) == whole[step]


def test_every_sample_once_an_epoch_and_resume():
    batches = list(step_batches(48, 8, 18, 0, 1))
    orders = [[index for batch in batches[6 * e:6 * e + 6] for epoch, index in batch if epoch == e]
              for e in range(3)]
    assert all(sorted(order) == list(range(48)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and batches != list(step_batches(48, 8, 18, 0, 2))
    for start in (0, 1, 6, 11, 18):
        assert list(step_batches(48, 8, 18, start, 1)) == batches[start:]


def test_batches_that_cannot_be(monkeypatch):
    cfg, cpu = SimpleNamespace(batch_size=8), torch.device("cpu")
    assert "7" in refusal(train_loader, range(7), cfg, 1, 0, cpu)
    monkeypatch.setattr(common, "world_size", lambda: 3)
    assert "3" in refusal(train_loader, range(100), cfg, 1, 0, cpu)


def loaded(data, workers, method=None, start=0):
    samples = TrainSamples(data, tokenize, 32, (0.5, 1.0), seed=5)
    cfg = SimpleNamespace(batch_size=4, seed=5, workers=workers)
    loader = train_loader(samples, cfg, 5, start, torch.device("cpu"))
    if method:
        loader.multiprocessing_context = method
    return list(loader)


@pytest.mark.parametrize("workers, method, start", [(2, "fork", 0), (1, "spawn", 2)])
def test_workers_and_resuming_do_not_change_the_batches(workers, method, start):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    data = Mixture(["a", "b", "b"], [Pictures(), *[Pictures(7)] * 2])
    ours, reference = loaded(data, workers, method, start), loaded(data, 0)[start:]
    for a, b in zip(ours, reference, strict=True):
        assert (a[0] == b[0]).all() and (a[1] == b[1]).all() and a[2] == b[2]
        assert a[0].shape == (4, 3, 32, 32) and a[0].dtype == torch.uint8


def test_samples_are_drawn_as_written_down():
    """Crop, then caption, from (seed, epoch, index), written out; then the augmentation."""
    data = Pictures()
    samples = TrainSamples(data, tokenize, 32, (0.5, 1.0), seed=5)
    mirrored = TrainSamples(data, tokenize, 32, (0.5, 1.0), 5, lambda image, rng: image.flip(-1))
    for epoch, index in itertools.product(range(3), (0, 1, 4, 9)):
        rng = np.random.default_rng((5, epoch, index))
        image = random_resized_crop(data.images[index], 32, rng, (0.5, 1.0))
        text = data.captions(index)[rng.integers(2)]
        ours = samples[epoch, index]
        assert (ours[0].numpy() == image).all() and sentence(ours[1]) == text and ours[2] == 0
        assert (mirrored[epoch, index][0].flip(-1) == ours[0]).all()
        assert samples.draw((epoch, index), 1)[3:] == (index, 0)


def test_bad_samples_are_replaced_by_the_next():
    samples = TrainSamples(Pictures(), tokenize, 32, (0.5, 1.0), seed=0)
    image, tokens, bad = samples[7, 3]
    expected, expected_tokens, none = samples[7, 4]
    assert bad == 1 and none == 0
    assert (image == expected).all() and (tokens == expected_tokens).all()
    places = [index for batch in step_batches(10, 4, 5, 0, 5) for _, index in batch]
    assert sum(batch[2] for batch in loaded(Pictures(), 0)) == places.count(3)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_workers_stay_one_line(workers):
    message = refusal(loaded, Pictures(corrupt=range(10)), workers)
    assert message.startswith("100 samples in a row") and message.endswith("(last: corrupt image)")


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_leaves_out_bad_samples(workers):
    data = Pictures()
    batches = list(eval_loader(data, 32, 4, workers))
    assert [list(batch[1]) for batch in batches] == [[0, 1, 2], [4, 5, 6, 7], [8, 9]]
    for images, indices, targets in batches:
        assert list(targets) == [data.captions(i) for i in indices]
        for image, i in zip(images, indices, strict=True):
            assert (image.numpy() == resize_center_crop(data.images[i], 32)).all()
    assert not list(eval_loader(Pictures(corrupt=range(10)), 32, 4, 0))


def test_check_bad(capsys):
    check_bad(collections.Counter({"not downloaded": 90, "cut off": 1}), 9, "data/x")
    assert capsys.readouterr().out.count("\n") == 1
    lost = collections.Counter({"not downloaded": 90, "cut off": 2})
    assert "2 cut off" in refusal(check_bad, lost, 8, "data/x")
