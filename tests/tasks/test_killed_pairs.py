"""`d2f pairs` killed at random moments, in one process and in two: the finished folder is that of an undisturbed run.

Run as a script, this file imports torch once, and forks the processes of every run.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_fast.commands.load_model import load_with_lora
from d2f_fast.commands.main import main
from d2f_fast.models.options import ModelOptions


def start(model: Path, output: Path, pairs: int, rank: int, world: int) -> int:
    """Fork a process that makes its part of the pairs as the command line does, and return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with Path(f"{output}-{rank}.txt").open("w") as errors:
        os.dup2(errors.fileno(), 2)
        os.dup2(errors.fileno(), 1)
        if world > 1:
            os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        options = ["--num_pairs", str(pairs), "--pairs_per_shard", "7", "--batch_size", "3"]
        options += ["--num_inference_steps", "2", "--guidance_scale", "2", "--guidance_scale_max", "6", "--seed", "3"]
        prompts = ["--prompts_file", str(output.parent / "prompts.txt")]
        try:
            code = main(["pairs", "--model", str(model), *prompts, *options, "--output_dir", str(output)])
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            sys.stderr.flush()
            os._exit(code)


def finish(pids: list[int]) -> list[int]:
    """Wait for processes, and return their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_runs(model: Path, root: Path, count: int, pairs: int) -> dict[str, Any]:
    """Kill runs so many times, with one process and two in turn, and finish what they left each time it is complete."""
    (root / "prompts.txt").write_text("ab\nc\nde fg\n")
    load_with_lora(str(model), [], ModelOptions(), None)  # The libraries are imported before the processes are forked.
    began = time.monotonic()
    assert finish([start(model, root / "whole", pairs, 0, 1)]) == [0]
    lasted, expected = time.monotonic() - began, contents(root / "whole")
    moments, kills, starts, runs, left = random.Random(0), 0, 0, 0, 0
    while kills < count:
        output, complete = root / f"killed{runs}", False
        while not complete:
            world = 1 + starts % 2
            starts += 1
            pids = [start(model, output, pairs, rank, world) for rank in range(world)]
            if kills < count:
                time.sleep(moments.uniform(0.1, 0.9) * lasted)
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            codes = finish(pids)
            kills += -signal.SIGKILL in codes
            left += len([name for name in contents(output) if name.startswith(".tmp-")]) if output.exists() else 0
            assert set(codes) <= {0, -signal.SIGKILL}, [Path(f"{output}-{r}.txt").read_text() for r in range(world)]
            complete = set(codes) == {0}
        found = contents(output)
        assert found.keys() == expected.keys(), sorted(found)
        assert [name for name in expected if found[name] != expected[name]] == []
        runs += 1
    return {"kills": kills, "runs": runs, "unfinished_files": left}


def result(*arguments: object) -> Any:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "pairs"), [(50, 60)])
def test_folder_after_kills_is_that_of_an_undisturbed_run(
    count: int, pairs: int, tiny_folder: Path, tmp_path: Path
) -> None:
    report = result(tiny_folder, tmp_path, count, pairs)
    assert report["kills"] >= count and report["runs"] >= 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_runs(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
