"""Small models, and the command line as a user runs it, with all that it leaves behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from kills.processes import MARK, SHARED_MEMORY, has_mark, is_alive, mapped_inodes
from model_families import TEXTS, build
from tiny_models import build_servable, write_prompts
from transformers import AutoModelForSequenceClassification

from rlhf_ray.models.loading import load_tokenizer, save_model

# vLLM compiles a kernel as it starts, which is kept for all tests; the headers that torch compiles
# for it before would be compiled again for each temporary folder.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have those that look for what a run leaves in shared memory run alone: others leave, too."""
    for item in items:
        if {"command_line", "new_command_line"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker("alone")


@pytest.fixture(scope="module")
def nothing_compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No rank compiles an operation, and none leaves a buffer in shared memory."""
    buffers, shared = Path("/dev/shm"), "deepspeed_allreduce_buffer_*"
    before, folder = set(buffers.glob(shared)), tmp_path_factory.mktemp("operations")
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield
    assert not list(folder.iterdir())
    assert set(buffers.glob(shared)) <= before


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small Llama with its tokenizer."""
    return build_servable(tmp_path_factory.mktemp("llama"), TEXTS)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory, llama: str) -> str:
    """Folder of a Llama sequence-classification model with one label."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    save_model(model, load_tokenizer(llama), folder)
    return str(folder)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small random Qwen2.5: fused biases, grouped keys, tied embeddings, two eos."""
    return build("qwen2.5", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON Lines file with a prompt a row."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", TEXTS)


@pytest.fixture(scope="module")
def vllm_here() -> Iterator[None]:
    """The environment of vLLM engines that the tests' own process starts, for it and its learner.

    The learner shares two cores with the engine: threads that wait for each other would spin.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


class CommandLine:
    """`rlhf-ray` in processes of their own, marked so that every descendant is known by its mark.

    The temporary folder is its own as well, so that no other run on the machine sweeps what these
    leave, and none of theirs is swept.
    """

    def __init__(self, scratch: Path, temporary: Path) -> None:
        self.mark = uuid.uuid4().hex
        self._scratch = scratch
        self._files_before = set(SHARED_MEMORY.glob("*"))
        self._environment = {**os.environ, MARK: self.mark, "TMPDIR": str(temporary)}
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command, with further environment variables; its output goes to a file."""
        log = self._scratch / f"output-{len(self._started)}.txt"
        command = [str(Path(sys.executable).with_name("rlhf-ray")), *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment | variables,
                cwd=self._scratch,
            )
        self._started.append(process)
        return process

    def run(self, *arguments: str, timeout_s: float = 400.0) -> str:
        """Run a command to its end; returns its output; fails where it fails."""
        process = self.start(*arguments)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            pytest.fail(f"rlhf-ray {arguments[0]} took over {timeout_s} s:\n{self.output()}")
        assert code == 0, f"rlhf-ray {arguments[0]} ended with {code}:\n{self.output()}"
        return self.output()

    def output(self) -> str:
        """The output of the last command."""
        log = self._scratch / f"output-{len(self._started) - 1}.txt"
        return log.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Everything alive that these commands started."""
        marked = (p for p in psutil.process_iter() if has_mark(p.pid, self.mark))
        return [process for process in marked if is_alive(process)]

    def shared_memory_files(self) -> list[Path]:
        """Files that are new in shared memory and that no living process maps."""
        new = {}
        for file in set(SHARED_MEMORY.glob("*")) - self._files_before:
            with suppress(FileNotFoundError):
                new[file.stat().st_ino] = file
        mapped = set[int]().union(*(mapped_inodes(pid) for pid in psutil.pids() if new))
        return sorted(new[number] for number in new.keys() - mapped)

    def wait_until_nothing_left(self, timeout_s: float = 10.0) -> None:
        """Fail where processes or shared-memory files outlive the commands."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.processes() and not self.shared_memory_files():
                return
            time.sleep(0.2)
        processes = [" ".join(process.cmdline()) for process in self.processes()]
        pytest.fail(f"left behind: {processes}, {self.shared_memory_files()}")

    def end(self) -> None:
        """Whatever a failed test left."""
        for process in self.processes():
            process.kill()
        for process in self._started:
            process.wait(10)
        for file in self.shared_memory_files():
            file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def new_command_line() -> Callable[[Path, Path], CommandLine]:
    """Makes a command line over a scratch and a temporary folder, for runs of several tests."""
    return CommandLine


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    """The command line; fails the test where a run leaves something behind."""
    with tempfile.TemporaryDirectory(prefix="rlhf-", dir="/tmp") as temporary:
        line = CommandLine(tmp_path, Path(temporary))
        try:
            yield line
        finally:
            line.end()
