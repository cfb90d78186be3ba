import gzip
import random
import sys
import threading
from pathlib import Path

import pytest

from rlhf_ray.data.stack_exchange import archives
from rlhf_ray.data.stack_exchange.archives import num_xml_bytes, site_name, unpacked
from rlhf_ray.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("dumps/ai.stackexchange.com.7z", "ai.stackexchange.com"),
        ("stackoverflow.com-Posts.7z", "stackoverflow.com"),
        ("/dumps/mathoverflow.net/Posts.xml", "mathoverflow.net"),
        ("/dumps/mine.7z", None),
        ("s3://dumps/ai.stackexchange.com/Posts.xml.zst", "ai.stackexchange.com"),
        ("ai.stackexchange.com-Posts.xml.gz", "ai.stackexchange.com"),
        ("/dumps/coffee/Posts.xml", None),
    ],
)
def test_the_site_is_told_by_the_name(path: str, site: str | None) -> None:
    assert site_name(path) == site


def test_posts_are_unpacked_while_they_are_read(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    xml = random.Random(0).randbytes(4_500_000).hex().encode()
    stored = [{"id": py7zr.FILTER_COPY}]
    with py7zr.SevenZipFile(tmp_path / "site.7z", "w", filters=stored) as archive:
        archive.writestr("<badges/>", "Badges.xml")
        archive.writestr(xml, "Posts.xml")
        archive.writestr("<users/>", "Users.xml")
    path = str(tmp_path / "site.7z")
    assert num_xml_bytes(path) == len(xml)
    chunks = unpacked(path)
    first = next(chunks)
    assert len(first) < len(xml) / 2
    assert first + b"".join(chunks) == xml
    assert [item.name for item in tmp_path.iterdir()] == ["site.7z"]


def test_an_archive_that_nobody_reads_on_is_closed(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "site.7z", "w") as archive:
        archive.writestr(bytes(30_000_000), "Posts.xml")
    chunks = unpacked(str(tmp_path / "site.7z"))
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "unpack"]


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "users.7z", "w") as archive:
        archive.writestr("<users/>", "Users.xml")
    (tmp_path / "broken.7z").write_bytes(b"no archive")
    (tmp_path / "broken.zst").write_bytes(b"no archive")
    for name, message in (
        ("users.7z", r"holds no Posts\.xml but Users\.xml"),
        ("broken.7z", "is broken or no 7z archive"),
        ("broken.zst", r"broken\.zst is broken or cut off"),
        ("nowhere.7z", "Cannot read .*No such file"),
    ):
        with pytest.raises(DataError, match=message):
            list(unpacked(str(tmp_path / name)))


def test_an_archive_with_flipped_bytes(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    path = tmp_path / "site.7z"
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.writestr("".join(f"<row {number**5}/>" for number in range(5000)), "Posts.xml")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(byte ^ 0x55 for byte in content[middle : middle + 16])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"site\.7z is broken .*download it again"):
        list(unpacked(str(path)))


def test_an_archive_with_a_password(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "site.7z", "w", password="x") as archive:
        archive.writestr("<posts/>", "Posts.xml")
    with pytest.raises(DataError, match=r"site\.7z is locked by a password"):
        list(unpacked(str(tmp_path / "site.7z")))


def test_without_py7zr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.7z").write_bytes(b"7z")
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(ConfigError, match=r"needs py7zr: pip install 'rlhf-ray\[7z\]'"):
        num_xml_bytes(str(tmp_path / "site.7z"))


@pytest.mark.parametrize("suffix", ["7z", "gz"])
def test_an_archive_that_expands_beyond_reason_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    py7zr = pytest.importorskip("py7zr")
    path = tmp_path / f"bomb.{suffix}"
    if suffix == "7z":
        with py7zr.SevenZipFile(path, "w") as archive:
            archive.writestr("x" * 5_000_000, "Posts.xml")
    else:
        path.write_bytes(gzip.compress(b"x" * 5_000_000))
    monkeypatch.setattr(archives, "LEAST_BYTES", 10**6)
    with pytest.raises(DataError, match=r"expands to more than 0\.0 GB"):
        list(unpacked(str(path)))


def test_addresses_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot open nowhere://bucket/Posts"):
        num_xml_bytes("nowhere://bucket/Posts.xml")
    with pytest.raises(DataError, match=r"Cannot read file://.*Posts\.xml: No such file"):
        num_xml_bytes(f"file://{tmp_path}/Posts.xml")
