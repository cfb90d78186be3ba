"""Write files whole or not at all, keep folders private, and report a full disk as one message."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.errors import ConfigError, RlhfError

DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a damaged JSON file raises: torn, nested too deeply, or of another kind."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a full disk and an exhausted quota."""
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


def temporary_folder() -> Path:
    """Return the folder for temporary files: TMPDIR, else the system's.

    Raises:
        ConfigError: none can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ConfigError(
            f"No folder for temporary files can be written (TMPDIR is "
            f"{os.environ.get('TMPDIR', 'not set')}). Set TMPDIR to a folder of yours with free "
            "space"
        ) from error


def private_name() -> str:
    """Return the name of this user's own folder in one for temporary files."""
    return f"rlhf_ray-{os.getuid()}"


def takes_links(folder: Path) -> bool:
    """Return whether a file system takes symbolic links; some network and FAT ones do not."""
    probe = folder / f".link-{os.getpid()}"
    try:
        probe.symlink_to("nowhere")
    except OSError:
        return False
    probe.unlink()
    return True


def is_private(folder: Path) -> bool:
    """Return whether a path is a folder of this user, not a link, that nobody else can enter."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return is_own and not stat.S_IMODE(found.st_mode) & 0o077


def make_private(folder: Path) -> Path:
    """Make a folder that only this user can enter, for files that others must not plant.

    Raises:
        ConfigError: something else has its name already, such as a folder of another user.
    """
    with unwritable_is_an_error(folder):
        if not os.path.lexists(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise ConfigError(
            f"{folder} is not a folder that only you can enter: it is a link, belongs to another "
            "user, or is open to others, who may have put files there. Remove it (or make it 0700, "
            "if it is yours), or set TMPDIR to a folder of your own"
        )
    return folder


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
        if is_clear or not (says_full(error) or shutil.disk_usage(folder).free < LEAST_FREE_BYTES):
            raise
        raise ConfigError(
            f"The disk is full ({folder}): {type(error).__name__}: {error}. Free space or choose "
            "another run.dir; what was written before is kept, and the run can be resumed"
        ) from error


def says_full(error: BaseException) -> bool:
    """Return whether an error, or its message, says that a disk or a quota is full."""
    full = isinstance(error, OSError) and error.errno in FULL
    named = any(os.strerror(code) in str(error) for code in FULL)
    return full or named or (error.__cause__ is not None and says_full(error.__cause__))
