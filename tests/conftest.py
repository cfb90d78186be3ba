"""Tests marked `gpu` are skipped where there is no NVIDIA GPU."""

import os

import pytest

# Tiny tensors gain nothing from threads, which then wait for each other on a busy machine: half
# the time of the unit tests. Read when torch is imported, so it stands here.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # slow to import, so only where a test asks

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
