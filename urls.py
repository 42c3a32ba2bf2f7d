"""Addresses: which are of this machine alone, and which the token may be sent to."""

import ipaddress
import re
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
