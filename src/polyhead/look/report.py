"""Report on a model's heads on one text: statistics and maps to tabulate, plot and save."""

from __future__ import annotations

import base64
import html
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyhead.errors import (
    ArgumentError,
    DependencyError,
    ModelError,
    did_you_mean,
    install_command,
)
from polyhead.look.kinds import name_head
from polyhead.look.picture import grid_png

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas  # type: ignore[import-untyped]

__all__ = ["HeadReport", "LayerReport"]

_FORMAT = 2
# Characters: a notebook keeps what its cells show, and loads all of it.
_NOTEBOOK_BUDGET = 1_500_000
_TENSORS = ("map", "keys", "key_weights", "weights", "query_ids", "key_ids")
_FLAGS = ("is_self", "is_input")


@dataclass(frozen=True, eq=False, repr=False)
class LayerReport:
    """Statistics, maps and top keys of the heads of one attention layer.

    Attributes:
        index: the layer's number in the model.
        name: its module name in the model.
        heads: indices of the N reported heads, the first dimension of every tensor.
        stats: one value per head by name, each (N,): `HeadStats.per_head`, and `contribution`,
            the mean norm of the head's own addition to the layer's output (if the output
            projection is a plain linear layer).
        map: (N, rows, columns) as from `attention_map`.
        keys, key_weights: (N, T, n) as from `top_keys`.
        weights: (N, T, S), if requested.
        is_self: True if queries and keys are established to be of the same tokens. If not, `stats`
            has no statistic that compares their positions, and heads get no names.
        is_input: True if query t and key t are of token t of the model's first input, so that
            the report's tokens label the map.
        query_ids, key_ids: (T,), (S,) the token of each query and key; None: not established.
    """

    index: int
    name: str
    heads: tuple[int, ...]
    stats: dict[str, Tensor]
    map: Tensor
    keys: Tensor
    key_weights: Tensor
    weights: Tensor | None = None
    is_self: bool = True
    is_input: bool = True
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None

    def __repr__(self) -> str:
        return f"LayerReport({self.index}, {self.name!r}, {len(self.heads)} heads)"

    def of_head(self, head: int) -> dict[str, float]:
        """Return the statistics of one head."""
        at = self.heads.index(head)
        return {name: values[at].item() for name, values in self.stats.items()}


@dataclass(frozen=True, eq=False, repr=False)
class HeadReport:
    """Per-head analysis of a model on one text (`polyhead.look.capture`).

    Attributes:
        model: the model's class.
        tokens: the text of each token, if it was given.
        token_ids: (T,) the model's input; None if that was not token ids.
        layers: one `LayerReport` per layer.
    """

    model: str
    tokens: tuple[str, ...]
    token_ids: Tensor | None
    layers: tuple[LayerReport, ...]

    def __repr__(self) -> str:
        heads = sum(len(layer.heads) for layer in self.layers)
        T = self.layers[0].keys.shape[1] if self.layers else 0
        return f"HeadReport({self.model}: {len(self.layers)} layers, {heads} heads, {T} tokens)"

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: layer, head, name (`name_head`; None unless is_self), statistics."""
        return [
            {
                "layer": layer.index,
                "head": head,
                "name": name_head(numbers) if layer.is_self else None,
                **numbers,
            }
            for layer in self.layers
            for head in layer.heads
            for numbers in [layer.of_head(head)]
        ]

    def to_dataframe(self) -> pandas.DataFrame:
        """Return `rows` as a pandas data frame.

        Raises:
            DependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise _needs("pandas", "a data frame") from error
        return pandas.DataFrame(self.rows())

    def plot_grid(self, statistic: str = "entropy") -> matplotlib.figure.Figure:
        """Plot one statistic of all heads as a heat map: one row per layer, one column per head.

        Args:
            statistic: a column of `to_dataframe`, such as "mass_first" or "contribution".

        Raises:
            ArgumentError: there is no such statistic.
            DependencyError: matplotlib is not installed.
        """
        rows = self.rows()
        known = list(dict.fromkeys(name for layer in self.layers for name in layer.stats))
        if statistic not in known:
            remedy = did_you_mean(statistic, known, "choose one")
            rule = f"must be one of {', '.join(known)}"
            raise ArgumentError("statistic", rule, repr(statistic), remedy)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise _needs("matplotlib", "a plot") from error
        heads = 1 + max(row["head"] for row in rows)
        line_of = {layer.index: line for line, layer in enumerate(self.layers)}
        grid = [[float("nan")] * heads for _ in self.layers]
        for row in rows:
            grid[line_of[row["layer"]]][row["head"]] = row.get(statistic, float("nan"))
        # Not pyplot, which would keep the figure and choose a window for the whole process.
        figure = Figure(figsize=(2 + 0.4 * heads, 1.5 + 0.25 * len(grid)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.set(xlabel="head", ylabel="layer", title=f"{statistic} of {self.model}'s heads")
        axes.set_xticks(range(heads))
        axes.set_yticks(range(len(grid)), [str(layer.index) for layer in self.layers])
        figure.colorbar(image)
        return figure

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page of `docs/heads.md`: one HTML file for any browser, without a network.

        It stays under 5 MB for 270 heads at any text length: if necessary, weights are rounded and
        weak ones left out, and the page notes it.

        Raises:
            ArgumentError: the tokens are not those of the input, or there is no self-attention.

        >>> import tempfile, torch, polyhead as ph
        >>> mha = ph.MultiHeadAttention(8, 8, context_length=16, dropout=0.0, num_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ph.look.capture(mha, torch.randn(1, 16, 8)).to_html(f"{folder}/heads.html")
        """
        from polyhead.look.page import render

        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(render(self))

    def _repr_html_(self) -> str:
        """Return the page for a notebook, in a sandboxed frame.

        An untrusted notebook removes frames and styles: it shows a line of text and a picture of
        all maps instead.
        """
        from polyhead.look.page import render

        page = html.escape(render(self, budget=_NOTEBOOK_BUDGET))
        title = html.escape(f"What the heads of {self.model} do")
        kinds = Counter(row["name"] for row in self.rows()).most_common()
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
        picture = base64.b64encode(grid_png(self)).decode()
        return (
            '<style>.polyhead-untrusted { display: none }</style><div class="polyhead-untrusted">'
            f"<p>{html.escape(repr(self))}: {counts}. Trust the notebook, or run the cell, for "
            f'the page.</p><img alt="{title}" src="data:image/png;base64,{picture}">'
            f'</div><iframe title="{title}" sandbox="allow-scripts" width="100%" height="900" '
            f'frameborder="0" srcdoc="{page}"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the tensors, and the other fields as JSON in its header.

        Raises:
            DependencyError: safetensors is not installed.
        """
        save_file = _safetensors("save_file")
        tensors = {} if self.token_ids is None else {"token_ids": self.token_ids.contiguous()}
        layers = []
        for layer in self.layers:
            flags = {name: getattr(layer, name) for name in _FLAGS}
            entry = {"index": layer.index, "name": layer.name, "heads": layer.heads}
            layers.append(entry | flags)
            held = {name: getattr(layer, name) for name in _TENSORS}
            held |= {f"stats.{name}": values for name, values in layer.stats.items()}
            for name, tensor in held.items():
                if tensor is not None:
                    tensors[f"{layer.index}.{name}"] = tensor.contiguous()
        about = {"format": _FORMAT, "model": self.model, "tokens": self.tokens, "layers": layers}
        save_file(tensors, path, {"polyhead": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadReport:
        """Read a file written by `save`.

        Raises:
            ModelError: the file is not a report of this format.
            DependencyError: safetensors is not installed.
        """
        with _safetensors("safe_open")(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("polyhead", "{}"))
            if about.get("format") != _FORMAT:
                raise ModelError(
                    f"{os.fspath(path)} must be a report of format {_FORMAT}; got "
                    f"{about.get('format')}; save it again with this version of polyhead"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = []
        for entry in about["layers"]:
            prefix = f"{entry['index']}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            stats = {n.removeprefix("stats."): t for n, t in own.items() if n.startswith("stats.")}
            held: dict[str, Any] = {name: own.get(name) for name in _TENSORS}
            held |= {name: entry[name] for name in _FLAGS}
            heads = tuple(entry["heads"])
            layers.append(LayerReport(entry["index"], entry["name"], heads, stats, **held))
        return cls(about["model"], tuple(about["tokens"]), tensors.get("token_ids"), tuple(layers))


def _safetensors(name: str) -> Callable[..., Any]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise _needs("safetensors", "a report on disk") from error
    found: Callable[..., Any] = getattr(safetensors, name, None) or getattr(safetensors.torch, name)
    return found


def _needs(package: str, what: str) -> DependencyError:
    return DependencyError(f"{package} is needed for {what}: {install_command('look')}")
