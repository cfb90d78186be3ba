"""Runs that cannot go on, full disks and bad rows, through the real command line."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from command_line import ANSWER, CONFIG, QUESTION, Refused, command, contents, copy_of, dump_of

from rlhf_ray import disk
from rlhf_ray.config import load
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.pipeline import open_run


class TestInputsOfLaterStages:
    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("critic.path=/no/model", r"Model folder /no/model does not exist"),
            ("rewards=[{type: classifier, path: /no/one}]", r"Model folder /no/one does not exist"),
            ("data.eval={path: no.jsonl}", r"no\.jsonl"),
            ("data.prompts=[{path: empty.jsonl}]", r"empty\.jsonl.*no rows"),
            ("ppo.advantage=mine.py:f", r"ppo\.advantage: mine\.py:f cannot be loaded"),
            ("ppo.policy_loss=mine.py:f", r"ppo\.policy_loss: mine\.py:f cannot be loaded"),
            ("rewards=[{type: function, function: no:f}]", r"rewards: no:f cannot be loaded"),
            ("reward.benchmark=[{path: no.jsonl}]", r"no\.jsonl"),
        ],
    )
    def test_they_are_looked_for_before_the_first(
        self,
        refused: Refused,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        override: str,
        says: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.jsonl").write_text("\n")
        refused("run", config_file, f"run.dir={tmp_path}/r", override, says=says)
        assert not (tmp_path / "r" / "prepare").exists()

    @pytest.mark.parametrize(
        "override", ["ppo.critic_warmup=1", "ppo.overlong.truncated=bootstrap"]
    )
    def test_a_function_without_values_has_no_critic_to_warm_up_or_to_ask(
        self,
        refused: Refused,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        override: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine.py").write_text("def f(rewards_BT, mask_BT):\n    return rewards_BT\n")
        overrides = (f"run.dir={tmp_path}/r", "ppo.advantage=mine.py:f", "ppo.iterations=3")
        says = r"needs a critic, which a run with ppo\.advantage mine\.py:f has not"
        refused("run", config_file, *overrides, override, says=says)

    def test_a_function_without_groups_has_none_to_filter(
        self,
        refused: Refused,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine.py").write_text("def f(rewards_BT, mask_BT):\n    return rewards_BT\n")
        overrides = (f"run.dir={tmp_path}/r", "ppo.advantage=mine.py:f", "rollout.shard_size=2")
        groups = ("ppo.samples_per_prompt=2", "ppo.filter_groups.max_refills=1")
        says = r"max_refills 1 replaces prompts .* with ppo\.advantage mine\.py:f those are learnt"
        refused("run", config_file, *overrides, *groups, says=says)


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
            ("data.prompts={path: p.jsonl}", r"data\.prompts: None there, \[\{'path': 'p\.jsonl'"),
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
        assert "Choose another run.name, set these back, or begin a new run with run.res" in message
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
        monkeypatch.setattr(disk.os, "replace", self.full)
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
            patched.setattr(datasets.arrow_writer.ArrowWriter, "finalize", self.full)
            refused(*arguments, says=r"Cannot write .*/prepare: No space left on device\. Free")
        after = contents(tmp_path / "r")
        assert {path: after[path] for path in before} == before
        assert command(*arguments) == 0
        assert contents(tmp_path / "r").keys() == before.keys()

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
            # By default the run waits an hour for space.
            refused(
                *("ppo", *arguments, "run.full_disk_wait_s=0"),
                says=r"Cannot write version 2 to .*: No space left",
            )
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
        self.prompts(tmp_path, num_empty=5, num_long=3)
        refused(
            *("run", *self.arguments(config_file, whole_run, tmp_path)),
            says=r"prompts: 5 of 20 rows are bad \(empty: 5\), more than the 20% that "
            r"data\.max_bad_share allows; fix the data, or raise data\.max_bad_share",
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
