"""What Pub/Sub takes as a message; every bus of ours takes the same."""

from __future__ import annotations

from schemas.errors import TooLarge
from schemas.limits import MAX_ATTRIBUTE_BYTES, MAX_MESSAGE_BYTES
from schemas.ports import Message

MAX_ATTRIBUTES = 100  # Pub/Sub, as are the next two
MAX_ATTRIBUTE_NAME_BYTES = 256
MAX_ORDERING_KEY_BYTES = 1_024


def check_message(message: Message) -> None:
    """Raises TooLarge beyond Pub/Sub's limits, and ValueError for a message without data and attributes."""
    if not message.data and not message.attributes:
        raise ValueError("a message has data or attributes")
    if len(message.attributes) > MAX_ATTRIBUTES:
        raise TooLarge(f"{len(message.attributes)} attributes; a message takes {MAX_ATTRIBUTES}")
    size = len(message.data)
    for name, value in message.attributes.items():
        name_size, value_size = len(name.encode()), len(value.encode())
        if not 0 < name_size <= MAX_ATTRIBUTE_NAME_BYTES or value_size > MAX_ATTRIBUTE_BYTES:
            raise TooLarge(f"attribute {name[:80]!r}: a name takes {MAX_ATTRIBUTE_NAME_BYTES} bytes, a value 1,024")
        size += name_size + value_size
    if len(message.ordering_key.encode()) > MAX_ORDERING_KEY_BYTES:
        raise TooLarge(f"an ordering key takes {MAX_ORDERING_KEY_BYTES} bytes")
    if size > MAX_MESSAGE_BYTES:
        raise TooLarge(f"the message has {size} bytes; {MAX_MESSAGE_BYTES} are the limit")
