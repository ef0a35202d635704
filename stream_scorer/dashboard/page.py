"""The page as files: no build step, no other host. Whoever serves it must also serve ``events`` beside it.

``GET /events`` is a stream of `stream_scorer.dashboard.snapshot.to_event` (``text/event-stream``, ``Cache-Control:
no-store``). A server that first replays its last few minutes of snapshots gives a page opened late its charts; the
page drops what it has already drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

STATIC: Path = Path(__file__).parent / "static"

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

CONTENT_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    "": "text/plain; charset=utf-8",
}


class Asset(NamedTuple):
    """One file of the page."""

    content_type: str
    body: bytes


def assets() -> dict[str, Asset]:
    """URL path -> file, read now; ``/`` is the page itself. Raises OSError when the installation is incomplete."""
    found = {
        f"/{path.relative_to(STATIC).as_posix()}": Asset(CONTENT_TYPES[path.suffix], path.read_bytes())
        for path in sorted(STATIC.rglob("*"))
        if path.is_file()
    }
    return {"/": found["/index.html"], **found}
