"""Remake the emoji sheets (`<set>.webp`) and the table (`emoji.tsv`) from published icon packages.

    npm install --save-exact @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/twemoji@1.2.5 \\
        @iconify-json/openmoji@1.2.29 @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/emojione@1.2.3 \\
        @iconify-json/emojione-v1@1.2.3 @iconify-json/fxemoji@1.2.2 @iconify-json/streamline-emojis@1.2.4 \\
        emojibase-data@17.0.0
    pip install pillow==13.0.0 resvg-py==0.5.0
    python make.py node_modules                  # writes the sheets and the table next to this file, then checks them
    python make.py node_modules --out elsewhere  # leaves the shipped files alone, for comparing
    python make.py --check                       # only checks the files that are there; needs Pillow alone

Nothing is random: the same versions give the same bytes. All decisions made by hand are in `choices.tsv`, one concept
a row in the order of the tiles: the Unicode name of the emoji, the words, the group, and under `drawings` what differs
from the automatic choice (`set=icon` takes that icon, `set=-` leaves a wrong drawing out).
"""

import argparse
import collections
import csv
import io
import json
import re
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
SETS = ("noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji-flat", "emojione", "emojione-v1", "fxemoji",
        "streamline-emojis")
COLUMNS = 22        # tiles in a row of a sheet
TILE = 64           # px
MARGIN = 2          # px left free on each side of the drawing's longer extent
RENDER = 320        # px, height at which a drawing is rasterised before it is cropped and reduced
FAINT = 8           # alpha up to this value (of 255) does not count as part of the drawing when cropping
# Colours are rounded to 32 levels and alpha to 16, then stored without loss: half the bytes of the unrounded drawings,
# and about a quarter of the error (1.6 against 6 of 255, RMS) of a lossy sheet of as many bytes, which blurs the edges.
LEVELS = 3 * [round(round(value * 31 / 255) * 255 / 31) for value in range(256)] + [
    17 * round(value / 17) for value in range(256)]
MIN_SETS = 7        # a concept needs drawings by this many artists
MIN_GROUP = 20      # concepts in a group
MAX_BYTES = 8_000_000
FIELDS = ("concept", "phrase", "plural", "group", "synonyms", "sets")


class IconSet:
    """One package of drawings; finds an icon by code point or by name and draws it."""

    def __init__(self, folder: Path):
        data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.size = data.get("width", 16), data.get("height", 16)
        self.icons = data["icons"]
        # Aliases that mirror or turn their parent are other drawings: left out.
        aliases = data.get("aliases", {}).items()
        self.aliases = {name: alias["parent"] for name, alias in aliases if set(alias) == {"parent"}}
        self.by_code = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.by_name = {}
        for name in [*self.icons, *self.aliases]:
            self.by_name.setdefault(normal(name), self.aliases.get(name, name))
        for name in self.icons:     # "pizza-1", "pizza-2": variants by the same artist, the first is used
            if name.endswith("-1"):
                self.by_name.setdefault(normal(name[:-2]), name)

    def names(self, icon: str) -> list[str]:
        """`icon` and every alias of it."""
        return [icon, *(alias for alias, parent in self.aliases.items() if parent == icon)]

    def draw(self, icon: str) -> Image.Image:
        """RGBA tile of TILE x TILE px: the drawing without its empty border, aspect kept, centred."""
        import resvg_py
        body = self.icons[icon]
        left, top = body.get("left", 0), body.get("top", 0)
        width, height = body.get("width", self.size[0]), body.get("height", self.size[1])
        svg = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
               f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body["body"]}</svg>')
        png = resvg_py.svg_to_bytes(svg_string=svg, height=RENDER, skip_system_fonts=True)
        image = Image.open(io.BytesIO(png)).convert("RGBA")
        image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > FAINT)).getbbox())
        scale = (TILE - 2 * MARGIN) / max(image.size)
        # Pillow reduces RGBA with premultiplied alpha, so no dark or white rim appears at transparent edges.
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        tile = Image.new("RGBA", (TILE, TILE))
        tile.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
        return tile


def normal(name: str) -> str:
    """Name reduced to its letters and digits: the sets spell "fire engine", "fire-engine" and "fireengine"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def box(index: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in px of tile `index` in a sheet."""
    row, column = divmod(index, COLUMNS)
    return column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def find_icons(choice: dict[str, str], code: str, sets: dict[str, IconSet]) -> dict[str, str]:
    """Icon name per set for one row of `choices.tsv`: by code point, else by a name another set uses, else by hand.

    code: hexadecimal code points joined by "-", as in the packages' chars.json.
    """
    found = {name: icons.by_code[code] for name, icons in sets.items() if code in icons.by_code}
    known = [choice["label"], *found.values()]
    for name, icon in found.items():
        known += sets[name].names(icon)
    for name, icons in sets.items():
        if name not in found:
            hits = [icons.by_name[normal(word)] for word in known if normal(word) in icons.by_name]
            found.update({name: hits[0]} if hits else {})
    for rule in choice["drawings"].split():
        name, icon = rule.split("=")
        if icon == "-" and name in found:
            del found[name]
        elif icon in sets[name].icons:
            found[name] = icon
        else:
            raise SystemExit(f"choices.tsv: {choice['label']}: {name} has no icon {icon!r}")
    return {name: found[name] for name in SETS if name in found}


def make(modules: Path, out: Path) -> None:
    """Write emoji.tsv and one sheet per set to `out`."""
    sets = {name: IconSet(modules / "@iconify-json" / name) for name in SETS}
    emoji = json.loads((modules / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    codes = {entry["label"]: entry["hexcode"].lower().replace("-fe0f", "") for entry in emoji}
    choices = read_table(HERE / "choices.tsv")
    height = -(-len(choices) // COLUMNS) * TILE
    sheets = {name: Image.new("RGBA", (COLUMNS * TILE, height)) for name in SETS}
    lines = ["\t".join(FIELDS)]
    for index, choice in enumerate(choices):
        icons = find_icons(choice, codes[choice["label"]], sets)
        for name, icon in icons.items():
            sheets[name].paste(sets[name].draw(icon), box(index))
        lines.append("\t".join([*(choice[field] for field in FIELDS[:-1]), " ".join(icons)]))
    out.mkdir(parents=True, exist_ok=True)
    (out / "emoji.tsv").write_bytes(("\n".join(lines) + "\n").encode())
    for name, sheet in sheets.items():
        sheet.point(LEVELS).save(out / f"{name}.webp", lossless=True, quality=100, method=4)


def check(out: Path) -> None:
    """Compare the table with the sheets and the words with each other; print a summary or stop with what is wrong."""
    rows = read_table(out / "emoji.tsv")
    wrong = []
    for name in SETS:
        sheet = Image.open(out / f"{name}.webp").convert("RGBA")
        for index, row in enumerate(rows):
            alpha = sheet.crop(box(index)).getchannel("A")
            listed, filled = name in row["sets"].split(), sum(alpha.histogram()[128:]) / TILE**2
            if filled < 0.02 if listed else alpha.getbbox():
                wrong.append(f"{name}: {row['concept']}: {filled:.1%} filled, {'listed' if listed else 'not listed'}")
    owner = {}
    for row in rows:
        words = {row["concept"], row["phrase"], row["plural"], *filter(None, row["synonyms"].split("|"))}
        for word in {re.sub("^(a|an|the) ", "", word.lower()) for word in words}:
            if owner.setdefault(word, row["concept"]) != row["concept"]:
                wrong.append(f"{word!r} stands for both {owner[word]!r} and {row['concept']!r}")
        if len(row["sets"].split()) < MIN_SETS:
            wrong.append(f"{row['concept']}: only {row['sets']}")
    groups = collections.Counter(row["group"] for row in rows)
    wrong += [f"group {group!r} has {count} concepts" for group, count in groups.items() if count < MIN_GROUP]
    size = sum((out / f"{name}.webp").stat().st_size for name in SETS)
    if size > MAX_BYTES:
        wrong.append(f"{size} bytes")
    if wrong:
        raise SystemExit("\n".join(wrong))
    drawings = sum(len(row["sets"].split()) for row in rows)
    print(f"{len(rows)} concepts, {drawings} drawings, {len(SETS)} sheets, {size / 1e6:.2f} MB; {dict(groups)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Remake or check the emoji sheets.")
    parser.add_argument("modules", type=Path, nargs="?", help="folder node_modules with the packages named in make.py")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to and to check (default: this one)")
    parser.add_argument("--check", action="store_true", help="only check the files that are there")
    args = parser.parse_args()
    if not args.check:
        if args.modules is None:
            parser.error("give the folder node_modules, or --check")
        make(args.modules, args.out)
    check(args.out)


if __name__ == "__main__":
    main()
