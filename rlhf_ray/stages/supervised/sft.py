"""Stage 3: supervised fine-tuning on question and answer, with LoRA (then merged) or in full."""

import time
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.data.datasets.texts import load_documents
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import pad_id
from rlhf_ray.models import adapters, loading
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.models.quantization import ready_for_adapter
from rlhf_ray.models.stopping import generation_config
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.language_model import (
    LanguageModelTraining,
    language_model_numbers,
    packed_blocks,
    text_rows,
)
from rlhf_ray.stages.supervised.launcher import open_training, run_training


class SftTraining(LanguageModelTraining):
    """A LoRA adapter over a frozen base, which may be quantised; or all weights."""

    name = "sft"

    @property
    def all_weights(self) -> bool:
        return self.config.sft.tuning == "full"

    def load_model(self) -> Any:
        settings = self.model_settings
        model = loading.load_causal_lm(self.base, settings, quantized=True)
        if self.all_weights:
            return self.partly_frozen(model)
        lora = self.config.sft.lora
        return adapters.attach(
            ready_for_adapter(model, settings),
            lora,
            "CAUSAL_LM",
            seed=self.config.run.seed,
            dropout=lora.dropout,
        )

    def save(self, model: Any) -> None:
        if self.all_weights:
            self.save_whole(model)
        else:
            self.save_adapter(model, "adapter")


def run(config: Config) -> dict[str, Any]:
    """Fine-tune what pretrain left, or ``model.path``; write ``sft/model``, and ``sft/adapter``.

    Returns:
        The summary: held-out loss and perplexity before and after, parameters, steps, seconds,
        and with LoRA the share of the changed weights that the merge kept.

    Raises:
        RlhfError: no usable data or model, or the training failed.
    """
    start_s = time.monotonic()
    run_folder = RunFolder(config)
    settings = config.sft
    training = open_training(SftTraining, config, run_folder.pretrained_model())
    tokenizer = loading.load_tokenizer(training.base)
    documents, counts = load_documents(
        text_rows(config, "sft"),
        Renderer(tokenizer, config.template),
        config.data.max_bad_share,
        settings.preferred_only,
        settings.loss_on,
        name="sft's texts",
        # Plain concatenation lets a text go on in the next block, so there none is too long.
        max_tokens=None if settings.packing == "concat" else settings.block_size,
        overlong=config.data.overlong,
    )
    blocks = packed_blocks("sft", documents, settings, pad_id(tokenizer))
    numbers = run_training(training, blocks)
    summary = {
        **language_model_numbers(numbers),
        "rows": counts,
    }
    if not training.all_weights:
        adapter, out = str(training.folder / "adapter"), training.folder / "model"
        summary["merge_survived"] = merge_adapter(training.base, adapter, out, config.model)
    model = training.folder / "model"
    generation_config(str(model), config.template).save_pretrained(model)
    summary["seconds"] = time.monotonic() - start_s
    run_folder.write_summary("sft", summary)
    return summary
