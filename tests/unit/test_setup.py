"""scripts/setup.sh: what it refuses before gigabytes are installed."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = "torch-2.13.0{local}.dist-info"


def make_torch(folder: Path, local: str, cuda: str) -> Path:
    """A wheel that is called torch, and says what it is built for."""
    wheel = folder / f"torch-2.13.0{local}-py3-none-any.whl"
    info = DIST.format(local=local)
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("torch/__init__.py", "raise ImportError('libcudart.so')\n")
        file.writestr("torch/version.py", f"cuda: str | None = {cuda}\n")
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0{local}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout on a machine with a GPU; the checks of memory and disk always pass."""
    for name in ("scripts/setup.sh", "scripts/env.sh", "rlhf_ray/doctor/nvidia_driver.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts" / "requirements").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    preflight = tmp_path / "rlhf_ray" / "doctor" / "preflight.py"
    preflight.write_text("import sys\nif '--decide' in sys.argv:\n    print('gpu vllm')\n")
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncase "$*" in *driver*) echo 580.95.05 ;; *) echo "$CAPABILITY, A GPU" ;; esac\n'
    )
    smi.chmod(0o755)
    return tmp_path


def set_up(checkout: Path, capability: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{checkout / 'bin'}:/usr/bin:/bin",
        "HOME": str(checkout),
        "PYTHON": sys.executable,
        "VENV": str(checkout / "env"),
        "CAPABILITY": capability,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(checkout),
        "PIP_CONFIG_FILE": os.devnull,
    }
    return subprocess.run(
        ["bash", str(checkout / "scripts" / "setup.sh")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_gpu_without_kernels_is_refused_before_anything_is_installed(checkout: Path) -> None:
    done = set_up(checkout, "6.1")
    assert done.returncode == 2
    assert "A GPU (6.1)" in done.stderr
    assert "RLHF_RAY_LOCK=cpu" in done.stderr
    assert not (checkout / "env").exists()


def test_a_torch_without_cuda_is_refused_before_the_other_packages(checkout: Path) -> None:
    wheel = make_torch(checkout, "+cpu", "None")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    other = f"vllm==0.32.0 \\\n    --hash=sha256:{'0' * 64}\n"
    lock = f"torch==2.13.0 \\\n    --hash=sha256:{digest}\n{other}"
    (checkout / "scripts" / "requirements" / "gpu.txt").write_text(lock)
    done = set_up(checkout, "9.0")
    assert done.returncode == 2, done.stderr
    assert "the torch that was installed is built without CUDA" in done.stderr
    assert "pip config list" in done.stderr
    assert "packages of" not in done.stdout, "the step that installs all others has begun"
    wheel.unlink()
    digest = hashlib.sha256(make_torch(checkout, "", "'13.0'").read_bytes()).hexdigest()
    lock = lock.replace(lock.partition("sha256:")[2].partition("\n")[0], digest)
    (checkout / "scripts" / "requirements" / "gpu.txt").write_text(lock)
    done = set_up(checkout, "9.0")
    assert "2 packages of scripts/requirements/gpu.txt" in done.stdout, done.stderr
    assert "built without CUDA" not in done.stderr
