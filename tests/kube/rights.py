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
    verb = VERBS[request.method]
    if verb == "get" and "name" not in request.match_info:
        verb = "watch" if request.query.get("watch", "").lower() in ("1", "true") else "list"
    if resource.endswith("/exec"):
        verb = "create"  # since 1.35, whatever the method
    if not account.may(verb, resource):
        where = request.match_info.get("namespace")
        raise Refused(
            403,
            f'{resource} is forbidden: User "{account.name}" cannot {verb} resource "{resource}" in API group ""'
            + (f' in the namespace "{where}"' if where else " at the cluster scope"),
        )
