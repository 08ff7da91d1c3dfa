"""Data sets and loaders against independent references: tarfile, webdataset, torchvision, and sets written here."""

import collections
import io
import json
import multiprocessing
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import (
    BadSample,
    CaptionTSV,
    CocoCaptions,
    Flickr30k,
    ImageFolderSet,
    StepSampler,
    TarShards,
    TorchvisionSet,
    TrainSamples,
    UserError,
    check_bad,
    eval_loader,
    import_torchvision,
    open_image,
    open_labelled,
    open_retrieval,
    open_train,
    random_crop_box,
    random_resized_crop,
    resize_center_crop,
    resize_whole,
    train_loader,
)

COCO_MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"


def picture(index, size=(640, 480), kind="JPEG", mode="RGB"):
    """Encoded picture: a COCO photograph when they are there (kind JPEG, no size asked), else smooth colours."""
    photos = sorted(COCO_MINI.glob("*2017/*.jpg"))
    if photos and kind == "JPEG" and size == (640, 480):
        return photos[index % len(photos)].read_bytes()
    small = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder, shards=3, samples=8):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = []
        for i in range(samples):
            key = f"{shard:05d}{i:04d}"
            members += [(f"{key}.jpg", picture(shard * samples + i)), (f"{key}.txt", f"caption  of {key}\n".encode()),
                        (f"{key}.json", json.dumps({"caption": "unused"}).encode())]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def one_line_error(function, *arguments, names=""):
    """The message of the UserError that a call raises: one line that names what it is about."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and str(names) in message, message
    return message


def tokenize(texts):
    """Stand-in tokenizer: the codes of the first characters."""
    return torch.tensor([[ord(c) for c in text.ljust(24)[:24]] for text in texts])


class Pictures:
    """A captioned set in memory; sample 3 is corrupt."""
    def __init__(self, n=10):
        self.images = [picture(i, (96, 64), "PNG") for i in range(n)]
        self.images[3] = b"no image"

    def __len__(self):
        return len(self.images)

    def key(self, i):
        return str(i)

    def read(self, i):
        return self.images[i], [f"first caption {i}", f"second caption {i}"]


class Corrupt(Pictures):
    def read(self, i):
        raise BadSample("corrupt image")


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("size", [(640, 480), (300, 301), (224, 500), (150, 100), (333, 224)])
def test_center_crop_is_torchvisions(size):
    transforms = import_torchvision().transforms
    image = Image.open(io.BytesIO(picture(1, size, "PNG")))
    reference = transforms.Compose([transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
                                    transforms.CenterCrop(224)])(image)
    ours = resize_center_crop(picture(1, size, "PNG"), 224)
    assert ours.shape == (3, 224, 224) and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - np.asarray(reference).transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("size", [(640, 480), (300, 301), (150, 100), (333, 224)])
def test_whole_image_is_torchvisions_resize(size):
    transforms = import_torchvision().transforms
    for side in (224, 64):
        image = Image.open(io.BytesIO(picture(1, size, "PNG")))
        reference = transforms.Resize((side, side), transforms.InterpolationMode.BICUBIC)(image)
        ours = resize_whole(picture(1, size, "PNG"), side)
        assert ours.shape == (3, side, side) and ours.dtype == np.uint8
        assert np.abs(ours.astype(int) - np.asarray(reference).transpose(2, 0, 1)).max() <= 1
        reduced = resize_whole(picture(1, size), side), resize_whole(Image.open(io.BytesIO(picture(1, size))), side)
        assert np.abs(np.subtract(*reduced, dtype=int)).mean() < 2  # a JPEG decoded at 1/2 to 1/8


def test_random_crop_is_torchvisions_resized_crop():
    torchvision = import_torchvision()
    for seed in range(20):
        encoded = picture(seed, (400, 300), "PNG")
        left, top, width, height = random_crop_box(400, 300, np.random.default_rng(seed), (0.5, 1.0), (3 / 4, 4 / 3))
        reference = torchvision.transforms.functional.resized_crop(
            Image.open(io.BytesIO(encoded)), top, left, height, width, [224, 224],
            torchvision.transforms.InterpolationMode.BICUBIC)
        ours = random_resized_crop(encoded, 224, np.random.default_rng(seed))
        assert np.abs(ours.astype(int) - np.asarray(reference).transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (900, 300), (100, 100)])
def test_crop_boxes_have_torchvisions_distribution(size):
    crop = import_torchvision().transforms.RandomResizedCrop
    rng, image = np.random.default_rng(0), Image.new("L", size)
    torch.manual_seed(0)
    ours = np.array([random_crop_box(*size, rng, (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    theirs = np.array([crop.get_params(image, (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])[:, [1, 0, 3, 2]]
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        difference = np.quantile(ours, quantile, axis=0) - np.quantile(theirs, quantile, axis=0)
        assert np.abs(difference).max() < 0.03 * max(size)


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000)])
def test_crop_of_extreme_images_is_torchvisions(size):
    top, left, height, width = import_torchvision().transforms.RandomResizedCrop.get_params(
        Image.new("L", size), (0.5, 1.0), (3 / 4, 4 / 3))
    box = random_crop_box(*size, np.random.default_rng(0), (0.5, 1.0), (3 / 4, 4 / 3))
    assert box == (left, top, width, height)


def test_large_jpegs_are_decoded_smaller():
    encoded = picture(0, (1600, 1200))
    assert open_image(encoded).size == (1600, 1200)
    assert open_image(encoded, 600).size == (800, 600)
    assert open_image(encoded, 601).size == (1600, 1200)
    assert open_image(encoded, 224).size == (400, 300)
    assert open_image(encoded, 16).size == (200, 150)
    assert open_image(picture(0, (1600, 1200), "PNG"), 16).size == (1600, 1200)  # PNG cannot be
    assert open_image(picture(0, (1601, 1203)), 224).size == (401, 301)


def decoding_difference(encoded, size, seed=None):
    """Mean grey levels between our crop of a JPEG and the same crop of its full decode (seed None: the centre)."""
    full = Image.open(io.BytesIO(encoded)).convert("RGB")  # as an image, it is not decoded again
    small, reference = (resize_center_crop(source, size) if seed is None else
                        random_resized_crop(source, size, np.random.default_rng(seed)) for source in (encoded, full))
    return np.abs(small.astype(int) - reference).mean()


@pytest.mark.parametrize("seeds", [[None], [0, 1, 2]])
def test_decoding_smaller_changes_little(seeds):
    # Photographs: 1.1 (random) and 1.6 (central) grey levels. Crop edges rounded to the reduced pixels would give 3.
    differences = [decoding_difference(picture(index), 112, seed) for index in range(0, 160, 8) for seed in seeds]
    assert 0 < np.mean(differences) < 2


@pytest.mark.parametrize("size", [(641, 427), (1201, 803), (455, 901)])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_decoding_smaller_does_not_shift(size, seed):
    # Without fine detail little but a shift shows: 0.27 to 0.34 grey levels as it is, 0.75 or more with rounded edges.
    assert decoding_difference(picture(3, size), 64, seed) < 0.5


def test_every_mode_becomes_rgb():
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64)
    for mode in ("L", "RGB", "P", "1", "CMYK"):
        image = open_image(picture(0, (64, 48), "TIFF", mode))
        assert image.mode == "RGB" and image.size == (64, 48)
    expected = np.round(ramp).astype(int)
    for kind in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray((ramp * 257).astype(np.uint16)).save(buffer, kind)
        assert np.abs(np.asarray(open_image(buffer.getvalue()))[..., 0].astype(int) - expected).max() <= 1
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(open_image(half).getpixel((0, 0))[0] - 127) <= 1
    buffer = io.BytesIO()
    Image.new("P", (4, 4), 0).save(buffer, "GIF", transparency=0)
    assert open_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"<html>", lambda b: b[:20],
                                    lambda b: b"\xff\xd8\xff" + bytes(500)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_corrupt_images_are_bad_samples(damage, kind):
    for function in (lambda b: open_image(b, 100), lambda b: resize_center_crop(b, 100),
                     lambda b: random_resized_crop(b, 100, np.random.default_rng(0))):
        with pytest.raises(BadSample, match="corrupt image"):
            function(damage(picture(0, (320, 240), kind)))


# ------------------------------------------------------------------------------------------------------- captioned sets


def test_shards_read_like_tarfile(shards):
    data = TarShards(shards)
    expected = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = sorted({name.split(".")[0] for name in tar.getnames()})
            expected += [(f"{path.stem}/{name}", tar.extractfile(f"{name}.jpg").read(), f"caption of {name}")
                         for name in names]
    assert [(data.key(i), *data.read(i)) for i in range(len(data))] == [(k, b, [c]) for k, b, c in expected]
    assert not data.bad


def test_shards_read_like_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    odd = "a/" + "long-" * 40 + "name"
    members = [("a", None), ("a/1.jpg", b"A"), ("a/1.txt", b"one"), ("./b.x/2.JPG", b"B"), ("./b.x/2.TXT", b"two"),
               (f"{odd}.seg.png", b"mask"), (f"{odd}.png", b"C"), (f"{odd}.txt", "drei\u00df".encode()),
               ("4.webp", b"D"), ("4.json", json.dumps({"caption": "four"}).encode()), ("._5.jpg", b"E"),
               ("\u00e9t\u00e9.jpeg", b"F"), ("\u00e9t\u00e9.txt", b"six")]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "0.tar", members, format)
        reference = {}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            image = next((sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample), None)
            text = sample["txt"].decode() if "txt" in sample else json.loads(sample.get("json", "{}")).get("caption")
            if image and text:
                reference[f"0/{sample['__key__']}"] = image, [text]
        data = TarShards(tmp_path)
        assert {data.key(i): data.read(i) for i in range(len(data))} == reference and len(reference) == 5
        path.unlink()


def test_unusable_samples_in_shards(tmp_path):
    good = [(f"{i}.{kind}", content) for i in range(4) for kind, content in (("jpg", b"I"), ("txt", b"t"))]
    write_tar(tmp_path / "a.tar", [*good, ("5.jpg", b"I"), ("6.txt", b"t"), ("7.jpg", b"I"), ("7.txt", b" \n"),
                                   ("8.jpg", b"I"), ("8.json", b"{}"), ("9.jpg", b"I"), ("9.json", b"[broken"),
                                   ("10.jpg", b"I"), ("10.json", b'{"caption": null}'), ("11.jpg", b"I"),
                                   ("11.txt", b"\xff\xfe")])
    data = TarShards(tmp_path)
    assert data.bad == {"without caption": 1, "without image": 1} and len(data) == 9
    for i in range(4):
        assert data.read(i) == (b"I", ["t"])
    for i in range(4, 9):
        with pytest.raises(BadSample, match="caption"):
            data.read(i)


@pytest.mark.parametrize("at", ["image", "caption", "header", "boundary", "end"])
def test_truncated_shard_keeps_its_whole_samples(tmp_path, at):
    path = write_shards(tmp_path, shards=1, samples=5) / "00000.tar"
    with tarfile.open(path) as tar:
        image, caption = tar.getmember("000000003.jpg"), tar.getmember("000000003.txt")
    cut = {"image": image.offset_data + 1000, "caption": caption.offset_data + 3, "header": caption.offset + 100,
           "boundary": image.offset, "end": path.stat().st_size}[at]
    path.write_bytes(path.read_bytes()[:cut])
    data = TarShards(tmp_path)
    assert [data.key(i)[-1] for i in range(len(data))] == list("01234" if at == "end" else "012")
    assert sum(data.bad.values()) == {"end": 0, "header": 2}.get(at, 1)
    assert all(data.read(i)[1] == [f"caption of {data.key(i)[6:]}"] for i in range(len(data)))


def test_shard_with_damaged_header_or_no_tar_is_counted(tmp_path):
    path = write_shards(tmp_path, shards=1, samples=5) / "00000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmember("000000003.jpg").offset
    content = bytearray(path.read_bytes())
    content[offset:offset + 20] = b"x" * 20
    path.write_bytes(content)
    (tmp_path / "1.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "2.tar").write_bytes(b"")
    data = TarShards(tmp_path)
    assert len(data) == 3 and data.bad == {"in a damaged shard": 3}


def test_index_is_cached_and_follows_the_shards(tmp_path, monkeypatch):
    write_shards(tmp_path / "sub", shards=2, samples=3)
    first = TarShards(tmp_path)
    assert len(list(tmp_path.glob(".index-*.npz"))) == 1 and len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # the second opening must not scan
        second = TarShards(tmp_path)
    assert (first.rows == second.rows).all() and first.bad == second.bad
    assert [first.key(i) for i in range(6)] == [second.key(i) for i in range(6)]
    write_tar(tmp_path / "sub" / "00009.tar", [("x.jpg", b"I"), ("x.txt", b"t")])
    assert len(TarShards(tmp_path)) == 7
    before = (tmp_path / "sub" / "00009.tar").stat()
    write_tar(tmp_path / "sub" / "00009.tar", [("longer.jpg", b"I"), ("later.jpg", b"J"), ("later.txt", b"u")])
    assert (tmp_path / "sub" / "00009.tar").stat().st_size == before.st_size  # padding: only the time tells
    assert TarShards(tmp_path).read(6) == (b"J", ["u"])
    for index in tmp_path.glob(".index-*.npz"):
        index.write_bytes(b"damaged")
    assert len(TarShards(tmp_path)) == 7


def test_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path, shards=1, samples=2)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("os.replace", refuse)
    assert len(TarShards(tmp_path)) == 2
    assert capsys.readouterr().out.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["00000.tar"]


def test_only_the_first_process_writes_the_index(tmp_path, monkeypatch):
    write_shards(tmp_path, shards=1, samples=2)
    monkeypatch.setattr(common, "rank", lambda: 1)
    assert len(TarShards(tmp_path)) == 2 and not list(tmp_path.glob(".index*"))


def test_index_is_small(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{i:09d}.{kind}", b"") for i in range(2000) for kind in ("jpg", "txt")])
    data = TarShards(tmp_path)
    assert (data.rows.nbytes + data.keys.nbytes) / len(data) * 3_000_000 < 200e6


def test_shard_errors(tmp_path):
    one_line_error(TarShards, tmp_path, names=tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    assert "unpack" in one_line_error(TarShards, tmp_path, names=tmp_path / "a.tar.gz")
    (tmp_path / "a.tar.gz").rename(tmp_path / "a.tar")
    assert "unpack" in one_line_error(TarShards, tmp_path, names=tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", [("x.jpg", b"I")])
    one_line_error(TarShards, tmp_path, names=tmp_path)


def write_tsv(root, rows=12, missing=(4, 7), header=False, name="Train_GCC-training.tsv"):
    lines = ["caption\turl"] * header + [f'a "quoted"  caption {i}\thttp://x/{i}.jpg' for i in range(rows)]
    (root / "images" / "00000").mkdir(parents=True)
    (root / name).write_text("\n".join(lines), "utf-8")
    for i in range(rows):
        if i not in missing:
            path = root / "images" / ("00000" if i % 2 else "") / f"{i:09d}.{'jpg' if i % 3 else 'png'}"
            path.write_bytes(b"image %d" % i)
            (path.parent / f"{path.stem}.json").write_text("{}")


@pytest.mark.parametrize("header", [False, True])
def test_caption_tsv(tmp_path, header, capsys):
    write_tsv(tmp_path, header=header)
    data = open_train("cc3m", tmp_path)
    rows = [i for i in range(12) if i not in (4, 7)]
    assert [data.read(i) for i in range(len(data))] == [(b"image %d" % i, [f'a "quoted" caption {i}']) for i in rows]
    assert [int(data.key(i)) for i in range(len(data))] == rows
    assert +data.bad == {"not downloaded": 2}
    assert "2 not downloaded" in capsys.readouterr().out  # 17 % are gone: reported, no error


def test_caption_tsv_errors(tmp_path):
    write_tsv(tmp_path, missing=range(12))
    one_line_error(open_train, "cc3m", tmp_path, names=tmp_path / "images")
    (tmp_path / "images" / "000000001.jpg").write_bytes(b"image")
    (tmp_path / "images" / "000000001.txt").write_text("another caption")
    one_line_error(CaptionTSV, tmp_path / "Train_GCC-training.tsv", tmp_path / "images", names="000000001.txt")


def write_coco(root, karpathy=True, missing=()):
    """10 images a 2017 folder; Karpathy's split takes its test and val images from both, as val2014 was spread."""
    listed = []
    for split, first in (("train2017", 0), ("val2017", 10)):
        (root / split).mkdir(parents=True)
        ids = range(first, first + 10)
        for i in ids:
            if i not in missing:
                (root / split / f"{i:012d}.jpg").write_bytes(b"image %d" % i)
        (root / "annotations").mkdir(exist_ok=True)
        captions = [{"image_id": i, "caption": f" caption {c}\n of {i}"} for c in range(5) for i in ids]
        content = {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids], "annotations": captions}
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
        listed += ids
    if karpathy:
        splits = ["train", "restval", "test", "val", "train"]
        images = [{"cocoid": i, "split": splits[i % 5], "filename": f"COCO_val2014_{i:012d}.jpg", "filepath": "val2014",
                   "sentences": [{"raw": f"caption {c} of {i}"} for c in range(5)]} for i in listed]
        (root / "dataset_coco.json").write_text(json.dumps({"images": images}))
        for i in (7, 12):  # the older naming, for a test image of each folder
            (root / "val2014").mkdir(exist_ok=True)
            next(root.glob(f"*2017/{i:012d}.jpg")).rename(root / "val2014" / f"COCO_val2014_{i:012d}.jpg")


def ids_of(data):
    return [int(data.key(i)) for i in range(len(data))]


def test_coco_with_karpathy_splits(tmp_path):
    write_coco(tmp_path)
    splits = {split: CocoCaptions(tmp_path, split) for split in ("train", "val", "test")}
    assert {s: set(ids_of(d)) for s, d in splits.items()} == {
        "train": {i for i in range(20) if i % 5 in (0, 1, 4)}, "val": {3, 8, 13, 18}, "test": {2, 7, 12, 17}}
    for data in splits.values():
        for i in range(len(data)):
            number = int(data.key(i))
            assert data.read(i) == (b"image %d" % number, [f"caption {c} of {number}" for c in range(5)])
    assert ids_of(open_train("coco", tmp_path)) == ids_of(splits["train"])
    assert ids_of(open_retrieval("coco", tmp_path, "val")) == ids_of(splits["val"])


def test_coco_official_layout(tmp_path):
    write_coco(tmp_path, karpathy=False, missing=(3,))
    train, test = CocoCaptions(tmp_path, "train"), CocoCaptions(tmp_path, "test")
    assert set(ids_of(train)) == set(range(10)) - {3} and set(ids_of(test)) == set(range(10, 20))
    assert train.bad == {"missing image file": 1}
    assert train.read(0) == (b"image 0", [f"caption {c} of 0" for c in range(5)])
    one_line_error(CocoCaptions, tmp_path, "val", names=tmp_path)
    assert open_retrieval("coco", tmp_path, "val") is None


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="no COCO photographs here")
def test_coco_photographs():
    content = json.loads((COCO_MINI / "annotations" / "captions_val2017.json").read_text())
    data = open_retrieval("coco", COCO_MINI, "test")
    assert len(data) == len(content["images"])
    captions = collections.defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
    assert all(data.read(i)[1] == captions[int(data.key(i))] for i in range(len(data)))
    assert open_image(data.read(0)[0]).mode == "RGB"


def test_coco_errors(tmp_path):
    one_line_error(CocoCaptions, tmp_path, "train", names=tmp_path / "annotations" / "captions_train2017.json")
    write_coco(tmp_path, karpathy=False, missing=range(8))
    one_line_error(CocoCaptions, tmp_path, "train", names=tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{")
    one_line_error(CocoCaptions, tmp_path, "test", names=tmp_path / "annotations" / "captions_val2017.json")


@pytest.mark.parametrize("folder", ["flickr30k-images", "images"])
def test_flickr30k(tmp_path, folder):
    one_line_error(Flickr30k, tmp_path, "test", names=tmp_path)
    (tmp_path / folder).mkdir()
    images = [{"filename": f"{i}.jpg", "split": ("train", "val", "test")[i % 3], "sentences": [{"raw": f"text {i} "}]}
              for i in range(9)]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    one_line_error(Flickr30k, tmp_path, "test", names=tmp_path / folder)
    for i in range(9):
        (tmp_path / folder / f"{i}.jpg").write_bytes(b"%d" % i)
    for split, first in (("train", 0), ("val", 1), ("test", 2)):
        data = open_train("flickr30k", tmp_path) if split == "train" else open_retrieval("flickr30k", tmp_path, split)
        assert [data.read(i) for i in range(3)] == [(b"%d" % i, [f"text {i}"]) for i in range(first, 9, 3)]


def test_held_out_samples_are_not_trained_on(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{i:04d}.{kind}", b"x") for i in range(250) for kind in ("jpg", "txt")])
    train, val = open_train("mine", tmp_path), open_retrieval("mine", tmp_path, "val")
    keys = [{data.key(i) for i in range(len(data))} for data in (train, val)]
    assert len(train) == 248 and len(val) == 2 and not keys[0] & keys[1] and val.read(1) == (b"x", ["x"])
    assert open_retrieval("mine", tmp_path, "test") is None
    (tmp_path / "val").mkdir()
    write_tar(tmp_path / "val" / "0.tar", [("v.jpg", b"v"), ("v.txt", b"v")])
    assert len(open_train("mine", tmp_path)) == 250
    assert [open_retrieval("mine", tmp_path, "val").read(0)] == [(b"v", ["v"])]


# -------------------------------------------------------------------------------------------------------- labelled sets


def write_classes(root, names, count=3):
    for number, name in enumerate(names):
        (root / name / "deeper").mkdir(parents=True)
        for i in range(count):
            parent = root / name / "deeper" if i == 0 else root / name
            (parent / f"{i}.JPEG").write_bytes(picture(10 * number + i, (40, 30)))
        (root / name / "notes.txt").write_text("no image")


def test_image_folder(tmp_path):
    write_classes(tmp_path / "test", ["hot_dog", "apple"])
    write_classes(tmp_path / "train", ["hot_dog", "big-tree", "apple"])
    data, train = open_labelled("folder", tmp_path, "test"), open_labelled("folder", tmp_path, "train")
    assert data.classes == train.classes == ["apple", "big tree", "hot dog"]
    assert len(data) == 6 and len(train) == 9 and data.templates == ["a photo of a {}."]
    assert sorted(data.read(i)[1] for i in range(6)) == [0, 0, 0, 2, 2, 2]
    assert {data.read(i)[0] for i in range(6) if data.read(i)[1] == 2} == {picture(i, (40, 30)) for i in range(3)}
    assert open_labelled("folder", tmp_path, "val") is None


def test_image_folder_errors(tmp_path):
    one_line_error(ImageFolderSet, tmp_path, "test", names=tmp_path)
    write_classes(tmp_path, ["a", "b"])
    assert len(ImageFolderSet(tmp_path, "test")) == 6
    one_line_error(ImageFolderSet, tmp_path, "train", names=tmp_path / "train")
    (tmp_path / "c" / "val" / "empty").mkdir(parents=True)
    one_line_error(ImageFolderSet, tmp_path / "c", "test", names=tmp_path / "c")


def test_imagenet(tmp_path):
    write_classes(tmp_path / "a" / "val", ["n01443537", "n01440764"])
    write_classes(tmp_path / "b", ["great_white_shark", "tench"])
    data = open_labelled("imagenet", tmp_path / "a", "test")
    assert data.classes == ["tench", "goldfish"] and len(data.templates) > 1
    assert all(template.count("{}") == 1 for template in data.templates)
    assert open_labelled("imagenet", tmp_path / "b", "test").classes == ["great white shark", "tench"]
    assert open_labelled("imagenet", tmp_path / "a", "val") is None
    (tmp_path / "c" / "val").mkdir(parents=True)
    (tmp_path / "c" / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    assert "sort" in one_line_error(open_labelled, "imagenet", tmp_path / "c", "test", names=tmp_path / "c" / "val")
    write_classes(tmp_path / "d" / "val", ["poodles"])
    one_line_error(open_labelled, "imagenet", tmp_path / "d", "test", names="poodles")


def test_torchvision_sets(tmp_path):
    write_classes(tmp_path / "eurosat" / "2750", ["AnnualCrop", "Forest"], 10)
    test, train = (open_labelled("eurosat", tmp_path, split) for split in ("test", "train"))
    assert len(test) == 4 and len(train) == 16 and not set(test.indices) & set(train.indices)
    assert [test.read(i)[1] for i in range(4)] == [0, 0, 1, 1] and test.classes[1] == "forest"
    for split, count in (("train", 2), ("valid", 1), ("test", 3)):
        write_classes(tmp_path / "country211" / split, ["AD", "DE"], count)
    assert [len(TorchvisionSet("country211", tmp_path, split)) for split in ("train", "test")] == [6, 6]
    image, label = TorchvisionSet("country211", tmp_path, "test").read(5)
    assert label == 1 and open_image(image).size == (40, 30)
    (tmp_path / "country211" / "test" / "DE" / "deeper" / "0.JPEG").write_bytes(b"damaged")
    with pytest.raises(BadSample):
        TorchvisionSet("country211", tmp_path, "test").read(5)


@pytest.mark.parametrize("name", sorted(common.TORCHVISION))
def test_torchvision_sets_say_what_is_missing(name, tmp_path):
    message = one_line_error(open_labelled, name, tmp_path, "test")
    hint = "cannot download it" if name in common.BY_HAND else f"datasets.{common.TORCHVISION[name][0]}('{tmp_path}'"
    assert (str(tmp_path) in message and hint in message) or "pip install" in message


def test_opening_errors(tmp_path):
    for function in (open_train, lambda n, r: open_retrieval(n, r, "val"), lambda n, r: open_labelled(n, r, "test")):
        message = one_line_error(function, "cocoo", None, names="cocoo")
        assert "imagenet" in message or "cc3m" in message
        one_line_error(function, "coco", tmp_path / "nowhere", names=tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_independent_of_the_number_of_ranks(world):
    n, batch, steps = 50, 8, 14  # 6 steps an epoch: three epochs are touched
    whole = list(StepSampler(n, batch, steps, seed=3))
    parts = [list(StepSampler(n, batch, steps, seed=3, rank=r, world=world)) for r in range(world)]
    for step in range(steps):
        assert [part for group in zip(*(p[step] for p in parts)) for part in group] == whole[step]
    assert len(whole) == steps and StepSampler(n, batch, steps).steps_per_epoch == 6


def test_every_sample_once_an_epoch_and_resume():
    sampler = StepSampler(48, 8, 18, seed=1)
    batches = list(sampler)
    orders = [[index for batch in batches[6 * e:6 * e + 6] for epoch, index in batch if epoch == e] for e in range(3)]
    assert all(sorted(order) == list(range(48)) for order in orders) and orders[0] != orders[1] != orders[2]
    assert batches != list(StepSampler(48, 8, 18, seed=2))
    for start in (0, 1, 6, 11, 18):
        resumed = StepSampler(48, 8, 18, start=start, seed=1)
        assert list(resumed) == batches[start:] and len(resumed) == 18 - start


def test_sampler_errors():
    assert "7" in one_line_error(StepSampler, 7, 8, 1)
    with pytest.raises(UserError, match="3"):
        StepSampler(100, 8, 1, world=3)


def loaded(data, workers, method=None, start=0):
    samples = TrainSamples(data, tokenize, 32, (0.5, 1.0), seed=5)
    loader = train_loader(samples, StepSampler(len(data), 4, 5, start=start, seed=5), workers, "cpu")
    if method:
        loader.multiprocessing_context = method
    return list(loader)


@pytest.mark.parametrize("workers, method", [(2, "fork"), (2, "spawn")])
def test_workers_do_not_change_the_batches(workers, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    for ours, reference in zip(loaded(Pictures(), workers, method), loaded(Pictures(), 0), strict=True):
        assert (ours[0] == reference[0]).all() and (ours[1] == reference[1]).all() and ours[2] == reference[2]
        assert ours[0].shape == (4, 3, 32, 32) and ours[0].dtype == torch.uint8 and ours[1].dtype == torch.int64


def test_resuming_gives_the_same_batches(shards):
    data = TarShards(shards)
    for ours, reference in zip(loaded(data, 0, start=2), loaded(data, 0)[2:], strict=True):
        assert (ours[0] == reference[0]).all() and (ours[1] == reference[1]).all()


def test_bad_samples_are_replaced_by_the_next():
    samples = TrainSamples(Pictures(), tokenize, 32, (0.5, 1.0), seed=0)
    image, tokens, bad = samples[7, 3]
    expected, expected_tokens, none = samples[7, 4]
    assert bad == 1 and none == 0 and (image == expected).all() and (tokens == expected_tokens).all()
    texts = {"".join(map(chr, samples[epoch, 5][1].tolist())).strip() for epoch in range(20)}
    assert texts == {"first caption 5", "second caption 5"}
    assert (samples[0, 5][0] != samples[1, 5][0]).any()
    assert sum(batch[2] for batch in loaded(Pictures(), 0)) == sum(
        index == 3 for batch in StepSampler(10, 4, 5, seed=5) for _, index in batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_workers_stay_one_line(workers):
    with pytest.raises(UserError) as caught:
        loaded(Corrupt(), workers)
    assert str(caught.value).startswith("100 samples in a row") and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_leaves_out_bad_samples(workers):
    data = Pictures(10)
    batches = list(eval_loader(data, 32, 4, workers))
    assert [batch[1] for batch in batches] == [[0, 1, 2], [4, 5, 6, 7], [8, 9]]
    for images, indices, targets in batches:
        assert targets == [data.read(i)[1] for i in indices]
        for image, i in zip(images, indices, strict=True):
            assert (image.numpy() == resize_center_crop(data.read(i)[0], 32)).all()
    assert list(eval_loader(Corrupt(), 32, 4, 0)) == []


def test_check_bad(capsys):
    check_bad(0, 100, "data/x")
    check_bad(collections.Counter(), 100, "data/x")
    assert capsys.readouterr().out == ""
    check_bad(10, 100, "data/x")
    check_bad(collections.Counter({"not downloaded": 90, "cut off": 1}), 100, "data/x")
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and out.count("data/x") == 2
    one_line_error(check_bad, 11, 100, "data/x", names="data/x")
    one_line_error(check_bad, collections.Counter({"not downloaded": 90, "cut off": 2}), 100, "data/x", names="cut off")
