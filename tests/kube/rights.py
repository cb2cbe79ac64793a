"""Who may do what: the accounts of a server and their rights."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from tests.kube.answers import Refused

Right = tuple[str, str]  # verb, resource (with /subresource)

VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True, slots=True)
class Account:
    """`rights` None may do everything."""

    name: str
    rights: frozenset[Right] | None = None

    def may(self, verb: str, resource: str) -> bool:
        """Whether it has that right."""
        return self.rights is None or (verb, resource) in self.rights


ACCOUNT = web.RequestKey("account", Account)  # whose request it is
ADMIN = Account("admin")
WORKER = Account(
    "system:serviceaccount:pigeon:worker",
    frozenset(
        {(verb, "pods") for verb in ("get", "list", "watch", "create", "patch", "delete")}
        | {(verb, "pods/exec") for verb in ("get", "create")}
    ),
)  # the Role of a worker


def authorize(account: Account, request: web.Request, resource: str) -> None:
    """Raise Refused with 403 where the account lacks the right that the request takes."""
    for verb in _verbs(request, resource):
        if not account.may(verb, resource):
            namespace = request.match_info.get("namespace")
            where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
            who = f'User "{account.name}" cannot {verb} resource "{resource}" in API group "" {where}'
            raise Refused(403, f"{resource} is forbidden: {who}")


def _verbs(request: web.Request, resource: str) -> tuple[str, ...]:
    verb = VERBS[request.method]
    if resource.endswith("/exec"):
        return (verb, "create")  # the latter since 1.35, whatever the method
    if verb == "get" and "name" not in request.match_info:
        return ("watch" if request.query.get("watch", "").lower() in ("1", "true") else "list",)
    return (verb,)
