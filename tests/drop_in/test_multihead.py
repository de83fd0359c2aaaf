"""`ph.drop_in.MultiheadAttention` beside torch's, and where torch's is wrong."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import ArgumentError, DtypeError, ShapeError

B, T, S, EMBED, HEADS = 2, 5, 7, 24, 3

BUILT = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 11, "vdim": 13, "batch_first": True},
    "learnt key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "both keys, other sizes": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 11},
}


def pair(dtype=torch.float32, **options):
    """torch's and ours, of one seed, with biases that are not 0."""
    made = []
    for kind in (nn.MultiheadAttention, ph.drop_in.MultiheadAttention):
        torch.manual_seed(7)
        module = kind(EMBED, HEADS, **options)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("proj.bias") or name == "in_proj_bias":
                    parameter.normal_()
        made.append(module.to(dtype))
    return made


def inputs(module, batched=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    sizes = ((T, EMBED), (S, module.kdim), (S, module.vdim))
    if batched:
        sizes = tuple((B, *size) if module.batch_first else (size[0], B, size[1]) for size in sizes)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def masks(batched=True):
    generator = torch.Generator().manual_seed(5)
    rows = B if batched else 1
    padding = torch.arange(S) >= torch.tensor([[4], [7]])[:rows]
    forbidden = torch.rand(T, S, generator=generator) < 0.3
    forbidden[:, 0] = False
    by_head = torch.rand(rows * HEADS, T, S, generator=generator) < 0.3
    by_head[..., 0] = False
    numbers = torch.randn(rows * HEADS, T, S, generator=generator)
    numbers_padding = torch.zeros(rows, S).masked_fill(padding, -torch.inf)
    squeeze = (lambda mask: mask) if batched else (lambda mask: mask[0])
    return {
        "no mask": {},
        "attn_mask": {"attn_mask": forbidden},
        "attn_mask by head": {"attn_mask": by_head},
        "numbers": {"attn_mask": numbers},
        "padding": {"key_padding_mask": squeeze(padding)},
        "both": {"attn_mask": by_head, "key_padding_mask": squeeze(padding)},
        "both numbers": {"attn_mask": numbers, "key_padding_mask": squeeze(numbers_padding)},
        "average_attn_weights": {"average_attn_weights": False, "attn_mask": forbidden},
        "need_weights": {"need_weights": False, "attn_mask": forbidden},
    }


def test_the_signatures_are_torchs():
    theirs, ours = nn.MultiheadAttention, ph.drop_in.MultiheadAttention
    for name in ("__init__", "forward"):
        want = inspect.signature(getattr(theirs, name)).parameters.values()
        got = inspect.signature(getattr(ours, name)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in got] == [
            (p.name, p.default, p.kind) for p in want
        ]


@pytest.mark.parametrize("options", BUILT.values(), ids=BUILT)
def test_one_seed_gives_the_same_parameters(options):
    states, after = [], []
    for kind in (nn.MultiheadAttention, ph.drop_in.MultiheadAttention):
        torch.manual_seed(11)
        module = kind(EMBED, HEADS, **options)
        after.append(torch.rand(1))
        states.append(module.state_dict())
        module.load_state_dict(states[0])
    theirs, ours = states
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert torch.equal(*after)


@pytest.mark.parametrize(
    "batched", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["batched", "unbatched"]
)
@pytest.mark.parametrize("call", masks())
@pytest.mark.parametrize("options", BUILT.values(), ids=BUILT)
def test_it_is_torchs(options, call, batched, assert_as_good_as_eager):
    theirs, ours = pair(**options)
    given = masks(batched)[call]
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for name, x in given.items()}  # fmt: skip
    x = inputs(ours, batched)
    exact = copy.deepcopy(theirs).double()(*(part.double() for part in x), **wide)
    for got, eager, want in zip(ours(*x, **given), theirs(*x, **given), exact, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert_as_good_as_eager(got, eager, want)


@pytest.mark.parametrize("call", ["no mask", "numbers", "both"])
@pytest.mark.parametrize("options", BUILT.values(), ids=BUILT)
def test_gradients_are_torchs(options, call):
    """Of inputs, parameters and a mask of numbers, through the output and the weights."""
    found = []
    for module in pair(torch.float64, **options):
        leaves = [x.requires_grad_() for x in inputs(module, dtype=torch.float64)]
        given = dict(masks()[call])
        if call == "numbers":
            given["attn_mask"] = given["attn_mask"].double().requires_grad_()
            leaves.append(given["attn_mask"])
        y, weights = module(*leaves[:3], **given)
        leaves += list(module.parameters())
        found.append(torch.autograd.grad(y.square().sum() + weights.square().sum(), leaves))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", BUILT.values(), ids=BUILT)
def test_is_causal_alone_is_causal(options, training, need_weights):
    """torch raises in training, and ignores it in inference."""
    theirs, ours = pair(torch.float64, **options)
    ours.train(training)
    x = inputs(ours, dtype=torch.float64)
    with torch.no_grad():
        y, weights = ours(*x, is_causal=True, need_weights=need_weights)
        future = torch.ones(T, S, dtype=torch.bool).triu(1)
        want, want_weights = theirs(*x, attn_mask=future)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(weights, want_weights, rtol=0, atol=1e-12)


def test_is_causal_holds_beside_a_mask_that_is_not():
    """torch takes one or the other, by the path."""
    _, ours = pair(torch.float64, batch_first=True)
    x = inputs(ours, dtype=torch.float64)
    forbidden = masks()["attn_mask"]["attn_mask"]
    future = torch.ones(T, S, dtype=torch.bool).triu(1)
    for need_weights in (True, False):
        got, _ = ours(*x, attn_mask=forbidden, is_causal=True, need_weights=need_weights)
        want, _ = ours(*x, attn_mask=forbidden | future)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_numbers_and_booleans_hold_together():
    theirs, ours = pair(torch.float64)
    x = inputs(ours, dtype=torch.float64)
    numbers = masks()["numbers"]["attn_mask"].double()
    padding = masks()["padding"]["key_padding_mask"]
    as_numbers = torch.zeros(B, S).double().masked_fill(padding, -torch.inf)
    for got, want in zip(
        ours(*x, attn_mask=numbers, key_padding_mask=padding),
        theirs(*x, attn_mask=numbers, key_padding_mask=as_numbers),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_inputs_without_a_batch():
    theirs, ours = pair(torch.float64, add_bias_kv=True)
    x = inputs(ours, batched=False, dtype=torch.float64)
    given = {"key_padding_mask": masks(batched=False)["padding"]["key_padding_mask"]}
    for got, want in zip(ours(*x, **given), theirs(*x, **given), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "bool"])
def test_a_row_with_nothing_to_attend_to(numbers, need_weights, mode):
    """torch gives NaN in most of these."""
    _, ours = pair(batch_first=True)
    ours.train(mode == "train")
    forbidden = torch.zeros(T, S, dtype=torch.bool)
    forbidden[2] = True
    mask = torch.zeros(T, S).masked_fill(forbidden, -torch.inf) if numbers else forbidden
    x = [part.requires_grad_() for part in inputs(ours)]
    with torch.inference_mode(mode == "inference"):
        y, weights = ours(*x, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(y[:, 2], ours.out_proj.bias.expand(B, EMBED))
    assert not y.isnan().any()
    if need_weights:
        assert not weights[:, 2].any()
        torch.testing.assert_close(weights[:, 3].sum(dim=-1), torch.ones(B))
    if mode == "train":
        query, key, _ = torch.autograd.grad(y.square().sum(), x)
        assert not query[:, 2].any()
        assert query[:, 3].any()
        assert not key.isnan().any()


def test_asking_for_weights_never_changes_the_output():
    _, ours = pair(dropout=0.5)
    x = inputs(ours)
    for ours.training in (True, False):
        found = []
        for need_weights in (True, False):
            torch.manual_seed(13)
            found.append(ours(*x, need_weights=need_weights)[0])
        assert torch.equal(*found)


def test_weights_are_those_before_dropout():
    _, ours = pair(dropout=0.5)
    x = inputs(ours)
    torch.manual_seed(13)
    first, trained = ours(*x)
    second, _ = ours(*x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(trained, ours.eval()(*x)[1])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_is_the_same(copied):
    _, ours = pair(add_bias_kv=True)
    x = inputs(ours)
    other = copied(ours)
    assert type(other) is ph.drop_in.MultiheadAttention
    assert torch.equal(other(*x)[0], ours(*x)[0])


def test_it_is_one_graph():
    _, ours = pair(batch_first=True)
    x = inputs(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for got, want in zip(compiled(*x, is_causal=True), ours(*x, is_causal=True), strict=True):
        torch.testing.assert_close(got, want)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("options", BUILT.values(), ids=BUILT)
def test_compiled_it_is_one_graph(options):
    _, ours = pair(**options)
    x = inputs(ours)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for given in ({}, {"need_weights": False, "is_causal": True}, masks()["both"]):
        for got, want in zip(compiled(*x, **given), ours(*x, **given), strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want)
    torch.compiler.reset()


def test_exported_it_is_the_module_at_every_length():
    _, ours = pair(batch_first=True)
    ours.eval()
    length = torch.export.Dim("length", min=2, max=64)
    x = torch.randn(B, 6, EMBED)
    shapes = ({1: length}, {1: length}, {1: length})
    options = {"is_causal": True}
    program = torch.export.export(
        ours, (x, x.clone(), x.clone()), options, dynamic_shapes=(*shapes, None)
    )
    x = torch.randn(B, 17, EMBED)
    for got, want in zip(
        program.module()(x, x, x, **options), ours(x, x, x, **options), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_second_derivatives():
    ours = ph.drop_in.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def attend(x):
        return ours(x, x, x, need_weights=False, is_causal=True)[0]

    assert torch.autograd.gradgradcheck(attend, x)


@pytest.mark.parametrize("options", BUILT.values(), ids=BUILT)
def test_autocast_takes_float32_to_bfloat16(options):
    _, ours = pair(**options)
    x = inputs(ours)
    with torch.autocast("cpu", torch.bfloat16):
        y, weights = ours(*x, **masks()["numbers"])
    assert y.dtype == weights.dtype == torch.bfloat16
    want, _ = ours(*x, **masks()["numbers"])
    # Two roundings to 8 bits of heads and output, of numbers that are added up.
    torch.testing.assert_close(y.float(), want, rtol=0, atol=4 * 2**-8 * want.abs().max().item())


def test_on_the_meta_device():
    module = ph.drop_in.MultiheadAttention(EMBED, HEADS, batch_first=True, device="meta")
    x = torch.empty(B, T, EMBED, device="meta")
    y, weights = module(x, x, x)
    assert y.is_meta
    assert (y.shape, weights.shape) == ((B, T, EMBED), (B, T, T))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1), ShapeError, "embed_dim must be an integer of at least 1; got 0"),
        ((24, 7), ShapeError, "embed_dim must be divisible by num_heads = 7: .* got 24"),
        ((24, 3, 1.0), ArgumentError, r"dropout must be a probability in \[0, 1\); got 1.0"),
    ],
)
def test_a_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        ph.drop_in.MultiheadAttention(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(T, 23)}, ShapeError, r"query must be \(B, tokens, 24\).*\(5, 23\)"),
        ({"key": torch.ones(S, 24)}, ShapeError, r"key must be \(B, tokens, 24\), .*\(7, 24\)"),
        ({"key": torch.ones(3, S, 24)}, ShapeError, r"value must have the key's tokens, \(3, 7\)"),
        (
            {"key": torch.ones(3, S, 24), "value": torch.ones(3, S, 24)},
            ShapeError,
            "key must have the query's batch rows, 2; got 3; see batch_first, which is True",
        ),
        ({"value": torch.ones(B, S, 24).double()}, DtypeError, "value .*torch.float32; got .*64"),
        ({"query": [[1.0]]}, DtypeError, "query must be a tensor; got list"),
        (
            {"attn_mask": torch.zeros(S, T)},
            ShapeError,
            r"attn_mask must be \(5, 7\) or \(6, 5, 7\); got \(7, 5\)",
        ),
        (
            {"key_padding_mask": torch.zeros(S, dtype=torch.bool)},
            ShapeError,
            r"key_padding_mask must be \(2, 7\); got \(7,\)",
        ),
        (
            {"attn_mask": torch.zeros(T, S, dtype=torch.uint8)},
            DtypeError,
            r"attn_mask must be bool \(True = forbidden\), .*torch.float32.*; got torch.uint8",
        ),
    ],
)
def test_a_call_refuses(change, error, message):
    _, ours = pair(batch_first=True)
    given = dict(zip(("query", "key", "value"), inputs(ours), strict=True)) | change
    with pytest.raises(error, match=message):
        ours(**given)
