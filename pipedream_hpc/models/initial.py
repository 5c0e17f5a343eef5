"""Initial weights, where torch's own would not do."""

from __future__ import annotations

from torch import nn


def he(network: nn.Module) -> None:
    """Draw the convolutions of a ReLU network so that the signal keeps its variance (He et al. 2015).

    torch draws them for a leaky slope of √5; thirteen of them without BatchNorm, as in VGG16, then
    let hardly any signal through, and training does not start.

    Args:
        network: its convolutions are drawn anew, in place, and their biases become zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def uniform(network: nn.Module, bound: float) -> None:
    """Draw every parameter from [-bound, bound], in place: the custom for recurrent networks."""
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -bound, bound)
