"""What a run counts and writes while it trains: its minutes, its waiting for data, TensorBoard, a full disk."""

import json
import resource
import time

import pytest
import torch
from small_runs import Stop, metrics, small, start, train


def test_a_run_ends_when_its_minutes_are_over_and_its_bar_knows_how_many_steps_that_makes(tmp_path, images):
    trainer = start(small(tmp_path / "run", images, max_steps=100_000, max_minutes=1.5 / 60))
    for micro_batches in trainer.steps(Stop()):
        report = trainer.train_step(micro_batches)
        trainer.journal.log(trainer.state.step, trainer.progress, report)
        assert trainer.journal.bar.total == round(trainer.state.step / trainer.progress)
    assert 1.5 <= trainer.state.seconds < 10
    assert trainer.journal.bar.total == trainer.state.step < 1000
    assert report["lr"] < 1e-3 / 2  # the schedule has followed the clock


def test_the_share_of_waiting_for_data_can_be_read_from_the_metrics(tmp_path, images):
    trainer = start(small(tmp_path / "run", images, max_steps=3))
    read = trainer.images.source.read

    def slowly(index):
        time.sleep(0.05)
        return read(index)

    trainer.images.source.read = slowly
    train(trainer)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in [line for line in lines if "total" in line]:
        assert 0.1 <= line["waited_seconds"] <= line["step_seconds"]
        assert line["images_per_second"] == pytest.approx(2 / line["step_seconds"])


def test_the_wait_of_the_slowest_process_counts(tmp_path, images):
    trainer = start(small(tmp_path / "run", images, max_steps=2))
    other = torch.tensor(
        [0.0] * 3 + [9.0]
    )  # its notes: no time, no signal, nothing rejected, nine seconds of waiting
    gather = trainer.accelerator.gather
    trainer.accelerator.gather = lambda row: gather(
        torch.cat([row, torch.cat([row[:, :-4], other[None]], 1)])
    )
    assert trainer.train_step(next(trainer.steps(Stop())))["waited_seconds"] == 9


def test_a_stop_of_this_process_or_of_another_takes_no_minutes_of_training(tmp_path, images, monkeypatch):
    monkeypatch.setattr(
        "latentcodec.training.exchange.running_time", lambda: 7.0
    )  # a clock that stands still
    trainer = start(small(tmp_path / "run", images, max_steps=2))
    waited = torch.tensor([3600.0, 0, 0, 0])  # the notes of a process that waited an hour for this one
    gather = trainer.accelerator.gather
    trainer.accelerator.gather = lambda row: gather(
        torch.cat([row, torch.cat([row[:, :-4], waited[None]], 1)])
    )
    trainer.train_step(next(trainer.steps(Stop())))
    assert trainer.state.seconds == 0


def test_a_full_disk_is_an_error_that_names_the_diary_and_its_bytes(tmp_path, images):
    trainer = start(small(tmp_path / "run", images))
    train(trainer, kill_at=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (trainer.journal.metrics.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"metrics\.jsonl cannot be written, it needs \d+ bytes: .*File too large"
        ):
            train(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trainer = start(small(tmp_path / "run", images))  # half a line was written, and is forgotten
    train(trainer)
    assert [line["step"] for line in metrics(tmp_path / "run") if "total" in line] == [1, 2, 3, 4, 5, 6]


def test_samples_and_numbers_reach_tensorboard(tmp_path, images):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = start(small(tmp_path / "run", images, max_steps=2, trackers=["tensorboard"]))
    train(trainer)
    trainer.accelerator.end_training()
    (folder,) = (path.parent for path in (tmp_path / "run/latentcodec").glob("events*"))
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("total")] == [1, 2]
    assert events.Scalars("validation/psnr")[0].step == 2
    assert events.Images("samples")[0].width > events.Images("samples")[0].height / 3
