"""Train a small GPT, character by character, on a chapter of Jane Austen.

    python examples/train_gpt.py                                   # half a minute on a laptop
    python examples/train_gpt.py --steps 2000 --checkpoint gpt.pt  # Ctrl-C saves; add --resume

`--attention stacked` converts the weights of `--attention split`: the loss curve is the same.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

import polyhead as ph

TEXT = Path(__file__).with_name("persuasion_chapter.txt")
BATCH, LEARNING_RATE, SAVE_EVERY = 16, 3e-3, 50


class UsageError(Exception):
    """Something the person at the terminal can put right; shown as one line."""


@dataclass(frozen=True)
class Settings:
    """What the loss curve depends on; a checkpoint can only go on with the same."""

    attention: str = "split"
    dtype: str = "float32"
    seed: int = 0
    heads: int = 4
    layers: int = 2
    width: int = 96
    context: int = 64


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        # No dropout: two layouts would drop different weights, and their curves would part.
        self.attention = ph.MultiHeadAttention(width, width, settings.context, 0.0, settings.heads)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Tokens (B, T) to logits (B, T, vocabulary)."""

    def __init__(self, settings: Settings, vocabulary_size: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(settings) for _ in range(settings.layers)))
        self.tokens = nn.Embedding(vocabulary_size, settings.width)
        self.positions = nn.Embedding(settings.context, settings.width)
        self.norm = nn.LayerNorm(settings.width)
        for embedding in (self.tokens, self.positions):  # small: the head is tied to it
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        return F.linear(self.norm(x), self.tokens.weight)


def build_model(settings: Settings, vocabulary_size: int, device: str = "cpu") -> GPT:
    """The untrained model; stacked heads get the weights that split heads would have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GPT(settings, vocabulary_size)
    if settings.attention == "stacked":
        for block in model.blocks:
            block.attention = ph.convert.split_to_stacked(block.attention)
    return model.to(device=device, dtype=getattr(torch, settings.dtype))


@dataclass
class Training:
    """A model, a text, and how far they are. `state` and `restore` keep all that matters."""

    settings: Settings
    text: str
    device: str = "cpu"
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.text) <= self.settings.context:
            need = f"more than the context of {self.settings.context} characters"
            raise UsageError(f"the text must have {need}; got {len(self.text)}")
        self.vocabulary = sorted(set(self.text))
        self.data = torch.tensor([self.vocabulary.index(character) for character in self.text])
        self.model = build_model(self.settings, len(self.vocabulary), self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.generator = torch.Generator().manual_seed(self.settings.seed)

    def train(self, steps: int) -> Iterator[float]:
        """Train until `steps` are done in all, yielding the loss of each."""
        length = self.settings.context
        while len(self.losses) < steps:
            starts = torch.randint(len(self.data) - length, (BATCH, 1), generator=self.generator)
            chunks = self.data[starts + torch.arange(length + 1)].to(self.device)
            logits = self.model(chunks[:, :-1])
            loss = F.cross_entropy(logits.transpose(1, 2), chunks[:, 1:])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            yield self.losses[-1]

    @torch.no_grad()
    def sample(self, count: int) -> str:
        generator = torch.Generator().manual_seed(self.settings.seed)
        tokens = self.data[:1].to(self.device)
        for _ in range(count):
            logits = self.model(tokens[None, -self.settings.context :])[0, -1].double().cpu()
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn.to(self.device)])
        return "".join(self.vocabulary[token] for token in tokens[1:].tolist())

    def state(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "text": self.text,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.losses = list(state["losses"])


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the file whole: whatever happens, `path` is the old or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def start(options: argparse.Namespace) -> Training:
    """A new training, or the one that the checkpoint holds."""
    if options.steps < 1:
        raise UsageError(f"--steps must be at least 1; got {options.steps}")
    path, text = options.checkpoint, options.text.read_text(encoding="utf-8")
    if options.resume and not path:
        raise UsageError("--resume needs --checkpoint, the file to go on from")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; leave it out for cpu")
    given = {k: v for k, v in vars(options).items() if hasattr(Settings, k) and v is not None}
    if not options.resume:
        if path and (path.exists() or not path.parent.is_dir()):
            why = "add --resume to go on" if path.exists() else "no such folder"
            raise UsageError(f"--checkpoint {path}: {why}, or name another file")
        return Training(Settings(**given), text, options.device)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = Settings(**dict(state)["settings"])
        changed = [name for name, value in given.items() if value != getattr(saved, name)]
        changed += ["text"] * (state["text"] != text)
        if changed:
            raise UsageError(f"{path} has another --{changed[0]}; it was trained with {saved}")
        training = Training(saved, text, options.device)
        training.restore(state)
    except (UsageError, FileNotFoundError):
        raise
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise UsageError(f"{path} is truncated, or no checkpoint of this program") from error
    return training


def train_with_bar(training: Training, steps: int, checkpoint: Path | None) -> None:
    """Train and show it; save every SAVE_EVERY steps, at the end, and on Ctrl-C."""
    notes = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s")
    bar = Progress(BarColumn(), MofNCompleteColumn(), notes, console=Console(stderr=True))
    # Ctrl-C only notes itself: a step that has begun ends, so that what is saved is whole.
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        with bar:
            first = len(training.losses)
            task = bar.add_task("", total=steps, completed=first, loss=float("nan"), rate=0.0)
            for done, loss in enumerate(training.train(steps), first + 1):
                rate = (bar.tasks[0].speed or 0.0) * BATCH * training.settings.context
                bar.update(task, completed=done, loss=loss, rate=rate)
                if checkpoint and (interrupts or done == steps or done % SAVE_EVERY == 0):
                    save(checkpoint, training.state())
                if interrupts:
                    raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: list[str] | None = None) -> int:
    parse = argparse.ArgumentParser(
        description="Train a small GPT on a text, by character.", allow_abbrev=False
    )
    parse.add_argument("--text", type=Path, default=TEXT, help="UTF-8 file to learn")
    parse.add_argument("--steps", type=int, default=300, help="in all (default 300)")
    parse.add_argument("--attention", choices=["split", "stacked"], help="default split")
    parse.add_argument("--dtype", choices=["float32", "float64"], help="default float32")
    for name in ("seed", "heads", "layers", "width", "context"):
        parse.add_argument(f"--{name}", type=int, help=f"default {getattr(Settings, name)}")
    parse.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parse.add_argument("--checkpoint", type=Path, help="file to save to; default: none")
    parse.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parse.add_argument("--sample-tokens", type=int, default=300, help="default 300")
    options, began = parse.parse_args(arguments), time.perf_counter()
    try:
        train_with_bar(training := start(options), options.steps, options.checkpoint)
    except (UsageError, ph.errors.PolyheadError, OSError, UnicodeError) as error:
        print(f"train_gpt: {error}".splitlines()[0], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"saved; to go on, add --resume to: python {shlex.join(sys.argv)}"
        saved = options.checkpoint and options.checkpoint.exists()
        print(again if saved else "stopped; --checkpoint FILE would have saved it")
        return 130
    seconds, losses = time.perf_counter() - began, training.losses or [float("nan")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {len(losses)} steps, {seconds:.0f} s here")
    print(training.sample(options.sample_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
