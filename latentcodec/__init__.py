"""A latent compression codec for diffusion pipelines: the public names, nothing else."""

from latentcodec.adopt import optimize_vae, restore_vae
from latentcodec.codec import LatentCodec
from latentcodec.pixels import load_image, save_image

__all__ = ["LatentCodec", "load_image", "optimize_vae", "restore_vae", "save_image"]
__version__ = "0.1.0"
