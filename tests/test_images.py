"""What counts as an image, and as a whole one."""

import hashlib
import io
import random
import struct
import threading
import zlib

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


# What the tests spoil


def noise(kind, side=200, **options):
    """Return an image of many bytes, so that there is something to cut off."""
    rows = random.Random(1).randbytes(side * side * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (side, side), rows).save(out, kind, **options)
    return out.getvalue()


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width=20, height=10, depth=8, colour=2, compression=0, filtering=0, interlace=0):
    fields = (width, height, depth, colour, compression, filtering, interlace)
    return chunk(b"IHDR", struct.pack(">2I5B", *fields))


ROWS = zlib.compress(random.Random(2).randbytes((1 + 20 * 3) * 10))
DATA = chunk(b"IDAT", ROWS)
TEXT = chunk(b"tEXt", b"Comment\0made for the tests")
END = chunk(b"IEND")


def segment(marker, data):
    return b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(data)) + data


def lossless_jpeg(width=64, height=64):
    """Return a grey image, each of its pixels as the one before: a bit of 0."""
    table = segment(0xC4, b"\0" + bytes([1, *[0] * 15]) + b"\0")
    frame = segment(0xC3, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
    scan = segment(0xDA, b"\1\1\0\1\0\0")
    return b"\xff\xd8" + table + frame + scan + bytes(width * height // 8) + b"\xff\xd9"


SAMPLES = {
    "a PNG": noise("PNG", 24),
    "a PNG of many chunks": png(
        header(),
        *(chunk(b"tEXt", b"Comment\0" + b"x" * 20 * n) for n in range(5)),
        *(chunk(b"IDAT", ROWS[start : start + 40]) for start in range(0, len(ROWS), 40)),
        chunk(b"IDAT"),
        chunk(b"prVt", b"what nobody knows"),
        END,
    ),
    "a baseline JPEG": noise("JPEG", 32),
    "a JPEG with restart markers": noise("JPEG", 32, restart_marker_blocks=1),
    "a progressive JPEG": noise("JPEG", 32, progressive=True),
    "a lossless JPEG": lossless_jpeg(),
    "a lossy WebP": noise("WEBP", 32),
    "a lossless WebP": noise("WEBP", 24, lossless=True),
}
PNG_SAMPLES = [name for name in SAMPLES if "PNG" in name]
DECODED_SAMPLES = [name for name in SAMPLES if "PNG" not in name]


def unread(*args):
    raise AssertionError("the file was read again")


def verify(data, rng, decode=unread, sizes=(1, 2, 7, 100, 5000)):
    """Feed the bytes in pieces of any size, down to one byte, as a network gives them."""
    verifier = images.Verifier(decode)
    start = 0
    while start < len(data):
        size = rng.choice(sizes)
        verifier.feed(data[start : start + size])
        start += size
    return verifier.finish("no file")


def whole_at_full_scale(path):
    try:
        with Image.open(path, formats=("JPEG", "WEBP")) as image:
            image.load()
    except Exception:
        return False
    return True


# Whole, or not


@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_are_whole(tmp_path, name):
    image = images.inspect(saved(tmp_path / "x", SAMPLES[name]))
    assert image.bytes == len(SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_the_pieces_in_which_it_comes_do_not_matter(tmp_path, name):
    data = SAMPLES[name]
    expected = images.inspect(saved(tmp_path / "x", data))
    size = expected.width, expected.height
    for sizes in ((1,), (2,), (3,), (1, 2, 7, 100), (len(data),)):
        assert verify(data, random.Random(1), lambda *args: size, sizes) == expected


@pytest.mark.parametrize("name", SAMPLES)
def test_an_image_that_ends_early_is_found_out_as_it_passes(name):
    data, rng = SAMPLES[name], random.Random(name)
    for _ in range(1000):
        with pytest.raises(images.ImageError) as error:
            verify(data[: rng.randrange(len(data))], rng)
        assert (error.value.code, error.value.remedy) in (
            ("upstream_truncated", Remedy.RETRY),
            ("not_an_image", Remedy.RETRY),
        )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99, -12, -2, -1])
def test_what_is_left_of_an_image_is_called_broken(tmp_path, kind, kept):
    data = noise(kind)
    cut = data[: int(len(data) * kept)] if kept > 0 else data[:kept]
    with pytest.raises(images.BrokenImage) as error:
        images.inspect(saved(tmp_path / "x", cut))
    assert (error.value.code, error.value.remedy) == ("upstream_truncated", Remedy.RETRY)
    assert str(error.value) == "The image ended early or does not decode"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_not_one_byte_may_be_missing(tmp_path, kind):
    data = image_bytes(kind)
    for kept in range(len(data)):
        with pytest.raises(images.ImageError):
            images.inspect(saved(tmp_path / "x", data[:kept]))
    assert images.inspect(saved(tmp_path / "x", data)).bytes == len(data)


def test_no_jpeg_may_lack_its_end_marker(tmp_path):
    # Some decode whole without it: where the last bits of the pixels were read ahead.
    for side in range(8, 108):
        data = noise("JPEG", side)
        for missing in (1, 2):
            with pytest.raises(images.BrokenImage):
                images.inspect(saved(tmp_path / "x", data[:-missing]))


@pytest.mark.parametrize("name", PNG_SAMPLES)
def test_a_wrong_byte_anywhere_in_a_png_is_found_out(name):
    data, rng = SAMPLES[name], random.Random(name)
    for _ in range(1000):
        spoiled, place = bytearray(data), rng.randrange(len(data))
        spoiled[place] ^= rng.randrange(1, 256)
        with pytest.raises(images.NotAnImage if place < 8 else images.BrokenImage):
            verify(bytes(spoiled), rng)


@pytest.mark.parametrize("name", DECODED_SAMPLES)
def test_a_wrong_byte_that_a_full_decode_finds_is_found_out(tmp_path, name):
    data, rng = SAMPLES[name], random.Random(name)
    found = 0
    for _ in range(1000):
        spoiled = bytearray(data)
        spoiled[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        path = saved(tmp_path / "x", bytes(spoiled))
        try:
            images.inspect(path)
        except images.ImageError:
            found += 1
        else:
            assert whole_at_full_scale(path)
    assert found > 10


@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_behind_the_end_are_no_fault(tmp_path, name):
    data = SAMPLES[name] + b"trailer\xff\xd9" * 1000
    image = images.inspect(saved(tmp_path / "x", data))
    assert (image.bytes, image.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize(
    "chunks",
    [
        (),
        (TEXT, header(), DATA, END),
        (DATA, END),
        (header(), header(), DATA, END),
        (header(), END),
        (header(), chunk(b"IDAT"), END),
        (header(), DATA, TEXT, DATA, END),
        (header(), DATA),
        (header(), DATA, chunk(b"IEND", b"x")),
        (header(), chunk(b"te t"), DATA, END),
        (chunk(b"IHDR", header()[8:20]), DATA, END),
        (chunk(b"IHDR", header()[8:22]), DATA, END),
        (chunk(b"iHDR", header()[8:21]), DATA, END),
        *((header(**field), DATA, END) for field in ({"width": 0}, {"height": 0}, {"depth": 3})),
        *((header(**field), DATA, END) for field in ({"colour": 5}, {"depth": 4, "colour": 2})),
        *((header(**field), DATA, END) for field in ({"compression": 1}, {"filtering": 1})),
        (header(interlace=2), DATA, END),
    ],
)
def test_the_chunks_of_a_png_must_make_an_image(chunks):
    with pytest.raises(images.BrokenImage):
        verify(png(*chunks), random.Random(1))


@pytest.mark.parametrize("fields", [{}, {"depth": 1, "colour": 0}, {"interlace": 1}])
def test_a_png_may_hold_other_chunks(fields):
    image = verify(png(header(**fields), TEXT, DATA, TEXT, END), random.Random(1))
    assert (image.width, image.height) == (20, 10)


# What is decoded, and how


@pytest.mark.parametrize(("kind", "size"), [("JPEG", (8, 6)), ("WEBP", (64, 48))])
def test_the_pixels_are_decoded_a_jpegs_at_an_eighth(tmp_path, monkeypatch, kind, size):
    path = saved(tmp_path / "x", image_bytes(kind, (64, 48)))
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self)
    )
    image = images.inspect(path)
    assert (image.width, image.height) == (64, 48)
    assert set(decoded) == {size}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_pixels_are_counted_before_they_are_decoded(tmp_path, kind):
    with pytest.raises(images.TooManyPixels) as error:
        images.inspect(saved(tmp_path / "x", image_bytes(kind, (4097, 4096))))
    assert (error.value.code, error.value.remedy) == ("image_too_large", Remedy.FAIL)
    assert str(error.value) == "The image has 4097 x 4096 pixels, more than 4096 x 4096"
    assert images.inspect(saved(tmp_path / "y", image_bytes(kind, (4096, 4096)))).width == 4096


def test_a_spoiled_size_is_not_taken_for_a_large_image():
    data = bytearray(png(header(), DATA, END))
    data[16] ^= 1
    with pytest.raises(images.BrokenImage):
        verify(bytes(data), random.Random(1))


def test_a_decompression_bomb_is_only_too_large(tmp_path):
    bomb = image_bytes("JPEG", (64, 48)).replace(
        struct.pack(">HH", 48, 64), struct.pack(">HH", 65500, 65500)
    )
    for data in (bomb, png(header(20000, 20000), DATA, END)):
        with pytest.raises(images.TooManyPixels):
            images.inspect(saved(tmp_path / "x", data))


def test_only_one_picture_is_decoded_at_a_time(tmp_path, monkeypatch):
    path = saved(tmp_path / "x", image_bytes("JPEG"))
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
    decoder = images.Decoder()
    verifier = decoder.verifier()
    verifier.feed(image_bytes("JPEG"))
    with pytest.raises(FileNotFoundError):
        verifier.finish(tmp_path / "none")
    decoder.close()
