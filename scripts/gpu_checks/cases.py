"""The table of what is checked, in order of value; as a program it runs one case in this process.

python -m gpu_checks.cases CASE FOLDER LINES
"""

import json
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_checks.lines import FAIL, Line, Place, append, would


@dataclass(frozen=True)
class Case:
    """One process of the check."""

    step: str
    """Cases of one step run beside each other, as far as there are cores."""
    name: str
    function: str
    """``module:function``: takes the place and the arguments, yields lines."""
    arguments: Sequence[str | int] = ()
    limit_s: int = 120
    does: str = ""
    """What it does; set where it can do nothing without a GPU."""
    alone: bool = False
    """Whether it measures time or memory, so that nothing may run beside it."""

    def lines(self, place: Place) -> Iterator[Line]:
        """Run it here; yield its lines as they come."""
        if self.does and not place.has_gpu:
            lines = iter([would(self.does)])
        else:
            lines = pkgutil.resolve_name(self.function)(place, *self.arguments)
        for line in lines:
            yield replace(line, step=self.step, case=self.name)


def _one_node() -> Iterator[Case]:
    yield Case("1", "versions", "gpu_checks.machine:versions", limit_s=60)
    for quantization in ("none", "int8", "nf4"):
        for role in ("frozen", "policy", "critic"):
            yield Case(
                "2", f"{role}-{quantization}", "gpu_checks.roles:placed", (role, quantization), 150
            )
    for runner in ("V1", "V2"):
        for dtype, serving in (
            ("bfloat16", "adapter"),
            ("bfloat16", "merged"),
            ("float32", "merged"),
        ):
            yield Case(
                "3",
                f"{dtype}-{serving}-{runner}",
                "gpu_checks.engines:proof",
                (dtype, serving, runner),
                limit_s=150,
                does="prove an engine on vLLM's second model runner, which CPUs lack"
                if runner == "V2"
                else "",
            )
    for stage in (1, 2, 3):
        for role in ("policy", "critic"):
            yield Case("4", f"{role}-zero{stage}", "gpu_checks.roles:learnt", (role, stage), 150)
    yield Case("5", "sleep", "gpu_checks.engines:sleep")
    yield Case("6", "five-roles", "gpu_checks.runs:two_iterations", limit_s=200, alone=True)
    yield Case("7", "7b-engine", "gpu_checks.engines:speed", limit_s=240, alone=True)
    yield Case("7", "7b-run", "gpu_checks.runs:against_plan", limit_s=300, alone=True)
    yield Case("8", "same-seeds", "gpu_checks.engines:seeds", ("0",))
    yield Case(
        "8",
        "batch-invariant",
        "gpu_checks.engines:seeds",
        ("1",),
        does="sample twice, and in another batch, in vLLM's batch-invariant mode",
    )


def _several_nodes() -> Iterator[Case]:
    yield Case("1", "doctor", "gpu_checks.nodes:doctor", limit_s=300, alone=True)
    yield Case("2", "nccl", "gpu_checks.nodes:bandwidth", limit_s=300, alone=True)
    for size in (2, 4, 8):
        yield Case(
            "3",
            f"tensor-parallel-{size}",
            "gpu_checks.nodes:tensor_parallel",
            (size,),
            400,
            alone=True,
        )
    yield Case("4", "ranks", "gpu_checks.nodes:ranks", limit_s=900, alone=True)
    yield Case("5", "rehearse-3x8", "gpu_checks.nodes:flagship", limit_s=3600, alone=True)
    yield Case("6", "killed", "gpu_checks.nodes:killed", limit_s=600, alone=True)


ONE_NODE = {case.name: case for case in _one_node()}
SEVERAL_NODES = {case.name: case for case in _several_nodes()}


def main(described: str, folder: str, lines: str) -> int:
    """Run one case, given as JSON; append its lines to a file."""
    case, path = Case(**json.loads(described)), Path(lines)
    try:
        for line in case.lines(Place(Path(folder))):
            append(path, line)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        append(path, Line(FAIL, "ended with an error", {"error": text}, case.step, case.name))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
