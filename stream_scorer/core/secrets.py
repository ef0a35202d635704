"""What must never be shown: words that mark a secret's name, and URLs with credentials in them."""

from __future__ import annotations

import re

SECRET_WORDS = ("password", "secret", "token", "jaas", "private", "key.pem", "oauthbearer")
MASK = "********"
_QUERY = re.compile(r"([?&](?:password|username)=)[^&]*")


def is_secret(name: str) -> bool:
    """Whether a setting or a log field of this name holds a secret."""
    return any(word in name.lower() for word in SECRET_WORDS)


def mask_url(url: str) -> str:
    """The URL without its password, wherever it stands in it: safe to print."""
    url = _QUERY.sub(rf"\1{MASK}", url)
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{credentials.partition(':')[0]}:{MASK}@{host}" if at else url
