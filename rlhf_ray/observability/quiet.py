"""Silences output of dependencies that a user cannot act on, turns telemetry off, and has their
imports interrupted rarely by the garbage collector.

Variables that the user has set keep their values.
"""

import gc
import logging
import os
import sys
import warnings

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
