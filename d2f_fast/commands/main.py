"""`d2f`: the commands. Options come from the dataclasses below, spelled with underscores or dashes.

Exit codes: 0 done, 2 refused input, 143 saved after SIGTERM or SIGINT.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from d2f_fast.commands.demo import Demo
from d2f_fast.commands.sample import Sample
from d2f_fast.commands.train import Train
from d2f_fast.config import (
    TrainingConfig,
)
from d2f_fast.errors import RefusedInputError

COMMANDS: dict[str, Any] = {"demo": Demo, "train": Train, "sample": Sample}


def with_config_file(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--config FILE` out of the arguments, and read the options in it.

    Raises:
        RefusedInputError: the file is missing, too large, or not a YAML mapping.
    """
    import yaml

    rest, options = list(arguments), {}
    for i, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.partition("=")[2]
            if not inline and i + 1 >= len(arguments):
                raise RefusedInputError("--config: give the path of a YAML file")
            path = Path(inline or arguments[i + 1])
            del rest[i : i + (1 if inline else 2)]
            try:
                options = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise RefusedInputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
            if not isinstance(options, dict):
                raise RefusedInputError(f"{path} must hold `option: value` lines")
            break
    return rest, options


def parse(arguments: Sequence[str]) -> Any:
    """Command dataclass of an argument list: the file's options first, then those typed.

    Raises:
        RefusedInputError: an option of the configuration file is unknown, or has a wrong type.
        SystemExit: misuse (2), or help (0).
    """
    rest, from_file = with_config_file(arguments)
    typed: list[str] = []
    command = COMMANDS.get(rest[0]) if rest else None
    if from_file and command is not None:
        # Made into arguments, so that they go through the same checks as typed ones, which replace them.
        options = [*dataclasses.fields(command), *(dataclasses.fields(TrainingConfig) if command is Train else ())]
        known = {option.name: option.type for option in options}
        for name, value in from_file.items():
            if name not in known:
                raise RefusedInputError(f"--config: {name} is no option of d2f {rest[0]}: see d2f {rest[0]} --help")
            if any(argument.partition("=")[0].replace("-", "_") == f"__{name}" for argument in rest):
                continue
            if isinstance(value, bool) and known[name] is bool:
                typed.append(f"--{name}" if value else f"--no_{name}")
            elif isinstance(value, bool):  # YAML's yes and no, meant as words
                typed += [f"--{name}", "yes" if value else "no"]
            elif isinstance(value, list):
                typed += [f"--{name}", *map(str, value)]
            else:
                typed += [f"--{name}", str(value)]
        rest = [rest[0], *typed, *rest[1:]]
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="d2f", description=__doc__, args=rest, use_underscores=True, sort_subcommands=False
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if command.dry_run:
            print(json.dumps(dataclasses.asdict(command), indent=2))
            return 0
        result = command.run()
    except RefusedInputError as error:
        print(f"d2f: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        # Only those classes of ours that carry an exit code; anything else is a defect and keeps its traceback.
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
