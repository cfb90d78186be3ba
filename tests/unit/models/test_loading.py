import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, BertConfig

from rlhf_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import adapters, folders, forward, loading, tiny, tokenizers
from rlhf_ray.models.load_arguments import rope_parameters

IDS_BS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
ATTENTION_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
ROPE_IDS_BS = torch.arange(3, 23)[None]
LINEAR = ModelConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})


def reward_folder(base: Path, folder: Path, settings: ModelConfig) -> torch.Tensor:
    """Write a changed reward adapter with its head; its scores of the two texts."""
    model = loading.load_sequence_classifier(str(base), settings)
    wrapped = adapters.attach(model, LoraConfig(r=2), "SEQ_CLS", seed=0, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (p for p in wrapped.parameters() if p.requires_grad):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        scores_B = forward.sequence_scores(wrapped.eval(), IDS_BS, ATTENTION_BS)
    loading.save_adapter(wrapped, loading.load_tokenizer(str(base)), folder, str(base))
    return scores_B


def scores(path: Path, settings: ModelConfig) -> torch.Tensor:
    model = loading.load_sequence_classifier(str(path), settings, require_head=True)
    with torch.no_grad():
        return forward.sequence_scores(model, IDS_BS, ATTENTION_BS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reward_folder_scores_the_same_after_a_move(base: Path, tmp_path: Path, dtype: str) -> None:
    settings = ModelConfig(dtype=dtype)  # type: ignore[arg-type]
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(base, old / "sft" / "model")
    expected_B = reward_folder(old / "sft" / "model", old / "reward" / "model", settings)
    assert torch.equal(scores(old / "reward" / "model", settings), expected_B)
    old.rename(new)
    assert torch.equal(scores(new / "reward" / "model", settings), expected_B)


def test_a_copied_run_uses_its_own_base(base: Path, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(base, run / "base")
    reward_folder(run / "base", run / "reward", ModelConfig())
    shutil.copytree(run, copy)
    assert folders.base_of(str(copy / "reward")) == str(copy / "base")


def test_plain_peft_loads_the_folder_where_it_was_written(
    base: Path, tmp_path: Path, settings: ModelConfig
) -> None:
    expected_B = reward_folder(base, tmp_path / "reward", settings)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", num_labels=1
    )
    with torch.no_grad():
        logits = plain.eval()(IDS_BS, attention_mask=ATTENTION_BS).logits[:, 0]
    torch.testing.assert_close(logits, expected_B)


def test_relative_base_in_adapter_config_is_relative_to_the_folder(
    base: Path, tmp_path: Path, settings: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what lies beside the working directory is no candidate
    shutil.copytree(base, tmp_path / "base")
    folder = tmp_path / "reward"
    expected_B = reward_folder(tmp_path / "base", folder, settings)
    (folder / folders.BASE_MODEL).unlink()
    config = json.loads((folder / folders.ADAPTER_CONFIG).read_text())
    config["base_model_name_or_path"] = "../base"
    (folder / folders.ADAPTER_CONFIG).write_text(json.dumps(config))
    assert torch.equal(scores(folder, settings), expected_B)


def test_head_is_kept_in_fp32_over_a_bf16_base(base: Path) -> None:
    model = loading.load_sequence_classifier(str(base), ModelConfig(dtype="bfloat16"))
    assert model.score.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_whole_reward_models_head_is_saved_and_loaded_in_fp32(
    base: Path, tmp_path: Path, settings: ModelConfig, dtype: Any
) -> None:
    model = loading.load_sequence_classifier(str(base), settings)
    head = model.score.weight.clone()
    assert not torch.equal(head, head.to(getattr(torch, dtype)))
    model.to(getattr(torch, dtype))
    loading.save_model(model, loading.load_tokenizer(str(base)), tmp_path)
    for half in (settings, ModelConfig(dtype=dtype)):
        loaded = loading.load_sequence_classifier(str(tmp_path), half, require_head=True)
        assert torch.equal(loaded.score.weight, head)


def test_zero_head_gives_value_zero_also_over_a_trained_one(
    base: Path, tmp_path: Path, settings: ModelConfig
) -> None:
    reward_folder(base, tmp_path, settings)
    for path in (base, tmp_path):
        model = loading.load_sequence_classifier(str(path), settings, zero_head=True)
        assert not forward.token_values(model, IDS_BS, ATTENTION_BS).any()


def test_models_come_in_evaluation_mode_without_cache(base: Path, settings: ModelConfig) -> None:
    model = loading.load_causal_lm(str(base), settings)
    assert not model.training
    assert model(IDS_BS).past_key_values is None
    assert model.generate(IDS_BS[:1], max_new_tokens=2, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_base_stays_near_the_full_one(tmp_path: Path, quantization: str) -> None:
    shape = TinyModelConfig(vocab_size=300, hidden_size=64, intermediate_size=64, num_heads=2)
    tiny.build(tmp_path, ["some text"], shape, max_length=64, seed=0)  # nf4 needs 64 inputs a row
    settings = ModelConfig(quantization=quantization)  # type: ignore[arg-type]
    full = loading.load_causal_lm(str(tmp_path), settings)
    small = loading.load_causal_lm(str(tmp_path), settings, quantized=True)
    assert full.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert small.model.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    with torch.no_grad():
        difference = (full(IDS_BS).logits - small(IDS_BS).logits).abs().max()
    assert 0 < difference < 0.2


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_evaluation_leaves_the_gradients_of_a_quantised_base_as_they_are(
    tmp_path: Path, quantization: str
) -> None:
    shape = TinyModelConfig(vocab_size=300, hidden_size=64, intermediate_size=64, num_heads=2)
    tiny.build(tmp_path, ["some text"], shape, max_length=64, seed=0)
    settings = ModelConfig(quantization=quantization)  # type: ignore[arg-type]
    gradients = []
    for evaluates in (False, True):
        base = loading.load_causal_lm(str(tmp_path), settings, quantized=True)
        model = adapters.attach(base, LoraConfig(r=2), "CAUSAL_LM", seed=0, dropout=0.0)
        if evaluates:
            with torch.no_grad():
                model.eval()(IDS_BS)
        model.train()(IDS_BS, labels=IDS_BS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("path", ["/no/such/model", "runs/x/sft/model", "./model", "~/no/model"])
def test_missing_folder_is_named_with_a_remedy(path: str, settings: ModelConfig) -> None:
    for load in (loading.load_tokenizer, lambda p: loading.load_causal_lm(p, settings)):
        with pytest.raises(DataError, match=r"does not exist; check model\.path"):
            load(path)


def test_hub_name_that_cannot_be_had_is_a_data_error(
    settings: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(folders.HfApi, "model_info", unreachable)
    with pytest.raises(DataError, match=r"'org/model' is no folder here.*Name or service"):
        loading.load_causal_lm("org/model", settings)


def damaged(base: Path, folder: Path, file: str, content: bytes | None) -> str:
    shutil.copytree(base, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "not a model folder"),
        ("config.json", b"{", "not a valid JSON"),
        ("config.json", b'{"model_type": "nonsense"}', "nonsense"),
        ("model.safetensors", None, "no file named model.safetensors"),
        ("model.safetensors", b"xx", "must hold config.json"),
    ],
)
def test_damaged_folder_is_a_data_error(
    base: Path,
    tmp_path: Path,
    settings: ModelConfig,
    file: str,
    content: bytes | None,
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        loading.load_causal_lm(damaged(base, tmp_path / "m", file, content), settings)


def test_models_of_the_wrong_kind_are_refused(
    base: Path, tmp_path: Path, settings: ModelConfig
) -> None:
    with pytest.raises(DataError, match=r"lack score.weight; name a model with a trained head"):
        loading.load_sequence_classifier(str(base), settings, require_head=True)
    three = loading.load_sequence_classifier(str(base), settings, num_labels=3)
    loading.save_model(three, loading.load_tokenizer(str(base)), tmp_path / "three")
    with pytest.raises(DataError, match=r"shape \(3, 32\), \(1, 32\) is needed"):
        loading.load_sequence_classifier(str(tmp_path / "three"), settings)
    with pytest.raises(DataError, match=r"not a whole causal LM.*lm_head"):
        loading.load_causal_lm(str(tmp_path / "three"), settings)
    reward_folder(base, tmp_path / "reward", settings)
    with pytest.raises(DataError, match="task_type SEQ_CLS, but CAUSAL_LM is needed"):
        loading.load_causal_lm(str(tmp_path / "reward"), settings)


def test_wrong_model_kwargs_are_a_config_error(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.kwargs.*no_such"):
        loading.load_causal_lm(str(base), ModelConfig(kwargs={"no_such": 1}))


def tokenizer_without(base: Path, folder: Path, *tokens: str) -> str:
    shutil.copytree(base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for token in tokens:
        del config[token]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_tokenizer_pads_on_the_right_with_a_token_other_than_eos(
    base: Path, tmp_path: Path
) -> None:
    tokenizer = loading.load_tokenizer(tokenizer_without(base, tmp_path / "m", "pad_token"))
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == "<|pad|>"  # found in the vocabulary


@pytest.mark.parametrize("pad", ["<|padding|>", "<｜▁pad▁｜>"])
def test_spare_pads_of_pythia_and_deepseek(base: Path, tmp_path: Path, pad: str) -> None:
    folder = Path(tokenizer_without(base, tmp_path / "m", "pad_token"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|pad|>", pad), encoding="utf-8")
    assert loading.load_tokenizer(str(folder)).pad_token == pad


def test_tokenizer_without_eos_or_spare_pad_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no eos token"):
        loading.load_tokenizer(tokenizer_without(base, tmp_path / "a", "eos_token"))
    monkeypatch.setattr(tokenizers, "_SPARE_PADS", ("<|eos|>",))
    with pytest.raises(DataError, match="no pad token other than eos"):
        loading.load_tokenizer(tokenizer_without(base, tmp_path / "b", "pad_token"))


def test_adapter_without_tokenizer_uses_its_bases(
    base: Path, tmp_path: Path, settings: ModelConfig
) -> None:
    reward_folder(base, tmp_path, settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert len(loading.load_tokenizer(str(tmp_path))) == 300


def test_scaling_lies_over_the_bases_own(base: Path) -> None:
    assert rope_parameters(str(base), ModelConfig()) is None
    expected = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    assert rope_parameters(str(base), LINEAR) == expected


def test_linear_scaling_is_half_the_position(base: Path, settings: ModelConfig) -> None:
    """Token s stands where token s / 2 stood, at factor 2."""
    plain = loading.load_causal_lm(str(base), settings)
    scaled = loading.load_causal_lm(str(base), LINEAR)
    positions_BS = torch.arange(ROPE_IDS_BS.shape[1])[None]
    attention_BS = torch.ones_like(ROPE_IDS_BS)  # without it, gaps in the positions part documents

    def logits(model: Any, positions_BS: torch.Tensor) -> torch.Tensor:
        return model(ROPE_IDS_BS, attention_mask=attention_BS, position_ids=positions_BS).logits

    with torch.no_grad():
        expected = logits(plain, positions_BS / 2)
        found = logits(scaled, positions_BS)
        unscaled = logits(plain, positions_BS)
    torch.testing.assert_close(found, expected)
    assert (found - unscaled).abs().max() > 1e-5


def test_a_saved_classifier_keeps_its_rope_scaling(base: Path, tmp_path: Path) -> None:
    classifier = loading.load_sequence_classifier(str(base), LINEAR)
    loading.save_model(classifier, loading.load_tokenizer(str(base)), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "linear"
    other = ModelConfig(rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert rope_parameters(str(tmp_path), other) is None  # scaling is for the base
    loaded = loading.load_sequence_classifier(str(tmp_path), other)
    assert loaded.config.rope_parameters["factor"] == 2.0


def test_an_architecture_without_rotary_embedding_is_refused(tmp_path: Path) -> None:
    BertConfig(architectures=["BertLMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.rope_scaling: .* \(bert\) has no rotary"):
        rope_parameters(str(tmp_path), LINEAR)
