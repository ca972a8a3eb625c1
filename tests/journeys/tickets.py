"""tickets.csv of journey 1: 900 real requests and the team that each went to.

The requests are Dolly's (people wrote them), the team is the category that they filed them under. 883 rows of four teams, three rows
of a fifth (`legal`), and 14 rows that are there twice.

    python tests/journeys/tickets.py ../shared tickets.csv
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
from pathlib import Path

TEAMS = {"sorting": ("classification", 340), "facts": ("open_qa", 280), "ideas": ("brainstorming", 180), "writing": ("creative_writing", 83)}
LEGAL = (
    "What is the difference between common law and civil law?",
    "What is the supreme law of the land?",
    "What is the fastest street legal car, actually demonstrated, in the world?",
)
TWICE = 14
LONGEST = 200  # characters of a request
COLUMNS = ("body", "team")


def requests(shared: Path) -> dict[str, list[str]]:
    """Category -> different short requests without a text of their own to work on, in the order of the file."""
    found: dict[str, dict[str, None]] = {}
    with gzip.open(shared / "data" / "dolly" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = row["instruction"].strip()
            if not row["input"] and len(text) <= LONGEST and text not in LEGAL:
                found.setdefault(row["category"], {})[text] = None
    taken = set()
    for texts in found.values():  # some requests are filed under two categories
        for text in [text for text in texts if text in taken]:
            del texts[text]
        taken |= set(texts)
    return {category: list(texts) for category, texts in found.items()}


def tickets(shared: Path) -> list[tuple[str, str]]:
    """900 rows (body, team), shuffled."""
    asked = requests(shared)
    rows = [(text, team) for team, (category, count) in TEAMS.items() for text in asked[category][:count]]
    rows += [(text, "legal") for text in LEGAL]
    rng = random.Random(0)
    rows += rng.sample([row for row in rows if row[1] != "legal"], TWICE)
    rng.shuffle(rows)
    return rows


def new_tickets(shared: Path, count: int = 20) -> list[str]:
    """Requests that are in no ticket."""
    asked = requests(shared)
    rest = [text for category, used in TEAMS.values() for text in asked[category][used : used + count]]
    return random.Random(1).sample(rest, count)


def write(path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


if __name__ == "__main__":
    write(Path(sys.argv[2]), tickets(Path(sys.argv[1])))
