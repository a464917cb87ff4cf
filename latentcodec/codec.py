"""LatentCodec: images to latents that a diffusion model can be trained on, and back.

It owns a genuine VAE of diffusers, of any covered class (`vae/families.py`), and adds what belongs to a codec and not
to a call site: the normalisation of the latents, sizes that are not multiples of f, finding a model wherever it lies.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from latentcodec.adopt import adopt, optimize_vae
from latentcodec.engine.plan import forget
from latentcodec.files import write_files
from latentcodec.finite import require_finite
from latentcodec.latents import LatentSpace, fingerprint
from latentcodec.loading import load_vae
from latentcodec.machine import usable_device
from latentcodec.model_card import model_card, zero_padded
from latentcodec.model_folder import CONFIG, WEIGHTS
from latentcodec.offloading import computing_device, is_offloaded, require_here
from latentcodec.pixels import crop, pad_to_multiple
from latentcodec.vae.families import KL, Family, family_of
from latentcodec.vae.padding import padding_mode, set_padding_mode


class LatentCodec:
    """Encodes images in [-1, 1] to latents of zero mean and unit variance, and decodes them.

    `codec.vae` is diffusers' own object: pass it as `vae=` to any pipeline that is made for its class. On a CPU it runs
    on native functions; on a GPU on compiled ones after `optimize_vae(codec.vae)`.
    """

    def __init__(self, vae: Any) -> None:
        """Takes over `vae`, of a covered class, in place (see `adopt.adopt`) and puts it into evaluation mode."""
        self.vae: Any = adopt(vae).eval()
        self._stored: tuple[str, str] | None = (
            None  # fingerprints of the weights: as computed with, as stored
        )
        LatentSpace.of(self.vae)  # raises for numbers that cannot be

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Any,
        subfolder: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> LatentCodec:
        """A codec from a folder, a hub id, one .safetensors file, a bundled name or a VAE object of a covered class.

        A folder or hub id of a whole pipeline is understood; its `vae` is taken. Weights are read from safetensors
        only, as float32 unless `dtype` says otherwise. An object is taken over in place, in the `dtype` it has.

        Raises ValueError naming `source`, what was looked for and the reason if nothing usable is found, and
        TypeError for an object of another class.
        """
        if not isinstance(source, str | Path):
            return cls(_moved(adopt(source), device, dtype))
        codec = cls(load_vae(str(source), subfolder))
        if dtype is None or torch.promote_types(dtype, codec.dtype) == dtype:
            _moved(codec.vae, device, dtype)
        else:  # values are rounded: those that are stored have the fingerprint
            stored = codec.fingerprint
            _moved(codec.vae, device, dtype)
            codec._stored = (codec.fingerprint, stored)
        return codec

    @property
    def family(self) -> Family:
        """What is known of the VAE's class."""
        return family_of(self.vae)

    @property
    def downsampling_factor(self) -> int:
        """f: pixels of image per latent cell, along each side."""
        return self.family.downsampling_factor(self.vae.config)

    @property
    def latent_channels(self) -> int:
        """c."""
        return self.family.latent_channels(self.vae.config)

    @property
    def image_channels(self) -> int:
        """C, of the images that go in."""
        return self.family.image_channels(self.vae.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vae.device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights, in which the network computes."""
        return self.vae.dtype

    @property
    def latents_mean(self) -> Tensor:
        """[c, 1, 1] float32: what is subtracted from a raw latent, by the canonical formula of the VAE's class."""
        return LatentSpace.of(self.vae).mean

    @property
    def latents_std(self) -> Tensor:
        """[c, 1, 1] float32: what the difference is then divided by."""
        return LatentSpace.of(self.vae).std

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, of the architecture, the normalisation and the weights (values as float32).

        The same on every machine, on every device, after save and load. Weights that `from_pretrained` read and rounded
        to `dtype` count as they are stored; saved in that dtype, they are another codec. Computed in full at each call,
        so a changed weight changes it. Raises ValueError for weights that are not here (offloaded).
        """
        require_here(self.vae, "no fingerprint")
        computed = fingerprint(self.vae)
        if self._stored is not None and self._stored[0] == computed:
            return self._stored[1]
        return computed

    @torch.no_grad()
    def encode(self, x: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> [B, c, ceil(H / f), ceil(W / f)] float32 of zero mean and unit variance.

        The posterior's mode, or with `sample` a draw from it. The right and the bottom edge are repeated up to the
        next multiple of f. Raises ValueError for another shape or for integers.
        """
        posterior = self._posterior(x)
        raw = posterior.sample(generator=generator) if sample else posterior.mode()
        return LatentSpace.of(self.vae).normalise(raw[:, :, 0] if self.family.has_frames else raw)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] in [-1, 1] -> mean and standard deviation [B, c, ceil(H / f), ceil(W / f)] float32.

        Both normalised as the latents of `encode`, whose mode the mean is. Raises what `encode` raises.
        """
        posterior, space = self._posterior(x), LatentSpace.of(self.vae)
        mean, std = (
            value[:, :, 0] if self.family.has_frames else value for value in (posterior.mode(), posterior.std)
        )
        return space.normalise(mean), space.pack(std.float()) / space.std

    def _posterior(self, x: Tensor) -> Any:
        """diffusers' distribution of the raw latents of images of any size."""
        _require(x, self.image_channels, "an image batch [B, C, H, W] in [-1, 1]")
        x = pad_to_multiple(x.to(computing_device(self.vae), self.dtype), self.downsampling_factor)
        return self.vae.encode(x[:, :, None] if self.family.has_frames else x).latent_dist

    @torch.no_grad()
    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, c, h, w] from `encode` -> [B, C, h f, w f] float32, or cropped to `size` = (H, W); about [-1, 1].

        Not clamped, where the class does not: `save_image` and the metrics do that. Raises ValueError for another
        shape, or for a `size` that does not belong to these latents.
        """
        _require(z, self.latent_channels, "a latent batch [B, c, h, w]")
        f = self.downsampling_factor
        if size is not None and [-(-side // f) for side in size] != list(z.shape[-2:]):
            raise ValueError(
                f"size {tuple(size)} does not belong to latents of {z.shape[-2]} x {z.shape[-1]}, f = {f}"
            )
        raw = LatentSpace.of(self.vae).restore(z.to(computing_device(self.vae))).to(self.dtype)
        if self.family.has_frames:
            y = self.vae.decode(raw[:, :, None]).sample[:, :, 0].float()
        else:
            y = self.vae.decode(raw).sample.float()
        return (y if size is None else crop(y, size)).contiguous()

    def refresh(self) -> None:
        """Take notice of weights that were written through `.data`, which leaves no trace that is cheap to see.

        Changes by `load_state_dict`, optimizers, `copy_` and other in-place operations under `no_grad` are noticed
        without it. Some adapters, and code that assigns to `weight.data[...]`, write past that: until `refresh` the
        results may be those of the weights before.
        """
        for network in (self.vae.encoder, self.vae.decoder):
            forget(network)  # weights that were made under `torch.inference_mode` count no versions
        changed = [weight for weight in self.vae.parameters() if not weight.is_inference()]
        torch.autograd.graph.increment_version(changed)

    def plug_into(self, pipe: Any) -> Any:
        """Make this codec's VAE the VAE of a diffusers pipeline that already exists; returns the pipeline.

        The VAE moves to the device and the dtype of the one it replaces. Raises ValueError if the pipeline has no
        VAE, if its denoiser was made for other latents, if its images have another number of channels, or if its VAE
        is already offloaded.
        """
        old = getattr(pipe, "vae", None)
        if old is None:
            raise ValueError(f"{type(pipe).__name__} has no component 'vae' to replace")
        if is_offloaded(old):  # its weights may be anywhere, and ours would be left without the hook
            raise ValueError(
                f"the VAE of this {type(pipe).__name__} is offloaded: plug in first, then offload"
            )
        family = _family_to_replace(old)
        if family is None:
            raise ValueError(f"{type(pipe).__name__} works on the latents of {type(old).__name__}")
        if (family.has_frames, family.units) != (self.family.has_frames, self.family.units):
            raise ValueError(
                f"{type(pipe).__name__} calls its VAE as a {family.name} is called, and this codec's is a "
                f"{self.family.name}"
            )
        for key, ours, theirs in (
            ("latent channels", self.latent_channels, family.latent_channels(old.config)),
            ("pixels a latent cell", self.downsampling_factor, family.downsampling_factor(old.config)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"this codec has {ours} {key}, the pipeline's VAE has {theirs}: its denoiser was trained on other "
                    "latents"
                )
        if self.image_channels != (channels := family.image_channels(old.config)):
            raise ValueError(
                f"this codec has {self.image_channels} image channels, the pipeline's VAE has {channels}: the pipeline "
                "works on other images"
            )
        pipe.register_modules(vae=_moved(self.vae, old.device, old.dtype))
        return pipe

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write a plain folder of the VAE's class, config.json and safetensors, with a model card README.md.

        `card` is the card's text (Markdown); without it, one that states the shapes and how to load the folder.
        All files are written in full before any takes its name, config.json last, so a save that fails or is killed
        while writing leaves what was there; of several processes that save at once, the files of one remain. Other
        files in `folder` stay, but the index of a codec in several files, which would be loaded in place of this one.
        A padding mode other than zeros, which no class of diffusers can hold, goes into the configuration under a key
        of ours, with a warning: diffusers alone would load the codec with zero padding.
        Raises OSError where the disk refuses, and ValueError for weights that are not finite, or not here (offloaded),
        and for convolutions that pad by several modes.
        """
        folder = Path(folder)
        if (mode := padding_mode(self.vae)) != "zeros":
            warnings.warn(f"{folder}: {zero_padded(mode)}", stacklevel=2)
        set_padding_mode(self.vae, mode)
        require_here(self.vae, f"{folder}: not saved")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.vae.state_dict().items()}
        require_finite(weights, f"{folder}: not saved")
        contents = {
            WEIGHTS: safetensors.torch.save(weights, metadata={"format": "pt"}),
            "README.md": (self.model_card() if card is None else card).encode(),
            CONFIG: self.vae.to_json_string().encode(),
        }
        try:
            write_files(folder, contents, last=CONFIG)
            (folder / f"{WEIGHTS}.index.json").unlink(missing_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"{folder}: the codec cannot be written ({error.strerror})") from error

    def model_card(self, details: str = "") -> str:
        """Markdown with the metadata that the hub reads; `details` go between the shapes and the usage."""
        return model_card(self.vae, details)


def run_compiled(codec: LatentCodec) -> LatentCodec:
    """Let a codec that is on a GPU run on compiled functions, as commands do.

    In place; one elsewhere, or that was optimised before, stays as it is. Returns `codec`.
    """
    network = codec.vae.image_networks if codec.family.has_frames else codec.vae.encoder
    if codec.device.type == "cuda" and network.engine.compiled is None:
        optimize_vae(codec.vae)
    return codec


def _family_to_replace(vae: Any) -> Family | None:
    """By which a pipeline calls the VAE that it has; None for a class that is neither covered nor of AutoencoderKL's
    kind, as AutoencoderTiny is."""
    try:
        return family_of(vae)
    except TypeError:
        # What has frames is called with their number too.
        has_frames = any(isinstance(module, nn.Conv3d) for module in vae.modules())
        is_similar = {"latent_channels", "block_out_channels", "in_channels"} <= vae.config.keys()
        return KL if is_similar and not has_frames else None


def _require(x: Tensor, channels: int, what: str) -> None:
    if x.ndim != 4 or x.shape[1] != channels or not x.numel() or not x.is_floating_point():
        raise ValueError(f"expected {what} with {channels} channels, got {x.dtype} of shape {list(x.shape)}")


def _moved(vae: Any, device: str | torch.device | None, dtype: torch.dtype | None) -> Any:
    """`vae`, in place, on `device` and in `dtype` where these are given."""
    if device is not None:
        vae.to(usable_device(device))
    if dtype is not None:
        nn.Module.to(vae, dtype)  # diffusers' own `to` warns of a cast, also where it does no harm
    return vae
