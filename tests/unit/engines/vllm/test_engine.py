"""What vLLM's engine checks and sets before it starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.engines.vllm import engine as engine_module
from rlhf_ray.engines.vllm.engine import VllmEngine, VllmSettings, packaged_cuda
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.stop_conditions import StopConditions


def settings(**given: object) -> VllmSettings:
    defaults = {
        "model": "/nowhere",
        "dtype": "float32",
        "serving": "adapter",
        "lora_rank": 8,
        "max_model_len": 64,
        "rule": SamplingRule(1.0),
        "stop_conditions": StopConditions(max_tokens=8),
    }
    return VllmSettings(**(defaults | given))  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "offers_merging"), [(1, True), (2, False)])
async def test_an_adapter_in_float32_is_refused_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, size: int, offers_merging: bool
) -> None:
    gpu = SimpleNamespace(device_type="cuda", is_sleep_mode_available=lambda: True)
    monkeypatch.setattr(engine_module, "current_platform", gpu)
    with pytest.raises(ConfigError, match=r"set rollout\.dtype=bfloat16") as refusal:
        await VllmEngine(settings(tensor_parallel_size=size)).start()
    assert ("rollout.serving=merged" in str(refusal.value)) == offers_merging


@pytest.fixture
def site_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of packages on a machine without CUDA."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(engine_module, "SYSTEM_CUDA", tmp_path / "cuda")
    monkeypatch.setattr(engine_module.sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def install_nvcc(packages: Path) -> Path:
    home = packages / "nvidia" / "cu13"
    for folder in ("bin", "lib"):
        (home / folder).mkdir(parents=True)
    for file in ("bin/nvcc", "lib/libcudart.so.13"):
        (home / file).touch(mode=0o755)
    return home


def complete(home: Path) -> None:
    """As scripts/setup.sh does."""
    (home / "lib64").symlink_to("lib")
    (home / "lib" / "libcudart.so").symlink_to("libcudart.so.13")


def test_the_compiler_among_our_packages_is_found(site_packages: Path) -> None:
    assert packaged_cuda() is None
    home = install_nvcc(site_packages)
    assert packaged_cuda() is None, "nothing could be linked"
    complete(home)
    assert packaged_cuda() == str(home)


def test_a_toolkit_of_the_machine_comes_first(
    site_packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(install_nvcc(site_packages))
    (site_packages / "bin").mkdir()
    (site_packages / "bin" / "nvcc").touch(mode=0o755)
    assert packaged_cuda() is None
    (site_packages / "bin" / "nvcc").unlink()
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert packaged_cuda() is None
