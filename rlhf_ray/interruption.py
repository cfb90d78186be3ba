"""SIGTERM and Ctrl-C: what a command still finishes, and by when it exits.

    first signal   work within `deferred` ends by itself; elsewhere KeyboardInterrupt is raised
    after 45 s     such work is called late
    after 55 s     the process exits at once, as it does on a second signal

The exit code is 128 plus the signal's number, with which schedulers start a job again. A thread
keeps these times, because the main thread may be in a library that doesn't come back.
"""

import asyncio
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
Stop = Callable[[bool], None]
"""Called when a signal has come, and again when its work is late, with whether it is."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S, LIMIT_S = 45.0, 55.0
"""Time after the first signal for work in hand, and for everything."""
SAME_S = 0.5
"""Signals within this time are one: Ray's job server signals a parent, which passes it on, and its
child as well."""
CLEAN_UP_S = 4.0
"""Time for cleaning up where the process exits at once."""


@dataclass
class _State:
    """What this process knows of its signals."""

    first: int | None = None
    """Number of the first one."""
    is_active: bool = False
    is_handled: bool = False
    is_late: bool = False
    deferring: list[Stop] = field(default_factory=list)
    cleaners: list[Callable[[], None]] = field(default_factory=list)
    kept: Callable[[], str] = lambda: "What was written is kept; the command can be run again"


_state = _State()


@contextmanager
def handled() -> Iterator[None]:
    """Handle SIGTERM and SIGINT in this block, in the main thread of a command."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def handle(number: int, _: FrameType | None) -> None:
        if _state.first is None:  # a library may have replaced the wake-up file
            os.write(writer, bytes([number]))
        _handle(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_keep_times, args=(reader,), daemon=True, name="signals").start()
    _state.is_active = True
    try:
        yield
    finally:
        if _state.first is None:  # else the thread ends a process that doesn't end by itself
            _state.is_active = False
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writer)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Handle the signals after this block as before it, whatever a library installs in it.

    `ray.init` installs a bare exit; Ray's core, below Python, calls what it found before, but
    aborts the process 3 s after SIGTERM.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # else it was not installed from Python
                    signal.signal(number, handler)


def exit_code() -> int | None:
    """Return the exit code of an interrupted process; None: no signal has come."""
    return None if _state.first is None else 128 + _state.first


def explain(kept: Callable[[], str]) -> None:
    """Set what finds out, at the end, what was kept and how to resume."""
    _state.kept = kept


def explanation() -> str:
    """Return what the command says last."""
    return f"Interrupted. {_state.kept()}"


@contextmanager
def deferred(stop: Stop) -> Iterator[None]:
    """Have a signal call ``stop`` instead of raising KeyboardInterrupt in this block.

    The call comes between any two steps of the main thread, so ``stop`` only sets a flag, wakes an
    event loop, or raises KeyboardInterrupt.
    """
    _state.deferring.append(stop)
    try:
        yield
    finally:
        _state.deferring.remove(stop)


@contextmanager
def cleaned_up_by(clean_up: Callable[[], None]) -> Iterator[None]:
    """Have ``clean_up`` called where the process exits at once in this block."""
    _state.cleaners.append(clean_up)
    try:
        yield
    finally:
        _state.cleaners.remove(clean_up)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine as `asyncio.run` does; a signal cancels it.

    Raises:
        KeyboardInterrupt: after a signal, once the coroutine has closed what it had open.
    """

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(is_late: bool) -> None:
            if not is_late:
                loop.call_soon_threadsafe(task.cancel)

        with deferred(stop):
            return await main

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        if _state.first is None:
            raise
        raise KeyboardInterrupt from None


class Droppable:
    """The work of a coroutine that an interruption drops; what it does outside ends by itself."""

    def __init__(self) -> None:
        self.is_dropped = False
        self._task: asyncio.Task[Any] | None = None

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that `drop` cancels, before or after it begins."""
        task = self._task = asyncio.ensure_future(work)
        if self.is_dropped:
            task.cancel()
        try:
            return await task
        finally:
            self._task = None

    def drop(self) -> None:
        """Cancel the present work, and all that comes."""
        self.is_dropped = True
        if self._task is not None:
            self._task.cancel()


def _handle(number: int) -> None:
    """Begin the end in the main thread, or call it late."""
    _state.first = _state.first or number
    if _state.is_handled and not _state.is_late:
        return  # a second one: the thread ends the process
    is_late, _state.is_handled = _state.is_handled, True
    if _state.deferring:
        _state.deferring[-1](is_late)
    elif not is_late:
        raise KeyboardInterrupt


def _keep_times(reader: int) -> None:
    number = _next_signal(reader, None)
    if number is None:
        os.close(reader)
        return
    _state.first = number
    started = time.monotonic()
    name = signal.Signals(number).name
    message = (
        f"\n{name}: ending within {LIMIT_S + CLEAN_UP_S:.0f} s; a second signal ends at once\n"
    )
    with suppress(OSError):
        os.write(2, message.encode())
    for limit_s in (GRACE_S, LIMIT_S):
        time.sleep(SAME_S)
        while select.select([reader], [], [], 0)[0]:
            os.read(reader, 1)
        if _next_signal(reader, started + limit_s) is not None:
            break
        if limit_s == GRACE_S:
            _state.is_late = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)  # runs `_handle`
    _exit_at_once(128 + number)


def _next_signal(reader: int, until: float | None) -> int | None:
    """Wait for a signal of ours; return None where none came in time, or none will."""
    while True:
        left_s = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([reader], [], [], left_s)[0]:
            return None
        if not (read := os.read(reader, 1)):
            return None
        if read[0] in SIGNALS:
            return read[0]


def _exit_at_once(code: int) -> None:
    """Exit without unwinding the main thread, but leave no process and no shared memory."""

    deadline = time.monotonic() + CLEAN_UP_S
    cleaning = [threading.Thread(target=each, daemon=True) for each in _state.cleaners]
    for thread in cleaning:
        thread.start()
    for thread in cleaning:
        thread.join(max(0.0, deadline - time.monotonic()))
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    with suppress(Exception):
        os.write(2, f"{explanation()}\n".encode())
    os._exit(code)


def _restore_defaults() -> None:
    """Have a forked child neither write to this process's pipe nor unwind this process's work."""
    if _state.is_active:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


os.register_at_fork(after_in_child=_restore_defaults)
