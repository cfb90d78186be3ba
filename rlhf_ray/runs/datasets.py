"""The data sets of a run: the user's rows, the prompts to learn from, and those held out.

Rows are read with a progress bar, and statistics of their texts are written for the report.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.config.data import DataSource
from rlhf_ray.data.datasets.drawn_prompts import DrawnPrompts, is_held_out
from rlhf_ray.data.datasets.drawn_rows import LARGE
from rlhf_ray.data.datasets.prompts import Check, PromptRendering, Prompts, load_prompts
from rlhf_ray.data.reading.counts import SkippedRows
from rlhf_ray.data.reading.draws import try_sample
from rlhf_ray.data.reading.formats import Use
from rlhf_ray.data.reading.rows import Row, StoredRows
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.data.reading.tables import cached_table
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import tokenizer_state
from rlhf_ray.data.text_statistics import RowStats
from rlhf_ray.disk import write_atomically
from rlhf_ray.errors import DataError
from rlhf_ray.observability.progress import Progress
from rlhf_ray.people.preferences import preferences_path
from rlhf_ray.rewards.required_columns import require_read_columns
from rlhf_ray.rewards.source import TemplateCheck
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.scratch import scratch_folder
from rlhf_ray.types import Prompt
from rlhf_ray.version import __version__

LARGE_BYTES = 10_000_000
"""Bytes of files above which their converted rows are kept in the run's scratch folder."""

RENDERED = "prompts"
"""Folder in that of stage ppo for the prompts rendered so far; emptied when the stage is done."""


def user_rows(
    config: Config, key: Literal["pretrain", "sft", "preferences", "prompts", "eval"], use: Use
) -> StoredRows:
    """Read the rows of ``data.<key>``, which must be set; write ``data/<key>.json``.

    It warns where a file has changed since this run read it last: what is held out, and what is
    left to learn, are then other rows than before.

    Raises:
        DataError: they cannot be read.
        ConfigError: a filter's function cannot be imported, or the run folder cannot be written.
    """
    sources = getattr(config.data, key)
    if identity := _identity(config, sources, use):
        folder = scratch_folder(config) / "rows" / identity
        table, notes = cached_table(folder, lambda: _read_rows(config, key, use))
    else:
        table, notes = _read_rows(config, key, use)
    report, digest = notes["report"], notes["digest"]
    path = RunFolder(config).stage("data") / f"{key}.json"
    earlier = _digests(path)
    if earlier.get(use, digest) != digest:
        paths = ", ".join(source.label for source in sources)
        Progress(config.run.stages).say(
            f"Warning: data.{key} ({paths}) holds other rows than when this run read it before, so "
            "other rows are held out and learnt. Restore the data, or begin a new run"
        )
    report["digests"] = {**earlier, use: digest}
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    return StoredRows(table, [SkippedRows(**each) for each in notes["skipped"]], digest)


def _read_rows(config: Config, key: str, use: Use) -> tuple[Dataset, dict[str, Any]]:
    """Read and convert the rows of ``data.<key>``; returns also what is to be known of them."""
    digest = hashlib.blake2b(digest_size=16)
    name, sources = f"data.{key}", getattr(config.data, key)
    with RowStats() as texts, Progress(config.run.stages).stage(name, unit="row") as bar:

        def count(row: Row) -> None:
            texts.add(row)
            digest.update(json.dumps(row, default=str).encode())
            bar.advance()

        loaded = load_rows(sources, use, config.prepare.max_pairs, config.run.seed, count)
        report = texts.report()
    skipped = [vars(each) for each in loaded.skipped]
    return loaded.table, {"skipped": skipped, "digest": digest.hexdigest(), "report": report}


def _identity(config: Config, sources: Sequence[DataSource], use: Use) -> str | None:
    """Return a name for all that decides what is read from large files; None: read them again.

    That is so for a few megabytes, a dataset on the hub, and rows that functions of the user make,
    which may have changed.
    """
    if any(each.function or any(test.function for test in each.filter) for each in sources):
        return None
    paths = [Path(source.path).expanduser() for source in sources if source.path is not None]
    if not all(path.exists() for path in paths):
        return None
    files = [
        file
        for path in paths
        for file in ([path] if path.is_file() else sorted(path.rglob("*")))
        if file.is_file()
    ]
    states = [file.stat() for file in files]
    if sum(state.st_size for state in states) < LARGE_BYTES:
        return None
    given = [
        [str(file.resolve()) for file in files],
        # Whatever is written to a file changes the last one.
        [(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states],
        [source.model_dump_json() for source in sources],
        (use, config.prepare.max_pairs, config.run.seed, __version__),
    ]
    return hashlib.blake2b(json.dumps(given).encode(), digest_size=16).hexdigest()


def preference_sources(config: Config) -> list[DataSource] | None:
    """Return what reward and dpo learn from; None: the pairs of prepare alone.

    Where ``run.stages`` has rank these are the verdicts on the run's own pairs, mixed by
    ``rank.weight`` with data.preferences, else with prepare's pairs, if the run has any.
    """
    if "rank" not in config.run.stages:
        return config.data.preferences
    run = RunFolder(config).path
    people = DataSource(path=str(preferences_path(run)), weight=config.rank.weight)
    others = config.data.preferences
    if others is None:
        prepared = run / "prepare" / "reward"
        others = [DataSource(path=str(prepared))] if prepared.is_dir() else []
    return [people, *(each.model_copy(update={"weight": each.weight or 1.0}) for each in others)]


def prepared_rows(folder: RunFolder, name: str) -> StoredRows:
    """Return a set that prepare wrote."""
    table = folder.rows(name)
    return StoredRows(table, digest=table._fingerprint)


def _digests(path: Path) -> dict[str, str]:
    """Return the digests of rows that this run read before, by what the rows were for."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["digests"])
    except (OSError, ValueError, KeyError, TypeError):  # none were read, or by an older version
        return {}


def ppo_prompts(
    config: Config,
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    checks: Sequence[Check] = (),
) -> tuple[Prompts | DrawnPrompts, list[Prompt], dict[str, int]]:
    """Return the prompts to train on, the held-out ones, and counts of dropped rows.

    They come from data.prompts, else from prepare's rl set. ``checks`` are as in `load_prompts`.
    Of a large set the counts are those of the rows read so far, and grow with them.
    """
    load = partial(_load, config, folder, tokenizer, checks)
    store = folder.stage("ppo") / RENDERED
    if config.data.prompts is None:
        prompts, counts = load("prompts", prepared_rows(folder, "rl"), store)
    else:
        rows = user_rows(config, "prompts", "prompts")
        if config.data.eval is None:
            prompts, held_out, counts = _split(config, load, rows, store)
            return prompts, held_out.sample(config.ppo.eval_prompts, config.run.seed), counts
        prompts, counts = load("prompts", rows, store)
    held_out = held_out_prompts(config, folder, tokenizer, config.ppo.eval_prompts, checks)
    return prompts, held_out, counts


def sampled_prompts(
    config: Config, folder: RunFolder, tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[Prompt]:
    """Return a sample of the prompts that PPO trains on, of which none is held out."""
    load = partial(_load, config, folder, tokenizer, ())
    if config.data.prompts is None:
        prompts, _ = load("prompts", prepared_rows(folder, "rl"))
    elif config.data.eval is None:
        prompts, *_ = _split(config, load, user_rows(config, "prompts", "prompts"))
    else:
        prompts, _ = load("prompts", user_rows(config, "prompts", "prompts"))
    return prompts.sample(limit, config.run.seed)


def held_out_prompts(
    config: Config,
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    checks: Sequence[Check] = (),
) -> list[Prompt]:
    """Return prompts that no stage trains on.

    They are a sample of data.eval, else of what data.prompts holds out, else of prepare's set.
    """
    load = partial(_load, config, folder, tokenizer, checks)
    if config.data.eval is not None:
        prompts, _ = load("eval", user_rows(config, "eval", "prompts"))
    elif config.data.prompts is not None:
        _, prompts, _ = _split(config, load, user_rows(config, "prompts", "prompts"))
    else:
        prompts, _ = load("evaluation", prepared_rows(folder, "evaluation"))
    return prompts.sample(limit, config.run.seed)


def _split(
    config: Config,
    load: Callable[..., tuple[Prompts | DrawnPrompts, dict[str, int]]],
    rows: StoredRows,
    store: Path | None = None,
) -> tuple[Prompts | DrawnPrompts, Prompts | DrawnPrompts, dict[str, int]]:
    """Hold out a tenth of the user's prompts, where data.eval is not set; returns counts as well.

    Raises:
        DataError: there are fewer than two.
    """
    seed = config.run.seed
    prompts, counts = load("prompts", rows, store, lambda text: not is_held_out(text, seed))
    if isinstance(prompts, DrawnPrompts):
        held_out, _ = load("prompts", rows, store, lambda text: is_held_out(text, seed))
        return prompts, held_out, counts
    if len(prompts) < 2:
        raise DataError(
            f"data.prompts holds {len(prompts)} usable prompts; at least 2 are needed, as one is "
            "held out for evaluation. Add prompts, or set data.eval"
        )
    return *prompts.split(max(1, len(prompts) // 10), seed), counts


def _load(
    config: Config,
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    checks: Sequence[Check],
    name: str,
    rows: StoredRows,
    store: Path | None = None,
    part: Callable[[str], bool] | None = None,
) -> tuple[Prompts | DrawnPrompts, dict[str, int]]:
    """Load prompts, or begin to draw them from a large set; returns counts as well.

    Args:
        config: the run's.
        folder: of the run.
        tokenizer: of the policy.
        checks: as in `load_prompts`.
        name: the set, for messages.
        rows: of the set.
        store: folder for what is rendered of a large set.
        part: of a large set, as in `DrawnPrompts`.
    """
    rendering = PromptRendering(
        Renderer(tokenizer, config.template),
        config.rollout.max_prompt_tokens,
        config.data.overlong,
        [partial(require_read_columns, config.rewards), *checks],
    )
    load, share = partial(load_prompts, **vars(rendering)), config.data.max_bad_share
    try_sample(rows, load, share, name)
    if len(rows.table) <= LARGE or _is_older(folder):
        return load(rows, max_bad_share=share, name=name)
    if store is not None:
        store = store / _digest(config, tokenizer, checks, rows)
    prompts = DrawnPrompts(rows, rendering, config.run.seed, share, name, part, store)
    prompts.reach(1)
    return prompts, prompts.counts


def _is_older(folder: RunFolder) -> bool:
    """Return whether PPO has begun without drawing large sets first: such a run keeps its order."""
    return (folder.path / "checkpoints").is_dir() and not (folder.stage("ppo") / RENDERED).is_dir()


def _digest(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    checks: Sequence[Check],
    rows: StoredRows,
) -> str:
    """Return a name for all that decides which prompts a row becomes, and in which order."""
    given = [
        rows.digest,
        tokenizer_state(tokenizer),
        *(
            tokenizer_state(check.renderer.tokenizer)
            for check in checks
            if isinstance(check, TemplateCheck)
        ),
        config.template.model_dump_json(),
        *(source.model_dump_json() for source in (*config.rewards, *(config.data.prompts or ()))),
        (config.run.seed, config.rollout.max_prompt_tokens, config.data.overlong),
    ]
    return hashlib.blake2b(json.dumps(given).encode(), digest_size=16).hexdigest()
