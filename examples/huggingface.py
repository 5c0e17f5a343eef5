"""Train a causal language model of Hugging Face's transformers, from a configuration and without a download.

    pip install transformers
    mpirun -n 4 pipedream train examples/huggingface.py --plan 4        train and evaluate
    mpirun -n 4 python examples/huggingface.py out/llama                the same, and save for from_pretrained

The text is the source code of Python's standard library, as bytes. A minibatch is a mapping, as a collator makes it:
the model gets it as keyword arguments, and computes its own loss.
"""

from __future__ import annotations

import math
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from pipedream_hpc import Job, Pipeline

#: Bytes of a sequence, and sequences of a minibatch.
LENGTH, MINIBATCH = 64, 8


class Text(Dataset[dict[str, torch.Tensor]]):
    """Sequences of bytes.

    Args:
        first: number of the first sequence.
        count: number of sequences.
    """

    def __init__(self, first: int, count: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files[:40])
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = (self._first + index) * LENGTH
        words = self._bytes[start : start + LENGTH].long()
        return {"input_ids": words, "labels": words}


def model() -> LlamaForCausalLM:
    """Create a Llama of four layers, with the same weights on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss_fn(output: Any, minibatch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss that the model has computed from the labels: the mean over all bytes."""
    loss: torch.Tensor = output.loss
    return loss


def job(args: list[str]) -> Job:
    """Return the job that the `pipedream` commands run."""
    train, test = Text(0, 320), Text(320, 80)
    return Job(
        model=model(),
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        train_loader=DataLoader(train, batch_size=MINIBATCH, shuffle=True),
        test_loader=DataLoader(test, batch_size=MINIBATCH),
        metrics={"loss": loss_fn},
        example_inputs=next(iter(DataLoader(train, batch_size=MINIBATCH))),
        epochs=3,
    )


def main() -> None:
    (folder,) = sys.argv[1:] or ["out/llama"]
    own = job([])
    with Pipeline.from_job(own, plan=4) as pipeline:
        for epoch in range(own.epochs):
            loss = pipeline.fit(own.train_loader)
            perplexity = math.exp(pipeline.evaluate(own.test_loader, own.metrics)["loss"])
            if pipeline.rank == 0:
                print(f"epoch {epoch}: loss {loss:.4f}, perplexity of the test set {perplexity:.2f}", flush=True)
        weights = pipeline.state_dict()  # all of them on rank 0
        if pipeline.rank == 0:
            whole = model()
            whole.load_state_dict(weights)
            whole.save_pretrained(folder)
            again = LlamaForCausalLM.from_pretrained(folder)
            assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
            print(f"saved to {folder}, which LlamaForCausalLM.from_pretrained reads")


if __name__ == "__main__":
    main()
