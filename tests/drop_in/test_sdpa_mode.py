"""`with ph.drop_in.sdpa()` and `use_for_sdpa(model)`: what they see, count and leave."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.overrides import _get_current_function_mode_stack as modes
from torch.utils.checkpoint import checkpoint

import polyhead as ph
from polyhead.drop_in import sdpa, sdpa_mode, use_for_sdpa

CAUSAL = {"is_causal": True}


class Block(nn.Module):
    """Attention as many write it, by the function as it was imported."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv, self.dropout = nn.Linear(16, 48), dropout

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = imported_by_name(query, key, value, dropout_p=dropout, is_causal=True)
        return x + y.transpose(1, 2).reshape(x.shape)


class Model(nn.Module):
    """Two blocks, checkpointed in training if asked."""

    def __init__(self, dropout=0.0, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(2)])
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.fixture
def x():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def _gradients(model, x, seed=0):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *_backward(y, x, model)]


def _backward(y, x, model):
    model.zero_grad()
    y.sin().sum().backward()  # a reentrant checkpoint has no autograd.grad
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


def _assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_mode_runs_polyhead_in_a_model(any_size, model, x, grad):
    expected = _gradients(model, x) if grad else [model(x)]
    with sdpa() as calls, torch.set_grad_enabled(grad):
        ours = _gradients(model, x) if grad else [model(x)]
    _assert_close(ours, [e if grad else e.detach() for e in expected])
    assert calls.counts == {("polyhead", "causal()"): 2}


@pytest.mark.parametrize("enter", [torch.inference_mode, torch.no_grad])
def test_sdpa_mode_in_inference_is_torchs_result(any_size, model, x, enter):
    with enter():
        expected = model(x)
        with sdpa() as calls:
            y = model(x)
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        with sdpa() as others:
            F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)
    _assert_close([y], [expected])
    assert (calls.polyhead, y.requires_grad) == (2, False)
    assert others.counts == {("polyhead", "recognized: causal()"): 1}


def test_sdpa_mode_ends_with_its_context(any_size, model, x):
    with sdpa() as calls:
        pass
    with pytest.raises(RuntimeError, match="within"), sdpa():
        raise RuntimeError("within")
    model(x)
    assert (calls.polyhead, modes()) == (0, [])


def test_sdpa_mode_prints_a_table(any_size, x):
    query = x[:, None]
    with sdpa() as calls:
        F.scaled_dot_product_attention(query, query, query)
        F.scaled_dot_product_attention(query, query, query, **CAUSAL)
        F.scaled_dot_product_attention(query, query, query, **CAUSAL)
        F.scaled_dot_product_attention(query.double(), query.double(), query.double())
    assert str(calls) == (
        "4 calls of scaled_dot_product_attention: 3 by polyhead, 1 by torch\n"
        "  polyhead  2  causal()\n"
        "  polyhead  1  no mask\n"
        "  torch     1  float64: polyhead's kernels run float32, bfloat16 and float16"
    )


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("is_batched", [False, True])
def test_sdpa_mode_sees_multi_head_attention(any_size, x, needs_grad, training, is_batched):
    """torch's module calls its function within a function that a mode stands around."""
    torch.manual_seed(0)
    attend = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    x = x if is_batched else x[0]
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.set_grad_enabled(needs_grad):
        expected, _ = attend(x, x, x, attn_mask=future, need_weights=False)
        with sdpa() as calls:
            y, _ = attend(x, x, x, attn_mask=future, need_weights=False)
    _assert_close([y], [expected])
    assert calls.counts == {("polyhead", "recognized: causal()"): 1}


def test_sdpa_mode_counts_attention_with_weights(any_size, x):
    """It computes them without the function."""
    attend = nn.MultiheadAttention(16, 2, batch_first=True)
    with sdpa() as calls:
        y, weights = attend(x, x, x)
    _assert_close([y, weights], attend(x, x, x))
    assert calls.counts == {("torch", sdpa_mode._WEIGHTS): 1}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [False, True])
def test_sdpa_mode_sees_torchs_encoder(any_size, x, training):
    """Its fast path, a kernel of torch's own for inference, stands aside for a mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        with sdpa() as calls:
            y = encoder(x, src_key_padding_mask=padding)
    real = ~padding
    _assert_close([y[real]], [expected[real]])
    assert calls.polyhead == 2


def test_sdpa_mode_in_autocast_computes_in_its_dtype(any_size, model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        with ph.use_backend("cpu"), sdpa() as calls:
            y = model(x)
    assert calls.polyhead == 2
    torch.testing.assert_close(y, expected, rtol=0.0, atol=4e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("covers_backward", [False, True])
def test_sdpa_mode_around_a_checkpoint_is_torchs(any_size, x, dropout, reentrant, covers_backward):
    """What is computed again outside of the context has to be what was computed within."""
    torch.manual_seed(0)
    model = Model(dropout, reentrant)
    expected = _gradients(model, x)
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    with sdpa() as calls:
        y = model(x)
        if covers_backward:
            grads = _backward(y, x, model)
    if not covers_backward:
        grads = _backward(y, x, model)
    _assert_close([y, *grads], expected)
    if dropout or not reentrant:
        assert calls.polyhead == 0
        assert {entry.why for entry in calls.counts} == {sdpa_mode._CHECKPOINTED}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_use_for_sdpa_runs_polyhead_in_checkpoints(any_size, x, dropout, reentrant):
    torch.manual_seed(0)
    plain = Model(dropout)
    checkpointed = Model(dropout, reentrant)
    checkpointed.load_state_dict(plain.state_dict())
    with ph.use_backend("cpu"), use_for_sdpa_of(plain), use_for_sdpa_of(checkpointed) as use:
        _assert_close(_gradients(checkpointed, x), _gradients(plain, x))
    assert use.calls.polyhead >= 4
    assert use.calls.torch == 0


def test_use_for_sdpa_checkpoint_of_a_function_is_torchs(any_size, x):
    """Its recomputation begins at the function, and passes no module that enters the mode."""

    class Outer(nn.Module):
        def forward(self, x):
            query = x[:, None]
            attend = F.scaled_dot_product_attention
            return checkpoint(lambda q: attend(q, q, q), query, use_reentrant=False)

    model = Outer()
    expected = _gradients(model, x)
    with use_for_sdpa_of(model) as use:
        _assert_close(_gradients(model, x), expected)
    assert use.calls.counts == {("torch", sdpa_mode._CHECKPOINTED): 1}


def test_sdpa_mode_as_context_of_a_checkpoint_is_torchs(any_size, x):
    """`context_fn` enters a mode in both runs, which the call cannot see: both are the same."""
    block = Block()
    plain = _gradients(block, x)
    modes_of = []

    def contexts():
        modes_of.extend([sdpa(), sdpa()])
        return tuple(modes_of[-2:])

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False, context_fn=contexts)

    _assert_close(_gradients(Outer(), x), plain)
    assert {mode.calls.torch for mode in modes_of} >= {1}


class use_for_sdpa_of:  # noqa: N801
    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.use = use_for_sdpa(self.model)
        return self.use

    def __exit__(self, *error):
        self.use.remove()


def test_use_for_sdpa_is_undone(any_size, model, x):
    before = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    use = use_for_sdpa(model)
    expected = model(x)
    assert use.calls.polyhead == 2
    use.remove()
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == before
    assert {len(m._forward_pre_hooks) for m in model.modules()} == {0}
    _assert_close([model(x)], [expected])
    assert use.calls.polyhead == 2
    use_for_sdpa(model).remove()


def test_use_for_sdpa_twice_is_refused(model):
    use = use_for_sdpa(model)
    with pytest.raises(ph.errors.ArgumentError, match=r"model must not be in use already"):
        use_for_sdpa(model)
    with pytest.raises(ph.errors.ArgumentError, match=r"call remove\(\) of that use first"):
        use_for_sdpa(nn.Sequential(model))
    assert len(model._forward_pre_hooks) == 1
    use.remove()
    use_for_sdpa(model).remove()


def test_use_for_sdpa_of_a_function_is_refused():
    with pytest.raises(ph.errors.DtypeError, match=r"model must be an nn.Module; got function"):
        use_for_sdpa(lambda x: x)


def test_use_for_sdpa_after_an_error_is_off(any_size, model, x):
    with use_for_sdpa_of(model) as use:
        with pytest.raises(RuntimeError):
            model(x[..., :3])
        assert modes() == []
        model(x)
        assert (use.calls.polyhead, modes()) == (2, [])


def test_use_for_sdpa_after_ctrl_c_begins_anew(any_size, model, x):
    """A forward hook is not called then."""

    def interrupt(module, args):
        raise KeyboardInterrupt

    with use_for_sdpa_of(model) as use:
        hook = model.blocks[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        hook.remove()
        model(x)
        assert (use.calls.polyhead, modes()) == (3, [])


def test_use_for_sdpa_covers_a_part_called_alone(any_size, model, x):
    with use_for_sdpa_of(model) as use:
        model.blocks[1](x)
        assert (use.calls.polyhead, modes()) == (1, [])


def test_use_for_sdpa_covers_every_thread(any_size, model, x):
    expected = model(x)
    results = []
    with use_for_sdpa_of(model) as use:
        threads = [
            threading.Thread(target=lambda: results.append(model(x).detach())) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for y in results:
        _assert_close([y], [expected.detach()])
    assert use.calls.polyhead == 16


def test_sdpa_mode_is_of_one_thread(any_size, model, x):
    with sdpa() as calls:
        thread = threading.Thread(target=lambda: model(x))
        thread.start()
        thread.join()
        assert calls.counts == {}


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_use_for_sdpa_goes_with_copies(any_size, model, x, copy_of):
    with use_for_sdpa_of(model) as use:
        other = copy_of(model)
        _assert_close([other(x)], [model(x)])
        assert (use.calls.polyhead, modes()) == (2, [])


def test_use_for_sdpa_nests_in_the_mode(any_size, model, x):
    with use_for_sdpa_of(model) as use:
        with sdpa() as calls:
            model(x)
        assert (use.calls.polyhead, calls.polyhead) == (2, 0)


def test_sdpa_mode_leaves_nested_tensors_to_torch(any_size):
    nested = torch.nested.nested_tensor(
        [torch.randn(2, 3, 8), torch.randn(2, 4, 8)], layout=torch.jagged
    )
    query = nested.transpose(1, 2)
    with sdpa() as calls:
        y = F.scaled_dot_product_attention(query, query, query)
    assert y.is_nested
    assert calls.polyhead == 0


def test_sdpa_mode_with_causal_bias_is_torchs(any_size, x):
    from torch.nn.attention.bias import causal_lower_right

    query = x[:, None]
    expected = F.scaled_dot_product_attention(query, query, query, causal_lower_right(5, 5))
    with sdpa():
        y = F.scaled_dot_product_attention(query, query, query, causal_lower_right(5, 5))
    _assert_close([y], [expected])


def test_sdpa_mode_under_a_device_context_still_counts(any_size, x):
    query = x[:, None]
    with torch.device("cpu"), sdpa() as calls:
        F.scaled_dot_product_attention(query, query, query)
    with sdpa() as others, torch.device("cpu"):
        F.scaled_dot_product_attention(query, query, query)
        nn.MultiheadAttention(16, 2)(x, x, x, need_weights=False)
    assert (calls.polyhead, others.polyhead) == (1, 2)


@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_mode_compiles_to_one_graph(grad):
    """A compiled graph has polyhead's operator, and counts nothing."""
    operators = []

    def record(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def attend(query):
        return F.scaled_dot_product_attention(query, query, query, is_causal=True) * 2

    query = torch.randn(1, 2, 400, 8, requires_grad=grad)
    expected = attend(query)
    with sdpa() as calls:
        y = torch.compile(attend, backend=record, fullgraph=True)(query)
    _assert_close([y], [expected])
    assert any("polyhead" in operator for operator in operators)
    assert calls.counts == {}


def test_use_for_sdpa_in_a_compiled_model_is_torchs(model, x):
    """Hooks that a graph records enter no mode: `with sdpa()` around the call does."""
    with use_for_sdpa_of(model) as use:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        _assert_close([compiled(x)], [model(x)])
        assert use.calls.torch == 2  # of the call that is not compiled
        assert modes() == []


def test_sdpa_mode_in_transformers_is_its_sdpa(any_size):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(14).view(2, 7)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        for options in ({}, {"attention_mask": padded}):
            expected = llama(ids, **options).logits
            with sdpa() as calls:
                logits = llama(ids, **options).logits
            assert (calls.polyhead, calls.torch) == (2, 0)
            real = padded.bool() if options else padded >= 0
            _assert_close([logits[real]], [expected[real]])


def test_function_with_another_global_leaves_the_function(x):
    """torch's own function is copied, not changed."""
    copied = sdpa_mode._function_with(F.multi_head_attention_forward, None)
    assert F.multi_head_attention_forward.__globals__["scaled_dot_product_attention"] is (
        torch._C._nn.scaled_dot_product_attention
    )
    assert copied.__globals__["scaled_dot_product_attention"] is None
    assert "scaled_dot_product_attention" in F.multi_head_attention_forward.__code__.co_names
    assert "has_torch_function" in F.multi_head_attention_forward.__code__.co_names
