"""Compute log-probs of response tokens without the logits of a whole batch.

Logits are by far the largest tensor of a training step: 8,000 tokens of a vocabulary of 250,000 are
8 GB in fp32, and a backward pass holds several such tensors. Here the head is applied to a chunk of
response tokens at a time, and again in the backward pass.

Dimensions: B sequences, S tokens of prompt and response, T response tokens, N = B * T, D width, V
vocabulary. Sequences are left-aligned and right-padded.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_ray.algorithms.experience import response_logits
from rlhf_ray.algorithms.logprobs import SamplingRule, entropy, token_logprobs
from rlhf_ray.errors import DataError
from rlhf_ray.models.adapters import Model, unwrapped
from rlhf_ray.models.probes import evaluating, refuse_change

ModelT = TypeVar("ModelT", bound=Model)

CHUNK_LOGITS = 2**24
"""Largest number of logits per chunk: 64 MiB in fp32, of which a backward pass holds several."""
PLAIN = SamplingRule()
"""The model's own distribution: every token, at temperature 1."""
VERIFIED_TOKENS = 8
"""Number of tokens on which the model's own logits are compared with those computed here."""

Entropy = Literal["none", "value", "gradient"]


@dataclass(frozen=True, slots=True)
class _Query:
    prompt_lengths_B: Tensor
    responses_BT: Tensor
    rule: SamplingRule
    entropy: Entropy


def answer_with_logprobs(model: ModelT) -> ModelT:
    """Make a causal LM answer `chunked_logprobs`; its other forward passes stay the same.

    The forward of the transformers model itself is replaced. Wrappers around it (PEFT,
    DistributedDataParallel, a training engine that shards weights) see an ordinary forward pass,
    and weights keep their names.

    Args:
        model: causal LM, in a PEFT wrapper or not.

    Returns:
        The same model.

    Raises:
        DataError: it has no output layer over a transformer.
    """
    base = unwrapped(model)
    assert isinstance(base, PreTrainedModel)
    base.forward = _LogprobForward(base)
    return model


def chunked_logprobs(
    model: nn.Module,
    sequences_BS: Tensor,
    attention_BS: Tensor,
    prompt_lengths_B: Tensor,
    responses_BT: Tensor,
    *,
    rule: SamplingRule = PLAIN,
    entropy: Entropy = "none",
) -> tuple[Tensor, ...]:
    """Return the log-probs of response tokens in the distribution that they were sampled from.

    Args:
        model: from `answer_with_logprobs`, with any wrappers around it.
        sequences_BS: token ids of prompt and response.
        attention_BS: 1 on real tokens.
        prompt_lengths_B: number of prompt tokens, at least 1.
        responses_BT: token ids of the responses alone; padding needs a valid id too.
        rule: by which the tokens were sampled.
        entropy: none; value: compute entropies; gradient: compute them differentiably.

    Returns:
        ``(logprobs_BT,)``, or with entropies ``(logprobs_BT, entropy_BT)``, in nats, fp32; entries
        at padding are arbitrary.

    Raises:
        DataError: the model transforms its logits after the head in an unknown way.
    """
    return model(
        input_ids=sequences_BS,
        attention_mask=attention_BS,
        position_ids=position_ids(attention_BS),
        use_cache=False,
        logprob_query=_Query(prompt_lengths_B, responses_BT, rule, entropy),
    )


def position_ids(attention_BS: Tensor) -> Tensor:
    """Return positions that count real tokens alone: 0, 1, 2, ...; `_BS`."""
    return (attention_BS.long().cumsum(dim=1) - 1).clamp(min=0)


class _LogprobForward:
    """Forward of a transformers causal LM that also answers log-prob queries."""

    def __init__(self, model: PreTrainedModel) -> None:
        functools.update_wrapper(self, model.forward)  # generate() looks at its signature
        self._model = model
        self._own_forward: Callable[..., Any] = model.forward
        self._backbone: nn.Module = model.base_model
        self._verified = False
        if self._backbone is model or model.get_output_embeddings() is None:
            raise DataError(
                f"{type(model).__name__} is not a transformer with an output layer on top; "
                "policies need a decoder such as LlamaForCausalLM"
            )

    def __call__(
        self, *args: object, logprob_query: _Query | None = None, **inputs: object
    ) -> object:
        if logprob_query is None:
            return self._own_forward(*args, **inputs)
        # A wrapper may pass the whole signature; not every backbone takes what is None here.
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if not self._verified:
            self._verify(inputs)
        return self._answer(self._backbone(**inputs).last_hidden_state, logprob_query)

    @property
    def _head(self) -> nn.Module:
        """Looked up each time: PEFT may have replaced it by an adapted one."""
        return cast(nn.Module, self._model.get_output_embeddings())

    def _answer(self, hidden_BSD: Tensor, query: _Query) -> tuple[Tensor, ...]:
        shape = query.responses_BT.shape
        hidden_BTD = response_logits(hidden_BSD, query.prompt_lengths_B, shape[1])
        hidden_ND, tokens_N = hidden_BTD.flatten(0, 1), query.responses_BT.flatten()
        steps_N = torch.arange(shape[1], device=tokens_N.device).repeat(shape[0])
        head = self._head
        forward = head.forward

        def of_chunk(hidden_ND: Tensor, tokens_N: Tensor, steps_N: Tensor) -> tuple[Tensor, ...]:
            return _of_logits(self._finished(forward(hidden_ND)), tokens_N, steps_N, query)

        def by_chunk(hidden_ND: Tensor) -> tuple[Tensor, ...]:
            return self._by_chunk(of_chunk, hidden_ND, tokens_N, steps_N)

        # One call of the head for all chunks. ZeRO-3 gathers its weights around each call, and all
        # ranks must gather equally often, but their responses make unequal numbers of chunks.
        with _forward_as(head, by_chunk):
            answers_N = head(hidden_ND)
        return tuple(answer_N.view(shape) for answer_N in answers_N)

    def _by_chunk(
        self, of_chunk: Callable[..., tuple[Tensor, ...]], *rows: Tensor
    ) -> tuple[Tensor, ...]:
        size = max(1, CHUNK_LOGITS // self._text_config.vocab_size)
        chunks = list(zip(*(part.split(size) for part in rows), strict=True))
        if len(chunks) > 1 and torch.is_grad_enabled():
            of_chunk = functools.partial(checkpoint, of_chunk, use_reentrant=False)
        answers = [of_chunk(*chunk) for chunk in chunks]
        return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))

    @property
    def _text_config(self) -> PretrainedConfig:
        return self._model.config.get_text_config()

    def _finished(self, logits: Tensor) -> Tensor:
        """Apply what some architectures do to the head's output (Cohere, Granite, Gemma 2)."""
        config = self._text_config
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def _verify(self, inputs: Mapping[str, object]) -> None:
        """Compare with the model's own logits: an unknown architecture may change them further."""
        start = {
            name: value[:1, :VERIFIED_TOKENS] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        with evaluating(self._model):  # dropout would make the two differ
            own = self._own_forward(**start).logits.float()
            ours = self._finished(self._head(self._backbone(**start).last_hidden_state)).float()
            eager = self._eager_logits(start)
        used = self._model.config._attn_implementation
        refuse_change(
            own if eager is None else eager,
            own,
            self._model.dtype,
            f"{type(self._model).__name__} computes something else with model.attn_implementation "
            f"{used} than with eager, as which it is defined; set model.attn_implementation=eager",
        )
        if not torch.allclose(ours, own, rtol=1e-2, atol=1e-2):
            raise DataError(
                f"{type(self._model).__name__} transforms its logits after the output layer in an "
                f"unknown way, by up to {float((ours - own).abs().max()):.3g}; its log-probs would "
                "be wrong: use another architecture"
            )
        self._verified = True

    def _eager_logits(self, inputs: Mapping[str, object]) -> Tensor | None:
        """Return its own logits with plain attention; None: they are computed with it anyway.

        Other kinds leave out what they do not know, such as soft-capping, without an error.
        """
        used = self._model.config._attn_implementation
        if used in (None, "eager"):
            return None
        self._model.set_attn_implementation("eager")
        try:
            return self._own_forward(**inputs).logits.float()
        finally:
            self._model.set_attn_implementation(used)


def _of_logits(
    logits_NV: Tensor, tokens_N: Tensor, steps_N: Tensor, query: _Query
) -> tuple[Tensor, ...]:
    drawn_NV = query.rule.logits(logits_NV, tokens_N, steps_N)
    logprobs_N = token_logprobs(drawn_NV, tokens_N)
    if query.entropy == "none":
        return (logprobs_N,)
    # After the log-probs: checkpointing stops recomputing once it has what the backward needs, so
    # an entropy without a gradient is not computed again.
    with torch.set_grad_enabled(torch.is_grad_enabled() and query.entropy == "gradient"):
        return logprobs_N, entropy(drawn_NV)


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make calls of the module run another forward; its hooks still run around it."""
    own = vars(module).get("forward")  # libraries such as accelerate set one on instances
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
