"""Latents on disk: encode pictures once, train on them for weeks. The format is on one page, docs/store.md."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentcodec.store.batch import EncodeBatch
    from latentcodec.store.encoding import ShardEncoder
    from latentcodec.store.finishing import finish
    from latentcodec.store.format import StoreError
    from latentcodec.store.job import encode, prepare
    from latentcodec.store.read import Item, LatentStore
    from latentcodec.store.stream import LatentBatches
    from latentcodec.store.verification import verify

__all__ = [
    "EncodeBatch",
    "Item",
    "LatentBatches",
    "LatentStore",
    "ShardEncoder",
    "StoreError",
    "encode",
    "finish",
    "prepare",
    "verify",
]
_FILES = {  # where each name is; a file is imported when one of its names is asked for
    "EncodeBatch": "batch",
    "Item": "read",
    "LatentBatches": "stream",
    "LatentStore": "read",
    "ShardEncoder": "encoding",
    "StoreError": "format",
    "encode": "job",
    "finish": "finishing",
    "prepare": "job",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
