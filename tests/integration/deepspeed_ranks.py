"""The code of each rank of the DeepSpeed test; a module of its own, so that processes find it."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_ray.algorithms.experience import response_logits
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.models import token_logprobs
from rlhf_ray.models.adapters import adapter_state, attach
from rlhf_ray.models.forward import ValueModel, initialise_head, keep_head_in_fp32
from rlhf_ray.models.token_logprobs import answer_with_logprobs, chunked_logprobs
from rlhf_ray.models.trainable import recompute_activations

OPTIMIZER = {"learning_rate": 1e-2, "epsilon": 1e-5, "max_grad_norm": 1.0}
STEPS = 3
VOCABULARY, LENGTH = 64, 8
PROMPT_LENGTHS_B = torch.tensor([1, 3, 5, 2])
"""Unequal responses: at two ranks, each makes another number of chunks of its head's output."""


SHAPE: Any = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LORA = LoraConfig(r=4)


def build(recompute: bool = False) -> Any:
    torch.manual_seed(0)
    base = answer_with_logprobs(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    model = attach(base, LORA, "CAUSAL_LM", seed=0, dropout=0.0).eval()
    return recompute_activations(model) if recompute else model


def build_critic(dtype: torch.dtype) -> Any:
    """A critic over a base of a data type, with a trained head."""
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)).to(dtype)
    keep_head_in_fp32(base)
    initialise_head(base, seed=0)
    return ValueModel(attach(base, LORA, "SEQ_CLS", seed=0, dropout=0.0).eval())


def take_steps(engine: Any, first: int, discarding: bool = False) -> list[float]:
    """Learn the batches ``first`` to ``first + STEPS``; gradient norms.

    Args:
        engine: one rank's.
        first: number of the first batch.
        discarding: whether the gradients of another batch are dropped before each step, and such
            as are not finite as well.
    """
    token_logprobs.CHUNK_LOGITS = 2 * VOCABULARY
    norms = []
    for number in range(first, first + STEPS):
        for scale in (1.0, float("nan")) if discarding else ():
            backward(engine, 100 + number, scale)
            engine.discard()
        backward(engine, number)
        engine.set_learning_rate(OPTIMIZER["learning_rate"] * (1 - number / (4 * STEPS)))
        norms.append(engine.step())
    return norms


def backward(engine: Any, number: int, scale: float = 1.0) -> None:
    """Gradients of a batch, two micro-batches, all ranks together."""
    num_tokens = int(engine.sum_over_ranks(float((LENGTH - my_prompts(engine)).sum())))
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(0, VOCABULARY, (4, LENGTH), generator=generator)
    mine = range(engine.rank, 4, engine.world_size)
    micro_batches = torch.tensor(mine).chunk(2)
    for index, rows in enumerate(micro_batches):
        logprobs_BT = response_logprobs(engine.model, ids_BS[rows], PROMPT_LENGTHS_B[rows])
        loss = -logprobs_BT.sum() / (num_tokens / engine.world_size)
        engine.backward(scale * loss, last=index == len(micro_batches) - 1)


def values(engine: Any) -> Tensor:
    """The critic's values of one sequence, `_BS`; all ranks together."""
    ids_BS = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return engine.model(ids_BS, torch.ones_like(ids_BS))


def learn_values(engine: Any) -> dict[str, Tensor]:
    """Learn the number of each token for three steps; values before and after, norms and state."""
    before_BS, norms = values(engine), []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        ids_BS = torch.randint(0, VOCABULARY, (4, LENGTH), generator=generator)
        norm = None
        while norm is None:  # in float16 gradients may overflow, until the loss's scale is lower
            for row in range(engine.rank, 4, engine.world_size):
                values_BS = engine.model(ids_BS[row, None], torch.ones(1, LENGTH, dtype=torch.long))
                loss = (values_BS - ids_BS[row] / VOCABULARY).square().sum()
                engine.backward(loss * engine.world_size / ids_BS.numel(), last=False)
            norm = engine.step()
        norms.append(norm)
    with engine.whole_parameters():
        saved = adapter_state(engine.module.classifier)
    return engine.export_state() | {
        "before": before_BS,
        "after": values(engine),
        "norms": torch.tensor(norms),
        "head": next(tensor for name, tensor in saved.items() if "score" in name),
    }


def critic_rank_main(
    rank: int, world_size: int, port: int, zero_stage: int, dtype: str, queue: Any
) -> None:
    torch.set_num_threads(1)
    from rlhf_ray.engines.deepspeed.engine import DeepSpeedEngine, join_group

    join_group(rank, world_size, "127.0.0.1", port, 120.0)
    settings = {"zero": {"stage3_param_persistence_threshold": 0}} if zero_stage == 3 else {}
    engine = DeepSpeedEngine(
        build_critic(getattr(torch, dtype)),
        **OPTIMIZER,
        zero_stage=zero_stage,
        dtype=dtype,
        settings=settings,
    )
    learnt = {name: value.float().numpy() for name, value in learn_values(engine).items()}
    engine.import_state(engine.export_state())
    learnt["restored"] = values(engine).numpy()
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    if rank == 0:
        queue.put(({str(p.dtype) for p in trained}, learnt))
    torch.distributed.barrier()


def my_prompts(engine: Any) -> Tensor:
    """Prompt lengths of the rows that are a rank's."""
    return PROMPT_LENGTHS_B[engine.rank :: engine.world_size]


def response_logprobs(model: Any, ids_BS: Tensor, prompt_lengths_B: Tensor) -> Tensor:
    """Log-probs of all that follows the prompts; 0 past the end."""
    lengths_B = LENGTH - prompt_lengths_B
    num_tokens = int(lengths_B.max())
    responses_BT = response_logits(ids_BS[:, 1:], prompt_lengths_B, num_tokens)
    (logprobs_BT,) = chunked_logprobs(
        model, ids_BS, torch.ones_like(ids_BS), prompt_lengths_B, responses_BT
    )
    return logprobs_BT * (torch.arange(num_tokens) < lengths_B.unsqueeze(1))


def rank_main(
    rank: int,
    world_size: int,
    port: int,
    zero_stage: int,
    recompute: bool,
    state: Any,
    first: int,
    discarding: bool,
    queue: Any,
) -> None:
    torch.set_num_threads(1)
    from rlhf_ray.engines.deepspeed.engine import DeepSpeedEngine, join_group

    join_group(rank, world_size, "127.0.0.1", port, 120.0)
    # Small weights would stay on every rank: at stage 3, have each of them gathered.
    settings = {"zero": {"stage3_param_persistence_threshold": 0}} if zero_stage == 3 else {}
    engine = DeepSpeedEngine(
        build(recompute), **OPTIMIZER, zero_stage=zero_stage, dtype="float32", settings=settings
    )
    if state is not None:
        engine.import_state({name: torch.from_numpy(value) for name, value in state.items()})
    norms = take_steps(engine, first, discarding)
    exported = {name: value.numpy() for name, value in engine.export_state().items()}
    if rank == 0:
        queue.put((norms, exported))
    torch.distributed.barrier()
