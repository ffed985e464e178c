"""SIGTERM and SIGINT at random moments of `d2f train`, in one process and in two: no step is lost.

Run as a script, this file imports torch once, and forks the processes of every run.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pytest
from PIL import Image

from d2f_fast.commands import main as command_line
from d2f_fast.stopping import run_until_stopped
from d2f_fast.training import accelerator, trainer
from d2f_fast.training.checkpoint import find_checkpoint, verify_checkpoint

STEPS = 12


class Ended(TypedDict):
    """How a run ended: exit code and standard error of each process, rows of the log, and the step that is saved."""

    codes: list[int]
    errors: list[str]
    logged: int
    saved: int
    complete: bool


def start(
    model: Path,
    images: Path,
    output: Path,
    rank: int,
    world: int,
    port: int,
    first: Callable[[], None] = lambda: None,
) -> int:
    """Fork a process that calls a function and then trains as the command line does, and return its number."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    with Path(f"{output}-{rank}.txt").open("w") as errors:
        os.dup2(errors.fileno(), 2)
        os.dup2(errors.fileno(), 1)
        if world > 1:
            names = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_PORT": str(port)}
            os.environ["ACCELERATE_USE_CPU"] = "true"
        arguments = [
            *("train", "--train_data_dir", str(images), "--pretrained_model_name_or_path", str(model)),
            *("--output_dir", str(output), "--resolution", "16", "--rank", "2", "--train_batch_size", "2"),
            *("--max_train_steps", str(STEPS), "--logging_steps", "1", "--checkpointing_steps", "5"),
        ]
        first()
        try:
            work = partial(command_line.run, arguments)
            code = run_until_stopped("d2f", work, ends_process=True)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            sys.stderr.flush()
            os._exit(code)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def finish(output: Path, pids: list[int]) -> Ended:
    """Wait for the processes of a run, and return how it ended; as torchrun, end all once one has failed."""
    found_codes: dict[int, int] = {}
    while len(found_codes) < len(pids):
        for pid in pids:
            if pid not in found_codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                found_codes[pid] = os.waitstatus_to_exitcode(status[1])
                if found_codes[pid]:
                    for other in set(pids) - set(found_codes):
                        os.kill(other, signal.SIGTERM)
        time.sleep(0.05)
    codes = [found_codes[pid] for pid in pids]
    log = output / "log.jsonl"
    found = None
    if any(output.glob("checkpoint-*")):
        found = find_checkpoint(output, "latest")
    return {
        "codes": codes,
        "errors": [Path(f"{output}-{rank}.txt").read_text() for rank in range(len(pids))],
        "logged": len(log.read_text().splitlines()) if log.exists() else 0,
        "saved": 0 if found is None else verify_checkpoint(found),
        "complete": (output / "pytorch_lora_weights.safetensors").exists(),
    }


def stop_runs(model: Path, images: Path, root: Path, moments: Path, world: Path) -> list[dict[str, Any]]:
    """Stop a run at each of so many random moments, and return how each one ended."""
    processes, choices = int(str(world)), random.Random(int(str(world)))
    port = free_port()
    began = time.monotonic()
    finish(root / "whole", [start(model, images, root / "whole", r, processes, port) for r in range(processes)])
    whole, ended = time.monotonic() - began, []
    for moment in range(int(str(moments))):
        output, port = root / f"{moment}", free_port()
        pids = [start(model, images, output, rank, processes, port) for rank in range(processes)]
        after = choices.uniform(0.05, whole)
        time.sleep(after)
        number = choices.choice((signal.SIGTERM, signal.SIGINT))
        stopped = pids if choices.random() < 0.6 else [choices.choice(pids)]
        for _ in range(choices.randint(1, 2)):
            for pid in stopped:
                os.kill(pid, number)
            time.sleep(choices.choice((0, 0.01, 0.2)))
        result = finish(output, pids)
        ended.append({**result, "after": after, "number": int(number), "stopped": len(stopped)})
    return ended


def early_stops(model: Path, images: Path, root: Path) -> list[dict[str, Any]]:
    """Stop one of two processes before and after they connect, when the other one waits for it, each in turn."""
    ended = []
    for module, name in ((accelerator, "Accelerator"), (trainer, "check_trainable")):
        for held in range(2):
            output, port = root / f"{name}-{held}", free_port()
            reached = Path(f"{output}-reached")

            def wait(*arguments: Any, reached: Path = reached, **options: Any) -> None:
                reached.touch()
                time.sleep(60)

            hold = partial(setattr, module, name, wait)
            pids = [start(model, images, output, r, 2, port, *[hold] * (r == held)) for r in range(2)]
            while not reached.exists():
                time.sleep(0.05)
            time.sleep(1)  # The other process comes to where it waits.
            os.kill(pids[held], signal.SIGTERM)
            ended.append({"held": f"{name} {held}", **finish(output, pids)})
    return ended


def overlapping_runs(model: Path, images: Path, root: Path, offsets: Path) -> list[dict[str, Any]]:
    """Start two runs in one folder at each of so many random distances, and return how both ended."""
    choices, ended = random.Random(0), []
    for number in range(int(str(offsets))):
        output, after = root / f"{number}", choices.choice((0.0, choices.uniform(0, 4)))
        began = []
        for rank in (0, 1):  # the number gives each process a file for its messages
            began.append(start(model, images, output, rank, 1, 0))
            time.sleep(after)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in began]
        steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
        checkpoint = find_checkpoint(output, "latest")
        errors = [Path(f"{output}-{rank}.txt").read_text().strip() for rank in (0, 1)]
        ended.append({
            "after": after,
            "codes": codes,
            "refusal": errors[codes.index(2)] if 2 in codes else "",
            "steps": steps,
            "saved": 0 if checkpoint is None else verify_checkpoint(checkpoint),
        })  # fmt: skip
    return ended


def faults(ended: dict[str, Any]) -> list[str]:
    """Return what is wrong with the end of a run."""
    found = [f"traceback: {text}" for text in ended["errors"] if "Traceback" in text]
    if ended["saved"] < ended["logged"] and not ended["complete"]:
        found.append(f"lost: step {ended['logged']} was logged and step {ended['saved']} is saved")
    allowed = {0, 128 + ended["number"]}
    if ended["stopped"] < len(ended["codes"]):
        allowed |= {143}  # The one that got no signal is ended by SIGTERM where the run had not begun.
    found += [f"exit code {code}" for code in ended["codes"] if code not in allowed]
    for text in ended["errors"]:
        for word in [line for line in text.splitlines() if ": saved as" in line and "after step" in line]:
            if f"after step {ended['saved']}: saved" not in word:
                found.append(f"not true: {word}")
    return found


def results(root: Path, tiny_folder: Path, action: str, *numbers: int) -> list[dict[str, Any]]:
    (root / "images").mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        (root / "images" / f"{index}.txt").write_text("abc")
    # The command itself sets the level of torch's messages, but only before torch is imported.
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    env["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    command = [sys.executable, __file__, action, *map(str, (tiny_folder, root / "images", root, *numbers))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    ended: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_signal_at_any_moment_loses_no_step(tmp_path: Path, tiny_folder: Path, processes: int) -> None:
    ended = results(tmp_path, tiny_folder, "stop_runs", 40, processes)
    assert [(each["after"], found) for each in ended if (found := faults(each))] == []
    assert sum(0 < each["logged"] < STEPS for each in ended) >= 5  # some are stopped in the middle of their training


@pytest.mark.slow
def test_process_that_waits_for_a_stopped_one_ends_by_the_signal_of_the_launcher(
    tmp_path: Path, tiny_folder: Path
) -> None:
    for each in results(tmp_path, tiny_folder, "early_stops"):
        assert each["codes"] == [143, 143], each
        assert all("stopped by SIGTERM" in text.splitlines()[-1] for text in each["errors"]), each
        assert not any("Traceback" in text or "frame #" in text for text in each["errors"]), each


@pytest.mark.slow
def test_one_of_two_runs_in_a_folder_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    for each in results(tmp_path, tiny_folder, "overlapping_runs", 20):
        assert sorted(each["codes"]) == [0, 2], each
        assert each["refusal"].startswith("d2f: ") and "\n" not in each["refusal"], each
        assert " is in use by " in each["refusal"] or " holds " in each["refusal"], each
        assert each["steps"] == list(range(1, STEPS + 1)) and each["saved"] == STEPS, each


if __name__ == "__main__":
    import torch

    from d2f_fast.models.load import load_pipeline  # Loaded before the processes are forked.

    torch.set_num_threads(1)
    load_pipeline(sys.argv[2])
    print(json.dumps(globals()[sys.argv[1]](*map(Path, sys.argv[2:]))))
