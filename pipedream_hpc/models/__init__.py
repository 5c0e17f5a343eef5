"""The networks of the paper's evaluation, full size, each with a variant small enough for a test.

Every one is a plain torch.nn.Module that torch.fx can trace. Build one without memory for its
weights under ``with torch.device("meta")``.
"""

from __future__ import annotations

from pipedream_hpc.models.alexnet import AlexNet, alexnet
from pipedream_hpc.models.awd_lm import AWDLM, awd_lm
from pipedream_hpc.models.gnmt import GNMT, gnmt
from pipedream_hpc.models.gpt import GPT, gpt
from pipedream_hpc.models.inception import Inception, inception_tiny, inception_v3
from pipedream_hpc.models.resnet import ResNet, resnet18, resnet50, resnet_tiny
from pipedream_hpc.models.s2vt import S2VT, s2vt
from pipedream_hpc.models.vgg import VGG, vgg16, vgg_small

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
