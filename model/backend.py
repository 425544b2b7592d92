"""Chooses what the model runs on, once, at start: device, op set, number types, threads."""

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.machine import processor_flags, usable_cores
from model.ops.base import Ops
from model.ops.cuda import CudaOps
from model.ops.library import Library, Unusable, is_built
from model.ops.native import NativeOps
from model.ops.panels import unfit
from model.ops.reference import TorchOps

_AVX512_VNNI = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c"}
_AVX512 = {*_AVX512_VNNI, "avx512_bf16"}
VARIANTS = {
    "amx": {*_AVX512, "amx_tile", "amx_int8", "amx_bf16"},
    "avx512": _AVX512,
    "avx512_vnni": _AVX512_VNNI,
    "avx2": {"avx2", "fma", "f16c"},
}
"""The native kernels' variants, fastest first, and the processor features that each needs."""

BITS = {"auto": 8, "q8": 8, "q4": 4, "none": 16}
"""Of the native kernels' weights where the file stores plain numbers."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for; `auto` leaves it to us."""

    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"
    quantize: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """The choice, and what to say of it."""

    ops: Ops
    description: str
    note: str | None = None
    """Why it is not the fastest there could be."""


def choose_backend(wishes: Wishes, config: ModelConfig) -> Backend:
    """The fastest op set that does what was asked on this machine (ModelError if none does)."""
    device = choose_device(wishes.device)
    if device.type == "cuda":
        dtype = choose_dtype(wishes.dtype, device)
        return Backend(
            CudaOps(device, dtype) if dtype != torch.float32 else TorchOps(device, dtype),
            f"{torch.cuda.get_device_name(device)}, {_name(dtype)}",
        )
    threads = wishes.threads or usable_cores()
    variant, why_not = choose_variant(wishes, config)
    if variant is not None:
        torch.set_num_threads(1)  # two pools of threads on the same cores cost more than they give
        bits = BITS[wishes.quantize]
        weights = "bfloat16" if bits == 16 else f"{bits}-bit"
        return Backend(
            NativeOps(Library(variant), threads, bits),
            f"CPU, {threads} threads, native {variant} kernels, {weights} unless the file has fewer",
        )
    torch.set_num_threads(threads)
    dtype = choose_dtype(wishes.dtype, device)
    note = None
    if why_not is not None:
        note = f"the native kernels are not used: {why_not}; torch's ops serve, about 2 to 9 times slower"
    return Backend(TorchOps(device, dtype), f"CPU, {threads} threads, torch ops, {_name(dtype)}", note)


def companion(ops: Ops, config: ModelConfig) -> Ops:
    """The op set for a second model beside the first: the same one, or torch's where that cannot run it."""
    if isinstance(ops, NativeOps) and unfit(config) is not None:
        return TorchOps(ops.device, choose_dtype("auto", ops.device))
    return ops


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device that is there (ModelError if not)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda was asked for, but torch sees no CUDA GPU: use --device cpu or auto")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes bfloat16 where the processor multiplies it (measured twice as fast), else float32."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def choose_variant(wishes: Wishes, config: ModelConfig) -> tuple[str | None, str | None]:
    """A variant of the native kernels, or None and why not; no reason if the user wanted torch's ops.

    Raises ModelError for a variant that was asked for by name and cannot be had.
    """
    if wishes.kernels == "torch" or wishes.dtype != "auto":
        return None, None
    flags = processor_flags()
    asked = [wishes.kernels] if wishes.kernels != "auto" else list(VARIANTS)
    misfit = unfit(config)
    reasons = []
    for variant in asked:
        if missing := sorted(VARIANTS[variant] - flags):
            reasons.append(f"the {variant} variant needs {', '.join(missing)}, which this processor lacks")
        elif not is_built(variant):
            reasons.append("they were not built, a C++ compiler was missing when Rivulet was installed")
        elif misfit is not None:
            reasons.append(misfit)
        elif (fault := unusable(variant)) is not None:
            reasons.append(f"the {variant} variant: {fault}")
        else:
            return variant, None
    if wishes.kernels != "auto":
        raise ModelError(f"--kernels {wishes.kernels} cannot be used: {reasons[0]}; use --kernels auto")
    return None, reasons[-1]


def unusable(variant: str) -> str | None:
    """Why a variant that is built cannot be used here, if it cannot."""
    try:
        Library(variant)
    except Unusable as fault:
        return str(fault)
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
