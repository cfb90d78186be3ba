"""What the roles' processes import: on few cores, most of the time that a run takes to start."""

import os
import subprocess
import sys

LOADED_BY_DEEPSPEED = "deepspeed.runtime.zero.muon.original_muon"
ROLES = (
    "actors.critic_learner",
    "actors.generator",
    "actors.likelihood",
    "actors.policy_learner",
    "actors.reference",
    "actors.reward_scorer",
    "rlhf_ray.engines.deepspeed.engine",
    "rlhf_ray.engines.scoring",
)
UNNEEDED = (
    "deepspeed",
    "matplotlib",
    "ray",
    "torch._inductor.compile_fx",
    "torch.utils.cpp_extension",
    "trl",
    "vllm",
)


def test_a_role_imports_no_engine_and_no_compiler_before_it_starts() -> None:
    code = (
        f"import sys, {', '.join(ROLES)}\n"
        "assert 'bitsandbytes' in sys.modules  # which peft imports\n"
        f"print([name for name in {UNNEEDED} if name in sys.modules])\n"
        f"import {LOADED_BY_DEEPSPEED}\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    variables = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == "[]"
