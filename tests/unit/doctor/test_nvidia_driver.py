"""The driver and the GPUs decide which GPU packages are installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.doctor import nvidia_driver


@pytest.mark.parametrize(
    ("driver", "lock"),
    [
        ("580.65.06", "gpu"),
        ("580.105.08", "gpu"),
        ("600.10", "gpu"),
        ("580.65.05", "gpu_cu12"),
        ("535.183.01", "gpu_cu12"),
        ("525.60.13", "gpu_cu12"),
        ("525.60.12", None),
        ("470.256.02", None),
        ("", None),
    ],
)
def test_a_driver_gets_the_newest_packages_that_it_runs(driver: str, lock: str | None) -> None:
    assert nvidia_driver.lock_for(driver) == lock


@pytest.mark.parametrize(
    ("capabilities", "lock"),
    [
        (["8.0", "8.0"], "gpu"),
        (["8.9"], "gpu"),
        (["10.3", "12.1"], "gpu"),
        (["7.5"], "gpu"),
        (["7.0"], "gpu_cu12"),
        (["8.0", "7.0"], "gpu_cu12"),  # one set of packages for all GPUs of a machine
        (["6.1"], None),
        (["9.0", "3.5"], None),
        (["11.0"], None),  # no kernel of another major version runs
    ],
)
def test_packages_have_kernels_for_all_gpus(capabilities: list[str], lock: str | None) -> None:
    assert nvidia_driver.lock_for("580.65.06", capabilities) == lock


def smi(folder: Path, driver: str, gpus: str) -> dict[str, str]:
    """The environment of a machine with this driver and GPUs."""
    fake = folder / "nvidia-smi"
    fake.write_text(
        f"""#!/bin/sh
case "$*" in
  *driver_version*) echo {driver} ;;
  *compute_cap*-i*1) echo "8.0, NVIDIA A100" ;;
  *) printf '{gpus}\\n' ;;
esac
"""
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment


@pytest.mark.parametrize(
    ("driver", "gpus", "visible", "code", "says"),
    [
        ("580.95.05", "7.0, Tesla V100-SXM2-16GB", None, 0, "gpu_cu12"),
        ("580.95.05", "9.0, NVIDIA H200\\n9.0, NVIDIA H200", None, 0, "gpu"),
        ("580.95.05", "6.1, GeForce GTX 1080\\n8.0, NVIDIA A100", None, 2, "GTX 1080 (6.1)"),
        ("580.95.05", "6.1, GeForce GTX 1080\\n8.0, NVIDIA A100", "1", 0, "gpu"),
        ("580.95.05", "[N/A], Something", None, 0, "gpu"),  # then the driver alone decides
        ("550.54.15", "6.0, Tesla P100", None, 2, "they have them for 7.0, 7.5, 8.0"),
    ],
)
def test_setup_refuses_gpus_without_kernels(
    tmp_path: Path, driver: str, gpus: str, visible: str | None, code: int, says: str
) -> None:
    environment = smi(tmp_path, driver, gpus)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run(
        [sys.executable, "-I", nvidia_driver.__file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert says in (done.stderr if code else done.stdout)
    assert len(done.stderr.splitlines()) == (1 if code else 0)


@pytest.mark.parametrize(("lock", "oldest"), [("gpu", "7.5"), ("gpu_cu12", "7.0")])
def test_a_lock_names_its_kernels(lock: str, oldest: str) -> None:
    assert nvidia_driver.KERNELS[lock][0] == oldest
    assert {"8.0", "9.0", "10.0"} <= set(nvidia_driver.KERNELS[lock])


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ("cuda: _Optional[str] = None", ""),
        ("cuda = '12.8'", "12.8"),
    ],
)
def test_the_build_of_torch_is_read_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, cuda: str
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip = '6'\n")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(nvidia_driver.importlib.util, "find_spec", lambda _: spec)
    assert nvidia_driver.cuda_of_torch() == cuda
    assert nvidia_driver.main(["--torch"]) == (0 if cuda else 2)
    monkeypatch.setattr(nvidia_driver.importlib.util, "find_spec", lambda _: None)
    assert nvidia_driver.cuda_of_torch() is None


@pytest.mark.parametrize(
    ("driver", "code", "says"),
    [
        ("580.95.05", 0, "gpu\n"),
        ("550.54.15", 0, "gpu_cu12\n"),
        ("470.256.02", 2, "driver of this machine is 470.256.02"),
    ],
)
def test_setup_gets_the_lock_or_an_error_with_the_driver_that_is_needed(
    tmp_path: Path, driver: str, code: int, says: str
) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho {driver}\necho {driver}\n")
    fake.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-I", nvidia_driver.__file__],
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert says in done.stdout + done.stderr
    assert (code == 0) == ("need 525.60.13 or newer" not in done.stderr)


@pytest.mark.parametrize(
    ("lock", "built_for"), [(lock, cuda) for lock, cuda, _ in nvidia_driver.LOCKS]
)
def test_each_lock_exists_and_has_the_cuda_version_it_names(lock: str, built_for: str) -> None:
    text = (Path(__file__).parents[3] / "scripts" / "requirements" / f"{lock}.txt").read_text()
    pinned = set(re.findall(r"^([\w-]+)==", text, re.MULTILINE))
    assert {"torch", "vllm", "deepspeed", "ray"} <= pinned
    assert ("nvidia-cublas-cu12" in pinned) == (built_for == "CUDA 12")


def test_the_cuda_compiler_of_a_lock_has_the_version_of_its_headers() -> None:
    """A newer one refuses them, and FlashInfer compiles when an engine starts."""
    text = (Path(__file__).parents[3] / "scripts" / "requirements" / "gpu.txt").read_text()
    pinned = dict(re.findall(r"^(nvidia-[\w-]+)==(\d+\.\d+)", text, re.MULTILINE))
    built = {pinned[f"nvidia-{name}"] for name in ("cuda-nvcc", "cuda-crt", "nvvm")}
    assert built == {pinned["nvidia-cuda-runtime"]}
