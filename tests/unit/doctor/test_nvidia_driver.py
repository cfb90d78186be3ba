"""The driver decides which GPU packages are installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.doctor import nvidia_driver


@pytest.mark.parametrize(
    ("driver", "lock"),
    [
        ("580.65.06", "gpu"),
        ("580.105.08", "gpu"),
        ("600.10", "gpu"),
        ("580.65.05", "gpu_cu12"),
        ("535.183.01", "gpu_cu12"),
        ("525.60.13", "gpu_cu12"),
        ("525.60.12", None),
        ("470.256.02", None),
        ("", None),
    ],
)
def test_a_driver_gets_the_newest_packages_that_it_runs(driver: str, lock: str | None) -> None:
    assert nvidia_driver.lock_for(driver) == lock


@pytest.mark.parametrize(
    ("driver", "code", "says"),
    [
        ("580.95.05", 0, "gpu\n"),
        ("550.54.15", 0, "gpu_cu12\n"),
        ("470.256.02", 2, "driver of this machine is 470.256.02"),
    ],
)
def test_setup_gets_the_lock_or_an_error_with_the_driver_that_is_needed(
    tmp_path: Path, driver: str, code: int, says: str
) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho {driver}\necho {driver}\n")
    fake.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-I", nvidia_driver.__file__],
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert says in done.stdout + done.stderr
    assert (code == 0) == ("need 525.60.13 or newer" not in done.stderr)


@pytest.mark.parametrize(
    ("lock", "built_for"), [(lock, cuda) for lock, cuda, _ in nvidia_driver.LOCKS]
)
def test_each_lock_exists_and_has_the_cuda_version_it_names(lock: str, built_for: str) -> None:
    text = (Path(__file__).parents[3] / "scripts" / "requirements" / f"{lock}.txt").read_text()
    pinned = set(re.findall(r"^([\w-]+)==", text, re.MULTILINE))
    assert {"torch", "vllm", "deepspeed", "ray"} <= pinned
    assert ("nvidia-cublas-cu12" in pinned) == (built_for == "CUDA 12")
