"""Runs in processes of their own: stopped, killed, and divided among two processes.

Run as a script, this file is the process that gets killed: it imports torch once and forks a child for every run.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.models.load import load_pipeline
from d2f_fast.training.agreement import LostProcessError
from d2f_fast.training.checkpoint import find_checkpoint, verify_checkpoint
from d2f_fast.training.signals import InterruptedRunError
from d2f_fast.training.trainer import AlignedTrainer


class Images:
    """Dataset of captioned images of noise; reading one takes `pause` seconds."""

    def __init__(self, length: int = 10, pause: float = 0.0) -> None:
        self.length, self.pause = length, pause

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.pause)
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        return {"image": Image.fromarray(pixels), "text": ["abc"[index % 3] * 2, "d e"]}


def config(output_dir: Path, **options: Any) -> TrainingConfig:
    defaults = {
        "resolution": 16,
        "rank": 2,
        "target_modules": ("to_q", "to_out.0", "ff.net.2"),
        "max_train_steps": 7,
        "logging_steps": 1,
        "checkpointing_steps": 3,
        "learning_rate": 1e-2,
    }
    return TrainingConfig(output_dir=str(output_dir), **{**defaults, **options})


STEPS = 20
GOES_ON = "as checkpoint-3, which --resume_from_checkpoint latest continues"


def kill_options(**options: Any) -> dict[str, Any]:
    return {"max_train_steps": STEPS, "checkpointing_steps": 2, "random_flip": True, "train_batch_size": 2, **options}


def start(pipeline: DiffusionPipeline, output: Path, **options: Any) -> int:
    """Fork a process that trains its copy of a pipeline, ending with the exit code that the command line would give."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            trainer = AlignedTrainer.from_pretrained(pipeline, config(output, **kill_options(**options)))
            trainer.fit(Images(pause=0.01))
            code = 0
        except InterruptedRunError as stop:
            print(stop, file=sys.stderr)
            code = stop.exit_code
        finally:
            os._exit(code)
    return pid


def wait_for_steps(output: Path, rows: int) -> int:
    """Wait until the log has so many rows, and return how many it has."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        found = (output / "log.jsonl").read_text().count("\n") if (output / "log.jsonl").exists() else 0
        if found >= rows:
            return found
        time.sleep(0.005)
    raise TimeoutError(f"{output} did not come to {rows} rows")


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def final(output: Path) -> dict[str, Tensor]:
    """Verify the last checkpoint, and return all of its tensors."""
    verify_checkpoint(output / f"checkpoint-{STEPS}")
    names = ("trainable", "ema", "optimizer")
    return {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in read_tensors(output / f"checkpoint-{STEPS}" / f"{name}.safetensors")[0].items()
    }


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not equal bit for bit."""
    return [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]


def kill_runs(model: Path, root: Path) -> dict[str, Any]:
    """Stop one run by SIGTERM and kill another at five random moments; resume both to their ends."""
    pipeline = load_pipeline(model)  # once for all runs
    assert finish(start(pipeline, root / "straight")) == 0
    expected = final(root / "straight")

    stopped = root / "stopped"
    pid = start(pipeline, stopped, checkpointing_steps=0)
    wait_for_steps(stopped, 4)
    os.kill(pid, signal.SIGSTOP)  # The run takes no further step between the count of its rows and the signal.
    os.waitpid(pid, os.WUNTRACED)
    rows = wait_for_steps(stopped, 4)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    code = finish(pid)
    folder = find_checkpoint(stopped, "latest")
    assert folder is not None
    saved = verify_checkpoint(folder)
    assert finish(start(pipeline, stopped, resume_from_checkpoint="latest")) == 0
    assert different(final(stopped), expected) == []

    killed, moments, starts = root / "killed", random.Random(0), []
    for _ in range(5):
        before = wait_for_steps(killed, 0)
        found = find_checkpoint(killed, "latest")
        starts.append(0 if found is None else verify_checkpoint(found))
        pid = start(pipeline, killed, resume_from_checkpoint="latest")
        wait_for_steps(killed, before + moments.randint(1, 3))
        time.sleep(moments.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert finish(pid) == -signal.SIGKILL
        for path in killed.glob("checkpoint*"):
            verify_checkpoint(path)
    assert finish(start(pipeline, killed, resume_from_checkpoint="latest")) == 0
    assert different(final(killed), expected) == []
    logged = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, STEPS + 1))
    return {"code": code, "rows": rows, "saved": saved, "starts": starts}


def run_script(action: str, *arguments: Path, **variables: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, __file__, action, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: "subprocess.Popen[str]") -> Any:
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def test_stopped_and_killed_runs_end_bit_equal_to_the_uninterrupted_one(tiny_folder: Path, tmp_path: Path) -> None:
    report = result(run_script("kill_runs", tiny_folder, tmp_path))
    assert report["code"] == 143
    assert report["rows"] <= report["saved"] <= report["rows"] + 2  # the step in progress, and one not yet logged
    assert report["starts"] == sorted(report["starts"]) and report["starts"][0] == 0 < report["starts"][-1]


def train_as_process(model: Path, root: Path) -> dict[str, Any]:
    """Train as one of the processes that the environment names."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {"train_batch_size": 4 // world, "max_grad_norm": 0.1}
    trainer = AlignedTrainer.from_pretrained(model, config(root / f"world{world}", **options))
    trainer.fit(Images(9))  # the last batch of an epoch has one image: none for the second process
    torch.save({k: v.detach() for k, v in trainer.trainable.items()}, root / f"{world}-{os.environ.get('RANK', 0)}.pt")
    return {"processes": trainer.accelerator.num_processes}


def stop_as_process(model: Path, root: Path) -> dict[str, Any]:
    """Train as one of two processes, of which the second alone meets each reason to stop, in its third step."""
    second, stopped = os.environ["RANK"] == "1", {}

    def signalled(batch: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def unreadable(index: int) -> None:
        raise AssertionError("decoder")

    for reason in ("signal", "image"):
        options = {"train_batch_size": 1, "logging_steps": 50, "max_train_steps": 60, "dataloader_num_workers": 0}
        trainer = AlignedTrainer.from_pretrained(model, config(root / reason, **options, cache_latents=False))
        images = Images(9)
        part, name, act = (trainer, "step", signalled) if reason == "signal" else (Images, "__getitem__", unreadable)
        original = getattr(part, name)

        def acting(*arguments: Any, trainer: Any = trainer, act: Any = act, original: Any = original) -> Any:
            if trainer.global_step == 2 and second:
                act(arguments[-1])
            return original(*arguments)

        setattr(part, name, acting)
        try:
            trainer.fit(images)
        except (InterruptedRunError, RefusedInputError) as error:
            stopped[reason] = [trainer.global_step, str(error)]
        setattr(part, name, original)
    return stopped


def lose_a_process(model: Path, root: Path) -> dict[str, Any]:
    """Train as one of two processes, of which the second is killed in its third step."""
    trainer = AlignedTrainer.from_pretrained(model, config(root, train_batch_size=1, max_train_steps=9))
    step = trainer.step

    def killed(batch: Any) -> Tensor:
        if trainer.global_step == 2 and os.environ["RANK"] == "1":
            print("{}", flush=True)
            os._exit(0)
        return step(batch)

    trainer.step = killed  # type: ignore[method-assign]
    with pytest.raises(LostProcessError) as caught:
        trainer.fit(Images(9))
    return {"message": str(caught.value)}


def results_of_two(script: str, *arguments: Path) -> list[Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    processes = [run_script(script, *arguments, **common, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    return [result(process) for process in processes]


@pytest.mark.slow
def test_two_processes_stop_together_between_two_logged_steps(tiny_folder: Path, tmp_path: Path) -> None:
    first, second = results_of_two("stop_as_process", tiny_folder, tmp_path)
    assert first["signal"] == second["signal"] == [3, f"stopped by SIGTERM after step 3: saved {GOES_ON}"]
    (sample,) = re.findall(r"sample \d", second["image"][1])
    sentence = f"{sample} cannot be used (AssertionError: decoder): replace it; step 2 is saved"
    assert second["image"] == [2, sentence] and first["image"] == [2, f"process 1: {sentence}"]
    for reason, step in (("signal", 3), ("image", 2)):
        found = find_checkpoint(tmp_path / reason, "latest")
        assert found is not None and verify_checkpoint(found) == step


@pytest.mark.slow
def test_process_whose_partner_is_killed_saves_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    first, second = results_of_two("lose_a_process", tiny_folder, tmp_path)
    assert (first, second) == ({"message": "another process of this run has ended; step 2 is saved"}, {})
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None and verify_checkpoint(found) == 2


@pytest.mark.slow
def test_two_processes_train_as_one_process_does(
    assert_equal: Any, distance: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    assert [each["processes"] for each in results_of_two("train_as_process", tiny_folder, tmp_path)] == [2, 2]
    assert result(run_script("train_as_process", tiny_folder, tmp_path))["processes"] == 1
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert_equal(first, second)
    assert distance(first, one) <= 1e-4
    logs = []
    for world in (1, 2):
        assert (tmp_path / f"world{world}" / "checkpoint-7").is_dir()
        rows = (tmp_path / f"world{world}" / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(row)["loss"] for row in rows])
    assert len(logs[0]) == 7 and logs[1] == pytest.approx(logs[0], rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](*map(Path, sys.argv[2:]))))
