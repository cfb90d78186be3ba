"""What of the working folder travels with a job: code, configs and small files; packed as a zip."""

import os
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from rlhf_ray.errors import ConfigError

MAX_BYTES = 100 * 10**6
"""Largest sum of files; Ray's job server takes no request over 100 MiB."""

LEFT_OUT_AT_THE_TOP = ("runs", "data")
"""Folders that are read from where the cluster keeps them; deeper down, names of code."""

LEFT_OUT_ANYWHERE = (
    *(".git", ".venv", "venv", "node_modules", "wandb", "mlruns"),
    *("__pycache__", "*.egg-info", ".*_cache", ".hypothesis", ".ipynb_checkpoints"),
    *("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.arrow", "*.parquet", "*.7z"),
    *(".env", ".env.*", ".netrc", "*.pem", "*.key"),  # secrets
)
"""Names, or patterns of names, of files and folders."""

NUM_NAMED = 5
"""How many of the biggest files a refusal names."""


def pack(folder: Path, extra: dict[str, str], archive: Path) -> int:
    """Write the archive of a working folder; returns the number of files.

    Args:
        folder: packed without what is left out above and without what Git ignores.
        extra: name in the archive -> text of files that are added, over any that are there.
        archive: to be written.

    Raises:
        ConfigError: the files are too large together.
    """
    files = [path for path in _files(folder) if path.as_posix() not in extra]
    _require_small(folder, files)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as packed:
        for path in files:
            packed.write(folder / path, path)
        for name, text in extra.items():
            packed.writestr(name, text)
    return len(files) + len(extra)


def _files(folder: Path) -> list[Path]:
    """Relative paths of the files that travel."""
    listed = _known_to_git(folder)
    candidates = _walk(folder) if listed is None else listed
    return sorted(p for p in candidates if not _left_out(p) and (folder / p).is_file())


def _left_out(path: Path) -> bool:
    if path.parts[0] in LEFT_OUT_AT_THE_TOP and len(path.parts) > 1:
        return True
    return any(fnmatch(part, pattern) for part in path.parts for pattern in LEFT_OUT_ANYWHERE)


def _known_to_git(folder: Path) -> list[Path] | None:
    """Files that Git does not ignore; None: this is no work tree of Git's."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [Path(name) for name in listing.stdout.split("\0") if name]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not _skipped(Path(parent), here / name)]
        yield from (here / name for name in names)


def _skipped(parent: Path, folder: Path) -> bool:
    """Whether nothing below a folder travels: left out by name, or a Python environment."""
    return _left_out(folder / "_") or (parent / folder.name / "pyvenv.cfg").is_file()


def _require_small(folder: Path, files: Iterable[Path]) -> None:
    sizes = {path: (folder / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        biggest = sorted(sizes, key=lambda path: -sizes[path])[:NUM_NAMED]
        named = "\n".join(f"  {sizes[path] / 1e6:8.1f} MB  {path}" for path in biggest)
        raise ConfigError(
            f"The working folder {folder} has {total / 1e6:.0f} MB to send, over "
            f"{MAX_BYTES / 1e6:.0f} MB. The biggest:\n{named}\nMove data and models to where the "
            "cluster's nodes read them, name what is not needed in .gitignore, or choose another "
            "folder with --working-dir"
        )
