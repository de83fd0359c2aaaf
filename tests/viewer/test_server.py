"""HTTP server of the live page: responses, errors and refused requests."""

import hashlib
import json
import re
import signal
import socket
import threading
from base64 import b64encode

import pytest
from starlette.testclient import TestClient

from polyhead.errors import ArgumentError
from polyhead.viewer.server import MAX_BYTES, listen, make_app, serve
from polyhead.viewer.session import BusyError

TEXT = "the dog saw the cat . the dog"
HERE = "http://127.0.0.1:8765"


def client_of(session, host="127.0.0.1", at=HERE, **options):
    return TestClient(make_app(session, host), base_url=at, **options)


@pytest.fixture
def client(session):
    return client_of(session)


def test_server_page_has_its_policy_as_header(client):
    answer = client.get("/")
    assert answer.status_code == 200
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    scripts = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    hashes = [b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy["script-src"].split() == [f"'sha256-{value}'" for value in hashes]
    assert scripts[-1].count("api/read") == 1


@pytest.mark.parametrize("path", ["/", "/api/start", "/api/read", "/none"])
def test_server_responses_have_security_headers(client, path):
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"].startswith("default-src 'none'; ")
    assert "access-control-allow-origin" not in headers


def test_server_reads_a_text_with_heads_off(client, session):
    assert client.get("/api/start").json() == session.start()
    asked = {"text": TEXT, "off": [[0, 1], [1, 3]], "how": "mean"}
    answer = client.post("/api/read", json=asked)
    assert answer.status_code == 200
    assert answer.json() == session.answer(TEXT, {(0, 1), (1, 3)}, "mean")
    assert any(abs(t["before"] - t["after"]) > 0.01 for t in answer.json()["next"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the request must be JSON"),
        (b'{"text": "\xff"}', "the request must be JSON"),
        (b"[" * 100_000, "the request must be JSON"),
        (b"[]", "text must be a string; got NoneType"),
        ({"text": 3}, "text must be a string; got int"),
        ({"text": TEXT, "of": []}, 'the request must have text, off and how alone; got ["of"]'),
        ({"text": " "}, "TEXT must not be empty"),
        ({"text": "the \ud83d cat"}, "TEXT must be whole characters"),
        ({"text": "cat"}, "at least 2 tokens"),
        ({"text": "the " * 21}, "at most 20 tokens; got 21"),
        ({"text": TEXT, "off": [[0]]}, "off must be a list of [layer, head]; got [[0]]"),
        ({"text": TEXT, "off": [[0, True]]}, "off must be a list of [layer, head]"),
        ({"text": TEXT, "off": {"0": 1}}, "off must be a list of [layer, head]"),
        ({"text": TEXT, "off": [[2, 0]]}, "layers from 0 to 1"),
        ({"text": TEXT, "off": [[0, 0]], "how": "half"}, 'how must be "zero" or "mean"'),
    ],
)
def test_server_bad_requests_get_one_message(client, body, message):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/api/read", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_server_refuses_large_and_non_json_requests(client):
    large = b" " * (MAX_BYTES + 1)
    answer = client.post("/api/read", content=large, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert f"at most {MAX_BYTES} bytes" in answer.json()["error"]
    # A content type that a form may send cross-origin without a preflight.
    plain = client.post("/api/read", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415


def test_server_busy_and_failed_responses(session, monkeypatch):
    def busy(**asked):
        raise BusyError("the model is reading")

    monkeypatch.setattr(session, "answer", busy)
    client = client_of(session, raise_server_exceptions=False)
    answer = client.post("/api/read", json={"text": TEXT})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json() == {"error": "the model is reading"}

    monkeypatch.setattr(session, "answer", lambda **asked: 1 / 0)
    answer = client.post("/api/read", json={"text": TEXT})
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server failed; see its terminal for the error"}
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.fixture
def listening():
    """A socket of a free port; its port."""
    with listen("127.0.0.1", 0) as found:
        yield found


def test_listen_taken_port_raises(listening):
    port = listening.getsockname()[1]
    with pytest.raises(ArgumentError, match=f"--port must be free on 127.0.0.1; got {port} "):
        listen("127.0.0.1", port)


# An unknown name, an invalid name, and another machine's address.
@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "192.0.2.1"])
def test_listen_foreign_host_raises(host):
    message = f"--host must be a name or an address of this machine; got {host}"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        listen(host, 0)


@pytest.mark.usefixtures("own_loop")
def test_serve_stops_on_ctrl_c(session, listening, capfd):
    """A client that disconnects during a request causes no traceback."""
    answers = []

    def ask_and_interrupt():
        host = "{}:{}".format(*listening.getsockname())
        with socket.create_connection(listening.getsockname()) as wire:
            start = f"POST /api/read HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            wire.sendall(f"{start}Content-Length: 9\r\n\r\n{{".encode())
        with socket.create_connection(listening.getsockname()) as wire:
            wire.sendall(f"GET /api/start HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answers.append(wire.recv(100))
        signal.raise_signal(signal.SIGINT)

    asking = threading.Thread(target=ask_and_interrupt)
    serve(session, "127.0.0.1", listening, asking.start)
    asking.join()
    assert answers[0].startswith(b"HTTP/1.1 200 OK")
    assert capfd.readouterr().err == ""
    with pytest.raises(Exception, match="the server stops"):
        session.answer(TEXT, (), "zero")
