"""pipedream partition"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from pipedream_hpc.planning.topology import Topology

_DEVICES, _PLANNING, _OUTPUT = "Devices", "Planning", "Output"


def run(
    profile: Annotated[Path, typer.Argument(help="A profile written by `pipedream profile`.")],
    topology: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--topology", "-t", help="A topology written by `pipedream probe`.", rich_help_panel=_DEVICES),
    ] = None,
    devices: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Instead of --topology: the number of devices, or the count of every level, innermost first: 8x2 is "
            "two nodes of eight devices.",
            rich_help_panel=_DEVICES,
        ),
    ] = None,
    bandwidth: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="With --devices: bytes per second of every level, such as 30e9,3.125e9.", rich_help_panel=_DEVICES
        ),
    ] = None,
    latency: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --bandwidth: seconds per message of every level; default 0.", rich_help_panel=_DEVICES),
    ] = None,
    preset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="With --devices, instead of --bandwidth: name of a preset that defines links and memory.",
            rich_help_panel=_DEVICES,
        ),
    ] = None,
    memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Memory of one device in bytes; default: the topology's.", rich_help_panel=_DEVICES),
    ] = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Plan for minibatches of so many samples: the measured times and bytes are scaled.",
            rich_help_panel=_DEVICES,
        ),
    ] = None,
    compute_scale: Annotated[
        float,
        typer.Option(help="Factor on all times, such as 1.6 for a slower device.", rich_help_panel=_DEVICES),
    ] = 1.0,
    straight: Annotated[
        bool, typer.Option("--straight", help="One replica per stage, one stage per device.", rich_help_panel=_PLANNING)
    ] = False,
    fewer: Annotated[
        bool, typer.Option("--fewer", help="Allow plans that leave devices unused.", rich_help_panel=_PLANNING)
    ] = False,
    cost: Annotated[
        str,
        typer.Option(
            help="How communication is counted: ring (all-reduces overlap with computing), ring-no-overlap, "
            "paper2018 or reference_code (as the paper and its published code do).",
            rich_help_panel=_PLANNING,
        ),
    ] = "ring",
    schedule: Annotated[
        str,
        typer.Option(help="Schedule to plan memory for: 1f1b, 2bw, 1f1b-flush, gpipe.", rich_help_panel=_PLANNING),
    ] = "1f1b",
    n_microbatches: Annotated[
        int,
        typer.Option(
            help="Microbatches per minibatch, for all schedules except 1f1b.", min=1, rich_help_panel=_PLANNING
        ),
    ] = 1,
    optimizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Optimizer to plan memory for: sgd, momentum, adam, by the state that it keeps: none, one or two "
            "numbers per weight; append -bf16 for bfloat16 weights with float32 masters. Default: that of the profile, "
            "or momentum.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    recompute: Annotated[
        str,
        typer.Option(
            help="Whether stages run their forward again to save memory: never, auto, always.",
            rich_help_panel=_PLANNING,
        ),
    ] = "never",
    cut_after: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="End a stage after this layer; repeatable.", rich_help_panel=_PLANNING),
    ] = None,
    together: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Layers, or modules with all layers in them, A,B,... that must share a stage, such as "
            "model.embed_tokens,lm_head or model.layers.3; repeatable.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the plan.", rich_help_panel=_OUTPUT)
    ] = Path("plan.json"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all figures as JSON instead of the table.", rich_help_panel=_OUTPUT)
    ] = False,
    what_if: Annotated[
        bool,
        typer.Option("--what-if", help="Also plan for fewer devices and for other networks.", rich_help_panel=_OUTPUT),
    ] = False,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Plot the results of --what-if to this PNG file.", rich_help_panel=_OUTPUT),
    ] = None,
) -> None:
    """Cut a model into stages so that the slowest stage is as fast as possible.

    From the measured layers and links it decides which layers form a stage, how many replicas each
    stage gets, and on which ranks. It needs neither the model nor the devices.

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
    from pipedream_hpc.planning.scale import describe_scaling, scale_profile
    from pipedream_hpc.planning.solver import Request, solve
    from pipedream_hpc.planning.what_if import what_if as plan_cases

    if recompute not in ("never", "auto", "always"):
        raise PipedreamError(f"--recompute should be never, auto or always, not '{recompute}'")
    if memory is not None and not 0 < memory < float("inf"):
        raise PipedreamError(f"--memory should be a positive number of bytes, not {memory:g}")
    measured = load(Profile, profile)
    scaled = scale_profile(measured, minibatch=batch, compute=compute_scale)
    target = _topology(measured.device, topology, devices, bandwidth, latency, preset)
    request = Request(
        cost=cost,
        straight=straight,
        fewer=fewer,
        memory_bytes=None if memory is None else int(memory),
        optimizer=optimizer or scaled.optimizer or "momentum",
        recompute=recompute,  # type: ignore[arg-type]
        schedule=schedule,
        n_microbatches=n_microbatches,
        cut_after=cut_after or [],
        together=[names.split(",") for names in together or []],
    )
    plan = solve(scaled, target, request)
    plan = dataclasses.replace(plan, scaled=describe_scaling(measured, minibatch=batch, compute=compute_scale))
    save(plan, output)
    cases = plan_cases(scaled, target, request) if what_if or plot else []
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
    if optimizer is None and scaled.optimizer is None:
        console.print(
            "memory counts the state of SGD with momentum: the profile names no optimizer, so use --optimizer"
        )
    for sentence in explain.sentences(plan):
        console.print(sentence)
    if cases:
        console.print(explain.what_if_table(cases))
    if plot is not None:
        console.print(f"drawn to {plot}")
    console.print(f"written to {output}")


def _topology(
    device: str,
    topology: Path | None,
    devices: str | None,
    bandwidth: str | None,
    latency: str | None,
    preset: str | None,
) -> Topology:
    """Return the topology to plan for: a file, a preset, or one given on the command line."""
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.files import load
    from pipedream_hpc.planning import presets
    from pipedream_hpc.planning.topology import Topology, parse_counts, parse_topology

    if topology is not None and not (devices or bandwidth or latency or preset):
        return load(Topology, topology)
    if topology is not None or devices is None or (bandwidth is None) == (preset is None):
        raise PipedreamError(
            "partition needs to know the devices: give either --topology FILE, or --devices with either --bandwidth "
            "or --preset"
        )
    counts = parse_counts(devices)
    if bandwidth is not None:
        return parse_topology(counts, bandwidth, latency, device=device)
    if latency is not None:
        raise PipedreamError("--latency goes with --bandwidth: leave it out, since a preset has its own latencies")
    assert preset is not None
    return presets.preset(preset, counts)
