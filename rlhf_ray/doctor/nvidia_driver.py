"""Choose the lock of GPU packages that the installed NVIDIA driver can run.

Standard library only: scripts/setup.sh runs this as a plain file before anything is installed.
"""

import re
import subprocess
import sys

LOCKS = (("gpu", "CUDA 13", "580.65.06"), ("gpu_cu12", "CUDA 12", "525.60.13"))
"""Lock, what its packages are built for, and the oldest driver that runs it; the best first."""

NVIDIA_SMI_S = 20


def lock_for(driver: str) -> str | None:
    """Return the best lock that a driver runs; None if it runs none."""
    numbers = _numbers(driver)
    return next((lock for lock, _, oldest in LOCKS if numbers >= _numbers(oldest)), None)


def oldest_driver() -> str:
    """Return the oldest driver that runs any lock."""
    return LOCKS[-1][2]


def read_driver() -> str:
    """Return the version of this machine's driver by nvidia-smi; empty if there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"^\d+(\.\d+)+$", done.stdout, re.MULTILINE)
    return match[0] if match else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def main() -> int:
    """Print the lock for this machine; if none fits, say what is needed and exit with 2."""
    driver = read_driver()
    lock = lock_for(driver)
    if lock is not None:
        print(lock)
        return 0
    _, built_for, _ = LOCKS[-1]
    print(
        f"the NVIDIA driver of this machine is {driver or 'not found (nvidia-smi)'}; the GPU "
        f"packages ({built_for}) need {oldest_driver()} or newer. Install it, or set up without "
        "GPU support: RLHF_RAY_LOCK=cpu scripts/setup.sh",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
