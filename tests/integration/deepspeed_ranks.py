"""What each rank of the DeepSpeed test runs; a module of its own, so that processes find it."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.config.model import LoraConfig
from rlhf_ray.models.adapters import attach

OPTIMIZER = {"learning_rate": 1e-2, "epsilon": 1e-5, "max_grad_norm": 1.0}
STEPS = 3


def build() -> Any:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    lora = LoraConfig(r=4)
    return attach(LlamaForCausalLM(shape), lora, "CAUSAL_LM", seed=0, dropout=0.0)


def take_steps(engine: Any, first: int) -> list[float]:
    """Learn the batches ``first`` to ``first + STEPS``, two micro-batches each; gradient norms."""
    norms = []
    for number in range(first, first + STEPS):
        ids_BS = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(number))
        mine = ids_BS[engine.rank :: engine.world_size]
        micro_batches = mine.chunk(2)
        for index, batch in enumerate(micro_batches):
            logprobs = engine.model(input_ids=batch).logits.log_softmax(-1)
            picked = logprobs[:, :-1].gather(-1, batch[:, 1:, None])
            loss = -picked.sum() / (4 * 7 / engine.world_size)
            engine.backward(loss, last=index == len(micro_batches) - 1)
        norms.append(engine.step())
    return norms


def rank_main(
    rank: int, world_size: int, port: int, zero_stage: int, state: Any, first: int, queue: Any
) -> None:
    torch.set_num_threads(1)
    from rlhf_ray.engines.deepspeed_engine import DeepSpeedEngine, join_group

    join_group(rank, world_size, "127.0.0.1", port, 120.0)
    engine = DeepSpeedEngine(
        build(), **OPTIMIZER, zero_stage=zero_stage, dtype="float32", settings={}
    )
    if state is not None:
        engine.import_state({name: torch.from_numpy(value) for name, value in state.items()})
    norms = take_steps(engine, first)
    exported = {name: value.numpy() for name, value in engine.export_state().items()}
    if rank == 0:
        queue.put((norms, exported))
    torch.distributed.barrier()
