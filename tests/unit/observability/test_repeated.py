"""Tests of the waits between attempts."""

from rlhf_ray.observability.repeated import GrowingWait


def test_waits_double_up_to_the_longest_however_often_something_fails() -> None:
    wait = GrowingWait(5.0, 60.0)
    assert [wait.next_s() for _ in range(6)] == [5, 10, 20, 40, 60, 60]
    for _ in range(2000):  # 2 to the power of their number has no float
        last = wait.next_s()
    assert last == 60
