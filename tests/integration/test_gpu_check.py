"""The GPU check without a GPU: tiny models run through it; the rest says what it would do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1300)]


@pytest.mark.parametrize("more", [(), ("--nodes",)], ids=["one node", "several"])
def test_every_step_runs_or_says_what_it_would_do(tmp_path: Path, more: tuple[str, ...]) -> None:
    script = ROOT / "scripts" / "gpu_check.sh"
    done = subprocess.run(
        [script, "--out", str(tmp_path), "--limit-s", "1200", *more],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1250,
        check=False,
    )
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    assert not [line for line in lines if line["verdict"] == "FAIL"], done.stdout
    assert done.returncode == 0, done.stderr
    num_steps = 6 if more else 8
    assert {line["step"] for line in lines} == {str(n) for n in range(1, num_steps + 1)}
    assert any(line["verdict"] == "WOULD" for line in lines)
