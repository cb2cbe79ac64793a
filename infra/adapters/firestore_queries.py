"""Queries as Firestore's messages."""

from __future__ import annotations

from infra.adapters.firestore_calls import QueryRequest
from infra.adapters.firestore_values import ID, Database, Message, encode, field_path
from schemas.ports import Query, Where

NAME = "__name__"  # the field that orders by id
OPERATORS = {"==": "EQUAL", "<=": "LESS_THAN_OR_EQUAL", ">=": "GREATER_THAN_OR_EQUAL"}


def query_request(database: Database, query: Query) -> Message:
    """A RunQuery of a query that was checked against the declared indexes."""
    request = QueryRequest()
    request.parent, _ = database.parent(query.collection)
    _structure(database, query, request.structured_query)
    return request


def newest_target(database: Database, collection: str, after: str, count: int, target: Message) -> None:
    """As what a listener listens to: the newest `count` documents whose ids are greater than `after`."""
    target.query.parent, _ = database.parent(collection)
    structured = target.query.structured_query
    _structure(database, Query(collection, descending=True, limit=count), structured)
    if after:
        structured.end_at.values.add().string_value = after
        structured.end_at.before = True


def _structure(database: Database, query: Query, structured: Message) -> None:
    structured.from_.add().collection_id = database.parent(query.collection)[1]
    for condition in query.where:
        _filter(condition, structured.where.composite_filter.filters.add().field_filter)
    if query.order_by is not None:
        _present(query.order_by, structured.where.composite_filter.filters.add().unary_filter)
        _order(field_path(query.order_by), query.descending, structured)
    if structured.HasField("where"):
        structured.where.composite_filter.op = structured.where.composite_filter.AND
    _by_id(database, query, structured)
    structured.limit.value = query.limit


def _by_id(database: Database, query: Query, structured: Message) -> None:
    """Firestore does not order by name alone from the end; a field that holds the same does it."""
    from_end = query.descending and query.order_by is None and not query.where
    if from_end:
        _order(ID, True, structured)
    _order(NAME, query.descending, structured)
    if query.after and from_end:
        structured.start_at.values.add().string_value = query.after
    elif query.after:
        structured.start_at.values.add().reference_value = database.document(f"{query.collection}/{query.after}")


def _filter(condition: Where, field_filter: Message) -> None:
    field_filter.field.field_path = field_path(condition.field)
    field_filter.op = getattr(field_filter, OPERATORS[condition.op])
    encode(condition.value, field_filter.value)


def _present(field: str, unary_filter: Message) -> None:
    """Firestore has documents in which the field is None in its index; our queries do not show them."""
    unary_filter.field.field_path = field_path(field)
    unary_filter.op = unary_filter.IS_NOT_NULL


def _order(path: str, descending: bool, structured: Message) -> None:
    order = structured.order_by.add()
    order.field.field_path = path
    order.direction = structured.DESCENDING if descending else structured.ASCENDING
