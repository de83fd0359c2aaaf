"""The repository's own rules. Each passes here, and is shown to catch a planted breach."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import polyhead

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
# One class, whose constructor and call are spelled out for readers of help().
# (a mask and its slices make one another)
LONG = {"multihead.py": 440, "algebra.py": 430}
ENDS = (".py", ".js", ".ipynb")  # of the subjects of a test file
# Private language. The field's words for it are in docs/glossary.md.
QUESTION = re.compile(r"(?:What|Who|Whether|Where|How|Which|When|Why)\b")
PER = r"(?:once|one \w+|\d+ times|numbers?|scales?|slopes?|ids?|bytes|microseconds|milliseconds)"
PRIVATE = re.compile(
    rf"\b{PER} a (?:key |KV |batch )?(?:head|token|row|layer|block)\b"
    r"|\bside by side\b|\bkey heads?\b|\bwhere (?:a|the) caches? holds?\b"
    r"|\bint8 codes?\b|(?<!exit )(?<!status )\bcodes\b|\b(?:short|general) way\b"
    r"|\b\w*(?:quantis|normalis|recognis|initialis)\w*|\b\w*colour\w*|\blearnt\b",
    re.IGNORECASE,
)


def long_files(root: Path) -> list[str]:
    """Return the modules too long to be read at one sitting."""
    paths = [*root.rglob("src/**/*.py"), *(root / "csrc").rglob("*.?pp")]
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in paths}
    return [
        f"{path.name}: {lines}"
        for path, lines in lengths.items()
        if lines > LONG.get(path.name, MAX_LINES)
    ]


def drawers(root: Path) -> list[str]:
    """Return the files whose name says nothing of what is in them."""
    return [path.name for path in root.rglob("src/**/util*.py")]


def settings(root: Path) -> list[str]:
    """Return the kernels' files that read the environment; isa.cpp alone may, once, when loaded."""
    paths = [path for path in (root / "csrc").rglob("*.?pp") if path.name != "isa.cpp"]
    return [path.name for path in paths if "getenv" in path.read_text("utf-8")]


def stray_tests(root: Path) -> list[str]:
    """Return the test files that mirror no module, no script and no example.

    One module may have several: test_cpu_dropout.py is of cpu/ too.
    """
    stray = []
    for test in (root / "tests").rglob("test_*.py"):
        place = test.relative_to(root / "tests").with_name(test.stem.removeprefix("test_"))
        if "acceptance" in place.parts or place == Path("repository"):
            continue
        folders = (
            [root]
            if place.parts[0] in ("examples", "scripts")
            else [root / "src/polyhead", root / "src"]
        )
        words = place.name.split("_")
        names = ["_".join(words[:n]) for n in range(1, len(words) + 1)]
        subjects = [folder / place.with_name(name) for folder in folders for name in names]
        modules = (subject.with_suffix(end) for subject in subjects for end in ENDS)
        if not any(module.exists() for module in modules) and not any(map(Path.is_dir, subjects)):
            stray.append(test.relative_to(root).as_posix())
    return sorted(stray)


def private_words(root: Path) -> dict[str, int]:
    """Return, per file of src, csrc and the documentation, the number of uses of private language.

    Such a use is a phrase of `PRIVATE` anywhere, or a docstring that begins with a question word.
    """
    paths = [
        *root.glob("src/**/*.py"),
        *root.glob("csrc/**/*.?pp"),
        *root.glob("*.md"),
        *root.glob("docs/**/*.md"),
    ]
    counts = {}
    for path in paths:
        text = path.read_text("utf-8")
        joined = re.sub(r"\s*\n\s*(?:#|//)?\s*", " ", text)  # phrases may be broken over lines
        uses = len(PRIVATE.findall(joined))
        if path.suffix == ".py":
            uses += sum(bool(QUESTION.match(docstring)) for docstring in docstrings(text))
        if uses:
            counts[path.relative_to(root).as_posix()] = uses
    return counts


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a module: its own, its classes' and its functions'."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def test_private_words_only_become_fewer():
    """The counts of `private_words.json` are the uses left. Lower them; never raise or add one."""
    allowed = json.loads((ROOT / "tests/private_words.json").read_text("utf-8"))
    more = {
        file: f"{uses}, at most {allowed.get(file, 0)}"
        for file, uses in private_words(ROOT).items()
        if uses > allowed.get(file, 0)
    }
    assert more == {}


def test_private_words_catches_a_breach(tmp_path):
    planted = {
        "src/polyhead/plain.py": '"""Rope: one angle per token."""\ndef f():\n    """True if."""\n',
        "src/polyhead/asking.py": '"""Whether it is."""\nclass A:\n    """How it is."""\n',
        "src/polyhead/look/spoken.py": "# One scale a\n# head: int8 codes, normalised.\n",
        "csrc/tiles/tile.hpp": "// Keys side by side, once a key head.\n",
        "csrc/isa.cpp": "// Keys are contiguous. Exit codes are not meant.\n",
        "docs/deep/a.md": "Colours of heads.\n",
        "README.md": "One value per head, in a head, which a head computes.\n",
        "tests/test_a.py": "# side by side\n",
    }
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert private_words(tmp_path) == {
        "src/polyhead/asking.py": 2,
        "src/polyhead/look/spoken.py": 3,
        "csrc/tiles/tile.hpp": 2,
        "docs/deep/a.md": 1,
    }


@pytest.mark.parametrize("rule", [long_files, drawers, settings, stray_tests])
def test_the_repository_keeps_its_rules(rule):
    assert rule(ROOT) == []


def test_the_rules_catch_a_breach(tmp_path):
    planted = {
        "src/polyhead/mask.py": "\n" * MAX_LINES,
        "src/polyhead/long.py": "\n" * (MAX_LINES + 1),
        "src/polyhead/look/utils.py": "",
        "csrc/isa.cpp": 'getenv("ISA")',
        "csrc/tiles/tile.hpp": 'getenv("ROWS")' + "\n" * (MAX_LINES + 1),
        "examples/train.py": "",
        "examples/notes.ipynb": "",
        "scripts/lock.py": "",
        "tests/test_mask.py": "",
        "tests/test_mask_errors.py": "",
        "tests/test_look.py": "",
        "tests/test_repository.py": "",
        "tests/acceptance/test_promise.py": "",
        "tests/examples/test_train.py": "",
        "tests/examples/test_notes.py": "",
        "tests/scripts/test_lock.py": "",
        "tests/look/test_mask.py": "",
        "tests/look/test_mask_errors.py": "",
        "tests/test_masks.py": "",
    }
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert long_files(tmp_path) == ["long.py: 401", "tile.hpp: 401"]
    assert drawers(tmp_path) == ["utils.py"]
    assert settings(tmp_path) == ["tile.hpp"]
    assert stray_tests(tmp_path) == [
        "tests/look/test_mask.py",
        "tests/look/test_mask_errors.py",
        "tests/test_masks.py",
    ]


def check_links(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/check_links.py", root]
    return subprocess.run(command, capture_output=True, text=True, check=False)


GOOD_README = """\
# Title, with `code` & *more*
## Twice
## Twice
[a](docs/a.md) ![b](docs/b%20c.png "t") [c](#title-with-code--more) [d](docs/a.md#first)
[e](#twice-1) [f](docs) [g](https://example.invalid/none) `[h](none.md)` [i](<docs/b c.png>)

[j]: docs/a.md#here
```text
[k](none.md)
```
"""


@pytest.fixture
def documents(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text('# First\n<a id="here"></a> [up](../README.md)\n')
    (tmp_path / "docs/b c.png").touch()
    (tmp_path / "README.md").write_text(GOOD_README)
    return tmp_path


def test_links_that_lead_somewhere_pass(documents):
    result = check_links(documents)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("[x](docs/none.md)", "docs/none.md: no such file"),
        ("[two\nlines](none.md)", "none.md: no such file"),
        ('<img src="none.png">', "none.png: no such file"),
        ("[x]: none.md", "none.md: no such file"),
        ("[x](#none)", "#none: no such heading"),
        ("[x](#k)", "#k: no such heading"),
        ("[x](docs/a.md#second)", "docs/a.md#second: no such heading"),
        ("[x](../elsewhere.md)", "../elsewhere.md: leaves the repository"),
    ],
)
def test_a_broken_link_is_named_with_its_line(documents, link, reason):
    readme = documents / "README.md"
    readme.write_text(GOOD_README + link + "\n```text\n# k\n```\n")
    line = GOOD_README.count("\n") + 1 + link.count("\n")
    result = check_links(documents)
    assert result.stdout == f"README.md:{line}: {reason}\n"
    assert result.returncode == 1


def test_broken_links_are_found_in_every_document(documents):
    (documents / "docs/decisions").mkdir()
    (documents / "tests").mkdir()
    for name in ("CHANGELOG.md", "docs/deep.md", "tests/README.md"):
        (documents / name).write_text("[x](none.md)\n")
    (documents / "docs/decisions/0001-x.md").write_text("[x](none.md)\n")
    assert check_links(documents).stdout.splitlines() == [
        "CHANGELOG.md:1: none.md: no such file",
        "docs/decisions/0001-x.md:1: none.md: no such file",
        "docs/deep.md:1: none.md: no such file",
        "tests/README.md:1: none.md: no such file",
    ]


def test_the_version_is_that_of_pyproject():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert declared
    assert polyhead.__version__ == importlib.metadata.version("polyhead") == declared[1]


def optional_modules_imported_by(code: str) -> set[str]:
    """Return the packages of polyhead's extras that a fresh process holds after running `code`."""
    required = importlib.metadata.requires("polyhead") or []
    optional = {
        re.findall(r"[\w-]+", line)[0].replace("-", "_") for line in required if "extra ==" in line
    }
    loaded = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return (optional - {"polyhead"}) & set(loaded.stdout.split())


def test_importing_polyhead_imports_nothing_optional():
    assert optional_modules_imported_by("import polyhead") == set()
    assert optional_modules_imported_by("import polyhead, click, gguf") == {"click", "gguf"}


def test_the_tables_of_performance_are_those_of_the_runs():
    command = [sys.executable, ROOT / "scripts/write_performance.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.stdout == "docs/performance.md is current\n"


def test_importing_polyhead_loads_other_parts_on_use():
    loaded = subprocess.run(
        [sys.executable, "-c", "import polyhead, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    parts = {"check", "convert", "drop_in", "integrations", "look", "bench", "viewer", "cli"}
    assert parts & {name.split(".")[1] for name in loaded if name.startswith("polyhead.")} == set()
    for name in parts & set(polyhead.__all__):
        assert getattr(polyhead, name).__name__ == f"polyhead.{name}"
        assert name in dir(polyhead)


def test_importing_polyhead_adds_a_tenth_of_a_second():
    """Of the processor's time: others may be busy. Compiled once, as any installed package is."""
    code = (
        "import time, torch; begin = time.process_time(); import polyhead; "
        "print(time.process_time() - begin)"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    run = [sys.executable, "-c", code]
    options = {"capture_output": True, "text": True, "check": True, "env": environment}
    times = [float(subprocess.run(run, **options).stdout) for _ in range(4)]
    assert min(times[1:]) < 0.1, times


def test_version_without_metadata_is_no_error():
    code = (
        "import importlib.metadata as m\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version; import polyhead; print(polyhead.__version__)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout == "0+unknown\n"
