"""`ph.drop_in.scaled_dot_product_attention` against torch's own, in float64 and by its samples."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import polyhead as ph
from polyhead.drop_in import explain_sdpa, scaled_dot_product_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOWEST = torch.finfo(torch.float32).min


def _exact(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The formula of torch's documentation, in float64; empty rows give zeros.

    The lowest float32 swallows a score in float32, and not in float64: it is made larger.
    """
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = torch.where(attn_mask == LOWEST, -1e300, attn_mask.double())
    query, key, value = (x.double() for x in (query, key, value))
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    T, S = scores.shape[-2:]
    if is_causal:
        allowed = torch.ones(T, S, dtype=torch.bool).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return weights @ value


def _call(function, args, kwargs):
    """Output and gradients, or the kind of the error."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in args]
    output = function(*leaves, **kwargs)
    learned = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(output, learned, torch.ones_like(output), materialize_grads=True)
    return [output, *grads]


def _assert_as_good(ours, theirs, exact, terms=1.0):
    """Twice torch's error in the same dtype, and units in the last place: 8 of the result, and one
    of the terms that cancel in it.
    """
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        truth = truth.reshape(a.shape)
        scale = truth.abs().max().item() if truth.numel() else 0.0
        error = (b.double() - truth).abs().max().item() if truth.numel() else 0.0
        allowed = 2 * error + torch.finfo(a.dtype).eps * (8 * max(scale, 1.0) + terms)
        torch.testing.assert_close(a.double(), truth, rtol=0.0, atol=allowed, equal_nan=False)


def _math(*args, **kwargs):
    """torch's function by its math path, which its documentation describes."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def _double(args):
    return [x.double() if x.is_floating_point() else x for x in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_sdpa_is_torchs_on_its_own_samples(any_size, torch_samples, dtype, requires_grad):
    """Every sample of op_db: forward and gradients, by the function and by the mode."""
    torch.manual_seed(0)
    seen = 0
    for sample in torch_samples.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
        seen += 1
        if kwargs.get("dropout_p"):
            # The weights that are dropped differ: the mean of what is kept does not.
            args = (args[0], args[1], torch.ones_like(args[2]))
            output = scaled_dot_product_attention(*args, **kwargs)
            expected = F.scaled_dot_product_attention(*args, **kwargs)
            assert output.shape == expected.shape
            assert abs(output.float().mean() - 1.0) < 0.5
            kwargs["dropout_p"] = 0.0
        attn_mask = kwargs.pop("attn_mask", None)
        args = args if attn_mask is None else (*args, attn_mask)
        with ph.use_backend("cpu" if dtype != torch.float64 else "auto"):
            ours = _call(scaled_dot_product_attention, args, kwargs)
            with ph.drop_in.sdpa() as calls:
                by_mode = _call(F.scaled_dot_product_attention, args, kwargs)
        assert calls.polyhead == (dtype != torch.float64)
        if dtype == torch.float64:  # torch computes it
            theirs = _call(F.scaled_dot_product_attention, args, kwargs)
            assert all(map(torch.equal, ours, theirs))
            assert all(map(torch.equal, by_mode, theirs))
            continue
        terms = args[0].abs().max().item() * args[2].abs().max().item()
        theirs, exact = _call(_math, args, kwargs), _call(_math, _double(args), kwargs)
        _assert_as_good(ours, theirs, exact, terms)
        _assert_as_good(by_mode, theirs, exact, terms)
    assert seen == 25


_DIMS = st.integers(1, 4)


@st.composite
def _calls(draw):
    """Arguments that torch takes: 2 to 5 dimensions, broadcast, masks of any shape, strides."""
    T, S, D, E = draw(st.tuples(_DIMS, _DIMS, _DIMS, _DIMS))
    T, S = draw(st.sampled_from([(T, S), (T, T)]))
    leading = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    enable_gqa = bool(leading) and draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))

    def part(tokens, size, dims):
        if draw(st.booleans()):
            dims = [draw(st.sampled_from([n, 1])) for n in dims]
            dims = dims[draw(st.integers(0, len(dims))) :] if not enable_gqa else dims
        x = torch.randn(*dims, tokens, size, generator=generator).to(dtype)
        if draw(st.booleans()) and x.ndim > 2:
            x = x.transpose(-3, -2).contiguous().transpose(-3, -2)
        return x

    if enable_gqa:
        group = draw(st.integers(1, 3))
        batch, G = leading[:-1], leading[-1]
        query = torch.randn(*batch, G * group, T, D, generator=generator).to(dtype)
        key = torch.randn(*batch, G, S, D, generator=generator).to(dtype)
        value = torch.randn(*batch, G, S, E, generator=generator).to(dtype)
        leading = [*batch, G * group]
    else:
        query, key, value = part(T, D, leading), part(S, D, leading), part(S, E, leading)
        leading = list(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]))
    kwargs = {"enable_gqa": enable_gqa}
    kind = draw(st.sampled_from(["none", "causal", "bool", "float", "infinite", "lowest"]))
    scores = torch.broadcast_shapes(query.shape[:-2], leading if enable_gqa else key.shape[:-2])
    if kind == "causal":
        kwargs["is_causal"] = True
    elif kind != "none":
        shape = [draw(st.sampled_from([n, 1])) for n in (*scores, T, S)]
        shape = shape[draw(st.integers(0, max(0, len(shape) - 2))) :]
        allowed = torch.rand(shape, generator=generator) < 0.6
        if draw(st.booleans()):
            allowed = torch.ones(shape, dtype=torch.bool).tril()
        kwargs["attn_mask"] = {
            "bool": allowed,
            "float": torch.randn(shape, generator=generator).to(dtype),
            "infinite": torch.zeros(shape, dtype=dtype).masked_fill(~allowed, -math.inf),
            "lowest": torch.zeros(shape).masked_fill(~allowed, LOWEST),
        }[kind]
    if draw(st.booleans()):
        kwargs["scale"] = draw(st.sampled_from([0.0, -0.7, 1.3, 2]))
    return (query, key, value), kwargs


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_calls(), st.sampled_from(["cpu", "auto", "reference"]))
def test_sdpa_is_the_formula_of_torch(any_size, call, backend):
    """Against float64, with twice the error of torch's math path and rounding."""
    args, kwargs = call
    query, _, _ = args
    with ph.use_backend(backend):
        ours = scaled_dot_product_attention(*args, **kwargs)
    assert ours.dtype == query.dtype
    _assert_as_good([ours], [_math(*args, **kwargs)], [_exact(*args, **kwargs)])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_calls())
def test_sdpa_has_the_gradients_of_torch(any_size, call):
    (query, key, value), kwargs = call
    args = [x.float() for x in (query, key, value)]
    if (attn_mask := kwargs.pop("attn_mask", None)) is not None:
        args.append(attn_mask if attn_mask.dtype == torch.bool else attn_mask.float())
    _assert_as_good(
        _call(scaled_dot_product_attention, args, kwargs),
        _call(_math, args, kwargs),
        _call(_exact, _double(args), kwargs),
    )


EMPTY_ROWS = {
    "bool": lambda: torch.tensor([[True, False], [False, False], [True, True]]),
    "infinity": lambda: torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf], [0.0, 0.0]]),
    "lowest": lambda: torch.tensor([[0.0, LOWEST], [LOWEST, LOWEST], [0.0, 0.0]]),
}


@pytest.mark.parametrize("kind", EMPTY_ROWS)
def test_sdpa_empty_row_is_torchs(any_size, tensors, kind):
    """Zeros, by both of torch's kernels; the mean of the values for the lowest floats."""
    args = tensors(B=1, H=2, G=2, T=3, S=2, D=4, dtype=torch.float32)
    kwargs = {"attn_mask": EMPTY_ROWS[kind]()}
    ours = _call(scaled_dot_product_attention, args, kwargs)
    # The gradient of torch's fused CPU kernel is twice as large for a row of the lowest floats.
    _assert_as_good(ours, _call(_math, args, kwargs), _call(_exact, _double(args), kwargs))
    mean = args[2].mean(dim=2) if kind == "lowest" else torch.zeros(1, 2, 4)
    torch.testing.assert_close(ours[0][:, :, 1], mean)
    fused = F.scaled_dot_product_attention(*args, **kwargs)
    torch.testing.assert_close(fused[:, :, 1], mean)


@pytest.mark.parametrize(("T", "S"), [(0, 5), (3, 0), (0, 0)])
def test_sdpa_without_tokens_is_torchs(tensors, T, S):
    args = tensors(B=2, H=2, G=2, T=T, S=S, D=4, dtype=torch.float32)
    ours = scaled_dot_product_attention(*args)
    assert torch.equal(ours, F.scaled_dot_product_attention(*args))
    assert explain_sdpa(*args).why == "an empty tensor: there is nothing to compute"


@pytest.mark.parametrize("scale", [0.0, -1.5])
def test_sdpa_scale_of_0_or_less_is_the_math_path(any_size, tensors, scale):
    """torch's fused CPU kernel gives NaN for it with is_causal: its math path is right."""
    args = tensors(B=1, H=2, G=2, T=4, S=4, D=4, dtype=torch.float32)
    ours = scaled_dot_product_attention(*args, is_causal=True, scale=scale)
    exact = _exact(*args, is_causal=True, scale=scale)
    torch.testing.assert_close(ours.double(), exact, rtol=0.0, atol=1e-5)


REFUSED = {
    "int mask": {"attn_mask": torch.zeros(3, 5, dtype=torch.int32)},
    "float64 mask": {"attn_mask": torch.zeros(3, 5, dtype=torch.float64)},
    "16-bit mask": {"attn_mask": torch.zeros(3, 5, dtype=torch.bfloat16)},
    "mask of another shape": {"attn_mask": torch.zeros(3, 4)},
    "mask of five dimensions": {"attn_mask": torch.zeros(2, 1, 1, 3, 5)},
    "dropout above 1": {"dropout_p": 1.5},
    "dropout as text": {"dropout_p": "0.1"},
    "scale as text": {"scale": "1"},
    "unknown argument": {"softcap": 3.0},
    "mask as a list": {"attn_mask": [[True]]},
    "other heads": {"key": torch.randn(2, 3, 5, 8)},
    "other head size": {"key": torch.randn(2, 4, 5, 7)},
    "other dtype": {"key": torch.randn(2, 4, 5, 8, dtype=torch.float64)},
    "one dimension": {"query": torch.randn(8)},
    "groups that do not divide": {"key": torch.randn(2, 3, 5, 8), "enable_gqa": True},
    "no tensor": {"query": None},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_sdpa_raises_what_torch_raises(any_size, kind):
    kwargs = {
        "query": torch.randn(2, 4, 3, 8),
        "key": torch.randn(2, 4, 5, 8),
        "value": torch.randn(2, 4, 5, 8),
        **REFUSED[kind],
    }
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.scaled_dot_product_attention(**kwargs)
    with ph.drop_in.sdpa() as calls, pytest.raises(type(theirs.value)) as ours:
        F.scaled_dot_product_attention(**kwargs)
    assert str(ours.value) == str(theirs.value)
    assert calls.polyhead == 0


HANDED = {
    "float64": lambda q: ((q.double(),) * 3, {}),
    "complex64 is a dtype": lambda q: ((q.to(torch.complex64),) * 3, {}),
    "attn_mask and is_causal": lambda q: ((q, q, q, torch.ones(5, 5).bool()), {"is_causal": True}),
    "dropout_p is 1.0": lambda q: ((q, q, q), {"dropout_p": 1.0}),
    "on meta": lambda q: ((q.to("meta"),) * 3, {}),
    "nested": lambda q: ((torch.nested.as_nested_tensor([q[0], q[1]]),) * 3, {}),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", HANDED)
def test_sdpa_hands_torch_what_is_torchs(any_size, kind):
    torch.manual_seed(0)
    args, kwargs = HANDED[kind](torch.randn(2, 3, 5, 8))
    explained = explain_sdpa(*args, **kwargs)
    assert explained.by == "torch"
    assert kind.split(" is a ")[0] in explained.why

    def result(function):
        try:
            output = function(*args, **kwargs)
        except RuntimeError as error:
            return str(error)
        if output.is_nested:
            return [x.tolist() for x in output.unbind()]
        return output.shape if output.is_meta else output.tolist()

    assert result(scaled_dot_product_attention) == result(F.scaled_dot_product_attention)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_sdpa_under_vmap_is_torchs(any_size):
    query = torch.randn(3, 2, 4, 5, 8)
    ours = torch.func.vmap(lambda q: scaled_dot_product_attention(q, q, q))(query)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, query, query))


def test_sdpa_on_fake_tensors_is_torchs(any_size):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query = torch.randn(2, 4, 5, 8)
        assert scaled_dot_product_attention(query, query, query).shape == (2, 4, 5, 8)
        assert explain_sdpa(query, query, query).by == "torch"


def test_sdpa_counts_flops_as_torch_does(any_size):
    from torch.utils.flop_counter import FlopCounterMode

    query = torch.randn(2, 4, 5, 8)
    counts = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        with FlopCounterMode(display=False) as counter:
            function(query, query, query, dropout_p=0.1)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpa_in_autocast_casts_as_torch_does(any_size, tensors, dtype):
    args = [*tensors(dtype=torch.float32, H=2, G=2), torch.zeros(5, 7)]
    args = [x.requires_grad_() for x in args]
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        with torch.autocast("cpu", dtype=dtype):
            output = function(*args)
        results.append([output, *torch.autograd.grad(output.float().sum(), args)])
    assert results[0][0].dtype == dtype
    assert results[0][1].dtype == torch.float32
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("contiguous", [True, False])
def test_sdpa_output_has_the_strides_of_torch(any_size, contiguous):
    query = torch.randn(2, 7, 4, 8).transpose(1, 2)
    query = query.contiguous() if contiguous else query
    ours = scaled_dot_product_attention(query, query, query)
    assert ours.stride() == F.scaled_dot_product_attention(query, query, query).stride()


def test_sdpa_second_derivatives_are_those_of_float64(any_size, tensors):
    query, key, value = (x.requires_grad_() for x in tensors(H=2, G=2, dtype=torch.float32))

    def second(function):
        (grad,) = torch.autograd.grad(
            function(query, key, value).sin().sum(), query, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), key)[0]

    torch.testing.assert_close(second(scaled_dot_product_attention), second(_math))


def test_sdpa_dropout_keeps_the_mean_and_repeats(any_size):
    query, value = torch.randn(2, 4, 64, 8), torch.ones(2, 4, 64, 8)
    torch.manual_seed(3)
    first = scaled_dot_product_attention(query, query, value, dropout_p=0.4)
    torch.manual_seed(3)
    again = scaled_dot_product_attention(query, query, value, dropout_p=0.4)
    assert torch.equal(first, again)
    # A row's variance is at most p / (1 - p).
    allowed = 5 * (0.4 / 0.6 / first[..., 0].numel()) ** 0.5
    assert abs(first.mean().item() - 1.0) < allowed
    assert first.std() > 0.01


def test_sdpa_with_use_backend_runs_that_backend(tensors):
    query, key, value = tensors(dtype=torch.float32, H=2, G=2)
    seen = []
    with ph.use_backend("reference"), ph.functional.observe(seen.append):
        ours = scaled_dot_product_attention(query, key, value)
    assert len(seen) == 1
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value))


def test_explain_sdpa_names_the_recognized_mask(any_size):
    query = torch.randn(1, 2, 9, 8)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)
    text = str(explain_sdpa(query, query, query, allowed))
    assert text.startswith(
        "runs: polyhead\n  recognized: causal() & window(before=3)\n  backend cpu"
    )


def test_explain_sdpa_of_a_mask_of_all_keys_says_so(any_size):
    query = torch.randn(1, 2, 9, 8)
    allowed = torch.ones(9, 9, dtype=torch.bool)
    assert explain_sdpa(query, query, query, allowed).why == "recognized: every key"


def test_sdpa_sees_a_mask_that_changes(any_size):
    """Through the cache of recognized masks, as a training loop would."""
    query = torch.randn(1, 2, 9, 8)
    mask = torch.ones(9, 9, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask.copy_(torch.rand(9, 9, generator=generator) < 0.7)
        if torch.rand((), generator=generator) < 0.5:
            mask.fill_(True).tril_()
        ours = scaled_dot_product_attention(query, query, query, mask)
        exact = _exact(query, query, query, mask)
        torch.testing.assert_close(ours.double(), exact, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_compiles_to_one_graph(grad):
    def attend(query, attn_mask):
        return scaled_dot_product_attention(query, query, query, attn_mask) * 2

    query = torch.randn(1, 2, 400, 8, requires_grad=grad)
    mask = torch.ones(400, 400, dtype=torch.bool).tril()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, mask), attend(query, mask))
