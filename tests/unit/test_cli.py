"""The command line: what it loads, what it prints, its exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.cli.arguments import read_config, split_versions
from rlhf_ray.errors import ConfigError
from rlhf_ray.version import __version__

JOBS = ("submit", "list", "status", "logs", "stop", "scale")
HEAVY = ("torch", "ray", "transformers", "datasets", "vllm", "deepspeed", "matplotlib")


def python(code: str) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['rlhf-ray', '--help']\n"
        "from rlhf_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    before = os.times()
    out = python(code)
    after = os.times()
    # Processor time, because other tests may run beside this one.
    used_s = sum(after[2:4]) - sum(before[2:4])
    assert used_s < 2.0  # 0.7 s on an idle machine
    assert "LOADED []" in out
    for command in ("run", "prepare", "pretrain", "sft", "reward", "ppo", "evaluate", "merge"):
        assert f" {command} " in out
    for command in JOBS:
        assert f" {command} " in out
    for command in ("export", "generate", "chat", "serve", "plan", "report", "doctor", "schema"):
        assert f" {command} " in out


def test_version_is_printed_by_the_installed_command_and_by_the_module() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"rlhf-ray {__version__}\n"
    code = (
        "import runpy, sys; sys.argv = ['rlhf_ray', '--version']\n"
        "try: runpy.run_module('rlhf_ray', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
    )
    assert python(code) == f"rlhf-ray {__version__}\n"


@pytest.mark.parametrize(
    "command", [command.name for command in get_command(cli.app).commands.values()]
)
def test_each_command_explains_itself_and_its_options(command: str) -> None:
    described = get_command(cli.app).commands[command]
    assert described.rich_help_panel
    assert described.help
    assert all(option.help for option in described.params), [o.name for o in described.params]
    assert CliRunner().invoke(cli.app, [command, "-h"]).exit_code == 0


def test_a_config_is_read_without_anything_heavy() -> None:
    code = (
        "import sys; from rlhf_ray.config import load; load(None, ['ppo.gamma=0.5'])\n"
        "import rlhf_ray.errors, rlhf_ray.types, rlhf_ray.roles\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python(code).strip() == "[]"


def test_plan_prints_generators_and_steps_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("generators: {num: 3}\nppo: {iterations: 5}\n")
    result = CliRunner().invoke(cli.app, ["plan", str(path), "ppo.gamma=0.5"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("It fits.\n")
    assert "gamma: 0.5" not in result.output
    assert "generator          3  vllm, merged serving" in result.output
    assert "5 iterations of 64 rollouts (320 in all), 4 optimizer steps each" in result.output
    result = CliRunner().invoke(cli.app, ["plan", str(path), "ppo.gamma=0.5", "--config"])
    assert "\n  gamma: 0.5\n" in result.output


@pytest.mark.parametrize("mode", ["local", "inline"])
def test_plan_names_the_model_that_serves_as_reference(mode: str) -> None:
    keys = ["reference.kind=policy_base", f"cluster.mode={mode}", "rollout.engine=transformers"]
    result = CliRunner().invoke(cli.app, ["plan", "configs/quickstart.yaml", *keys])
    assert "reference          0  the policy's base, adapter off" in result.output
    result = CliRunner().invoke(cli.app, ["plan", "configs/quickstart.yaml"])
    assert "reference          1  frozen SFT model" in result.output


def test_plan_names_the_gpus_per_generator() -> None:
    preset = Path(__file__).parents[2] / "configs" / "models" / "qwen25_32b_tp.yaml"
    result = CliRunner().invoke(cli.app, ["plan", str(preset), "--cluster", "2x8xA100-80GB"])
    assert "generator          2  vllm, adapter serving, over 4 GPUs each" in result.output


def test_plan_shows_model_sizes_and_trainable_parameters(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    keys = [
        f"model.path={tmp_path / 'llama'}",
        "model.dtype=bfloat16",
        "model.quantization=int8",
        "run.stages=[sft, reward, ppo]",
        "sft.lora.target_modules=[q_proj, v_proj]",
        "ppo.advantage=rloo",
        "ppo.samples_per_prompt=4",
    ]
    path = str(tmp_path / "c.yaml")
    Path(path).write_text("{}\n")
    found = json.loads(CliRunner().invoke(cli.app, ["plan", path, *keys, "--json"]).output)
    (model,) = found["models"]
    assert model["parameters"] == 6_738_415_616
    assert model["weights_bytes"] == 2 * 6_738_415_616
    trainings = {part["stage"]: part for part in found["trainings"]}
    assert list(trainings) == ["sft", "reward", "ppo policy"]
    assert trainings["sft"]["trainable"] == 8_388_608
    assert trainings["sft"]["training_bytes"] == 16 * 8_388_608
    assert trainings["sft"]["weights_bytes"] == 6_476_005_376 + 4 * 262_410_240
    assert trainings["ppo policy"]["weights_bytes"] == 6_476_005_376 + 2 * 262_410_240
    text = CliRunner().invoke(cli.app, ["plan", path, *keys]).output
    assert re.search(r"model\.path +6,738,415,616 +13\.48 GB  /", text)
    assert re.search(r"sft +8,388,608 +7\.53 GB +0\.13 GB", text)


def test_schema_is_json_and_describes_every_key() -> None:
    result = CliRunner().invoke(cli.app, ["schema"])
    schema = json.loads(result.output)
    assert "ppo" in schema["properties"]
    for definition in schema["$defs"].values():
        for name, entry in definition.get("properties", {}).items():
            assert entry.get("description"), f"{name} has no description"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it has no config\.yaml"):
        read_config(tmp_path, None)


def test_a_run_folder_is_read_as_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("ppo: {gamma: 0.5}\n")
    assert read_config(tmp_path, ["ppo.epochs=2"]).ppo.gamma == 0.5


def test_errors_are_one_message_and_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("ppo: {gama: 0.5}\n")
    monkeypatch.setattr(sys, "argv", ["rlhf-ray", "plan", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ")
    assert "ppo.gama: unknown key (value 0.5). Did you mean ppo.gamma" in err
    assert "Traceback" not in err


FAULT = """
import sys
from rlhf_ray import cli
import rlhf_ray.cli.inspection as inspection

def fail(**_):
    raise RuntimeError("no answer to planted-s3cret \\x1b[2J")

cli.app = fail
sys.argv = ["rlhf-ray", "schema"]
cli.main()
"""


def test_a_traceback_shows_no_secret_and_no_control_character() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULT],
        env={**os.environ, "MY_TOKEN": "planted-s3cret"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: no answer to ... \\u001b[2J\n")


def test_a_copied_folder_is_the_run_that_a_command_reads_and_writes(tmp_path: Path) -> None:
    old, copy, link = tmp_path / "old", tmp_path / "copy", tmp_path / "link"
    old.mkdir()
    (old / "config.yaml").write_text(f"run: {{dir: {old}, name: x}}\n")
    shutil.copytree(old, copy)
    link.symlink_to(old)
    assert read_config(old, []).run.dir == str(old)
    assert read_config(link, []).run.dir == str(old)
    assert read_config(copy, []).run.dir == str(copy)
    assert read_config(copy, ["run.dir=elsewhere"]).run.dir == "elsewhere"
    assert read_config(copy / "config.yaml", []).run.dir == str(old), "a file is a config, no run"
    shutil.rmtree(old)
    assert read_config(copy, []).run.name == "x"


def test_versions_are_split_from_the_run(tmp_path: Path) -> None:
    assert split_versions(Path("runs/a@100,200, latest,100")) == (
        Path("runs/a"),
        ["100", "200", "latest"],
    )
    for plain in ("@quickstart", "runs/a", "c.yaml", "me@host/runs/a"):
        assert split_versions(Path(plain)) == (Path(plain), [])
    folder = tmp_path / "a@1"
    folder.mkdir()
    assert split_versions(folder) == (folder, [])
    assert split_versions(Path(f"{folder}@best")) == (folder, ["best"])
    for wrong in ("runs/a@", "runs/a@1,"):
        with pytest.raises(ConfigError, match="names no version after a comma or @"):
            split_versions(Path(wrong))
