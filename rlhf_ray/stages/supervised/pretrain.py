"""Stage 2: a causal LM learns the domain's text, all its weights trained."""

import time
from collections.abc import Iterator
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.data.datasets.texts import load_documents
from rlhf_ray.data.reading.rows import StoredRows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import pad_id
from rlhf_ray.models import loading, tiny
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.language_model import (
    LanguageModelTraining,
    language_model_numbers,
    packed_blocks,
    text_rows,
)
from rlhf_ray.stages.supervised.launcher import open_training, run_training


class PretrainTraining(LanguageModelTraining):
    """All weights are trained."""

    name = "pretrain"

    @property
    def all_weights(self) -> bool:
        return True

    def load_model(self) -> Any:
        return self.partly_frozen(loading.load_causal_lm(self.base, self.model_settings))

    def save(self, model: Any) -> None:
        self.save_whole(model)


def run(config: Config) -> dict[str, Any]:
    """Build the tiny model if no ``model.path`` is given, pretrain, write ``pretrain/model``.

    Returns:
        The summary: held-out loss and perplexity before and after, steps, tokens, parameters,
        seconds.

    Raises:
        RlhfError: no usable data or model, or the training failed.
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
    tokenizer = loading.load_tokenizer(training.base)
    renderer = Renderer(tokenizer, config.template)
    documents, counts = load_documents(
        rows, renderer, config.data.max_bad_share, name="pretrain's texts"
    )
    blocks = packed_blocks("pretrain", documents, settings, pad_id(tokenizer))
    numbers = run_training(training, blocks)
    summary = {
        **language_model_numbers(numbers),
        "rows": counts,
        "seconds": time.monotonic() - start_s,
    }
    if settings.packing != "none":  # there each row has as many as its text
        summary["tokens"] = numbers["steps"] * settings.batch_size * settings.block_size
    run_folder.write_summary("pretrain", summary)
    return summary


def _texts(rows: StoredRows) -> Iterator[str]:
    """Each text as it is tokenised: a prompt and its completion apart."""
    for row in rows:
        turns = [message["content"] for message in row.get("messages") or []]
        texts = [*turns, *(row.get(column) for column in ("prompt", "completion", "text"))]
        yield from (text for text in texts if isinstance(text, str))
