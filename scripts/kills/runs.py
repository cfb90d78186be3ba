"""One run of PPO whose processes are killed."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

from kills import driver
from kills.choice import Kill
from kills.inputs import NUM_ROLES
from kills.nodes import Nodes
from kills.outcome import faults_of_leftovers, faults_of_records, read_summary
from kills.processes import MARK, Marked, Seen, kill

SCRIPTS = Path(__file__).parents[1]
POLL_S = 0.05
MAPS_EVERY_S = 5.0
"""Seconds between two looks at the shared memory that processes map."""
STILL_S = 300.0
"""Seconds without an edge of a phase after which a run counts as hanging."""
FIRST_GUESS_S = 3.0
"""Length of an iteration as long as none was timed."""
DRIVER, NODE, ENGINE, GENERATOR = "driver", "node", "engine", "generator"
GROUPS = ("policy", "critic")
"""Roles whose processes are started again together."""
Mode = Literal["local", "ray"]
"""Ray inside the run (its driver's death takes it along), or a cluster that the run joins, whose
nodes can be killed."""


@dataclass
class Struck:
    """A kill that was made."""

    kill: Kill
    phase: str
    """The driver's, or edge and phase."""
    at: float
    ended: dict[str, int]
    """Name -> process id of all actors that it ended; ``driver`` among them."""
    cold_s: float | None
    """The longest first start of them in the same run."""
    recovered_s: float | None = None
    """Seconds until the last of them was ready again; None: not before the run's end, or before
    the driver or a node was killed, too."""
    survived: bool = False


@dataclass
class Outcome:
    """What became of a run."""

    faults: list[str]
    struck: list[Struck]
    seconds: float
    summary: dict[str, Any]


class Failed(Exception):
    """A run died or does not move any more."""


@dataclass
class ChaosRun:
    """A run, its kills, and the watch over both."""

    folder: Path
    """Of the run; it does not exist yet."""
    config: Path
    mode: Mode
    iterations: int
    seed: int
    kills: Sequence[Kill] = ()
    """In their order."""
    on_kill: Callable[[Struck], None] = lambda struck: None

    marked: Marked = field(default_factory=Marked)
    _struck: list[Struck] = field(default_factory=list)
    _edges: list[dict[str, Any]] = field(default_factory=list)
    _drivers: set[int] = field(default_factory=set)
    """Process ids of the drivers that have reached an edge."""
    _cold_s: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    """Phases in which the driver is, in the order in which it entered them."""
    _moved_at: float = 0.0
    _maps_read_at: float = 0.0

    def run(self) -> Outcome:
        """Run to the end; kill on the way; leave nothing behind."""
        self.folder.mkdir(parents=True)
        self._pending = list(self.kills)
        began_s = time.monotonic()
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="rlhf-", dir="/tmp")
            self._environment = self._make_environment(stack.enter_context(temporary))
            stack.callback(self.marked.kill_all)
            self._log = stack.enter_context((self.folder / "output.txt").open("ab"))
            try:
                self._watch()
                faults = list(faults_of_records(self.folder / "run", self.iterations))
                faults += faults_of_leftovers(self.marked)
                for each in self._struck:
                    each.survived = not faults
            except Failed as failure:
                faults = [str(failure)]
                for each in self._struck[:-1]:
                    each.survived = True
        seconds = time.monotonic() - began_s
        return Outcome(faults, self._struck, seconds, read_summary(self.folder / "run"))

    def _make_environment(self, temporary: str) -> dict[str, str]:
        paths = [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            # vLLM compiles a kernel as it starts; by default for each temporary folder again.
            "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_tests",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TMPDIR": temporary,
            "RAY_TMPDIR": temporary,
            "RAY_AUTH_MODE": "token",
            MARK: self.marked.mark,
        }

    # The watch

    def _watch(self) -> None:
        with ExitStack() as stack:
            self._nodes = None
            if self.mode == "ray":
                self._nodes = Nodes(NUM_ROLES - 3, NUM_ROLES - 3, self._environment, self._log)
                stack.callback(self._nodes.close)
            self._start_driver()
            while (code := self._driver.poll()) is None:
                time.sleep(POLL_S)
                self._look()
                if self._pending:
                    self._kill_if_due(self._pending[0])
            if code:
                raise Failed(f"the driver ended with {code}: {self._last_lines()}")

    def _start_driver(self) -> None:
        arguments = [f"run.dir={self.folder / 'run'}", f"run.seed={self.seed}"]
        arguments += [f"ppo.iterations={self.iterations}", f"cluster.mode={self.mode}"]
        address = {"RAY_ADDRESS": self._nodes.address} if self._nodes else {}
        command = [sys.executable, "-m", "kills.driver", str(self.folder), "run", str(self.config)]
        self._driver_began_at = self._moved_at = time.time()
        self._driver = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=self._environment | address,
            cwd=self.folder,
        )

    def _look(self) -> None:
        """Read edges and processes; note who has become ready."""
        now = time.time()
        path = self.folder / driver.EDGES
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines[len(self._edges) :]:
            self._reached(json.loads(line))
        ready = [seen for seen in self.marked.refresh().values() if seen.ready]
        if now - self._maps_read_at > MAPS_EVERY_S:
            self.marked.read_shared_memory()
            self._maps_read_at = now
        if not self._struck:
            for seen in ready:
                self._cold_s.setdefault(seen.name, now - seen.process.create_time())
        # The newest of a name: on a node that died an older one may live for some seconds more.
        began_at = {seen.name: _began_at(seen) for seen in sorted(ready, key=_began_at)}
        if self._driver.pid in self._drivers:
            began_at[DRIVER] = self._driver_began_at
        for each in self._recovering():
            if all(began_at.get(name, 0.0) > each.at for name in each.ended):
                each.recovered_s = now - each.at
        if now - self._moved_at > STILL_S:
            titles = sorted(self.marked.titles().values())
            raise Failed(f"still for {STILL_S:.0f} s: {titles}: {self._last_lines()}")

    def _reached(self, edge: dict[str, Any]) -> None:
        self._edges.append(edge)
        self._moved_at = time.time()
        if edge["pid"] != self._driver.pid:
            return
        self._drivers.add(edge["pid"])
        self._cold_s.setdefault(DRIVER, edge["at"] - self._driver_began_at)
        if edge["edge"] == "before":
            self._open.append(edge["phase"])
        elif edge["phase"] in self._open:
            self._open.remove(edge["phase"])

    def _recovering(self) -> list[Struck]:
        """Return the kills from which the run recovers, up to the last one that hid others."""
        hiding = [n for n, each in enumerate(self._struck) if each.kill.role in (DRIVER, NODE)]
        last = hiding[-1] if hiding else 0
        return [each for each in self._struck[last:] if each.recovered_s is None]

    def _last_lines(self) -> str:
        written = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        return " | ".join(written.splitlines()[-12:])

    # The kills

    def _kill_if_due(self, chosen: Kill) -> None:
        if chosen.boundary is not None:
            self._kill_at_boundary(chosen, " ".join(chosen.boundary))
            return
        begun = [e for e in self._edges if (e["edge"], e["phase"]) == ("before", "gen")]
        mine = [edge["at"] for edge in begun if edge["pid"] == self._driver.pid]
        if not mine or begun[-1]["of"] < chosen.iteration:
            return
        lengths = [later - earlier for earlier, later in pairwise(mine)]
        due = next(edge["at"] for edge in begun if edge["of"] >= chosen.iteration)
        if time.time() >= due + chosen.moment * (median(lengths) if lengths else FIRST_GUESS_S):
            ahead = [phase for phase in self._open if phase != "save"] or self._open
            self._strike(chosen, ahead[-1] if ahead else "between")

    def _kill_at_boundary(self, chosen: Kill, boundary: str) -> None:
        """Have the driver wait at an edge of an iteration to come; strike when it is there.

        A role may have no process at that moment; then it is the same edge of a later iteration.
        """
        hold, held = self.folder / driver.HOLD, self.folder / driver.HELD
        if held.exists():
            self._strike(chosen, boundary)
            held.unlink(missing_ok=True)
            hold.unlink(missing_ok=True)
        elif not hold.exists():
            reached = self._edges[-1]["of"] if self._edges else 0
            hold.write_text(f"{boundary} {max(chosen.iteration, reached + 2)}", encoding="utf-8")

    def _strike(self, chosen: Kill, phase: str) -> None:
        """Kill a process of a role, if there is one that does its work."""
        victims = self._victims(chosen.role)
        if not victims:
            return
        victim = victims[int(chosen.which * len(victims))]
        ended = self._ended_with(victim, chosen.role)
        cold = [self._cold_s[name] for name in ended if name in self._cold_s]
        self.marked.read_shared_memory()
        struck = Struck(chosen, phase, time.time(), ended, max(cold, default=None))
        kill(victim)
        self._struck.append(struck)
        self._pending.remove(chosen)
        self._moved_at = struck.at
        if chosen.role == DRIVER:
            self._driver.wait()
            self._open.clear()
            (self.folder / driver.HELD).unlink(missing_ok=True)
            (self.folder / driver.HOLD).unlink(missing_ok=True)
            self._start_driver()
        elif chosen.role == NODE and self._nodes:
            self._nodes.raylets.remove(victim.process.pid)
            self._nodes.add()
        self.on_kill(struck)

    def _victims(self, role: str) -> list[Seen]:
        seen = self.marked.seen
        if role == DRIVER:
            return [seen[self._driver.pid]]
        if role == NODE:
            return [seen[pid] for pid in self._nodes.raylets] if self._nodes else []
        found = [each for each in seen.values() if each.ready and each.role == role]
        if role != ENGINE:  # of two with one name the older one, of a dead node, is about to end
            found = list({e.name: e for e in sorted(found, key=_began_at)}.values())
        return sorted(found, key=lambda each: (each.name, each.process.pid))

    def _ended_with(self, victim: Seen, role: str) -> dict[str, int]:
        """Return the actors that end with a process: name -> process id."""
        if role == DRIVER:
            return {DRIVER: victim.process.pid}
        if role == ENGINE:
            family = {parent.pid for parent in victim.process.parents()}
        elif role == NODE:
            family = {child.pid for child in victim.process.children(recursive=True)}
        else:
            family = {victim.process.pid}
        ended = [each for pid, each in self.marked.seen.items() if pid in family and each.role]
        groups = {each.role for each in ended} & set(GROUPS)
        ended += [each for each in self.marked.seen.values() if each.role in groups]
        return {each.name: each.process.pid for each in ended if each.role != ENGINE}


def _began_at(seen: Seen) -> float:
    return seen.process.create_time()
