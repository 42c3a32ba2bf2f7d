"""Keep secrets out of what leaves the server: replace them, and find a part of one."""

import functools
import json
import re
from urllib.parse import quote, unquote

# So many characters of a secret in a row are a part of it, and not a coincidence.
_PART_LENGTH = 12


def scrub(text: str, secrets: tuple[str, ...]) -> str:
    """Return the text with the secrets in it replaced by `***`.

    In whatever case, and as they are written in an address, in JSON and by repr().
    """
    lower = text.lower()
    # To look for the words is fifty times as quick. Outside ASCII, more than lower() is alike.
    if lower.isascii() and not any(word in lower for word in _spellings(secrets)):
        return text
    return _any_spelling(secrets).sub("***", text)


def reveals_secret(text: str, secrets: tuple[str, ...]) -> bool:
    """Return whether a text repeats a secret or a part of one that is worth guarding.

    A part is _PART_LENGTH characters; blanks between them, percent signs, backslashes and
    case make no difference.
    """
    skeleton = _skeleton(text)
    return any(
        secret[start : start + _PART_LENGTH] in skeleton
        for secret in map(_skeleton, secrets)
        for start in range(len(secret) - _PART_LENGTH + 1)
    )


@functools.cache
def _any_spelling(secrets: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(_spellings(secrets), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)


@functools.cache
def _spellings(secrets: tuple[str, ...]) -> frozenset[str]:
    """Return the secrets as they may be written, in lower case."""
    return frozenset(
        spelling.lower()
        for secret in secrets
        for spelling in (
            *(secret, quote(secret), quote(secret, safe="")),
            *(json.dumps(secret)[1:-1], repr(secret)[1:-1]),
        )
    )


def _skeleton(text: str) -> str:
    """Return the letters, digits and signs of a text, whatever was put between them."""
    return re.sub(r"[^!-~]|\\", "", unquote(text)).lower()
