"""Stage sft: fine-tune on questions and answers, with LoRA (merged afterwards) or in full."""

import time
from functools import partial

from rlhf_ray.config import Config
from rlhf_ray.data.datasets.texts import TextRendering
from rlhf_ray.models import loading
from rlhf_ray.models.adapters import Model
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.models.stop_conditions import generation_config
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.language_model import (
    LanguageModelTraining,
    text_rows,
    train_on_texts,
)
from rlhf_ray.stages.supervised.launcher import open_training


class SftTraining(LanguageModelTraining):
    """A LoRA adapter over a frozen base, which may be quantised; or all weights."""

    name = "sft"
    adapter_folder = "adapter"

    @property
    def all_weights(self) -> bool:
        return self.config.sft.tuning == "full"

    def load_model(self) -> Model:
        model = loading.load_causal_lm(self.base, self.model_settings, quantized=True)
        if self.all_weights:
            return self.partly_frozen(model)
        return self.with_adapter(model, self.config.sft.lora, "CAUSAL_LM")


def run(config: Config) -> dict[str, object]:
    """Fine-tune what pretrain left, or ``model.path``; write ``sft/model``, and ``sft/adapter``.

    Returns:
        The summary: held-out loss and perplexity before and after, parameters, steps, seconds,
        and with LoRA the share of the changed weights that the merge kept.
    """
    start_s = time.monotonic()
    run_folder = RunFolder(config)
    settings = config.sft
    training = open_training(SftTraining, config, run_folder.pretrained_model())
    rendering = partial(
        TextRendering,
        preferred_only=settings.preferred_only,
        loss_on=settings.loss_on,
        # With plain concatenation a text continues in the next block, so none is too long.
        max_tokens=None if settings.packing == "concat" else settings.block_size,
        overlong=config.data.overlong,
    )
    _, summary = train_on_texts(training, text_rows(config, "sft"), rendering)
    model = training.folder / "model"
    if not training.all_weights:
        adapter = str(training.folder / training.adapter_folder)
        summary["merge_survived"] = merge_adapter(training.base, adapter, model, config.model)
    generation_config(str(model), config.template, config.model).save_pretrained(model)
    summary["seconds"] = time.monotonic() - start_s
    run_folder.write_summary("sft", summary)
    return summary
