"""What prepare does with one part of its dumps, and with one bucket of their posts.

Both read files and write files, and what is written doesn't depend on who does it, nor when. Each
leaves a small file of counts, last of all: what has one is not done again.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets.arrow_writer import ArrowWriter

from rlhf_ray.config import Config
from rlhf_ray.data.prepare.question_sets import SETS, set_of_question, to_markdown
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import Row
from rlhf_ray.data.stack_exchange.grouping import Counts, Post, group, questions_in
from rlhf_ray.data.stack_exchange.parts import Dump, Part
from rlhf_ray.data.stack_exchange.posts import Question, tag_names
from rlhf_ray.data.text_statistics import TextStats
from rlhf_ray.disk import write_atomically
from rlhf_ray.errors import ConfigError

TEXTS = ("questions", "answers")
"""Kinds of texts whose statistics are kept apart."""


@dataclass(frozen=True)
class Shards:
    """The parts and buckets of one run of prepare."""

    config: Config
    dumps: tuple[Dump, ...]
    sites: tuple[str | None, ...]
    """Of each dump."""
    num_buckets: int
    rows: Path
    """Folder of the posts of each part."""
    sets: Path
    """Folder in which the four sets are written."""

    def is_grouped(self, part: Part) -> bool:
        """Return whether a part's posts are there."""
        return self._counts_of(part).is_file()

    def group(self, part: Part, xml: Iterable[bytes]) -> str:
        """Write the posts of a part by bucket; returns the part's name.

        Raises:
            DataError: the XML is broken.
        """
        ranks: list[int] = []

        def is_selected(post: Post) -> bool:
            selected = _is_selected(post, self.config)
            if selected and self.config.prepare.limit is not None:
                ranks.append(self._rank(part.dump, int(post["Id"])))
            return selected

        file = self.rows / f"{part.name}.arrow"
        counts = group(part, xml, self.num_buckets, is_selected, file)
        np.save(self._ranks_of(part.name), np.array(ranks, np.uint64))
        write_atomically(self._counts_of(part), json.dumps(vars(counts)))
        return part.name

    def grouped(self, name: str) -> Counts:
        """Return the counts of a part whose posts are there.

        Raises:
            ConfigError: another node has written them to a folder of its own.
        """
        path = self.rows / f"{name}.json"
        try:
            return Counts(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} was written on another node and is not here; set prepare.scratch to a "
                "folder that all nodes share"
            ) from None

    def last_rank(self, names: Iterable[str]) -> int | None:
        """Return the highest rank of a question within ``prepare.limit``; None: all are.

        Args:
            names: those of all parts.
        """
        limit = self.config.prepare.limit
        if limit is None:
            return None
        ranks = np.unique(np.concatenate([np.load(self._ranks_of(name)) for name in names]))
        return None if len(ranks) <= limit else int(ranks[limit - 1])

    @property
    def name(self) -> str:
        """The dumps, for messages."""
        return ", ".join(dump.path for dump in self.dumps)

    def is_converted(self, bucket: int) -> bool:
        """Return whether a bucket's rows are in the sets."""
        return self.converted(bucket).with_suffix(".json").is_file()

    def converted(self, bucket: int) -> Path:
        """Return the path, without a suffix, of the files that count a bucket's rows."""
        return self.rows / f"bucket-{bucket:05d}"

    def counted(self, bucket: int) -> Mapping[str, int]:
        """Return the numbers of ``questions`` and ``answers`` of a bucket in the sets."""
        return saved_counts(self.converted(bucket))["posts"]

    def convert(
        self,
        bucket: int,
        names: Iterable[str],
        last_rank: int | None,
        on_question: Callable[[Mapping[str, int]], object] = lambda _: None,
    ) -> int:
        """Write a bucket's rows into the sets, a file in each; returns the bucket.

        Args:
            bucket: its index.
            names: those of all parts.
            last_rank: from `last_rank`.
            on_question: called with the numbers of questions (1) and answers of each question.
        """
        files = [self.rows / f"{name}.arrow" for name in names]
        with SetCounts(self.config, self.name) as counts, ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    ArrowWriter(features=features, path=str(self.file(name, bucket)))
                )
                for name, features in SETS.items()
            }
            for dump, question in questions_in(files, bucket, counts.skipped, counts.unused):
                if last_rank is not None and self._rank(dump, question.id) > last_rank:
                    counts.unused["beyond_limit"] += 1
                    continue
                on_question({"questions": 1, "answers": len(question.answers)})
                name, rows = counts.add(question, self.sites[dump])
                for row in rows:
                    writers[name].write(dict(row))
            for name, writer in writers.items():
                writer.finalize()
                if not counts.rows[name]:
                    self.file(name, bucket).unlink()
            counts.save(self.converted(bucket))
        return bucket

    def file(self, name: str, bucket: int) -> Path:
        """Return the file of a bucket's rows in a set."""
        return self.sets / name / f"data-{bucket:05d}-of-{self.num_buckets:05d}.arrow"

    def _counts_of(self, part: Part) -> Path:
        return self.rows / f"{part.name}.json"

    def _ranks_of(self, name: str) -> Path:
        return self.rows / f"{name}.npy"

    def _rank(self, dump: int, question_id: int) -> int:
        """Return a question's place in the draw of ``prepare.limit``, as 64 bits."""
        seed = self.config.run.seed
        digest = hashlib.sha256(f"limit:{seed}:{dump}:{question_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big")


def _is_selected(post: Post, config: Config) -> bool:
    """Return whether a question is one that prepare.min_score, tags and since ask for.

    Raises:
        KeyError: the post has no score or date, which is needed.
        ValueError: its score is no number.
    """
    wanted = config.prepare
    return (
        (wanted.min_score is None or int(post["Score"]) >= wanted.min_score)
        and (wanted.since is None or post["CreationDate"] >= wanted.since)
        and (not wanted.tags or not {*wanted.tags}.isdisjoint(tag_names(post.get("Tags", ""))))
    )


class SetCounts:
    """Counts of what the sets hold and of what was left out; those of buckets can be added up."""

    def __init__(self, config: Config, name: str) -> None:
        """
        Args:
            config: the run's.
            name: the dumps, for messages.
        """
        self.posts: Counter[str] = Counter()
        """Questions and answers; pairs of answers to one question, and those with equal scores."""
        self.rows: Counter[str] = Counter(dict.fromkeys(SETS, 0))
        """Of each set."""
        self.scores: Counter[str] = Counter()
        """Of answers."""
        self.skipped: Counter[str] = Counter()
        """Posts left out while they were grouped, by reason."""
        self.unused: Counter[str] = Counter()
        """Good questions left out, by reason."""
        self.tally = RowTally(name, config.data.max_bad_share)
        self._added = {
            "posts": self.posts,
            "rows": self.rows,
            "scores": self.scores,
            "skipped": self.skipped,
            "unused": self.unused,
        }
        self._config = config

    def __enter__(self) -> "SetCounts":
        with ExitStack() as stack:
            self.texts = {name: stack.enter_context(TextStats()) for name in TEXTS}
            self._files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, question: Question, site: str | None) -> tuple[str, list[Row]]:
        """Count a question; returns the set that it belongs to, and its rows there."""
        self.posts.update(questions=1, answers=len(question.answers))
        name = set_of_question(question.id, self._config)
        ready = to_markdown(question, self._config, site, self.tally, self.unused)
        if ready is None:
            return name, []
        self.texts["questions"].add(ready.text)
        for answer in ready.question.answers:
            self.texts["answers"].add(ready.answers[answer.id])
        scores = Counter(str(answer.score) for answer in ready.question.answers)
        self.scores.update(scores)
        ties = sum(math.comb(num, 2) for num in scores.values())
        self.posts.update(pairs=math.comb(scores.total(), 2), ties=ties)
        rows = ready.rows(name)
        if not rows:
            self.unused["question_without_pairs"] += 1
        self.rows[name] += len(rows)
        return name, rows

    def save(self, path: Path) -> None:
        """Write the counts to files of this name; the last one tells that they are whole."""
        texts = {}
        for name, stats in self.texts.items():
            texts[name], digests = stats.state()
            np.save(path.with_suffix(f".{name}.npy"), digests)
        state = {**self._added, "tally": self.tally.state(), "texts": texts}
        write_atomically(path.with_suffix(".json"), json.dumps(state))

    def add_saved(self, path: Path) -> None:
        """Add the counts that were saved under a name."""
        state = saved_counts(path)
        for name, mine in self._added.items():
            mine.update(state[name])
        self.tally.add(state["tally"])
        for name, stats in self.texts.items():
            stats.add_all(state["texts"][name], np.load(path.with_suffix(f".{name}.npy")))


def saved_counts(path: Path) -> dict[str, Any]:
    """Return the counts that `SetCounts.save` wrote under a name, without the texts' digests."""
    return dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
