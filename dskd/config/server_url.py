"""The URL of a server that writes texts (`corpus.server`): its check, and its form for people, manifests and logs.

A URL can hold a key: as a password, after a `?`, or in its path. The first two are refused, in messages that do not
repeat the value; a path is shown only if all its parts are common ones, and otherwise a digest stands for it.
"""

import hashlib
import ipaddress
import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, PlainSerializer

# The environment variable with the key that a server of `corpus.server` asks for. It is in no file.
SERVER_KEY_VARIABLE = "DSKD_SERVER_KEY"
_EXPECTED = "expected http://HOST:PORT or https://HOST/PATH, such as http://localhost:8000/v1"
_NAME_OF_HOST = re.compile(r"[\w-]+(?:\.[\w-]+)*\.?")
_ENDPOINTS = ("/chat/completions", "/completions", "/models")  # what requests add to the URL, or a user may copy
# Parts of a path that tell nobody's key.
_COMMON_PARTS = re.compile(r"v\d{1,2}(?:alpha|beta)?\d?|api|openai|inference|compatible-mode|serve|llm")


def shown_url(url: str) -> str:
    """Returns a URL for manifests, logs and messages: a path with other than common parts becomes a digest of it."""
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if not path or all(map(_COMMON_PARTS.fullmatch, path.split("/"))):
        return url
    digest = hashlib.sha256(parts.path.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{parts.scheme}://{parts.netloc}/path-{digest[:12]}"


def _checked(url: str) -> str:
    """Returns the URL without slashes at its end. No message repeats it, since it may hold a key."""
    if re.search(r"[\s\x00-\x1f\x7f\\]", url):
        raise ValueError(f"the URL has a space, a line break or a \\; {_EXPECTED}")
    try:
        parts = urlsplit(url)
        has_host = _is_host(parts)
    except ValueError:
        raise ValueError(f"the URL has a [ or ] that does not enclose an IPv6 address; {_EXPECTED}") from None
    if "@" in parts.netloc:
        raise ValueError(
            "the URL has a user or a password, which manifests and logs would show; write it without, and set the key "
            f"in the environment variable {SERVER_KEY_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"this is not a server URL; {_EXPECTED}")
    if parts.query or parts.fragment or url[-1] in "?#":
        raise ValueError(
            f"the URL has a ? or a #; expected the address alone, such as http://localhost:8000/v1. If a key follows, "
            f"set it in the environment variable {SERVER_KEY_VARIABLE}"
        )
    if not has_host:
        raise ValueError(f"the URL has no name or address of a host that could exist; {_EXPECTED}")
    if not _is_port(parts):
        raise ValueError(f"the port in the URL is not a number from 1 to 65535; {_EXPECTED}")
    url = url.rstrip("/")
    for endpoint in _ENDPOINTS:
        if url.endswith(endpoint):
            right = shown_url(url.removesuffix(endpoint))
            raise ValueError(f"dskd adds {endpoint} to the URL itself; write the URL without it: {right}")
    return url


def _is_host(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    if "[" in parts.netloc:
        ipaddress.IPv6Address(host)  # raises a ValueError
        return True
    return _NAME_OF_HOST.fullmatch(host) is not None


def _is_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0 and not parts.netloc.endswith(":")
    except ValueError:
        return False


ServerUrl = Annotated[str, AfterValidator(_checked), PlainSerializer(shown_url, when_used="json")]
