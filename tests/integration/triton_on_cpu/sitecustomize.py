"""Imported by Python as it starts: has vLLM accept a Triton that only interprets its kernels."""

from types import SimpleNamespace

from triton.backends import backends

backends["cpu"] = SimpleNamespace(  # type: ignore[assignment]
    compiler=None, driver=SimpleNamespace(is_active=lambda: True)
)
