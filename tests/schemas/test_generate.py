"""The generated schemas are what the models say."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from schemas import generate
from schemas.documents import Session
from schemas.functions import FUNCTIONS
from schemas.generate import FOLDER, drift, files, main, openapi, write
from schemas.http import PROBLEMS, Problem, problem


def test_the_committed_schemas_are_what_the_models_say() -> None:
    """Run `make schemas` and commit what it writes."""
    assert drift(FOLDER) == []


def test_drift_is_named_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` fails with a line for what is stale, missing or left over; writing puts it right."""
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert main([]) == 0
    assert main(["--check"]) == 0
    (tmp_path / "json" / "session.opened.v1.schema.json").write_text("{}")
    (tmp_path / "json" / "user.document.schema.json").unlink()
    (tmp_path / "json" / "older.v1.schema.json").write_text("{}")
    assert main(["--check"]) == 1
    printed = capsys.readouterr().err
    for line in (
        "session.opened.v1.schema.json is not what the models say",
        "user.document.schema.json is missing",
        "older.v1.schema.json is not generated any more",
        "make schemas",
    ):
        assert line in printed
    write(tmp_path)
    assert main(["--check"]) == 0


@pytest.mark.parametrize("path", [path for path in files() if path.parent.name == "json"], ids=str)
def test_every_schema_is_one(path: Path) -> None:
    """Of the dialect that it names."""
    schema = json.loads(files()[path])
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]


def test_every_function_is_in_the_openapi_document_with_its_refusals() -> None:
    """A client generated from it knows every status that can come back."""
    document = json.loads(json.dumps(openapi()))
    assert document["openapi"] == "3.1.0"
    for function in FUNCTIONS.values():
        path = f"/{function.name}/{{id}}" if function.by_session else f"/{function.name}"
        operation = document["paths"][path][function.method.lower()]
        statuses = {int(status) for status in operation["responses"]}
        assert {401, 403, 405, 500, 503, *function.problems, *function.responses} == statuses
        assert ("requestBody" in operation) == (function.request is not None)


def test_every_reference_of_the_openapi_document_leads_somewhere() -> None:
    """And every schema in it is used and valid."""
    document = openapi()
    text = json.dumps(document)
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert text.count(f'"#/components/schemas/{name}"') or name in ("StreamedData", "StreamedGap", "StreamedEnd")
    for reference in set(text.split('"$ref": "')[1:]):
        _, *parts = reference.partition('"')[0].split("/")
        found = document
        for part in parts:
            found = found[part]


def test_a_problem_document_is_what_the_rfc_says() -> None:
    """RFC 9457: type, title, status and detail, with the stable code beside them."""
    document = json.loads(problem("too_large", "a file has at most 4 bytes").model_dump_json(by_alias=True))
    assert document["type"] == "urn:problem-type:pigeon:too_large"
    assert (document["title"], document["status"], document["code"]) == ("Too large", 413, "too_large")
    assert Problem.model_validate(document).detail == "a file has at most 4 bytes"
    assert {status for status, _ in PROBLEMS.values()} <= {400, 401, 403, 404, 405, 409, 413, 415, 429, 500, 501, 503}


def test_stored_names_are_those_of_the_schema() -> None:
    """Camel case, as written by `fields`."""
    schema = json.loads(files()[Path("json/session.document.schema.json")])
    assert {"userId", "finalOffset", "expireAt"} <= schema["properties"].keys()
    assert schema["properties"].keys() == {field.alias for field in Session.model_fields.values()}
