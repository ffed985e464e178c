"""Options of kohya's scripts and of diffusers lead to the options of d2f that serve."""

import re

import pytest

from d2f_fast.commands.foreign_options import FOREIGN_OPTIONS
from d2f_fast.commands.main import COMMANDS, main
from d2f_fast.option_help import options_of

GIVEN = [(command, name) for command, options in FOREIGN_OPTIONS.items() for name in options]
# The options that the documentation of each program uses most.
OF_KOHYA = (
    *("network_dim", "network_alpha", "network_module", "unet_lr", "text_encoder_lr", "network_train_unet_only"),
    *(
        "max_train_epochs",
        "save_every_n_epochs",
        "save_every_n_steps",
        "save_model_as",
        "save_precision",
        "output_name",
    ),
    *("optimizer_type", "min_snr_gamma", "cache_latents_to_disk", "enable_bucket", "flip_aug", "xformers", "sdpa"),
    *("dataset_config", "network_weights", "v_parameterization", "zero_terminal_snr", "noise_offset", "vae"),
)
OF_DIFFUSERS = (
    *("dataset_name", "instance_data_dir", "instance_prompt", "num_train_epochs", "use_8bit_adam", "use_ema"),
    *("enable_xformers_memory_efficient_attention", "validation_prompt", "validation_epochs", "push_to_hub"),
    *("train_text_encoder", "allow_tf32", "scale_lr", "noise_offset", "hub_model_id", "logging_dir"),
    *("max_train_samples", "proportion_empty_prompts", "non_ema_revision"),
)


@pytest.mark.parametrize(("command", "name"), GIVEN)
def test_advice_names_options_that_the_command_has(command, name):
    text = FOREIGN_OPTIONS[command][name]
    names = {option.field.name for option in options_of(COMMANDS[command])} | {"dtype"}  # that of d2f convert
    assert name not in names
    assert set(re.findall(r"--(?:no_)?(\w+)", text.replace("as --lora", ""))) <= names


@pytest.mark.parametrize("name", sorted({*OF_KOHYA, *OF_DIFFUSERS}))
def test_common_options_of_training_scripts_have_an_answer(name):
    assert name in FOREIGN_OPTIONS["train"]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["train", "--network_dim", "8"], "give --rank"),
        (["sample", "--prompt", "a fox"], "give --prompts"),
        (["sample", "--steps=4"], "give --num_inference_steps"),
        (["sample", "--max_train_steps", "4"], "it is an option of d2f train"),
        (["train", "--rnak", "3"], "the nearest is --rank"),
        (["convert", "a", "b", "--ranks", "3"], "the nearest is --rank"),
    ],
)
def test_unknown_option_is_refused_in_one_line_with_the_answer(arguments, answer, capsys):
    assert main(arguments) == 2
    command, given = arguments[0], next(word for word in arguments if word.startswith("--")).partition("=")[0]
    line = f"d2f: {given} is not an option of d2f {command}: {answer} (d2f {command} --help lists all)\n"
    assert capsys.readouterr().err == line


def test_key_of_the_configuration_file_is_answered_like_an_option(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("network_dim: 8\n")
    assert main(["train", "--config", str(config)]) == 2
    line = f"--config {config}: network_dim is not an option of d2f train: give --rank (d2f train --help lists all)\n"
    assert capsys.readouterr().err == f"d2f: {line}"


@pytest.mark.parametrize("arguments", [["train", "--version"], ["sample", "--version"]])
def test_version_may_follow_the_command(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("d2f 0.")
