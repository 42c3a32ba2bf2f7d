"""What a file is: a PNG, JPEG or WebP image by its bytes, and whether it is whole."""

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from PIL import Image as Pillow

from records import AttemptError, Image, Remedy

MAX_PIXELS = 4096 * 4096
THUMBNAIL_SIDE = 512

_Result = TypeVar("_Result")
_BROKEN = "The image ended early or does not decode"


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

    def inspect(self, path: Path) -> Image:
        """Do as `inspect` does."""
        return self._do(inspect, path)

    def thumbnail(self, path: Path) -> bytes:
        """Do as `thumbnail` does."""
        return self._do(thumbnail, path)

    def close(self) -> None:
        """Finish what is being decoded, and end the thread."""
        self._thread.shutdown()

    def _do(self, work: Callable[[Path], _Result], path: Path) -> _Result:
        try:
            future = self._thread.submit(work, path)
        except RuntimeError:  # The interpreter is going down, but the image is paid for.
            return work(path)
        return future.result()


def inspect(path: Path) -> Image:
    """Decode the file whole and return its facts, or raise ImageError.

    Only the bytes count, never a name or a header. Raises OSError where the file
    cannot be read.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        file.seek(0)
        kind = _kind(file.read(16))
    if kind is None:
        raise NotAnImage("Chutes answered with something that is not a PNG, JPEG or WebP image")
    width, height = _decode(path, kind)
    content_type = f"image/{kind.lower()}"
    extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    return Image(content_type, extension, size, width, height, sha256)


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


def _kind(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    return None


def _decode(path: Path, kind: str) -> tuple[int, int]:
    with _decoding_faults():
        with Pillow.open(path, formats=(kind,)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise TooManyPixels(
                    f"The image has {width} x {height} pixels, more than 4096 x 4096"
                )
            image.load()
        if kind == "PNG":
            _check_chunks(path)
    return width, height


def _check_chunks(path: Path) -> None:
    """Check a PNG to its last byte: load() looks at no checksum, verify() not at the last."""
    with path.open("rb") as file:
        Pillow.open(file, formats=("PNG",)).verify()
        if len(file.read(4)) < 4:
            raise BrokenImage(_BROKEN)


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
