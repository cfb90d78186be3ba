"""The GPU check without a GPU: tiny models run through it; the rest says what it would do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = ("1", "5")
"""Those whose cases no other test runs; all of them together take a quarter of an hour on CPUs."""


def test_steps_run_or_say_what_they_would_do(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "gpu_check.sh"
    done = subprocess.run(
        [script, "--out", str(tmp_path), "--limit-s", "350", "--steps", ",".join(STEPS)],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    assert not [line for line in lines if line["verdict"] == "FAIL"], done.stdout
    assert done.returncode == 0, done.stderr
    assert {line["step"] for line in lines} == set(STEPS)
    assert any(line["verdict"] == "WOULD" for line in lines)
