"""data/prepare.py: each official layout in small, and what people's files hold instead."""

import io
import json

import common
import numpy as np
import pytest
from common import Listed, UserError
from data import prepare
from PIL import Image


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_images(root, names):
    """A file per name, each with a content of its own; {name: content}."""
    contents = {name: f"image {name}".encode() for name in names}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return contents


def run(name, root, *flags):
    """The lists that data/prepare.py writes, by split."""
    prepare.main([name, str(root), *map(str, flags)])
    out = flags[1] if flags else root
    return {path.stem: Listed(path) for path in out.glob("*.jsonl")}


def refusal(name, root):
    """The one line in which data/prepare.py refuses."""
    with pytest.raises((UserError, OSError)) as caught:
        run(name, root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def samples_of(data):
    return {data.key(i): data[i] for i in range(len(data))}


# ---------------------------------------------------------------------------------- official sets


def write_coco(root, karpathy=False, first=0):
    """Ten images a folder, whose ids are not the numbers in their names."""
    for split, start in (("train2017", first), ("val2017", first + 10)):
        ids = range(start, start + 10)
        write_images(root, [f"{split}/{i + 1:012d}.jpg" for i in ids])
        captions = [{"image_id": i, "caption": f" caption {c}\n of {i}"}
                    for c in range(5) for i in reversed(ids)]
        images = [{"id": i, "file_name": f"{i + 1:012d}.jpg"} for i in ids]
        write_json(root / "annotations" / f"captions_{split}.json",
                   {"images": images, "annotations": captions})
    if karpathy:
        splits = ["train", "restval", "test", "val", "train"]
        images = [{"cocoid": i + 1, "split": splits[i % 5], "filepath": "val2014",
                   "filename": f"COCO_val2014_{i + 1:012d}.jpg",
                   "sentences": [{"raw": f"caption {c} of {i}"} for c in range(5)]}
                  for i in range(first, first + 20)]
        write_json(root / "dataset_coco.json", {"images": images})


def test_coco(tmp_path, capsys):
    write_coco(tmp_path)
    lists = run("coco", tmp_path)
    assert set(lists) == {"train", "test"} and "train.jsonl: 10 samples" in capsys.readouterr().out
    captions = [[f"caption {c} of {i}" for c in range(5)] for i in range(10)]
    assert samples_of(lists["train"]) == {
        f"{i:012d}": (f"image train2017/{i + 1:012d}.jpg".encode(), captions[i])
        for i in range(10)}
    assert lists["test"].key(0) == f"{10:012d}" and not lists["test"].bad
    write_coco(tmp_path, karpathy=True)  # the file that was absent has come
    with pytest.raises(UserError, match="dataset_coco.json has changed since.*prepare.py coco"):
        Listed(tmp_path / "train.jsonl")
    (tmp_path / "val2014").mkdir()
    old = tmp_path / "val2014" / "COCO_val2014_000000000003.jpg"
    (tmp_path / "train2017" / "000000000003.jpg").rename(old)
    lists = run("coco", tmp_path)
    found = {split: [int(data.key(i)) - 1 for i in range(len(data))]
             for split, data in lists.items()}
    assert found == {"train": [i for i in range(20) if i % 5 in (0, 1, 4)],
                     "val": [3, 8, 13, 18], "test": [2, 7, 12, 17]}
    assert lists["test"][0] == (b"image train2017/000000000003.jpg",
                                [f"caption {c} of 2" for c in range(5)])


def test_flickr30k(tmp_path):
    write_images(tmp_path / "flickr30k-images", [f"{i}.jpg" for i in range(9)])
    images = [{"filename": f"{i}.jpg", "split": ("train", "val", "test")[i % 3],
               "sentences": [{"raw": f"text {i} "}]} for i in range(9)]
    write_json(tmp_path / "dataset_flickr30k.json", {"images": images})
    for first, split in enumerate(("train", "val", "test")):
        assert samples_of(run("flickr30k", tmp_path)[split]) == {
            f"{i}.jpg": (f"image {i}.jpg".encode(), [f"text {i}"]) for i in range(first, 9, 3)}


def test_visual_genome(tmp_path, capsys):
    root = tmp_path / "vg"
    write_images(root / "images", [f"VG_100K{'_2' * (i % 2)}/{i}.jpg" for i in range(30)])
    regions = [{"id": i, "regions": [{"image_id": i, "phrase": f" phrase {r}\n of {i}"}
                                     for r in range(3)]} for i in range(30)]
    write_json(root / "region_descriptions.json", regions)
    data = run("vg", root)["train"]
    assert "do not test on COCO" in capsys.readouterr().out
    assert samples_of(data) == {
        str(i): (f"image VG_100K{'_2' * (i % 2)}/{i}.jpg".encode(),
                 [f"phrase {r} of {i}" for r in range(3)]) for i in range(30)}
    write_coco(tmp_path / "coco", karpathy=True)
    coco_ids = {5: 14, 6: 15, 7: 13}  # of Karpathy's images 14 is for validation, 13 for testing
    write_json(root / "image_data.json",
               [{"image_id": i, "coco_id": coco_ids.get(i)} for i in range(30)])
    data = run("vg", root)["train"]
    assert set(samples_of(data)) == {str(i) for i in set(range(30)) - {5, 7}}
    assert data.bad == {"in COCO's val or test": 2}


@pytest.mark.parametrize("folder", ["val", "images", ""])
def test_nocaps(tmp_path, folder):
    write_images(tmp_path / folder, [f"{i}.jpg" for i in range(11)])
    domains = ["in-domain", "near-domain", "out-domain"]
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": domains[i % 3]} for i in range(12)]
    captions = [{"image_id": i, "id": 100 * c + i, "caption": f"caption {c} of {i}"}
                for c in range(10) for i in reversed(range(12))]
    write_json(tmp_path / "nocaps_val_4500_captions.json",
               {"images": images, "annotations": captions})
    lists = run("nocaps", tmp_path)
    assert samples_of(lists["test"]) == {
        str(i): (f"image {i}.jpg".encode(), [f"caption {c} of {i}" for c in range(10)])
        for i in range(11)}
    assert [lists["test"].record(i)["domain"] for i in range(11)] == [domains[i % 3] for i in range(11)]
    assert lists["test"].bad == {"missing image file": 1} and len(lists) == 1


def write_sbu(root, rows):
    captions = [f" caption  {i}" for i in range(10)]
    write_json(root / "sbu-captions-all.json", {"image_urls": [], "captions": captions})
    return write_images(root, [f"images/{i // 4:05d}/{i:09d}.jpg" for i in rows])


def write_table(root, rows, text):
    root.mkdir(exist_ok=True)
    content = text if isinstance(text, bytes) else text.encode()
    (root / "Train_GCC-training.tsv").write_bytes(content)
    return write_images(root, [f"images/{i // 4:05d}/{i:09d}.jpg" for i in rows])


TABLE = "".join(f" caption  {i}\thttp://x/{i}.jpg\n" for i in range(10))


@pytest.mark.parametrize("text", [None, TABLE, TABLE.strip(), "\ufeff" + TABLE,
                                  "text\tlink\n" + TABLE, "\ufeffcaption\turl\n" + TABLE,
                                  TABLE.replace("\n", "\r\n")])
def test_images_named_by_row(tmp_path, text):
    rows = [i for i in range(10) if i not in (2, 5)]
    if text is None:
        name, found = "sbu", write_sbu(tmp_path, rows)
    else:
        name, found = "cc3m", write_table(tmp_path, rows, text)
    data = run(name, tmp_path)["train"]
    assert samples_of(data) == {f"{i:09d}": (content, [f"caption {i}"])
                                for i, content in zip(rows, found.values())}
    assert data.bad == {"not downloaded": 2}  # a fifth is gone: no error
    beside = tmp_path / "images" / "00000" / "000000001.txt"
    beside.write_text("caption 1")
    run(name, tmp_path)
    for other in (b"caption 7", b"\xff"):
        beside.write_bytes(other)
        assert "000000001.txt is not the caption of row 1" in refusal(name, tmp_path)


@pytest.mark.parametrize("rows, text, words", [
    (range(1, 11), TABLE, "000000010.jpg is the image of no row"),
    (range(10), TABLE.replace(" caption  3\t", '"caption\n3"\t'), "line 4: no address"),
    (range(10), TABLE.replace(" caption  0\t", '"caption\n0"\t'), "line 1: no address"),
    (range(10), TABLE.replace("\n", "\n\n"), "line 2: no address"),
    (range(10), "\n".join(f"http://x/{i}.jpg\tcaption" for i in range(10)), "no address"),
    (range(10), TABLE.encode("utf-16"), "no address"),
    ((), TABLE, "nothing can be used of Train_GCC-training.tsv"),
])
def test_tables_that_would_shift_rows(tmp_path, rows, text, words):
    write_table(tmp_path, rows, text)
    assert words in refusal("cc3m", tmp_path)


def write_vqa(root, images, part="train2014", name="COCO_{folder}_{i:012d}.jpg", **changed):
    """Three questions an image with ten answers each; `changed`: other fields of question 1."""
    folder, kinds = part.replace("-dev", ""), ["yes/no", "number", "other"]
    questions = [{"image_id": 10 * i, "question": f"Question {q} about {i}?",
                  "question_id": 100 * i + q} for i in range(12) for q in range(3)]
    annotations = [{"question_id": 100 * i + q, "answer_type": kinds[q],
                    "answers": [{"answer": f"answer {a % 3} to {100 * i + q}"} for a in range(10)]}
                   for i in range(12) for q in range(3)]
    for key, value in changed.items():
        (annotations if key == "answers" else questions)[1][key] = value
    write_json(root / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": questions})
    if not part.startswith("test"):
        write_json(root / f"v2_mscoco_{part}_annotations.json", {"annotations": annotations[::-1]})
    write_json(root / "answer_list.json", ["yes", "no", "2"])
    write_images(images, [f"{folder}/" + name.format(folder=folder, i=10 * i) for i in range(12)])


@pytest.mark.parametrize("part, split", [("train2014", "train"), ("val2014", "val"),
                                         ("test2015", "test"), ("test-dev2015", "test-dev")])
def test_vqa_v2(tmp_path, part, split):
    root, folder = tmp_path / "vqav2", part.replace("-dev", "")
    write_vqa(root, tmp_path / "coco", part)
    data = run("vqav2", root)[split]
    assert len(data) == 36 and data.answers == ["yes", "no", "2"] and not data.bad
    official = split in ("train", "val")
    for n in range(36):
        i, q = divmod(n, 3)
        image, (question, answers, kind) = data[n]
        assert data.key(n) == str(100 * i + q)
        assert image == f"image {folder}/COCO_{folder}_{10 * i:012d}.jpg".encode()
        assert question == f"Question {q} about {i}?"
        assert answers == [f"answer {a % 3} to {100 * i + q}" for a in range(10) if official]
        assert kind == (["yes/no", "number", "other"][q] if official else None)


def test_vqa_v2_reads_the_folders_of_2017(tmp_path):
    write_vqa(tmp_path, tmp_path, "val2014", name="{i:012d}.jpg")
    (tmp_path / "val2014").rename(tmp_path / "train2017")
    assert len(run("vqav2", tmp_path)["val"]) == 36


@pytest.mark.parametrize("changed, reason", [
    ({"answers": [{"answer": "yes"}] * 3}, "with fewer than ten answers: the official accuracy cannot reach 100"),
    ({"answers": []}, "without answers"), ({"answers": 5}, "without answers"),
    ({"answers": [{"answer": 5}]}, "without answers"),
    ({"question": None}, 'no str under "question"'),
    ({"image_id": None}, 'no int under "image_id"'), ({"image_id": 7}, "missing image file")])
def test_questions_that_cannot_be_used(tmp_path, capsys, changed, reason):
    write_vqa(tmp_path, tmp_path, **changed)
    data = run("vqav2", tmp_path)["train"]
    assert f"1 {reason}" in capsys.readouterr().out
    assert len(data) == 36 - data.bad.total() and data.bad.total() == ("fewer" not in reason)


# ---------------------------------------------------------------------------------- other forms

IMAGES = [{"id": i, "file_name": f"{i + 1:012d}.jpg"} for i in range(10)]
CAPTIONS = [{"image_id": i, "caption": f"caption {c} of {i}"} for c in range(2) for i in range(10)]


def changed(entries, **fields):
    return [{**entries[0], **fields}, *entries[1:]]


def captions_file(**fields):
    return {"images": IMAGES, "annotations": CAPTIONS, **fields}


@pytest.mark.parametrize("content, first, words", [  # the captions that image 0 keeps
    (captions_file(annotations=changed(CAPTIONS, caption=None)), 1, '1 no str under "caption"'),
    (captions_file(annotations=changed(CAPTIONS, caption=["a"])), 1, '1 no str under "caption"'),
    (captions_file(annotations=changed(CAPTIONS, caption=" ")), 1, "1 empty caption"),
    (captions_file(annotations=changed(CAPTIONS, image_id=99)), 1, "1 captions of images that are not listed"),
    (captions_file(images=changed(IMAGES, file_name=5)), 0, '1 no str under "file_name"'),
    (captions_file(images=changed(IMAGES, file_name="9.jpg")), 0, "1 missing image file"),
    (captions_file(images=changed(IMAGES, id=None)), 0, '1 no int under "id"'),
    (captions_file(images=[*IMAGES, 3]), 2, '1 no int under "id"'),
    (captions_file(images=[*IMAGES, {"file_name": "1.jpg"}]), 2, '1 no int under "id"'),
    (captions_file(annotations=[*CAPTIONS, 3]), 2, '1 no str under "caption"'),
    (captions_file(images=[*IMAGES, {"id": 0, "file_name": "000000000005.jpg"}]), 0, "id that"),
])
def test_one_entry_of_many_is_counted(tmp_path, capsys, monkeypatch, content, first, words):
    write_coco(tmp_path)
    write_json(tmp_path / "annotations" / "captions_train2017.json", content)
    monkeypatch.setattr(prepare, "check_bad", lambda bad, good, where: print(
        *(f"{number} {reason}" for reason, number in bad.items())))  # 2 of 11 would be too many
    data = run("coco", tmp_path)["train"]
    keys = {data.key(i): data[i][1] for i in range(len(data))}
    assert len(keys.pop(f"{0:012d}", [])) == first and words in capsys.readouterr().out
    assert keys == {f"{i:012d}": [f"caption {c} of {i}" for c in range(2)] for i in range(1, 10)}


@pytest.mark.parametrize("content, words", [
    ([captions_file()], "official form"), ({"annotations": CAPTIONS}, 'no list under "images"'),
    (captions_file(images={"0": 3}), 'no list under "images"'),
    ({"images": IMAGES}, 'no list under "annotations"'),
    (captions_file(images=[3]), 'image 0: no int under "id"'),
    (captions_file(annotations=[3]), 'annotation 0: no str under "caption"'),
    ({"images": IMAGES, "annotations": [{"image_id": 0, "bbox": [1, 2, 3, 4]}]},
     'annotation 0: no str under "caption"'),
    ("{", "no valid json"), ('{"images": "\udcff"}', "no valid json"),
    (captions_file(images=[{"id": i, "file_name": "x.jpg"} for i in range(10)]), "missing image"),
    (captions_file(images=IMAGES[:1] + [{"id": i + 1} for i in range(9)]), "more than 10 %"),
])
def test_a_file_of_another_form_is_one_line(tmp_path, content, words):
    write_coco(tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").unlink()
    path = tmp_path / "annotations" / "captions_train2017.json"
    if isinstance(content, str):
        path.write_bytes(content.encode(errors="surrogateescape"))
    else:
        write_json(path, content)
    message = refusal("coco", tmp_path)
    assert words in message and (path.name in message or "train.jsonl" in message), message


@pytest.mark.parametrize("name, files, words", [
    ("coco", {}, "captions_train2017.json"), ("flickr30k", {}, "dataset_flickr30k.json"),
    ("vg", {}, "region_descriptions.json"), ("vqav2", {}, "answer_list.json"),
    ("sbu", {}, "sbu-captions-all.json"), ("nocaps", {}, "nocaps_val_4500_captions.json"),
    ("vqav2", {"answer_list.json": {"yes": 1}}, "no list of texts"),
    ("vqav2", {"answer_list.json": [1]}, "no list of texts"), ("cc3m", {}, "list nothing"),
    ("flickr30k", {"dataset_flickr30k.json": {"images": [{"filename": "0.jpg"}]}}, "image 0: of no split"),
    ("sbu", {"sbu-captions-all.json": {"captions": {"0": "a"}}}, 'no list under "captions"'),
    ("vg", {"region_descriptions.json": [], "image_data.json": [3], "../coco/dataset_coco.json":
            {"images": []}}, "image_data.json is missing or not of the official form"),
    ("flickr30k", {"dataset_flickr30k.json": {"images": [{"filename": "0.jpg", "split": "test"}]}},
     'no list under "sentences"'),
])
def test_what_is_missing_is_said(tmp_path, name, files, words):
    (tmp_path / name).mkdir()
    for file, content in files.items():
        write_json(tmp_path / name / file, content)
    assert words in refusal(name, tmp_path / name)
    with pytest.raises(UserError, match="no folder"):
        run(name, tmp_path / "nowhere")


def test_lists_that_have_aged(tmp_path):
    write_coco(tmp_path / "here")
    before = samples_of(run("coco", tmp_path / "here")["train"])
    (tmp_path / "here").rename(tmp_path / "a b")
    assert samples_of(Listed(tmp_path / "a b" / "train.jsonl")) == before
    run("coco", tmp_path / "a b", "--out", tmp_path / "lists")
    path = tmp_path / "lists" / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[3])
    edited = [json.dumps({**record, **change}) + "\n" for change in (
        {"captions": "a dog"}, {"captions": [5]}, {"captions": None}, {"key": 5})]
    for line in (lines[3][:20] + "\n", lines[3].replace("captions", "captains"), "[3]\n",
                 "[" * 10 ** 5 + "\n", *edited):
        path.write_text("".join([*lines[:3], line, *lines[4:]]))
        data = Listed(path)
        with pytest.raises(UserError, match="line 4, is damaged"):
            data[2]
    (tmp_path / "a b" / "train2017" / "000000000001.jpg").unlink()
    with pytest.raises(common.BadSample, match="unreadable file"):
        data[0]
    (tmp_path / "a b" / "annotations" / "captions_train2017.json").write_text("{}")
    command = f"python data/prepare.py coco '{tmp_path}/a b' --out {tmp_path}/lists"
    with pytest.raises(UserError) as caught:
        Listed(path)
    assert command in str(caught.value) and "has changed since" in str(caught.value)
    for text in ("", "{}\n", "".join(lines[:-1])):
        path.write_text(text)
        with pytest.raises(UserError, match="is no list of data/prepare.py, or not whole"):
            Listed(path)


def test_a_folder_on_another_disk_and_lists_of_another_time(tmp_path):
    folder = tmp_path / "data" / "vqav2"
    write_images(tmp_path / "data" / "coco", ["test2015/000000000001.jpg"])  # beside the link
    (tmp_path / "a" / "disk").mkdir(parents=True)
    folder.symlink_to(tmp_path / "a" / "disk")
    write_json(folder / "answer_list.json", ["yes"])
    write_json(folder / "v2_OpenEnded_mscoco_test2015_questions.json",
               {"questions": [{"question_id": 1, "question": "Is it?", "image_id": 1}]})
    write_json(folder / "val.jsonl", {"name": "vqav2", "made_from": []})
    assert "val.jsonl is no list" in refusal("vqav2", folder)
    write_json(folder / "val.jsonl", {"name": "vqav2", "made_from": [1]})
    lists = run("vqav2", folder)
    image = b"image test2015/000000000001.jpg"
    assert samples_of(lists["test"]) == {"1": (image, ("Is it?", [], None))}
    assert lists.keys() == {"test"}


def test_main_script(tmp_path, capsys):
    write_coco(tmp_path)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / "train2017" / "000000000001.jpg").write_bytes(buffer.getvalue())
    assert common.run_main(prepare.main, ["coco", str(tmp_path)]) == 0
    assert common.resize_whole(Listed(tmp_path / "train.jsonl")[0][0], 4).shape == (3, 4, 4)
    assert common.run_main(prepare.main, ["vg", str(tmp_path / "annotations")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
