"""The house rules that a reader relies on, checked on the source: who may import whom, sizes, errors, docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdxl_eqx"
ROOMS = [
    "arrays",
    "config",
    "console",
    "flags",
    "kernels",
    "nn",
    "models",
    "weights",
    "diffusion",
    "data",
    "parallel",
    "loading",
    "sampling",
    "generation",
    "training",
    "conversion",
    "benchmarks",
]
"""A file imports from its own room and from those above it in this list."""

NEVER = {"transformers", "diffusers", "torch", "sdxl_eqx.config", "sdxl_eqx.flags", "sdxl_eqx.data"}
"""What the layers and models know nothing of."""

PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


def name(path: Path) -> str:
    """The path as a test shows it."""
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(path: Path) -> str:
    """The room a file of the package lies in: its folder, or its own name at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as absolute names (`from a import b` is both `a` and `a.b`)."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_within(module: str, package: str) -> bool:
    """Whether a module is a package or lies in it."""
    return module == package or module.startswith(package + ".")


def test_there_is_something_to_check_and_every_room_has_its_place_in_the_order():
    assert PACKAGE_FILES
    assert {room(path) for path in PACKAGE_FILES} - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name)
def test_a_file_imports_only_from_its_own_room_and_those_above(path: Path):
    allowed = ROOMS if room(path) == "__init__" else ROOMS[: ROOMS.index(room(path)) + 1]
    used = {module.split(".")[1] for module in imports(path) if module.startswith("sdxl_eqx.")}
    assert not (used & set(ROOMS)) - set(allowed), f"{name(path)} imports from rooms below its own"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name)
def test_the_package_imports_neither_scripts_nor_tests(path: Path):
    assert not {module for module in imports(path) if module.split(".")[0] in ("scripts", "tests")}


@pytest.mark.parametrize("path", [path for path in PACKAGE_FILES if room(path) in ("nn", "models")], ids=name)
def test_layers_and_models_know_no_checkpoint_library_no_config_and_no_data(path: Path):
    assert not {module for module in imports(path) if any(is_within(module, never) for never in NEVER)}


@pytest.mark.parametrize("path", [*PACKAGE_FILES, *SCRIPTS], ids=name)
def test_no_file_is_long(path: Path):
    limit = 60 if path in SCRIPTS else 400
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name)
def test_the_package_prints_nothing(path: Path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """Whether a handler names `Exception` or `BaseException`, alone or in a tuple."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in kinds)


def says_something(handler: ast.ExceptHandler) -> bool:
    """Whether a handler raises, or hands the exception it caught to a call (a log, a list of failures)."""
    inside = [node for statement in handler.body for node in ast.walk(statement)]
    if any(isinstance(node, ast.Raise) for node in inside):
        return True
    calls = [node for node in inside if isinstance(node, ast.Call)]
    if any(isinstance(call.func, ast.Attribute) and call.func.attr == "exception" for call in calls):
        return True
    names = [node for call in calls for node in ast.walk(call) if isinstance(node, ast.Name)]
    return any(node.id == handler.name for node in names)


@pytest.mark.parametrize("path", [*PACKAGE_FILES, *SCRIPTS], ids=name)
def test_no_exception_is_swallowed(path: Path):
    for handler in (node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler)):
        assert handler.type is not None, f"{name(path)}:{handler.lineno}: a bare except"
        if catches_everything(handler):
            assert says_something(handler), f"{name(path)}:{handler.lineno}: swallows every exception without a word"


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """The public classes, functions and methods without a docstring. Overrides and overloads say nothing new."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from undocumented(node.body, prefix)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if not ast.get_docstring(node) and not decorators & {"overload", "override"}:
            yield f"{prefix}{node.name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", [*PACKAGE_FILES, *SCRIPTS], ids=name)
def test_every_module_public_class_and_public_function_says_what_it_is(path: Path):
    module = tree(path)
    assert ast.get_docstring(module), f"{name(path)} has no docstring"
    assert not list(undocumented(module.body))
