"""Stage pretrain: train all weights of a causal LM on the domain's text."""

import time
from collections.abc import Iterator

from rlhf_ray.config import Config
from rlhf_ray.data.reading.counts import SkippedRows
from rlhf_ray.data.reading.rows import StoredRows, unpack_row
from rlhf_ray.models import loading, tiny
from rlhf_ray.models.adapters import Model
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.language_model import (
    LanguageModelTraining,
    text_rows,
    train_on_texts,
)
from rlhf_ray.stages.supervised.launcher import open_training


class PretrainTraining(LanguageModelTraining):
    """All weights are trained."""

    name = "pretrain"

    @property
    def all_weights(self) -> bool:
        return True

    def load_model(self) -> Model:
        return self.partly_frozen(loading.load_causal_lm(self.base, self.model_settings))


def run(config: Config) -> dict[str, object]:
    """Build the tiny model if no ``model.path`` is given, pretrain, write ``pretrain/model``.

    Returns:
        The summary: held-out loss and perplexity before and after, steps, tokens, parameters,
        seconds.
    """
    start_s = time.monotonic()
    run_folder = RunFolder(config)
    settings = config.pretrain
    rows = text_rows(config, "pretrain")
    if config.model.path is None:
        run_folder.stage("pretrain")
        tiny.build(
            run_folder.base_model(),
            _texts(rows),
            config.model.tiny,
            config.model.max_length,
            config.run.seed,
        )
    training = open_training(PretrainTraining, config, run_folder.base_model())
    trained, summary = train_on_texts(training, rows)
    summary["seconds"] = time.monotonic() - start_s
    if settings.packing != "none":  # unpacked rows are as long as their texts
        summary["tokens"] = trained.steps * settings.batch_size * settings.block_size
    run_folder.write_summary("pretrain", summary)
    return summary


def _texts(rows: StoredRows) -> Iterator[str]:
    """Yield each text as it is tokenised: a prompt and its completion apart."""
    for stored in rows:
        if isinstance(stored, SkippedRows):
            continue
        row = unpack_row(stored)
        messages = row.get("messages")
        turns = [item["content"] for item in messages] if isinstance(messages, list) else []
        texts = [*turns, *(row.get(column) for column in ("prompt", "completion", "text"))]
        yield from (text for text in texts if isinstance(text, str))
