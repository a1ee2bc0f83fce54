"""Write the table of our configuration keys into the project's README, from config.py's comments.

python dev/config_table.py          # rewrite the table
python dev/config_table.py --check  # exit 1 if it is out of date (a test calls this)
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "jigsaw_d2" / "config.py"
README = ROOT / "projects" / "JigsawPretrain" / "README.md"
BEGIN, END = "<!-- config keys: begin -->", "<!-- config keys: end -->"
KEY = re.compile(r"\s+cfg\.([A-Z_0-9.]+) = (.+)")


def keys_of(source: str) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of each assignment in config.py; the meaning is the comment above it.

    A key directly below another shares its comment.
    """
    rows, comment, used = [], "", False
    for line in source.splitlines():
        text, match = line.strip(), KEY.match(line)
        if text.startswith("#"):
            said = text[1:].strip()
            comment = said if used or not comment else f"{comment} {said}"
            used = False
        elif match and "CfgNode()" not in line:
            rows.append((match[1], match[2], comment))
            used = True
        else:
            comment, used = "", False
    return rows


def table(rows: list[tuple[str, str, str]]) -> str:
    """Markdown table of the rows."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in rows]
    return "\n".join(lines)


def with_table(readme: str, rows: list[tuple[str, str, str]]) -> str:
    """``readme`` with the text between its two markers replaced by the table."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Rewrite the table, or with ``--check`` say whether it is current."""
    current = README.read_text()
    wanted = with_table(current, keys_of(CONFIG.read_text()))
    if "--check" in sys.argv[1:]:
        return int(wanted != current)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
