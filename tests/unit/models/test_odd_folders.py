"""Bases whose own files would trip loading, training or saving: repaired, or refused at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_random
from transformers import AutoTokenizer, GenerationConfig

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import adapters, loading
from rlhf_ray.models.folders import adapter_rank, base_of
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.models.stop_conditions import generation_config
from rlhf_ray.models.token_logprobs import answer_with_logprobs, chunked_logprobs

SETTINGS = ModelConfig()
TEXTS = ["some text"]
LOADERS: dict[str, Callable[[str], Any]] = {
    "policy": lambda path: loading.load_causal_lm(path, SETTINGS),
    "classifier": lambda path: loading.load_sequence_classifier(path, SETTINGS),
    "tokenizer": loading.load_tokenizer,
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(build_random("llama", tmp_path / "llama", TEXTS))


def edit(file: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(old | values))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.9},
        {"do_sample": False, "top_p": 0.5, "top_k": 3},
        {"temperature": 0.6},
        {"num_beams": 1, "early_stopping": True, "do_sample": False},
    ],
)
def test_a_generation_config_that_contradicts_itself_does_not_keep_a_model_from_being_saved(
    llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    edit(llama / "generation_config.json", eos_token_id=[1, 2], **settings)
    model = loading.load_causal_lm(str(llama), SETTINGS)
    wrapped = adapters.attach(model, LoraConfig(r=2), "CAUSAL_LM", seed=0, dropout=0.0)
    tokenizer = loading.load_tokenizer(str(llama))
    loading.save_adapter(wrapped, tokenizer, tmp_path / "adapter", str(llama))
    merge_adapter(str(llama), str(tmp_path / "adapter"), tmp_path / "merged", SETTINGS)
    generation_config(str(tmp_path / "merged")).save_pretrained(tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [1, 2]


@pytest.mark.parametrize("text", ["[]", "{", '"text"', "7"])
def test_a_generation_config_that_cannot_be_read_is_named(llama: Path, text: str) -> None:
    (llama / "generation_config.json").write_text(text)
    with pytest.raises(DataError, match=r"generation_config\.json"):
        generation_config(str(llama))


def refusal(load: str, folder: Path) -> str | None:
    """The message with which a folder is refused; None: it is loaded."""
    try:
        LOADERS[load](str(folder))
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"vocab_size": -1},
        {"vocab_size": [300]},
        {"rope_parameters": 7},
        {"hidden_act": "none"},
        {"model_type": ["llama"]},
        {"model_type": "unheard_of"},
        {"layer_types": {"a": 1}},
        {"pad_token_id": 10_000},
        {"architectures": 3},
    ],
)
def test_a_config_of_wrong_types_is_one_message(
    llama: Path, load: str, values: dict[str, Any]
) -> None:
    edit(llama / "config.json", **values)
    message = refusal(load, llama)
    assert message is None or (str(llama) in message and "\n" not in message)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["[]", "[1, {}]", "7", "null", "{", "", '{"a": [[[', '"text"'])
def test_a_file_that_holds_other_json_is_one_message(
    llama: Path, load: str, file: str, text: str
) -> None:
    (llama / file).write_text(text)
    message = refusal(load, llama)
    assert message is None or (str(llama) in message and "\n" not in message)
    if file == "config.json" or (load == "tokenizer" and file == "tokenizer.json"):
        assert message


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(llama: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(300 - len(tokenizer) + 1)])
    tokenizer.save_pretrained(llama)
    with pytest.raises(DataError, match=r"token '<extra\d+>' with id 300, but .* has 300 rows"):
        loading.load_tokenizer(str(llama))


def test_a_token_for_pictures_needs_no_row_of_the_embedding(llama: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(llama)
    fill = [f"<extra{number}>" for number in range(300 - len(tokenizer))]
    tokenizer.add_tokens([*fill, "<image_soft_token>"])
    tokenizer.save_pretrained(llama)
    assert "<image_soft_token>" in str(refusal("tokenizer", llama))
    edit(llama / "tokenizer_config.json", image_token="<image_soft_token>")
    assert refusal("tokenizer", llama) is None


def test_a_tokenizer_keeps_the_side_on_which_it_pads(llama: Path, tmp_path: Path) -> None:
    edit(llama / "tokenizer_config.json", padding_side="left")
    tokenizer = loading.load_tokenizer(str(llama))
    assert tokenizer.padding_side == "right"
    loading.save_model(loading.load_causal_lm(str(llama), SETTINGS), tokenizer, tmp_path / "saved")
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.padding_side == "left"
    assert tokenizer.padding_side == "right"


class _Trap:
    """What a pickle may hold: code that runs when it is opened."""

    def __init__(self, touched: Path) -> None:
        self._touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._touched,)


def test_a_pickled_adapter_is_refused_before_it_is_opened(llama: Path, tmp_path: Path) -> None:
    model = loading.load_causal_lm(str(llama), SETTINGS)
    wrapped = adapters.attach(model, LoraConfig(r=2), "CAUSAL_LM", seed=0, dropout=0.0)
    folder = tmp_path / "adapter"
    loading.save_adapter(wrapped, loading.load_tokenizer(str(llama)), folder, str(llama))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(_Trap(tmp_path / "touched"), folder / "adapter_model.bin")
    for use in (
        lambda: loading.load_causal_lm(str(folder), SETTINGS),
        lambda: merge_adapter(str(llama), str(folder), tmp_path / "merged", SETTINGS),
        lambda: adapter_rank(str(folder)),
    ):
        with pytest.raises(DataError, match=r"no adapter_model\.safetensors"):
            use()
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("text", ["[]", "null", '{"r": "many"}', '{"r": [1]}', "{}"])
def test_an_adapter_config_of_wrong_types_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"adapter_config\.json"):
        adapter_rank(str(tmp_path))
    with pytest.raises(DataError, match=r"adapter_config\.json"):
        base_of(str(tmp_path))


def gemma2(folder: Path) -> str:
    """A Gemma 2 whose attention scores are so large that capping them matters."""
    return build_random("gemma2", folder, TEXTS, attn_logit_softcapping=1.0)


def test_a_base_with_capped_attention_scores_is_computed_with_eager_attention(
    tmp_path: Path,
) -> None:
    path = gemma2(tmp_path / "gemma2")
    ids_BS = torch.arange(10, 30).view(2, 10)
    eager = loading.load_causal_lm(path, ModelConfig(attn_implementation="eager"))
    auto = loading.load_causal_lm(path, SETTINGS)
    assert torch.equal(auto(ids_BS).logits, eager(ids_BS).logits)
    classifier: Any = loading.load_sequence_classifier(path, SETTINGS)
    assert classifier.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"sdpa leaves out the soft-capping .* at 1 "):
        loading.load_causal_lm(path, ModelConfig(attn_implementation="sdpa"))
    uncapped = build_random("gemma2", tmp_path / "plain", TEXTS, attn_logit_softcapping=None)
    plain: Any = loading.load_causal_lm(uncapped, SETTINGS)
    assert plain.config._attn_implementation == "sdpa"


def test_logprobs_of_a_model_that_sdpa_computes_otherwise_are_refused(tmp_path: Path) -> None:
    """Where no config says so: the model's own logits with sdpa are compared with eager's."""
    model: Any = loading.load_causal_lm(gemma2(tmp_path / "gemma2"), SETTINGS)
    model.set_attn_implementation("sdpa")
    ids_BS = torch.arange(10, 30).view(2, 10)
    batch = (ids_BS, torch.ones_like(ids_BS), torch.tensor([2, 2]), ids_BS[:, 2:])
    with pytest.raises(DataError, match=r"attn_implementation sdpa than with eager"):
        chunked_logprobs(answer_with_logprobs(model), *batch)
    model.set_attn_implementation("eager")
    assert chunked_logprobs(model, *batch)[0].isfinite().all()
