"""Builds the native kernels, a shared library a variant, with whatever C++ compiler is there.

Without one, or on another kind of processor, the install goes through and torch's ops serve.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("model/native").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("model/native").glob("*.h"))
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512_VNNI = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", *AVX2]
AVX512 = [*AVX512_VNNI, "-mavx512bf16"]
FLAGS = {
    "amx": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    "avx512": AVX512,
    "avx512_vnni": AVX512_VNNI,
    "avx2": AVX2,
}


class BuildLibraries(build_ext):
    """Plain shared libraries: named without Python's suffix, since ctypes loads them."""

    def get_ext_filename(self, fullname: str) -> str:
        """`model.native.rivulet_avx2` -> model/native/rivulet_avx2.so."""
        return fullname.replace(".", "/") + ".so"


def extensions() -> list[Extension]:
    """One for each variant, on the processors that they are for."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    return [
        Extension(
            f"model.native.rivulet_{variant}",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=["-O3", "-std=c++17", "-pthread", "-g0", "-w", *flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for variant, flags in FLAGS.items()
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries})
