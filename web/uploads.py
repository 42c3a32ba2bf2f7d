"""What a request uploads: fields, and images that go to disk as they come, checked there."""

import binascii
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from flask import request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData

from images import BrokenImage, ImageError, NotAnImage, TooManyPixels
from inputs import Arrival
from outputs import whole_image_path
from web import schemas
from web.errors import Refusal
from web.params import MAX_BODY, body_chunks, check_declared
from web.schemas import Generate, Invalid, Request
from web.service import service

FORM = "multipart/form-data"
IMAGE_PARTS = {"image", "images", "image[]", "images[]"}
MAX_JSON_BODY = 8 * 2**20
MAX_PARTS = 100
# More than any model takes; an id of a task makes a large file of a few bytes.
MAX_IMAGES = 16
# The headers of a part and what has come of its content, in bytes.
_MAX_BUFFER = 2**17
# A task's id, or what stands before the data of a data URL, is shorter.
_HEAD = 256
_CHUNK = 65536
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_WHITE_SPACE = b" \t\r\n\f\v"

_FAULTS: dict[type[Exception], str] = {
    NotAnImage: "is not a PNG, JPEG or WebP image",
    BrokenImage: "ends early, or does not decode: send the whole file",
    TooManyPixels: "is larger than 4096 x 4096 pixels",
}
# Of the bodies that are parsed in memory, one at a time.
_parsing = threading.Lock()


def understand(
    kind: type[Generate], held: ExitStack, image_text: Callable[[Any], str]
) -> tuple[Request, list[Arrival]]:
    """Read a request to edit images, and the images that came with it, or refuse it.

    Their files are removed when `held` is closed, but for those that were published.
    `image_text` returns the text of an image in a JSON body, or raises Invalid.
    """
    if "Idempotency-Key" not in request.headers:  # Else it may be answered without room.
        service.check_disk()
    check_declared(FORM)
    is_form, receiver = request.mimetype == FORM, _Receiver(held)
    fields = receiver.read_form() if is_form else receiver.read_json(image_text)
    images = [arrival.image for arrival in receiver.arrivals]
    find = service.registry.find
    asked = schemas.understand(kind, fields, service.config, find, images, is_form)
    return asked, receiver.arrivals


class _Receiver:
    """Read one body, image by image."""

    def __init__(self, held: ExitStack):
        self.arrivals: list[Arrival] = []
        self._held = held

    def read_json(self, image_text: Callable[[Any], str]) -> dict[str, Any]:
        """Read a JSON body: first to disk, so that slow clients fill no memory."""
        maximum = min(MAX_JSON_BODY, service.config.max_upload_mb * 2**20)
        with service.inputs.arrival() as spool:
            try:
                for chunk in body_chunks(maximum):
                    spool.write(chunk)
            except Refusal as refusal:
                if refusal.status == 413:
                    advice = "send the images as files, in multipart/form-data"
                    raise Refusal(413, f"{refusal} of JSON; {advice}") from refusal
                raise
            with _parsing:
                fields = schemas.json_object(spool.read())
                texts = fields.pop("images", None)
                if not isinstance(texts, list | None):
                    raise Invalid("images must be a list", "images")
                for number, item in enumerate(texts or ()):
                    with _naming(number):
                        self._take(_slices(image_text(item)), is_file=False)
                return fields

    def read_form(self) -> dict[str, list[str]]:
        """Read a multipart body: the images to disk as they come."""
        fields: dict[str, list[str]] = {}
        room = MAX_BODY
        for part, chunks in _parts(body_chunks(service.config.max_upload_mb * 2**20)):
            if part.name in IMAGE_PARTS:
                self._take_part(part, chunks)
            elif isinstance(part, File):
                hint = schemas.HINTS.get(part.name, "send it as text")
                raise Invalid(f"{part.name[:50]!a} is a file; only images may be one: {hint}")
            else:
                text = _text(part.name, chunks, room)
                room -= len(text)
                fields.setdefault(part.name, []).append(text)
        return fields

    def _take_part(self, part: Field | File, chunks: Iterator[bytes]) -> None:
        head, chunks = _peek(chunks)
        # What a browser sends for a file that nobody chose.
        if not (isinstance(part, File) and not part.filename and not head):
            with _naming(len(self.arrivals)):
                self._take(chunks, isinstance(part, File))

    def _take(self, chunks: Iterator[bytes], is_file: bool) -> None:
        """Keep an image that comes as its bytes, in base64, as a data URL or as a task's id."""
        if len(self.arrivals) == MAX_IMAGES:
            raise Invalid(f"is one too many: at most {MAX_IMAGES} come in one request")
        head, chunks = _peek(chunks)
        if not head:
            raise Invalid("is empty")
        if not is_file and not head.startswith(_SIGNATURES):
            chunks = _of_text(head, chunks)
        arrival = self._held.enter_context(service.inputs.arrival())
        arrival.receive(chunks, service.decoder.verifier())
        self.arrivals.append(arrival)


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Say of a fault which of the images has it."""
    try:
        yield
    except (ImageError, Invalid) as error:
        why = _FAULTS.get(type(error)) or str(error)
        raise Invalid(f"images[{number}] {why}", "images") from error


def _parts(body: Iterator[bytes]) -> Iterator[tuple[Field | File, Iterator[bytes]]]:
    """Yield the parts of a multipart body, each with its content, which is to be read first."""
    boundary = request.mimetype_params.get("boundary", "")
    if not boundary:
        raise Invalid("The body is multipart/form-data without a boundary; let the client set it")
    decoder = MultipartDecoder(boundary.encode(), _MAX_BUFFER, max_parts=MAX_PARTS)
    events = _events(decoder, body)
    for event in events:
        if isinstance(event, Field | File):
            if not event.name:
                raise Invalid("A part of the form has no name")
            yield event, _content(events)


def _events(decoder: MultipartDecoder, body: Iterator[bytes]) -> Iterator[Event]:
    try:
        while not isinstance(event := decoder.next_event(), Epilogue):
            if isinstance(event, NeedData):
                decoder.receive_data(next(body, None))
            else:
                yield event
    except RequestEntityTooLarge:
        sentence = f"The form has more than {MAX_PARTS} parts, or too long a name of one"
        raise Invalid(f"{sentence}, or too much beside them") from None
    except ValueError as error:
        raise Invalid("The body is not valid multipart/form-data, or has no end") from error


def _content(events: Iterator[Event]) -> Iterator[bytes]:
    for event in events:
        if isinstance(event, Data):
            if event.data:
                yield event.data
            if not event.more_data:
                return


def _text(name: str, chunks: Iterator[bytes], room: int) -> str:
    text = bytearray()
    for chunk in chunks:
        text += chunk
        if len(text) > room:
            raise Refusal(413, f"{name[:50]} is too long: all fields may have 1 MiB")
    try:
        # A browser ends each line of a text with both, whatever was typed.
        return text.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise Invalid(f"{name[:50]} is not UTF-8", name) from None


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes, at least _HEAD where there are as many, and all of them."""
    head = b""
    while len(head) < _HEAD and (chunk := next(chunks, b"")):
        head += chunk
    return head, itertools.chain([head], chunks)


def _slices(text: str) -> Iterator[bytes]:
    """Yield a text in pieces; what is not ASCII is no base64 either."""
    for start in range(0, len(text), _CHUNK):
        yield text[start : start + _CHUNK].encode("ascii", "replace")


def _of_text(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Return the bytes of the image that a text names, or raise Invalid."""
    start = head.lstrip(_WHITE_SPACE)
    if start[:5].lower() == b"data:":
        return _decoded(_without_type(start, chunks))
    if re.match(rb"https?://", start, re.IGNORECASE):
        raise Invalid("is an address, which is not fetched: send the image itself")
    if len(head) >= _HEAD:
        return _decoded(chunks)
    if found := _of_task(head.strip(_WHITE_SPACE).decode("ascii", "replace")):
        return found
    with suppress(Invalid):
        data = b"".join(_decoded(chunks))
        if data.startswith(_SIGNATURES):
            return iter([data])
    raise Invalid("is neither the id of a task here nor an image in base64")


def _without_type(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Return what follows the type of a data URL."""
    kind, comma, _ = head[:_HEAD].partition(b",")
    if not comma or not kind.lower().endswith(b";base64"):
        raise Invalid("is a data URL, but not one in base64: data:image/png;base64,...")
    next(chunks)
    return itertools.chain([head[len(kind) + 1 :]], chunks)


def _of_task(name: str) -> Iterator[bytes] | None:
    """Return the image of a task, or None where the text is no task's id."""
    task = service.database.get(name) if name.isprintable() else None
    if task is None:
        if _UUID.fullmatch(name):
            raise Invalid(f"names the task {name}, which there is not")
        return None
    if task.status != "completed":
        raise Invalid(f"names the task {name}, which has no image: it is {task.status}")
    (task,) = service.with_image_facts([task])
    path = whole_image_path(service.config, task)
    if path is None:
        raise Invalid(f"names the task {name}, whose image is no longer there")
    try:
        return _read(path.open("rb"))
    except OSError as error:
        raise Invalid(f"names the task {name}, whose image is no longer there") from error


def _read(file: Any) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _decoded(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decode base64 in pieces, without its white space; raise Invalid where it is at fault."""
    left, has_ended = b"", False
    for chunk in chunks:
        text = left + chunk.translate(None, _WHITE_SPACE)
        size = len(text) // 4 * 4
        text, left = text[:size], text[size:]
        if text and has_ended:
            raise Invalid("is not valid base64: something follows its end")
        has_ended = has_ended or text.endswith(b"=")
        try:
            yield binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error as error:
            fault = f"{str(error)[:1].lower()}{str(error)[1:]}"
            raise Invalid(f"is not valid base64: {fault}") from None
    if left:
        raise Invalid("is not valid base64: its length is not a multiple of four")
