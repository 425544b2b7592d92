"""Every family from transformers' own checkpoints, against its float32 logits at every step of a mixed batch.

Torch's ops within ten times the noise floor (test_oracle.py); the native ones, on weights that bfloat16 holds
exactly, about as near as torch's in bfloat16. What these bounds see is shown by faults in a single layer.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch
from checkpoints import byte_tokenizer
from families import FAMILIES, family_config, make_family
from harness import Drive, Tiny, make_ops
from live import LiveServer
from safetensors.torch import load_file, save_file
from test_oracle import errors_by_step, noise_floor, random_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from model import loader
from model.backend import VARIANTS
from model.errors import ModelError
from model.layers import DecoderLayer, MixtureOfExperts
from model.ops.reference import TorchOps
from model.rotary import rotary_table
from model.transformer import Transformer
from model.weights import open_checkpoint
from model.weights.safetensors import read_config

LENGTH = 72
PROMPT = 54
"""Further than the windows (20) and than the original context of LongRoPE (64)."""
MIXTURES = ("qwen3_moe", "mixtral")


@dataclass
class Case:
    """One family's checkpoint, and what is expected of it."""

    name: str
    tiny: Tiny
    token_ids: list[int]

    @cached_property
    def expected(self) -> Tensor:
        """The reference's logits of the steps."""
        return self.tiny.reference_logits(self.token_ids)[PROMPT - 1 : -1]

    @cached_property
    def noise(self) -> float:
        """The reference's own error in float32."""
        return noise_floor(self.tiny, self.token_ids)

    def logits(self, model: Transformer) -> Tensor:
        """Ours at every step, while others prefill and decode beside it."""
        drive = Drive(model, budget=24, poison=float("nan"), shuffle_blocks=1)
        others = [drive.add("before", random_tokens(5, 256, seed=3), forced=random_tokens(20, 256, seed=4))]
        drive.step()
        trace = drive.add("a", self.token_ids[:PROMPT], forced=self.token_ids[PROMPT:])
        others.append(drive.add("beside", random_tokens(60, 256, seed=5), forced=[1, 2, 3]))
        drive.run()
        assert all(other.done for other in others)
        mixed = [[chunk.count for chunk in batch.chunks] for batch in drive.batches]
        assert any(min(counts) == 1 < max(counts) for counts in mixed)
        return torch.stack(trace.logits)

    def error(self, logits: Tensor) -> float:
        """The largest error of a logit."""
        return float((logits - self.expected).abs().max())

    def relative_error(self, logits: Tensor) -> float:
        """Of all logits together, as a part of their spread."""
        return float((logits - self.expected).norm() / (self.expected - self.expected.mean()).norm())

    @cached_property
    def native_bound(self) -> float:
        """What torch loses by bfloat16; native kernels round weights and activations to it as well."""
        return 1.5 * self.relative_error(self.logits(self.load("bfloat16")))

    def load(self, op_set: str) -> Transformer:
        """Load the weights afresh, on these ops."""
        ops = TorchOps(torch.device("cpu"), torch.bfloat16) if op_set == "bfloat16" else make_ops(op_set, 16)
        return loader.load_model(open_checkpoint(self.tiny.path), ops, 512)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name)
        # Numbers of bfloat16: native panels and torch in bfloat16 then have the weights of the reference.
        make_family(name, folder, dtype=torch.bfloat16)
        return Case(name, Tiny(folder), random_tokens(LENGTH, 256, seed=1))

    return make


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def test_every_logit_of_every_step_is_the_references(case: Case) -> None:
    assert case.error(case.logits(case.tiny.model)) <= 10 * case.noise


@pytest.mark.parametrize("op_set", VARIANTS)
def test_the_native_kernels_are_as_near_as_bfloat16_allows(case: Case, op_set: str) -> None:
    error = case.relative_error(case.logits(case.load(op_set)))
    assert error <= case.native_bound < 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_chosen_by_a_margin(name: str, cases: Callable[[str], Case]) -> None:
    """Else the two sides may choose others, which no tolerance covers."""
    case = cases(name)
    with torch.no_grad():
        out = case.tiny.reference(torch.tensor([case.token_ids]), use_cache=False, output_router_logits=True)
    chosen = case.tiny.config.experts.per_token
    for logits in out.router_logits:
        ranked = logits.sort(dim=-1, descending=True).values
        assert float((ranked[:, chosen - 1] - ranked[:, chosen]).min()) > 0.1
        assert len(set(logits.topk(chosen).indices.flatten().tolist())) == logits.shape[1]


# -- what the bounds see -------------------------------------------------------------------------------

Fault = Callable[[Transformer, DecoderLayer], None]


def forget(part: str) -> Fault:
    """A bias or a norm of attention that is not applied."""

    def fault(model: Transformer, layer: DecoderLayer) -> None:
        *owners, name = part.split(".")
        owner: object = layer.attention
        for step in owners:
            owner = getattr(owner, step)
        assert getattr(owner, name) is not None
        setattr(owner, name, None)

    return fault


def _scale(model: Transformer, layer: DecoderLayer) -> None:
    layer.attention.scale = layer.attention.output.weight.shape[1] ** -0.5


def _residual(model: Transformer, layer: DecoderLayer) -> None:
    layer.multiplier = 1.0


def _embedding(model: Transformer, layer: DecoderLayer) -> None:
    model.config = replace(model.config, embedding_multiplier=1.0)


def _logits(model: Transformer, layer: DecoderLayer) -> None:
    model.config = replace(model.config, logits_multiplier=1.0)


def _rope_of_another(model: Transformer, layer: DecoderLayer) -> None:
    layer.rope = next(rope for rope in model.rotary if rope != layer.rope)


def _unrotated(model: Transformer, layer: DecoderLayer) -> None:
    layer.rope = None


def _attention_factor(model: Transformer, layer: DecoderLayer) -> None:
    rope = layer.rope
    assert rope is not None and rope.scaling is not None
    plain = replace(rope, scaling=replace(rope.scaling, attention_factor=1.0))
    model.rotary[rope] = rotary_table(plain, model.config.head_dim, 512, model.ops.device)


def _short_factors(model: Transformer, layer: DecoderLayer) -> None:
    rope = layer.rope
    assert rope is not None
    short = replace(rope, scaling=replace(rope.scaling, long_factors=rope.scaling.short_factors))
    model.rotary[rope] = rotary_table(short, model.config.head_dim, 512, model.ops.device)


def _unnormalised(model: Transformer, layer: DecoderLayer) -> None:
    mlp = model.layers[-1].mlp  # whose experts share most evenly
    assert isinstance(mlp, MixtureOfExperts)
    mlp.config = replace(mlp.config, normalised=not mlp.config.normalised)


def _activation(model: Transformer, layer: DecoderLayer) -> None:
    assert not isinstance(layer.mlp, MixtureOfExperts)
    layer.mlp.activation = "silu"


def _norms_before(model: Transformer, layer: DecoderLayer) -> None:
    layer.norm = dict(zip(DecoderLayer.norms, layer.norm.values(), strict=True))
    model.layers[model.layers.index(layer)].__class__ = DecoderLayer


FAULTS: list[tuple[str, Fault]] = [
    ("llama_bias", forget("qkv.bias")),
    ("llama_bias", forget("output.bias")),
    ("qwen2", forget("qkv.bias")),
    ("qwen2_window", _attention_factor),
    ("qwen3", forget("norm")),
    ("qwen3_moe", _unnormalised),
    ("mixtral", _unnormalised),
    ("smollm3", _unrotated),
    ("phi3_long", _attention_factor),
    ("phi3_long", _short_factors),
    ("granite", _scale),
    ("granite", _residual),
    ("granite", _embedding),
    ("granite", _logits),
    ("olmo2", forget("norm")),
    ("olmo2", _norms_before),
    ("gemma3", forget("norm")),
    ("gemma3", _scale),
    ("gemma3", _embedding),
    ("gemma3", _rope_of_another),
    ("gemma3", _activation),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_of_one_layer_is_beyond_both_bounds(
    name: str, fault: Fault, cases: Callable[[str], Case]
) -> None:
    case = cases(name)
    model = case.load("torch")
    fault(model, model.layers[0])
    logits = case.logits(model)
    assert case.error(logits) > 100 * case.noise
    assert case.relative_error(logits) > 1.5 * case.native_bound


# -- forms of one family -------------------------------------------------------------------------------


def test_longrope_of_a_short_served_context(tmp_path: Path) -> None:
    """The other set of factors; the reference takes it for inputs up to the original context."""
    make_family("phi3_long", tmp_path)
    tiny, ids = Tiny(tmp_path, max_model_len=64), random_tokens(64, 256, seed=2)
    drive = tiny.drive(budget=16)
    trace = drive.add("a", ids[:30], forced=ids[30:])
    drive.run()
    errors = errors_by_step(trace.logits, tiny.reference_logits(ids), 30)
    assert max(errors) <= 10 * noise_floor(tiny, ids)


@pytest.mark.parametrize("name", [*MIXTURES, "gemma3_nested"])
def test_the_names_that_transformers_has_in_memory(name: str, tmp_path: Path) -> None:
    """Experts stacked, gate and up in one; the language model under another name: the same parameters."""
    published, plain = tmp_path / "published", tmp_path / "plain"
    make_family(name, published)
    AutoModelForCausalLM.from_pretrained(published).save_pretrained(plain, save_original_format=False)
    assert set(load_file(published / "model.safetensors")) != set(load_file(plain / "model.safetensors"))
    one, other = (
        {name: stored.dequantise() for name, stored in tensors(path)} for path in (published, plain)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[parameter], other[parameter]) for parameter in one)


def tensors(path: Path) -> Iterator[tuple[str, object]]:
    checkpoint = open_checkpoint(path)
    shapes = loader.parameter_shapes(checkpoint.config)
    checkpoint.check(shapes)
    return checkpoint.tensors(shapes)


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("name", ["llama2", "qwen2", "gemma3"])
def test_the_old_form_of_a_config_is_read_as_the_new_one(name: str, rope: str, tmp_path: Path) -> None:
    """`rope_theta`, `rope_scaling`, `rope_local_base_freq` and `torch_dtype` of transformers 4."""
    scaling = {
        "rope_type": rope,
        **({} if rope == "default" else {"factor": 4.0, "original_max_position_embeddings": 64}),
        **({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}),
    }
    parameters = {"rope_theta": 5000.0, **scaling}
    if name == "gemma3":
        local = {"rope_type": "default", "rope_theta": 300.0}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    family_config(name, rope_parameters=parameters, dtype="bfloat16").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    old = {field: value for field, value in new.items() if field not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 5000.0, "rope_scaling": scaling, "torch_dtype": new["dtype"]}
    if name == "gemma3":
        old["rope_local_base_freq"] = 300
    read = read_config(tmp_path)
    path.write_text(json.dumps(old))
    assert read_config(tmp_path) == read


# -- strictness ----------------------------------------------------------------------------------------


def test_a_tensor_that_is_missing_misshapen_or_unknown_is_named(case: Case) -> None:
    """Each of the file's tensors in turn, by the name that the file has for it."""
    checkpoint = open_checkpoint(case.tiny.path)
    expected = loader.parameter_shapes(checkpoint.config)
    shapes = checkpoint.files.shapes
    checkpoint.check(expected)
    for name, shape in dict(shapes).items():
        if checkpoint.names.is_passed_over(name):
            continue
        named = re.escape(f"the tensor '{name}' ")
        del shapes[name]
        with pytest.raises(ModelError, match=named + "is missing"):
            checkpoint.check(expected)
        shapes[name] = (shape[0] + 1, *shape[1:])
        with pytest.raises(ModelError, match=named + "has shape"):
            checkpoint.check(expected)
        shapes[name] = shape
        shapes[f"{name}.more"] = shape
        with pytest.raises(ModelError, match=re.escape(f"the tensor '{name}.more' has no place")):
            checkpoint.check(expected)
        del shapes[f"{name}.more"]


def test_a_stacked_tensor_of_too_few_experts(tmp_path: Path) -> None:
    make_family("mixtral", tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", save_original_format=False)
    path = tmp_path / "b" / "model.safetensors"
    stored = load_file(path)
    name = "model.layers.1.mlp.experts.down_proj"
    stored[name] = stored[name][:3].clone()
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has shape \[3, 128, 96\], but its config says \[4, 128, 96\]"):
        list(tensors(tmp_path / "b"))


# -- served --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "phi3_long", "olmo2", "gemma3_nested"])
def test_a_live_server_says_what_the_reference_says(name: str, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    make_family(name, tmp_path)
    prompt = "The quick brown fox jumps over the lazy dog, and then once more over all the other dogs."
    server = LiveServer(tmp_path, dtype="float32", kv_cache_tokens=1024)
    try:
        with server.client() as client:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": 24, "details": True}}
            details = client.post("/generate", json=body).json()["details"]
    finally:
        server.stop()
    ours = [token["id"] for token in details["tokens"]]
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = list(prompt.encode())
    with torch.no_grad():
        logits = reference(torch.tensor([[*given, *ours]]), use_cache=False).logits[0, len(given) - 1 : -1]
    assert ours == logits.argmax(dim=-1).tolist()
    assert len(ours) == 24 or ours[-1] in reference.generation_config.eos_token_id
