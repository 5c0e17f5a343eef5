"""A decoder-only transformer in the manner of GPT-2 (Radford et al. 2019): what pipelines are used for today.

Normalisation stands before each half of a block, so that the residual stream runs through untouched::

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
        """The same shape; a token attends to itself and to those before it."""
        split = self.project(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        mixed: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and a two-layer network, each added to its input, float (batch, tokens, width).

    Args:
        width: a multiple of `heads`.
        heads: number of attention heads.
        dropout: probability, on what is added.
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
        """The same shape."""
        x = x + self.attention(x)
        y: torch.Tensor = x + self.network(x)
        return y


class GPT(nn.Module):
    """Takes tokens, int64 (batch, tokens), and returns logits, float (batch, tokens, vocabulary).

    The logits at a token are for the next one.

    Args:
        layers: number of blocks.
        width: of the residual stream, a multiple of `heads`.
        heads: attention heads per block.
        vocabulary: number of tokens.
        sequence: most tokens there may be.
        dropout: probability, on the embedded tokens and on what each half of a block adds.
        tied: the classifier's weight is the embedding's; a pipeline needs both in one stage, or neither tied.
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
                f"GPT: width is {width} and heads is {heads}; give a width that is a multiple of heads"
            )
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(sequence, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.classifier.weight = self.tokens.weight
        self._draw(layers)

    def _draw(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        # 2 * layers terms are added up in the residual stream: each is made smaller, so that the sum is not larger.
        for block in self.blocks:
            for last in (block.get_submodule("attention.1.out"), block.get_submodule("network.3")):
                nn.init.normal_(last.get_parameter("weight"), std=0.02 * (2 * layers) ** -0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) for tokens (batch, tokens)."""
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
    """A GPT of any size; the defaults are those of the small GPT-2, 124,439,808 parameters."""
    return GPT(layers, width, heads, vocabulary, sequence, dropout, tied)
