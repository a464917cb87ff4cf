"""A latent compression codec for diffusion pipelines: the public names, nothing else.

Each name is imported when it is first used (PEP 562), so that `import latentcodec` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentcodec.adopt import optimize_vae, restore_vae
    from latentcodec.codec import LatentCodec
    from latentcodec.pixels import load_image, save_image
    from latentcodec.store import LatentStore

__all__ = ["LatentCodec", "LatentStore", "load_image", "optimize_vae", "restore_vae", "save_image"]
__version__ = "0.1.0"

_MODULES = {
    "LatentCodec": "latentcodec.codec",
    "LatentStore": "latentcodec.store",
    "load_image": "latentcodec.pixels",
    "optimize_vae": "latentcodec.adopt",
    "restore_vae": "latentcodec.adopt",
    "save_image": "latentcodec.pixels",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'latentcodec' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
