"""Encoders with the blocks of a family and one of them a level, for what depends on the kind of block alone: import it.

Tracing or compiling a graph takes time for every block, and says the same of each.
"""

import timm
from timm.models import densenet, register_model
from torch import nn


def densenet_short(pretrained: bool = False, **options: object) -> nn.Module:
    return timm.create_model("densenet121", pretrained, block_config=(2, 1, 1, 1), **options)


@register_model
def seresnet_short(pretrained: bool = False, **options: object) -> nn.Module:
    return timm.create_model("seresnet50", pretrained, layers=(1, 1, 1, 1), **options)


densenet_short.__module__ = densenet.__name__  # a model's module says whether timm can dilate it
register_model(densenet_short)
