"""The house as drawn: who may import whom, no hidden wiring, small files and functions."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paring.backends.targets import TARGETS
from paring.passes.base import Pass
from paring.passes.contract import Lossy
from paring.passes.pipelines import PIPELINES, pipeline

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
FLOORS = ("ir", "passes", "backends", "autotune", "frontends", "bench")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_ENVIRONMENT_VARIABLES = 3

# Which of our packages a folder may import. `frontends` is the importers; `api` is the public face, which sees all.
HOUSE = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "backends": {"ir", "backends"},
    "autotune": {"ir", "passes", "backends", "autotune"},
    "frontends": {"ir", "frontends"},
    # `paring bench` starts the benchmark.
    "frontends/api": {"ir", "passes", "backends", "autotune", "frontends", "api", "bench"},
    "bench": {"ir", "passes", "backends", "autotune", "frontends", "api", "bench"},
}
SERVICES = {"psutil", "filelock", "platformdirs", "pydantic"}
LIBRARIES = {
    "ir": {"numpy"},
    "passes": {"numpy", "safetensors", "networkx"},
    "backends": {"numpy", "safetensors", "networkx", "tvm", "tvm_ffi", *SERVICES},
    "autotune": {"numpy", "networkx", "tvm", "tvm_ffi", "cloudpickle", "xgboost", *SERVICES},
    "frontends": {"numpy", "torch"},
}
CHANGES = {"append", "extend", "insert", "update", "setdefault", "add", "pop", "clear"}
# Names of targets and of what tells them apart: what a pass must know of a target comes as its option.
TARGET = re.compile(r"\b(x86|arm|aarch64|cuda|neon|avx2|avx512|vnni|sm80|sm90|llvm)\b", re.IGNORECASE)


def folder_of(path: Path) -> str:
    """The floor that a file belongs to; the public face is one of its own."""
    parts = path.relative_to(ROOT).parts
    return "frontends/api" if parts[:2] == ("frontends", "api") else parts[0]


SOURCES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py") if "node_modules" not in p.parts)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in (*SOURCES, *TESTS)}


def place(path: Path, node: ast.AST | None = None) -> str:
    line = getattr(node, "lineno", None)
    return f"{path.relative_to(ROOT)}" + (f":{line}" if line else "")


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Each imported module's full name; for `from paring import x` that of x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module == "paring":
                yield from ((node, f"paring.{alias.name}") for alias in node.names)
            else:
                yield node, node.module or ""


def package_of(module: str) -> str:
    """`paring.ir.ops` is of `ir`; `paring` itself and its plain modules are the public face."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "api"


def test_no_bare_imports() -> None:
    """`import ir` would load a second copy of the package."""
    faults = [
        f"{place(path, node)} {name}" for path, tree in TREES.items() for node, name in imports(tree) if root(name) in FLOORS
    ]
    assert not faults


def root(module: str) -> str:
    return module.split(".")[0]


def test_arrows_are_as_drawn() -> None:
    ours = [(path, node, name) for path in SOURCES for node, name in imports(TREES[path]) if root(name) == "paring"]
    faults = [f"{place(path, node)} {name}" for path, node, name in ours if package_of(name) not in HOUSE[folder_of(path)]]
    assert not faults


def test_rooms_of_lossy_passes_share_what_lies_outside_of_them() -> None:
    """`channels`, `masks` and `quantization` do not know each other."""
    home = "paring.passes.compress."
    faults = []
    for path in SOURCES:
        room, *inner = module_of(path).removeprefix(home).split(".")
        if module_of(path).startswith(home) and inner:
            others = [name for _, name in imports(TREES[path]) if name.startswith(home) and name.count(".") > home.count(".")]
            faults += [f"{place(path)} {name}" for name in others if not name.startswith(f"{home}{room}.")]
    assert not faults


def test_libraries_stay_on_their_floors() -> None:
    faults = []
    for path in SOURCES:
        floor = folder_of(path)
        names = {root(name) for _, name in imports(TREES[path])} - {"paring", "__future__"} - sys.stdlib_module_names
        faults += [f"{place(path)} {name}" for name in names - LIBRARIES.get(floor, names)]
        if "torch" in names and floor not in ("frontends", "frontends/api", "bench"):
            faults.append(f"{place(path)} torch")
        if "tvm" in names and floor not in ("backends", "autotune", "bench"):
            faults.append(f"{place(path)} tvm")
    assert not faults


def test_no_import_inside_a_function_hides_a_cycle() -> None:
    """Below the public face, which imports what is heavy only when it is needed."""
    faults = []
    for path in SOURCES:
        functions = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        if folder_of(path) not in ("frontends/api", "bench"):
            faults += [f"{place(path, f)} {f.name}" for f in functions if any(root(n) == "paring" for _, n in imports(f))]
    assert not faults


def test_imports_have_no_cycle() -> None:
    """Over modules, by the imports at their top."""
    modules = {module_of(path): path for path in SOURCES}
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        top = ast.Module([n for n in TREES[path].body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        arrows[name] = {found for _, target in imports(top) for found in (target,) if found in modules and found != name}
    while arrows:
        free = {name for name, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"a cycle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def module_of(path: Path) -> str:
    parts = [p for p in path.relative_to(ROOT).with_suffix("").parts if p != "__init__"]
    return ".".join(["paring", *(parts[2:] if parts[:2] == ["frontends", "api"] else parts)])


def test_no_target_is_named_below() -> None:
    faults = []
    for path in SOURCES:
        if folder_of(path) not in ("ir", "passes"):
            continue
        nodes = list(ast.walk(TREES[path]))
        documented = [n for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef) and n.body]
        docstrings = {n.body[0].value for n in documented if isinstance(n.body[0], ast.Expr)}
        texts = [n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and n not in docstrings]
        faults += [f"{place(path, n)} {n.value!r}" for n in texts if TARGET.search(str(n.value))]
    assert not faults


def test_files_and_functions_are_small() -> None:
    faults = []
    for path, tree in TREES.items():
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            faults.append(f"{place(path)} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    faults.append(f"{place(path, node)} {node.name} has {length} lines")
    assert not faults


def environment_reads(tree: ast.AST) -> Iterator[str]:
    """Names read through os.environ or os.getenv, `?` for one that is not written there.

    Handing the whole environment to a child process is none, and neither is remembering a value to put it back.
    """
    restored = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and _restores(n)]
    own = {id(node) for function in restored for node in ast.walk(function)}
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=name, ctx=ast.Load()):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get" | "pop"), args=[name, *_]):
                pass
            case ast.Call(func=ast.Attribute(attr="getenv"), args=[name, *_]):
                pass
            case _:
                continue
        if id(node) not in own or isinstance(name, ast.Constant):
            yield str(name.value) if isinstance(name, ast.Constant) else "?"


def _restores(function: ast.AST) -> bool:
    """Whether a function sets variables that it also reads: `os.environ[name] = value` for a name that is not written there."""
    for node in ast.walk(function):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=ast.Name(), ctx=ast.Store()):
                return True
    return False


def test_there_are_few_environment_variables() -> None:
    found = {name for path in SOURCES for name in environment_reads(TREES[path])}
    assert "?" not in found, "a variable's name is written where it is read"
    assert len(found) <= MAX_ENVIRONMENT_VARIABLES, sorted(found)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("os.environ['A'] + os.getenv('B', '') + os.environ.get('C')", {"A", "B", "C"}),
        ("os.environ.get(name)", {"?"}),
        ("os.environ[name]", {"?"}),
        ("def f():\n    old = os.environ.get(name)\n    os.environ[name] = old", set()),
        ("def f():\n    old = os.environ.get('A')\n    os.environ[name] = old", {"A"}),
        ("run(env={**os.environ})", set()),
    ],
)
def test_reads_of_the_environment_are_seen(code: str, names: set[str]) -> None:
    assert set(environment_reads(ast.parse(code))) == names


def makes_lossy(tree: ast.AST) -> list[ast.Call]:
    """Where a Lossy contract is made."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [c for c in calls if (c.func.id if isinstance(c.func, ast.Name) else getattr(c.func, "attr", "")) == "Lossy"]


def is_lossy(cls: type[Pass]) -> bool:
    return isinstance(cls.contract, Lossy)


def test_lossy_passes_live_in_compress_and_run_only_if_asked_for() -> None:
    home = {ROOT / "passes" / "contract.py", *(ROOT / "passes" / "compress").rglob("*.py")}
    assert not [place(path, call) for path in SOURCES if path not in home for call in makes_lossy(TREES[path])]
    known = {module_of(path) for path in home}
    assert not [cls for cls in all_passes() if is_lossy(cls) and cls.__module__ not in known]
    assert not [name for name in PIPELINES if any(is_lossy(type(p)) for p in own_pipeline(name))]


def all_passes() -> list[type[Pass]]:
    """Every pass that the package has, in a table or not."""
    for path in SOURCES:
        if folder_of(path) == "passes":
            importlib.import_module(module_of(path))
    found, pending = [], [Pass]
    while pending:
        found.append(pending.pop())
        pending += found[-1].__subclasses__()
    return [cls for cls in found if cls.__module__.startswith("paring.passes.")]


def own_pipeline(name: str) -> tuple[Pass, ...]:
    return pipeline(name, TARGETS["x86-avx2"].pipeline_options())


@pytest.mark.parametrize("code", ["contract = Lossy('accuracy', 0.1)", "Rule(p, f, contracts.Lossy('a', 1.0))"])
def test_a_lossy_contract_is_seen(code: str) -> None:
    assert len(makes_lossy(ast.parse(code))) == 1


def test_no_global_statement_and_no_registry_filled_elsewhere() -> None:
    """No `global`, and no module's upper-case table is changed after it was written."""
    faults = []
    for path in SOURCES:
        for node in ast.walk(TREES[path]):
            match node:
                case ast.Global():
                    faults.append(f"{place(path, node)} global")
                case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name))]) if _is_table(name):
                    faults.append(f"{place(path, node)} {name}[...] = ...")
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method in CHANGES and _is_table(name):
                    faults.append(f"{place(path, node)} {name}.{method}")
    assert not faults


def _is_table(name: str) -> bool:
    return len(name) > 1 and re.fullmatch(r"_?[A-Z][A-Z0-9_]+", name) is not None


def test_every_package_is_listed_in_pyproject() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.relative_to(ROOT).as_posix() for p in SOURCES}
    assert {Path(folder).as_posix() for folder in listed["package-dir"].values()} == folders
    assert set(listed["packages"]) == set(listed["package-dir"])
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


def test_no_bare_tolerances() -> None:
    """A tolerance is a named number with a unit, not an argument found by trying."""
    faults = []
    for path in TESTS:
        for node in ast.walk(TREES[path]):
            match node:
                case ast.keyword(arg="rtol" | "atol" | "rel" | "abs", value=ast.Constant(value=value)) if value != 0:
                    faults.append(f"{place(path, node.value)} {node.arg}={value}")
    assert not faults


def test_the_testing_module_needs_neither_torch_nor_tvm() -> None:
    code = "import paring.testing, sys; print(sorted({'torch', 'tvm', 'hypothesis'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    assert done.stdout.strip() == "[]"
