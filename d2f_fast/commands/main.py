"""`d2f`: choose the command, and turn refusals into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 refused input, 130 stopped by Ctrl-C, 141 the output has no reader, 143 stopped by
SIGTERM.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from importlib import import_module
from typing import TypeVar

from d2f_fast import __version__
from d2f_fast.commands.foreign_options import FOREIGN_OPTIONS
from d2f_fast.commands.options import Command, parse_options
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.option_help import options_of, purpose
from d2f_fast.stopping import run_until_stopped, unless_stopped

Key = TypeVar("Key", bound=Hashable)


class LazyCommands(Mapping[Key, type[Command]]):
    """Map names to commands, each of which is imported when it is looked up.

    Args:
        places: for each name, the module in `d2f_fast.commands` and the class in it, with a colon between them.
    """

    def __init__(self, places: Mapping[Key, str]) -> None:
        self._places = places

    def __getitem__(self, name: Key) -> type[Command]:
        """Import and return a command."""
        module, _, command = self._places[name].partition(":")
        found: type[Command] = getattr(import_module(f"d2f_fast.commands.{module}"), command)
        return found

    def __contains__(self, name: object) -> bool:
        """Return whether there is a command of this name, without importing it."""
        return name in self._places

    def __iter__(self) -> Iterator[Key]:
        """Return the names in their order."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of commands."""
        return len(self._places)


COMMANDS = LazyCommands(
    {
        "demo": "demo:Demo",
        "train": "train:Train",
        "sample": "sample:Sample",
        "pairs": "pairs:Pairs",
        "evaluate": "evaluate:Evaluate",
        "convert": "convert:Convert",
        "inspect": "inspect:Inspect",
    }
)
# Commands whose options depend on --task.
TASKS = LazyCommands(
    {
        ("sample", "depth"): "sample_depth:SampleDepth",
        ("sample", "image_to_image"): "sample_image_to_image:SampleImageToImage",
        ("evaluate", "depth"): "evaluate_depth:EvaluateDepth",
    }
)


class ForeignOptions(Mapping[str, str]):
    """Map options of other commands and programs to what to do in their place; commands are imported at a look-up.

    Args:
        command: name of the command that was given such an option.
    """

    def __init__(self, command: str) -> None:
        self._command = command

    @cached_property
    def _found(self) -> dict[str, str]:
        """The sentences by the names of the options."""
        elsewhere = {
            option.field.name: f"it is an option of d2f {name}"
            for name, command in COMMANDS.items()
            for option in options_of(command)
        }
        return {**elsewhere, **FOREIGN_OPTIONS.get(self._command, {})}

    def __getitem__(self, option: str) -> str:
        """Return the sentence of an option."""
        return self._found[option]

    def __iter__(self) -> Iterator[str]:
        """Return the names of the options."""
        return iter(self._found)

    def __len__(self) -> int:
        """Return the number of options."""
        return len(self._found)


def help_text() -> str:
    """Return the text of `d2f --help`: what d2f is, its commands, and two examples."""
    purposes = "\n".join(f"  {name:9}{purpose(command)}" for name, command in COMMANDS.items())
    return f"""usage: d2f [-h] [--version] COMMAND [OPTIONS]

d2f finetunes a Stable Diffusion model on your captioned images with a flow-matching loss (the
Diff2Flow method), and generates images with the result. A second training on pairs that the model
makes itself (reflow) is for sampling in one to four steps.

commands:
{purposes}

options:
  -h, --help  Show this help and stop. `d2f COMMAND --help` explains the options of a command.
  --version   Print the version of d2f and stop.

The options of a command may also come from a YAML file (--config FILE). --dry_run shows all options
without running, and --json prints the result as JSON. In a clone, `python export/to_onnx.py --help`
explains the export to ONNX.

examples:
  d2f demo
  d2f train --train_data_dir photos --pretrained_model_name_or_path MODEL --output_dir run
  d2f sample --prompts "a red fox" --model MODEL --lora run
"""


def parse(arguments: Sequence[str]) -> Command:
    """Return the command that the arguments ask for, with its options.

    Args:
        arguments: words after `d2f`, the name of the command first.

    Raises:
        RefusedInputError: There is no such command, the configuration file cannot be used, or an option has a value
            that it does not take.
        SystemExit: The arguments cannot be parsed (2), or help was asked for (0).
    """
    name = arguments[0] if arguments else None
    if name is None or name not in COMMANDS:
        got = "nothing" if name is None else printable(name)
        raise RefusedInputError(f"give a command ({', '.join(COMMANDS)}), got {got}: see d2f --help")
    foreign = ForeignOptions(name)
    task = task_of(arguments)
    if (name, task) in TASKS:
        return parse_options(TASKS[name, task], arguments[1:], f"{name} --task {task}", foreign)
    return parse_options(COMMANDS[name], arguments[1:], name, foreign)


def task_of(arguments: Sequence[str]) -> str:
    """Return the word that follows `--task`, also as `--task=word`; "" where there is none.

    Args:
        arguments: words of a command line.
    """
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--task":
            return following
        if word.startswith("--task="):
            return word.partition("=")[2]
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line inside a Python program, and return the exit code.

    Args:
        arguments: words after `d2f`; None takes those of the process, and ends it where a signal arrives afterwards.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return run_until_stopped("d2f", partial(run, given), ends_process=arguments is None)


def run(arguments: Sequence[str]) -> int:
    """Run the command line, and return the exit code; the caller handles signals.

    Args:
        arguments: words after `d2f`.
    """
    if "--version" in arguments[:2]:
        print(f"d2f {__version__}")
        return 0
    if arguments and arguments[0] in ("-h", "--help"):
        print(help_text().rstrip())
        return 0
    try:
        command = parse(arguments)
        if command.dry_run:
            unless_stopped(command.check)
            print(json.dumps(dataclasses.asdict(command), indent=2))
            return 0
        with _warnings_as_lines():
            result = unless_stopped(command.run)
    except RefusedInputError as error:
        print(f"d2f: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        # Only this package's own errors carry an exit code; any other error is a defect and keeps its traceback.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"d2f: {error}", file=sys.stderr)
        return int(code)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"d2f: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(json.dumps(result) if command.json else result["output"])
    return 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print what the package logs as a warning as it prints all other lines, inside a `with` block."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("d2f: %(message)s"))
    logger = logging.getLogger("d2f_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
