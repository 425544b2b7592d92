"""The images, the compose file and the install script, without a Docker engine."""

# The files are held against the compose schema and the linters, and what the image's build runs is run here,
# on what it copies, in an environment that holds nothing else.

import json
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
INSTALL = ROOT / "docker" / "install.sh"
SHELL_SCRIPTS = (INSTALL, ROOT / ".ci" / "run")


def tool(name: str) -> str:
    """Find a linter: the one of the test extra, else one on PATH, else the test skips."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Give a Dockerfile's (instruction, arguments) pairs: no comments, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.split("\n"))
        if word
    ]


def stages(dockerfile: str) -> list[list[tuple[str, str]]]:
    """Give the instructions of each build stage; what stands before the first FROM is dropped."""
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions(dockerfile):
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def copied(stage: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """Give the (sources, destination) pairs that a stage copies from the build context."""
    words = [rest.split() for word, rest in stage if word in ("COPY", "ADD")]
    return [(line[:-1], line[-1]) for line in words if not line[0].startswith("--from")]


BUILD, IMAGE = stages((ROOT / "docker" / "Dockerfile").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def last(stage: list[tuple[str, str]], word: str) -> str:
    return [rest for name, rest in stage if name == word][-1]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for word, rest in IMAGE if word == "ENV" for pair in shlex.split(rest))


# -- the compose file --


def meets_compose_schema(path: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compose_file_meets_the_compose_schema() -> None:
    result = meets_compose_schema(ROOT / "docker-compose.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_compose_schema_refuses_a_misspelt_key(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text((ROOT / "docker-compose.yml").read_text().replace("restart:", "restrat:"))
    assert meets_compose_schema(wrong).returncode != 0


@pytest.mark.parametrize(
    ("options", "service"),
    [([], "rivulet"), (["--profile", "gpu"], "rivulet-gpu"), (["--profile", "cpu"], "rivulet")],
)
def test_compose_starts_one_service(options: list[str], service: str) -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "COMPOSE_PROFILES"}
    command = ["docker", "compose", *options, "config", "--services"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [service]


def test_each_service_has_its_own_profile_and_cpu_is_the_default() -> None:
    assert {name: service["profiles"] for name, service in SERVICES.items()} == {
        "rivulet": ["cpu"],
        "rivulet-gpu": ["gpu"],
    }
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_service_is_published_on_loopback_and_locked_down(service: dict[str, Any]) -> None:
    port = last(IMAGE, "EXPOSE")
    assert service["ports"] == [f"${{RIVULET_PUBLISH:-127.0.0.1:{port}}}:{port}"]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert "privileged" not in service


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_service_agrees_with_the_image(service: dict[str, Any]) -> None:
    assert service["build"]["dockerfile"] == "docker/Dockerfile"
    assert service["volumes"] == [f"cache:{last(IMAGE, 'VOLUME')}"]
    assert set(COMPOSE["volumes"]) == {"cache"}
    assert service["healthcheck"]["test"] == [
        "CMD",
        *json.loads(last(IMAGE, "HEALTHCHECK").partition(" CMD ")[2]),
    ]
    declared = {rest.partition("=")[0] for word, rest in BUILD if word == "ARG"}
    assert {argument.partition("=")[0] for argument in service["build"]["args"]} == declared


def test_only_the_gpu_service_reserves_a_gpu() -> None:
    assert "deploy" not in SERVICES["rivulet"]
    (device,) = SERVICES["rivulet-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "DEVICE=cuda" in SERVICES["rivulet-gpu"]["build"]["args"]


# -- the Dockerfile --


def test_hadolint_has_no_complaint() -> None:
    command = [tool("hadolint"), "--no-color", str(ROOT / "docker" / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(script: Path) -> None:
    result = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert script.stat().st_mode & stat.S_IXUSR, f"{script.name} is not executable"


def test_image_runs_as_an_ordinary_user() -> None:
    user, _, group = last(IMAGE, "USER").partition(":")
    assert int(user) >= 1000  # by number, so that an orchestrator can tell that it is not root
    assert int(group) >= 1000
    assert f"--uid {user} " in last(IMAGE, "RUN")
    after = [word for word, _ in IMAGE[[word for word, _ in IMAGE].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)  # nothing under /opt is the user's own


def test_image_serves_on_all_addresses_of_the_container() -> None:
    environment = image_environment()
    assert environment["RIVULET_HOST"] == "0.0.0.0"
    assert environment["RIVULET_PORT"] == last(IMAGE, "EXPOSE")
    assert environment["RIVULET_CACHE_FOLDER"] == last(IMAGE, "VOLUME")


def test_image_starts_the_server_without_a_shell() -> None:
    assert json.loads(last(IMAGE, "ENTRYPOINT")) == ["rivulet"]
    assert json.loads(last(IMAGE, "CMD")) == ["serve"]
    command = json.loads(last(IMAGE, "HEALTHCHECK").partition(" CMD ")[2])
    assert command == ["python", "/opt/rivulet/ready.py"]
    assert (["docker/ready.py"], "/opt/rivulet/") in copied(IMAGE)


def test_images_hold_no_secret_and_name_no_index() -> None:
    for word, rest in BUILD + IMAGE:
        if word in ("ENV", "ARG"):
            assert not re.search(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY", rest, re.IGNORECASE), rest
        assert "://" not in rest


def test_every_copied_file_exists_and_is_let_into_the_build_context() -> None:
    ignore = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignore[0] == "*"  # so .git, .venv, .env and the rest stay out unless they are named
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    sources = {source for stage in (BUILD, IMAGE) for names, _ in copied(stage) for source in names}
    assert all((ROOT / source).exists() for source in sources)
    assert {source.split("/")[0] for source in sources} == allowed


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_health_check_asks_ready(status: int | None, code: int) -> None:
    asked = []

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status or 0)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        port = server.server_port
        if status is None:
            server.server_close()  # nobody listens
        else:
            threading.Thread(target=server.handle_request, daemon=True).start()
        environment = {"RIVULET_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
        command = [sys.executable, str(ROOT / "docker" / "ready.py")]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
    assert result.returncode == code, result.stderr
    assert asked == ([] if status is None else ["/ready"])


# -- the install script --


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


def install(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the install script with tmp_path/bin in front of the system's own commands."""
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        ["/bin/sh", str(INSTALL), str(tmp_path / "venv"), *arguments],
        env={"PATH": path, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def pip_calls(tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """Give what the install script asks of pip, in a venv whose pip only writes that down."""
    executable(tmp_path / "venv" / "bin" / "python", f'echo "$@" >>"{tmp_path}/calls"\n')
    result = install(tmp_path, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return (tmp_path / "calls").read_text().splitlines()[1:]  # the first asks for pip's version


def test_without_a_gpu_torch_is_pinned_and_comes_first(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "nvidia-smi", "exit 9\n")
    first, second = pip_calls(tmp_path, "auto", "-e", ".[test]")
    assert first == "-m pip install --quiet torch==2.13.0"
    assert second == "-m pip install --quiet -e .[test]"


def test_an_index_for_torch_is_for_torch_alone(tmp_path: Path) -> None:
    first, second = pip_calls(tmp_path, "cpu", RIVULET_TORCH_INDEX="https://wheels.invalid/cpu")
    assert first == "-m pip install --quiet --index-url https://wheels.invalid/cpu torch==2.13.0"
    assert second == f"-m pip install --quiet {ROOT}"


def test_an_empty_index_is_none(tmp_path: Path) -> None:
    assert pip_calls(tmp_path, "cpu", RIVULET_TORCH_INDEX="")[0] == "-m pip install --quiet torch==2.13.0"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_with_a_gpu_torch_is_what_the_project_asks_for(tmp_path: Path, device: str) -> None:
    if device == "auto":
        executable(tmp_path / "bin" / "nvidia-smi", 'echo "GPU 0: NVIDIA L4 (UUID: GPU-0)"\n')
    (wanted,) = (
        requirement
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if requirement.startswith("torch")
    )
    assert pip_calls(tmp_path, device)[0] == f"-m pip install --quiet {wanted}"


OLD = 'case "$2" in *print*) echo 3.9 ;; *version_info*) exit 1 ;; esac\n'
BARE = (
    'case "$2" in *print*) echo 3.12 ;; *ensurepip*) echo "No module named ensurepip" >&2; exit 1 ;; esac\n'
)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("", "Python 3.11 or newer is needed, and there is no 'a-python'. {debian} python3-venv"),
        (OLD, "Python 3.11 or newer is needed, and 'a-python' is 3.9. Name another: PYTHON=python3.12"),
        (BARE, "'a-python' cannot make virtual environments. {debian} python3.12-venv"),
    ],
    ids=["none", "old", "no venv"],
)
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, python: str, message: str) -> None:
    if python:
        executable(tmp_path / "bin" / "a-python", python)
    said = message.format(debian="On Debian or Ubuntu: sudo apt install")
    result = install(tmp_path, PYTHON="a-python")
    assert (result.returncode, result.stderr) == (1, f"install: {said}\n")
    assert not (tmp_path / "venv").exists()


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    result = install(tmp_path, "tpu")
    assert (result.returncode, result.stderr) == (1, "install: the device is auto, cpu or cuda, not 'tpu'\n")


def tracked_files(folder: Path) -> list[Path]:
    """List the files below a folder that git knows or would add, as paths from ROOT."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


class ImageBuild:
    """What the image's build stage does, done by hand in an empty environment, while other tests run."""

    def __init__(self, folder: Path) -> None:
        self.venv, self.home = folder / "venv", folder / "home"
        self.home.mkdir()
        source = folder / "src"
        for names, _ in copied(BUILD):
            for file in (file for name in names for file in tracked_files(ROOT / name)):
                (source / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, source / file)
        kept = re.compile(
            r"PIP_.*|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(https?|all|no)_proxy",
            re.IGNORECASE,
        )
        self.environment = {
            name: value for name, value in os.environ.items() if kept.fullmatch(name)
        }  # how pip gets out
        self.environment |= {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin",
            "DEVICE": "cpu",
        }
        if "RIVULET_TORCH_INDEX" in os.environ:
            self.environment["RIVULET_TORCH_INDEX"] = os.environ["RIVULET_TORCH_INDEX"]
        command = re.sub(r"^(--\S+\s+)*", "", last(BUILD, "RUN")).replace("/opt/rivulet", str(self.venv))
        self._said = folder / "said"
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                command,
                shell=True,
                cwd=source,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def wait(self) -> tuple[int, str]:
        """Its exit status, and what it said."""
        return self._process.wait(), self._said.read_text()

    def end(self) -> None:
        """End whatever still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.mark.timeout(480)
@pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="only a git checkout tells what belongs to the project"
)
def test_image_build_in_an_empty_environment(image_build: ImageBuild) -> None:
    """What came of it; then start what the image's entry point starts."""
    venv, home, environment = image_build.venv, image_build.home, dict(image_build.environment)
    status, said = image_build.wait()
    assert status == 0, said
    assert f"==> installed in {venv}" in said

    (site,) = (venv / "lib").glob("python*/site-packages")
    packages = [file for name in ("model", "server") for file in tracked_files(ROOT / name)]
    assert [file for file in packages if not (site / file).exists()] == [], (
        "the installed package lacks these"
    )
    environment["PATH"] = f"{venv / 'bin'}:/usr/bin:/bin"
    kernels = []
    if shutil.which("g++", path="/usr/bin:/bin") and platform.machine() == "x86_64":
        variants = ("avx2", "avx512_vnni", "avx512")
        built = f"from model.ops.library import is_built; assert all(map(is_built, {variants}))"
        kernels.append(["python", "-c", built])
    for line in (
        ["rivulet", "--help"],
        ["python", "-m", "pip", "--version"],  # it fetches the default model
        *kernels,
    ):
        started = subprocess.run(
            line, cwd=home, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert started.returncode == 0, started.stdout + started.stderr
