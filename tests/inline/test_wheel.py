"""A wheel's installation runs outside the checkout, with the configs that it carries."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from built_wheel import PIP, build_wheel

TINY = (
    *("cluster.mode=inline", "rollout.engine=transformers", "run.name=tiny"),
    "run.stages=[prepare,pretrain,sft,reward,ppo,report]",
    *("model.tiny.num_layers=1", "model.tiny.hidden_size=32", "model.tiny.intermediate_size=64"),
    *("model.tiny.num_heads=2", "prepare.num_questions=100", "data.max_bad_share=0.9"),
    *("pretrain.steps=2", "sft.steps=2", "reward.steps=2", "reward.eval_rows=8"),
    *("ppo.iterations=1", "ppo.batch_size=8", "ppo.mini_batch_size=8", "ppo.eval_prompts=8"),
    "rollout.max_tokens=8",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and sees the locked packages."""
    scratch = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(scratch)
    environment = scratch / "environment"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path file that names a folder doesn't read that folder's own path files, so the
    # development install there stays out of sight.
    (packages / "locked.pth").write_text(sysconfig.get_path("purelib") + "\n")
    target = ["--python", str(environment), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*PIP, *target], check=True)
    return environment / "bin"


def run(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_shipped_config_is_written_run_and_reported(installed: Path, tmp_path: Path) -> None:
    rlhf_ray = str(installed / "rlhf-ray")
    assert "Wrote quickstart.yaml" in run([rlhf_ray, "init", "quickstart"], tmp_path)
    run([rlhf_ray, "run", "quickstart.yaml", *TINY], tmp_path)
    assert (tmp_path / "runs" / "tiny" / "report.html").stat().st_size > 10_000
    # The package that ran is the wheel's.
    where = "import rlhf_ray; print(rlhf_ray.__file__)"
    assert run([str(installed / "python"), "-c", where], tmp_path).startswith(str(installed.parent))


def test_a_shipped_config_is_named_without_a_copy(installed: Path, tmp_path: Path) -> None:
    command = ["-m", "rlhf_ray", "plan", "@stackllama/ppo_3x8_a100", "--cluster", "3x8xA100-80GB"]
    assert "fits" in run([str(installed / "python"), *command], tmp_path)


def test_the_library_is_imported_without_torch(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from rlhf_ray import Config, ConfigError, load_config, run; "
        "load_config('@quickstart', ['run.seed=3']); print('torch' in sys.modules)"
    )
    assert run([str(installed / "python"), "-c", code], tmp_path).strip() == "False"
