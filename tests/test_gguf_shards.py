"""A GGUF model in several files, and a folder that holds one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import byte_tokenizer_metadata, make_llama, read_metadata
from gguf_files import write_gguf
from harness import make_ops

from model import loader
from model.errors import ModelError
from model.weights import open_checkpoint
from model.weights.gguf import GgufFiles

PARTS = 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one.gguf`, the same in parts, and parts of another model of the same sizes."""
    folder = tmp_path_factory.mktemp("sources")
    tokens = byte_tokenizer_metadata()
    for name, seed in (("one", 1), ("another", 2)):
        model = make_llama(folder / "hf", tie=False, seed=seed)
        write_gguf(model, folder / f"{name}.gguf", metadata=tokens)
        write_gguf(model, folder / f"{name}.gguf", metadata=tokens, parts=PARTS)
    model = make_llama(folder / "hf", tie=False, layers=3)
    write_gguf(model, folder / "longer.gguf", metadata=tokens, parts=PARTS)
    return folder


def part(name: str, number: int, count: int = PARTS) -> str:
    return f"{name}-{number:05}-of-{count:05}.gguf"


@pytest.fixture
def parts(sources: Path, tmp_path: Path) -> Path:
    for number in range(1, PARTS + 1):
        shutil.copy(sources / part("one", number), tmp_path)
    return tmp_path


def same(path: Path, other: Path) -> bool:
    """Whether two checkpoints are one model."""
    one, two = open_checkpoint(path), open_checkpoint(other)
    shapes = loader.parameter_shapes(one.config)
    ours, theirs = dict(one.tensors(shapes)), dict(two.tensors(shapes))
    return one.config == two.config and all(ours[k].data.equal(theirs[k].data) for k in shapes)


@pytest.mark.parametrize("number", range(1, PARTS + 1))
def test_any_part_gives_the_whole_model(number: int, parts: Path, sources: Path) -> None:
    path = parts / part("one", number)
    checkpoint = open_checkpoint(path)
    loader.load_model(checkpoint, make_ops("torch"), 64)
    assert same(path, sources / "one.gguf")
    assert not same(path, sources / "another.gguf")
    assert isinstance(checkpoint.files, GgufFiles)
    metadata = {k: v for k, v in checkpoint.files.metadata.items() if not k.startswith("split.")}
    assert metadata == read_metadata(sources / "one.gguf")  # and so the tokenizer is there
    # A tensor is named by the file that it stands in.
    assert part("one", 1) in checkpoint.describe("embedding")
    assert part("one", PARTS) in checkpoint.describe("output")


def test_a_folder_with_one_model_is_that_model(parts: Path, sources: Path, tmp_path: Path) -> None:
    assert same(parts, sources / "one.gguf")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(sources / "one.gguf", alone / "some name.gguf")
    assert same(alone, sources / "one.gguf")
    shutil.copy(sources / "another.gguf", alone)
    with pytest.raises(ModelError, match=r"holds 2 GGUF models \(another.gguf, some name.gguf\)"):
        open_checkpoint(alone)
    for file in (sources / "hf").iterdir():
        shutil.copy(file, alone)
    assert open_checkpoint(alone).path == alone  # config.json says what the folder is


def missing(folder: Path, sources: Path) -> None:
    (folder / part("one", 2)).unlink()


def swapped(folder: Path, sources: Path) -> None:
    shutil.copy(sources / part("one", 3), folder / part("one", 2))


def of_another_count(folder: Path, sources: Path) -> None:
    shutil.copy(sources / part("longer", 2), folder / part("one", 2))


def whole(folder: Path, sources: Path) -> None:
    shutil.copy(sources / "one.gguf", folder / part("one", 2))


def repeated(folder: Path, sources: Path) -> None:
    """The bytes of the part that follow its own numbers are the third's."""
    third = (sources / part("one", 3)).read_bytes()
    key = b"split.no" + b"\x02\x00\x00\x00"  # uint16
    assert third.count(key + b"\x02\x00") == 1
    (folder / part("one", 2)).write_bytes(third.replace(key + b"\x02\x00", key + b"\x01\x00"))


def damaged(folder: Path, sources: Path) -> None:
    path = folder / part("one", 3)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (missing, 2, "is missing, one of 3 parts"),
        (swapped, 2, "field split.no is 2, it must be 1"),
        (of_another_count, 2, "field split.tensors.count is 30, it must be 21"),
        (whole, 2, "field split.no is missing, it must be 1"),
        (repeated, 3, "stands in one-00002-of-00003.gguf too"),
        (damaged, 3, "the file is truncated"),
    ],
)
@pytest.mark.parametrize("given", [1, 3])
def test_a_part_that_is_missing_or_foreign_is_named(
    given: int, damage: Callable[[Path, Path], None], file: int, words: str, parts: Path, sources: Path
) -> None:
    damage(parts, sources)
    with pytest.raises(ModelError, match=words) as raised:
        open_checkpoint(parts / part("one", given))
    assert str(raised.value).startswith(str(parts / part("one", file)))
    assert "\n" not in str(raised.value)


def test_a_part_must_keep_its_name(parts: Path) -> None:
    (parts / part("one", 1)).rename(parts / "renamed.gguf")
    with pytest.raises(ModelError, match=r"renamed\.gguf: is one of 3 parts by its metadata"):
        open_checkpoint(parts / "renamed.gguf")


def test_the_first_part_alone_has_the_metadata(parts: Path) -> None:
    """Else the tests above would not see whose metadata are read."""
    assert "llama.block_count" in read_metadata(parts / part("one", 1))
    assert "llama.block_count" not in read_metadata(parts / part("one", 3))
