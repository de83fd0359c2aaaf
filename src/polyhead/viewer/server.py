"""HTTP server of the live page, for a single user: three routes."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from polyhead.errors import ArgumentError, PolyheadError
from polyhead.viewer import timeouts
from polyhead.viewer.request_guard import Guard
from polyhead.viewer.session import BusyError, Session, StoppedError

__all__ = ["MAX_BYTES", "listen", "make_app", "serve"]

MAX_BYTES = 2**17  # of a request
_GRACE = 3  # seconds for responses in progress when the server stops


def make_app(session: Session, host: str) -> ASGIApp:
    """Return the ASGI app of one session.

    | route | response |
    |---|---|
    | GET / | the page |
    | GET /api/start | `Session.start()` |
    | POST /api/read | `Session.answer()` of {"text": ..., "off": [[layer, head]], "how": ...} |

    An error is {"error": message}, of status 400 (bad arguments), 403 (`Guard`), 408 (too slow),
    413 (too large), 415 (no JSON), 500 or 503 (busy: retry).
    """
    policy = _policy(session.page)

    def page(request: Request) -> Response:
        return HTMLResponse(session.page, headers={"Content-Security-Policy": policy})

    def start(request: Request) -> Response:
        return JSONResponse(session.start())

    async def read(request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return _error(415, "the request must be of type application/json")
        try:
            body = await asyncio.wait_for(_body(request), timeouts.SECONDS)
        except ClientDisconnect:
            return _error(400, "the request ended early")
        except (TimeoutError, asyncio.TimeoutError):
            message = f"the request must arrive within {timeouts.SECONDS:g} seconds"
            return _error(408, message, {"Connection": "close"})
        if body is None:
            return _error(413, f"the request must have at most {MAX_BYTES} bytes")
        try:
            asked = _parse(body)
            # In a thread, so that the event loop can refuse other requests meanwhile.
            return JSONResponse(await run_in_threadpool(session.answer, **asked))
        except (BusyError, StoppedError) as error:
            return _error(503, str(error), {"Retry-After": "1"})
        except PolyheadError as error:
            return _error(400, str(error))

    routes = [
        Route("/", page),
        Route("/api/start", start),
        Route("/api/read", read, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={Exception: _failed}), host)


async def _body(request: Request) -> bytes | None:
    """Read the body of a request; None if it is too large."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            return None
    return body


def _failed(request: Request, error: Exception) -> Response:
    return _error(500, "the server failed; see its terminal for the error")


def _policy(page: str) -> str:
    """The page's own content security policy, and the directive that only a header can set."""
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found is not None
    return f"{found[1]}; frame-ancestors 'none'"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _parse(body: bytes) -> dict[str, Any]:
    """Parse text, off and how of a request; the existence of the heads is checked by `read`."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(
            "the request", "must be JSON", error, "send what the page sends"
        ) from error
    asked = asked if isinstance(asked, dict) else {}
    text, off, how = asked.get("text"), asked.get("off", []), asked.get("how", "zero")
    unknown = sorted(asked.keys() - {"text", "off", "how"})
    if unknown:
        got = json.dumps(unknown)[:80]
        raise ArgumentError("the request", "must have text, off and how alone", got, "leave it out")
    if not isinstance(text, str):
        raise ArgumentError("text", "must be a string", type(text).__name__, "give the text")
    heads = off if isinstance(off, list) else [off]
    if not all(
        isinstance(head, list) and len(head) == 2 and all(type(n) is int for n in head)
        for head in heads
    ):
        rule = "must be a list of [layer, head]"
        raise ArgumentError("off", rule, json.dumps(off)[:80], "count both from 0")
    return {"text": text, "off": frozenset(map(tuple, heads)), "how": how}


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any free port.

    Raises:
        ArgumentError: the port is taken or not allowed, or the host is not of this machine.
    """
    rule = "must be a name or an address of this machine"
    remedy = "leave it out to serve on 127.0.0.1"
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise ArgumentError("--host", rule, f"{host} ({error})", remedy) from error
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ArgumentError("--host", rule, host, remedy) from error
        reason = error.strerror or str(error)
        raise ArgumentError(
            "--port",
            f"must be free on {host}",
            f"{port} ({reason})",
            "give another; 0 takes any that is free",
        ) from error


def serve(session: Session, host: str, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        host: as given to `listen`.
        listening: the socket from `listen`.
        ready: called once the server accepts requests.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            session.stop()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        make_app(session, host),
        lifespan="off",
        http=timeouts.TimedProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=_GRACE,
    )
    with suppress(KeyboardInterrupt):  # raised again by uvicorn after it has stopped
        Server(config).run(sockets=[listening])
