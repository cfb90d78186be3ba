"""What may be shown: what counts as a secret, and which characters a terminal gets.

A secret is known by the name of its key or environment variable, by its shape (the prefixes of
well-known services, a login or key in an address), or because this process has read it.
"""

import json
import os
import re
from collections.abc import Iterator
from urllib.parse import quote

HIDDEN = "..."

_ALWAYS = re.compile(
    r"(password|passwd|passphrase|passcode|secret|credential|apikey|authori[sz]ation|bearer|cookie"
    r")s?$|^(pwd|pw|jwt|dsn|pat|webhook|sig)$"
)
"""Words of a name whose value is secret, number or text."""
_KEYS = re.compile(
    r"\bamz (signature|credential)\b|\b(api|access|secret|private|auth|signing|encryption|ssh"
    r"|service|account|master|deploy) (keys?|tokens)\b"
)
_LAST = re.compile(r"(token|auth|key|pass)$")
_NOT_LAST = re.compile(
    r"\b(eos|bos|pad|unk|sep|cls|mask|image|audio|video|stop|start|end|special|cache|sort|group|"
    r"partition|primary|foreign|label|column|per|row|text|input|output|prompt|image|message|messages|"
    r"answer|query|by) (token|key)$|(^| )(monkey|hotkey|bypass|compass)$"
)
_HARMLESS_ENDS = re.compile(
    r" (file|path|dir|folder|env|mode|type|url|uri|sock|socket|host|port|method|timeout|s)$"
)

_SHELLS = ("PWD", "OLDPWD")
"""The working folder, not a password."""

_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*-----|\Z)"
    r"|\b(sk-(?=[\w-]*\d)[\w-]{16,}|hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}"
    r"|AIza[\w-]{30,}|nvapi-[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
    r"|(?<=\bBearer )\S{6,}|(?<=\bBasic )[A-Za-z0-9+/=]{8,}",
    re.DOTALL,
)
_LOGIN = re.compile(r"(?<=://)[^/?#\s]+(?=@)")
_PARAMETER = re.compile(r"(?<=[?&;])([\w.-]+)=([^&;#\s'\"]+)")

_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""All but tab and line feed: C0, DEL, C1, marks of direction, half characters."""

_LEAST_LENGTH = 8
"""Shorter values are words such as EMPTY, which occur in any message."""

_read: set[str] = set()


def remember(secret: str) -> None:
    """Hide a secret that this process has read, whatever its variable is called."""
    if len(secret) >= _LEAST_LENGTH:
        _read.add(secret)


def is_secret(name: str, value: object = "x") -> bool:
    """Return whether a key's name says that its value is a secret.

    ``token: true`` asks for the login of this machine, and ``max_tokens: 5`` is a number: only text
    is a token or key, but a password may be digits.
    """
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    words = " ".join(parts).lower()
    if name in _SHELLS:
        return False
    if value is None or isinstance(value, bool) or value == "" or _HARMLESS_ENDS.search(words):
        return False
    if any(_ALWAYS.search(word) for word in words.split()) or _KEYS.search(words):
        return True
    if not isinstance(value, str) or value.isdigit() or _NOT_LAST.search(words):
        return False
    return bool(_LAST.search(words)) or "token" in words.split()[:-1]


def holds_secret(text: str) -> bool:
    """Return whether a text looks like a known kind of key, or is an address with a login."""
    is_address = re.fullmatch(r"\w[\w+.-]*://\S+", text) is not None
    return bool(_SHAPES.search(text)) or (is_address and _without_addresses(text) != text)


def redacted(text: str) -> str:
    """Return a text without the secrets known to this process, or known by their shape."""
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return without_shapes(text)


def printable(text: str) -> str:
    """Return a text for a terminal, with control characters spelled out as in JSON.

    Answers, file names and messages of servers may hold escape sequences, which would move the
    cursor, set the title or write to the clipboard; and marks that turn the order of characters.
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found.group()):04x}", text.replace("\r\n", "\n"))


def without_shapes(text: str) -> str:
    """Return a text without what looks like a key, and without logins and keys in addresses."""
    return _SHAPES.sub(HIDDEN, _without_addresses(text))


def _without_addresses(text: str) -> str:
    def hide(match: re.Match[str]) -> str:
        name, value = match.groups()
        return f"{name}={HIDDEN}" if is_secret(name, value) else match.group()

    return _PARAMETER.sub(hide, _LOGIN.sub(HIDDEN, text))


def _known() -> Iterator[str]:
    """Yield every secret that was read or stands in the environment, as texts may show it."""
    exported = {
        value.strip()
        for name, value in os.environ.items()
        if len(value.strip()) >= _LEAST_LENGTH and is_secret(name, value)
    }
    for secret in exported | _read:
        yield from (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1])
        yield from (line for line in secret.splitlines() if len(line) >= _LEAST_LENGTH)
