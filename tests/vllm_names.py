"""Which names of vLLM our code uses, and what the sources of a vLLM say about them.

Sources are read, not imported: the GPU builds need CUDA. `python tests/vllm_names.py FOLDER` prints
the names found in a folder that holds an unpacked wheel, for tests/fixtures/vllm_names.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOM = ROOT / "rlhf_ray" / "engines" / "vllm"


@dataclass(frozen=True)
class Use:
    """A name that our code uses: a call if ``keywords`` is not None, else an attribute."""

    module: str
    owner: str
    """The class; empty for a name of the module, ``text`` for a string in its source."""
    name: str
    positional: int = 0
    keywords: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.module}:{self.owner}.{self.name}"


def call(module: str, method: str, positional: int = 0, *keywords: str) -> Use:
    owner, _, name = method.rpartition(".")
    return Use(module, owner, name, positional, keywords)


def attributes(module: str, owner: str, *names: str) -> list[Use]:
    return [Use(module, owner, name) for name in names]


ASYNC = "vllm.v1.engine.async_llm"
V1, V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
LAYERS = "vllm.lora.layers"

CALLS = [
    call(ASYNC, "AsyncLLM.from_engine_args", 1),
    call(ASYNC, "AsyncLLM.generate", 3, "lora_request"),
    call(ASYNC, "AsyncLLM.collective_rpc", 1, "args"),
    call(ASYNC, "AsyncLLM.pause_generation", 0, "mode", "clear_cache"),
    call(ASYNC, "AsyncLLM.resume_generation"),
    call(ASYNC, "AsyncLLM.reset_prefix_cache"),
    call(ASYNC, "AsyncLLM.sleep", 0, "level"),
    call(ASYNC, "AsyncLLM.wake_up"),
    call(ASYNC, "AsyncLLM.shutdown"),
    call("vllm.platforms.interface", "Platform.is_cpu"),
    call("vllm.platforms.interface", "Platform.is_sleep_mode_available"),
    call("vllm.platforms.interface", "Platform.get_device_capability"),
    call("vllm.config.model", "ModelConfig.get_vocab_size"),
    call("vllm.lora.peft_helper", "PEFTHelper.from_dict", 1),
    call("vllm.lora.peft_helper", "PEFTHelper.validate_legal", 1),
    call(
        "vllm.lora.lora_model",
        "LoRAModel.from_lora_tensors",
        3,
        *("device", "dtype", "model_vocab_size", "weights_mapper"),
    ),
    *(
        call("vllm.lora.model_manager", f"LRUCacheLoRAModelManager.{name}", 1)
        for name in ("remove_adapter", "add_adapter", "activate_adapter")
    ),
    *(
        call(f"{LAYERS}.{module}", f"{owner}.{name}", 1)
        for module, owner in (
            ("column_parallel_linear", "ColumnParallelLinearWithLoRA"),
            ("column_parallel_linear", "MergedColumnParallelLinearWithLoRA"),
            ("column_parallel_linear", "QKVParallelLinearWithLoRA"),
            ("column_parallel_linear", "MergedQKVParallelLinearWithLoRA"),
            ("row_parallel_linear", "RowParallelLinearWithLoRA"),
            ("replicated_linear", "ReplicatedLinearWithLoRA"),
        )
        for name in ("slice_lora_a", "slice_lora_b")
    ),
    *(call(runner, "GPUModelRunner.get_model") for runner in (V1, V2)),
    call(V1, "GPUModelRunner.reload_weights", 0, "weights_iterator", "is_checkpoint_format"),
    call("vllm.model_executor.layers.attention.attention", "Attention.get_attn_backend"),
    call("vllm.v1.attention.backend", "AttentionBackend.get_name"),
]
ATTRIBUTES = [
    *(
        use
        for runner in (V1, V2)
        for use in attributes(
            runner,
            "GPUModelRunner",
            *("vllm_config", "model_config", "lora_config", "device", "lora_manager"),
        )
    ),
    *attributes(ASYNC, "AsyncLLM", "errored", "input_processor", "output_processor"),
    *attributes("vllm.v1.engine.output_processor", "OutputProcessor", "request_states"),
    *attributes("vllm.v1.engine.input_processor", "InputProcessor", "generation_config_fields"),
    *attributes("vllm.platforms.interface", "Platform", "device_type"),
    *attributes("vllm.outputs", "RequestOutput", "outputs"),
    *attributes("vllm.outputs", "CompletionOutput", "token_ids", "logprobs", "finish_reason"),
    *attributes("vllm.logprobs", "Logprob", "logprob"),
    *attributes("vllm.lora.request", "LoRARequest", "lora_name", "lora_int_id", "lora_path"),
    *attributes("vllm.lora.worker_manager", "WorkerLoRAManager", "_adapter_manager"),
    *attributes(
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager",
        *("modules", "lora_index_to_id", "packed_modules_mapping"),
    ),
    *attributes(
        f"{LAYERS}.base_linear",
        "BaseLinearLayerWithLoRA",
        *("base_layer", "lora_a_stacked", "lora_b_stacked", "n_slices", "tp_size"),
    ),
    *attributes("vllm.model_executor.layers.linear", "LinearBase", "quant_method"),
    *attributes("vllm.config.lora", "LoRAConfig", "lora_dtype"),
    *attributes("vllm.config.model", "ModelConfig", "model", "dtype"),
    *attributes("vllm.config.vllm", "VllmConfig", "compilation_config"),
    *attributes("vllm.config.compilation", "CompilationConfig", "static_forward_context"),
]
TEXTS = [
    Use("vllm.config.model", "text", '"processed_logprobs"'),
    Use("vllm.v1.engine.async_llm", "text", '``"wait"``'),
    Use("vllm.v1.engine.utils", "text", "Failed core proc(s): "),
    Use("vllm.v1.engine.core_client", "text", "Timed out"),
    *(
        Use("vllm.engine.arg_utils", "text", f'"--{option}"')
        for option in (
            *("dtype", "max-model-len", "served-model-name", "hf-overrides", "trust-remote-code"),
            *("enforce-eager", "kv-cache-memory-bytes", "enable-lora", "max-lora-rank"),
            "max-loras",
        )
    ),
]

MAPPER = "vllm.model_executor.models.utils"
NOT_EVERYWHERE = [
    call(MAPPER, "WeightsMapper.get_rename_mapper"),
    call(MAPPER, "WeightsMapper.get_unstacked_mapper"),
    call(V2, "GPUModelRunner.reload_weights"),
    call(
        f"{LAYERS}.column_parallel_linear",
        "MergedColumnParallelLinearWithLoRA.expand_packed_lora",
        2,
    ),
]
"""What `versions` and the read-back use only where it is."""


def uses() -> list[Use]:
    """Return every use; imports, keywords and variables are read from our own code."""
    trees = [ast.parse(path.read_text()) for path in sources_of_ours()]
    engine = trees[0]
    return [
        *(*CALLS, *ATTRIBUTES, *TEXTS, *(use for tree in trees for use in _imported(tree))),
        *attributes("vllm.engine.arg_utils", "AsyncEngineArgs", *_engine_args(engine)),
        *attributes("vllm.sampling_params", "SamplingParams", *_keywords(engine, "SamplingParams")),
        *(Use("vllm.envs", "text", f'"{name}"') for name in sorted(_variables())),
    ]


def sources_of_ours() -> list[Path]:
    return [ROOM / name for name in ("engine.py", "own_process.py", "worker_extension.py")]


def _imported(tree: ast.Module) -> Iterator[Use]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
            for alias in node.names:
                yield Use(str(node.module), "", alias.name)


def _keywords(tree: ast.Module, function: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function:
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)


def _engine_args(tree: ast.Module) -> Iterator[str]:
    """Yield the string keys of `_engine_args`, which are arguments but for those of a model."""
    method = next(n for n in ast.walk(tree) if getattr(n, "name", "") == "_engine_args")
    for node in ast.walk(method):
        keys = node.keys if isinstance(node, ast.Dict) else []
        names = [key.value for key in keys if isinstance(key, ast.Constant)]
        yield from (str(name) for name in names if name != "rope_parameters")
    yield "hf_overrides"


def _variables() -> set[str]:
    ours = [ROOT / "rlhf_ray" / name for name in ("cluster", "observability", "engines", "serving")]
    text = "\n".join(path.read_text() for folder in ours for path in folder.rglob("*.py"))
    return set(re.findall(r'"(VLLM_[A-Z0-9_]+)"', text))


@dataclass(frozen=True)
class Sources:
    """The sources of one vLLM; ``folder`` holds the package."""

    folder: Path

    @cached_property
    def version(self) -> str:
        text = (self.folder / "vllm" / "_version.py").read_text()
        found = re.search(r"version = '(\d+\.\d+\.\d+)", text)
        assert found is not None, f"no version in {self.folder}"
        return found[1]

    def names(self) -> set[str]:
        """Return a line for each use of ours that these sources have, calls with parameters."""
        every = [*uses(), *NOT_EVERYWHERE]
        return {line for use in every if (line := self.line(use)) is not None}

    def line(self, use: Use) -> str | None:
        if use.owner == "text":
            return str(use) if use.name in self._text(use.module) else None
        if not use.owner:
            tree = self._tree(use.module)
            return str(use) if tree is not None and use.name in _defined(tree) else None
        found = self._member(use.module, use.owner, use.name)
        if found is None or use.keywords is None:
            return None if found is None else str(use)
        return f"{use}({', '.join(found)})"

    def _path(self, module: str) -> Path | None:
        path = self.folder.joinpath(*module.split("."))
        return next(filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py")), None)

    def _text(self, module: str) -> str:
        path = self._path(module)
        return path.read_text() if path else ""

    def _tree(self, module: str) -> ast.Module | None:
        path = self._path(module)
        return ast.parse(path.read_text()) if path else None

    def _member(self, module: str, owner: str, name: str) -> list[str] | None:
        """Return a method's parameters, or [] for an attribute; bases are searched as well."""
        tree = self._tree(module)
        if tree is None:
            return None
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        if owner not in classes:
            return None
        for node in ast.walk(classes[owner]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return _parameters(node)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            if name in {getattr(target, "id", getattr(target, "attr", None)) for target in targets}:
                return []
        for base in (ast.unparse(base).partition("[")[0] for base in classes[owner].bases):
            home = module if base in classes else _home(tree, module, base)
            if home is not None and (found := self._member(home, base, name)) is not None:
                return found
        return None


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    args = function.args
    positional = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    named = [arg.arg for arg in args.kwonlyargs]
    rest = ["**"] if args.kwarg else []
    return [name for name in positional if name not in ("self", "cls")] + ["*", *named, *rest]


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # such as the names that a lazy package offers
    return names


def _home(tree: ast.Module, module: str, name: str) -> str | None:
    """Return the module that a name is imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            package = module.rsplit(".", node.level)[0] + "." if node.level else ""
            return package + (node.module or "")
    return None


def fits(use: Use, line: str) -> bool:
    """Return whether our call binds to the parameters that a line names."""
    if use.keywords is None:
        return True
    names = line.partition("(")[2].removesuffix(")").split(", ")
    star = names.index("*")
    free = set(names[use.positional :])
    return use.positional <= star and ("**" in names or free.issuperset(use.keywords))


if __name__ == "__main__":
    print("\n".join(sorted(Sources(Path(sys.argv[1])).names())))
