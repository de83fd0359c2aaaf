"""Hub ids: one request, and the models near to a name."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from polyhead.errors import ModelError
from polyhead.models import hub
from polyhead.models.hub import check_on_hub, is_cached, remedy_for
from polyhead.models.load import load_model

constants = pytest.importorskip("huggingface_hub.constants")


class Hub(http.server.BaseHTTPRequestHandler):
    """Has one model, and refuses to list another."""

    def do_GET(self):
        name = self.path.partition("/api/models/")[2]
        body = b'{"id": "some/model", "siblings": []}' if name == "some/model" else b"{}"
        self.send_response(200 if name == "some/model" else 500 if name == "odd/one" else 404)
        if name not in ("some/model", "odd/one"):
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def answering(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def refusing(monkeypatch):
    """A port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("answering")
def test_check_on_hub_finds_a_model():
    check_on_hub("some/model")
    check_on_hub("odd/one")  # a mirror that answers other requests only


@pytest.mark.usefixtures("answering")
def test_check_on_hub_unknown_model_raises():
    with pytest.raises(ModelError, match=r"^some/modle must be a folder.*no such model there; "):
        check_on_hub("some/modle")


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize("name", ["nobody-has-this", "nobody/nothing"])
def test_load_model_without_a_hub_raises_at_once(name):
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"no answer from the hub \(Connect\w*Error.*the network"):
        load_model(name)
    assert time.perf_counter() - start < 15  # repeated requests take over a minute


def test_check_on_hub_silent_hub_times_out(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ModelError, match=r"no answer from the hub \(\w*Timeout"):
            check_on_hub("some/model", seconds=0.2)


def test_load_model_in_offline_mode_raises():
    """In a process of its own: some releases read the variable once."""
    code = "from polyhead.models.hub import check_on_hub; check_on_hub('some/model')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "no answer from the hub" in run.stderr
    assert "offline mode is enabled" in run.stderr


def test_is_cached_reads_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model/snapshots/1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--some--model/refs"
    refs.mkdir()
    (refs / "main").write_text("1234")
    assert is_cached("some/model")
    assert not is_cached("some/other")
    assert not is_cached("not--an/id..")
    assert remedy_for("else/modell", "check it") == "did you mean 'some/model'?"


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("smollm2", "leave it out for SmolLM2-135M-Instruct, the default"),
        ("HuggingFaceTB/SmolLM2-135M-instrct", "leave it out for SmolLM2-135M-Instruct, the def"),
        ("tiny-lama", "did you mean 'tiny-llama'?"),
        ("./tiny-lama/", "did you mean 'tiny-llama'?"),
        ("weigths.gguf", "did you mean 'weights.gguf'?"),
        ("sub/modl", "did you mean 'sub/model'?"),
        ("nothing/like/it", "check it"),
    ],
)
def test_remedy_for_names_the_nearest_model(tmp_path, monkeypatch, source, remedy):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_cached", list)
    for folder in ("tiny-llama", "sub/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "weights.gguf").touch()
    (tmp_path / "tiny-lame").mkdir()  # no model
    assert remedy_for(source, "check it").startswith(remedy)
