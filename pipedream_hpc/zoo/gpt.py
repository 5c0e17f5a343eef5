"""GPT: a decoder-only transformer like GPT-2 (Radford et al. 2019), the usual model of today's pipelines.

Each half of a block normalises its own input, so nothing but additions acts on the residual stream::

    x ──┬── norm ── attention ── + ──┬── norm ── widen, GELU, narrow ── + ──►
        └────────────────────────┘   └──────────────────────────────────┘
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pipedream_hpc.errors import PipedreamError


class Attention(nn.Module):
    """Causal self-attention of float (batch, tokens, width).

    Args:
        width: a multiple of `heads`.
        heads: number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape; a token attends to itself and to earlier tokens."""
        split = self.project(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        mixed: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and a two-layer network, each added to its input, float (batch, tokens, width).

    Args:
        width: a multiple of `heads`.
        heads: number of attention heads.
        dropout: dropout probability of the terms that are added.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads), nn.Dropout(dropout))
        self.network = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape."""
        x = x + self.attention(x)
        y: torch.Tensor = x + self.network(x)
        return y


class GPT(nn.Module):
    """GPT: takes tokens, int64 (batch, tokens); returns logits, float (batch, tokens, vocabulary).

    The logits at a token predict the next token.

    Args:
        layers: number of blocks.
        width: width of the residual stream, a multiple of `heads`.
        heads: number of attention heads per block.
        vocabulary: number of tokens in the vocabulary.
        sequence: maximum number of tokens in a sequence.
        dropout: dropout probability of the embedded tokens and of the terms that a block adds.
        tied: use the embedding's weight as the classifier's weight.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        vocabulary: int,
        sequence: int,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise PipedreamError(
                f"GPT: width is {width} and heads is {heads}: choose a width that is a multiple of heads"
            )
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(sequence, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.classifier.weight = self.tokens.weight
        self._initialise(layers)

    def _initialise(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        # The residual stream is a sum of 2 * layers terms: each is scaled down, so that the sum keeps its variance.
        for block in self.blocks:
            for last in (block.get_submodule("attention.1.out"), block.get_submodule("network.3")):
                nn.init.normal_(last.get_parameter("weight"), std=0.02 * (2 * layers) ** -0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, tokens, vocabulary) for tokens (batch, tokens)."""
        x = self.tokens(tokens) + self.positions[: tokens.size(1)]
        logits: torch.Tensor = self.classifier(self.norm(self.blocks(self.dropout(x))))
        return logits


def gpt(
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 50_257,
    sequence: int = 1024,
    dropout: float = 0.0,
    tied: bool = True,
) -> GPT:
    """Create a GPT of any size; the defaults are those of the small GPT-2, with 124,439,808 parameters."""
    return GPT(layers, width, heads, vocabulary, sequence, dropout, tied)
