"""The benchmark's cheapest row, whole; no goal is tested."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


def test_a_quick_row_prints_its_figures_beside_their_goals(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--row", "real-tokens", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ">= 0.95" in ended.stdout
    assert "real-tokens" in ended.stderr  # progress
    result = json.loads(out.read_text(encoding="utf-8"))
    (row,) = result["rows"]
    assert row["name"] == "real-tokens"
    for line in row["lines"]:
        assert line["verdict"] in ("met", "missed")
        assert 0 < line["low"] <= line["value"] <= line["high"] <= 1
        assert len(line["details"]["rounds"]) >= 5
