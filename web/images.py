"""The routes of images: the bytes as Chutes sent them, and a small one to look through."""

import hashlib
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, g, request, send_file
from zipstream import ZipStream  # type: ignore[import-untyped]

import outputs
from images import ImageError
from outputs import thumbnail_path, whole_image_path
from records import Task
from web.errors import Refusal
from web.openapi import OCTETS, binary, operation
from web.params import ArchiveQuery, ImageQuery, get_task_or_404, query
from web.service import service

# How long a client is asked to wait: one that has waited may ask at once, one that wanted to
# and could not would use up its retries.
_RETRY_SECONDS = 5
_RETRY_SECONDS_INSTEAD_OF_WAIT = 10

log = logging.getLogger("images")

_TYPES = ("image/png", "image/jpeg", "image/webp")
_CACHED = {"ETag": "strong: the SHA-256 of the bytes", "Cache-Control": "immutable, for a year"}
_NAMED = {**_CACHED, "Content-Disposition": "inline, with the file's name"}
_RANGE = {"Range": "one range of bytes; any other is ignored", "If-None-Match": "an ETag"}

_ATTACHED = {"Content-Length": "bytes", "Content-Disposition": "attachment, as images.zip"}
_MANIFEST = ("id", "prompt", "model", "params", "sha256")

bp = Blueprint("images", __name__)


def _bytes(*content_types: str) -> dict[int, dict[str, Any]]:
    """Return what the document says of an answer that is an image, or a part of one."""
    content = binary(*content_types)
    return {
        200: {"description": "The bytes", "content": content, "headers": _NAMED},
        206: {"description": "A part of the bytes", "content": content, "headers": _NAMED},
        304: {"description": "The client has these bytes", "headers": _CACHED},
    }


@bp.get("/images/<name>")
@operation(_bytes(*_TYPES), errors=(409, 410, 416), query=ImageQuery, headers=_RANGE)
def image(name: str) -> Response:
    """Fetch the picture; /images/{id}.png, or what its ending is, is the same."""
    # The Node server's ids may have dots.
    is_id = "." not in name or service.database.get(name)
    task_id, dot, extension = (name, "", "") if is_id else name.rpartition(".")
    task = _completed(task_id, query(ImageQuery).wait)
    made = Path(task.file_path or "")
    if dot and made.suffix != f".{extension}":
        raise Refusal(404, f"The picture of this task is {made.name}")
    path = _path(task)
    return _send(path, task, path, task.content_type, task.sha256)


@bp.get("/images/<task_id>/thumbnail")
@operation(_bytes("image/webp"), errors=(409, 410, 416), headers=_RANGE)
def thumbnail(task_id: str) -> Response:
    """Fetch a picture of at most 512 pixels a side."""
    task = _completed(task_id)
    original = _path(task)
    kept = thumbnail_path(service.config, task.id)
    try:
        data = _kept(kept) or service.decoder.thumbnail(original)
    except (ImageError, FileNotFoundError) as error:
        raise _gone(task) from error
    if not kept.exists():
        _keep(kept, data)
        if service.database.get(task.id) is None:
            kept.unlink(missing_ok=True)
    return _send(io.BytesIO(data), task, kept, "image/webp", hashlib.sha256(data).hexdigest())


@bp.get("/tasks/<task_id>/inputs/<int:number>")
@operation(_bytes(*_TYPES), errors=(410, 416), query=ImageQuery, headers=_RANGE, id="inputImage")
def input_image(task_id: str, number: int) -> Response:
    """Fetch a picture that the task edits; the first one is 0."""
    task = get_task_or_404(task_id)
    if number >= len(task.inputs):
        raise Refusal(404, f"This task has {len(task.inputs)} input images, counted from 0")
    image = task.inputs[number]
    if not service.inputs.has(image):
        raise Refusal(410, "This input image is no longer there, or no longer whole; send it again")
    path = service.inputs.path_of(image)
    return _send(path, task, path, image.content_type, image.sha256)


@bp.get("/images.zip")
@operation(
    {
        200: {
            "description": "The archive",
            "content": binary("application/zip"),
            "headers": _ATTACHED,
        }
    },
    query=ArchiveQuery,
)
def archive() -> Response:
    """Fetch the pictures of several tasks as one zip, with a manifest."""
    ids = query(ArchiveQuery).id
    stream = ZipStream(sized=True)
    lines = [_archived(stream, task_id, task_id in ids[:n]) for n, task_id in enumerate(ids)]
    g.task = None
    manifest = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    stream.add(manifest, "manifest.jsonl")
    # A file that is no longer as it was breaks the answer off, short of its length.
    headers = {
        "Content-Length": str(len(stream)),
        "Content-Disposition": 'attachment; filename="images.zip"',
        "X-Content-Type-Options": "nosniff",
    }
    return Response(stream, headers=headers, content_type=_type_asked_for("application/zip"))


def _archived(stream: ZipStream, task_id: str, is_there: bool) -> dict[str, Any]:
    """Add the image of a task to an archive; return what the manifest says of it."""
    try:
        task = _completed(task_id)
        if is_there:
            raise Refusal(409, "The task is named twice; its picture is there once")
        path = _path(task)
        try:
            stream.add_path(path, path.name, recurse=False)
        except OSError as error:
            raise _gone(task) from error
    except Refusal as refusal:
        return {"id": task_id, "missing": str(refusal)}
    return {name: getattr(task, name) for name in _MANIFEST}


def _completed(task_id: str, wait: int = 0) -> Task:
    """Return the task, or refuse its image: it is not there yet, or never will be."""
    task = get_task_or_404(task_id, wait)
    if task.status == "completed":
        (task,) = service.with_image_facts([task])
        if task.sha256 is None:
            sentence = "The file of this picture is not in OUTPUT_DIR, or is no whole image"
            raise Refusal(410, f"{sentence}; retry the task to make one", status=task.status)
        return task
    if task.status == "failed":
        sentence = f"The task has failed: {task.error}"
        raise Refusal(409, sentence, status=task.status, error_code=task.error_code)
    seconds = _RETRY_SECONDS_INSTEAD_OF_WAIT if "wait" in request.args else _RETRY_SECONDS
    headers = {"Retry-After": str(1 if g.waited else seconds)}
    raise Refusal(503, f"The picture is not there yet: {task.status}", headers, status=task.status)


def _path(task: Task) -> Path:
    path = whole_image_path(service.config, task)
    if path is None:
        raise _gone(task)
    return path


def _kept(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _keep(path: Path, data: bytes) -> None:
    """Keep a thumbnail; where that fails, it is made again the next time."""
    try:
        path.parent.mkdir(exist_ok=True)
        outputs.write_atomic(path, data)
    except OSError as error:
        log.warning("a thumbnail cannot be kept: %s", error)


def _send(
    file: Path | io.BytesIO, task: Task, name: Path, content_type: str | None, etag: str | None
) -> Response:
    # The Node server's files may be named in any way, and a header holds no such name.
    plain_name = re.sub(r"[^\w.-]", "_", name.name, flags=re.ASCII)
    try:
        size = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
        part = _part_asked_for(size)
        request.environ.pop("HTTP_RANGE", None)
        if part:
            request.environ["HTTP_RANGE"] = part
        response = send_file(
            file, content_type, download_name=plain_name, conditional=True, etag=etag or True
        )
    except FileNotFoundError as error:
        raise _gone(task) from error
    response.content_type = _type_asked_for(response.content_type)
    response.headers["Content-Disposition"] = f'inline; filename="{plain_name}"'
    response.headers["Cache-Control"] = "private, max-age=31536000, immutable"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _type_asked_for(content_type: str) -> str:
    """Return the true type, or that of any bytes to a client that accepts nothing else."""
    return OCTETS if request.headers.get("Accept") == OCTETS else content_type


def _part_asked_for(size: int) -> str | None:
    """Return the Range that is to be answered; any other is ignored (RFC 9110, 14.2).

    One that counts from the end becomes one from the start: a suffix longer than the file is
    the whole of it, for RFC 9110, but an error for Werkzeug.
    """
    found = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", request.headers.get("Range", "")[:60])
    if request.method != "GET" or not found or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        return f"bytes={max(0, size - int(last))}-"
    return None if last and int(first) > int(last) else found[0]


def _gone(task: Task) -> Refusal:
    fact = "The picture was made, but its file is no longer there, or no longer whole"
    sentence = f"{fact}; retry the task to make one"
    return Refusal(410, sentence, status=task.status)
