import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.data.stack_exchange import archives
from rlhf_ray.data.stack_exchange.archives import site_name, unpacked
from rlhf_ray.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("dumps/ai.stackexchange.com.7z", "ai.stackexchange.com"),
        ("stackoverflow.com-Posts.7z", "stackoverflow.com"),
        ("/dumps/mathoverflow.net/Posts.xml", "mathoverflow.net"),
        ("/dumps/mine.7z", None),
        ("/dumps/coffee/Posts.xml", None),
    ],
)
def test_the_site_is_told_by_the_name(path: str, site: str | None) -> None:
    assert site_name(Path(path)) == site


def test_a_plain_file_is_taken_as_it_is(tmp_path: Path) -> None:
    with unpacked(tmp_path / "Posts.xml", tmp_path) as file:
        assert file == tmp_path / "Posts.xml"


def test_posts_are_unpacked_for_as_long_as_they_are_read(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "site.7z", "w") as archive:
        archive.writestr("<posts/>", "Posts.xml")
        archive.writestr("<users/>", "Users.xml")
    work = tmp_path / "work"
    work.mkdir()
    with unpacked(tmp_path / "site.7z", work) as file:
        assert file.read_text() == "<posts/>"
        assert [path.name for path in file.parent.iterdir()] == ["Posts.xml"]
    assert not list(work.iterdir())


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "users.7z", "w") as archive:
        archive.writestr("<users/>", "Users.xml")
    (tmp_path / "broken.7z").write_bytes(b"no archive")
    for name, message in (
        ("users.7z", r"holds no Posts\.xml but Users\.xml"),
        ("broken.7z", "is broken or no 7z archive"),
        ("nowhere.7z", "Cannot read .*No such file"),
    ):
        with pytest.raises(DataError, match=message), unpacked(tmp_path / name, tmp_path):
            pass


def test_an_archive_with_flipped_bytes(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    path = tmp_path / "site.7z"
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.writestr("".join(f"<row {number**5}/>" for number in range(5000)), "Posts.xml")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(byte ^ 0x55 for byte in content[middle : middle + 16])
    path.write_bytes(content)
    with (
        pytest.raises(DataError, match=r"site\.7z is broken .*download it again"),
        unpacked(path, tmp_path),
    ):
        pass


def test_an_archive_with_a_password(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "site.7z", "w", password="x") as archive:
        archive.writestr("<posts/>", "Posts.xml")
    with (
        pytest.raises(DataError, match=r"site\.7z is locked by a password"),
        unpacked(tmp_path / "site.7z", tmp_path),
    ):
        pass


def test_without_py7zr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with (
        pytest.raises(ConfigError, match=r"needs py7zr: pip install 'rlhf-ray\[7z\]'"),
        unpacked(tmp_path / "site.7z", tmp_path),
    ):
        pass


def test_an_archive_that_expands_beyond_reason_or_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    py7zr = pytest.importorskip("py7zr")
    path = tmp_path / "bomb.7z"
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.writestr("x" * 5_000_000, "Posts.xml")
    monkeypatch.setattr(archives, "LEAST_BYTES", 10**6)
    message = r"Posts\.xml would have 0\.0 GB, \d{4,} times the archive"
    with pytest.raises(DataError, match=message), unpacked(path, tmp_path):
        pass
    monkeypatch.setattr(archives, "LEAST_BYTES", 10**9)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000))
    with pytest.raises(DataError, match=r"0\.0 GB free; free space"), unpacked(path, tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.7z"]
