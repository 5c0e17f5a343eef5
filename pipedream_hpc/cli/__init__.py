"""The command `pipedream`: one thin file per command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipedream_hpc.cli import partition, probe, profile, simulate, trace, train, verify
from pipedream_hpc.cluster import abort
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.version import VERSION

app = typer.Typer(
    help="""Train one deep network over many devices by pipelining minibatches through stages.

    The way from a model to a trained one:

        pipedream profile train.py -o profile.json

        mpirun -n 4 pipedream probe -o topology.json

        pipedream partition profile.json --topology topology.json --straight -o plan.json

        mpirun -n 4 pipedream train train.py --plan plan.json
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (profile, probe, partition, simulate, train, trace, verify):
    app.command(name=command.__name__.rpartition(".")[2])(command.run)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pipedream {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; bad input ends in one sentence and exit status 2, on all ranks together."""
    try:
        app()
    except SystemExit as leaving:
        if leaving.code:
            abort.abort_others(leaving)
        raise
    except PipedreamError as error:
        if abort.installed():
            raise  # the hook says it, once for all ranks, and stops them
        sys.stderr.write(abort.message(error))
        sys.exit(abort.BAD_INPUT)
