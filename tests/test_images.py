"""What counts as an image, and as a whole one."""

import hashlib
import io
import random
import threading

import pytest
from PIL import Image, ImageFile
from upstream import image_bytes

import images
from records import Remedy


def saved(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "content_type", "extension"),
    [
        ("PNG", "image/png", "png"),
        ("JPEG", "image/jpeg", "jpg"),
        ("WEBP", "image/webp", "webp"),
    ],
)
def test_the_bytes_say_what_it_is(tmp_path, kind, content_type, extension):
    data = image_bytes(kind, (300, 200))
    image = images.inspect(saved(tmp_path / "misleading.txt", data))
    assert (image.content_type, image.extension) == (content_type, extension)
    assert (image.bytes, image.width, image.height) == (len(data), 300, 200)
    assert image.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"<html></html>", b"GIF89a" + b"\0" * 40, b"RIFF\x24\0\0\0WAVEfmt ", b"\xff\xd8"],
)
def test_other_bytes_are_no_image(tmp_path, data):
    with pytest.raises(images.NotAnImage) as error:
        images.inspect(saved(tmp_path / "x", data))
    assert (error.value.code, error.value.remedy) == ("not_an_image", Remedy.RETRY)


def noise(kind, **options):
    """Return an image of many bytes, so that there is something to cut off."""
    rows = random.Random(1).randbytes(200 * 200 * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (200, 200), rows).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99, -12, -2, -1])
def test_an_image_that_ends_early_is_found_out(tmp_path, kind, kept):
    data = noise(kind)
    cut = data[: int(len(data) * kept)] if kept > 0 else data[:kept]
    with pytest.raises(images.BrokenImage) as error:
        images.inspect(saved(tmp_path / "x", cut))
    assert (error.value.code, error.value.remedy) == ("upstream_truncated", Remedy.RETRY)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_not_one_byte_may_be_missing(tmp_path, kind):
    data = image_bytes(kind)
    for kept in range(len(data)):
        with pytest.raises(images.ImageError):
            images.inspect(saved(tmp_path / "x", data[:kept]))
    assert images.inspect(saved(tmp_path / "x", data)).bytes == len(data)


def test_a_png_with_a_wrong_bit_is_found_out(tmp_path):
    # Stored without compression, so that nothing but the checksum can tell.
    data = bytearray(noise("PNG", compress_level=0))
    data[len(data) // 2] ^= 1
    with pytest.raises(images.BrokenImage):
        images.inspect(saved(tmp_path / "x", bytes(data)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_bytes_behind_the_end_are_no_fault(tmp_path, kind):
    data = image_bytes(kind) + b"trailer" * 1000
    assert images.inspect(saved(tmp_path / "x", data)).bytes == len(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_pixels_are_decoded(tmp_path, monkeypatch, kind):
    path = saved(tmp_path / "x", image_bytes(kind))
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(1) or load(self))
    images.inspect(path)
    assert decoded


def test_the_pixels_are_counted_before_they_are_decoded(tmp_path):
    with pytest.raises(images.TooManyPixels) as error:
        images.inspect(saved(tmp_path / "x", image_bytes("PNG", (4097, 4096))))
    assert (error.value.code, error.value.remedy) == ("image_too_large", Remedy.FAIL)
    assert images.inspect(saved(tmp_path / "y", image_bytes("PNG", (4096, 4096)))).width == 4096


def test_a_decompression_bomb_is_only_too_large(tmp_path):
    out = io.BytesIO()
    Image.new("1", (20000, 20000)).save(out, "PNG")
    data = out.getvalue()
    with pytest.raises(images.TooManyPixels):
        images.inspect(saved(tmp_path / "x", data))


def test_only_one_picture_is_decoded_at_a_time(tmp_path, monkeypatch):
    path = saved(tmp_path / "x", image_bytes())
    load, inside, most = ImageFile.ImageFile.load, [], []

    def watched(image):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)  # Another thread would come in meanwhile.
        try:
            return load(image)
        finally:
            inside.pop()

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    decoder = images.Decoder()
    threads = [threading.Thread(target=decoder.inspect, args=(path,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decoder.close()
    assert most == [1] * 8
    assert [t for t in threading.enumerate() if t.name.startswith("decode")] == []


def test_a_file_that_cannot_be_read_is_not_called_broken(tmp_path):
    with pytest.raises(FileNotFoundError):
        images.inspect(tmp_path / "none")
