"""`register()`."""

import sys

import pytest

import polyhead as ph
from polyhead.errors import DependencyError, ModelError


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r'pip install "polyhead\[hf\]"'):
        ph.integrations.transformers.register()


def bloom(**settings):
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(
        vocab_size=31, hidden_size=24, n_layer=1, n_head=6, **settings
    )
    return transformers.BloomModel._from_config(config)


def test_a_new_model_that_would_keep_its_own_attention_is_refused():
    with pytest.raises(ModelError, match=r"BloomModel cannot run .* own layers"):
        bloom(attn_implementation="polyhead")


@pytest.mark.parametrize("name", ["Bert", "Roberta", "ModernBert", "T5"])
def test_before_transformers_5_more_models_compute_their_own(name):
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("4."):
        pytest.skip("since transformers 5 they ask")
    config = getattr(transformers, f"{name}Config")(attn_implementation="polyhead")
    with pytest.raises(ModelError, match=f"{name}Model cannot run"):
        getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize("name", ["polyhead", {"": "polyhead"}])
def test_a_finished_model_that_would_keep_its_own_attention_is_refused(name):
    model = bloom()
    with pytest.raises(ModelError, match=r"BloomModel cannot run .* own layers"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("eager")


def test_registering_twice_changes_nothing():
    from transformers import PreTrainedModel

    before = PreTrainedModel.set_attn_implementation
    ph.integrations.transformers.register()
    assert PreTrainedModel.set_attn_implementation is before
