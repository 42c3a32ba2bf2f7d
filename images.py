"""What a file is: a PNG, JPEG or WebP image by its bytes, and whether it is whole; its base64."""

import base64
import functools
import hashlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from PIL import Image as Pillow

from records import AttemptError, Image, Remedy

MAX_PIXELS = 4096 * 4096
THUMBNAIL_SIDE = 512

_Result = TypeVar("_Result")
# A reader that stops where it needs more bytes than have come.
_Reading = Generator[None, None, _Result]
_BROKEN = "The image ended early or does not decode"
_READ_SIZE = 65536
# Base64 makes four characters of three bytes, so that each piece but the last is whole.
_BASE64_CHUNK = 48 * 1024
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
# The markers of a JPEG that have a length behind them, and its end.
_JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
_JPEG_END = b"\xd9"
_JPEG_LOSSLESS = (b"\xc3", b"\xc7", b"\xcb", b"\xcf")


class ImageError(AttemptError):
    """A file that is no image to keep."""

    code = "upstream_truncated"


class NotAnImage(ImageError):
    """The bytes are not those of a PNG, JPEG or WebP image."""

    code = "not_an_image"


class BrokenImage(ImageError):
    """The bytes begin as an image, but end early or do not decode."""


class TooManyPixels(ImageError):
    """The image is larger than MAX_PIXELS."""

    code = "image_too_large"
    remedy = Remedy.FAIL


class Decoder:
    """Decode one image at a time, in one thread, which `close` ends.

    Several at once are where a small machine's memory goes. And the allocator keeps what
    a thread has freed for that thread, so that each thread that ever decodes would keep
    an image's worth.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "decode")

    def verifier(self) -> "Verifier":
        """Return a verifier of one image, which decodes it in the thread if it must."""
        return Verifier(functools.partial(self._do, _decode))

    def inspect(self, path: Path) -> Image:
        """Do as `inspect` does."""
        return _inspect(path, self.verifier())

    def thumbnail(self, path: Path) -> bytes:
        """Do as `thumbnail` does."""
        return self._do(thumbnail, path)

    def close(self) -> None:
        """Finish what is being decoded, and end the thread."""
        self._thread.shutdown()

    def _do(self, work: Callable[..., _Result], *args: object) -> _Result:
        try:
            future = self._thread.submit(work, *args)
        except RuntimeError:  # The interpreter is going down, but the image is paid for.
            return work(*args)
        return future.result()


@dataclass(frozen=True)
class _Outline:
    """What the bytes tell by themselves: the kind, and for a PNG the width and height.

    `scalable` is a JPEG that can be decoded at a reduced scale.
    """

    kind: str
    size: tuple[int, int] | None = None
    scalable: bool = False


class Verifier:
    """Verify one image while its bytes pass: `feed` them all, in any pieces, then `finish`.

    A PNG is followed by its chunks, each with its checksum, and is not decoded. A JPEG and
    a WebP are followed to their end, and then `decode` reads the file. Bytes behind the end
    of an image are no fault. `size` is how many bytes there were.
    """

    def __init__(self, decode: Callable[[Path, _Outline], tuple[int, int]]):
        self._decode = decode
        self._sha256 = hashlib.sha256()
        self.size = 0
        self._stream = _Stream()
        self._reading = _read(self._stream)
        self._verdict: _Outline | ImageError | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes. What is wrong with them is raised by `finish`."""
        self._sha256.update(data)
        self.size += len(data)
        if self._verdict is None:
            self._stream.feed(data)
            self._read_on()

    def finish(self, path: Path) -> Image:
        """Return the facts of the image that is in the file, or raise ImageError.

        Only the bytes count, never a name or a header. Raises OSError where the file
        cannot be read.
        """
        if self._verdict is None:
            self._stream.end()
            self._read_on()
        if not isinstance(self._verdict, _Outline):
            raise self._verdict or BrokenImage(_BROKEN)
        width, height = self._verdict.size or self._decode(path, self._verdict)
        kind = self._verdict.kind
        extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
        sha256 = self._sha256.hexdigest()
        return Image(f"image/{kind.lower()}", extension, self.size, width, height, sha256)

    def _read_on(self) -> None:
        try:
            next(self._reading)
        except StopIteration as end:
            self._verdict = end.value
        except ImageError as error:
            self._verdict = error


class Base64Stream:
    """Texts with the contents of files between them in base64: in pieces, but of known length."""

    def __init__(self, texts: Sequence[str], files: Sequence[IO[bytes]]):
        self._texts = [text.encode() for text in texts]
        self._files = files
        sizes = [file.seek(0, os.SEEK_END) for file in files]
        self._length = sum(map(len, self._texts)) + sum((size + 2) // 3 * 4 for size in sizes)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        for text, file in zip(self._texts, self._files, strict=False):
            yield text
            file.seek(0)
            while data := file.read(_BASE64_CHUNK):
                yield base64.b64encode(data)
        yield self._texts[-1]


def inspect(path: Path) -> Image:
    """Return the facts of the image in a file, or raise ImageError, as a Verifier does."""
    return _inspect(path, Verifier(_decode))


def thumbnail(path: Path) -> bytes:
    """Return a WebP image of the image, at most THUMBNAIL_SIDE on its longest side.

    Raises BrokenImage where the file does not decode, OSError where it cannot be read.
    """
    out = io.BytesIO()
    with _decoding_faults(), Pillow.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        mode = "RGBA" if image.has_transparency_data else "RGB"
        image.convert(mode).save(out, "WEBP", quality=80)
    return out.getvalue()


def _inspect(path: Path, verifier: Verifier) -> Image:
    with path.open("rb") as file:
        while data := file.read(_READ_SIZE):
            verifier.feed(data)
    return verifier.finish(path)


class _Stream:
    """The bytes that have come and were not read yet.

    The reader's methods stop where they need more; at the end they raise BrokenImage.
    """

    def __init__(self) -> None:
        self._unread = bytearray()
        self._has_ended = False

    def feed(self, data: bytes) -> None:
        self._unread += data

    def end(self) -> None:
        self._has_ended = True

    def peek(self, size: int) -> _Reading[bytes]:
        """Return the next `size` bytes, or all that come, and leave them to be read."""
        while len(self._unread) < size and not self._has_ended:
            yield
        return bytes(self._unread[:size])

    def take(self, size: int) -> _Reading[bytes]:
        """Read `size` bytes."""
        while len(self._unread) < size:
            yield from self._more()
        return self._cut(size)

    def take_some(self, most: int) -> _Reading[bytes]:
        """Read what has come, at least one byte and at most so many."""
        while not self._unread:
            yield from self._more()
        return self._cut(most)

    def skip(self, size: int) -> _Reading[None]:
        """Read `size` bytes and forget them."""
        while size > 0:
            size -= len((yield from self.take_some(size)))

    def find(self, pattern: re.Pattern[bytes]) -> _Reading[bytes]:
        """Read to the end of the next match of a pattern of two bytes; return its group."""
        while not (found := pattern.search(self._unread)):
            del self._unread[:-1]
            yield from self._more()
        group: bytes = found[1]
        del self._unread[: found.end()]
        return group

    def _more(self) -> _Reading[None]:
        if self._has_ended:
            raise BrokenImage(_BROKEN)
        yield

    def _cut(self, size: int) -> bytes:
        taken = bytes(self._unread[:size])
        del self._unread[:size]
        return taken


def _read(stream: _Stream) -> _Reading[_Outline]:
    """Read an image to its end and no further."""
    head = yield from stream.peek(12)
    if head.startswith(_PNG_SIGNATURE):
        return (yield from _read_png(stream))
    if head.startswith(b"\xff\xd8\xff"):
        return (yield from _read_jpeg(stream))
    if head.startswith(b"RIFF") and head[8:] == b"WEBP":
        return (yield from _read_webp(stream))
    raise NotAnImage("Chutes answered with something that is not a PNG, JPEG or WebP image")


def _read_png(stream: _Stream) -> _Reading[_Outline]:
    yield from stream.take(len(_PNG_SIGNATURE))
    header = yield from stream.peek(8 + 13)
    kind, length = yield from _read_png_chunk(stream)
    if (kind, length) != (b"IHDR", 13):
        raise BrokenImage(_BROKEN)
    # Only now: the checksum is right, so that a spoiled size is not taken for a large image.
    size = _png_size(header[8:])
    data = runs_of_data = 0
    while kind != b"IEND":
        previous = kind
        kind, length = yield from _read_png_chunk(stream)
        if kind == b"IDAT":
            data += length
            runs_of_data += previous != kind
        if kind == b"IHDR":
            raise BrokenImage(_BROKEN)
    if not data or runs_of_data != 1 or length:
        raise BrokenImage(_BROKEN)
    return _Outline("PNG", size)


def _read_png_chunk(stream: _Stream) -> _Reading[tuple[bytes, int]]:
    """Check a chunk by its checksum; return its type and length."""
    length, kind = struct.unpack(">I4s", (yield from stream.take(8)))
    checksum, left = zlib.crc32(kind), length
    while left:
        data = yield from stream.take_some(left)
        checksum = zlib.crc32(data, checksum)
        left -= len(data)
    if checksum != int.from_bytes((yield from stream.take(4)), "big") or not kind.isalpha():
        raise BrokenImage(_BROKEN)
    return kind, length


def _png_size(header: bytes) -> tuple[int, int]:
    width, height, depth, colour, *methods = struct.unpack(">2I5B", header)
    if not width or not height or depth not in _PNG_DEPTHS.get(colour, ()):
        raise BrokenImage(_BROKEN)
    if methods not in ([0, 0, 0], [0, 0, 1]):  # Compression, filter, interlace.
        raise BrokenImage(_BROKEN)
    _check_pixels(width, height)
    return width, height


def _read_jpeg(stream: _Stream) -> _Reading[_Outline]:
    scalable = True
    while (marker := (yield from stream.find(_JPEG_MARKER))) != _JPEG_END:
        if marker in _JPEG_LOSSLESS:
            scalable = False
        length = int.from_bytes((yield from stream.take(2)), "big")
        yield from stream.skip(length - 2)
    return _Outline("JPEG", scalable=scalable)


def _read_webp(stream: _Stream) -> _Reading[_Outline]:
    head = yield from stream.take(8)
    yield from stream.skip(int.from_bytes(head[4:], "little"))
    return _Outline("WEBP")


def _decode(path: Path, outline: _Outline) -> tuple[int, int]:
    """Decode a file whole; return its width and height."""
    with _decoding_faults(), Pillow.open(path, formats=(outline.kind,)) as image:
        width, height = image.size
        _check_pixels(width, height)
        if outline.scalable:
            # As small as can be, an eighth: every coefficient is read all the same.
            image.draft(None, (1, 1))
        image.load()
    return width, height


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooManyPixels(f"The image has {width} x {height} pixels, more than 4096 x 4096")


@contextmanager
def _decoding_faults() -> Iterator[None]:
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Pillow.DecompressionBombError as error:
        raise TooManyPixels("The image has more than 4096 x 4096 pixels") from error
    except Exception as error:  # Decoders raise whatever a broken file leads them to.
        if isinstance(error, OSError) and error.errno:
            raise
        raise BrokenImage(_BROKEN) from error
