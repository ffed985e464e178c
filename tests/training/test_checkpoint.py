"""Checkpoints: processes really killed, files really damaged, disks really full.

Run as a script, this file is the process that gets killed: it imports torch once and forks a child for every kill.
"""

import builtins
import errno
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from d2f_fast.errors import CheckpointError
from d2f_fast.files.json_file import read_json, write_json
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.training.checkpoint import find_checkpoint, named_checkpoint, save_checkpoint, verify_checkpoint

torch.set_num_threads(1)


def writer(value: float) -> Callable[[Path], None]:
    """Make a `write` for save_checkpoint whose three files all hold `value`; one lies in a folder."""

    def write(folder: Path) -> None:
        write_tensors(folder / "state.safetensors", {"weight": torch.full((257, 3), value)}, {"value": str(value)})
        write_json(folder / "trainer.json", {"value": value})
        (folder / "unet").mkdir()
        with open(folder / "unet" / "plain.bin", "wb") as file:
            file.write(struct.pack("d", value) * 700)

    return write


def content(folder: Path) -> float:
    """Read back the value that all three files of a checkpoint must agree on."""
    tensors, metadata = read_tensors(folder / "state.safetensors")
    values = {
        float(metadata["value"]),
        read_json(folder / "trainer.json")["value"],
        *tensors["weight"].unique().tolist(),
    }
    values |= set(struct.unpack("700d", (folder / "unet" / "plain.bin").read_bytes()))
    assert len(values) == 1, values
    return values.pop()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_before_call(k: int, root: Path) -> None:
    """Patch the calls that change a disk so that the k-th one kills this process, as a power cut would.

    Files that no fsync has brought to disk by then lose their second half: a power cut forgets the page cache.
    """

    def stamp(status: os.stat_result) -> tuple[int, int]:
        return status.st_size, status.st_mtime_ns

    def files() -> Iterator[Path]:
        return (path for path in root.rglob("*") if path.is_file())

    synced = {path.stat().st_ino: stamp(path.stat()) for path in files()}
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == k:
            for path in files():
                status = path.stat()
                if synced.get(status.st_ino) != stamp(status):
                    real_truncate(path, status.st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return call

    real_open, real_fsync, real_truncate = io.open, os.fsync, os.truncate

    def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wxa+"):
            count()
        return real_open(file, mode, *args, **kwargs)

    def counted_fsync(descriptor: int) -> None:
        count()
        real_fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = stamp(status)

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "chmod"):
        setattr(os, name, counted(getattr(os, name)))
    os.fsync = counted_fsync  # type: ignore[assignment]
    builtins.open = io.open = counted_open


def in_child(work: Callable[[], None]) -> bool:
    """Run `work` in a forked process, and return whether it ended alive."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert status == 0, status
    return True


SCENARIOS: dict[
    str, dict[str, Any]
] = {  # steps saved before; step of the killed save; checkpoints to keep; value of the old one
    "first": {"before": [], "step": 2, "keep": 1, "old": None},
    "next": {"before": [1], "step": 2, "keep": 1, "old": 1.0},
    "same_step": {"before": [1, 2], "step": 2, "keep": None, "old": 2.0},
}


def kill_at_every_call(root: Path) -> dict[str, dict[str, int]]:
    """Kill a save before each of its calls in turn, and count what was found afterwards."""
    os.fsync = lambda fd: None  # waiting for a real disk shows nothing: kill_before_call does the forgetting
    outcomes: dict[str, dict[str, int]] = {}
    for scenario, plan in SCENARIOS.items():
        pristine, folder = root / f"{scenario}-pristine", root / scenario
        pristine.mkdir(parents=True)
        for step in plan["before"]:
            save_checkpoint(pristine, step, writer(float(step)))

        def save(folder: Path = folder, plan: dict[str, Any] = plan) -> None:
            save_checkpoint(folder, plan["step"], writer(-1.0), plan["keep"])

        outcome = outcomes[scenario] = {"old": 0, "new": 0}
        for k in range(1, 1000):
            shutil.copytree(pristine, folder)

            def killed_save(k: int = k, folder: Path = folder, save: Callable[[], None] = save) -> None:
                kill_before_call(k, folder)
                save()

            alive = in_child(killed_save)
            for path in folder.glob("checkpoint*"):
                verify_checkpoint(path)
            found = find_checkpoint(folder, "latest")
            value = None if found is None else content(found)
            assert value in (plan["old"], -1.0), (scenario, k, value)
            outcome["old" if value == plan["old"] else "new"] += 1
            save()  # the next attempt, and it leaves nothing of the killed one
            kept = {2} if plan["keep"] == 1 else {*plan["before"], 2}
            assert names(folder) == [f"checkpoint-{step}" for step in sorted(kept)], (scenario, k, names(folder))
            assert content(folder / "checkpoint-2") == -1.0
            shutil.rmtree(folder)
            if alive:
                break
        else:
            raise AssertionError("the save never ended")
    return outcomes


def kill_at_random_moments(root: Path) -> dict[str, int]:
    """Kill a process that saves in a loop, five times or more; nothing that it had finished saving may be lost."""
    moments = random.Random(0)
    acknowledged = kills = 0
    while kills < 5 or (acknowledged < 5 and kills < 200):  # A slow disk takes more kills until five saves are made.
        kills += 1
        reader, sender = os.pipe()
        pid = os.fork()
        if pid == 0:
            found = find_checkpoint(root, "latest")
            step = 0 if found is None else verify_checkpoint(found)
            while True:
                step += 1
                save_checkpoint(root, step, writer(float(step)), keep=2)
                os.write(sender, struct.pack("q", step))
        os.close(sender)
        time.sleep(moments.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(reader, "rb") as stream:
            received = stream.read()
        if received:
            acknowledged = struct.unpack("q", received[-8:])[0]
        for path in root.glob("checkpoint*"):
            verify_checkpoint(path)
        if acknowledged:
            found = find_checkpoint(root, "latest")
            assert found is not None and verify_checkpoint(found) >= acknowledged
            assert content(found) == verify_checkpoint(found)
    return {"acknowledged": acknowledged}


def kill_saves(root: Path) -> dict[str, Any]:
    """Run the two functions above, each in a folder of its own."""
    (root / "random").mkdir()
    # This is the first one, because the other one leaves out the waiting for the disk.
    at_random = kill_at_random_moments(root / "random")
    return {"at random moments": at_random, "at every call": kill_at_every_call(root / "calls")}


def fill_the_disk(root: Path) -> dict[str, Any]:
    """Save on a filesystem with 0, 4, 8 … KiB left, until it succeeds."""
    save_checkpoint(root, 1, writer(1.0))
    messages = []
    for free_pages in range(40):
        room = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
        (root / "filler").write_bytes(bytes(max(room - free_pages * 4096, 0)))
        try:
            save_checkpoint(root, 2, writer(2.0))
        except CheckpointError as error:
            messages.append(str(error))
            assert names(root) == ["checkpoint-1", "filler"], names(root)
            found = find_checkpoint(root, "latest")
            assert found is not None and content(found) == 1.0
        else:
            found = find_checkpoint(root, "latest")
            assert found is not None and content(found) == 2.0
            return {"messages": messages}
        (root / "filler").unlink()
    raise AssertionError("the disk stayed full")


def run_script(action: str, folder: Path, prefix: tuple[str, ...] = ()) -> Any:
    """Run one of the functions above in a process of its own, and return what it reports."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*prefix, sys.executable, __file__, action, str(folder)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Kill saves in one process, and return what was found afterwards."""
    found: dict[str, Any] = run_script("kill_saves", tmp_path_factory.mktemp("killed"))
    return found


def test_kill_before_any_call_of_a_save_leaves_the_old_or_the_new_checkpoint(killed: dict[str, Any]) -> None:
    outcomes = killed["at every call"]
    assert outcomes.keys() == SCENARIOS.keys()
    for outcome in outcomes.values():
        assert outcome["old"] > 15 and outcome["new"] >= 1, outcomes  # the sweep passed through the whole save


def test_kill_at_random_moments_loses_no_finished_checkpoint(killed: dict[str, Any]) -> None:
    assert killed["at random moments"]["acknowledged"] >= 5


def test_full_filesystem_keeps_the_previous_checkpoint_and_gives_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = shutil.which("unshare")
    mount = ("--mount", "--map-root-user", "sh", "-c", 'mount -t tmpfs -o size=256k tmpfs "$0" && exec "$@"', str(disk))
    if unshare is None or subprocess.run([unshare, *mount, "true"], capture_output=True).returncode:
        pytest.skip("a small filesystem cannot be mounted here")
    messages = run_script("fill_the_disk", disk, (unshare, *mount))["messages"]
    assert len(messages) >= 3  # full at the first byte, within the files, at the manifest
    for message in messages:
        assert "\n" not in message
        assert message.startswith(f"{disk}/checkpoint-2: the disk is full, about 0.0 MiB needed, ")
        assert "earlier checkpoints are intact" in message


def test_files_and_names_reach_the_disk_before_the_older_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, writer(1.0))
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)))
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(("rename", os.path.relpath(source, tmp_path)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save_checkpoint(tmp_path, 2, writer(2.0), keep=1)

    temporary = ".tmp-checkpoint-2"
    renamed, deleted = events.index(("rename", temporary)), events.index(("rename", "checkpoint-1"))
    brought = {name for event, name in events[:renamed] if event == "fsync"}
    assert {f"{temporary}/{n}" for n in ("state.safetensors", "trainer.json", "unet", "unet/plain.bin")} <= brought
    assert events[renamed - 1] == ("fsync", temporary)  # the manifest's name
    assert ("fsync", ".") in events[renamed:deleted]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_only_a_file_that_cannot_be_synced_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync, refused = os.fsync, stat.S_ISDIR

    def partial(descriptor: int) -> None:
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", partial)
    assert content(save_checkpoint(tmp_path, 1, writer(1.0))) == 1.0
    refused = stat.S_ISREG
    with pytest.raises(OSError) as caught:
        save_checkpoint(tmp_path, 2, writer(2.0))
    assert caught.value.errno == number and names(tmp_path) == ["checkpoint-1"]


def test_other_error_while_syncing_a_folder_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        save_checkpoint(tmp_path, 1, writer(1.0))


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError(f"Error while serializing: I/O error: Disk quota exceeded (os error {errno.EDQUOT})"),
]


@pytest.mark.parametrize("error", FULL, ids=["disk", "quota", "quota in safetensors' words"])
def test_full_disk_gives_one_line_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    save_checkpoint(tmp_path, 1, writer(1.0))

    def write(folder: Path) -> None:
        (folder / "begun.bin").write_bytes(b"begun")
        raise error

    with pytest.raises(
        CheckpointError, match=r"checkpoint-2: the disk is full, .* needed, .* free; make room"
    ) as caught:
        save_checkpoint(tmp_path, 2, write, keep=1)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["checkpoint-1"]
    assert content(tmp_path / "checkpoint-1") == 1.0


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EACCES, "denied")], ids=repr)
def test_error_while_writing_is_raised_unchanged_and_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def write(folder: Path) -> None:
        (folder / "begun.bin").write_bytes(b"begun")
        raise error

    with pytest.raises(type(error)) as caught:
        save_checkpoint(tmp_path, 1, write)
    assert caught.value is error
    assert names(tmp_path) == []


@pytest.mark.parametrize(("keep", "left"), [(None, [8, 9, 10, 11]), (1, [11]), (2, [10, 11]), (9, [8, 9, 10, 11])])
def test_checkpoints_with_the_highest_steps_are_kept(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in (8, 9, 10, 11):
        assert save_checkpoint(tmp_path, step, writer(step), keep) == tmp_path / f"checkpoint-{step}"
    assert sorted(int(name.split("-")[1]) for name in names(tmp_path)) == left


def test_checkpoints_of_higher_steps_are_never_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 30, 40):
        save_checkpoint(tmp_path, step, writer(step))
    save_checkpoint(tmp_path, 3, writer(3), keep=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-30", "checkpoint-40"]


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1 or None, got 0"):
        save_checkpoint(tmp_path, 1, writer(1.0), keep=0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def set_manifest(**changes: Any) -> Callable[[Path], int]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    f"{damage.__name__} {name}": (name, damage)
    for name in ("state.safetensors", "trainer.json", "unet/plain.bin")
    for damage in (truncate, flip_a_byte, Path.unlink)
} | {
    "no manifest": ("manifest.json", Path.unlink),
    "manifest truncated": ("manifest.json", truncate),
    "manifest not JSON": ("manifest.json", lambda path: path.write_bytes(b"\x80\x04\xff")),
    "manifest nested too deep": ("manifest.json", lambda path: path.write_text("[" * 100_000)),
    "manifest a list": ("manifest.json", lambda path: path.write_text("[]")),
    "manifest without files": ("manifest.json", lambda path: path.write_text('{"format": 1, "step": 2}')),
    "manifest files a list": ("manifest.json", set_manifest(files=["state.safetensors"])),
    "manifest of another step": ("manifest.json", set_manifest(step=1)),
    "manifest step in text": ("manifest.json", set_manifest(step="2")),
    "manifest step infinite": ("manifest.json", set_manifest(step=math.inf)),
    "manifest format newer": ("manifest.json", set_manifest(format=2)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_by_name_and_skipped_by_latest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, writer(step))
    name, spoil = DAMAGES[damage]
    spoil(tmp_path / "checkpoint-2" / name)

    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, "checkpoint-2")
    assert str(tmp_path / "checkpoint-2" / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not damage.startswith("truncate ") or "bytes," in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="d2f_fast.training.checkpoint"):
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    assert [record.getMessage() for record in caplog.records] == [f"checkpoint-2 is skipped: {caught.value}"]


@pytest.mark.parametrize("name", ["../secret", "{root}/secret", "link", "unet/../../secret", "nul\0byte"])
def test_manifest_that_leads_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    folder = save_checkpoint(tmp_path, 1, writer(1.0))
    (folder / "link").symlink_to(secret)
    manifest = read_json(folder / "manifest.json")
    sha256 = subprocess.run(["sha256sum", secret], capture_output=True, text=True).stdout.split()[0]
    manifest["files"][name.format(root=tmp_path)] = {"size": 6, "sha256": sha256}
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="missing" if "\0" in name else "outside the checkpoint"):
        find_checkpoint(tmp_path, "checkpoint-1")


def test_latest_is_the_checkpoint_with_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 10):
        save_checkpoint(tmp_path, step, writer(step))
    for name in ("checkpoint-500-tmp", "checkpoint-x", ".tmp-checkpoint-77"):
        shutil.copytree(tmp_path / "checkpoint-10", tmp_path / name)
    (tmp_path / "checkpoint-99").write_text("a file")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"


def test_missing_checkpoints_give_none_and_a_warning_for_latest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_checkpoint(tmp_path, None) is None
    assert not caplog.records
    assert find_checkpoint(tmp_path / "not there", "latest") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_latest_of_damaged_checkpoints_alone_is_refused_and_names_each(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, writer(step))
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    (weights,) = (tmp_path / "checkpoint-2").glob("*.safetensors")
    weights.write_bytes(b"")
    (tmp_path / "checkpoint-3" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, "latest")
    assert str(caught.value) == (
        f"every checkpoint in {tmp_path} is damaged (checkpoint-3: manifest.json is not the manifest of a checkpoint; "
        f"checkpoint-2: {weights.name} has 0 bytes, and {(tmp_path / 'checkpoint-3' / weights.name).stat().st_size} "
        "were written; checkpoint-1: manifest.json: no such file): restore one from a copy, or name a new output_dir"
    )


def test_checkpoint_is_found_by_name_or_path_and_refused_if_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    folder = save_checkpoint(run, 5, writer(5.0))
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(run, "checkpoint-5") == folder
    assert find_checkpoint(tmp_path / "other", str(folder)) == folder
    assert find_checkpoint(tmp_path / "other", Path("run/checkpoint-5")) == Path("run/checkpoint-5")
    folder = folder.rename(run / ".old-checkpoint-5")  # killed while it was replaced
    assert find_checkpoint(run, "checkpoint-5") == find_checkpoint(run, "latest") == folder
    assert verify_checkpoint(folder.rename(tmp_path / "best")) == 5
    with pytest.raises(CheckpointError, match=r"checkpoint-5 is not a checkpoint in .*run: give one that is there"):
        find_checkpoint(run, "checkpoint-5")


if __name__ == "__main__":
    logging.disable()
    action = {function.__name__: function for function in (kill_saves, fill_the_disk)}
    print(json.dumps(action[sys.argv[1]](Path(sys.argv[2]))))


def test_named_checkpoint_is_found_with_its_step_and_without_reading_contents(tmp_path: Path) -> None:
    assert named_checkpoint(tmp_path, None) is None and named_checkpoint(tmp_path, "latest") is None
    for step in (1, 2):
        save_checkpoint(tmp_path, step, writer(step))
    (weights,) = (tmp_path / "checkpoint-2").glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for named in ("latest", "checkpoint-2"):
        assert named_checkpoint(tmp_path, named) == (tmp_path / "checkpoint-2", 2)
    weights.write_bytes(b"\xff" * len(content))
    with pytest.raises(CheckpointError, match="not an intact safetensors file"):
        named_checkpoint(tmp_path, "checkpoint-2")
    assert named_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-1", 1)
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(checkpoint-2: .*; checkpoint-1: "):
        named_checkpoint(tmp_path, "latest")
