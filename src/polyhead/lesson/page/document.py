"""The lesson's document: its files, and torch's own numbers of every step."""

from __future__ import annotations

import base64
import re
import struct
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyhead.html_document import assemble
from polyhead.lesson.inputs import LECTURE_X
from polyhead.lesson.measure import gradient_difference, products_and_times
from polyhead.lesson.steps import SPLIT_CODE, STACKED_CODE, STEPS

if TYPE_CHECKING:
    from polyhead.lesson.lesson import Lesson

__all__ = ["payload", "render"]

# In this order: each file uses those before it.
_SCRIPTS = ("core.js", "parts.js", "figures.js", "exercises.js", "main.js")
_TRACED = ("query", "key", "value", "scores", "weights", "contexts", "output")


def render(lesson: Lesson) -> str:
    """The page as one HTML document, under 60 KB for the lecture's input."""
    return assemble(
        _file("lesson.html"),
        title="Multi-head attention, two ways",
        style=_file("lesson.css"),
        scripts=[_file(name) for name in _SCRIPTS],
        data=payload(lesson),
    )


def payload(lesson: Lesson) -> dict[str, Any]:
    """The data of the page: the input, the weights, and each step as torch computes it."""
    stacked, split = lesson.stacked, lesson.split
    weights: dict[str, Any] = {name: getattr(split, name).weight for name in _WEIGHTS}
    weights |= {"W_out": split.out_proj.weight, "bias": split.out_proj.bias}
    trace = lesson.traces[0]
    return {
        "tokens": list(lesson.tokens),
        "x": lesson.x.tolist(),
        "lecture": LECTURE_X,
        "heads": stacked.num_heads,
        "size": split.head_dim,
        "seed": lesson.seed,
        "weights": {name: _packed(weight) for name, weight in weights.items()},
        "torch": {name: _packed(getattr(trace, name)[0]) for name in _TRACED},
        "gradients": gradient_difference(
            stacked.requires_grad_(), split.requires_grad_(), lesson.x[None]
        ),
        "measured": products_and_times(),
        "steps": STEPS,
        "code": {"stacked": STACKED_CODE, "split": SPLIT_CODE},
    }


_WEIGHTS = ("W_query", "W_key", "W_value")


def _packed(tensor: Tensor) -> str:
    """float64, little endian, in base64: every bit of it."""
    numbers = tensor.detach().to(torch.float64).flatten().tolist()
    return base64.b64encode(struct.pack(f"<{len(numbers)}d", *numbers)).decode()


def _file(name: str) -> str:
    """One of the page's files, without the comments and blanks that only readers of it need."""
    text = resources.files("polyhead.lesson.page").joinpath(name).read_text("utf-8")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("//")]
    if name.endswith(".css"):
        return re.sub(r"\s*([{};:,>])\s*", r"\1", "\n".join(lines)).replace(";}", "}")
    if name.endswith(".js"):
        return re.sub(r"(?<=[{(\[,;])\n", "", "\n".join(map(_without_blanks, lines)))
    return "\n".join(lines)


def _without_blanks(line: str) -> str:
    """A line of JavaScript without blanks around its signs; one with a template is left alone."""
    if re.search(r"['`/\\]", line):
        return line
    parts = re.split(r'("[^"]*")', line)
    return "".join(part if part.startswith('"') else _SPACED.sub(r"\1", part) for part in parts)


_SPACED = re.compile(r" ?([=*<>?:,;{}()\[\]|&]+) ?")
