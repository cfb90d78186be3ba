"""A job server's client in memory: it takes what Ray's takes, and checks it."""

import asyncio
import json
import zipfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf_ray.jobs.job_server import CONTROL

Attachment = Sequence[str | Exception | None]
"""What one connection to a job's log brings: texts, then perhaps how it breaks; None: it hangs."""


def details(submission_id: str | None, **changes: Any) -> Any:
    """A job as Ray describes it; running, submitted by us as run ``mine``."""
    values = {
        "submission_id": submission_id,
        "entrypoint": "exec rlhf-ray run submitted.yaml",
        "status": "RUNNING",
        "start_time": 1_000_000,
        "end_time": None,
        "metadata": {"rlhf_ray.run": "mine", "rlhf_ray.folder": "/mnt/mine"},
        "driver_exit_code": None,
        "driver_node_id": "node-7",
        "driver_agent_http_address": "http://10.0.0.7:52365",
        "message": None,
    }
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**values | changes)


@dataclass
class FakeJobClient:
    """Jobs end as ``outcomes`` says, one a submitted run; a driver answers with ``answer``."""

    jobs: dict[str, Any] = field(default_factory=dict)
    outcomes: list[tuple[str, int | None]] = field(default_factory=list)
    attachments: dict[str, list[Attachment]] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    packed: list[dict[str, str]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    answers: bool = True
    """Whether jobs that ask a driver end; else they wait for its node forever."""
    num_looks: int = 0
    deleted: list[str] = field(default_factory=list)

    @property
    def asked(self) -> list[str]:
        """Arguments of what was asked of drivers."""
        prefix = f"exec {CONTROL} "
        return [
            job["entrypoint"].removeprefix(prefix)
            for job in self.submitted
            if job["entrypoint"].startswith(prefix)
        ]

    def submit_job(self, **job: Any) -> str:
        """Start a job; one that asks a driver is done at once."""
        self.submitted.append(job)
        if CONTROL in job["entrypoint"]:
            name = f"asking-{len(self.submitted)}"
            status = "SUCCEEDED" if self.answers else "PENDING"
            self.jobs[name] = details(name, entrypoint=job["entrypoint"], status=status)
            return name
        name = job["submission_id"]
        assert name not in self.jobs, "ids are given once"
        with zipfile.ZipFile(job["runtime_env"]["working_dir"]) as archive:
            self.packed.append({n: archive.read(n).decode() for n in archive.namelist()})
        given = {"entrypoint": job["entrypoint"], "metadata": job["metadata"]}
        self.jobs[name] = details(name, **given)
        return name

    def list_jobs(self) -> list[Any]:
        """Return all jobs."""
        return list(self.jobs.values())

    def get_job_info(self, job_id: str) -> Any:
        """Return one job."""
        if job_id not in self.jobs:
            raise RuntimeError(f"Job {job_id} does not exist")
        return self.jobs[job_id]

    def get_job_logs(self, job_id: str) -> str:
        """Return a job's output."""
        if CONTROL in self.jobs[job_id].entrypoint:
            self.num_looks += 1
            late = self.num_looks > 1  # a log may come later than its job's end
            answer = f"{json.dumps(self.answer)}\nA library takes its leave\n" if late else ""
            return f"Running entrypoint for job {job_id}\n{answer}"
        return f"log of {job_id}\n"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Open one connection; the job ends with the last one that is planned."""
        planned = self.attachments.get(job_id, [])
        for text in planned.pop(0) if planned else []:
            if isinstance(text, Exception):
                raise text
            if text is None:
                await asyncio.Event().wait()
            else:
                yield text
        if not planned:
            status, code = self.outcomes.pop(0) if self.outcomes else ("SUCCEEDED", 0)
            self.jobs[job_id].status, self.jobs[job_id].driver_exit_code = status, code

    def stop_job(self, job_id: str) -> bool:
        """End one."""
        self.stopped.append(job_id)
        return True

    def delete_job(self, job_id: str) -> bool:
        """Forget one."""
        self.deleted.append(job_id)
        del self.jobs[job_id]
        return True


def work_folder(folder: Path) -> Path:
    """A working folder with one file."""
    folder.mkdir()
    (folder / "rewards.py").write_text("def mine(): ...\n")
    return folder
