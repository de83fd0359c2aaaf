"""`attention(return_aux=...)`: weights, lse and stats, and what they leave as it was."""

from __future__ import annotations

import math

import pytest
import torch

import polyhead as ph

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
AUX_CASES = {
    "plain": {},
    "mask": {"mask": ph.mask.causal()},
    "bias": {"bias": torch.linspace(-1, 1, 35).view(5, 7)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 1, 6)},
    "dropout": {"dropout": 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AUX_CASES)
def test_asking_for_aux_changes_neither_output_nor_random_numbers(tensors, case, dtype):
    inputs = tensors(dtype=dtype)
    options = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in AUX_CASES[case].items()
    }
    torch.manual_seed(1)
    alone, next_alone = ph.attention(*inputs, **options), torch.rand(3)
    asked = [{name: True} for name in ("weights", "lse", "stats", "mean_weights")]
    asked.append({"weights": True, "lse": True})
    for names in asked:
        torch.manual_seed(1)
        output, aux = ph.attention(*inputs, **options, return_aux=ph.AuxRequest(**names))
        assert torch.equal(output, alone)
        assert torch.equal(torch.rand(3), next_alone)
        for name in ("weights", "lse", "stats", "mean_weights"):
            assert (getattr(aux, name) is not None) == (name in names)


@pytest.mark.parametrize("case", [name for name in AUX_CASES if name != "dropout"])
def test_weights_and_lse_are_those_of_the_output(tensors, all_aux, case):
    query, key, value = tensors()
    options = {
        k: v.double() if isinstance(v, torch.Tensor) else v for k, v in AUX_CASES[case].items()
    }
    output, aux = ph.attention(query, key, value, **options, return_aux=all_aux)
    repeated_key, repeated_value = (x.repeat_interleave(3, dim=1) for x in (key, value))
    torch.testing.assert_close(aux.weights @ repeated_value, output, rtol=0, atol=1e-13)
    assert torch.equal(aux.mean_weights, aux.weights.mean(dim=1))
    scores = query @ repeated_key.mT / math.sqrt(8)
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores + options.get("bias", 0.0)
    if "mask" in options:
        scores = scores.masked_fill(~options["mask"].materialize(5, 7), -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    torch.testing.assert_close(aux.lse, lse)
    torch.testing.assert_close(aux.stats.max_logit, scores.amax(dim=-1))
    total = aux.weights.sum(dim=-1)
    if "sinks" in options:
        left = torch.exp(lse) / (torch.exp(lse) + torch.exp(options["sinks"])[:, None])
        torch.testing.assert_close(total, left)
    else:
        torch.testing.assert_close(total, torch.ones_like(total))


def test_a_large_sink_takes_the_weight_and_leaves_lse_alone(tensors, gradient, all_aux):
    inputs = [x.requires_grad_() for x in tensors(dtype=torch.float32)]
    _, without = ph.attention(*inputs, return_aux=all_aux)
    sinks = torch.full((6,), 300.0, requires_grad=True)
    output, aux = ph.attention(*inputs, sinks=sinks, return_aux=all_aux)
    assert torch.equal(aux.lse, without.lse)
    assert (aux.weights == 0).all()
    assert (gradient(output, [*inputs, sinks]) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_dtype_in_is_the_dtype_out(tensors, all_aux, backend, dtype):
    output, aux = ph.attention(*tensors(dtype=dtype), backend=backend, return_aux=all_aux)
    assert output.dtype == aux.weights.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert aux.lse.dtype == aux.stats.entropy.dtype == wide


def test_a_float32_bias_beside_16_bit_queries_is_not_rounded(tensors, naive_attention):
    inputs = tensors(dtype=torch.bfloat16)
    bias = torch.full((7,), 100.0)
    bias[3] += 0.2  # bfloat16 has no number between 100 and 100.5
    output, aux = ph.attention(*inputs, bias=bias, return_aux=ph.AuxRequest(lse=True))
    assert output.dtype == torch.bfloat16
    _, wide = ph.attention(
        *(x.float() for x in inputs), bias=bias, return_aux=ph.AuxRequest(lse=True)
    )
    torch.testing.assert_close(aux.lse, wide.lse, rtol=1e-6, atol=0)


def test_stats_by_hand(all_aux):
    """Scores are the logs of 1, 2, 1: weights 1/4, 1/2, 1/4 for a query that stands at key 2."""
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64).log().view(1, 1, 3, 1)
    _, aux = ph.attention(query, key, key, scale=1.0, return_aux=all_aux)
    assert aux.weights.flatten().tolist() == pytest.approx([0.25, 0.5, 0.25])
    assert aux.lse.item() == pytest.approx(math.log(4))
    stats = aux.stats
    assert stats.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert stats.mean_distance.item() == pytest.approx(0.25 * 2 + 0.5 * 1)
    assert stats.mass_first.item() == pytest.approx(0.25)
    assert stats.mass_previous.item() == pytest.approx(0.5)
    assert stats.mass_self.item() == pytest.approx(0.25)
    assert stats.max_logit.item() == pytest.approx(math.log(2))


def test_stats_of_equal_weights_by_hand(all_aux):
    """T = 2 against S = 4 with equal scores: the queries stand at keys 2 and 3."""
    query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 8)
    _, aux = ph.attention(query, key, key, mask=ph.mask.causal(), return_aux=all_aux)
    stats = {name: x.flatten().tolist() for name, x in aux.stats.tensors.items()}
    assert stats["entropy"] == pytest.approx([math.log(3), math.log(4)])
    assert stats["mean_distance"] == pytest.approx([(2 + 1) / 3, (3 + 2 + 1) / 4])
    assert stats["mass_first"] == pytest.approx([1 / 3, 1 / 4])
    assert stats["mass_previous"] == pytest.approx([1 / 3, 1 / 4])
    assert stats["mass_self"] == pytest.approx([1 / 3, 1 / 4])
    assert stats["max_logit"] == [0.0, 0.0]


def test_a_distance_to_a_later_key_counts_as_one_to_an_earlier(all_aux):
    """T = S = 3 and equal weights, nothing masked."""
    zeros = torch.zeros(1, 1, 3, 8)
    _, aux = ph.attention(zeros, zeros, zeros, return_aux=all_aux)
    assert aux.stats.mean_distance.flatten().tolist() == pytest.approx([3 / 3, 2 / 3, 3 / 3])
    assert aux.stats.mass_previous.flatten().tolist() == pytest.approx([0, 1 / 3, 1 / 3])


def test_without_aux_is_the_same_call(tensors, all_aux):
    call = ph.functional.build_call(*tensors(), scale=0.5, aux=all_aux)
    bare = call.without_aux()
    assert bare.aux.names == ()
    assert call.aux.names == ("weights", "lse", "stats", "mean_weights")
    assert bare.query is call.query
    assert bare.scale == 0.5
    assert (call.B, call.H, call.G, call.T, call.S, call.D, call.E) == (2, 6, 2, 5, 7, 8, 8)
    assert call.group == 3
