"""The routes of the page: one HTML file, one stylesheet and one script, for everybody to see."""

from collections.abc import Callable
from pathlib import Path

from flask import Blueprint, Response, send_file

from web.openapi import operation

_FOLDER = Path(__file__).resolve().parent / "static"
_FILES = {
    "/": ("index.html", "text/html", "page", "Look at the page"),
    "/page.css": ("page.css", "text/css", "stylesheet", "Read how it looks"),
    "/page.js": ("page.js", "text/javascript", "script", "Read what it does"),
}
_HEADERS = {
    # Nothing from another host, and nothing that is written into the page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _sender(file: Path, content_type: str, name: str, summary: str) -> Callable[[], Response]:
    headers = {"Content-Security-Policy": "nothing from another host", "ETag": ""}
    there = {"description": "It", "content": {content_type: {}}, "headers": headers}
    unchanged = {"description": "The client has it", "headers": headers}

    @operation({200: there, 304: unchanged}, for_all=True, id=name)
    def send() -> Response:
        response = send_file(file, content_type, conditional=True)
        response.headers.update(_HEADERS)
        return response

    send.__doc__ = summary
    return send


bp = Blueprint("page", __name__)
for _path, (_file, *_facts) in _FILES.items():
    bp.add_url_rule(_path, _file.replace(".", "_"), _sender(_FOLDER / _file, *_facts))
