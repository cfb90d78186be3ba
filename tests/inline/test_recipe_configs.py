"""The recipe's configs run for two steps in this process, a tiny model in the place of theirs."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from prove_people import rank_all
from tiny_models import build_tiny
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config import Config, load
from rlhf_ray.data.stack_exchange.synthetic_site import write_posts
from rlhf_ray.models.loading import load_tokenizer, save_model
from rlhf_ray.observability.sinks import read_jsonl
from rlhf_ray.people.ranking import Ranking
from rlhf_ray.stages import pipeline

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TEXTS = [f"Question: how do I sort list {i}?\n\nAnswer: call sorted(x{i})." for i in range(60)]
INLINE = ("cluster.mode=inline", "rollout.engine=transformers", "sft.train_workers=1")
TRAINING = ("steps=2", "batch_size=2", "eval_rows=4", "train_workers=1")
PPO = (
    *("ppo.iterations=2", "ppo.batch_size=4", "ppo.mini_batch_size=4", "ppo.eval_prompts=8"),
    *("policy.num_ranks=1", "critic.num_ranks=1", "reference.num_workers=1", "generators.num=1"),
    *("reward.num_workers=1", "rollout.shard_size=4", "evaluate.num_prompts=4"),
)


SUMS = [
    {
        "question": f"Ann has {n} boxes of 1,000 nails. How many nails has she?",
        "answer": f"{n} x 1,000 is <<{n}*1000={n}000>>{n},000 nails.\n#### {n},000",
    }
    for n in range(2, 22)
]
"""Rows of GSM8K's columns and form."""
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eos|>{% endfor %}assistant: "


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, a reward model and a classifier of it, and rows of every kind."""
    folder = tmp_path_factory.mktemp("files")
    base = build_tiny(folder / "llama", TEXTS)
    for name, num_labels in (("reward", 1), ("classifier", 2)):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
        model.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"} if num_labels == 2 else {0: "score"}
        save_model(model, load_tokenizer(base), folder / name)
    rows = [
        {
            "text": text,
            "prompt": text.partition("Answer")[0],
            "label": "call sorted",
            "chosen": text.partition("Answer: ")[2],
            "rejected": "no idea",
        }
        for text in TEXTS
    ]
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHAT
    shutil.copytree(base, folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    for name, columns in {
        "texts": ("text",),
        "prompts": ("prompt", "label"),
        "pairs": ("prompt", "chosen", "rejected"),
    }.items():
        lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def small(stage: str) -> tuple[str, ...]:
    return tuple(f"{stage}.{setting}" for setting in TRAINING)


STACKLLAMA_PPO = (
    *PPO,
    *("sft.path={files}/llama", "reward.path={files}/reward"),
    "data.prompts.path={files}/prompts.jsonl",
)
GSM8K = (
    *PPO,
    *("model.path={files}/chat", "model.max_length=256", "rollout.max_prompt_tokens=200"),
    *("data.prompts={{path: {files}/sums.jsonl}}", "data.eval={{path: {files}/sums.jsonl}}"),
    "rollout.max_tokens=16",
)
STACKLLAMA_FULL = (
    *(*small("pretrain"), "pretrain.epochs=null", "pretrain.block_size=32"),
    *(*small("sft"), "sft.block_size=32", *small("reward"), "reward.epochs=null"),
    *(f"{stage}.trainer={{{{}}}}" for stage in ("pretrain", "sft", "reward")),
    *("data.pretrain.path={files}/texts.jsonl", "data.sft.path={files}/pairs.jsonl"),
    "data.preferences.path={files}/pairs.jsonl",
)
CASES = {
    "gsm8k_qwen25_0_5b.yaml": GSM8K,
    "stackllama/prepare.yaml": ("prepare.num_questions=60",),
    "stackllama/sft.yaml": (
        *small("sft"),
        "sft.block_size=32",
        "data.sft.path={files}/pairs.jsonl",
    ),
    "stackllama/reward.yaml": (
        *small("reward"),
        "reward.epochs=null",
        "reward.eval_every=1",
        "data.preferences.path={files}/pairs.jsonl",
    ),
    "stackllama/full_1x8_a100.yaml": STACKLLAMA_FULL,
    "stackllama/full_3x8_a100.yaml": STACKLLAMA_FULL,
    "stackllama/ppo_3x8_a100.yaml": STACKLLAMA_PPO,
    "stackllama/ppo_1x8_a100.yaml": STACKLLAMA_PPO,
    "stackllama/ppo_1_gpu.yaml": STACKLLAMA_PPO,
    "domain_pretraining.yaml": (
        *small("pretrain"),
        "pretrain.epochs=null",
        "data.pretrain={{path: {files}/texts.jsonl}}",
        "pretrain.block_size=32",
    ),
    "sentiment.yaml": (
        *small("sft"),
        *PPO,
        "sft.epochs=null",
        "sft.block_size=32",
        "data.sft.path={files}/texts.jsonl",
        "data.prompts={{path: {files}/prompts.jsonl, format: prompt_completion}}",
        "rewards=[{{type: classifier, path: {files}/classifier}}]",
    ),
    "summarisation.yaml": (
        *small("sft"),
        *PPO,
        "sft.epochs=null",
        "sft.block_size=64",
        "data.sft.path={files}/prompts.jsonl",
        "data.prompts={{path: {files}/prompts.jsonl}}",
    ),
}
"""Config -> what makes it small: fewer and smaller steps, other files; placement of one process."""


def test_every_config_of_the_recipe_is_here() -> None:
    jobs = {*CONFIGS.glob("stackllama/*.yaml"), *CONFIGS.glob("*.yaml")}
    shared = {"llama_7b.yaml", "ppo.yaml"}
    # Small as they stand; people have a test of their own.
    elsewhere = {"quickstart.yaml", "stack_exchange_cpu.yaml", "human_feedback.yaml"}
    names = {str(path.relative_to(CONFIGS)) for path in jobs if path.name not in shared | elsewhere}
    assert names == set(CASES)


def small_config(name: str, files: Path, folder: Path, *more: str) -> Config:
    """Load a config, with ``more`` of its own before what makes it small."""
    given = [override.format(files=files) for override in CASES[name]]
    model = [f"model.path={files}/llama"]
    return load(CONFIGS / name, [*more, f"run.dir={folder}/run", *INLINE, *model, *given])


PAGE = (ROOT / "docs" / "stackllama.md").read_text(encoding="utf-8")
EVERYWHERE = ("On a Slurm cluster", "On a Ray cluster", "On Kubernetes")
SMALL_STEPS = (
    *(*small("sft"), "sft.block_size=32"),
    *(*small("reward"), "reward.epochs=null", "reward.eval_every=1"),
    *PPO,
)
"""What makes each step small; its paths stay those of the page."""


def jobs_of(heading: str) -> list[tuple[str, list[str]]]:
    """The config and the overrides of each command in a section of the page on StackLLaMA."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    lines = section.replace("\\\n", " ").splitlines()
    # On Slurm some are what a variable is set to.
    lines = [re.sub(r"^\w+=\$\((.*)\)$", r"\1", line) for line in lines]
    commands = [shlex.split(line) for line in lines if "configs/stackllama/" in line]
    return [
        next((word, words[words.index(word) + 1 :]) for word in words if word.endswith(".yaml"))
        for words in commands
        if "=" in words[-1]
    ]


def overrides_of(words: list[str]) -> set[str]:
    return {word for word in words if "=" in word and not word.startswith("-")}


@pytest.mark.parametrize("heading", ["On one machine", "In four folders"])
def test_the_commands_of_the_page_on_stackllama_lead_to_a_policy(
    heading: str, files: Path, tmp_path: Path
) -> None:
    shutil.copytree(files / "llama", tmp_path / "models" / "llama-7b")
    (tmp_path / "data").mkdir()
    write_posts(tmp_path / "data" / "Posts.xml", num_questions=100, seed=0)
    names = {"/shared": str(tmp_path), "stackoverflow.com-Posts.7z": "Posts.xml"}
    done = []
    for file, words in jobs_of(heading):
        for name, here in names.items():
            words = [word.replace(name, here) for word in words]
        config = load(ROOT / file, [*words, *INLINE, *SMALL_STEPS])
        pipeline.run(config)
        done += [Path(config.run.dir) / stage for stage in config.run.stages]
    assert [folder.name for folder in done] == STEPS
    assert all((folder / "summary.json").is_file() for folder in done if folder.name != "report")


STEPS = ["prepare", "sft", "reward", "ppo", "evaluate", "report"]


@pytest.mark.parametrize("heading", EVERYWHERE)
def test_launchers_get_the_same_jobs_with_absolute_paths(heading: str) -> None:
    alone, theirs = jobs_of("On one machine"), jobs_of(heading)
    assert len(theirs) == 4
    for (file, words), (their_file, their_words) in zip(alone, theirs, strict=True):
        assert their_file == file.replace("1x8", "3x8")
        assert overrides_of(their_words) == overrides_of(words)
        config = load(ROOT / their_file, sorted(overrides_of(their_words)))
        data = config.data
        sources = [*(data.preferences or []), *(data.sft or []), *(data.prompts or [])]
        paths = [config.run.dir, config.prepare.posts, config.sft.path, config.reward.path]
        paths += [source.path for source in sources]
        assert all(path is None or path.startswith("/shared/") for path in paths)


def test_the_kubernetes_job_is_the_last_step_of_the_page() -> None:
    job = yaml.safe_load((ROOT / "scripts" / "cluster" / "rayjob.yaml").read_text())
    assert job["spec"]["entrypoint"] in PAGE


@pytest.mark.parametrize("name", CASES)
def test_a_config_runs_for_two_steps(name: str, files: Path, tmp_path: Path) -> None:
    config = small_config(name, files, tmp_path)
    pipeline.run(config)
    for stage in config.run.stages:
        if stage != "report":
            assert (tmp_path / "run" / stage / "summary.json").is_file(), stage
    if "ppo" in config.run.stages:
        summary = json.loads((tmp_path / "run" / "ppo" / "summary.json").read_text())
        assert summary["iterations"] == 2
        assert summary["samples_learnt"] == summary["samples_generated"] == 8


def test_the_run_with_people_in_it_goes_on_when_they_have_answered(tmp_path: Path) -> None:
    sizes = (*small("pretrain"), *small("sft"), *small("reward"), "pretrain.block_size=32")
    people = ("prepare.num_questions=100", "sft.block_size=32", "rank.pairs=8", "rank.answers=3")
    config = load(
        CONFIGS / "human_feedback.yaml",
        [f"run.dir={tmp_path}", *INLINE, *PPO, *sizes, *people, "rank.wait=false"],
    )
    pipeline.run(config)
    assert not (tmp_path / "reward").exists()
    assert rank_all(tmp_path) >= config.rank.answers
    # Untrained, the model is neither courteous nor rude: to one who cares for no more all is equal.
    ranking = Ranking(tmp_path)
    while shown := ranking.next("bob"):
        ranking.answer("bob", shown.pair.id, "left")
    pipeline.run(config)
    assert all((tmp_path / stage / "summary.json").is_file() for stage in config.run.stages[:-1])
    assert json.loads((tmp_path / "rank" / "summary.json").read_text())["people"] == 2
    assert "2 people gave" in (tmp_path / "report.html").read_text()


def test_gsm8k_is_asked_and_judged_as_published(files: Path, tmp_path: Path) -> None:
    """With the overrides for GRPO that stand at the top of the file."""
    name = "gsm8k_qwen25_0_5b.yaml"
    comment = (CONFIGS / name).read_text().partition("GRPO")[2].partition("#\n")[0]
    words = shlex.split(comment.replace("\\\n#", " ").partition(f"{name} ")[2])
    assert {"ppo.advantage=grpo", "ppo.samples_per_prompt=5"} <= set(words)
    sizes = ("ppo.samples_per_prompt=2", "ppo.batch_size=4")
    config = small_config(name, files, tmp_path, *words, *sizes)
    assert config.ppo.advantage == "grpo"
    pipeline.run(config)
    folder = tmp_path / "run"
    (sample, *_) = read_jsonl(folder / "evaluate" / "samples.jsonl")
    assert sample["prompt"].startswith("user: Ann has ")
    assert sample["prompt"].endswith('answer after "####".<|eos|>assistant: ')
    records = read_jsonl(folder / "ppo" / "metrics.jsonl")
    assert {r["objective/scores/right"] for r in records} == {0.0}, "a tiny model cannot count"
    summary = json.loads((folder / "evaluate" / "summary.json").read_text())
    assert summary["models"]["sft"]["reward_mean"] == 0.0
    assert summary["asked"]["temperature"] == 0.01
