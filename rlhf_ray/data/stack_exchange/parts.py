"""Parts of dumps: ranges of their XML that can be read apart."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from rlhf_ray.config.data import part_bytes
from rlhf_ray.data.stack_exchange import archives

_ROW = re.compile(rb"<row[\s/>]")
_TAG = len(b"<row ")
_CHUNK = 2**20
_HEAD = 4096
_ENCODING = re.compile(rb"""encoding=["']([\w.-]+)""")


@dataclass(frozen=True)
class Part:
    """A range of a dump's XML; it holds the rows that begin in it."""

    dump: int
    """Index of the dump."""
    number: int
    """Index of the part in it."""
    path: str
    start: int
    """In bytes of the XML."""
    stop: int | None
    """None: to the end."""

    @property
    def name(self) -> str:
        """Name of the part among those of all dumps."""
        return f"{self.dump:04d}-{self.number:05d}"

    def xml(self) -> Iterator[bytes]:
        """Yield its XML in chunks, a whole document; nothing where no row begins in it."""
        if archives.suffix(self.path):
            yield from _xml(_Scanner(archives.unpacked(self.path), 0), self)
            return
        with archives.opened(self.path) as file:
            file.seek(self.start)
            yield from _xml(_Scanner(iter(lambda: file.read(_CHUNK), b""), self.start), self)


@dataclass(frozen=True)
class Dump:
    """The posts of one site."""

    index: int
    path: str
    num_bytes: int
    """Of the XML; estimated for an archive that doesn't tell."""
    step: int | None
    """Bytes of a part; None: it cannot be cut, as it is not UTF-8 or declares entities."""

    @property
    def is_streamed(self) -> bool:
        """Whether its parts can only be had one after the other: by unpacking all before them."""
        return bool(archives.suffix(self.path)) and self.step is not None

    def parts(self) -> list[Part]:
        """Return its parts; of a streamed one their number is an estimate."""
        step = self.step or self.num_bytes
        return [self._part(number) for number in range(math.ceil(self.num_bytes / step))]

    def pieces(self) -> Iterator[tuple[Part, Iterator[bytes]]]:
        """Yield each part with its XML, which is lost when the next one is taken."""
        if not self.is_streamed:
            yield from ((part, part.xml()) for part in self.parts())
            return
        scanner = _Scanner(archives.unpacked(self.path), 0)
        for number in count():
            part = self._part(number)
            xml = _xml(scanner, part)
            yield part, xml
            for _ in xml:
                pass
            if scanner.has_ended:
                return

    def _part(self, number: int) -> Part:
        if self.step is None:
            return Part(self.index, 0, self.path, 0, None)
        start = number * self.step
        return Part(self.index, number, self.path, start, start + self.step)


def find_dumps(paths: Sequence[str]) -> list[Dump]:
    """Look at the sizes of dumps, and at how they begin.

    Raises:
        DataError: a file is missing, empty or a broken archive.
        ConfigError: a package to read it is missing.
    """
    sizes = [archives.num_xml_bytes(path) for path in paths]
    step = part_bytes(sum(sizes))
    return [
        Dump(index, path, size, step if _can_be_cut(path) else None)
        for index, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]


def num_buckets(dumps: Sequence[Dump]) -> int:
    """Return into how many buckets the posts of dumps are grouped: each is as large as a part."""
    total = sum(dump.num_bytes for dump in dumps)
    return math.ceil(total / part_bytes(total))


def _can_be_cut(path: str) -> bool:
    """Return whether rows can be told from what is between them without reading all before."""
    if archives.suffix(path):
        head = next(archives.unpacked(path), b"")[:_HEAD]
    else:
        with archives.opened(path) as file:
            head = file.read(_HEAD)
    encoding = _ENCODING.search(head)
    is_utf8 = encoding is None or encoding[1].lower() in (b"utf-8", b"utf8")
    before, tag, _ = head.partition(b"<row")
    return is_utf8 and bool(tag) and b"<posts>" in before and b"<!" not in before


class _Scanner:
    """The XML of a dump from a position on."""

    def __init__(self, chunks: Iterator[bytes], position: int) -> None:
        self.position = position
        self.has_ended = False
        self._chunks = chunks
        self._buffer = b""

    def until(self, stop: int | None) -> Iterator[bytes]:
        """Yield what comes before the first row that begins at ``stop`` or after."""
        while not self.has_ended:
            first = max(0, stop - self.position) if stop is not None else len(self._buffer)
            found = _ROW.search(self._buffer, first)
            if found:
                yield self._take(found.start())
                return
            # What may be the beginning of a row's tag stays.
            yield self._take(max(0, len(self._buffer) - _TAG + 1))
            chunk = next(self._chunks, b"")
            self._buffer += chunk
            self.has_ended = not chunk
        yield self._take(len(self._buffer))

    def _take(self, num_bytes: int) -> bytes:
        taken, self._buffer = self._buffer[:num_bytes], self._buffer[num_bytes:]
        self.position += num_bytes
        return taken


def _xml(scanner: _Scanner, part: Part) -> Iterator[bytes]:
    if part.start:
        for _ in scanner.until(part.start):
            pass
        if scanner.has_ended or (part.stop is not None and scanner.position >= part.stop):
            return
        yield b"<posts>"
    yield from scanner.until(part.stop)
    if not scanner.has_ended:
        yield b"</posts>"
