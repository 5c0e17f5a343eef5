"""The networks of the PipeDream paper's evaluation at full size, each with a variant small enough for a test.

Every network is a plain torch.nn.Module. Built under ``with torch.device("meta")`` its weights
take no memory.
"""

from __future__ import annotations

from pipedream_hpc.zoo.alexnet import AlexNet, alexnet
from pipedream_hpc.zoo.awd_lm import AWDLM, awd_lm
from pipedream_hpc.zoo.gnmt import GNMT, gnmt
from pipedream_hpc.zoo.gpt import GPT, gpt
from pipedream_hpc.zoo.inception import Inception, inception_tiny, inception_v3
from pipedream_hpc.zoo.resnet import ResNet, resnet18, resnet50, resnet_tiny
from pipedream_hpc.zoo.s2vt import S2VT, s2vt
from pipedream_hpc.zoo.vgg import VGG, vgg16, vgg_small

__all__ = [
    "AWDLM",
    "GNMT",
    "GPT",
    "S2VT",
    "VGG",
    "AlexNet",
    "Inception",
    "ResNet",
    "alexnet",
    "awd_lm",
    "gnmt",
    "gpt",
    "inception_tiny",
    "inception_v3",
    "resnet18",
    "resnet50",
    "resnet_tiny",
    "s2vt",
    "vgg16",
    "vgg_small",
]
