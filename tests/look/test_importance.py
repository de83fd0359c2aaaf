"""Head importance: losses per ablated head, and the resume file."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import torch

import polyhead as ph
from polyhead.errors import ModelError

importance = importlib.import_module("polyhead.look.importance")
IDS = torch.arange(30) % 11


class Model(torch.nn.Module):
    """One attention layer on embeddings; its head 1 has no effect."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 12)
        self.attend = ph.MultiHeadAttention(12, 11, 64, 0.0, num_heads=3, head_dim=4)
        with torch.no_grad():
            self.attend.out_proj.weight.mul_(20.0)
            self.attend.out_proj.weight[:, 4:8] = 0.0
        self.runs = 0

    def forward(self, ids):
        self.runs += 1
        return self.attend(self.embed(ids))


def test_head_importance_is_the_change_of_loss():
    model = Model()
    found = ph.look.head_importance(model, IDS)
    assert found.loss == ph.look.next_token_loss(model, IDS[None]).item()
    for head in range(3):
        with ph.look.ablate(model, {(0, head)}):
            lost = ph.look.next_token_loss(model, IDS[None]).item()
        assert found.change[0, head] == lost - found.loss
    assert found.change[0, 1] == 0.0
    assert found.change[0, 0] != 0.0
    values = [found.change[head] for head in found.ranked]
    assert values == sorted(values, reverse=True)


def test_next_token_loss_is_cross_entropy():
    model, ids = Model(), torch.randint(11, (2, 5))
    logs = model(ids).log_softmax(dim=-1)
    each = [logs[b, t, ids[b, t + 1]] for b in range(2) for t in range(4)]
    torch.testing.assert_close(ph.look.next_token_loss(model, ids), -torch.stack(each).mean())


def test_head_importance_custom_loss_and_progress():
    seen = []
    found = ph.look.head_importance(
        Model(),
        IDS,
        heads=[(0, 2), (0, 1)],
        how="mean",
        loss=lambda model, ids: model(ids).abs().mean(),
        progress=lambda *step: seen.append(step),
    )
    assert list(found.change) == [(0, 2), (0, 1)]
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_head_importance_resumes_from_the_file(tmp_path):
    path, model = tmp_path / "heads.json", Model()
    whole = ph.look.head_importance(model, IDS)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ph.look.head_importance(model, IDS, resume=path, progress=stop)
    assert len(json.loads(path.read_text())["heads"]) == 2
    model.runs = 0
    assert ph.look.head_importance(model, IDS, resume=path) == whole
    assert model.runs == 2  # the loss with all heads, and the head that was left


def test_head_importance_refuses_a_file_of_another_run(tmp_path):
    path, model = tmp_path / "heads.json", Model()
    ph.look.head_importance(model, IDS, resume=path)
    kept = path.read_text()
    refused = pytest.raises(ModelError, match=re.escape(f"{path} must be of this model, text and"))
    with refused:
        ph.look.head_importance(model, IDS.flip(0), resume=path)
    with refused:
        ph.look.head_importance(model, IDS, how="mean", resume=path)
    with torch.no_grad():
        model.embed.weight.mul_(2.0)
    with refused:
        ph.look.head_importance(model, IDS, resume=path)
    assert path.read_text() == kept
    path.write_text("[]")
    with pytest.raises(ModelError, match="must be a file of head_importance; delete it"):
        ph.look.head_importance(model, IDS, resume=path)


@pytest.mark.parametrize("terminal", [True, False])
def test_show_bar_prints_on_a_terminal_only(monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    importance.show_bar(1, 3)
    importance.show_bar(3, 3)
    bar = f"\r[{'=' * 10:30}] 1/3 heads\r[{'=' * 30}] 3/3 heads\n"
    assert capsys.readouterr().err == (bar if terminal else "")
