from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build_random

from rlhf_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import adapters, forward, loading, merging, tiny
from rlhf_ray.models.adapters import merge_into_base
from rlhf_ray.models.merging import free_memory, merge_adapter, verify_saved
from rlhf_ray.models.probes import probe_logits, refuse_change

IDS_BS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def save_changed(model: object, base: Path, folder: Path, task: str, scale: float) -> torch.Tensor:
    """Attach an adapter, fill it with noise, save it; the wrapped model's logits or scores."""
    wrapped = adapters.attach(model, LoraConfig(r=2), task, seed=0, dropout=0.0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (p for p in wrapped.parameters() if p.requires_grad):
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)
        wrapped.eval()
        if task == "SEQ_CLS":
            result = forward.sequence_scores(wrapped, IDS_BS, torch.ones_like(IDS_BS))
        else:
            result = wrapped(IDS_BS).logits
    loading.save_adapter(wrapped, loading.load_tokenizer(str(base)), folder, str(base))
    return result


def test_merged_causal_lm_equals_base_with_adapter(
    base: Path, tmp_path: Path, settings: ModelConfig
) -> None:
    model = loading.load_causal_lm(str(base), settings)
    plain = model(IDS_BS).logits.detach()
    expected = save_changed(model, base, tmp_path / "adapter", "CAUSAL_LM", 0.1)
    survived = merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "merged", settings)
    merged = loading.load_causal_lm(str(tmp_path / "merged"), settings)
    logits = merged(IDS_BS).logits.detach()
    assert (logits - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 0.01
    assert survived > 0.999
    assert torch.equal(
        merged.generate(IDS_BS, max_new_tokens=8, do_sample=False)[:, 5],
        expected[:, -1].argmax(-1),
    )


def test_merged_classifier_keeps_its_head(
    base: Path, tmp_path: Path, settings: ModelConfig
) -> None:
    model = loading.load_sequence_classifier(str(base), settings)
    expected_B = save_changed(model, base, tmp_path / "adapter", "SEQ_CLS", 0.1)
    merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "merged", settings)
    merged = loading.load_sequence_classifier(str(tmp_path / "merged"), settings, require_head=True)
    scores_B = forward.sequence_scores(merged, IDS_BS, torch.ones_like(IDS_BS))
    assert (scores_B - expected_B).abs().max() < 1e-4


def test_an_adapter_on_an_adapter_stands_on_what_that_made(
    base: Path, tmp_path: Path, settings: ModelConfig
) -> None:
    """A critic that was trained on a reward model in PEFT form."""
    model = loading.load_sequence_classifier(str(base), settings)
    first_B = save_changed(model, base, tmp_path / "reward", "SEQ_CLS", 0.1)
    wrapped = loading.load_sequence_classifier(str(tmp_path / "reward"), settings)
    folded, survived = merge_into_base(wrapped)
    scores_B = forward.sequence_scores(folded, IDS_BS, torch.ones_like(IDS_BS))
    torch.testing.assert_close(scores_B, first_B, rtol=1e-4, atol=1e-4)
    assert survived > 0.999
    second_B = save_changed(folded, tmp_path / "reward", tmp_path / "critic", "SEQ_CLS", 0.1)
    loaded = loading.load_sequence_classifier(str(tmp_path / "critic"), settings)
    found_B = forward.sequence_scores(loaded, IDS_BS, torch.ones_like(IDS_BS))
    torch.testing.assert_close(found_B, second_B, rtol=1e-4, atol=1e-4)
    assert (second_B - first_B).abs().max() > 0.01


def test_a_quantised_base_is_not_folded_into(tmp_path: Path) -> None:
    wide = tmp_path / "wide"  # nf4 needs 64 inputs a row
    shape = TinyModelConfig(vocab_size=300, hidden_size=64, intermediate_size=64, num_heads=2)
    tiny.build(wide, ["some text"], shape, max_length=64, seed=0)
    model = loading.load_sequence_classifier(str(wide), ModelConfig())
    save_changed(model, wide, tmp_path / "reward", "SEQ_CLS", 0.1)
    wrapped = loading.load_sequence_classifier(
        str(tmp_path / "reward"), ModelConfig(quantization="nf4"), quantized=True
    )
    with pytest.raises(DataError, match=r"into a quantised base in memory: merge it"):
        merge_into_base(wrapped)


def test_folder_is_complete_and_replaced_whole(
    base: Path, tmp_path: Path, settings: ModelConfig
) -> None:
    model = loading.load_causal_lm(str(base), settings)
    save_changed(model, base, tmp_path / "adapter", "CAUSAL_LM", 0.1)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "stale.txt").write_text("old")
    merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "merged", settings)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    assert "stale.txt" not in names
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}


def test_share_that_survives_bf16_is_counted(base: Path, tmp_path: Path) -> None:
    """bf16 keeps 8 bits: a change of a thousandth is partly lost, a large one is not."""
    settings = ModelConfig(dtype="bfloat16")
    shares = []
    for name, scale in (("small", 1e-5), ("large", 1.0)):
        model = loading.load_causal_lm(str(base), settings)
        save_changed(model, base, tmp_path / name, "CAUSAL_LM", scale)
        out = tmp_path / f"{name}-merged"
        shares.append(merge_adapter(str(base), str(tmp_path / name), out, settings))
    assert 0 < shares[0] < 0.9
    assert shares[1] > 0.99


def test_fresh_adapter_changes_nothing(base: Path, tmp_path: Path, settings: ModelConfig) -> None:
    model = loading.load_causal_lm(str(base), settings)
    wrapped = adapters.attach(model, LoraConfig(r=2), "CAUSAL_LM", seed=0, dropout=0.0)
    tokenizer = loading.load_tokenizer(str(base))
    loading.save_adapter(wrapped, tokenizer, tmp_path / "adapter", str(base))
    assert merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "m", settings) == 1.0
    merged = loading.load_causal_lm(str(tmp_path / "m"), settings).state_dict()
    for name, weight in loading.load_causal_lm(str(base), settings).state_dict().items():
        assert torch.equal(merged[name], weight), name


def test_plain_folder_is_refused(base: Path, tmp_path: Path, settings: ModelConfig) -> None:
    with pytest.raises(DataError, match="nothing to merge"):
        merge_adapter(str(base), str(base), tmp_path / "m", settings)


def peft_folder(base: str, folder: Path, **lora: object) -> str:
    """An adapter as other tools make it, by peft alone, with weights that matter."""
    model = loading.load_causal_lm(base, ModelConfig())
    settings = PeftLoraConfig(r=2, task_type="CAUSAL_LM", **lora)  # type: ignore[arg-type]
    wrapped = get_peft_model(model, settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (p for p in wrapped.parameters() if p.requires_grad):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    wrapped.peft_config["default"].base_model_name_or_path = base  # type: ignore[index,union-attr]
    wrapped.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_output_layer_is_not_merged_into_the_embedding(
    tmp_path: Path, settings: ModelConfig, target: str
) -> None:
    base = build_random("llama", tmp_path / "base", ["some text"], tie_word_embeddings=True)
    adapter = peft_folder(base, tmp_path / "adapter", target_modules=[target])
    with pytest.raises(DataError, match=f"on {target}, whose weight is that of the input"):
        merge_adapter(base, adapter, tmp_path / "merged", settings)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_on_an_untied_output_layer_is_merged(
    tmp_path: Path, settings: ModelConfig
) -> None:
    base = build_random("llama", tmp_path / "base", ["some text"])
    adapter = peft_folder(base, tmp_path / "adapter", target_modules=["lm_head", "embed_tokens"])
    expected = loading.with_adapter(loading.load_causal_lm(base, settings), adapter)(IDS_BS).logits
    merge_adapter(base, adapter, tmp_path / "merged", settings)
    merged = loading.load_causal_lm(str(tmp_path / "merged"), settings)
    torch.testing.assert_close(merged(IDS_BS).logits, expected, atol=1e-3, rtol=1e-3)


def test_a_merge_that_changes_the_logits_is_refused(tmp_path: Path, settings: ModelConfig) -> None:
    """DoRA rescales the sum of weight and delta; a merge that adds the delta alone is wrong."""
    base = build_random("llama", tmp_path / "base", ["some text"])
    adapter = peft_folder(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(DataError, match=r"The merge went wrong: its logits differ by \d"):
        merge_adapter(base, adapter, tmp_path / "merged", settings)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bloom", "opt", "mixtral"])
def test_a_merge_is_within_what_rounding_explains(tmp_path: Path, kind: str, dtype: str) -> None:
    settings = ModelConfig.model_validate({"dtype": dtype})
    base = build_random(kind, tmp_path / "base", ["some text"])
    targets = ["q_proj", "v_proj"] if kind == "mixtral" else "all-linear"
    adapter = peft_folder(base, tmp_path / "adapter", target_modules=targets)
    assert merge_adapter(base, adapter, tmp_path / "merged", settings) > 0.9


def test_the_memory_of_a_job_is_what_its_control_groups_leave(tmp_path: Path) -> None:
    task = tmp_path / "job" / "task"
    task.mkdir(parents=True)
    unlimited = free_memory(task)
    for folder, limit, used in ((task, "max", "300"), (tmp_path / "job", "1000", "400")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert free_memory(task) == 600
    assert unlimited > 10**8


def test_scores_that_hardly_differ_are_compared_by_their_size() -> None:
    """A reward model may score random texts alike; bf16 rounds by the size of the scores."""
    scores = 4.0 + 0.01 * torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    refuse_change(scores, scores + 0.02, torch.bfloat16, "Merged")
    with pytest.raises(DataError, match="Merged: its logits differ by 2"):
        refuse_change(scores, scores - 2, torch.bfloat16, "Merged")


def test_what_all_logits_of_a_token_share_is_not_compared() -> None:
    logits = torch.randn(8, 4, 50, generator=torch.Generator().manual_seed(0))
    refuse_change(logits - 100, logits - 97, torch.float32, "Merged")
    with pytest.raises(DataError, match=r"of a size of (0\.99|1|1\.\d+);"):  # not of 100
        refuse_change(logits - 100, logits.flip(-1) - 100, torch.float32, "Merged")


def test_a_folder_that_holds_another_model_is_not_passed_off_as_the_trained_one(
    base: Path, tmp_path: Path, settings: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load_causal_lm(str(base), settings)
    logits = probe_logits(model)
    verify_saved(model, logits, str(base), settings)
    with pytest.raises(DataError, match=r"is not the model that was saved: its logits differ"):
        verify_saved(model, logits + logits.std() * torch.randn_like(logits), str(base), settings)
    save_changed(model, base, tmp_path / "adapter", "CAUSAL_LM", 0.1)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(iter(tensors))
    monkeypatch.setattr(merging, "MEMORY_SHARE", 0.0)  # names and shapes must do
    verify_saved(model, logits, str(tmp_path / "adapter"), settings)
    for wrong in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: tensors[name][:, :-1].contiguous()},
    ):
        save_file(wrong, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(DataError, match="cannot be loaded"):
            verify_saved(model, logits, str(tmp_path / "adapter"), settings)
