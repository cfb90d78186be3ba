"""Dumps of Stack Exchange that are broken, hostile or odd."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pytest
from command_line import Ends

QUESTION = '<row Id="{}" PostTypeId="1" Title="How?" Body="{}" Score="1" />'
ANSWER = '<row Id="{}" PostTypeId="2" ParentId="{}" Body="{}" Score="{}" />'
NUM_QUESTIONS = 60


def rows(body: str = "&lt;p&gt;Why&lt;/p&gt;") -> list[str]:
    lines = []
    for i in range(1, 3 * NUM_QUESTIONS, 3):
        lines += [QUESTION.format(i, body), ANSWER.format(i + 1, i, f"So {i}", 5)]
        lines.append(ANSWER.format(i + 2, i, f"No {i}", 0))
    return lines


def dump(*lines: str, head: str = "") -> bytes:
    return (head + "<posts>\n" + "\n".join(lines) + "\n</posts>\n").encode()


ENTITIES = '<!DOCTYPE p [<!ENTITY a0 "ha">' + "".join(
    f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)
)
REFUSED: dict[str, bytes] = {
    "empty": b"",
    "text": b"just words",
    "nul": b"<posts>\x00</posts>",
    "binary": bytes(range(256)) * 10,
    "utf16_cut_off": dump(*rows()).decode().encode("utf-16")[:-301],
    "other_root": b"<html><p>Hi</p></html>",
    "no_rows": b"<posts></posts>",
    "cut_off": dump(*rows())[:-60],
    "cut_off_in_a_tag": dump(*rows())[:-130],
    "two_roots": dump(*rows()) + dump(*rows()),
    "unclosed": b"<posts>" + b"<row>" * 2000,
    "deep": b"<posts>" + b"<a>" * 5000 + b"</a>" * 5000 + b"</posts>",
    "attribute_twice": dump('<row Id="1" Id="2" PostTypeId="1" />'),
    "control_character": dump('<row Id="1" PostTypeId="1" Body="&#7;" />'),
    "entity_bomb": dump(QUESTION.format(1, "&a9;"), head=ENTITIES + "]>"),
    "entity_of_a_file": dump(
        QUESTION.format(1, "&f;"), head='<!DOCTYPE p [<!ENTITY f SYSTEM "/etc/passwd">]>'
    ),
    "unknown_entity": dump(QUESTION.format(1, "&nothing;")),
    "unknown_encoding": b'<?xml version="1.0" encoding="nothing"?>' + dump(*rows()),
    "wrong_encoding": b'<?xml version="1.0" encoding="ascii"?>' + dump(*rows("Zürich")),
    "answers_alone": dump(*(ANSWER.format(i, 1, "So", i) for i in range(2, 20))),
    "questions_alone": dump(*(QUESTION.format(i, "Why") for i in range(2, 20))),
    "no_ids": dump(*['<row PostTypeId="1" Title="a" Body="b" />'] * 20),
    "ids_of_text": dump(*['<row Id="x" PostTypeId="1" Title="a" Body="b" />'] * 20),
    "types_of_text": dump(*['<row Id="1" PostTypeId="question" Body="b" />'] * 20),
    "no_bodies": dump(*[f'<row Id="{i}" PostTypeId="1" />' for i in range(20)]),
    "users": dump(*[f'<row Id="{i}" DisplayName="a" Reputation="1" />' for i in range(20)]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_dump_that_holds_nothing_usable_is_refused(
    ends: Ends, config_file: Path, tmp_path: Path, name: str
) -> None:
    posts = tmp_path / "Posts.xml"
    posts.write_bytes(REFUSED[name])
    ends("prepare", config_file, f"prepare.posts={posts}", f"run.dir={tmp_path}/run")


def zipped(folder: Path) -> Path:
    path = folder / "posts.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Posts.xml", dump(*rows()))
    return path


PACKED: dict[str, bytes] = {
    "garbage.7z": b"7z\xbc\xaf\x27\x1c" + b"a" * 100,
    "empty.7z": b"",
    "text.xml.gz": b"just words",
    "cut_off.xml.gz": gzip.compress(dump(*rows()))[:-20],
    "cut_off.xml.bz2": bz2.compress(dump(*rows()))[:-20],
    "cut_off.xml.xz": lzma.compress(dump(*rows()))[:-20],
    "rows.parquet": b"PAR1",
}


@pytest.mark.parametrize("name", PACKED)
def test_a_broken_archive_is_refused(
    ends: Ends, config_file: Path, tmp_path: Path, name: str
) -> None:
    posts = tmp_path / name
    posts.write_bytes(PACKED[name])
    ends("prepare", config_file, f"prepare.posts={posts}", f"run.dir={tmp_path}/run")


def test_an_archive_of_another_kind_is_refused(
    ends: Ends, config_file: Path, tmp_path: Path
) -> None:
    ends("prepare", config_file, f"prepare.posts={zipped(tmp_path)}", f"run.dir={tmp_path}/run")


ODD_ROWS: dict[str, str] = {
    "no_id": '<row PostTypeId="1" Title="a" Body="b" />',
    "id_of_text": '<row Id="x" PostTypeId="1" Title="a" Body="b" />',
    "id_of_many_digits": f'<row Id="{"9" * 5000}" PostTypeId="1" Title="a" Body="b" />',
    "negative_id": '<row Id="-5" PostTypeId="1" Title="a" Body="b" />',
    "id_twice": '<row Id="1" PostTypeId="1" Title="a" Body="b" />',
    "no_type": '<row Id="9000" Title="a" Body="b" />',
    "type_of_text": '<row Id="9000" PostTypeId="q" Title="a" Body="b" />',
    "other_type": '<row Id="9000" PostTypeId="7" Title="a" Body="b" />',
    "no_body": '<row Id="9000" PostTypeId="1" Title="a" />',
    "no_parent": '<row Id="9000" PostTypeId="2" Body="a" Score="1" />',
    "own_parent": '<row Id="9000" PostTypeId="2" ParentId="9000" Body="a" Score="1" />',
    "unknown_parent": '<row Id="9000" PostTypeId="2" ParentId="8999" Body="a" Score="1" />',
    "score_of_text": '<row Id="9000" PostTypeId="2" ParentId="1" Body="a" Score="many" />',
    "score_nan": '<row Id="9000" PostTypeId="2" ParentId="1" Body="a" Score="nan" />',
    "score_of_many_digits": f'<row Id="9000" PostTypeId="2" ParentId="1" Body="a" Score="{"9" * 5000}" />',  # noqa: E501
    "deep_html": f'<row Id="9000" PostTypeId="2" ParentId="1" Body="{"&lt;div&gt;" * 3000}" Score="1" />',  # noqa: E501
    "deep_lists": f'<row Id="9000" PostTypeId="2" ParentId="1" Body="{"&lt;ul&gt;&lt;li&gt;" * 2000}" Score="1" />',  # noqa: E501
    "open_html": '<row Id="9000" PostTypeId="2" ParentId="1" Body="&lt;pre&gt;&lt;code" Score="1" />',  # noqa: E501
    "odd_entities": '<row Id="9000" PostTypeId="2" ParentId="1" Body="&amp;#xd800; &amp;#0;" Score="1" />',  # noqa: E501
    "other_element": "<other />",
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_an_odd_row_is_skipped_or_used(
    ends: Ends, config_file: Path, tmp_path: Path, name: str
) -> None:
    posts = tmp_path / "Posts.xml"
    posts.write_bytes(dump(*rows(), ODD_ROWS[name]))
    run = tmp_path / "run"
    ends("prepare", config_file, f"prepare.posts={posts}", f"run.dir={run}", codes=(0,))
    summary = json.loads((run / "prepare" / "summary.json").read_text(encoding="utf-8"))
    assert summary["questions"] >= NUM_QUESTIONS - 1
