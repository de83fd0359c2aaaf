"""Configs of transformers 4 spelt as those of 5."""

import functools

import pytest

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "GptOss", "Phi3")
FAMILIES += ("GPTNeoX", "Falcon", "DeepseekV3")


@pytest.fixture(autouse=True)
def rope_parameters(monkeypatch, is_transformers_4):
    """In transformers 4 too a config takes `rope_parameters`, to be said in its own way."""
    if not is_transformers_4:
        return
    import transformers

    for family in FAMILIES:
        config = getattr(transformers, f"{family}Config")
        monkeypatch.setattr(config, "__init__", taking_rope_parameters(config.__init__, family))


@pytest.fixture(scope="session")
def is_transformers_4():
    transformers = pytest.importorskip("transformers")
    return transformers.__version__.startswith("4.")


def taking_rope_parameters(init, family):
    neox = family == "GPTNeoX"

    @functools.wraps(init)
    def with_rope_parameters(self, *arguments, rope_parameters=None, **options):
        ropes = dict(rope_parameters or {})
        if local := ropes.pop("sliding_attention", None):
            options["rope_local_base_freq"] = local["rope_theta"]
            ropes = dict(ropes["full_attention"])
        if ropes:
            options["rotary_emb_base" if neox else "rope_theta"] = ropes.pop("rope_theta")
            share = ropes.pop("partial_rotary_factor", None)
            if share is not None:
                options["rotary_pct" if neox else "partial_rotary_factor"] = share
            options["rope_scaling"] = None if ropes["rope_type"] == "default" else ropes
        if ropes.get("rope_type") == "longrope" and "factor" not in ropes:
            self.original_max_position_embeddings = ropes["original_max_position_embeddings"]
        init(self, *arguments, **options)

    return with_rope_parameters
