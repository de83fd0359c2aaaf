"""`polyhead convert`: files and errors."""

import pytest
from click.testing import CliRunner

import polyhead
from polyhead.cli import main


def test_convert_writes_the_other_layout(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    split = polyhead.MultiHeadAttention(6, 4, context_length=8, dropout=0.0, num_heads=2)
    path, output = str(tmp_path / "split.safetensors"), tmp_path / "stacked.safetensors"
    safetensors.save_file(split.state_dict(), path)
    arguments = ["convert", path, str(output), "--from", "split", "--to", "stacked", "--heads", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "1 attention layers converted from split to stacked, 0 other tensors" in result.output
    want = polyhead.convert.split_to_stacked(split).state_dict()
    got = safetensors.load_file(output)
    assert got.keys() == want.keys()
    assert all(got[name].equal(tensor) for name, tensor in want.items())

    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "OUT must not exist yet" in again.output
    assert CliRunner().invoke(main, [*arguments, "--force"]).exit_code == 0
    unknown = CliRunner().invoke(main, [*arguments[:-4], "--to", "gpt3"])
    assert unknown.exit_code == 2
    assert "'gpt3' is not one of 'polyhead'" in unknown.output
