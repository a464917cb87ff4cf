"""Do the tests bite? Break the code in many small ways, one at a time; each must turn at least one test red.

    python tests/mutants.py                 # all of them, in a temporary copy of the repository
    python tests/mutants.py muon noise      # those whose name has one of these words
    python tests/mutants.py --check         # only whether each piece of code to be changed still exists once

Each mutant is a file, a piece of its text, what takes its place, and the tests that should notice. Those tests are
run once on the unchanged copy first: a test that fails there proves nothing. Ends with "N of M killed" and the names
of those that survived; exit code 1 if one did. Ends with code 2 where a piece of text does not occur exactly once any
more: this list must follow the code. pytest does not collect this script.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("latentcodec", "train", "bench", "examples", "tests", "pyproject.toml", "README.md")
PATIENCE_SECONDS = 900  # for the tests of one mutant; one that hangs is noticed too

PASSED, FAILED = 0, 1  # of pytest's exit codes


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    name: str
    file: str
    """In latentcodec/."""
    old: str
    new: str
    tests: str
    """What should notice: "test_file.py" or "test_file.py::test_name", several with spaces between. Files are found by
    their names, wherever in tests/ they are."""


MUTANTS = [
    # ---- how weights move
    Mutant(
        "Muon is never used",
        "training/optim/muon.py",
        'for weight in group["params"] if group["orthogonal"] else ():',
        "for weight in ():",
        "test_muon.py",
    ),
    Mutant(
        "no weight is marked for Muon",
        "training/optim/schedule.py",
        '"orthogonal": inner,',
        '"orthogonal": False,',
        "test_muon.py",
    ),
    Mutant(
        "the moving average never moves",
        "training/optim/schedule.py",
        "list(model.parameters()), 1 - decay)",
        "list(model.parameters()), 0.0)",
        "test_trainer.py::test_the_average_follows_the_weights_by_its_formula",
    ),
    Mutant(
        "the learning rate has no warm-up",
        "training/optim/schedule.py",
        "if progress < warmup:",
        "if progress < 0:",
        "test_trainer.py::test_the_learning_rate_rises_to_its_peak_and_falls_by_its_schedule",
    ),
    Mutant(
        "gradients are not clipped",
        "training/gradients.py",
        "clip_grad_norm_(self.parameters, self.config.clip_norm)",
        "clip_grad_norm_(self.parameters, 1e9)",
        "test_trainer.py::test_gradients_are_clipped_to_the_norm",
    ),
    Mutant(
        "accumulated micro-batches add up instead of averaging",
        "training/gradients.py",
        "self.accelerator.backward(total / accumulation)",
        "self.accelerator.backward(total)",
        "test_trainer.py::test_accumulated_micro_batches_equal_one_batch",
    ),
    Mutant(
        "the gradient scaler of fp16 is never updated",
        "training/trainer.py",
        "state.scaler.update()",
        "pass",
        "test_trainer.py::test_an_overflow_in_fp16_halves_the_scale_and_is_no_bad_step",
    ),
    # ---- the forward pass
    Mutant(
        "the posterior's noise is dropped",
        "training/start/model.py",
        "latent = sample_posterior(mean, logvar, noise)",
        "latent = mean",
        "test_forward.py",
    ),
    Mutant(
        "gradient checkpointing is ignored by the configuration",
        "training/start/model.py",
        "if config.gradient_checkpointing:",
        "if False:",
        "test_forward.py",
    ),
    Mutant(
        "gradient checkpointing is ignored by the network",
        "vae/networks.py",
        "if network.gradient_checkpointing and torch.is_grad_enabled():",
        "if False:",
        "test_forward.py",
    ),
    Mutant(
        "the log-variance is not clamped",
        "vae/posterior.py",
        "logvar.clamp(*LOGVAR_RANGE)",
        "logvar",
        "test_terms.py",
    ),
    # ---- losses
    Mutant(
        "levels of interpolative and additive noise are swapped",
        "training/losses/sample.py",
        "replaced, added = draw_noise_levels(config, seed, positions)",
        "added, replaced = draw_noise_levels(config, seed, positions)",
        "test_objective.py",
    ),
    Mutant(
        "interpolative and additive noise are one draw",
        "training/losses/sample.py",
        "noise(Purpose.ADDITIVE_NOISE)",
        "noise(Purpose.INTERPOLATIVE_NOISE)",
        "test_objective.py",
    ),
    Mutant(
        "noise stays as it is while the latents grow",
        "training/losses/regularizers.py",
        "deviation + (power - power.detach()) / (2 * deviation)",
        "deviation.expand(len(z), -1, 1, 1)",
        "test_regularizers.py",
    ),
    Mutant(
        "the parent's share is the trained weights' share",
        "training/export/exporter.py",
        "self.config.finish.parent_share)",
        "1 - self.config.finish.parent_share)",
        "test_codec_folder.py",
    ),
    Mutant(
        "noise in training stays as it is while the latents grow",
        "training/losses/sample.py",
        "scale = unit(z).to(z)",
        "scale = unit(z.detach()).to(z)",
        "test_objective.py",
    ),
    Mutant(
        "a round trip gets shorter by smaller latents",
        "training/losses/objective.py",
        "self._unit(result.mean)",
        "self._unit(result.mean.detach())",
        "test_objective.py",
    ),
    Mutant(
        "the target is not warped with the latent",
        "training/losses/sample.py",
        "target = warp_image(target, warp, f)",
        "pass",
        "test_objective.py",
    ),
    Mutant(
        "the target's spectrum is not masked with the latent's",
        "training/losses/sample.py",
        "target = mask_spectrum(target, diagonals)",
        "pass",
        "test_objective.py",
    ),
    Mutant(
        "a picture that was coded before should come back as the image it was",
        "training/losses/generations.py",
        "first[samples] = given[samples]",
        "pass",
        "test_generations.py",
    ),
    Mutant(
        "a picture that is not finite becomes a picture of 8 bits",
        "training/losses/generations.py",
        "torch.where(recoded.isfinite(), from_uint8(to_uint8(recoded)), recoded)",
        "from_uint8(to_uint8(recoded))",
        "test_generations.py",
    ),
    Mutant(
        "every generation is made of all samples",
        "training/losses/generations.py",
        "(numbers >= trip)",
        "(numbers >= 0)",
        "test_generations.py",
    ),
    Mutant(
        "LPIPS is detached",
        "training/losses/objective.py",
        "self.lpips(y, target)",
        "self.lpips(y.detach(), target)",
        "test_objective.py",
    ),
    Mutant(
        "the KL is a mean over the latent instead of a sum",
        "training/losses/terms.py",
        "return kl_elements(mean, logvar).flatten(1).sum(1)",
        "return kl_elements(mean, logvar).flatten(1).mean(1)",
        "test_terms.py",
    ),
    Mutant(
        "free bits cost",
        "training/losses/terms.py",
        "torch.where(reference > floor, per_channel, floor)",
        "per_channel",
        "test_terms.py test_objective.py",
    ),
    Mutant(
        "the objective is not divided by the dimensions",
        "training/losses/terms.py",
        "(dimensions if k in summed else 1)",
        "1",
        "test_terms.py",
    ),
    Mutant(
        "rate control steers away from its target",
        "training/losses/rate.py",
        "2 ** (CONTROL_GAIN * error)",
        "2 ** (-CONTROL_GAIN * error)",
        "test_terms.py test_objective.py",
    ),
    Mutant(
        "the KL weight has no warm-up",
        "training/losses/rate.py",
        "return min(1.0, step / warmup_steps) if warmup_steps else 1.0",
        "return 1.0",
        "test_terms.py test_objective.py",
    ),
    Mutant(
        "the anchor to the teacher has no gradient",
        "training/losses/teacher.py",
        "anchor_loss(self.space.pack(result.mean),",
        "anchor_loss(self.space.pack(result.mean.detach()),",
        "test_model.py",
    ),
    Mutant(
        "the discriminator plays before its start",
        "training/losses/adversary.py",
        "return step >= self.config.start_step",
        "return True",
        "test_trainer.py::test_the_discriminator_takes_no_computation_before_its_start",
    ),
    Mutant(
        "the generator's loss does not reach the codec",
        "training/losses/adversary.py",
        "generator_loss(self.plain, y)",
        "generator_loss(self.plain, y.detach().requires_grad_())",
        "test_trainer.py::test_the_codec_gets_no_gradient_from_the_discriminator_nor_it_from_the_codec",
    ),
    Mutant(
        "the discriminator's loss reaches the codec",
        "training/losses/discriminator.py",
        "torch.cat([x.detach(), y.detach()])",
        "torch.cat([x.detach(), y])",
        "test_discriminator.py",
    ),
    # ---- data
    Mutant(
        "the middle is off by one",
        "pixels/tensors.py",
        "max(length - side, 0) // 2 for",
        "max(length - side + 2, 0) // 2 for",
        "test_pixels.py::test_the_middle_is_exactly_in_the_middle",
    ),
    Mutant(
        "no crop is mirrored",
        "training/data/crops.py",
        "crop.flip(-1) if flip and draws[3] < 0.5 else crop",
        "crop",
        "test_crops.py",
    ),
    Mutant(
        "every process reads the same positions",
        "training/data/order.py",
        "(batch * self.world_size + self.rank) * self.batch_size",
        "batch * self.world_size * self.batch_size",
        "test_stream.py",
    ),
    Mutant(
        "every epoch has the same order",
        "training/data/order.py",
        "return shuffled(self.images, self.seed, epoch)",
        "return shuffled(self.images, self.seed, 0)",
        "test_stream.py",
    ),
    Mutant(
        "validation images are trained on",
        "training/data/images.py",
        "train = _others(source, val_source, val)",
        "train = np.arange(len(source))",
        "test_stream.py test_sources.py",
    ),
    # ---- what survives a restart
    Mutant(
        "a resume loses the seconds already trained",
        "training/state.py",
        'numbers["draw"], numbers["seconds"]',
        'numbers["draw"], 0.0',
        "test_state.py",
    ),
    Mutant(
        "a rollback goes back in the stream",
        "training/state.py",
        "self.draw, self.seconds, self.rollbacks, self.bad_steps = draw,",
        "self.draw, self.seconds, self.rollbacks, self.bad_steps = self.draw,",
        "test_state.py",
    ),
    Mutant(
        "the optimizer's averages are not resumed",
        "training/state.py",
        'load_optimizer(self.optimizer, saved["optimizer"])',
        "pass",
        "test_state.py",
    ),
    Mutant(
        "a damaged checkpoint is used",
        "training/manifest.py",
        "if found != expected:",
        "if False:",
        "test_checkpoint.py::test_every_damage_is_noticed_and_the_checkpoint_before_is_used",
    ),
    Mutant(
        "a checkpoint is not flushed before its rename",
        "training/checkpoint.py",
        "        make_durable(unfinished)\n",
        "",
        "test_checkpoint.py::test_everything_is_durable_before_it_has_its_name_and_has_it_before_others_go",
    ),
    Mutant(
        "old checkpoints are never removed",
        "training/checkpoint.py",
        "    prune(folder, path, keep_last)\n",
        "",
        "test_checkpoint.py::test_only_the_last_ones_are_kept",
    ),
    Mutant(
        "removing .lock by hand lets a second run in",
        "training/lock.py",
        "for path in (_beside(folder), owner)",
        "for path in (owner,)",
        "test_loop.py::test_a_folder_in_which_another_run_writes_is_refused_until_that_one_is_gone",
    ),
    Mutant(
        "images that were left out do not show in the exit code",
        "training/loop.py",
        "return LOOK if alone and trainer.journal.has_rejects else DONE",
        "return DONE",
        "test_loop.py::test_corrupt_images_are_left_out_counted_and_listed_once",
    ),
    # ---- what is scored and saved
    Mutant(
        "validation scores the trained instead of the averaged weights",
        "training/export/exporter.py",
        "codec = LatentCodec(self._vae())",
        "codec = LatentCodec(state.codec.vae)",
        "test_exporter.py",
    ),
    Mutant(
        "the saved codec has the trained instead of the averaged weights",
        "training/export/exporter.py",
        "vae = copy.deepcopy(vae)",
        "vae = copy.deepcopy(state.codec.vae)",
        "test_exporter.py",
    ),
    Mutant(
        "float16 needs no headroom",
        "quality/precision.py",
        "HEADROOM = 8.0",
        "HEADROOM = 1.0",
        "test_certificate.py",
    ),
    Mutant(
        "a codec lost between two renames is not recovered",
        "training/export/codec_folder.py",
        "if old.exists() and not (folder / CONFIG).exists():",
        "if False:",
        "test_codec_folder.py",
    ),
    Mutant(
        "the saved latents have no unit variance",
        "latents.py",
        "Normalisation((1 / std).diag(), std.diag(),",
        "Normalisation((0.5 / std).diag(), (2 * std).diag(),",
        "test_codec_folder.py",
    ),
    Mutant(
        "whitened channels are ordered the wrong way round",
        "latents.py",
        ".eigenvectors.T.flip(0)",
        ".eigenvectors.T",
        "test_codec_folder.py",
    ),
    Mutant(
        "metrics see pixels that no file can hold",
        "quality/metrics.py",
        "return from_uint8(to_uint8(x))",
        "return x",
        "test_metrics.py",
    ),
    Mutant(
        "the KLT does not centre its blocks",
        "quality/klt.py",
        "second / count - torch.outer(mean, mean)",
        "second / count",
        "test_klt.py",
    ),
    # ---- the engine
    Mutant(
        "the memory bound ignores the batch",
        "engine/needs.py",
        "network.mid_block, len(x) * dtype.itemsize",
        "network.mid_block, dtype.itemsize",
        "test_memory.py",
    ),
    Mutant(
        "the memory bound of single images ignores the batch",
        "engine/images.py",
        "smallest = 2 * row_bytes * len(x) * dtype.itemsize",
        "smallest = 2 * row_bytes * dtype.itemsize",
        "test_streams.py",
    ),
    Mutant(
        "strips are never freed",
        "engine/maps.py",
        "lambda last: _drained(kept) if last else iter(kept)",
        "lambda last: iter(kept)",
        "test_memory.py",
    ),
    Mutant(
        "our operations run while a graph is traced",
        "ops/functional.py",
        "        and not torch.jit.is_tracing()\n",
        "",
        "test_call_forms.py",
    ),
    Mutant(
        "single operations are watched, and strips run all the same",
        "ops/functional.py",
        "        and not torch._C._len_torch_dispatch_stack()\n",
        "",
        "test_call_forms.py",
    ),
    Mutant(
        "forward-mode derivatives are lost",
        "ops/functional.py",
        "        and forward_mode._current_level < 0\n",
        "",
        "test_call_forms.py",
    ),
    Mutant(
        "subclasses of tensors are taken for tensors",
        "ops/functional.py",
        "        and type(x) in (Tensor, torch.nn.Parameter)\n",
        "",
        "test_call_forms.py",
    ),
    Mutant(
        "a quantised weight is taken for a plain one",
        "engine/checks.py",
        "if has_hooks(module) or not has_plain_parameters(module):",
        "if has_hooks(module):",
        "test_call_forms.py",
    ),
    Mutant(
        "other paddings are not seen where gradients are asked for",
        "engine/layers.py",
        "    return is_plain_convolution(layer) and has_plain_parameters(layer)\n",
        "    return True\n",
        "test_call_forms.py",
    ),
    Mutant(
        "code that was put into torch's classes is passed over",
        "engine/plan.py",
        "            and not torch_layers_are_replaced()\n",
        "",
        "test_call_forms.py",
    ),
    Mutant(
        "a tensor added between two convolutions is lost",
        "engine/layers.py",
        "            h = h + temb\n",
        "            pass\n",
        "test_call_forms.py",
    ),
    Mutant(
        "results are not contiguous",
        "engine/plan.py",
        ".contiguous(memory_format=torch.contiguous_format)",
        "",
        "test_call_forms.py",
    ),
    Mutant(
        "an attention processor that computes something else is taken over",
        "vae/layers.py",
        "if type(processor) not in self.equal_processors:",
        "if False:",
        "test_call_forms.py",
    ),
    Mutant(
        "GiB are taken for GB",
        "engine/memory.py",
        "1024**power",
        "1000**power",
        "test_memory.py",
    ),
    Mutant(
        "strips run where gradients are asked for",
        "engine/plan.py",
        "            and not torch.is_grad_enabled()\n",
        "",
        "test_strips.py",
    ),
    # ---- what a run notices
    Mutant(
        "a run that stands still is not ended",
        "training/watchdog.py",
        "            end(FAILED)\n",
        "            del end\n",
        "test_watchdog.py::test_a_standstill_ends_the_process_and_says_what_it_was_at",
    ),
    Mutant(
        "the time in which a process was stopped counts as standstill",
        "training/watchdog.py",
        "min(now - before, 2 * TICK_SECONDS)",
        "now - before",
        "test_watchdog.py::test_the_time_in_which_the_process_was_stopped_does_not_count",
    ),
    Mutant(
        "a download counts as standstill",
        "training/watchdog.py",
        "_now.signs_of_life or not _now.timed:",
        "_now.signs_of_life:",
        "test_watchdog.py::test_a_download_takes_as_long_as_it_takes",
    ),
    Mutant(
        "exchanged images are not noticed",
        "training/data/images.py",
        "for index, length in enumerate(source.lengths()):",
        "for index, length in ():",
        "test_faults.py::test_a_folder_whose_images_were_exchanged_is_not_resumed_on",
    ),
    Mutant(
        "an exchanged held-out image of the same length is not noticed",
        "training/data/images.py",
        'found.update(_digest(self.val_source, index) or b"unreadable")',
        "found.update(b'')",
        "test_faults.py::test_a_held_out_image_that_was_exchanged_for_one_of_its_length_is_noticed",
    ),
    Mutant(
        "null is taken for a value",
        "training/config.py",
        "elif value is None and type(None) not in",
        "elif value is None and type(None) in",
        "test_faults.py::test_a_configuration_that_cannot_be_meant_is_refused_in_one_line",
    ),
    Mutant(
        "a JPEG XL picture is decoded before its size is judged",
        "pixels/containers.py",
        "refuse_bomb(*jxl.stated_size(file.read()))",
        "jxl.stated_size(file.read())",
        "test_containers.py::test_a_picture_too_large_is_refused_before_its_pixels_are_decoded",
    ),
]


def find(name: str, root: Path) -> str:
    """test_file.py::test_name -> its path in tests/."""
    file, _, test = name.partition("::")
    found = list((root / "tests").rglob(file))
    if len(found) != 1:
        sys.exit(f"{len(found)} files called {file} in {root / 'tests'}: mend the list in {__file__}")
    return str(found[0].relative_to(root)) + (f"::{test}" if test else "")


def check(mutants: list[Mutant]) -> None:
    """End with code 2 where the list no longer fits the code."""
    faults = []
    for mutant in mutants:
        text = (ROOT / "latentcodec" / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            faults.append(f"{mutant.name}: {mutant.file} has {text.count(mutant.old)} times {mutant.old!r}")
        for name in mutant.tests.split():
            find(name, ROOT)
    if faults:
        print(*faults, sep="\n", file=sys.stderr)
        sys.exit(2)


def run(copy: Path, tests: str) -> int:
    """pytest's exit code; a hang counts as a failure, and what is neither passed nor failed ends the program."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    command += [find(name, copy) for name in tests.split()]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return FAILED
    if ended.returncode not in (PASSED, FAILED):
        print(ended.stdout[-3000:], ended.stderr[-3000:], file=sys.stderr)
        sys.exit(f"pytest {tests} ended with code {ended.returncode}")
    return ended.returncode


def survivors(mutants: list[Mutant], copy: Path) -> list[str]:
    """Apply each mutant to the copy, run its tests, take it back; the names of those that no test has noticed."""
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        if run(copy, tests) != PASSED:
            sys.exit(f"{tests} fails without any mutant")
        print(f"passes unchanged: {tests}", flush=True)
    alive = []
    for mutant in mutants:
        file = copy / "latentcodec" / mutant.file
        text, began = file.read_text(), time.monotonic()
        file.write_text(text.replace(mutant.old, mutant.new))
        try:
            noticed = run(copy, mutant.tests) == FAILED
        finally:
            file.write_text(text)
        print(
            f"{'killed' if noticed else 'SURVIVED':8} {time.monotonic() - began:5.1f} s  {mutant.name}",
            flush=True,
        )
        if not noticed:
            alive.append(mutant.name)
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only mutants whose name has one of these")
    parser.add_argument("--check", action="store_true", help="run nothing")
    options = parser.parse_args()
    check(MUTANTS)
    chosen = [
        m for m in MUTANTS if not options.words or any(w.lower() in m.name.lower() for w in options.words)
    ]
    if options.check:
        print(f"{len(chosen)} mutants, each of one piece of code that exists")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, folder)
        alive = survivors(chosen, Path(folder))
    print(
        f"{len(chosen) - len(alive)} of {len(chosen)} killed",
        *(f"survived: {name}" for name in alive),
        sep="\n",
    )
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
