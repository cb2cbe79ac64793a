"""Writes the JSON Schemas of events and documents, and the OpenAPI document, from the models.

`python -m schemas.generate` writes schemas/json and schemas/openapi.json; with `--check` it writes nothing and exits
with 1 if a file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from schemas.documents import Chunk, Command, Cursor, Rollout, Session, Stored, Transfer, User
from schemas.events import EVENTS
from schemas.functions import ANY_PROBLEM, FUNCTIONS, Function, Parameter
from schemas.http import Problem, StreamedData, StreamedEnd, StreamedGap
from schemas.model import Model

FOLDER = Path(__file__).parent
DIALECT = "https://json-schema.org/draft/2020-12/schema"
DOCUMENTS: tuple[type[Stored], ...] = (Session, Command, Chunk, Transfer, User, Cursor, Rollout)
SESSION_PARAMETER = Parameter("id", "The session's id.", {"type": "string"}, where="path", required=True)

Json = dict[str, Any]


def files() -> dict[Path, str]:
    """Every generated file and its content, by path relative to this package."""
    schemas = {f"json/{name}.schema.json": _schema(event, name) for name, event in EVENTS.items()}
    schemas |= {f"json/{name}.document.schema.json": _schema(document, name) for name, document in _documents()}
    content = {Path(name): _dump(schema) for name, schema in schemas.items()}
    content[Path("openapi.json")] = _dump(openapi())
    return content


def _documents() -> list[tuple[str, type[Stored]]]:
    return [(document.__name__.lower(), document) for document in DOCUMENTS]


def _schema(model: type[Model], title: str) -> Json:
    return {"$schema": DIALECT, **model.model_json_schema(by_alias=True, mode="validation"), "title": title}


def _dump(content: Json) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def openapi() -> Json:
    """The OpenAPI 3.1 document of all functions."""
    references, definitions = models_json_schema(
        [(model, mode) for mode, models in _models().items() for model in models],
        ref_template="#/components/schemas/{model}",
    )
    names = {model: reference for (model, _), reference in references.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pigeon", "version": version("pigeon-terminal"), "summary": "An event-driven terminal."},
        "security": [{"token": []}],
        "paths": {_path(function): _operation(function, names) for function in FUNCTIONS.values()},
        "components": {
            "schemas": definitions["$defs"],
            "responses": {"Problem": _problem(names[Problem])},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _models() -> dict[Any, list[type[Model]]]:
    """What clients write, which they may leave incomplete, and what they read, which is always complete."""
    requests = [function.request for function in FUNCTIONS.values() if function.request is not None]
    answers = {model: None for function in FUNCTIONS.values() for model in function.responses.values()}
    answers.pop(Model, None)
    return {
        "validation": requests,
        "serialization": [*answers, Problem, StreamedData, StreamedGap, StreamedEnd],
    }


def _path(function: Function) -> str:
    return f"/{function.name}/{{id}}" if function.by_session else f"/{function.name}"


def _operation(function: Function, names: dict[type[Any], Json]) -> Json:
    parameters = ((SESSION_PARAMETER,) if function.by_session else ()) + function.parameters
    operation: Json = {"operationId": function.target, "summary": function.summary}
    if parameters:
        operation["parameters"] = [_parameter(parameter) for parameter in parameters]
    if function.request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": names[function.request]}},
        }
    answers = {str(status): _answer(function, names.get(model)) for status, model in function.responses.items()}
    problem = {"$ref": "#/components/responses/Problem"}
    refusals = {str(status): problem for status in sorted({*ANY_PROBLEM, *function.problems})}
    return {function.method.lower(): {**operation, "responses": answers | refusals}}


def _problem(schema: Json) -> Json:
    return {"description": "A problem document.", "content": {"application/problem+json": {"schema": schema}}}


def _parameter(parameter: Parameter) -> Json:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.required,
        "description": parameter.description,
        "schema": parameter.schema,
    }


def _answer(function: Function, schema: Json | None) -> Json:
    content = {
        media_type: {"schema": schema} if schema is not None and media_type == "application/json" else {}
        for media_type in function.media_types
    }
    return {"description": "Success.", "content": content}


def drift(folder: Path) -> list[str]:
    """One line for each generated file that is missing, stale or left over; empty if all is as it should be."""
    wanted = files()
    found = {path.relative_to(folder) for path in (folder / "json").glob("*.json")} | {Path("openapi.json")}
    lines = [f"{path} is not generated any more: remove it" for path in sorted(found - wanted.keys())]
    for path, content in wanted.items():
        if not (folder / path).is_file():
            lines.append(f"{path} is missing")
        elif (folder / path).read_text(encoding="utf-8") != content:
            lines.append(f"{path} is not what the models say")
    return lines


def write(folder: Path) -> None:
    """Write every generated file, and remove those that are not generated any more."""
    wanted = files()
    (folder / "json").mkdir(exist_ok=True)
    for path in (folder / "json").glob("*.json"):
        if path.relative_to(folder) not in wanted:
            path.unlink()
    for path, content in wanted.items():
        (folder / path).write_text(content, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m schemas.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 on drift")
    if not parser.parse_args(arguments).check:
        write(FOLDER)
        return 0
    lines = drift(FOLDER)
    for line in lines:
        sys.stderr.write(f"schemas/{line}\n")
    if lines:
        sys.stderr.write("run `make schemas` and commit the result\n")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
