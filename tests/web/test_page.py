"""The files of the page, and of the page of the API document: who may have them, and how."""

from pathlib import Path

import pytest
from conftest import KEYS

from web import page

MODULES = sorted(file.name for file in (Path(page.__file__).parent / "static/page").iterdir())
FILES = ["/", "/page.css", "/page.js", *(f"/page/{name}" for name in MODULES)]
DOCS = ["/docs", "/docs/ui.css", "/docs/ui.js", "/docs/docs.js"]


@pytest.mark.parametrize("path", FILES + DOCS)
def test_the_files_need_no_key_and_let_nothing_in(serve, path):
    client = serve(API_KEYS=KEYS).client
    answer = client.get(path)
    assert answer.status_code == 200
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["img-src"] == "'self' blob: data:"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    again = client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.headers["Cache-Control"]) == (304, "no-cache")


def test_the_files_are_typed(client):
    kinds = {"/": "html", "/docs": "html", "/page.css": "css", "/docs/ui.css": "css"}
    for path in FILES + DOCS:
        kind = kinds.get(path, "javascript")
        assert client.get(path).content_type == f"text/{kind}; charset=utf-8"


@pytest.mark.parametrize("name", ["none.js", "..", "..%2Fpage.js", "../page.js", "%2e%2e/docs.js"])
def test_no_other_file_is_a_module(client, name):
    assert client.get(f"/page/{name}").status_code == 404


@pytest.mark.parametrize("path", ["/openapi.json", *DOCS])
def test_the_document_and_its_page_are_for_everybody_but_other_sites(serve, path):
    anyone = serve(API_KEYS=KEYS).client
    assert anyone.get(path).status_code == 200
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
        assert anyone.get(path, headers=headers).status_code == 403
    assert serve().client.get(path, headers={"Host": "evil.example"}).status_code == 403
