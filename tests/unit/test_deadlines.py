"""No wait is without a deadline: every wait in the source is found, and has one or a reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

TIMEOUT_ARGUMENT = {
    "ray.get": "timeout",
    "ray.wait": "timeout",
    "subprocess.run": "timeout",
    "subprocess.check_call": "timeout",
    "subprocess.check_output": "timeout",
    "urlopen": "timeout",
    "httpx.AsyncClient": "timeout",
    "httpx.Client": "timeout",
}
"""Calls that wait unless they are given this argument."""
WAITS = {"wait", "join", "communicate", "acquire", "recv", "accept", "fit", "result"}
"""Methods that wait forever if they are called without arguments."""

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
    "cluster/nodes.py on_nodes: .remote": "ray.get with what is left of the deadline",
    "doctor/bandwidth.py _link: .remote": "ray.get with TIMEOUT_S",
    # Awaited in a task that somebody watches, or that is done.
    "cluster/colocation.py Colocation._leave_if_entered: entering.result": "it is done",
    "cluster/life_signs.py Watch._keep: reading.result": "it is done",
    "driver/commits.py Commits.written: writing.result": "it is done",
    "generators/dispatch.py Dispatch._take_in: call.result": "it is done",
    "generators/pool.py GeneratorPool._join_late: await step": "calls of a generator",
    "interruption.py run.cancellable: await main": "the run itself",
    "interruption.py Droppable.wait: await task": "the run's own calls, which have deadlines",
    "observability/phases.py while_it_moves: task.result": "it is done",
    "observability/phases.py while_it_moves: await work": "without a deadline in tests alone",
    "rewards/source.py together: task.result": "it is done",
    "rewards/user_function.py UserFunction.awaited: await result": "within the source's timeout_s",
    # Threads and processes of this machine that end by themselves, or that were killed.
    "cluster/orphans.py ProcessRecord.close: self._thread.join": "it looks at its event every 2 s",
    "engines/vllm/own_process.py while_alive: task.result": "it is done",
    "jobs/retries.py _drive: children[0].wait": "the driver, whose own waits have deadlines",
    "jobs/retries.py _drive.end_at_once: child.wait": "it cleans up at once at a second signal",
    "rewards/function_process.py _Process.kill: self.popen.wait": "it was killed",
    "rewards/function_process.py _Process.ending: self.popen.wait": "it has closed its pipe",
    "rewards/function_process.py _Process.__init__: self.connection.recv": "within a scorer's call",
    "rewards/function_process.py FunctionProcess.__init__: .result": "within a scorer's start",
    "rewards/function_process.py _listen: connection.recv": "a thread that ends with its process",
    "rewards/function_worker.py _Calls.answer_all: self._connection.recv": "serves its parent",
    "rewards/function_worker.py main: connection.recv": "serves its parent",
    "rewards/remote.py Endpoint.post_all: httpx.AsyncClient": "each attempt within timeout_s",
    "doctor/bandwidth.py Peer._serve: self._server.accept": "a thread that serves its peers",
    "serving/text_generation.py TextGenerator.stream: thread.join": "it has sent its last text",
    "stages/rehearse.py _killing_a_generator: killer.join": "it looks at its event every 50 ms",
    "stages/supervised/ray_train.py _fit: fitting.result": (
        "its processes end themselves where they make no progress (ends_when_stalled)"
    ),
}
"""Where the source waits -> what ends it."""


def waits(tree: ast.AST, where: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield each wait without a deadline of its own, by function."""
    if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        where = (*where, tree.name)
    found = ""
    if isinstance(tree, ast.Call):
        called, given = ast.unparse(tree.func), {keyword.arg for keyword in tree.keywords}
        method = called.rpartition(".")[2]
        timeout = TIMEOUT_ARGUMENT.get(called)
        values = {k.arg: ast.unparse(k.value) for k in tree.keywords}
        if timeout and values.get(timeout, "None") == "None":
            found = called
        elif method == "remote" and not called.startswith("ray.remote"):
            found = ".remote"
        elif method in WAITS and "." in called and not tree.args and not given:
            found = f".{method}" if "(" in called else called
    elif isinstance(tree, ast.Await):
        value = tree.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "cast":
            value = value.args[1]  # as good as the value itself
        if not isinstance(value, ast.Call):
            found = f"await {ast.unparse(value)}"
    if found:
        yield f"{'.'.join(where)}: {found}"
    for child in ast.iter_child_nodes(tree):
        yield from waits(child, where)


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
async def f(actor, reference, process):
    ray.get(actor.work.remote())
    ray.get(reference, timeout=None)
    ray.get(reference, timeout=5)
    await reference
    await cast("Awaitable[int]", reference)
    await g(reference)
    process.wait()
    process.wait(5)
    subprocess.run(["git"], check=True)
"""
    assert sorted(waits(ast.parse(source))) == sorted(
        [
            "f: ray.get",
            "f: .remote",
            "f: ray.get",
            "f: await reference",
            "f: await reference",
            "f: process.wait",
            "f: subprocess.run",
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
