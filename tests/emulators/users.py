"""Firestore as a browser's user sees it: over REST, under the rules, with an unsigned token."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx

import infra.firestore
from infra.adapters.firebase_token import unsigned

RULES = Path(infra.firestore.__file__).with_name("firestore.rules")


def id_token(project: str, user: str, *, admin: bool = False) -> str:
    """What Firebase gives for a custom token; the emulator does not check the signature."""
    now = int(time.time())
    payload: dict[str, Any] = {
        "iss": f"https://securetoken.google.com/{project}",
        "aud": project,
        "sub": user,
        "user_id": user,
        "iat": now,
        "exp": now + 3600,
        "firebase": {"sign_in_provider": "custom", "identities": {}},
    }
    return unsigned(payload | ({"admin": True} if admin else {}))


async def load_rules(client: httpx.AsyncClient, project: str) -> None:
    """Put our rules in force in one project of the emulator."""
    files = [{"name": "firestore.rules", "content": RULES.read_text()}]
    answer = await client.put(f"/emulator/v1/projects/{project}:securityRules", json={"rules": {"files": files}})
    assert answer.is_success, answer.text


class Caller:
    """Somebody with a token, or with none; each method says whether it was allowed."""

    def __init__(self, client: httpx.AsyncClient, project: str, token: str | None) -> None:
        self._client = client
        self._documents = f"/v1/projects/{project}/databases/(default)/documents"
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}

    async def get(self, path: str) -> bool:
        """Read one document."""
        return await self._allowed("GET", f"/{path}")

    async def list(self, path: str) -> bool:
        """Read the collection that a document is in, whole."""
        return await self._query(path, None)

    async def list_own(self, path: str, user: str) -> bool:
        """Read those of the collection whose userId is `user`."""
        condition = {"field": {"fieldPath": "userId"}, "op": "EQUAL", "value": {"stringValue": user}}
        return await self._query(path, {"fieldFilter": condition})

    async def create(self, path: str) -> bool:
        """Create a document beside the one of that path."""
        collection, _, name = path.rpartition("/")
        return await self._allowed("POST", f"/{collection}", {"documentId": name + "-new"}, {"fields": {}})

    async def update(self, path: str) -> bool:
        """Change the document."""
        fields = {"reason": {"stringValue": "x"}}
        return await self._allowed("PATCH", f"/{path}", {"currentDocument.exists": "true"}, {"fields": fields})

    async def delete(self, path: str) -> bool:
        """Delete the document."""
        return await self._allowed("DELETE", f"/{path}")

    async def _query(self, path: str, where: dict[str, Any] | None) -> bool:
        parent, _, collection = path.rpartition("/")[0].rpartition("/")
        query: dict[str, Any] = {"from": [{"collectionId": collection}]}
        body = {"structuredQuery": query | ({"where": where} if where else {})}
        return await self._allowed("POST", f"{'/' + parent if parent else ''}:runQuery", None, body)

    async def _allowed(
        self, method: str, path: str, params: dict[str, str] | None = None, body: dict[str, Any] | None = None
    ) -> bool:
        answer = await self._client.request(
            method, self._documents + path, params=params, json=body, headers=self._headers
        )
        assert answer.status_code in (200, 403), answer.text
        return answer.status_code == 200
