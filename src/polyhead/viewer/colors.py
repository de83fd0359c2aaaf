"""Color scale of the terminal."""

from __future__ import annotations

from rich.color import Color
from rich.style import Style
from rich.text import Text

__all__ = ["colored"]

# Dark blue to yellow through green, the order of viridis: legible for the color-blind too.
_SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def colored(text: str, share: float) -> Text:
    """Return the text on a background color for `share` between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    left = min(int(place), len(_SCALE) - 2)
    part = place - left
    pairs = zip(_SCALE[left], _SCALE[left + 1], strict=True)
    red, green, blue = (round(a + (b - a) * part) for a, b in pairs)
    # Relative luminance, above which black is the easier to read: as in WCAG 2.
    linear = [(channel / 255) ** 2.2 for channel in (red, green, blue)]
    bright = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179
    ink = Color.from_rgb(*([0] * 3 if bright else [255] * 3))  # "black" is grey in many themes
    return Text(text, style=Style(color=ink, bgcolor=Color.from_rgb(red, green, blue)))
