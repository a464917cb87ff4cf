"""Every claim of five introductions to VAEs with its number, and whether it held in the runs of a result.

The introductions, as the page names them: 000 questions and answers, 001 a small VAE on MNIST with pictures of the two
forces, 002 VAEs and Stable Diffusion, 003 slides, 004 a notebook on Fashion-MNIST. Limits are written in each claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentcodec.quality.one_cell import monotone

SWEEP = ("beta-0.01", "beta-0.1", "vae-16", "beta-4", "beta-10", "collapsed-16")


@dataclass(frozen=True)
class Claim:
    """What somebody says of VAEs, and what came out."""

    source: str
    text: str
    measured: str
    held: bool
    experiment: str


def claims(data: Mapping[str, Any]) -> list[Claim]:
    """In the order of the page. A claim that is wrong as an introduction states it is here as it is right."""
    return [*_basics(data), *_regimes(data), *_shape(data), *_likelihoods(data), *_balance(data)]


def looked_at(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What `report/classic.py` found of one run."""
    looked: dict[str, Any] = data["runs"][name]["looked"]
    return looked


def _basics(data: Mapping[str, Any]) -> list[Claim]:
    basics = data["basics"]
    drawn, moved = basics["gradients"]["sample"], basics["gradients"]["mean + sigma * noise"]
    same, numbers = basics["likelihood"], basics["numbers"]["16"]
    return [
        Claim("000.4, 003, 004.1", "a draw lets no gradient through, mean + sigma x noise does",
              f"gradient {'none' if drawn is None else drawn} against {moved:.3f} (exact: 1)",
              drawn is None and abs(moved - 1) < 0.1, "E0"),
        Claim("001.C", "squared error is the negative log-likelihood of a gaussian: the output is its mean",
              f"gradients differ by {same['largest_difference']:.1e} of {same['largest']:.1f}",
              same["largest_difference"] < 1e-5 * same["largest"], "E0"),
        Claim("000.5, 001", "a diagonal covariance needs 2 d numbers, a whole one d + d (d + 1) / 2",
              f"d = 16: {numbers['diagonal']} against {numbers['whole']}", numbers == {"diagonal": 32, "whole": 152},
              "E0"),
    ]  # fmt: skip


def _regimes(data: Mapping[str, Any]) -> list[Claim]:
    ae, vae, collapsed = (looked_at(data, f"{name}-2") for name in ("ae", "vae", "collapsed"))
    wide, sixteen = looked_at(data, "ae-16"), looked_at(data, "vae-16")
    kls = ae["kl_nats"], vae["kl_nats"], collapsed["kl_nats"]
    return [
        Claim("001.int.1", "healthy: a centred cloud within about 3, classes apart and touching",
              f"codes {vae['codes_low']:.1f} to {vae['codes_high']:.1f}, deviation {vae['codes_std']:.2f}; "
              f"{_share(vae.get('label_agreement'))} of neighbours of one class",
              -5 < vae["codes_low"] < -1 and 1 < vae["codes_high"] < 5 and 0.5 < vae["codes_std"] < 1.3, "E1"),
        Claim("001.int.2", "without a KL codes lie far apart, with nothing between them",
              f"codes {ae['codes_low']:.0f} to {ae['codes_high']:.0f}; {ae['trained_share']:.0%} of draws of N(0, I) "
              f"lie near a code, of the VAE {vae['trained_share']:.0%}",
              ae["codes_high"] - ae["codes_low"] > 2 * (vae["codes_high"] - vae["codes_low"])
              and ae["trained_share"] < 0.5 * vae["trained_share"], "E1"),
        Claim("001.int.3, 003", "with too much KL all codes are 0, sigma is 1, and one grey ghost is drawn",
              f"KL {collapsed['kl_nats']:.3f} nats, {collapsed['active']} active, sigma {collapsed['mean_sigma']:.2f}, "
              f"spread of the decoded {collapsed['decoder_spread']:.4f}",
              collapsed["kl_nats"] < 0.1 and not collapsed["active"] and collapsed["decoder_spread"] < 0.05, "E1"),
        Claim("004.3, corrected", "a KL near zero is posterior collapse; an autoencoder has a large one",
              f"autoencoder {kls[0]:.0f}, VAE {kls[1]:.1f}, collapsed {kls[2]:.3f} nats",
              kls[0] > 5 * kls[1] > 25 * kls[2], "E1"),
        Claim("001, 003, 004.4", "an autoencoder cannot be sampled from N(0, I), a VAE can",
              f"variance of decoded draws over that of images: autoencoder {_spreads(ae, wide)}, VAE "
              f"{_spreads(vae, sixteen)} (2 and 16 numbers); like data, with 16: {wide['draw_precision']:.0%} against "
              f"{sixteen['draw_precision']:.0%}",
              vae["draw_spread"] > 3 * ae["draw_spread"] and sixteen["draw_spread"] > 3 * wide["draw_spread"]
              and sixteen["draw_precision"] > wide["draw_precision"], "E1"),
        Claim("004.4", "a VAE is blurrier than an autoencoder",
              f"16 numbers: {sixteen['psnr_db']:.2f} against {wide['psnr_db']:.2f} dB, sharpness "
              f"{sixteen['sharpness']:.2f} against {wide['sharpness']:.2f}",
              wide["psnr_db"] > sixteen["psnr_db"] and wide["sharpness"] > sixteen["sharpness"], "E1"),
    ]  # fmt: skip


def _shape(data: Mapping[str, Any]) -> list[Claim]:
    vae, two, ae = looked_at(data, "vae-16"), looked_at(data, "vae-2"), looked_at(data, "ae-16")
    plain = looked_at(data, "ae-2")
    stds = vae["draws_std"]
    inside = [walk["distance"][6] for walk in vae["walks"]]
    outside = [max(walk["distance"][0], walk["distance"][-1]) for walk in vae["walks"]]
    first, last = vae["walks"][0], vae["walks"][-1]
    found = [
        Claim("000.1", "draws of the posterior follow N(0, I)",
              f"means within {vae['draws_mean']:.2f}, deviations {min(stds):.2f} to {max(stds):.2f}, correlation "
              f"{vae['draws_correlation']:.2f} (rms)",
              vae["draws_mean"] < 0.3 and min(stds) > 0.75 and max(stds) < 1.25 and vae["draws_correlation"] < 0.15,
              "E1"),
        Claim("000.2", "68, 95 and 99.7 % of draws lie within 1, 2 and 3",
              ", ".join(f"{share:.1%}" for share in vae["within"]),
              all(abs(a - b) < 0.02 for a, b in zip(vae["within"], (0.683, 0.954, 0.997), strict=True)), "E1"),
        Claim("000.2", "beyond 3 the pictures are unrealistic",
              f"distance to the nearest image, in that of held-out images: {_mean(inside):.2f} at 0, "
              f"{_mean(outside):.2f} at 6", _mean(outside) > 1.1 * _mean(inside), "E1"),
        Claim("001.z_i", "one number slants, another changes what is written: they tell different amounts",
              f"the first tells {first['kl']:.2f} nats and moves the picture by {first['change']:.1f}, the sixth "
              f"{last['kl']:.2f} and {last['change']:.1f}", first["kl"] > last["kl"], "E1"),
        Claim("001.Q2", "the same image, another draw: the same picture (a bubble)",
              f"draws are {two['bubble_psnr_db']:.1f} dB from the mean's picture (2 numbers), "
              f"{vae['bubble_psnr_db']:.1f} (16)", min(two["bubble_psnr_db"], vae["bubble_psnr_db"]) > 12, "E1"),
        Claim("003", "interpolation is smooth",
              f"largest step over the mean one: VAE {two['largest_step']:.2f} and {vae['largest_step']:.2f}, "
              f"autoencoder {plain['largest_step']:.2f} and {ae['largest_step']:.2f} (2 and 16 numbers)",
              max(two["largest_step"], vae["largest_step"]) < 3, "E1"),
        Claim("004.5", "the 15 x 15 map of the VAE is smooth and has no gaps",
              f"largest step {two['map_largest_step']:.1f} medians, of the autoencoder's "
              f"{plain['map_largest_step']:.1f}", two["map_largest_step"] < plain["map_largest_step"], "E1"),
    ]  # fmt: skip
    if "classes" in two:
        mixture = two["classes"]
        mean = max(map(abs, mixture["mixture_mean"]))
        low, high = min(mixture["mixture_variance"]), max(mixture["mixture_variance"])
        apart = max(max(map(abs, row)) for row in mixture["means"])
        found.append(
            Claim("001.Q1", "a cluster for each class, and all together N(0, I)",
                  f"means of classes up to {apart:.1f} from 0; of all: mean {mean:.2f}, variances {low:.2f} to "
                  f"{high:.2f}",
                  apart > 0.5 and mean < 0.35 and low > 0.6 and high < 1.4, "E1"))  # fmt: skip
    return found


def _likelihoods(data: Mapping[str, Any]) -> list[Claim]:
    sigma, fixed, learned = (
        data["runs"]["pixel-scale"]["sigma"],
        looked_at(data, "vae-16"),
        looked_at(data, "pixel-scale"),
    )
    gauss, laplace, bernoulli = (looked_at(data, name) for name in ("vae-16", "laplace", "bernoulli"))
    ae, small, ghost = (looked_at(data, name) for name in ("few-ae", "few-vae", "collapsed-16"))
    gaps = [run["train_psnr_db"] - run["psnr_db"] for run in (ae, small)]
    return [
        Claim("001.B", "a learned variance for each pixel cheats: what is hard becomes noise",
              f"sigma {sigma['on_strokes']:.2f} where strokes are, {sigma['elsewhere']:.3f} elsewhere; it follows the "
              f"error with correlation {sigma['correlation']:.2f}",
              sigma["on_strokes"] > 3 * sigma["elsewhere"] and sigma["correlation"] > 0.3, "E2"),
        Claim("001.B", "and the pictures are worse than with one fixed sigma",
              f"{learned['psnr_db']:.2f} dB with {learned['kl_nats']:.0f} nats, fixed {fixed['psnr_db']:.2f} dB with "
              f"{fixed['kl_nats']:.0f} nats", learned["psnr_db"] < fixed["psnr_db"], "E2"),
        Claim("000.8, 002", "squared error or cross-entropy: both serve for grey images",
              f"cross-entropy {bernoulli['psnr_db']:.2f} dB with {bernoulli['kl_nats']:.0f} nats, squared error "
              f"{gauss['psnr_db']:.2f} dB with {gauss['kl_nats']:.0f}, the mean image {ghost['psnr_db']:.2f} dB",
              min(bernoulli["psnr_db"], gauss["psnr_db"]) > ghost["psnr_db"] + 2, "E3"),
        Claim("001.blur", "squared error blurs; absolute error blurs less",
              f"energy above half the band over that of the images: gaussian {gauss['sharpness']:.2f}, Laplace "
              f"{laplace['sharpness']:.2f}, Bernoulli {bernoulli['sharpness']:.2f}",
              gauss["sharpness"] < 0.9 and laplace["sharpness"] > gauss["sharpness"], "E3"),
        Claim("000.note, 003", "the KL guards against overfitting",
              f"500 images: training above held-out by {gaps[0]:.2f} dB (autoencoder), {gaps[1]:.2f} dB (VAE)",
              gaps[0] > gaps[1], "E5"),
    ]  # fmt: skip


def _balance(data: Mapping[str, Any]) -> list[Claim]:
    sweep = {data["runs"][name]["kl_weight"]: looked_at(data, name) for name in SWEEP}
    by = {key: {beta: looked[key] for beta, looked in sweep.items()}
          for key in ("mean_sigma", "mean_square_mu", "psnr_db", "kl_nats")}  # fmt: skip
    ends = min(sweep), max(sweep)
    theory = data["theory"]["runs"]
    told = {name: theory[name] for name in theory if theory[name]["noise"] > 0}
    right = sum(bool(told[name]["alive"]) == bool(looked_at(data, name)["active"]) for name in told)
    many, sixteen = looked_at(data, "vae-128"), looked_at(data, "vae-16")
    found = [
        Claim("000.3", "the KL pulls sigma to 1 and mu to 0; much of it costs the picture",
              f"from beta {ends[0]:g} to {ends[1]:g}: sigma {_ends(by['mean_sigma'], 2)}, mean mu^2 "
              f"{_ends(by['mean_square_mu'], 2)}, {_ends(by['psnr_db'], 1)} dB",
              monotone(by["mean_sigma"], True, 0.03) and monotone(by["mean_square_mu"], False, 0.1)
              and monotone(by["psnr_db"], False, 0.1), "E4"),
        Claim("002", "L = reconstruction + beta KL trades one for the other",
              f"KL {_ends(by['kl_nats'], 1)} nats", monotone(by["kl_nats"], False, 0.1), "E4"),
        Claim("linear theory", "told before training: which runs live and which collapse",
              f"{right} of {len(told)} runs as predicted", right == len(told), "E4"),
        Claim("001, 004", "128 numbers tell no more than sixteen do: the others are not worth their nats",
              f"{many['kl_nats']:.1f} nats against {sixteen['kl_nats']:.1f}; {many['active']} of 128 tell 0.01 nats, "
              f"linear theory {theory['vae-128']['alive']}", many["kl_nats"] < 1.3 * sixteen["kl_nats"], "E1"),
    ]  # fmt: skip
    followed = {name: data["runs"][f"{name}-2"].get("followed") for name in ("ae", "vae", "collapsed")}
    if all(followed.values()):
        pulled = [rows[-1]["mean_abs_mu"] for rows in followed.values() if rows]
        found.append(
            Claim("001.spring", "the KL is a spring: the stronger, the nearer the codes are held to 0",
                  "mean |mu| after training: " + ", ".join(f"{value:.2f}" for value in pulled) + " at beta 0, 1, 100",
                  pulled == sorted(pulled, reverse=True), "E4"))  # fmt: skip
    curves = data["runs"]["vae-2"].get("curves")
    if curves:
        nll, kl = ([value for _, value in curves[key]] for key in ("nll", "kl"))
        start, end = _mean(nll[: len(nll) // 10 + 1]), _mean(nll[-(len(nll) // 10 + 1) :])
        later = len(kl) * 7 // 10
        before, after = _mean(kl[later : later + len(kl) // 10 + 1]), _mean(kl[-(len(kl) // 10 + 1) :])
        found.append(
            Claim("004.3", "the reconstruction's loss falls, and the KL settles",
                  f"nll {start:.0f} to {end:.0f} nats; KL {before:.2f} after three quarters, {after:.2f} at the end",
                  end < start and abs(after - before) < 0.15 * before, "E1"))  # fmt: skip
    bounds = data["runs"]["vae-2"].get("bounds")
    if bounds:
        values = {float(k): value for k, value in bounds.items()}
        found.append(
            Claim("003", "the ELBO is a lower bound: more draws bring it nearer to the likelihood",
                  ", ".join(f"{values[k]:.1f} nats with {k:.0f}" for k in sorted(values)),
                  monotone(values, True), "E5"))  # fmt: skip
    return found


def _ends(values: Mapping[float, float], digits: int) -> str:
    return f"{values[min(values)]:.{digits}f} to {values[max(values)]:.{digits}f}"


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _share(value: float | None) -> str:
    return "an unknown share" if value is None or math.isnan(value) else f"{value:.0%}"


def _spreads(two: Mapping[str, Any], sixteen: Mapping[str, Any]) -> str:
    return f"{two['draw_spread']:.2f} and {sixteen['draw_spread']:.2f}"
