"""Terminal view of a report, with and without colors, wide and narrow."""

import dataclasses
import io
import re

import pytest
import torch
from rich.console import Console

from polyhead.viewer.terminal import print_report


@pytest.fixture
def printed():
    """`printed(report, by=, width=, colors=)`: the printed lines."""

    def show(report, by="effective_keys", width=80, colors=None):
        out = io.StringIO()
        console = Console(
            file=out, width=width, color_system=colors, force_terminal=colors is not None
        )
        print_report(report, console, by)
        return out.getvalue().splitlines()

    return show


def test_print_report_grid_has_letters_and_numbers(printed, report):
    lines = printed(report)
    assert lines[0] == "a model read 7 tokens: 2 layers, 4 heads"
    assert lines[2:5] == [
        "   head       0      1",
        "layer 0  I 1.40 P 1.60",
        "layer 1  S 1.10 L 3.20",
    ]
    kinds = "I induction   P previous token   L local   M multiple sinks   O other   S sink"
    assert kinds in lines
    assert "Number: effective tokens, from 1.10 to 3.20 tokens." in "\n".join(lines)
    assert "All tokens are among the last 16: local is true of every head." in lines


def test_print_report_highlights_have_an_example(printed, report):
    lines = printed(report)
    assert max(map(len, lines)) <= 80
    at = next(i for i, line in enumerate(lines) if line.startswith("0.0"))
    assert lines[at].split() == [
        *("0.0", "induction", "0.20", "0.10", "1.00", "0.90", "1.4"),
        *("'", "Tom'", "looks", "at"),
    ]
    assert lines[at + 1].strip() == "' met' (0.93)"
    wide = next(line for line in printed(report, width=120) if line.startswith("0.0"))
    assert wide.rstrip().endswith("' Tom' looks at ' met' (0.93)")


def test_print_report_colors_span_the_range(printed, report):
    lines = printed(report, colors="truecolor")
    yellow, dark = "48;2;253;231;37", "48;2;68;1;84"
    cells = re.findall(r"\x1b\[[\d;]*;(48;2;[\d;]+)m ([A-Z] [\d.]+)", "\n".join(lines[3:5]))
    colors = {cell.split()[1]: color for color, cell in cells}
    assert (colors["1.10"], colors["3.20"]) == (dark, yellow)
    assert len(set(colors.values())) == 4
    assert "Color: effective tokens" in "\n".join(lines)
    # The scale of shares is always 0 to 1.
    shares = printed(report, "mass_first", colors="truecolor")
    assert yellow not in "\n".join(shares[3:5])


def with_heads(report, heads):
    """The report with `heads` heads per layer, copies of the first."""
    layers = []
    for layer in report.layers:
        held = {
            name: getattr(layer, name)[:1].expand(heads, *[-1] * (getattr(layer, name).ndim - 1))
            for name in ("map", "keys", "key_weights")
        }
        stats = {name: values[:1].repeat(heads) for name, values in layer.stats.items()}
        stats["mass_recent"] = torch.linspace(0.0, 1.0, heads)
        layers.append(dataclasses.replace(layer, heads=tuple(range(heads)), stats=stats, **held))
    return dataclasses.replace(report, layers=tuple(layers))


def test_print_report_many_heads_use_digits_then_blocks(printed, report):
    lines = printed(with_heads(report, 32), "mass_recent")
    assert lines[2].split() == ["head", "0", "5", "10", "15", "20", "25", "30"]
    assert lines[3].startswith("layer 0 I0I0I0I0I1")
    assert lines[3].endswith("I9")
    assert max(map(len, lines)) <= 80
    lines = printed(with_heads(report, 64), "mass_recent")
    assert [line.split()[1] for line in lines if line.startswith("   head ")] == [
        "0",
        "35",
    ]
    assert max(map(len, lines)) <= 80


def test_text_of_tokens_is_shown_as_it_is(printed, report):
    hostile = dataclasses.replace(report, tokens=("[red]x[/]\x1b[31m\n日本", *report.tokens[1:]))
    lines = "\n".join(printed(dataclasses.replace(hostile, model="[b]m"), width=200))
    assert "[b]m read 7 tokens" in lines
    assert r"'[red]x[/]\x1b[31m\n日本'" in lines
    assert "\x1b" not in lines


def test_print_report_heads_without_number_show_letter(printed, report):
    lines = printed(report, "contribution")
    assert lines[3].split() == ["layer", "0", "I", "P"]
    report.layers[0].stats["contribution"] = torch.tensor([2.0, 30.0])
    lines = printed(report, "contribution")
    assert [line.rstrip() for line in lines[3:5]] == [
        "layer 0  I  2.0 P 30.0",
        "layer 1  S      L",
    ]


@pytest.mark.parametrize("width", [20, 40, 60])
def test_print_report_narrow_terminal_keeps_numbers_whole(printed, report, width):
    wide, narrow = (" ".join(printed(report, width=w)) for w in (80, width))
    assert "…" not in narrow
    told = re.findall(r"\d\.\d\d?\b", wide.split("for example")[1])
    assert told
    assert re.findall(r"\d\.\d\d?\b", narrow.split("for example")[1]) == told
