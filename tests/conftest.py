"""What many tests share: the real model's file, tiny checkpoints, runners and live servers."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from checkpoints import BOS, IM_START, byte_tokenizer, make_llama
from harness import OP_SETS, Tiny
from live import LiveServer
from wire import script_llama

from model.errors import ModelError
from model.source import locate
from server.config import ModelSettings

if TYPE_CHECKING:
    from test_docker import ImageBuild

torch.set_num_threads(1)  # tiny matrices: a second thread would only wait


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Let a stage of `make test` pass for which its ARGS leave no test."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and "alone" in session.config.option.markexpr:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(scope="session", autouse=True)
def begin_image_build(request: pytest.FixtureRequest) -> None:
    """Begin the image's build with the session if its test is to run, and runs here for sure."""
    wanted = "test_image_build_in_an_empty_environment" in {item.name for item in request.session.items}
    if wanted and "PYTEST_XDIST_WORKER" not in os.environ:
        request.getfixturevalue("image_build")


@pytest.fixture(scope="session")
def image_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ImageBuild | None"]:
    """The image's build, which takes a minute."""
    from test_docker import ROOT, ImageBuild

    build = ImageBuild(tmp_path_factory.mktemp("image")) if (ROOT / ".git").exists() else None
    yield build
    if build is not None:
        build.end()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model, downloaded once into the cache that `rivulet serve` uses."""
    settings = ModelSettings()
    try:
        return locate("smollm2-135m", None, settings.cache_folder, print)
    except ModelError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default model cannot be had here: {error}")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with grouped heads and a byte tokenizer, in float32."""
    folder = tmp_path_factory.mktemp("tiny")
    byte_tokenizer(folder)
    make_llama(folder, tie=True, rope_scaling=False, seed=1, head_dim=32)
    return folder


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of 4,000 tokens."""
    folder = tmp_path_factory.mktemp("long")
    byte_tokenizer(folder)
    make_llama(folder, tie=True, seed=2, max_positions=4096)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Tiny:
    """The tiny model on torch's ops, from which tests make runners and engines."""
    return Tiny(tiny_folder)


@pytest.fixture(scope="session", params=OP_SETS)
def any_tiny(request: pytest.FixtureRequest, tiny_folder: Path) -> Tiny:
    """The tiny model on each op set in turn."""
    return Tiny(tiny_folder, op_set=request.param)


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., LiveServer]]:
    """Start live servers that end with the session; equal arguments give the same server."""
    servers: dict[tuple[object, ...], LiveServer] = {}

    def start(model: Path, **settings: object) -> LiveServer:
        key = (model, *sorted(settings.items()))
        if key not in servers:
            servers[key] = LiveServer(model, **settings)
        return servers[key]

    yield start
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="session")
def tiny_server(serve: Callable[..., LiveServer], tiny_folder: Path) -> LiveServer:
    """A live server of the tiny model."""
    return serve(tiny_folder, dtype="float32")


@pytest.fixture(scope="session")
def smollm2_server(serve: Callable[..., LiveServer], smollm2_path: Path) -> LiveServer:
    """A live server of the default model as users run it."""
    return serve(smollm2_path)


@pytest.fixture(scope="session")
def script_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says what stands here: after each byte comes the next one, after the last one EOS."""
    folder = tmp_path_factory.mktemp("script")
    scripts = ("9\nA😎é漢. BCD", "1\r2\u20283", "4\x855", '6"7\\8')
    cut = b"x\xc5"  # the first byte of a character that never ends
    special = (ord("u"), IM_START, ord("v"), BOS, ord("w"))
    script_llama(folder, *(script.encode() for script in scripts), cut, special)
    return folder


@pytest.fixture(scope="session")
def script_server(serve: Callable[..., LiveServer], script_folder: Path) -> LiveServer:
    """A live server of the model with known answers."""
    return serve(script_folder, dtype="float32")


@pytest.fixture(scope="session")
def exact_server(serve: Callable[..., LiveServer], tiny_folder: Path) -> LiveServer:
    """A live server of the tiny model on which a lone call computes the same whatever came before it."""
    return serve(tiny_folder, dtype="float32", prefix_cache=False)
