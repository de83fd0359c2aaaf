"""Tour (`polyhead run`) on the real model."""

import dataclasses
import json

import pytest
import torch

import polyhead.tour
from polyhead.convert import from_transformers
from polyhead.errors import ArgumentError, ShapeError
from polyhead.tour import compare_mechanisms, run

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def report(smollm2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polyhead.tour, "load_model", lambda source, **options: smollm2)
        yield run(TEXT)


@pytest.fixture
def use_loaded(monkeypatch, smollm2):
    """Make `run` use the loaded model."""
    monkeypatch.setattr(polyhead.tour, "load_model", lambda source, **options: smollm2)


def test_run_mechanisms_agree_with_float64(report):
    names = [row.mechanism for row in report.mechanisms]
    assert names == ["stacked heads (3.6.1)", "weight split (3.6.2)", "weight split, best backend"]
    assert [row.backend for row in report.mechanisms] == ["reference", "reference", "cpu"]
    for row in report.mechanisms:
        assert 0.0 < row.largest_error < 1e-4  # outputs are of order 1 to 10
        assert row.median_ms > 0.0
    assert report.mechanisms[0].speedup == 1.0
    assert report.mechanisms[0].difference == 0.0 <= report.mechanisms[1].difference < 1e-4
    assert [row.query_weights for row in report.mechanisms] == [
        (9, 64, 576),
        (576, 576),
        (576, 576),
    ]
    assert {row.output for row in report.mechanisms} == {(1, 5, 576)}


def test_run_default_layer_is_the_middle_one(report):
    assert (report.layer, report.num_layers) == (15, 30)
    assert (report.num_heads, report.num_kv_heads, len(report.heads)) == (9, 3, 9)


def test_run_next_tokens_match_the_model_s_own(report):
    assert report.next_polyhead[0].text == " Paris"
    assert [t.text for t in report.next_polyhead] == [t.text for t in report.next_own]
    for ours, own in zip(report.next_polyhead, report.next_own, strict=True):
        assert ours.probability == pytest.approx(own.probability, abs=1e-4)


def test_run_calls_polyhead_in_every_layer(use_loaded, monkeypatch):
    calls = []
    attend = polyhead.integrations.transformers.forward.attention

    def counted(*args, **kwargs):
        calls.append(1)
        return attend(*args, **kwargs)

    monkeypatch.setattr(polyhead.integrations.transformers.forward, "attention", counted)
    run(TEXT)
    assert len(calls) == 30


def test_run_head_rows_match_the_weights_in_float64(report, smollm2):
    layer = smollm2.model.model.layers[report.layer]
    seen = []
    handle = layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    ids = torch.tensor([smollm2.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        smollm2.model(ids)
        handle.remove()
        mha = from_transformers(layer.self_attn).double()
        request = polyhead.AuxRequest(weights=True)
        weights = mha(seen[0].double(), return_aux=request)[1].weights[0]
    T = weights.shape[-1]
    for row in report.heads:
        head = weights[row.head]
        assert row.mass_first == pytest.approx(head[:, 0].mean().item(), abs=1e-5)
        assert row.mass_self == pytest.approx(head.diagonal().mean().item(), abs=1e-5)
        assert row.mass_previous == pytest.approx(head.diagonal(-1).sum().item() / T, abs=1e-5)


def test_run_restores_the_model_s_own_attention(use_loaded, smollm2):
    before = smollm2.model.config._attn_implementation
    run(TEXT, layer=0)
    assert smollm2.model.config._attn_implementation == before


@pytest.mark.parametrize("layer", [-1, 30])
def test_run_layer_out_of_range_raises(use_loaded, layer):
    with pytest.raises(ArgumentError, match=rf"^layer must be from 0 to 29; got {layer}"):
        run(TEXT, layer=layer)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_run_empty_text_raises(text):
    with pytest.raises(ArgumentError, match="TEXT must not be empty"):
        run(text)


def test_run_text_longer_than_the_context_raises(use_loaded):
    with pytest.raises(ShapeError, match=r"at most 8192 tokens.*got 9001"):
        run("a b c " * 3000 + "d")


def test_run_with_one_token(use_loaded):
    report = run("a")
    assert report.tokens == 1
    assert report.heads[0].mass_self == pytest.approx(1.0)
    assert report.heads[0].mean_distance == 0.0


def test_run_long_text_is_compared_on_its_first_tokens(use_loaded, monkeypatch):
    monkeypatch.setattr(polyhead.tour, "COMPARED_TOKENS", 3)
    report = run(TEXT)
    assert (report.tokens, report.compared_tokens) == (5, 3)


def test_compare_mechanisms_detects_a_wrong_mechanism(monkeypatch):
    torch.manual_seed(0)
    mha = polyhead.MultiHeadAttention(16, 16, 8, 0.0, 4).eval()

    def wrong(split):
        stacked = polyhead.convert.split_to_stacked(split)
        with torch.no_grad():
            stacked.heads[1].W_query.weight.neg_()
        return stacked

    monkeypatch.setattr(polyhead.tour, "split_to_stacked", wrong)
    rows = compare_mechanisms(mha, torch.randn(1, 8, 16))
    assert rows[0].largest_error > 1e-3 > 1e-5 > rows[1].largest_error
    assert rows[1].difference > 1e-3


def test_run_report_serializes_to_json(report):
    assert json.loads(json.dumps(dataclasses.asdict(report)))["model"] == report.model
