"""The routes of the page: one HTML file, one stylesheet and one script, for everybody to see."""

from pathlib import Path

from flask import Blueprint, Response, send_file

_FOLDER = Path(__file__).resolve().parent / "static"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
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


def _sender(file: Path, content_type: str):
    def send() -> Response:
        response = send_file(file, content_type, conditional=True)
        response.headers.update(_HEADERS)
        return response

    return send


bp = Blueprint("page", __name__)
for _path, (_name, _content_type) in _FILES.items():
    bp.add_url_rule(_path, _name.replace(".", "_"), _sender(_FOLDER / _name, _content_type))
