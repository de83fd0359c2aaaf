"""`polyhead.lesson`: both mechanisms on small numbers, as text, as a page, in a notebook."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ArgumentError
from polyhead.lesson.drawing import draw
from polyhead.lesson.inputs import check_input, check_size
from polyhead.lesson.steps import STEPS
from polyhead.modules import MultiHeadAttention, MultiHeadAttentionWrapper
from polyhead.trace import Trace, trace

__all__ = ["Lesson", "LessonStep", "lesson"]


@dataclass(frozen=True, eq=False, repr=False)
class LessonStep:
    """One of the ten steps.

    Attributes:
        number: from 1.
        name, title, says, formula: in words.
        stacked, split: the step's numbers in each class, with a batch of one.
        tokens: a text for each row.
        num_heads: how many heads.
    """

    number: int
    name: str
    title: str
    says: str
    formula: str
    stacked: Tensor
    split: Tensor
    tokens: tuple[str, ...]
    num_heads: int

    @property
    def difference(self) -> float:
        """The largest difference of the two classes' numbers."""
        apart = (self.stacked - self.split).abs()  # -inf is -inf, though their difference is nan
        return torch.where(self.stacked == self.split, 0.0, apart).max().item()

    def __repr__(self) -> str:
        return f"LessonStep({self.number}, {self.name!r}, {tuple(self.split.shape)})"

    @property
    def _heading(self) -> str:
        return f"{self.number} {self.title} (largest difference {self.difference:.1e})"

    def __str__(self) -> str:
        """The numbers as tables, one per head, below one another."""
        tables = self.split[0] if self.split.ndim == 4 else self.split
        lines = [self._heading]
        for head, table in enumerate(tables.tolist()):
            lines += [f"head {head}"] if self.split.ndim == 4 else []
            for token, row in zip(self.tokens, table, strict=True):
                numbers = "".join(f"{value:8.3f}" for value in row)
                lines.append(f"{token if len(token) <= 8 else token[:7] + '…':8}{numbers}")
        return "\n".join(lines)

    def _repr_svg_(self) -> str:
        return draw(self._heading, self.split[0], self.tokens, self.num_heads)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """Picture and tables: JupyterLab shows a picture only where the notebook is trusted."""
        return {"image/svg+xml": self._repr_svg_(), "text/plain": str(self)}


@dataclass(frozen=True, eq=False, repr=False)
class Lesson:
    """Stacked heads and the weight split of the same weights (`polyhead.lesson`).

    Attributes:
        x: (T, features), float64.
        tokens: a text for each row.
        seed: drew the weights.
        stacked, split: the two modules, in float64, both with an output projection.
    """

    x: Tensor
    tokens: tuple[str, ...]
    seed: int
    stacked: MultiHeadAttentionWrapper
    split: MultiHeadAttention

    @functools.cached_property
    def traces(self) -> tuple[Trace, Trace]:
        """Every step of the stacked heads, and of the split."""
        with torch.no_grad():
            return trace(self.stacked, self.x[None]), trace(self.split, self.x[None])

    @functools.cached_property
    def steps(self) -> tuple[LessonStep, ...]:
        """The ten steps, with their numbers."""
        x, (stacked, split) = self.x[None], self.traces
        heads: Any = self.stacked.heads
        pairs = [
            (x, x),
            (torch.cat([head.W_query(x) for head in heads], -1), self.split.W_query(x)),
        ]
        shown = ("query", "scores", "masked", "weights", "contexts", "merged", "output", "output")
        pairs += [(getattr(stacked, name), getattr(split, name)) for name in shown]
        steps = []
        for number, (words, (a, b)) in enumerate(zip(STEPS, pairs, strict=True), start=1):
            steps.append(LessonStep(number, *words, a, b, self.tokens, self.stacked.num_heads))
        return tuple(steps)

    @property
    def difference(self) -> float:
        """The largest difference of the two classes in any step."""
        return max(step.difference for step in self.steps)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the lesson as one HTML file for any browser, without a network.

        >>> import tempfile, polyhead as ph
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ph.lesson().to_html(f"{folder}/lesson.html")
        """
        from polyhead.lesson.page import render

        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(render(self))

    def __repr__(self) -> str:
        heads = self.stacked.num_heads
        return (
            f"Lesson({len(self.tokens)} tokens of {self.x.shape[1]} features, {heads} heads of "
            f"{self.split.head_dim}, seed {self.seed})"
        )

    def __str__(self) -> str:
        lines = [repr(self), f"{'':15}{'stacked heads':16}{'weight split':16}difference"]
        for step in self.steps:
            shapes = "".join(f"{tuple(t.shape)!s:16}" for t in (step.stacked, step.split))
            lines.append(f"{step.number:2} {step.name:12}{shapes}{step.difference:.1e}")
        return "\n".join([*lines, f"largest difference of the two: {self.difference:.1e}"])

    def _repr_html_(self) -> str:
        """The page in a frame, as a notebook shows it; its text where frames are not trusted."""
        from polyhead.lesson.page import render

        page = render(self).replace("&", "&amp;").replace('"', "&quot;")
        # Where a notebook is not trusted, frames and styles are taken out: then the text is seen.
        return (
            "<style>.polyhead-untrusted { display: none }</style>"
            f'<pre class="polyhead-untrusted">{html.escape(str(self))}</pre>'
            '<iframe title="Multi-head attention, two ways" sandbox="allow-scripts" width="100%" '
            f'height="900" frameborder="0" srcdoc="{page}"></iframe>'
        )


def lesson(
    x: Any = None,
    tokens: Sequence[str] | None = None,
    *,
    d_out: int = 2,
    num_heads: int = 2,
    seed: int = 123,
) -> Lesson:
    """Both mechanisms of the lecture on small numbers, with the same weights.

    The stacked heads have the weights that `torch.manual_seed(seed)` gives them; the split's are
    converted from theirs, exactly. Show it in a notebook, print it, or write its page.

    Args:
        x: (T, features) numbers, up to 12 x 4; None: the lecture's six tokens.
        tokens: T texts; None: the lecture's, or the rows' numbers.
        d_out: size of one head, 1 to 4.
        num_heads: 1 to 4.
        seed: draws the weights.

    Raises:
        ShapeError, DtypeError, ArgumentError: an argument breaks a rule.

    >>> import polyhead as ph
    >>> learned = ph.lesson()
    >>> learned
    Lesson(6 tokens of 3 features, 2 heads of 2, seed 123)
    >>> learned.steps[5], learned.difference < 1e-12
    (LessonStep(6, 'Softmax', (1, 2, 6, 6)), True)
    """
    from polyhead.convert import stacked_to_split  # not loaded with polyhead

    numbers, texts = check_input(x, tokens)
    check_size("d_out", d_out)
    check_size("num_heads", num_heads)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ArgumentError(
            "seed", "must be an integer from 0 to 2**32 - 1", repr(seed), "choose one of these"
        )
    T, features = numbers.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stacked = MultiHeadAttentionWrapper(
            features, d_out, T, 0.0, num_heads, out_proj=True, dtype=torch.float32, device="cpu"
        )
    stacked = stacked.double().requires_grad_(False)
    return Lesson(numbers, texts, seed, stacked, stacked_to_split(stacked).requires_grad_(False))
