"""Find out what code of a stranger, a chat template, needs before it is run here."""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

LONGEST_S = 20.0
"""Longest rendering of a short chat, also on a busy machine; it takes milliseconds."""
MORE_BYTES = 2**30
"""Most memory that it may take."""
LONGEST_TEXT = 10_000_000
"""Most characters that it may write."""


def problem_of(render: Callable[[], str]) -> str | None:
    """Return what is wrong with a rendering that does not end or takes too much; else None.

    It runs in a fork of this process, because neither a loop nor one large product can be stopped
    here. An error that it raises is no problem of this kind.
    """
    child = os.fork()
    if child == 0:
        _render_and_exit(render)
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.waitstatus_to_exitcode(status) == 0:
                return None
            return f"takes more than {MORE_BYTES / 1e9:.0f} GB or writes {LONGEST_TEXT} characters"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"does not end within {LONGEST_S:g} s"


def _render_and_exit(render: Callable[[], str]) -> NoReturn:
    """Exit with 0 if the rendering stays within the limits, whatever else happens."""
    code = 1
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        limit = pages * resource.getpagesize() + MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        code = int(len(render()) > LONGEST_TEXT)
    except (MemoryError, RecursionError):
        pass
    except Exception:
        code = 0
    finally:
        os._exit(code)  # without the parent's exit handlers
