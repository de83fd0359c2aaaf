"""What all three modules refuse, and the words they refuse it with."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dropout": -0.25}, ArgumentError, r"dropout must be .* in \[0, 1\); got -0\.25"),
        ({"dropout": 1.0}, ArgumentError, r"dropout must be .* in \[0, 1\); got 1\.0"),
        ({"dropout": float("nan")}, ArgumentError, "dropout .*got nan"),
        ({"d_in": 0}, ShapeError, "d_in must be an integer of at least 1; got 0"),
        ({"d_out": -3}, ShapeError, "d_out must be .*; got -3"),
        ({"d_in": 2.5}, ShapeError, r"d_in must be an integer .*; got 2\.5"),
        ({"d_in": True}, ShapeError, "d_in must be an integer .*; got True"),
        ({"context_length": 0}, ShapeError, "context_length must be .*; got 0"),
        ({"mask": torch.ones(11, 11, dtype=torch.bool)}, DtypeError, "mask .*Tensor.*mask.dense"),
        ({"rope": 10_000.0}, DtypeError, r"rope must be a polyhead.Rope or None; got 10000\.0"),
        ({"rope": ph.Rope()}, ShapeError, "head_dim must be even with rope; got 7"),
        ({"dropout": None}, DtypeError, "dropout must be a number; got None"),
        ({"dropout": "0.1"}, DtypeError, "dropout must be a number; got '0.1'"),
        ({"scale": "0.1"}, DtypeError, "scale must be a number; got '0.1'"),
        ({"scale": True}, DtypeError, "scale must be a number; got True"),
        ({"scale": float("nan")}, ArgumentError, "scale must be finite; got nan"),
    ],
)
def test_constructor_refuses(kind, change, error, message):
    with pytest.raises(error, match=message):
        kind.build(**change)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 12, 5), ShapeError, "at most context_length = 11 tokens; got 12"),
        (torch.ones(2, 3, 4), ShapeError, "x must have d_in = 5 features; got 4"),
        (torch.ones(3, 5), ShapeError, r"x must have 3 dim.*d_in = 5.*got \(3, 5\); .*x\[None\]"),
        (torch.ones(2, 1, 3, 5), ShapeError, r"x must have 3 dim.*got \(2, 1, 3, 5\); reshape"),
        (torch.ones(2, 3, 5, dtype=torch.int64), DtypeError, "x .*torch.int64; embed token ids"),
        (torch.ones(2, 3, 5, dtype=torch.float64), DtypeError, "torch.float32; got torch.float64"),
        (torch.ones(2, 3, 5, device="meta"), DeviceError, "module's device, cpu; got meta"),
        ([[[1.0] * 5]], DtypeError, "x must be a tensor; got list"),
    ],
)
def test_call_refuses(kind, x, error, message):
    with pytest.raises(error, match=message):
        kind.build()(x)


def test_memory_is_checked_too_but_may_be_longer_than_the_context(kind):
    module = kind.build(mask=None)
    x = torch.ones(2, 3, 5)
    with pytest.raises(ShapeError, match="memory must have d_in = 5 features; got 6"):
        module(x, memory=torch.ones(2, 4, 6))
    with pytest.raises(ShapeError, match=r"query's B = 2.*got \(3, "):
        module(x, memory=torch.ones(3, 4, 5))
    assert module(x, memory=torch.ones(2, 13, 5)).shape[:2] == (2, 3)


def test_mask_at_the_call_must_be_a_mask(kind):
    with pytest.raises(DtypeError, match=r"mask must be .*; got Tensor; wrap .*mask\.dense"):
        kind.build()(torch.ones(2, 3, 5), mask=torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.arange(4), r"\(T,\) = \(3,\) or \(B, T\) = \(2, 3\); got torch.int64 \(4,\)"),
        (torch.zeros(3, 2, dtype=torch.int64), r"\(B, T\) = \(2, 3\); got .*\(3, 2\)"),
        (torch.arange(3.0), "must be integers .*got torch.float32"),
        (torch.ones(3, dtype=torch.bool), "must be integers .*got torch.bool"),
        ([0, 1, 2], "must be a tensor of integers; got list"),
    ],
)
def test_positions_of_another_form(kind, positions, message):
    module = kind.build(head_dim=6, rope=ph.Rope())
    with pytest.raises(ArgumentError, match="positions " + ".*" + message):
        module(torch.ones(2, 3, 5), positions=positions)


def test_positions_are_the_default_written_out(kind):
    module, x = kind.build(head_dim=6, rope=ph.Rope()), torch.randn(2, 3, 5)
    assert torch.equal(module(x), module(x, positions=torch.arange(3)))
    assert torch.equal(module(x), module(x, positions=torch.arange(3).expand(2, 3)))
    # Only distances count, so a shift of all positions changes nothing; a stretch does.
    torch.testing.assert_close(module(x), module(x, positions=torch.arange(3) + 100))
    assert not torch.allclose(module(x), module(x, positions=torch.arange(3) * 5))


@pytest.mark.parametrize("return_aux", [False, 0, "", True])
def test_a_request_for_aux_is_no_flag(kind, return_aux):
    message = (
        f"return_aux must be a polyhead.AuxRequest or None; got {return_aux!r}; pass for example"
    )
    with pytest.raises(DtypeError, match=message):
        kind.build()(torch.ones(2, 3, 5), return_aux=return_aux)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (0, 0, 5)])
def test_nothing_in_nothing_out(kind, shape):
    module = kind.build()
    x = torch.zeros(shape, requires_grad=True)
    y = module(x)
    assert y.shape[:2] == shape[:2]
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "request_", [ph.AuxRequest(weights=True, lse=True, stats=True), ph.AuxRequest(lse=True)]
)
def test_aux_never_changes_the_output(kind, training, request_):
    module = kind.build(dropout=0.3).train(training)
    x = torch.randn(2, 4, 5)
    torch.manual_seed(0)
    plain = module(x)
    torch.manual_seed(0)
    output, aux = module(x, return_aux=request_)
    assert torch.equal(plain, output)
    assert (aux.weights is not None) == request_.weights
    assert aux.lse.shape == (2, kind.heads, 4)
    assert (aux.stats is not None) == request_.stats
    if request_.weights:
        assert aux.weights.shape == (2, kind.heads, 4, 4)
        # Before dropout: rows sum to 1, and nothing above the diagonal.
        torch.testing.assert_close(aux.weights.sum(-1), torch.ones(2, kind.heads, 4))
        assert not aux.weights.triu(1).any()
        assert aux.stats.entropy.shape == (2, kind.heads, 4)


def test_aux_is_the_formula(kind):
    module, x = kind.build(qkv_bias=True).double(), torch.randn(2, 4, 5, dtype=torch.float64)
    _, aux = module(x, return_aux=ph.AuxRequest(weights=True, lse=True))
    for h in range(kind.heads):
        if kind.name == "MultiHeadAttention":
            rows = slice(7 * h, 7 * h + 7)
            query, key = module.W_query(x)[..., rows], module.W_key(x)[..., rows]
        else:
            head = module if kind.heads == 1 else module.heads[h]
            query, key = head.W_query(x), head.W_key(x)
        scores = (query @ key.mT / 7**0.5).masked_fill(
            torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf
        )
        torch.testing.assert_close(aux.weights[:, h], scores.softmax(-1))
        torch.testing.assert_close(aux.lse[:, h], scores.logsumexp(-1))


def test_the_modules_mask_and_the_calls_must_both_allow(kind):
    module, x = kind.build(), torch.randn(2, 4, 5)
    window = ph.mask.window(before=1)
    both = kind.build(mask=ph.mask.causal() & window)
    both.load_state_dict(module.state_dict())
    assert torch.equal(module(x, mask=window), both(x))
    assert not torch.allclose(module(x, mask=window), module(x))
    none = kind.build(mask=None)
    none.load_state_dict(module.state_dict())
    assert torch.equal(none(x, mask=ph.mask.causal()), module(x))
    # A mask that forbids a whole row gives a context of zeros, never NaN.
    lengths = ph.mask.lengths([0, 4])
    y = module(x, mask=lengths)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[1], module(x)[1])


def test_dropout_acts_in_training_only_and_follows_the_seed(kind):
    module, x = kind.build(dropout=0.5), torch.randn(2, 4, 5)
    without = kind.build()
    without.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x), without(x))
    module.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], without(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_in_is_dtype_out(kind, dtype):
    module = kind.build(dtype=dtype)
    assert module(torch.randn(2, 4, 5, dtype=dtype)).dtype == dtype


def test_autocast_casts_the_input(kind):
    module, x = kind.build(), torch.randn(2, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        assert torch.equal(module(x.bfloat16()), y)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0, atol=0.05)


def test_built_on_the_meta_device_it_fills_later(kind):
    module = kind.build(device="meta", dropout=0.1)
    assert all(parameter.is_meta for parameter in module.parameters())
    with pytest.raises(DtypeError, match=r"torch.float32; got torch.float64"):
        module(torch.empty(2, 4, 5, device="meta", dtype=torch.float64))
    source, x = kind.build(), torch.randn(2, 4, 5)
    module.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(module.eval()(x), source(x))


def test_runs_on_the_meta_device(kind):
    y = kind.build(device="meta")(torch.empty(2, 4, 5, device="meta"))
    assert y.is_meta
    assert y.shape == kind.build()(torch.zeros(2, 4, 5)).shape


@pytest.mark.parametrize("options", [{}, {"rope": ph.Rope(), "head_dim": 6}])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(kind, options, training):
    torch._dynamo.reset()
    module = kind.build(dropout=0.0, **options).train(training)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(compiled(x), module(x))
