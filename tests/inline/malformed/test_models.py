"""Model folders with torn or odd files, as the base of a training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ends

TORN: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "number": b"3",
    "list": b"[]",
    "empty_mapping": b"{}",
    "cut_off": b'{"model_type": "lla',
    "binary": bytes(range(256)),
    "nested": b'{"model_type": {"a": 1}, "tokenizer_class": [], "model": 3}',
}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
HARMLESS = {("tokenizer_config.json", "empty_mapping")}


@pytest.fixture
def base(whole_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run / "pretrain" / "model", tmp_path / "base"))


@pytest.fixture
def training(
    config_file: Path, whole_run: Path, tmp_path: Path, base: Path
) -> Callable[..., list[object]]:
    """The command that trains on the base, in a run that is prepared."""
    run = tmp_path / "run"
    shutil.copytree(whole_run / "prepare", run / "prepare")
    shutil.copy(whole_run / "config.yaml", run / "config.yaml")

    def command(stage: str = "sft", key: str = "model.path") -> list[object]:
        return [stage, config_file, f"run.dir={run}", f"{key}={base}", "run.resume=auto"]

    return command


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", TORN)
def test_a_torn_file_is_refused(
    ends: Ends, training: Callable[..., list[object]], base: Path, file: str, how: str
) -> None:
    (base / file).write_bytes(TORN[how])
    codes = (0, 2) if (file, how) in HARMLESS else (2,)
    ends(*training(), codes=codes)


@pytest.mark.parametrize("file", FILES[:2] + FILES[3:])
def test_a_missing_file_is_refused(
    ends: Ends, training: Callable[..., list[object]], base: Path, file: str
) -> None:
    (base / file).unlink()
    ends(*training())


CONFIG_VALUES: dict[str, dict[str, Any]] = {
    "model_type_unknown": {"model_type": "nothing"},
    "model_type_number": {"model_type": 3},
    "hidden_size_text": {"hidden_size": "many"},
    "hidden_size_negative": {"hidden_size": -32},
    "hidden_size_zero": {"hidden_size": 0},
    "hidden_size_other": {"hidden_size": 48},
    "hidden_size_list": {"hidden_size": [32]},
    "heads_that_do_not_divide": {"num_attention_heads": 3},
    "heads_zero": {"num_attention_heads": 0},
    "layers_text": {"num_hidden_layers": "many"},
    "layers_many": {"num_hidden_layers": 10**9},
    "layers_negative": {"num_hidden_layers": -1},
    "layers_other": {"num_hidden_layers": 3},
    "vocab_small": {"vocab_size": 100},
    "vocab_huge": {"vocab_size": 10**12},
    "vocab_text": {"vocab_size": "many"},
    "rope_list": {"rope_parameters": [1]},
    "quantization_unknown": {"quantization_config": {"quant_method": "nothing"}},
    "quantization_number": {"quantization_config": 3},
    "dtype_unknown": {"dtype": "float3"},
    "dtype_number": {"dtype": 3},
    "remote_code": {"auto_map": {"AutoModelForCausalLM": "code.Model"}, "model_type": "own"},
}

IGNORED = ("quantization_unknown", "dtype_number")
"""Values that transformers passes over: the weights, which are not quantised, load all the same."""


@pytest.mark.parametrize("name", CONFIG_VALUES)
def test_an_odd_config_is_refused(
    ends: Ends, training: Callable[..., list[object]], base: Path, name: str
) -> None:
    path = base / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | CONFIG_VALUES[name]), encoding="utf-8")
    ends(*training(), codes=(0, 2) if name in IGNORED else (2,))


REPAIRED: dict[str, tuple[str, Any]] = {
    "sampling_keys_without_sampling": (
        "generation_config.json",
        {"do_sample": False, "temperature": 0.9, "top_p": 0.5},
    ),
    "generation_config_list": ("generation_config.json", []),
    "generation_config_number": ("generation_config.json", 3),
    "generation_config_types": ("generation_config.json", {"eos_token_id": "many"}),
    "special_tokens_map_list": ("special_tokens_map.json", []),
    "chat_template_number": ("chat_template.json", {"chat_template": 3}),
    "added_tokens_list": ("added_tokens.json", []),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_odd_side_files_are_repaired_or_refused(
    ends: Ends, training: Callable[..., list[object]], base: Path, name: str
) -> None:
    file, content = REPAIRED[name]
    (base / file).write_text(json.dumps(content), encoding="utf-8")
    ends(*training(), codes=(0, 2))


ADAPTER: dict[str, bytes] = {
    **TORN,
    "type_unknown": b'{"peft_type": "NOTHING", "base_model_name_or_path": "x"}',
    "base_number": b'{"peft_type": "LORA", "base_model_name_or_path": 3, "r": 8}',
    "base_nowhere": b'{"peft_type": "LORA", "base_model_name_or_path": "/nowhere", "r": 8}',
    "rank_text": b'{"peft_type": "LORA", "base_model_name_or_path": "x", "r": "many"}',
}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(pytest.param("adapter_config.json", ADAPTER[how], id=how) for how in ADAPTER),
        *(
            pytest.param("adapter_model.safetensors", TORN[how], id=f"weights_{how}")
            for how in TORN
        ),
    ],
)
def test_a_torn_adapter_is_refused(
    ends: Ends, config_file: Path, whole_run: Path, tmp_path: Path, file: str, content: bytes
) -> None:
    adapter = Path(shutil.copytree(whole_run / "reward" / "model", tmp_path / "adapter"))
    (adapter / file).write_bytes(content)
    ends(
        *("ppo", config_file, f"run.dir={tmp_path}/run", f"sft.path={whole_run}/sft/model"),
        *(f"reward.path={adapter}", f"data.prompts.path={prompts(tmp_path)}"),
    )


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    rows = (json.dumps({"prompt": f"Question: {i}?\n\nAnswer: "}) + "\n" for i in range(40))
    path.write_text("".join(rows), encoding="utf-8")
    return path
