"""The lesson's document: its size, its policy, its data."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import torch

import polyhead as ph
from polyhead.lesson.page import payload, render


def test_the_page_is_under_60_kb():
    assert len(render(ph.lesson()).encode()) < 60_000


def test_the_largest_page_is_under_100_kb():
    x = torch.randn(12, 4)
    assert len(render(ph.lesson(x, num_heads=4, d_out=4)).encode()) < 100_000


def test_a_policy_that_names_all_that_runs():
    text = render(ph.lesson())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    assert "connect-src" not in rules

    def hashes(tag):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digests = (hashlib.sha256(code.encode()).digest() for code in found)
        return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]

    assert rules["script-src"].split() == hashes("script")
    assert rules["style-src"].split() == hashes("style")
    assert not re.search(r"\ssrc=|@import|url\(", text)


def test_the_data_is_torch_s_to_the_last_bit(unpacked):
    lesson = ph.lesson()
    data = payload(lesson)
    assert data["x"] == lesson.x.tolist()
    assert data["x"][0] == [0.43, 0.15, 0.89]
    for lane in lesson.traces:
        for name in ("query", "key", "value", "scores", "weights", "contexts", "output"):
            step = getattr(lane, name).flatten()
            torch.testing.assert_close(unpacked(data["torch"][name]), step, rtol=0, atol=1e-12)
    assert torch.equal(unpacked(data["weights"]["W_key"]), lesson.split.W_key.weight.flatten())
    assert json.loads(json.dumps(data)) == json.loads(
        json.dumps(payload(lesson) | {"measured": data["measured"]})
    )
