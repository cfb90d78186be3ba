"""The pages of `rlhf-ray view`: a run's samples over time, its curves and its guards' warnings."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rlhf_ray.errors import DataError
from rlhf_ray.observability.samples.index import prompt_key
from rlhf_ray.observability.samples.reading import SORTS, Found, Query, Samples
from rlhf_ray.observability.sinks import record_of
from rlhf_ray.web.curves import Curves
from rlhf_ray.web.requests import RANGES, address, page_of, query_of
from rlhf_ray.web.server import page
from rlhf_ray.web.tokens import KINDS, coloured

PAGE = 50
"""Samples of a page."""
CAUSES = 3
"""Samples that are shown with a warning."""
SORT_OF_GUARD = {
    "mismatch": ("mismatch", True),
    "repetition": ("distinct_bigrams", False),
    "negative_kl": ("kl", False),
    "ratio": ("kl", True),
    "non_finite": ("kl", True),
    "loss_spike": ("score", True),
}
"""Guard -> the order, and whether it is descending, in which the samples it fired on come first."""


class Viewer:
    """Reads a run's folder for the pages."""

    def __init__(self, run: Path) -> None:
        """
        Args:
            run: the run's folder.

        Raises:
            DataError: it is no run's folder.
        """
        self._run, self._stage = run, run / "ppo"
        self._samples, self._curves = Samples(self._stage), Curves(self._stage)
        self._reading = Lock()
        self._require_run()

    def routes(self) -> list[Route]:
        """Return the routes of all pages."""
        pages = {
            "/": self._list,
            "/sample/{iteration:int}/{position:int}": self._sample,
            "/prompt/{key:int}": self._prompt,
            "/fixed": self._fixed,
            "/warnings": self._warnings,
        }
        return [
            Route(path, partial(_in_a_thread, self._require_run, render))
            for path, render in pages.items()
        ]

    def _require_run(self) -> None:
        if not (self._run / "config.yaml").is_file() and not self._stage.is_dir():
            raise DataError(
                f"{self._run} is no run's folder: it was moved or deleted, or has neither "
                "config.yaml nor ppo/. Give the run.dir of a run (runs/<run.name>)"
            )

    def _list(self, request: Request) -> Response:
        values = dict(request.query_params)
        query, number = query_of(values), page_of(values)
        found = self._samples.find(query, number, PAGE)
        return self._page(
            request,
            "samples.html.j2",
            values=values,
            query=query,
            found=found,
            records=self._records(found),
            number=number,
            num_pages=-(-found.total // PAGE),
            ranges=RANGES,
            sorts=SORTS,
            sources=self._samples.sources,
            to=partial(address, values),
        )

    def _sample(self, request: Request) -> Response:
        iteration, position = (request.path_params[name] for name in ("iteration", "position"))
        row = self._samples.at(iteration, position)
        record = None if row is None else self._samples.record(row)
        if record is None:
            raise DataError(
                f"Sample {position} of iteration {iteration} is not recorded, or its line in "
                "ppo/completions.jsonl is damaged"
            )
        kind = request.query_params.get("by", "advantage")
        tokens = coloured(record.get("tokens"), kind if kind in KINDS else "advantage")
        warned = [each for each in self._lines("warnings.jsonl") if each["iteration"] == iteration]
        return self._page(
            request,
            "sample.html.j2",
            record=record,
            tokens=tokens,
            kinds=KINDS,
            kind=kind,
            key=prompt_key(str(record.get("prompt", ""))),
            warnings=warned,
        )

    def _prompt(self, request: Request) -> Response:
        key, number = request.path_params["key"], page_of(request.query_params)
        found = self._samples.find(Query(prompt=key, descending=False), number, PAGE)
        records = self._records(found)
        fixed = (
            {**each, **sample, "iteration": each["iteration"]}
            for each in self._lines("eval.jsonl")
            for sample in each.get("samples", ())
            if prompt_key(str(sample.get("prompt", ""))) == key
        )
        evaluated = list(islice(fixed, number * PAGE, (number + 1) * PAGE + 1))
        shown = [record for record in records if record] or evaluated
        if not shown:
            raise DataError("No recorded sample has this prompt any more")
        return self._page(
            request,
            "prompt.html.j2",
            prompt=shown[0].get("prompt", ""),
            records=records,
            evaluated=evaluated[:PAGE],
            number=number,
            has_more=found.total > (number + 1) * PAGE or len(evaluated) > PAGE,
        )

    def _fixed(self, request: Request) -> Response:
        first = next(self._lines("eval.jsonl"), {"samples": []})
        prompts = [str(sample.get("prompt", "")) for sample in first.get("samples", ())]
        keyed = [(prompt_key(prompt), prompt) for prompt in prompts]
        return self._page(request, "fixed.html.j2", prompts=keyed)

    def _warnings(self, request: Request) -> Response:
        number = page_of(request.query_params)
        total = sum(1 for _ in self._lines("warnings.jsonl"))
        end = max(0, total - number * PAGE)
        part = islice(self._lines("warnings.jsonl"), max(0, end - PAGE), end)
        warnings = [{**warning, "causes": self._causes(warning)} for warning in part]
        return self._page(
            request,
            "warnings.html.j2",
            warnings=warnings[::-1],
            number=number,
            num_pages=-(-total // PAGE),
            orders=SORT_OF_GUARD,
        )

    def _causes(self, warning: dict[str, Any]) -> list[Any]:
        """Return the samples of a warning's iteration that its guard fired on most."""
        if warning.get("guard") not in SORT_OF_GUARD:
            return []
        sort, descending = SORT_OF_GUARD[warning["guard"]]
        iteration = warning["iteration"]
        ranges = {"iteration": (iteration, iteration)}
        query = Query(ranges=ranges, sort=sort, descending=descending)
        return self._records(self._samples.find(query, 0, CAUSES))

    def _records(self, found: Found) -> list[dict[str, Any] | None]:
        return [self._samples.record(row) for row in found.rows]

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the records of a file that have an iteration, one at a time."""
        try:
            file = (self._stage / name).open("rb")
        except FileNotFoundError:
            return
        with file:
            for line in file:
                record = record_of(line.decode(errors="replace"))
                if record is not None and isinstance(record.get("iteration"), int):
                    yield record

    def _page(self, request: Request, template: str, **values: Any) -> Response:
        with self._reading:  # pages are rendered in threads
            curves = self._curves.look()
        return page(
            request,
            template,
            run=self._run.resolve().name,
            curves=curves,
            at=time.strftime("%H:%M:%S"),
            **values,
        )


async def _in_a_thread(
    require_run: Callable[[], None], render: Callable[[Request], Response], request: Request
) -> Response:
    """Render a page in a thread, because it reads files; a run that is gone is said first."""

    def rendered() -> Response:
        require_run()
        return render(request)

    return await run_in_threadpool(rendered)
