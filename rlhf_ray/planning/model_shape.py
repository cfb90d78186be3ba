"""What of a model's architecture decides how much memory and time it takes; without torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rlhf_ray.config.model import LoraConfig, ShapeConfig, TinyModelConfig
from rlhf_ray.planning.memory import ModelSize


@dataclass(frozen=True)
class Linear:
    """Linear layers of the blocks that are alike."""

    name: str
    """Last part of their name, such as ``q_proj``."""
    inputs: int
    outputs: int
    count: int
    """How many there are in all blocks."""


@dataclass(frozen=True)
class Shape:
    """A decoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    size: ModelSize
    """Of the model as it is loaded, its head included."""
    output_parameters: int
    """Of the output layer over the vocabulary, where it shares none of its weights."""
    linears: tuple[Linear, ...]
    """Of the blocks."""

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies two projections."""
        return any("gate" in linear.name for linear in self.linears)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that a KV cache holds of a token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def adapted(self, lora: LoraConfig) -> tuple[Linear, ...]:
        """The layers that an adapter lies on."""
        if isinstance(lora.target_modules, str):
            return self.linears
        targets = {target.rpartition(".")[2] for target in lora.target_modules}
        return tuple(linear for linear in self.linears if linear.name in targets)

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Of both matrices of every adapted layer."""
        return sum(
            lora.r * (linear.inputs + linear.outputs) * linear.count
            for linear in self.adapted(lora)
        )

    def with_scalar_head(self) -> "Shape":
        """The same transformer as a reward model or a critic."""
        size = self.size
        parameters = size.parameters - self.output_parameters + self.hidden_size
        return replace(self, size=ModelSize(parameters, size.quantizable), output_parameters=0)


def described(shape: ShapeConfig) -> Shape:
    """A decoder as Llama, Mistral and Qwen have it: RMS norms, no biases, layers named alike."""
    heads, width, mlp = shape.num_heads, shape.hidden_size, shape.intermediate_size
    kv_heads = shape.num_kv_heads or heads
    head_dim = shape.head_dim or width // heads
    layers = shape.num_layers
    linears = (
        Linear("q_proj", width, heads * head_dim, layers),
        Linear("k_proj", width, kv_heads * head_dim, layers),
        Linear("v_proj", width, kv_heads * head_dim, layers),
        Linear("o_proj", heads * head_dim, width, layers),
        *([Linear("gate_proj", width, mlp, layers)] if shape.gated_mlp else []),
        Linear("up_proj", width, mlp, layers),
        Linear("down_proj", mlp, width, layers),
    )
    vocabulary = shape.vocab_size * width
    quantizable = num_weights(linears)
    output = 0 if shape.tied_embeddings else vocabulary
    norms = (2 * layers + 1) * width
    return Shape(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=shape.vocab_size,
        size=ModelSize(quantizable + vocabulary + output + norms, quantizable),
        output_parameters=output,
        linears=linears,
    )


def tiny_shape(tiny: TinyModelConfig) -> Shape:
    """The small Llama that is built where no model is given."""
    return described(ShapeConfig(**tiny.model_dump()))


def num_weights(linears: Iterable[Linear]) -> int:
    """Weights of linear layers."""
    return sum(linear.inputs * linear.outputs * linear.count for linear in linears)
