import subprocess
import sys
from collections.abc import Iterator

import pytest

from rlhf_ray import stacks

HANGS = """
import sys, threading
from rlhf_ray import stacks
stacks.register()
def hang_on_purpose():
    print("hangs", flush=True)
    threading.Event().wait()
hang_on_purpose()
"""
DEAF = "import time; print('hangs', flush=True); time.sleep(600)"


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", request.param], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        yield process
        process.kill()


@pytest.fixture
def no_py_spy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_by_py_spy", lambda _: "")


@pytest.mark.parametrize("process", [HANGS], indirect=True)
def test_a_process_that_hangs_is_read_from_outside(process: subprocess.Popen[str]) -> None:
    assert "hang_on_purpose" in stacks.stacks(process.pid)


@pytest.mark.parametrize("process", [HANGS], indirect=True)
@pytest.mark.usefixtures("no_py_spy")
def test_where_nothing_may_attach_the_process_writes_its_own_stacks(
    process: subprocess.Popen[str],
) -> None:
    for _ in range(2):
        text = stacks.stacks(process.pid)
        assert text.count("in hang_on_purpose") == 1
    assert process.poll() is None


@pytest.mark.parametrize("process", [DEAF], indirect=True)
@pytest.mark.usefixtures("no_py_spy")
def test_a_process_that_the_signal_would_end_gets_none(process: subprocess.Popen[str]) -> None:
    assert "No Python stack can be read" in stacks.stacks(process.pid)
    assert process.poll() is None


def test_a_process_that_has_ended_is_named() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert stacks.stacks(ended.pid) == f"Process {ended.pid} has ended.\n"
