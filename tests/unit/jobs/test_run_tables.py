"""Runs as people see them."""

import io
import time

from rich.console import Console
from rich.table import Table

from rlhf_ray.jobs.job_server import Job
from rlhf_ray.jobs.run_tables import list_table, status_table
from rlhf_ray.runs.status import RunStatus
from rlhf_ray.types import GeneratorStatus


def shown(table: object) -> list[str]:
    written = io.StringIO()
    Console(width=200, file=written).print(table)
    return [" ".join(line.split()) for line in written.getvalue().splitlines()]


def test_a_status_shows_every_known_field() -> None:
    generators = (
        GeneratorStatus("generator-0", "ready", 12, 1),
        GeneratorStatus("generator-1", "starting", None, 0),
    )
    status = RunStatus(
        *("mine", "/mnt/mine", "running", "ppo", "12/40 iterations", 96.8),
        *(12, 40, 0.5123, 1.25, 12, 3.456, generators, time.time() - 2),
        restarts={"policy": 1, "generator": 2},
        effective_time_ratio=0.9312,
    )
    assert shown(status_table(status)) == [
        "run mine in /mnt/mine",
        "state running, reported 0:02 ago",
        "stage ppo",
        "progress 12/40 iterations",
        "ETA 1:37",
        "reward 0.512",
        "kl 1.25",
        "version 12",
        "s/iteration 3.46",
        "restarts policy 1, generator 2",
        "useful time 93.1%",
        "generator state version restarts",
        "generator-0 ready 12 1",
        "generator-1 starting - 0",
    ]


def test_a_status_outside_ppo_is_short() -> None:
    status = RunStatus("mine", "/mnt/mine", "running", "sft", updated=time.time())
    assert shown(status_table(status))[1:] == ["state running, reported 0:00 ago", "stage sft"]


def test_what_the_job_server_says_of_a_run_that_is_gone_is_shown() -> None:
    status = RunStatus("mine", "-", "failed", updated=time.time(), message="Its node has died.")
    assert shown(status_table(status))[2:] == ["message Its node has died."]


def test_the_list_has_a_row_per_run() -> None:
    over = Job("a-1", "a", "/mnt/a", "SUCCEEDED", 1000.0, 1065.0, 0, "", "node")
    plain = Job("raysubmit_x", None, None, "RUNNING", time.time() - 5, None, None, "", None)
    table = list_table([over, plain])
    assert isinstance(table, Table)
    first, second = shown(table)[1:]
    assert first.startswith("a a-1 succeeded ")
    assert first.endswith(" 1:05 /mnt/a")
    assert second.startswith("- raysubmit_x running ")
    assert second.endswith(" 0:05 -")
