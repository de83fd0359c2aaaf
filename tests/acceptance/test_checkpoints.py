"""Checkpoints as programs save them, given to `polyhead convert`: moved right, or refused by name.

transformers#1061 and gpt-neox#1161 (buffers), gemma.cpp#533 (codes), MDI-LLM#6 (the other layout).
"""

import copy
import json

import pytest
import torch
import torch.nn.utils.prune
from click.testing import CliRunner
from torch import nn

import polyhead as ph
from polyhead.cli import main

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

H, G, WIDTH = 6, 2, 48


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=H,
        num_key_value_heads=G, intermediate_size=36, max_position_embeddings=64, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_embd=WIDTH, n_head=H, n_layer=2, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config)


def load(path):
    if path.suffix == ".safetensors":
        return safetensors.load_file(path)
    return torch.load(path, weights_only=True)


@pytest.fixture
def convert(tmp_path):
    """`convert(path, ...)`: the command; the output's tensors, or its error and no output."""

    def run(path, *options, output="out.safetensors", target="polyhead"):
        out = tmp_path / "written" / output
        out.parent.mkdir(exist_ok=True)
        arguments = ["convert", str(path), str(out), "--to", target, *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        if result.exit_code == 0:
            return load(out), result.output
        assert result.exit_code == 2
        assert list(out.parent.iterdir()) == []  # nothing is written, no partial file either
        return None, " ".join(result.output.split())

    return run


def assert_moved(moved, model, prefix="model.layers.{}.self_attn."):
    """Every layer of the model is there as from_transformers makes it, and loads strictly."""
    layers = [m for m in model.modules() if type(m).__name__ in ("LlamaAttention", "GPT2Attention")]
    assert len(layers) == 2
    for i, layer in enumerate(layers):
        mine = ph.convert.from_transformers(layer)
        start = prefix.format(i)
        got = {name.removeprefix(start): t for name, t in moved.items() if name.startswith(start)}
        assert got.keys() == mine.state_dict().keys()
        assert all(torch.equal(got[name], t) for name, t in mine.state_dict().items())
    assert not any("q_proj" in name or "c_attn" in name for name in moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_what_save_pretrained_writes(tmp_path, convert, dtype, shards):
    """Half precision; sharded with an index, a layer's tensors in several files; tied heads."""
    model = llama(tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size=shards)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (shards == "20KB")
    moved, _ = convert(tmp_path / "model")
    assert_moved(moved, model)
    back, _ = convert(
        write(tmp_path / "moved.pt", moved), "--from", "polyhead", target="llama", output="back.pt"
    )
    want = {name: tensor for name, tensor in model.state_dict().items() if name in back}
    assert all(torch.equal(back[name], tensor) for name, tensor in want.items())
    assert {"lm_head.weight"} >= model.state_dict().keys() - back.keys()


def write(path, tensors):
    path.parent.mkdir(exist_ok=True)
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("end", ["bin", "safetensors"])
def test_shards_of_either_kind_with_their_index(tmp_path, convert, count, end):
    model, names = llama(), list(llama().state_dict())
    whole = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[end]
    stem = whole.partition(".")[0]
    weight_map = {}
    for i in range(count):
        shard = f"{stem}-{i + 1:05}-of-{count:05}.{end}"
        part = {name: model.state_dict()[name].clone() for name in names[i::count]}
        (torch.save if end == "bin" else safetensors.save_file)(part, tmp_path / shard)
        weight_map |= dict.fromkeys(part, shard)
    alone, error = convert(tmp_path / shard, "--from", "llama")
    assert alone is None
    assert "must be a whole checkpoint; got one shard of several; pass their folder" in error
    _, error = convert(tmp_path, "--from", "llama")
    assert f"{whole}.index.json" in error
    (tmp_path / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    moved, _ = convert(tmp_path, "--from", "llama")
    assert_moved(moved, model)
    (tmp_path / shard).unlink()
    (tmp_path / "written/out.safetensors").unlink()
    _, error = convert(tmp_path, "--from", "llama")
    assert f"{shard} is missing; get the rest" in error


@pytest.mark.parametrize("kind", ["renamed", "in memory"])
def test_one_shard_under_another_name(tmp_path, convert, kind):
    """Its name does not tell; a layer that is cut, or absent, does."""
    state = llama().state_dict()
    names = sorted(state)
    for part in (names[::2], names[: len(names) // 2], names[len(names) // 2 :]):
        tensors = {name: state[name] for name in part}
        if kind == "in memory":
            with pytest.raises(ph.errors.ConversionError):
                ph.convert.state_dict(tensors, source="llama", target="polyhead")
            continue
        moved, error = convert(write(tmp_path / "x.pt", tensors), "--from", "llama")
        assert moved is None
        assert "model.layers." in error


@pytest.mark.parametrize("how", ["compiled", "parallel", "both", "lightning's"])
def test_prefixes_of_wrappers_stay(tmp_path, convert, how):
    model = gpt2()
    wrapped, prefix = {
        "compiled": (lambda: torch.compile(model), "_orig_mod."),
        "parallel": (lambda: nn.DataParallel(model), "module."),
        "both": (lambda: nn.DataParallel(torch.compile(model)), "module._orig_mod."),
        "lightning's": (lambda: nn.ModuleDict({"model": model}), "model."),
    }[how]
    path = write(tmp_path / "x.pth", wrapped().state_dict())
    moved, _ = convert(path, "--from", "gpt2")
    assert_moved(moved, model, prefix + "transformer.h.{}.attn.")


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_trainer_s_checkpoint_is_refused_with_what_helps(tmp_path, convert, key):
    model = gpt2()
    content = {
        "epoch": 3, "global_step": 7, key: model.state_dict(),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    }  # fmt: skip
    path = write(tmp_path / "x.ckpt", content)
    moved, error = convert(path, "--from", "gpt2")
    assert moved is None
    assert "must hold tensors by name and nothing else; got epoch; save the model's " in error
    assert f"torch.save(torch.load(path)['{key}'], another)" in error
    torch.save(torch.load(path)[key], tmp_path / "another.pt")  # the remedy works
    moved, _ = convert(tmp_path / "another.pt", "--from", "gpt2")
    assert_moved(moved, model, "transformer.h.{}.attn.")


def test_buffers_of_an_old_gpt2(tmp_path, convert):
    model = gpt2()
    old = dict(model.state_dict())
    for i in range(2):
        old[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        old[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    moved, told = convert(write(tmp_path / "pytorch_model.bin", old), "--from", "gpt2")
    assert_moved(moved, model, "transformer.h.{}.attn.")
    assert "4 old buffers left out (transformer.h.0.attn.bias, " in told


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_adapters_of_peft_merged_and_not(tmp_path, convert):
    peft = pytest.importorskip("peft")
    for targets in (["q_proj", "v_proj"], ["q_proj"], ["o_proj"], "all-linear"):
        model = llama()
        config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        path = write(tmp_path / "x.pt", adapted.state_dict())
        moved, error = convert(path, "--from", "llama")
        assert moved is None
        assert "base_layer" in error or "lora_" in error or "o_proj.weight" in error
        adapted.save_pretrained(tmp_path / "adapter")
        moved, error = convert(tmp_path / "adapter/adapter_model.safetensors", "--from", "llama")
        assert moved is None
        merged = adapted.merge_and_unload()  # the remedy
        moved, _ = convert(write(tmp_path / "x.pt", merged.state_dict()), "--from", "llama")
        assert_moved(moved, merged)
        (tmp_path / "written/out.safetensors").unlink()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_an_adapter_in_one_layer_of_two(tmp_path, convert):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1])
    state = peft.get_peft_model(llama(), config).state_dict()
    moved, error = convert(write(tmp_path / "x.pt", state), "--from", "llama")
    assert moved is None
    assert "layers.1.self_attn.: layout llama needs q_proj.weight, which cannot be found" in error
    assert "q_proj.base_layer.weight" in error
    assert "merge it first, as model.merge_and_unload() of peft does" in error


def parametrized(projection):
    torch.nn.utils.parametrizations.weight_norm(projection)


def pruned(projection):
    torch.nn.utils.prune.l1_unstructured(projection, "weight", 0.5)


def compiled(projection):
    projection.compile()  # in place: no name changes


@pytest.mark.parametrize("change", [parametrized, pruned, compiled])
def test_a_projection_that_is_computed(tmp_path, convert, change):
    model = llama()
    like = copy.deepcopy(model)
    change(model.model.layers[1].self_attn.v_proj)
    moved, error = convert(write(tmp_path / "x.pt", model.state_dict()), "--from", "llama")
    if change is compiled:
        assert_moved(moved, like)
        return
    assert moved is None
    assert "model.layers.1.self_attn.: layout llama needs v_proj.weight" in error
    assert "make it a plain weight first" in error


QUANTIZED = {
    "bitsandbytes 4 bit": lambda w: {
        "weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.zeros(w.numel() // 64),
        "weight.quant_map": torch.zeros(16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    },
    "bitsandbytes 8 bit": lambda w: {"weight": w.to(torch.int8), "SCB": torch.zeros(len(w))},
    "int8 alone": lambda w: {"weight": w.to(torch.int8)},
    "fp8": lambda w: {
        "weight": w.to(torch.float8_e4m3fn), "weight_scale_inv": torch.zeros(1, 1),
    },
    "fp8, scales of inputs": lambda w: {
        "weight": w.to(torch.float8_e5m2), "weight_scale": torch.ones(()),
        "input_scale": torch.ones(()),
    },
    "gptq": lambda w: {
        "qweight": torch.zeros(6, len(w), dtype=torch.int32), "qzeros": torch.zeros(1, 6).int(),
        "scales": torch.zeros(1, len(w)).half(), "g_idx": torch.zeros(48).int(),
    },
    "awq": lambda w: {
        "qweight": torch.zeros(48, 6).int(), "qzeros": torch.zeros(1, 6).int(),
        "scales": torch.zeros(1, len(w)).half(),
    },
    "compressed tensors": lambda w: {
        "weight_packed": torch.zeros(len(w), 6).int(), "weight_scale": torch.ones(len(w), 1),
        "weight_shape": torch.tensor(w.shape),
    },
    "hqq": lambda w: {"W_q": torch.zeros(8, 8, dtype=torch.uint8), "meta": torch.zeros(3)},
    "scales beside a weight of 16 bits": lambda w: {"weight": w, "weight_scale": torch.ones(())},
}  # fmt: skip


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("end", ["safetensors", "pt"])
def test_codes_of_quantizers_are_refused(tmp_path, convert, scheme, layers, end):
    state = llama().state_dict()
    for layer in layers:
        for x in "qkvo":
            start = f"model.layers.{layer}.self_attn.{x}_proj."
            parts = QUANTIZED[scheme](state.pop(f"{start}weight"))
            state |= {f"{start}{name}": tensor.contiguous() for name, tensor in parts.items()}
    del state["lm_head.weight"]
    path = tmp_path / f"x.{end}"
    (torch.save if end == "pt" else safetensors.save_file)(state, path)
    moved, error = convert(path, "--from", "llama")
    assert moved is None
    assert f"model.layers.{layers[0]}.self_attn.: " in error
    assert "dequantize the model first" in error


def test_codes_of_safetensors_without_a_dtype_in_torch(tmp_path, convert):
    header = b'{"h.0.attn.c_attn.weight":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    moved, error = convert(path, "--from", "gpt2")
    assert moved is None
    assert "got F4; dequantize the model first" in error


def test_nano_gpt(tmp_path, convert):
    """(out, in) under GPT-2's names, compiled, in a trainer's dict, with its mask."""
    state = {}
    for i in range(2):
        attention = f"_orig_mod.transformer.h.{i}.attn."
        state[f"{attention}bias"] = torch.ones(1, 1, 16, 16).tril()
        state[f"{attention}c_attn.weight"] = torch.randn(3 * WIDTH, WIDTH)
        state[f"{attention}c_proj.weight"] = torch.randn(WIDTH, WIDTH)
    moved, error = convert(
        write(tmp_path / "ckpt.pt", {"model": state, "iter_num": 3}), "--from", "gpt2"
    )
    assert moved is None
    assert "torch.save(torch.load(path)['model'], another)" in error
    moved, error = convert(write(tmp_path / "ckpt.pt", state), "--from", "gpt2")
    assert moved is None
    assert "transpose c_attn.weight, c_proj.weight first (tensor.T)" in error
    turned = {name: t.T.contiguous() if "attn.c_" in name else t for name, t in state.items()}
    moved, _ = convert(write(tmp_path / "ckpt.pt", turned), "--from", "gpt2")
    key = state["_orig_mod.transformer.h.1.attn.c_attn.weight"][WIDTH : 2 * WIDTH]
    assert torch.equal(moved["_orig_mod.transformer.h.1.attn.W_key.weight"], key)


@pytest.mark.parametrize("source", ["llama", "qwen3", "gemma3"])
def test_olmo2_is_none_of_them(tmp_path, convert, source):
    config = transformers.Olmo2Config(
        vocab_size=31, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=H,
        intermediate_size=36, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.Olmo2ForCausalLM(config).save_pretrained(tmp_path / "model")
    moved, error = convert(tmp_path / "model", "--from", source)
    assert moved is None
    assert "q_norm.weight" in error
    moved, error = convert(tmp_path / "model")
    assert moved is None
    assert "got model_type 'olmo2'" in error


@pytest.mark.filterwarnings("ignore")  # quantized tensors are deprecated
@pytest.mark.parametrize("tensor", ["meta", "sparse", "quantized"])
def test_files_of_tensors_that_are_not_plain(tmp_path, convert, tensor):
    state = dict(gpt2().state_dict())
    state["transformer.wte.weight"] = {
        "meta": lambda w: w.to("meta"),
        "sparse": lambda w: w.to_sparse(),
        "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    }[tensor](state["transformer.wte.weight"])
    moved, error = convert(write(tmp_path / "x.pt", state), "--from", "gpt2")
    assert moved is None
    assert "transformer.wte.weight must be a dense tensor with values; got" in error


def test_a_gguf_file_is_no_checkpoint(tmp_path, convert):
    for name in ("x.gguf", "x.bin"):
        (tmp_path / name).write_bytes(b"GGUF\3\0\0\0" + bytes(64))
        moved, error = convert(tmp_path / name, "--from", "llama")
        assert moved is None
        assert "got a GGUF file" in error
