"""A driver in a child process, which is started again after it died.

    rlhf-ray run --retries N  -->  rlhf-ray run  -- dies -->  rlhf-ray run run.resume=auto  --> ...

This process is the entry point of a job, or runs in a terminal; it loads neither torch nor Ray.
Signals it passes on, and if it is killed the driver ends as well.
"""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rlhf_ray import interruption
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.repeated import GrowingWait
from rlhf_ray.runs.control import ControlFiles

DRIVER = (sys.executable, "-P", "-m", "rlhf_ray")
"""Start of a driver's command line; -P: as for the command ``rlhf-ray``, no module is found in the
current folder."""
RESUME = "run.resume=auto"
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 300.0
"""Wait before the first retry, and the longest."""
ENDED = {0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM}
"""Exit codes of a driver that is not started again: done, its user's error, or told to end."""
PR_SET_PDEATHSIG = 1


def run_with_retries(
    command: Sequence[str], folder: Path, num_retries: int, say: Callable[[str], None]
) -> int:
    """Run a driver until it ends, starting it again after a death; return its exit code.

    Args:
        command: command line of the driver.
        folder: the run's.
        num_retries: how many times it is started again at most.
        say: prints a line.
    """
    files, wait = ControlFiles(folder), GrowingWait(FIRST_WAIT_S, LONGEST_WAIT_S)
    interruption.explain(lambda: "The driver has ended, and is not started again")
    code = _drive(command)
    for left in reversed(range(num_retries)):
        if interruption.exit_code() is not None or code in ENDED:
            break
        if files.requested().stop:
            break
        if _would_repeat(files):
            say("Not started again: from the same commit it would end in the same way")
            break
        wait_s = wait.next_s()
        say(
            f"The driver died (exit code {code}). It is started again in {wait_s:g} s, to resume "
            f"from what is saved; {left} retries are left after that"
        )
        time.sleep(wait_s)
        code = _drive([*command, RESUME])
    return code


def _drive(command: Sequence[str]) -> int:
    """Run a driver to its end, however that comes; return its exit code as shells give it."""
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(is_late: bool) -> None:
        if not is_late:
            for child in children:
                child.send_signal((interruption.exit_code() or 128 + signal.SIGTERM) - 128)

    def end_at_once() -> None:  # a second signal, which the driver answers by cleaning up at once
        for child in children:
            child.terminate()
            child.wait()

    with interruption.deferred(pass_on), interruption.cleaned_up_by(end_at_once):
        # Also where this process is killed, no driver without a parent may hold the cluster.
        children.append(subprocess.Popen(command, preexec_fn=_end_with_parent))
        if interruption.exit_code() is not None:  # it came before there was a child
            pass_on(False)
        code = children[0].wait()
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _would_repeat(files: ControlFiles) -> bool:
    """Return whether the run ended by an error that the same commit leads to again."""
    with suppress(ConfigError):
        status = files.status()
        return status.state == "failed" and status.repeats
    return False
