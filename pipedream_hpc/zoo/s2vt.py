"""S2VT, video to text (Venugopalan et al. 2015, arXiv 1505.00487).

A stack of two LSTMs runs over the frames and then, keeping its states, over the words. The first LSTM reads only the
frames, the second also the words; each reads zeros where it has no input::

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

from pipedream_hpc.zoo import initial


class S2VT(nn.Module):
    """S2VT: takes (frames, words); returns logits, float (batch, words, vocabulary).

    The frames are features of a convolutional network, float (batch, frames, features); the words are the caption
    without its last token, int64 (batch, words). The logits at a word predict the next word. The captions of a
    minibatch are padded at the end, so that padding affects no real word.

    Args:
        vocabulary: number of words.
        features: features per frame.
        embedding: width of the embedded frames and words.
        hidden: width of both LSTMs.
        dropout: dropout probability of the embedded inputs and of the output.
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
        """Return logits (batch, words, vocabulary) for frames (batch, frames, features) and words (batch, words)."""
        embedded_frames = self.dropout(self.frames(frames))
        embedded_words = self.dropout(self.words(words))
        x = self.first(torch.cat([embedded_frames, torch.zeros_like(embedded_words)], dim=1))[0]
        x = torch.cat([torch.cat([torch.zeros_like(embedded_frames), embedded_words], dim=1), x], dim=2)
        x = self.second(x)[0][:, frames.size(1) :]
        logits: torch.Tensor = self.classifier(self.dropout(x))
        return logits


def s2vt(
    vocabulary: int = 12_594, features: int = 4096, embedding: int = 500, hidden: int = 1000, dropout: float = 0.5
) -> S2VT:
    """Create an S2VT with the widths of its paper and the 12,594 words of MSVD; 36,968,094 parameters.

    The 4096 features of a frame are the input of the last layer of VGG16.
    """
    return S2VT(vocabulary, features, embedding, hidden, dropout)
