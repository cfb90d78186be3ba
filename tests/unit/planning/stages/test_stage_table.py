"""What people and programs read of the stages."""

import json

import pytest
from shipped_plans import CONFIGS, planned
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.planning.stages.disk import Disk
from rlhf_ray.planning.stages.estimates import StageEstimate, whole_run
from rlhf_ray.planning.stages.table import stage_table, total_time
from rlhf_ray.planning.tables import as_text

HOUR, GB = 3600.0, 1e9


def stage(name: str, hours: float | None, memory: float, kept: float, peak: float) -> StageEstimate:
    seconds = None if hours is None else (hours * HOUR, 2 * hours * HOUR)
    disk = Disk((kept * GB, kept * GB), (peak * GB, peak * GB))
    return StageEstimate(name, seconds, memory * GB, name != "prepare", disk, "")


STAGES = [stage("prepare", 10, 90, 60, 130), stage("sft", 20, 25, 14, 80)]


def test_a_run_takes_hours_in_turn_the_memory_of_its_largest_stage_and_disk_on_top() -> None:
    total = whole_run(STAGES)
    assert total.seconds == (30 * HOUR, 60 * HOUR)
    assert (total.memory, total.on_gpu) == (25 * GB, True)  # what is scarce is the GPU's memory
    assert total.disk == Disk((74 * GB, 74 * GB), (140 * GB, 140 * GB))  # 60 kept, and 80


def test_the_bottom_line_is_not_estimated_where_a_stage_is_not() -> None:
    stages = [*STAGES, stage("reward", None, 17, 1, 2)]
    assert total_time(STAGES) == "days of the run: 1.25 to 2.50"
    assert total_time(stages) == (
        "time of the run: not estimated, because of reward; the others take 30.0 to 60.0 hours"
    )
    table = list(stage_table(stages, 100))
    assert table[-1].split()[:4] == ["whole", "run", "not", "estimated"]
    assert table[2].split()[1:4] == ["10.0", "to", "20.0"]
    assert table[2].split()[4:6] == ["90.00", "CPU"]
    assert table[3].split()[4:6] == ["25.00", "GPU"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("stackllama/*.yaml")), ids=lambda p: p.stem)
def test_every_stage_of_stackllama_has_its_line(path: str) -> None:
    plan = planned(path, "3x8xA100-80GB")
    _, _, rest = as_text(plan, []).partition("\nstage  ")
    lines = rest.partition("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        *plan.config.run.stages,
        "whole",
    ]
    assert max(map(len, lines)) <= 100


def test_programs_read_the_stages_too() -> None:
    path = str(CONFIGS / "stackllama" / "prepare.yaml")
    keys = ["plan", path, "prepare.posts_gb=100", "--cluster", "3x8xA100-80GB", "--json"]
    found = json.loads(CliRunner().invoke(cli.app, keys).stdout)
    (prepare,) = found["stage_estimates"]
    assert prepare["hours_range"] == [
        pytest.approx(0.056, abs=0.001),
        pytest.approx(0.736, abs=0.001),
    ]
    assert prepare["disk_peak_gb_range"] == [80, 135]
    assert found["whole_run"]["hours_range"] == prepare["hours_range"]
    assert found["days_range"] == [pytest.approx(each / 24) for each in prepare["hours_range"]]
    assert any(each.startswith("prepare, MB of a dump's XML") for each in found["assumptions"])
