"""Architecture as tests: import layers, purity of core, where torch may be, sizes, docstrings, and the README's map."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]
PACKAGES = ("stream_scorer", "esmm")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}
CORE = [name for name in TREES if name.startswith("stream_scorer/core/") or name == "esmm/batch.py"]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FILES = {  # exceptions: the size each may have at most, and why
    "esmm/model.py": 480,  # a model is one file: constructor, validation, forward and what DeepCTR-Torch users know
    "stream_scorer/trainer/loop.py": 460,  # the loop with its publishing and restart
}
LONG_FUNCTIONS: set[str] = set()

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _imports(tree: ast.Module) -> set[str]:
    out: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            out.add(node.module)
    return out


def _roots(tree: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in _imports(tree)}


def _calls(tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything called, as written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Definition, bool]]:
    """(qualified name, node, public) of classes and functions; what is inside a function is nobody else's."""
    stack: list[tuple[str, ast.AST, bool]] = [("", tree, True)]
    while stack:
        prefix, parent, public = stack.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{node.name}"
                shown = public and not node.name.startswith("_")
                yield name, node, shown
                if isinstance(node, ast.ClassDef):
                    stack.append((f"{name}.", node, shown))
            elif isinstance(node, ast.If | ast.Try):
                stack.append((prefix, node, public))


# ---- imports
def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out
    assert re.search(r"Contracts: ([6-9]|\d\d) kept, 0 broken", capsys.readouterr().out)


def test_torch_lives_in_esmm_only() -> None:
    assert [name for name, tree in TREES.items() if "torch" in _roots(tree) and not name.startswith("esmm/")] == []
    assert "torch" in _roots(TREES["esmm/model.py"])


def test_adapters_clients_stay_in_adapters() -> None:
    clients = {"confluent_kafka", "redis", "rocksdict"}
    homes = ("stream_scorer/adapters/", "stream_scorer/embedded/")
    assert [name for name, tree in TREES.items() if clients & _roots(tree) and not name.startswith(homes)] == []


def test_no_module_imports_from_a_package_it_is_in() -> None:
    """Every import cycle found in this field's codebases came from a child that imports from its own package."""
    bad = []
    for name, tree in TREES.items():
        parts = Path(name).parent.parts
        packages = {".".join(parts[: depth + 1]) for depth in range(len(parts))} - {"stream_scorer", "esmm"}
        bad += [
            f"{name}: {node.module}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and node.module in packages
            and any(f"{node.module.replace('.', '/')}/{alias.name}.py" not in TREES for alias in node.names)
        ]
    assert bad == []


def test_root_packages_import_nothing() -> None:
    for package in PACKAGES:
        assert _roots(TREES[f"{package}/__init__.py"]) & set(PACKAGES) == set()


# ---- purity and safety
def test_core_is_pure() -> None:
    impure = {
        "time", "datetime", "threading", "asyncio", "socket", "pathlib", "os", "io", "sys", "logging", "random",
        "secrets", "subprocess", "tempfile", "torch", "confluent_kafka", "redis", "structlog", "rocksdict",
        "multiprocessing",
    }  # fmt: skip
    assert len(CORE) > 8
    assert {name: _roots(TREES[name]) & impure for name in CORE if _roots(TREES[name]) & impure} == {}
    forbidden = {"open", "print", "input", "time.time", "datetime.now", "np.random.default_rng", "np.random.rand"}
    assert {name: set(_calls(TREES[name])) & forbidden for name in CORE if set(_calls(TREES[name])) & forbidden} == {}


def test_core_keeps_no_module_state() -> None:
    found = [f"{name}:{node.lineno}" for name in CORE for node in ast.walk(TREES[name]) if isinstance(node, ast.Global)]
    assert found == []


def test_no_pickle_no_torch_load_no_eval() -> None:
    modules = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    calls = {"torch.load", "eval", "exec", "np.load", "numpy.load", "__import__", "yaml.load", "os.system"}
    bad = {
        name: found for name, tree in TREES.items() if (found := (_roots(tree) & modules) | (set(_calls(tree)) & calls))
    }
    assert bad == {}
    shells = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) != "False"
    ]
    assert shells == []


def test_nothing_is_swallowed() -> None:
    """A bare except, or one that catches everything and does nothing, hides a failure."""
    bad = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            wide = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            if node.type is None or (wide and all(isinstance(step, ast.Pass) for step in node.body)):
                bad.append(f"{name}:{node.lineno}")
    assert bad == []


# ---- sizes and words
def test_files_are_small() -> None:
    sizes = {name: len((ROOT / name).read_text().splitlines()) for name in TREES}
    assert {name for name, size in sizes.items() if size > MAX_FILE_LINES} == set(LONG_FILES)
    assert {name: sizes[name] for name, limit in LONG_FILES.items() if sizes[name] > limit} == {}


def test_functions_are_short() -> None:
    long = {
        f"{name}:{qualified}"
        for name, tree in TREES.items()
        for qualified, node, _ in _definitions(tree)
        if not isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == LONG_FUNCTIONS


def test_public_names_have_docstrings() -> None:
    special = {"__init__", "__enter__", "__exit__"}
    bare = [
        f"{name}:{qualified}"
        for name, tree in TREES.items()
        for qualified, node, public in _definitions(tree)
        if public and node.name not in special and ast.get_docstring(node) is None and not _overload(node)
    ]
    bare += [name for name, tree in TREES.items() if tree.body and ast.get_docstring(tree) is None]
    assert bare == []


def _overload(node: Definition) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def test_no_catch_all_names() -> None:
    """A file or class called helper or manager says nothing about what it keeps."""
    vague = re.compile(r"(utils?|helpers?|misc|common|managers?)$", re.IGNORECASE)
    assert [name for name in TREES if vague.search(Path(name).stem)] == []
    classes = [
        f"{name}:{qualified}"
        for name, tree in TREES.items()
        for qualified, node, _ in _definitions(tree)
        if isinstance(node, ast.ClassDef) and vague.search(node.name)
    ]
    assert classes == []


# ---- what is in the repository
def _tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_machine_paths_registries_or_conflicts_in_tracked_files() -> None:
    # split so that this file does not find itself
    patterns = [
        "/wo" + r"rk/\w",
        "/ro" + r"ot/\w",
        r"/home/\w",
        "/Us" + r"ers/\w",
        "pypi" + r"\.org/simple",
        "files.python" + "hosted",
    ]
    patterns += ["registry.npm" + "js", "--index" + "-url +https?:", "^<{7} ", "^>{7} "]
    pattern = re.compile("|".join(patterns), re.MULTILINE)
    found = []
    for path in _tracked():
        if "vendor" in path.parts:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def test_no_large_or_built_file_is_tracked() -> None:
    large = [path.name for path in _tracked() if path.stat().st_size > 1_000_000]
    built = [path.name for path in _tracked() if path.suffix in {".pyc", ".so", ".whl", ".gz", ".safetensors"}]
    assert large + built == []


# ---- README
README = ROOT / "README.md"


def _life_of_an_event() -> str:
    text = README.read_text()
    section = text.split("## The life of an event", 1)
    assert len(section) == 2, "README has no section 'The life of an event'"
    return section[1].split("\n## ", 1)[0]


def test_every_file_in_the_life_of_an_event_exists() -> None:
    named = re.findall(r"`((?:stream_scorer|esmm)/[\w/]+\.py)`", _life_of_an_event())
    assert len(set(named)) >= 12
    assert [name for name in named if name not in TREES] == []


def test_every_name_in_the_life_of_an_event_exists_in_its_file() -> None:
    """A row names its file first, then names defined in it: `file.py` ... `name`."""
    rows = [line for line in _life_of_an_event().splitlines() if re.match(r"\| *\d", line)]
    assert len(rows) >= 13
    for row in rows:
        files = re.findall(r"`((?:stream_scorer|esmm)/[\w/]+\.py)`", row)
        assert files, row
        defined = {qualified.split(".")[-1] for name in files for qualified, _, _ in _definitions(TREES[name])}
        for name in re.findall(r"`(\w+)\(?\)?`", row.split("|")[3]):
            assert name in defined, f"{name} is not defined in {files}: {row}"


def test_every_local_link_and_command_in_readme_resolves() -> None:
    text = README.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert "demo" in used
    assert used - targets == set()
