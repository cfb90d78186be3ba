"""What passes through a decoder take: tensors that a backward pass needs, and temporaries.

Counted operator by operator, as Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) do, on a
block as transformers computes it: fused attention, no dropout inside the model. A frozen layer
keeps no input, since only the gradient of its weights would need it, so a block under an adapter
keeps less than one that is trained.

Of one token in one block, h wide, with numbers of b bytes (2 or 4):

- two norms: their inputs in fp32, 8h; where they are trained, what they scale as well;
- attention: queries, keys, values (spread over all heads where rows are padded), output: 4ab for
  a = heads x head_dim;
- the MLP, m wide: what goes into its activation function, what comes out, and what that is
  multiplied with: 3mb; without a gate mb;
- inputs of trained matrices, once for those that share one; a copy each where the adapter computes
  in another data type, and with dropout a copy and a mask each. bitsandbytes keeps the inputs of
  frozen int8 layers as well (`MatMul8bitLt`), and dequantises a layer to go back through it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_ray.config.model import LoraConfig
from rlhf_ray.planning.memory import Quantization
from rlhf_ray.planning.model_shape import Linear, Shape

_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_KEPT_ANYWAY = ("o_proj", "out_proj")
"""Their input is the output of attention."""

CHUNK_LOGITS = 2**24
"""Logits that learners make at a time (`token_logprobs.CHUNK_LOGITS`)."""
CHUNK_BYTES = 20
"""Of a logit there: five tensors in fp32, of the entropy forwards, of the log-prob backwards."""
WHOLE_BYTES = 12
"""Of a logit where a stage takes the loss of all at once: in the backward pass the log-softmax and
two gradients, all in fp32."""


@dataclass(frozen=True)
class Pass:
    """One forward pass, with or without a backward pass after it."""

    tokens: int
    """Padding included."""
    length: int
    """Tokens of its longest row."""
    num_bytes: float
    """Of a number of the activations."""
    recomputes: bool = False
    """Whether blocks keep their inputs alone."""

    @property
    def rows(self) -> int:
        """Of full length."""
        return max(1, self.tokens // self.length)


def adapter_pass_bytes(
    shape: Shape,
    lora: LoraConfig,
    what: Pass,
    *,
    adapter_bytes: float,
    dropout: float,
    quantization: Quantization,
) -> float:
    """Peak of forward and backward with an adapter over a frozen base.

    Args:
        adapter_bytes: of a number of the adapter, which its inputs are cast to.
        dropout: on the adapter's inputs.
        quantization: of the base.
    """
    adapted, layers = shape.adapted(lora), shape.num_layers
    copies = bool(dropout) or adapter_bytes != what.num_bytes
    keeping = shape.linears if quantization == "int8" else () if copies else adapted
    inputs = _distinct_inputs(keeping, layers) * what.num_bytes
    if copies:
        width = sum(linear.inputs * linear.count for linear in adapted) / layers
        inputs += width * (adapter_bytes + (1 if dropout else 0))
    ranks = sum(lora.r * linear.count for linear in adapted) / layers * adapter_bytes
    norms = 8 * shape.hidden_size
    largest = max(linear.inputs * linear.outputs for linear in shape.linears)
    dequantised = 0 if quantization == "none" else largest * what.num_bytes
    return _peak(shape, what, norms + inputs + ranks) + dequantised


def whole_pass_bytes(shape: Shape, what: Pass) -> float:
    """Peak of forward and backward where all weights are trained, which are in fp32."""
    norms = 16 * shape.hidden_size
    inputs = _distinct_inputs(shape.linears, shape.num_layers) * what.num_bytes
    return _peak(shape, what, norms + inputs)


def forward_bytes(shape: Shape, what: Pass) -> float:
    """Peak of a forward pass that nothing follows: the block in hand."""
    return what.tokens * _temporaries(shape, what)


def chunked_logits_bytes(shape: Shape, tokens: int) -> float:
    """Peak of the log-probs of so many response tokens (`models.token_logprobs`)."""
    return min(tokens * shape.vocab_size, CHUNK_LOGITS) * CHUNK_BYTES


def whole_logits_bytes(shape: Shape, tokens: int, num_bytes: float) -> float:
    """Peak of a next-token loss over so many tokens at once.

    Args:
        num_bytes: of a logit as the head puts it out.
    """
    cast = num_bytes if num_bytes != 4 else 0
    return tokens * shape.vocab_size * (WHOLE_BYTES + cast)


def _peak(shape: Shape, what: Pass, per_token: float) -> float:
    """All blocks' tensors, or their inputs and one block's; and the temporaries of the last."""
    attention = 4 * shape.num_heads * shape.head_dim * what.num_bytes
    mlp = (3 if shape.is_gated else 1) * shape.intermediate_size * what.num_bytes
    block = what.tokens * (per_token + attention + mlp) + _mask(what)
    kept = block * shape.num_layers
    if what.recomputes:
        kept = what.tokens * shape.hidden_size * what.num_bytes * shape.num_layers + block
    return kept + what.tokens * _temporaries(shape, what)


def _mask(what: Pass) -> float:
    """Each layer keeps its own copy; rows of one length, or one row, need none."""
    return what.tokens * what.length * what.num_bytes if what.rows > 1 else 0


def _temporaries(shape: Shape, what: Pass) -> float:
    """Of a token: the MLP's three widths, forwards or their gradients, and the residual."""
    return (3 * shape.intermediate_size + 2 * shape.hidden_size) * what.num_bytes


def _distinct_inputs(linears: Iterable[Linear], layers: int) -> float:
    """Widths of the inputs that a block keeps for these, each once."""
    found: dict[str, float] = {}
    for linear in linears:
        if linear.name in _KEPT_ANYWAY:
            continue
        shared = next((group[0] for group in _SHARED_INPUTS if linear.name in group), linear.name)
        found[shared] = linear.inputs * linear.count / layers
    return sum(found.values())
