"""The process in which a user's reward function runs; `function_process` starts it.

The function has the main thread, so that it may use signals, and the process for itself: it may
hang, exit or crash without harm to the run. Run as a module with the file descriptor of a socket.
"""

import asyncio
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue

from rlhf_ray.errors import RlhfError
from rlhf_ray.observability.lasting_output import keep_output
from rlhf_ray.rewards.user_function import UserFunction

PR_SET_PDEATHSIG = 1

BEGAN = "began"
"""Answer that a call has begun: its deadline runs from here, not from behind those before it."""

Work = tuple[Callable[[], object], Future[object]]


class _Calls:
    """Takes calls in a thread, so that the main thread is the function's, without an event loop.

    A function may then run a loop of its own. What an async function awaits runs in the thread.
    """

    def __init__(self, connection: Connection, function: UserFunction) -> None:
        self._connection = connection
        self._function = function
        self._works = SimpleQueue[Work]()
        self._sending = threading.Lock()

    def work(self) -> None:
        """Do in this thread what the calls ask for; the process ends when the socket is closed."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            work, future = self._works.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _listen(self) -> None:
        asyncio.run(self._take())
        os._exit(0)  # the function may hang

    async def _take(self) -> None:
        loop, calls = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        while True:
            try:
                call = await loop.run_in_executor(None, self._connection.recv)
            except (EOFError, OSError):
                return
            task = loop.create_task(self._answer(*call))
            calls.add(task)
            task.add_done_callback(calls.discard)

    async def _answer(
        self, number: int, args: Sequence[object], named: Mapping[str, object], count: int
    ) -> None:
        try:
            run = partial(self._run, number)
            answer = await self._function.scores(args, named, count, run=run)
        except RlhfError as error:
            answer = error
        except BaseException as error:  # an interrupt that an async function raised
            answer = RlhfError(f"a reward function raised {type(error).__name__}: {error}")
        self._send(number, answer)

    def _run(self, number: int, work: Callable[[], object]) -> Awaitable[object]:
        def begin() -> object:
            # From the main thread: a function that never lets go of the interpreter would keep
            # every other thread from it.
            self._send(number, BEGAN)
            return work()

        future = Future[object]()
        self._works.put((begin, future))
        return asyncio.wrap_future(future)

    def _send(self, number: int, answer: object) -> None:
        with self._sending:
            self._connection.send((number, answer))


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
    _Calls(connection, function).work()


if __name__ == "__main__":
    main(int(sys.argv.pop()))  # a function that reads its arguments finds none
