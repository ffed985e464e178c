"""Build the documentation as one site: the guides and the API reference, with links between them.

    python docs/build_site.py [FOLDER]               # writes FOLDER/index.html; FOLDER is site/ by default

README.md and docs/*.md become pages, and pdoc writes the reference of every module to FOLDER/api. A guide links to a
file of the repository by its relative path, as GitHub shows it: here a link to a Markdown file leads to its page, one
to a Python module to its reference, and any other file is copied beside the pages.
"""

import re
import shutil
import sys
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pdoc
from pdoc import render
from pdoc.render_helpers import to_html

ROOT = Path(__file__).resolve().parent.parent
# Pages in the order of the menu; a guide that is not named here comes last.
ORDER = (
    *("index.md", "README.md", "training.md", "reflow.md", "depth.md", "image_to_image.md", "sampling.md"),
    *("comfyui.md", "a1111.md"),
    *("convert.md", "evaluation.md", "deploy.md", "method.md", "results.md"),
)
# Folders of modules, and the package that they are imported as.
PACKAGES = {"d2f_fast": "d2f_fast", "kernels": "d2f_fast.kernels", "export": "d2f_fast.export"}

_LINK = re.compile(r'(?P<attribute>href|src)="(?P<target>[^"]+)"')
_HEADING_LINK = re.compile(r'(?P<before><h[1-6] id="|href="#)(?P<name>[^"]+)"')


def guides() -> list[Path]:
    """Return the Markdown files that become pages, in the order of the menu."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return sorted(files, key=lambda file: (ORDER.index(file.name) if file.name in ORDER else len(ORDER), file.name))


def page_name(guide: Path) -> str:
    """Return the file name of a guide's page."""
    return f"{guide.stem.lower()}.html"


def module_name(file: Path) -> str | None:
    """Return the name by which a Python file of this repository is imported; None for one outside the package."""
    top, *rest = file.relative_to(ROOT).with_suffix("").parts
    if top not in PACKAGES or file.suffix != ".py":
        return None
    return ".".join([PACKAGES[top], *rest]).removesuffix(".__init__")


def rooms() -> list[str]:
    """Return the package and its direct modules and packages, whose submodules pdoc finds by itself.

    pdoc would not find these, because the package names its public objects in `__all__`.
    """
    files = [file for top in PACKAGES for file in (ROOT / top).rglob("*.py")]
    names = {module_name(file) or "" for file in files if not file.stem.startswith("__main")}
    return sorted({".".join(name.split(".")[:2]) for name in names})


def build(folder: Path) -> None:
    """Write the site into a folder, which is emptied first."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "index.html").is_file():
            raise SystemExit(f"{folder} holds no site: name an empty or a new folder")
        shutil.rmtree(folder)
    render.configure(docformat="google", show_source=False, template_directory=ROOT / "docs/templates")
    pages = {guide: to_html(guide.read_text(encoding="utf-8")) for guide in guides()}
    render.env.globals["guides"] = {page_name(guide): _title(html) for guide, html in pages.items()}
    folder.mkdir(parents=True)
    template = render.env.get_template("guide.html.jinja2")
    for guide, html in pages.items():
        contents = _lower_case_anchors(getattr(html, "toc_html", None) or "")  # markdown2 adds it to the string
        body = _lower_case_anchors(_LINK.sub(partial(_site_link, guide=guide, folder=folder), html))
        page = template.render(title=_title(html), body=body, contents=contents)
        (folder / page_name(guide)).write_text(page, encoding="utf-8")
    pdoc.pdoc(*rooms(), output_directory=folder / "api")


def _title(html: str) -> str:
    """Return the text of the first heading of a page."""
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", html)
    if heading is None:
        raise SystemExit("a guide has no heading of the first level")
    return re.sub(r"<[^>]+>", "", heading[1])


def _lower_case_anchors(html: str) -> str:
    """Write the anchors of headings in lower case, as GitHub does, so that links work in both places."""
    return _HEADING_LINK.sub(lambda found: f'{found["before"]}{found["name"].lower()}"', html)


def _site_link(link: re.Match[str], guide: Path, folder: Path) -> str:
    """Return the attribute of a link on the site, and copy the file that it leads to if that is no page."""
    address = urlsplit(link["target"])
    if address.scheme or address.netloc or not address.path:
        return link[0]
    file = (guide.parent / address.path).resolve()
    if not file.is_file() or not file.is_relative_to(ROOT):
        raise SystemExit(f"{guide.relative_to(ROOT)} links to {address.path}, which is no file of this repository")
    path = file.relative_to(ROOT)
    if file.suffix == ".md" and path.parent.as_posix() in (".", "docs") and file in guides():
        target = page_name(file)
    elif (module := module_name(file)) is not None:
        target = f"api/{module.replace('.', '/')}.html"
    else:
        target = path.as_posix()
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / target)
    fragment = f"#{address.fragment}" if address.fragment else ""
    return f'{link["attribute"]}="{target}{fragment}"'


if __name__ == "__main__":
    output = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site")
    build(output)
    print(output / "index.html")
