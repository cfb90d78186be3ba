"""The data sets of a run: the user's rows, the prompts to learn from, and those held out.

Rows are read with a progress bar, and statistics of their texts are written for the report.
"""

import json
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.datasets.prompts import Prompts, load_prompts
from rlhf_ray.data.quality import RowStats
from rlhf_ray.data.reading.formats import Use
from rlhf_ray.data.reading.rows import Row, StoredRows
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.disk import write_atomically
from rlhf_ray.errors import DataError
from rlhf_ray.observability.progress import Progress
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.types import Prompt


def user_rows(
    config: Config, key: Literal["pretrain", "sft", "preferences", "prompts", "eval"], use: Use
) -> StoredRows:
    """Read the rows of ``data.<key>``, which must be set; write ``data/<key>.json``.

    Raises:
        DataError: they cannot be read.
        ConfigError: a filter's function cannot be imported, or the run folder cannot be written.
    """
    name = f"data.{key}"
    with RowStats() as texts, Progress(config.run.stages).stage(name, unit="row") as bar:

        def count(row: Row) -> None:
            texts.add(row)
            bar.advance()

        sources, seed = getattr(config.data, key), config.run.seed
        loaded = load_rows(sources, use, config.prepare.max_pairs, seed, count)
        report = json.dumps(texts.report(), indent=2)
    write_atomically(RunFolder(config).stage("data") / f"{key}.json", report + "\n")
    return loaded


def ppo_prompts(
    config: Config, folder: RunFolder, tokenizer: PreTrainedTokenizerBase
) -> tuple[Prompts, list[Prompt], dict[str, int]]:
    """Return the prompts to train on, the held-out ones, and counts of dropped rows.

    They come from data.prompts, else from prepare's rl set.
    """
    if config.data.prompts is None:
        prompts, counts = _load(config, StoredRows(folder.rows("rl")), tokenizer, "prompts")
    else:
        rows = user_rows(config, "prompts", "prompts")
        prompts, counts = _load(config, rows, tokenizer, "prompts")
        if config.data.eval is None:
            cut = len(prompts) - _num_held_out(prompts)
            return prompts[:cut], list(prompts[cut:][: config.ppo.eval_prompts]), counts
    return prompts, held_out_prompts(config, folder, tokenizer, config.ppo.eval_prompts), counts


def held_out_prompts(
    config: Config, folder: RunFolder, tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[Prompt]:
    """Return prompts that no stage trains on.

    They come from data.eval, else from the end of data.prompts, else from prepare's set.
    """
    if config.data.eval is not None:
        prompts, _ = _load(config, user_rows(config, "eval", "prompts"), tokenizer, "eval")
    elif config.data.prompts is not None:
        prompts, _ = _load(config, user_rows(config, "prompts", "prompts"), tokenizer, "prompts")
        prompts = prompts[-_num_held_out(prompts) :]
    else:
        rows = StoredRows(folder.rows("evaluation"))
        prompts, _ = _load(config, rows, tokenizer, "evaluation")
    return list(prompts[:limit])


def _num_held_out(prompts: Prompts) -> int:
    """Return a tenth of the user's prompts, to hold out where data.eval is not set."""
    if len(prompts) < 2:
        raise DataError(
            f"data.prompts holds {len(prompts)} usable prompts; at least 2 are needed, as one is "
            "held out for evaluation. Add prompts, or set data.eval"
        )
    return max(1, len(prompts) // 10)


def _load(
    config: Config, rows: StoredRows, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[Prompts, dict[str, int]]:
    return load_prompts(
        rows,
        Renderer(tokenizer, config.template),
        config.rollout.max_prompt_tokens,
        config.data.overlong,
        config.data.max_bad_share,
        name,
    )
