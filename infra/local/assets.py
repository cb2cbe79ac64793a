"""The page's files, read once at start: a fixed table, so that no request can name anything else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

WEB = Path(__file__).resolve().parents[2] / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
REVALIDATE = "no-cache"
FOR_GOOD = "public, max-age=31536000, immutable"  # the address carries the version


@dataclass(frozen=True, slots=True)
class Asset:
    """A file and what is said with it."""

    body: bytes
    media_type: str
    cache_control: str
    etag: str

    def answer(self, request: Request, status: int = 200) -> Response:
        """The file, or 304 where the browser has it. A status other than 200 is never answered from a cache."""
        if status != 200:
            return Response(self.body, status, {"cache-control": "no-store"}, self.media_type)
        headers = {"cache-control": self.cache_control, "etag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, status, headers, self.media_type)


def load_assets(web: Path = WEB) -> dict[str, Asset]:
    """Everything below web/page and web/vendor that a browser may ask for, by address. Raises OSError."""
    return {
        f"/{path.relative_to(web).as_posix()}": _load(path, cache)
        for folder, cache in (("page", REVALIDATE), ("vendor", FOR_GOOD))
        for path in sorted((web / folder).rglob("*"))
        if path.suffix in TYPES and path.is_file()
    }


def _load(path: Path, cache_control: str) -> Asset:
    body = path.read_bytes()
    return Asset(body, TYPES[path.suffix], cache_control, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
