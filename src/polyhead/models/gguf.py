"""Load a Llama-architecture GGUF file straight into a transformers model and its tokenizer.

transformers reads GGUF files too, some ten times slower. The file format is described in ggml's
docs/gguf.md, the names of keys and tensors in llama.cpp's gguf-py. Settings that this loader does
not support (rope scaling, experts, biases, another pre-tokenizer) are refused, never ignored.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from polyhead.errors import DependencyError, ModelError, PolyheadError, install_command
from polyhead.models.gguf_settings import FROM_TRANSFORMERS, check_supported

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["load_gguf"]

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType
# A 262 thousand token vocabulary takes 2 million; a corrupt count would take hours.
_MOST_READS = 5_000_000

_CONFIG = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
_SAME_AS_HEAD_DIM = ("attention.value_length", "rope.dimension_count")
_LAYER_TENSORS = {
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


def load_gguf(
    path: str | os.PathLike[str], before_weights: Callable[[Any], None] | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the model and the tokenizer of a Llama-architecture GGUF file.

    Any quantization that the ``gguf`` package can dequantize is read; weights become float32 on
    the CPU, so the model takes four bytes per weight.

    Args:
        path: a GGUF file with ``general.architecture`` "llama" and a "smollm" BPE tokenizer.
        before_weights: called with the model on the meta device before its weights are read.

    Returns:
        The model in eval mode, weights (out, in) in transformers' row order, and its tokenizer.

    Raises:
        ModelError: the file is missing, truncated, corrupt, or of an unsupported model.
        DependencyError: ``gguf``, ``tokenizers`` or ``transformers`` is not installed.

    >>> model, tokenizer = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    """
    with needs_cli_extra("reading a GGUF file"):
        for package in ("gguf", "tokenizers", "transformers"):
            importlib.import_module(package)
        from transformers import LlamaForCausalLM
    name = os.fspath(path)
    with _refusing(name, "cannot be read as GGUF", "it is not GGUF, cut short, or corrupt"):
        reader = _open_reader(name)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    check_supported(name, metadata, (*_CONFIG.values(), *_SAME_AS_HEAD_DIM))
    with _refusing(name, "does not describe a Llama model", "its metadata is corrupt"):
        config = _config(metadata, tied="output.weight" not in tensors)
        _check_names(name, config, tensors)
        with torch.device("meta"):  # no random weights that would be overwritten
            model = LlamaForCausalLM(config)
        if before_weights is not None:
            before_weights(model)
        _fill(name, model, config, tensors)
    with _refusing(name, "does not hold a usable tokenizer", "its metadata is corrupt"):
        return model, _tokenizer(metadata)


@contextmanager
def needs_cli_extra(what: str) -> Iterator[None]:
    """Turn an ImportError inside the block into a DependencyError with the install command."""
    try:
        yield
    except ImportError as error:
        raise DependencyError(
            f"{what} needs the package {error.name}, which cannot be imported ({error}); "
            f"install it: {install_command('cli')}"
        ) from error


@contextmanager
def _refusing(path: str, what: str, cause: str) -> Iterator[None]:
    """Raise ModelError with the file and the cause: corrupt bytes make parsers raise anything."""
    try:
        yield
    except (PolyheadError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"{path} {what} ({reason}): {cause}; get the file again") from error


class _CheckedBytes:
    """Bytes of a file; a slice beyond the end raises instead of shrinking."""

    def __init__(self, data: Any) -> None:
        import numpy as np

        self._data = np.asarray(data)  # slices of a memmap cost four times those of an array
        self._reads = 0

    def __getitem__(self, where: slice) -> Any:
        self._reads += 1
        if where.stop > len(self._data):
            raise ValueError(f"bytes up to {where.stop} are needed, the file has {len(self._data)}")
        if self._reads > _MOST_READS:
            raise ValueError(f"the metadata has more than {_MOST_READS} parts")
        return self._data[where]


def _open_reader(path: str) -> GGUFReader:
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._checked

        @data.setter
        def data(self, mapped: Any) -> None:
            self._checked = _CheckedBytes(mapped)

    with np.errstate(all="raise"):  # offsets that overflow are corrupt
        reader = Reader(path)
    if reader.byte_order != "I":
        raise ValueError("the file is in the byte order of another kind of machine")
    return reader


def _config(metadata: Mapping[str, Any], *, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    tokens, heads = metadata["tokenizer.ggml.tokens"], metadata["llama.attention.head_count"]
    absent = {  # llama.cpp's defaults
        "head_dim": metadata["llama.embedding_length"] // heads,
        "num_key_value_heads": heads,
        "rope_theta": 10000.0,
        "vocab_size": len(tokens),
    }
    sizes = {arg: metadata.get(f"llama.{key}", absent.get(arg)) for arg, key in _CONFIG.items()}
    for arg, value in sizes.items():
        if not isinstance(value, int | float) or not 0 < value < 2**31:
            raise ValueError(f"llama.{_CONFIG[arg]} must be a positive number, got {value!r}")
    for key in _SAME_AS_HEAD_DIM:
        if (got := metadata.get(f"llama.{key}", sizes["head_dim"])) != sizes["head_dim"]:
            raise ValueError(f"llama.{key} must be the head size {sizes['head_dim']}, got {got}")
    if heads % sizes["num_key_value_heads"]:
        raise ValueError(f"{heads} heads cannot share {sizes['num_key_value_heads']} evenly")
    if len(tokens) > sizes["vocab_size"]:
        raise ValueError(f"{len(tokens)} tokens exceed the vocabulary of {sizes['vocab_size']}")
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    sizes |= {arg: metadata.get(f"tokenizer.ggml.{key}_token_id") for arg, key in ids.items()}
    return LlamaConfig(tie_word_embeddings=tied, **sizes)


def _names(layers: int, *, tied: bool) -> Iterator[tuple[str, str]]:
    """Yield all tensors of a model of this size as (name in the file, name in the model)."""
    yield "token_embd.weight", "model.embed_tokens.weight"
    yield "output_norm.weight", "model.norm.weight"
    if not tied:
        yield "output.weight", "lm_head.weight"
    for layer in range(layers):
        for ours, theirs in _LAYER_TENSORS.items():
            yield f"blk.{layer}.{ours}.weight", f"model.layers.{layer}.{theirs}.weight"


def _check_names(path: str, config: LlamaConfig, tensors: Mapping[str, ReaderTensor]) -> None:
    # Lazy, because a corrupt layer count can be a billion; and before the model is built.
    pairs = _names(config.num_hidden_layers, tied=config.tie_word_embeddings)
    missing = list(islice((name for name, _ in pairs if name not in tensors), 4))
    if missing:
        raise ModelError(
            f"{path}: tensors are missing: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}; "
            "a file that is split in parts must be joined first (llama-gguf-split --merge)"
        )
    pairs = _names(config.num_hidden_layers, tied=config.tie_word_embeddings)
    extra = sorted(tensors.keys() - {name for name, _ in pairs})
    if extra:
        raise ModelError(
            f"{path}: no tensor may be left out, and this loader does not support "
            f"{', '.join(extra[:3])}{', ...' * (len(extra) > 3)}; {FROM_TRANSFORMERS}"
        )


def _fill(
    path: str, model: LlamaForCausalLM, config: LlamaConfig, tensors: Mapping[str, ReaderTensor]
) -> None:
    """Replace a model's parameters on the meta device by the weights of the file."""
    expected = model.state_dict()
    weights = {}
    for ours, theirs in _names(config.num_hidden_layers, tied=config.tie_word_embeddings):
        tensor, shape = tensors[ours], tuple(expected[theirs].shape)
        if (got := tuple(reversed(tensor.shape.tolist()))) != shape:
            raise ModelError(
                f"{path}: tensor {ours} must have the shape {shape} that the metadata implies; "
                f"got {got}; get the file again"
            )
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        weights[theirs] = _weight(tensor, heads.get(ours.split(".")[-2]))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # The rotary frequencies are not in the state dict, so they are still on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.train(False)


def _weight(tensor: ReaderTensor, heads: int | None) -> torch.Tensor:
    """Return the float32 weight, rows in transformers' order.

    llama.cpp rotates adjacent rows (2i, 2i + 1) of a query or KV head together, transformers
    rows i and i + head_dim / 2, so llama.cpp's converter interleaved the halves: undo that.
    """
    import gguf
    import numpy as np

    array = np.empty(tuple(reversed(tensor.shape.tolist())), np.float32)
    rows = 64 if array.ndim == 2 else len(array)  # few, so that gguf's copies stay in the cache
    for start in range(0, len(array), rows):
        part = slice(start, start + rows)
        array[part] = gguf.dequantize(tensor.data[part], tensor.tensor_type)
    if heads is not None:
        array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
    return torch.from_numpy(array)


def _tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not len(vocabulary) == len(tokens) == len(types):
        raise ValueError(
            f"{len(tokens)} tokens, {len(vocabulary)} of them distinct, have {len(types)} types"
        )
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        found = [token for token, type_ in zip(tokens, types, strict=True) if type_ == kind]
        add([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in found])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{key}_token_id") for ours, key in named.items()}
    special = {f"{ours}_token": tokens[id_] for ours, id_ in ids.items() if id_ is not None}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, chat_template=metadata.get("tokenizer.chat_template"), **special
    )
