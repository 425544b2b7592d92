"""Hostile `.pth` files: whatever zip, pickle or tensors claim, they are served or refused in a sentence.

Files are made byte by byte and go all the way of a start, within the bounds of test_hostile_files.py.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from minimind import KINDS, make_state
from test_hostile_files import FUZZ, Touch, outcome

STATE = make_state(KINDS["v3"], dtype=torch.float16)
EMBEDDING = "model.embed_tokens.weight"


class Storage:
    """A storage as the pickle spells it: number type, record and count of numbers."""

    def __init__(self, key: str, count: int, kind: Any = torch.HalfStorage) -> None:
        self.words = ("storage", kind, key, "cpu", count)


class Claim:
    """A tensor as the pickle spells it, whatever there is."""

    def __init__(
        self, storage: Storage, shape: tuple[int, ...], stride: tuple[int, ...] | None = None, offset: int = 0
    ) -> None:
        rows = stride or (*(shape[1:]), 1)
        self.arguments = (storage, offset, shape, rows, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Calls:
    """Anything at all, called when it is unpickled."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Writer(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.words if isinstance(value, Storage) else None


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    Writer(file, protocol=2).dump(value)
    return file.getvalue()


def archive(
    data: bytes, records: dict[str, bytes] | None = None, *, compress: bool = False, comment: bytes = b""
) -> bytes:
    """A file of torch.save around a pickle."""
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as zipped:
        zipped.writestr("x/data.pkl", data)
        for name, content in ({"data/0": bytes(64)} | (records or {})).items():
            zipped.writestr(f"x/{name}", content)
        zipped.writestr("x/version", b"3\n")
        zipped.comment = comment
    return file.getvalue()


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def one(claim: Claim, **records: bytes) -> bytes:
    """A file of one tensor."""
    return archive(pickled({EMBEDDING: claim}), {f"data/{key[1:]}": x for key, x in records.items()})


def end_record(directory: int, start: int) -> bytes:
    return b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, directory, start, 0)


GOOD = saved(STATE)
NUMBERS = Storage("0", 32)
NOT_HELD = "does not hold the numbers of tensor 'model.embed_tokens.weight'; save it again with torch.save"
NO_FILE = "is no whole file of torch.save of 2020 or later"
NO_DICT = "save `model.state_dict()`"
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", NO_FILE),
    "a text": (lambda: b"version https://git-lfs\n" * 9, NO_FILE),
    "zeros": (lambda: bytes(1 << 16), NO_FILE),
    "an old file": (lambda: saved(STATE, _use_new_zipfile_serialization=False), NO_FILE),
    "half of a file": (lambda: GOOD[: len(GOOD) // 2], NO_FILE),
    "all but a byte": (lambda: GOOD[:-1], NO_FILE),
    "the end alone": (lambda: GOOD[-22:], NO_FILE),
    "all but the first byte": (lambda: GOOD[1:], NO_FILE),
    "a directory of gigabytes": (lambda: bytes(99) + end_record(1 << 31, 0), NO_FILE),
    "a directory beyond the file": (lambda: bytes(99) + end_record(99, 1 << 31), NO_FILE),
    "a directory of zeros": (lambda: bytes(99) + end_record(99, 0), "is not a whole archive"),
    "a 64-bit directory elsewhere": (
        lambda: bytes(56) + b"PK\6\7" + struct.pack("<IQI", 0, 1 << 40, 1) + end_record(0, 0),
        NO_FILE,
    ),
    "a comment": (lambda: archive(pickled({}), comment=b"x" * 99), NO_FILE),
    "no pickle": (lambda: GOOD.replace(b"data.pkl", b"data.pki"), "has no data.pkl"),
    "an empty archive": (lambda: end_record(0, 0), "has no data.pkl"),
    "two records of a name": (
        lambda: archive(pickled({}), {"DATA.pkl": b""}),
        "holds two records of one name",
    ),
    "a compressed archive": (
        lambda: archive(bytes(99), compress=True),
        "is compressed, which torch.save never",
    ),
    "a pickle of megabytes": (
        lambda: archive(bytes(1 << 21)),
        "has a data.pkl larger than that of any model",
    ),
    "a pickle of zeros": (lambda: archive(bytes(999)), "holds a broken pickle"),
    "a pickle that goes on": (lambda: archive(b"N" * 999_999), "holds a broken pickle"),
    "lists in lists": (lambda: archive(b"\x80\2" + b"]" * 99_999 + b"a" * 99_998 + b"."), NO_DICT),
    "a long string": (lambda: archive(b"\x80\2X\xff\xff\xff\x7fx."), "holds a broken pickle"),
    "the other byte order": (
        lambda: archive(pickled({}), {"byteorder": b"big"}),
        "was written on a machine of another byte order",
    ),
    "a call": (
        lambda: archive(pickled({"a": Calls(print, "x")})),
        "names __builtin__.print, and code of a file is",
    ),
    "a call of old": (lambda: archive(b"(S'x'\nios\nsystem\n."), "holds a broken pickle"),
    "a name from the stack": (lambda: archive(pickle.dumps({"a": Calls(print)}, 4)), "holds a broken pickle"),
    "much memory": (lambda: archive(pickled(Calls(bytearray, 1 << 40))), "names __builtin__.bytearray"),
    "a whole model": (lambda: saved(torch.nn.Linear(2, 2)), "names torch.nn.modules.linear.Linear"),
    "a new tensor": (lambda: archive(pickled(Calls(torch.FloatTensor, 1 << 40))), "names torch.FloatTensor"),
    "no dict": (lambda: saved([torch.ones(2)]), "holds a list and no dict of tensors"),
    "a tensor": (lambda: saved(torch.ones(2)), "holds a Tensor and no dict of tensors"),
    "an empty dict": (lambda: saved({}), "is no MiniMind checkpoint"),
    "a dict of two levels": (
        lambda: saved({"model": {"model": STATE}}),
        "holds 'model', which is no tensor by its name",
    ),
    "two models": (
        lambda: saved({"model": STATE, "state_dict": STATE}),
        "holds 'model', which is no tensor by its name",
    ),
    "another word": (lambda: saved({"net": STATE}), "holds 'net', which is no tensor by its name"),
    "a number beside": (lambda: saved(STATE | {"epoch": 3}), "holds 'epoch', which is no tensor by its name"),
    "a name that is none": (lambda: saved({7: torch.ones(1)}), "holds '7', which is no tensor by its name"),
    "a sparse tensor": (
        lambda: saved({EMBEDDING: torch.eye(4).to_sparse()}),
        "names torch._utils._rebuild_sparse_tensor, and code",
    ),
    "a transposed tensor": (lambda: saved({EMBEDDING: torch.ones(3, 4).t()}), "is sparse, quantised or not"),
    "one number as a terabyte": (
        lambda: one(Claim(Storage("0", 32), (1 << 20, 1 << 20), (0, 0))),
        "is sparse, quantised or not contiguous",
    ),
    "more than the storage has": (lambda: one(Claim(NUMBERS, (33, 1))), NOT_HELD),
    "beyond the storage": (lambda: one(Claim(NUMBERS, (4, 4), offset=20)), NOT_HELD),
    "an offset of exabytes": (lambda: one(Claim(NUMBERS, (4, 4), offset=1 << 61)), "save it again"),
    "a negative offset": (lambda: one(Claim(NUMBERS, (4, 4), offset=-1)), "save it again"),
    "a negative size": (lambda: one(Claim(NUMBERS, (-4, 4))), "save it again"),
    "sizes that overflow": (lambda: one(Claim(NUMBERS, (1 << 40, 1 << 40))), "save it again"),
    "a storage of terabytes": (lambda: one(Claim(Storage("0", 1 << 40), (1 << 20, 1 << 20))), NOT_HELD),
    "a storage larger than its record": (lambda: one(Claim(Storage("0", 64), (8, 8))), NOT_HELD),
    "a storage smaller than its record": (lambda: one(Claim(Storage("0", 16), (4, 4))), NOT_HELD),
    "a storage without a record": (lambda: one(Claim(Storage("9", 32), (4, 8))), "save it again"),
    "the pickle as a storage": (lambda: one(Claim(Storage("../data.pkl", 32), (4, 8))), "save it again"),
    "a storage of another kind": (
        lambda: one(Claim(Storage("0", 64, torch.CharStorage), (8, 8))),
        "MiniMind",
    ),
    "no more than an embedding": (lambda: one(Claim(NUMBERS, (4, 8))), "is no MiniMind checkpoint"),
    "layers without end": (
        lambda: saved({f"model.layers.{n}.input_layernorm.weight": torch.ones(1) for n in range(6000)}),
        "is no MiniMind checkpoint",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file(name: str, tmp_path: Path) -> None:
    make, words = FILES[name]
    byte_tokenizer(tmp_path)
    path = tmp_path / "model.pth"
    path.write_bytes(make())
    told = outcome(path)
    assert told is not None and words in told, told
    assert str(path) in told


def test_the_base_is_good_and_code_never_runs(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    path = tmp_path / "model.pth"
    path.write_bytes(GOOD)
    assert outcome(path) is None
    for code in (
        archive(pickled({"a": Touch(tmp_path / "mark")})),
        saved({"model": STATE, "x": Touch(tmp_path / "mark")}),
    ):
        path.write_bytes(code)
        assert "code of a file is never run" in str(outcome(path))
        assert not (tmp_path / "mark").exists()


@FUZZ
@given(data=st.data())
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of the pickle, of the headers and of the directory changed, or an end cut off."""
    content = bytearray(GOOD)
    pickle_at, directory = content.index(b"\x80\2"), content.rindex(b"PK\1\2") - 4000
    for _ in range(data.draw(st.integers(1, 3))):
        area = data.draw(
            st.sampled_from([(0, 4500), (pickle_at, 3000), (directory, len(content) - directory)])
        )
        content[area[0] + data.draw(st.integers(0, area[1] - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content))) :]
    folder = tmp_path_factory.mktemp("damaged")
    byte_tokenizer(folder)
    (folder / "model.pth").write_bytes(content)
    outcome(folder / "model.pth")
