import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.observability.quiet import environment

NOISY = """
import logging, os, sys, warnings
from rlhf_ray.observability.quiet import silence_dependencies
silence_dependencies()
logger = logging.getLogger("DeepSpeed")
logger.setLevel(logging.WARNING)
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.warning("harmless")
logging.getLogger("ray.train").warning("harmless")
warnings.warn("harmless", FutureWarning)
warnings.warn_explicit("harmless", UserWarning, "x.py", 1, module="torch.nn")
logger.error("kept: error")
warnings.warn("kept: ours", UserWarning)
print(os.environ["VLLM_LOGGING_LEVEL"], os.environ["RAY_USAGE_STATS_ENABLED"])
print("HF_HUB_OFFLINE" in os.environ)
"""


def _run(**variables: str) -> str:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", NOISY], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_harmless_output_is_silenced_and_errors_are_shown():
    output = _run()
    assert "harmless" not in output
    assert "kept: error" in output
    assert "kept: ours" in output
    assert "ERROR 0\nFalse\n" in output


def test_variables_set_by_the_user_are_kept():
    output = _run(VLLM_LOGGING_LEVEL="DEBUG", PYTHONWARNINGS="default")
    assert "DEBUG 0\n" in output
    assert output.count("harmless") == 2


def test_children_get_the_defaults_or_the_users_values(monkeypatch):
    from rlhf_ray.observability.quiet import environment

    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    variables = environment()
    assert variables["TRANSFORMERS_VERBOSITY"] == "info"
    assert variables["VLLM_NO_USAGE_STATS"] == "1"
    assert "HF_HUB_OFFLINE" not in variables


@pytest.mark.parametrize(
    ("variable", "off"),
    [
        ("DO_NOT_TRACK", "1"),
        ("GRADIO_ANALYTICS_ENABLED", "False"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("WANDB_ERROR_REPORTING", "false"),
    ],
)
def test_telemetry_is_off_in_every_process(
    variable: str, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert environment()[variable] == off


COMPILES = """
import sys, types
calls = []
torch = types.ModuleType("torch")
torch.compile = lambda model=None, **options: calls.append((model, options)) or (lambda n: n + 1)
torch.compiler = types.SimpleNamespace(is_compiling=lambda: compiling)
compiling, compile_now = False, torch.compile
sys.modules["torch"] = torch
import rlhf_ray
import bitsandbytes
assert torch.compile is compile_now and not calls
assert bitsandbytes.double.__name__ == "double"
assert [bitsandbytes.double(1), bitsandbytes.double(2)] == [2, 3]
((model, options),) = calls
assert model(1) == 2 and options == {"dynamic": False}
compiling = True
assert bitsandbytes.double(3) == 6
"""


def test_bitsandbytes_compiles_a_function_once_at_its_first_call_and_not_inside_another(
    tmp_path: Path,
) -> None:
    (tmp_path / "bitsandbytes.py").write_text(
        "import torch\ndef double(n): return 2 * n\ndouble = torch.compile(double, dynamic=False)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run(
        [sys.executable, "-c", COMPILES], env=os.environ | {"PYTHONPATH": path}, check=True
    )
