"""Choose the lock of GPU packages that the installed NVIDIA driver and the GPUs can run.

Standard library only: scripts/setup.sh runs this as a plain file before anything is installed.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

LOCKS = (("gpu", "CUDA 13", "580.65.06"), ("gpu_cu12", "CUDA 12", "525.60.13"))
"""Lock, what its packages are built for, and the oldest driver that runs it; the best first."""

KERNELS = {
    "gpu": ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0"),
    "gpu_cu12": ("7.0", "7.5", "8.0", "8.6", "9.0", "10.0", "12.0"),
}
"""Compute capabilities that both torch and vLLM of a lock have kernels for, as their binaries say.
A kernel runs on GPUs of the same major version with the same minor version or a later one."""

NVIDIA_SMI_S = 20


def lock_for(driver: str, capabilities: Iterable[str] = ()) -> str | None:
    """Return the best lock that a driver and all GPUs run; None if there is none.

    Args:
        driver: version of the driver.
        capabilities: of the GPUs, such as 8.0.
    """
    numbers, needed = _numbers(driver), list(capabilities)
    return next(
        (
            lock
            for lock, _, oldest in LOCKS
            if numbers >= _numbers(oldest) and all(has_kernels(lock, each) for each in needed)
        ),
        None,
    )


def has_kernels(lock: str, capability: str) -> bool:
    """Return whether the packages of a lock run on GPUs of a compute capability."""
    major, minor = _numbers(capability)
    built = map(_numbers, KERNELS[lock])
    return any(major == b_major and minor >= b_minor for b_major, b_minor in built)


def oldest_driver() -> str:
    """Return the oldest driver that runs any lock."""
    return LOCKS[-1][2]


def read_driver() -> str:
    """Return the version of this machine's driver by nvidia-smi; empty if there is none."""
    match = re.search(r"^\d+(\.\d+)+$", _query("driver_version"), re.MULTILINE)
    return match[0] if match else ""


def read_capabilities() -> dict[str, str]:
    """Return name -> compute capability of the visible GPUs, as far as nvidia-smi says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    text = _query("compute_cap,name", *(("-i", visible) if visible else ()))
    rows = re.findall(r"^(\d+\.\d+), (.+)$", text, re.MULTILINE)
    return {name.strip(): capability for capability, name in rows}


def cuda_of_torch() -> str | None:
    """Return the CUDA version that the installed torch is built for; empty for none at all.

    It is not imported, which takes seconds, and without its other packages fails. None: no torch.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda\b.*= ['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else ""


def _query(fields: str, *options: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", *options]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _refusal(driver: str, gpus: dict[str, str]) -> str:
    if lock_for(driver) is None:
        return (
            f"the NVIDIA driver of this machine is {driver or 'not found (nvidia-smi)'}; the GPU "
            f"packages ({LOCKS[-1][1]}) need {oldest_driver()} or newer. Install it"
        )
    without = {name: each for name, each in gpus.items() if lock_for(driver, [each]) is None}
    listed = ", ".join(f"{name} ({capability})" for name, capability in without.items())
    return (
        f"the GPU packages have no kernels for the compute capability of {listed or 'all GPUs'}: "
        f"they have them for {', '.join(KERNELS[LOCKS[-1][0]])}. Where other GPUs are there, name "
        "them in CUDA_VISIBLE_DEVICES"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the lock for this machine; if none fits, say what is needed and exit with 2.

    With ``--torch``: exit with 2 if the installed torch is built without CUDA.
    """
    if (sys.argv[1:] if arguments is None else arguments) == ["--torch"]:
        if cuda_of_torch():
            return 0
        print("the torch that was installed is built without CUDA", file=sys.stderr)
        return 2
    driver, gpus = read_driver(), read_capabilities()
    lock = lock_for(driver, gpus.values())
    if lock is not None:
        print(lock)
        return 0
    print(
        f"{_refusal(driver, gpus)}, or set up without GPU support: "
        "RLHF_RAY_LOCK=cpu scripts/setup.sh",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
