"""Write files whole or not at all, keep folders private, and report a full disk as one message."""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import FileIO
from pathlib import Path

from rlhf_ray.errors import ConfigError, RlhfError

DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a damaged JSON file raises: torn, nested too deeply, or of another kind."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a full disk and an exhausted quota."""
PASSING = (*FULL, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""Those that may pass by themselves: also the hiccups of a network's file system."""
LEAST_FREE_BYTES = 2**20
"""Less free space than this counts as a full disk."""
_large_files: ContextVar[Path | None] = ContextVar("_large_files", default=None)


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


class AppendedFile:
    """A file that grows; what a full disk refuses is kept, and written with what comes next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._rest = b""
        self._lock = threading.RLock()  # the watchdog writes warnings from a thread

    def write(self, content: str | bytes) -> None:
        """Append a text or bytes; readers see it at once, unless the disk is full."""
        with self._lock:
            self._rest += content.encode() if isinstance(content, str) else content
            try:
                self.flush()
            except OSError as error:
                if not may_pass(error):
                    raise

    def flush(self) -> None:
        """Write what the disk has refused so far.

        Raises:
            OSError: it still does.
        """
        with self._lock:
            while self._rest:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = FileIO(self._path, "a")
                self._rest = self._rest[self._file.write(self._rest) :]

    def sync(self) -> None:
        """Make what was written durable."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the rest and close the file; a later text opens it again."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a file for this process in the block; yield False if another process has the lock.

    The system releases it when the process dies. On a file system without locks all get it.

    Raises:
        ConfigError: the file cannot be made.
    """
    with unwritable_is_an_error(path):
        file = path.open("a")
    with file:
        try:
            # Of the process: a lock of the open file would be kept by children that outlive it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError as error:
            is_ours = error.errno not in (errno.EACCES, errno.EAGAIN)
        yield is_ours


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


def large_files_folder() -> Path | None:
    """Return the folder for temporary files that grow with the data; None: that of all others."""
    return _large_files.get()


@contextmanager
def large_files_in(folder: Path) -> Iterator[None]:
    """Have temporary files that grow with the data in another folder, within the block."""
    before = _large_files.set(folder)
    try:
        yield
    finally:
        _large_files.reset(before)


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
    return _is_of(error, FULL)


def may_pass(error: BaseException) -> bool:
    """Return whether the same may be written later: see `PASSING`."""
    return _is_of(error, PASSING)


def _is_of(error: BaseException, codes: Sequence[int]) -> bool:
    is_one = isinstance(error, OSError) and error.errno in codes
    named = any(os.strerror(code) in str(error) for code in codes)
    return is_one or named or (error.__cause__ is not None and _is_of(error.__cause__, codes))
