"""What vLLM's engine checks and sets before it starts."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.engines.vllm import engine as engine_module
from rlhf_ray.engines.vllm.engine import VllmEngine, VllmSettings, find_cuda
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.stop_conditions import StopConditions
from rlhf_ray.types import AdapterUpdate


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


class Rpc:
    """An engine's process that applies whatever it is sent."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    async def collective_rpc(self, method: str, args: tuple[bytes, str, int]) -> list[object]:
        assert method == "serve_adapter"
        self.numbers.append(args[2])
        return [{"num_modules": 1, "digest": "d"}]


async def test_of_the_adapters_side_by_side_the_oldest_gives_way() -> None:
    engine, rpc = VllmEngine(settings(num_adapters=3)), Rpc()
    engine._engine = rpc  # type: ignore[assignment]
    engine._servable = {"q_proj"}
    requests = []
    for version in range(-1, 6):
        peft = {"target_modules": ["q_proj"]}
        served = await engine._serve(AdapterUpdate(version, f"d{version}", peft, b""))
        assert served.caches_cleared
        assert engine._lora_request is not None
        requests.append(engine._lora_request)
    assert [each.lora_int_id for each in requests] == rpc.numbers == [3, 1, 2, 3, 1, 2, 3]
    assert len({each.lora_name for each in requests}) == len(requests)


def gpu(major: int) -> SimpleNamespace:
    """vLLM's platform with a GPU of this compute capability."""
    return SimpleNamespace(
        device_type="cuda",
        is_cpu=lambda: False,
        get_device_capability=lambda: SimpleNamespace(major=major),
    )


@pytest.mark.parametrize(
    ("major", "given", "remedies"),
    [
        (9, {}, ["rollout.dtype=bfloat16", "rollout.serving=merged"]),
        (9, {"tensor_parallel_size": 2}, ["rollout.dtype=bfloat16"]),
        (7, {}, ["rollout.dtype=float16", "rollout.serving=merged"]),
        (7, {"dtype": "bfloat16"}, ["rollout.dtype=float16"]),
        (9, {"dtype": "bfloat16"}, []),
        (7, {"dtype": "float16"}, []),
        (9, {"serving": "merged"}, []),
    ],
)
async def test_a_data_type_that_a_gpu_cannot_serve_is_refused(
    monkeypatch: pytest.MonkeyPatch, major: int, given: dict[str, object], remedies: list[str]
) -> None:
    monkeypatch.setattr(engine_module, "current_platform", gpu(major))
    engine = VllmEngine(settings(**given))
    if not remedies:
        engine._refuse_what_the_platform_lacks()
        return
    with pytest.raises(ConfigError) as refusal:
        await engine.start()
    said = str(refusal.value)
    assert [
        word for word in said.split() if word.startswith("rollout.") and "=" in word
    ] == remedies


async def test_an_engine_on_cpus_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def start(_: object) -> None:
        seen.append(os.environ.get("TORCH_COMPILE_DISABLE"))
        raise ConfigError("enough")

    for platform in (SimpleNamespace(is_cpu=lambda: True, device_type="cpu"), gpu(9)):
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "")  # so that what is set is taken back
        monkeypatch.delenv("TORCH_COMPILE_DISABLE")
        monkeypatch.setattr(engine_module, "current_platform", platform)
        monkeypatch.setattr(engine_module.versions, "prefer_exact_runner", lambda *_: None)
        monkeypatch.setattr(engine_module.AsyncLLM, "from_engine_args", start)
        with pytest.raises(ConfigError, match="enough"):
            await VllmEngine(settings(dtype="bfloat16")).start()
    assert seen == ["1", None]


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
    assert find_cuda() is None
    home = install_nvcc(site_packages)
    assert find_cuda() is None, "nothing could be linked"
    complete(home)
    assert find_cuda() == home


def test_a_toolkit_of_the_machine_comes_first(
    site_packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(install_nvcc(site_packages))
    for root in ("cuda", "other", ""):
        (site_packages / root / "bin").mkdir(parents=True, exist_ok=True)
        (site_packages / root / "bin" / "nvcc").touch(mode=0o755)
    assert find_cuda() == site_packages, "the one on PATH"
    (site_packages / "bin" / "nvcc").unlink()
    assert find_cuda() == site_packages / "cuda", "where CUDA is installed by default"
    monkeypatch.setenv("CUDA_HOME", str(site_packages / "other"))
    assert find_cuda() == site_packages / "other"
    monkeypatch.setenv("CUDA_HOME", "/nowhere/cuda")
    assert find_cuda() is None, "FlashInfer would not look elsewhere"


@pytest.mark.parametrize(
    ("major", "given", "refused"),
    [
        (10, {}, True),
        (10, {"dtype": "float32", "serving": "merged"}, False),
        (10, {"engine_args": {"attention_config": {"backend": "FLASH_ATTN"}}}, False),
        (9, {}, False),
    ],
)
async def test_blackwell_without_a_compiler_is_refused(
    site_packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    major: int,
    given: dict[str, object],
    refused: bool,
) -> None:
    monkeypatch.setattr(engine_module, "current_platform", gpu(major))
    engine = VllmEngine(settings(**({"dtype": "bfloat16"} | given)))
    if refused:
        with pytest.raises(ConfigError, match="no nvcc was found"):
            await engine.start()
    complete(install_nvcc(site_packages))
    engine._refuse_what_the_platform_lacks()
