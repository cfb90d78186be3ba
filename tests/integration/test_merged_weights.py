"""Weights that a checkpoint transposes, or names otherwise than their engine, are merged right."""

from pathlib import Path
from typing import Any

import pytest
from faulty_engine import FaultyEngine
from proof_setup import engine_settings, make_config, make_setup, move
from safetensors.torch import load_file, save_file
from tiny_models import build_random

from actors.generator import Generator

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("vllm_here")]


def hub_checkpoint(kind: str, folder: Path, **shape: Any) -> str:
    """A model whose files name no transformer before its modules, as the hub's gpt2 and bloom."""
    model = build_random(kind, folder, ["why does the kettle leak?"], **shape)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    return model


WIDE = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 512}
BARE = {
    "gpt2": WIDE | {"n_embd": 64, "n_head": 2, "n_positions": 512},
    "bloom": WIDE | {"n_head": 2},
}


@pytest.mark.parametrize(("kind", "shape"), BARE.items())
async def test_weights_that_are_transposed_or_named_without_their_transformer_are_merged(
    kind: str, shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = hub_checkpoint(kind, tmp_path / kind, **shape)
    config = make_config("float32", "merged", 1)
    setup = make_setup(config, model, FaultyEngine(engine_settings(config, model)))
    await setup.generator.worker.call(Generator.start)
    try:
        await setup.prove()
        move(setup.learner, seed=0)
        await setup.publish(version=1)
        assert (await setup.gap(version=1)).mean < 1e-3
    finally:
        await setup.generator.worker.call(Generator.stop)
