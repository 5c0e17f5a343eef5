"""The documents show what the repository holds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from pipedream_hpc.cli import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = (
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "slurm/README.md", "benchmarks/RESULTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

#: Options of mpirun that documents name by themselves.
LAUNCHERS = {"--bind-to", "--oversubscribe"}
#: Folders that documents name files of.
FOLDERS = "tests|examples|benchmarks|pipedream_hpc|docs|csrc|slurm"


def in_documents() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def shown_commands(text: str) -> list[str]:
    """Return the `pipedream ...` commands of indented lines, without their comments."""
    return [line.split("#")[0] for line in re.findall(r"^ +(?:\S+ )*?(pipedream [a-z].*)$", text, re.M)]


def check_command(line: str) -> None:
    """Check that the command exists, and that it has the options."""
    name, *words = shlex.split(line)[1:]
    assert name in COMMANDS, line
    known = {option for each in COMMANDS[name].params for option in (*each.opts, *each.secondary_opts)}
    own_words = words[: words.index("--")] if "--" in words else words
    assert {word for word in own_words if word.startswith("-")} <= known, line


def test_the_users_own_program_is_shown_whole_and_is_short() -> None:
    program = (ROOT / "examples" / "digits.py").read_text()
    assert f"```python\n{program}```" in README.read_text()
    assert len(program.splitlines()) < 60


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@in_documents()
def test_commands_in_documents_parse(document: Path) -> None:
    """No option was renamed without its documents."""
    for line in shown_commands(document.read_text()):
        check_command(line)


def test_commands_in_help_texts_parse() -> None:
    shown = [line for command in COMMANDS.values() for line in shown_commands(command.help or "")]
    assert len(shown) > 10
    for line in shown:
        check_command(line)


def test_readme_and_docs_show_every_command() -> None:
    shown = {shlex.split(line)[1] for document in DOCUMENTS for line in shown_commands(document.read_text())}
    assert shown == set(COMMANDS)


@in_documents()
def test_options_named_in_documents_exist(document: Path) -> None:
    """An option or a command in backquotes, such as `--plan 4`, is one of ours, or an option of a launcher."""
    text = document.read_text()
    for line in re.findall(r"`(pipedream [a-z]+(?: [^`\n]*)?)`", text):
        check_command(line)
    known = {option for command in COMMANDS.values() for each in command.params for option in each.opts}
    known |= {option for command in COMMANDS.values() for each in command.params for option in each.secondary_opts}
    if document.parent.name not in ("slurm", "benchmarks"):  # options of Slurm, and of the benchmarks
        assert set(re.findall(r"`(--[a-z][a-z-]*)", text)) - LAUNCHERS <= known


@in_documents()
def test_files_named_in_documents_exist(document: Path) -> None:
    """Paths in backquotes are relative to the repository, targets of links to the document."""
    text = document.read_text()
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
        assert re.match(r"https?://", target) or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", ["CONTRIBUTING.md"])
def test_modules_named_in_tables_exist(document: str) -> None:
    """Rows name modules relative to the package, the glossary also relative to the runtime."""
    rows = [line for line in (ROOT / document).read_text().splitlines() if line.startswith("| ")]
    named = re.findall(rf"`(?!(?:{FOLDERS})/)([a-z_]+/[a-z_/]+)(?:\.\w+)?`", "\n".join(rows))
    assert len(named) > 15
    for name in named:
        places = [ROOT / "pipedream_hpc" / room / name for room in (".", "runtime")]
        assert any(place.with_suffix(".py").exists() or place.is_dir() for place in places), name


def test_the_map_names_every_module() -> None:
    """The map of CONTRIBUTING has every module; those of the zoo and the commands have only their folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    words = set(re.findall(r"\w+", text[text.index("## The map") : text.index("## Import rules")]))
    paths = [path.relative_to(ROOT / "pipedream_hpc") for path in (ROOT / "pipedream_hpc").rglob("*.py")]
    named = [path for path in paths if path.parts[0] not in ("zoo", "cli") and not path.name.startswith("__")]
    assert {path.stem for path in named} - {"version"} <= words
