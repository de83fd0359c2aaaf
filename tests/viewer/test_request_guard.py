"""Request guard: checks of the Host and Origin headers."""

import socket

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from polyhead.viewer.request_guard import Guard


def status(listens, host, origin=None, method="POST"):
    client = TestClient(Guard(PlainTextResponse("fine"), listens))
    headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
    return client.request(method, "/", headers=headers).status_code


@pytest.mark.parametrize(
    ("listens", "host", "answered"),
    [
        ("127.0.0.1", "127.0.0.1:8765", True),
        ("127.0.0.1", "localhost:8765", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("localhost", "127.0.0.1:9000", True),  # through a tunnel
        ("::1", "[::1]:8765", True),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "evil.example:8765", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "evil.example@127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1/evil", False),
        ("127.0.0.1", "127.0.0.1@evil.example", False),
        ("127.0.0.1", "192.0.2.7", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[", False),
        ("192.0.2.7", "192.0.2.7:8765", True),
        ("192.0.2.7", "192.0.2.8:8765", False),
        ("192.0.2.7", "localhost", False),
        ("lab.example", "LAB.example:80", True),
        ("lab.example", "lab.example.evil", False),
        ("0.0.0.0", "192.0.2.7:8765", True),
        ("0.0.0.0", socket.gethostname(), True),
        ("0.0.0.0", "localhost", True),
        ("0.0.0.0", "evil.example", False),
        ("::", "[2001:db8::1]:8765", True),
    ],
)
def test_guard_accepts_only_its_own_host_names(listens, host, answered):
    for method in ("GET", "POST"):
        assert status(listens, host, method=method) == (200 if answered else 403)


@pytest.mark.parametrize(
    ("origin", "answered"),
    [
        (None, True),  # no browser
        ("http://127.0.0.1:8765", True),
        ("http://127.0.0.1:9999", False),
        ("http://localhost:8765", False),
        ("http://evil.example", False),
        ("null", False),
        ("http://[", False),
    ],
)
def test_guard_accepts_only_its_own_origin(origin, answered):
    assert status("127.0.0.1", "127.0.0.1:8765", origin) == (200 if answered else 403)
    assert status("127.0.0.1", "127.0.0.1:8765", origin, "GET") == 200


def test_guard_refuses_two_host_headers():
    client = TestClient(Guard(PlainTextResponse("fine"), "127.0.0.1"))
    names = [("Host", "127.0.0.1"), ("Host", "evil.example")]
    answer = client.get("/", headers=names)
    assert answer.status_code == 403
    assert "127.0.0.1, evil.example" in answer.json()["error"]
