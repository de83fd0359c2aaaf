"""State: same seed as the lecture, checkpoints both ways, copies, no T x T buffer."""

import copy
import io
import pickle

import pytest
import torch

import polyhead as ph


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_same_seed_same_parameters_same_outputs(kind, qkv_bias):
    torch.manual_seed(5)
    theirs = kind.build_lecture(qkv_bias=qkv_bias)
    torch.manual_seed(5)
    ours = kind.build(qkv_bias=qkv_bias)
    expected, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert list(expected) == list(got)  # an optimizer's state knows parameters by their order
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert torch.equal(torch.rand(3), torch.rand(3).new_tensor(_after(kind, qkv_bias)))
    x = torch.randn(2, 11, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours(x[:, :4]), theirs(x[:, :4]), rtol=0, atol=1e-6)


def _after(kind, qkv_bias):
    """What the generator gives after the lecture's construction."""
    torch.manual_seed(5)
    kind.build_lecture(qkv_bias=qkv_bias)
    return torch.rand(3).tolist()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_same_seed_same_dropout(kind, backend):
    theirs = kind.build_lecture(dropout=0.5)
    ours = kind.build(dropout=0.5, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 11, 5)
    torch.manual_seed(7)
    expected = theirs(x)
    torch.manual_seed(7)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)


def test_no_square_tensor_is_kept(kind):
    module = kind.build(context_length=1009)
    tensors = [*module.state_dict().values(), *module.buffers(), *module.parameters()]
    assert all(1009 not in tensor.shape for tensor in tensors)
    assert not list(module.buffers())
    assert not any("mask" in name for name in module.state_dict())
    lecture_keys = kind.build_lecture().state_dict().keys()
    assert set(module.state_dict()) == {k for k in lecture_keys if not k.endswith("mask")}


def test_lecture_checkpoint_loads_strictly_and_is_left_as_it_was(kind):
    theirs, ours = kind.build_lecture(qkv_bias=True), kind.build(qkv_bias=True)
    state = theirs.state_dict()
    names = list(state)
    ours.load_state_dict(state, strict=True)
    assert list(state) == names
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    # Inside another module, and from a context of another length.
    longer = torch.nn.ModuleDict({"a": kind.build(qkv_bias=True, context_length=97)})
    longer.load_state_dict(torch.nn.ModuleDict({"a": theirs}).state_dict())
    torch.testing.assert_close(longer["a"](x), theirs(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_inverted_mask_in_a_checkpoint_is_an_error(kind, dtype):
    state = kind.build_lecture().state_dict()
    for name in state:
        if name.endswith("mask"):
            state[name] = (1 - state[name]).to(dtype)
    with pytest.raises(RuntimeError, match=r"mask must be the lecture's.*inverse.*\(11, 11\)"):
        kind.build().load_state_dict(state)


@pytest.mark.parametrize("mask", [torch.zeros(11, 11), torch.ones(11, 7).triu(1), torch.ones(11)])
def test_another_mask_in_a_checkpoint_is_an_error(kind, mask):
    state = {
        name: mask if name.endswith("mask") else tensor
        for name, tensor in kind.build_lecture().state_dict().items()
    }
    with pytest.raises(RuntimeError, match=r"mask must be the lecture's.*got another.*11"):
        kind.build().load_state_dict(state)


def test_state_dict_round_trip_through_a_file(kind):
    module, other = kind.build(qkv_bias=True), kind.build(qkv_bias=True)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    x = torch.randn(2, 6, 5)
    assert torch.equal(module(x), other(x))


def test_unknown_and_missing_keys_still_fail(kind):
    state = kind.build().state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        kind.build().load_state_dict({**state, "extra": torch.ones(1)})
    missing = next(iter(state))
    del state[missing]
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        kind.build().load_state_dict(state)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_compute_the_same_and_are_independent(kind, copied):
    mask = ph.mask.causal() & ph.mask.window(before=3)
    module = kind.build(head_dim=6, rope=ph.Rope(500.0), mask=mask, scale=0.3)
    x = torch.randn(2, 6, 5)
    other, before = copied(module), module(x)
    assert torch.equal(other(x), before)
    torch.nn.init.zeros_(next(other.parameters()))
    assert torch.equal(module(x), before)
    # The copy's loading hooks are its own: the lecture's mask is still taken out.
    other.load_state_dict(kind.build_lecture(head_dim=6).state_dict())


def test_copy_of_a_module_loads_by_its_own_form():
    module = ph.MultiHeadAttention(5, 6, 11, 0.0, 3)
    other = copy.deepcopy(module)
    module.fuse()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.state_dict()["W_query.weight"], module.W_qkv.weight[:6])


def test_fused_checkpoint_of_another_size_is_an_error_with_numbers():
    state = ph.MultiHeadAttention(5, 6, 11, 0.0, 3).fuse().state_dict()
    grouped = ph.MultiHeadAttention(5, 6, 11, 0.0, 3, num_kv_heads=1)
    message = r"W_qkv.weight must have 10 rows, 6 \+ 2 \+ 2 .*got \(18, 5\)"
    with pytest.raises(RuntimeError, match=message):
        grouped.load_state_dict(state)


def test_separate_projections_of_another_split_do_not_load_as_one():
    # 32 + 32 + 32 rows are as many as 64 + 16 + 16.
    state = ph.MultiHeadAttention(5, 32, 11, 0.0, 2, out_proj=False).state_dict()
    grouped = ph.MultiHeadAttention(5, 64, 11, 0.0, 4, num_kv_heads=1, out_proj=False).fuse()
    message = r"W_value must have \[64, 16, 16\] rows of weight; got \[32, 32, 32\]; load them"
    with pytest.raises(RuntimeError, match=message):
        grouped.load_state_dict(state)


def test_assigned_parts_of_a_fused_checkpoint_share_no_memory():
    state = ph.MultiHeadAttention(5, 6, 11, 0.0, 3).fuse().state_dict()
    module = ph.MultiHeadAttention(5, 6, 11, 0.0, 3, device="meta")
    module.load_state_dict(state, assign=True)
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert len(storages) == len(list(module.parameters()))


@pytest.mark.parametrize("rule", [None, ph.mask.window(before=2)], ids=repr)
def test_a_causal_checkpoint_does_not_turn_bidirectional(rule):
    module = ph.MultiHeadAttention(4, 4, 6, 0.0, 2, mask=rule)
    state = module.state_dict() | {"mask": torch.ones(6, 6).triu(1)}
    with pytest.raises(RuntimeError, match=r"mask says that the checkpoint is causal; got a modul"):
        module.load_state_dict(state)


def test_a_causal_checkpoint_loads_where_causality_is_one_rule_of_two():
    rule = ph.mask.causal() & ph.mask.window(before=2)
    module = ph.MultiHeadAttention(4, 4, 6, 0.0, 2, mask=rule)
    module.load_state_dict(module.state_dict() | {"mask": torch.ones(6, 6).triu(1)})
