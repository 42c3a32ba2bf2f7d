"""The upstream: one request in, one file on disk out, or a ChutesError that says what to do."""

import functools
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, cast

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError

import models
import urls
from config import Config
from images import Base64Stream
from models import Model
from records import AttemptError, Remedy, Reply

MAX_RETRY_AFTER = 3600.0
# A quota is a day's or a month's; a later reset is an error of the answer.
MAX_QUOTA_WAIT = 32 * 86400.0
_CONNECT_SECONDS = 10.0
ERROR_BODY_SECONDS = 10.0
_LATE_SECONDS = 5.0
_ERROR_BODY_BYTES = 65536
_CHUNK = 65536
_DETAIL_LENGTH = 300
# A refusal may be JSON in a sentence in JSON, and so on.
_MAX_WRAPPINGS = 8
# Chutes' edge ends every call at 600 s: a gateway's error that late is about work that took long.
EDGE_SECONDS = 300.0
_USER_AGENT = requests.utils.default_user_agent()
_NETWORK_FAULTS = (requests.RequestException, HTTPError, HTTPException)


class ChutesError(AttemptError):
    """A call without an image."""

    def __init__(
        self,
        remedy: Remedy,
        code: str,
        headline: str,
        detail: str = "",
        advice: str = "",
        *,
        wait: float | None = None,
        reply: Reply | None = None,
    ):
        message = f"{headline}: {detail}" if detail else headline
        super().__init__(f"{message.rstrip('.')}. {advice}" if advice else message)
        self.remedy = remedy
        self.code = code
        self.headline = headline
        self.wait = wait
        self.reply = reply or Reply()


class Canceled(Exception):
    """The call was canceled by this server; the message is the reason that was given."""


class CancelToken:
    """The one connection of a call, which any thread may cancel, at any moment."""

    def __init__(self) -> None:
        self.connected = False
        self.host: str | None = None
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def cancel(self, reason: str) -> None:
        """Shut the connection down, now or as soon as there is one; the first reason stays."""
        with self._lock:
            self.reason = self.reason or reason
            self._shut()

    def connect(self, host: str, port: int, seconds: float) -> socket.socket:
        """Connect to the first address that answers; they share that time fairly."""
        self.host = host
        deadline = time.monotonic() + seconds
        error = OSError("no address")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for left, (family, kind, protocol, _, address) in zip(
            range(len(found), 0, -1), found, strict=True
        ):
            connection = socket.socket(family, kind, protocol)
            try:
                self._watch(connection)
                connection.settimeout(max(0.05, (deadline - time.monotonic()) / left))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.connect(address)
            except OSError as failure:
                connection.close()
                error = failure
            else:
                return connection
            if self.reason:
                break
        raise error

    def _watch(self, connection: socket.socket) -> None:
        with self._lock:
            if self.reason:
                raise OSError("the call was canceled")
            self._forget()
            # A duplicate stays valid when TLS takes the socket over, and shutting it
            # down ends the connect, the reads and the writes of both.
            self._socket = connection.dup()

    def close(self) -> None:
        """Forget the connection: nothing will be shut down any more."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def _shut(self) -> None:
        if self._socket:
            with suppress(OSError):  # It may have ended by itself.
                self._socket.shutdown(socket.SHUT_RDWR)


class Watchdog:
    """Cancel each token at its deadline: one thread for all, which `close` ends."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deadlines: dict[CancelToken, tuple[float, str]] = {}
        self._nearest = math.inf
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def cancel_after(self, token: CancelToken, seconds: float, reason: str) -> None:
        """Cancel the token in that many seconds, instead of when was said before."""
        with self._changed:
            deadline = time.monotonic() + seconds
            self._deadlines[token] = deadline, reason
            # Else the thread wakes in time by itself.
            if deadline < self._nearest:
                self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                self._thread.start()

    def forget(self, token: CancelToken) -> None:
        """Leave the token alone from now on."""
        with self._changed:
            self._deadlines.pop(token, None)

    def close(self) -> None:
        """End the thread, and let nothing be canceled any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                for token, (deadline, reason) in list(self._deadlines.items()):
                    if deadline <= now:
                        del self._deadlines[token]
                        token.cancel(reason)
                self._nearest = min((d for d, _ in self._deadlines.values()), default=math.inf)
                self._changed.wait(min(self._nearest - now, threading.TIMEOUT_MAX))


class Chutes:
    """Call Chutes' API, with one fresh connection for each call. `close` it at the end."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time):
        self._config = config
        self._clock = clock
        self._watchdog = Watchdog()
        self._of_this_thread = threading.local()
        self._max_bytes = config.max_image_mb * 1024 * 1024

    def generate(
        self,
        model: Model,
        prompt: str,
        params: dict[str, Any],
        path: Path,
        token: CancelToken,
        sink: Callable[[bytes], object],
        inputs: Sequence[BinaryIO] = (),
    ) -> Reply:
        """Make one image and write the bytes to path, on disk (fsync) when this returns.

        `inputs` are the images that it is made of. Takes at most TASK_TIMEOUT seconds from
        starting to connect to the last byte. Whether the bytes are an image is for `sink` to
        look at, which is called with each piece of them as it comes. Raises ChutesError,
        Canceled where the token was canceled by someone else, or OSError where the file cannot
        be written: before the call where it cannot be opened, else when `sink` has had all of
        the bytes. The file may then hold a part.
        """
        try:
            with path.open("wb") as file:
                url, name = models.address(model, self._config.chutes_api_url)
                head = {**({"model": name} if name else {}), "prompt": prompt}
                body = _body(model, head, params, inputs)
                return self._call(url, model.name, body, file, token, sink)
        finally:
            self._watchdog.forget(token)
            token.close()

    def close(self) -> None:
        """End the thread that watches the deadlines."""
        self._watchdog.close()

    def _call(
        self,
        url: str,
        model: str,
        body: bytes | Base64Stream,
        file: BinaryIO,
        token: CancelToken,
        sink: Callable[[bytes], object],
    ) -> Reply:
        reply, framed = Reply(), False
        deadline = time.monotonic() + self._config.task_timeout
        self._watchdog.cancel_after(token, self._config.task_timeout, "deadline")
        try:
            with self._post(url, body, token) as response:
                reply = self._reply(response)
                if not 200 <= response.status_code < 300:
                    left = max(0, deadline - time.monotonic())
                    left = min(left, ERROR_BODY_SECONDS)
                    self._watchdog.cancel_after(token, left, "error body")
                    raise self._refusal(response, model, reply)
                framed = response.raw.chunked or response.raw.length_remaining is not None
                self._stream(response, file, reply, sink)
        except _NETWORK_FAULTS as error:
            raise self._fault(error, model, token, reply) from error
        # A body without a length that was cut looks like one that ended.
        if token.reason and not framed:
            raise self._fault(None, model, token, reply)
        return reply

    @contextmanager
    def _post(
        self, url: str, body: bytes | Base64Stream, token: CancelToken
    ) -> Iterator[requests.Response]:
        """Send a request on a connection of its own, which is closed after the call.

        By an adapter alone: a session would look for .netrc, proxies, cookies and redirects.
        """
        if not hasattr(self._of_this_thread, "adapter"):
            self._of_this_thread.adapter = _Adapter(pool_connections=1, pool_maxsize=1)
        adapter: _Adapter = self._of_this_thread.adapter
        adapter.token = token
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {self._config.chutes_api_token}",
            "User-Agent": _USER_AGENT,
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        }
        request = requests.Request("POST", url, headers, data=body).prepare()
        # Longer than the deadline, which cancels the token: it knows why the read ended.
        timeout = self._config.task_timeout + _LATE_SECONDS
        connect, began = min(_CONNECT_SECONDS, self._config.task_timeout), time.monotonic()
        try:
            with adapter.send(request, stream=True, timeout=(connect, timeout)) as response:
                response.elapsed = timedelta(seconds=time.monotonic() - began)
                yield response
        finally:
            adapter.close()

    def _stream(
        self,
        response: requests.Response,
        file: BinaryIO,
        reply: Reply,
        sink: Callable[[bytes], object],
    ) -> None:
        chunks = self._chunks(response, reply)
        for chunk in chunks:
            sink(chunk)
            try:
                file.write(chunk)
            except OSError:
                for rest in chunks:  # How large the image is, the next one wants to know.
                    sink(rest)
                raise
        file.flush()
        os.fsync(file.fileno())

    def _chunks(self, response: requests.Response, reply: Reply) -> Iterator[bytes]:
        """Yield the bytes as they come, at most MAX_IMAGE_MB of them."""
        size = 0
        if _length(response) > self._max_bytes:
            raise self._too_large(reply)
        for chunk in response.iter_content(_CHUNK):
            size += len(chunk)
            if size > self._max_bytes:
                raise self._too_large(reply)
            yield chunk

    def _too_large(self, reply: Reply) -> ChutesError:
        return ChutesError(
            Remedy.FAIL,
            "image_too_large",
            f"The image has more than {self._config.max_image_mb} MB",
            advice="Raise MAX_IMAGE_MB to accept it",
            reply=reply,
        )

    def _reply(self, response: requests.Response) -> Reply:
        invocation = response.headers.get("X-Chutes-InvocationID")
        return Reply(
            response.status_code,
            self._plain(invocation)[:100] if invocation else None,
            _quota(response),
        )

    def _fault(
        self, error: Exception | None, model: str, token: CancelToken, reply: Reply
    ) -> ChutesError | Canceled:
        """Say what a broken connection means: it depends on how far the call had come."""
        if token.reason and token.reason != "deadline":
            return Canceled(token.reason)
        if not token.connected:
            why = "timed out" if token.reason else self._plain(urls.cause(error))
            headline = f"Chutes cannot be reached for {model} ({why})"
            return ChutesError(Remedy.HOLD_MODEL, "unavailable", headline)
        if token.reason:
            headline = f"No whole image came within {self._config.task_timeout:g} seconds"
            return ChutesError(Remedy.RETRY, "upstream_timeout", headline, reply=reply)
        if reply.status:
            headline = "The image ended early: the connection broke"
            return ChutesError(Remedy.RETRY, "upstream_truncated", headline, reply=reply)
        why = self._plain(urls.cause(error))
        headline = f"The connection to Chutes broke before an answer came ({why})"
        return ChutesError(Remedy.RETRY, "upstream_error", headline)

    def _refusal(self, response: requests.Response, model: str, reply: Reply) -> ChutesError:
        """Say what a status other than 2xx means."""
        status = response.status_code
        detail = _detail(response)
        text = self._plain(_sentence(detail))
        refuse = functools.partial(ChutesError, reply=reply)
        rejected = functools.partial(refuse, Remedy.FAIL, "upstream_rejected")
        hold = functools.partial(refuse, Remedy.HOLD_MODEL, "unavailable")
        wait = self._retry_after(response.headers.get("Retry-After"))

        if status == 401:
            headline = "Chutes refused the API token (401)"
            advice = "Set a valid CHUTES_API_TOKEN and start the server again"
            return refuse(Remedy.PAUSE, "upstream_auth", headline, text, advice)
        if status == 402:
            return self._payment(detail, text, refuse)
        if status == 403:
            headline = f"Chutes does not let this token use {model} (403)"
            return refuse(Remedy.FAIL, "upstream_auth", headline, text)
        if status == 503 and "disabled" in text.lower():
            return rejected(f"Chutes has disabled {model} (503)", text)
        if status == 429 and text.startswith("Free models limit"):
            return hold(f"Chutes' free limit for today is reached for {model}", wait=wait)
        if status in (429, 503):
            return hold(f"Chutes has no free capacity for {model}", text, wait=wait)
        if status in (502, 504) or 520 <= status <= 524:
            if response.elapsed.total_seconds() >= EDGE_SECONDS:
                headline = f"Chutes' gateway gave the call up after {response.elapsed.seconds} s"
                advice = "Lower num_inference_steps or the size"
                return refuse(Remedy.RETRY, "upstream_timeout", headline, advice=advice)
            return hold(f"Chutes' gateway has no answer for {model} ({status})", wait=wait)
        if status == 408 or status >= 500:
            return refuse(Remedy.RETRY, "upstream_error", f"Chutes failed ({status})", text)
        if 300 <= status < 400:
            headline = f"Chutes answered with a redirect ({status}), which is not followed"
            return rejected(headline, advice="Check CHUTES_API_URL")
        if 400 <= status < 500:
            return rejected(f"Chutes refused the request ({status})", text)
        return refuse(Remedy.RETRY, "upstream_error", f"Chutes answered with status {status}")

    def _payment(
        self, detail: dict[str, Any], text: str, refuse: Callable[..., ChutesError]
    ) -> ChutesError:
        reset = _timestamp(detail.get("quota_reset_timestamp"))
        if reset is None:
            headline = "Chutes wants payment (402)"
            advice = "Add balance to the account, then resume the queue"
            return refuse(Remedy.PAUSE, "upstream_payment", headline, text, advice)
        wait = min(reset - self._clock(), MAX_QUOTA_WAIT)
        return refuse(
            Remedy.HOLD_ALL,
            "quota",
            "Chutes' daily quota is used up",
            wait=wait if wait > 0 else None,
        )

    def _retry_after(self, value: str | None) -> float | None:
        """Return the seconds to wait, at most an hour, or None where none are named."""
        if value is None:
            return None
        if re.fullmatch(r"[0-9]+", value.strip()):
            seconds = float(value.strip()[:10])
        else:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - self._clock()
            except (ValueError, TypeError, OverflowError):
                return None
        return min(seconds, MAX_RETRY_AFTER) if seconds > 0 else None

    def _plain(self, found: Any) -> str:
        """Make text from upstream fit to be shown: no secret, one line, not long."""
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        text = self._config.scrub(text if found else "")
        if self._config.reveals_secret(text):
            return "(not shown: it repeats a part of a secret)"
        text = text.encode("utf-8", "replace").decode()
        text = " ".join(re.sub(r"[^\w\s!-~]", " ", text).split())
        return text if len(text) <= _DETAIL_LENGTH else text[:_DETAIL_LENGTH] + " ..."


def _body(
    model: Model, head: dict[str, Any], params: dict[str, Any], inputs: Sequence[BinaryIO]
) -> bytes | Base64Stream:
    """Return the body of a call; its keys keep their order, since the same bytes may cost less."""
    if not inputs:
        return json.dumps({**head, **params}).encode()
    if model.images is None or len(inputs) > model.images.maximum:
        number = f"at most {model.images.maximum}" if model.images else "no"
        headline = f"{model.name} takes {number} input images by now, not {len(inputs)}"
        raise ChutesError(Remedy.FAIL, "upstream_rejected", headline, advice="Name another model")
    opening, closing = ('["', '"]') if model.images.maximum > 1 else ('"', '"')
    before = f'{json.dumps(head)[:-1]}, "{model.images.field}": {opening}'
    after = f", {json.dumps(params)[1:]}" if params else "}"
    between = ['", "'] * (len(inputs) - 1)
    return Base64Stream([before, *between, closing + after], inputs)


class _Connection(HTTPConnection):
    """A connection that shows its socket to the token before anything is sent on it."""

    def __init__(self, *args: Any, adapter: "_Adapter", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._token = adapter.token

    def _new_conn(self) -> socket.socket:
        # urllib3 has no public place before the TCP connection and the TLS handshake.
        try:
            return self._token.connect(self._dns_host, self.port or 0, cast(float, self.timeout))
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error

    def connect(self) -> None:
        super().connect()
        self._token.connected = not self._token.reason


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Adapter(HTTPAdapter):
    token: CancelToken

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        connection = _TLSConnection if pool.scheme == "https" else _Connection
        pool.ConnectionCls = functools.partial(connection, adapter=self)
        return pool


def _length(response: requests.Response) -> int:
    value = response.headers.get("Content-Length", "")
    return int(value[:20]) if value.isascii() and value.isdigit() else 0


def _quota(response: requests.Response) -> tuple[float, float, float] | None:
    numbers = [
        response.headers.get(f"X-Chutes-Quota-{name}", "")
        for name in ("Total", "Used", "Remaining")
    ]
    if not all(re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", number) for number in numbers):
        return None
    total, used, remaining = (float(n) if "." in n else int(n) for n in numbers)
    return total, used, remaining


def _detail(response: requests.Response) -> dict[str, Any]:
    """Read what a refusal says, as far as it comes: at most 64 KiB, broken or not."""
    text = b""
    try:
        for chunk in response.iter_content(4096):
            text += chunk
            if len(text) >= _ERROR_BODY_BYTES:
                break
    except _NETWORK_FAULTS:
        pass
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text.decode("utf-8", "replace")
        if value.lstrip().startswith("<"):
            value = ""
    detail = value.get("detail", value) if isinstance(value, dict) else value
    return detail if isinstance(detail, dict) else {"message": detail}


def _sentence(found: Any, wrappings: int = _MAX_WRAPPINGS) -> str:
    """Return what a refusal says to a person, out of whatever JSON it is wrapped in."""
    if isinstance(found, list) and wrappings:
        return "; ".join(_sentence(each, wrappings - 1) for each in found)
    if isinstance(found, dict) and wrappings:
        told = [found[key] for key in ("message", "detail", "msg") if key in found]
        if told:
            text, place = _sentence(next(filter(None, told), ""), wrappings - 1), found.get("loc")
            # A field that is wrong, as pydantic tells of it.
            return f"{place[-1]}: {text}" if isinstance(place, list) and place else text
    if not isinstance(found, str):
        with suppress(RecursionError):
            return json.dumps(found, ensure_ascii=False) if found else ""
        return ""
    text = re.sub(r"^(Invalid request:\s*)+(?=\S)", "", found)
    before, brace, after = text.partition("{")
    try:
        value, end = json.JSONDecoder().raw_decode(brace + after)
    except (ValueError, RecursionError):
        return text
    inner = _sentence(value, wrappings - 1) if wrappings else ""
    return f"{before}{inner}{after[end - 1 :]}" if inner and "{" not in inner else text


def _timestamp(text: Any) -> float | None:
    try:
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
