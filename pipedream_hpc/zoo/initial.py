"""Weight initialisation, where torch's default is not suitable."""

from __future__ import annotations

from torch import nn


def he(network: nn.Module) -> None:
    """Initialise the convolutions of a ReLU network so that the signal keeps its variance (He et al. 2015).

    torch's default assumes a leaky slope of √5; after thirteen convolutions without BatchNorm, as in VGG16, the
    signal is then almost zero, and training does not start.

    Args:
        network: its convolutions are initialised in place, with zero biases.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def uniform(network: nn.Module, bound: float) -> None:
    """Initialise every parameter from [-bound, bound] in place, as is usual for recurrent networks."""
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -bound, bound)
