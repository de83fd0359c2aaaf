"""`install()`: found by imports and by metadata, undone without a trace, never over another."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap

import pytest

from polyhead.drop_in import flash_attn as ours
from polyhead.drop_in.flash_attn import install, uninstall
from polyhead.errors import ArgumentError

NAMES = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.bert_padding",
    "flash_attn.layers",
    "flash_attn.layers.rotary",
)


@pytest.fixture(autouse=True)
def nothing_is_left():
    finders = list(sys.meta_path)
    yield
    uninstall()
    assert sys.meta_path == finders
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None


def test_import_finds_these_functions():
    with install():
        import flash_attn
        from flash_attn import flash_attn_func, flash_attn_with_kvcache
        from flash_attn.bert_padding import pad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
        from flash_attn.layers.rotary import apply_rotary_emb

        assert flash_attn.__version__ == ours.__version__ == "2.8.3+polyhead"
        assert flash_attn_func is ours.flash_attn_func
        assert flash_attn_with_kvcache is ours.flash_attn_with_kvcache
        assert pad_input is ours.bert_padding.pad_input
        assert flash_attn_varlen_func is ours.flash_attn_varlen_func
        assert apply_rotary_emb is ours.rotary.apply_rotary_emb
        assert flash_attn.bert_padding.pad_input is pad_input
        assert "polyhead" in repr(flash_attn)
        assert all(importlib.util.find_spec(name) is not None for name in NAMES)


def test_what_is_not_offered_cannot_be_imported():
    with install():
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.ops"):
            importlib.import_module("flash_attn.ops.triton")
        with pytest.raises(ImportError, match=r"flash_attn_gpu.*polyhead"):
            from flash_attn import flash_attn_gpu  # noqa: F401


def test_metadata_gives_the_version():
    with install():
        for name in ("flash-attn", "flash_attn"):
            assert importlib.metadata.version(name) == "2.8.3+polyhead"
        assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
        assert importlib.metadata.distribution("flash-attn").files is None
        assert importlib.metadata.requires("flash-attn") is None
        assert importlib.metadata.entry_points(group="console_scripts")
        assert importlib.metadata.version("torch").startswith("2.")
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("flash-attn-3")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")
    assert "flash_attn" not in importlib.metadata.packages_distributions()


def test_uninstall_after_install_leaves_nothing():
    install()
    import flash_attn

    uninstall()
    uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")
    assert flash_attn.flash_attn_func is ours.flash_attn_func  # an import from before works


def test_inner_context_leaves_the_outer_installed():
    with install():
        with install():
            pass
        assert importlib.util.find_spec("flash_attn") is not None


def test_context_is_left_after_an_error():
    with pytest.raises(ZeroDivisionError), install():
        raise ZeroDivisionError
    assert importlib.util.find_spec("flash_attn") is None


def test_installed_flash_attn_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("__version__ = '2.8.3'\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        with pytest.raises(ArgumentError) as raised:
            install()
        assert str(raised.value) == (
            f"install() must not replace an installed flash_attn; got {tmp_path}/flash_attn/"
            "__init__.py; import it, or import the functions from polyhead.drop_in.flash_attn by "
            "name"
        )
        import flash_attn

        assert flash_attn.__version__ == "2.8.3"
        with pytest.raises(ArgumentError, match="imported; import it"):
            install()
        uninstall()
        assert sys.modules["flash_attn"] is flash_attn  # which is not ours to remove
        del sys.modules["flash_attn"]
    importlib.invalidate_caches()


def test_metadata_without_package_is_not_replaced(tmp_path, monkeypatch):
    """An installation that is broken: pip lists it."""
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n"
    (tmp_path / "flash_attn-2.8.3.dist-info/METADATA").write_text(metadata)
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        with pytest.raises(ArgumentError, match=r"got flash-attn 2\.8\.3; import it"):
            install()
    importlib.invalidate_caches()


def test_import_of_polyhead_installs_nothing():
    """Explicit: neither the package nor its functions change what others can import."""
    code = """
        import importlib.util
        import polyhead
        polyhead.drop_in.flash_attn.flash_attn_func
        assert importlib.util.find_spec("flash_attn") is None
        installation = polyhead.drop_in.flash_attn.install()
        print(installation)
        import flash_attn
        print(flash_attn.__doc__)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "flash_attn 2.8.3+polyhead: polyhead.drop_in.flash_attn",
        "Stand-in for flash_attn: polyhead.drop_in.flash_attn.",
    ]
