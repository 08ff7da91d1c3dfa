"""Make the lists that training and evaluation read from the official files of a data set, once.

    python data/prepare.py NAME DIR [--out DIR]

NAME: coco, flickr30k, vg, sbu, nocaps, vqav2 or cc3m (any table of caption<TAB>address). DIR holds
the official files and the images, see data/README.md. Written to DIR (or --out): train.jsonl,
val.jsonl, test.jsonl (vqav2: test-dev.jsonl too), those of them that the set has. Line 1 of a list
says what it was made from and what could not be used, by reason; then comes one record a line:

    {"key", "image", "captions": [...], "domain" of nocaps}
    {"key", "image", "question", "answers": [...], "kind"}

`image` is relative to the list where that stands in DIR. The file that a record names is the file:
only where the official files give nothing but a number is it found by that number. A sample that
cannot be used is counted; a file of another form ends in one line that says what is missing.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    HELD_BACK,
    IMAGE_TYPES,
    NOT_DOWNLOADED,
    BadSample,
    UserError,
    are_texts,
    check_bad,
    clean_captions,
    files_below,
    read_json,
    read_text,
    run_main,
    stamp,
    write_text,
)


class Lists:
    """The lists in the making: records, and what could not be used, of each split."""

    def __init__(self, root, out):
        self.root, self.out = (Path(os.path.abspath(folder)) for folder in (root, out))
        # not of what is reached by a link, from where .. leads elsewhere
        self.relative = self.root == self.out == self.out.resolve()
        self.sources, self.first = {}, {}
        self.lines = defaultdict(dict)  # by key
        self.bad = defaultdict(Counter)  # samples, by reason
        self.notes = defaultdict(Counter)  # what is lost of good samples
        self.answers = None

    def source(self, path):
        """Note a file that the lists are made from. One that is absent counts, it may come."""
        size, time = stamp(path) if path.is_file() else (None, None)
        file = self.place(path)
        self.sources[file] = {"file": file, "size": size, "time": time}
        self.latest = path
        return path

    def place(self, path):
        """A path as the lists hold it."""
        return os.path.relpath(path, self.out) if self.relative else str(path)

    def read(self, path, **options):
        """What a json file holds."""
        return read_json(self.source(path), **options)

    @contextlib.contextmanager
    def entry(self, counter, split, where):
        """Count what cannot be used of an entry instead of ending."""
        try:
            yield
        except BadSample as error:
            counter[split][str(error)] += 1
            self.first.setdefault(split, f"{where}: {error}")

    def add(self, split, key, image, **record):
        """One sample. BadSample if its image (a path or None) is missing, or its key is not new."""
        if image is None:
            raise BadSample("missing image file")
        if key in self.lines[split]:
            raise BadSample("listed twice")
        self.lines[split][key] = json.dumps({"key": key, "image": self.place(image), **record})

    def write(self, name):
        """Write the lists that hold something. UserError if none does, or too much is unusable."""
        if not any(self.lines.values()):
            first = next(iter(self.first.values()), "they list nothing")
            sources = ", ".join(self.sources) or "a table *.tsv (V*.tsv: in val/)"
            raise UserError(f"nothing can be used of {sources} in {self.root}: {first} (see "
                            "data/README.md)")
        head = {"name": name, "kind": "questions" if self.answers else "captions",
                "made_from": list(self.sources.values()),
                "root": os.path.relpath(self.root, self.out), "answers": self.answers}
        for split, lines in self.lines.items():  # before anything is removed or written
            if lines:
                check_bad(self.bad[split], len(lines), self.out / f"{split}.jsonl")
        old = [path for path in self.out.glob("*.jsonl")
               if path.stem in ("train", "val", "test", "test-dev")]
        for path in old:
            if made_by_us(path) != name:
                raise UserError(f"{path} is no list of {name} that this command has made: move it "
                                "away, or take another --out")
        for path in old:
            path.unlink()
        for split in self.lines | self.bad:
            lines, bad, path = self.lines[split], self.bad[split], self.out / f"{split}.jsonl"
            if not lines:
                print(f"{path} is not written: {self.first[split]}")
                continue
            notes = +self.notes[split]
            head |= {"samples": len(lines), "unusable": bad, "notes": notes}
            write_text(path, "\n".join([json.dumps(head), *lines.values()]) + "\n")
            for found, number in {"samples": len(lines), **notes}.items():
                print(f"{path}: {number:,} {found}")


def made_by_us(path):
    """The name of the set that a list of this script is of; None of any other list."""
    with contextlib.suppress(ValueError), open(path) as file:
        head = json.loads(file.readline())
        return field(head, "made_from") and field(head, "name")


def field(entry, name):
    """entry[name], or None."""
    return entry.get(name) if isinstance(entry, dict) else None


def take(entry, name, kind=str):
    """entry[name], which must be of this type and not empty, else BadSample."""
    value = field(entry, name)
    if not isinstance(value, kind) or value in ("", []):
        raise BadSample(f'no {kind.__name__} under "{name}"')
    return value


def first_file(*paths):
    """The first of these files that is there, else None."""
    return next(filter(os.path.isfile, paths), None)


def image_file(root, folders, name):
    """An image in one of these folders of root, of images/ or of the folder coco beside.

    The 2017 folders of COCO hold the images of 2014, without COCO_train2014_ before.
    """
    short = re.sub(r"^COCO_[a-z]+20\d\d_", "", name)
    names = [name, short, *(f"COCO_{folder}_{short}" for folder in folders)]
    parents = root, root / "images", root.parent / "coco"
    return first_file(*(parent / folder / each for parent in parents for folder in folders
                        for each in names))


def read_captions(lists, split, path, folders, digits=0):
    """A json in COCO's form: images with id and file_name, annotations with image_id, caption."""
    content, captions = lists.read(path), defaultdict(list)
    for i, annotation in enumerate(take(content, "annotations", list)):
        with lists.entry(lists.notes, split, f"{path}, annotation {i}"):
            caption = take(annotation, "caption")
            captions[take(annotation, "image_id", int)] += clean_captions(caption)
    images = take(content, "images", list)
    ids = Counter(str(field(image, "id")) for image in images)
    for i, image in enumerate(images):
        with lists.entry(lists.bad, split, f"{path}, image {i}"):
            number, file = take(image, "id", int), take(image, "file_name")
            if ids[str(number)] > 1:
                raise BadSample("with an id that another image has too")
            if not captions[number]:
                raise BadSample("without caption")
            lists.add(split, str(number).zfill(digits), image_file(lists.root, folders, file),
                      captions=captions[number], domain=image.get("domain"))
    lists.notes[split]["captions of images that are not listed"] += sum(
        len(texts) for number, texts in captions.items() if str(number) not in ids)


# restval: what COCO's official validation part leaves after Karpathy's val and test
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_karpathy(lists, path, key_of, folders):
    for i, image in enumerate(take(lists.read(path), "images", list)):
        split = KARPATHY.get(str(field(image, "split")))
        with lists.entry(lists.bad, split or "train", f"{path}, image {i}"):
            if not split:
                raise BadSample("of no split")
            captions = [take(sentence, "raw") for sentence in take(image, "sentences", list)]
            lists.add(split, key_of(image),
                      image_file(lists.root, folders, take(image, "filename")),
                      captions=clean_captions(captions))


def coco_splits(lists, folder):
    """Karpathy's file in COCO's folder, or None: whoever puts it there later is told to prepare
    anew."""
    return first_file(*(lists.source(parent / "dataset_coco.json")
                        for parent in (folder, folder / "annotations")))


def coco(lists):
    splits = coco_splits(lists, lists.root)
    if splits:
        return read_karpathy(lists, splits, lambda image: f"{take(image, 'cocoid', int):012d}",
                             ("val2014", "train2014", "val2017", "train2017"))
    for split, year in (("train", "train2017"), ("test", "val2017")):
        path = lists.root / "annotations" / f"captions_{year}.json"
        if path.is_file() or split == "train":
            read_captions(lists, split, path, (year,), 12)


def flickr30k(lists):
    read_karpathy(lists, lists.root / "dataset_flickr30k.json",
                  lambda image: take(image, "filename"), ("flickr30k-images", "images"))


def vg(lists):
    path = lists.root / "region_descriptions.json"
    held_back = held_back_by_coco(lists)

    def phrase_only(entry):  # 5.4 million regions: keep no more of them, from the start
        return entry.get("phrase", entry)

    for i, image in enumerate(lists.read(path, object_hook=phrase_only)):
        with lists.entry(lists.bad, "train", f"{path}, image {i}"):
            number, regions = take(image, "id", int), take(image, "regions", list)
            if number in held_back:
                raise BadSample(HELD_BACK)
            phrases = [phrase for phrase in regions if isinstance(phrase, str)]
            lists.notes["train"]["regions without text"] += len(regions) - len(phrases)
            file = image_file(lists.root, ("VG_100K", "VG_100K_2"), f"{number}.jpg")
            lists.add("train", str(number), file, captions=clean_captions(phrases))


def held_back_by_coco(lists):
    """Numbers of Visual Genome's images that Karpathy's splits of COCO keep for val and test."""
    path, folder = lists.source(lists.root / "image_data.json"), lists.root.parent / "coco"
    splits = coco_splits(lists, folder)
    if not splits or not path.is_file():
        print(f"no {path} or no dataset_coco.json in {folder}: images that COCO is tested on stay "
              "in, do not test on COCO what is trained on this list")
        return set()
    images = lists.read(splits)["images"]
    coco = {image["cocoid"] for image in images if KARPATHY[image["split"]] != "train"}
    return {image["image_id"] for image in lists.read(path) if image["coco_id"] in coco}


def sbu(lists):
    path = lists.root / "sbu-captions-all.json"
    add_rows(lists, "train", path, take(lists.read(path), "captions", list), lists.root)


def cc3m(lists):
    root = lists.root
    for split, folder in (("train", root), ("train", root / "train"), ("val", root / "val")):
        own = "*.tsv" if split == "val" else "[!Vv]*.tsv"  # Validation_GCC-1.1.0-Validation.tsv
        tables = sorted(folder.glob("Train*.tsv")) or sorted(folder.glob(own))
        if tables:
            rows = read_table(lists.source(tables[0]))
            add_rows(lists, split, tables[0], rows, folder / "images")


def read_table(path):
    """The captions of a table caption<TAB>address, with or without a header, row by row."""
    captions = []
    for i, line in enumerate(read_text(path, errors="replace").removesuffix("\n").split("\n")):
        caption, *address = line.split("\t")
        if address and re.match(r"\s*(\w+:)?//|\s*www\.", address[0]):
            captions.append(caption)
        elif i or not address:  # else it is the header
            raise UserError(f"{path}, line {i + 1}: no address in the second column; the rows "
                            "behind it would be given each other's images")
    return captions


def add_rows(lists, split, path, captions, folder):
    """Images named by the row of their caption, 000000123.jpg that of row 123, the first is 0."""
    files = {}
    for file in files_below(folder, IMAGE_TYPES):
        if file.stem.isdecimal():
            files.setdefault(int(file.stem), file)
    if files and max(files) >= len(captions):
        raise UserError(f"{files[max(files)]} is the image of no row, the last of {path} is "
                        f"{len(captions) - 1}: the first row is 0 (see data/README.md)")
    for row, caption in enumerate(captions):
        with lists.entry(lists.bad, split, f"{path}, row {row}"):
            if row not in files:
                raise BadSample(NOT_DOWNLOADED)
            texts = clean_captions(caption)
            if "\ufffd" in texts[0]:
                raise BadSample("caption that is no UTF-8")
            beside = files[row].with_suffix(".txt")  # img2dataset's, whose keys may not be rows
            if beside.is_file() and read_text(beside, errors="replace").split() != texts[0].split():
                raise UserError(f"{beside} is not the caption of row {row} of {path}: download "
                                "with 10,000 images a shard (see data/README.md)")
            lists.add(split, f"{row:09d}", files[row], captions=texts)


def nocaps(lists):
    read_captions(lists, "test", lists.root / "nocaps_val_4500_captions.json", ("", "val"))


def vqav2(lists):
    path = lists.root / "answer_list.json"
    lists.answers = lists.read(path)
    if not (lists.answers and are_texts(lists.answers)):
        raise UserError(f'{path} is no list of texts, ["yes", "no", ...]')
    for split, part in (("train", "train2014"), ("val", "val2014"), ("test", "test2015"),
                        ("test-dev", "test-dev2015")):
        path = lists.root / f"v2_OpenEnded_mscoco_{part}_questions.json"
        if path.is_file():
            read_questions(lists, split, part, path)


FEW = ("with fewer than ten answers: the official accuracy cannot reach 100 where they are fewer "
       "than four")


def read_questions(lists, split, part, path):
    folders = part.replace("-dev", ""), "train2017", "val2017"
    given, answered = {}, split in ("train", "val")
    if answered:
        annotations = lists.root / f"v2_mscoco_{part}_annotations.json"
        for i, annotation in enumerate(take(lists.read(annotations), "annotations", list)):
            with lists.entry(lists.notes, split, f"{annotations}, annotation {i}"):
                answers = [take(answer, "answer") for answer in take(annotation, "answers", list)]
                given[take(annotation, "question_id", int)] = answers, annotation.get("answer_type")
    for i, entry in enumerate(take(lists.read(path), "questions", list)):
        with lists.entry(lists.bad, split, f"{path}, question {i}"):
            number, question = take(entry, "question_id", int), take(entry, "question")
            answers, kind = given.get(number, ([], None))
            if answered and not answers:
                raise BadSample("without answers")
            image = image_file(lists.root, folders, f"{take(entry, 'image_id', int):012d}.jpg")
            lists.add(split, str(number), image, question=question, answers=answers, kind=kind)
            lists.notes[split][FEW] += 0 < len(answers) < 10


SETS = {"coco": coco, "flickr30k": flickr30k, "vg": vg, "sbu": sbu, "nocaps": nocaps,
        "vqav2": vqav2, "cc3m": cc3m}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SETS)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--out", type=Path, help="where the lists are written (default: DIR)")
    given = parser.parse_args(argv)
    if not given.dir.is_dir():
        raise UserError(f"no folder {given.dir} (see data/README.md)")
    lists = Lists(given.dir, given.out or given.dir)
    try:
        SETS[given.name](lists)
    except (AttributeError, KeyError, TypeError, OSError, BadSample) as error:
        raise UserError(f"{lists.latest} is missing or not of the official form "
                        f"(see data/README.md): {error}") from error
    lists.write(given.name)


if __name__ == "__main__":
    sys.exit(run_main(main))
