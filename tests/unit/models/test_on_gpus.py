"""Forward passes on fake tensors of another device than the CPU: nothing is computed, but an
operation on tensors of two devices is an error, as on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rlhf_ray.algorithms import advantages, logprobs, losses, whitening
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.engines import transformers_engine
from rlhf_ray.models import adapters
from rlhf_ray.models.forward import ValueModel, causal_lm_logits, sequence_scores
from rlhf_ray.models.loading import load_causal_lm, load_sequence_classifier
from rlhf_ray.models.stop_conditions import StopConditions
from rlhf_ray.models.token_logprobs import answer_with_logprobs
from rlhf_ray.types import Prompt, SampleRequest

# A build without CUDA cannot index tensors of "cuda". On fake ones "meta" is a device like others.
GPU = torch.device("cuda", 0) if torch.backends.cuda.is_built() else torch.device("meta")
CPU = torch.device("cpu")
RULE = SamplingRule(temperature=0.7, top_k=5, top_p=0.9, min_tokens=2, stop_token_ids=(1,))


@pytest.fixture
def fake() -> FakeTensorMode:
    """The mode in which tensors have a shape and a device, but no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def on_gpu(fake: FakeTensorMode, module: nn.Module) -> Any:
    """Replace a module's tensors by fake ones of a GPU, in place."""
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            held = nn.Parameter(moved(fake, param.data), requires_grad=param.requires_grad)
            part._parameters[name] = held
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = moved(fake, buffer)
    return module


def moved(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    without_data = fake.from_tensor(tensor)
    with fake:
        return without_data.to(GPU)


def policy(base: Path) -> Any:
    model = load_causal_lm(str(base), ModelConfig(dtype="bfloat16"))
    lora = LoraConfig(r=2)
    return adapters.attach(answer_with_logprobs(model), lora, "CAUSAL_LM", seed=0, dropout=0.0)


def batch() -> tuple[Tensor, Tensor]:
    """Sequences and attention."""
    ids_BS = torch.ones(2, 9, dtype=torch.long).to(GPU)
    return ids_BS, ids_BS.clone()


def test_logits_and_logprobs_stay_on_the_gpu(fake: FakeTensorMode, base: Path) -> None:
    model = on_gpu(fake, policy(base).eval())
    with fake:
        ids_BS, attention_BS = batch()
        logits_BSV = causal_lm_logits(model)(ids_BS, attention_BS)
        found = [logprobs.token_logprobs(logits_BSV, ids_BS, 0.7), logprobs.entropy(logits_BSV)]
        assert [(part.device, tuple(part.shape)) for part in found] == [(GPU, (2, 9))] * 2
        assert causal_lm_logits(model, last=3)(ids_BS, attention_BS).shape[1] == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_scores_stay_on_the_gpu(fake: FakeTensorMode, base: Path, dtype: Any) -> None:
    model = load_sequence_classifier(str(base), ModelConfig(dtype=dtype))
    wrapped = adapters.attach(model, LoraConfig(r=2), "SEQ_CLS", seed=0, dropout=0.0).eval()
    adapters.compute_in_base_dtype(wrapped)
    critic = ValueModel(on_gpu(fake, wrapped))
    with fake:
        ids_BS, attention_BS = batch()
        values_BS = critic(ids_BS, attention_BS)
        assert (values_BS.device.type, values_BS.dtype) == (GPU.type, torch.float32)
        assert sequence_scores(wrapped, ids_BS, attention_BS).device.type == GPU.type


def test_losses_and_advantages_stay_on_the_gpu(fake: FakeTensorMode) -> None:
    rows_BT = moved(fake, torch.ones(4, 6))
    with fake:
        computed = losses_and_advantages(rows_BT)
    assert {part.device.type for part in computed} == {GPU.type}


def losses_and_advantages(rows_BT: Tensor) -> list[Tensor]:
    mask_BT, scores_B = rows_BT.bool(), rows_BT[:, 0]
    return [
        losses.policy_loss(rows_BT, rows_BT, rows_BT, mask_BT, dual_clip=3.0, weights=rows_BT)[0],
        losses.value_loss(rows_BT, rows_BT, rows_BT, mask_BT)[0],
        losses.pairwise_reward_loss(scores_B, scores_B),
        *advantages.gae(rows_BT, rows_BT, mask_BT, 1.0, 0.95),
        whitening.masked_whiten(rows_BT, mask_BT),
        *(kl_estimate(rows_BT, rows_BT, kind) for kind in ("k1", "k2", "k3")),
    ]


def test_decoding_stays_on_the_gpu(
    fake: FakeTensorMode, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = transformers_engine.TransformersSettings(
        model=str(base),
        settings=ModelConfig(),
        rule=RULE,
        stop_conditions=StopConditions(max_tokens=3, strings=(), limits=None),
    )
    engine: Any = transformers_engine.TransformersEngine(settings)
    model = load_causal_lm(str(base), ModelConfig())
    devices: list[str] = []

    def tokens(drawn_B: Tensor) -> list[int]:  # of a fake tensor there are none
        devices.append(drawn_B.device.type)
        return [5] * len(drawn_B)

    monkeypatch.setattr(FakeTensor, "tolist", tokens)
    monkeypatch.setattr(engine, "_extend", lambda *_: len(devices) == 3)
    monkeypatch.setattr(transformers_engine._Row, "sampled", lambda _, logprobs_T: logprobs_T)
    prompts = [Prompt(str(n), "", (5,) * n) for n in (2, 4)]
    requests = [SampleRequest(position, prompt, 1) for position, prompt in enumerate(prompts)]
    engine._slot = adapters.AdapterSlot(on_gpu(fake, model))
    with fake:
        rows = engine._decode(requests, [3, 3], torch.ones(2, 3, dtype=torch.float64))
        assert devices == [GPU.type] * 3
        assert [tuple(row.shape) for row in rows] == [(3,)] * 2


def test_a_tensor_left_on_the_cpu_is_found(fake: FakeTensorMode, base: Path) -> None:
    model = on_gpu(fake, policy(base).eval())
    with fake:
        ids_BS, attention_BS = batch()
        with pytest.raises(Exception, match="device"):
            causal_lm_logits(model)(ids_BS, attention_BS) + torch.ones(9, 1)
