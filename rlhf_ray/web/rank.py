"""The pages of `rlhf-ray rank`: a prompt, two answers without their models, a person's verdict.

Every verdict is a form that is sent, and the page after it another one: what a page shows is read
from the ranking alone, so reloading it, or going on in another browser, changes nothing.
"""

from pathlib import Path
from shlex import quote
from typing import cast
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.people.pairs import (
    Choice,
    choose_pairs,
    evaluated_pairs,
    pairs_path,
    read_pairs,
    write_pairs,
)
from rlhf_ray.people.preferences import Verdict, preferences_path
from rlhf_ray.people.ranking import LONGEST_NAME, Ranking
from rlhf_ray.web.server import HOST, page

VERDICTS = {
    "left": ("A is better", "←", "ArrowLeft"),
    "tie": ("Equally good", "↓", "ArrowDown"),
    "right": ("B is better", "→", "ArrowRight"),
    "both_bad": ("Both bad", "b", "b"),
    "skip": ("Skip", "s", "s"),
}
"""Verdict -> its button, its key as people know it, and as a browser calls it."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
TUNNEL_PORT = 8268
"""Port of a page that is brought here from another machine, unless one is given."""
LARGEST_FORM = 10_000
"""Bytes of what a page sends."""


def prepare_pairs(run: Path, choice: Choice, num: int, seed: int) -> None:
    """Write the pairs of a run that has none, out of the answers of its last evaluation.

    Args:
        run: the run's folder; a copy will do.
        choice: which pairs are shown.
        num: most pairs.
        seed: of their order.

    Raises:
        ConfigError: it is no run's folder.
        DataError: the run has neither pairs nor an evaluation to make them of.
    """
    require_run(run)
    if read_pairs(run):
        return
    candidates = evaluated_pairs(run)
    if not candidates:
        raise DataError(
            f"{run} has no answers to rank: neither {pairs_path(run).relative_to(run)} nor "
            f"evaluate/samples.jsonl. Run rlhf-ray evaluate {run} first"
        )
    write_pairs(run, choose_pairs(candidates, choice, num, seed))


def require_run(run: Path) -> None:
    """Raise a ConfigError unless a folder is that of a run."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run} is no run's folder: it was moved or deleted, or has no config.yaml. Give the "
            "run.dir of a run (runs/<run.name>), or a copy of it"
        )


def tunnels(run: Path, address: str, port: int, host: str | None = None, why: str = "") -> str:
    """Return the commands that serve a run of a cluster there, and bring the page here.

    Args:
        run: its folder on the cluster.
        address: the dashboard's; one of this machine is itself a tunnel.
        port: on both sides; 0: a fixed one.
        host: that of the run's driver; None: that of the address.
        why: the driver's is not known.
    """
    port = port or TUNNEL_PORT
    which, pod = "the node of the run's driver", "-l ray.io/node-type=head"
    if host is None:
        host = urlsplit(address if "//" in address else f"//{address}").hostname
        which = f"the address's host (of the run's driver nothing is known: {why})"
    elif host not in _LOOPBACK:
        pod = f"--field-selector status.podIP={host}"
    if host is None or host in _LOOPBACK:
        host = "HEAD"
    # A name with blanks is quoted for both shells, this one's and that of the other side.
    serve = f"rlhf-ray rank {quote(str(run))} --port {port}"
    return (
        f"By ssh, to {which}:\n"
        f"  ssh -t -L {port}:{HOST}:{port} {quote(str(host))} {quote(serve)}\n"
        "On Kubernetes:\n"
        f"  POD=$(kubectl get pod {pod} -o name | head -n 1)\n"
        f"  kubectl port-forward $POD {port} &\n"
        f"  kubectl exec -it $POD -- {serve}\n"
        "Then open the address that is printed."
    )


class RankPages:
    """Shows each person what they have not ranked, and records what they answer."""

    def __init__(self, run: Path) -> None:
        """
        Args:
            run: the run's folder, with its pairs.

        Raises:
            DataError: the file of pairs is damaged.
        """
        self._run, self.ranking = run, Ranking(run)

    def damage(self) -> str:
        """Return what of the verdicts on disk could not be read; empty if all were."""
        found = self.ranking.found
        lines = found.num_bad + found.is_torn
        if not lines:
            return ""
        return (
            f"{preferences_path(self._run)}: {lines} broken line(s) left out, whose writers were "
            f"stopped in the middle; the other {len(found.records)} are read"
        )

    def routes(self) -> list[Route]:
        """Return the routes of the page and of its forms."""
        return [
            Route("/", self._show),
            Route("/answer", self._answer, methods=["POST"]),
            Route("/undo", self._undo, methods=["POST"]),
        ]

    async def _show(self, request: Request) -> Response:
        person = request.query_params.get("person", "").strip()
        require_run(self._run)
        return await run_in_threadpool(self._page, request, person)

    def _page(self, request: Request, person: str) -> Response:
        return page(
            request,
            "rank.html.j2",
            run=self._run.resolve().name,
            person=person,
            shown=self.ranking.next(person) if person else None,
            progress=self.ranking.progress(person),
            verdicts=VERDICTS,
            longest=LONGEST_NAME,
        )

    async def _answer(self, request: Request) -> Response:
        form = await _form(request)
        require_run(self._run)  # appending would make the folder again
        person, pair, verdict = (form.get(name, "") for name in ("person", "pair", "verdict"))
        # Of a known verdict: the ranking refuses others.
        await run_in_threadpool(self.ranking.answer, person, pair, cast(Verdict, verdict))
        return _to_first_page(request, person)

    async def _undo(self, request: Request) -> Response:
        person = (await _form(request)).get("person", "")
        require_run(self._run)
        await run_in_threadpool(self.ranking.undo, person)
        return _to_first_page(request, person)


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form, each once.

    Raises:
        ConfigError: the form is too large, or no text.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_FORM:
            raise ConfigError(f"The form has more than {LARGEST_FORM} bytes")
    try:
        fields = parse_qs(body.decode(), errors="strict")
    except ValueError as error:
        raise ConfigError(f"The form is no text: {error}") from error
    return {name: values[0].strip() for name, values in fields.items()}


def _to_first_page(request: Request, person: str) -> Response:
    """Return the way to a person's next pair; reloading that sends nothing again."""
    root = request.scope["root_path"]
    return RedirectResponse(f"{root}/?{urlencode({'person': person})}", status_code=303)
