"""Models of Hugging Face's transformers for benchmarks, and a job that trains one: GPT-2-like or Llama-like.

pipedream profile benchmarks/huggingface_job.py -- gpt2
pipedream profile benchmarks/huggingface_job.py -- llama
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipedream_hpc import Job

#: Tokens of a sequence, sequences of a minibatch of the job, and different tokens.
LENGTH, MINIBATCH, VOCABULARY = 64, 8, 512


def gpt2(width: int = 192, blocks: int = 4) -> GPT2LMHeadModel:
    """Create a GPT-2 without dropout whose embeddings are not tied, always with the same weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=blocks,
        n_head=width // 48,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config).train()


def llama(width: int = 192, blocks: int = 4) -> LlamaForCausalLM:
    """Create a Llama with grouped queries whose embeddings are not tied, always with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 48,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


class Words(Dataset[dict[str, torch.Tensor]]):
    """Sequences of random tokens, as a causal language model takes them.

    Args:
        count: number of sequences.
    """

    def __init__(self, count: int) -> None:
        self._words = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._words[index], "labels": self._words[index]}


def loss_fn(output: Any, minibatch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss that the model has computed from the labels."""
    loss: torch.Tensor = output.loss
    return loss


def job(args: list[str]) -> Job:
    """Return the job of the model that is named: "gpt2" or "llama"."""
    (name,) = args
    loader = DataLoader(Words(40 * MINIBATCH), batch_size=MINIBATCH)
    return Job(
        model={"gpt2": gpt2, "llama": llama}[name](),
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_loader=loader,
        example_inputs=next(iter(loader)),
    )
