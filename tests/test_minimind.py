"""MiniMind in all its forms against plain references, and every way in which its files can fall short."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from harness import Drive, make_ops
from minimind import KINDS, Size, State, make_state, turn_neighbours, write_config
from safetensors.torch import save_file
from test_oracle import random_tokens
from torch import Tensor

from model.backend import VARIANTS
from model.errors import ModelError
from model.loader import load_model, parameter_shapes
from model.ops.reference import TorchOps
from model.rope import Yarn
from model.transformer import Transformer
from model.weights import open_checkpoint
from model.weights.checkpoint import Checkpoint

PROMPT, TOKENS = 40, 80
IDS = random_tokens(TOKENS, 256, seed=1)


@cache
def state_of(name: str, dtype: torch.dtype = torch.float32) -> State:
    """One random checkpoint of a kind; nobody changes it."""
    return make_state(KINDS[name], seed=1, dtype=dtype)


@cache
def expected(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """The reference's logits of the steps in float32, and how far they are from those in float64."""
    kind, state = KINDS[name], state_of(name, dtype)
    single, double = (
        kind.reference({key: x.to(precision) for key, x in state.items()}, IDS, kind.size)[PROMPT - 1 : -1]
        for precision in (torch.float32, torch.float64)
    )
    return single, float((single - double).abs().max())


def logits(model: Transformer) -> Tensor:
    """Ours at every step, while others prefill and decode beside it."""
    drive = Drive(model, budget=24, poison=float("nan"), shuffle_blocks=1)
    others = [drive.add("before", random_tokens(5, 256, seed=3), forced=random_tokens(40, 256, seed=4))]
    drive.step()
    trace = drive.add("a", IDS[:PROMPT], forced=IDS[PROMPT:])
    others.append(drive.add("beside", random_tokens(60, 256, seed=5), forced=[1, 2, 3]))
    drive.run()
    assert all(other.done for other in others)
    return torch.stack(trace.logits)


def load(path: Path, fields: Mapping[str, object], op_set: str = "torch") -> Transformer:
    ops = TorchOps(torch.device("cpu"), torch.bfloat16) if op_set == "bfloat16" else make_ops(op_set, bits=16)
    return load_model(open_checkpoint(path, fields), ops, 512)


def save(state: State, path: Path) -> Path:
    torch.save(state, path)
    return path


# -- the forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_bare_file_gives_the_references_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(save(state_of(name, dtype), tmp_path / "full_sft_128.pth"), KINDS[name].fields)
    reference, noise = expected(name, dtype)
    assert float((logits(model) - reference).abs().max()) <= 10 * noise


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", KINDS)
def test_a_folder_gives_the_references_logits(name: str, weights: str, tmp_path: Path) -> None:
    """As `save_pretrained` leaves it: safetensors have a tied weight once, and no code is run."""
    state = dict(state_of(name))
    if weights.endswith(".safetensors"):
        state.pop("output.weight", state.pop("lm_head.weight", None))
        save_file(state, tmp_path / weights)
    else:
        save(state, tmp_path / weights)
    write_config(tmp_path, KINDS[name])
    reference, noise = expected(name)
    assert float((logits(load(tmp_path, {})) - reference).abs().max()) <= 10 * noise


def typical_error(ours: Tensor, reference: Tensor) -> float:
    """Of the middle step, as a part of the logits' spread; a rounding may choose another expert in few."""
    errors = (ours - reference).norm(dim=1) / (reference - reference.mean()).norm(dim=1).mean()
    return float(errors.median())


@pytest.mark.parametrize("name", KINDS)
def test_the_native_kernels_are_as_near_as_bfloat16_allows(name: str, tmp_path: Path) -> None:
    # Numbers of bfloat16: all sides have the very weights of the reference.
    path = save(state_of(name, torch.bfloat16), tmp_path / "x.pth")
    reference, _ = expected(name, torch.bfloat16)
    bound = 1.5 * typical_error(logits(load(path, KINDS[name].fields, "bfloat16")), reference)
    assert bound < 0.1
    for op_set in VARIANTS:
        try:
            model = load(path, KINDS[name].fields, op_set)
        except pytest.skip.Exception:
            continue
        assert typical_error(logits(model), reference) <= bound, op_set


FAULTS: dict[str, tuple[str, Mapping[str, object]]] = {
    "another base": ("v1", {"rope_theta": 1e6}),
    "another number of heads": ("v2", {"num_attention_heads": 8}),
    "another epsilon": ("v3", {"rms_norm_eps": 1e-3}),
    "one expert too few": ("v2 experts", {"num_experts_per_tok": 1}),
    "weights of experts as they are": ("v3 experts", {"norm_topk_prob": False}),
    "no YaRN": ("v3, YaRN", {"inference_rope_scaling": False}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_field_would_be_seen(fault: str, tmp_path: Path) -> None:
    name, wrong = FAULTS[fault]
    path = save(state_of(name), tmp_path / "x.pth")
    reference, noise = expected(name)
    ours = logits(load(path, {**KINDS[name].fields, **wrong}))
    assert float((ours - reference).abs().max()) > 100 * noise


# -- what is inferred ----------------------------------------------------------------------------------


def read(path: Path, **fields: object) -> Checkpoint:
    """Open, and hold the tensors against what was read from them."""
    checkpoint = open_checkpoint(path, fields)
    checkpoint.check(parameter_shapes(checkpoint.config))
    return checkpoint


def test_v3_says_it_all(tmp_path: Path) -> None:
    config = read(save(state_of("v3 experts", torch.float16), tmp_path / "x.pth")).config
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (260, 128, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 32)
    assert (config.norm_eps, config.max_position_embeddings, config.dtype) == (1e-6, 32768, "float16")
    assert config.layers[0].rope is not None and config.layers[0].rope.theta == 1e6
    experts = config.experts
    assert experts is not None and (experts.count, experts.per_token, experts.num_shared) == (4, 1, 0)
    assert experts.normalised


YARN = Yarn(16.0, 2048, 1.0, 32.0, 1.0)


@pytest.mark.parametrize(
    ("name", "fields", "found"),
    [
        ("v1", {"rope_theta": 10000, "n_heads": 4}, (1e4, 512, None)),
        ("v2 of February", {"rope_theta": 1e6, "n_heads": 4}, (1e6, 8192, None)),
        ("v2 of February, experts", {"n_heads": 4}, (1e6, 8192, None)),
        ("v2", {"num_attention_heads": 4}, (1e6, 32768, None)),
        ("v2", {"head_dim": 32, "max_position_embeddings": 64, "rope_theta": 5e5}, (5e5, 64, None)),
        ("v3", {"inference_rope_scaling": True}, (1e6, 32768, YARN)),
        # As its own code does: nothing is stretched that is not longer.
        ("v3", {"inference_rope_scaling": True, "max_position_embeddings": 2048}, (1e6, 2048, None)),
    ],
)
def test_the_rest_is_given_or_the_generations(
    name: str, fields: dict[str, object], found: tuple[float, int, Yarn | None], tmp_path: Path
) -> None:
    config = read(save(state_of(name), tmp_path / "x.pth"), **fields).config
    rope = config.layers[0].rope
    assert rope is not None
    assert (rope.theta, config.max_position_embeddings, rope.scaling) == found
    assert config.num_heads == 4


def rotations(size: Size, positions: int) -> Tensor:
    """The complex table that old versions kept."""
    half = torch.arange(0, size.head_dim, 2).float() / size.head_dim
    angles = torch.outer(torch.arange(positions).float(), 1 / size.theta**half)
    return torch.polar(torch.ones_like(angles), angles)


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("name", ["v1", "v2 of February", "v2"])
def test_tables_that_a_training_kept_say_heads_base_and_context(
    name: str, halved: bool, tmp_path: Path
) -> None:
    """Nothing else needs to be given; they are no parameters."""
    table = rotations(KINDS[name].size, 300)
    tables: State = {"pos_cis": table, "layers.0.attention.mask": torch.ones(1, 1, 300, 300)}
    if name == "v2":
        cosines = torch.cat((table.real, table.real), dim=1)
        tables = {"model.freqs_cos": cosines, "model.freqs_sin": cosines}
    if halved:  # a complex number then loses its imaginary part
        tables = {key: (x.real if x.is_complex() else x).half() for key, x in tables.items()}
    config = read(save(state_of(name) | tables, tmp_path / "x.pth")).config
    rope = config.layers[0].rope
    assert rope is not None
    assert (config.num_heads, rope.theta, config.max_position_embeddings) == (4, KINDS[name].size.theta, 300)


def test_neighbours_are_turned_as_complex_numbers() -> None:
    """What the reference of old files does, told apart from what transformers does."""
    x = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    turned = turn_neighbours(x, torch.tensor([[torch.pi / 2, 0.0]]))
    assert torch.allclose(turned, torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), atol=1e-6)


def test_flags_win_over_the_config_beside_a_file(tmp_path: Path) -> None:
    path = save(state_of("v2"), tmp_path / "x.pth")
    write_config(tmp_path, KINDS["v2"], rms_norm_eps=1e-4, max_seq_len=77, eos_token_id=2)
    assert read(path).config.max_position_embeddings == 77
    config = read(path, max_position_embeddings=88).config
    assert (config.max_position_embeddings, config.norm_eps, config.eos_token_ids) == (88, 1e-4, (2,))


def test_a_training_state_has_the_model_one_level_down(tmp_path: Path) -> None:
    """With an optimizer beside it, which is passed over; its numbers are not even mapped."""
    for name in ("model", "state_dict"):
        saved = {name: state_of("v3"), "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3}
        read(save(saved, tmp_path / "x.pth"))


EXPORTS: dict[str, dict[str, object]] = {
    "v2": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 1},
    "v3": {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}


@pytest.mark.parametrize("form", ["model.safetensors", "full_sft.pth"])
@pytest.mark.parametrize("name", EXPORTS)
def test_exports_as_other_families(name: str, form: str, tmp_path: Path) -> None:
    """A folder of the other family, and a bare file beside its config."""
    config = {
        "vocab_size": 260,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "rms_norm_eps": KINDS[name].size.epsilon,
        "rope_theta": 1e6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | EXPORTS[name]))
    state, path = dict(state_of(name)), tmp_path / form
    if form.endswith(".pth"):
        save(state, path)
    else:
        del state["lm_head.weight"]
        save_file(state, path)
        path = tmp_path
    reference, noise = expected(name)
    assert float((logits(load(path, {})) - reference).abs().max()) <= 10 * noise
    with pytest.raises(ModelError, match="--config-fields is for MiniMind's checkpoints, and this is none"):
        open_checkpoint(path, {"rope_theta": 1e6})


# -- what falls short ----------------------------------------------------------------------------------


def without(name: str, *tensors: str) -> State:
    return {key: x for key, x in state_of(name).items() if key not in tensors}


def changed(name: str, **tensors: Tensor) -> State:
    """With tensors instead; `_` for each dot."""
    names = {key.replace(".", "_"): key for key in state_of(name)}
    return {**state_of(name), **{names.get(key, key): x for key, x in tensors.items()}}


REFUSALS: dict[str, tuple[State, dict[str, object], str]] = {
    "no heads": (
        state_of("v2"),
        {},
        "do not say how many attention heads it has; give --config-fields num_attention_heads=..., "
        "or put its config.json beside it",
    ),
    "no base": (
        state_of("v1"),
        {"n_heads": 4},
        "do not say its rotary base (10000 in v1, 1e+06 in v2 of 2025-02); give --config-fields rope_theta=",
    ),
    "a base of its own": (
        state_of("v1"),
        {"n_heads": 4, "rope_theta": 5e5},
        "how long its contexts are (512 in v1, 8192 in v2 of 2025-02); give --config-fields "
        "max_position_embeddings=",
    ),
    "heads that do not divide": (
        state_of("v2"),
        {"num_attention_heads": 3},
        "field num_attention_heads is 3, it must be a divisor of 128",
    ),
    "keys of no whole head": (
        state_of("v2"),
        {"num_attention_heads": 2},
        "128 rows of queries and 32 of keys are no groups of heads of 64",
    ),
    "other heads than the norm": (
        state_of("v3"),
        {"num_attention_heads": 8},
        "field num_attention_heads is 8, it must be 4, as the tensors of",
    ),
    "other key-value heads": (
        state_of("v3"),
        {"n_kv_heads": 4},
        "field num_key_value_heads is 4, it must be 2, as",
    ),
    "another head width": (state_of("v3"), {"head_dim": 64}, "field head_dim is 64, it must be 32, as"),
    "another vocabulary": (state_of("v3"), {"vocab_size": 6400}, "field vocab_size is 6400, it must be 260"),
    "another width": (state_of("v3"), {"dim": 512}, "field hidden_size is 512, it must be 128"),
    "more layers": (state_of("v3"), {"n_layers": 8}, "field num_hidden_layers is 8, it must be 2"),
    "another network": (state_of("v3"), {"hidden_dim": 9}, "field intermediate_size is 9, it must be 96"),
    "experts that are not there": (
        state_of("v3"),
        {"use_moe": True},
        "field use_moe is True, it must be false",
    ),
    "no experts": (state_of("v3 experts"), {"use_moe": False}, "field use_moe is False, it must be true"),
    "more experts": (state_of("v3 experts"), {"num_experts": 8}, "field num_experts is 8, it must be 4"),
    "more shared experts": (
        state_of("v2 experts"),
        {"num_attention_heads": 4, "n_shared_experts": 3},
        "field n_shared_experts is 3, it must be 2",
    ),
    "more experts a token than there are": (
        state_of("v3 experts"),
        {"num_experts_per_tok": 5},
        "field num_experts_per_tok is 5, it must be a whole number from 1 to 4",
    ),
    "two words that disagree": (
        state_of("v3"),
        {"dim": 128, "hidden_size": 64},
        "--config-fields: hidden_size and dim are one field and disagree; leave one out",
    ),
    "an unknown field": (
        state_of("v3"),
        {"heads": 4},
        "--config-fields: 'heads' is no field of MiniMind's, whose fields are bos_token_id, dim,",
    ),
    "a base that the table is not of": (
        {**state_of("v1"), "pos_cis": rotations(KINDS["v1"].size, 16)},
        {"rope_theta": 1e6},
        "field rope_theta is 1000000.0, it must be that of the table of rotations among the tensors",
    ),
    "a table of no generation": (
        {**state_of("v1"), "pos_cis": rotations(replace(KINDS["v1"].size, theta=500.0), 16)},
        {},
        "do not say its rotary base; give --config-fields rope_theta=",
    ),
    "YaRN before v3": (
        state_of("v2"),
        {"num_attention_heads": 4, "inference_rope_scaling": True},
        "--config-fields: scales rotations, which is served for MiniMind v3 only",
    ),
    "no layer": (
        without("v3", "model.layers.0.self_attn.q_proj.weight"),
        {},
        "is no MiniMind checkpoint, it has no tensor layers.0.attention.wq.weight or "
        "model.layers.0.self_attn.q_proj.weight",
    ),
    "no embedding": (
        without("v3", "model.embed_tokens.weight", "lm_head.weight"),
        {},
        "the tensor lm_head.weight is missing; save the whole model again",
    ),
    "a tensor that is missing": (
        without("v3", "model.layers.1.mlp.up_proj.weight"),
        {},
        "the tensor 'model.layers.1.mlp.up_proj.weight' is missing",
    ),
    "an unknown tensor": (
        {**state_of("v3"), "model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(1)},
        {},
        "'model.layers.0.self_attn.q_proj.lora.A.weight' has no place in a minimind of 2 layers",
    ),
    "shared experts in v3": (
        {**state_of("v3 experts"), "model.layers.0.mlp.shared_experts.0.up_proj.weight": torch.ones(96, 128)},
        {},
        "is no MiniMind checkpoint",
    ),
    "a misshapen tensor": (
        changed("v3", model_layers_1_mlp_up_proj_weight=torch.ones(96, 127)),
        {},
        "has shape [96, 127], but its config says [96, 128]",
    ),
    "a matrix that is a vector": (
        changed("v3", model_layers_0_self_attn_k_proj_weight=torch.ones(64)),
        {},
        "has shape [64], but ought to have 2 dimensions",
    ),
    "an odd head": (
        changed("v3", model_layers_0_self_attn_q_norm_weight=torch.ones(3)),
        {},
        "128 rows of queries and 64 of keys are no groups of heads of 3, an even number",
    ),
    "integers": (
        changed("v3", model_norm_weight=torch.ones(128, dtype=torch.int8)),
        {},
        "tensor 'model.norm.weight' is of type int8, only float32, float16 and bfloat16 are served",
    ),
    "a head that is not tied": (
        changed("v3", lm_head_weight=torch.ones(260, 128)),
        {},
        "tensor lm_head.weight differs from model.embed_tokens.weight though the config ties them",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_falls_short_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    state, fields, words = REFUSALS[case]
    path = save(state, tmp_path / "x.pth")
    with pytest.raises(ModelError) as refused:
        load(path, fields)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "field hidden_act is 'gelu', it must be 'silu' or absent"),
        ({"scoring_func": "sigmoid"}, "field scoring_func is 'sigmoid', it must be 'softmax' or absent"),
        ({"rope_scaling": 3}, "field rope_scaling is 3, it must be an object or null"),
        ({"rope_scaling": {"type": "linear"}}, "field type is 'linear', it must be default or yarn"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": -1}},
            "field factor is -1, it must be a number from",
        ),
        ({"tie_word_embeddings": "yes"}, "field tie_word_embeddings is 'yes', it must be true or false"),
        ({"eos_token_id": 6400}, "field eos_token_id is 6400, it must be made of token ids from 0 to 259"),
        ({"rms_norm_eps": 0}, "field rms_norm_eps is 0, it must be a number from"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_file_and_field(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = save(state_of("v3"), tmp_path / "pytorch_model.bin")
    write_config(tmp_path, KINDS["v3"], **change)
    with pytest.raises(ModelError) as refused:
        open_checkpoint(tmp_path)
    assert words in str(refused.value) and str(tmp_path / "config.json") in str(refused.value)
    assert path.is_file()
