"""Silences output of dependencies that a user cannot act on, turns telemetry off, and has them
imported quickly: rarely interrupted by the garbage collector, without a compiler that few need.

Variables that the user has set keep their values.
"""

import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

_DEFAULTS = {
    # Telemetry off.
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_ERROR_REPORTING": "false",
    # Errors only, no progress bars.
    "GLOO_LOG_LEVEL": "ERROR",
    "GRPC_VERBOSITY": "ERROR",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "KMP_WARNINGS": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    # Opts in to the behaviour that Ray's FutureWarning announces for actors without accelerators.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

_COMPILED_AT_IMPORT = ("bitsandbytes", "deepspeed.runtime.zero.muon.original_muon")
"""Modules that hand functions to `torch.compile` when they are imported. That compiles none before
it is called, but imports PyTorch's compiler: a quarter of what a learner imports. Only quantised
bases on CPUs and the optimizer Muon call them; peft imports the one, DeepSpeed the other."""

GC_THRESHOLDS = (20_000, 10, 10)
"""For `gc.set_threshold`. Importing PyTorch, Transformers and vLLM makes millions of objects that
stay; by Python's default, 700, walking over them takes a fifth of a process's start."""

# vllm and transformers are missing here because their variables above set their loggers.
_CHATTY_LOGGERS = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "httpx",
    "matplotlib",
    "ray",
    "torch.distributed",
)

_NOISY_MODULES = r"(accelerate|bitsandbytes|datasets|deepspeed|peft|ray|torch|transformers|vllm)"


def environment() -> dict[str, str]:
    """Return the variables for child processes: the user's value, or our default."""
    return {name: os.environ.get(name, value) for name, value in _DEFAULTS.items()}


def silence_dependencies() -> None:
    """Silence this process and its future children. Call before the libraries are imported."""
    gc.set_threshold(*GC_THRESHOLDS)
    if not sys.warnoptions and "PYTHONWARNINGS" not in os.environ:
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", category=UserWarning, module=rf"{_NOISY_MODULES}(\.|$)")
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed resets its logger's level on import, which a filter survives.
    logging.getLogger("DeepSpeed").addFilter(_errors_only)


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def put_compiling_off() -> None:
    """Have `_COMPILED_AT_IMPORT` compile a function when it is first called."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _COMPILED_AT_IMPORT else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_without_compiler, spec.loader.exec_module)
        return spec


def _without_compiler(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    import torch

    compile_now: Any = torch.compile

    def compile_later(model: object = None, **options: object) -> object:
        if not isinstance(model, FunctionType):
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))

        @functools.wraps(model)
        def call(*args: object, **kwargs: object) -> object:
            inlined = torch.compiler.is_compiling()  # by a compiled caller
            return (model if inlined else compiled())(*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        execute(module)
    finally:
        torch.compile = compile_now
