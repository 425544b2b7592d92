"""The kernels over odd shapes under the address and undefined-behaviour sanitizers (sanitize/kernels.cpp)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from model.backend import VARIANTS
from model.machine import processor_flags

HERE = Path(__file__).parent
KERNELS = HERE.parent / "model" / "native"
AVX512_VNNI = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c"
AVX512 = f"{AVX512_VNNI} -mavx512bf16"
OPTIONS = {
    "amx": f"{AVX512} -mamx-tile -mamx-int8 -mamx-bf16",
    "avx512": AVX512,
    "avx512_vnni": AVX512_VNNI,
    "avx2": "-mavx2 -mfma -mf16c",
    "avx2, tiles in plain C++": "-mavx2 -mfma -mf16c -DRIVULET_MODEL_OF_TILES",
}


@pytest.fixture(scope="module", params=OPTIONS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := VARIANTS[request.param.partition(",")[0]] - processor_flags():
        pytest.skip(f"this processor lacks {sorted(missing)}")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("sanitized") / request.param.partition(",")[0]
    sources = [HERE / "sanitize" / "kernels.cpp", *sorted(KERNELS.glob("*.cpp"))]
    checks = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-D_GLIBCXX_ASSERTIONS",
    ]
    options = ["-std=c++17", "-O0", "-g1", "-w", "-pthread", f"-I{KERNELS}", *OPTIONS[request.param].split()]
    done = subprocess.run(
        [compiler, *options, *checks, *map(str, sources), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert done.returncode == 0, done.stderr[-2000:]
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, env=environment, timeout=200, check=False
    )


@pytest.mark.timeout(400)
def test_no_kernel_reads_or_writes_past_an_end(program: Path) -> None:
    done = run(program)
    assert done.stdout.strip() == "done", done.stdout[-500:] + done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_write_past_an_end_is_seen(program: Path) -> None:
    done = run(program, "fault")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
