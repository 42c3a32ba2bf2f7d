"""Requests to edit images, byte by byte: pictures of any size, forms, and who sends them."""

import base64
import hashlib
import json
import random
import socket
import struct
import zlib
from contextlib import closing

BOUNDARY = "a-boundary-of-the-tests"


def png(seed, side=16):
    """Return a PNG of noise, another one for each seed: three bytes a pixel, not compressed."""
    noise = random.Random(seed)
    rows = b"".join(b"\0" + noise.randbytes(side * 3) for _ in range(side))
    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each) for each in chunks)


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def form(*pictures, **fields):
    """Return the body of a multipart form with these pictures as files."""
    parts = [f'name="{name}"\r\n\r\n{text}'.encode() for name, text in fields.items()]
    parts += [b'name="images"; filename="x.png"\r\n\r\n' + picture for picture in pictures]
    before = f"--{BOUNDARY}\r\nContent-Disposition: form-data; ".encode()
    return b"".join(before + part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()


def request(body, *headers, length=None):
    """Return the bytes of a request to edit with this form."""
    lines = [
        "POST /edit HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body


def read_answer(connection):
    """Return the status and the JSON of an answer, read to its end."""
    with closing(connection), connection.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def send(server, *pictures, headers=(), **fields):
    """Edit pictures; return the status and the JSON of the answer."""
    connection = socket.create_connection(("127.0.0.1", server.port), 60)
    connection.sendall(request(form(*pictures, **fields), *headers))
    return read_answer(connection)


def edit(server, *pictures, prompt="p", **fields):
    """Add a task that edits pictures, and return its id."""
    status, answer = send(server, *pictures, prompt=prompt, **fields)
    assert status == 202, answer
    return answer["id"]


def name(picture):
    """Return the name of the file that a PNG is kept in."""
    return f"{hashlib.sha256(picture).hexdigest()}.png"


def sent(fields):
    """Return the pictures of a body that Chutes was sent."""
    return [base64.b64decode(text, validate=True) for text in fields["image_b64s"]]
