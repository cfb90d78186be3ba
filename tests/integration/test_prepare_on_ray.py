"""prepare of a dump of many parts, on real Ray: the same files as in one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import Config, data, resolve
from rlhf_ray.data.prepare.question_sets import SETS
from rlhf_ray.data.stack_exchange import write_posts
from rlhf_ray.errors import DataError
from rlhf_ray.stages import prepare

pytestmark = pytest.mark.integration

PART_BYTES = 60_000
NUM_PARTS = 10
KILLED = f"""
import sys
from rlhf_ray.config import resolve
from rlhf_ray.config import data
from rlhf_ray.stages import prepare

data.PART_BYTES = {PART_BYTES}
prepare.run(resolve({{
    "run": {{"dir": sys.argv[1]}},
    "cluster": {{"mode": "local", "dashboard": False}},
    "prepare": {{"posts": sys.argv[2], "site": "a.example.com", "num_workers": 2}},
}}))
"""


def config_of(folder: Path, posts: Path, mode: str) -> Config:
    return resolve(
        {
            "run": {"dir": str(folder)},
            "cluster": {"mode": mode, "dashboard": False},
            "rollout": {"engine": "transformers"} if mode == "inline" else {},
            "prepare": {"posts": str(posts), "site": "a.example.com", "num_workers": 2},
        }
    )


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for name in SETS for path in (folder / "prepare" / name).glob("*.arrow")]
    paths.append(folder / "prepare" / "quality.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site") / "Posts.xml"
    write_posts(path, 450, seed=0)
    return path


def test_any_number_of_processes_writes_the_same_files(
    tmp_path: Path, posts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    py7zr = pytest.importorskip("py7zr")
    monkeypatch.setattr(data, "PART_BYTES", PART_BYTES)
    archive, broken = tmp_path / "site.7z", tmp_path / "broken.xml"
    with py7zr.SevenZipFile(archive, "w") as packed:
        packed.write(posts, "Posts.xml")
    broken.write_bytes(posts.read_bytes()[:-400])
    prepare.run(config_of(tmp_path / "inline", posts, "inline"))
    local = {
        name: config_of(tmp_path / name, path, "local")
        for name, path in (("ray", posts), ("7z", archive), ("broken", broken))
    }
    with ray_session(local["ray"]):
        for name in ("ray", "7z"):
            prepare.run(local[name])
        with pytest.raises(DataError, match=r"broken\.xml is broken or cut off after \d+ rows"):
            prepare.run(local["broken"])
    assert files(tmp_path / "ray") == files(tmp_path / "inline")
    assert files(tmp_path / "7z") == files(tmp_path / "inline")
    assert len(files(tmp_path / "ray")) > 3 * NUM_PARTS
    assert not (tmp_path / "broken" / "prepare" / ".partial").exists()


def test_a_run_that_is_killed_twice_ends_with_the_same_files(
    tmp_path: Path, posts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PART_BYTES", PART_BYTES)
    killed, rows = tmp_path / "killed", tmp_path / "killed" / "scratch" / "posts"
    command = [sys.executable, "-c", KILLED, str(killed), str(posts)]
    for pattern, num in (("0*.json", 3), ("bucket-*.json", 4)):
        process = subprocess.Popen(command, start_new_session=True)
        end_s = time.monotonic() + 180
        while len(list(rows.glob(pattern))) < num:
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    subprocess.run(command, check=True, timeout=300)
    prepare.run(config_of(tmp_path / "whole", posts, "inline"))
    assert files(killed) == files(tmp_path / "whole")
    assert not rows.parent.exists()
