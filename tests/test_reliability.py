"""docs/reliability.md names tests that exist, and each promise has one."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("| promise", "|---"))]


def functions(file):
    return {
        node.name for node in ast.parse((TESTS / file).read_text("utf-8")).body if isinstance(node, ast.FunctionDef)
    }


def test_each_promise_names_tests_that_exist():
    assert len(ROWS) > 20
    for row in ROWS:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, f"no test: {row}"
        for file, name in named:
            assert name in functions(file), f"{file} has no {name}"


def test_what_is_not_promised_is_said():
    assert "## Not promised" in PAGE
