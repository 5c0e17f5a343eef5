"""S2VT, a video in, a sentence out (Venugopalan et al. 2015, arXiv 1505.00487).

Two LSTMs, one upon the other, run over the frames and then, with the states they have come to, over the
words. The first sees only frames, the second also the words; either sees zeros where it has no input::

    time     1     2    ...   F    F+1   F+2   ...  F+W
    first   frame frame      frame  0     0          0
              │     │          │    │     │          │
    second    0     0          0   <bos> word  ...  word
                                    │     │          │
    logits                         word  word  ...  <eos>
"""

from __future__ import annotations

import torch
from torch import nn

from pipedream_hpc.models import initial


class S2VT(nn.Module):
    """Takes (frames, words) and returns logits, float (batch, words, vocabulary).

    The frames are features of a convolutional network, float (batch, frames, features); the words are
    the caption without its last token, int64 (batch, words): the logits at a word are for the next one.
    Captions of one minibatch are padded at the end, where nothing after them can be spoiled.

    Args:
        vocabulary: number of words.
        features: numbers per frame.
        embedding: width to which frames and words are brought.
        hidden: width of both LSTMs.
        dropout: probability, on the embedded inputs and on the output.
    """

    def __init__(self, vocabulary: int, features: int, embedding: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.frames = nn.Linear(features, embedding)
        self.words = nn.Embedding(vocabulary, embedding)
        self.first = nn.LSTM(embedding, hidden, batch_first=True)
        self.second = nn.LSTM(embedding + hidden, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)
        initial.uniform(self, 0.08)

    def forward(self, frames: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Logits (batch, words, vocabulary) for frames (batch, frames, features) and words (batch, words)."""
        seen = self.dropout(self.frames(frames))
        said = self.dropout(self.words(words))
        x = self.first(torch.cat([seen, torch.zeros_like(said)], dim=1))[0]
        x = torch.cat([torch.cat([torch.zeros_like(seen), said], dim=1), x], dim=2)
        x = self.second(x)[0][:, frames.size(1) :]
        logits: torch.Tensor = self.classifier(self.dropout(x))
        return logits


def s2vt(
    vocabulary: int = 12_594, features: int = 4096, embedding: int = 500, hidden: int = 1000, dropout: float = 0.5
) -> S2VT:
    """S2VT with the paper's widths and the 12,594 words of MSVD: 36,968,094 parameters.

    The 4096 features of a frame are those of VGG16 before its classifier's last layer.
    """
    return S2VT(vocabulary, features, embedding, hidden, dropout)
