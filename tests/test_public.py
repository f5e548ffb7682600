"""What the package promises: its names, which module may see which, and what importing costs."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import unolora

SOURCE = Path(unolora.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# module -> what of the package it may import; `errors` may be imported by all
ALLOWED = {
    "errors": set(),
    "config": set(),
    "fused": set(),
    "layer": {"fused"},
    "hypernetwork": set(),
    "words": {"hypernetwork"},
    "checkpoint": {"config"},
    "quantise": set(),
    "conditioning": {"config", "hypernetwork", "layer", "words"},
    "model": {"checkpoint", "conditioning", "config", "hypernetwork", "layer", "quantise", "words"},
    "atomic": set(),
    "lock": {"atomic"},
    "processes": set(),
    "recovery": {"atomic", "runs", "settings", "tasks"},
    "sampling": set(),
    "metrics": {"tasks"},
    "tasks": {"atomic"},
    "methods": {"config", "layer", "model", "settings", "words"},
    "settings": {"config", "methods", "sampling"},
    "heads": {"hypernetwork", "methods", "tasks"},
    "tokens": {"atomic"},
    "data": {"sampling", "tasks", "tokens"},
    "text": {"data", "heads", "methods", "metrics", "tasks", "tokens", "vocabulary"},
    "vocabulary": set(),
    "runs": {
        "atomic", "checkpoint", "config", "data", "doctor", "fused", "heads", "methods", "processes", "quantise",
        "settings", "tasks", "text", "words",
    },
    "card": {"metrics", "settings", "tasks"},
    "hub": {"card", "runs", "tasks"},
    "scoring": {"data", "metrics", "processes", "runs", "tasks", "text"},
    "serving": {"atomic", "data", "layer", "methods", "model", "runs", "scoring", "tasks", "text", "words"},
    "compare": {"charts", "metrics", "runs", "settings"},
    "charts": set(),
    "gradients": set(),
    "rates": set(),
    "analysis": {
        "atomic", "charts", "compare", "config", "data", "gradients", "layer", "runs", "scoring", "tasks"
    },
    "report": {"analysis", "atomic", "charts", "compare", "metrics", "runs"},
    "progress": {"trainer"},
    "doctor": {"tasks"},
    "bench": {
        "atomic", "charts", "config", "data", "doctor", "fused", "heads", "methods", "model", "report", "runs",
        "run_folder", "sampling", "scoring", "serving", "settings", "tasks", "text", "tokens", "trainer",
    },
    "trainer": {
        "atomic", "data", "gradients", "metrics", "processes", "rates", "recovery", "runs", "sampling", "scoring",
        "settings", "tasks",
    },
    "run_folder": {"atomic", "card", "lock", "processes", "recovery", "runs", "settings", "tasks"},
    "results": {"methods", "metrics", "tasks", "trainer"},
    "training": {
        "analysis", "data", "heads", "methods", "processes", "quantise", "recovery", "report", "results",
        "run_folder", "runs", "scoring", "settings", "tasks", "trainer",
    },
    "auto": {"data", "hypernetwork", "runs", "scoring", "tasks", "text"},
    "importing": {"atomic", "config", "runs"},
    "static_scale": {"data", "heads", "layer", "methods", "runs", "text"},
    "onnx_graph": {"hypernetwork"},
    "howto": {"runs", "tasks", "text"},
    "export": {
        "atomic", "config", "data", "heads", "howto", "methods", "metrics", "onnx_graph", "quantise", "runs",
        "scoring", "static_scale", "tasks", "text",
    },
    "grow": {
        "atomic", "card", "data", "heads", "hypernetwork", "metrics", "quantise", "recovery", "report",
        "results", "run_folder", "runs", "scoring", "settings", "tasks", "text", "trainer", "training",
    },
    "arguments": {"runs", "settings"},
    "tables": {"metrics"},
    "cli": {
        "analysis", "arguments", "auto", "bench", "compare", "doctor", "export", "grow", "hub", "importing", "metrics",
        "processes", "progress", "report", "runs", "scoring", "serving", "tables", "tasks", "trainer", "training",
    },
}  # fmt: skip
RICH = {"cli", "doctor", "progress", "tables"}


def name_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path):
    """Every module that a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_public_names():
    assert unolora.__all__ == sorted(unolora.__all__)
    assert len(unolora.__all__) <= 15
    for name in unolora.__all__:
        assert getattr(unolora, name) is not None
    modules = {name for name in vars(unolora) if isinstance(getattr(unolora, name), type(os))}
    public = {name for name in vars(unolora) if not name.startswith("_")} - modules
    assert public == set(unolora.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    name = name_of(path)
    if name in ("__init__", "__main__"):
        return
    seen = {module.split(".")[1] for module in imports(path) if module.startswith("unolora.")}
    assert seen - {name, "errors"} <= ALLOWED[name]


def test_every_module_is_in_the_table():
    assert {name_of(path) for path in FILES} - {"__init__", "__main__"} == set(ALLOWED)


def test_the_table_has_no_circle():
    """Beside the two that are types only: methods see settings, which list the methods."""
    edges = {name: set(seen) for name, seen in ALLOWED.items()}
    edges["methods"].discard("settings")
    edges["progress"].discard("trainer")
    done = []
    while edges:
        free = sorted(name for name, seen in edges.items() if seen <= set(done))
        assert free, edges
        done += free
        for name in free:
            del edges[name]


@pytest.mark.parametrize("module", ["methods", "progress", "metrics"])
def test_imports_for_types_stay_for_types(module):
    """`methods` -> settings, `progress` -> trainer and `metrics` -> tasks only under TYPE_CHECKING."""
    paths = [path for path in FILES if name_of(path) == module]
    forbidden = {"methods": "unolora.settings", "progress": "unolora.trainer", "metrics": "unolora.tasks"}[module]
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
        tree.body = [node for node in tree.body if node not in guarded]
        found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not any(name.startswith(forbidden) for name in found), path


def test_only_the_command_line_draws():
    users = {name_of(path) for path in FILES if any(m.split(".")[0] == "rich" for m in imports(path))}
    assert users
    assert users <= RICH


def test_nothing_prints_and_nothing_is_pickled():
    for path in [*FILES, SOURCE.parent / "unolora_cli.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not names & {"print", "eval", "exec", "breakpoint"}, path
        attributes = {f"{getattr(n.value, 'id', '')}.{n.attr}" for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not attributes & {"torch.load", "torch.save", "pickle.load", "pickle.dump", "yaml.load"}, path
        assert "pickle" not in set(imports(path)), path
        assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path


def test_every_module_imports_alone():
    for path in FILES:
        if path.name != "__main__.py":
            name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
            assert importlib.import_module(name)


def test_importing_the_package_leaves_the_heavy_rest_alone():
    """PEFT brings torch and transformers; data sets, tables, scores and figures come when they are needed."""
    heavy = ["datasets", "pandas", "sklearn", "scipy", "plotly", "rich", "jinja2", "jsonargparse", "yaml"]
    code = (
        "import sys, peft, transformers; before = set(sys.modules); import unolora; "
        f"print(sorted({{name.split('.')[0] for name in set(sys.modules) - before}} & set({heavy})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_is_typed():
    assert (SOURCE / "py.typed").is_file()
