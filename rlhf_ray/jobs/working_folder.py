"""Pack the part of the working folder that a job needs: code, configs and small files."""

import os
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from rlhf_ray.errors import ConfigError

MAX_BYTES = 100 * 10**6
"""Largest sum of file sizes; Ray's job server refuses requests over 100 MiB."""

EXCLUDED_AT_TOP = ("runs", "data")
"""Top-level folders that the cluster reads from its own storage; deeper down the names may be
code."""

EXCLUDED_ANYWHERE = (
    *(".git", ".venv", "venv", "node_modules", "wandb", "mlruns"),
    *("__pycache__", "*.egg-info", ".*_cache", ".hypothesis", ".ipynb_checkpoints"),
    *("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.arrow", "*.parquet", "*.7z"),
    *(".env", ".env.*", ".netrc", "*.pem", "*.key"),  # secrets
)
"""Patterns of names of files and folders."""

NUM_LISTED = 5
"""How many of the largest files an error names."""


def pack(folder: Path, extra: dict[str, str], archive: Path) -> int:
    """Write the archive of a working folder and return its number of files.

    Raises:
        ConfigError: the files are too large together.
    """
    files = [path for path in _files(folder) if path.as_posix() not in extra]
    _require_small(folder, files)
    # Not strict: a zip holds no dates before 1980, which files of some build systems have.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as packed:
        for path in files:
            packed.write(folder / path, path)
        for name, text in extra.items():
            packed.writestr(name, text)
    return len(files) + len(extra)


def _files(folder: Path) -> list[Path]:
    """Return the relative paths of the files to pack."""
    listed = _known_to_git(folder)
    candidates = _walk(folder) if listed is None else listed
    return sorted(p for p in candidates if not _is_excluded(p) and (folder / p).is_file())


def _is_excluded(path: Path) -> bool:
    if path.parts[0] in EXCLUDED_AT_TOP and len(path.parts) > 1:
        return True
    return any(fnmatch(part, pattern) for part in path.parts for pattern in EXCLUDED_ANYWHERE)


def _known_to_git(folder: Path) -> list[Path] | None:
    """Return the files that Git does not ignore; None outside a Git work tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [Path(name) for name in listing.stdout.split("\0") if name]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not _is_skipped(Path(parent), here / name)]
        yield from (here / name for name in names)


def _is_skipped(parent: Path, folder: Path) -> bool:
    """Return whether a folder is left out: excluded by name, or a Python environment."""
    return _is_excluded(folder / "_") or (parent / folder.name / "pyvenv.cfg").is_file()


def _require_small(folder: Path, files: Iterable[Path]) -> None:
    sizes = {path: (folder / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:NUM_LISTED]
        named = "\n".join(f"  {sizes[path] / 1e6:8.1f} MB  {path}" for path in largest)
        raise ConfigError(
            f"The working folder {folder} has {total / 1e6:.0f} MB to send, more than the limit of "
            f"{MAX_BYTES / 1e6:.0f} MB. The largest files:\n{named}\nMove data and models to "
            "storage that the cluster's nodes can read, list what the run does not need in "
            ".gitignore, or choose another folder with --working-dir"
        )
