"""Bad input through the real command line: one message with a remedy, exit code 2, nothing lost."""

import json
from pathlib import Path

import pytest
from command_line import ANSWER, QUESTION, Refused, command, contents, dump_of


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
            (["rollout.max_tokens=64"], r"24 .* 64 = 88 tokens exceed model\.max_length 64; raise"),
            (["prepare.rl=0.5"], r"prepare: .* are shares and must add up to 1, got 1\.35"),
            (["run.stages=[ppo, fly]"], r"run\.stages\.1: Input should be 'prepare', .*got 'fly'"),
            (["lora.peft={r: 4}"], r"lora\.peft may not contain 'r' \(set by lora\.r\)"),
            (
                ["ppo.iterations"],
                r"Override 'ppo\.iterations' must have the form dotted\.key=value",
            ),
            (["=3"], r"Override '=3' must have the form dotted\.key=value"),
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
            ("- ppo\n- sft\n", r"config\.yaml must be a mapping of keys to values, got a list"),
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
        refused(
            "run",
            tmp_path,
            says="is not the folder of a run: it has no config.yaml. Name a YAML file",
        )


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


class TestRows:
    """Data sets of the user's own that cannot be trained on."""

    def arguments(self, folder: Path, config_file: Path, run: Path) -> tuple[object, ...]:
        models = (f"model.path={run}/pretrain/model", f"sft.path={run}/sft/model")
        return (config_file, f"run.dir={folder}/r", *models)

    @pytest.mark.parametrize(
        ("stage", "key", "row", "says"),
        [
            ("sft", "sft", {"a": "b"}, r": the columns a match no format that sft can use: "),
            ("sft", "sft", {"prompt": "a"}, r"20 of 20 rows are bad \(no_answer: 20\)"),
            (
                "reward",
                "preferences",
                {"prompt": "q", "chosen": "a", "rejected": "a"},
                r"19 of 19 rows are bad \(equal: 19\).*data\.max_bad_share",
            ),
            (
                "reward",
                "preferences",
                {"question": "q", "answers": []},
                r"20 of 20 rows are bad \(question_without_answers: 20\)",
            ),
            (
                "reward",
                "preferences",
                {"question": "q", "answers": [{"text": "a", "pm_score": float("nan")}]},
                r"no_scored_answer: no answer has both a text and a finite pm_score",
            ),
            (
                "sft",
                "sft",
                {"messages": [{"role": "user", "content": "a"}]},
                r"20 of 20 rows are bad \(no_answer: 20\)",
            ),
            (
                "sft",
                "sft",
                {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
                r"has no chat template.*set template\.kind to question_answer",
            ),
        ],
    )
    def test_that_cannot_be_used(
        self,
        refused: Refused,
        config_file: Path,
        whole_run: Path,
        tmp_path: Path,
        stage: str,
        key: str,
        row: dict[str, object],
        says: str,
    ) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text((json.dumps(row) + "\n") * 20, encoding="utf-8")
        arguments = self.arguments(tmp_path, config_file, whole_run)
        if stage == "sft":
            arguments = tuple(item for item in arguments if "sft.path" not in str(item))
        refused(stage, *arguments, f"data.{key}.path={path}", says=says)

    def test_answers_alone_cannot_be_learnt_of_plain_texts(
        self, refused: Refused, config_file: Path, whole_run: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "a"}\n' * 20, encoding="utf-8")
        base = f"model.path={whole_run}/pretrain/model"
        refused(
            *("sft", config_file, f"run.dir={tmp_path}/r", base, f"data.sft.path={path}"),
            "sft.loss_on=completion",
            says=r"plain text, so sft\.loss_on completion finds no answer in it; set "
            r"sft\.loss_on to all",
        )

    def test_chats_can_be_laid_out_as_question_and_answer(
        self, config_file: Path, whole_run: Path, tmp_path: Path
    ) -> None:
        turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
        path = tmp_path / "rows.jsonl"
        path.write_text((json.dumps({"messages": turns * 2}) + "\n") * 40, encoding="utf-8")
        base = f"model.path={whole_run}/pretrain/model"
        arguments = ("sft", config_file, f"run.dir={tmp_path}/r", base, f"data.sft.path={path}")
        more = ("template.kind=question_answer", "sft.loss_on=assistant", "sft.block_size=64")
        assert command(*arguments, *more) == 0
        summary = json.loads((tmp_path / "r/sft/summary.json").read_text(encoding="utf-8"))
        assert summary["rows"] == {"kept": 40}
