"""The perceptual distance LPIPS, as training minimises it and the metrics report it, for any image channels.

The network is that of the `lpips` package, version 0.1 (Zhang et al., "The unreasonable effectiveness of deep
features as a perceptual metric", 2018). The package is imported where a distance is asked for: it imports
torchvision and scipy, which inference does not need. Rounding to 8 bits and averaging are left to the caller.

Shapes: B batch, C image channels, H W pixels.
"""

import os
import warnings
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

LpipsNet = Literal["vgg", "alex", "squeeze"]
SMALLEST_SIDE: dict[LpipsNet, int] = {"vgg": 16, "alex": 31, "squeeze": 17}
"""Pixels a side of an image, below which the network has nothing left to pool."""


def load_lpips(net: str, weights: str | Path | None = None) -> nn.Module:
    """The frozen LPIPS network, float32 on the CPU: two [B, 3, H, W] in [-1, 1] -> [B, 1, 1, 1].

    net: "vgg", "alex" or "squeeze". weights: None takes torchvision's ImageNet features, from its cache or
    the internet. A path reads everything from a safetensors file, of any floating point format, that has
    torchvision's names for the features (`net.features.3.squeeze.weight`) and `lin0.weight` ... for the rest.

    Raises `ValueError`, naming lpips_net and lpips_weights, where neither is to be had, and where the file
    does not fit the network.
    """
    if net not in get_args(LpipsNet):
        raise ValueError(f"lpips_net: {net!r} is none of {', '.join(get_args(LpipsNet))}")
    network = _new_network(net, download=weights is None)
    if weights is not None:
        _fill(network, net, Path(os.path.expanduser(weights)))
    return network.eval().requires_grad_(False)


class Perceptual(nn.Module):
    """LPIPS of two batches of images in [-1, 1], differentiable in both, its own weights frozen.

    Three channels are a colour image. Any other number is taken channel by channel, each as a grey image
    (repeated three times, as the network needs), and the distance is the mean over the channels. So a grey
    image costs as much as a colour image, and C channels cost C times as much.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None) -> None:
        """As `load_lpips`."""
        super().__init__()
        self.network = load_lpips(net, weights)
        self.eval()

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """[B, C, H, W] twice -> [B], 0 for equal images and about 1 for unrelated ones.

        H and W are at least `SMALLEST_SIDE` of the network, which torch refuses otherwise.
        """
        if x.shape[1] == 3:
            return self.network(y, x).flatten()
        grey_y, grey_x = (t.flatten(0, 1)[:, None].expand(-1, 3, -1, -1) for t in (y, x))  # [B C, 3, H, W]
        return self.network(grey_y, grey_x).view(x.shape[:2]).mean(1)

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation: its linear layers have dropout, which would make the distance random."""
        return super().train(False)


def _new_network(net: str, download: bool) -> nn.Module:
    import lpips

    # Fresh layers are drawn before they are filled; that must not move the random numbers of the caller.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # lpips' older call
        try:
            return lpips.LPIPS(net=net, pnet_rand=not download, verbose=False)
        except OSError as error:  # urllib's errors are OSErrors
            raise ValueError(
                f"lpips_net: the ImageNet features of {net!r} are not in torchvision's cache and could not "
                f"be downloaded ({error}); go online once, or give a local safetensors file as lpips_weights"
            ) from error


def _fill(network: nn.Module, net: str, path: Path) -> None:
    """Copy every weight of the file into the network; a name too many or too few is an error."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"lpips_weights: {path} cannot be read as a safetensors file ({error})") from error
    own = {_stored_name(name): value for name, value in network.state_dict().items() if _is_weight(name)}
    differing = sorted(own.keys() ^ stored.keys())
    if differing:
        raise ValueError(
            f"lpips_weights: {path} does not hold the network of lpips_net {net!r}: "
            f"{len(differing)} names differ, the first is {differing[0]!r}"
        )
    for name, value in own.items():
        if value.shape != stored[name].shape:
            raise ValueError(
                f"lpips_weights: in {path} {name!r} has the shape {list(stored[name].shape)}; "
                f"lpips_net {net!r} needs {list(value.shape)}"
            )
        value.copy_(stored[name])


def _is_weight(name: str) -> bool:
    """Not the constants of the input scaling, and not the second name `lins.0` of `lin0`."""
    return not name.startswith(("scaling_layer.", "lins."))


def _stored_name(name: str) -> str:
    """net.slice2.3.squeeze.weight -> net.features.3.squeeze.weight; lin0.model.1.weight -> lin0.weight."""
    if name.startswith("lin"):
        return f"{name.split('.')[0]}.weight"
    _, _, inside = name.split(".", 2)
    return f"net.features.{inside}"
