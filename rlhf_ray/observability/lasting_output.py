"""Standard output and error of a run.

Nobody may be reading them any more (``rlhf-ray run ... | head -1``), and what libraries print, here
or in the processes whose lines Ray prints here, may hold secrets.
"""

import errno
import io
import os
import sys
from typing import TextIO

from typing_extensions import Buffer

from rlhf_ray.secrecy import redacted

_GONE = {errno.EPIPE, errno.EIO, errno.EBADF}
"""Errors of a pipe without a reader, a terminal that was closed, a descriptor that never was."""


def keep_output() -> None:
    """Let no write to standard output or error fail, or show a secret, from now on.

    What nobody reads goes to the null device, under the same descriptor: libraries and processes
    that this one starts write there as well. Streams that a caller has put in place stay.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _lasting(sys.__stdout__, 1)  # type: ignore[misc]
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _lasting(sys.__stderr__, 2)  # type: ignore[misc]


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    if isinstance(stream, _LastingText):
        return stream
    if stream is None:  # closed when Python began: the next file to be opened would take its place
        _to_null(descriptor)
    else:
        stream.flush()
    return _LastingText(
        io.BufferedWriter(_LastingFile(descriptor, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors=(stream.errors if stream else None) or "backslashreplace",
        line_buffering=True,
    )


class _LastingText(io.TextIOWrapper):
    """Text over a `_LastingFile`, without secrets."""

    def write(self, text: str, /) -> int:
        super().write(redacted(text))
        return len(text)


class _LastingFile(io.FileIO):
    def write(self, data: Buffer, /) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError as error:  # of a full disk the text is lost, but what follows may fit
            if error.errno in _GONE:
                _to_null(self.fileno())
            return size
        return size if written is None else written  # None: it would block


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
