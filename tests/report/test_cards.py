"""Model cards and evaluation blocks are written from results: every number is the result's."""

import pytest
import yaml

from latentcodec.report import __main__ as command
from latentcodec.report.cards import card_section, evaluation_block
from latentcodec.report.results import write_json

ENTRY = {"codec": "a", "latent": "f8c4", "psnr_over_klt": 1.25}
ENTRY |= {"psnr": {"mean": 25.5}, "ssim": {"mean": 0.75}, "lpips": {"mean": None}}
RESULT = {
    "bench": "reconstruction",
    "codecs": [ENTRY],
    "folder": "kodak",
    "evaluated": 24,
    "protocol": "8 bits",
}
RESULT |= {
    "lpips": "LPIPS not measured",
    "hardware": {"device": "a machine"},
    "date": "2026-01-01",
    "commit": "abc",
}


def test_a_reconstruction_becomes_a_table():
    assert (
        card_section(RESULT)
        == """## Reconstruction

24 images of kodak; 8 bits. LPIPS not measured.

| codec | latent | PSNR dB | over the KLT | SSIM | LPIPS |
| --- | --- | --- | --- | --- | --- |
| a | f8c4 | 25.50 | +1.25 | 0.7500 | - |

Measured 2026-01-01 on a machine, commit abc."""
    )


def test_pictures_that_came_back_unchanged_have_a_row():
    entry = ENTRY | {"psnr": {"mean": None}, "psnr_over_klt": None}  # which JSON has for infinity
    assert "| a | f8c4 | infinite | - | 0.7500 | - |" in card_section(RESULT | {"codecs": [entry]})


def test_an_inspection_becomes_verdicts_with_their_reasons():
    verdict = {"level": "warning", "reasons": [{"text": "Fragile: so it is."}], "notes": []}
    data = {
        "bench": "inspect",
        "folder": "photos",
        "measures": {"images": 7},
        "verdicts": {"diffusion": verdict},
    }
    assert (
        card_section(data | {"hardware": {"device": "a machine"}, "time": "now"})
        == """## Latents

Judged by `latentcodec inspect` on 7 images of photos.

- For a diffusion model: **warning**
  - Fragile: so it is.

Measured now on a machine, commit not recorded."""
    )


def test_the_evaluation_block_is_what_the_hub_reads():
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import model_index_to_eval_results

    name, results = model_index_to_eval_results(yaml.safe_load(evaluation_block(RESULT))["model-index"])
    assert name == "a"
    assert all(isinstance(result, EvalResult) for result in results)
    assert {result.metric_type: result.metric_value for result in results} == {"psnr": 25.5, "ssim": 0.75}


def test_the_command_prints_them_and_refuses_other_results(tmp_path, capsys):
    write_json(RESULT, tmp_path / "a.json")
    command.main([str(tmp_path / "a.json"), "--card"])
    assert "## Reconstruction" in capsys.readouterr().out
    command.main([str(tmp_path / "a.json"), "--evaluation"])
    assert "model-index" in capsys.readouterr().out
    write_json({"bench": "throughput"}, tmp_path / "b.json")
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "b.json"), "--card"])
    assert "not of throughput" in capsys.readouterr().err
