"""Request guard of the server: checks of Host and Origin, and security headers."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "is_loopback"]

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# Unless the response has a policy of its own.
_POLICY = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """ASGI middleware that accepts requests under the server's own name, from its own page, only.

    A foreign page whose name resolves to this server (DNS rebinding) sends that name as Host, and
    is refused; a form or script of another page sends that page as Origin, and is refused.

    Args:
        app: the application that receives accepted requests.
        host: the address on which the server listens.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._host = host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets; the lifespan is off
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Content-Security-Policy", _POLICY)
            await send(message)

        refusal = self._why_not(scope["method"], Headers(scope=scope))
        app = self._app if refusal is None else JSONResponse({"error": refusal}, 403)
        await app(scope, receive, send_guarded)

    def _why_not(self, method: str, headers: Headers) -> str | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own_name(hosts[0]):
            return f"this server does not accept the host name {', '.join(hosts) or '(none)'}"
        origins = headers.getlist("origin")
        if method not in ("GET", "HEAD") and any(_place(o) != hosts[0].lower() for o in origins):
            return f"a page of {', '.join(origins)} may not send requests to this server"
        return None

    def _is_own_name(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
        except ValueError:
            return False
        if parts.netloc != host or "@" in host:
            return False
        name = parts.hostname or ""
        if is_loopback(self._host):
            return is_loopback(name)
        if _is_any(self._host):  # an IP address or the machine's name: these cannot be rebound
            return _is_number(name) or name in ("localhost", socket.gethostname().lower())
        return name == self._host


def is_loopback(host: str) -> bool:
    """True if a host is a loopback address or name.

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    return host == "localhost" or (_is_number(host) and ipaddress.ip_address(host).is_loopback)


def _is_any(host: str) -> bool:
    return _is_number(host) and ipaddress.ip_address(host).is_unspecified


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
