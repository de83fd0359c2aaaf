"""The example trains, resumes to the bit, and fails in one line."""

import importlib.util
import math
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "train_gpt.py"
TINY = {"heads": 2, "layers": 2, "width": 12, "context": 13}
TINY_OPTIONS = [f"--{name}={size}" for name, size in TINY.items()]


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location("train_gpt_example", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def text(example):
    return example.TEXT.read_text(encoding="utf-8")


def curve(example, text, steps=20, **options):
    training = example.Training(example.Settings(**{**TINY, **options}), text)
    return list(training.train(steps))


def run(example, *arguments):
    return example.main([*TINY_OPTIONS, "--sample-tokens=5", *map(str, arguments)])


def saved_losses(path):
    return torch.load(path, weights_only=True)["losses"]


def test_stacked_and_split_follow_one_curve(example, text):
    split = curve(example, text, attention="split", dtype="float64")
    stacked = curve(example, text, attention="stacked", dtype="float64")
    torch.testing.assert_close(torch.tensor(stacked), torch.tensor(split), rtol=0, atol=1e-9)
    assert split != stacked  # they are two computations
    module = example.build_model(example.Settings(**TINY, attention="stacked"), 71)
    assert type(module.blocks[1].attention).__name__ == "MultiHeadAttentionWrapper"


def test_the_same_seed_is_the_same_curve_and_another_is_not(example, text):
    global_state = torch.get_rng_state()
    assert curve(example, text, steps=5) == curve(example, text, steps=5)
    assert curve(example, text, steps=5) != curve(example, text, steps=5, seed=1)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_the_model_is_causal_and_starts_near_uniform(example, text):
    model = example.build_model(example.Settings(**TINY), 71)
    tokens = torch.randint(71, (2, 13))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 71
    assert torch.equal(model(tokens)[:, :9], model(changed)[:, :9])
    assert abs(curve(example, text, steps=1)[0] - math.log(71)) < 0.5


def test_loss_falls(example, text):
    losses = curve(example, text, steps=60, width=24)
    assert losses[0] > 4.0
    assert sum(losses[-5:]) / 5 < losses[0] - 1.2


@pytest.mark.parametrize("attention", ["split", "stacked"])
def test_resume_is_uninterrupted_to_the_bit(example, tmp_path, attention):
    options = ["--attention", attention, "--seed", 3]
    whole, halves = tmp_path / "whole.pt", tmp_path / "halves.pt"
    assert run(example, *options, "--steps", 12, "--checkpoint", whole) == 0
    assert run(example, *options, "--steps", 7, "--checkpoint", halves) == 0
    # Settings need not be said again: the checkpoint knows them.
    assert (
        example.main(["--steps=12", f"--checkpoint={halves}", "--resume", "--sample-tokens=0"]) == 0
    )
    assert saved_losses(halves) == saved_losses(whole)
    left, right = (torch.load(path, weights_only=True) for path in (whole, halves))
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name])
    assert torch.equal(left["generator"], right["generator"])


def test_ctrl_c_saves_a_whole_step_and_says_how_to_go_on(example, tmp_path, monkeypatch, capsys):
    path, whole = tmp_path / "gpt.pt", tmp_path / "whole.pt"
    handler = signal.getsignal(signal.SIGINT)
    train = example.Training.train

    def interrupted(self, steps):
        for loss in train(self, steps):
            if len(self.losses) == 4:
                signal.raise_signal(signal.SIGINT)
            yield loss

    with monkeypatch.context() as patch:
        patch.setattr(example.Training, "train", interrupted)
        assert run(example, "--steps", 9, "--checkpoint", path) == 130
    assert signal.getsignal(signal.SIGINT) == handler
    assert "--resume" in capsys.readouterr().out
    assert len(saved_losses(path)) == 4
    assert run(example, "--steps", 9, "--checkpoint", path, "--resume") == 0
    assert run(example, "--steps", 9, "--checkpoint", whole) == 0
    assert saved_losses(path) == saved_losses(whole)
    with monkeypatch.context() as patch:
        patch.setattr(example.Training, "train", interrupted)
        assert run(example, "--steps", 9) == 130
    assert "--checkpoint FILE would have saved it" in capsys.readouterr().out


def test_saves_now_and_then(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "SAVE_EVERY", 2)
    seen = []
    monkeypatch.setattr(example, "save", lambda path, state: seen.append(len(state["losses"])))
    assert run(example, "--steps", 5, "--checkpoint", tmp_path / "gpt.pt") == 0
    assert seen == [2, 4, 5]


@pytest.mark.parametrize("stage", ["write", "sync", "replace"])
def test_a_save_that_fails_leaves_the_old_checkpoint(example, tmp_path, monkeypatch, capsys, stage):
    path = tmp_path / "gpt.pt"
    assert run(example, "--steps", 2, "--checkpoint", path) == 0
    before = path.read_bytes()

    def half_a_write(state, file):
        file.write(b"half a check")
        raise OSError("no space left on device")

    def fail(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if stage == "write":
            patch.setattr(torch, "save", half_a_write)
        else:
            patch.setattr(example.os, "fsync" if stage == "sync" else "replace", fail)
        capsys.readouterr()
        assert run(example, "--steps", 4, "--checkpoint", path, "--resume") == 2
    assert "no space left" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert run(example, "--steps", 4, "--checkpoint", path, "--resume") == 0


def test_prints_losses_and_a_sample(example, capsys):
    assert run(example, "--steps", 3, "--sample-tokens", 50) == 0
    out, err = capsys.readouterr()
    first, sample = out.split("\n", 1)
    assert re.fullmatch(r"loss \d\.\d{3} -> \d\.\d{3}, 3 steps, \d+ s here", first)
    assert len(sample) == 50 + 1
    assert "3/3" in err
    assert "tokens/s" in err


def refused(example, capsys, *arguments):
    """Exit code 2, and one line that does not break off."""
    assert run(example, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("train_gpt: ")
    assert err.count("\n") == 1
    return err


def test_train_gpt_option_by_its_beginning_is_refused(example, capsys):
    with pytest.raises(SystemExit) as exit_:
        example.main(["--step", "1"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: --step 1" in capsys.readouterr().err


def test_bad_checkpoints(example, tmp_path, capsys):
    path, other = tmp_path / "gpt.pt", tmp_path / "other.pt"
    assert run(example, "--steps", 2, "--checkpoint", path) == 0
    capsys.readouterr()
    resume = ("--resume", "--checkpoint")
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        other.write_bytes(whole[:size])
        assert "truncated" in refused(example, capsys, *resume, other)
    other.write_bytes(b"Vanity was the beginning and the end of Sir Walter Elliot's character")
    assert "no checkpoint of this program" in refused(example, capsys, *resume, other)
    for foreign in ({"model": {}}, [1, 2], torch.ones(3)):
        torch.save(foreign, other)
        assert "no checkpoint of this program" in refused(example, capsys, *resume, other)
    state = torch.load(path, weights_only=True)
    del state["model"]["norm.weight"]
    torch.save(state, other)
    assert "no checkpoint of this program" in refused(example, capsys, *resume, other)
    assert "No such file" in refused(example, capsys, *resume, tmp_path / "none.pt")
    assert path.read_bytes() == whole


def test_other_refusals(example, tmp_path, capsys):
    path, text = tmp_path / "gpt.pt", tmp_path / "text.txt"
    assert run(example, "--steps", 2, "--checkpoint", path) == 0
    capsys.readouterr()
    assert "add --resume" in refused(example, capsys, "--checkpoint", path)
    assert "needs --checkpoint" in refused(example, capsys, "--resume")
    resume = ("--resume", "--checkpoint", path)
    assert "another --seed" in refused(example, capsys, *resume, "--seed", 5)
    text.write_text("x" * 13)
    assert "another --text" in refused(example, capsys, *resume, "--text", text)
    short = "more than the context of 13 characters; got 13"
    assert short in refused(example, capsys, "--text", text)
    text.write_bytes(b"\xff\xfe caf\xe9" * 9)
    refused(example, capsys, "--text", text)
    assert "No such file" in refused(example, capsys, "--text", tmp_path / "none.txt")
    assert "--steps must be at least 1; got 0" in refused(example, capsys, "--steps", 0)
    assert "divisible by num_heads = 5" in refused(example, capsys, "--heads", 5)
    assert "no such folder" in refused(example, capsys, "--checkpoint", tmp_path / "no" / "gpt.pt")
    with pytest.raises(SystemExit) as exit_:
        example.main(["--attention", "both"])
    assert exit_.value.code == 2
