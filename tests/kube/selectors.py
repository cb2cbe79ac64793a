"""Label and field selectors, as they come in a query."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from tests.kube.answers import Object, Refused

Labels = Mapping[str, str]
Test = Callable[[Labels], bool]

KEY = r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?"
VALUE = r"[A-Za-z0-9._-]*"
SET = re.compile(rf"(?P<key>{KEY})\s+(?P<op>in|notin)\s*\((?P<values>[^)]*)\)")
EQUALITY = re.compile(rf"(?P<key>{KEY})\s*(?P<op>==|=|!=)\s*(?P<values>{VALUE})")
PRESENCE = re.compile(rf"(?P<op>!?)\s*(?P<key>{KEY})")
REQUIREMENTS = re.compile(r",(?![^(]*\))")  # commas outside of a set
FIELDS = ("metadata.name", "metadata.namespace", "status.phase", "spec.nodeName", "spec.serviceAccountName")


def label_selector(text: str) -> Test:
    """Whether labels match all of `a=b,c!=d,e in (f,g),h notin (i),j,!k`. Raises Refused with 400."""
    tests = [_requirement(part.strip()) for part in REQUIREMENTS.split(text) if part.strip()]
    return lambda labels: all(test(labels) for test in tests)


def _requirement(text: str) -> Test:
    if found := SET.fullmatch(text):
        key, values = found["key"], {value.strip() for value in found["values"].split(",")}
        if found["op"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if found := EQUALITY.fullmatch(text):
        key, value = found["key"], found["values"]
        if found["op"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if found := PRESENCE.fullmatch(text):
        key, absent = found["key"], bool(found["op"])
        return lambda labels: (key in labels) is not absent
    raise Refused(400, f"unable to parse requirement: {text!r}")


def field_selector(text: str) -> Callable[[Object], bool]:
    """Whether an object's fields match all of `metadata.name=a,status.phase!=b`. Raises Refused with 400."""
    tests: list[tuple[str, bool, str]] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"([\w.]+)(==|=|!=)(.*)", part)
        if not found or found[1] not in FIELDS:
            raise Refused(400, f'Unable to find "v1, Resource=pods" that match field selector "{text}"')
        tests.append((found[1], found[2] != "!=", found[3]))
    return lambda thing: all((_field(thing, path) == value) is wanted for path, wanted, value in tests)


def _field(thing: Object, path: str) -> str:
    top, _, leaf = path.partition(".")
    return str(thing.get(top, {}).get(leaf, ""))
