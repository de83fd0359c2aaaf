"""Shared fixtures."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
from collections.abc import Callable
from importlib import resources

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import polyhead as ph
from polyhead.backends.cpu import ops


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Skip a test that requests the kernels by name if they are not built (a supported state)."""
    try:
        return (yield)
    except (ph.errors.BackendError, AssertionError) as error:
        if ops.unavailable and f"cpu: {ops.unavailable}" in str(error):
            pytest.skip(f"needs the kernels: {ops.unavailable}")
        raise


@pytest.fixture(scope="session")
def smollm2():
    """Default model, loaded once."""
    from polyhead.models.load import load_model

    return load_model()


@pytest.fixture(scope="session")
def tiny_model():
    """Random decoder of 2 layers x 4 heads with a word-level tokenizer; a `LoadedModel`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from polyhead.models.load import LoadedModel

    text = "[UNK] the cat sat on a mat and saw dog . , <b> one two three four"
    words = text.split()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,]"), "isolated")]
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # so that every head affects the output
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    return LoadedModel(model, tokenizer, "tiny", "nowhere")


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium by playwright, started once; skips the test if there is none.

    With POLYHEAD_REQUIRE_BROWSER=1 the test fails instead.
    """
    absent = pytest.fail if os.environ.get("POLYHEAD_REQUIRE_BROWSER") == "1" else pytest.skip
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        absent("needs Chromium; on Debian: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("needs playwright: pip install playwright")
    quiet = ("background-networking", "component-update", "sync", "gpu")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in quiet)]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def axe():
    """`axe(page)`: accessibility violations found by axe-core, each with its rule and elements."""
    package = pytest.importorskip("axe_playwright_python")
    source = resources.files(package).joinpath("axe.min.js").read_text("utf-8")
    off_by_default = ("label-content-name-mismatch", "target-size")
    options = {"rules": {rule: {"enabled": True} for rule in off_by_default}}

    def violations(page) -> list[tuple[str, list[str]]]:
        if not page.evaluate("'axe' in window"):
            page.evaluate(source)
        script = "(options) => axe.run(document, options).then((found) => found.violations)"
        found = page.evaluate(script, options)
        return [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in found]

    return violations


@pytest.fixture
def own_loop():
    """Temporarily unset the event loop that playwright leaves running in the test thread."""
    theirs = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(theirs)


def _runs(isa: str) -> bool:
    before = ops.isa()
    try:
        ops.choose_isa(isa)
    except RuntimeError:
        return False
    ops.choose_isa(before)
    return True


INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "neon_bf16", "neon", "portable")
ISAS = [] if ops.unavailable else [isa for isa in INSTRUCTION_SETS if _runs(isa)]


@pytest.fixture(scope="session")
def kernels() -> None:
    """C++ kernels. If they are not built, the test skips; in CI, with a compiler, it fails."""
    if ops.unavailable:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent(f"needs the kernels: {ops.unavailable}")


@pytest.fixture(scope="session")
def isas() -> list[str]:
    """Instruction sets of this processor and build, the best first."""
    return ISAS


@pytest.fixture(params=ISAS)
def isa(request, kernels):
    """Name of an instruction set (one test per set), whose kernels run in the test."""
    before = ops.isa()
    ops.choose_isa(request.param)
    yield request.param
    ops.choose_isa(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tensors() -> Callable[..., list[Tensor]]:
    """`tensors(B=2, H=6, G=2, T=5, S=7, D=8, E=D, dtype=, seed=)`: random query, key and value."""

    def build(B=2, H=6, G=2, T=5, S=7, D=8, E=None, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, E or D)]
        return [
            torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
            for shape in shapes
        ]

    return build


def _gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    direction = torch.randn(
        output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    return torch.autograd.grad(output, inputs, direction.to(output.dtype), retain_graph=True)


@pytest.fixture(scope="session")
def gradients() -> Callable[..., tuple[Tensor, ...]]:
    """`gradients(output, inputs)`: in a random direction, the same each time."""
    return _gradients


@pytest.fixture(scope="session")
def gradient() -> Callable[..., Tensor]:
    """`gradient(output, inputs)`: all as one vector, so that a zero by cancellation has a scale."""
    return lambda output, inputs: torch.cat([x.flatten() for x in _gradients(output, inputs)])


@pytest.fixture(scope="session")
def all_aux() -> ph.AuxRequest:
    """Request for all auxiliary results."""
    return ph.AuxRequest(weights=True, lse=True, stats=True, mean_weights=True)


def _naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in the dtype of its inputs, a loop over heads. Shares no code with src."""
    B, H, T, D = query.shape
    S = key.shape[2]
    group = H // key.shape[1]
    scale = D**-0.5 if scale is None else scale
    all_keys = torch.ones(B, H, T, S, dtype=torch.bool)
    allowed = all_keys if allowed is None else all_keys & allowed
    bias = torch.zeros(B, H, T, S, dtype=query.dtype) if bias is None else bias.expand(B, H, T, S)
    batches = []
    for b in range(B):
        heads = []
        for h in range(H):
            scores = query[b, h] @ key[b, h // group].T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = (scores + bias[b, h].to(query.dtype)).masked_fill(~allowed[b, h], -math.inf)
            attends = scores.detach().isfinite().any(dim=-1, keepdim=True) if S else all_keys[b, h]
            scores = torch.where(attends, scores, 0.0) if S else scores
            if sinks is not None:
                scores = torch.cat([scores, sinks[h].to(query.dtype).expand(T, 1)], dim=-1)
            weights = torch.softmax(scores, dim=-1)[:, :S]
            heads.append(torch.where(attends, weights, 0.0) @ value[b, h // group])
        batches.append(torch.stack(heads))
    return torch.stack(batches)


@pytest.fixture(scope="session")
def naive_attention() -> Callable[..., Tensor]:
    """Oracle: `naive_attention(query, key, value, *, allowed=, bias=, scale=, ...)`."""
    return _naive_attention


def _assert_as_good_as_eager(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert actual.dtype == eager.dtype
    eager_error = (eager.double() - exact).abs().max().item()
    rounding = 4 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(
        actual.double(), exact, rtol=0.0, atol=2 * eager_error + rounding, equal_nan=False
    )


@pytest.fixture(scope="session")
def assert_as_good_as_eager() -> Callable[[Tensor, Tensor, Tensor], None]:
    """`assert_as_good_as_eager(actual, eager, exact)`: the tolerance of STYLE.md, derived.

    Twice the largest error of an eager run in the same dtype against float64, plus 4 units in the
    last place of the largest element.
    """
    return _assert_as_good_as_eager


class TensorSizes(TorchDispatchMode):
    """Dispatch mode that records the storages of results, and the names of operations.

    `largest`: elements of the largest storage. `peak`: the most bytes alive at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.largest = 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                held = item.untyped_storage().nbytes() // item.element_size()
                self.largest = max(self.largest, held)
                self._count(item.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = alive
        self.peak = max(self.peak, sum(size for _, size in alive.values()))


@pytest.fixture
def tensor_sizes() -> TensorSizes:
    """Dispatch mode: `with tensor_sizes: ...`, then read `.largest` and `.operations`."""
    return TensorSizes()
