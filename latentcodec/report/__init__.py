"""Results of measurements, and the pages made from them; needs the extra `report`."""

from latentcodec.extras import require

require("report", "matplotlib", "jinja2")
