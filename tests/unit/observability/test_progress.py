import io

import pytest

from rlhf_ray.observability.progress import Progress, clock_time


class Clock:
    """Seconds that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_ten_seconds_with_the_eta():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(["sft", "ppo"], stream=stream, clock=clock)
    with progress.stage("ppo", total=60, unit="iteration") as bar:
        for iteration in range(1, 13):
            clock.now = iteration * 41 / 12
            bar.advance(1, reward=0.5 + iteration / 1000, kl=1.2)
    # Iterations take 3.42 s: lines at 10.25 s (3), 20.5 s (6), 30.75 s (9), 41 s (12).
    assert stream.getvalue().splitlines() == [
        "[2/2] ppo",
        "ppo 3/60 iterations, 5%, 0:10 elapsed, ETA 3:15, reward 0.503, kl 1.2",
        "ppo 6/60 iterations, 10%, 0:20 elapsed, ETA 3:04, reward 0.506, kl 1.2",
        "ppo 9/60 iterations, 15%, 0:31 elapsed, ETA 2:54, reward 0.509, kl 1.2",
        "ppo 12/60 iterations, 20%, 0:41 elapsed, ETA 2:44, reward 0.512, kl 1.2",
        "[2/2] ppo done: 12/60 iterations in 0:41, reward 0.512, kl 1.2",
    ]


def test_the_log_of_a_job_gets_plain_lines_whatever_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    clock, stream = Clock(), io.StringIO()
    with Progress(stream=stream, clock=clock).stage("ppo", total=4, unit="iteration") as bar:
        clock.now = 30.0
        bar.advance(1, reward=0.5)
    assert stream.getvalue().splitlines() == [
        "ppo",
        "ppo 1/4 iterations, 25%, 0:30 elapsed, reward 0.5",
        "ppo done: 1/4 iterations in 0:30, reward 0.5",
    ]


def test_earlier_work_and_start_up_do_not_count_towards_the_throughput():
    clock = Clock()
    progress = Progress(stream=io.StringIO(), clock=clock)
    with progress.stage("ppo", total=60, unit="iteration", done=40) as bar:
        clock.now = 100.0
        bar.advance(1)
        assert bar.eta_s is None  # starting up took 99 s or so, and says nothing of the pace
        clock.now = 118.0
        bar.advance(9)
        # 9 in 18 s, 10 left.
        assert bar.eta_s == 20.0
        assert bar.line() == "ppo 50/60 iterations, 83%, 1:58 elapsed, ETA 0:20"


def test_an_unknown_total_has_no_eta():
    clock, stream = Clock(), io.StringIO()
    with Progress(stream=stream, clock=clock).stage("prepare", unit="question") as bar:
        clock.now = 12.0
        bar.advance(1)
    assert stream.getvalue().splitlines() == [
        "prepare",
        "prepare 1 question, 0:12 elapsed",
        "prepare done: 1 question in 0:12",
    ]


def test_a_stage_that_fails_says_so():
    stream = io.StringIO()
    progress = Progress(stream=stream, clock=Clock())

    def fail() -> None:
        with progress.stage("sft", total=8) as bar:
            bar.advance(2)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert stream.getvalue().splitlines()[-1] == "sft stopped: 2/8 steps in 0:00"


def test_a_terminal_gets_a_live_bar_and_the_final_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(["sft"], stream=stream).stage("sft", total=2) as bar:
        bar.advance(2, loss=1.25)
    text = stream.getvalue()
    assert "━" in text
    assert "[1/1] sft done: 2/2 steps in 0:00, loss 1.25" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (3723, "1:02:03")]
)
def test_clock_time(seconds: float, text: str):
    assert clock_time(seconds) == text


def test_a_new_part_of_a_stage_has_its_own_count_and_eta():
    clock, stream = Clock(), io.StringIO()
    with Progress(stream=stream, clock=clock).stage("prepare", unit="question") as bar:
        bar.restart(100, "megabyte")
        bar.advance(100)
        clock.now = 5.0
        bar.restart(40, "question")
        assert bar.eta_s is None
        bar.advance()
        clock.now = 15.0
        bar.advance()
        # Ten seconds a question since the first one, 38 to go.
        assert bar.eta_s == 380
    assert stream.getvalue().splitlines() == [
        "prepare",
        "prepare 2/40 questions, 5%, 0:15 elapsed, ETA 6:20",
        "prepare done: 2/40 questions in 0:15",
    ]
