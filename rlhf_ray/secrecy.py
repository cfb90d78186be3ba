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
    r"|service|account|master|deploy) (keys?|tokens)\b|\bauth headers?\b|\bconnection string\b"
)
_LAST = re.compile(r"(token|auth|key|pass)$")
_NOT_LAST = re.compile(
    r"\b(eos|bos|eot|eoi|boi|pad|unk|sep|cls|mask|image|audio|video|stop|start|end|special|next|new"
    r"|chat|think|call|turn|cache|sort|group|partition|primary|foreign|public|registry|dict|id|index"
    r"|label|column|columns|field|row|text|input|output|prompt|message|messages|content|role|turns"
    r"|conversation|conversations|answer|response|query|question|reference|source|dataset|data|split"
    r"|chosen|rejected|score|reward|per|by|fn|implicit|assistant|system|human|tool|function"
    r"|observation|thinking|reasoning|generation|placeholder|separator|delimiter|boundary|prefix"
    r"|suffix|middle|fim|newline|vision|patch|frame|sink|attention|lookup) (token|key)$"
    r"|(^| )(monkey|hotkey|pkey|bypass|compass|askpass|(first|forward|backward|num|single) pass)$"
)
_HARMLESS_ENDS = re.compile(
    r" (file|path|dir|folder|env|mode|type|url|uri|sock|socket|host|port|method|timeout|s|ids|level"
    r"|count|limit|budget|classification|name)$"
)
_HARMLESS_TEXT = re.compile(r"<.*>|\[\w+\]|\d+|true|false|yes|no|on|off", re.IGNORECASE | re.DOTALL)
"""What a token or key never is: a special token of a tokenizer, a number, a switch."""

_SHELLS = ("PWD", "OLDPWD")
"""The working folder, not a password."""

_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*-----|\Z)"
    # Not sk-models-2024-final, as data of Slovak are called.
    r"|\bsk-((proj|ant|or|svcacct)-|(?=[\w-]{0,99}\d)(?!([a-z]+|\d{1,8})(-([a-z]+|\d{1,8})){0,20}(?![\w-])))"
    r"[\w-]{16,}"
    r"|\b(hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}"
    r"|AIza[\w-]{30,}|nvapi-[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|(gsk|r8|npm|dckr_pat|dop_v1|[sr]k_live|[sr]k_test)_[A-Za-z0-9]{16,}"
    r"|(xai|pplx|tvly|pypi)-(?=[\w-]*\d)[\w-]{24,}|ya29\.[\w-]{16,}|SG\.[\w-]{16,}\.[\w-]{16,})"
    r"|(?<=hooks\.slack\.com/services/)\S+"
    # In a sentence, "Bearer tokens" and "Basic questions" are words.
    r"|(?<=\b(?i:bearer) )(?=\S*\d)\S{6,}|\A(?i:bearer) \S{6,}\Z"
    r"|(?<=[\"'](?i:bearer) )[^\s\"']{6,}(?=[\"'])|(?<=\b(?i:authorization): )(?i:bearer|basic) \S+"
    r"|(?<=\b(?i:basic) )(?=\S*(\d|[a-z][A-Z]))([A-Za-z0-9+/]{4})+"
    r"([A-Za-z0-9+/]{2}(==|[A-Za-z0-9+/]=))?(?![\w+/=])",
    re.DOTALL,
)
_LOGIN = re.compile(
    r"(?<=://)([^/?#\s:@]*:[^/?#\s]*|(?<!abfs://)(?<!abfss://)(?<!wasbs://)[^/?#\s]+)(?=@)"
)
"""In addresses of Azure's storage a container stands there."""
_PARAMETER = re.compile(r"(?<=[?&;#])([\w.-]+)(=)([^&;#\s'\"]+)")
_QUOTED_PARAMETER = re.compile(
    r"(?:(?<=%3F)|(?<=%3f)|(?<=%26))([\w.-]+)(%3[Dd])((?:(?!%26|%23)[^&;#\s'\"])+)"
)
"""Of an address that is itself a parameter: ``?next=http%3A%2F%2Fh%2F%3Ftoken%3Da``."""
_ASSIGNED = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]+)(?P<sign>[\"']?\s*(=|:(?=[\s\"']))\s*[\"']?)"
    r"((?=[^\s\"']{0,99}\d)[^\s\"',;&)}\]]{8,})"
)
"""``api_key: abcdefg1``, as texts of libraries quote headers, files and JSON."""

_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""All but tab and line feed: C0, DEL, C1, marks of direction, half characters."""

_LEAST_LENGTH = 8
"""Shorter values may be words such as EMPTY, or numbers, which occur in any message."""
_SHORT = re.compile(r"(?=.*[^\W\d])(?=.*[\d\W])\S{4,7}")
"""What a shorter secret looks like, such as hunter2: letters with digits or signs."""

_read: set[str] = set()


def remember(secret: str) -> None:
    """Hide a secret that this process has read, whatever its variable is called."""
    if len(secret) >= _LEAST_LENGTH or _SHORT.fullmatch(secret):
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
    if not isinstance(value, str) or _HARMLESS_TEXT.fullmatch(value) or _NOT_LAST.search(words):
        return False
    return bool(_LAST.search(words)) or "token" in words.split()[:-1]


def holds_secret(text: str) -> bool:
    """Return whether a text looks like a known kind of key, or is an address with a login."""
    if _SHAPES.search(text):
        return True
    if re.fullmatch(r"\w[\w+.-]*://\S+", text):
        return _without_addresses(text) != text
    return _ASSIGNED.fullmatch(text) is not None and without_shapes(text) != text


def redacted(text: str) -> str:
    """Return a text without the secrets known to this process, or known by their shape."""
    for secret in sorted(_known(), key=len, reverse=True):
        if len(secret) >= _LEAST_LENGTH:
            text = text.replace(secret, HIDDEN)
        else:  # not as a part of another word
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return without_shapes(text)


def printable(text: str) -> str:
    """Return a text for a terminal, with control characters spelled out as in JSON.

    Answers, file names and messages of servers may hold escape sequences, which would move the
    cursor, set the title or write to the clipboard; and marks that turn the order of characters.
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found.group()):04x}", text.replace("\r\n", "\n"))


def without_shapes(text: str) -> str:
    """Return a text without what looks like a key, and without logins and keys in addresses."""

    def hide(found: re.Match[str]) -> str:
        name, sign = found.group("name", "sign")
        # Of names such as key and token, which rows of data have as well, no text is judged.
        return f"{name}{sign}{HIDDEN}" if is_secret(name, 1) else found.group()

    return _ASSIGNED.sub(hide, _SHAPES.sub(HIDDEN, _without_addresses(text)))


def _without_addresses(text: str) -> str:
    def hide(match: re.Match[str]) -> str:
        name, sign, value = match.groups()
        return f"{name}{sign}{HIDDEN}" if is_secret(name, value) else match.group()

    return _PARAMETER.sub(hide, _QUOTED_PARAMETER.sub(hide, _LOGIN.sub(HIDDEN, text)))


def _known() -> Iterator[str]:
    """Yield every secret that was read or stands in the environment, as texts may show it."""
    exported = {
        text
        for name, value in os.environ.items()
        if (len(text := value.strip()) >= _LEAST_LENGTH or _SHORT.fullmatch(text))
        and is_secret(name, value)
    }
    for secret in exported | _read:
        yield from (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1])
        yield from (line for line in secret.splitlines() if len(line) >= _LEAST_LENGTH)
