"""The house rules that a machine can check: which room may import which, where torch is allowed, what files look like.

Run: `pytest tests/test_house.py`. The sources are parsed, not imported, so the rules hold for code no test runs.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "slimba"

# ARCHITECTURE.md draws this: a room may import the rooms listed, besides itself and `errors`.
MAY_IMPORT = {
    "formats": {"models.spec"},  # presets.py: the layouts of a whole model
    "models": {"checkpoints.checkpoint", "formats", "kernels.triton"},
    "kernels": set(),
    "data": set(),
    "checkpoints": {"formats", "models"},
    "runtime": {"checkpoints", "data", "formats", "models", "kernels"},
    "training": {"checkpoints", "data", "formats", "kernels.triton", "models", "recipes"},
    "recipes": set(),
    "assets": set(),
    "evaluation": {"runtime", "checkpoints", "data", "formats", "models"},
    "methods": {
        "kernels.triton",
        "training",
        "checkpoints",
        "data",
        "formats",
        "models",
        "recipes",
        "evaluation",
        "runtime",
    },
}
# What a base install runs: nothing here may import torch when it is imported, and only TORCH_INSIDE may at all.
TORCH_FREE = (
    "formats",
    "checkpoints",
    "runtime",
    "evaluation",
    "data",
    "cli",
    "errors.py",
    "__init__.py",
    "__main__.py",
)
TORCH_BACKENDS = ("runtime/backends/reference.py", "runtime/backends/cuda")
TORCH_INSIDE = ("checkpoints/", *TORCH_BACKENDS, "cli/", "evaluation/", "__init__.py")

SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = sorted(
    [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
)
CPP = sorted(p for p in PACKAGE.rglob("*") if p.suffix in {".cpp", ".hpp", ".h"})


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, *, module_level_only: bool = False) -> Iterator[str]:
    """Dotted names of every import; those under `if TYPE_CHECKING` are skipped, they import nothing at run time."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack += node.orelse
        elif not (module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            stack += ast.iter_child_nodes(node)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE], ids=name_of)
def test_dependencies_between_rooms_point_downwards(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room in {"cli", "integrations", "serving"}:
        return  # the top floor may use every room
    allowed = MAY_IMPORT[room] | {room, "errors", "__version__"}
    for name in imports(parsed(path)):
        if name.startswith("slimba."):
            inside = name.removeprefix("slimba.")
            assert any(inside == a or inside.startswith(a + ".") for a in allowed | {"_core"}), (
                f"{name_of(path)} imports {name}, but {room} may only import {', '.join(sorted(allowed))}"
            )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_torch_stays_out_of_what_a_base_install_imports(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    if not relative.startswith(TORCH_FREE) and relative != "models/spec.py":
        return
    heavy = {"torch", "transformers", "yaml", "pyarrow", "lm_eval"}
    top = {name.split(".")[0] for name in imports(parsed(path), module_level_only=True)}
    if not relative.startswith(TORCH_BACKENDS):
        assert not top & heavy, f"{name_of(path)} imports {top & heavy} when it is imported"
    if not relative.startswith(TORCH_INSIDE):
        anywhere = {name.split(".")[0] for name in imports(parsed(path))}
        assert "torch" not in anywhere, f"{name_of(path)} imports torch"


def test_the_run_verbs_import_with_torch_blocked() -> None:
    """The whole command line loads, and shows its help, where importing torch fails."""
    script = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "yaml", "pyarrow"):
    sys.modules[name] = None
import slimba, slimba.cli
for module in pkgutil.iter_modules(slimba.cli.__path__):
    importlib.import_module("slimba.cli." + module.name)
for name in ("formats", "checkpoints.reader", "checkpoints.packed", "runtime.load", "runtime.backends.cpu"):
    importlib.import_module("slimba." + name)
from typer.testing import CliRunner
from slimba.cli.main import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0, result.output
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_python_files_say_what_they_are_and_stay_short(path: Path) -> None:
    assert ast.get_docstring(parsed(path)), f"{name_of(path)} opens without a docstring"
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines < 400, f"{name_of(path)} has {lines} lines"


@pytest.mark.parametrize("path", CPP, ids=name_of)
def test_cpp_files_say_what_they_are_and_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(("//", "/*")), f"{name_of(path)} opens without a comment that says what it is"
    assert text.count("\n") < 400


@pytest.mark.parametrize("path", [*PYTHON, *CPP], ids=name_of)
def test_no_machine_paths_or_leftovers(path: Path) -> None:
    if path == Path(__file__).resolve():
        return
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"(?:^|[\s\"'=(])(/(?:work|root|home|opt/dev)/\S*)", text) + re.findall(
        r"\b(?:TODO|FIXME|XXX)\b", text
    )
    assert not found, f"{name_of(path)}: {found}"


def test_type_information_is_published() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_base_dependencies_hold_no_torch_and_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=!\[; ]", d)[0] for d in project["dependencies"]}
    assert names == {"numpy", "ml_dtypes", "safetensors", "tokenizers", "typer", "rich", "zstandard"}
    assert set(project["optional-dependencies"]) == {"train", "gpu", "serve", "eval", "datasets", "dev"}
    import slimba

    assert slimba.__version__ == project["version"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()


def test_imported_packages_are_declared() -> None:
    """Every third-party package that the product imports is a dependency of the base install or of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [d for group in [project["dependencies"], *project["optional-dependencies"].values()] for d in group]
    names = {re.split(r"[<>=!\[; ]", d)[0].lower().replace("-", "_") for d in declared}
    names |= {"yaml", "slimba", "huggingface_hub"}  # PyYAML's module; the hub client comes with tokenizers
    for path in SOURCES:
        for name in imports(parsed(path)):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top.lower() in names, f"{name_of(path)} imports {top}"


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def test_makefile_has_the_targets_that_ci_and_the_documents_use() -> None:
    targets = makefile_targets()
    assert {"demo", "test", "lint", "wheel", "venv", "clean"} <= targets
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"]
    for document in documents:
        for used in re.findall(r"(?:^|`|    )make ((?:[a-z]+ ?)+)", document.read_text(), flags=re.M):
            assert set(used.split()) <= targets, f"{document.name} says `make {used}`"


def test_readme_commands_exist() -> None:
    """Every `slimba VERB --flag` in a code block of the README and of docs/ is accepted by the command line."""
    from typer.main import get_command

    from slimba.cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    seen = set()
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text().replace("\\\n", " ")
        for verb, rest in re.findall(r"^ *(?:\$ )?(?:python -m )?slimba ([a-z]+)([^\n]*)$", text, flags=re.M):
            assert verb in commands, f"{document.name}: slimba has no verb {verb}"
            options = {o for p in commands[verb].params for o in [*p.opts, *p.secondary_opts]}
            rest = re.sub(r"\"[^\"]*\"|'[^']*'|#.*", "", rest)
            unknown = set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", rest)) - options
            assert not unknown, f"{document.name}: slimba {verb} has no {', '.join(sorted(unknown))}"
            seen.add(verb)
    assert seen >= {"demo", "generate", "compress", "eval", "inspect"}


def test_architecture_names_every_file() -> None:
    """ARCHITECTURE.md is a map: every source file is on it, and nothing that is not there."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in SOURCES:
        if path.name not in {"__init__.py", "__main__.py"}:
            assert re.search(rf"`(?:\S*/)?{re.escape(path.name)}`", text), f"{name_of(path)} is not in ARCHITECTURE.md"
    known = {p.name for p in ROOT.rglob("*") if ".venv" not in p.parts and ".git" not in p.parts}
    for name in re.findall(r"`(?:[\w/-]+/)?([\w-]+\.(?:py|cpp|h|hpp|md|yaml))`", text):
        assert name in known, f"ARCHITECTURE.md names {name}, which is not there"
