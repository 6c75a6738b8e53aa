"""Takes passwords out of URLs: what is shown, logged, written or passed in argv holds none."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

_UP_TO_PASSWORD = re.compile(r"(?i)[a-z][a-z0-9+.-]{0,31}://[^:/@]*:")
_IN_QUERY = re.compile(r"(?P<mark>[?&])password=[^&]*(?P<more>&?)")


def remove_passwords(text: str) -> str:
    """Returns a text without the passwords of the URLs in it.

    >>> remove_passwords("redis://me:secret@host/0 and redis://:secret@host, unix:///run/redis?db=1&password=secret")
    'redis://me@host/0 and redis://host, unix:///run/redis?db=1'
    """
    return "".join(_remove_from_word(word) for word in re.split(r"""([\s"']+)""", text))


def split_password(url: str) -> tuple[str, str | None]:
    """Returns a URL without its password, and the password; None when it has none."""
    try:
        parts = urlsplit(url)
        password = unquote(parts.password) if parts.password else None
        asked = parse_qs(parts.query).get("password")
    except ValueError:
        return remove_passwords(url), None
    return remove_passwords(url), asked[0] if asked else password


def add_password(url: str, password: str) -> str:
    """Returns a URL with a password in it, for the library that opens it."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def _remove_from_word(word: str) -> str:
    # A folder of runs may hold anything, so the time must not grow faster than the text: no pattern looks for the @.
    end = word.rfind("@")
    if end >= 0 and (found := _UP_TO_PASSWORD.search(word, 0, end)):
        start = found[0][:-1]
        word = word[: found.start()] + (start if start.endswith("://") else f"{start}@") + word[end + 1 :]
    return _IN_QUERY.sub(lambda found: found["mark"] if found["more"] else "", word)
