"""The API document, OpenAPI 3.1: from the models that validate, and models of the answers."""

import functools
from typing import Any

from flask import Blueprint, Response, jsonify
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from config import Config
from web import answers
from web.params import ImageQuery, RetryQuery, TasksQuery, Wait
from web.schemas import OPENAI_MODEL, Generate, Generations
from web.service import service

_ID = "ee078b27-6c4d-42f6-8911-d9669086c9e9"
_EXAMPLE = {"prompt": "a red fox in the snow", "width": 1024, "height": 768, "seed": 7}
_COMPONENT = "#/components/schemas/{model}"


# What answers of a status tell beside their body.
_HEADERS = {
    "202": {
        "Location": "the status of the new task",
        "Idempotent-Replayed": "true, where the key has come before",
    },
    "401": {"WWW-Authenticate": "Bearer"},
    "405": {"Allow": "the methods that there are"},
    "429": {"Retry-After": "seconds"},
    "503": {"Retry-After": "seconds"},
    "507": {"Retry-After": "seconds"},
}
_MODELS = (
    *(answers.Accepted, answers.Task, answers.TaskWithCalls, answers.Tasks, answers.Retried),
    *(answers.Queue, answers.Health, answers.Ready, answers.Error),
    *(answers.OpenAIImages, answers.OpenAIModels, answers.OpenAIError),
)

_ERRORS = {
    400: "A fault in the request, which is named",
    401: "A key is needed",
    403: "The page, or the name of the host, is not this server's",
    404: "There is no such task",
    405: "Another method is needed",
    409: "The task is in another state",
    410: "The picture's file is no longer there",
    413: "The body is larger than 1 MiB",
    415: "The body is declared as something other than JSON",
    416: "The range is beyond the end of the picture",
    422: "The Idempotency-Key came with another request before",
    429: "MAX_PENDING tasks are pending",
    500: "Internal server error",
    502: "Chutes failed in every attempt",
    503: "Not now; see Retry-After",
    504: "The picture is not there in time; its task goes on",
    507: "Less than MIN_FREE_MB is free on the disk",
}


bp = Blueprint("openapi", __name__)


@bp.get("/openapi.json")
def openapi() -> Response:
    return jsonify(document(service.config))


@functools.lru_cache(maxsize=1)  # Not at the start, which it would make slower.
def document(config: Config) -> dict[str, Any]:
    """Return the API document, as this server is set up."""
    _, schemas = models_json_schema(
        [
            (Generate, "validation"),
            (Generations, "validation"),
            *((model, "serialization") for model in _MODELS),
        ],
        ref_template=_COMPONENT,
    )
    made = {
        "openapi": "3.1.0",
        "info": {
            "title": "Image proxy",
            "version": "1",
            "description": "A durable queue in front of Chutes AI's image API.",
        },
        "servers": [{"url": config.public_url or "/"}],
        "paths": paths(),
        "components": {"schemas": schemas["$defs"]},
    }
    for kind, model in (("Generate", _model_rule(config)), ("Generations", _any_model(config))):
        made["components"]["schemas"][kind]["required"] = ["prompt"]
        fields = made["components"]["schemas"][kind]["properties"]
        # What validators of our own check.
        fields["prompt"]["pattern"] = r"^[^\u0000]*[^\s\u0000][^\u0000]*$"
        fields["negative_prompt"]["anyOf"][0]["pattern"] = r"^[^\u0000]*$"
        fields["model"] = {"description": "a model's name", **model}
    if config.api_keys:
        made["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        made["security"] = [{"bearer": []}, {"key": []}]
        for path in ("/healthz", "/", "/page.css", "/page.js"):
            made["paths"][path]["get"]["security"] = []
    return made


def _model_rule(config: Config) -> dict[str, Any]:
    if config.models:
        return {"enum": [*config.models, None]}
    if config.model_in_url:
        return {
            "type": ["string", "null"],
            "pattern": "^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$",
        }
    name = r"^(?!.*\.\.)(?!.*//)[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$"
    return {"type": ["string", "null"], "pattern": name}


def _any_model(config: Config) -> dict[str, Any]:
    """Return the rule where OpenAI's own names, or none, mean the default model."""
    return {"anyOf": [_model_rule(config), {"type": "string", "pattern": f"^({OPENAI_MODEL})?$"}]}


def paths() -> dict[str, Any]:
    """Return the operations of every route, by path and method."""
    task_id = _path("id", "the task's id")
    wait = _query(Wait)
    after = {
        "status": _link("status", "the task"),
        "task": _link("task", "the task, with its calls"),
        "image": _link("image", "its picture, once it is there"),
        "cancel": _link("cancel", "end it"),
    }
    added = _json(202, "The task is on disk; Location names its status", "Accepted", after)
    one = _json(200, "The task", "Task")
    queue = _json(200, "How the queue stands", "Queue")
    return {
        "/generate": {
            "post": _operation(
                "generate",
                "Add a task",
                added,
                [_idempotency_key()],
                (400, 413, 415, 422, 429, 507),
                body=("Generate", _EXAMPLE),
            )
        },
        "/status/{id}": {
            "get": _operation("status", "Look at a task", one, [task_id, *wait], (400, 404))
        },
        "/tasks": {
            "get": _operation(
                "tasks",
                "List tasks, the newest first",
                _page(),
                _query(TasksQuery),
                (400,),
            )
        },
        "/tasks/{id}": {
            "get": _operation(
                "task",
                "Look at a task and its calls",
                _json(200, "The task", "TaskWithCalls"),
                [task_id, *wait],
                (400, 404),
            ),
            "delete": _operation(
                "delete",
                "Delete a task and its files",
                {"204": {"description": "It is gone"}},
                [task_id],
                (404, 409, 507),
            ),
        },
        "/tasks/{id}/cancel": {
            "post": _operation("cancel", "End a task", one, [task_id], (404, 507))
        },
        "/tasks/{id}/retry": {
            "post": _operation(
                "retry",
                "Add a new task with the same input",
                added,
                [task_id],
                (400, 404, 409, 429, 507),
            )
        },
        "/tasks/retry": {
            "post": _operation(
                "retryFailed",
                "Retry all that failed and were not retried yet; with `error_code`, only those",
                _json(202, "How many", "Retried"),
                _query(RetryQuery),
                (400, 429, 507),
            )
        },
        "/images/{id}": {
            "get": _operation(
                "image",
                "Fetch the picture; /images/{id}.png, or what its ending is, is the same",
                _picture("image/png", "image/jpeg", "image/webp"),
                [task_id, *_query(ImageQuery), *_of_a_file()],
                (400, 404, 409, 410, 416, 503),
            )
        },
        "/images/{id}/thumbnail": {
            "get": _operation(
                "thumbnail",
                "Fetch a picture of at most 512 pixels a side",
                _picture("image/webp"),
                [task_id, *_of_a_file()],
                (404, 409, 410, 416, 503),
            )
        },
        "/queue": {"get": _operation("queue", "Look at the queue", queue)},
        "/queue/pause": {"post": _operation("pause", "Start no more calls", queue, errors=(507,))},
        "/queue/resume": {"post": _operation("resume", "Go on", queue, errors=(507,))},
        "/v1/images/generations": {
            "post": _operation(
                "generations",
                "Make pictures, and wait for them, as OpenAI's API does",
                _replayable(_json(200, "The pictures", "OpenAIImages")),
                [_idempotency_key()],
                (400, 409, 410, 413, 415, 422, 429, 500, 502, 504, 507),
                body=("Generations", {"prompt": "a red fox", "size": "1024x768", "n": 2}),
                error_model="OpenAIError",
            )
        },
        "/v1/models": {
            "get": _operation(
                "models",
                "List the models, as OpenAI's API does",
                _json(200, "The models", "OpenAIModels"),
                error_model="OpenAIError",
            )
        },
        "/healthz": {
            "get": _operation(
                "healthz", "Ask if the process lives", _json(200, "It does", "Health")
            )
        },
        "/readyz": {
            "get": _operation(
                "readyz", "Ask if it can serve", _json(200, "It can", "Ready"), errors=(503,)
            )
        },
        "/metrics": {
            "get": _operation(
                "metrics",
                "Read the numbers for Prometheus",
                {"200": {"description": "Text", "content": {"text/plain": {}}}},
            )
        },
        "/": {"get": _operation("page", "Look at the page", _file("text/html"))},
        "/page.css": {"get": _operation("stylesheet", "Read how it looks", _file("text/css"))},
        "/page.js": {"get": _operation("script", "Read what it does", _file("text/javascript"))},
        "/openapi.json": {
            "get": _operation(
                "openapi",
                "Read this document",
                {"200": {"description": "It", "content": {"application/json": {}}}},
            )
        },
    }


def _operation(
    name: str,
    summary: str,
    answers: dict[str, Any],
    parameters: list[dict[str, Any]] | None = None,
    errors: tuple[int, ...] = (),
    body: tuple[str, dict[str, Any]] | None = None,
    error_model: str = "Error",
) -> dict[str, Any]:
    refusals = (*errors, 401, 403, 405)
    responses = {
        **answers,
        **{str(code): _error(code, error_model) for code in sorted({*refusals, 503})},
    }
    for code, response in responses.items():
        told = {"X-Request-ID": "the client's own, or a new one", **_HEADERS.get(code, {})}
        if error_model == "OpenAIError" and code not in answers:
            told["X-Should-Retry"] = "false, once the tasks are stored"
        response["headers"] = {**_headers(told), **response.get("headers", {})}
    made = {
        "operationId": name,
        "summary": summary,
        "parameters": parameters or [],
        "responses": responses,
    }
    if body:
        model, example = body
        schema = {"$ref": _COMPONENT.format(model=model)}
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": example}},
        }
    return made


def _error(code: int, model: str) -> dict[str, Any]:
    schema = {"$ref": _COMPONENT.format(model=model)}
    example: dict[str, Any] = {"error": _ERRORS[code]}
    if model == "OpenAIError":
        fault = {"message": _ERRORS[code], "type": "invalid_request_error", "param": None}
        example = {"error": {**fault, "code": "a_word"}}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"description": _ERRORS[code], "content": content}


def _json(
    code: int, description: str, model: str, links: dict[str, Any] | None = None
) -> dict[str, Any]:
    schema = {"$ref": _COMPONENT.format(model=model)}
    made = {"description": description, "content": {"application/json": {"schema": schema}}}
    return {str(code): {**made, "links": links} if links else made}


def _headers(told: dict[str, str]) -> dict[str, Any]:
    return {
        name: {"description": description, "schema": {"type": "string"}}
        for name, description in told.items()
    }


def _replayable(answers: dict[str, Any]) -> dict[str, Any]:
    (answer,) = answers.values()
    answer["headers"] = _headers({"Idempotent-Replayed": "true, where the key has come before"})
    return answers


def _file(content_type: str) -> dict[str, Any]:
    headers = _headers({"Content-Security-Policy": "nothing from another host", "ETag": ""})
    return {
        "200": {"description": "It", "content": {content_type: {}}, "headers": headers},
        "304": {"description": "The client has it", "headers": headers},
    }


def _page() -> dict[str, Any]:
    made = _json(200, "A page", "Tasks")
    made["200"]["headers"] = _headers({"Link": 'the next page, as `rel="next"`'})
    return made


def _picture(*content_types: str) -> dict[str, Any]:
    content = {content_type: {} for content_type in content_types}
    same = {"ETag": "strong: the SHA-256 of the bytes", "Cache-Control": "immutable, for a year"}
    headers = _headers({**same, "Content-Disposition": "inline, with the file's name"})
    return {
        "200": {"description": "The bytes", "content": content, "headers": headers},
        "206": {"description": "A part of the bytes", "content": content, "headers": headers},
        "304": {"description": "The client has these bytes", "headers": _headers(same)},
    }


def _path(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string", "format": "uuid"},
        "example": _ID,
    }


def _query(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Return the parameters that a model of a query reads."""
    parameters = []
    for name, schema in model.model_json_schema()["properties"].items():
        del schema["title"]
        # A default of nothing means that it is not there; what is there is never null.
        if not schema["default"]:
            del schema["default"]
            schema |= schema.pop("anyOf", [{}])[0]
        description = schema.pop("description", "")
        parameters.append(
            {"name": name, "in": "query", "schema": schema, "description": description}
        )
    return parameters


def _of_a_file() -> list[dict[str, Any]]:
    told = {"Range": "one range of bytes; any other is ignored", "If-None-Match": "an ETag"}
    return [
        {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}
        for name, description in told.items()
    ]


def _idempotency_key() -> dict[str, Any]:
    return {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "the same key with the same request is the same task, for 24 hours",
        "schema": {"type": "string", "pattern": r"^[\x20-\x7e]{1,255}$"},
        "example": "order-66",
    }


def _link(operation: str, description: str) -> dict[str, Any]:
    return {
        "operationId": operation,
        "parameters": {"id": "$response.body#/id"},
        "description": description,
    }
