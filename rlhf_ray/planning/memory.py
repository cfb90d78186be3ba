"""How much memory a model and its training state take: arithmetic on numbers of parameters.

Bytes throughout; 1 GB is 10^9 of them. What a forward and a backward pass add is in `activations`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.config.model import Dtype

Quantization = Literal["none", "int8", "nf4"]

GB = 10**9

BYTES: dict[str, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": 4.127 / 8}
"""Of a parameter. nf4: four bits, and .127 for the scales of double quantisation (Dettmers et al.
2023, arXiv:2305.14314, section 3)."""

ADAM_BYTES = 8
"""Of a trained parameter: both of Adam's moments, in float32."""

STATE_BYTES: Mapping[str, int] = {"weights": 4, "gradients": 4, "optimizer": ADAM_BYTES}
"""Of a trained parameter, by part, all in float32."""


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters."""

    parameters: int
    """All; shared weights once."""
    quantizable: int
    """Those in the linear layers of the blocks, which int8 and nf4 hold."""


def weights_bytes(size: ModelSize, dtype: Dtype, quantization: Quantization = "none") -> float:
    """What the weights take; embeddings, norms and the output layer are never quantised."""
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
) -> Parts:
    """What one rank of a DeepSpeed group holds besides its activations.

    ZeRO shards over the ranks from stage 1 the optimizer (its own fp32 weights and Adam's moments),
    from 2 the gradients, from 3 the weights, frozen ones too (Rajbhandari et al. 2019,
    arXiv:1910.02054, section 5). What a pass gathers again of these, and the buffer that gradients
    are reduced in, have sizes of their own: DeepSpeed's defaults, unless ``zero`` names others.

    Args:
        frozen: bytes of the weights that are not trained.
        trainable: numbers that are; in ``dtype``, as DeepSpeed casts the whole module.
        dtype: of weights and gradients.
        stage: 0 to 3.
        ranks: of the group.
        zero: keys of DeepSpeed's ``zero_optimization``.
        on_gpu: whether memory counts when it is asked for, not when it is touched.
    """
    weights = frozen + trainable * BYTES[dtype]
    live = min(weights, BYTES[dtype] * zero.get("stage3_max_live_parameters", 1e9))
    bucket = zero.get("reduce_bucket_size", 5e8)
    gradient = trainable * BYTES[dtype] / (ranks if stage >= 2 else 1)
    at_the_step = trainable * 4 / (ranks if stage >= 1 else 1)
    return {
        "weights": frozen / (ranks if stage == 3 else 1),
        "adapter": trainable * BYTES[dtype] / (ranks if stage == 3 else 1),
        "gathered": live if stage == 3 and ranks > 1 else 0,
        "gradients": gradient + at_the_step,
        "optimizer": trainable * (4 + ADAM_BYTES) / (ranks if stage >= 1 else 1),
        "reduce buffer": BYTES[dtype] * (bucket if on_gpu else min(bucket, trainable)),
    }


def training_bytes(trainable: int) -> int:
    """Weights, gradients and Adam's moments of what is trained, whatever it stands on."""
    return trainable * sum(STATE_BYTES.values())
