"""Measurements as one self-contained page; plots need the extra `report`."""

from latentcodec.extras import require

require("report", "matplotlib")
