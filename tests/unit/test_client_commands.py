"""Planning, submitting and watching runs elsewhere needs no library that trains or samples."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

CONFIGS = Path(__file__).parents[2] / "configs"
HEAVY = ("torch", "deepspeed", "vllm", "transformers", "peft")

BLOCKED = f"""
import sys

sys.modules.update(dict.fromkeys({HEAVY}))
from rlhf_ray.cli import main
main()
"""
NOBODY = ["--address", "http://127.0.0.1:9"]
"""A port where no dashboard answers: the command gets as far as asking it."""


def client(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", str(CONFIGS / "quickstart.yaml")], "It fits."),
        (["plan", str(CONFIGS / "stackllama/sft.yaml"), "--cluster", "8xA100-80GB"], "It fits."),
        (["dashboards", "--out", "files"], "prometheus"),
        (["init", "quickstart"], "quickstart.yaml"),
        (["submit", str(CONFIGS / "quickstart.yaml"), "run.dir=/shared/q", "--dry-run"], "MB"),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_commands_of_this_machine_load_nothing_that_trains(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = client(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_plan_reads_a_model_folder_without_the_library_that_loads_it(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen2", num_hidden_layers=2, hidden_size=128).save_pretrained(tmp_path)
    keys = (f"model.path={tmp_path}", "--cluster", "8xA100-80GB")
    done = client(tmp_path, "plan", str(CONFIGS / "stackllama/sft.yaml"), *keys)
    assert done.returncode == 0, done.stderr
    assert "It fits." in done.stdout


@pytest.mark.parametrize("command", ["run", "prepare", "chat", "merge"])
def test_a_command_that_trains_or_samples_says_what_it_needs(tmp_path: Path, command: str) -> None:
    done = client(tmp_path, command, str(CONFIGS / "quickstart.yaml"))
    assert done.returncode == 2
    assert done.stderr.startswith("Error: This command needs t")
    assert "pip install 'rlhf-ray[gpu]'" in done.stderr
    assert list(tmp_path.iterdir()) == [], "it began"


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["status", "a"], ["logs", "a"], ["stop", "a"], ["scale", "a", "--generators", "2"]],
    ids=lambda given: given[0],
)
def test_commands_of_a_cluster_load_nothing_that_trains(
    tmp_path: Path, arguments: list[str]
) -> None:
    done = client(tmp_path, *arguments, *NOBODY)
    assert done.returncode == 1
    assert "Nothing answers at http://127.0.0.1:9" in done.stderr
