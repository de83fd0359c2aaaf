"""`torch.jit.trace`, and torch.onnx's way through it: programs that run with torch alone."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import BackendError

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

ALONE = """
import sys, torch
folder = sys.argv[1]
for name, given in torch.load(f"{folder}/inputs.pt").items():
    for number, inputs in enumerate(given):
        program = torch.jit.load(f"{folder}/{name}.pt")
        outputs = program(*inputs)
        torch.save(outputs, f"{folder}/{name}.{number}.out")
assert "polyhead" not in sys.modules
"""


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return ph.attention(query, key, value, **self.options)


class Called(nn.Module):
    """A module whose forward takes x alone."""

    def __init__(self, module, arguments=1, **options):
        super().__init__()
        self.module, self.arguments, self.options = module, arguments, options

    def forward(self, x):
        return first(self.module(*(x,) * self.arguments, **self.options))


CALLS = {
    "plain": {},
    "causal": {"mask": ph.mask.causal()},
    "upper_left": {"mask": ph.mask.causal(align="start")},
    "window": {"mask": ph.mask.causal() & ph.mask.window(before=2)},
    "padding": {"mask": ph.mask.causal() & ph.mask.left_padding([0, 2])},
    "prefix": {"mask": ph.mask.causal() | ph.mask.prefix(2)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.1, -2.0, 3.0, 0.5])},
    "alibi": {"alibi_slopes": ph.alibi_slopes(4), "mask": ph.mask.causal()},
}


def heads(T, S):
    return torch.randn(2, 4, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)


def modules():
    encoder = nn.TransformerEncoderLayer(24, 6, batch_first=True).eval()
    ph.drop_in.replace_attention(encoder)
    drop_in = ph.drop_in.MultiheadAttention(24, 6, batch_first=True)
    rope = ph.Rope(theta=10_000.0)
    return {
        "split": ph.MultiHeadAttention(24, 24, 9, 0.0, 6, num_kv_heads=2, rope=rope),
        "stacked": ph.MultiHeadAttentionWrapper(24, 4, 9, 0.0, 6),
        "one_head": ph.CausalAttention(24, 24, 9, 0.0),
        "drop_in": Called(drop_in, 3),
        "drop_in_output": Called(drop_in, 3, need_weights=False),
        "encoder": encoder,
    }


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["no_grad", "grad"])
def gradients(request):
    with torch.set_grad_enabled(request.param):
        yield request.param


@pytest.fixture
def run_alone(tmp_path):
    """Trace modules, and give what a process without polyhead computes with the programs."""

    def run(traced, given):
        for name, program in traced.items():
            program.save(tmp_path / f"{name}.pt")
        torch.save(given, tmp_path / "inputs.pt")
        subprocess.run([sys.executable, "-c", ALONE, tmp_path], check=True)
        return {
            name: [torch.load(tmp_path / f"{name}.{i}.out") for i in range(len(inputs))]
            for name, inputs in given.items()
        }

    return run


def first(result):
    return result[0] if isinstance(result, tuple) else result


def assert_same(got, modules, given):
    for name, module in modules.items():
        for outputs, inputs in zip(got[name], given[name], strict=True):
            expected = first(module(*inputs))
            torch.testing.assert_close(first(outputs), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_traced_calls_run_with_torch_alone_at_any_length(gradients, run_alone):
    calls = {name: Attention(**options) for name, options in CALLS.items()}
    traced = {name: torch.jit.trace(call, heads(5, 5)) for name, call in calls.items()}
    given = {name: [heads(5, 5), heads(3, 7), heads(1, 6)] for name in calls}
    assert_same(run_alone(traced, given), calls, given)


def test_traced_modules_run_with_torch_alone_at_any_length(gradients, run_alone):
    layers = {name: layer.eval() for name, layer in modules().items()}
    traced = {name: torch.jit.trace(layer, torch.randn(2, 5, 24)) for name, layer in layers.items()}
    given = {name: [(torch.randn(2, T, 24),) for T in (5, 3, 9)] for name in layers}
    assert_same(run_alone(traced, given), layers, given)


def test_traced_transformers_model_runs_with_torch_alone(gradients, run_alone):
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    config = transformers.MistralConfig(
        **{"vocab_size": 31, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 4},
        attn_implementation="polyhead",
    )

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.MistralForCausalLM(config).eval()

        def forward(self, tokens, real):
            return self.model(tokens, attention_mask=real, use_cache=False).logits

    real = torch.ones(2, 9, dtype=torch.int64)
    real[0, :3] = 0
    models = {"mistral": Logits()}
    given = {"mistral": [(torch.randint(31, (2, 9)), real)]}
    traced = {"mistral": torch.jit.trace(models["mistral"], given["mistral"][0])}
    assert_same(run_alone(traced, given), models, given)


def test_traced_program_gives_gradients():
    split = modules()["split"].eval()
    x = torch.randn(2, 5, 24, requires_grad=True)
    traced = torch.jit.trace(split, x)
    grad = torch.randn(2, 5, 24)
    inputs = (x, *split.parameters())
    expected = torch.autograd.grad(split(x), inputs, grad)
    got = torch.autograd.grad(traced(x), (x, *traced.parameters()), grad)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_traced_bfloat16_and_many_rows_are_whole(run_alone):
    """Of many features oneDNN would multiply, of many tokens masks come in chunks."""
    with torch.no_grad():
        split = ph.MultiHeadAttention(512, 512, 2048, 0.0, 8, dtype=torch.bfloat16).eval()
        calls = {"large": split, "window": Attention(**CALLS["window"])}
        given = {
            "large": [(torch.randn(1, 600, 512, dtype=torch.bfloat16),)],
            "window": [tuple(x[:1] for x in heads(1100, 1100))],
        }
        traced = {name: torch.jit.trace(call, given[name][0]) for name, call in calls.items()}
        got = run_alone(traced, given)
    torch.testing.assert_close(got["large"][0], split(*given["large"][0]), rtol=2e-2, atol=2e-2)
    assert_same(got, {"window": calls["window"]}, given)


@pytest.mark.parametrize("backend", ["cpu", "flex"])
def test_tracing_a_backend_of_other_operators_says_why_not(backend):
    with pytest.raises(BackendError, match=r"is no operator of torch's own; torch.jit.trace rec"):
        torch.jit.trace(Attention(backend=backend), heads(5, 5))


@pytest.mark.parametrize(
    ("name", "lengths"),
    # torch's exporter keeps the number of positions that rope is given.
    [("split", [5]), ("stacked", [5, 3]), ("drop_in", [5, 3]), ("drop_in_output", [5, 3])],
)
def test_onnx_export_by_tracing_agrees_with_torch(name, lengths, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    module = modules()[name].eval()
    module = module if isinstance(module, Called) else Called(module)
    path = tmp_path / "model.onnx"
    axes = {"x": {1: "tokens"}}
    torch.onnx.export(
        module, (torch.randn(2, 5, 24),), path, dynamo=False, input_names=["x"], dynamic_axes=axes
    )
    session = onnxruntime.InferenceSession(path)
    for T in lengths:
        x = torch.randn(2, T, 24)
        got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(got, first(module(x)).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_export_of_the_drop_in_itself_is_accepted(tmp_path):
    """Torch passes its options as tensors."""
    pytest.importorskip("onnx")
    drop_in = ph.drop_in.MultiheadAttention(24, 6, batch_first=True).eval()
    torch.onnx.export(drop_in, (torch.randn(2, 5, 24),) * 3, tmp_path / "m.onnx", dynamo=False)
    assert (tmp_path / "m.onnx").stat().st_size > 0
