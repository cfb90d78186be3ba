"""Log-probs of response tokens without the logits of a whole batch.

Logits are the largest tensor of a training step by far: 8,000 tokens of a vocabulary of 250,000 are
8 GB in fp32, several times over in a backward pass. Here the head is applied to some tokens of the
responses at a time, and once more in the backward pass.

Dimensions: B sequences, S tokens of prompt and response, T response tokens, N = B * T, D width, V
vocabulary. Sequences are left-aligned and right-padded.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_ray.algorithms.experience import response_logits
from rlhf_ray.algorithms.logprobs import SamplingRule, entropy, token_logprobs
from rlhf_ray.errors import DataError
from rlhf_ray.models.heads import position_ids

CHUNK_LOGITS = 2**24
"""Most logits that are made at a time: 64 MiB in fp32, of which a backward pass holds several."""
PLAIN = SamplingRule()
"""Every token, at temperature 1."""
VERIFIED_TOKENS = 8
"""Length of the sequence on which a model's own logits are compared with those made here."""

Entropy = Literal["none", "value", "gradient"]


@dataclass(frozen=True, slots=True)
class _Query:
    prompt_lengths_B: Tensor
    responses_BT: Tensor
    rule: SamplingRule
    entropy: Entropy


def answer_with_logprobs(model: Any) -> Any:
    """Teach a causal LM to answer `chunked_logprobs`; its other forward passes stay as they are.

    It is taught in the forward of the transformers model itself: what stands around that (PEFT,
    DistributedDataParallel, a training engine that shards weights) sees an ordinary forward pass,
    and weights keep their names.

    Args:
        model: causal LM, in a PEFT wrapper or not.

    Returns:
        The same model.

    Raises:
        DataError: it has no output layer over a transformer.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.forward = _LogprobForward(base)
    return model


def chunked_logprobs(
    model: Any,
    sequences_BS: Tensor,
    attention_BS: Tensor,
    prompt_lengths_B: Tensor,
    responses_BT: Tensor,
    *,
    rule: SamplingRule = PLAIN,
    entropy: Entropy = "none",
) -> tuple[Tensor, ...]:
    """Log-probs of response tokens in the distribution that they were drawn from.

    Args:
        model: from `answer_with_logprobs`, with whatever was put around it since.
        sequences_BS: token ids of prompt and response.
        attention_BS: 1 on real tokens.
        prompt_lengths_B: number of prompt tokens, at least 1.
        responses_BT: token ids of the responses alone; padding needs a valid id too.
        rule: by which the tokens were drawn.
        entropy: whether entropies are wanted, and differentiable.

    Returns:
        ``(logprobs_BT,)``, or with entropies ``(logprobs_BT, entropy_BT)``, in nats, fp32; what
        stands at padding means nothing.

    Raises:
        DataError: the model changes its logits behind the head in a way that is not known here.
    """
    return model(
        input_ids=sequences_BS,
        attention_mask=attention_BS,
        position_ids=position_ids(attention_BS),
        use_cache=False,
        logprob_query=_Query(prompt_lengths_B, responses_BT, rule, entropy),
    )


class _LogprobForward:
    """Forward of a transformers causal LM that answers queries as well."""

    def __init__(self, model: Any) -> None:
        functools.update_wrapper(self, model.forward)  # generate() looks at its signature
        self._model = model
        self._own_forward = model.forward
        self._backbone: Any = getattr(model, model.base_model_prefix, None)
        self._verified = False
        if self._backbone in (None, model) or self._head is None:
            raise DataError(
                f"{type(model).__name__} is not a transformer with an output layer on top; "
                "policies need a decoder such as LlamaForCausalLM"
            )

    def __call__(self, *args: Any, logprob_query: _Query | None = None, **inputs: Any) -> Any:
        if logprob_query is None:
            return self._own_forward(*args, **inputs)
        given = {name: value for name, value in inputs.items() if value is not None}
        if not self._verified:
            self._verify(given)
        return self._answer(self._backbone(**given).last_hidden_state, logprob_query)

    @property
    def _head(self) -> Any:
        """Looked up each time: PEFT may have put an adapted one in its place."""
        return self._model.get_output_embeddings()

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

        # One call of the head, whatever the number of chunks: sharding engines gather its weights
        # around a call, and their ranks, whose responses are unequal, must gather equally often.
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
    def _text_config(self) -> Any:
        return self._model.config.get_text_config()

    def _finished(self, logits: Tensor) -> Tensor:
        """What some architectures make of the head's output (Cohere, Granite, Gemma 2)."""
        config = self._text_config
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def _verify(self, inputs: dict[str, Any]) -> None:
        start = {
            name: value[:1, :VERIFIED_TOKENS] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        with _evaluating(self._model):  # dropout would make the two differ
            own = self._own_forward(**start).logits.float()
            ours = self._finished(self._head(self._backbone(**start).last_hidden_state)).float()
        if not torch.allclose(ours, own, rtol=1e-2, atol=1e-2):
            raise DataError(
                f"{type(self._model).__name__} changes its logits behind the output layer by up "
                f"to {float((ours - own).abs().max()):.3g} in a way that is not known here; its "
                "log-probs would be wrong: use another architecture"
            )
        self._verified = True


def _of_logits(
    logits_NV: Tensor, tokens_N: Tensor, steps_N: Tensor, query: _Query
) -> tuple[Tensor, ...]:
    drawn_NV = query.rule.logits(logits_NV, tokens_N, steps_N)
    logprobs_N = token_logprobs(drawn_NV, tokens_N)
    if query.entropy == "none":
        return (logprobs_N,)
    # Behind the log-probs: what needs no gradient there is not computed again for the backward.
    with torch.set_grad_enabled(torch.is_grad_enabled() and query.entropy == "gradient"):
        return logprobs_N, entropy(drawn_NV)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within, every module is in evaluation mode; each gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, a call of the module, its hooks included, runs another forward."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
