"""How far two runs may be apart whose sums were taken in another order, and no further."""

import torch

# The gradient of a step is a sum over its pixels, 4 x 32 x 32 here. Another order of the sum rounds otherwise: each
# of n additions by up to half of 2^-23, at random, so by sqrt(n) 2^-23 = 8e-6 of the gradient's norm altogether.
PIXELS = 4 * 32 * 32
ROUNDING = PIXELS**0.5 * 2**-23
# AdamW divides by the gradient's own size, so a weight with a gradient near zero may go the other way; Muon lifts the
# weakest directions of a gradient 3.4445^5 = 485 times. Such weights and directions are few: in norm, and measured by
# how far the weights have come, they add a digit and a half.
AMPLIFIED = 30 * ROUNDING


def relative(record, other, name, unit=None):
    size = (record[name] if unit is None else unit).norm()
    return ((record[name] - other[name]).norm() / size).item()


def assert_equal_but_for_rounding(one, other):
    """Two records of `small_runs.recorded`."""
    assert one.keys() == other.keys()
    assert torch.equal(one["begin"], other["begin"])
    way = one["end"] - one["begin"]
    assert relative(one, other, "gradient 0") <= ROUNDING
    for name in [name for name in one if name.startswith("gradient")]:
        assert relative(one, other, name) <= AMPLIFIED, name
    assert relative(one, other, "end", way) <= AMPLIFIED
    assert relative(one, other, "averages", way) <= AMPLIFIED
    assert relative(one, other, "discriminator") <= AMPLIFIED
    assert relative(one, other, "latents") <= AMPLIFIED
