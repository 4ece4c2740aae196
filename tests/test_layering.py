"""The house keeps its order: imports go downward, no torch, names are told apart, the model fits a screen."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lowest first. A module imports from lower tiers, and within its own folder.
TIERS = [
    {"storage"},
    {"config"},
    {"machine", "hardware"},
    {"tokenizer"},
    {"sharding"},
    {"ops"},
    {"model"},
    {"experts"},
    {"checkpoint"},
    {"data"},
    {"jaxseek_convert"},
    {"decode"},
    {"engine", "api"},
    {"serve"},
    {"train"},
    {"rl"},
    {"recipes"},
    {"lab"},
    {"bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(TIERS) for name in names}
SOURCES = [*sorted((ROOT / "jaxseek").rglob("*.py")), *sorted((ROOT / "convert").rglob("*.py"))]
MODULES = [p for p in SOURCES if p != ROOT / "jaxseek" / "__init__.py"]  # which names what users import
REFERENCES = {"torch", "transformers", "tensorflow"}
TOP_LEVEL = {"__init__.py", "api.py", "hardware.py"}
NAMED_BY_VERB = {"cli", "bench"}  # their files bear the names of verbs and of what is timed
OPENING = re.compile(r"(Of|What|Whether|Where|As|That|For)\b")  # STYLE: a docstring opens with none of these


def label(path):
    return str(path.relative_to(ROOT))


def place(dotted):
    """`jaxseek.model.moe` is in `model`, `jaxseek_convert.table` in `jaxseek_convert`; others have none."""
    first, *rest = dotted.split(".")
    return first if first == "jaxseek_convert" else rest[0] if first == "jaxseek" and rest else None


def imports(path):
    """What a file imports other than for type checking: (dotted name, line, whether in a function)."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{label(path)}:{child.lineno} imports relatively"
                names = [child.module]
                if child.module == "jaxseek":
                    names = [f"jaxseek.{alias.name}" for alias in child.names]
                yield from ((name, child.lineno, inside) for name in names)
            yield from walk(child, inside or isinstance(child, ast.FunctionDef))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_go_downward_only(path):
    own = place(".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("convert."))
    assert own in LEVEL, f"{label(path)} has no tier in tests/test_layering.py"
    for name, line, _ in imports(path):
        other = place(name)
        if other is not None and other != own:
            assert LEVEL[other] < LEVEL[own], f"{label(path)}:{line} imports {name}, which is not below it"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_other_framework_is_imported(path):
    found = {name for name, _, _ in imports(path) if name.split(".")[0] in REFERENCES}
    if path.parent.name == "bench":  # compares with them where they are installed and the user asks for it
        assert not {n for n, _, inside in imports(path) if n.split(".")[0] in REFERENCES and not inside}
    else:
        assert not found


def test_the_package_has_rooms_and_a_few_files_at_its_door():
    assert {p.name for p in (ROOT / "jaxseek").glob("*.py")} <= TOP_LEVEL


def test_modules_of_different_rooms_have_different_names():
    rooms = defaultdict(set)
    for path in MODULES:
        room = place(".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("convert."))
        if room not in NAMED_BY_VERB and not path.stem.startswith("__"):
            rooms[path.stem].add(room)
    shared = {stem: sorted(found) for stem, found in rooms.items() if len(found) > 1}
    assert not shared


def test_tests_lie_in_rooms_and_have_names_of_their_own():
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if p.parent != ROOT / "tests"]
    rooms = {p.name for p in (ROOT / "jaxseek").iterdir() if (p / "__init__.py").exists()}
    folders = {p.relative_to(ROOT / "tests").parts[0] for p in files}
    assert folders <= rooms | {"convert", "parity"}
    names = [p.name for p in files]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


def docstrings(path):
    """(line, docstring) of a file's module, classes and functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


def test_docstrings_open_with_a_subject_or_a_verb():
    every = [(path, *found) for path in SOURCES for found in docstrings(path)]
    astray = [f"{label(p)}:{line}: {text.splitlines()[0]}" for p, line, text in every if OPENING.match(text)]
    assert len(astray) <= 0.02 * len(every), "\n".join(astray)


def test_the_config_needs_the_standard_library_alone():
    import sys

    own = {"jaxseek.storage.untrusted"}  # which needs no more either
    for path in ("config/model.py", "config/hf.py", "storage/untrusted.py"):
        found = imports(ROOT / "jaxseek" / path)
        names = {name for name, _, _ in found if place(name) != "config"} - own
        assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_the_model_fits_a_screen(method):
    tree = ast.parse((ROOT / "jaxseek" / "model" / "deepseek.py").read_text(encoding="utf-8"))
    model = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DeepSeek")
    function = next(n for n in model.body if isinstance(n, ast.FunctionDef) and n.name == method)
    assert function.end_lineno - function.lineno + 1 < 40
