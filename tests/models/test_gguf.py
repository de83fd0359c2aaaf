"""Tiny GGUF files written here: loaded as the same function, or refused."""

import numpy as np
import pytest
import torch

import polyhead.models.gguf as ours
from polyhead.errors import ModelError
from polyhead.models.gguf import load_gguf


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("alignment", [None, 256])
def test_load_gguf_same_function_as_the_written_model(
    tiny_llama, gguf_tensors, tiny_file, logits, tmp_path, tied, alignment
):
    written = tiny_llama(tied=tied)
    file = tiny_file(tensors=gguf_tensors(written), alignment=alignment)
    model, _ = load_gguf(file.write(tmp_path / "tiny.gguf"))
    ids = torch.arange(0, 53)[None] * 4
    assert torch.equal(logits(model, ids), logits(written, ids))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training


def test_load_gguf_absent_keys_take_llama_cpp_defaults(tiny_file, tmp_path):
    file = tiny_file()
    for key in ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size"):
        del file.metadata[f"llama.{key}"]
    # One row per token; the other tests have one more, as padded vocabularies do.
    file.tensors["token_embd.weight"] = file.tensors["token_embd.weight"][:262]
    width = file.metadata["llama.embedding_length"]
    for layer in range(file.metadata["llama.block_count"]):
        for name in ("attn_k", "attn_v"):
            file.tensors[f"blk.{layer}.{name}.weight"] = np.ones((width, width), np.float32)
    config = load_gguf(file.write(tmp_path / "tiny.gguf"))[0].config
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (4, 10, 262)
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else vars(config)
    assert rope["rope_theta"] == 10000.0


def test_load_gguf_half_precision_is_exact_in_float32(tiny_file, tmp_path):
    file = tiny_file()
    half = file.tensors["blk.1.ffn_up.weight"].astype(np.float16)
    file.tensors["blk.1.ffn_up.weight"] = half
    model, _ = load_gguf(file.write(tmp_path / "tiny.gguf"))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert np.array_equal(weight.detach().numpy(), half.astype(np.float32))


def test_load_gguf_quantized_weights_of_several_blocks(tmp_path):
    import gguf

    weight = torch.randn(131, 64, generator=torch.Generator().manual_seed(0)).numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quantize(weight, kind)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "one.gguf").tensors
    assert np.array_equal(ours._weight(tensor, None).numpy(), gguf.dequantize(packed, kind))


def test_load_gguf_weights_outlive_the_file(tiny_file, logits, tmp_path):
    path = tiny_file().write(tmp_path / "tiny.gguf")
    model, _ = load_gguf(path)
    ids = torch.tensor([[5, 6, 7]])
    before = logits(model, ids)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(logits(model, ids), before)


def test_load_gguf_tokenizer_of_a_tiny_file(tiny_file, tmp_path):
    _, tokenizer = load_gguf(tiny_file().write(tmp_path / "tiny.gguf"))
    assert tokenizer.tokenize("hello<user>") == ["hell", "o", "<user>"]
    assert tokenizer.tokenize("hello<|end|>") == ["hell", "o", "<|end|>"]
    assert tokenizer.decode(tokenizer("<|start|>hello<user>")["input_ids"]) == (
        "<|start|>hello<user>"
    )
    ids = tokenizer("<|start|>hello<user>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<user>"


REFUSED = {
    "tokenizer.ggml.pre": ("gpt-9", "tokenizer.ggml.pre must be 'smollm'; got 'gpt-9'"),
    "tokenizer.ggml.model": ("llama", "tokenizer.ggml.model must be 'gpt2'; got 'llama'"),
    "tokenizer.ggml.add_bos_token": (True, "'tokenizer.ggml.add_bos_token': True"),
    "tokenizer.ggml.eos_token_id": (999, "not hold a usable tokenizer"),
    "tokenizer.ggml.merges": (["h e", "xx yy"], "not hold a usable tokenizer"),
    "tokenizer.ggml.token_type": ([3, 3], "have 2 types"),
    "llama.rope.scaling.type": ("yarn", "'llama.rope.scaling.type': 'yarn'"),
    "llama.expert_count": (8, "'llama.expert_count': 8"),
    "llama.attention.head_count": (0, "not describe a Llama model"),
    "llama.attention.head_count_kv": (3, "4 heads cannot share 3 evenly"),
    "llama.attention.key_length": (9, "llama.rope.dimension_count must be the head size 9, got 10"),
    "llama.rope.freq_base": (-1.0, "llama.rope.freq_base must be a positive number, got -1.0"),
    "llama.context_length": ("long", "llama.context_length must be a positive number, got 'long'"),
    "llama.vocab_size": (100, "262 tokens exceed the vocabulary of 100"),
    "llama.block_count": (2**30, "missing: blk.3.attn_norm.weight, blk.3.attn_q.weight"),
    "llama.feed_forward_length": (29, r"must have the shape \(29, 40\).*got \(28, 40\)"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_load_gguf_invalid_metadata_raises(tiny_file, tmp_path, key):
    value, message = REFUSED[key]
    file = tiny_file()
    file.metadata[key] = value
    with pytest.raises(ModelError, match=f"tiny.gguf.*{message}"):
        load_gguf(file.write(tmp_path / "tiny.gguf"))


NEUTRAL = {
    "expert_count": {"expert_count": 0},
    "no scaling": {"rope.scaling.type": "none"},
    "a factor of 1": {"rope.scaling.factor": 1.0},
    "a factor that is not set": {"rope.scaling.factor": 0.0},
    "linear by 1": {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
    "an older name": {"rope.scale_linear": 1.0},
    "none, and what it would be for": {
        "rope.scaling.type": "none",
        "rope.scaling.original_context_length": 77,
        "rope.scaling.finetuned": True,
        "rope.scaling.yarn_beta_fast": 32.0,
    },
    "causal": {"attention.causal": True},
    "scales of 1": {"logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0},
    "a window as long as the context": {"attention.sliding_window": 77},
    "no window": {"attention.sliding_window": 0},
    "the usual scale": {"attention.key_length": 10, "attention.scale": 10**-0.5},
}


@pytest.mark.parametrize("case", NEUTRAL)
def test_load_gguf_neutral_metadata_is_accepted(
    tiny_llama, gguf_tensors, tiny_file, logits, tmp_path, case
):
    written = tiny_llama(tied=True)
    file = tiny_file(tensors=gguf_tensors(written))
    file.metadata |= {f"llama.{key}": value for key, value in NEUTRAL[case].items()}
    model, _ = load_gguf(file.write(tmp_path / "tiny.gguf"))
    ids = torch.arange(0, 53)[None] * 4
    assert torch.equal(logits(model, ids), logits(written, ids))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope.scaling.factor": 2.0},
        {"rope.scaling.finetuned": True, "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 1.0, "rope.scaling.type": "yarn"},
        {"rope.scaling.type": "linear", "rope.scale_linear": 2.0},
        {"rope.scale_linear": 0.5},
        {"rope.scaling.attn_factor": 0.7},
        {"attention.causal": False},  # False is 0, which was read as not set
        {"attention.sliding_window": 76},
        {"attention.scale": 0.5},
        {"logit_scale": 0.25},
        {"tensor_data_layout": "Meta AI original pth"},
        {"attention.max_alibi_bias": 8.0},
        {"final_logit_softcapping": 30.0},
    ],
)
def test_load_gguf_unsupported_metadata_raises(tiny_file, tmp_path, changes):
    file = tiny_file()
    file.metadata |= {f"llama.{key}": value for key, value in changes.items()}
    key, value = list(changes.items())[-1]
    shown = rf"'llama\.{key}': " + str(value if isinstance(value, bool) else "")
    with pytest.raises(ModelError, match=rf"no setting may be left out, .*{shown}"):
        load_gguf(file.write(tmp_path / "tiny.gguf"))


NO_MODELS = {
    "lora": ("llama", {"general.type": "adapter", "adapter.type": "lora"}, "llama-export-lora"),
    "mmproj": ("clip", {"general.type": "mmproj"}, "of the language model that it belongs to"),
    "an older mmproj": ("clip", {"clip.has_vision_encoder": True}, "projector of images"),
    "imatrix": ("llama", {"general.type": "imatrix"}, "of the model that they were computed for"),
    "control vector": (
        "controlvector",
        {"controlvector.layer_count": 3},
        "GGUF file of that model",
    ),
    "a part": ("llama", {"split.count": 3, "split.no": 1}, "one of 3 parts; join them first"),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_load_gguf_other_file_kind_raises_with_remedy(tiny_file, tmp_path, case):
    architecture, metadata, message = NO_MODELS[case]
    tensors = {"some.weight": np.ones((3, 4), np.float32)}
    file = tiny_file(architecture=architecture, metadata=metadata, tensors=tensors)
    with pytest.raises(ModelError, match=rf"tiny\.gguf must be a .*{message}") as error:
        load_gguf(file.write(tmp_path / "tiny.gguf"))
    assert "from_pretrained" not in str(error.value)  # which cannot help here


def test_load_gguf_absent_metadata_raises_model_error_only(tiny_file, tmp_path, llama_key):
    file = tiny_file()
    del file.metadata[llama_key]
    try:
        load_gguf(file.write(tmp_path / "tiny.gguf"))
    except ModelError as error:
        assert "tiny.gguf" in str(error)  # noqa: PT017


def test_load_gguf_other_architecture_raises(tiny_file, tmp_path):
    with pytest.raises(ModelError, match="architecture must be 'llama'; got 'mamba'"):
        load_gguf(tiny_file(architecture="mamba").write(tmp_path / "tiny.gguf"))


def test_load_gguf_missing_tensors_are_named(tiny_file, tmp_path):
    file = tiny_file()
    del file.tensors["blk.2.attn_v.weight"], file.tensors["output_norm.weight"]
    with pytest.raises(ModelError, match=r"missing: output_norm\.weight, blk\.2\.attn_v\.weight;"):
        load_gguf(file.write(tmp_path / "tiny.gguf"))


def test_load_gguf_unknown_tensor_raises(tiny_file, tmp_path):
    file = tiny_file()
    file.tensors["rope_freqs.weight"] = np.ones(5, np.float32)
    with pytest.raises(ModelError, match=r"does not support rope_freqs\.weight;"):
        load_gguf(file.write(tmp_path / "tiny.gguf"))


def test_load_gguf_tensor_of_another_shape_raises(tiny_file, tmp_path):
    file = tiny_file()
    file.tensors["blk.1.attn_k.weight"] = np.ones((20, 41), np.float32)
    with pytest.raises(ModelError, match=r"blk\.1\.attn_k.* shape \(20, 40\).*got \(20, 41\)"):
        load_gguf(file.write(tmp_path / "tiny.gguf"))
