"""The most memory that a worker's process has held, asked for at the end of its work."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

KB = 1024


def peak_memory(_actor: Any, holds_gpus: bool) -> int:
    """Bytes in use on the GPUs of this process; where it holds none, its and its children's peak.

    PyTorch and vLLM keep what they had of a GPU while they work, so what is in use at the end is
    the peak. On a GPU that is shared it is that of all who share it. With placement.turns the side
    that sleeps has given its part back: it is that of the side that worked last.

    Args:
        holds_gpus: whether the worker was given any; all GPUs of a node are seen by those who were
            not.
    """
    if holds_gpus:
        found = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
        return max(total - free for free, total in found)
    return sum(_high_water_marks(psutil.Process()))


def _high_water_marks(process: psutil.Process) -> Iterator[int]:
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # it has ended meanwhile, or this system has no such file
            continue
        yield from (int(line.split()[1]) * KB for line in lines if line.startswith("VmHWM:"))
