"""The API document, OpenAPI 3.1, from what each route says beside itself, and from the models."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flask import Blueprint, Flask, Response, current_app, jsonify, request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import models as known_models
import urls
from config import Config
from web.answers import Answer, Error, OpenAIError
from web.errors import OPENAI_PREFIX
from web.schemas import OPENAI_MODEL, Edit, Edits, Generate, Generations, body_of
from web.service import service

_Json = dict[str, Any]

_DESCRIPTION = "A durable queue in front of Chutes AI's image API."
# What follows the name of a body where it is a form.
_FORM = "Form"
_COMPONENT = "#/components/schemas/{model}"


def _parameter(name: str, place: str, description: str, schema: _Json, **more: Any) -> _Json:
    return {"name": name, "in": place, "description": description, "schema": schema, **more}


# What a client that asks for nothing else is told the bytes are.
OCTETS = "application/octet-stream"


def path_parameter(description: str, schema: _Json, example: str) -> _Json:
    """Return what the document says of the one part of a path that varies."""
    return _parameter("id", "path", description, schema, required=True, example=example)


_ID = "ee078b27-6c4d-42f6-8911-d9669086c9e9"
_UUID = {"type": "string", "format": "uuid"}
_NAME = {"type": "string", "pattern": f"^{known_models.NAME}$"}
_MODEL = path_parameter("any name of the model", _NAME, "qwen-image")
_COUNT = {"type": "integer", "minimum": 0}
_TASK_ID = path_parameter("the task's id", _UUID, _ID)
_IDEMPOTENCY_KEY = _parameter(
    "Idempotency-Key",
    "header",
    "the same key with the same request is the same task, for 24 hours",
    {"type": "string", "pattern": r"^[\x20-\x7e]{1,255}$"},
    example="order-66",
)
_ERRORS = {
    400: "A fault in the request, which is named",
    401: "A key is needed",
    403: "The page, or the name of the host, is not this server's",
    404: "There is no such task, model or file",
    405: "Another method is needed",
    409: "The task is in another state",
    410: "The picture's file is no longer there, or no longer whole",
    413: "The body is larger than 1 MiB, or with images than MAX_UPLOAD_MB",
    415: "The body is declared as another type than is taken here, or is compressed",
    416: "The range is beyond the end of the picture",
    422: "The Idempotency-Key came with another request before",
    429: "MAX_PENDING tasks are pending",
    500: "Internal server error",
    502: "Chutes failed in every attempt",
    503: "Not now; see Retry-After",
    504: "The picture is not there in time; its task goes on",
    507: "Less than MIN_FREE_MB is free on the disk",
}
_ANY_ROUTE = {401, 403, 405, 503}
_ERROR_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    405: {"Allow": "the methods that there are"},
    **{code: {"Retry-After": "seconds"} for code in (429, 503, 507)},
}

View = TypeVar("View", bound=Callable[..., Any])


@dataclass(frozen=True)
class operation:
    """Say beside a route what it answers and takes; its docstring is the summary.

    `answer` is a model, or responses as OpenAPI has them, with headers by name and description.
    `errors` are the statuses of refusals beside those of every route, and of every one with an
    id, a query or a body. `headers` are those that a request may have. An `idempotent` route
    takes an Idempotency-Key; a `public` one needs no key of API_KEYS. `id` is for a view of
    another name, `path` says what the part of the path is that varies.
    """

    answer: type[Answer] | dict[int, _Json]
    errors: tuple[int, ...] = ()
    query: type[BaseModel] | None = None
    body: type[Generate] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = False
    public: bool = False
    id: str = ""
    path: _Json = field(default_factory=lambda: _TASK_ID)

    def __call__(self, view: View) -> View:
        view.operation = self  # type: ignore[attr-defined]
        return view


_ANY = {"type": "object"}


def binary(*content_types: str) -> _Json:
    """Return the content of an answer that is bytes of these types, as the document has it."""
    schema = {"type": "string", "format": "binary"}
    return {content_type: {"schema": schema} for content_type in (*content_types, OCTETS)}


bp = Blueprint("openapi", __name__)


@bp.get("/openapi.json")
@operation(
    {200: {"description": "It", "content": {"application/json": {"schema": _ANY}}}}, public=True
)
def openapi() -> Response:
    """Read this document."""
    cache = current_app.extensions
    if "openapi" not in cache:  # Not at the start, which it would make slower.
        cache["openapi"] = document(current_app, service.config)
    return jsonify(cache["openapi"])


def needs_key() -> bool:
    """Return whether the request is for a route that only holders of a key may use."""
    view: Any = current_app.view_functions.get(request.endpoint or "")
    return view is None or not view.operation.public


def document(app: Flask, config: Config) -> _Json:
    """Return the API document of an application, as it is set up."""
    paths: dict[str, _Json] = {}
    tags: dict[str, str] = {}
    models: dict[tuple[type[BaseModel], Any], None] = {}
    for rule in app.url_map.iter_rules():
        view: Any = app.view_functions[rule.endpoint]
        path = re.sub(r"<(\w+:)?\w+>", "{id}", rule.rule.replace("<int:number>", "{n}"))
        tag = rule.endpoint.partition(".")[0]
        tags[tag] = (sys.modules[view.__module__].__doc__ or "").partition("\n")[0]
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            paths.setdefault(path, {})[method.lower()] = _describe(path, tag, view, config)
        if view.operation.body:
            models[body_of(view.operation.body, known_models.ANY_MODEL), "validation"] = None
        for model in (view.operation.answer, _error_model(path)):
            if isinstance(model, type):
                models[model, "serialization"] = None
    spec: _Json = {
        "openapi": "3.1.0",
        "info": {"title": "Image proxy", "version": "1", "description": _DESCRIPTION},
        "servers": [{"url": config.public_url or "/"}],
        "security": [{"bearer": []}, {"key": []}] if config.api_keys else [],
        "tags": [{"name": name, "description": tags[name]} for name in sorted(tags)],
        "paths": paths,
        "components": {"schemas": _schemas(list(models), config)},
    }
    if config.api_keys:
        spec["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return spec


def _describe(path: str, tag: str, view: Any, config: Config) -> _Json:
    op = view.operation
    described = {
        "operationId": op.id or view.__name__,
        "summary": view.__doc__.partition("\n")[0].removesuffix("."),
        "tags": [tag],
        "parameters": list(_parameters(path, op)),
        "responses": {str(c): _with_headers(r) for c, r in _responses(path, op).items()},
    }
    if op.body:
        content = {"application/json": {"schema": _ref(op.body), "example": op.body.example}}
        if "images" in op.body.model_fields:
            content["multipart/form-data"] = {"schema": _ref(op.body, _FORM)}
        described["requestBody"] = {"required": True, "content": content}
    if config.api_keys and op.public:
        described["security"] = []
    return described


def _parameters(path: str, op: operation) -> Iterator[_Json]:
    if "{id}" in path:
        is_models = path.startswith((OPENAI_PREFIX, "/models"))
        yield _MODEL if is_models else op.path
    if "{n}" in path:
        yield _parameter("n", "path", "from 0", _COUNT, required=True, example=0)
    if op.query:
        yield from _query(op.query)
    for name, text in op.headers.items():
        yield _parameter(name, "header", text, {"type": "string"})
    if op.idempotent:
        yield _IDEMPOTENCY_KEY


def _query(model: type[BaseModel]) -> Iterator[_Json]:
    document = model.model_json_schema()
    for name, schema in document["properties"].items():
        del schema["title"]
        more = {"required": True} if name in document.get("required", ()) else {}
        # A default of nothing means that it is not there; what is there is never null.
        if not schema.get("default"):
            schema.pop("default", None)
            schema |= schema.pop("anyOf", [{}])[0]
        yield _parameter(name, "query", schema.pop("description", ""), schema, **more)


def _responses(path: str, op: operation) -> dict[int, _Json]:
    """Return the responses by status, with headers by name and description."""
    success = op.answer if isinstance(op.answer, dict) else _success(op.answer)
    body, takes = op.body, op.body or op.query
    implied = {400: takes, 404: "{id}" in path, 413: body, 415: body, 422: op.idempotent}
    codes = {*op.errors, *_ANY_ROUTE, *filter(implied.get, implied)}
    if op.idempotent:
        replayed = {"Idempotent-Replayed": "true, where the key has come before"}
        success = {c: {**r, "headers": {**r["headers"], **replayed}} for c, r in success.items()}
    return {**success, **{code: _error(code, _error_model(path)) for code in sorted(codes)}}


def _success(model: type[Answer]) -> dict[int, _Json]:
    content = {"application/json": {"schema": _ref(model)}}
    response = {"description": model.__doc__, "content": content, "headers": model.headers}
    if model.links:
        response["links"] = {name: _link(name, text) for name, text in model.links.items()}
    return {model.status_code: response}


def _link(operation_id: str, description: str) -> _Json:
    parameters = {"id": "$response.body#/id"}
    return {"operationId": operation_id, "parameters": parameters, "description": description}


def _error(code: int, model: type[Answer]) -> _Json:
    text, headers = _ERRORS[code], _ERROR_HEADERS.get(code, {})
    example: _Json = {"error": text}
    if model is OpenAIError:
        body = {"message": text, "type": "invalid_request_error", "param": None, "code": "a_word"}
        example = {"error": body}
        headers = {**headers, "X-Should-Retry": "false, once the tasks are stored"}
    content = {"application/json": {"schema": _ref(model), "example": example}}
    return {"description": text, "content": content, "headers": headers}


def _error_model(path: str) -> type[Answer]:
    return OpenAIError if path.startswith(OPENAI_PREFIX) else Error


def _with_headers(response: _Json) -> _Json:
    texts = {"X-Request-ID": "the client's own, or a new one", **response.get("headers", {})}
    schema = {"type": "string"}
    headers = {name: {"description": text, "schema": schema} for name, text in texts.items()}
    return {**response, "headers": headers}


def _ref(model: type[BaseModel], more: str = "") -> dict[str, str]:
    return {"$ref": _COMPONENT.format(model=model.__name__ + more)}


def _schemas(models: list[tuple[type[BaseModel], Any]], config: Config) -> _Json:
    schemas: _Json = models_json_schema(models, ref_template=_COMPONENT)[1]["$defs"]
    # A model may be left out, and its rule depends on the settings.
    rule = _model_rule(config)
    ours = {"type": "string", "pattern": f"^({OPENAI_MODEL})?$"}
    for kind in (Generate, Edit, Generations, Edits):
        schema = schemas[kind.__name__]
        schema["required"].remove("model")
        schema["description"] += "\n\nA model may have other fields, and other ranges: GET /models."
        model = {"anyOf": [rule, ours]} if issubclass(kind, Generations) else rule
        schema["properties"]["model"] = {"description": "a model's name", **model}
        if "images" in kind.model_fields:
            name = kind.__name__ + _FORM
            schemas[name] = {**_form(schema), "title": name}
    return schemas


def _form(schema: _Json) -> _Json:
    """Return what a form has in place of a JSON body: the images as files."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    return {**schema, "properties": {**schema["properties"], "images": files}}


def _model_rule(config: Config) -> _Json:
    if config.models:
        return {"enum": [*config.models, None]}
    pattern = urls.LABEL if config.model_in_url else known_models.NAME
    return {"type": ["string", "null"], "pattern": f"^{pattern}$"}
