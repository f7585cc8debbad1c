"""What .ci/run needs from Python: the commands of README.md, and what a log or a report counts.

    python .ci/readme.py blocks README.md FOLDER    write each `sh` block to FOLDER/1.sh, FOLDER/2.long.sh, ...
    python .ci/readme.py options FILE...            check that the commands in these files have these options
    python .ci/readme.py notebooks LOG TOTAL        print how many notebooks nbdev_test passed and failed
    python .ci/readme.py junit REPORT...            print how many tests pytest passed and failed

Needs nothing but Python's standard library, because it runs before the environment exists.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

FENCE = re.compile(r"^```sh\b([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(
    readme: str,  # path of a Markdown file
    folder: str,  # folder for the scripts
) -> None:
    """Write each `sh` block to a script; `{.long}` after `sh` makes it `*.long.sh`."""
    found = FENCE.findall(Path(readme).read_text(encoding="utf-8"))
    for number, (info, code) in enumerate(found, 1):
        kind = ".long.sh" if ".long" in info else ".sh"
        Path(folder, f"{number}{kind}").write_text(code, encoding="utf-8")


def commands(
    code: str,  # a shell script
) -> list[list[str]]:  # the words of each simple command
    """Split a script into its simple commands."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


def options(
    *paths: str,  # shell scripts
) -> None:
    """Run each command with `--help`; fail if it does not exist or its help lacks an option."""
    for path in paths:
        for words in commands(Path(path).read_text(encoding="utf-8")):
            start = next(
                (i for i, word in enumerate(words) if word.startswith("-")), len(words)
            )
            asked = [*words[:start], "--help"]
            done = subprocess.run(asked, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{shlex.join(asked)} failed: {done.stderr.strip()}")
            for word in words[start:]:
                option = word.partition("=")[0]
                if option.startswith("-") and not re.search(
                    rf"(?<![\w-]){re.escape(option)}(?![\w-])", done.stdout
                ):
                    sys.exit(f"{shlex.join(asked)} does not list {option}")
            print(f"{shlex.join(words)}: these options exist")


def notebooks(
    log: str,  # what nbdev_test printed
    total: str,  # number of notebooks
) -> None:
    """Print how many notebooks passed and failed; nothing if nbdev_test did not run."""
    text = Path(log).read_text(encoding="utf-8", errors="replace")
    failed = re.search(
        r"^nbdev Tests Failed On .*\n=+\n((?:\s+\S+\.ipynb\n?)+)", text, re.MULTILINE
    )
    if failed:
        count = len(failed[1].split())
        print(int(total) - count, count)
    elif re.search(r"^Success\.$", text, re.MULTILINE):
        print(total, 0)


def junit(
    *paths: str,  # JUnit reports, of which some may not exist
) -> None:
    """Print how many tests passed and failed; nothing if there is no report."""
    suites = []
    for path in filter(Path.exists, map(Path, paths)):
        suites += ElementTree.parse(path).getroot().iter("testsuite")
    if suites:
        total, failures, errors, skipped = (
            sum(int(suite.get(name)) for suite in suites)
            for name in ("tests", "failures", "errors", "skipped")
        )
        print(total - failures - errors - skipped, failures + errors)


if __name__ == "__main__":
    task = {f.__name__: f for f in (blocks, options, notebooks, junit)}[sys.argv[1]]
    task(*sys.argv[2:])
