"""The layers of the VAE for training: the same numbers as `vae/layers.py`, with fewer passes over the feature maps.

Group norm and SiLU are one function, and so are the doubling of a map and its convolution (`ops/functional.py`),
gradients included. The plain layers run wherever these functions do not apply: under a compiler, for other activations,
where hooks or adapters sit on the layers.

Shapes: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from latentcodec.engine.checks import (
    has_hooks,
    has_plain_parameters,
    is_plain_convolution,
    torch_layers_are_replaced,
)
from latentcodec.ops.functional import applies_to, conv3x3, norm_silu, suits_winograd, upsample_conv
from latentcodec.vae import layers
from latentcodec.vae.layers import LayerTypes


def norm_act(x: Tensor, norm: nn.GroupNorm, activation: nn.Module) -> Tensor:
    """activation(norm(x)); [B, C, H, W] -> [B, C, H, W]."""
    if not (_may_replace_layers(x) and _is_fusible(norm, activation) and x.shape[1] == norm.num_channels):
        return activation(norm(x))
    return norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _is_fusible(norm: nn.GroupNorm, activation: nn.Module) -> bool:
    if type(norm) is not nn.GroupNorm or type(activation) is not nn.SiLU or not has_plain_parameters(norm):
        return False
    if norm.weight is None or norm.bias is None:
        return False
    return not (has_hooks(norm) or has_hooks(activation))


def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(x); [B, C, H, W] -> [B, C', H, W]."""
    if _may_replace_layers(x) and _is_plain_conv3x3(layer) and suits_winograd(x, layer.weight):
        return conv3x3(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


class ResnetBlock2D(layers.ResnetBlock2D):
    """The residual block, with each norm and its activation as one function, and fast convolutions on CPUs."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        h = conv(norm_act(input_tensor, self.norm1, self.nonlinearity), self.conv1)
        if temb is not None:
            h = h + temb
        h = conv(norm_act(h, self.norm2, self.nonlinearity), self.conv2)
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + h


class Upsample(layers.Upsample):
    """Nearest neighbour times two and the convolution after it, as one transposed convolution."""

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        if output_size is None and _may_replace_layers(hidden_states) and _is_plain_conv3x3(self.conv):
            return upsample_conv(hidden_states, self.conv.weight, self.conv.bias)
        return super().forward(hidden_states, output_size)


def _may_replace_layers(x: Tensor) -> bool:
    return applies_to(x) and not torch_layers_are_replaced()


def _is_plain_conv3x3(layer: nn.Module) -> bool:
    """Whether it keeps the size of a map, as both functions for it assume."""
    if type(layer) is not nn.Conv2d or has_hooks(layer):
        return False
    if (layer.weight.shape[2:], layer.stride, layer.padding) != ((3, 3), (1, 1), (1, 1)):
        return False
    return is_plain_convolution(layer) and has_plain_parameters(layer)


FAST_LAYERS = LayerTypes(resnet=ResnetBlock2D, upsample=Upsample)
