"""Bad input through the real command line: one message with a remedy, exit code 2, nothing lost."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_ray.cli import main
from rlhf_ray.config import load
from rlhf_ray.stages import pipeline, run_folder
from rlhf_ray.stages.pipeline import open_run
from rlhf_ray.stages.run_folder import RunFolder

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

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command quietens the libraries for its whole process: undo that."""
    before = dict(os.environ)
    levels = {name: logging.getLogger(name).level for name in ("ray", "datasets", "httpx")}
    yield
    os.environ.clear()
    os.environ.update(before)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def command(*arguments: object) -> int:
    """Exit code of ``rlhf-ray ARGUMENTS``; an error that is not ours comes out as it is."""
    sys.argv = ["rlhf-ray", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command that must be refused; returns its one message."""
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(*arguments: object, says: str) -> str:
        assert command(*arguments) == 2
        printed = capsys.readouterr().err
        # Libraries that were loaded before the command could quieten them may speak first.
        _, *messages = re.split(r"^Error: ", printed, flags=re.MULTILINE)
        assert len(messages) == 1, printed
        assert "Traceback" not in printed
        assert re.search(says, messages[0]), messages[0]
        return messages[0]

    return run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that went through every stage; no test may change it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    pipeline.run(load(folder / "config.yaml", [f"run.dir={folder / 'run'}"]))
    return folder / "run"


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def dump_of(folder: Path, *rows: str) -> Path:
    path = folder / "Posts.xml"
    path.write_text(f"<posts>\n{chr(10).join(rows)}\n</posts>\n", encoding="utf-8")
    return path


class TestDump:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, r"Cannot read .*Posts\.xml: No such file.*; give the Posts\.xml"),
            ("", r"Posts\.xml is empty \(0 bytes\); give the Posts\.xml"),
            ("Id,Body\n1,Hello\n", r"is not an XML dump \(.*\); give the Posts\.xml"),
            ("<html><p>Hi</p></html>", r"holds no <row> elements \(its root is <html>\); give"),
            ("<posts></posts>", r"holds no <row> elements \(its root is <posts>\); give"),
        ],
    )
    def test_that_is_none(
        self, refused: Refused, config_file: Path, tmp_path: Path, content: str | None, says: str
    ) -> None:
        posts = tmp_path / "Posts.xml"
        if content is not None:
            posts.write_text(content, encoding="utf-8")
        refused("run", config_file, f"prepare.posts={posts}", f"run.dir={tmp_path}/r", says=says)

    def test_cut_off(self, refused: Refused, config_file: Path, tmp_path: Path) -> None:
        posts = dump_of(tmp_path, *(QUESTION.format(i) for i in range(1, 40)))
        posts.write_text(posts.read_text(encoding="utf-8")[:-60], encoding="utf-8")
        refused(
            *("prepare", config_file, f"prepare.posts={posts}", f"run.dir={tmp_path}/r"),
            says=r"is broken or cut off after 38 rows .*; unpack it again",
        )

    def test_answers_alone(self, refused: Refused, config_file: Path, tmp_path: Path) -> None:
        posts = dump_of(tmp_path, *(ANSWER.format(i, 1, i) for i in range(2, 9)))
        refused(
            *("prepare", config_file, f"prepare.posts={posts}", f"run.dir={tmp_path}/r"),
            says=r"holds 7 answers but no questions; give the Posts\.xml",
        )

    def test_too_small_for_four_sets(
        self, refused: Refused, config_file: Path, tmp_path: Path
    ) -> None:
        posts = dump_of(
            tmp_path, QUESTION.format(1), ANSWER.format(2, 1, 3), ANSWER.format(3, 1, 0)
        )
        refused(
            *("prepare", config_file, f"prepare.posts={posts}", f"run.dir={tmp_path}/r"),
            says=r"its 1 questions leave no rows for .*; give a larger dump, or raise that share",
        )

    def test_that_breaks_later_leaves_the_sets(
        self, refused: Refused, config_file: Path, tmp_path: Path
    ) -> None:
        rows = []
        for i in range(0, 1500, 3):
            rows += [QUESTION.format(i), ANSWER.format(i + 1, i, 5), ANSWER.format(i + 2, i, 0)]
            rows[-1] = rows[-1].replace("So", "No")
        posts = dump_of(tmp_path, *rows)
        arguments = ("prepare", config_file, f"prepare.posts={posts}", f"run.dir={tmp_path}/r")
        assert command(*arguments) == 0
        before = contents(tmp_path / "r")
        assert "prepare/summary.json" in before
        posts.write_text("<posts>", encoding="utf-8")
        refused(*arguments, says="is not an XML dump")
        assert contents(tmp_path / "r") == before

    def test_can_be_corrected_afterwards(
        self, refused: Refused, config_file: Path, tmp_path: Path
    ) -> None:
        """A run that was refused is no run yet: its keys are not held against the next try."""
        arguments = ("prepare", config_file, f"run.dir={tmp_path}/r")
        refused(*arguments, "prepare.posts=nowhere.xml", says="Cannot read nowhere.xml")
        assert command(*arguments) == 0


class TestConfig:
    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["ppo.iteration=3"], r"ppo\.iteration: unknown key .*Did you mean ppo\.iterations\?"),
            (["pppo.batch_size=8"], r"pppo: unknown key .*Did you mean ppo"),
            (["ppo.iterations=many"], r"ppo\.iterations: .*valid integer, got 'many'"),
            (["cluster.dashboard=3"], r"cluster\.dashboard: .*valid boolean, got 3"),
            (["ppo.batch_size=-4"], r"ppo\.batch_size: .*greater than or equal to 1, got -4"),
            (["ppo.mini_batch_size=3"], r"ppo\.batch_size 8 is not a multiple of .* try 6 or 9"),
            (["ppo.samples_per_prompt=3"], r"ppo\.batch_size 8 is not a multiple of ppo\.samples"),
            (["rollout.max_tokens=64"], r"24 .* 64 = 88 exceed model\.max_length 64; raise"),
            (["prepare.rl=0.5"], r"prepare: shares .* must add up to 1, got 1\.35"),
            (["run.stages=[ppo, fly]"], r"run\.stages\.1: Input should be 'prepare', .*got 'fly'"),
            (["lora.peft={r: 4}"], r"lora\.peft may not contain 'r' \(set by lora\.r\)"),
            (["ppo.iterations"], r"Override 'ppo\.iterations' must look like dotted\.key=value"),
            (["=3"], r"Override '=3' must look like dotted\.key=value"),
            (["ppo.batch_size.x=3"], r"batch_size is a value, not a section"),
            (
                ["model.path=${NO_SUCH_NAME}"],
                r"model\.path: .*NO_SUCH_NAME is not set.*; export it",
            ),
        ],
    )
    def test_wrong_keys_and_values(
        self, refused: Refused, config_file: Path, tmp_path: Path, overrides: list[str], says: str
    ) -> None:
        refused("run", config_file, f"run.dir={tmp_path}/r", *overrides, says=says)
        assert not (tmp_path / "r").exists()

    def test_all_that_is_wrong_is_named_at_once(self, refused: Refused, config_file: Path) -> None:
        message = refused("plan", config_file, "ppo.epochs=x", "ppo.gama=1", says="ppo.gama")
        assert "ppo.epochs: " in message

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("ppo: {iterations: 3\n", r"config\.yaml is not valid YAML: .*line 2"),
            ("\x00\x01", r"config\.yaml is not valid YAML"),
            ("- ppo\n- sft\n", r"config\.yaml must hold keys and values, got a list"),
            ("extends: other.yaml\n", r"other\.yaml does not exist"),
            ("extends: config.yaml\n", r"config\.yaml extends itself"),
        ],
    )
    def test_files_that_are_none(
        self, refused: Refused, config_file: Path, content: str, says: str
    ) -> None:
        config_file.write_text(content, encoding="utf-8")
        refused("run", config_file, says=f"(?s){says}")

    def test_no_file(self, refused: Refused, tmp_path: Path) -> None:
        refused("run", tmp_path / "no.yaml", says=r"Config file .*no\.yaml does not exist; name a")
        refused("run", tmp_path, says="is no run: it has no config.yaml; name a YAML file")


class TestModel:
    @pytest.mark.parametrize(
        ("stage", "key"),
        [
            ("pretrain", "model.path"),
            ("ppo", "sft.path"),
            ("ppo", "reward.path"),
            ("ppo", "critic.path"),
        ],
    )
    def test_that_does_not_exist(
        self,
        refused: Refused,
        config_file: Path,
        whole_run: Path,
        tmp_path: Path,
        stage: str,
        key: str,
    ) -> None:
        arguments = [config_file, f"run.dir={tmp_path}/r"]
        assert command("prepare", *arguments) == 0
        before = contents(tmp_path / "r" / "prepare")
        given = {name: f"{whole_run}/{name}/model" for name in ("sft", "reward")}
        arguments += [f"{name}.path={path}" for name, path in given.items() if stage == "ppo"]
        refused(
            *(stage, *arguments, f"{key}=/nowhere/model"),
            says=r"Model folder /nowhere/model does not exist; check model\.path, sft\.path",
        )
        assert contents(tmp_path / "r" / "prepare") == before

    def test_that_is_a_file_or_an_empty_folder(
        self, refused: Refused, config_file: Path, tmp_path: Path
    ) -> None:
        arguments = ("pretrain", config_file, f"run.dir={tmp_path}/r")
        assert command("prepare", *arguments[1:]) == 0
        (tmp_path / "empty").mkdir()
        path = f"model.path={tmp_path}/empty"
        refused(*arguments, path, says="is not a model folder: it has neither config.json")
        path = f"model.path={config_file}"
        refused(*arguments, path, says="is a file; a model is the folder that holds it")


class TestRunFolder:
    def test_below_a_file(self, refused: Refused, config_file: Path) -> None:
        refused(
            *("run", config_file, f"run.dir={config_file}/run"),
            says=r"Cannot write .*/run: Not a directory\. Free space or choose another run\.dir",
        )
        assert config_file.read_text(encoding="utf-8") == CONFIG

    def test_without_a_run_to_go_on_from(
        self, refused: Refused, config_file: Path, tmp_path: Path
    ) -> None:
        refused(
            *("run", config_file, f"run.dir={tmp_path}/r", "run.resume=must"),
            says=r"run\.resume is must, and .*/r holds no run; check run\.dir",
        )
        assert not (tmp_path / "r").exists()

    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("model.tiny.hidden_size=64", r"model\.tiny\.hidden_size: 32 there, 64 now"),
            ("model.path=/other/model", r"model\.path: None there, '/other/model' now"),
            ("prepare.posts=/other/Posts.xml", r"prepare\.posts: None there, '/other/Posts"),
            ("data.prompts={path: p.jsonl}", r"data\.prompts: None there, \{'path': 'p\.jsonl'"),
            ("lora.r=4", r"lora\.r: 16 there, 4 now"),
            ("lora.target_modules=[q_proj]", r"lora\.target_modules: 'all-linear' there, \['q_"),
            ("ppo.gamma=0.9", r"ppo\.gamma: 1\.0 there, 0\.9 now"),
            ("ppo.batch_size=16", r"ppo\.batch_size: 8 there, 16 now"),
            ("run.seed=1", r"run\.seed: 0 there, 1 now"),
        ],
    )
    def test_of_another_run(
        self, refused: Refused, config_file: Path, whole_run: Path, override: str, says: str
    ) -> None:
        before = contents(whole_run)
        message = refused("run", config_file, f"run.dir={whole_run}", override, says=says)
        assert "Choose another run.name, set these back, or start anew with run.res" in message
        assert contents(whole_run) == before

    def test_goes_on_with_another_placement(self, config_file: Path, whole_run: Path) -> None:
        """Checked without running: two ranks and two generators need Ray."""
        changed = [
            "ppo.iterations=9",
            "cluster.mode=local",
            "rollout.engine=vllm",
            "generators.num=2",
            "policy.num_ranks=2",
            "critic.num_ranks=2",
            "reference.num_workers=2",
            "ppo.save_every=3",
        ]
        before = contents(whole_run)
        config = load(config_file, [f"run.dir={whole_run}", *changed])
        open_run(RunFolder(config))
        after = contents(whole_run)
        assert {name for name in after if after[name] != before.get(name)} == {"config.yaml"}
        open_run(RunFolder(load(config_file, [f"run.dir={whole_run}"])))
        assert contents(whole_run) == before

    def test_with_a_broken_config(
        self, refused: Refused, config_file: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "config.yaml").write_text("run: {", encoding="utf-8")
        arguments = ("prepare", config_file, f"run.dir={tmp_path}/r")
        refused(*arguments, says=r"r/config\.yaml cannot be read: (.|\n)*restore or remove it")


class TestFullDisk:
    def full(self, *_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def test_at_the_start(
        self,
        refused: Refused,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(run_folder.os, "replace", self.full)
        refused(
            *("run", config_file, f"run.dir={tmp_path}/r"),
            says=r"Cannot write .*config\.yaml: No space left on device\. Free space",
        )

    def test_while_data_is_written(
        self,
        refused: Refused,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        arguments = ("prepare", config_file, f"run.dir={tmp_path}/r")
        assert command(*arguments) == 0
        before = contents(tmp_path / "r")
        with monkeypatch.context() as patched:
            patched.setattr(datasets.Dataset, "save_to_disk", self.full)
            refused(*arguments, says=r"Cannot write .*/prepare: No space left on device\. Free")
        assert contents(tmp_path / "r") == before

    def test_while_a_commit_is_written(
        self,
        refused: Refused,
        config_file: Path,
        whole_run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = copy_of(whole_run, tmp_path)
        before = contents(folder / "checkpoints")
        arguments = (config_file, f"run.dir={folder}", "ppo.iterations=2")
        with monkeypatch.context() as patched:
            patched.setattr("rlhf_ray.driver.checkpoint._write", self.full)
            refused("ppo", *arguments, says=r"Cannot write version 2 to .*: No space left")
        assert contents(folder / "checkpoints") == before
        assert command("ppo", *arguments) == 0
        summary = json.loads((folder / "ppo" / "summary.json").read_text(encoding="utf-8"))
        assert summary["iterations"] == summary["adapter_version"] == 2

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            RuntimeError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
        ],
    )
    def test_in_a_library_that_trains(
        self,
        refused: Refused,
        config_file: Path,
        whole_run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
    ) -> None:
        folder = copy_of(whole_run, tmp_path)
        before = contents(folder / "sft" / "model")

        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("transformers.Trainer.save_model", fail)
        refused(
            *("reward", config_file, f"run.dir={folder}"),
            says=r"The disk is full \(.*\): .*No space left on device.* Free space or choose",
        )
        assert contents(folder / "sft" / "model") == before


class TestBadRows:
    def prompts(self, folder: Path, num_empty: int, num_long: int) -> Path:
        """Twenty rows, some of them bad."""
        texts = [""] * num_empty + ["word " * 60] * num_long
        texts += [f"Question: {i}?\n\nAnswer: " for i in range(20 - len(texts))]
        path = folder / "prompts.jsonl"
        rows = (json.dumps({"prompt": text}) + "\n" for text in texts)
        path.write_text("".join(rows), encoding="utf-8")
        return path

    def arguments(self, config_file: Path, whole_run: Path, folder: Path) -> tuple[object, ...]:
        return (
            config_file,
            f"run.dir={folder}/r",
            f"sft.path={whole_run}/sft/model",
            f"reward.path={whole_run}/reward/model",
            f"data.prompts.path={folder}/prompts.jsonl",
            "data.overlong=drop",
            "run.stages=[ppo,evaluate]",
        )

    def test_are_counted(self, config_file: Path, whole_run: Path, tmp_path: Path) -> None:
        self.prompts(tmp_path, num_empty=1, num_long=3)
        assert command("run", *self.arguments(config_file, whole_run, tmp_path)) == 0
        summary = json.loads((tmp_path / "r/ppo/summary.json").read_text(encoding="utf-8"))
        assert summary["prompts_dropped"] == {"kept": 16, "empty": 1, "overlong": 3}

    def test_over_a_fifth_are_too_many(
        self, refused: Refused, config_file: Path, whole_run: Path, tmp_path: Path
    ) -> None:
        self.prompts(tmp_path, num_empty=2, num_long=3)
        refused(
            *("run", *self.arguments(config_file, whole_run, tmp_path)),
            says=r"prompts: 5 of 20 rows are bad \(empty: 2, overlong: 3\), more than the 20% that "
            r"data\.max_bad_share allows; clean the data, or raise that share, or raise the length "
            r"limit, or set data\.overlong to truncate",
        )

    def test_of_a_dump_are_counted_and_limited(
        self, refused: Refused, config_file: Path, tmp_path: Path
    ) -> None:
        rows = []
        for i in range(0, 1500, 3):
            rows += [QUESTION.format(i), ANSWER.format(i + 1, i, 5), ANSWER.format(i + 2, i, 0)]
            rows[-1] = rows[-1].replace("So", "No")
        empty = [ANSWER.format(9000 + i, 0, 1).replace("So", "") for i in range(300)]
        posts = dump_of(tmp_path, *rows, *empty)
        arguments = ("prepare", config_file, f"prepare.posts={posts}", f"run.dir={tmp_path}/r")
        assert command(*arguments) == 0
        summary = json.loads((tmp_path / "r/prepare/summary.json").read_text(encoding="utf-8"))
        assert summary["dropped"] == {"empty_answer": 300}
        dump_of(tmp_path, *rows, *empty, *(row.replace('"9', '"8') for row in empty))
        refused(*arguments, says=r"600 of 2100 rows are bad \(empty_answer: 600\), more than")


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a run that a test may change."""
    return Path(shutil.copytree(run, folder / "run", symlinks=True))
