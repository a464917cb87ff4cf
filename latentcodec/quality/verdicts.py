"""What the measures of a latent space mean: rules, and three headlines that they add up to.

A rule looks at measures and says what is wrong, with the number, its limit and the configuration key that cures it.
What that means depends on what the codec is for, which `TABLE` says; a headline's level is the worst of its reasons,
and notes do not change it. Where a measure is None its rule says nothing, so that a few cheap measures can be judged
during training by the same rules.

Sources of the limits: for each rule beside it; our own measurements where none is named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

Level = Literal["healthy", "warning", "failure"]
Meaning = Literal["failure", "warning", "note"]
LEVELS: tuple[Level, ...] = ("healthy", "warning", "failure")
HEADLINES = ("diffusion", "sampling", "storage")

# Of signal in a channel's variance. Burda's 0.01 in raw units calls noise an active channel.
SMALLEST_SHARE = 0.05
SMALLEST_SPREAD = 0.05  # of the decoded means against the images
SMALLEST_DROP = 0.01  # dB that a channel is worth
CONSTANT = 0.01  # of the median channel's deviation
DEAD_SHARE = 0.25  # of all channels, above which a diffusion model should not be trained
LARGEST_RATE = 5.6  # bits an element: noise of 1/50 of the deviation
LARGEST_NOISE, LARGEST_DRAW_COST = 0.5, 1.0  # share of the deviation; dB
SMALLEST_NOISE_BORNE = 0.05  # deviations, for 1 dB
LARGEST_SEC = 0.45  # rank networks of one normalisation by it, not normalisations: a warning, never a failure
SMALLEST_WITHIN_3, LARGEST_DRAW = 0.99, 8.0  # of a normal distribution: 0.997
LARGEST_MEAN, STANDARD_ERRORS = 0.1, 3.0
STD_RANGE = (0.8, 1.25)
LARGEST_INT8_LOSS = 0.02  # dB
MORE_HOLES = 0.1  # than among as many draws of N(0, I) themselves
ENOUGH_IMAGES, ENOUGH_CELLS = 100, 100_000

# What each rule means for a diffusion model, for sampling from N(0, I) and for storage; None: nothing.
TABLE: dict[str, tuple[Meaning | None, Meaning | None, Meaning | None]] = {
    "posterior_collapse": ("failure", "failure", "failure"),
    "dead_channels": ("warning", "note", "note"),
    "nearly_autoencoder": ("note", "failure", "note"),
    "too_noisy": ("warning", None, "warning"),
    "fragile": ("warning", None, "note"),
    "rough_spectrum": ("warning", None, "note"),
    "heavy_tails": ("warning", "warning", "note"),
    "not_normalised": ("warning", "failure", "note"),
    "unsafe_fp16": ("warning", "note", "warning"),
    "int8_loss": (None, None, "warning"),
    "holes": ("note", "failure", None),
    "provisional": ("note", "note", "note"),
}


@dataclass(frozen=True)
class Finding:
    """One rule that a codec breaks."""

    rule: str
    """A key of `TABLE`."""
    text: str
    """What is wrong, in one sentence with its number."""
    measure: str
    """The key of the measure that the rule looked at."""
    value: float | None
    limit: float | None
    cure: str
    """The configuration key to turn, and which way."""
    serious: bool = False
    """Whether it is a failure where the table says warning."""


Measures = Mapping[str, Any]
Channels = Sequence[Mapping[str, Any]]


def verdicts(measures: Measures, channels: Channels) -> dict[str, dict[str, Any]]:
    """By headline: level, reasons and notes, each reason a `Finding` as a dictionary with its own level."""
    found = findings(measures, channels)
    result: dict[str, dict[str, Any]] = {}
    for column, headline in enumerate(HEADLINES):
        reasons, notes = [], []
        for finding in found:
            meaning = TABLE[finding.rule][column]
            if meaning == "warning" and finding.serious and headline == "diffusion":
                meaning = "failure"
            entry = {key: value for key, value in asdict(finding).items() if key != "serious"}
            if meaning == "note":
                notes.append(entry | {"level": "note"})
            elif meaning is not None:
                reasons.append(entry | {"level": meaning})
        level = max((entry["level"] for entry in reasons), key=LEVELS.index, default="healthy")
        result[headline] = {"level": level, "reasons": reasons, "notes": notes}
    return result


def findings(measures: Measures, channels: Channels) -> list[Finding]:
    """Every rule that is broken, by the measures and channels of `health.Health`."""
    collapsed = _posterior_collapse(measures, channels)
    live = [channel for channel in channels if why_dead(channel, channels) is None]
    rules: list[Callable[[Measures, Channels], Finding | None]]
    if collapsed:  # of latents that say nothing, nothing else is worth saying
        return [finding for finding in (collapsed, _provisional(measures, channels)) if finding]
    found = [_dead_channels(measures, channels)]
    rules = [
        _nearly_autoencoder,
        _too_noisy,
        _fragile,
        _rough_spectrum,
        _heavy_tails,
        _not_normalised,
        _unsafe_fp16,
        _int8_loss,
        _holes,
        _provisional,
    ]
    found += [rule(measures, live) for rule in rules]
    return [finding for finding in found if finding is not None]


def why_dead(channel: Mapping[str, Any], channels: Channels) -> str | None:
    """Why a channel is dead: "noise", "constant" or "ignored" by the decoder; None for one that lives."""
    if channel["std"] < CONSTANT * median(other["std"] for other in channels):
        return "constant"
    if channel["signal_share"] < SMALLEST_SHARE:
        return "noise"
    drop = channel.get("drop_db")
    return "ignored" if drop is not None and drop < SMALLEST_DROP else None


def _posterior_collapse(measures: Measures, channels: Channels) -> Finding | None:
    """Higgins et al. 2017, Lucas et al. 2019: the posterior is the prior, or the decoder does not look at it."""
    cure = "lower loss.kl_weight, or let loss.target_bits: 4 steer it"
    largest = max(channel["signal_share"] for channel in channels)
    if largest < SMALLEST_SHARE:
        text = f"Posterior collapse: no channel has more than {largest:.1%} of signal, the rest is noise."
        return Finding("posterior_collapse", text, "signal_share", largest, SMALLEST_SHARE, cure)
    spread = measures.get("decoder_spread")
    if spread is not None and spread < SMALLEST_SPREAD:
        text = (
            f"Posterior collapse: decoded images vary {spread:.1%} as much as the images themselves; "
            "the decoder draws nearly the same picture for every latent."
        )
        return Finding("posterior_collapse", text, "decoder_spread", spread, SMALLEST_SPREAD, cure)
    return None


def _dead_channels(measures: Measures, channels: Channels) -> Finding | None:
    del measures
    dead = {channel["name"]: why for channel in channels if (why := why_dead(channel, channels)) is not None}
    if not dead:
        return None
    share = len(dead) / len(channels)
    named = ", ".join(f"{name} ({why})" for name, why in dead.items())
    are = "channel is" if len(dead) == 1 else "channels are"
    text = f"{len(dead)} of {len(channels)} {are} dead: {named}."
    cure = (
        f"loss.free_bits: 0.1, a lower loss.kl_weight, or model.latent_channels: {len(channels) - len(dead)}"
    )
    return Finding("dead_channels", text, "dead_share", share, DEAD_SHARE, cure, serious=share > DEAD_SHARE)


def _nearly_autoencoder(measures: Measures, channels: Channels) -> Finding | None:
    """Stable Diffusion's VAE has about 15 bits: harmless for a diffusion model (Rombach et al. 2022)."""
    del channels
    rate = measures.get("rate_bits")
    if rate is None or rate <= LARGEST_RATE:
        return None
    text = (
        f"Nearly an autoencoder: {rate:.1f} bits an element, noise of {2**-rate:.1e} deviations; between its codes "
        "nothing was trained."
    )
    cure = "raise loss.kl_weight, or loss.target_bits: 2"
    return Finding("nearly_autoencoder", text, "rate_bits", rate, LARGEST_RATE, cure)


def _too_noisy(measures: Measures, channels: Channels) -> Finding | None:
    """Rombach et al. 2022, KL sweep: generation is worse once noise makes up most of the variance."""
    cure = "lower loss.kl_weight, or loss.target_std: 0.1"
    cost = measures.get("draw_cost_db")
    if cost is not None and cost > LARGEST_DRAW_COST:
        text = f"Too noisy: a draw from the posterior decodes {cost:.2f} dB worse than its mean."
        return Finding("too_noisy", text, "draw_cost_db", cost, LARGEST_DRAW_COST, cure)
    noise = median(channel["noise"] for channel in channels) if channels else 0.0
    if noise > LARGEST_NOISE:
        text = (
            f"Too noisy: the posterior's deviation is {noise:.2f} of the latents' own in the median channel."
        )
        return Finding("too_noisy", text, "noise", noise, LARGEST_NOISE, cure)
    return None


def _fragile(measures: Measures, channels: Channels) -> Finding | None:
    """A generator's latents are never exact; decoding under noise predicts generation (arXiv:2603.21085)."""
    del channels
    borne = measures.get("noise_1db")
    if borne is None or borne >= SMALLEST_NOISE_BORNE:
        return None
    text = f"Fragile: noise of {borne:.3f} deviations costs 1 dB; from 0.1 on it would be good."
    cure = "regularizer.latent_noise_share: 1 with regularizer.additive_noise, or loss.target_std: 0.05"
    return Finding("fragile", text, "noise_1db", borne, SMALLEST_NOISE_BORNE, cure)


def _rough_spectrum(measures: Measures, channels: Channels) -> Finding | None:
    """arXiv:2606.03578: r about 0.8 with generation, among networks of one normalisation."""
    del channels
    share = measures.get("sec")
    if share is None or share <= LARGEST_SEC:
        return None
    text = f"Rough latents: {share:.0%} of their energy lies in high frequencies; below 25 % is good."
    cure = "regularizer.equivariance_probability: 0.5, or regularizer.scale_equivariance_weight: 0.25"
    return Finding("rough_spectrum", text, "sec", share, LARGEST_SEC, cure)


def _heavy_tails(measures: Measures, channels: Channels) -> Finding | None:
    del channels
    cure = "raise loss.kl_weight, or regularizer.latent_tail_weight: 1e-6"
    within, largest = measures.get("within_3"), measures.get("largest_draw")
    if within is not None and within < SMALLEST_WITHIN_3:
        text = f"Heavy tails: {within:.1%} of the draws lie within three deviations, of a normal one 99.7 %."
        return Finding("heavy_tails", text, "within_3", within, SMALLEST_WITHIN_3, cure)
    if largest is not None and largest > LARGEST_DRAW:
        text = f"Heavy tails: the largest draw lies {largest:.1f} deviations from the mean."
        return Finding("heavy_tails", text, "largest_draw", largest, LARGEST_DRAW, cure)
    return None


def _not_normalised(measures: Measures, channels: Channels) -> Finding | None:
    """A mean counts only where it is more than three standard errors over the images: ten photographs prove nothing."""
    del measures
    low, high = STD_RANGE
    shifted = [
        channel
        for channel in channels
        if abs(channel["mean"]) > max(LARGEST_MEAN, STANDARD_ERRORS * channel["mean_error"])
    ]
    scaled = [channel for channel in channels if not low <= channel["std"] <= high]
    if 2 * len(scaled) <= len(channels) and 2 * len(shifted) <= len(channels):
        overall = (sum(c["std"] ** 2 for c in channels) / max(len(channels), 1)) ** 0.5
        if not channels or low <= overall <= high:
            return None
    worst = max(
        channels, key=lambda channel: max(channel["std"] / high, low / channel["std"], abs(channel["mean"]))
    )
    text = (
        f"Not normalised: {len(scaled)} of {len(channels)} channels have a deviation outside {low} to {high}, "
        f"{len(shifted)} a mean off zero; channel {worst['name']} has mean {worst['mean']:+.2f}, deviation "
        f"{worst['std']:.2f}."
    )
    cure = "finish.normalise: whitened, and a larger train.statistics_images"
    return Finding("not_normalised", text, "std", worst["std"], None, cure)


def _unsafe_fp16(measures: Measures, channels: Channels) -> Finding | None:
    """float16 ends at 65504; see `precision.py`."""
    del channels
    if measures.get("fp16_safe") is not False:
        return None
    peak = measures["largest_activation"]
    text = f"Unsafe in float16: activations reach {peak:.3g} of 65504, or the decoded picture differs."
    cure = "keep force_upcast: true; run it in bfloat16 or float32"
    return Finding("unsafe_fp16", text, "largest_activation", peak, 65504 / 8, cure)


def _int8_loss(measures: Measures, channels: Channels) -> Finding | None:
    del channels
    loss = measures.get("int8_loss_db")
    if loss is None or loss <= LARGEST_INT8_LOSS:
        return None
    text = f"8 bits cost {loss:.3f} dB: store these latents as float16."
    return Finding("int8_loss", text, "int8_loss_db", loss, LARGEST_INT8_LOSS, "store them as float16")


def _holes(measures: Measures, channels: Channels) -> Finding | None:
    del channels
    share, ideal = measures.get("hole_share"), measures.get("hole_share_ideal")
    if share is None or ideal is None or share <= ideal + MORE_HOLES:
        return None
    text = (
        f"Holes: {share:.0%} of the draws of N(0, I) lie far from every code, where {ideal:.0%} would if the codes "
        "were N(0, I)."
    )
    return Finding("holes", text, "hole_share", share, ideal + MORE_HOLES, "raise loss.kl_weight")


def _provisional(measures: Measures, channels: Channels) -> Finding | None:
    del channels
    images, cells = measures["images"], measures["cells"]
    if images >= ENOUGH_IMAGES or cells >= ENOUGH_CELLS:
        return None
    text = f"Provisional: {images} images with {cells:,} cells; from {ENOUGH_IMAGES} images on the numbers are firm."
    return Finding("provisional", text, "images", images, ENOUGH_IMAGES, "--images with a larger folder")
