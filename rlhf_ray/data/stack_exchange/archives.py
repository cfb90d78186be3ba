"""Dumps where they lie: Posts.xml as it is or compressed, on a disk or an object store."""

import bz2
import gzip
import lzma
import os
import queue
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import IO, Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from rlhf_ray.config.data import EXPANSION, PACKED
from rlhf_ray.errors import ConfigError, DataError

MEMBER = "Posts.xml"
REMEDY = "give the Posts.xml of a Stack Exchange dump, or the .7z that holds it"

MAX_EXPANSION = 200
"""Most times its own size to which an archive may expand."""
LEAST_BYTES = 10**9
"""A member up to this size may be compressed however well."""
_CHUNK = 2**20
_QUEUE = 2
"""Chunks that are unpacked ahead."""
_STALLED_S = 600.0
"""Longest wait for the next chunk: a storage that hangs doesn't answer at all."""

_SITE = re.compile(r"(?:[a-z0-9-]+\.)+(?:com|net|org)")
_SEVEN_ZIP = ".7z"


def _zstd(file: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))


_STREAMS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".zst": _zstd,
    ".gz": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
"""Suffix of a compressed file -> what unpacks it while it is read."""

_BROKEN = (lzma.LZMAError, zlib.error, EOFError, ValueError, OSError, MemoryError)
"""What unpacking a broken file raises; MemoryError: a header claims a dictionary of gigabytes."""


def is_url(path: str) -> bool:
    """Return whether a dump lies on an object store, such as ``s3://bucket/Posts.xml``."""
    return "://" in path


def suffix(path: str) -> str:
    """Return the suffix that tells how a dump is packed; empty if it is plain XML."""
    found = PurePosixPath(path).suffix.lower()
    return found if found in PACKED else ""


def site_name(path: str) -> str | None:
    """Return the site that an archive or a dump's folder is named after; None if it is no site.

    Example:
        >>> site_name("dumps/stackoverflow.com-Posts.7z")
        'stackoverflow.com'
        >>> site_name("s3://dumps/coffee.stackexchange.com/Posts.xml")
        'coffee.stackexchange.com'
    """
    whole = PurePosixPath(path if is_url(path) else os.path.abspath(path))
    is_named = suffix(path) and not whole.name.startswith(MEMBER)
    name = whole.stem.removesuffix(".xml").removesuffix("-Posts") if is_named else whole.parent.name
    return name if _SITE.fullmatch(name) else None


def packed_bytes(path: str) -> int:
    """Return the size of a dump's file.

    Raises:
        DataError: it cannot be read, is a folder, or is empty.
    """
    if not is_url(path) and Path(path).is_dir():
        raise DataError(f"{path} is a folder; give the {MEMBER} inside it")
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
    if not size:
        raise DataError(f"{path} is empty (0 bytes); {REMEDY}")
    return size


def num_xml_bytes(path: str) -> int:
    """Return the bytes of a dump's XML; of an archive that doesn't tell, five times its size.

    Raises:
        DataError: the file cannot be read.
        ConfigError: a .7z cannot be unpacked without py7zr.
    """
    size, packing = packed_bytes(path), suffix(path)
    if packing != _SEVEN_ZIP:
        return size * EXPANSION if packing else size
    with opened(path) as file, _read_seven_zip(path, file) as archive:
        return int(next(m for m in archive.list() if m.filename == MEMBER).uncompressed)


def stamp(path: str) -> str:
    """Return what changes with a dump's content: its size, and when it was written.

    Raises:
        DataError: it cannot be read.
    """
    size = packed_bytes(path)
    if not is_url(path):
        return f"{os.path.abspath(path)}:{size}:{os.stat(path).st_mtime_ns}"
    files, name = fsspec.url_to_fs(path)
    found = files.info(name)
    return f"{path}:{size}:{found.get('ETag') or found.get('mtime') or found.get('updated')}"


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a dump's file as it is, wherever it lies.

    Raises:
        DataError: it cannot be read.
        ConfigError: the package for its object store is not installed.
    """
    try:
        if is_url(path):
            files, name = fsspec.url_to_fs(path)
            file = files.open(name, "rb")
        else:
            file = Path(path).open("rb")  # noqa: SIM115  (closed below)
    except (ImportError, ValueError) as error:  # ValueError: a protocol that nobody knows
        raise ConfigError(f"Cannot open {path}: {error}") from error
    except Exception as error:  # object stores raise errors of their own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"Cannot read {path}: {reason}; {REMEDY}") from None
    with file:
        yield cast(BinaryIO, file)


def unpacked(path: str) -> Iterator[bytes]:
    """Yield the XML of a packed dump chunk by chunk, as it is unpacked; nothing lies on the disk.

    Raises:
        DataError: it is broken, has a password, holds no Posts.xml, or is no dump by its size.
        ConfigError: py7zr is not installed.
    """
    limit = max(MAX_EXPANSION * packed_bytes(path), LEAST_BYTES)
    num_bytes = 0
    with opened(path) as file:
        is_archive = suffix(path) == _SEVEN_ZIP
        chunks = _unpacked_7z(path, file) if is_archive else _decompressed(path, file)
        for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise DataError(
                    f"{path} expands to more than {limit / 1e9:.1f} GB; dumps expand to about ten "
                    "times. It is no dump: download it again"
                )
            yield chunk


def _decompressed(path: str, file: BinaryIO) -> Iterator[bytes]:
    try:
        with _STREAMS[suffix(path)](file) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except _BROKEN as error:
        raise DataError(f"{path} is broken or cut off ({error}); download it again") from error


def _unpacked_7z(path: str, file: BinaryIO) -> Iterator[bytes]:
    """Unpack in a thread, as py7zr calls us with what it has unpacked and doesn't wait."""
    chunks: queue.Queue[bytes | Exception | None] = queue.Queue(_QUEUE)
    closed = threading.Event()

    def put(chunk: bytes | Exception | None) -> None:
        while not closed.is_set():
            try:
                return chunks.put(chunk, timeout=0.1)
            except queue.Full:
                continue
        raise EOFError("nobody reads on")

    def unpack() -> None:
        try:
            with _read_seven_zip(path, file) as archive:
                archive.extract(targets=[MEMBER], factory=_handing_over(put))
            put(None)
        except Exception as error:
            if not closed.is_set():
                put(error)

    thread = threading.Thread(target=unpack, name="unpack", daemon=True)
    thread.start()
    try:
        while (chunk := chunks.get(timeout=_STALLED_S)) is not None:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
    except queue.Empty:
        raise DataError(f"Nothing of {path} was read within {_STALLED_S:g} s") from None
    finally:
        closed.set()
        thread.join(_STALLED_S)


def _handing_over(put: Callable[[bytes], None]) -> object:
    """Return a py7zr WriterFactory whose only file passes on what is written to it."""
    py7zr = _py7zr()

    class Writer(py7zr.io.Py7zIO):  # type: ignore[misc, name-defined]
        num_bytes = 0

        def write(self, data: bytes | bytearray) -> int:
            self.num_bytes += len(data)
            put(bytes(data))
            return len(data)

        def read(self, size: int | None = None) -> bytes:
            return b""

        def seek(self, offset: int, whence: int = 0) -> int:
            return 0

        def flush(self) -> None:
            pass

        def size(self) -> int:
            return self.num_bytes

    class Factory(py7zr.io.WriterFactory):  # type: ignore[misc, name-defined]
        def create(self, filename: str) -> Writer:
            return Writer()

    return Factory()


@contextmanager
def _read_seven_zip(path: str, file: BinaryIO) -> Iterator[Any]:
    py7zr = _py7zr()
    try:
        with py7zr.SevenZipFile(file, blocksize=_CHUNK) as archive:
            names = archive.getnames()
            if MEMBER not in names:
                raise DataError(
                    f"{path} holds no {MEMBER} but {', '.join(names[:8])}; of a site that comes in "
                    "several archives give the one whose name ends in "
                    f"{MEMBER.removesuffix('.xml')}"
                )
            yield archive
    except py7zr.exceptions.PasswordRequired as error:
        raise DataError(
            f"{path} is locked by a password; unpack it and give its {MEMBER}"
        ) from error
    except (py7zr.exceptions.ArchiveError, *_BROKEN) as error:
        raise DataError(
            f"{path} is broken or no 7z archive ({error}); download it again"
        ) from error


def _py7zr() -> ModuleType:
    try:
        import py7zr
        import py7zr.io
    except ImportError as error:
        raise ConfigError(
            "prepare.posts names a .7z archive, which needs py7zr: pip install 'rlhf-ray[7z]', or "
            "unpack the archive first"
        ) from error
    return py7zr
