"""Packed rows, given by `cu_seq_lens_*`, `seq_idx` or positions."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError
from polyhead.integrations.transformers.packing import packed_documents, restarting_documents

B, S = 2, 6
BOUNDS = torch.tensor([0, 2, 6, 9, 12], dtype=torch.int32)  # two documents per row
IDS = torch.tensor([[0, 0, 1, 1, 1, 1], [2, 2, 2, 3, 3, 3]])


def read(T=S, **given):
    return packed_documents(torch.Size((B, 3, T, 4)), S, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 4, "max_length_k": 4},
        {"cu_seq_lens_q": BOUNDS},
        {"cu_seq_lens_k": BOUNDS.long(), "max_length_k": torch.tensor(4)},
        {"seq_idx": IDS},
        {"seq_idx": IDS.int(), "cu_seq_lens_q": BOUNDS},
        {"cu_seq_lens_q": torch.tensor([0, 2, 2, 6, 9, 12])},  # a document of no tokens
    ],
    ids=["all four", "queries'", "keys'", "seq_idx", "both", "an empty document"],
)
def test_packed_documents_are_masks_documents(given):
    got = read(**given).materialize(S, S)
    assert torch.equal(got, ph.mask.documents(IDS).materialize(S, S))


def test_packed_documents_without_arguments_is_none():
    assert read(cu_seq_lens_q=None, max_length_q=4) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"cu_seq_lens_q": BOUNDS[:-1]}, r"cu_seq_lens_q must begin with 0, never fall, and end"),
        ({"cu_seq_lens_k": BOUNDS[1:]}, r"cu_seq_lens_k must begin with 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 3, 6, 12])}, r"B \* T = 2 \* 6 = 12; got \[0, 4, 3"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 9, 12])},
            r"begin a document where a row begins, at 6",
        ),
        (
            {"cu_seq_lens_q": BOUNDS, "max_length_q": 3},
            r"max_length_q must be at least .* 4 tokens",
        ),
        ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": torch.tensor([0, 6, 12])}, r"_k must name the"),
        ({"cu_seq_lens_q": BOUNDS, "seq_idx": torch.zeros(1, S, dtype=int)}, r"seq_idx must name"),
        ({"cu_seq_lens_q": BOUNDS[None]}, r"must be integers of shape \(documents \+ 1,\); got"),
        ({"seq_idx": IDS[:, :5]}, r"seq_idx must be \(B, T\) = \(2, 6\); got \(2, 5\)"),
        (
            {"cu_seq_lens_q": BOUNDS, "T": 1},
            r"equal numbers of queries and keys: got T = 1, S = 6.*use_cache",
        ),
    ],
)
def test_packed_documents_that_do_not_fit_raise(given, text):
    with pytest.raises(ArgumentError, match=text):
        read(**given)


def test_packed_documents_of_a_cached_step_raise():
    with pytest.raises(ShapeError, match="seq_idx must come with equal numbers"):
        read(T=2, seq_idx=IDS)


def test_restarting_documents_begin_where_positions_restart():
    positions = torch.tensor([[0, 1, 0, 1, 2, 3]])
    got = restarting_documents(positions, B, S, S).materialize(S, S)
    expected = ph.mask.documents([0, 0, 1, 1, 1, 1]).materialize(S, S)
    assert torch.equal(got, expected.expand_as(got))


@pytest.mark.parametrize(
    "positions", [None, torch.arange(3, 9)[None], torch.zeros(3, B, S), torch.zeros(B, 1)], ids=str
)
def test_restarting_documents_of_other_positions_are_none(positions):
    assert restarting_documents(positions, B, S, S) is None
