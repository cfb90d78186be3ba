"""A process of its own for a user's reward function: calls with a deadline, and a fresh start."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.rewards import function_worker
from rlhf_ray.rewards.user_function import Signature

Scores = list[float | None]


class LateError(Exception):
    """A call missed its deadline; its process was killed."""


class _GoneError(Exception):
    """The process ended before it answered."""


def _future() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # who waits may give up; the answer must still fit
    return future


@dataclass
class _Call:
    """One call of the function, in one process."""

    process: "_Process | None" = None
    """None: not sent."""

    began: Future[None] = field(default_factory=_future)
    scores: Future[Scores] = field(default_factory=_future)

    def fail(self) -> None:
        """Let whoever waits for it learn that the process is gone."""
        for future in (self.began, self.scores):
            with suppress(InvalidStateError):
                future.set_exception(_GoneError())

    def abandon(self) -> None:
        """End its process, where nobody waits any more; other calls are then made again."""
        if self.process and not self.scores.done():
            self.process.kill()


class _Process:
    """One process, from its start to its end."""

    def __init__(self, name: str, spec: str, signature: Signature) -> None:
        """
        Raises:
            ConfigError: the function cannot be loaded.
        """
        ours, theirs = socket.socketpair()
        # -P: a file of the user's that is named as a library must not stand for it.
        command = [sys.executable, "-P", "-m", function_worker.__name__, str(theirs.fileno())]
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        with theirs:
            self.popen = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the run's to handle; and it ends as a group
            )
        self.connection = Connection(ours.detach())
        self.calls: dict[int, _Call] = {}
        self.was_killed = False
        try:
            self.connection.send((name, spec, signature))
            failure = self.connection.recv()
        except (EOFError, OSError):
            failure = ConfigError(f"rewards: {name}: {spec} cannot be loaded: {self.ending()}")
        if failure is not None:
            self.kill()
            raise failure
        threading.Thread(target=_listen, args=(self.connection, self.calls), daemon=True).start()

    def kill(self) -> None:
        """Kill the process and what it started."""
        self.was_killed = True
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def ending(self) -> str:
        """Describe how it ended by itself."""
        code = self.popen.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return f"its process {how}"


def _listen(connection: Connection, calls: dict[int, _Call]) -> None:
    """Hand out answers until the process ends; then every call that is left fails."""
    with connection, suppress(EOFError, OSError):
        while True:
            number, answer = connection.recv()
            if answer == function_worker.BEGAN:
                calls[number].began.set_result(None)
            elif isinstance(answer, RlhfError):
                calls.pop(number).scores.set_exception(answer)
            else:
                calls.pop(number).scores.set_result(answer)
    for call in list(calls.values()):
        call.fail()


class FunctionProcess:
    """Calls a function in a long-lived process, which is started again after it was killed."""

    def __init__(self, name: str, spec: str, signature: Signature, timeout_s: float) -> None:
        """Load the function in its process.

        Raises:
            ConfigError: the function cannot be loaded.
        """
        self._start = partial(_Process, name, spec, signature)
        self._described = f"rewards: {name}: {spec}"
        self._timeout_s = timeout_s
        self._numbers = count()
        # A thread that lives as long as this object: Linux ends the process with the thread that
        # started it. It also sends, because a busy process may not read yet.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._process = [self._thread.submit(self._start).result()]
        weakref.finalize(self, _kill_all, self._process)

    async def scores(
        self, args: Sequence[object], named: Mapping[str, object], num_responses: int
    ) -> Scores:
        """Return the function's scores, as `UserFunction.scores` does.

        Raises:
            LateError: the function did not return in time.
            RlhfError: raised by the function, or its process ended.
        """
        loop = asyncio.get_running_loop()
        while True:
            call = _Call()
            send = partial(self._send, call, (args, named, num_responses))
            try:
                await loop.run_in_executor(self._thread, send)
                await asyncio.wrap_future(call.began)
                return await asyncio.wait_for(asyncio.wrap_future(call.scores), self._timeout_s)
            except TimeoutError:
                call.abandon()
                raise LateError from None
            except asyncio.CancelledError:
                self._thread.submit(call.abandon)  # once it is sent, if it still is
                raise
            except _GoneError:
                # Killed because of another call, which waited before or ran beside: once more.
                if call.process and not call.process.was_killed:
                    raise RlhfError(f"{self._described}: {call.process.ending()}") from None

    def _send(self, call: _Call, message: tuple[object, ...]) -> None:
        """Send a call to the process, to a fresh one if it has ended."""
        if self._process[0].popen.poll() is not None:
            self._process[0] = self._start()
        process, number = self._process[0], next(self._numbers)
        process.calls[number], call.process = call, process
        try:
            process.connection.send((number, *message))
        except OSError:
            call.fail()


def _kill_all(processes: Sequence[_Process]) -> None:
    for process in processes:
        process.kill()
