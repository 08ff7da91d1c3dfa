"""What becomes of 1,000 damaged files: python tests/damage.py [COUNT [SEED]]

Images, shards, json lists, tables, checkpoints and logs are cut off, have bits flipped or a stretch
zeroed, or hold another type. Each is then read as the scripts read it. A file may be used (flipped
pixels look like any others), lost samples must be counted, or one line must say what is wrong.
Failures are a traceback, a picture with another one's caption, and a loss that nothing counts.
"""

import collections
import contextlib
import io
import json
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import eclipse
from data import prepare
from PIL import Image

NUMBER = 30  # samples in a set
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")


def picture(number, format="JPEG"):
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(NUMBER)]
# far apart: a few flipped bits do not turn one into another
CAPTIONS = [np.random.default_rng(number).bytes(12).hex() for number in range(NUMBER)]


def damage(content, how, rng):
    if how == "sound":
        return content
    content = bytearray(content)
    place = int(rng.integers(len(content)))
    if how == "cut off":
        del content[place:]
    elif how == "bits flipped":
        for place in rng.integers(len(content), size=8):
            content[place] ^= 1 << rng.integers(8)
    elif how == "zeroed":
        end = min(len(content), place + int(rng.integers(1, 600)))
        content[place:end] = bytes(end - place)
    else:  # another type
        others = [picture(0, "PNG"), b"[1, 2]", b"caption\taddress\n", b"PK\x03\x04", b""]
        content = others[rng.integers(len(others))]
    return bytes(content)


def check_pairs(data):
    """Reads a whole captioned set; AssertionError for what is wrong or lost without a count."""
    readable = 0
    for i in range(len(data)):
        try:
            image, captions = data[i]
        except common.BadSample:
            continue
        readable += 1
        if image in PICTURES and captions[0] in CAPTIONS:
            assert PICTURES.index(image) == CAPTIONS.index(captions[0]), "another one's caption"
    unreadable = len(data) - readable
    lost = NUMBER - readable
    assert lost <= 0 or unreadable + data.bad.total() > 0, f"{lost} lost, none counted"
    return "whole" if lost <= 0 else "counted"


# ---------------------------------------------- kinds: the file that is damaged, and how it is read


def image(folder, rng):
    path = folder / "image"
    path.write_bytes(picture(int(rng.integers(NUMBER)), FORMATS[rng.integers(len(FORMATS))]))
    return path


def read_image(path):
    for read in (common.resize_center_crop, common.resize_whole):
        try:
            read(path.read_bytes(), 16)
        except common.BadSample:
            return "counted"
    common.random_resized_crop(path.read_bytes(), 16, np.random.default_rng(0))
    return "whole"


def shard(folder, rng):
    import tarfile
    path = folder / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(NUMBER):
            text = CAPTIONS[number].encode()
            caption = ("txt", text)
            if number % 2:
                caption = ("json", json.dumps({"caption": CAPTIONS[number]}).encode())
            for extension, content in (("jpg", PICTURES[number]), caption):
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def read_shard(path):
    return check_pairs(common.TarShards(path.parent))


def write_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(PICTURES):
        (folder / f"{number:012d}.jpg").write_bytes(content)


def captions_json(folder, rng):
    write_images(folder / "train2017")
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(NUMBER)]
    texts = [{"image_id": i, "id": i, "caption": CAPTIONS[i]} for i in range(NUMBER)]
    path = folder / "annotations" / "captions_train2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": images, "annotations": texts}, indent=1))
    return path


def table(folder, rng):
    write_images(folder / "images")
    path = folder / "Train_GCC-training.tsv"
    path.write_text("".join(f"{text}\thttp://a/{i}.jpg\n" for i, text in enumerate(CAPTIONS)))
    return path


def read_prepared(name, folder):
    prepare.main([name, str(folder)])
    return check_pairs(common.Listed(folder / "train.jsonl"))


def prepared(folder, rng):
    table(folder, rng)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main(["cc3m", str(folder)])
    return folder / "train.jsonl"


def checkpoint(folder, rng):
    size = common.PRESETS["demo"]
    clip = eclipse.CLIP(size, eclipse.PruningVisionTransformer(size, fuse=True))
    path = folder / "clip.pt"
    if rng.random() < 0.5:
        torch.save(clip.state_dict(), path)
        return path
    header, data = {}, b""
    for name, tensor in clip.state_dict().items():
        content = tensor.numpy().tobytes()
        ends = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": ends}
        data += content
    head = json.dumps(header).encode()
    path = path.with_suffix(".safetensors")
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def read_checkpoint(path):
    weights, size = common.clip_weights(common.read_checkpoint(path), "gelu")
    clip = eclipse.CLIP(size, eclipse.PruningVisionTransformer(size, fuse=True))
    common.load_weights(clip, weights, path)
    return "whole"


def log(folder, rng):
    path = folder / "log.csv"
    rows = [f"{step},{step / 10},0.5" for step in range(1, 30)]
    path.write_text("\n".join(["step,epoch,loss", *rows]) + "\n")
    return path


def read_log(path):
    rows = common.read_csv(path)
    cfg = eclipse.Config(out=str(path.parent), resume=True)
    common.Run(cfg, None, ["step", "epoch", "loss"]).start(20)
    return "whole" if len(rows) == 29 else "counted"


KINDS = [
    (image, read_image),
    (shard, read_shard),
    (captions_json, lambda path: read_prepared("coco", path.parents[1])),
    (table, lambda path: read_prepared("cc3m", path.parent)),
    (prepared, lambda path: check_pairs(common.Listed(path))),
    (checkpoint, read_checkpoint),
    (log, read_log),
]
HOW = ("sound", "cut off", "bits flipped", "zeroed", "another type")


def main(count=1000, seed=0):
    outcomes, failures = collections.defaultdict(collections.Counter), 0
    for trial in range(count):
        rng = np.random.default_rng((seed, trial))
        write, read = KINDS[trial % len(KINDS)]
        how = HOW[trial // len(KINDS) % len(HOW)]
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), rng)
            path.write_bytes(damage(path.read_bytes(), how, rng))
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    outcome = read(path)
                assert how != "sound" or outcome == "whole", outcome
            except common.UserError as error:
                outcome = "one line"
                if "\n" in str(error) or how == "sound":
                    outcome, failures = "FAILED", failures + 1
                    print(f"trial {trial}: {write.__name__}, {how}: {error}")
            except Exception:
                outcome, failures = "FAILED", failures + 1
                print(f"trial {trial}: {write.__name__}, {how}")
                traceback.print_exc(file=sys.stdout)
        outcomes[f"{write.__name__}, {how}"][outcome] += 1
    common.print_table({name: dict(found) for name, found in sorted(outcomes.items())})
    print(f"{count:,} damaged files, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
