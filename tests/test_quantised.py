"""Checkpoints of GPTQ, AWQ, compressed-tensors and fp8: served as the weights that they stand for.

The tests quantise a tiny Llama themselves and write each format's tensors by its definition. The reference is
transformers' float32 model with the dequantised weights.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_llama
from harness import Drive, make_ops
from safetensors.torch import load_file, save_file
from test_native_kernels import normal, read, relative_error
from test_oracle import errors_by_step, noise_floor, random_tokens
from torch import Tensor
from transformers import LlamaForCausalLM

from model import loader
from model.backend import VARIANTS
from model.errors import ModelError
from model.ops.native import NativeOps
from model.weights import open_checkpoint
from model.weights.quantised.pieces import in_groups

QUERY = "model.layers.0.self_attn.q_proj"
Pieces = dict[str, Tensor]
"""By the last part of a tensor's name."""


# -- a plain quantiser --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Weights as scale * (u - zero), u [out, in], the others [out, groups]."""

    bits: int
    u: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor

    @property
    def numbers(self) -> Tensor:
        """What they stand for."""
        steps = self.u - self.zeros[:, self.group_of]
        return steps.float() * self.scales.float()[:, self.group_of]


def quantise(
    weight: Tensor,
    bits: int,
    size: int | None,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    order: Tensor | None = None,
) -> Grid:
    """To the nearest of 2^bits steps in groups of inputs, which follow each other in `order`."""
    outputs, inputs = weight.shape
    size, most = size or inputs, 2**bits - 1
    group_of = torch.empty(inputs, dtype=torch.long)
    group_of[torch.arange(inputs) if order is None else order] = torch.arange(inputs) // size
    scales, zeros = torch.empty(2, outputs, inputs // size)
    if not symmetric:  # some groups whose zero point is 0
        weight = torch.where(torch.arange(outputs)[:, None] % 3 == 0, weight.abs(), weight)
    for group in range(inputs // size):
        some = weight[:, group_of == group]
        low, high = some.amin(1).clamp(max=-1e-3), some.amax(1).clamp(min=1e-3)
        if symmetric:
            low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
        scales[:, group] = (high - low) / most
        zeros[:, group] = (most + 1) / 2 if symmetric else (-low / scales[:, group]).round().clamp(0, most)
    scales, zeros = scales.to(dtype), zeros.long()
    u = (weight / scales.float()[:, group_of]).round().long() + zeros[:, group_of]
    return Grid(bits, u.clamp(0, most), scales, zeros, group_of)


def words(values: Tensor, bits: int) -> Tensor:
    """Pack along the last axis, the first of a word in its lowest bits."""
    parts = values.reshape(*values.shape[:-1], -1, 32 // bits).long()
    whole = sum(parts[..., i] << bits * i for i in range(32 // bits))
    return (whole - (whole >> 31 << 32)).to(torch.int32)  # type: ignore[operator]


# -- formats ------------------------------------------------------------------------------------------


def gptq(grid: Grid, less: int) -> Pieces:
    """`less` is taken from whole words, so that a zero point of 0 borrows from the next."""
    ones = torch.tensor(0x11111111 if grid.bits == 4 else 0x01010101, dtype=torch.int32)
    return {
        "qweight": words(grid.u, grid.bits).t(),
        "qzeros": words(grid.zeros.t(), grid.bits) - less * ones,
        "scales": grid.scales.t(),
        "g_idx": grid.group_of.int(),
    }


def awq(grid: Grid) -> Pieces:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(values: Tensor) -> Tensor:
        return words(values.view(len(values), -1, 8)[:, :, order].flatten(1), 4)

    qweight, qzeros = pack(grid.u.t().contiguous()), pack(grid.zeros.t().contiguous())
    return {"qweight": qweight, "qzeros": qzeros, "scales": grid.scales.t()}


def packed(grid: Grid, zeros: str | None = None) -> Pieces:
    pieces = {
        "weight_packed": words(grid.u, grid.bits),
        "weight_scale": grid.scales,
        "weight_shape": torch.tensor(grid.u.shape),
    }
    if zeros == "packed":
        pieces["weight_zero_point"] = words(grid.zeros.t(), grid.bits).t()
    elif zeros == "bytes":
        pieces["weight_zero_point"] = (grid.zeros - 2 ** (grid.bits - 1)).to(torch.int8)
    return pieces


def bytes_of(grid: Grid, zeros: bool = False) -> Pieces:
    pieces = {"weight": (grid.u - 128).to(torch.int8), "weight_scale": grid.scales}
    if zeros:
        pieces["weight_zero_point"] = (grid.zeros - 128).to(torch.int8)
    return pieces


@dataclass(frozen=True)
class Case:
    """One format with one set of settings."""

    config: Mapping[str, Any]
    make: Callable[[Tensor], tuple[Tensor, Pieces]]
    """A weight -> what it becomes, and how that is stored."""
    bits: int | None
    """Of the panels that hold it exactly; None if none do."""


def of_grid(
    config: Mapping[str, Any], write: Callable[[Grid], Pieces], exact: bool = True, **how: Any
) -> Case:
    def make(weight: Tensor) -> tuple[Tensor, Pieces]:
        grid = quantise(weight, **how)
        return grid.numbers, write(grid)

    return Case(config, make, how["bits"] if exact else None)


def gptq_case(
    bits: int, size: int | None, symmetric: bool, format: str = "gptq", order: bool = False
) -> Case:
    less = 1 if format == "gptq" else 0
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size or -1,
        "desc_act": order,
        "sym": symmetric,
    }
    how: dict[str, Any] = {"bits": bits, "size": size, "symmetric": symmetric}

    def make(weight: Tensor) -> tuple[Tensor, Pieces]:
        seed = torch.Generator().manual_seed(3)
        inputs = torch.randperm(weight.shape[1], generator=seed) if order else None
        grid = quantise(weight, **how, order=inputs)
        return grid.numbers, gptq(grid, less)

    return Case(config | {"checkpoint_format": format}, make, None if order else bits)


def awq_case(size: int | None) -> Case:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size or -1,
        "zero_point": True,
        "version": "gemm",
    }
    return of_grid(config, awq, bits=4, size=size, symmetric=False)


def scheme(
    format: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def integers_case(
    bits: int,
    strategy: str,
    size: int | None = None,
    *,
    format: str = "pack-quantized",
    zeros: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": zeros is None}
    write: Callable[[Grid], Pieces] = lambda grid: (  # noqa: E731
        packed(grid, zeros) if format == "pack-quantized" else bytes_of(grid, zeros is not None)
    )
    how = {"bits": bits, "size": size, "symmetric": zeros is None, "dtype": dtype}
    return of_grid(scheme(format, weights | {"group_size": size or -1}), write, **how)


def packed_in_order(used: bool) -> Case:
    """With a g_idx as quantising by `actorder` leaves it, or the place that is kept for one."""
    config = integers_case(4, "group", 32).config

    def make(weight: Tensor) -> tuple[Tensor, Pieces]:
        inputs = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
        grid = quantise(weight, 4, 32, True, order=inputs if used else None)
        group_of = grid.group_of if used else torch.full_like(grid.group_of, -1)
        return grid.numbers, packed(grid) | {"weight_g_idx": group_of.int()}

    return Case(config, make, None if used else 4)


def one_scale(weight: Tensor) -> tuple[Tensor, Pieces]:
    """Int8 with one scale for all of a tensor."""
    scale = (weight.abs().max() / 127).half().view(1)
    steps = (weight / scale.float()).round().clamp(-128, 127)
    return steps * scale.float(), {"weight": steps.to(torch.int8), "weight_scale": scale}


def float_case(
    config: Mapping[str, Any],
    block: tuple[int, int] | None,
    name: str,
    dtype: torch.dtype = torch.float8_e4m3fn,
    single: tuple[int, ...] = (),
) -> Case:
    def make(weight: Tensor) -> tuple[Tensor, Pieces]:
        outputs, inputs = (step or size for step, size in zip(block or (0, 0), weight.shape, strict=True))
        parts = torch.nn.functional.pad(weight, (0, -weight.shape[1] % inputs, 0, -weight.shape[0] % outputs))
        parts = parts.view(parts.shape[0] // outputs, outputs, -1, inputs)
        scales = parts.abs().amax((1, 3)) / torch.finfo(dtype).max
        each = scales.repeat_interleave(outputs, 0).repeat_interleave(inputs, 1)
        each = each[: weight.shape[0], : weight.shape[1]]
        stored = (weight / each).to(dtype)
        return stored.float() * each, {"weight": stored, name: scales if block else scales.view(single)}

    return Case(config, make, None)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
FLOAT_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}

CASES = {
    "gptq, 32": gptq_case(4, 32, True),
    "gptq, 64, zero points": gptq_case(4, 64, False),
    "gptq, 128, zero points": gptq_case(4, 128, False),
    "gptq, whole rows": gptq_case(4, None, False),
    "gptq, 8 bits": gptq_case(8, 64, False),
    "gptq_v2": gptq_case(4, 64, False, "gptq_v2"),
    "gptq, act-order": gptq_case(4, 32, False, order=True),
    "gptq, groups of 16": Case(gptq_case(4, 16, True).config, gptq_case(4, 16, True).make, None),
    "awq, 32": awq_case(32),
    "awq, 64": awq_case(64),
    "awq, 128": awq_case(128),
    "packed, 4 bits, 32": integers_case(4, "group", 32),
    "packed, 4 bits, 64, packed zero points": integers_case(4, "group", 64, zeros="packed"),
    "packed, 4 bits, 128, zero points": integers_case(4, "group", 128, zeros="bytes", dtype=torch.float16),
    "packed, 4 bits, channel": integers_case(4, "channel"),
    "packed, 4 bits, channel, zero points": integers_case(4, "channel", zeros="packed"),
    "packed, 4 bits, act-order": packed_in_order(True),
    "packed, 4 bits, empty act-order": packed_in_order(False),
    "packed, 8 bits, channel": integers_case(8, "channel"),
    "packed, 8 bits, 128": integers_case(8, "group", 128, zeros="packed"),
    "int8, channel": integers_case(8, "channel", format="int-quantized"),
    "int8, 64, zero points": integers_case(8, "group", 64, format="int-quantized", zeros="bytes"),
    "int8, tensor": Case(scheme("int-quantized", {"num_bits": 8, "strategy": "tensor"}), one_scale, 8),
    "fp8, blocks": float_case(FP8 | {"weight_block_size": [128, 128]}, (128, 128), "weight_scale_inv"),
    "fp8, odd blocks": float_case(FP8 | {"weight_block_size": [48, 80]}, (48, 80), "weight_scale_inv"),
    "fp8, one scale of transformers": float_case(FP8, None, "weight_scale_inv"),
    "fp8, one scale of vLLM": float_case(FP8, None, "weight_scale", single=(1,)),
    "fp8, e5m2": float_case(FP8, None, "weight_scale", torch.float8_e5m2),
    "float8, channel": float_case(
        scheme("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, DYNAMIC),
        (1, 0),
        "weight_scale",
    ),
    "float8, tensor": float_case(
        scheme("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        None,
        "weight_scale",
        single=(1,),
    ),
    "float8, blocks": float_case(
        scheme("float-quantized", FLOAT_BLOCKS, DYNAMIC), (128, 128), "weight_scale"
    ),
}


@dataclass
class Checkpoint:
    """A folder of one format, and what it stands for."""

    folder: Path
    case: Case
    reference: LlamaForCausalLM

    @torch.no_grad()
    def reference_logits(self, ids: list[int]) -> Tensor:
        """As Tiny's: [tokens, vocabulary]."""
        logits: Tensor = self.reference(torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def change(self, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
        """Write other tensors and another quantization_config."""
        file, config_file = self.folder / "model.safetensors", self.folder / "config.json"
        tensors, config = load_file(file), json.loads(config_file.read_text())
        change(tensors, config)
        save_file(tensors, file)
        config_file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("original")
    return folder, make_llama(
        folder, tie=False, hidden_size=128, intermediate_size=256, head_dim=32, layers=1, seed=11
    )


def write(original: tuple[Path, LlamaForCausalLM], folder: Path, name: str) -> Checkpoint:
    source, model = original
    case, reference = CASES[name], copy.deepcopy(model)
    tensors: dict[str, Tensor] = {}
    for tensor, weight in model.state_dict().items():
        if not tensor.endswith("_proj.weight"):
            tensors[tensor] = weight
            continue
        numbers, pieces = case.make(weight)
        reference.get_parameter(tensor).data = numbers
        module = tensor.removesuffix(".weight")
        tensors |= {f"{module}.{end}": piece.contiguous() for end, piece in pieces.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": case.config}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder, case, reference)


@pytest.fixture(scope="module", params=CASES)
def quantised(
    request: pytest.FixtureRequest,
    original: tuple[Path, LlamaForCausalLM],
    tmp_path_factory: pytest.TempPathFactory,
) -> Checkpoint:
    return write(original, tmp_path_factory.mktemp("quantised"), request.param)


def test_every_logit_is_that_of_the_dequantised_weights(quantised: Checkpoint) -> None:
    model = loader.load_model(open_checkpoint(quantised.folder), make_ops("torch"), 128)
    ids = random_tokens(60, 260, seed=1)
    drive = Drive(model)
    trace = drive.add("a", ids[:40], forced=ids[40:])
    drive.run()
    errors = errors_by_step(trace.logits, quantised.reference_logits(ids), 40)
    assert len(errors) == 20
    assert max(errors) <= 10 * noise_floor(quantised, ids), errors  # type: ignore[arg-type]


def test_rows_in_any_order_are_those_of_the_whole(quantised: Checkpoint) -> None:
    """As fused matrices and interleaved heads ask for them."""
    files = open_checkpoint(quantised.folder).files
    stored, rows = files.read(f"{QUERY}.weight"), torch.tensor([37, 5, 100, 6, 127])
    want = quantised.reference.get_parameter(f"{QUERY}.weight").detach()
    assert torch.equal(stored.dequantise(), want)
    assert torch.equal(stored.rows(rows).dequantise(), want[rows])
    assert torch.equal(stored.rows(slice(64, 128)).rows(slice(3, 21)).dequantise(), want[67:85])


@pytest.mark.parametrize("variant", VARIANTS)
def test_panels_hold_the_same_weights(
    quantised: Checkpoint, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.ops.panels.NUMBERS_AT_ONCE", 48 * 128)  # several parts, the last one shorter
    ops = make_ops(variant)
    assert isinstance(ops, NativeOps)
    checkpoint = open_checkpoint(quantised.folder)
    model = loader.load_model(checkpoint, ops, 128)
    seen = 0
    for name, matrix in model.parameters():
        tensor = checkpoint.names.place(name).tensor
        if not tensor.endswith("_proj.weight"):
            continue
        ours, want = read(ops, matrix), quantised.reference.get_parameter(tensor).detach()
        assert matrix.panels is not None
        if quantised.case.bits is None:  # quantised again
            assert matrix.panels.bits == 8
            assert 0 < relative_error(ours, want) < 0.006
        else:
            assert matrix.panels.bits == quantised.case.bits
            assert torch.equal(ours, want), name
        seen += 1
    assert seen == 7


def test_float8_goes_to_the_bits_that_were_asked_for(
    original: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    """As any plain numbers: it holds them in bfloat16 or in float32 only."""
    checkpoint = open_checkpoint(write(original, tmp_path, "fp8, blocks").folder)
    for bits in (4, 16):
        ops = make_ops("avx2", bits=bits)
        matrices = [weight for _, weight in loader.load_model(checkpoint, ops, 64).parameters()]
        assert {m.panels.bits for m in matrices if not isinstance(m, Tensor)} == {bits}


def test_scales_that_float16_does_not_hold_are_rounded() -> None:
    """The integers stay; what a scale below float16's least step loses is less than 2^-25."""
    u = torch.randint(16, (16, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scales = (normal(16, 2).abs() * 2e-6).bfloat16()
    tensor = in_groups((16, 64), 4, lambda rows: u[rows], scales, torch.full((16, 2), 8))
    ops = make_ops("avx2")
    matrix = ops.matrix(16, 64)
    ops.fill(matrix, tensor)
    error = (read(ops, matrix) - tensor.dequantise()).abs()
    assert 0 < float(error.max()) <= 8 * 2.0**-25
    with pytest.raises(ValueError, match="beyond what panels hold"):
        ops.fill(matrix, in_groups((16, 64), 4, lambda rows: u[rows], scales * 1e12, torch.full((16, 2), 8)))


def test_biases_of_zeros_stand_for_none(original: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    """AutoGPTQ wrote them for every module."""
    checkpoint = write(original, tmp_path, "gptq, 64, zero points")

    def add(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            outputs = tensors[name].shape[1]
            tensors[f"{name.removesuffix('.scales')}.bias"] = torch.zeros(outputs, dtype=torch.float16)

    checkpoint.change(add)
    model = loader.load_model(open_checkpoint(tmp_path), make_ops("torch"), 128)
    ids = random_tokens(30, 260, seed=1)
    drive = Drive(model)
    trace = drive.add("a", ids[:20], forced=ids[20:])
    drive.run()
    errors = errors_by_step(trace.logits, checkpoint.reference_logits(ids), 20)
    assert max(errors) <= 10 * noise_floor(checkpoint, ids), errors  # type: ignore[arg-type]


# -- what is refused ----------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def set_field(**fields: Any) -> Change:
    return lambda tensors, config: config["quantization_config"].update(fields)


def set_scheme(where: str | None = None, **fields: Any) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        (group if where is None else group[where]).update(fields)

    return change


def set_tensor(end: str, change: Callable[[Tensor], Tensor | None], other: str | None = None) -> Change:
    def edit(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        found = change(tensors[f"{QUERY}.{other or end}"])
        if found is None:
            del tensors[f"{QUERY}.{end}"]
        else:
            tensors[f"{QUERY}.{end}"] = found.clone().contiguous()

    return edit


def two_schemes(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = copy.deepcopy(groups["group_0"])
    groups["group_1"]["weights"]["num_bits"] = 8


def drop_config(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del config["quantization_config"]


def rename_config(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"] = "gptq"


GPTQ, AWQ, PACKED, INT8 = "gptq, 64, zero points", "awq, 64", "packed, 4 bits, 32", "int8, channel"
REFUSED: list[tuple[str, Change, str]] = [
    (GPTQ, set_tensor("scales", lambda t: None), r"q_proj.scales' is missing"),
    (GPTQ, set_tensor("qzeros", lambda t: None), r"q_proj.qzeros' is missing"),
    (GPTQ, set_tensor("qweight", lambda t: None), r"' has no .*q_proj.qweight of type I32 beside it"),
    (
        GPTQ,
        set_tensor("qzeros", lambda t: t[:1]),
        r"q_proj.qzeros' has shape \[1, 16\], .* ask for \[2, 16\]",
    ),
    (
        GPTQ,
        set_tensor("scales", lambda t: t.int()),
        r"q_proj.scales' is of type I32, it must be F16 or BF16 or",
    ),
    (GPTQ, set_tensor("weight", lambda t: t, "scales"), r"q_proj.weight' stands beside .*q_proj.qweight"),
    (
        GPTQ,
        set_tensor("qweight", lambda t: t[:8]),
        r"q_proj.qzeros' has shape \[2, 16\], .* ask for \[1, 16\]",
    ),
    (GPTQ, set_tensor("qweight", lambda t: t[0]), r"q_proj.qweight' has shape \[128\] and is no matrix"),
    (
        GPTQ,
        set_tensor("g_idx", lambda t: t + 1),
        r"q_proj.qweight' has inputs of a group that is none of its 2",
    ),
    (GPTQ, set_tensor("bias", lambda t: t[0].half(), "scales"), r"q_proj.bias' has no place"),
    (GPTQ, set_tensor("extra", lambda t: t.half(), "scales"), r"q_proj.extra' has no place"),
    (GPTQ, set_field(group_size=48), r"rows of 256 inputs, which are no whole groups of 48"),
    (GPTQ, set_field(group_size=0), r"field group_size is 0"),
    (GPTQ, set_field(bits=3), r"field bits is 3, it must be 4 or 8"),
    (
        GPTQ,
        set_field(checkpoint_format="marlin"),
        r"checkpoint_format is 'marlin', it must be gptq or gptq_v2",
    ),
    (GPTQ, set_field(dynamic={"+:.*": {"bits": 8}}), r"field dynamic is a dict of 1"),
    (
        GPTQ,
        set_field(quant_method="exl3"),
        r"quant_method is 'exl3', it must be awq or compressed-tensors or fp8",
    ),
    (GPTQ, rename_config, r"quantization_config is 'gptq', it must be an object"),
    (GPTQ, drop_config, r"g_idx' is of type I32, only F32, F16 and BF16"),
    (AWQ, set_field(version="gemv"), r"field version is 'gemv', it must be 'gemm'"),
    (AWQ, set_field(zero_point=False), r"field zero_point is False"),
    (AWQ, set_field(bits=8), r"field bits is 8"),
    (AWQ, set_tensor("g_idx", lambda t: t[:, 0].half(), "scales"), r"q_proj.g_idx' has no place"),
    (
        PACKED,
        set_scheme(input_activations={"num_bits": 8, "dynamic": True}),
        r"input_activations .* must be null",
    ),
    (PACKED, set_scheme(weights={"num_bits": 3}), r"field num_bits is 3"),
    (PACKED, set_scheme("weights", type="float"), r"field type is 'float', it must be int"),
    (PACKED, set_scheme("weights", symmetric=False), r"_proj.weight_zero_point' is missing"),
    (
        PACKED,
        set_scheme("weights", strategy="channel"),
        r"weight_scale' has shape \[128, 8\], .* ask for \[128, 1\]",
    ),
    (PACKED, set_field(format="marlin-24"), r"field format is 'marlin-24', it must be pack-quantized or"),
    (PACKED, set_field(kv_cache_scheme={"num_bits": 8}), r"field kv_cache_scheme is a dict of 1"),
    (PACKED, set_field(sparsity_config={"format": "sparse-24"}), r"field sparsity_config is a dict of 1"),
    (PACKED, two_schemes, r"field config_groups is a dict of 2, it must be of one scheme"),
    (PACKED, set_field(config_groups={}), r"field config_groups is a dict of 0"),
    (
        PACKED,
        set_tensor("weight_shape", lambda t: t - 1),
        r"weight_packed' is \[128, 128\], but its weight_shape",
    ),
    (
        INT8,
        set_tensor("weight_scale", lambda t: t[:4]),
        r"weight_scale' has shape \[4, 1\], .* ask for \[128, 1\]",
    ),
    (INT8, set_tensor("weight_scale", lambda t: None), r"weight_scale' is missing"),
    (
        INT8,
        set_tensor("weight", lambda t: t.half()),
        r"q_proj.weight_scale' has no .*q_proj.weight of type I8",
    ),
    (
        "fp8, blocks",
        set_field(activation_scheme="static"),
        r"activation_scheme is 'static', it must be 'dynamic'",
    ),
    (
        "fp8, blocks",
        set_tensor("weight_scale_inv", lambda t: None),
        r"q_proj.weight' must have one of weight_scale and weight_scale_inv beside it",
    ),
    (
        "fp8, blocks",
        set_tensor("weight_scale", lambda t: t, "weight_scale_inv"),
        r"q_proj.weight' must have one",
    ),
    ("fp8, blocks", set_field(weight_block_size=128), r"weight_block_size is 128, it must be a list of two"),
    (
        "fp8, blocks",
        set_field(weight_block_size=[64, 64]),
        r"weight_scale_inv' has shape \[1, 2\], .* \[2, 4\]",
    ),
    (
        "float8, channel",
        set_scheme(input_activations={"dynamic": False}),
        r"input_activations .* dynamic true",
    ),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), REFUSED, ids=[message[-40:] for _, _, message in REFUSED]
)
def test_what_does_not_fit_is_refused_by_name(
    original: tuple[Path, LlamaForCausalLM], tmp_path: Path, name: str, change: Change, message: str
) -> None:
    checkpoint = write(original, tmp_path, name)
    checkpoint.change(change)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message) as refusal:
        loader.load_model(open_checkpoint(tmp_path), make_ops("torch"), 64)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
