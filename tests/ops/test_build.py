"""The native functions are built once, by any number of processes, and said to be missing where they cannot be."""

import logging
import threading

import pytest
import torch

from latentcodec.adopt import build as build_vae
from latentcodec.adopt import optimize_vae
from latentcodec.ops.native import build


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A user who has called nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_builders", [])
    build.library.cache_clear()
    build._cache_folder.cache_clear()
    yield tmp_path
    for thread in build._builders:
        thread.join()
    build.library.cache_clear()
    build._cache_folder.cache_clear()


@pytest.mark.parametrize("command", ["", "no-such-compiler", "false", "true"])
def test_without_a_compiler_that_works_it_is_said_once(fresh, monkeypatch, caplog, command):
    monkeypatch.setenv("CXX", command)
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
        assert build.library() is None
    assert len(caplog.records) == 1
    assert "slower but equal" in caplog.text


@pytest.mark.slow
def test_processes_that_build_at_once_leave_one_whole_library(fresh):
    found = []
    flags = [*build.FLAGS, "-O0"]
    builders = [
        threading.Thread(target=lambda: found.append(build._built(build._compiler(), flags)))
        for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(set(found)) == 1
    folder = fresh / "latentcodec" / "native"
    assert list(folder.iterdir()) == [found[0]]
    build._declared(build.ctypes.CDLL(str(found[0])))


def test_a_first_call_does_not_wait_for_the_compiler(fresh, monkeypatch):
    may_end, original = threading.Event(), build._compile

    def compile_later(*arguments):
        assert may_end.wait(60)
        original(*arguments)

    monkeypatch.setattr(build, "_compile", compile_later)
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-O0"])
    assert build.library_if_built() is None
    assert build.library_if_built() is None
    assert len(build._builders) == 1
    may_end.set()
    build._builders[0].join()
    assert build.library_if_built() is build.library() is not None
    build.library.cache_clear()
    monkeypatch.setattr(build, "_builders", [])  # a later process finds the file, and needs no thread
    assert build.library_if_built() is not None
    assert build._builders == []


@pytest.mark.parametrize("command", ["", "no-such-compiler", "false"])
def test_without_a_compiler_no_thread_tries_for_ever(fresh, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    for thread in (build.library_if_built(), *build._builders):
        assert thread is None or thread.join() is None
    assert build.library_if_built() is None


@pytest.mark.slow
def test_other_flags_make_another_file(fresh):
    compiler = build._compiler()
    assert build._built(compiler, [*build.FLAGS, "-O0"]) != build._built(
        compiler, [*build.FLAGS, "-O0", "-g"]
    )


def test_twenty_threads_share_one_vae():
    vae = build_vae(
        {
            "block_out_channels": (64, 128),
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
    )
    vae = optimize_vae(vae).eval()
    images = [torch.rand(1, 3, 24 + 8 * (i % 3), 40) for i in range(20)]
    results: dict[int, torch.Tensor] = {}

    def encode(index):
        with torch.no_grad():
            results[index] = vae.encoder(images[index])

    threads = [threading.Thread(target=encode, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for index, image in enumerate(images):
            assert torch.equal(results[index], vae.encoder(image))


@pytest.mark.parametrize("script", ["printf 'caf\\351\\n'", '[ "$1" = --version ] || { echo >&2; exit 1; }'])
def test_a_compiler_that_says_nothing_or_no_utf8_is_no_error(fresh, monkeypatch, caplog, tmp_path, script):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
    assert "slower but equal" in caplog.text


@pytest.mark.slow
def test_a_compiler_with_half_a_quotation_is_no_error(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", 'c++ "-O1')
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
    assert "slower but equal" in caplog.text
