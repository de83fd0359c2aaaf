"""Benchmark cases: work, mask, inputs."""

import pytest
import torch

import polyhead as ph
import polyhead.mask
from polyhead.bench.cases import Case
from polyhead.bench.peers.attention import attention_run, eager_attention

P2 = Case("P2", 1, 12, 12, 4096, 4096, 64)
D1 = Case("D1", 1, 32, 8, 1, 8192, 128, dtype=torch.bfloat16)


def test_case_causal_work_is_half_of_all_pairs():
    assert P2.work == 2 * 12 * 4096 * 4096 * (64 + 64) / 2
    assert P2.unit == "GFLOP/s"
    assert P2.ceiling == "float32"


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({"causal": False}, 2), ({"train": True}, 3.5), ({"window": 511}, 512 / 2048)],
)
def test_case_work_relative_to_causal_forward(changes, factor):
    sizes = (1, 12, 12, 4096, 4096, 64)
    assert Case("X", *sizes, **changes).work == pytest.approx(P2.work * factor)


def test_case_module_work_includes_projections():
    sizes = (8, 12, 12, 1024, 1024, 64)
    attention = Case("X", *sizes).work
    projections = 4 * 2 * 8 * 1024 * 768**2
    assert Case("M1", *sizes, kind="module").work == attention + projections
    training = Case("M2", *sizes, kind="module", train=True).work
    assert training == 3.5 * attention + 3 * projections


def test_case_decode_work_is_bytes_read():
    assert D1.work == 8 * 8192 * 2 * 128 * 2
    assert (D1.unit, D1.ceiling) == ("GB/s", "read")
    assert D1.mask is None  # the last query attends to every key


def test_case_decode_uses_copies_beyond_the_cpu_cache():
    assert D1.copies == 8
    assert Case("D4", 1, 12, 12, 1, 1024, 64, in_cache=True).copies == 1
    assert Case("D4", 1, 12, 12, 1, 1024, 64, in_cache=True).ceiling is None
    assert P2.copies == 1


def test_case_mask_is_causal_and_window():
    window = Case("W1", 1, 1, 1, 9, 9, 8, window=3).mask
    assert window == polyhead.mask.causal() & polyhead.mask.window(before=3)
    assert Case("P7", 1, 1, 1, 9, 9, 8, causal=False).mask is None


def test_case_shrunk_keeps_the_group_size():
    small = Case("P3", 3, 32, 8, 2048, 2048, 128).shrunk(5)
    assert (small.B, small.H, small.G, small.T, small.S) == (1, 4, 1, 409, 409)
    assert D1.shrunk(10**6).S == 1
    assert P2.shrunk(1) is P2


def test_case_inputs_are_equal_for_equal_seeds(small):
    first, again = (small(train=True).inputs(seed=3) for _ in range(2))
    assert {name: tensor.shape for name, tensor in first.items()} == {
        "query": (3, 6, 17, 5),
        "key": (3, 2, 17, 5),
        "value": (3, 2, 17, 5),
        "grad": (3, 6, 17, 5),
    }
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
    half = small(train=True, dtype=torch.bfloat16).inputs(seed=3)
    assert torch.equal(half["query"], first["query"].bfloat16())
    assert not torch.equal(small().inputs(seed=4)["query"], first["query"])


def test_case_str_has_its_sizes():
    assert str(P2) == "forward 1, 12/12, 4096, 4096, 64, causal(), float32"
    assert str(D1) == "decode 1, 32/8, 1, 8192, 128, full, bfloat16"
    assert str(Case("T4", 1, 2, 2, 8, 8, 4, train=True, dropout=0.1)) == (
        "forward and backward 1, 2/2, 8, 8, 4, causal(), dropout 0.1, float32"
    )


@pytest.mark.parametrize(("H", "reads"), [(32, True), (33, False)])
def test_case_with_many_operations_per_byte_is_flops(H, reads):
    # Two operations per head on each of a token's 2 D elements of 4 bytes: 0.5 per byte.
    case = Case("D", 1, H, 1, 1, 40, 24)
    assert (case.reads, case.ceiling) == (reads, "read" if reads else "float32")
    assert case.work == (2 * 40 * 24 * 4 if reads else 2 * H * 40 * 2 * 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_case_int8_inputs_are_exact(dtype):
    case = Case("D", 2, 4, 2, 1, 40, 24, codes=True, dtype=dtype)
    cache = ph.KVCache(2, 40, 2, 24, dtype=dtype, storage_dtype=torch.int8)
    inputs = case.inputs(seed=0)
    cache.append(inputs["key"], inputs["value"])
    assert all(map(torch.equal, cache.read(), (inputs["key"], inputs["value"])))
    assert inputs["key"].unique().numel() > 100


def test_case_cached_work_counts_stored_bytes():
    codes = Case("D", 1, 4, 2, 1, 40, 24, codes=True, blocks=16, dtype=torch.bfloat16)
    assert codes.work == 2 * 2 * 40 * (24 + 4)
    assert Case("D", 1, 4, 2, 1, 40, 24, blocks=16).work == 2 * 2 * 40 * 24 * 4
    assert str(codes) == "decode 1, 4/2, 1, 40, 24, full, int8, blocks of 16, bfloat16"


def test_case_latent_values_are_read_once():
    case = Case("D6", 1, 16, 1, 1, 40, 24, latent=16, dtype=torch.bfloat16)
    inputs = case.inputs(seed=0)
    assert torch.equal(inputs["value"], inputs["key"][..., :16])
    assert inputs["value"].data_ptr() == inputs["key"].data_ptr()
    assert case.work == 2 * 16 * 40 * (24 + 16)  # 27 operations for each byte
    assert case.ceiling == "bfloat16"
    assert str(case) == "decode 1, 16/1, 1, 40, 24, full, values of 16 in the keys, bfloat16"
    output = attention_run(case, inputs, eager_attention)()["output"]
    assert output.shape == (1, 16, 1, 16)
