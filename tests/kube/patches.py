"""The three ways to patch an object: JSON patch, JSON merge patch and strategic merge patch."""

from __future__ import annotations

import copy
from typing import Any

from tests.kube.answers import Object, Refused

MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "conditions": "type",
    "ownerReferences": "uid",
}  # lists whose items strategic merge recognises; all others are replaced, but
SETS = ("finalizers",)  # which grow


def patched(thing: Object, content_type: str, patch: Any) -> Object:
    """The object with the patch applied. Raises Refused with 400, 415 or 422."""
    if content_type == "application/json-patch+json":
        return json_patch(thing, patch)
    if not isinstance(patch, dict):
        raise Refused(400, "a merge patch is an object")
    if content_type == "application/merge-patch+json":
        merged: Object = merge_patch(thing, patch)
        return merged
    if content_type == "application/strategic-merge-patch+json":
        return strategic_patch(thing, patch)
    known = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json"
    raise Refused(415, f"the body of the request was in an unknown format - accepted media types include: {known}")


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def strategic_patch(target: Any, patch: Object) -> Object:
    """Merge patch, but that lists with a merge key are merged item by item, and the `$` directives."""
    if patch.get("$patch") == "replace":
        return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
    result: Object = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.partition("/")[2]
            result[name] = [item for item in result.get(name, []) if item not in value]
        elif key.startswith("$"):
            continue  # $setElementOrder and $retainKeys only order and tidy
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = strategic_patch(result.get(key), value)
        elif isinstance(value, list):
            result[key] = _merged_list(key, result.get(key) or [], value)
        else:
            result[key] = value
    return result


def _merged_list(field: str, old: list[Any], new: list[Any]) -> list[Any]:
    if field in SETS:
        return [*old, *(item for item in new if item not in old)]
    by = MERGE_KEYS.get(field)
    if by is None:
        return copy.deepcopy(new)
    items = {item[by]: item for item in old}
    for item in new:
        if item.get("$patch") == "delete":
            items.pop(item[by], None)
        else:
            items[item[by]] = strategic_patch(items.get(item[by]), item)
    return list(items.values())


def json_patch(thing: Object, patch: Any) -> Object:
    """RFC 6902. Raises Refused with 422 when a test fails or a path is not there."""
    result = copy.deepcopy(thing)
    try:
        for step in patch:
            _step(result, step)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise Refused(422, f"the server rejected our request due to an error in our request: {error!r}") from error
    return result


def _step(document: Any, step: Object) -> None:
    op = step["op"]
    if op in ("move", "copy"):
        value = copy.deepcopy(_at(document, _pointer(step["from"])))
        if op == "move":
            _remove(document, _pointer(step["from"]))
        _add(document, _pointer(step["path"]), value)
    elif op == "test":
        if _at(document, _pointer(step["path"])) != step["value"]:
            raise ValueError(f"test of {step['path']} failed")
    elif op == "remove":
        _remove(document, _pointer(step["path"]))
    elif op in ("add", "replace"):
        if op == "replace":
            _at(document, _pointer(step["path"]))
        _add(document, _pointer(step["path"]), step["value"], replace=op == "replace")
    else:
        raise ValueError(f"unknown op {op}")


def _pointer(text: str) -> list[str]:
    if not text.startswith("/"):
        raise ValueError(f"not a path below the object: {text!r}")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _at(document: Any, path: list[str]) -> Any:
    for part in path:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def _add(document: Any, path: list[str], value: Any, *, replace: bool = False) -> None:
    parent, last = _at(document, path[:-1]), path[-1]
    if not isinstance(parent, list):
        parent[last] = value
    elif replace:
        parent[int(last)] = value
    else:
        parent.insert(len(parent) if last == "-" else int(last), value)


def _remove(document: Any, path: list[str]) -> None:
    parent, last = _at(document, path[:-1]), path[-1]
    del parent[int(last) if isinstance(parent, list) else last]
