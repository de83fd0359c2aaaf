"""`attention()`: the definition against a naive oracle, and what every call keeps to."""

from __future__ import annotations

import math

import pytest
import torch

import polyhead as ph


def test_the_oracle_attends_as_plain_python_does(tensors, naive_attention):
    """One head by hand, a number at a time."""
    query, key, value = (x.tolist() for x in tensors(B=1, H=1, G=1, T=2, S=3, D=2))
    want = []
    for q in query[0][0]:
        powers = [math.exp(sum(a * b for a, b in zip(q, k, strict=True)) * 0.5) for k in key[0][0]]
        want.append(
            [
                sum(p * v[e] for p, v in zip(powers, value[0][0], strict=True)) / sum(powers)
                for e in range(2)
            ]
        )
    got = naive_attention(*tensors(B=1, H=1, G=1, T=2, S=3, D=2), scale=0.5)
    torch.testing.assert_close(got, torch.tensor([[want]], dtype=torch.float64))


SIZES = [
    {"H": 1, "G": 1, "T": 1, "S": 1, "D": 24},
    {"H": 3, "G": 3, "T": 17, "S": 17, "D": 80},
    {"H": 6, "G": 3, "T": 17, "S": 31, "D": 96},
    {"H": 21, "G": 7, "T": 5, "S": 3, "D": 24, "E": 40},
    {"H": 7, "G": 1, "T": 1, "S": 257, "D": 80, "E": 1},
    {"B": 1, "H": 2, "G": 1, "T": 257, "S": 17, "D": 24},
    {"B": 1, "H": 2, "G": 2, "T": 257, "S": 257, "D": 96, "E": 24},
    {"H": 6, "G": 2, "T": 5, "S": 7, "D": 1, "E": 3},
]
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -1.5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "causal": {"mask": ph.mask.causal()},
    "everything": {
        "mask": ph.mask.causal() | ph.mask.window(after=3),
        "bias": (1, 1, "T", "S"),
        "scale": 0.9,
        "softcap": 2.0,
        "sinks": True,
    },
    **{
        f"bias {shape}": {"bias": shape}
        for shape in [
            ("B", "H", "T", "S"),
            ("B", 1, 1, "S"),
            (1, "H", "T", 1),
            ("H", "T", "S"),
            ("T", "S"),
            ("S",),
            (1,),
            (),
        ]
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_definition_is_the_oracle_to_1e12(tensors, gradients, naive_attention, size, option):
    inputs = [x.requires_grad_() for x in tensors(**size)]
    (B, H, T, _), S = inputs[0].shape, inputs[1].shape[2]
    options = dict(OPTIONS[option])
    generator = torch.Generator().manual_seed(4)
    if "bias" in options:
        named = {"B": B, "H": H, "T": T, "S": S, 1: 1}
        shape = [named[axis] for axis in options["bias"]]
        options["bias"] = torch.randn(shape, dtype=torch.float64, generator=generator)
        inputs.append(options["bias"].requires_grad_())
    if "sinks" in options:
        options["sinks"] = torch.randn(H, dtype=torch.float64, generator=generator)
        inputs.append(options["sinks"].requires_grad_())
    output = ph.attention(*inputs[:3], **options, backend="reference")
    mask = options.pop("mask", None)
    allowed = None if mask is None else mask.materialize(T, S)
    want = naive_attention(*inputs[:3], **options, allowed=allowed)
    assert output.shape == (B, H, T, inputs[2].shape[-1])
    torch.testing.assert_close(output, want, rtol=0, atol=1e-12)
    for got, expected in zip(gradients(output, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_alibi_slopes_can_be_learnt(tensors):
    slopes = torch.tensor([0.5, 0.25, 1.0, 0.1, 0.2, 2.0], dtype=torch.float64, requires_grad=True)
    inputs = tensors(T=3, S=4)
    assert torch.autograd.gradcheck(lambda s: ph.attention(*inputs, alibi_slopes=s), (slopes,))


def test_a_custom_mask_is_the_rule_it_states(tensors, naive_attention):
    inputs = tensors()
    rule = ph.mask.custom(lambda b, h, q, k: (q + k + b + h) % 3 > 0, batch=2, heads=6)
    at = torch.meshgrid(*(torch.arange(n) for n in (2, 6, 5, 7)), indexing="ij")
    allowed = (at[2] + 2 + at[3] + at[0] + at[1]) % 3 > 0  # query 0 of 5 stands at key 2 of 7
    want = naive_attention(*inputs, allowed=allowed)
    torch.testing.assert_close(ph.attention(*inputs, mask=rule), want, rtol=0, atol=1e-12)
    mask = rule & ph.mask.causal()
    want = naive_attention(*inputs, allowed=allowed & ph.mask.causal().materialize(5, 7))
    torch.testing.assert_close(ph.attention(*inputs, mask=mask), want, rtol=0, atol=1e-12)


def test_gradcheck_of_everything_differentiable(tensors, all_aux):
    inputs = [x.requires_grad_() for x in tensors(B=2, H=2, G=1, T=3, S=2, D=3, E=2)]
    bias = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def everything(query, key, value, bias, sinks):
        output, aux = ph.attention(
            query,
            key,
            value,
            bias=bias,
            sinks=sinks,
            softcap=3.0,
            mask=ph.mask.causal(),  # T > S: the first query attends to nothing
            return_aux=all_aux,
        )
        lse = aux.lse.masked_fill(aux.lse == -math.inf, 0.0)
        return output, aux.weights, lse, aux.stats.entropy, aux.stats.mean_distance

    assert torch.autograd.gradcheck(everything, (*inputs, bias, sinks))


def test_the_same_seed_gives_the_same_bits(tensors):
    inputs = tensors(dtype=torch.float32)

    def output(seed):
        torch.manual_seed(seed)
        return ph.attention(*inputs, dropout=0.5)

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))


def test_dropout_acts_on_normalised_weights(tensors, all_aux):
    """Values are the unit vectors, so that the output is the weights that were kept."""
    query, key, _ = tensors(B=400, H=2, G=1, T=5, S=7, dtype=torch.float64)
    value = torch.eye(7, dtype=torch.float64).expand(400, 1, 7, 7)
    torch.manual_seed(0)
    kept, aux = ph.attention(query, key, value, dropout=0.25, return_aux=all_aux)
    whole, before = ph.attention(query, key, value, return_aux=all_aux)
    torch.testing.assert_close(aux.weights, whole, rtol=0, atol=1e-14)
    assert torch.equal(aux.lse, before.lse)
    assert torch.equal(aux.stats.entropy, before.stats.entropy)
    dropped = kept == 0
    torch.testing.assert_close(kept, torch.where(dropped, 0.0, whole / 0.75))
    count = kept.numel()
    assert dropped.double().mean().item() == pytest.approx(
        0.25, abs=5 * math.sqrt(0.25 * 0.75 / count)
    )


def test_dropout_is_unbiased(tensors):
    query, key, value = tensors(B=1, H=2, G=1, T=3, S=5, D=4)
    many = 20_000
    torch.manual_seed(0)
    outputs = ph.attention(*(x.expand(many, -1, -1, -1) for x in (query, key, value)), dropout=0.4)
    error = (outputs.mean(dim=0) - ph.attention(query, key, value)[0]).abs()
    assert (error < 5 * outputs.std(dim=0) / math.sqrt(many)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", [None, ph.mask.causal(), ph.mask.window(before=1)], ids=repr)
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_in_gives_nothing_or_zeros(
    tensors, gradients, gradient, all_aux, B, T, S, mask, dtype
):
    inputs = [x.requires_grad_() for x in tensors(B=B, T=T, S=S, E=3, dtype=dtype)]
    output, aux = ph.attention(*inputs, mask=mask, return_aux=all_aux)
    assert output.shape == (B, 6, T, 3)
    assert (output == 0).all()
    assert aux.weights.shape == (B, 6, T, S)
    assert aux.lse.shape == aux.stats.entropy.shape == (B, 6, T)
    if S == 0:
        assert (aux.lse == -math.inf).all()
        assert (aux.stats.max_logit == -math.inf).all()
    assert [x.shape for x in gradients(output, inputs)] == [x.shape for x in inputs]
    assert (gradient(output, inputs) == 0).all()


def test_no_keys_but_a_sink_gives_zeros(tensors):
    query, key, value = tensors(S=0)
    output = ph.attention(query, key, value, sinks=torch.zeros(6))
    assert (output == 0).all()


def test_no_key_head_is_repeated_in_the_gradient_of_the_definition(tensors, tensor_sizes):
    B, H, G, T, S, D = 2, 8, 2, 3, 64, 16
    inputs = tensors(B=B, H=H, G=G, T=T, S=S, D=D, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    with tensor_sizes:
        ph.attention(*inputs, backend="reference").sum().backward()
    assert tensor_sizes.largest < B * H * S * D


@pytest.mark.parametrize("mask", [None, ph.mask.causal(), ph.mask.causal(align="start")], ids=repr)
def test_sdpa_holds_no_scores(tensors, tensor_sizes, mask):
    T = S = 512
    inputs = tensors(B=1, H=2, G=1, T=T, S=S, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    with tensor_sizes:
        ph.attention(*inputs, mask=mask, backend="sdpa").sum().backward()
    assert tensor_sizes.operations
    assert tensor_sizes.largest < T * S / 4


def test_decoding_one_token_writes_no_mask(tensors, tensor_sizes):
    inputs = tensors(T=1, S=64, dtype=torch.float32)
    with tensor_sizes:
        ph.attention(*inputs, mask=ph.mask.causal(), backend="sdpa")
    assert tensor_sizes.operations == ["_scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.parametrize(("T", "S"), [(5, 5), (5, 7), (1, 7)])
def test_compiles_in_one_graph(tensors, T, S):
    torch.compiler.reset()
    inputs = tensors(T=T, S=S, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(query, key, value):
        return ph.attention(query, key, value, mask=ph.mask.causal())

    assert torch.equal(compiled(*inputs), ph.attention(*inputs, mask=ph.mask.causal()))
