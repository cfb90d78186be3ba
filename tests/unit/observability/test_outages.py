from pathlib import Path

from rlhf_ray.observability.outages import Outages


def test_a_later_process_of_the_run_counts_what_earlier_ones_reported(tmp_path: Path) -> None:
    first = Outages(tmp_path / "outages.jsonl")
    first.restarted("policy", "died", 12.5)
    first.lost("driver", "placement", 3.0)
    first.close()
    later = Outages(tmp_path / "outages.jsonl")
    later.restarted("policy", "died", 0.5)
    later.restarted("generator", "deadline", 0.0)
    assert later.restarts == {"policy": 2, "generator": 1}
    assert later.lost_s == {"policy: died": 13.0, "driver: placement": 3.0}
    assert Outages(tmp_path / "outages.jsonl").restarts == later.restarts
