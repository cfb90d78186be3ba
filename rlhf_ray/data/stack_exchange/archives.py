"""Archives of data dumps: a site's Posts.xml, mostly inside a .7z."""

import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ray.errors import ConfigError, DataError

MEMBER = "Posts.xml"

MAX_EXPANSION = 200
"""Most times its own size to which an archive may expand."""
LEAST_BYTES = 10**9
"""A member up to this size may be compressed however well."""

_SITE = re.compile(r"(?:[a-z0-9-]+\.)+(?:com|net|org)")


def site_name(path: Path) -> str | None:
    """Return the site that an archive or a dump's folder is named after; None if it is no site.

    Example:
        >>> site_name(Path("dumps/stackoverflow.com-Posts.7z"))
        'stackoverflow.com'
        >>> site_name(Path("coffee.stackexchange.com/Posts.xml"))
        'coffee.stackexchange.com'
    """
    is_archive = path.suffix.lower() == ".7z"
    name = path.stem.removesuffix("-Posts") if is_archive else path.absolute().parent.name
    return name if _SITE.fullmatch(name) else None


@contextmanager
def unpacked(path: Path, work_dir: Path) -> Iterator[Path]:
    """Give a dump's Posts.xml: the file itself, or a copy unpacked from a .7z and removed after.

    Args:
        path: Posts.xml, or an archive that holds it.
        work_dir: folder to unpack in; needs about ten times the archive's size.

    Raises:
        ConfigError: py7zr is not installed.
        DataError: the archive is broken, has a password, or holds no Posts.xml.
    """
    if path.suffix.lower() != ".7z" or path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dump-", dir=work_dir) as folder:
        _extract(path, folder)
        yield Path(folder) / MEMBER


def _extract(path: Path, folder: str) -> None:
    py7zr = _py7zr()
    try:
        with py7zr.SevenZipFile(path) as archive:
            names = archive.getnames()
            if MEMBER in names:
                _require_room(path, next(m for m in archive.list() if m.filename == MEMBER), folder)
                archive.extract(folder, targets=[MEMBER])
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}") from error
    except py7zr.exceptions.PasswordRequired as error:
        raise DataError(
            f"{path} is locked by a password; unpack it and give its Posts.xml"
        ) from error
    except (
        py7zr.exceptions.ArchiveError,
        lzma.LZMAError,
        zlib.error,
        EOFError,
        MemoryError,  # a header that claims a dictionary of gigabytes
        ValueError,
    ) as error:
        raise DataError(
            f"{path} is broken or no 7z archive ({error}); download it again"
        ) from error
    if MEMBER not in names:
        raise DataError(
            f"{path} holds no {MEMBER} but {', '.join(names[:8])}; of a site that comes in several "
            f"archives give the one whose name ends in {MEMBER.removesuffix('.xml')}"
        )


def _require_room(path: Path, member: Any, folder: str) -> None:
    """Refuse a member that could not be a dump's, or that fills the disk.

    Raises:
        DataError: naming its size and the limit.
    """
    size, packed = int(member.uncompressed), path.stat().st_size
    if size > max(MAX_EXPANSION * packed, LEAST_BYTES):
        raise DataError(
            f"{path}: {MEMBER} would have {size / 1e9:.1f} GB, {size / packed:.0f} times the "
            f"archive; dumps expand to about ten times. It is no dump: download it again"
        )
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{path}: {MEMBER} needs {size / 1e9:.1f} GB in {folder}, which has "
            f"{free / 1e9:.1f} GB free; free space, or unpack it elsewhere and give its Posts.xml"
        )


def _py7zr() -> ModuleType:
    try:
        import py7zr
    except ImportError as error:
        raise ConfigError(
            "prepare.posts names a .7z archive, which needs py7zr: pip install 'rlhf-ray[7z]', or "
            "unpack the archive first"
        ) from error
    return py7zr
