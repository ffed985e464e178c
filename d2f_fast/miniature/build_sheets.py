"""Make the two aligned sprite sheets and their names from two npm packages: the stage `pictures` of `build.py`."""

import json
import math
from pathlib import Path

from PIL import Image

from d2f_fast.miniature import emoji

CATEGORIES = {"Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities"}


def build_sheets(npm: Path) -> None:
    """Write the sprite sheets of both styles, and the list of names.

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
    rows = math.ceil(len(entries) / emoji.COLUMNS)
    size = (emoji.COLUMNS * emoji.SIZE, rows * emoji.SIZE)
    sheets = {style: Image.new("RGBA", size) for style in emoji.STYLES}
    names = []
    for i, entry in enumerate(entries):
        codes = [code.lower() for code in (entry["unified"], entry["non_qualified"]) if code]
        found = [path for path in (fluent / f"{code}.webp" for code in codes) if path.exists()]
        sources = {"noto": noto / "img" / "google" / "64" / entry["image"]} | ({"fluent": found[0]} if found else {})
        corner = (i % emoji.COLUMNS * emoji.SIZE, i // emoji.COLUMNS * emoji.SIZE)
        for style, path in sources.items():
            with Image.open(path) as image:
                small = image.convert("RGBA").resize((emoji.SIZE, emoji.SIZE), Image.Resampling.LANCZOS)
            sheets[style].paste(small, corner)
        names.append({"name": entry["name"].lower().replace("’", "'"), "code_point": codes[0], "fluent": bool(found)})
    emoji.FOLDER.mkdir(exist_ok=True)
    for style, sheet in sheets.items():
        sheet.save(emoji.FOLDER / f"{style}.webp", lossless=True, quality=100, method=6)
    (emoji.FOLDER / "names.json").write_text("[\n" + ",\n".join(json.dumps(name) for name in names) + "\n]\n")
