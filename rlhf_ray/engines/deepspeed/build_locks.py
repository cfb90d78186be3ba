"""Remove locks that killed processes left on the build folders of DeepSpeed's operations.

PyTorch waits for such a lock forever. A lock's owner keeps the file open, so a lock that no process
of this machine has open is orphaned, or belongs to another node that shares the folder. One older
than `LONGEST_BUILD_S` is taken as orphaned.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

LONGEST_BUILD_S = 120.0
"""An operation takes half a minute on two cores."""
POLL_S = 0.5


def wait_for_builds(root: Path | None = None, longest_s: float = LONGEST_BUILD_S) -> None:
    """Wait until no lock without an owner here is left; remove locks that are too old."""
    folder = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*folder.glob("*/lock"), *folder.glob("*/*/lock")]:
        # The clock of the node that wrote it may be ahead.
        deadline = time.monotonic() + longest_s
        while (age_s := _age_s(lock)) is not None and not _is_open(lock):
            if age_s > longest_s or time.monotonic() > deadline:
                lock.unlink(missing_ok=True)
                break
            time.sleep(POLL_S)


def _age_s(path: Path) -> float | None:
    """Return the age of a file in seconds, or None if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_open(path: Path) -> bool:
    return any(str(path.resolve()) in files for files in _open_files())


def _open_files() -> Iterator[set[str]]:
    """Yield the open files of each process that this user may inspect."""
    for process in psutil.process_iter():
        try:
            yield {file.path for file in process.open_files()}
        except psutil.Error:
            continue
