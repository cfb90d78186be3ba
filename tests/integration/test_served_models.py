"""vLLM serves what a run leaves and what is exported, and says what transformers says."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from model_families import build
from tiny_models import with_random_adapter

from rlhf_ray.config import Config, dump, resolve
from rlhf_ray.models import loading
from rlhf_ray.serving import export, serve

if TYPE_CHECKING:
    from conftest import CommandLine

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_here"),
]

PROMPT = list(range(20, 40))
START_S = 200.0


def make_run(folder: Path) -> Config:
    """A run of a given base with longer rotary positions, and a policy of noise."""
    base = build("qwen3", folder / "base")
    config = resolve(
        {
            "run": {"dir": str(folder / "run")},
            "model": {
                "path": base,
                "max_length": 96,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "rollout": {"max_prompt_tokens": 64, "max_tokens": 16},
        }
    )
    model = with_random_adapter(base, config.model, r=4, deviation=0.05)
    checkpoints = folder / "run" / "checkpoints"
    loading.save_adapter(model, loading.load_tokenizer(base), checkpoints / "1" / "policy", base)
    (checkpoints / "latest").symlink_to("1", target_is_directory=True)
    (folder / "run" / "config.yaml").write_text(dump(config), encoding="utf-8")
    return config


def expected_logprobs(path: str, config: Config, token_ids: list[int]) -> list[float]:
    """Return transformers' log-probs of the tokens after the prompt."""
    model = loading.load_causal_lm(path, config.model)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + token_ids])).logits[0]
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[len(PROMPT) - 1 + i, t]) for i, t in enumerate(token_ids)]


@contextmanager
def serving(command_line: "CommandLine", run: Path) -> Iterator[str]:
    """Run `rlhf-ray serve`; yields the server's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = command_line.start("serve", str(run), f"--vllm=--port={port}")
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(process, address, command_line)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def wait_until_up(
    process: "subprocess.Popen[bytes]", address: str, command_line: "CommandLine"
) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, command_line.output()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"not up after {START_S} s:\n{command_line.output()}")


def complete(address: str, model: str) -> tuple[list[int], list[float]]:
    """Token ids and log-probs of the likeliest continuation of PROMPT."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        logprobs = json.load(answer)["choices"][0]["logprobs"]
    ids = [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
    return ids, logprobs["token_logprobs"]


def complete_here(model: str) -> tuple[list[int], list[float]]:
    """As `complete`, by vLLM alone over a model's folder."""
    from vllm import LLM, SamplingParams
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    engine = LLM(
        model,
        dtype="float32",  # as `serve.command` says; by itself vLLM halves the precision
        max_model_len=96,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        distributed_executor_backend=UniProcExecutor,
    )
    likeliest = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    try:
        (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], likeliest)
    finally:
        engine.llm_engine.engine_core.shutdown()
    (output,) = answer.outputs
    ids = [*output.token_ids]
    assert output.logprobs is not None
    return ids, [each[token].logprob for each, token in zip(output.logprobs, ids, strict=True)]


def test_vllm_serves_adapters_and_merged_models(
    command_line: "CommandLine", tmp_path: Path
) -> None:
    config = make_run(tmp_path)
    run = tmp_path / "run"
    policy = str(run / "checkpoints" / "latest" / "policy")
    with serving(command_line, run) as address:
        from_base, base_logprobs = complete(address, "sft")
        from_adapter, adapter_logprobs = complete(address, "ppo")
    assert base_logprobs == pytest.approx(
        expected_logprobs(str(config.model.path), config, from_base), abs=1e-3
    )
    assert adapter_logprobs == pytest.approx(
        expected_logprobs(policy, config, from_adapter), abs=1e-3
    )
    assert from_adapter != from_base

    merged = export.run(config, kind="merged")["folder"]
    alone = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(tmp_path / "merged")}),
            "model": config.model.model_copy(update={"path": merged, "rope_scaling": None}),
        }
    )
    arguments = serve.command(alone)
    assert {merged, "sft"} <= set(arguments)
    assert arguments[arguments.index("--dtype") + 1] == "float32"
    assert not {"--enable-lora", "--hf-overrides"} & set(arguments), "it is a model like any other"
    from_merged, merged_logprobs = complete_here(merged)
    assert from_merged == from_adapter
    assert merged_logprobs == pytest.approx(adapter_logprobs, abs=1e-3)
    command_line.wait_until_nothing_left()
