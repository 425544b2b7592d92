"""What may import what, read from the source with `ast`: the directions that design.md section 2 draws."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import EXPORTER

ROOT = Path(__file__).resolve().parents[1]
PATHS = [path for package in ("server", "model") for path in (ROOT / package).rglob("*.py")]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in PATHS)
TREES = {file: ast.parse((ROOT / file).read_text()) for file in FILES}

WEB = {"fastapi", "starlette", "uvicorn", "sse_starlette"}
MAY_SERVE = ("server/app.py", "server/routes/", "server/errors.py", "server/edge/")
MAY_VALIDATE = ("server/routes/", "server/config.py")
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "yaml", "importlib.util", "runpy"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
UNSAFE_ATTRIBUTES = {("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load")}
MOST_LINES = 400
MOST_DOC_LINES = 6


def imports(tree: ast.AST) -> Iterator[str]:
    """The full names of everything that is imported, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports say the whole name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(tree: ast.AST) -> set[str]:
    """The top names of everything that is imported."""
    return {name.partition(".")[0] for name in imports(tree)}


def users(names: set[str]) -> list[str]:
    """The files that import one of these packages."""
    return [file for file, tree in TREES.items() if packages(tree) & names]


def within(file: str, places: tuple[str, ...]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def test_there_is_something_to_read() -> None:
    assert {"server/app.py", "server/routes/tgi.py", "model/transformer.py"} <= set(FILES)


def test_model_never_imports_server() -> None:
    assert [file for file in users({"server"}) if file.startswith("model/")] == []


def test_server_has_no_torch() -> None:
    tensors = {"torch", "numpy", "safetensors", "gguf"}
    assert [file for file in users(tensors) if file.startswith("server/")] == []


def test_web_libraries_stay_at_the_edge() -> None:
    assert [file for file in users(WEB) if not within(file, MAY_SERVE)] == []
    assert {"server/app.py", "server/edge/serving.py"} <= set(users(WEB))


def test_pydantic_is_on_the_wire_only() -> None:
    pydantic = {"pydantic", "pydantic_core", "pydantic_settings"}
    assert [file for file in users(pydantic) if not within(file, MAY_VALIDATE)] == []
    assert "server/config.py" in users(pydantic)


def test_text_and_engine_know_nothing_of_the_wire() -> None:
    for file, tree in TREES.items():
        inner = {name for name in imports(tree) if name.startswith("server.")}
        if file.startswith("server/engine/"):
            assert all(name.startswith("server.engine") for name in inner), (file, inner)
        if file.startswith("server/text/"):
            assert all(name.startswith("server.text") for name in inner), (file, inner)
        if not within(file, (*MAY_SERVE, "server/routes/")):
            assert not any(name.startswith("server.routes") for name in inner), (file, inner)


def test_what_crosses_the_seam_is_plain_python() -> None:
    tree = TREES["model/batch.py"]
    assert packages(tree) <= {"collections", "dataclasses", "typing", "enum"}
    for file in ("server/engine/scheduler.py", "server/engine/block_pool.py", "server/engine/request.py"):
        foreign = {name for name in imports(TREES[file]) if name.startswith("model")}
        assert all(name.startswith("model.batch") for name in foreign), (file, foreign)


def test_the_environment_is_read_in_one_place() -> None:
    ways = {"environ", "environb", "getenv", "putenv"}
    found = {
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ways)
        or (isinstance(node, ast.alias) and node.name in ways)
    }
    assert found <= {"server/config.py"}


def test_nothing_runs_what_it_reads() -> None:
    for file, tree in TREES.items():
        assert not set(imports(tree)) & UNSAFE_MODULES, file
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            match node.func:
                case ast.Name(id=name):
                    assert name not in UNSAFE_CALLS, (file, node.lineno)
                case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                    assert file == "model/weights/pth.py", node.lineno
                    assert "weights_only=True" in ast.unparse(node)
                case ast.Attribute(value=ast.Name(id=owner), attr=name):
                    assert (owner, name) not in UNSAFE_ATTRIBUTES, (file, node.lineno)
            words = {word.arg for word in node.keywords}
            assert not words & {"trust_remote_code", "allow_pickle"}, (file, node.lineno)


def test_nothing_needs_the_tests() -> None:
    modules = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests", "pytest", "hypothesis"}
    assert users(modules) == []
    # The one runs pip, the other the process in which templates render: nothing else runs anything.
    assert set(users({"subprocess"})) <= {"model/source.py", "server/text/renderer.py"}
    assert users({"transformers"}) == [], "it is for tests only"


def test_nothing_polls_for_a_disconnect() -> None:
    """Cleanup stands in a `finally` (design.md section 9, rule 6)."""
    for file, tree in TREES.items():
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "is_disconnected" not in names, file


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_one_clear_job(file: str) -> None:
    """A docstring says the contract in at most six lines, and the file can be read in one go."""
    docstring = ast.get_docstring(TREES[file])
    assert docstring, "a module docstring says the contract"
    assert len(docstring.splitlines()) <= MOST_DOC_LINES
    assert len((ROOT / file).read_text().splitlines()) <= MOST_LINES


def test_every_import_of_a_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=;\[ ]", line)[0].replace("-", "_") for line in project["dependencies"]}
    used = set().union(*(packages(tree) for tree in TREES.values()))
    foreign = used - set(sys.stdlib_module_names) - {"server", "model"}
    assert foreign - declared - {"pydantic_core", "opentelemetry"} == set(), "the one comes with pydantic"
    # The other is an extra: whoever imports what needs it asks for the setting first.
    assert users({"opentelemetry"}) == ["server/edge/tracing.py"]
    assert [line.partition(">")[0] for line in project["optional-dependencies"]["otel"]] == [
        "opentelemetry-sdk",
        EXPORTER,
    ]
    asked = [file for file, tree in TREES.items() if "server.edge.tracing" in set(imports(tree))]
    assert asked == ["server/app.py"]
    assert "server.edge.tracing" not in {
        node.module for node in TREES["server/app.py"].body if isinstance(node, ast.ImportFrom)
    }


def test_only_the_expected_modules_are_loaded_for_help() -> None:
    """What answers `--help` must not import torch, nor the web stack."""
    code = "import sys, server.cli; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", *WEB}


def test_a_server_answers_before_torch_is_imported() -> None:
    """Probes are told that it loads while it loads; and who imports torch first decides how much of it."""
    code = "import sys, server.process; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_start_imports_neither_torchs_compiler_nor_an_extra() -> None:
    """The one takes a second, and nothing on a CPU needs it; who does later gets it whole."""
    code = (
        "from model.lean import UNUSED, import_torch\nimport_torch()\n"
        "import server.startup, server.app, sys\n"
        "unwanted = ('torch._dynamo', UNUSED, 'opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print([name for name in sys.modules if name.startswith(unwanted)])\n"
        "import torch._meta_registrations\n"
        "assert torch._meta_registrations.register_meta"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
