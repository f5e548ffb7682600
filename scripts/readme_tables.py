"""Put the tables of results/ between their marks in README.md and docs/: `python scripts/readme_tables.py`.

A place is marked `<!-- table: NAME -->` ... `<!-- end -->`; results/NAME/table.md, which scripts/reproduce.py or
another script that measures writes, holds the table. `<!-- table: NAME/OTHER -->` is for results/NAME/OTHER.md, which
scripts/method_tables.py writes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("method", "rivals", "tasks")))
WRITERS = {"auto": "auto_accuracy.py", "few-shot": "few_shot.py", "zero-shot": "zero_shot.py"}
"""Tables that are no suite's -> the script that measures."""
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def only_table(text: str) -> str:
    """Return the lines of a Markdown table without the notes around it."""
    return "".join(line + "\n" for line in text.splitlines() if line.startswith("|"))


def filled(text: str, results: Path) -> str:
    """Return a page whose marked places hold the tables of `results`."""

    def table(place: re.Match[str]) -> str:
        path = results / (f"{place[2]}.md" if "/" in place[2] else f"{place[2]}/table.md")
        if not path.is_file():
            writer = "method_tables.py" if "/" in place[2] else WRITERS.get(place[2], "reproduce.py")
            raise SystemExit(f"{path}: no such file; scripts/{writer} writes it")
        text = path.read_text(encoding="utf-8")
        return f"{place[1]}\n{only_table(text) or text}\n{place[3]}"

    return PLACE.sub(table, text)


def main() -> None:
    """Write the pages again."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if not PLACE.search(text):
            sys.exit(f"{path}: no place is marked <!-- table: NAME --> ... <!-- end -->")
        path.write_text(filled(text, ROOT / "results"), encoding="utf-8")


if __name__ == "__main__":
    main()
