"""Each worker of a tensor-parallel engine finds its own shard of the adapter in its layers.

The layers are vLLM's, made as rank r of n; what they hold is cut here by hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.linear as linear
import vllm.model_executor.parameter as parameter
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from rlhf_ray.engines.served_adapters import TensorDict, digest
from rlhf_ray.engines.vllm import worker_extension
from rlhf_ray.engines.vllm.worker_extension import FIRST_ADAPTER, AdapterExtension, report

WIDTH, HEAD, HEADS, KV_HEADS, INNER = 32, 8, 8, 2, 48
RANK, LARGEST_RANK, SCALING = 5, 8, 0.5
BLOCK = "model.layers.0"
KV = HEAD * KV_HEADS
SIZES = {  # of each part: inputs, outputs
    "q_proj": (WIDTH, HEAD * HEADS),
    "k_proj": (WIDTH, KV),
    "v_proj": (WIDTH, KV),
    "o_proj": (HEAD * HEADS, WIDTH),
    "gate_proj": (WIDTH, INNER),
    "up_proj": (WIDTH, INNER),
    "down_proj": (INNER, WIDTH),
    "query_key_value": (WIDTH, HEAD * HEADS + 2 * KV),
    "dense_h_to_4h": (WIDTH, INNER),
    "gate_up_stored_as_one": (WIDTH, 2 * INNER),
    "in_proj_stored_as_one": (WIDTH, 4 * INNER),
    "router": (WIDTH, 16),
}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PARALLEL = [(size, rank) for size in (1, 2, 4, 8) for rank in range(size)]


def part(matrix: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """Rows of one of ``count`` equal shards."""
    return matrix.tensor_split(count)[index]


def query_key_value(up: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    query, key, value = up.split([HEAD * HEADS, KV, KV])
    heads = min(size, KV_HEADS)  # with more ranks than heads, neighbours hold the same head
    kv_rank = rank * heads // size
    return torch.cat(
        [part(query, rank, size), part(key, kv_rank, heads), part(value, kv_rank, heads)]
    )


@contextmanager
def as_rank(rank: int, size: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (linear, parameter):
        patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    with set_current_vllm_config(VllmConfig()):
        yield


def make_layers() -> dict[str, Any]:
    """One of vLLM's layers of each kind that an adapter can be applied to."""
    qkv = [linear.QKVParallelLinear(WIDTH, HEAD, HEADS, KV_HEADS, bias=False) for _ in range(2)]
    merged = linear.MergedColumnParallelLinear
    layers = {
        "qkv_proj": MergedQKVParallelLinearWithLoRA(qkv[0]),
        "o_proj": RowParallelLinearWithLoRA(linear.RowParallelLinear(HEAD * HEADS, WIDTH)),
        "gate_up_proj": MergedColumnParallelLinearWithLoRA(merged(WIDTH, [INNER, INNER])),
        "down_proj": RowParallelLinearWithLoRA(linear.RowParallelLinear(INNER, WIDTH)),
        "query_key_value": QKVParallelLinearWithLoRA(qkv[1]),
        "dense_h_to_4h": ColumnParallelLinearWithLoRA(linear.ColumnParallelLinear(WIDTH, INNER)),
        "gate_up_stored_as_one": ColumnParallelLinearWithLoRA(merged(WIDTH, [INNER, INNER])),
        "in_proj_stored_as_one": MergedColumnParallelLinearVariableSliceWithLoRA(
            merged(WIDTH, [2 * INNER, INNER, INNER])
        ),
        "router": ReplicatedLinearWithLoRA(linear.ReplicatedLinear(WIDTH, 16)),
    }
    lora = SimpleNamespace(
        max_lora_rank=LARGEST_RANK, fully_sharded_loras=False, lora_dtype=torch.float32
    )
    for layer in layers.values():
        layer.create_lora_weights(2, lora)
    return {f"{BLOCK}.{name}": layer for name, layer in layers.items()}


def make_adapter(seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{BLOCK}.{name}.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        for name, (inputs, outputs) in SIZES.items()
        for side, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK)))
    }


def shards(adapter: TensorDict, name: str, rank: int, size: int) -> tuple[torch.Tensor, ...]:
    """The A and B of each slice that rank ``rank`` of ``size`` holds of a part."""
    down, up = (
        adapter[f"base_model.model.{BLOCK}.{name}.lora_{side}.weight"] for side in ("A", "B")
    )
    if name in ("o_proj", "down_proj"):
        return part(down.T, rank, size).T, up
    if name in ("k_proj", "v_proj"):
        heads = min(size, KV_HEADS)
        return down, part(up, rank * heads // size, heads)
    if name == "query_key_value":
        return down, query_key_value(up, rank, size)
    if name == "gate_up_stored_as_one":
        return down, torch.cat([part(half, rank, size) for half in up.tensor_split(2)])
    if name == "in_proj_stored_as_one":
        slices = up.split([2 * INNER, INNER, INNER])
        return tuple(m for one in slices for m in (down, part(one, rank, size)))
    return (down, up) if name == "router" else (down, part(up, rank, size))


def fill(layers: dict[str, Any], adapter: TensorDict, rank: int, size: int, slot: int) -> None:
    """Write a rank's shards into a slot."""
    for path, layer in layers.items():
        name = path.rpartition(".")[2]
        matrices = [m for p in FUSED.get(name, [name]) for m in shards(adapter, p, rank, size)]
        for stack, matrix in zip(layer.lora_a_stacked, matrices[::2], strict=True):
            stack[slot, 0, :RANK] = matrix
        for stack, matrix in zip(layer.lora_b_stacked, matrices[1::2], strict=True):
            stack[slot, 0, :, :RANK] = matrix * SCALING


def extension_over(layers: dict[str, Any], slot: int) -> AdapterExtension:
    ids: list[int | None] = [None, None]
    ids[slot] = FIRST_ADAPTER
    manager = SimpleNamespace(
        modules=layers, lora_index_to_id=ids, packed_modules_mapping=FUSED | {"experts": ["w1"]}
    )
    extension = AdapterExtension()
    extension.model_runner = SimpleNamespace(
        lora_manager=SimpleNamespace(_adapter_manager=manager),
        lora_config=SimpleNamespace(lora_dtype=torch.float32),
    )
    return extension


def lost(layers: dict[str, Any], adapter: TensorDict, slot: int = 1) -> set[str]:
    """Return the parts that are not found in the layers."""
    applied = extension_over(layers, slot)._applied_in_lora_layers(adapter, SCALING, FIRST_ADAPTER)
    said = report(adapter, applied)
    missing = set(SIZES) - {name.removeprefix(f"{BLOCK}.") for name in applied}
    assert (said["digest"] == digest(adapter)) == (not missing)
    assert said["num_modules"] == len(SIZES) - len(missing)
    return missing


@pytest.mark.parametrize(("size", "rank"), PARALLEL)
def test_each_worker_reads_its_shard_back(
    size: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    with as_rank(rank, size, monkeypatch):
        layers = make_layers()
        fill(layers, adapter, rank, size, slot=1)
        assert lost(layers, adapter) == set()
        # What was cut by hand is what vLLM itself would have loaded.
        for path, layer in layers.items():
            parts = FUSED.get(path.rpartition(".")[2], [path.rpartition(".")[2]])
            keys = [f"base_model.model.{BLOCK}.{p}.lora_{{}}.weight" for p in parts]
            downs = [adapter[key.format("A")] for key in keys]
            ups = [adapter[key.format("B")] * SCALING for key in keys]
            layer.set_lora(0, *((downs, ups) if len(parts) > 1 else (downs[0], ups[0])))
            for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                assert torch.equal(stack[0], stack[1])


def beyond_the_rank(layers: dict[str, Any], adapter: TensorDict) -> None:
    """A larger adapter's last row is still there."""
    layers[f"{BLOCK}.o_proj"].lora_a_stacked[0][1, 0, LARGEST_RANK - 1] = 1


def stale(layers: dict[str, Any], adapter: TensorDict) -> None:
    layers[f"{BLOCK}.down_proj"].lora_b_stacked[0][1] *= 1.001


def unscaled(layers: dict[str, Any], adapter: TensorDict) -> None:
    layers[f"{BLOCK}.qkv_proj"].lora_b_stacked[2][1] /= SCALING


def never_applied(layers: dict[str, Any], adapter: TensorDict) -> None:
    for stack in layers[f"{BLOCK}.router"].lora_a_stacked:
        stack.zero_()


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (beyond_the_rank, {"o_proj"}),
        (stale, {"down_proj"}),
        (unscaled, {"q_proj", "k_proj", "v_proj"}),
        (never_applied, {"router"}),
    ],
)
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (8, 5)])
def test_a_layer_that_holds_something_else_is_not_counted(
    fault: Callable[..., None],
    parts: set[str],
    size: int,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = make_adapter()
    with as_rank(rank, size, monkeypatch):
        layers = make_layers()
        fill(layers, adapter, rank, size, slot=1)
        fault(layers, adapter)
        assert lost(layers, adapter) == parts


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (4, 3), (8, 6)])
def test_the_shard_of_another_worker_is_not_counted(
    size: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that share a key-value head still differ in the query."""
    adapter = make_adapter()
    with as_rank(rank, size, monkeypatch):
        layers = make_layers()
        fill(layers, adapter, rank - 1, size, slot=1)
        assert lost(layers, adapter) == set(SIZES) - {"router"}  # of which all hold the whole
        fill(layers, adapter, rank, size, slot=1)
        fill(layers, make_adapter(seed=1), rank, size, slot=0)
        assert lost(layers, adapter) == set()
        assert lost(layers, adapter, slot=0) == set(SIZES)


def test_layers_without_an_adapter_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as vLLM's experts, which cannot cut what was not sent."""
    adapter = {key: tensor for key, tensor in make_adapter().items() if "o_proj" in key}
    with as_rank(1, 2, monkeypatch):
        layers = make_layers()
        layers[f"{BLOCK}.experts"] = SimpleNamespace(tp_size=2)
        slot = layers[f"{BLOCK}.o_proj"]
        down, up = shards(make_adapter(), "o_proj", 1, 2)
        slot.lora_a_stacked[0][1, 0, :RANK] = down
        slot.lora_b_stacked[0][1, 0, :, :RANK] = up * SCALING
        found = extension_over(layers, slot=1)._applied_in_lora_layers(
            adapter, SCALING, FIRST_ADAPTER
        )
    assert report(adapter, found)["digest"] == digest(adapter)


def test_a_layer_whose_slices_are_not_known_is_not_counted() -> None:
    layer = SimpleNamespace(n_slices=3, tp_size=1, lora_a_stacked=(), lora_b_stacked=())
    assert not worker_extension._holds(layer, 0, [torch.ones(1, 2)], [torch.ones(6, 1)])


class GpuLayer:
    """A layer whose product rounds, as TF32 does; the weight is on its device as it is."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.quant_method = weight, self

    def apply(self, layer: Any, given: torch.Tensor, bias: None) -> torch.Tensor:
        return (given @ self.weight.T).bfloat16().float()


def test_merged_weights_are_read_from_a_gpu_layer_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    layer = GpuLayer(weight)
    assert not torch.equal(worker_extension._weight_of(layer, weight), weight)
    monkeypatch.setattr(worker_extension, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert torch.equal(worker_extension._weight_of(layer, weight), weight)
