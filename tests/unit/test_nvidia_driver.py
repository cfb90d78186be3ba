"""The driver decides which GPU packages are installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray import nvidia_driver


@pytest.mark.parametrize(
    ("driver", "lock"),
    [
        ("580.65.06", "gpu"),
        ("580.105.08", "gpu"),
        ("600.10", "gpu"),
        ("580.65.05", None),
        ("575.57.08", None),
        ("", None),
    ],
)
def test_the_oldest_driver_of_cuda_13_is_the_border(driver: str, lock: str | None) -> None:
    assert nvidia_driver.lock_for(driver) == lock


@pytest.mark.parametrize(
    ("driver", "code", "says"),
    [("580.95.05", 0, "gpu\n"), ("535.183.01", 2, "driver here is 535.183.01")],
)
def test_setup_is_told_the_lock_or_the_driver_that_is_needed(
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
    assert (code == 0) == ("580.65.06" not in done.stderr)
