"""Options of each command: how they are parsed, and how their help explains them."""

import dataclasses
import math
import os
import re
import shlex
from typing import get_args

import pytest
import tyro

from d2f_fast.commands.main import COMMANDS, TASKS, main, parse
from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.option_help import argument_texts, examples, options_of

OPTIONS = {
    f"{name} {option.field.name}": option
    for name, command in (*COMMANDS.items(), *((" ".join(key), command) for key, command in TASKS.items()))
    for option in options_of(command)
}
TRAIN = ["train", "--train_data_dir", "x"]

TITLE = r"^ (\w[\w ]*?) +\n -+ +$"  # of a group in the help


@pytest.fixture
def help_of(capsys, monkeypatch):
    """Function that returns the help of a command in a terminal of 100 columns."""

    def text(name: str) -> str:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setitem(tyro._experimental_options, "utf8_boxes", False)
        with pytest.raises(SystemExit) as exit_:
            main([*name.split(), "--help"])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    return text


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_option_is_explained_in_full_sentences(option):
    assert re.match(r"[A-Z].*\.$", option.help)
    assert len(option.help.split()) >= 5


HELP = {**COMMANDS, **{f"{name} --task {task}": command for (name, task), command in TASKS.items()}}


@pytest.mark.parametrize("name", HELP)
def test_help_fits_100_columns_and_shows_each_option_under_its_title(name, help_of):
    text = help_of(name)
    assert max(map(len, text.splitlines())) <= 100
    body, _, lines = text.partition("\nexamples:\n")
    _, *parts = re.split(TITLE, body, flags=re.MULTILINE)
    boxes = dict(zip(parts[::2], parts[1::2], strict=True))
    for option in options_of(HELP[name]):
        group, is_positional = option.field.metadata.get("group"), option.field.metadata.get("positional")
        title = "positional arguments" if is_positional else "options" if group is None else f"{group} options"
        words = " ".join(boxes[title].split())
        name_in_help = option.field.name.upper() if is_positional else f"--{option.field.name}"
        text, _, default = option.help.removesuffix(".").partition(". Default: ")
        assert f" {name_in_help}" in f" {words}" and text in words and default in words
    assert "--config FILE" in boxes["other options"]
    assert [line.strip() for line in lines.splitlines()] == examples(HELP[name])
    assert "(default: None)" not in text and "(default: )" not in text and "{None" not in text


@pytest.mark.parametrize("name", HELP)
def test_examples_of_the_help_parse(name):
    for line in examples(HELP[name]):
        program, *words = shlex.split(line)
        assert program == "d2f"
        parse(words)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_option_says_its_default_once(option):
    is_explained = "Default: " in option.help
    assert is_explained == (option.field.default in (None, (), ""))
    assert re.search(r"default", option.help.partition("Default: ")[0]) is None


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_help_names_the_options_of_depth(name, help_of):
    text = help_of(name)
    assert f"listed by `d2f {name} --task depth --help`" in text and "--task {text,depth" in text


def test_training_options_are_in_groups_of_which_the_essential_one_is_first(help_of):
    titles = re.findall(TITLE, help_of("train"), re.MULTILINE)
    groups = ["essential", "data", "model", "LoRA", "depth", "image to image", "method", "teacher"]
    groups += ["optimisation", "memory and speed"]
    assert titles == ["options", *(f"{group} options" for group in [*groups, "checkpoints and logs", "other"])]


def test_each_documented_option_exists():
    for command in (*COMMANDS.values(), *TASKS.values(), TrainingConfig):
        assert list(argument_texts(command)) == list(command.__dataclass_fields__)


def test_defaults_of_the_command_line_are_those_of_the_dataclass():
    assert parse(TRAIN).options == TrainingConfig()


def test_dashes_and_underscores_and_equal_signs_are_accepted():
    options = parse([*TRAIN, "--max-train-steps", "5", "--train_batch_size=3", "--no-random-flip"]).options
    assert (options.max_train_steps, options.train_batch_size, options.random_flip) == (5, 3, False)


def test_none_can_be_typed_for_an_option_that_takes_it():
    options = parse([*TRAIN, "--checkpoints_total_limit", "None", "--target_modules", "to_q", "to_k"]).options
    assert options.checkpoints_total_limit is None and options.target_modules == ("to_q", "to_k")


def test_options_come_from_the_file_and_typed_ones_win(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("rank: 7\nlearning_rate: 3.0e-5\ncenter_crop: true\nobjective: fm\ntrain_data_dir: somewhere\n")
    command = parse(["train", "--config", str(config), "--rank=9", "--max-train-steps", "5"])
    assert (command.options.rank, command.options.learning_rate) == (9, 3e-5)
    assert (command.options.objective, command.train_data_dir) == ("fm", "somewhere")
    assert command.options.max_train_steps == 5
    assert parse(["train", f"--config={config}"]).options.rank == 7


def test_one_folder_or_several_are_taken_from_the_file_and_typed(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("train_data_dir: [a, b]\ndataset_weights: [9, 1]\n")
    command = parse(["train", "--config", str(config)])
    assert (command.train_data_dir, command.dataset_weights) == (("a", "b"), (9.0, 1.0))
    assert parse(["train", "--train_data_dir", "a", "b"]).train_data_dir == ("a", "b")
    assert parse(["train", "--train_data_dir", "a"]).train_data_dir == "a"


def test_typed_option_may_make_a_contradiction_of_the_file_valid(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("center_crop: false\ntarget_modules: [to_q]\n")
    options = parse([*TRAIN, "--config", str(config), "--no_cache_latents", "--target_modules", "to_k"]).options
    assert (options.center_crop, options.cache_latents, options.target_modules) == (False, False, ("to_k",))


@pytest.mark.parametrize("name", ["--config", "--config="])
def test_config_without_a_path_is_refused(name, capsys):
    assert main([*TRAIN, name]) == 2
    assert capsys.readouterr().err == "d2f: --config: give the path of a YAML file\n"


def test_second_configuration_file_is_refused(capsys):
    assert main([*TRAIN, "--config", "a.yaml", "--config=b.yaml"]) == 2
    assert capsys.readouterr().err == "d2f: --config was given more than once: put the options into one file\n"


@pytest.mark.parametrize(
    ("arguments", "words"), [(["sample"], "--prompts"), ([*TRAIN, "--random_flip", "maybe"], "maybe")]
)
def test_arguments_that_cannot_be_parsed_end_with_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


NUMERIC = [
    pytest.param(option, id=f"{name} {option.field.name}")
    for name, command in COMMANDS.items()
    for option in options_of(command)
    if {int, float} & {option.hint, *get_args(option.hint)}
]
# Very large values of these mean that nothing is clamped, or that nothing is learned.
ANY_POSITIVE = ("snr_gamma", "max_grad_norm", "adam_epsilon")


@pytest.mark.parametrize("option", NUMERIC)
def test_number_that_no_run_can_use_is_refused(option):
    check, name = option.field.metadata["check"], option.field.name
    is_whole = float not in {option.hint, *get_args(option.hint)}
    for value in (-1 if is_whole else math.nan, -(10**20), 10**20 if is_whole else math.inf, -math.inf, 10**10, 1e20):
        accepted = (name == "seed" and value == 10**10) or (name in ANY_POSITIVE and value in (10**10, 1e20))
        if accepted:
            check(name, value)
        else:
            with pytest.raises(RefusedInputError, match=f"{name} must be"):
                check(name, value)
    if option.field.default is not dataclasses.MISSING:
        check(name, option.field.default)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--resolution", "64,64"], "resolution must be a whole number, got 64,64"),
        (["--resolution", "64", "wide"], "resolution must be a whole number, got wide"),
        (["--dataset_weights", "1", "two"], "dataset_weights must be a number, got two"),
        (["--learning-rate=fast"], "learning_rate must be a number, got fast"),
        (["--mixed_precision", "fp16"], "mixed_precision must be no or bf16, got fp16"),
        (["--max_train_steps", "--json"], "--max_train_steps needs a value: give a number"),
        (["--objective"], "--objective needs a value: give diff2flow, fm or diffusion"),
        (["--compile", "fast"], "compile must be off, full or regional, got fast"),
    ],
)
def test_value_of_another_type_is_refused_in_one_line(arguments, line, capsys):
    assert main([*TRAIN, *arguments]) == 2
    assert capsys.readouterr().err == f"d2f: {line}\n"


def test_option_of_several_values_that_is_given_twice_is_refused(capsys):
    assert main(["sample", "--prompts", "a", "--lora", "b", "--lora=c"]) == 2
    assert capsys.readouterr().err == "d2f: --lora was given more than once: give all its values after one --lora\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_text_that_is_not_utf8_is_refused_in_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = os.fsdecode(b"a\xff")
    given = {
        "train": ["--train_data_dir", bad],
        "sample": ["--prompts", bad],
        "pairs": ["--prompts_file", bad],
        "convert": [bad, "out"],
        "inspect": [bad],
    }
    for more in (["--dry_run"], []):
        assert main([name, *given.get(name, ["--output_dir", bad]), *more]) == 2
        assert r"must be UTF-8 text without zero bytes, got 'a\udcff'" in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_size_is_one_number_or_several_in_the_file_and_typed(tmp_path):
    config = tmp_path / "options.yaml"
    for text, given in (("768", 768), ("[48, 64]", (48, 64)), ("[64, 64]", 64)):
        config.write_text(f"resolution: {text}\n")
        assert parse(["train", "--config", str(config)]).options.resolution == given
    assert parse(["train", "--config", str(config), "--resolution", "24", "32"]).options.resolution == (24, 32)
    assert parse(["train", "--resolution", "24", "32", "32", "32"]).options.resolution == (24, 32, 32, 32)
    assert parse(["train", "--resolution=24"]).options.resolution == 24
