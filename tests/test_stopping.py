"""Signals end a command with one line and an exit code, whatever it is doing."""

import signal
import subprocess
import sys
import time

import pytest

from d2f_fast.stopping import StopRequestedError, run_until_stopped

START = """
import os, signal, sys, time
from d2f_fast.stopping import run_until_stopped, unless_stopped
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


def run(work: str, *numbers: int) -> "subprocess.CompletedProcess[str]":
    """Run a command whose work is this code, send it signals once it prints a line, and wait for its end."""
    code = f"{START}{work}\nsys.exit(run_until_stopped('d2f', work, ends_process=True))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    for number in numbers:
        process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, first + output, errors)


SLEEP = """
def work():
    try:
        print('begun', flush=True)
        time.sleep(600)
    finally:
        time.sleep(0.2)
        print('cleaned')
"""


@pytest.mark.parametrize(
    ("numbers", "code", "name"),
    [
        ((signal.SIGTERM,), 143, "SIGTERM"),
        ((signal.SIGINT,), 130, "SIGINT"),
        ((signal.SIGTERM, signal.SIGTERM), 143, "SIGTERM"),
    ],
)
def test_signal_ends_the_command_in_one_line_after_its_cleaning(numbers, code, name):
    done = run(SLEEP, *numbers)
    assert (done.returncode, done.stdout, done.stderr) == (code, "begun\ncleaned\n", f"d2f: stopped by {name}\n")


def test_signal_whose_exception_python_drops_is_sent_again():
    work = """
class Slow:
    def __del__(self):
        print('begun', flush=True)
        time.sleep(600)

def work():
    slow = Slow()
    del slow
    time.sleep(600)
"""
    done = run(work, signal.SIGTERM)
    assert (done.returncode, done.stderr) == (143, "d2f: stopped by SIGTERM\n")


def test_error_that_a_library_made_of_the_signal_is_not_shown():
    work = """
def load():
    try:
        print('begun', flush=True)
        time.sleep(600)
    except BaseException:
        raise OSError('unable to load')

def work():
    try:
        return unless_stopped(load)
    except OSError:
        return 2
"""
    done = run(work, signal.SIGTERM)
    assert (done.returncode, done.stderr) == (143, "d2f: stopped by SIGTERM\n")


def test_signal_while_python_shuts_down_keeps_the_exit_code():
    work = """
import atexit
atexit.register(lambda: (print('begun', flush=True), time.sleep(600)))

def work():
    return 7
"""
    started = time.monotonic()
    done = run(work, signal.SIGINT)
    assert (done.returncode, done.stdout, done.stderr) == (7, "begun\n", "")
    assert time.monotonic() - started < 300


def test_signal_that_arrives_as_the_work_ends_prints_no_traceback():
    work = """
import d2f_fast.stopping

def written():
    os.kill(os.getpid(), signal.SIGTERM)
    return True

d2f_fast.stopping.output_is_read = written

def work():
    print('begun', flush=True)
    return 0
"""
    done = run(work)
    assert (done.returncode, done.stderr) == (0, "")


def test_main_thread_that_waits_in_foreign_code_does_not_keep_the_command():
    work = """
import ctypes, threading
import d2f_fast.stopping
d2f_fast.stopping.PATIENCE_SECONDS = 0.2

def work():
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    threading.Timer(0.5, print, ('begun',), {'flush': True}).start()
    libc.pthread_mutex_lock(mutex)  # This second call waits for ever, and no signal ends it.
"""
    done = run(work, signal.SIGTERM)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")


def test_ignored_signal_stays_ignored():
    work = """
signal.signal(signal.SIGINT, signal.SIG_IGN)

def work():
    print('begun', flush=True)
    time.sleep(0.3)
    return 0
"""
    assert run(work, signal.SIGINT).returncode == 0


def test_handlers_from_before_return_when_the_process_goes_on():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], sys.unraisablehook

    def stopped() -> int:
        raise StopRequestedError(signal.SIGTERM)

    assert run_until_stopped("d2f", stopped, ends_process=False) == 143
    assert ([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], sys.unraisablehook) == before


SLOW_IMPORT = """
import importlib.abc, runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            print('begun', flush=True)
            time.sleep(600)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("start", "imported", "program"),
    [
        ("runpy.run_module('d2f_fast', run_name='__main__')", "d2f_fast.commands.main", "d2f"),
        ("runpy.run_module('d2f_fast.export.to_onnx', run_name='__main__')", "d2f_fast.export.options", "to_onnx.py"),
    ],
)
def test_signal_during_the_first_imports_ends_the_command_in_one_line(start, imported, program):
    command = [sys.executable, "-c", SLOW_IMPORT + start, imported]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=600)[1]
    assert (process.returncode, errors) == (130, f"{program}: stopped by SIGINT\n")


@pytest.mark.parametrize("output", ["'x' * 10", "'x' * 10**6"])
def test_command_whose_output_has_no_reader_ends_quietly(output):
    work = f"""
def work():
    print('begun', flush=True)
    sys.stdin.read()
    print({output})
    return 0
"""
    code = f"{START}{work}\nsys.exit(run_until_stopped('d2f', work, ends_process=True))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True) as process:
        assert process.stdout is not None and process.stdin is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, "")


def test_help_whose_output_has_no_reader_ends_quietly():
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        command = [sys.executable, "-m", "d2f_fast", "train", "--help"]
        done = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (141, "")


def test_broken_pipe_to_another_program_is_an_error_of_the_work():
    def work() -> int:
        raise BrokenPipeError("another program")

    with pytest.raises(BrokenPipeError, match="another program"):
        run_until_stopped("d2f", work, ends_process=False)
