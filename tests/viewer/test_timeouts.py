"""Time limits of slow requests."""

import signal
import socket
import threading
import time

import pytest

from polyhead.viewer import timeouts
from polyhead.viewer.server import listen, serve

pytestmark = pytest.mark.usefixtures("own_loop")


def exchanges(session, *talks):
    """Results of client functions, each called with its own connection to a server."""
    listening, found = listen("127.0.0.1", 0), []

    def run():
        try:
            for talk in talks:
                with socket.create_connection(listening.getsockname(), timeout=10) as wire:
                    found.append(talk(wire, "{}:{}".format(*listening.getsockname()).encode()))
        finally:
            signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=run)
    serve(session, "127.0.0.1", listening, thread.start)
    thread.join()
    return found


def read_all(wire):
    parts = []
    while part := wire.recv(65536):
        parts.append(part)
    return b"".join(parts)


def half_a_header(wire, host):
    wire.sendall(b"GET / HTTP/1.1\r\nHost: ")
    return read_all(wire)


def nothing(wire, host):
    return read_all(wire)


def header_by_drops(wire, host):
    try:
        for _ in range(100):
            wire.sendall(b"X")
            time.sleep(0.05)
    except OSError:
        return "closed"
    return "still open"


def half_a_body(wire, host):
    wire.sendall(
        b"POST /api/read HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        b"Host: " + host + b"\r\n\r\n{"
    )
    return read_all(wire)


def second_half_after_a_first_request(wire, host):
    wire.sendall(b"GET /api/start HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    first = wire.recv(65536)
    wire.sendall(b"GET /")
    return first, read_all(wire)


def whole(wire, host):
    wire.sendall(b"GET /api/start HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    return read_all(wire)


def test_slow_headers_and_bodies_time_out(session, monkeypatch):
    monkeypatch.setattr(timeouts, "SECONDS", 0.4)
    talks = [half_a_header, nothing, header_by_drops, half_a_body, whole]
    talks.append(second_half_after_a_first_request)
    header, silent, drops, body, answered, (first, second) = exchanges(session, *talks)
    assert header == silent == b""
    assert b"HTTP/1.1" not in second  # the rest of the first answer, and the end
    assert drops == "closed"
    assert body.startswith(b"HTTP/1.1 408 ")
    assert b"the request must arrive within 0.4 seconds" in body
    assert answered.startswith(b"HTTP/1.1 200 OK")
    assert first.startswith(b"HTTP/1.1 200 OK")


def test_slow_response_does_not_time_out(session, monkeypatch):
    monkeypatch.setattr(timeouts, "SECONDS", 0.2)
    answer = session.start

    def slowly():
        time.sleep(0.6)
        return answer()

    monkeypatch.setattr(session, "start", slowly)
    (answered,) = exchanges(session, whole)
    assert answered.startswith(b"HTTP/1.1 200 OK")
