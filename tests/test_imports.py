"""What an import costs: nothing is loaded before it is used, and what is missing is named with its cure."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import latentcodec
from latentcodec.cli import run
from latentcodec.extras import require

HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "datasets",
    "matplotlib",
    "lpips",
    "accelerate",
    "numpy",
    "PIL",
}


def loaded_by(statement):
    """The packages that Python loads for a statement, in a process of its own, and the seconds that it takes."""
    started = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement], capture_output=True, text=True, check=True
    )
    lines = [line.split("|") for line in run.stderr.splitlines() if line.count("|") == 2]
    return {line[2].strip().split(".")[0] for line in lines}, time.perf_counter() - started


def test_the_package_is_imported_without_the_libraries():
    loaded, seconds = loaded_by("import latentcodec; latentcodec.__version__; dir(latentcodec)")
    assert "latentcodec" in loaded
    assert not loaded & HEAVY
    assert seconds < 2  # half a second on an idle machine


def test_reading_an_image_needs_no_diffusers():
    loaded, _ = loaded_by("from latentcodec import load_image, save_image")
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "datasets", "matplotlib", "lpips", "accelerate"}


@pytest.mark.slow
def test_a_codec_needs_no_library_of_training_or_reports():
    loaded, _ = loaded_by("from latentcodec import LatentCodec, optimize_vae")
    assert not loaded & {"datasets", "matplotlib", "lpips", "tensorboard", "jsonargparse"}


@pytest.mark.slow
def test_training_on_a_folder_needs_no_library_of_data_sets_or_reports():
    loaded, _ = loaded_by("import latentcodec.training.loop")
    assert not loaded & {"datasets", "pandas", "matplotlib", "tensorboard"}


def test_python_without_docstrings_is_refused_in_one_line(monkeypatch, capsys):
    bare = SimpleNamespace(flags=SimpleNamespace(optimize=2), excepthook=sys.excepthook)
    monkeypatch.setattr("latentcodec.extras.sys", bare)
    assert run(["verify", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: python -OO")
    assert said.count("\n") == 1


def test_all_public_names_are_there_and_no_others():
    for name in latentcodec.__all__:
        assert getattr(latentcodec, name).__name__ == name
    assert set(latentcodec.__all__) <= set(dir(latentcodec))
    assert latentcodec._MODULES.keys() == set(latentcodec.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LatentCodek'"):
        latentcodec.LatentCodek  # noqa: B018


def test_a_missing_package_is_named_with_what_installs_it():
    require("report", "torch", "diffusers")
    with pytest.raises(ModuleNotFoundError, match=r"^no_such_package: .*pip install 'latentcodec\[report\]'"):
        require("report", "torch", "no_such_package")


@pytest.mark.parametrize("package", ["matplotlib"])
def test_a_report_without_its_extra_ends_in_one_line(package):
    statement = f"import sys; sys.modules[{package!r}] = None; import latentcodec.report.page"
    run = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: {package}: not installed; pip install 'latentcodec[report]'")
    assert run.returncode == 1


def test_the_help_of_the_command_needs_no_torch():
    loaded, _ = loaded_by("import sys; sys.argv = ['latentcodec', '--help']; import latentcodec.cli")
    assert "typer" in loaded
    assert not loaded & HEAVY
