"""The table of faults that the page on checkpoints shows, and its rows for several processes."""

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "nbs" / "results" / "faults.json"
TOGETHER, STUDIES = "Several processes", "Studies with parallel runs"  # their groups


def plain(text: str) -> str:
    "Return the last line of a text, without paths, process numbers and steps."
    text = text.strip().splitlines()[-1] if text.strip() else "no message"
    text = re.sub(r"(/[\w.+-]+)+/run(-\d)?\b", "FOLDER", text)
    text = re.sub(r"step-\d+", "step-N", text)
    for package in ("torch", "albumentations", "numpy"):
        text = text.replace(f"is '{version(package)}'", "is '…'")
    text = re.sub(r"pid(\(s\))? [\d, ]+\d", "pid N", text)
    return re.sub(r"\.\d+\.part", ".part", text)


def check_row(group: str, fault: str, message: str, on_disk: str) -> None:
    "Compare a row of the table with a fault that was tested, or write it on request."
    text = re.sub(r"\b(epoch|batch|after|seed) \d+", r"\1 N", plain(message))
    text = re.sub(r"worker \d \(process \d+\)", "worker N (process N)", text)
    text = re.sub(r"'[0-9a-f]{32}'", "'…'", text)
    text = re.sub(r"processes 1 and 0", "processes 0 and 1", text)
    row = {"a user sees": text, "on the disk": on_disk}
    table = json.loads(TABLE.read_text())
    rows = table.setdefault("together", {}).setdefault(group, {})
    if os.environ.get("ERA_S10_FAULTS") and rows.get(fault) != row:
        rows[fault] = row
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    assert rows.get(fault) == row
