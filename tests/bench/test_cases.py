"""What a case says of itself: work, rule, inputs."""

import pytest
import torch

import polyhead as ph
import polyhead.mask
from polyhead.bench.cases import Case
from polyhead.bench.peers.attention import attention_run, eager_attention

P2 = Case("P2", 1, 12, 12, 4096, 4096, 64)
D1 = Case("D1", 1, 32, 8, 1, 8192, 128, dtype=torch.bfloat16)


def test_causal_work_is_counted_as_half_of_all_pairs():
    assert P2.work == 2 * 12 * 4096 * 4096 * (64 + 64) / 2
    assert P2.unit == "GFLOP/s"
    assert P2.ceiling == "float32"


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({"causal": False}, 2), ({"train": True}, 3.5), ({"window": 511}, 512 / 2048)],
)
def test_work_of_other_kinds_relative_to_causal_forward(changes, factor):
    sizes = (1, 12, 12, 4096, 4096, 64)
    assert Case("X", *sizes, **changes).work == pytest.approx(P2.work * factor)


def test_a_module_adds_four_projections_and_trains_them_for_twice_their_forward():
    sizes = (8, 12, 12, 1024, 1024, 64)
    attention = Case("X", *sizes).work
    projections = 4 * 2 * 8 * 1024 * 768**2
    assert Case("M1", *sizes, kind="module").work == attention + projections
    training = Case("M2", *sizes, kind="module", train=True).work
    assert training == 3.5 * attention + 3 * projections


def test_decoding_is_counted_in_bytes_of_keys_and_values_read_once():
    assert D1.work == 8 * 8192 * 2 * 128 * 2
    assert (D1.unit, D1.ceiling) == ("GB/s", "read")
    assert D1.mask is None  # the last query sees every key


def test_decoding_reads_from_memory_unless_it_should_stay_in_the_cache():
    assert D1.copies == 8
    assert Case("D4", 1, 12, 12, 1, 1024, 64, in_cache=True).copies == 1
    assert Case("D4", 1, 12, 12, 1, 1024, 64, in_cache=True).ceiling is None
    assert P2.copies == 1


def test_the_rule_is_causal_and_the_window():
    window = Case("W1", 1, 1, 1, 9, 9, 8, window=3).mask
    assert window == polyhead.mask.causal() & polyhead.mask.window(before=3)
    assert Case("P7", 1, 1, 1, 9, 9, 8, causal=False).mask is None


def test_a_trial_keeps_the_group_and_at_least_one_of_everything():
    small = Case("P3", 3, 32, 8, 2048, 2048, 128).shrunk(5)
    assert (small.B, small.H, small.G, small.T, small.S) == (1, 4, 1, 409, 409)
    assert D1.shrunk(10**6).S == 1
    assert P2.shrunk(1) is P2


def test_the_same_seed_gives_the_same_numbers_in_the_dtype_asked_for(small):
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


def test_it_prints_its_sizes():
    assert str(P2) == "forward 1, 12/12, 4096, 4096, 64, causal(), float32"
    assert str(D1) == "decode 1, 32/8, 1, 8192, 128, full, bfloat16"
    assert str(Case("T4", 1, 2, 2, 8, 8, 4, train=True, dropout=0.1)) == (
        "forward and backward 1, 2/2, 8, 8, 4, causal(), dropout 0.1, float32"
    )


@pytest.mark.parametrize(("H", "reads"), [(32, True), (33, False)])
def test_many_operations_a_byte_are_work_and_not_reading(H, reads):
    # A head makes two of each of a token's 2 D numbers, of 4 bytes: half a one of a byte.
    case = Case("D", 1, H, 1, 1, 40, 24)
    assert (case.reads, case.ceiling) == (reads, "read" if reads else "float32")
    assert case.work == (2 * 40 * 24 * 4 if reads else 2 * H * 40 * 2 * 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_keep_the_numbers_of_such_a_case_exactly(dtype):
    case = Case("D", 2, 4, 2, 1, 40, 24, codes=True, dtype=dtype)
    cache = ph.KVCache(2, 40, 2, 24, dtype=dtype, storage_dtype=torch.int8)
    inputs = case.inputs(seed=0)
    cache.append(inputs["key"], inputs["value"])
    assert all(map(torch.equal, cache.read(), (inputs["key"], inputs["value"])))
    assert inputs["key"].unique().numel() > 100


def test_what_a_cache_holds_is_counted_as_it_holds_it():
    codes = Case("D", 1, 4, 2, 1, 40, 24, codes=True, blocks=16, dtype=torch.bfloat16)
    assert codes.work == 2 * 2 * 40 * (24 + 4)
    assert Case("D", 1, 4, 2, 1, 40, 24, blocks=16).work == 2 * 2 * 40 * 24 * 4
    assert str(codes) == "decode 1, 4/2, 1, 40, 24, full, int8, blocks of 16, bfloat16"


def test_values_of_a_latent_are_in_the_keys_and_read_once():
    case = Case("D6", 1, 16, 1, 1, 40, 24, latent=16, dtype=torch.bfloat16)
    inputs = case.inputs(seed=0)
    assert torch.equal(inputs["value"], inputs["key"][..., :16])
    assert inputs["value"].data_ptr() == inputs["key"].data_ptr()
    assert case.work == 2 * 16 * 40 * (24 + 16)  # 27 operations for each byte
    assert case.ceiling == "bfloat16"
    assert str(case) == "decode 1, 16/1, 1, 40, 24, full, values of 16 in the keys, bfloat16"
    output = attention_run(case, inputs, eager_attention)()["output"]
    assert output.shape == (1, 16, 1, 16)
