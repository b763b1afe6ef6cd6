"""Convolutions with batch norm, and folding the norm into the weights for inference."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import fresh

__all__ = ["ConvNorm", "folded"]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and an activation if one is given.

    :func:`folded` turns it into a convolution with bias.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        groups: int = 1,
        gain: float = 1.0,
        activation: Callable[[Tensor], Tensor] | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if padding is None:
            sides = (kernel, kernel) if isinstance(kernel, int) else kernel
            padding = (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(dim, out, kernel, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out, eps=eps)
        #: initial weight of the norm: 0 where a residual branch starts as nothing
        self.gain = gain
        self.activation = activation

    def init_weights(self) -> None:
        """The norm alone: running statistics too; the convolution is the network's to fill."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm.reset_running_stats()
            nn.init.constant_(self.norm.weight, self.gain)
            nn.init.zeros_(self.norm.bias)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Tensor:
        x = self.conv(x)
        if isinstance(self.norm, nn.BatchNorm2d) and not (self.training or torch.is_grad_enabled()):
            scale, shift = fresh.affine_of(self.norm)
            x = fresh.affine(x, scale[:, None, None], shift[:, None, None])
        else:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def fold(self) -> None:
        """Put the norm into the convolution, for inference; the module must be in eval mode."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


def folded(model: nn.Module) -> nn.Module:
    """A copy for inference with every :class:`ConvNorm` as one convolution; the same outputs up to
    rounding. The copy can't be trained further, nor saved as the paper's network."""
    model = deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.fold()
    return model
