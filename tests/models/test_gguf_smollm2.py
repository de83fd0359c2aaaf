"""The real GGUF file: its config and tokenizer, equal to other readers."""

import os
import re

import pytest
import torch

from polyhead.errors import ModelError
from polyhead.models.gguf import load_gguf

TEXTS = [
    "The capital of France is",
    "  two spaces in front, one behind ",
    "line\n\nbreaks\r\nand\ttabs",
    "in 1984, 3.14159 and  007",
    "naïve café, עברית, 日本語のテキスト",
    "😀 👩‍👩‍👧 ½ ²³ ١٢٣ Ⅷ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't they'LL def f(x):\n    return x**2",
    "",
]


def test_smollm2_knows_the_capital_of_france(logits, smollm2):
    ids = torch.tensor([smollm2.tokenizer("The capital of France is")["input_ids"]])
    assert smollm2.tokenizer.decode([logits(smollm2.model, ids)[0, -1].argmax()]) == " Paris"


def test_smollm2_reads_austen_with_every_row_in_its_place(smollm2):
    # Query and key rows in llama.cpp's order still find Paris, but lose 1.7 nats per token here.
    text = (
        "It is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of a wife."
    )
    ids = torch.tensor([smollm2.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        assert smollm2.model(ids, labels=ids).loss.item() == pytest.approx(2.7654, abs=1e-3)


def test_smollm2_config(smollm2):
    config = smollm2.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        30,
        576,
        1536,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.max_position_embeddings, config.vocab_size) == (8192, 49152)
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else vars(config)
    assert rope["rope_theta"] == 100000.0
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.tie_word_embeddings


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokenizer_round_trips(smollm2, text):
    assert smollm2.tokenizer.decode(smollm2.tokenizer(text)["input_ids"]) == text


def test_smollm2_tokenizer_gives_known_ids(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer("<|im_start|>hi<|im_end|>")["input_ids"] == [1, 6004, 2]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 42  7")["input_ids"]) == [
        *("Ġ", "4", "2", "ĠĠ", "7")
    ]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.decode([0, 1, 6004], skip_special_tokens=True) == "hi"
    chat = [{"role": "user", "content": "hi"}]
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template(chat, tokenize=False)


def test_smollm2_cut_after_a_megabyte(smollm2, tmp_path):
    path = tmp_path / "cut.gguf"
    with open(smollm2.source, "rb") as file:
        path.write_bytes(file.read(1 << 20))
    with pytest.raises(ModelError, match=r"cut\.gguf cannot be read .*the file has 1048576"):
        load_gguf(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smollm2_agrees_with_transformers_own_reader(logits, smollm2):
    pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate")
    from transformers import AutoModelForCausalLM

    folder, name = os.path.split(smollm2.source)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    ids = torch.tensor([smollm2.tokenizer(" ".join(TEXTS))["input_ids"]])
    torch.testing.assert_close(logits(smollm2.model, ids), logits(theirs, ids), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smollm2_tokenizer_agrees_with_transformers_own(smollm2):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    folder, name = os.path.split(smollm2.source)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    plain = [text for text in TEXTS if not re.search(r"  \d|[½²١Ⅷ]", text)]
    assert [theirs(t)["input_ids"] for t in plain] == [
        smollm2.tokenizer(t)["input_ids"] for t in plain
    ]
    # It ignores "smollm" in the file, a pre-tokenizer that splits digits first.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    )
    assert [theirs(t)["input_ids"] for t in TEXTS] == [
        smollm2.tokenizer(t)["input_ids"] for t in TEXTS
    ]
