"""The choice of what the model runs on: by the processor, the build, the model's widths and the user."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_llama
from harness import make_ops

from model import backend
from model.backend import VARIANTS, Wishes, choose_backend, choose_dtype, choose_variant
from model.config import LayerConfig, ModelConfig
from model.errors import ModelError
from model.machine import processor_flags
from model.ops import library
from model.ops.library import is_built
from model.ops.native import NativeOps
from model.ops.panels import unfit
from model.ops.reference import TorchOps
from model.weights import open_checkpoint

ALL_FLAGS = frozenset(VARIANTS["avx512"] | VARIANTS["avx2"])
"""What can be run here and in most places; AMX has tests of its own."""


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """Choosing a backend sets torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("config")
    make_llama(folder, tie=True, head_dim=32)
    config = open_checkpoint(folder).config
    return replace(config, layers=(LayerConfig(rope=None),))  # so that heads may have any width


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> "Machine":
    return Machine(monkeypatch)


class Machine:
    """A processor and a build that are what a test says; by default all there is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.has(ALL_FLAGS)
        self.built(*VARIANTS)

    def has(self, flags: frozenset[str]) -> None:
        self._monkeypatch.setattr(backend, "processor_flags", lambda: flags)

    def built(self, *variants: str) -> None:
        self._monkeypatch.setattr(backend, "is_built", lambda variant: variant in variants)


class TestVariant:
    def test_the_fastest_that_the_processor_can_run(self, machine: Machine, config: ModelConfig) -> None:
        assert choose_variant(Wishes(), config) == ("avx512", None)
        machine.has(ALL_FLAGS - {"avx512_bf16"})
        assert choose_variant(Wishes(), config) == ("avx512_vnni", None)
        for flag in VARIANTS["avx512_vnni"] - VARIANTS["avx2"]:
            machine.has(ALL_FLAGS - {flag})
            assert choose_variant(Wishes(), config) == ("avx2", None), flag
        for flag in VARIANTS["avx2"]:
            machine.has(ALL_FLAGS - {flag} if flag != "avx2" else frozenset({"sse2"}))
            variant, why_not = choose_variant(Wishes(), config)
            assert variant is None
            assert why_not is not None
            assert flag in why_not

    def test_one_that_was_built(self, machine: Machine, config: ModelConfig) -> None:
        machine.built("avx2")
        assert choose_variant(Wishes(), config) == ("avx2", None)
        machine.built()
        variant, why_not = choose_variant(Wishes(), config)
        assert variant is None
        assert why_not is not None
        assert "compiler" in why_not

    def test_one_by_name(self, machine: Machine, config: ModelConfig) -> None:
        assert choose_variant(Wishes(kernels="avx2"), config) == ("avx2", None)
        assert choose_variant(Wishes(kernels="avx512"), config) == ("avx512", None)

    def test_amx_where_the_system_gives_it(
        self, machine: Machine, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A processor that has it is not enough: it must be given, and multiply as the others do."""
        machine.has(ALL_FLAGS | VARIANTS["amx"])
        monkeypatch.setattr(backend, "unusable", lambda variant: None)
        assert choose_variant(Wishes(), config) == ("amx", None)
        monkeypatch.setattr(backend, "unusable", lambda variant: "no tiles" if variant == "amx" else None)
        assert choose_variant(Wishes(), config) == ("avx512", None)
        with pytest.raises(ModelError, match="the amx variant: no tiles; use --kernels auto"):
            choose_variant(Wishes(kernels="amx"), config)

    @pytest.mark.skipif("amx_tile" in processor_flags(), reason="this processor has AMX")
    def test_amx_is_refused_by_the_library_itself(self) -> None:
        """Not an illegal instruction, whatever the flags say."""
        if not is_built("amx"):
            pytest.skip("the amx variant was not built")
        assert backend.unusable("amx") == "the system does not give this process AMX tiles"

    @pytest.mark.parametrize(
        "wishes",
        [
            Wishes(kernels="torch"),
            Wishes(dtype="bfloat16"),
            Wishes(dtype="float32"),
        ],
    )
    def test_torch_s_ops_where_they_were_asked_for(
        self, machine: Machine, config: ModelConfig, wishes: Wishes
    ) -> None:
        """And nothing is said about it."""
        assert choose_variant(wishes, config) == (None, None)
        chosen = choose_backend(wishes, config)
        assert type(chosen.ops) is TorchOps
        assert chosen.note is None
        assert "torch ops" in chosen.description

    @pytest.mark.parametrize(
        ("flags", "built", "fits", "word"),
        [
            (frozenset({"avx2", "fma", "f16c"}), ("avx512", "avx2"), True, "avx512_vnni"),
            (ALL_FLAGS, ("avx2",), True, "compiler"),
            (ALL_FLAGS, ("avx512", "avx2"), False, "head_dim 16"),
        ],
    )
    def test_one_by_name_that_cannot_be_had(
        self,
        machine: Machine,
        config: ModelConfig,
        flags: frozenset[str],
        built: tuple[str, ...],
        fits: bool,
        word: str,
    ) -> None:
        """One sentence, and no library is loaded: its first instruction might be one that kills us."""
        machine.has(flags)
        machine.built(*built)
        model = config if fits else replace(config, head_dim=16)
        with pytest.raises(ModelError) as error:
            choose_backend(Wishes(kernels="avx512"), model)
        message = str(error.value)
        assert word in message
        assert "--kernels avx512" in message
        assert "\n" not in message
        assert not message.endswith(".")

    def test_nothing_is_loaded_on_a_processor_that_lacks_it(
        self, machine: Machine, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded: list[str] = []
        monkeypatch.setattr(backend, "Library", loaded.append)
        machine.has(frozenset({"fpu", "sse2"}))
        assert type(choose_backend(Wishes(), config).ops) is TorchOps
        with pytest.raises(ModelError, match="lacks"):
            choose_backend(Wishes(kernels="avx2"), config)
        assert not loaded

    def test_every_flag_of_the_build_is_asked_for(self) -> None:
        """The compiler may use whatever setup.py allows it: the processor must have it all."""
        setup = (Path(__file__).parent.parent / "setup.py").read_text()
        scope: dict[str, dict[str, list[str]]] = {}
        exec(setup.partition("\nclass ")[0], {}, scope)
        built = scope["FLAGS"]
        assert built.keys() == VARIANTS.keys()
        for variant, flags in VARIANTS.items():
            names = (option.removeprefix("-m").replace("-", "_") for option in built[variant])
            spelt = {
                name.replace("avx512vnni", "avx512_vnni").replace("avx512bf16", "avx512_bf16")
                for name in names
            }
            assert spelt - flags <= ({"avx2"} if variant != "avx2" else set())


class TestShapes:
    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"head_dim": 16}, "head_dim 16"),
            ({"head_dim": 80}, "head_dim 80"),
            ({"head_dim": 288}, "head_dim 288"),
            ({"hidden_size": 48}, "hidden_size 48"),
            ({"intermediate_size": 130}, "intermediate_size 130"),
        ],
    )
    def test_what_panels_cannot_hold_goes_to_torch(
        self, machine: Machine, config: ModelConfig, change: dict[str, int], word: str
    ) -> None:
        chosen = choose_backend(Wishes(), replace(config, **change))
        assert type(chosen.ops) is TorchOps
        assert chosen.note is not None
        assert word in chosen.note
        assert "slower" in chosen.note
        assert "\n" not in chosen.note

    @pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 256])
    def test_what_they_can_hold(self, config: ModelConfig, dim: int) -> None:
        assert unfit(replace(config, head_dim=dim)) is None
        assert unfit(replace(config, vocab_size=7)) is None


class TestNote:
    @pytest.mark.parametrize(
        ("flags", "built", "word"),
        [
            (frozenset({"sse2"}), tuple(VARIANTS), "which this processor lacks"),
            (frozenset(), tuple(VARIANTS), "which this processor lacks"),
            (ALL_FLAGS, (), "they were not built"),
        ],
    )
    def test_it_names_the_reason(
        self, machine: Machine, config: ModelConfig, flags: frozenset[str], built: tuple[str, ...], word: str
    ) -> None:
        machine.has(flags)
        machine.built(*built)
        note = choose_backend(Wishes(), config).note
        assert note is not None
        assert word in note
        assert "slower" in note

    def test_the_build_is_blamed_where_the_processor_would_do(
        self, machine: Machine, config: ModelConfig
    ) -> None:
        """Not the instructions that only the other variant needs."""
        machine.has(VARIANTS["avx2"])
        machine.built()
        note = choose_backend(Wishes(), config).note
        assert note is not None
        assert "not built" in note


class TestNative:
    @pytest.fixture(params=VARIANTS)
    def variant(self, request: pytest.FixtureRequest) -> str:
        make_ops(request.param)  # skips where it cannot run
        return str(request.param)

    @pytest.mark.parametrize(("quantize", "bits"), [("auto", 8), ("q8", 8), ("q4", 4), ("none", 16)])
    def test_the_choice_is_what_it_says(
        self, variant: str, config: ModelConfig, quantize: str, bits: int
    ) -> None:
        chosen = choose_backend(Wishes(kernels=variant, quantize=quantize, threads=3), config)
        assert isinstance(chosen.ops, NativeOps)
        assert (chosen.ops.name, chosen.ops.threads, chosen.ops._bits) == (f"native {variant}", 3, bits)
        assert variant in chosen.description
        assert "3 threads" in chosen.description
        assert ("bfloat16" if bits == 16 else f"{bits}-bit") in chosen.description
        assert chosen.note is None
        assert torch.get_num_threads() == 1, "torch's own threads would fight for the cores"

    def test_threads_are_the_usable_cores_by_default(
        self, variant: str, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backend, "usable_cores", lambda: 5)
        chosen = choose_backend(Wishes(kernels=variant), config)
        assert isinstance(chosen.ops, NativeOps)
        assert chosen.ops.threads == 5

    def test_is_built_looks_at_the_file(
        self, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert library.is_built(variant)
        monkeypatch.setattr(library, "FOLDER", tmp_path)
        assert not library.is_built(variant)
        (tmp_path / f"rivulet_{variant}.so").touch()
        assert library.is_built(variant)


class TestTorch:
    def test_threads(self, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "usable_cores", lambda: 4)
        choose_backend(Wishes(kernels="torch"), config)
        assert torch.get_num_threads() == 4
        choose_backend(Wishes(kernels="torch", threads=3), config)
        assert torch.get_num_threads() == 3

    @pytest.mark.parametrize("bf16", [True, False])
    def test_dtype(self, monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        cpu = torch.device("cpu")
        assert choose_dtype("auto", cpu) == (torch.bfloat16 if bf16 else torch.float32)
        assert choose_dtype("float16", cpu) == torch.float16

    def test_a_gpu_that_is_not_there(self, config: ModelConfig) -> None:
        with pytest.raises(ModelError, match="no CUDA GPU"):
            choose_backend(Wishes(device="cuda"), config)
