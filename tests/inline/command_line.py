"""The command line in this process, and what its tests share."""

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.cli import main

CONFIG = """
cluster: {mode: inline}
model: {max_length: 64, tiny: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_layers: 1, num_heads: 2}}
prepare: {num_questions: 120}
pretrain: {steps: 60, batch_size: 8, block_size: 32, learning_rate: 0.01}
sft: {steps: 2, batch_size: 4, block_size: 32}
reward: {steps: 2, batch_size: 4, eval_rows: 8}
data: {overlong: truncate}
ppo: {iterations: 1, batch_size: 8, mini_batch_size: 4, epochs: 1, eval_prompts: 8}
rollout: {engine: transformers, max_prompt_tokens: 24, max_tokens: 8}
evaluate: {num_prompts: 8}
"""  # noqa: E501

QUESTION = '<row Id="{}" PostTypeId="1" Title="How?" Body="&lt;p&gt;Why&lt;/p&gt;" Score="1" />'
ANSWER = '<row Id="{}" PostTypeId="2" ParentId="{}" Body="&lt;p&gt;So&lt;/p&gt;" Score="{}" />'

PLANTED = "planted-s3cret"
"""The value of every secret in the environment of the run that went through every stage."""

Refused = Callable[..., str]
Ends = Callable[..., str]


def command(*arguments: object) -> int:
    """Exit code of ``rlhf-ray ARGUMENTS``; an error that is not ours comes out as it is."""
    sys.argv = ["rlhf-ray", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder but the one that tells how its last process ended."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "status.json"
    }


def dump_of(folder: Path, *rows: str) -> Path:
    path = folder / "Posts.xml"
    path.write_text(f"<posts>\n{chr(10).join(rows)}\n</posts>\n", encoding="utf-8")
    return path


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a run that a test may change."""
    return Path(shutil.copytree(run, folder / "run", symlinks=True))
