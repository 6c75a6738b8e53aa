"""Takes passwords out of URLs: what is shown, logged, written or passed in argv holds none."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

_UP_TO_PASSWORD = re.compile(r"(?i)[a-z][a-z0-9+.-]{0,31}://[^:/@]*:")
# Of a URL in quotes the last one is not the password's.
_IN_QUERY = re.compile(r"(?i)(?P<mark>[?&])password=[^&]*?(?P<more>&|(?=[\"']?$))")


def remove_passwords(text: str) -> str:
    """Returns a text without the passwords of the URLs in it.

    >>> remove_passwords("redis://me:secret@host/0 and redis://:secret@host, unix:///run/redis?db=1&password=secret")
    'redis://me@host/0 and redis://host, unix:///run/redis?db=1'
    """
    return "".join(map(_remove_from_word, re.split(r"(\s+)", text)))


def split_password(url: str) -> tuple[str, str | None]:
    """Returns a URL without its password, and the password; None when it has none.

    Raises ValueError, which quotes nothing, where a character of the password ends it: it would be shown, or be lost.
    """
    rest = remove_passwords(url)
    try:
        parts = urlsplit(url)
        password = unquote(parts.password or "") or next(iter(parse_qs(parts.query).get("password", ())), None)
    except ValueError:
        password = None
    if re.search(r"\s", url) or (rest != url and not password):
        raise ValueError(
            "write spaces, and each character of the password other than letters, digits, '-', '.', '_' and '~', as % "
            "and two hexadecimal digits (%2F for /, %40 for @), or put the password into queue.password_file"
        )
    return rest, password


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
