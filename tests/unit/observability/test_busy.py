from rlhf_ray.observability.busy import BusyTime


def test_calls_that_overlap_count_once() -> None:
    busy = BusyTime(since_s=100.0)
    busy.add("generator-0", 102.0, 106.0)
    busy.add("generator-0", 100.0, 103.0)  # told later, begun before
    busy.add("generator-0", 103.0, 104.0)
    busy.add("policy-0", 108.0, 109.0)
    # 100..106 of 10 s, and 1 s of 10.
    assert busy.shares(110.0) == {"generator-0": 0.6, "policy-0": 0.1}


def test_what_lies_before_was_counted_before_and_who_does_nothing_is_idle() -> None:
    busy = BusyTime(since_s=100.0)
    busy.add("policy-0", 100.0, 104.0)
    busy.shares(110.0)
    busy.add("reward-0", 108.0, 112.0)  # 2 s of it since
    assert busy.shares(120.0) == {"policy-0": 0.0, "reward-0": 0.2}
