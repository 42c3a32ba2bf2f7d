"""Addresses: which are of this machine, which the token may go to, and why one is not reached."""

import ipaddress
import re
import ssl
from urllib.parse import urlsplit

# A single label of a host name: anything else could send the token to another host.
LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
RULE = "an https address, or http on loopback, without user, query or fragment"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_upstream(url: str, variable: str = "") -> str:
    """Return the address, or raise ValueError where it breaks RULE.

    It may hold `{variable}`, which stands for a label of a host name.
    """
    parts = urlsplit(url.replace(f"{{{variable}}}", variable) if variable else url)
    host, _ = parts.hostname, parts.port  # Either may raise ValueError.
    if not host or re.search(r"[?#@\\{}]", parts.geturl()) or not re.fullmatch("[!-~]+", url):
        raise ValueError(f"must be {RULE}")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise ValueError(f"must be {RULE}")
    return url


def cause(error: BaseException | None) -> str:
    """Find the plainest word for a network fault in the chain of its causes."""
    words = "connection lost"
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"certificate: {error.verify_message}"
        if isinstance(error, TimeoutError):
            words = "timed out"
        elif isinstance(error, OSError) and error.strerror:
            words = error.strerror
        error = error.__cause__ or error.__context__
    return words
