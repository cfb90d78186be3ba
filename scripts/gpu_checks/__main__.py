"""The command line of scripts/gpu_check.sh, which finds or installs the packages.

Prints the lines of each case as they come, and keeps results.json whole after each of them. Exits
with 0 where nothing failed, 1 where a line did, 2 where the command was wrong.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gpu_checks.cases import ONE_NODE, SEVERAL_NODES
from gpu_checks.lines import FAIL, PASS, WOULD, Line, Place
from gpu_checks.running import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _options(arguments)
    folder = options.out.absolute()
    cases = [
        case
        for case in (SEVERAL_NODES if options.nodes else ONE_NODE).values()
        if options.steps is None or case.step in options.steps.split(",")
    ]
    if not cases:
        print(f"gpu_check: no such step: {options.steps}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    results, started = folder / "results.json", time.monotonic()
    lines: list[Line] = []
    for line in run(cases, folder, options.limit_s):
        lines.append(line)
        print(line, flush=True)
        seconds = round(time.monotonic() - started, 1)
        whole = {"seconds": seconds, "lines": [asdict(each) for each in lines]}
        results.write_text(json.dumps(whole, indent=2), encoding="utf-8")
    counts = Counter(line.verdict for line in lines)
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (PASS, FAIL, WOULD))
    print(f"{listed} in {time.monotonic() - started:.0f} s; {results}, logs in {folder / 'logs'}")
    return 1 if counts[FAIL] else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu_check.sh", description="Check what only GPUs can show.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="results, models")
    parser.add_argument("--steps", help="some steps alone, for example 1,3")
    parser.add_argument("--nodes", action="store_true", help="the part for a running Ray cluster")
    parser.add_argument("--limit-s", type=float, help="seconds of the whole check")
    options = parser.parse_args(arguments)
    if options.limit_s is None:
        alone = 600.0 if Place(options.out).has_gpu else 1800.0
        options.limit_s = 7200.0 if options.nodes else alone
    return options


if __name__ == "__main__":
    sys.exit(main())
