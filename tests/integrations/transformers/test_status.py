"""`status(model)`: the implementation that runs in each layer."""

import pytest
import torch

import polyhead as ph
from polyhead.integrations.transformers import status


def test_status_layers_that_run_polyhead_are_reported(family, build, inputs, calls):
    model = build(family, "polyhead")
    given, _ = inputs(family)
    model(**given)
    layers = status(model).layers
    assert len(layers) == len(calls)
    assert all(layer.attends_through_polyhead for layer in layers)


def test_status_other_implementation_has_remedy(build):
    (layer, _) = status(build("Llama", "eager")).layers
    assert (layer.name, layer.cls) == ("model.layers.0.self_attn", "LlamaAttention")
    assert layer.runs == "eager"
    assert layer.reason == 'call model.set_attn_implementation("polyhead")'


def test_status_layer_with_own_attention():
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(vocab_size=31, hidden_size=24, n_layer=2, n_head=6)
    assert str(status(transformers.BloomModel(config))).splitlines() == [
        "BloomModel: 0 of 2 attention layers run polyhead",
        *(
            f"  h.{layer}.self_attention  BloomAttention  its own  "
            "computes attention in its forward, without AttentionInterface"
            for layer in range(2)
        ),
    ]


def test_status_torch_and_polyhead_modules():
    model = torch.nn.ModuleDict(
        {
            "theirs": torch.nn.MultiheadAttention(24, 6),
            "ours": ph.drop_in.MultiheadAttention(24, 6),
            "split": ph.MultiHeadAttention(24, 24, 9, 0.0, 6),
        }
    )
    theirs, *ours = status(model).layers
    assert theirs.runs == "its own"
    assert theirs.reason == "is torch's; call polyhead.drop_in.replace_attention(model)"
    assert [layer.runs for layer in ours] == ["polyhead", "polyhead"]


def test_status_model_without_attention():
    assert str(ph.integrations.transformers.status(torch.nn.Linear(2, 3))) == (
        "Linear: 0 of 0 attention layers run polyhead"
    )
