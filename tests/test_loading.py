"""The memory that loading takes at its peak: below 1.3 times what it leaves, whatever the format."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_gguf, make_llama
from harness import ROOT

from model.backend import VARIANTS
from model.machine import processor_flags
from model.ops.library import is_built

BOUND = 1.3

LOAD = """
import json, resource, sys
from pathlib import Path
from model.lean import import_torch
import_torch()
from model import loader
from model.backend import Wishes, choose_backend
from model.footprint import measure
from model.weights import open_checkpoint

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

path, kernels, dtype = sys.argv[1:]
checkpoint = open_checkpoint(Path(path))
backend = choose_backend(Wishes(kernels=kernels, dtype=dtype, threads=2), checkpoint.config)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
model = loader.load_model(checkpoint, backend.ops, 64)
del checkpoint
sizes = {"peak": status("VmHWM") - before, "left": status("VmRSS") - before}
print(json.dumps(sizes | {"weights": measure(open_checkpoint(Path(path)), backend.ops).memory}))
"""

SHAPE = {
    "layers": 4,
    "hidden_size": 512,
    "intermediate_size": 4096,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 64,
    "vocab_size": 60_000,
}
"""60 million numbers, half of them in one matrix."""

GGUF = ("Q8_0", "Q4_1", "Q5_0")

NATIVE = next((v for v in VARIANTS if is_built(v) and not VARIANTS[v] - processor_flags()), None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("large")
    model = make_llama(folder / "F32", tie=True, **SHAPE)
    model.half().save_pretrained(folder / "F16")
    torch.save(model.state_dict(), folder / "F16" / "model.pth")
    made = {"F16": folder / "F16", "F32": folder / "F32", "pth": folder / "F16" / "model.pth"}
    return made | {kind: make_gguf(model.float(), folder / f"{kind}.gguf", kind=kind) for kind in GGUF}


CASES = [
    *((kind, NATIVE or "avx2", "auto") for kind in ("F16", "F32", "pth", *GGUF)),
    ("F16", "torch", "bfloat16"),
    ("Q8_0", "torch", "float32"),
]


@pytest.mark.parametrize(("kind", "kernels", "dtype"), CASES)
def test_the_peak_of_loading(files: dict[str, Path], kind: str, kernels: str, dtype: str) -> None:
    if kernels != "torch" and NATIVE is None:
        pytest.skip("the native kernels do not run here")
    command = [sys.executable, "-c", LOAD, files[kind], kernels, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    sizes = json.loads(done.stdout)
    assert sizes["weights"] <= sizes["left"] <= 1.6 * sizes["weights"], sizes
    assert sizes["peak"] <= BOUND * sizes["left"], sizes
