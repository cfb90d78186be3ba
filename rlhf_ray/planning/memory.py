"""Memory of a model: its weights, its training state, and its passes.

Arithmetic on numbers of parameters. Bytes throughout; 1 GB is 10^9 of them.

Activations are counted operator by operator, as Korthikanti et al. 2022 (arXiv:2205.05198, section
4.1) do, on a block as transformers computes it: fused attention, no dropout inside the model. A
frozen layer keeps no input, since only the gradient of its weights would need it, so a block under
an adapter keeps less than one that is trained. One block, h wide, keeps of each token, with numbers
of b bytes (2 or 4):

- two norms: their inputs in fp32, 8h; where they are trained, what they scale as well;
- attention: queries, keys, values (expanded to all heads where rows are padded) and output: 4ab for
  a = heads x head_dim;
- the MLP, m wide: the input and output of its activation function, and the factor that the output
  is multiplied by: 3mb; without a gate mb;
- inputs of trained matrices, once for those that share one; a copy each where the adapter computes
  in another data type, and with dropout a copy and a mask each. bitsandbytes keeps the inputs of
  frozen int8 layers as well (`MatMul8bitLt`), and dequantises a layer for its backward pass.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf_ray.config.model import Dtype, LoraConfig

Quantization = Literal["none", "int8", "nf4"]

GB = 10**9


def gb(num_bytes: float) -> str:
    """Format bytes as GB."""
    return f"{num_bytes / GB:,.2f} GB"


BYTES: dict[str, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": 4.127 / 8}
"""Bytes of a parameter. nf4: four bits, and .127 for the scales of double quantisation (Dettmers et
al. 2023, arXiv:2305.14314, section 3)."""

ADAM_BYTES = 8
"""Bytes of both of Adam's moments for a trained parameter, in float32."""

STATE_BYTES: Mapping[str, int] = {"weights": 4, "gradients": 4, "optimizer": ADAM_BYTES}
"""Part -> bytes for a trained parameter, all in float32."""


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of a model."""

    parameters: int
    """All parameters; shared weights count once."""
    quantizable: int
    """Parameters in the linear layers of the blocks, which int8 and nf4 apply to."""


@dataclass(frozen=True)
class Linear:
    """Linear layers of the blocks with the same name and size."""

    name: str
    """Last part of their name, such as ``q_proj``."""
    inputs: int
    outputs: int
    count: int
    """Number of such layers in all blocks."""


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    size: ModelSize
    """Parameters of the model as it is loaded, its head included."""
    output_parameters: int
    """Parameters of the output layer over the vocabulary; 0 where it is tied to the embedding."""
    linears: tuple[Linear, ...]
    """Linear layers of the blocks."""

    @property
    def is_gated(self) -> bool:
        """True if the MLP multiplies two projections."""
        return any("gate" in linear.name for linear in self.linears)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that a KV cache holds for a token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def adapted(self, lora: LoraConfig) -> tuple[Linear, ...]:
        """Return the layers that an adapter is on."""
        if isinstance(lora.target_modules, str):
            return self.linears
        targets = {target.rpartition(".")[2] for target in lora.target_modules}
        return tuple(linear for linear in self.linears if linear.name in targets)

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Return the parameters of both matrices of every adapted layer."""
        return sum(
            lora.r * (linear.inputs + linear.outputs) * linear.count
            for linear in self.adapted(lora)
        )

    def with_scalar_head(self) -> "Shape":
        """Return the same transformer with a scalar head, as a reward model or critic has."""
        size = self.size
        parameters = size.parameters - self.output_parameters + self.hidden_size
        return replace(self, size=ModelSize(parameters, size.quantizable), output_parameters=0)


def num_weights(linears: Iterable[Linear]) -> int:
    """Return the number of weights in linear layers."""
    return sum(linear.inputs * linear.outputs * linear.count for linear in linears)


def weights_bytes(size: ModelSize, dtype: Dtype, quantization: Quantization = "none") -> float:
    """Return the bytes of the weights; embeddings, norms and output layer are never quantised."""
    if quantization == "none":
        return size.parameters * BYTES[dtype]
    rest = size.parameters - size.quantizable
    return size.quantizable * BYTES[quantization] + rest * BYTES[dtype]


Parts = dict[str, float]
"""Name of a part of a process's memory -> its bytes on each of the process's GPUs."""


def deepspeed_parts(
    frozen: float,
    trainable: int,
    dtype: Dtype,
    stage: int,
    ranks: int,
    zero: Mapping[str, Any],
    on_gpu: bool,
    passes: Dtype | None = None,
) -> Parts:
    """Return what one rank of a DeepSpeed group holds on its device besides its activations.

    ZeRO shards the optimizer (its fp32 weights and Adam's moments) from stage 1, the gradients from
    stage 2, and the weights, frozen ones too, from stage 3 (Rajbhandari et al. 2019,
    arXiv:1910.02054, section 5). The weights that a pass gathers again and the buffer that
    gradients are reduced in have DeepSpeed's default sizes, unless ``zero`` sets others. What it
    has offloaded is in main memory (`offloaded_bytes`); stage 3 keeps gradients on its device.

    Args:
        frozen: bytes of the weights that are not trained.
        trainable: parameters that are trained.
        dtype: data type of their weights and gradients: fp32 where one of them is a head, else the
            base's, because DeepSpeed casts the whole module.
        stage: ZeRO stage, 0 to 3.
        ranks: size of the group.
        zero: keys of DeepSpeed's ``zero_optimization``.
        on_gpu: whether memory counts once it is allocated; on a CPU only what is touched counts.
        passes: data type that stage 3 gathers weights in; None: ``dtype``.
    """
    gathered = BYTES[passes or dtype] / BYTES[dtype]
    weights = (frozen + trainable * BYTES[dtype]) * gathered
    live = min(weights, BYTES[passes or dtype] * zero.get("stage3_max_live_parameters", 1e9))
    bucket = zero.get("reduce_bucket_size", 5e8)
    has_optimizer, has_weights = (
        not is_offloaded(zero, "optimizer"),
        not is_offloaded(zero, "param"),
    )
    gradient = trainable * BYTES[dtype] / (ranks if stage >= 2 else 1)
    at_the_step = trainable * 4 / (ranks if stage >= 1 else 1)
    share = has_weights / ranks if stage == 3 else 1
    return {
        "weights": frozen * share,
        "adapter": trainable * BYTES[dtype] * share,
        "gathered": live if stage == 3 and (ranks > 1 or not has_weights) else 0,
        "gradients": gradient * (has_optimizer or stage != 2) + at_the_step * has_optimizer,
        "optimizer": optimizer_bytes(trainable, stage, ranks) * has_optimizer,
        "reduce buffer": BYTES[dtype] * (bucket if on_gpu else min(bucket, trainable)),
    }


def is_offloaded(zero: Mapping[str, Any], what: Literal["optimizer", "param"]) -> bool:
    """Return whether a part is in main memory or on a disk (``offload_optimizer``, ...)."""
    return zero.get(f"offload_{what}", {}).get("device", "none") != "none"


def optimizer_bytes(trainable: int, stage: int, ranks: int) -> float:
    """Return the bytes of a rank's fp32 weights and Adam's moments, beside the weights in use."""
    return trainable * (4 + ADAM_BYTES) / (ranks if stage >= 1 else 1)


def training_bytes(trainable: int) -> int:
    """Return the bytes of weights, gradients and Adam's moments of the trained parameters."""
    return trainable * sum(STATE_BYTES.values())


_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_KEPT_ANYWAY = ("o_proj", "out_proj")
"""Their input is the output of attention, which is counted there."""

CHUNK_LOGITS = 2**24
"""Logits that learners compute at a time (`token_logprobs.CHUNK_LOGITS`)."""
CHUNK_BYTES = 20
"""Bytes of a logit there: five fp32 tensors, in the entropy's forward or the log-prob's backward
pass."""
WHOLE_BYTES = 12
"""Bytes of a logit where a stage takes the loss of all at once: the log-softmax and two gradients
in the backward pass, all in fp32."""


@dataclass(frozen=True)
class Pass:
    """One forward pass, with or without a backward pass after it."""

    tokens: int
    """Tokens, padding included."""
    length: int
    """Tokens of its longest row."""
    num_bytes: float
    """Bytes of a number in the activations."""
    recomputes: bool = False
    """Whether blocks keep only their inputs (gradient checkpointing)."""

    @property
    def rows(self) -> int:
        """Number of rows of full length."""
        return max(1, self.tokens // self.length)


def adapter_pass_bytes(
    shape: Shape,
    lora: LoraConfig,
    batch: Pass,
    *,
    adapter_bytes: float,
    dropout: float,
    quantization: Quantization,
) -> float:
    """Return the peak of forward and backward with an adapter over a frozen base."""
    adapted, layers = shape.adapted(lora), shape.num_layers
    copies = bool(dropout) or adapter_bytes != batch.num_bytes
    keeping = shape.linears if quantization == "int8" else () if copies else adapted
    inputs = _distinct_inputs(keeping, layers) * batch.num_bytes
    if copies:
        width = sum(linear.inputs * linear.count for linear in adapted) / layers
        inputs += width * (adapter_bytes + (1 if dropout else 0))
    ranks = sum(lora.r * linear.count for linear in adapted) / layers * adapter_bytes
    norms = 8 * shape.hidden_size
    largest = max(linear.inputs * linear.outputs for linear in shape.linears)
    dequantised = 0 if quantization == "none" else largest * batch.num_bytes
    return _peak(shape, batch, norms + inputs + ranks) + dequantised


def whole_pass_bytes(shape: Shape, batch: Pass) -> float:
    """Return the peak of forward and backward where all weights are trained, in fp32."""
    norms = 16 * shape.hidden_size
    inputs = _distinct_inputs(shape.linears, shape.num_layers) * batch.num_bytes
    return _peak(shape, batch, norms + inputs)


def forward_bytes(shape: Shape, batch: Pass) -> float:
    """Return the peak of a forward pass alone: that of the current block."""
    return batch.tokens * _temporaries(shape, batch)


def chunked_logits_bytes(shape: Shape, tokens: int) -> float:
    """Return the peak of computing response tokens' log-probs (`models.token_logprobs`)."""
    return min(tokens * shape.vocab_size, CHUNK_LOGITS) * CHUNK_BYTES


def whole_logits_bytes(shape: Shape, tokens: int, num_bytes: float) -> float:
    """Return the peak of a next-token loss over tokens at once, with ``num_bytes`` a logit."""
    cast = num_bytes if num_bytes != 4 else 0
    return tokens * shape.vocab_size * (WHOLE_BYTES + cast)


def _peak(shape: Shape, batch: Pass, per_token: float) -> float:
    """Return the bytes of all blocks' tensors, or of their inputs and one block's if recomputed;
    and of the last block's temporaries."""
    attention = 4 * shape.num_heads * shape.head_dim * batch.num_bytes
    mlp = (3 if shape.is_gated else 1) * shape.intermediate_size * batch.num_bytes
    block = batch.tokens * (per_token + attention + mlp) + _mask(batch)
    kept = block * shape.num_layers
    if batch.recomputes:
        kept = batch.tokens * shape.hidden_size * batch.num_bytes * shape.num_layers + block
    return kept + batch.tokens * _temporaries(shape, batch)


def _mask(batch: Pass) -> float:
    """Return the bytes of a layer's attention mask, which each keeps; a single row needs none."""
    return batch.tokens * batch.length * batch.num_bytes if batch.rows > 1 else 0


def _temporaries(shape: Shape, batch: Pass) -> float:
    """Return a token's bytes in the MLP's three widths, or their gradients, and the residual."""
    return (3 * shape.intermediate_size + 2 * shape.hidden_size) * batch.num_bytes


def _distinct_inputs(linears: Iterable[Linear], layers: int) -> float:
    """Return the summed widths of the inputs that a block keeps for layers, shared ones once."""
    widths: dict[str, float] = {}
    for linear in linears:
        if linear.name in _KEPT_ANYWAY:
            continue
        shared = next((group[0] for group in _SHARED_INPUTS if linear.name in group), linear.name)
        widths[shared] = linear.inputs * linear.count / layers
    return sum(widths.values())
