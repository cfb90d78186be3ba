"""One tiny base model for all tests of this folder."""

from pathlib import Path

import pytest
from tiny_models import build_tiny

TEXTS = [f"Question: how do I sort list {i}?\n\nAnswer: call sorted(x{i})." for i in range(50)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    return Path(build_tiny(tmp_path_factory.mktemp("models") / "base", TEXTS))
