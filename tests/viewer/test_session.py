"""Session of the live page."""

import threading

import pytest
import torch

import polyhead.viewer.session as module
from polyhead.errors import ShapeError
from polyhead.look.page import payload
from polyhead.viewer.reader import read
from polyhead.viewer.session import BusyError, Session, StoppedError

TEXT = "the dog saw the cat . the dog"


def test_session_start_has_text_and_next_tokens(session, tiny_model):
    first = session.start()
    assert (first["text"], first["most"]) == ("the cat sat on a mat and the", 20)
    probabilities = read(first["text"], tiny_model).next_token
    assert first["next"][0]["before"] == pytest.approx(probabilities.max().item(), rel=1e-4)
    assert all(token["before"] == token["after"] for token in first["next"])


def test_session_answer_has_payload_and_next_tokens(session, tiny_model):
    whole, without = (read(TEXT, tiny_model, off=off) for off in ((), {(1, 2)}))
    for off, seen in (((), whole), ({(1, 2)}, without), ((), whole)):
        answer = session.answer(TEXT, off, "zero")
        assert answer["payload"] == payload(seen.report)
        after = {token["text"]: token["after"] for token in answer["next"]}
        for token in answer["next"]:
            at = tiny_model.tokenizer.convert_tokens_to_ids(token["text"])
            assert token["before"] == pytest.approx(whole.next_token[at].item(), rel=1e-4)
            assert after[token["text"]] == pytest.approx(seen.next_token[at].item(), rel=1e-4)


def test_session_reads_the_same_text_once(session, monkeypatch):
    texts = []

    def count(text, *args, off=(), **options):
        texts.append((text, tuple(off)))
        return read(text, *args, off=off, **options)

    monkeypatch.setattr(module, "read", count)
    for off in ((), [(0, 0)], [(0, 1)]):
        session.answer(TEXT, off, "mean")
    assert texts == [(TEXT, ()), (TEXT, ((0, 0),)), (TEXT, ((0, 1),))]


def test_session_concurrent_request_raises_busy(session, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def slow(*args, **options):
        reading.set()
        assert go_on.wait(10)
        return read(*args, **options)

    monkeypatch.setattr(module, "read", slow)
    answers = []
    first = threading.Thread(target=lambda: answers.append(session.answer(TEXT, (), "zero")))
    first.start()
    assert reading.wait(10)
    with pytest.raises(BusyError, match="another text; try again"):
        session.answer(TEXT, (), "zero")
    go_on.set()
    first.join()
    assert answers[0]["payload"]["tokens"][1] == " dog"
    assert session.answer(TEXT, (), "zero") == answers[0]


def test_session_failure_leaves_it_unchanged(session):
    before = session.answer("the cat", (), "zero")
    with pytest.raises(ShapeError, match="at most 20 tokens; got 21"):
        session.answer("the " * 21, (), "zero")
    assert session.answer("the cat", (), "zero") == before


def test_session_stop_ends_reading_at_the_next_layer(session, monkeypatch):
    def stopped_halfway(*args, progress, **options):
        def tell(step, share):
            if share:
                session.stop()
            progress(step, share)

        return read(*args, progress=tell, **options)

    monkeypatch.setattr(module, "read", stopped_halfway)
    with pytest.raises(StoppedError):
        session.answer(TEXT, (), "zero")


def test_session_limits_the_first_text_too(tiny_model):
    with pytest.raises(ShapeError, match="at most 3 tokens; got 4"):
        Session(tiny_model, "the cat sat on", most=3)


def test_session_page_is_live(session):
    assert "connect-src 'self'" in session.page
    assert 'fetch("api/read"' in session.page
    assert torch.is_grad_enabled()
