"""Data sets of the user's own: read with progress, their texts counted for the report."""

import json
from typing import Literal

from rlhf_ray.config import Config
from rlhf_ray.data.formats import Use
from rlhf_ray.data.quality import RowTexts
from rlhf_ray.data.rows import Loaded, Row
from rlhf_ray.data.sources import load_rows
from rlhf_ray.observability.progress import Progress
from rlhf_ray.stages.run_folder import RunFolder, write_atomically


def own_rows(
    config: Config, key: Literal["pretrain", "sft", "preferences", "prompts", "eval"], use: Use
) -> Loaded:
    """The rows of ``data.<key>``, which must be set; writes ``data/<key>.json``.

    Raises:
        DataError: they cannot be read.
        ConfigError: a filter's function cannot be imported, or the run folder cannot be written.
    """
    name = f"data.{key}"
    with RowTexts() as texts, Progress(config.run.stages).stage(name, unit="row") as bar:

        def count(row: Row) -> None:
            texts.add(row)
            bar.advance()

        sources, seed = getattr(config.data, key), config.run.seed
        loaded = load_rows(sources, use, config.prepare.max_pairs, seed, count)
        report = json.dumps(texts.report(), indent=2)
    write_atomically(RunFolder(config).stage("data") / f"{key}.json", report + "\n")
    return loaded
