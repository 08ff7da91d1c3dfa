"""Scenes of emoji drawings with captions, classes and questions: the demos' data, drawn here.

A scene shows one to three of up to 412 concepts (a dog, a rose, ...) as drawings of
various artists, side by side or stacked, on a coloured background. Drawings are mirrored, turned
and recoloured a little. All of it follows from (split, seed, index), so a scene is the same in
whatever order, process or run it is asked for.

Held out: of the artists who drew a concept, two are for testing and one for validation, chosen once
and for all; training sees only the others. So no drawing of an evaluation was ever trained on, and
evaluating is a shift of style. Wrong captions, rare concepts and near duplicates, as the web has
them, are in the training scenes only.

EmojiScenes has captions, EmojiClasses is a zero-shot set, EmojiQuestions is for visual question
answering; each follows the protocol of the sets in common.py. A picture of eight scenes:

    from PIL import Image
    from data.emoji.scenes import EmojiScenes

    scenes = EmojiScenes("train", scenes=8, image_size=128, difficulty="medium")
    picture = Image.new("RGB", (8 * scenes.canvas, scenes.canvas))
    for i in range(8):
        image, captions = scenes[i]
        picture.paste(image, (i * scenes.canvas, 0))
        print(captions[0])
    picture.save("scenes.png")

Drawings, table and licences: data/README.md. Everything about the scenes is [choice].
Letters in shape comments: S side of the canvas in pixels.
"""

import csv
import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageOps

HERE = Path(__file__).parent
SPLITS = ("train", "val", "test")
TILE, COLUMNS = 64, 22  # a sheet: tiles of 64 x 64 px, 22 in a row
LARGE = 80  # px; smaller scenes are kept once drawn: 9,000 of 45 px are 73 MB

COLOURS = {  # of backgrounds; the first eight are light and stand out from the drawings
    "white": "#fafafa",
    "light blue": "#cde2fa",
    "light green": "#d0f0d0",
    "pink": "#fcd6e2",
    "yellow": "#fcf4be",
    "grey": "#cdcdcd",
    "lilac": "#e2d4f6",
    "beige": "#f0e4d0",
    "blue": "#466ebe",
    "green": "#469650",
    "red": "#be4646",
    "brown": "#825f41",
    "black": "#232328",
    "orange": "#f0963c",
    "purple": "#7d4ba0",
    "turquoise": "#3cafaa"
}


class Difficulty(NamedTuple):
    objects: tuple  # probability of one, two, three objects
    scale: tuple  # smallest and largest side of a single object, as a fraction of the canvas
    colours: int  # how many of COLOURS are used
    background: str  # plain, gradient or clutter


DIFFICULTIES = {
    "easy": Difficulty((0.85, 0.15), (0.7, 0.9), 8, "plain"),
    "medium": Difficulty((0.5, 0.4, 0.1), (0.4, 0.75), 16, "gradient"),
    "hard": Difficulty((0.3, 0.4, 0.3), (0.25, 0.6), 16, "clutter")
}

# what differs in scenes that are asked about
QUESTIONED = {"objects": (0.5, 0.5), "scale": (0.6, 0.9)}

# {0}, {1}, {2}: the objects from left to right or from top to bottom
CAPTIONS = {  # by the number of objects
    1: [
        "{0}",
        "a picture of {0}",
        "a drawing of {0}",
        "there is {0}",
        "{0}, {category}",
        "{category}: {0}",
        "{0} {place}",
        "{0} on a {background} background",
        "{0} {place} of a {background} picture"
    ],
    2: [
        "{0} and {1}",
        "{0} next to {1}",
        "a picture of {0} and {1}",
        "{0} and {1} on a {background} background"
    ],
    3: [
        "{0}, {1} and {2}",
        "a picture of {0}, {1} and {2}",
        "{2}, {0} and {1} on a {background} background"
    ]
}
RELATIONS = {  # by the number of objects and whether they are stacked
    (2, False): [
        "{0} to the left of {1}",
        "{1} to the right of {0}",
        "{0} on the left and {1} on the right"
    ],
    (2, True): [
        "{0} above {1}",
        "{1} below {0}",
        "{0} at the top and {1} at the bottom"
    ],
    (3, False): [
        "{0} to the left of {1} and {2}",
        "{1} between {0} and {2}",
        "{2} to the right of {0} and {1}"
    ],
    (3, True): [
        "{0} above {1} and {2}",
        "{1} between {0} and {2}",
        "{2} below {0} and {1}"
    ]
}


PLACES = (  # on a 3 x 3 grid, row by row
    "in the top left corner",
    "at the top",
    "in the top right corner",
    "on the left",
    "in the middle",
    "on the right",
    "in the bottom left corner",
    "at the bottom",
    "in the bottom right corner"
)
QUESTIONS = 6  # about each scene, see ask_scene


# ---------------------------------------------------------------------------------------- drawings


@functools.cache
def load_concepts(count):
    """The first `count` rows of emoji.tsv, of 412, as dicts: the columns and three more. Four at
    least: up to three in a scene, and one that a question misses.

    "names": the phrase and its synonyms; "category": the group with its article, "an animal";
    "artists": {split: the sets whose drawing of the concept belongs to it}.
    """
    lines = (HERE / "emoji.tsv").read_text("utf-8").splitlines()
    rows = list(csv.DictReader(lines, delimiter="\t"))
    for concept, row in enumerate(rows):
        row["names"] = [row["phrase"], *filter(None, row["synonyms"].split("|"))]
        group = row["group"]
        article = "" if group == "food" else "an " if group[0] in "aeiou" else "a "
        row["category"] = article + group
        rng = np.random.default_rng((2312, concept))  # fixed: not the run's seed
        sets = rng.permutation(row["sets"].split()).tolist()
        row["artists"] = {"test": sets[:2], "val": sets[2:3], "train": sets[3:]}
    return rows[:count]


@functools.cache
def load_sheet(artist):
    return Image.open(HERE / f"{artist}.webp").convert("RGBA")


def load_drawing(concept, artist):
    """One drawing as an RGBA image of TILE x TILE pixels."""
    row, column = divmod(concept, COLUMNS)
    left, top = column * TILE, row * TILE
    return load_sheet(artist).crop((left, top, left + TILE, top + TILE))


# -------------------------------------------------------------------------------------------- sets


@functools.cache
def kept_samples(fields):
    """{index: sample} of what was drawn so far, one dict for all sets with the same fields."""
    return {}


@dataclasses.dataclass
class EmojiScenes:
    """Scenes with captions, each determined by (split, seed, index).

    split "train" shows the training drawings, with one caption a scene and the web's flaws; "val"
    and "test" show held-out drawings, with five captions a scene, none of them wrong. Images have
    S x S pixels, S = 9/8 image_size, which leaves room for crops.
    """

    split: str
    scenes: int
    image_size: int
    seed: int = 0
    concepts: int = 150
    difficulty: str = "easy"
    noise: float = 0.0  # share of training scenes captioned for a scene drawn at random
    long_tail: float = 0.0  # exponent z of concept frequencies 1 / rank^z; 0: uniform
    duplicates: float = 0.0  # share of training scenes that nearly repeat an earlier one

    kind = "captions"
    digest = None  # seed and flags tell all

    def __post_init__(self):
        self.rows = load_concepts(self.concepts)
        self.setting = DIFFICULTIES[self.difficulty]
        self.canvas = self.image_size + self.image_size // 8
        frequency = 1.0 / np.arange(1, self.concepts + 1) ** self.long_tail
        rng = np.random.default_rng(self.seed)
        self.frequency = rng.permutation(frequency / frequency.sum())
        self.samples = kept_samples((self.kind, *dataclasses.astuple(self)))

    def __len__(self):
        return self.scenes

    def key(self, index):
        return f"emoji-{self.split}-{self.seed}-{index:07d}"

    def __getitem__(self, index):
        """(RGB image of S x S pixels, captions). Of large scenes only the latest is kept."""
        if index not in self.samples:
            if self.canvas > LARGE:
                self.samples.clear()
            image = render_scene(self._rng(index, 2), self.scene(index), self.setting, self.canvas)
            self.samples[index] = image, self.captions(index)
        return self.samples[index]

    def _rng(self, index, purpose):
        return np.random.default_rng((SPLITS.index(self.split), self.seed, index, purpose))

    def scene(self, index):
        """What compose_scene returns, or nearly that of an earlier index."""
        rng = self._rng(index, 0)
        if self.split == "train" and index and rng.random() < self.duplicates:
            # skewed: a few scenes are repeated often, as on the web
            scene = self.scene(int(index * rng.random() ** 3))
            for thing in scene["objects"]:
                for field in ("x", "y", "size"):
                    thing[field] *= 1 + 0.03 * rng.standard_normal()
            return scene
        shares = self.setting.objects
        count = 1 + rng.choice(len(shares), p=shares)
        concepts = rng.choice(self.concepts, count, replace=False, p=self.frequency)
        artists = [rng.choice(self.rows[i]["artists"][self.split]) for i in concepts]
        return compose_scene(rng, self.setting, concepts, artists)

    def captions(self, index):
        """One caption of a training scene, perhaps another scene's; five of an evaluation scene."""
        rng, training = self._rng(index, 1), self.split == "train"
        if training and rng.random() < self.noise:
            index = int(rng.integers(self.scenes))
        return caption_scene(rng, self.scene(index), self.rows, 1 if training else 5)


class EmojiClasses:
    """Images of one drawing each, three of every drawing of the split, labelled by="concept" or
    by="group" (10 classes). The images have S x S pixels, S = 9/8 image_size.
    """

    kind = "classes"
    templates = ["{}", "a picture of {}", "a drawing of {}"]

    def __init__(self, split, image_size, by="concept", concepts=150, difficulty="easy"):
        self.split, self.setting = split, DIFFICULTIES[difficulty]
        self.canvas = image_size + image_size // 8
        rows = load_concepts(concepts)
        self.names = [row["phrase" if by == "concept" else "category"] for row in rows]
        self.classes = list(dict.fromkeys(self.names))
        self.items = []
        for concept, row in enumerate(rows):
            for artist in row["artists"][split]:
                self.items += 3 * [(concept, artist)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        concept, artist = self.items[index]
        rng = np.random.default_rng((SPLITS.index(self.split), 1, index, index % 3))
        scene = compose_scene(rng, self.setting, [concept], [artist])
        image = render_scene(rng, scene, self.setting, self.canvas)
        return image, self.classes.index(self.names[concept])


class EmojiQuestions(EmojiScenes):
    """All questions about each of `scenes` scenes, with one answer as if ten people gave it.

    The scenes differ from those with captions: one thing or two as often, not all large, so that
    "where", "how many" and "is there" have no answer that is mostly right. `answers`: all that can
    be right, for any scene.
    """

    kind = "questions"

    def __post_init__(self):
        super().__post_init__()
        self.setting = self.setting._replace(**QUESTIONED)
        self.answers = emoji_answers(self.concepts, self.difficulty)

    def __len__(self):
        return QUESTIONS * self.scenes

    def key(self, index):
        return f"{super().key(index // QUESTIONS)}-{index % QUESTIONS}"

    def captions(self, index):
        """What is kept beside the image of a scene: here [(kind, question, answer)] about it."""
        return ask_scene(self._rng(index, 3), self.scene(index), self.rows)

    def __getitem__(self, index):
        image, asked = super().__getitem__(index // QUESTIONS)
        kind, question, answer = asked[index % QUESTIONS]
        return image, (question, [answer] * 10, kind)


def emoji_answers(concepts, difficulty):
    """All answers that ask_scene can give: concepts, backgrounds, yes and no, numbers, places."""
    answers = [row["concept"] for row in load_concepts(concepts)]
    answers += list(COLOURS)[: DIFFICULTIES[difficulty].colours]
    answers += ["yes", "no", "1", "2", "3", *PLACES]
    return list(dict.fromkeys(answers))  # an orange and the colour orange are one answer


def emoji_words(concepts):
    """Texts with every word of the captions, questions and answers, whatever the difficulty.

    For BertTokenizer(words=...): its small vocabulary then has all that these scenes need.
    """
    rows = load_concepts(concepts)
    texts = emoji_answers(concepts, "hard")
    for row in rows:
        texts += row["names"] + [row["category"]]
    rng = np.random.default_rng(0)
    thing = {"concept": 0, "x": 0.5, "y": 0.5}
    for count, vertical in [(1, False), *RELATIONS]:  # every form of caption and question
        scene = {"background": "white", "vertical": vertical, "objects": [thing] * count}
        texts += caption_scene(rng, scene, rows, None)
        for _, question, answer in ask_scene(rng, scene, rows):
            texts += [question, answer]
    return texts


# ---------------------------------------------------------------------------- composing and drawing


def compose_scene(rng, setting, concepts, artists):
    """Draw a place and a size for each concept, and the background.

    The objects stand in equal strips, in a row or stacked. Returns {"background": name,
    "vertical": stacked or not, "objects": [{"concept", "artist", "x", "y", "size"}]}; centre and
    side of an object are fractions of the canvas.
    """
    count = len(concepts)
    vertical = rng.random() < 0.5
    objects = []
    for strip, (concept, artist) in enumerate(zip(concepts, artists)):
        size = rng.uniform(*setting.scale) * min(1, 1.1 / count)
        margin = size * count / 2
        along = (strip + rng.uniform(margin, 1 - margin)) / count
        across = rng.uniform(size / 2, 1 - size / 2)
        x, y = (across, along) if vertical else (along, across)
        objects.append({"concept": concept, "artist": artist, "x": x, "y": y, "size": size})
    return {"background": list(COLOURS)[rng.integers(setting.colours)], "vertical": vertical,
            "objects": objects}


def render_scene(rng, scene, setting, canvas):
    """The scene as an RGB image of canvas x canvas pixels."""
    image = paint_background(rng, COLOURS[scene["background"]], setting.background, canvas)
    for thing in scene["objects"]:
        side = max(2, round(thing["size"] * canvas))
        drawing = jitter(rng, load_drawing(thing["concept"], thing["artist"]), side)
        left = round(thing["x"] * canvas - side / 2)
        top = round(thing["y"] * canvas - side / 2)
        image.paste(drawing, (left, top), drawing)
    return image


def paint_background(rng, colour, style, canvas):
    pixels = np.array(ImageColor.getrgb(colour))  # (3,), below (S, S, 3)
    if style != "plain":  # a linear gradient towards a darker or lighter shade
        angle = rng.uniform(0, 2 * np.pi)
        x = np.linspace(-1, 1, canvas)[:, None]  # (S, 1), below (S, 1, 1) for y
        y = x[:, None]
        pixels = pixels + 35 * (np.cos(angle) * x + np.sin(angle) * y)
    pixels = pixels + rng.normal(0, 4, (canvas, canvas, 1))
    image = to_image(pixels)
    if style == "clutter":
        brush = ImageDraw.Draw(image, "RGBA")
        for _ in range(12):
            corner = rng.uniform(-0.2, 1, 2)
            extent = rng.uniform(0.05, 0.5, 2)
            shape = brush.ellipse if rng.random() < 0.5 else brush.rectangle
            box = [*corner * canvas, *(corner + extent) * canvas]
            shape(box, fill=(*rng.integers(0, 256, 3).tolist(), 90))
    return image


def jitter(rng, drawing, side):
    """The drawing at side x side pixels, mirrored or not, slightly turned and recoloured."""
    if rng.random() < 0.5:
        drawing = ImageOps.mirror(drawing)
    drawing = drawing.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    drawing = drawing.resize((side, side))  # bicubic too
    pixels = np.array(drawing, np.float32)
    contrast = rng.uniform(0.8, 1.1)
    shift = rng.uniform(-15, 15, 3)  # of red, green and blue
    pixels[..., :3] = (pixels[..., :3] - 128) * contrast + 128 + shift
    return to_image(pixels)


def to_image(pixels):
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# --------------------------------------------------------------------------- captions and questions


def caption_scene(rng, scene, rows, count):
    """`count` different captions in plain English, or all (None), each with names of its own."""
    things = [rows[thing["concept"]] for thing in scene["objects"]]
    forms = CAPTIONS[len(things)] + RELATIONS.get((len(things), scene["vertical"]), [])
    captions = []
    for form in rng.permutation(len(forms))[:count]:
        # the phrase, the usual name, is the likeliest
        names = [rng.choice(thing["names"][: 1 + rng.integers(3)]) for thing in things]
        captions.append(forms[form].format(
            *names,
            category=things[0]["category"],
            place=place_in_words(scene["objects"][0]),
            background=scene["background"]
        ))
    return captions


def place_in_words(thing):
    """Where an object stands on a 3 x 3 grid."""
    column = int(min(2, 3 * thing["x"]))
    row = int(min(2, 3 * thing["y"]))
    return PLACES[3 * row + column]


def ask_scene(rng, scene, rows):
    """[(kind, question, answer)]: number, background, presence (yes, then no), where one of the
    objects is, and what a single one is, or how several stand to each other."""
    things = [rows[thing["concept"]] for thing in scene["objects"]]
    names = [thing["concept"] for thing in things]
    absent = next(row for row in rng.permutation(rows) if row["concept"] not in names)
    present = things[rng.integers(len(things))]
    place = rng.integers(len(things))
    sought = things[place]["phrase"] if len(things) > 1 else "it"
    asked = [
        ("number", "how many objects are there?", str(len(things))),
        ("background", "what is the background colour?", scene["background"]),
        ("presence", f"is there {present['phrase']}?", "yes"),
        ("presence", f"is there {absent['phrase']}?", "no"),
        ("where", f"where is {sought}?", place_in_words(scene["objects"][place]))
    ]
    if len(things) == 1:
        return asked + [("what", "what is in the picture?", names[0])]
    side = "above" if scene["vertical"] else "left of"
    return asked + [("relation", f"what is {side} the {names[1]}?", names[0])]
