"""Color scale: increasing lightness, legible text."""

from polyhead.viewer.colors import colored


def luminance(triplet):
    channels = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in triplet]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def test_colored_is_legible_and_grows_lighter():
    before = -1.0
    for step in range(101):
        style = colored("x", step / 100).style
        ground, ink = (luminance(color.triplet) for color in (style.bgcolor, style.color))
        assert ground > before
        before = ground
        light, dark = max(ground, ink), min(ground, ink)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG's contrast for small text


def test_colored_clamps_shares():
    assert colored("x", -1.0).style == colored("x", 0.0).style
    assert colored("x", 2.0).style == colored("x", 1.0).style
