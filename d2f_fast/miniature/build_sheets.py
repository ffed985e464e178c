"""Make the two aligned sprite sheets and their names from two npm packages: the stage `pictures` of `build.py`."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from d2f_fast.miniature import emoji

CATEGORIES = {"Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities"}


class EmojiSource(NamedTuple):
    """An emoji of the npm packages.

    Attributes:
        name: its name in captions.
        code_point: its code points in hexadecimal.
        files: its image in each style that has it.
    """

    name: str
    code_point: str
    files: dict[str, Path]


def emoji_sources(npm: Path) -> list[EmojiSource]:
    """Return the emoji of the npm packages that the sheets hold, in the order of the sheets.

    Args:
        npm: the node_modules folder with `emoji-datasource-google` and `@lobehub/fluent-emoji-3d`.
    """
    noto = npm / "emoji-datasource-google"
    fluent = npm / "@lobehub" / "fluent-emoji-3d" / "assets"
    entries = [
        entry
        for entry in json.loads((noto / "emoji.json").read_text())
        if entry["has_img_google"]
        and (
            entry["category"] in CATEGORIES
            or ("LARGE" in entry["name"] and ("SQUARE" in entry["name"] or "CIRCLE" in entry["name"]))
        )
    ]
    entries.sort(key=lambda entry: entry["sort_order"])
    sources = []
    for entry in entries:
        codes = [code.lower() for code in (entry["unified"], entry["non_qualified"]) if code]
        found = [path for path in (fluent / f"{code}.webp" for code in codes) if path.exists()]
        files = {"noto": noto / "img" / "google" / "64" / entry["image"]} | ({"fluent": found[0]} if found else {})
        sources.append(EmojiSource(entry["name"].lower().replace("’", "'"), codes[0], files))
    return sources


def build_sheets(npm: Path) -> None:
    """Write the sprite sheets of both styles, and the list of names.

    Args:
        npm: the node_modules folder with `emoji-datasource-google` and `@lobehub/fluent-emoji-3d`.
    """
    sources = emoji_sources(npm)
    rows = math.ceil(len(sources) / emoji.COLUMNS)
    size = (emoji.COLUMNS * emoji.SIZE, rows * emoji.SIZE)
    sheets = {style: Image.new("RGBA", size) for style in emoji.STYLES}
    names = []
    for i, source in enumerate(sources):
        corner = (i % emoji.COLUMNS * emoji.SIZE, i // emoji.COLUMNS * emoji.SIZE)
        for style, path in source.files.items():
            with Image.open(path) as image:
                small = image.convert("RGBA").resize((emoji.SIZE, emoji.SIZE), Image.Resampling.LANCZOS)
            sheets[style].paste(small, corner)
        names.append({"name": source.name, "code_point": source.code_point, "fluent": "fluent" in source.files})
    emoji.FOLDER.mkdir(exist_ok=True)
    for style, sheet in sheets.items():
        sheet.save(emoji.FOLDER / f"{style}.webp", lossless=True, quality=100, method=6)
    (emoji.FOLDER / "names.json").write_text("[\n" + ",\n".join(json.dumps(name) for name in names) + "\n]\n")
