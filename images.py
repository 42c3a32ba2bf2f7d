"""What a file is: a PNG, JPEG or WebP image by its bytes, and whether it is whole."""

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as Pillow

MAX_PIXELS = 4096 * 4096
EXTENSIONS = ("png", "jpg", "webp")

_TAIL = 4096
# One decoded picture at a time: several at once are where a small machine's memory goes.
_decoding = threading.Lock()


class ImageError(Exception):
    """A file that is no picture to keep: `code` says why, `again` if another call may help."""

    code = "upstream_truncated"
    again = True


class NotAnImage(ImageError):
    """The bytes are not those of a PNG, JPEG or WebP image."""

    code = "not_an_image"


class BrokenImage(ImageError):
    """The bytes begin as an image, but end early or do not decode."""


class TooManyPixels(ImageError):
    """The picture is larger than MAX_PIXELS."""

    code = "image_too_large"
    again = False


@dataclass(frozen=True)
class Image:
    """The facts of a whole image file; `extension` is without the dot."""

    content_type: str
    extension: str
    bytes: int
    width: int
    height: int
    sha256: str


def inspect(path: Path) -> Image:
    """Decode the file whole and return its facts, or raise ImageError.

    Only the bytes count, never a name or a header. Raises OSError where the file
    cannot be read.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        file.seek(0)
        head = file.read(16)
        file.seek(max(0, size - _TAIL))
        tail = file.read()
    kind = _kind(head)
    if kind is None:
        raise NotAnImage("Chutes answered with something that is not a PNG, JPEG or WebP image")
    if not _has_its_end(kind, head, tail, size):
        raise BrokenImage("The image ended early")
    with _decoding:
        width, height = _decode(path, kind)
    content_type = f"image/{kind.lower()}"
    extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    return Image(content_type, extension, size, width, height, sha256)


def keep(part: Path, target: Path) -> tuple[Path, Image]:
    """Give a whole image its final name, `target` and the ending its bytes ask for.

    The file must be on disk (fsync) already; when this returns, so is its name. Raises
    ImageError, and then no file has a final name.
    """
    image = inspect(part)
    path = target.with_name(f"{target.name}.{image.extension}")
    part.replace(path)
    try:
        _sync_folder(path.parent)
    except OSError:
        path.unlink()
        raise
    return path, image


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _kind(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    return None


def _has_its_end(kind: str, head: bytes, tail: bytes, size: int) -> bool:
    """Tell whether the last bytes are there: decoders do not miss them all."""
    if kind == "JPEG":
        return b"\xff\xd9" in tail
    if kind == "WEBP":
        return size >= int.from_bytes(head[4:8], "little") + 8
    return b"IEND\xae\x42\x60\x82" in tail


def _decode(path: Path, kind: str) -> tuple[int, int]:
    try:
        with Pillow.open(path, formats=(kind,)) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise TooManyPixels(
                    f"The image has {width} x {height} pixels, more than 4096 x 4096"
                )
            picture.load()
        if kind == "PNG":
            # load() does not look at the checksums of the chunks.
            with Pillow.open(path, formats=(kind,)) as picture:
                picture.verify()
    except (ImageError, MemoryError):
        raise
    except Pillow.DecompressionBombError as error:
        raise TooManyPixels("The image has more than 4096 x 4096 pixels") from error
    except Exception as error:  # Decoders raise whatever a broken file leads them to.
        if isinstance(error, OSError) and error.errno:
            raise
        raise BrokenImage("The image does not decode") from error
    return width, height
