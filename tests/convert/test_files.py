"""Checkpoint files: converted as in memory, one layer at a time, and never half written."""

import json
import os

import pytest
import torch

import polyhead as ph
from polyhead.convert import convert_file, files, state_dict
from polyhead.errors import ArgumentError, ConversionError, ModelError

safetensors = pytest.importorskip("safetensors.torch")

H, LAYERS = 3, 4


@pytest.fixture
def gpt2():
    """A checkpoint of several dtypes, one of them of one byte and odd in size."""
    torch.manual_seed(0)
    tensors = {"wte.weight": torch.randn(31, 12), "seen": torch.ones(3, dtype=torch.uint8)}
    for i in range(LAYERS):
        attention = f"h.{i}.attn."
        tensors[f"{attention}c_attn.weight"] = torch.randn(12, 36).bfloat16()
        tensors[f"{attention}c_attn.bias"] = torch.randn(36).bfloat16()
        tensors[f"{attention}c_proj.weight"] = torch.randn(12, 12).bfloat16()
        tensors[f"{attention}c_proj.bias"] = torch.randn(12).bfloat16()
        tensors[f"{attention}bias"] = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
        tensors[f"h.{i}.mlp.c_proj.weight"] = torch.randn(5, 12, dtype=torch.float64)
    tensors["steps"] = torch.tensor(7)
    tensors["none"] = torch.zeros(0, 4)
    return tensors


def without_masks(gpt2):
    return {name: tensor for name, tensor in gpt2.items() if not name.endswith(".attn.bias")}


def save(tensors, folder, kind):
    """Save the checkpoint in one of the readable kinds and return the path to pass."""
    folder.mkdir(exist_ok=True)
    if kind in ("sharded", "sharded.bin"):
        names = sorted(tensors)  # a layer's tensors come to lie in different shards
        whole = "pytorch_model.bin" if kind.endswith("bin") else "model.safetensors"
        end = whole.rpartition(".")[2]
        write = torch.save if end == "bin" else safetensors.save_file
        shards = {f"a.{end}": names[::2], f"b.{end}": names[1::2]}
        for shard, held in shards.items():
            write({name: tensors[name] for name in held}, folder / shard)
        weight_map = {name: shard for shard, held in shards.items() for name in held}
        (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder
    if kind == "folder":
        safetensors.save_file(tensors, folder / "model.safetensors")
        return folder
    if kind == "folder.bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    path = folder / kind
    if kind.endswith(".safetensors"):
        safetensors.save_file(tensors, path, metadata={"format": "pt", "by": "a test"})
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization="legacy" not in kind)
    return path


def load(path):
    return safetensors.load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


KINDS = [
    "x.safetensors",
    "folder",
    "sharded",
    "x.pt",
    "legacy.bin",
    "folder.bin",
    "sharded.bin",
    "x.ckpt",
]


@pytest.mark.parametrize("output", ["out.safetensors", "out.pt"])
@pytest.mark.parametrize("kind", KINDS)
def test_convert_file_equals_state_dict_and_round_trips(gpt2, tmp_path, kind, output):
    path = save(gpt2, tmp_path / "in", kind)
    seen = []
    report = convert_file(
        path,
        tmp_path / output,
        source="gpt2",
        target="polyhead",
        progress=lambda step, done: seen.append((step, done)),
    )
    want = state_dict(gpt2, source="gpt2", target="polyhead")
    assert_same(load(tmp_path / output), want)
    assert (report.layers, report.unchanged) == (LAYERS, len(gpt2) - 5 * LAYERS)
    assert report.dropped == tuple(f"h.{i}.attn.bias" for i in range(LAYERS))
    assert report.bytes == (tmp_path / output).stat().st_size
    shares = [done for _, done in seen]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    assert {"converting h.2.attn", "copying wte.weight"} <= {step for step, _ in seen}
    back = tmp_path / "back.safetensors"
    convert_file(tmp_path / output, back, source="polyhead", target="gpt2")
    assert_same(load(back), without_masks(gpt2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        ["in", output, "back.safetensors"]
    )


def test_convert_file_metadata_is_kept(gpt2, tmp_path):
    path = save(gpt2, tmp_path, "x.safetensors")
    convert_file(path, tmp_path / "y.safetensors", source="gpt2", target="polyhead")
    with safetensors.safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "a test"}


def test_convert_file_heads_come_from_config_json(tmp_path):
    split = ph.MultiHeadAttention(7, 12, 11, 0.0, H).state_dict()
    path = save(split, tmp_path, "x.safetensors")
    out = tmp_path / "y.safetensors"
    with pytest.raises(ConversionError, match="num_heads must be known"):
        convert_file(path, out, source="split", target="stacked")
    assert not out.exists()
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": H}))
    convert_file(path, out, source="split", target="stacked")
    want = state_dict(split, source="split", target="stacked", num_heads=H)
    assert_same(load(out), want)
    # Arguments take precedence over the config.
    convert_file(path, out, source="split", target="stacked", num_heads=2, overwrite=True)
    assert "heads.2.W_query.weight" not in load(out)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"config.json must hold a JSON object; got list"):
        convert_file(path, tmp_path / "z.pt", source="split", target="stacked")


def test_convert_file_one_layer_is_in_memory_at_a_time(gpt2, tmp_path, monkeypatch):
    path = save(gpt2, tmp_path / "in", "sharded")
    alive = []
    real = files._pieces

    def counted(moves, unchanged, read):
        held = []

        def counting(name):
            held.append(name)
            return read(name)

        for step, piece in real(moves, unchanged, counting):
            alive.append(len(held))
            yield step, piece
            held.clear()

    monkeypatch.setattr(files, "_pieces", counted)
    convert_file(path, tmp_path / "y.safetensors", source="gpt2", target="polyhead")
    assert alive == [4] * LAYERS + [1] * (len(gpt2) - 5 * LAYERS)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, RuntimeError])
@pytest.mark.parametrize("there_before", [True, False])
def test_convert_file_interrupted_keeps_the_old_file(gpt2, tmp_path, failure, there_before):
    path = save(gpt2, tmp_path / "in", "x.safetensors")
    out = tmp_path / "y.safetensors"
    if there_before:
        out.write_bytes(b"precious")
    calls = []

    def fail(step, done):
        calls.append(step)
        if len(calls) == 5:
            raise failure("the disk is full")

    expected = ModelError if failure is OSError else failure
    with pytest.raises(expected, match="the disk is full"):
        convert_file(path, out, source="gpt2", target="polyhead", overwrite=True, progress=fail)
    assert (
        sorted(entry.name for entry in tmp_path.iterdir())
        == ["in", "y.safetensors"][: 1 + there_before]
    )
    if there_before:
        assert out.read_bytes() == b"precious"


def test_convert_file_output_that_appears_is_not_overwritten(gpt2, tmp_path):
    path, out = save(gpt2, tmp_path / "in", "x.safetensors"), tmp_path / "y.safetensors"
    with pytest.raises(ArgumentError, match="output must not exist yet"):
        convert_file(
            path,
            out,
            source="gpt2",
            target="polyhead",
            progress=lambda step, done: out.write_bytes(b"precious"),
        )
    assert out.read_bytes() == b"precious"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "y.safetensors"]


def test_convert_file_replaces_its_own_input(gpt2, tmp_path):
    path = save(gpt2, tmp_path, "x.safetensors")
    with pytest.raises(ArgumentError, match=r"output must not exist yet; .*overwrite=True"):
        convert_file(path, path, source="gpt2", target="polyhead")
    assert_same(load(path), gpt2)
    convert_file(path, path, source="gpt2", target="polyhead", overwrite=True)
    assert_same(load(path), state_dict(gpt2, source="gpt2", target="polyhead"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("y.npz", r"output must end in .safetensors, .pt, .pth or .bin; got .*y.npz"),
        ("none/y.pt", r"output must be in a folder that exists; got .*none"),
        ("folder.pt", r"output must not exist yet; got .*folder.pt"),
        ("pipe.pt", r"output must be a file; got the device .*pipe.pt; name a new file"),
    ],
)
def test_convert_file_invalid_output_raises(gpt2, tmp_path, output, message):
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    path = save(gpt2, tmp_path, "x.safetensors")
    for overwrite in (False, True):
        with pytest.raises(ArgumentError, match=message):
            convert_file(
                path, tmp_path / output, source="gpt2", target="polyhead", overwrite=overwrite
            )


class Surprise:
    def __reduce__(self):
        return os.system, ("echo surprised > surprise",)


def test_convert_file_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Surprise()}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"x.pt cannot be read as tensors alone \(Unpickling"):
        convert_file(tmp_path / "x.pt", tmp_path / "y.pt", source="gpt2", target="polyhead")
    assert not (tmp_path / "surprise").exists()


@pytest.mark.parametrize(
    ("content", "got"),
    [({"model": {"a": torch.ones(2)}, "step": 3}, "model"), ([torch.ones(2)], "list")],
)
def test_convert_file_pickle_with_other_objects_raises(tmp_path, content, got):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=f"tensors by name and nothing else; got {got}; save"):
        convert_file(tmp_path / "x.pt", tmp_path / "y.pt", source="gpt2", target="polyhead")


def test_convert_file_unreadable_checkpoint_raises(gpt2, tmp_path):
    def refuse(path, message):
        with pytest.raises(ModelError, match=message):
            convert_file(path, tmp_path / "y.pt", source="gpt2", target="polyhead")

    refuse(tmp_path / "none.safetensors", "no such file or folder; check the path")
    (tmp_path / "empty").mkdir()
    refuse(
        tmp_path / "empty", r"empty must hold model.safetensors or pytorch_model.bin, or one of th"
    )
    (tmp_path / "cut.safetensors").write_bytes(
        save(gpt2, tmp_path, "x.safetensors").read_bytes()[:-1]
    )
    refuse(tmp_path / "cut.safetensors", r"cut.safetensors cannot be read as safetensors \(")
    folder = save(gpt2, tmp_path / "shards", "sharded")
    (folder / "b.safetensors").unlink()
    refuse(folder, "names shards; b.safetensors is missing")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    refuse(folder, "every shard's name is missing")
    index.write_text("{")
    refuse(folder, r"index.json cannot be read as JSON")
    save(gpt2, tmp_path / "shards", "sharded")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    refuse(folder, r"b.safetensors holds .*, as another file does")


def test_convert_file_different_heads_raise_while_writing(tmp_path):
    stacked = ph.MultiHeadAttentionWrapper(7, 4, 11, 0.0, 4).state_dict()
    path = save(stacked, tmp_path, "x.safetensors")
    with pytest.raises(ConversionError, match=r"heads\[0\] and heads\[1\] must have equal W_key"):
        convert_file(path, tmp_path / "y.pt", source="stacked", target="split", num_kv_heads=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("family", ["gpt_neox", None, "mamba"])
def test_convert_file_layout_comes_from_config(tmp_path, family):
    tensors = {"a.query_key_value.weight": torch.randn(12, 4), "a.dense.weight": torch.randn(4, 4)}
    folder = save(tensors, tmp_path / "model", "folder")
    config = {"num_attention_heads": 2, "model_type": family}
    (folder / "config.json").write_text(json.dumps(config))
    output = tmp_path / "moved.safetensors"
    if family == "gpt_neox":
        assert convert_file(folder, output, target="polyhead").source == "neox"
        assert_same(
            load(output), state_dict(tensors, source="neox", target="polyhead", num_heads=2)
        )
        return
    message = rf"must be given where no config.*got model_type {family!r}; those of neox, bloom"
    with pytest.raises(ConversionError, match=message):
        convert_file(folder, output, target="polyhead")
    assert not output.exists()
