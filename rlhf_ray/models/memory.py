"""How much memory a model takes: arithmetic on numbers of parameters, without torch.

Bytes throughout; 1 GB is 10^9 of them. Activations and caches are not in here, but for the range of
`int8_lora_bytes`.
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_ray.config.model import Dtype

Quantization = Literal["none", "int8", "nf4"]

GB = 10**9

BYTES: dict[str, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": 4.127 / 8}
"""Of a parameter. nf4: four bits, and .127 for the scales of double quantisation (Dettmers et al.
2023, arXiv:2305.14314, section 3)."""

ADAM_BYTES = 8
"""Of a trained parameter: both of Adam's moments, in float32."""

FULL_BYTES = 4 + 4 + ADAM_BYTES
"""Of a parameter as this system trains it: weight and gradient in float32, and Adam's moments."""

INT8_LORA_BYTES = (1.2, 1.4)
"""Of a parameter of an int8 base with an adapter in training, its activations included: from short
batches to long ones (the StackLLaMA report)."""


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


def training_bytes(trainable: int) -> int:
    """Weights, gradients and Adam's moments of what is trained, whatever it stands on."""
    return trainable * FULL_BYTES


def half_precision_training_bytes(parameters: int) -> int:
    """All weights in half precision with Adam's moments in float32: (2 + 8) bytes a parameter."""
    return parameters * (2 + ADAM_BYTES)


def int8_lora_bytes(parameters: int) -> tuple[float, float]:
    """Least and most that training an adapter on an int8 base takes."""
    least, most = INT8_LORA_BYTES
    return parameters * least, parameters * most


def largest_int8_lora(memory: float) -> float:
    """Parameters of the largest base whose adapter can be trained in this much memory."""
    return memory / INT8_LORA_BYTES[1]
