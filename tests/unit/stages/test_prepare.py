import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_ray.config import Config, data, resolve
from rlhf_ray.data import template
from rlhf_ray.data.prepare.shards import Shards
from rlhf_ray.data.stack_exchange import parts
from rlhf_ray.data.stack_exchange import synthetic_site as synthetic
from rlhf_ray.data.stack_exchange.parts import Part
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages import prepare

SETS = ("finetune", "reward", "rl", "evaluation")


def config(folder: Path, **prepare_section: Any) -> Config:
    return resolve(
        {
            "run": {"dir": str(folder)},
            "cluster": {"mode": "inline"},
            "rollout": {"engine": "transformers"},
            "prepare": {"num_questions": 200, **prepare_section},
        }
    )


def load(folder: Path, name: str) -> datasets.Dataset:
    loaded = datasets.load_from_disk(str(folder / "prepare" / name))
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def question(number: int, votes: tuple[int, ...]) -> str:
    """A question with its answers; every answer's text is its number of votes."""
    row = '<row Id="{}" PostTypeId="2" ParentId="{}" Score="{}" Body="up {}"/>'
    answers = [row.format(1000 * number + i, number, up, up) for i, up in enumerate(votes)]
    return f'<row Id="{number}" PostTypeId="1" Title="q{number}" Body="b"/>' + "".join(answers)


def dump(path: Path, *posts: str) -> str:
    path.write_text(f"<posts>{''.join(posts)}</posts>")
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, prepare.run(config(folder))


def test_the_sets_share_no_question_and_keep_their_shares(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    ids = {name: set(load(folder, name)["question_id"]) for name in SETS}
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    # Shares .3, .45, .15, .1 of 200; pairless questions are missing from two of them.
    assert 40 <= len(ids["finetune"]) <= 80
    assert 60 <= len(ids["reward"]) <= 110
    assert 15 <= len(ids["rl"]) <= 45
    assert 8 <= len(ids["evaluation"]) <= 32


def test_each_set_has_its_columns_and_rows(run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = run
    base = ["question_id", "question", "prompt", "link"]
    sets = {name: load(folder, name) for name in SETS}
    assert sets["finetune"].column_names == [*base, "completion", "score", "preferred"]
    assert sets["rl"].column_names == base
    for name in ("reward", "evaluation"):
        assert sets[name].column_names == [*base, "chosen", "rejected"]
        assert all(row["chosen"] != row["rejected"] for row in sets[name].to_list())
    for rows in sets.values():
        assert all(row["prompt"] == template.prompt(row["question"]) for row in rows.to_list())
    assert summary["rows"] == {name: len(rows) for name, rows in sets.items()}


def test_the_summary_counts_everything(run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = run
    assert summary == RunFolder(config(folder)).summary("prepare")
    assert summary["questions"] == 200
    assert 700 < summary["answers"] < 900
    assert summary["synthetic"] is True
    assert summary["seconds"] > 0
    num_used = sum(len(set(load(folder, name)["question_id"])) for name in SETS)
    without = ("question_without_answers", "question_without_pairs")
    assert num_used + sum(summary["dropped"].get(reason, 0) for reason in without) == 200
    assert sorted(item.name for item in (folder / "prepare").iterdir()) == sorted(
        [*SETS, "Posts.xml", "quality.json", "summary.json"]
    )


def test_a_user_dump_with_the_synthetic_posts_gives_the_same_sets(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = run
    synthetic.write_posts(tmp_path / "Posts.xml", 200, seed=0)
    summary = prepare.run(config(tmp_path / "run", posts=str(tmp_path / "Posts.xml")))
    assert summary["synthetic"] is False
    for name in SETS:
        assert load(tmp_path / "run", name).to_list() == load(folder, name).to_list()
    assert not (tmp_path / "run" / "prepare" / "Posts.xml").exists()


def test_winners_of_pairs_are_preferred(tmp_path: Path) -> None:
    posts = dump(
        tmp_path / "Posts.xml", *(question(i, (0, 3, 3, 7)) for i in range(1, 60)), question(60, ())
    )
    summary = prepare.run(config(tmp_path, posts=posts))
    rows = load(tmp_path, "finetune").to_list()
    # Scores of 0, 3, 7 votes: 0, 2, 3; the answer without votes wins no pair.
    assert {(row["completion"], row["score"], row["preferred"]) for row in rows} == {
        ("up 0", 0, False),
        ("up 3", 2, True),
        ("up 7", 3, True),
    }
    # Six pairs less the tie.
    for name in ("reward", "evaluation"):
        assert summary["rows"][name] == 5 * len(set(load(tmp_path, name)["question_id"]))
    assert summary["dropped"] == {"question_without_answers": 1}
    assert load(tmp_path, "rl")[0]["question"].startswith("q")


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    prepare.run(config(tmp_path))
    before = load(tmp_path, "rl").to_list()
    (tmp_path / "prepare" / ".partial" / "rl").mkdir(parents=True)
    prepare.run(config(tmp_path, num_questions=100))
    assert len(load(tmp_path, "rl")) < len(before)
    assert not (tmp_path / "prepare" / ".partial").exists()


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files of the sets, and quality.json."""
    stage = folder / "prepare"
    paths = [path for name in SETS for path in (stage / name).iterdir()]
    return {str(path.relative_to(stage)): path.read_bytes() for path in paths} | {
        "quality.json": (stage / "quality.json").read_bytes()
    }


@pytest.mark.parametrize("limit", [None, 100])
def test_a_killed_run_goes_on_at_its_shard_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(data, "PART_BYTES", 40_000)
    posts = str(tmp_path / "Posts.xml")
    synthetic.write_posts(Path(posts), 200, seed=0)

    def prepared(folder: Path) -> Config:
        return config(folder, posts=posts, limit=limit)

    prepare.run(prepared(tmp_path / "whole"))
    done: list[tuple[str, object]] = []
    due: list[tuple[str, int]] = []

    def killed_at(name: str) -> Callable[..., object]:
        do = getattr(Shards, name)

        def step(self: Shards, shard: Part | int, *args: Any, **kwargs: Any) -> object:
            if due and due[0] == (name, sum(kind == name for kind, _ in done)):
                if name == "convert":  # a file that is written by half
                    self.file("rl", int(str(shard))).write_bytes(b"half")
                raise KeyboardInterrupt
            result = do(self, shard, *args, **kwargs)
            done.append((name, shard))
            return result

        return step

    for name in ("group", "convert"):
        monkeypatch.setattr(Shards, name, killed_at(name))
    for moment in (("group", 2), ("convert", 2), ("convert", 3)):
        due[:] = [moment]
        with pytest.raises(KeyboardInterrupt):
            prepare.run(prepared(tmp_path / "killed"))
    due.clear()
    prepare.run(prepared(tmp_path / "killed"))
    assert len(done) == len(set(done)) == 2 * len(parts.find_dumps([posts])[0].parts())
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) > 12
    assert not (tmp_path / "killed" / "prepare" / ".partial").exists()
    assert not (tmp_path / "killed" / "scratch").exists()


def test_a_run_that_was_killed_with_another_dump_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posts = dump(tmp_path / "Posts.xml", *(question(i, (0, 3)) for i in range(1, 60)))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.run(config(tmp_path, posts=posts))
    dump(tmp_path / "Posts.xml", *(question(i, (0, 3)) for i in range(1, 90)))
    assert prepare.run(config(tmp_path, posts=posts))["questions"] == 89


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_keeps_the_earlier_sets_and_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.run(config(tmp_path))
    before = load(tmp_path, "rl").to_list()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_finish", full_disk)
        with pytest.raises(ConfigError, match="No space left on device"):
            prepare.run(config(tmp_path, num_questions=100))
    assert load(tmp_path, "rl").to_list() == before
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "convert", full_disk)  # it is not called again
        assert prepare.run(config(tmp_path, num_questions=100))["questions"] == 100


def test_only_questions_that_are_asked_for_are_taken(tmp_path: Path) -> None:
    row = (
        '<row Id="{0}" PostTypeId="1" Title="q{0}" Body="b" Score="{1}" Tags="{2}" '
        'CreationDate="{3}T10:00"/>'
    )
    answer = '<row Id="{1}" PostTypeId="2" ParentId="{0}" Score="{2}" Body="up {2}"/>'
    posts: list[str] = []
    for i in range(1, 401):
        day = f"201{i % 2}-06-30"
        tags = "|python|c|" if i % 4 < 2 else "|c++|"
        posts.append(row.format(i, i % 8, tags, day))
        posts += [answer.format(i, 1000 * i + up, up) for up in (0, 3)]
    path = dump(tmp_path / "Posts.xml", *posts)

    def taken(**asked: Any) -> set[int]:
        summary = prepare.run(config(tmp_path, posts=path, **asked))
        assert summary["questions"] + sum(
            summary["dropped"].get(reason, 0) for reason in ("not_selected", "beyond_limit")
        ) == 400  # fmt: skip
        assert "answer_without_question" not in summary["dropped"]
        return {row["question_id"] for name in SETS for row in load(tmp_path, name).to_list()}

    every = set(range(1, 401))
    assert taken() == every
    assert taken(min_score=5) == {i for i in every if i % 8 >= 5}
    assert taken(tags=["python", "go"]) == {i for i in every if i % 4 < 2}
    assert taken(since="2011-01-01") == {i for i in every if i % 2}
    some = {i for i in every if i % 4 < 2 and i % 8 >= 1 and i % 2}
    assert taken(tags=["c"], min_score=1, since="2011-06-30") == some
    drawn = taken(limit=90)
    assert len(drawn) == 90
    assert drawn < taken(limit=120), "a larger sample holds the smaller one"
    assert max(drawn) > 300
    assert min(drawn) < 100
    assert len(taken(limit=1000)) == 400


def test_several_sites_are_one_dump(tmp_path: Path) -> None:
    paths = []
    for site, votes in (("tea.example.com", (0, 3)), ("coffee.example.com", (0, 7))):
        (tmp_path / site).mkdir()
        posts = (question(i, votes) for i in range(1, 60))
        paths.append(dump(tmp_path / site / "Posts.xml", *posts))
    summary = prepare.run(config(tmp_path, posts=paths))
    assert (summary["questions"], summary["answers"]) == (118, 236)
    for name in ("reward", "evaluation"):
        for row in load(tmp_path, name).to_list():
            best = "up 3" if "tea.example.com" in row["link"] else "up 7"
            assert (row["chosen"], row["rejected"]) == (best, "up 0")
    links = load(tmp_path, "rl")["link"]
    assert {link.split("/")[2] for link in links} == {"tea.example.com", "coffee.example.com"}
    with pytest.raises(ConfigError, match=r"prepare\.site names one site"):
        config(tmp_path, posts=paths, site="tea.example.com")


def test_grouped_posts_lie_in_the_scratch_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "disk"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.run(config(tmp_path / "run", scratch=str(scratch)))
    assert [path.suffix for path in sorted(scratch.rglob("*.arrow"))] == [".arrow"]
    prepare.run(config(tmp_path / "run", scratch=str(scratch)))
    assert not any(scratch.iterdir())


@pytest.mark.parametrize("bad_share", [0.1, 0.3])
def test_empty_posts_are_counted_up_to_the_share_allowed(tmp_path: Path, bad_share: float) -> None:
    num_bad = round(200 * bad_share)
    answer = '<row Id="{}" PostTypeId="2" ParentId="1" Score="0" Body="&lt;p&gt; &lt;/p&gt;"/>'
    posts = dump(
        tmp_path / "Posts.xml",
        *(question(i, (0, 3, 7)) for i in range(1, 51)),
        *(answer.format(100_000 + i) for i in range(num_bad)),
    )
    if bad_share < 0.2:
        assert prepare.run(config(tmp_path, posts=posts))["dropped"] == {"empty_answer": num_bad}
    else:
        with pytest.raises(DataError, match=r"60 of 260 rows are bad \(empty_answer: 60\)"):
            prepare.run(config(tmp_path, posts=posts))


def test_rows_that_cannot_be_read_are_counted_over_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PART_BYTES", 1000)
    odd = ('<row PostTypeId="1"/>', '<row Id="9" PostTypeId="2" ParentId="7777" Score="0"/>')
    posts = (question(i, (0, 3, 7)) + "".join(odd[: i % 9 == 0]) for i in range(1, 91))
    summary = prepare.run(config(tmp_path, posts=dump(tmp_path / "Posts.xml", *posts, odd[1])))
    dropped = summary["dropped"]
    assert (dropped["malformed_row"], dropped["answer_without_question"]) == (10, 1)


def test_a_dump_without_a_preference_is_refused(tmp_path: Path) -> None:
    posts = dump(tmp_path / "Posts.xml", *(question(i, (1, 1)) for i in range(1, 60)))
    with pytest.raises(DataError, match="no rows for reward, evaluation"):
        prepare.run(config(tmp_path, posts=posts))
    assert not (tmp_path / "prepare" / "rl").exists()


def test_a_missing_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.xml: No such file"):
        prepare.run(config(tmp_path, posts=str(tmp_path / "nowhere.xml")))


def test_questions_keep_their_link_and_nobodys_name(tmp_path: Path) -> None:
    site = tmp_path / "coffee.stackexchange.com"
    site.mkdir()
    owner = 'PostTypeId="2" OwnerUserId="4711" OwnerDisplayName="Ann Bean" '
    posts = dump(site / "Posts.xml", *(question(i, (0, 3)) for i in range(1, 60)))
    text = Path(posts).read_text().replace('PostTypeId="2" ', owner)
    Path(posts).write_text(text)
    prepare.run(config(tmp_path, posts=posts))
    for name in SETS:
        for row in load(tmp_path, name).to_list():
            link = f"https://coffee.stackexchange.com/questions/{row['question_id']}"
            assert row["link"] == link
            assert not any("Ann Bean" in str(cell) or "4711" in str(cell) for cell in row.values())
    prepare.run(config(tmp_path, posts=posts, site="other.example"))
    assert load(tmp_path, "rl")[0]["link"].startswith("https://other.example/questions/")


def test_an_archive_is_read_like_the_dump_inside(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    posts = dump(tmp_path / "Posts.xml", *(question(i, (0, 3)) for i in range(1, 60)))
    with py7zr.SevenZipFile(tmp_path / "coffee.stackexchange.com.7z", "w") as archive:
        archive.write(posts, "Posts.xml")
    archive_config = config(tmp_path, posts=str(tmp_path / "coffee.stackexchange.com.7z"))
    assert prepare.run(archive_config)["questions"] == 59
    assert load(tmp_path, "rl")[0]["link"].startswith("https://coffee.stackexchange.com/")
    assert not (tmp_path / "prepare" / ".partial").exists()


def test_quality_json_describes_the_texts(tmp_path: Path) -> None:
    posts = dump(
        tmp_path / "Posts.xml",
        *(question(i, (0, 3, 3, 7)) for i in range(1, 60)),
        '<row Id="70000" PostTypeId="2" ParentId="1" Score="-3" Body="&lt;pre class=&quot;lang-py '
        'x&quot;&gt;&lt;code&gt;1&lt;/code&gt;&lt;/pre&gt;"/>',
    )
    prepare.run(config(tmp_path, posts=posts))
    quality = json.loads((tmp_path / "prepare" / "quality.json").read_text())
    # Answers say "up 0", "up 3", "up 7" and one block of code; questions are numbered.
    assert (quality["answers"]["texts"], quality["answers"]["repeated"]) == (237, 233)
    assert (quality["questions"]["texts"], quality["questions"]["repeated"]) == (59, 0)
    assert quality["scores"] == {"-1": 1, "0": 59, "2": 118, "3": 59}
    assert quality["answers"]["languages"] == {"py": 1}
    assert quality["answers"]["lengths"][0] == 237
    # Four answers are six pairs, one of them a tie; question 1 has five answers.
    assert quality["pairs"] == {"pairs": 58 * 6 + 10, "ties": 59}


def test_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.run(config(tmp_path))
    assert re.search(r"prepare done: 200/200 questions in 0:0\d", capsys.readouterr().out)
