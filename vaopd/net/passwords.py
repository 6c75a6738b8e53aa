"""Takes passwords out of URLs: what is shown, logged, written or passed in argv holds none."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

_BEFORE_HOST = re.compile(r"""(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^\s:/@"']*):[^\s"']*@""")
_IN_QUERY = re.compile(r"""(?P<mark>[?&])password=[^\s&"']*(?P<more>&?)""")


def remove_passwords(text: str) -> str:
    """Returns a text without the passwords of the URLs in it.

    >>> remove_passwords("redis://me:secret@host/0 and redis://:secret@host, unix:///run/redis?db=1&password=secret")
    'redis://me@host/0 and redis://host, unix:///run/redis?db=1'
    """
    return "".join(_remove_from_word(word) for word in re.split(r"(\s+)", text))


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
    word = _BEFORE_HOST.sub(lambda found: found["scheme"] + (f"{found['user']}@" if found["user"] else ""), word)
    return _IN_QUERY.sub(lambda found: found["mark"] if found["more"] else "", word)
