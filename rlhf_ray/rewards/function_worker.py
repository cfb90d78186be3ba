"""The process in which a user's reward function runs; `function_process` starts it.

The function has the main thread, so that it may use signals, and the process for itself: it may
hang, exit or crash without harm to the run. Run as a module with the file descriptor of a socket.
"""

import asyncio
import ctypes
import inspect
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Mapping, Sequence
from multiprocessing.connection import Connection

from rlhf_ray.errors import RlhfError
from rlhf_ray.observability.lasting_output import keep_output
from rlhf_ray.rewards.user_function import UserFunction

PR_SET_PDEATHSIG = 1

BEGAN = "began"
"""Answer that a call has begun: its deadline runs from here, not from behind those before it."""


class _Calls:
    """Answers calls in the main thread, which has no event loop: a function may run its own.

    What an async function returns is awaited in a thread, beside the calls that follow.
    """

    def __init__(self, connection: Connection, function: UserFunction) -> None:
        self._connection = connection
        self._function = function
        self._sending = threading.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def answer_all(self) -> None:
        """Answer calls until the socket is closed."""
        while True:
            try:
                call = self._connection.recv()
            except (EOFError, OSError):
                return
            self._answer(*call)

    def _answer(
        self, number: int, args: Sequence[object], named: Mapping[str, object], count: int
    ) -> None:
        self._send(number, BEGAN)
        try:
            result = self._function.call(args, named)
            if inspect.isawaitable(result):
                later = self._answer_later(number, result, count)
                asyncio.run_coroutine_threadsafe(later, self._loop)
                return
            answer = self._function.scores(result, count)
        except BaseException as error:
            answer = _as_answer(error)
        # From this thread: a next call that never lets go of the interpreter would keep it back.
        self._send(number, answer)

    async def _answer_later(self, number: int, result: Awaitable[object], count: int) -> None:
        try:
            answer = self._function.scores(await self._function.awaited(result), count)
        except BaseException as error:
            answer = _as_answer(error)
        self._send(number, answer)

    def _send(self, number: int, answer: object) -> None:
        with self._sending:
            self._connection.send((number, answer))


def _as_answer(error: BaseException) -> RlhfError:
    if isinstance(error, RlhfError):
        return error
    return RlhfError(f"a reward function raised {type(error).__name__}: {error}")


def main(descriptor: int) -> None:
    """Serve calls until the socket is closed."""
    # Dies with the run, however that ends: nobody else would end a function that hangs.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    keep_output()  # a function that prints must not end a run whose output nobody reads
    connection = Connection(descriptor)
    name, spec, signature = connection.recv()
    try:
        function = UserFunction(name, spec, signature)
    except RlhfError as error:
        connection.send(error)
        return
    connection.send(None)
    _Calls(connection, function).answer_all()
    os._exit(0)  # threads that the function left must not keep the process


if __name__ == "__main__":
    main(int(sys.argv.pop()))  # a function that reads its arguments finds none
