"""Properties of every KV cache: the law, the errors, copies."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.cache import Cache, KVCache, PagedKVCache
from polyhead.errors import ArgumentError, DtypeError, ShapeError

MAX_TOKENS = 48
SIZES = {"num_kv_heads": 3, "head_dim": 5, "value_head_dim": 2}


def dense(batch, **options):
    return KVCache(batch, MAX_TOKENS, **SIZES, **options)


def preallocated(batch, **options):
    return KVCache(batch, MAX_TOKENS, **SIZES, **options, preallocate=True)


def rolling(batch, window=3, max_rewind=2, **options):
    return KVCache(batch, None, **SIZES, **options, window=window, max_rewind=max_rewind)


def paged(batch, **options):
    return PagedKVCache(batch, MAX_TOKENS, **SIZES, **options, block_size=3)


def repickled(cache):
    return pickle.loads(pickle.dumps(cache))


def resaved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_cache = pytest.mark.parametrize("make", [dense, preallocated, rolling, paged])
every_storage = pytest.mark.parametrize("storage_dtype", [None, torch.int8], ids=["plain", "int8"])


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class History:
    """Oracle: all tokens so far, by concatenation. Shares no code with a cache."""

    def __init__(self, batch, seed, dtype=torch.float64, group=2):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        heads, D, E = SIZES["num_kv_heads"], SIZES["head_dim"], SIZES["value_head_dim"]
        self.sizes = ((group * heads, D), (heads, D), (heads, E))
        self.tensors = [torch.empty(batch, h, 0, d, dtype=dtype) for h, d in self.sizes]

    @property
    def batch(self):
        return self.tensors[0].shape[0]

    @property
    def length(self):
        return self.tensors[0].shape[2]

    def draw(self, T):
        """Query, key and value of T new tokens, which are recorded."""
        new = [
            torch.randn(self.batch, h, T, d, generator=self.generator, dtype=torch.float64)
            for h, d in self.sizes
        ]
        new = [x.to(self.dtype) for x in new]
        self.tensors = [torch.cat(pair, dim=2) for pair in zip(self.tensors, new, strict=True)]
        return new

    def keep(self, length):
        self.tensors = [x[:, :, :length] for x in self.tensors]

    def reorder(self, rows):
        self.tensors = [x[rows] for x in self.tensors]


def draw_mask(draw, window):
    """Draw a function of B, T and S: the mask of the last T of S tokens against all S."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    counts = torch.randint(0, MAX_TOKENS, (9,), generator=generator)
    ids = torch.randint(0, 2, (9, MAX_TOKENS), generator=generator).cumsum(dim=-1)
    allowed = torch.rand(MAX_TOKENS, MAX_TOKENS, generator=generator) < 0.7
    before, n = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    mask = ph.mask
    kinds = {
        "all": lambda B, T, S: mask.causal(),
        "window": lambda B, T, S: mask.window(before=before, after=0),
        "lengths": lambda B, T, S: mask.lengths(counts[:B]),
        "left_padding": lambda B, T, S: mask.left_padding(counts[:B] // 4),
        "documents": lambda B, T, S: mask.documents(ids[:B, :S]),
        "one row's documents": lambda B, T, S: mask.documents(ids[0, :S]),
        "prefix": lambda B, T, S: mask.causal() | mask.prefix(n),
        "dense": lambda B, T, S: mask.dense(allowed[S - T : S, :S]),
    }
    chosen = [kinds[name] for name in draw(st.sets(st.sampled_from(sorted(kinds)), max_size=3))]

    def build(B, T, S):
        whole = mask.causal() if window is None else mask.causal() & mask.window(before=window)
        for part in chosen:
            whole = whole & part(B, T, S)
        return whole

    return build


def largest_difference(history, T, storage_dtype):
    """The bound on the change of an output (B, H, T, E) by int8 that KVCache documents."""
    query, key, value = (x.double() for x in history.tensors)
    if storage_dtype is None:
        return torch.full_like(query[:, :, query.shape[2] - T :, :1], 1e-12)
    group = query.shape[1] // key.shape[1]
    # The half step, and one rounding of the scale to float32.
    half_step = 1 / 254 + 2.0**-23
    a_k = key.abs().amax(dim=(2, 3)).repeat_interleave(group, dim=1)[:, :, None, None]
    a_v = value.abs().amax(dim=(2, 3)).repeat_interleave(group, dim=1)[:, :, None, None]
    scale = query.shape[-1] ** -0.5
    d = scale * query[:, :, query.shape[2] - T :].abs().sum(dim=-1, keepdim=True) * a_k * half_step
    return a_v * half_step + 2 * torch.tanh(d / 2) * a_v + 1e-12


def assert_outputs(cache, history, chunk, held, mask, naive_attention):
    """Assert the law for the newest chunk: row for row the output without a cache."""
    query, (key, value) = chunk[0], held
    B, T, S = query.shape[0], query.shape[2], history.length
    assert cache.length == len(cache) == S
    assert key.shape[2] == value.shape[2] == S - cache.start
    if S == 0:
        return
    mask_of_chunk = mask(B, T, S).for_keys(cache.start, S)
    output = ph.attention(query, key, value, mask=mask_of_chunk, backend="reference")
    allowed = mask(B, S, S).materialize(S, S)
    want = naive_attention(*history.tensors, allowed=allowed)[:, :, S - T :]
    assert bool(
        ((output - want).abs() <= largest_difference(history, T, cache.storage_dtype)).all()
    )


@every_storage
@every_cache
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_append_of_any_chunks_equals_one_uncached_call(make, storage_dtype, naive_attention, data):
    chunks = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=6))
    while sum(chunks) > MAX_TOKENS:
        chunks.pop()
    history = History(data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1000)))
    cache = make(history.batch, dtype=torch.float64, storage_dtype=storage_dtype)
    mask = draw_mask(data.draw, getattr(cache, "window", None))
    outputs = []
    for T in chunks:
        query, key, value = history.draw(T)
        key, value = cache.append(key, value)
        S = history.length
        of_chunk = mask(history.batch, T, S).for_keys(cache.start, S)
        outputs.append(ph.attention(query, key, value, mask=of_chunk, backend="reference"))
    allowed = mask(history.batch, S, S).materialize(S, S)
    want = naive_attention(*history.tensors, allowed=allowed)
    error = (torch.cat(outputs, dim=2) - want).abs()
    assert bool((error <= largest_difference(history, S, storage_dtype)).all())


@every_storage
@every_cache
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_law_holds_after_rewind_reorder_and_clone(make, storage_dtype, naive_attention, data):
    history = History(data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1000)))
    cache = make(history.batch, dtype=torch.float64, storage_dtype=storage_dtype)
    mask = draw_mask(data.draw, getattr(cache, "window", None))
    operations = st.sampled_from(["append", "append", "rewind", "reorder", "clone", "reset"])
    for operation in data.draw(st.lists(operations, max_size=14)):
        if operation == "append":
            room = MAX_TOKENS - history.length
            chunk = history.draw(data.draw(st.integers(0, min(room, 16))))
            held = cache.append(*chunk[1:])
            assert_outputs(cache, history, chunk, held, mask, naive_attention)
        elif operation == "rewind":
            n = data.draw(st.integers(0, min(history.length, 6)))
            try:
                cache.rewind(n)
                history.keep(history.length - n)
            except ArgumentError:
                assert make is rolling
        elif operation == "reorder":
            rows = data.draw(st.lists(st.integers(0, history.batch - 1), min_size=1, max_size=4))
            cache.reorder(torch.tensor(rows))
            history.reorder(rows)
        elif operation == "clone":
            original, cache = cache, cache.clone()
            original.reset()  # and overwrite its memory
            B = history.batch
            original.append(
                torch.full((B, 3, 16, 5), 1e9).double(), torch.zeros(B, 3, 16, 2).double()
            )
        else:
            cache.reset()
            history.keep(0)
        assert (cache.length, cache.batch) == (history.length, history.batch)
        if history.length:
            last = [x[:, :, -1:] for x in history.tensors]
            assert_outputs(cache, history, last, cache.read(), mask, naive_attention)


@every_cache
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_append_unquantized_is_bit_exact(make, dtype):
    history = History(2, seed=0, dtype=dtype)
    cache = make(2, dtype=dtype)
    for T in (5, 1, 1, 17, 1, 2):
        held = cache.append(*history.draw(T)[1:])
        for x, whole in zip(held, history.tensors[1:], strict=True):
            assert x.dtype == dtype
            assert torch.equal(x, whole[:, :, cache.start :])


@every_storage
@every_cache
def test_read_equals_the_last_one_token_append(make, storage_dtype):
    history = History(2, seed=0, dtype=torch.float32)
    cache = make(2, storage_dtype=storage_dtype)
    for T in (7, 1, 1):
        held, start = cache.append(*history.draw(T)[1:]), cache.start
    assert all(map(torch.equal, cache.read(), held))
    assert cache.start == start


@every_storage
@every_cache
@pytest.mark.parametrize("copied", [copy.deepcopy, repickled, Cache.clone])
def test_copy_shares_no_state_with_the_original(make, storage_dtype, copied):
    history = History(2, seed=0, dtype=torch.float32)
    cache = make(2, storage_dtype=storage_dtype)
    cache.append(*history.draw(7)[1:])
    twin = copied(cache)
    before = [x.clone() for x in cache.read()]
    _, key, value = history.draw(1)
    held_clone = [x.clone() for x in twin.append(key, value)]
    start = twin.start
    twin.reorder(torch.tensor([1, 1]))
    assert all(map(torch.equal, cache.read(), before))
    assert cache.length == 7
    assert all(map(torch.equal, cache.append(key, value), held_clone))
    assert (cache.length, cache.start) == (twin.length, start)


@every_storage
@every_cache
@pytest.mark.parametrize("copied", [copy.deepcopy, repickled, resaved, Cache.clone])
def test_copy_made_in_inference_mode_is_written_outside(make, storage_dtype, copied):
    """litgpt#837: `copy.deepcopy` made inference tensors, and `append` could not write to them."""
    history = History(2, seed=0, dtype=torch.float32)
    with torch.inference_mode():
        cache = make(2, storage_dtype=storage_dtype)
        cache.append(*history.draw(5)[1:])
        twin = copied(cache)
        twin.reorder(torch.tensor([1, 0]))
    cache.reorder(torch.tensor([1, 0]))
    for _ in range(4):  # within the allocated memory, and beyond it
        _, key, value = history.draw(1)
        for got, expected in zip(twin.append(key, value), cache.append(key, value), strict=True):
            assert torch.equal(got, expected)


KEY, VALUE = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 2)
BAD_CHUNKS = [
    (
        KEY[:1],
        VALUE,
        ShapeError,
        r"key must be \(B, G, T, D\) = \(2, 3, T, 5\); got \(1, 3, 4, 5\)",
    ),
    (KEY[:, :2], VALUE, ShapeError, r"= \(2, 3, T, 5\); got \(2, 2, 4, 5\)"),
    (KEY[..., :4], VALUE, ShapeError, r"= \(2, 3, T, 5\); got \(2, 3, 4, 4\)"),
    (KEY[0], VALUE, ShapeError, r"= \(2, 3, T, 5\); got \(3, 4, 5\)"),
    (KEY, KEY, ShapeError, r"value must be \(B, G, T, E\) = \(2, 3, T, 2\); got \(2, 3, 4, 5\)"),
    (KEY, VALUE[:, :, :3], ShapeError, "value must have the key's T = 4 tokens; got 3"),
    (
        KEY.double(),
        VALUE,
        DtypeError,
        "key must have the cache's dtype, torch.float32; got torch.f",
    ),
    (KEY, VALUE.half(), DtypeError, "value must have the cache's dtype.*; got torch.float16"),
    (KEY.to("meta"), VALUE, ph.errors.DeviceError, "key must be on the cache's device, cpu; got m"),
    ([1.0], VALUE, DtypeError, "key must be a tensor; got list"),
    (
        KEY.clone().requires_grad_(),
        VALUE,
        ArgumentError,
        "key must not require grad: a cache is for inference; got requires_grad=True",
    ),
    (KEY, VALUE.clone().requires_grad_(), ArgumentError, "value must not require grad"),
]
ROWS = torch.tensor([0, 1])
BAD_ROWS = [
    ([0, 1], DtypeError, "rows must be a tensor; got list"),
    (ROWS.float(), DtypeError, "rows must be int32 or int64; got torch.float32"),
    (ROWS[None], ShapeError, r"rows must be \(N,\), N at least 1; got \(1, 2\)"),
    (ROWS[:0], ShapeError, r"rows must be \(N,\), N at least 1; got \(0,\)"),
    (ROWS + 1, ArgumentError, r"rows must be from 0 to batch - 1 = 1; got \[1, 2\]"),
    (ROWS - 1, ArgumentError, r"rows must be from 0 to batch - 1 = 1; got \[-1, 0\]"),
    (ROWS.to("meta"), ph.errors.DeviceError, "rows must be on the cache's device, cpu; got meta"),
]


@every_cache
def test_call_that_raises_changes_nothing(make):
    cache = make(2)
    cache.append(torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 2))
    before = pickle.dumps(cache)
    for key, value, error, message in BAD_CHUNKS:
        with pytest.raises(error, match=message):
            cache.append(key, value)
    for rows, error, message in BAD_ROWS:
        with pytest.raises(error, match=message):
            cache.reorder(rows)
    for n, message in ((7, "n must be at most length = 6; got 7"), (-1, "at least 0; got -1")):
        with pytest.raises(ArgumentError, match=message):
            cache.rewind(n)
    if cache.max_tokens is not None:
        message = "key must have at most max_tokens - length = 48 - 6 = 42 tokens; got 43"
        with pytest.raises(ShapeError, match=message):
            cache.append(torch.zeros(2, 3, 43, 5), torch.zeros(2, 3, 43, 2))
    assert pickle.dumps(cache) == before


@every_storage
@every_cache
def test_append_under_no_grad_drops_the_graph(make, storage_dtype):
    key, value = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 2)
    cache = make(2, storage_dtype=storage_dtype)
    with torch.no_grad():
        held = cache.append(key, value)
    assert not any(x.requires_grad for x in (*held, *cache.read()))


@every_storage
@every_cache
def test_cache_used_in_inference_mode_is_written_outside(make, storage_dtype):
    cache = make(2, storage_dtype=storage_dtype)
    for T in (1, 2, 3, 20):
        with torch.inference_mode():
            cache.append(torch.zeros(2, 3, T, 5), torch.zeros(2, 3, T, 2))
            cache.reorder(torch.tensor([1, 0, 1]))
            cache.reorder(torch.tensor([0, 1]))
            copied = cache.clone()
        cache.append(KEY[:, :, :1], VALUE[:, :, :1])
        copied.append(KEY[:, :, :1], VALUE[:, :, :1])


@every_cache
def test_cache_bad_batch_or_dtype_raises(make):
    with pytest.raises(ArgumentError, match="batch must be an integer of at least 1; got 0"):
        make(0)
    with pytest.raises(
        DtypeError, match=r"dtype must be one of torch.float32, .*; got torch.int32"
    ):
        make(1, dtype=torch.int32)
    with pytest.raises(
        DtypeError, match=r"storage_dtype must be None .* or torch.int8; got torch.float16"
    ):
        make(1, storage_dtype=torch.float16)


@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
@pytest.mark.parametrize(
    ("size", "bad"),
    [("max_tokens", 0), ("num_kv_heads", 0), ("head_dim", 2.0), ("value_head_dim", -1)],
)
def test_cache_bad_size_raises_with_its_name(kind, size, bad):
    sizes = {"batch": 1, "max_tokens": 8, **SIZES, size: bad}
    least = 0 if size == "value_head_dim" else 1
    message = f"{size} must be an integer of at least {least}; got {bad}"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        kind(**sizes)


@every_storage
@every_cache
def test_cache_with_value_head_dim_0_has_empty_values(make, storage_dtype):
    cache = make(2, storage_dtype=storage_dtype)
    latent = type(cache)(2, 8, 1, 5, value_head_dim=0, storage_dtype=storage_dtype)
    key, value = latent.append(torch.randn(2, 1, 3, 5), torch.empty(2, 1, 3, 0))
    assert (key.shape, value.shape) == ((2, 1, 3, 5), (2, 1, 3, 0))


@every_cache
def test_empty_cache_is_truthy_and_readable(make):
    cache = make(2)
    assert len(cache) == 0
    assert cache
    key, value = cache.read()
    assert (key.shape, value.shape) == ((2, 3, 0, 5), (2, 3, 0, 2))
    cache.append(KEY[:, :, :1], VALUE[:, :, :1])
    for shown in ("batch=2", "num_kv_heads=3", "head_dim=5", "value_head_dim=2", "length=1"):
        assert shown in repr(cache)
    assert f"nbytes={cache.nbytes}" in repr(cache)
