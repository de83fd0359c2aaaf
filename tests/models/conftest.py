"""Tiny GGUF files, complete or changed."""

import re
from dataclasses import dataclass, field

import pytest
import torch

# Vocabulary 263, width 40, inner 28: apart from 40 = 4 heads of 10, no size is another's multiple.
LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM = 3, 40, 28, 4, 2, 10
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def interleave(weight, heads):
    """llama.cpp's converter: row i of a head's first half, then row i of its second, and so on."""
    size = weight.shape[0] // heads
    rows = []
    for head in range(heads):
        for i in range(size // 2):
            rows += [head * size + i, head * size + size // 2 + i]
    return weight[rows]


def _tiny_llama(*, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=263,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=77,
        rms_norm_eps=1e-3,
        rope_theta=123.0,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def _gguf_tensors(model):
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    tensors = {}
    for name, weight in weights.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        theirs = layer[2] if layer else name.removesuffix(".weight")
        short = next(ours for ours, hf in NAMES.items() if hf == theirs)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(short)
        weight = interleave(weight, heads) if heads else weight
        tensors[f"blk.{layer[1]}.{short}.weight" if layer else f"{short}.weight"] = weight.numpy()
    return tensors


LLAMA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 77,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.attention.layer_norm_rms_epsilon": 1e-3,
    "llama.rope.freq_base": 123.0,
    "llama.vocab_size": 263,
}


def tiny_metadata():
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|end|>", "<|start|>", "<user>", *sorted(ByteLevel.alphabet()), "he", "ll", "hell"]
    return {
        **LLAMA,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


@dataclass
class TinyFile:
    """A GGUF file to be written, with changes."""

    architecture: str = "llama"
    metadata: dict = field(default_factory=tiny_metadata)
    tensors: dict = field(default_factory=lambda: _gguf_tensors(_tiny_llama(tied=True)))
    alignment: int | None = None

    def write(self, path):
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture)
        if self.alignment:
            writer.add_custom_alignment(self.alignment)
        for key, value in self.metadata.items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add |= {str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
        for name, array in self.tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture(scope="session")
def tiny_llama():
    """`tiny_llama(tied=)`: a model with fixed random weights."""
    return _tiny_llama


@pytest.fixture(scope="session")
def gguf_tensors():
    """`gguf_tensors(model)`: its weights as llama.cpp's converter names and lays them out."""
    return _gguf_tensors


@pytest.fixture(scope="session")
def tiny_file():
    """`tiny_file(tensors=, alignment=, ...).write(path)`: a GGUF file, of one model by default."""
    return TinyFile


@pytest.fixture(scope="session")
def tiny_bytes(tmp_path_factory):
    """The bytes of a complete file."""
    return TinyFile().write(tmp_path_factory.mktemp("tiny") / "tiny.gguf").read_bytes()


@pytest.fixture(params=LLAMA)
def llama_key(request):
    """Each key of the model's metadata, one per test."""
    return request.param


@pytest.fixture(scope="session")
def logits():
    """`logits(model, ids)`."""

    @torch.no_grad()
    def run(model, ids):
        return model(ids).logits

    return run
