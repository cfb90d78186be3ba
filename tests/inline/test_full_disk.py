"""A run on a disk that fills up waits until there is space, and loses nothing."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakePolicy
from harness import Harness, make_config

from rlhf_ray.driver import commits
from rlhf_ray.types import StepReport

FREED_AFTER_S = 0.4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Filling(FakePolicy):
    """Fills the disk while it learns its third batch; space is freed a little later."""

    disk: Path

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int
    ) -> StepReport:
        report = await super().learn(advantage_mean, advantage_std, iteration)
        if self.learnt == 3:
            ballast = self.disk / "ballast"
            with ballast.open("wb", buffering=0) as file:
                for size in (2**20, 4096, 1):  # until not even a byte fits
                    try:
                        while file.write(bytes(size)):
                            pass
                    except OSError:
                        continue
            threading.Timer(FREED_AFTER_S, ballast.unlink).start()
        return report


def test_a_run_waits_for_space_on_a_full_disk_and_loses_no_record(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "RETRY_S", 0.1)
    keys = {"save_every": 1, "keep_checkpoints": 1}
    whole = Harness(make_config(tmp_path / "whole", **keys))
    whole.run()
    policy = Filling()
    policy.disk = small_disk
    harness = Harness(make_config(small_disk / "run", **keys), policy=policy)
    summary = harness.run()
    assert summary["iterations"] == 6
    assert harness.metrics() == whole.metrics()
    for name in ("completions", "eval"):
        assert harness.records(name) == whole.records(name)
    full = [record for record in harness.records("warnings") if record["guard"] == "disk_full"]
    assert full
    assert all("No space left on device" in record["text"] for record in full)
    causes = {(record["role"], record["cause"]) for record in harness.records("outages")}
    assert ("driver", "full disk") in causes
    saved = harness.checkpoints.latest()
    assert saved is not None
    assert saved.version == 6
