"""The most memory that a worker's process has held, asked for at the end of its work."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

KB = 1024


def peak_memory(_actor: Any = None) -> int:
    """Bytes in use on the GPUs of this process; where it has none, its and its children's peak.

    PyTorch and vLLM give nothing back to a GPU, so what is in use at the end is the peak. On a GPU
    that is shared it is that of all who share it.
    """
    if torch.cuda.is_available():
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
