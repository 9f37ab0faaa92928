"""OpenAPI 3.1 description of the router: its paths, their parameters and bodies, and all their answers."""

from __future__ import annotations

from typing import Any

from pdtransport.router.call import PATHS
from pdtransport.router.relay import PD_HEADERS
from pdtransport.serving.openapi import as_json, document, got, key_scheme, query, refused, wanting

_COUNT = {"type": "integer", "minimum": 0}
_JUDGED = "; validated by the servers"
_WHERE = "How the request was served; absent if it was refused before it was sent to a server."
_HEADERS = {name: {"description": _WHERE, "schema": {"type": "string"}} for name in PD_HEADERS}


def describe(*, public: bool, admin: bool, keys: bool, admin_keys: bool) -> dict[str, Any]:
    """The description of one listening socket, as JSON: ``public`` and ``admin`` paths, and which need keys."""
    paths: dict[str, Any] = {"/openapi.json": {"get": got("openapi", "This description.", as_json({"type": "object"}))}}
    if public:
        paths |= _public(wanting("clientKey") if keys else {})
    if admin:
        paths |= _admin(wanting("adminKey") if admin_keys else {}, closed=not admin_keys and public)
    schemes = {
        name: key_scheme(text)
        for name, text, there in (
            ("clientKey", "A key of api_key_file.", public and keys),
            ("adminKey", "A key of admin_api_key_file.", admin and admin_keys),
        )
        if there
    }
    return document(
        "pdrouter", "One OpenAI-compatible server in front of vLLM prefill and decode servers.", paths, schemes
    )


def _public(security: dict[str, Any]) -> dict[str, Any]:
    prompts = {
        "completions": ("A completion.", "prompt", "text, token ids, or a list of these"),
        "chat": ("A chat completion.", "messages", "the conversation"),
    }
    paths: dict[str, Any] = {}
    for api, path in PATHS.items():
        summary, key, about = prompts[api]
        paths[path] = {"post": _generate(api, summary, {key: {"description": about + _JUDGED}}, security)}
    health = as_json(
        {
            "type": "object",
            "required": ["status", "prefill", "decode", "disaggregates", "why_not"],
            "properties": {
                "status": {"enum": ["ok", "degraded", "unavailable"]},
                "prefill": _role(),
                "decode": _role(),
                "disaggregates": {
                    "type": ["boolean", "null"],
                    "description": "Whether prompts are handed over; null: not known yet.",
                },
                "why_not": {"type": ["string", "null"]},
            },
        }
    )
    unavailable = {**health, "description": "No decode server is healthy, so no completion can be answered."}
    models = as_json({}, "The list of a decode server.")
    paths["/v1/models"] = {"get": {**got("models", "The models.", models), **security}}
    paths["/v1/models"]["get"]["responses"] |= {"4XX": refused(), "5XX": refused()}
    paths["/health"] = {"get": got("health", "Readiness: whether completions can be answered.", health)}
    paths["/health"]["get"]["responses"]["503"] = unavailable
    paths["/live"] = {"get": got("live", "Liveness: whether the router answers.", as_json({"type": "object"}))}
    return paths


def _generate(api: str, summary: str, prompt: dict[str, Any], security: dict[str, Any]) -> dict[str, Any]:
    body = {
        "type": "object",
        "description": "As vLLM accepts it: the router reads a few members and passes on all of them. Duplicate "
        "members are refused.",
        "properties": {
            **prompt,
            "model": {"description": "one of /v1/models" + _JUDGED},
            "stream": {"description": "whether to answer in server-sent events" + _JUDGED},
            "max_tokens": {"description": "the longest answer" + _JUDGED},
            "kv_transfer_params": {"type": "null", "description": "Set by the router; a client's own are refused."},
        },
    }
    served = {
        "description": "Decode's answer, unchanged.",
        "headers": _HEADERS,
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
    return {
        "operationId": api,
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": served,
            "400": refused("The body can't be read, or a server says that it is wrong."),
            "408": refused("The body did not arrive in time."),
            "413": refused("The body is larger than max_body_bytes."),
            "415": refused("The body is compressed, or its Content-Type is not application/json."),
            "503": refused("The router is at its limit, or no decode server is healthy.", retry=True),
            "4XX": refused(),
            "5XX": refused("Servers failed, and so did all retries."),
        },
        **security,
    }


def _admin(security: dict[str, Any], *, closed: bool) -> dict[str, Any]:
    refusals: dict[str, Any] = {"4XX": refused("No valid key, or not found.")}
    if closed:
        refusals["403"] = refused("Only clients on the router's own machine may use this.")
    text = {
        "description": "Prometheus text.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
    listed = as_json(
        {
            "type": "object",
            "required": ["traces"],
            "properties": {"traces": {"type": "array", "items": {"type": "object"}}},
        }
    )
    state = as_json(
        {
            "type": "object",
            "required": ["uptime_s", "dispatch", "inflight", "buffered_bytes", "prefill", "decode"],
            "properties": {
                "uptime_s": {"type": "number"},
                "placement": {"type": "string", "description": "The placement policy."},
                "inflight": _COUNT,
                "buffered_bytes": _COUNT,
            },
        }
    )
    limit = query("limit", {"type": "integer", "minimum": 0, "maximum": 999_999_999}, "Maximum number of traces.")
    workers = query("workers", {"enum": ["0", "1"]}, "1: include the status of every worker.")
    transfer = {"name": "transfer_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    operations = {
        "/metrics": (got("metrics", "Counters and histograms.", text), []),
        "/pd/status": (got("status", "Servers, and requests in progress.", state), [workers]),
        "/pd/traces": (got("traces", "Timelines of the newest requests.", listed), [limit]),
        "/pd/trace/{transfer_id}": (got("trace", "One timeline.", as_json({"type": "object"})), [transfer]),
    }
    for operation, parameters in operations.values():
        operation |= {"parameters": parameters, **security}
        operation["responses"] |= refusals
    return {path: {"get": operation} for path, (operation, _) in operations.items()}


def _role() -> dict[str, Any]:
    return {"type": "object", "required": ["healthy", "of"], "properties": {"healthy": _COUNT, "of": _COUNT}}
