"""GNMT (Wu et al. 2016, arXiv 1609.08144), with the attention of its later, public versions.

Encoder and decoder are stacks of LSTMs. The first LSTM of the encoder is bidirectional; from the third on, each has a
residual connection. The outputs of the decoder's first LSTM are the queries of the attention, and every later LSTM
reads the attention's context in addition to its input::

    source ── embed ── BiLSTM ───── LSTM ── LSTM + ── ... ──────┐ keys
                                                                ▼
    target ── embed ── LSTM ─────────┬─── queries ──────── attention
                                     │                          │ context
                                     ├──── LSTM ── LSTM + ── ... ── logits
                                     └── dropout     each reads context too
"""

from __future__ import annotations

import torch
from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.zoo import initial


class BidirectionalLSTM(nn.Module):
    """One LSTM over the tokens, and another one over the reversed tokens.

    Each sentence is reversed by itself, with its padding left at the end. nn.LSTM(bidirectional=True) needs packed
    sequences for that, and their shapes depend on the lengths.

    Args:
        inputs: width of the input.
        hidden: output width of each LSTM.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.forwards = nn.LSTM(inputs, hidden, batch_first=True)
        self.backwards = nn.LSTM(inputs, hidden, batch_first=True)

    def forward(self, x: torch.Tensor, position: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return float (batch, tokens, 2 hidden).

        Args:
            x: float (batch, tokens, inputs).
            position: int64 (batch, tokens), position of each token in its sentence.
            lengths: int64 (batch), number of tokens without padding.
        """
        last = lengths.unsqueeze(1) - 1
        mirrored = torch.where(position > last, position, last - position).unsqueeze(2)
        back = self.backwards(torch.take_along_dim(x, mirrored, dim=1))[0]
        return torch.cat([self.forwards(x)[0], torch.take_along_dim(back, mirrored, dim=1)], dim=2)


class Attention(nn.Module):
    """Additive attention (Bahdanau et al. 2015, arXiv 1409.0473) with a normalised score vector.

    The sum of every query and every key is a vector: batch x queries x keys x width elements are live at once.

    Args:
        width: width of queries, keys and output.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.empty(width))
        self.direction = nn.Parameter(torch.empty(width))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, queries: torch.Tensor, memory: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """Return weighted means of the memory, float (batch, queries, width).

        Args:
            queries: float (batch, queries, width).
            memory: float (batch, keys, width), both keys and values.
            padding: bool (batch, keys), true for padding, which gets no attention.
        """
        pairs = self.query(queries).unsqueeze(2) + self.key(memory).unsqueeze(1) + self.bias
        scores = torch.tanh(pairs) @ (self.scale * self.direction / self.direction.norm())
        weights = scores.masked_fill(padding.unsqueeze(1), float("-inf")).softmax(dim=2)
        return torch.bmm(weights, memory)


class GNMT(nn.Module):
    """GNMT: takes (source, lengths, target); returns logits, float (batch, target tokens, vocabulary).

    Args:
        layers: number of LSTMs in encoder and decoder together; even, at least 4.
        vocabulary: number of tokens, the same for both languages; token 0 is padding.
        hidden: width of all layers.
        dropout: dropout probability before every LSTM but the first of encoder and decoder.
        share_embedding: use one embedding for source and target instead of two.
    """

    def __init__(self, layers: int, vocabulary: int, hidden: int, dropout: float, share_embedding: bool) -> None:
        super().__init__()
        if layers < 4 or layers % 2:
            raise PipedreamError(
                f"GNMT: layers is {layers}: choose an even number of at least 4, half of which are in the encoder"
            )
        half = layers // 2
        self.source = nn.Embedding(vocabulary, hidden, padding_idx=0)
        self.bidirectional = BidirectionalLSTM(hidden, hidden)
        self.encoder = nn.ModuleList(
            nn.LSTM(hidden if layer else 2 * hidden, hidden, batch_first=True) for layer in range(half - 1)
        )
        self.target = self.source if share_embedding else nn.Embedding(vocabulary, hidden, padding_idx=0)
        self.query_lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.attention = Attention(hidden)
        self.decoder = nn.ModuleList(nn.LSTM(2 * hidden, hidden, batch_first=True) for _ in range(half - 1))
        self.classifier = nn.Linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)
        initial.uniform(self, 0.1)
        nn.init.zeros_(self.attention.bias)
        nn.init.constant_(self.attention.scale, hidden**-0.5)  # scores start near zero, so attention is nearly uniform

    def forward(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, target tokens, vocabulary); those at a target token predict the next one.

        Args:
            source: int64 (batch, source tokens), each sentence padded at its end.
            lengths: int64 (batch), number of source tokens without padding, at least 1.
            target: int64 (batch, target tokens), the translation without its last token.
        """
        position = torch.ones_like(source).cumsum(dim=1) - 1
        memory = self.bidirectional(self.source(source), position, lengths)
        for layer, lstm in enumerate(self.encoder):
            y = lstm(self.dropout(memory))[0]
            memory = memory + y if layer else y

        x = self.query_lstm(self.target(target))[0]
        context = self.attention(x, memory, position >= lengths.unsqueeze(1))
        for layer, lstm in enumerate(self.decoder):
            y = lstm(torch.cat([self.dropout(x), context], dim=2))[0]
            x = x + y if layer else y
        logits: torch.Tensor = self.classifier(x)
        return logits


def gnmt(
    layers: int = 16,
    vocabulary: int = 32_317,
    hidden: int = 1024,
    dropout: float = 0.2,
    share_embedding: bool = False,
) -> GNMT:
    """Create a GNMT-8 or GNMT-16, with four or eight LSTMs in the encoder and as many in the decoder.

    With the defaults, for WMT16 English to German, GNMT-16 has 277,709,374 parameters and GNMT-8 has 193,757,758. A
    shared embedding saves 33,092,608 parameters, but it has to be sent from the first stage of a pipeline to the
    stage where the decoder starts; so there are two by default.
    """
    return GNMT(layers, vocabulary, hidden, dropout, share_embedding)
