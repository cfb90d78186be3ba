"""What scripts/gpu_check.sh checks on one node, on the GPU of this machine, case by case."""

from pathlib import Path

import pytest
from gpu_checks.cases import ONE_NODE
from gpu_checks.lines import PASS
from gpu_checks.running import run

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that cases share."""
    return tmp_path_factory.mktemp("gpu_check")


@pytest.mark.parametrize("name", ONE_NODE)
def test_a_case_of_the_gpu_check_passes(name: str, folder: Path) -> None:
    lines = list(run([ONE_NODE[name]], folder, limit_s=ONE_NODE[name].limit_s))
    assert lines
    assert not [str(line) for line in lines if line.verdict != PASS]
