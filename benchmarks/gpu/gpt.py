"""A GPT of about a billion parameters in bfloat16 with float32 masters, in stages that share one GPU or have one each.

    python benchmarks/gpu/gpt.py                              2 stages, 1F1B, AdamW
    python benchmarks/gpu/gpt.py --device cpu --layers 2 --width 64 --vocabulary 100 --sequence 16   to try it out

Plans evenly, trains, and prints tokens per second, the memory by part, and the route that boundary tensors took.
Two ranks on one GPU take turns on it: what this shows is that it runs, and what it needs,
not how fast a pipeline over two GPUs is. The same model in one stage on one rank stands beside it.
The file is also the job: `pipedream train benchmarks/gpu/gpt.py --plan 2 --master-weights`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipedream_hpc import Job
from pipedream_hpc.zoo import gpt

BIN = Path(sys.executable).parent


def sizes(parser: argparse.ArgumentParser) -> None:
    """1.05 billion parameters by default."""
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=30)


def job(args: list[str]) -> Job:
    """What `pipedream train` asks for: random tokens, next-token loss in float32."""
    parser = argparse.ArgumentParser(prog="gpt.py")
    sizes(parser)
    wanted = parser.parse_args(args)
    torch.manual_seed(0)
    tokens = torch.randint(0, wanted.vocabulary, (wanted.batch, wanted.sequence))

    network = gpt(
        layers=wanted.layers,
        width=wanted.width,
        heads=max(1, wanted.width // 128),
        vocabulary=wanted.vocabulary,
        sequence=wanted.sequence,
        tied=False,
    ).bfloat16()
    return Job(
        network,
        next_token,
        partial(torch.optim.AdamW, lr=1e-4),
        train_loader=[(tokens, tokens)] * wanted.minibatches,
        example_inputs=tokens,
    )


def next_token(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy: (samples, length, words), (samples, length) -> ()."""
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("gpt-out"))
    options = parser.parse_args()
    names = ("layers", "width", "vocabulary", "sequence", "batch", "minibatches")
    own = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    environment = {"PIPEDREAM_SHARE_GPUS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    for stages in sorted({1, options.stages}):
        out = options.out / f"{stages}-stages"
        command = ["mpirun", "-n", str(stages), "--oversubscribe", "--bind-to", "none", "pipedream", "train", __file__]
        command += ["--plan", "-".join(["1"] * stages), "--epochs", "2", "--master-weights", "--device", options.device]
        subprocess.run([*command, "--out", str(out), "--", *own], env=environment, check=True)
        summary = json.loads((out / "summary.json").read_text())
        seconds = summary["minibatch_ms"] / 1e3
        tokens = options.batch * options.sequence
        print(f"{stages} stages: {seconds * 1e3:.1f} ms per minibatch, {tokens / seconds:.0f} tokens per second")


if __name__ == "__main__":
    main()
