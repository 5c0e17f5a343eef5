"""Measure a GPT-2 of Hugging Face's transformers: against its stages alone, and against torch.distributed.pipelining.

    python benchmarks/huggingface.py
    python benchmarks/huggingface.py --microbatches 4 8 16 --rounds 9

Starts two ranks itself, with one thread and one core each. All contenders train the same GPT2LMHeadModel on the same
sequences, cut before the same block, with plain SGD, and take turns. A minibatch is a microbatch of torch's:

- the stages alone: both ranks run forward, backward and update of their own blocks repeatedly and at the same time, in
  a plain loop without communication: no pipeline of these stages can be faster.
- pipedream_hpc: asynchronous 1F1B on whole minibatches, and synchronous 1F1B-flush on as many microbatches as torch.
- torch: `pipeline(model, split_spec=...)`, which cuts the model as torch.export traces it, and Schedule1F1B over gloo.

Input and output embeddings are not tied: torch gives each stage a copy of its own, and trains another model. The
synchronous schedules have to put out the same losses, else the comparison is refused.

Required: asynchronous 1F1B reaches at least 0.95 of the throughput of its stages alone, and at least 1.15 times that of
torch with 8 microbatches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from launch import on_two_ranks
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

MIN_OF_STAGES, MIN_OF_TORCH = 0.95, 1.15
#: Largest relative difference between the losses of the synchronous schedules.
SAME_LOSS = 1e-4
#: Batches whose losses are compared.
COMPARED = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender")
    parser.add_argument("--minibatches", type=int, default=48, help="minibatches, torch's microbatches, per turn")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8], help="per step of synchronous schedules")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--plot", type=Path, help="write a figure")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options)
        return
    (found,) = on_two_ranks([sys.executable, __file__, *sys.argv[1:], "--rank"])
    report(found, Console(width=100, highlight=False))
    if options.plot:
        draw(found, options.plot)


def report(found: dict[str, Any], console: Console) -> None:
    """Print the times, the ratios, and how far apart the losses are."""
    seconds = found["seconds"]
    ours = "pipedream_hpc 1f1b"
    table = Table("contender", "ms per minibatch", "samples/s", "pipedream_hpc 1f1b is", title=found["model"])
    for name, times in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
        median = statistics.median(times)
        ratio = f"{speedup(found, ours, name):.3f} x as fast"
        table.add_row(name, f"{1e3 * median:.1f}", f"{found['samples'] / median:.0f}", "" if name == ours else ratio)
    console.print(table)
    stages = " and ".join(f"{1e3 * statistics.median(times):.1f}" for times in zip(*found["stages"], strict=True))
    console.print(
        f"the stages alone take {stages} ms; losses of {COMPARED} batches, relative to torch's: "
        + ", ".join(f"{name} within {difference:.0e}" for name, difference in found["differs"].items())
    )


def speedup(found: dict[str, Any], name: str, other: str) -> float:
    """Return how many times as fast as `other` a contender is: the median over the rounds."""
    pairs = zip(found["seconds"][other], found["seconds"][name], strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the time per minibatch of every contender and round."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    for position, times in enumerate(found["seconds"].values()):
        axes.plot([1e3 * each for each in times], [position] * len(times), "o", color="tab:blue", alpha=0.4)
        axes.plot(1e3 * statistics.median(times), position, "|", color="tab:blue", markersize=20, markeredgewidth=2)
    axes.set_yticks(range(len(found["seconds"])), list(found["seconds"]), fontsize="small")
    axes.set(xlabel="ms per minibatch", xlim=(0, None))
    axes.invert_yaxis()
    figure.savefig(path, dpi=130)


def run(options: argparse.Namespace) -> None:
    """Run as one rank."""
    from functools import partial

    import contenders as c
    import torch
    import torch.distributed as dist
    import transformers
    from huggingface_job import LENGTH, VOCABULARY, gpt2
    from torch.distributed import pipelining
    from torch.nn.functional import cross_entropy
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    from pipedream_hpc import Pipeline, ScheduleConfig, Step, TrainConfig

    transformers.logging.set_verbosity_error()
    rank, _ = c.start_ranks()
    samples, blocks = 4, 8
    cut, model = blocks // 2, partial(gpt2, options.width, blocks)

    def tokens(minibatches: int) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.randint(VOCABULARY, (samples * minibatches, LENGTH))

    def causal_loss(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())

    class Contender:
        """Trains the model; `losses` are those of the first batches."""

        def __init__(self, name: str, n_microbatches: int) -> None:
            self.name, self.n_microbatches, self.losses = name, n_microbatches, list[float]()
            self.words = tokens(n_microbatches)

        def open(self) -> None:
            """Prepare training, and train `COMPARED` batches. Collective."""
            raise NotImplementedError

        def seconds(self, minibatches: int) -> float:
            """Train; return the seconds per minibatch. Collective."""
            raise NotImplementedError

        def close(self) -> None:
            """Release all resources. Collective."""

    class StagesAlone(Contender):
        """Each rank runs its own blocks in a plain loop, on what the whole model has at the boundary."""

        def open(self) -> None:
            whole = model()
            body = whole.transformer
            first, second = body.h[:cut], body.h[cut:]
            positions = torch.arange(LENGTH)

            def embed() -> torch.Tensor:
                x = body.drop(body.wte(self.words) + body.wpe(positions))
                for block in first:
                    x = block(x)
                return x

            def predict(x: torch.Tensor) -> torch.Tensor:
                for block in second:
                    x = block(x)
                return causal_loss(whole.lm_head(body.ln_f(x)), self.words)

            boundary = embed().detach().requires_grad_()
            (gradient,) = torch.autograd.grad(predict(boundary), boundary)
            modules = [body.wte, body.wpe, *first] if rank == 0 else [*second, body.ln_f, whole.lm_head]
            optimizer = torch.optim.SGD([p for each in modules for p in each.parameters()], lr=c.LEARNING_RATE)

            def step() -> None:
                optimizer.zero_grad()
                if rank == 0:
                    embed().backward(gradient)
                else:
                    predict(boundary.detach().requires_grad_()).backward()
                optimizer.step()

            self._step = step
            self.seconds(COMPARED)

        def seconds(self, minibatches: int) -> float:
            began = time.perf_counter()
            for _ in range(minibatches):
                self._step()
            return (time.perf_counter() - began) / minibatches

    class Ours(Contender):
        """pipedream_hpc over MPI."""

        def open(self) -> None:
            m = self.n_microbatches
            self._minibatch = {"input_ids": self.words, "labels": self.words}
            self._pipeline = Pipeline(
                model(),
                loss_fn=lambda output, _: output.loss,
                optimizer=partial(torch.optim.SGD, lr=c.LEARNING_RATE),
                example_inputs=self._minibatch,
                plan=2,
                schedule="1f1b" if m == 1 else ScheduleConfig("1f1b-flush", n_microbatches=m),
                train_config=TrainConfig(leaf_modules=(GPT2Block,)),
            )
            stage_of = self._pipeline.stage_of_parameters()
            cuts_of = [stage_of[f"transformer.h.{number}.ln_1.weight"] for number in range(blocks)]
            assert cuts_of == [0] * cut + [1] * (blocks - cut), f"the blocks are in stages {cuts_of}"

            def note(step: Step) -> None:
                self.losses.append(step.loss)

            self._pipeline.fit([self._minibatch] * COMPARED, on_step=note)

        def seconds(self, minibatches: int) -> float:
            ends: list[float] = []
            began = time.perf_counter()
            batches = minibatches // self.n_microbatches
            self._pipeline.fit([self._minibatch] * batches, on_step=lambda _: ends.append(time.perf_counter()))
            if self.n_microbatches > 1:
                return (time.perf_counter() - began) / minibatches
            # Asynchronous: filled once and drained once in an epoch, so from the end of one minibatch to another's.
            return (ends[-1] - ends[0]) / (len(ends) - 1)

        def close(self) -> None:
            self._pipeline.close()

    class Theirs(Contender):
        """torch.distributed.pipelining over gloo."""

        def open(self) -> None:
            at = {f"transformer.h.{cut}": pipelining.SplitPoint.BEGINNING}
            pipe = pipelining.pipeline(model(), (), {"input_ids": self.words[:samples]}, split_spec=at)
            stage = pipe.build_stage(rank, torch.device("cpu"))
            self._schedule = pipelining.Schedule1F1B(stage, self.n_microbatches, loss_fn=causal_loss)
            self._optimizer = torch.optim.SGD(stage.submod.parameters(), lr=c.LEARNING_RATE)
            self.losses = [self._step() for _ in range(COMPARED)]

        def _step(self) -> float:
            losses: list[torch.Tensor] = []
            self._optimizer.zero_grad()
            if rank == 0:
                self._schedule.step(input_ids=self.words)
            else:
                self._schedule.step(target=self.words, losses=losses, return_outputs=False)
            self._optimizer.step()
            return statistics.fmean(loss.item() for loss in losses) if losses else 0.0

        def seconds(self, minibatches: int) -> float:
            began = time.perf_counter()
            for _ in range(minibatches // self.n_microbatches):
                self._step()
            return (time.perf_counter() - began) / minibatches

    stages = StagesAlone("stages alone", 1)
    everyone: list[Contender] = [stages, Ours("pipedream_hpc 1f1b", 1)]
    for m in options.microbatches:
        everyone += [Theirs(f"torch 1F1B, m = {m}", m), Ours(f"pipedream_hpc 1f1b-flush, m = {m}", m)]
    found: dict[str, Any] = {
        "model": f"GPT-2, {blocks} x {options.width}, {LENGTH} tokens, minibatch {samples}",
        "samples": samples,
        "stages": [],
        "differs": {},
        "seconds": defaultdict(list),
    }
    for each in everyone:
        each.open()
    for m in options.microbatches:
        losses: list[Any] = [None, None]
        (theirs, ours) = (each for each in everyone if each.name.endswith(f"m = {m}"))
        dist.all_gather_object(losses, (theirs.losses, ours.losses))
        expected, got = losses[1]
        difference = max(abs(a - b) / abs(a) for a, b in zip(expected, got, strict=True))
        found["differs"][ours.name] = difference
        if difference > SAME_LOSS:
            sys.exit(f"{ours.name} trains another model than torch: losses {got} instead of {expected}")
    for each in c.rotate(everyone, options.rounds):
        by_rank: list[Any] = [None, None]
        dist.barrier()
        dist.all_gather_object(by_rank, each.seconds(options.minibatches))
        found["seconds"][each.name].append(max(by_rank))
        if each is stages:
            found["stages"].append(by_rank)
    for each in everyone:
        each.close()
    if rank == 0:
        print(json.dumps(found), flush=True)
    c.exit_together()


if __name__ == "__main__":
    main()
