"""Head reports as rows, data frames, plots and files."""

from __future__ import annotations

import base64
import re
import sys

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, DependencyError, ModelError
from polyhead.look.picture import grid_png


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(7, 8),
        ph.MultiHeadAttention(8, 12, 16, 0.0, num_heads=3),
        ph.MultiHeadAttention(12, 8, 16, 0.0, num_heads=2),
    )
    ids = torch.tensor([1, 2, 3, 1, 2])
    return ph.look.capture(model, ids, weights=True, tokens=["a", "b", "c", "a", "b"])


def test_report_has_one_row_per_head(report):
    rows = report.rows()
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert rows[4]["entropy"] == report.layers[1].stats["entropy"][1].item()
    assert all(row["name"] == ph.look.name_head(row) for row in rows)


def test_report_repr_is_one_line(report):
    assert repr(report) == "HeadReport(Sequential: 2 layers, 5 heads, 5 tokens)"
    assert repr(report.layers[0]).count("\n") == 0
    assert len(repr(report.layers)) < 200


def test_report_in_untrusted_notebook_shows_a_picture(report):
    shown = report._repr_html_()
    left = re.sub(r"<style>.*?</style>|<iframe.*</iframe>", "", shown, flags=re.S)
    assert f"<p>{report!r}: " in left
    names = [row["name"] for row in report.rows()]
    assert all(f"{names.count(name)} {name}" in left for name in names)
    picture = re.search(r'<img alt="[^"]+" src="data:image/png;base64,([^"]+)"', left)[1]
    assert base64.b64decode(picture) == grid_png(report)


def test_report_to_dataframe(report):
    pytest.importorskip("pandas")
    frame = report.to_dataframe()
    assert frame.to_dict("records") == report.rows()


def test_report_save_and_load_round_trip(report, tmp_path):
    pytest.importorskip("safetensors")
    report.save(tmp_path / "heads.safetensors")
    again = ph.look.HeadReport.load(tmp_path / "heads.safetensors")
    assert again.rows() == report.rows()
    assert (again.model, again.tokens) == ("Sequential", ("a", "b", "c", "a", "b"))
    assert torch.equal(again.token_ids, report.token_ids)
    for one, other in zip(report.layers, again.layers, strict=True):
        assert (one.index, one.name, one.heads) == (other.index, other.name, other.heads)
        for name in ("map", "keys", "key_weights", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_report_save_omits_missing_tensors(tmp_path):
    pytest.importorskip("safetensors")
    mha = ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=2)
    ph.look.capture(mha, torch.randn(1, 5, 8)).save(tmp_path / "heads")
    again = ph.look.HeadReport.load(tmp_path / "heads")
    assert again.token_ids is None
    assert again.layers[0].weights is None


def test_report_load_refuses_other_files(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ModelError, match="other must be a report of format 2; got None; save it"):
        ph.look.HeadReport.load(tmp_path / "other")


def test_plot_grid_is_layers_by_heads(report):
    pytest.importorskip("matplotlib")
    figure = report.plot_grid("mass_first")
    (image,) = figure.axes[0].images
    grid = torch.tensor(image.get_array().filled(float("nan")))
    assert grid.shape == (2, 3)
    assert torch.equal(grid[0].float(), report.layers[0].stats["mass_first"])
    assert torch.equal(grid[1, :2].float(), report.layers[1].stats["mass_first"])
    assert grid[1, 2].isnan()  # layer 1 has two heads
    message = "must be one of entropy, effective_keys, mean_distance"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        report.plot_grid("name")


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("pandas", lambda report: report.to_dataframe()),
        ("matplotlib.figure", lambda report: report.plot_grid()),
        ("safetensors", lambda report: report.save("nowhere")),
        ("safetensors", lambda report: report.load("nowhere")),
    ],
)
def test_report_without_optional_package_raises(monkeypatch, report, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0]
    with pytest.raises(DependencyError, match=f"{name} is needed.*pip install -e"):
        use(report)
