"""The process in which a user's reward function runs; `function_process` starts it.

The function has the main thread, so that it may use signals, and the process for itself: it may
hang, exit or crash without harm to the run. Run as a module with the file descriptor of a socket.
"""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.user_function import UserFunction, run_here

PR_SET_PDEATHSIG = 1

BEGAN = "began"
"""Answer that a call has begun: its deadline runs from here, not from behind those before it."""


async def _serve(connection: Connection) -> None:
    name, spec, signature = connection.recv()
    try:
        function = UserFunction(name, spec, signature, run_here)
    except RlhfError as error:
        connection.send(error)
        return
    connection.send(None)
    loop, calls = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    while True:
        try:
            call = await loop.run_in_executor(None, connection.recv)
        except (EOFError, OSError):
            return
        task = loop.create_task(_answer(connection, function, *call))
        calls.add(task)
        task.add_done_callback(calls.discard)


async def _answer(
    connection: Connection,
    function: UserFunction,
    number: int,
    args: Sequence[object],
    named: Mapping[str, object],
    count: int,
) -> None:
    connection.send((number, BEGAN))
    try:
        answer = await function.scores(args, named, count)
    except RlhfError as error:
        answer = error
    except BaseException as error:  # an interrupt that the function raised itself
        answer = RlhfError(f"a reward function raised {type(error).__name__}: {error}")
    connection.send((number, answer))


def main(descriptor: int) -> None:
    """Serve calls until the socket is closed."""
    # Dies with the run, however that ends: nobody else would end a function that hangs.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    asyncio.run(_serve(Connection(descriptor)))
    os._exit(0)  # threads that the function left must not keep the process


if __name__ == "__main__":
    main(int(sys.argv[1]))
