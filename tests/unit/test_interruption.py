"""Commands that get a signal, each in a process of its own, with short times."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlhf_ray import interruption

COMMAND = """
import asyncio, os, subprocess, sys, time
from rlhf_ray import cli, interruption

interruption.GRACE_S, interruption.LIMIT_S, interruption.SAME_S = 1.0, 2.0, 0.2

@cli.app.command()
def work():
    print("working", flush=True)
    try:
        {body}
    finally:
        print("closed", flush=True)

sys.argv = ["rlhf-ray", "work"]
cli.main()
"""
Command = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def command() -> Command:
    """Start a command with the given body, and wait until it works."""

    def start(body: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(body=body)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        time.sleep(0.1)
        return process

    return start


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_unwinds_a_command_and_is_its_exit_code(
    command: Command, number: signal.Signals, code: int
) -> None:
    process = command("time.sleep(60)")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert out == "closed\n"
    assert "Interrupted. What was written is kept" in err
    assert "Traceback" not in err


def test_an_error_after_a_signal_keeps_the_signals_exit_code(command: Command) -> None:
    process = command(
        "with interruption.deferred(lambda _: None): time.sleep(.5); raise ValueError"
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


def test_a_signal_cancels_a_coroutine_which_closes_what_it_had_open(command: Command) -> None:
    process = command("interruption.run(asyncio.sleep(60))")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (143, "closed\n")


def test_work_that_ends_within_its_time_is_finished_and_no_failure(command: Command) -> None:
    process = command("with interruption.deferred(lambda late: print(late)): time.sleep(.5)")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "False\nclosed\n")


def test_late_work_is_called_again_and_then_ended(command: Command) -> None:
    process = command(
        "with interruption.deferred(lambda late: print(late, flush=True)): time.sleep(60)"
    )
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 143
    assert out == "False\nTrue\n", "its main thread did not come back"
    assert 1.5 < time.monotonic() - began < 6


WITH_CHILD = """
        child = subprocess.Popen(['sleep', '60'])
        print(child.pid, flush=True)
        with (
            interruption.cleaned_up_by(lambda: open({file!r}, 'w')),
            interruption.deferred(lambda _: None),
        ):
            time.sleep(60)
"""


def test_a_second_signal_ends_a_command_at_once_without_orphans(
    command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "cleaned"
    process = command(WITH_CHILD.format(file=str(file)))
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "two within a moment are one"
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 130
    end_s = time.monotonic() + 5  # its signal may still be on its way
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end_s
        time.sleep(0.02)
    assert file.exists()


def test_a_signal_to_a_forked_child_is_not_the_commands(command: Command) -> None:
    fork = "pid = os.fork(); pid or time.sleep(60); time.sleep(.3); os.kill(pid, 15)"
    process = command(f"{fork}; print(os.waitpid(pid, 0)[1]); time.sleep(.5)")
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "15\nclosed\n", "")


def test_handlers_that_a_library_installs_are_replaced_by_ours() -> None:
    """That it works for Ray's core as well, below Python, is for `test_loopback.py`."""
    before = signal.getsignal(signal.SIGTERM)
    with interruption.handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


async def test_dropped_work_ends_and_none_begins_afterwards() -> None:
    droppable, begun = interruption.Droppable(), list[int]()

    async def work() -> None:
        begun.append(1)
        await asyncio.sleep(60)

    waiting = asyncio.ensure_future(droppable.wait(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    droppable.drop()
    for waited in (waiting, droppable.wait(work())):
        with pytest.raises(asyncio.CancelledError):
            await waited
    assert begun == [1]
