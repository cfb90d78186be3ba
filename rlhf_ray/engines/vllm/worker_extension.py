"""Serve an adapter inside vLLM's workers, and read back what is served.

The generator names this class as ``worker_extension_cls``; its methods are called through
``collective_rpc`` with plain bytes and strings, since vLLM's RPC does not decode tensors in untyped
arguments. Reports are never copied from the input: they are read from the layers that the model
computes with. vLLM has no public in-memory LoRA API, so this file uses its internals, which both of
its model runners have; `versions` holds what differs.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import load
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from rlhf_ray import stacks
from rlhf_ray.engines.served_adapters import TensorDict, digest
from rlhf_ray.engines.vllm import versions
from rlhf_ray.models.folders import safetensors_files

if multiprocessing.parent_process() is not None:  # the engine's process has no hook of its own
    stacks.register()

_PREFIX = "base_model.model."
FIRST_ADAPTER = 1
"""vLLM's number of the first adapter; 0 stands for the base."""


class AppliedAdapter(TypedDict):
    """The part of an adapter that one worker's layers hold."""

    num_modules: int
    """Number of modules whose tensors were found."""
    digest: str
    """Digest of the tensors that were found."""


class AdapterExtension:
    """Mixed into vLLM's Worker by vLLM; method names must not clash with the Worker's."""

    model_runner: Any  # vLLM has several classes of it
    _merged_modules: Set[str] = frozenset()
    """Modules whose weights may differ from the base."""

    def engine_facts(self) -> versions.EngineFacts:
        """Return what this worker computes with."""
        return versions.engine_facts(self.model_runner)

    def servable_modules(self) -> list[str]:
        """Return the checkpoint names of the layer kinds that an adapter can be applied to.

        These are linear layers inside the blocks. Not embeddings and the output layer, where vLLM
        drops part of an adapter's effect (its issue 51594), nor fused experts, which the read-back
        does not know. Merging also needs their weights in the checkpoint, by these names.
        """
        runner = self.model_runner
        model = runner.get_model()
        packed = getattr(model, "packed_modules_mapping", {})
        names = {
            name
            for name, layer in model.named_modules()
            if isinstance(getattr(layer, "base_layer", layer), LinearBase)
        }
        parts = {part for name in names for part in _parts(name, packed)}
        if runner.lora_config is None:
            parts &= {whole for name, _ in self._stored() if (whole := _whole(name, parts))}
        return sorted({part.rpartition(".")[2] for part in parts})

    def serve_adapter(self, blob: bytes, peft_config: str, adapter_id: int) -> AppliedAdapter:
        """Serve an adapter through vLLM's LoRA layers, in place of the last one of this number."""
        tensors, settings = load(blob), json.loads(peft_config)
        self._activate(tensors, settings, adapter_id)
        applied = self._applied_in_lora_layers(tensors, _scaling(settings), adapter_id)
        return report(tensors, applied)

    def serve_merged(self, blob: bytes, peft_config: str) -> AppliedAdapter:
        """Merge an adapter into the engine's copy of the base, from the frozen base each time."""
        tensors, settings = load(blob), json.loads(peft_config)
        merged: dict[str, torch.Tensor] = {}
        # Not model.load_weights: weight loaders are gone once a CPU engine has packed its layers.
        weights = self._merged_weights(tensors, settings, merged)
        versions.reload_weights(self.model_runner, weights)
        return report(tensors, self._applied_in_weights(merged))

    def _activate(self, tensors: TensorDict, settings: dict[str, Any], adapter_id: int) -> None:
        runner = self.model_runner
        helper = PEFTHelper.from_dict(settings)
        helper.validate_legal(runner.lora_config)
        adapter = LoRAModel.from_lora_tensors(
            adapter_id,
            # Loading scales lora_B in place, and the read-back needs the tensors as sent.
            {name: tensor.clone() for name, tensor in tensors.items()},
            helper,
            device="cpu",
            dtype=runner.lora_config.lora_dtype,
            model_vocab_size=runner.model_config.get_vocab_size(),
            weights_mapper=versions.rename_mapper(runner.get_model()),
        )
        manager = runner.lora_manager._adapter_manager
        manager.remove_adapter(adapter_id)
        manager.add_adapter(adapter)
        manager.activate_adapter(adapter_id)

    def _applied_in_lora_layers(
        self, tensors: TensorDict, scaling: float, adapter_id: int
    ) -> set[str]:
        """Return the modules whose layer holds exactly the sent tensors (cast, scaled), no others.

        With tensor parallelism a worker's layers hold shards; each worker checks its own.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        if adapter_id not in manager.lora_index_to_id:
            return set()
        dtype = self.model_runner.lora_config.lora_dtype
        slot = manager.lora_index_to_id.index(adapter_id)
        applied: set[str] = set()
        for name, layer in manager.modules.items():
            parts = _parts(name, manager.packed_modules_mapping)
            downs, ups = zip(*(map(tensors.get, _names(part)) for part in parts), strict=True)
            scaled = [None if up is None else up.to(dtype) * scaling for up in ups]
            if any(up is not None for up in ups) and _holds(layer, slot, downs, scaled):
                applied |= {part for part, up in zip(parts, ups, strict=True) if up is not None}
        return applied

    def _merged_weights(
        self, tensors: TensorDict, settings: dict[str, Any], merged: TensorDict
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield checkpoint tensors of every layer that an adapted module is fused into.

        A fused layer (q, k and v in one) must be reloaded as a whole: with a part missing, vLLM
        computes with garbage (log-probs 16 nats off) and raises no error.

        Args:
            tensors: the adapter's.
            settings: its PEFT config.
            merged: gets each tensor under its name in the model, as outputs x inputs.
        """
        packed = getattr(self.model_runner.get_model(), "packed_modules_mapping", {})
        adapted = {
            sibling for module in _adapted_modules(tensors) for sibling in _siblings(module, packed)
        }
        reloaded = adapted | self._merged_modules  # the last adapter's modules return to the base
        self._merged_modules = adapted
        dtype, scaling = self.model_runner.model_config.dtype, _scaling(settings)
        transposed = bool(settings.get("fan_in_fan_out"))  # as GPT-2 stores its weights
        for name, read in self._stored():
            if (module := _whole(name, reloaded)) is None:
                continue
            weight, kind = read(), name.rpartition(".")[2]
            down, up = (tensors.get(key) for key in _names(module))
            if kind == "weight" and down is not None and up is not None:
                delta = scaling * (up.float() @ down.float())
                weight = weight.float() + (delta.T if transposed else delta)
            weight = weight.to(dtype)
            turned = transposed and kind == "weight"
            merged[f"{module}.{kind}"] = weight.T if turned else weight
            yield name, weight

    def _stored(self) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
        """Yield the name of each tensor of the checkpoint, and a function that reads it."""
        for path in safetensors_files(self.model_runner.model_config.model):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    yield name, partial(file.get_tensor, name)

    def _applied_in_weights(self, merged: TensorDict) -> set[str]:
        """Return the modules whose merged weight is exactly what the engine's layer computes with.

        The rows may be in another order, which vLLM changes in fused layers of Bloom and NeoX.
        """
        applied = set()
        model = self.model_runner.get_model()
        packed = getattr(model, "packed_modules_mapping", {})
        for name, layer in model.named_modules():
            parts = _parts(name, packed)
            if f"{parts[0]}.weight" not in merged or not hasattr(layer, "quant_method"):
                continue
            weights = [merged[f"{part}.weight"] for part in parts]
            sizes, fused = [weight.shape[0] for weight in weights], _weight_of(layer, weights[0])
            if fused.dtype == weights[0].dtype and fused.shape[0] == sum(sizes):
                held = zip(parts, fused.split(sizes), weights, strict=True)
                applied |= {part for part, h, w in held if _same_rows(h, w)}
        return applied


def _weight_of(layer: Any, like: torch.Tensor) -> torch.Tensor:
    """Return the matrix that a layer multiplies with, outputs x inputs.

    A CPU engine packs it into its own layout, so there the identity matrix is multiplied: each
    output is one product plus zeros, exact in every data type. On a GPU that would take the memory
    of a large matrix, and TF32 would round; the layer has the matrix itself.
    """
    if not current_platform.is_cpu():
        return layer.weight.cpu()
    eye = torch.eye(like.shape[1], dtype=like.dtype)
    return layer.quant_method.apply(layer, eye, None).T


def _same_rows(held: torch.Tensor, sent: torch.Tensor) -> bool:
    return torch.equal(held, sent) or torch.equal(held.unique(dim=0), sent.unique(dim=0))


def _whole(name: str, modules: Set[str]) -> str | None:
    """Return which of the modules a checkpoint's tensor belongs to.

    Some checkpoints on the hub (gpt2, bloom) leave the name of the transformer out, with which the
    names of all its modules begin.
    """
    module = name.rpartition(".")[0]
    prefixes = ["", *sorted({f"{other.partition('.')[0]}." for other in modules})]
    return next((p + module for p in prefixes if p + module in modules), None)


def report(sent: TensorDict, applied: set[str]) -> AppliedAdapter:
    """Count and digest the sent tensors that were found in the engine.

    The digest equals the sender's if and only if every module is applied.
    """
    held = {key: sent[key] for module in applied for key in _names(module) if key in sent}
    num_modules = sum(key.endswith("lora_A.weight") for key in held)
    return {"num_modules": num_modules, "digest": digest(held)}


def _names(module: str) -> tuple[str, str]:
    """Return PEFT's names of a module's two matrices."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _holds(
    layer: Any, slot: int, downs: Sequence[torch.Tensor | None], ups: Sequence[torch.Tensor | None]
) -> bool:
    """Return whether a layer's slot holds these matrices and zeros elsewhere.

    Args:
        layer: one of vLLM's; its own rule says which shard of each matrix this worker holds.
        slot: the adapter's.
        downs: of each part that the layer fuses; None for one that is not adapted.
        ups: likewise, scaled.
    """
    downs, ups = list(downs), list(ups)
    if layer.n_slices != len(ups):  # a part that vLLM holds in several slices
        if not hasattr(layer, "expand_packed_lora"):  # 0.19: how it cuts is not known
            return False
        downs, ups = layer.expand_packed_lora(downs, ups)
    if layer.tp_size > 1 and layer.n_slices > 1:
        downs, ups = layer.slice_lora_a(downs), layer.slice_lora_b(ups)
    elif layer.tp_size > 1:
        downs, ups = [layer.slice_lora_a(downs[0])], [layer.slice_lora_b(ups[0])]
    held = [stack[slot, 0] for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    return all(_is_padded(h, sent) for h, sent in zip(held, (*downs, *ups), strict=True))


def _is_padded(held: torch.Tensor, sent: torch.Tensor | None) -> bool:
    """Return whether a matrix is the sent one with zeros up to the engine's largest rank."""
    expected = torch.zeros_like(held)
    if sent is not None:
        expected[: sent.shape[0], : sent.shape[1]] = sent
    return torch.equal(held, expected)


def _scaling(settings: dict[str, Any]) -> float:
    rank = settings["r"]
    return settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)


def _adapted_modules(tensors: TensorDict) -> list[str]:
    suffix = ".lora_A.weight"
    return [
        name.removeprefix(_PREFIX).removesuffix(suffix) for name in tensors if name.endswith(suffix)
    ]


def _parts(module: str, packed: dict[str, list[str]]) -> list[str]:
    """Return the checkpoint names of the modules that an engine layer fuses, in order."""
    parent, _, leaf = module.rpartition(".")
    return [f"{parent}.{part}" for part in packed.get(leaf, [leaf])]


def _siblings(module: str, packed: dict[str, list[str]]) -> list[str]:
    parent, _, leaf = module.rpartition(".")
    group = next((parts for parts in packed.values() if leaf in parts), [leaf])
    return [f"{parent}.{part}" for part in group]
