"""Examples of the documentation give what the pages say, recipes run, and no link is broken."""

import doctest
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from PIL import Image

from benchmarks import estimate
from d2f_fast.commands.foreign_options import FOREIGN_OPTIONS
from d2f_fast.commands.main import main, parse
from d2f_fast.commands.train import Train
from d2f_fast.config import DEFAULT_CAPTION_DROPOUT, DEFAULT_RANK
from d2f_fast.option_help import options_of

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = ("training", "reflow", "depth", "image_to_image", "sampling", "evaluation", "results")
RECIPES = sorted((ROOT / "docs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("page", ["docs/method.md", "docs/sampling.md"])
def test_examples_give_what_the_page_says(page: str) -> None:
    result = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("page", [f"{page}.md" for page in PAGES])
def test_d2f_commands_of_a_page_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named relative to the clone
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    commands = re.findall(r"^(?:.* -m d2f_fast|d2f) (.+)$", "".join(blocks), re.MULTILINE)
    assert commands
    for line in commands:
        parse(shlex.split(line))


def test_d2f_commands_of_the_table_of_conversions_parse() -> None:
    page = (ROOT / "docs/convert.md").read_text(encoding="utf-8")
    commands = re.findall(r"`d2f ((?:convert|inspect) [\w/.:]+ [^`]+)`", page)
    assert len(commands) == 8
    for line in commands:
        parse(shlex.split(line))


# Tables of options


def section(heading: str) -> str:
    """Return the text below a heading of the training guide, without the marks of code."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].replace("`", "")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading of the training guide, without its head."""
    lines = re.findall(r"^\| (.+) \|$", section(heading), re.MULTILINE)
    return [line.split(" | ") for line in lines[1:]]


def test_table_of_everyday_options_has_the_defaults_of_the_code() -> None:
    defaults = {option.field.name: option.field.default for option in options_of(Train)}
    chosen_later: dict[str, object] = {  # what the default None means
        **{"rank": DEFAULT_RANK, "lora_alpha": "the rank", "caption_dropout": DEFAULT_CAPTION_DROPOUT},
        **{"mixed_precision": "no", "resolution": "the model's own, or that of its training with this package"},
    }
    table = rows("Everyday options")
    assert len(table) >= 20
    for flag, stated, _ in table:
        name = flag.removeprefix("--")
        default = chosen_later.get(name) if defaults[name] is None else defaults[name]
        if isinstance(default, bool):
            assert stated == ("on" if default else "off"), name
        elif isinstance(default, int | float):
            assert float(stated) == default, name
        else:
            assert stated == default, name


def test_table_of_kohyas_options_has_the_answers_of_the_command() -> None:
    answers = {name: answer.replace("`", "") for name, answer in FOREIGN_OPTIONS["train"].items()}
    table = rows("Coming from kohya's scripts")
    assert len(table) >= 20
    for flags, answer in table:
        for flag in flags.split(", "):
            assert answers[flag.removeprefix("--")] == answer


def test_options_that_kohya_has_by_the_same_name_are_options_of_training() -> None:
    words = section("Coming from kohya's scripts").partition("\n|")[0]
    same = re.findall(r"--(\w+)", words)
    assert len(same) >= 15
    assert set(same) <= {option.field.name for option in options_of(Train)}


# Recipes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two captioned images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        Image.new("RGB", (40, 32), (100 * i, 50, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_trains_the_miniature(recipe: Path, images: Path, tmp_path: Path) -> None:
    options = ["--max_train_steps", "2", "--output_dir", str(tmp_path)]
    options += ["--resolution", "32"] if recipe.stem == "resolution" else []
    options += ["--cache_dir", str(images.parent / "cache")]
    assert main(["train", "--config", str(recipe), "--train_data_dir", str(images), *options]) == 0
    full = yaml.safe_load(recipe.read_text(encoding="utf-8"))["adapter"] == "full"
    assert (tmp_path / ("pipeline/model_index.json" if full else "pytorch_lora_weights.safetensors")).is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_value_of_a_recipe_has_a_comment_that_is_a_sentence(recipe: Path) -> None:
    header, *paragraphs = recipe.read_text(encoding="utf-8").strip().split("\n\n")
    assert all(line.startswith("#") for line in header.splitlines())
    for paragraph in paragraphs:
        *comment, option = paragraph.splitlines()
        text = " ".join(line.removeprefix("# ") for line in comment)
        assert re.fullmatch(r"\w+: .+", option) and text[0].isupper() and text.endswith((".", "dog."))


def test_table_of_recipes_has_their_values() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+\.yaml)\].*", readme, re.MULTILINE)
    assert sorted(rows) == [recipe.name for recipe in RECIPES]
    for recipe in RECIPES:
        options = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        (row,) = re.findall(rf"^\| \[{recipe.name}\].*", readme, re.MULTILINE)
        _, _, _, images, a_step, rank, rate, steps, shift, _ = (cell.strip() for cell in row.split("|"))
        assert f"{images} captioned images" in recipe.read_text(encoding="utf-8")
        assert int(a_step) == options["train_batch_size"] * options.get("gradient_accumulation_steps", 1)
        assert rank == str(options.get("rank", "–"))
        assert float(rate) == options["learning_rate"]
        assert (int(steps), float(shift)) == (options["max_train_steps"], options["flow_shift"])


# The estimate of memory and time


def test_estimate_counts_the_state_of_a_full_finetuning() -> None:
    needs = estimate.estimate(estimate.Run("miniature", rank=None))
    parameters = sum(p.numel() for p in estimate._build("miniature", None).parameters())
    assert needs.state_bytes == 16 * parameters  # weights, two moments and the average, float32 each
    assert needs.update_bytes == 8 * parameters  # gradients, and the differences of the average
    assert needs.pass_bytes[4] > needs.pass_bytes[1] > 4 * parameters  # gradients are whole at the end


def test_estimate_of_lora_needs_less_than_full_finetuning_and_more_without_checkpointing() -> None:
    kept = estimate.estimate(estimate.Run("miniature", rank=4))
    recomputed = estimate.estimate(estimate.Run("miniature", rank=4, checkpointing=True))
    full = estimate.estimate(estimate.Run("miniature", rank=None))
    assert kept.memory_gb(4) < full.memory_gb(4)
    assert recomputed.pass_bytes[4] < kept.pass_bytes[4]
    assert kept.image_operations < full.image_operations < recomputed.image_operations * 1.5
    assert kept.image_operations < recomputed.image_operations < 2 * kept.image_operations
    assert kept.seconds(4, "H100") == pytest.approx(4 * kept.image_operations / (0.36 * 989e12))


def test_estimate_says_which_card_a_run_does_not_fit() -> None:
    needs = estimate.Estimate(30_000_000_000, dict.fromkeys(estimate.BATCHES, 0), 0, image_operations=10**13)
    assert needs.time_cell(4, "RTX 4090") == "does not fit in 24 GB"
    assert needs.time_cell(4, "H100") == "0.11 s"


def test_readme_table_has_a_row_for_each_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- estimate: begin -->\n(.*?)\n<!-- estimate: end -->", readme, re.DOTALL)
    empty = estimate.Estimate(0, dict.fromkeys(estimate.BATCHES, 0), 0, 0)
    expected = estimate.table(dict.fromkeys(estimate.RUNS, empty))
    labels = [[line.split("|")[1:4] for line in lines] for lines in (table.splitlines(), expected)]
    assert labels[0] == labels[1]


@pytest.mark.slow
def test_readme_table_is_what_the_estimate_prints() -> None:
    printed = subprocess.run([sys.executable, "-m", "benchmarks.estimate"], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


# Links


class Page(HTMLParser):
    """Collect the anchors and the links of an HTML page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.add(value)


def anchors_on_github(markdown: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    outside_code = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", outside_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_links_of_a_guide_lead_somewhere(page: Path) -> None:
    markdown = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", markdown)
    assert page.name not in ("README.md", "index.md") or len(links) >= 5
    for link in links:
        address = urlsplit(link)
        if address.scheme:
            assert address.scheme == "https"
            continue
        target = (page.parent / unquote(address.path)).resolve() if address.path else page
        assert target.is_file() and target.is_relative_to(ROOT), link
        if address.fragment and target.suffix == ".md":
            assert address.fragment in anchors_on_github(target.read_text(encoding="utf-8")), link


@pytest.mark.slow
def test_site_has_guides_and_reference_and_no_broken_link(tmp_path: Path) -> None:
    site = tmp_path / "site"
    built = subprocess.run([sys.executable, "docs/build_site.py", site], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            if not target.is_file() or (address.fragment and address.fragment not in pages[target].anchors):
                broken.append(f"{file.relative_to(site)}: {link}")
    assert not broken
    assert {f"{guide.stem.lower()}.html" for guide in GUIDES} <= {file.name for file in site.glob("*.html")}
    assert (site / "api/d2f_fast/training/trainer.html").is_file()
    assert (site / "api/d2f_fast/kernels/align.html").is_file()
    assert any("api/" in link for link in pages[site / "sampling.html"].links)
    assert "../../training.html" in pages[site / "api/d2f_fast/flow.html"].links
