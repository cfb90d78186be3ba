"""Ray in a run on one machine: unreachable from outside, and out of the program's way."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import ray
from sockets import reachable

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import resolve

pytestmark = pytest.mark.integration


def test_every_socket_of_ray_listens_on_loopback_alone_and_signals_stay_the_programs(
    tmp_path: Path,
) -> None:
    """Those of engines and learners are looked at in `test_kill_and_resume.py`."""
    config = resolve({"run": {"dir": str(tmp_path)}, "cluster": {"mode": "local"}})
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    with ray_session(config):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        left_s, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest's own time limit is longer
        assert not 0 < left_s <= 3, "Ray's core would abort the process"
        signal.signal(signal.SIGTERM, before)
        assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
        # By default Ray's workers would be nicer: beside a busy program they would stand still.
        niceness = ray.remote(lambda: os.nice(0)).remote()
        assert ray.get(niceness, timeout=60) == os.nice(0)
        me = psutil.Process()
        assert not list(reachable((me, *me.children(recursive=True))))
