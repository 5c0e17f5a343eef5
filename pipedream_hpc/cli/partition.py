"""pipedream partition"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from pipedream_hpc.planning.profile import Profile
    from pipedream_hpc.planning.topology import Topology

_WHERE, _HOW, _OUT = "What to plan for", "How to plan", "What comes out"


def run(
    profile: Annotated[Path, typer.Argument(help="A profile that `pipedream profile` wrote.")],
    topology: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--topology", "-t", help="A topology that `pipedream probe` wrote.", rich_help_panel=_WHERE),
    ] = None,
    devices: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Instead of --topology: number of devices, or of each level from the inside out: 8x2 are two "
            "nodes of eight.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    bandwidth: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --devices: bytes per second, one per level: 30e9,3.125e9.", rich_help_panel=_WHERE),
    ] = None,
    latency: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --devices: seconds per message, one per level; 0 if left out.", rich_help_panel=_WHERE),
    ] = None,
    preset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --devices, instead of --bandwidth: links and memory by name.", rich_help_panel=_WHERE),
    ] = None,
    memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Bytes of memory of one device; otherwise the topology's.", rich_help_panel=_WHERE),
    ] = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Samples per minibatch, if not the profile's: scales it.", rich_help_panel=_WHERE),
    ] = None,
    compute_scale: Annotated[
        float, typer.Option(help="Factor on all times: 1.6 for a device that much slower.", rich_help_panel=_WHERE)
    ] = 1.0,
    straight: Annotated[
        bool, typer.Option("--straight", help="One replica per stage, one stage per device.", rich_help_panel=_HOW)
    ] = False,
    fewer: Annotated[bool, typer.Option("--fewer", help="Devices may be left unused.", rich_help_panel=_HOW)] = False,
    cost: Annotated[
        str,
        typer.Option(help="Cost formula: ring, ring-no-overlap, paper2018, reference_code.", rich_help_panel=_HOW),
    ] = "ring",
    schedule: Annotated[
        str, typer.Option(help="What the memory is planned for: 1f1b, 2bw, 1f1b-flush, gpipe.", rich_help_panel=_HOW)
    ] = "1f1b",
    microbatches: Annotated[
        int, typer.Option(help="Pieces per minibatch, for all schedules but 1f1b.", min=1, rich_help_panel=_HOW)
    ] = 1,
    optimizer: Annotated[
        str,
        typer.Option(
            help="For its memory: sgd, momentum, adam; with -bf16 for bfloat16 weights.", rich_help_panel=_HOW
        ),
    ] = "momentum",
    recompute: Annotated[
        str, typer.Option(help="Run forwards again to save memory: never, auto, always.", rich_help_panel=_HOW)
    ] = "never",
    cut_behind: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A stage ends behind this layer; repeatable.", rich_help_panel=_HOW),
    ] = None,
    together: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Layers a,b,... that must share a stage; repeatable.", rich_help_panel=_HOW),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the plan.", rich_help_panel=_OUT)
    ] = Path("plan.json"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every figure as JSON instead of the table.", rich_help_panel=_OUT)
    ] = False,
    what_if: Annotated[
        bool,
        typer.Option("--what-if", help="Plans for fewer devices and other networks as well.", rich_help_panel=_OUT),
    ] = False,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw --what-if as PNG.", rich_help_panel=_OUT),
    ] = None,
) -> None:
    """Cut a model into stages, so that the slowest stage is as fast as can be.

    From the measured layers and links it decides which layers make a stage, how many replicas each
    stage gets, and on which ranks. Neither the model nor the ranks are needed.

        pipedream partition profile.json --topology topology.json

        pipedream partition vgg16.json --devices 8x2 --bandwidth 30e9,3.125e9 --memory 16e9

        pipedream partition vgg16.json --devices 16 --preset cluster-b --what-if --plot what-if.png

    Next: pipedream simulate plan.json (predict the timeline), pipedream train ... --plan plan.json
    """
    import dataclasses

    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.files import load, save
    from pipedream_hpc.observe import explain, terminal
    from pipedream_hpc.planning.profile import Profile
    from pipedream_hpc.planning.scale import describe, scaled
    from pipedream_hpc.planning.solver import Request, solve
    from pipedream_hpc.planning.what_if import what_if as cases_of

    if recompute not in ("never", "auto", "always"):
        raise PipedreamError(f"--recompute should be never, auto or always, not '{recompute}'")
    if memory is not None and not 0 < memory < float("inf"):
        raise PipedreamError(f"--memory should be a positive number of bytes, not {memory:g}")
    measured = load(Profile, profile)
    layers = scaled(measured, minibatch=batch, compute=compute_scale)
    links = _topology(layers, topology, devices, bandwidth, latency, preset)
    request = Request(
        cost=cost,
        straight=straight,
        fewer=fewer,
        memory_bytes=None if memory is None else int(memory),
        optimizer=optimizer,
        recompute=recompute,  # type: ignore[arg-type]
        schedule=schedule,
        microbatches=microbatches,
        cut_behind=cut_behind or [],
        together=[names.split(",") for names in together or []],
    )
    plan = solve(layers, links, request)
    plan = dataclasses.replace(plan, scaled=describe(measured, minibatch=batch, compute=compute_scale))
    save(plan, output)
    cases = cases_of(layers, links, request) if what_if or plot else []
    if plot is not None:
        explain.draw_what_if(cases, plot)
    if as_json:
        figures = explain.report(plan)
        if cases:
            figures["what_if"] = explain.what_if_report(cases)
        typer.echo(json.dumps(figures, indent=1))
        return
    console = terminal.console()
    console.print(explain.stages_table(plan))
    for sentence in explain.sentences(plan):
        console.print(sentence)
    if cases:
        console.print(explain.what_if_table(cases))
    if plot is not None:
        console.print(f"drawn to {plot}")
    console.print(f"written to {output}")


def _topology(
    profile: Profile,
    topology: Path | None,
    devices: str | None,
    bandwidth: str | None,
    latency: str | None,
    preset: str | None,
) -> Topology:
    """What was asked to plan for."""
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.files import load
    from pipedream_hpc.planning import presets
    from pipedream_hpc.planning.profile import LONGEST_S
    from pipedream_hpc.planning.topology import SLOWEST, Level, Topology

    if topology is not None and not (devices or bandwidth or latency or preset):
        return load(Topology, topology)
    if topology is not None or devices is None or (bandwidth is None) == (preset is None):
        raise PipedreamError(
            "say what to plan for: either --topology FILE, or --devices with either --bandwidth or --preset"
        )
    counts = [_count(word, devices) for word in devices.lower().split("x")]
    if preset is not None:
        if latency is not None:
            raise PipedreamError("--latency goes with --bandwidth: a preset has its own")
        return presets.preset(preset, counts)
    assert bandwidth is not None
    bandwidths = _numbers("--bandwidth", bandwidth, len(counts))
    latencies = [0.0] * len(counts) if latency is None else _numbers("--latency", latency, len(counts))
    if min(bandwidths) < SLOWEST:
        raise PipedreamError(f"--bandwidth should be bytes per second, {SLOWEST:g} at least, not {min(bandwidths):g}")
    if not all(0 <= latency_s <= LONGEST_S for latency_s in latencies):
        raise PipedreamError(f"--latency should be seconds from 0 to {LONGEST_S:g}, not '{latency}'")
    names = ["network"] if len(counts) == 1 else ["node", "network", *(f"level{i}" for i in range(2, len(counts)))]
    levels = (Level(*each) for each in zip(names, counts, latencies, bandwidths, strict=False))
    return Topology(tuple(levels), device=profile.device)


def _count(word: str, text: str) -> int:
    from pipedream_hpc.errors import PipedreamError

    if not word.isascii() or not word.isdigit() or not 0 < int(word) <= 1 << 20:
        raise PipedreamError(
            f"--devices should be a number such as 16, or one per level such as 8x2, of 1 to {1 << 20} each, "
            f"not '{text}'"
        )
    return int(word)


def _numbers(option: str, text: str, count: int) -> list[float]:
    from pipedream_hpc.errors import PipedreamError

    words = text.split(",")
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise PipedreamError(f"{option} should be numbers with commas between, not '{text}'") from None
    if len(values) != count or not all(value < float("inf") for value in values):
        raise PipedreamError(f"{option} should be {count} number{'s' * (count > 1)}, one per level, not '{text}'")
    return values
