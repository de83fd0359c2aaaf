"""Models, files and modules of others that once met a raw error, or a refusal that was wrong."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import ArgumentError, PolyheadError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning"),
]


def mha(**options):
    torch.manual_seed(5)
    return ph.MultiHeadAttention(24, 24, 17, 0.0, 3, **options).eval()


def x(tokens=7):
    return torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(1))


class ByDropIn(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.attention = ph.drop_in.MultiheadAttention(24, 3, batch_first=True).eval()

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


LOAD = """
import sys, torch
module, x, y = torch.jit.load(sys.argv[1]), *torch.load(sys.argv[2])
torch.testing.assert_close(module(x), y, rtol=0, atol=1e-5)
assert not any(name.startswith("polyhead") for name in sys.modules)
"""


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(
    "build",
    [mha, lambda: mha(num_kv_heads=1, rope=ph.Rope()), lambda: mha(mask=None), ByDropIn],
    ids=["causal", "grouped with rope", "no mask", "drop-in"],
)
def test_traced_module_runs_with_torch_alone(build, needs_grad, tmp_path):
    """NATTEN#201, pytorch#143107."""
    module = build()
    with torch.set_grad_enabled(needs_grad):
        traced = torch.jit.trace(module, x())
        expected = module(x()).detach()
    torch.jit.save(traced, tmp_path / "module.pt")
    torch.save([x(), expected], tmp_path / "tensors.pt")
    files = [str(tmp_path / name) for name in ("module.pt", "tensors.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "build",
    [mha, lambda: mha(num_kv_heads=1, sinks=True), lambda: mha(rope=ph.Rope()), ByDropIn],
    ids=["causal", "grouped with sinks", "rope", "drop-in"],
)
def test_traced_onnx_export_of_a_module(build, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    module, path = build(), tmp_path / "module.onnx"
    with torch.no_grad():
        torch.onnx.export(module, (x(),), path, dynamo=False, input_names=["x"], opset_version=17)
        expected = module(x())
    (y,) = runtime.InferenceSession(path).run(None, {"x": x().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_cache_copied_in_inference_mode_takes_tokens_outside(make):
    """litgpt#837."""
    module = mha()
    with torch.inference_mode():
        cache = module.make_cache(batch=1)
        module(x()[:, :3], cache=cache)
        twin = make(cache)
    with torch.no_grad():
        whole = module(x())
        steps = module(x()[:, 3:], cache=twin)
    torch.testing.assert_close(steps, whole[:, 3:], rtol=0, atol=1e-5)


def test_draft_over_a_filled_windowed_cache_is_right_or_refused():
    """transformers#48280."""
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=4,
        max_position_embeddings=64,
        attn_implementation="polyhead",
    )
    model = transformers.MistralForCausalLM(config).eval()
    draft = copy.deepcopy(model)
    ids = torch.randint(3, 31, (1, 9))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    cache = ph.integrations.transformers.PolyheadCache(config)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
    with contextlib.suppress(ArgumentError):  # a refusal by name is right, too
        drafted = model.generate(
            ids,
            assistant_model=draft,
            max_new_tokens=12,
            do_sample=False,
            past_key_values=cache,
            pad_token_id=0,
        )
        assert torch.equal(drafted, expected)


def test_buffers_of_old_checkpoints_are_dropped():
    """gpt-neox#1161."""
    prefix = "gpt_neox.layers.0.attention"
    state = {
        f"{prefix}.query_key_value.weight": torch.randn(72, 24),
        f"{prefix}.query_key_value.bias": torch.randn(72),
        f"{prefix}.dense.weight": torch.randn(24, 24),
        f"{prefix}.dense.bias": torch.randn(24),
        f"{prefix}.bias": torch.ones(1, 1, 17, 17, dtype=torch.bool).tril(),
        f"{prefix}.masked_bias": torch.tensor(-1e9),
        f"{prefix}.rotary_emb.inv_freq": torch.ones(2),
    }
    moved = ph.convert.state_dict(state, source="neox", target="polyhead", num_heads=3)
    assert all("bias" not in name.split(".")[-2:-1] for name in moved)
    own = {name.removeprefix(f"{prefix}."): tensor for name, tensor in moved.items()}
    mha(qkv_bias=True).load_state_dict(own, strict=True)


def test_dtensor_is_refused_by_name(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        plain = torch.randn(1, 2, 4, 8)
        sharded = distribute_tensor(plain, mesh)
        for heads in ((sharded,) * 3, (plain, sharded, plain), (plain, plain, sharded)):
            with pytest.raises(PolyheadError, match="DTensor"):
                ph.attention(*heads)
        with pytest.raises(PolyheadError, match="DTensor"):
            mha()(distribute_tensor(x(), mesh))
    finally:
        distributed.destroy_process_group()


def test_rolling_cache_keeps_a_prefix_in_its_remedy():
    module = mha(mask=ph.mask.causal() | ph.mask.prefix(2))
    with torch.no_grad(), pytest.raises(PolyheadError) as caught:
        module(x(), cache=module.make_cache(batch=1, window=4))
    assert "add & polyhead.mask.window" not in str(caught.value)
