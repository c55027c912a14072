"""The name and the matrix units of this machine's processor."""

import os
import platform
from pathlib import Path

import torch

# Instruction sets that determine the speed of matrix products, slowest first, and their usual spelling.
UNITS = {"avx2": "AVX2", "avx512_f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "ARM BF16"}


def multiplies_bf16() -> bool:
    """Whether an x86 processor multiplies bfloat16 matrices in hardware and oneDNN uses it.

    Elsewhere torch emulates bfloat16 at a small fraction of the speed of float32.
    """
    if not _flags() & {"avx512_bf16", "amx_bf16"} or not torch.backends.mkldnn.is_available():
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a private operator, which a release of torch may lack
        return True


def describe() -> str:
    """For example "AMD EPYC, 2 cores, AVX2 AVX512 AVX512-BF16", with environment variables that restrict it."""
    units = " ".join(name for flag, name in UNITS.items() if flag in _flags())
    told = [f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA") if name in os.environ]
    return ", ".join(filter(None, [_name(), f"{cores()} cores", units, *told]))


def cores() -> int:
    """The number of cores that this process may use; a container often has fewer than the machine."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no such limit
        return os.cpu_count() or 1


def _flags() -> set[str]:
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.9 lacks it
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    return set(_of_linux("flags").replace("avx512f", "avx512_f").split())


def _name() -> str:
    return _of_linux("model name") or platform.processor() or platform.machine()


def _of_linux(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, or nothing."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), "")
