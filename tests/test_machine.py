"""What a machine can do, told apart from what its libraries call supported."""

from __future__ import annotations

import pytest
import torch

from latentcodec import control_groups, machine

X86 = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some CPU\nflags\t\t: fpu sse4_1 avx avx2 fma {}\n"
AMD = X86.replace("GenuineIntel", "AuthenticAMD")
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No settings from outside, and nothing remembered of other tests."""
    for name in (machine.OVERRIDE, *machine.ONEDNN_LIMITS):
        monkeypatch.delenv(name, raising=False)
    machine._has_bfloat16_units.cache_clear()
    yield
    machine._has_bfloat16_units.cache_clear()


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Let the system describe another processor."""

    def describe(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")

    return describe


@pytest.fixture
def clock(monkeypatch):
    """Seconds that convolutions take, by dtype; and the dtypes that were timed."""
    times, asked = {torch.float32: 1.0, torch.bfloat16: 1.0}, []

    def seconds(dtype, device):
        asked.append(dtype)
        if isinstance(times[dtype], Exception):
            raise times[dtype]
        return times[dtype]

    monkeypatch.setattr(machine, "convolution_seconds", seconds)
    return times, asked


@pytest.mark.parametrize(
    ("text", "flags", "dtype"),
    [
        (X86, "", torch.float32),
        (X86, "avx512f avx512_vnni", torch.float32),
        (X86, "avx512f avx512_vnni avx512_bf16", torch.float32),  # Intel's: there, but no gain
        (AMD, "avx512f avx512_vnni avx512_bf16", torch.bfloat16),
        (X86, "avx512f amx_tile amx_bf16", torch.bfloat16),
        (X86, "avx512f amx_tile amx_int8", torch.float32),
        (X86, "avx_vnni avx_ne_convert", torch.float32),
        (AMD, "", torch.float32),
    ],
)
def test_an_x86_processor_decides_by_its_description_without_a_measurement(
    processor, clock, monkeypatch, text, flags, dtype
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    processor(text.format(flags))
    assert machine.fast_dtype() == dtype
    assert machine.is_fast(torch.bfloat16) == (dtype == torch.bfloat16)
    assert machine.is_fast(torch.float32)
    assert not machine.is_fast(torch.float16)
    assert clock[1] == []


@pytest.mark.parametrize("name", machine.ONEDNN_LIMITS)
@pytest.mark.parametrize(
    ("limit", "dtype"),
    [
        ("AVX2", torch.float32),
        ("avx2", torch.float32),
        ("AVX512_CORE_VNNI", torch.float32),
        ("AVX512_CORE_BF16", torch.bfloat16),
        ("AVX512_CORE_AMX", torch.bfloat16),
        ("DEFAULT", torch.bfloat16),
        ("AVX10_1_512_AMX", torch.bfloat16),
    ],
)
def test_units_that_the_environment_switches_off_are_not_there(processor, monkeypatch, name, limit, dtype):
    processor(AMD.format("avx512f avx512_vnni avx512_bf16 amx_bf16"))
    monkeypatch.setenv(name, limit)
    assert machine.fast_dtype() == dtype


@pytest.mark.parametrize(
    ("text", "flags", "dtype"),
    [
        (AMD, "avx512f avx512_bf16", torch.float32),  # as fast in float32, by Winograd's convolutions
        (X86, "avx512f avx512_bf16", torch.float32),
        (X86, "avx512f avx512_bf16 amx_bf16", torch.bfloat16),
        (X86, "", torch.float32),
    ],
)
def test_x86_processors_train_in_bfloat16_with_amx_only(processor, monkeypatch, text, flags, dtype):
    processor(text.format(flags))
    assert machine.training_dtype() == dtype
    monkeypatch.setenv(machine.OVERRIDE, "bfloat16")
    assert machine.training_dtype() == torch.bfloat16


def test_what_is_no_x86_processor_trains_in_what_it_is_fast_in(processor, clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    processor(AMD.format("avx512_bf16"))
    assert machine.training_dtype("cuda") == torch.bfloat16
    processor(ARM.format("bf16"))
    clock[0][torch.bfloat16] = 0.5
    assert machine.training_dtype() == torch.bfloat16


def test_instruction_sets_are_those_that_may_be_used(processor, monkeypatch):
    processor(X86.format("avx512f avx512_bf16"))
    assert machine.instruction_sets() == ["avx2", "avx512f", "avx512_bf16"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.instruction_sets() == ["avx2"]
    processor(ARM.format("sve bf16"))
    assert machine.instruction_sets() == ["asimd", "sve", "bf16"]
    processor("nothing to the point")
    assert machine.instruction_sets() == []


@pytest.mark.parametrize(
    ("seconds", "dtype"), [(0.5, torch.bfloat16), (0.95, torch.float32), (RuntimeError("no"), torch.float32)]
)
@pytest.mark.parametrize("text", [ARM.format("bf16"), "nothing to the point"])
def test_in_doubt_a_convolution_is_timed(processor, clock, monkeypatch, text, seconds, dtype):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    processor(text)
    clock[0][torch.bfloat16] = seconds
    assert machine.fast_dtype() == dtype
    assert torch.bfloat16 in clock[1]


def test_an_arm_processor_without_units_is_not_timed(processor, clock):
    processor(ARM.format("sve"))
    assert machine.fast_dtype() == torch.float32
    assert clock[1] == []


def test_a_gpu_that_emulates_bfloat16_has_no_units_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert machine.fast_dtype("cuda") == torch.float32
    assert machine.is_fast(torch.float16, "cuda")


def test_the_current_gpu_is_asked_each_time(monkeypatch):
    """Of two GPUs in a machine, the answer for the first one was kept for both."""
    answers = iter([False, True])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: next(answers))
    assert machine.fast_dtype("cuda") == torch.float32
    assert machine.fast_dtype("cuda") == torch.bfloat16


@pytest.mark.parametrize(("value", "dtype"), machine.DTYPES.items())
def test_the_override_takes_the_place_of_the_decision(processor, monkeypatch, value, dtype):
    processor(X86.format(""))
    monkeypatch.setenv(machine.OVERRIDE, value)
    assert machine.fast_dtype() == dtype


def test_a_wrong_override_is_named(monkeypatch):
    monkeypatch.setenv(machine.OVERRIDE, "bf16")
    with pytest.raises(ValueError, match=r"LATENTCODEC_DTYPE is 'bf16'; it may be float32 or bfloat16"):
        machine.fast_dtype()


def test_the_cost_of_a_format_is_its_time_over_that_of_float32(clock):
    clock[0][torch.bfloat16] = 9.0
    assert machine.emulation_cost(torch.bfloat16) == 9.0


def test_a_convolution_is_timed_in_both_formats():
    assert all(machine.convolution_seconds(dtype) > 0 for dtype in machine.DTYPES.values())


@pytest.fixture
def cores(tmp_path, monkeypatch):
    """Let this process run on some logical processors, of which `siblings` share a core."""

    def describe(allowed: int, siblings: int, known: bool = True) -> None:
        monkeypatch.setattr(machine, "_allowed_threads", lambda: list(range(allowed)))
        monkeypatch.setattr(machine, "_core", lambda i: ("0", str(i // siblings)) if known else None)
        monkeypatch.setattr(control_groups, "PROCESS_CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "fs")

    return describe


def test_two_threads_of_a_core_count_once_and_forbidden_ones_not(cores, monkeypatch):
    cores(allowed=8, siblings=2)
    assert machine.physical_cores() == 4
    cores(allowed=3, siblings=1)
    assert machine.physical_cores() == 3
    cores(allowed=8, siblings=2, known=False)
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical: 4)
    assert machine.physical_cores() == 4


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "350000 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/seen/from/outside", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "damaged"}, 16),
        (
            "4:cpu,cpuacct:/docker/1",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "1"},
            16,
        ),
        ("4:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "400000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 4),
        ("4:cpuacct,cpu:/d", {"cpu/cpu.cfs_quota_us": "500000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 5),
        ("3:cpuset:/x", {"cpuset/x/cpu.max": "100000 100000"}, 16),
    ],
)
def test_limits_of_control_groups_count(cores, tmp_path, groups, files, count):
    cores(allowed=16, siblings=1)
    (tmp_path / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert machine.physical_cores() == count


@pytest.mark.parametrize(
    ("count", "arguments", "threads"),
    [
        (2, dict(workers=2), 2),
        (4, dict(workers=2), 3),
        (8, dict(workers=2), 6),
        (64, dict(workers=2), 62),
        (8, dict(processes=4, workers=2), 2),
        (2, dict(processes=4), 1),
        (8, dict(threads=5, workers=2), 5),
    ],
)
def test_a_process_takes_its_share_of_the_cores(monkeypatch, count, arguments, threads):
    taken = []
    monkeypatch.setattr(machine, "physical_cores", lambda: count)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    assert machine.use_cores(**arguments) == threads
    assert taken == [threads]


def test_float32_is_exact_in_convolutions_of_gpus_for_a_while(monkeypatch):
    """And nothing else of cuDNN's settings changes."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "allow_tf32", True)  # torch's default, which a bench may have changed here
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    assert before[0] == "tf32"
    with machine.exact_convolutions():
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", before[1])
        assert cudnn.enabled
        assert cudnn.benchmark
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == before
    assert cudnn.allow_tf32  # which raises where the settings contradict each other
