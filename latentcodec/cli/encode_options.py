"""The options of `latentcodec encode`, by name: what each may be, and what `--help` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latentcodec.cli.output import DEVICE

SIZE, STORED, SOURCE, RUN = (
    "Size of the pictures",
    "What is stored",
    "Data sets",
    "How it runs",
)  # panels of --help


def option(text: str, *names: str, panel: str | None = None, **settings: Any) -> Any:
    """What typer needs to know of an option."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


Sources = Annotated[
    list[str],
    typer.Argument(help="Folders, image files, patterns, .tar and .parquet files, data sets of `datasets`."),
]
Out = Annotated[Path, option("Folder of the store.", "--out", "-o", show_default=False)]
Size = Annotated[
    int | None,
    option("Pixels of the square centre, after the shorter side was scaled to it.", panel=SIZE),
]
Area = Annotated[
    int | None, option("Pixels of a bucket: sides that keep about the picture's ratio.", panel=SIZE)
]
Multiple = Annotated[int | None, option("Pixels that a bucket's sides are multiples of.", panel=SIZE)]
MinSide = Annotated[int, option("Leave out pictures with a shorter side.", panel=SIZE)]
Dtype = Annotated[
    str,
    option("float32, float16, bfloat16, int8 (range of each picture and channel), float8.", panel=STORED),
]
Std = Annotated[
    bool,
    option("Store the posterior's deviation too, so that training draws fresh samples.", panel=STORED),
]
Mirrored = Annotated[bool, option("Store the latents of the mirrored pictures too.", panel=STORED)]
NoCodec = Annotated[bool, option("Put no copy of the codec into the store.", "--no-codec", panel=STORED)]
ShardSize = Annotated[
    int, option("Pictures of a shard at most; large ones make shards of 512 MiB.", panel=STORED)
]
Check = Annotated[int, option("Pictures that are decoded again, to measure the loss.", panel=STORED)]
ImageColumn = Annotated[str | None, option("Column with the pictures.", panel=SOURCE)]
CaptionColumn = Annotated[str | None, option("Column with the captions.", panel=SOURCE)]
LabelColumn = Annotated[str | None, option("Column with whole numbers.", panel=SOURCE)]
Subset = Annotated[str | None, option("Subset of the data set.", panel=SOURCE)]
Split = Annotated[str, option("Split of the data set.", panel=SOURCE)]
Device = Annotated[str | None, option(DEVICE, panel=RUN)]
Batch = Annotated[int, option("Pictures encoded at once; 0: by their size.", panel=RUN)]
Precision = Annotated[
    str | None, option("float32 or bfloat16; by default what the machine is fast in.", panel=RUN)
]
Threads = Annotated[int | None, option("Threads of the model on a CPU; by default the cores.", panel=RUN)]
Workers = Annotated[
    int | None, option("Processes that decode pictures; by default the cores, at most 8.", panel=RUN)
]
Rank = Annotated[int | None, option("This process, counted from 0; else from the launcher.", panel=RUN)]
World = Annotated[int | None, option("Number of processes; else from the launcher.", panel=RUN)]
Engine = Annotated[str, option("local or ray.", panel=RUN)]
DryRun = Annotated[bool, option("Say what would be done, and do nothing.", "--dry-run", panel=RUN)]
