"""`register()`."""

import sys

import pytest

import polyhead as ph
from polyhead.errors import DependencyError, ModelError
from polyhead.integrations.transformers import status

transformers = pytest.importorskip("transformers")


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r'pip install "polyhead\[hf\]"'):
        ph.integrations.transformers.register()


def bloom(**settings):
    config = transformers.BloomConfig(
        vocab_size=31, hidden_size=24, n_layer=1, n_head=6, **settings
    )
    return transformers.BloomModel._from_config(config)


@pytest.mark.parametrize("make", ["by its class", "by AutoModel"])
def test_a_saved_model_is_loaded_with_it_or_refused(make, tmp_path):
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 1}
    llama = transformers.LlamaModel(transformers.LlamaConfig(num_attention_heads=6, **sizes))
    for name, model in {"llama": llama, "bloom": bloom()}.items():
        model.save_pretrained(tmp_path / name)
    auto = transformers.AutoModel
    of = {"llama": transformers.LlamaModel, "bloom": transformers.BloomModel}
    load = {name: (auto if "Auto" in make else of[name]).from_pretrained for name in of}
    asked = {"attn_implementation": "polyhead"}
    (layer,) = status(load["llama"](tmp_path / "llama", **asked)).layers
    assert layer.runs == "polyhead"
    with pytest.raises(ModelError, match="BloomModel cannot run"):
        load["bloom"](tmp_path / "bloom", **asked)


def test_a_new_model_that_would_keep_its_own_attention_is_refused():
    with pytest.raises(ModelError, match=r"BloomModel cannot run .* own layers"):
        bloom(attn_implementation="polyhead")


@pytest.mark.parametrize("name", ["Bert", "Roberta", "ModernBert", "T5"])
def test_before_transformers_5_more_models_compute_their_own(name):
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


def git(attn_implementation="eager"):
    """Its image encoder asks; its text decoder does not."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
    image = sizes | {"intermediate_size": 29, "image_size": 12, "patch_size": 4}
    config = transformers.GitConfig(
        vision_config=image,
        vocab_size=31,
        intermediate_size=29,
        max_position_embeddings=37,
        **sizes,
    )
    return transformers.GitModel._from_config(config, attn_implementation=attn_implementation)


def test_a_new_model_whose_layers_choose_among_their_own_classes_is_refused():
    known = "GIT_SELF_ATTENTION_CLASSES of eager"
    with pytest.raises(ModelError, match=rf"a layer cannot run .* {known}.*vision_config"):
        git("polyhead")
    git("eager")
    with pytest.raises(KeyError):  # torch's and transformers' own errors stay what they were
        transformers.models.git.modeling_git.GIT_SELF_ATTENTION_CLASSES["sdpa"]


def test_a_part_that_would_keep_its_own_attention_is_refused_and_the_others_can_be_named():
    model = git()
    with pytest.raises(ModelError, match=r"GitModel: GitSelfAttention \(enc.*, 2 in all\) cannot"):
        model.set_attn_implementation("polyhead")
    assert {layer.runs for layer in status(model).layers} == {"its own", "eager"}
    model.set_attn_implementation({"vision_config": "polyhead"})
    assert {layer.runs for layer in status(model).layers} == {"its own", "polyhead"}


def test_a_new_model_with_a_part_of_its_own_is_refused():
    config = transformers.LongT5Config(
        vocab_size=31, d_model=24, d_kv=4, d_ff=29, num_layers=1, num_heads=6
    )
    with pytest.raises(ModelError, match=r"LongT5(Stack: LongT5Local.* 1 in all\)|Model) cannot"):
        transformers.LongT5Model._from_config(config, attn_implementation="polyhead")


def test_a_part_of_a_part_of_its_own_is_warned_of():
    """AIMv2's layers ask; the head that pools their tokens does not."""
    config = transformers.Aimv2VisionConfig(
        hidden_size=24, intermediate_size=29, num_hidden_layers=1, num_attention_heads=6
    )
    with pytest.warns(UserWarning, match=r"Aimv2AttentionPoolingHead \(head, 1 in all\) keeps"):
        model = transformers.Aimv2VisionModel._from_config(config, attn_implementation="polyhead")
    assert [layer.runs for layer in status(model).layers] == ["polyhead", "its own"]


def test_registering_twice_changes_nothing():
    from transformers import PreTrainedModel

    before = PreTrainedModel.set_attn_implementation
    ph.integrations.transformers.register()
    assert PreTrainedModel.set_attn_implementation is before
