"""The small op set that the model is written against, one class a way of computing it.

A backend is chosen once, at start; `TorchOps` is the reference that the tests believe.
"""

import torch

from model.ops.cuda import CudaOps
from model.ops.reference import TorchOps

__all__ = ["CudaOps", "TorchOps", "choose_ops"]


def choose_ops(device: torch.device, dtype: torch.dtype) -> TorchOps:
    """The fastest op set for a device and a weight type (flash attention has no float32)."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return CudaOps(device, dtype)
    return TorchOps(device, dtype)
