"""The data sets of a run: the user's rows, and the prompts to learn from and to hold out.

Rows are read with progress, and their texts are counted for the report.
"""

import json
from typing import Any, Literal

from rlhf_ray.config import Config
from rlhf_ray.data.datasets.prompts import Prompts, load_prompts
from rlhf_ray.data.quality import RowStats
from rlhf_ray.data.reading.formats import Use
from rlhf_ray.data.reading.rows import Row, StoredRows
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.observability.progress import Progress
from rlhf_ray.runs.folder import RunFolder, write_atomically
from rlhf_ray.types import Prompt


def user_rows(
    config: Config, key: Literal["pretrain", "sft", "preferences", "prompts", "eval"], use: Use
) -> StoredRows:
    """The rows of ``data.<key>``, which must be set; writes ``data/<key>.json``.

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
    config: Config, folder: RunFolder, tokenizer: Any
) -> tuple[Prompts, list[Prompt], dict[str, int]]:
    """What PPO samples from (data.prompts, else prepare's rl set), what is held out, and counts."""
    if config.data.prompts is None:
        prompts, counts = _load(config, StoredRows(folder.rows("rl")), tokenizer, "prompts")
    else:
        rows = user_rows(config, "prompts", "prompts")
        prompts, counts = _load(config, rows, tokenizer, "prompts")
        if config.data.eval is None:
            cut = len(prompts) - _num_held_out(prompts)
            return prompts[:cut], list(prompts[cut:][: config.ppo.eval_prompts]), counts
    return prompts, held_out_prompts(config, folder, tokenizer, config.ppo.eval_prompts), counts


def held_out_prompts(config: Config, folder: RunFolder, tokenizer: Any, limit: int) -> list[Prompt]:
    """Prompts that no stage trains on: data.eval, the end of data.prompts, or prepare's set."""
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
    """A tenth of the user's prompts, where no set for evaluation is given.

    Raises:
        DataError: too few to divide.
    """
    if len(prompts) < 2:
        raise DataError(
            f"data.prompts holds {len(prompts)} usable prompts; at least 2 are needed, one of them "
            "held out for evaluation (or name a set in data.eval)"
        )
    return max(1, len(prompts) // 10)


def _load(
    config: Config, rows: StoredRows, tokenizer: Any, name: str
) -> tuple[Prompts, dict[str, int]]:
    return load_prompts(
        rows,
        Renderer(tokenizer, config.template),
        config.rollout.max_prompt_tokens,
        config.data.overlong,
        config.data.max_bad_share,
        name,
    )
