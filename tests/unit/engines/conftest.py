"""One tiny base model for all tests of this folder."""

import pytest

from rlhf_ray.config.model import TinyModelConfig
from rlhf_ray.models import tiny

TEXTS = [f"Question: how do I sort list {i}?\n\nAnswer: call sorted(x{i})." for i in range(50)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shape = TinyModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_heads=2, num_layers=1
    )
    tiny.build(folder, TEXTS, shape, max_length=64, seed=0)
    return str(folder)
