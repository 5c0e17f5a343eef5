"""What README shows is what the repository holds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer.main

from pipedream_hpc.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_users_own_program_is_shown_whole_and_is_short() -> None:
    program = (ROOT / "examples" / "digits.py").read_text()
    assert program in README
    assert len(program.splitlines()) < 60


def test_every_command_shown_exists_with_its_options() -> None:
    """Commands of README and of the help texts parse: no option was renamed behind their back."""
    group = typer.main.get_command(app)
    texts = [README, *(command.help or "" for command in group.commands.values())]  # type: ignore[attr-defined]
    shown = [line.split("#")[0] for text in texts for line in re.findall(r"^ +(?:\S+ )*?(pipedream .*)$", text, re.M)]
    assert len(shown) > 10
    for line in shown:
        name, *words = shlex.split(line)[1:]
        command = group.commands[name]  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        before_job = words[: words.index("--")] if "--" in words else words
        assert {word for word in before_job if word.startswith("-")} <= known, line


def test_files_named_in_the_documents_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for path in re.findall(r"[`(]((?:tests|examples|benchmarks|pipedream_hpc|docs|csrc|slurm)/[\w./]+)[`)]", text):
            assert (ROOT / path.rstrip("/")).exists(), f"{document} names {path}"
