"""The routes of two pages, of the tasks and of the API document: files, for everybody to see."""

from importlib.resources import files
from pathlib import Path

from flask import Blueprint, Response, send_file
from werkzeug.exceptions import NotFound

from web.openapi import operation, path_parameter

_OURS = Path(__file__).resolve().parent / "static"
# The package's own page would hold a script, which the policy would have to name.
_SWAGGER = Path(str(files("flask_swagger_ui"))) / "dist"
_FILES = (
    ("/", _OURS / "index.html", "html", "page", "Look at the page"),
    ("/page.css", _OURS / "page.css", "css", "stylesheet", "Read how it looks"),
    ("/page.js", _OURS / "page.js", "javascript", "script", "Read what it does"),
    ("/page/<name>", _OURS / "page", "javascript", "modules", "Read a module of it"),
    ("/docs", _OURS / "docs.html", "html", "docs", "Try out what this document says"),
    ("/docs/docs.js", _OURS / "docs.js", "javascript", "docsScript", "Read what starts it"),
    ("/docs/ui.css", _SWAGGER / "swagger-ui.css", "css", "docsStyle", "Read how it looks"),
    ("/docs/ui.js", _SWAGGER / "swagger-ui-bundle.js", "javascript", "docsUI", "Read what it does"),
)
_MODULES = sorted(file.name for file in (_OURS / "page").glob("*.js"))
_MODULE = path_parameter("the name of the file", {"type": "string", "enum": _MODULES}, "api.js")
# Nothing from another host, and nothing that is written into a page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI writes HTML by itself.
_STRICT_POLICY = f"{_POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"
_TEXT = {"type": "string"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

bp = Blueprint("page", __name__)


def _add(path: str, file: Path, kind: str, id: str, summary: str) -> None:
    policy = _POLICY if path.startswith("/docs") else _STRICT_POLICY
    headers = {"Content-Security-Policy": "nothing from another host", "ETag": ""}
    there = {
        "description": "It",
        "content": {f"text/{kind}": {"schema": _TEXT}},
        "headers": headers,
    }
    unchanged = {"description": "The client has it", "headers": headers}

    @operation({200: there, 304: unchanged}, public=True, id=id, path=_MODULE)
    def send(name: str = "") -> Response:
        if name and name not in _MODULES:
            raise NotFound
        response = send_file(file / name, f"text/{kind}", conditional=True)
        response.headers.update({**_HEADERS, "Content-Security-Policy": policy})
        return response

    send.__doc__ = summary
    bp.add_url_rule(path, id, send)


for _facts in _FILES:
    _add(*_facts)
