"""No wait is without a deadline: every wait in the source is found, and has one or a reason."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]

TIMEOUT_POSITION = {
    "asyncio.wait": 99,
    "asyncio.as_completed": 99,
    "asyncio.wait_for": 1,
    "as_completed": 1,
    "wait": 1,
    "ray.get": 99,
    "ray.wait": 99,
    "select.select": 3,
    "socket.create_connection": 1,
    "subprocess.call": 99,
    "subprocess.check_call": 99,
    "subprocess.check_output": 99,
    "subprocess.run": 99,
    "torch.distributed.init_process_group": 99,
    "urlopen": 2,
}
"""Calls that wait unless they are given a timeout -> which positional argument it may be."""
FOREVER = {"getpass.getpass", "input", "os.wait", "os.waitid", "signal.pause", "signal.sigwait"}
"""Calls that take no timeout."""
NOT_BLOCKING = {
    "fcntl.flock": "LOCK_NB",
    "fcntl.lockf": "LOCK_NB",
    "os.waitpid": "WNOHANG",
}
"""Calls that wait unless they are given this flag."""
WAITS = {
    "accept",
    "acquire",
    "communicate",
    "fit",
    "get",
    "getoutput",
    "join",
    "readline",
    "recv",
    "recv_bytes",
    "result",
    "sigwait",
    "wait",
    "wait_closed",
}
"""Methods that wait forever if they are called without arguments, or with nothing but None."""
COLLECTIVES = {
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
}
"""Functions of ``torch.distributed`` that wait for other processes."""
LOCKS = {"BoundedSemaphore", "Condition", "Lock", "RLock", "Semaphore"}
"""Classes whose ``with`` waits to enter."""
ENDED = {"Popen", "Pool", "ProcessPoolExecutor", "ThreadPoolExecutor"}
"""Classes whose ``with`` waits to leave, and whose ``shutdown`` waits."""

ALLOWED = {
    # Calls to actors: what they return is awaited by `RayWorker._until_done`, which watches.
    "cluster/ray_workers.py RayWorker.address: .remote": "awaited by RayWorker._await",
    "cluster/ray_workers.py RayWorker.peak_memory: .remote": "awaited by RayWorker._await",
    "cluster/ray_workers.py RayWorker.call: .remote": "awaited by RayWorker._await",
    "cluster/ray_workers.py RayWorker.call_split: .remote": "awaited by RayWorker._await",
    "cluster/ray_workers.py RayWorker._await: call.result": "it is done",
    "cluster/ray_workers.py RayWorker._held: await scalars": "awaited by RayWorker._await",
    "cluster/ray_workers.py RayWorker._held: await data": "awaited by RayWorker._await",
    "cluster/ray_workers.py _resolve: await answer": "in a task that RayWorker._until_done watches",
    "cluster/workers.py fetch: await handle": "within FETCH_TIMEOUT_S",
    "cluster/spawner.py RoleSpawner.leave: .remote": "its stage awaits it, by RayWorker._await",
    "cluster/spawner.py _idle: .remote": "ray.get with END_TIMEOUT_S",
    "cluster/nodes.py on_nodes: .remote": "ray.get with what is left of the deadline",
    "cluster/nodes.py map_in_order: .remote": "ray.get with a timeout",
    "doctor/bandwidth.py _link: .remote": "ray.get with TIMEOUT_S",
    # Awaited in a task that somebody watches, or that is done.
    "cluster/colocation.py Colocation._leave_if_entered: entering.result": "it is done",
    "cluster/life_signs.py Watch._keep: reading.result": "it is done",
    "driver/commits.py Commits.written: writing.result": "it is done",
    "generators/dispatch.py Dispatch._take_in: call.result": "it is done",
    "generators/pool.py GeneratorPool.publish: await publication": "calls of generators",
    "generators/publications.py Publications._catch_up: asyncio.wait": "calls of a generator",
    "generators/publications.py Publications._catch_up: while": "calls of a generator",
    "generators/publications.py Publications._join_late: await step": "calls of a generator",
    "interruption.py run.cancellable: await main": "the run itself",
    "interruption.py Droppable.wait: await task": "the run's own calls, which have deadlines",
    "observability/phases.py while_it_moves: task.result": "it is done",
    "observability/phases.py while_it_moves: await work": "without a deadline in tests alone",
    "rewards/source.py together: task.result": "it is done",
    "rewards/user_function.py UserFunction.awaited: await result": "within the source's timeout_s",
    # Threads and processes of this machine that end by themselves, or that were killed.
    "cluster/orphans.py ProcessRecord.settle: self._thread.join": "it looks at its event every 2 s",
    "engines/vllm/own_process.py while_alive: task.result": "it is done",
    "jobs/retries.py _drive: children[0].wait": "the driver, whose own waits have deadlines",
    "jobs/retries.py _drive.end_at_once: child.wait": "it cleans up at once at a second signal",
    "rewards/function_process.py _Process.kill: self.popen.wait": "it was killed",
    "rewards/function_process.py _Process.ending: self.popen.wait": "it has closed its pipe",
    "rewards/function_process.py _Process.__init__: self.connection.recv": "within a scorer's call",
    "rewards/function_process.py FunctionProcess.__init__: .result": "within a scorer's start",
    "rewards/function_process.py _listen: connection.recv": "a thread that ends with its process",
    "data/datasets/drawn_prompts.py DrawnPrompts._read_block: ahead.result": (
        "a thousand rows, rendered in a second"
    ),
    "disk.py large_files_folder: _large_files.get": "it is no queue",
    "rewards/function_worker.py _Calls.answer_all: self._connection.recv": "serves its parent",
    "rewards/function_worker.py main: connection.recv": "serves its parent",
    "rewards/remote.py Endpoint.post_all: httpx.AsyncClient": "each attempt within timeout_s",
    "doctor/bandwidth.py Peer._serve: self._server.accept": "a thread that serves its peers",
    "serving/text_generation.py TextGenerator.stream: thread.join": "it has sent its last text",
    "serving/versions.py Versions.answer: with self._one_at_a_time": "an answer has max_tokens",
    "stages/rehearse.py _killing_a_generator: killer.join": "it looks at its event every 50 ms",
    "stages/supervised/processes.py TrainingProcesses.train: self._fitting.result": "it is done",
    "stages/supervised/processes.py trainings: while": "ended by its driver, or with it",
    "cli/models.py _typed_lines: input": "a person types",
    "cluster/colocation.py Colocation._enter: with self._lock": (
        "held while calls with deadlines swap groups"
    ),
    "cluster/colocation.py Colocation.awake: while": "calls of the other group have deadlines",
    "cluster/learner_groups.py LearnerGroupClient._restore: with self._restoring": (
        "starts and calls with deadlines"
    ),
    "cluster/life_signs.py LifeSigns._repeat: while": "a thread that ends with its process",
    "cluster/role_clients.py Crew._next: asyncio.wait": "starts with deadlines, within a budget",
    "cluster/role_clients.py Crew._replace: await restart": "within a budget, as above",
    "cluster/role_clients.py Restarts.again: while": "starts with deadlines, within a budget",
    "data/rendering/bounded.py problem_of: os.waitpid": "it was killed",
    **{
        f"people/ranking.py Ranking.{method}: with self._lock": "held while a line is appended"
        for method in ("_append", "disputed", "next", "progress", "undo")
    },
    "people/preferences.py holds_preferences: file.readline": "a line of a file",
    "disk.py AppendedFile.flush: with self._lock": "held while another thread writes to the file",
    "disk.py AppendedFile.write: with self._lock": "held while another thread writes to the file",
    "driver/batches.py _all: asyncio.wait": "calls of learners",
    "driver/commits.py Commits.written: asyncio.wait": (
        "a thread that writes to a disk; the watchdog reports one that hangs"
    ),
    "driver/kept_batches.py BatchKeeper.written: asyncio.wait": "as for commits",
    "engines/deepspeed/engine.py DeepSpeedEngine.sum_over_ranks: torch.distributed.all_reduce": (
        "within the timeout of its group, and a call"
    ),
    "engines/deepspeed/engine.py wait_for_ranks: torch.distributed.barrier": (
        "within the timeout of its group, and a call"
    ),
    "generators/dispatch.py Dispatch.run: batch.done.get": (
        "calls of generators, or what ends the pool"
    ),
    "generators/first_starts.py FirstStarts.wait: while": "starts with deadlines",
    "stages/ppo/drains.py Drains.follow: while": "it is cancelled with its roles",
    "observability/trackers.py current: _current.get": "it is no queue",
    "rewards/function_worker.py _Calls._send: with self._sending": (
        "its parent has a thread that reads"
    ),
    "rewards/functions.py FunctionSource._finished: calling.result": "it is done",
    "rewards/remote.py Endpoint._post: with self._free": (
        "requests with deadlines and a number of retries"
    ),
    "runs/control.py ControlFiles.update: with _updating": (
        "held while another thread writes the file"
    ),
    "web/view.py Viewer._page: with self._reading": "held while another thread reads a local file",
    "stacks.py stacks_of: with ThreadPoolExecutor": "processes with a timeout",
    "stages/rank.py _enough: while": "for people, who may take days; a signal or a request ends it",
    "stages/ppo/control.py controlled.exchange: while": "it is cancelled with the block",
    "stages/supervised/trainer.py _on_any_rank: torch.distributed.all_reduce": (
        "within ends_when_stalled"
    ),
}
"""Where the source waits -> what ends it."""


def waits(
    tree: ast.AST, where: tuple[str, ...] = (), made: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield each wait without a deadline of its own, by function."""
    made = dict(_made_by(tree)) if made is None else made
    if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        where = (*where, tree.name)
    found = ""
    if isinstance(tree, ast.Call):
        found = _waiting_call(tree, made)
    elif isinstance(tree, ast.withitem):
        entered = ast.unparse(tree.context_expr)
        if _class_of(tree.context_expr, made) in LOCKS | ENDED:
            found = f"with {entered.partition('(')[0]}"
    elif isinstance(tree, ast.While):
        text = ast.unparse(tree)
        if re.search(r"\bsleep\(", text) and not re.search(r"deadline|monotonic", text):
            found = "while"
    elif isinstance(tree, ast.Await):
        value = tree.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "cast":
            value = value.args[1]  # as good as the value itself
        if not isinstance(value, ast.Call):
            found = f"await {ast.unparse(value)}"
    if found:
        yield f"{'.'.join(where)}: {found}"
    for child in ast.iter_child_nodes(tree):
        yield from waits(child, where, made)


def _waiting_call(call: ast.Call, made: Mapping[str, str]) -> str:
    """Return what a call that may wait forever is listed as; empty for any other."""
    called, positional = ast.unparse(call.func), [ast.unparse(each) for each in call.args]
    given = {each.arg: ast.unparse(each.value) for each in call.keywords}
    method = called.rpartition(".")[2]
    short = f".{method}" if "(" in called else called
    is_timed = given.get("timeout", "None") != "None"
    if called in TIMEOUT_POSITION:
        at = TIMEOUT_POSITION[called]
        return (
            "" if is_timed or [*positional, "None"][at : at + 1] not in ([], ["None"]) else called
        )
    if given.get("timeout") == "None" or called in FOREVER:
        return short
    if called in NOT_BLOCKING:
        return "" if NOT_BLOCKING[called] in " ".join(positional) else called
    if method in COLLECTIVES and called.startswith(("torch.distributed.", "dist.")):
        return called
    if method == "remote" and not called.startswith("ray.remote"):
        return ".remote"
    if method == "shutdown" and isinstance(call.func, ast.Attribute):
        is_waited_for = given.get("wait", "True") != "False"
        return short if is_waited_for and _class_of(call.func.value, made) in ENDED else ""
    is_empty = set(positional) <= {"None", "True"} and given.get("blocking") != "False"
    return short if method in WAITS and "." in called and is_empty and not is_timed else ""


def _made_by(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield what is assigned in a module, and the class that makes it: ``self._lock``, ``Lock``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield ast.unparse(target), _class_of(node.value, {})
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            yield ast.unparse(node.optional_vars), _class_of(node.context_expr, {})


def _class_of(value: ast.AST, made: Mapping[str, str]) -> str:
    """Return the class whose call, or whose variable, an expression is; empty: unknown."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2]
    return made.get(ast.unparse(value), "")


def waits_of_the_source() -> set[str]:
    found = set()
    for folder in ("rlhf_ray", "actors"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix().removeprefix("rlhf_ray/")
            found |= {f"{name} {wait}" for wait in waits(ast.parse(path.read_text()))}
    return found


def test_every_wait_in_the_source_has_a_deadline_or_a_reason() -> None:
    assert waits_of_the_source() - set(ALLOWED) == set()


def test_every_listed_wait_still_exists() -> None:
    assert set(ALLOWED) - waits_of_the_source() == set()


def test_waits_without_a_deadline_are_found() -> None:
    source = """
LOCK = threading.Lock()
async def f(actor, reference, process, tasks, queue, event):
    ray.get(actor.work.remote())
    ray.get(reference, timeout=None)
    ray.get(reference, timeout=5)
    ray.wait([reference])
    await reference
    await cast("Awaitable[int]", reference)
    await g(reference)
    await asyncio.wait(tasks)
    await asyncio.wait(tasks, timeout=5)
    await asyncio.wait_for(work(), None)
    await asyncio.wait_for(work(), 5)
    wait(tasks)
    wait(tasks, 5)
    process.wait()
    process.wait(None)
    process.wait(timeout=None)
    process.wait(5)
    event.wait(timeout=5)
    await event.wait()
    queue.get()
    queue.get(timeout=5)
    LOCK.acquire()
    LOCK.acquire(True)
    LOCK.acquire(blocking=False)
    with LOCK:
        os.waitpid(1, 0)
        os.waitpid(1, os.WNOHANG)
    with open(path), ThreadPoolExecutor() as pool:
        pool.shutdown()
        pool.shutdown(wait=False)
    subprocess.run(["git"], check=True)
    select.select([], [], [])
    select.select([], [], [], 5)
    socket.create_connection(address)
    fcntl.flock(file, fcntl.LOCK_EX)
    httpx.get(url, timeout=None)
    torch.distributed.broadcast(tensor, 0)
    while not is_ready():
        time.sleep(1)
    while time.monotonic() < end:
        time.sleep(1)
"""
    assert sorted(wait.removeprefix("f: ") for wait in waits(ast.parse(source))) == sorted(
        [
            *["ray.get", ".remote", "ray.get", "ray.wait", "await reference", "await reference"],
            *["asyncio.wait", "asyncio.wait_for", "wait", *["process.wait"] * 3, "event.wait"],
            *["queue.get", "LOCK.acquire", "LOCK.acquire", "with LOCK", "os.waitpid"],
            *["with ThreadPoolExecutor", "pool.shutdown", "subprocess.run", "select.select"],
            *["socket.create_connection", "fcntl.flock", "httpx.get"],
            *["torch.distributed.broadcast", "while"],
        ]
    )


def test_durations_and_deadlines_are_measured_by_clocks_that_never_jump() -> None:
    """`time.time` is the clock of what is shown or compared with other machines alone."""
    allowed = {
        "driver/ppo_loop.py": "the time of a commit, for the process that resumes the run",
        "driver/recorder.py": "the time of a commit, which a dashboard shows",
        "engines/deepspeed/build_locks.py": "the age of a file, by its own time",
        "jobs/run_tables.py": "the age of what another machine wrote",
        "observability/outages.py": "when it happened, in a record",
        "observability/tracing.py": "when this process began",
        "observability/tracker_libraries.py": "a time stamp",
        "rewards/remote.py": "a date that a service names",
        "runs/control.py": "a time stamp",
        "stages/ppo/drains.py": "when a node ends, as Ray says it",
    }
    found = set()
    for folder in ("rlhf_ray", "actors"):
        for path in (ROOT / folder).rglob("*.py"):
            if "time.time()" in path.read_text():
                found.add(path.relative_to(ROOT).as_posix().removeprefix("rlhf_ray/"))
    assert found == set(allowed)
