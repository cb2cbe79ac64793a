"""Resource quantities: "500m", "1Gi", "20"."""

from __future__ import annotations

from decimal import Decimal

from tests.kube.answers import Object

SUFFIXES = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
}


def quantity(text: str | int | float) -> Decimal:
    """The number a quantity stands for. Raises ValueError."""
    written = str(text)
    digits = written.rstrip("mkKMGTPEi")
    suffix = written[len(digits) :]
    if not digits or suffix not in SUFFIXES:
        raise ValueError(f"not a quantity: {text!r}")
    return Decimal(digits) * SUFFIXES[suffix]


def written(number: Decimal, like: str | int) -> str:
    """The number in the unit in which `like` is written."""
    suffix = str(like).lstrip("0123456789.")
    return f"{(number / SUFFIXES[suffix]).normalize():f}{suffix}"


def requested(pod: Object, kind: str, resource: str) -> Decimal | None:
    """What all containers of a pod ask for; `kind` is "requests" or "limits". None where one of them does not say."""
    total = Decimal(0)
    for container in pod["spec"]["containers"]:
        asked = container.get("resources", {}).get(kind, {})
        if resource not in asked:
            return None
        total += quantity(asked[resource])
    return total
