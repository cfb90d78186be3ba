"""Reward functions as users write them, and the source that calls one."""

import asyncio
from typing import Any

from rlhf_ray.config.rewards import FunctionSourceConfig
from rlhf_ray.rewards.functions import FunctionSource
from rlhf_ray.types import Rollout

CODE = '''
import asyncio
import json
import os
import re
import signal
import sys
import time

def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def echo(prompts, completions, completion_ids, level):
    """Fails where its arguments are not what TRL would give."""
    assert completion_ids == [[5, 6]] * len(prompts)
    return [level[i] * 10 + len(prompts[i]) for i in range(len(prompts))]

def longer(completions, *args):
    assert args == ()
    return [float(len(text)) for text in completions]

def chat(prompts, completions, **columns):
    assert "messages" not in columns
    return [len(p[-1]["content"]) + len(c[0]["content"]) for p, c in zip(prompts, completions)]

async def slowly(completions):
    await asyncio.sleep(0.001)
    return [None if "skip" in text else 1 for text in completions]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    right = float(solution_str == ground_truth)
    return {"score": right, "acc": 1} if data_source == "gsm" else right + extra_info["bonus"]

async def acompute_score(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str == ground_truth)

def reward_func(queries, prompts, labels):
    import torch
    right = [q == p + l for q, p, l in zip(queries, prompts, labels)]
    return {"rewards": torch.tensor(right), "extra_logs": {}}

def column_of_one(queries, prompts, labels, **more):
    import numpy
    return numpy.array([[0.25]] * len(queries))

def short(completions):
    return [1.0]

def words(completions):
    return ["good"] * len(completions)

def none(completions):
    return None

def broken(completions):
    return [1 / 0]

def broken_in_a_library(completions):
    return json.loads("no JSON")

def leaves(completions):
    exit(3)

async def leaves_later(completions):
    sys.exit(0)

def interrupts(completions):
    raise KeyboardInterrupt

def crashes(completions):
    os.kill(os.getpid(), signal.SIGSEGV)

def process(completions):
    return [float(os.getpid())] * len(completions)

def remembers(completions):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(1)  # as math_verify does; only a main thread may
    signal.alarm(0)
    remembers.calls = getattr(remembers, "calls", 0) + 1
    return [remembers.calls] * len(completions)

def hangs(completions):
    while "hang" in completions:
        time.sleep(0.01)
    return [float(len(text)) for text in completions]

def hangs_at_one(data_source, solution_str, ground_truth, extra_info=None):
    while solution_str == "hang":
        pass
    return float(len(solution_str))

def takes_its_time(data_source, solution_str, ground_truth, extra_info=None):
    time.sleep(0.6)
    return 1.0

def never_lets_go(completions):
    """At one text, holds the interpreter: no other thread of the process runs."""
    if "hang" in completions:
        re.match(r"(a+)+$", "a" * 60 + "b")
    return [1.0] * len(completions)

async def meets(completions):
    """Returns once another call has come as well."""
    meets.calls = getattr(meets, "calls", 0) + 1
    while meets.calls < 2:
        await asyncio.sleep(0.01)
    return [1.0] * len(completions)

def with_a_loop_of_its_own(completions):
    return asyncio.run(slowly(completions))

def stops(completions):
    return [next(iter([]))]

def prints(completions):
    for _ in range(3):
        print("scoring", flush=True)
    return [1.0] * len(completions)

def arguments(completions):
    return [float(len(sys.argv))] * len(completions)
'''


def score(path: Any, name: str, rollouts: list[Rollout], **keys: Any) -> list[float | None]:
    config = FunctionSourceConfig(type="function", function=f"{path}:{name}", **keys)
    return asyncio.run(FunctionSource(config).score(rollouts))
