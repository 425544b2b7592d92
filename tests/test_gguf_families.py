"""Every family as a GGUF file, teacher-forced against transformers' float32 logits of the same weights."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from families import COMMON, YARN, make_family
from gguf_files import Edit, write_gguf
from harness import Drive, make_ops
from test_oracle import errors_by_step, random_tokens
from torch import Tensor
from transformers import Olmo3Config, Olmo3ForCausalLM, PreTrainedModel

from model import loader
from model.backend import VARIANTS
from model.dialects import gguf_names
from model.errors import ModelError
from model.transformer import Transformer
from model.weights import open_checkpoint


def apart(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """As files had it until 2024: one tensor an expert."""
    if "_exps" not in name:
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        yield name.replace("_exps", f".{expert}"), matrix


def unfused(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Phi-3 with queries, keys, values, gate and up apart."""
    if "attn_qkv" in name:
        parts = zip("qkv", tensor.split((128, 64, 64)), strict=True)
        yield from ((name.replace("qkv", part), rows) for part, rows in parts)
    elif "ffn_up" in name:
        yield from zip((name.replace("up", "gate"), name), tensor.chunk(2), strict=True)
    else:
        yield name, tensor


@dataclass(frozen=True)
class Case:
    """What a file is made of."""

    family: str
    overrides: Mapping[str, object] = field(default_factory=dict)
    edit: Edit | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)


CASES = {
    "llama2": Case("llama2"),
    "llama3": Case("llama3"),
    "llama_bias": Case("llama_bias"),
    "linear": Case("llama2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "linear, as the oldest files say it": Case(
        "llama2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        metadata={
            "ARCH.rope.scaling.type": None,
            "ARCH.rope.scaling.factor": None,
            "ARCH.rope.scale_linear": 4.0,
        },
    ),
    "mistral": Case("mistral"),
    "mixtral": Case("mixtral"),
    "mixtral, experts apart": Case("mixtral", edit=apart),
    "qwen2": Case("qwen2"),
    "qwen2 yarn": Case("qwen2", {"rope_parameters": YARN}),
    "qwen3": Case("qwen3"),
    "qwen3_moe": Case("qwen3_moe", {"mlp_only_layers": [], "num_hidden_layers": 2}),
    "smollm2": Case("smollm2"),
    "smollm3": Case("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "phi3": Case("phi3"),
    "phi3, unfused": Case("phi3", edit=unfused),
    "phi3_long": Case("phi3_long"),
    "granite": Case("granite"),
    "olmo2": Case("olmo2"),
    "gemma3": Case("gemma3"),
    "gemma3 by default": Case(
        "gemma3",
        {"query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": None},
        metadata={"ARCH.attention.sliding_window_pattern": None, "ARCH.attention.scale": None},
    ),
}


@dataclass(frozen=True)
class Made:
    """A file and the model it was written from."""

    reference: PreTrainedModel
    path: Path

    @cache  # noqa: B019 - as many as there are cases
    @torch.no_grad()
    def logits(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The reference's, of one of GIVEN: [tokens, vocabulary]."""
        model = self.reference if dtype == torch.float32 else copy.deepcopy(self.reference).to(dtype)
        logits: Tensor = model(torch.tensor([GIVEN[name]]), use_cache=False).logits[0]
        return logits.double()

    def load(self, op_set: str, bits: int = 16) -> Transformer:
        """Ours."""
        return loader.load_model(open_checkpoint(self.path), make_ops(op_set, bits), 512)


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("gguf")
    model = make_family(case.family, folder, seed=3, **case.overrides)
    model.config._experts_implementation = "eager"  # the grouped product takes no float64
    path = write_gguf(model, folder / "model.gguf", edit=case.edit, metadata=case.metadata)
    return Made(model, path)


GIVEN = {name: random_tokens(100, 260, seed) for seed, name in enumerate("ab")}
PROMPT = 70


def forced(model: Transformer) -> dict[str, list[Tensor]]:
    """Both of GIVEN in one batch, their prompts in chunks: the logits of each step."""
    drive = Drive(model, budget=29)
    traces = {name: drive.add(name, ids[:PROMPT], forced=ids[PROMPT:]) for name, ids in GIVEN.items()}
    drive.run()
    return {name: trace.logits for name, trace in traces.items()}


def assert_exact(made: Made) -> None:
    """Ours on torch's ops; the tolerance is ten times the arithmetic's own noise."""
    for name, logits in forced(made.load("torch")).items():
        want = made.logits(name)
        noise = float((made.logits(name, torch.float64) - want).abs().max())
        errors = errors_by_step(logits, want, PROMPT)
        assert max(errors) <= 10 * noise, (noise, errors)


def test_every_logit_of_every_step_is_the_references(made: Made) -> None:
    assert_exact(made)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_serve_every_family(made: Made, variant: str) -> None:
    """With plain weights in bfloat16: the middle step's error, since rounding may turn an expert's choice."""
    for name, logits in forced(made.load(variant)).items():
        assert middle_error(logits, made.logits(name)) < 0.1


def middle_error(ours: list[Tensor], want: Tensor) -> float:
    steps = zip(ours, want[PROMPT - 1 : -1], strict=True)
    errors = [float((row - right).norm() / right.norm()) for row, right in steps]
    return sorted(errors)[len(errors) // 2]


@pytest.mark.parametrize("family", ["llama2", "granite", "smollm3", "llama_bias"])
def test_the_order_of_rows_would_be_seen(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inverse: queries and keys taken as they stand in the file are far beyond the tolerances."""
    model = make_family(family, tmp_path, seed=3)
    made = Made(model, write_gguf(model, tmp_path / "model.gguf"))
    monkeypatch.setattr(gguf_names, "INTERLEAVED", frozenset())
    for name, logits in forced(made.load("torch")).items():
        assert middle_error(logits, made.logits(name)) > 0.2


def test_every_tensor_is_needed_and_no_other_is_taken(made: Made) -> None:
    """Each one of the last layer and beside the layers: missing, misshapen, and one too many."""
    whole = open_checkpoint(made.path)
    expected = loader.parameter_shapes(whole.config)
    whole.check(expected)
    last = f"blk.{whole.config.num_layers - 1}."
    names = [name for name in whole.files.shapes if name.startswith((last, "token", "output"))]
    assert len(names) >= 9
    for name in names:
        if name == "output.weight":
            continue  # without it the embedding is the output
        for change, words in (
            ({}, "is missing"),
            ({name: (7, 7)}, "has shape [7, 7]"),
            ({name: whole.files.shapes[name], f"{name}_scale": (1,)}, "has no place in"),
        ):
            shapes = {other: shape for other, shape in whole.files.shapes.items() if other != name} | change
            with pytest.raises(ModelError) as raised:
                replace(whole, files=Listed(made.path, shapes)).check(expected)
            assert name in str(raised.value)
            assert words in str(raised.value)


@dataclass(frozen=True)
class Listed:
    """A file's table of tensors, changed."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]

    def file_of(self, name: str) -> Path:
        return self.path


@pytest.mark.parametrize(
    ("family", "metadata", "words"),
    [
        ("phi3", {"ARCH.rope.dimension_count": 34}, "dimension_count is 34, it must be the head width 32"),
        ("llama2", {"ARCH.rope.dimension_count": 24}, "dimension_count is 24, it must be the head width 32"),
        ("qwen3", {"ARCH.attention.value_length": 16}, "value_length is 16"),
        ("mixtral", {"ARCH.expert_count": 8}, "ffn_gate_inp.weight' has shape [4, 128], but its config says"),
        ("mixtral", {"ARCH.expert_used_count": 5}, "expert_used_count is 5, it must be a whole number"),
        ("mixtral", {"ARCH.expert_gating_func": 2}, "expert_gating_func is 2, it must be 1 or absent"),
        ("mixtral", {"ARCH.expert_count": None}, "ffn_gate_inp.weight' has no place"),
        (
            "llama2",
            {"ARCH.vocab_size": 300},
            "token_embd.weight' has shape [260, 128], but its config says [300",
        ),
        (
            "llama2",
            {"ARCH.vocab_size": None, "tokenizer.ggml.tokens": [f"t{i}" for i in range(261)]},
            "tokenizer.ggml.tokens has 261 tokens, but tensor token_embd.weight only 260 rows",
        ),
        ("qwen3", {"ARCH.block_count": 3}, "blk.2."),
        ("qwen3", {"ARCH.block_count": 1}, "blk.1."),
        ("olmo2", {"ARCH.attention.head_count_kv": 4}, "attn_k.weight' has shape [64, 128], but"),
        ("gemma3", {"ARCH.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3", {"ARCH.attention.sliding_window_pattern": [True]}, "pattern is a list of 1"),
        ("llama3", {"ARCH.rope.scaling.type": "linear"}, "none or absent beside tensor rope_freqs.weight"),
        ("phi3_long", {"ARCH.rope.dimension_count": 32}, "rope_factors_long.weight must hold 16 positive"),
    ],
)
def test_what_contradicts_itself_is_refused(
    family: str, metadata: dict[str, object], words: str, tmp_path: Path
) -> None:
    model = make_family(family, tmp_path)
    path = write_gguf(model, tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(ModelError) as raised:
        check(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def check(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.check(loader.parameter_shapes(checkpoint.config))


def test_olmo3_is_an_olmo2_with_windows(tmp_path: Path) -> None:
    """In GGUF it has OLMo 2's architecture: three layers of four have a window, and only the others YaRN."""
    fields = {**COMMON, "num_hidden_layers": 5, "sliding_window": 20, "rope_parameters": {**YARN}}
    model = Olmo3ForCausalLM(Olmo3Config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    default = {"ARCH.attention.sliding_window_pattern": None}
    made = Made(model, write_gguf(model, tmp_path / "model.gguf", metadata=default))
    assert [layer.window for layer in open_checkpoint(made.path).config.layers] == [20, 20, 20, None, 20]
    assert_exact(made)
