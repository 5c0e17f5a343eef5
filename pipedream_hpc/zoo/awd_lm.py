"""AWD-LSTM language model (Merity et al. 2018, arXiv 1708.02182).

LSTMs between an embedding and its transpose, with dropout of whole words, of whole channels of the activations, and
of the recurrent weights::

    tokens ── embed ── LSTM ── LSTM ── ... ── LSTM ── logits
              weight ───────── tied ───────────────── weight
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pipedream_hpc.zoo import initial


class LockedDropout(nn.Module):
    """Dropout of whole channels of float (batch, tokens, channels), with one mask for all tokens of a sequence."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape; in evaluation, of the same values."""
        mask: torch.Tensor = self.dropout(torch.ones_like(x[:, :1]))
        return x * mask


class WordDropout(nn.Module):
    """An embedding with dropout of whole words: a dropped word is zero everywhere in the minibatch.

    Args:
        vocabulary: number of tokens.
        width: width of the embedding.
        dropout: dropout probability of a word.
    """

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float (batch, tokens, width) for int64 (batch, tokens)."""
        known: torch.Tensor = self.dropout(torch.ones_like(self.weight[:, :1]))
        return functional.embedding(tokens, self.weight) * functional.embedding(tokens, known)


class WeightDropLSTM(nn.Module):
    """An LSTM with dropout of its recurrent weights, with one mask per minibatch for all tokens.

    Every minibatch starts from zero states.

    Args:
        inputs: width of the input.
        hidden: width of the output.
        dropout: dropout probability of a recurrent weight.
    """

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden))
        self.dropout = nn.Dropout(dropout)
        initial.uniform(self, hidden**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float (batch, tokens, hidden) for float (batch, tokens, inputs)."""
        start = x.new_zeros(1, x.size(0), self.hidden)
        weights = [self.weight_ih, self.dropout(self.weight_hh), self.bias_ih, self.bias_hh]
        # nn.LSTM reads its own weights; only the function accepts weights after dropout. Its training flag controls
        # dropout between layers, and there is only one layer; cuDNN needs the flag for a backward. So it is always
        # set, and a trace is valid in either mode.
        return torch.lstm(x, (start, start), weights, True, 1, 0.0, True, False, True)[0]


class AWDLM(nn.Module):
    """AWD-LSTM: takes tokens, int64 (batch, tokens); returns logits, float (batch, tokens, vocabulary).

    The logits at a token predict the next token.

    Args:
        layers: number of LSTMs.
        vocabulary: number of tokens.
        embedding: width of the embedding and of the last LSTM.
        hidden: width of the other LSTMs.
        tied: use the embedding's weight as the classifier's weight.
        dropout: dropout probability of the channels after the last LSTM.
        dropout_input: dropout probability of the channels of the embedded tokens.
        dropout_hidden: dropout probability of the channels between LSTMs.
        dropout_words: dropout probability of whole words.
        dropout_weights: dropout probability of the recurrent weights.
    """

    def __init__(
        self,
        layers: int,
        vocabulary: int,
        embedding: int,
        hidden: int,
        *,
        tied: bool = True,
        dropout: float = 0.4,
        dropout_input: float = 0.4,
        dropout_hidden: float = 0.3,
        dropout_words: float = 0.1,
        dropout_weights: float = 0.5,
    ) -> None:
        super().__init__()
        widths = [embedding, *[hidden] * (layers - 1), embedding]
        between = [dropout_hidden] * (layers - 1)
        self.embedding = WordDropout(vocabulary, embedding, dropout_words)
        self.dropout = LockedDropout(dropout_input)
        self.layers = nn.Sequential()
        for inputs, outputs, after in zip(widths, widths[1:], [*between, dropout], strict=False):
            self.layers.append(WeightDropLSTM(inputs, outputs, dropout_weights))
            self.layers.append(LockedDropout(after))
        self.classifier = nn.Linear(embedding, vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.classifier.bias)
        if tied:
            self.classifier.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, tokens, vocabulary) for tokens (batch, tokens)."""
        logits: torch.Tensor = self.classifier(self.layers(self.dropout(self.embedding(tokens))))
        return logits


def awd_lm(
    layers: int = 3, vocabulary: int = 10_000, embedding: int = 400, hidden: int = 1150, *, tied: bool = True
) -> AWDLM:
    """Create the AWD-LSTM of its paper, for the Penn Treebank; 24,221,600 parameters.

    The PipeDream paper measures a deeper model of six LSTMs: 55,989,200 parameters with the other defaults.
    """
    return AWDLM(layers, vocabulary, embedding, hidden, tied=tied)
