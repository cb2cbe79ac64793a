"""Text that is safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line of `text` that cannot steer the terminal it is printed on.

    Programs in a sandbox have a say in some of what we are told (why it ended, what a file is called), and whoever
    reads a list of sessions did not ask for their escape sequences.
    """
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
