"""Write files whole or not at all, and report a full disk as one clear message."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.errors import ConfigError, RlhfError

LEAST_FREE_BYTES = 2**20
"""Less free space than this counts as a full disk."""


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all: readers see the old text or the new one, never a part.

    Raises:
        ConfigError: the disk is full or the folder cannot be written.
    """
    # Several processes may write the same file (a run's requests), each through a file of its own.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with unwritable_is_an_error(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


@contextmanager
def unwritable_is_an_error(path: Path) -> Iterator[None]:
    """Report an OSError of the block as one clear message about ``path``.

    Raises:
        ConfigError: the disk is full, or a permission is missing.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another "
            "run.dir; what was written before is kept, and the run can be resumed"
        ) from error


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """Report whatever a library makes of a full disk as one clear message.

    Libraries differ: an OSError, a RuntimeError without a reason (torch.save), or an error that
    another process wrapped. So the free space is looked up as well.

    Raises:
        ConfigError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        is_clear = isinstance(error, RlhfError) and error.exit_code == 2
        if is_clear or not (_says_full(error) or shutil.disk_usage(folder).free < LEAST_FREE_BYTES):
            raise
        raise ConfigError(
            f"The disk is full ({folder}): {type(error).__name__}: {error}. Free space or choose "
            "another run.dir; what was written before is kept, and the run can be resumed"
        ) from error


def _says_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or os.strerror(errno.ENOSPC) in str(error)
