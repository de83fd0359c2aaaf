"""The short way of plain calls: the general way's bits, or the general way itself."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.backends import cpu
from polyhead.backends.cpu import ops
from polyhead.call import NO_AUX
from polyhead.functional import observe
from polyhead.validate import build_call

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAUSAL = ph.mask.causal()


def try_fast_path(query, key, value, mask=None, scale=None):
    with torch.no_grad():
        return cpu.try_fast_path(query, key, value, mask, scale)


@settings(deadline=None, max_examples=100)
@given(
    B=st.integers(0, 2),
    G=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7]),
    T=st.sampled_from([0, 1, 3, 17]),
    S=st.sampled_from([0, 1, 5, 64, 257]),
    D=st.sampled_from([1, 24, 64, 80]),
    E=st.sampled_from([0, 1, 24, 64]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.3, -1.0, 0]),
    strides=st.sampled_from(["side by side", "transposed", "slice", "expanded"]),
)
def test_it_gives_the_bits_of_the_general_way(B, G, group, T, S, D, E, dtype, scale, strides):
    generator = torch.Generator().manual_seed(S)

    def tensor(heads, tokens, size):
        if strides == "transposed":
            return (
                torch.randn(B, tokens, heads, size, generator=generator).to(dtype).transpose(1, 2)
            )
        if strides == "slice":
            longer = torch.randn(B, heads, tokens + 3, size, generator=generator).to(dtype)
            return longer[:, :, 1 : tokens + 1]
        if strides == "expanded":
            return (
                torch.randn(1, 1, tokens, size, generator=generator)
                .to(dtype)
                .expand(B, heads, -1, -1)
            )
        return torch.randn(B, heads, tokens, size, generator=generator).to(dtype)

    inputs = tensor(G * group, T, D), tensor(G, S, D), tensor(G, S, E)
    for mask in (None, CAUSAL):
        # With matrix units bfloat16 is eligible only in decoding.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "_has_amx", lambda: False)
            output = try_fast_path(*inputs, mask, scale)
        expected, _ = cpu.run(build_call(*inputs, mask=mask, scale=scale))
        assert output.dtype == dtype
        assert output.is_contiguous()
        assert torch.equal(output, expected)


@pytest.mark.parametrize("return_aux", [None, ph.AuxRequest()])
def test_attention_goes_this_way_and_answers_as_asked(tensors, monkeypatch, return_aux):
    inputs = tensors(T=1)
    expected = ph.attention(*inputs, mask=CAUSAL)

    def refuse(*arguments):
        raise AssertionError("the general way was taken")

    monkeypatch.setattr(ph.functional, "build_call", refuse)
    with torch.no_grad():
        answer = ph.attention(*inputs, mask=CAUSAL, return_aux=return_aux)
    output, aux = (answer, NO_AUX) if return_aux is None else answer
    assert torch.equal(output, expected)
    assert aux is NO_AUX


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    {
        "float64": lambda q, k, v: (q.double(), k.double(), v.double()),
        "two dtypes": lambda q, k, v: (q, k.half(), v),
        "three dimensions": lambda q, k, v: (q[0], k[0], v[0]),
        "batch": lambda q, k, v: (q, k[:1], v[:1]),
        "head size": lambda q, k, v: (q, k[..., 1:], v),
        "heads": lambda q, k, v: (q[:, :5], k, v),
        "no key heads": lambda q, k, v: (q, k[:, :0], v[:, :0]),
        "no query heads": lambda q, k, v: (q[:, :0], k, v),
        "no head size": lambda q, k, v: (q[..., :0], k[..., :0], v),
        "keys and values": lambda q, k, v: (q, k, v[:, :, 1:]),
        "features apart": lambda q, k, v: (q, k.mT.contiguous().mT, v),
        "large heads": lambda q, k, v: (q, k, v.repeat(1, 1, 1, 50)),
        "another device": lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")),
        "a subclass": lambda q, k, v: (q.as_subclass(Subclass), k, v),
        "no tensor": lambda q, k, v: (q.tolist(), k, v),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_not_plain_goes_the_general_way(tensors, change):
    inputs = change[1](*tensors(T=1))
    assert try_fast_path(*inputs) is None
    assert try_fast_path(*inputs, CAUSAL) is None


@pytest.mark.parametrize(
    ("mask", "scale"),
    [
        (ph.mask.causal(align="start"), None),
        (ph.mask.window(before=3), None),
        (CAUSAL & ph.mask.lengths([3, 4]), None),
        ("no mask", None),
        (None, math.nan),
        (None, math.inf),
    ],
)
def test_masks_and_scales_that_go_the_general_way(tensors, mask, scale):
    assert try_fast_path(*tensors(T=1), mask, scale) is None


@pytest.mark.parametrize(
    "mask",
    [ph.mask.causal(align="start"), ph.mask.window(before=2), CAUSAL & ph.mask.window(before=2)],
    ids=repr,
)
def test_other_masks_take_the_general_path(tensors, mask):
    assert try_fast_path(*tensors(T=2), mask) is None


def test_surroundings_that_go_the_general_way(tensors, monkeypatch):
    inputs = tensors(T=1)
    assert cpu.try_fast_path(*inputs, None, None) is None  # gradients may be asked for
    half = tuple(x.bfloat16() for x in inputs)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_has_amx", lambda: True)
        assert try_fast_path(*half) is not None
        several = tensors(T=2, dtype=torch.bfloat16)
        assert try_fast_path(*several) is not None
        assert ph.explain(*several).chosen == "cpu"
        assert try_fast_path(*tensors(T=17, dtype=torch.bfloat16)) is None
        assert try_fast_path(*tensors(T=17)) is not None
        # More heads per KV head than the decode kernel takes: as on the general path.
        many = tensors(H=33, G=1, T=1, dtype=torch.bfloat16)
        assert try_fast_path(*many) is None
        assert ph.explain(*many).chosen == "sdpa"
    with monkeypatch.context() as patch:
        patch.setattr(ops, "unavailable", "was not built")
        assert try_fast_path(*inputs) is None
    with torch.no_grad():
        for transform in (torch.func.vmap, torch.func.functionalize):
            seen = []
            transform(
                lambda x, seen=seen: seen.append(cpu.try_fast_path(*inputs, None, None)) or x
            )(half[0])
            assert seen == [None]


@pytest.mark.parametrize(
    "options",
    [
        {"bias": torch.zeros(1)},
        {"softcap": 2.0},
        {"sinks": torch.zeros(6)},
        {"alibi_slopes": torch.zeros(6)},
        {"dropout": 0.5},
        {"return_aux": ph.AuxRequest(lse=True)},
        {"backend": "cpu"},
        {"backend": ["cpu"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_else_is_asked_goes_the_general_way(tensors, monkeypatch, options):
    taken = lambda *arguments: pytest.fail("the fast path was taken")  # noqa: E731
    monkeypatch.setattr(sys.modules["polyhead.functional"], "_FAST_PATH", taken)
    with torch.no_grad():
        ph.attention(*tensors(T=1), **options)


def test_another_backend_and_an_observer_are_heeded(tensors):
    inputs, seen = tensors(T=1), []
    with torch.no_grad(), observe(seen.append):
        ph.attention(*inputs)
    assert len(seen) == 1
    with torch.no_grad(), ph.use_backend("reference"):
        by_definition = ph.attention(*inputs)
    assert torch.equal(by_definition, ph.attention(*inputs, backend="reference"))
    assert not torch.equal(by_definition, ph.attention(*inputs))


def test_opcheck(tensors):
    torch.library.opcheck(torch.ops.polyhead.attention_fast, (*tensors(T=1), None))
    torch.library.opcheck(torch.ops.polyhead.attention_fast, (*tensors(T=3), 0.5))
    torch.library.opcheck(torch.ops.polyhead.attention_fast, (*tensors(T=3), 0.5, True))
