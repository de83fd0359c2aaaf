"""What a lesson is of: tensors, lists, files, texts."""

from __future__ import annotations

import json

import pytest
import torch

from polyhead.errors import ArgumentError, DtypeError, ShapeError
from polyhead.lesson.inputs import check_input, read_file, words


def test_lists_keep_their_digits():
    x, tokens = check_input([[0.43, 0.1]], ["a"])
    assert x.tolist() == [[0.43, 0.1]]
    assert tokens == ("a",)
    assert check_input(torch.zeros(1, 2, 3), None)[1] == ("0", "1")


@pytest.mark.parametrize(
    ("x", "tokens", "error", "message"),
    [
        ([[1, 2], [3]], None, DtypeError, "x must be numbers; got list"),
        ("text", None, DtypeError, "x must be numbers; got str"),
        ([1.0, 2.0], None, ShapeError, r"x must be \(tokens, features\); got \(2,\)"),
        (torch.zeros(2, 3, 3), None, ShapeError, r"got \(2, 3, 3\)"),
        ([[float("nan")]], None, ArgumentError, "x must be finite"),
        ([[1.0]], ["a", "b"], ShapeError, "tokens must be 1, one for each row of x; got 2"),
        ([[1.0]], "a", DtypeError, "tokens must be a list of strings"),
        ([[1.0]], [1], DtypeError, "tokens must be a list of strings"),
        (None, ["a"], ShapeError, "tokens must be 6"),
    ],
)
def test_other_inputs_are_refused_by_name(x, tokens, error, message):
    with pytest.raises(error, match=message):
        check_input(x, tokens)


def test_the_same_word_has_the_same_numbers():
    x, tokens = words("to be or not to be", 3)
    assert tokens == ("to", "be", "or", "not", "to", "be")
    assert torch.equal(x[:2], x[4:])
    assert len({tuple(row) for row in x.tolist()}) == 4
    assert torch.equal(x, words("to be or not to be", 3)[0])


@pytest.mark.parametrize("text", ["", "  ", "a " * 13])
def test_texts_of_no_or_many_words_are_refused(text):
    with pytest.raises(ShapeError, match="--text must have 1 to 12 words"):
        words(text, 0)


def test_files_of_rows_or_of_rows_and_tokens(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text("[[1, 2.5]]")
    assert read_file(path) == ([[1, 2.5]], None)
    path.write_text(json.dumps({"x": [[1]], "tokens": ["é"]}), "utf-8-sig")
    assert read_file(path) == ([[1]], ["é"])


@pytest.mark.parametrize("text", ["", "{", '{"y": [[1]]}', '{"x": [[1]], "z": 1}', "3", '"x"'])
def test_other_files_are_refused_with_an_example(tmp_path, text):
    path = tmp_path / "numbers.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=r"--file must be .*write"):
        read_file(path)
    with pytest.raises(ArgumentError, match=r"none\.json"):
        read_file(tmp_path / "none.json")
