"""`register()`."""

import sys

import pytest

import polyhead as ph
from polyhead.errors import DependencyError, ModelError
from polyhead.integrations.transformers import status

transformers = pytest.importorskip("transformers")


def test_register_without_transformers_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r'pip install -e "\.\[hf\]"'):
        ph.integrations.transformers.register()


def bloom(**settings):
    config = transformers.BloomConfig(
        vocab_size=31, hidden_size=24, n_layer=1, n_head=6, **settings
    )
    return transformers.BloomModel._from_config(config)


@pytest.mark.parametrize("make", ["by its class", "by AutoModel"])
def test_register_saved_model_is_loaded_or_refused(make, tmp_path):
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 1}
    llama = transformers.LlamaModel(transformers.LlamaConfig(num_attention_heads=6, **sizes))
    for name, model in {"llama": llama, "bloom": bloom()}.items():
        model.save_pretrained(tmp_path / name)
    auto = transformers.AutoModel
    of = {"llama": transformers.LlamaModel, "bloom": transformers.BloomModel}
    load = {name: (auto if "Auto" in make else of[name]).from_pretrained for name in of}
    options = {"attn_implementation": "polyhead"}
    (layer,) = status(load["llama"](tmp_path / "llama", **options)).layers
    assert layer.runs == "polyhead"
    with pytest.raises(ModelError, match="BloomModel cannot run"):
        load["bloom"](tmp_path / "bloom", **options)


def test_guard_new_model_with_own_attention_raises():
    with pytest.raises(ModelError, match=r"BloomModel cannot run .* themselves"):
        bloom(attn_implementation="polyhead")


@pytest.mark.parametrize("name", ["Bert", "Roberta", "ModernBert", "T5"])
def test_guard_more_models_raise_before_transformers_5(name):
    if not transformers.__version__.startswith("4."):
        pytest.skip("since transformers 5 they ask")
    config = getattr(transformers, f"{name}Config")(attn_implementation="polyhead")
    with pytest.raises(ModelError, match=f"{name}Model cannot run"):
        getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize("name", ["polyhead", {"": "polyhead"}])
def test_guard_built_model_with_own_attention_raises(name):
    model = bloom()
    with pytest.raises(ModelError, match=r"BloomModel cannot run .* themselves"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("eager")


def git(attn_implementation="eager"):
    """GIT: its image encoder uses AttentionInterface, its text decoder does not."""
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


def test_guard_own_attention_classes_raise_with_names():
    known = "GIT_SELF_ATTENTION_CLASSES of eager"
    with pytest.raises(ModelError, match=rf"a layer cannot run .* {known}.*vision_config"):
        git("polyhead")
    git("eager")
    with pytest.raises(KeyError):  # torch's and transformers' own errors stay what they were
        transformers.models.git.modeling_git.GIT_SELF_ATTENTION_CLASSES["sdpa"]


def test_guard_part_with_own_attention_raises_others_run():
    model = git()
    with pytest.raises(ModelError, match=r"GitModel: GitSelfAttention \(enc.*, 2 in all\) cannot"):
        model.set_attn_implementation("polyhead")
    assert {layer.runs for layer in status(model).layers} == {"its own", "eager"}
    model.set_attn_implementation({"vision_config": "polyhead"})
    assert {layer.runs for layer in status(model).layers} == {"its own", "polyhead"}


def test_guard_new_model_with_own_part_raises():
    config = transformers.LongT5Config(
        vocab_size=31, d_model=24, d_kv=4, d_ff=29, num_layers=1, num_heads=6
    )
    with pytest.raises(ModelError, match=r"LongT5(Stack: LongT5Local.* 1 in all\)|Model) cannot"):
        transformers.LongT5Model._from_config(config, attn_implementation="polyhead")


def test_guard_some_own_layers_of_a_part_warn():
    """AIMv2's layers use AttentionInterface; the head that pools their tokens does not."""
    config = transformers.Aimv2VisionConfig(
        hidden_size=24, intermediate_size=29, num_hidden_layers=1, num_attention_heads=6
    )
    with pytest.warns(UserWarning, match=r"Aimv2AttentionPoolingHead \(head, 1 in all\) keeps"):
        model = transformers.Aimv2VisionModel._from_config(config, attn_implementation="polyhead")
    assert [layer.runs for layer in status(model).layers] == ["polyhead", "its own"]


def test_register_twice_changes_nothing():
    from transformers import PreTrainedModel

    before = PreTrainedModel.set_attn_implementation
    ph.integrations.transformers.register()
    assert PreTrainedModel.set_attn_implementation is before
