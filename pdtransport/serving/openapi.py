"""Building blocks of OpenAPI 3.1 descriptions."""

from __future__ import annotations

from typing import Any

from pdtransport import __version__

ERROR = {"$ref": "#/components/schemas/Error"}
_TEXT = {"type": ["string", "null"]}


def document(title: str, summary: str, paths: dict[str, Any], schemes: dict[str, Any]) -> dict[str, Any]:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "summary": summary},
        "paths": paths,
        "components": {"schemas": {"Error": error_schema()}, "securitySchemes": schemes},
    }


def key_scheme(text: str) -> dict[str, Any]:
    return {"type": "http", "scheme": "bearer", "description": text}


def got(name: str, summary: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "responses": {"200": answer}}


def query(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def wanting(scheme: str) -> dict[str, Any]:
    return {"security": [{scheme: []}]}


def as_json(schema: dict[str, Any], text: str = "The answer.") -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def refused(text: str = "Refused.", *, retry: bool = False) -> dict[str, Any]:
    answer = {**as_json(ERROR, text)}
    if retry:
        answer["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
    return answer


def error_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message"],
                "properties": {
                    "message": {"type": "string"},
                    "type": _TEXT,
                    "param": _TEXT,
                    "code": {"type": ["string", "integer", "null"]},
                },
            }
        },
    }
