"""The command as the tests of it give it: few settings for an encoding, and the line for programs that ends it."""

import json

from latentcodec.cli import run

ENCODE = ("--workers", 0, "--threads", 1, "--shard-size", 2, "--check", 2)


def last(out):
    return json.loads(out.splitlines()[-1])


def encode_the_photographs(place):
    """The store that the command makes of the photographs in `place`."""
    arguments = ["encode", place / "photos", "--codec", place / "codec", "--out", place / "store", *ENCODE]
    assert run([str(argument) for argument in arguments]) == 0
    return place / "store"
