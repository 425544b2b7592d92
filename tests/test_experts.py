"""Mixtures of experts in both op sets, against a plain loop over tokens and experts in float64."""

import random
import time
from dataclasses import replace

import pytest
import torch
from harness import make_ops
from test_native_kernels import LARGEST, normal, read, rows_only
from torch import Tensor

from model.backend import VARIANTS
from model.config import ExpertsConfig, LayerConfig, ModelConfig
from model.layers import MixtureOfExperts
from model.ops.base import Ops
from model.ops.native import NativeOps
from model.ops.native_handles import Hidden
from model.ops.panels import GROUP, Matrix, unfit
from model.weights.stored import StoredTensor

WIDTH, SIZE = 96, 64
EIGHT = ExpertsConfig(count=8, per_token=2, intermediate_size=SIZE, normalised=True)
CASES = {
    "two of eight, normalised": EIGHT,
    "two of eight, as they are": replace(EIGHT, normalised=False),
    "one of four": replace(EIGHT, count=4, per_token=1, normalised=False),
    "three of 37": replace(EIGHT, count=37, per_token=3),
    "all of five": replace(EIGHT, count=5, per_token=5),
    "two shared": replace(EIGHT, num_shared=2, shared_intermediate_size=32),
}


@pytest.fixture(name="ops", scope="module", params=["torch", *VARIANTS])
def each_op_set(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


@pytest.fixture(name="native", scope="module", params=VARIANTS)
def each_variant(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


def model_config(experts: ExpertsConfig, width: int) -> ModelConfig:
    return ModelConfig(
        architecture="mixture",
        vocab_size=32,
        hidden_size=width,
        layers=(LayerConfig(None, experts=True),),
        num_heads=1,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=32,
        hidden_act="silu",
        norm_eps=1e-5,
        max_position_embeddings=32,
        tie_embeddings=True,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(),
        experts=experts,
    )


def fill(ops: Ops, network: MixtureOfExperts, name: str, numbers: Tensor) -> None:
    ops.fill(dict(network.parameters())[name], StoredTensor.plain(numbers))


def mixture(ops: Ops, config: ExpertsConfig, width: int = WIDTH) -> MixtureOfExperts:
    network = MixtureOfExperts(model_config(config, width), ops)
    for seed, (_, weight) in enumerate(network.parameters()):
        ops.fill(
            weight, StoredTensor.plain(normal(*ops.shape(weight), seed=seed) / ops.shape(weight)[1] ** 0.5)
        )
    return network


def run(ops: Ops, network: MixtureOfExperts, x: Tensor) -> Tensor:
    if not isinstance(ops, NativeOps):
        result = network.forward(x, None)
        assert isinstance(result, Tensor)
        return result
    hidden = torch.zeros_like(x)
    with ops.recording(len(x), 1) as tape:
        ops.add(Hidden(hidden), network.forward(Hidden(x), None))
    tape.run(rows_only(len(x)))
    return hidden


def numbers_of(ops: Ops, weight: Matrix | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.double()
    assert isinstance(ops, NativeOps)
    return read(ops, weight).double()


def as_read(ops: Ops, row: Tensor) -> Tensor:
    """A row as a product reads it: natively as integers of 8 bits in groups of 32."""
    if not isinstance(ops, NativeOps):
        return row
    groups = row.view(-1, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / LARGEST
    return ((groups / step).round() * step).flatten()


def by_loop(ops: Ops, network: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token, expert by expert, on the weights that the op set holds, the rows as it reads them."""
    weights = {name: numbers_of(ops, weight) for name, weight in network.parameters()}

    def network_of(name: str, row: Tensor) -> Tensor:
        row = as_read(ops, row)
        gate = weights[f"{name}.gate"] @ row
        inner = gate * gate.sigmoid() * (weights[f"{name}.up"] @ row)
        return weights[f"{name}.down"] @ as_read(ops, inner)

    config, rows = network.config, []
    for row in x.double():
        shares = (weights["router"] @ row).softmax(-1).tolist()
        chosen = sorted(range(config.count), key=lambda expert: (-shares[expert], expert))[: config.per_token]
        total = sum(shares[expert] for expert in chosen) if config.normalised else 1.0
        y = torch.zeros_like(row)
        for expert in chosen:
            y += shares[expert] / total * network_of(f"experts.{expert}", row)
        for shared in range(config.num_shared):
            y += network_of(f"shared.{shared}", row)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_as_a_loop_over_tokens(ops: Ops, config: ExpertsConfig) -> None:
    """Float32's rounding; natively that may turn an integer of a row into the next one."""
    network = mixture(ops, config)
    bound = 0.002 if isinstance(ops, NativeOps) else 1e-5
    for count in (1, 2, 9, 64, 150):
        x = normal(count, WIDTH, seed=count)
        want = by_loop(ops, network, x)
        errors = (run(ops, network, x) - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(errors.max()) < bound, (count, int(errors.argmax()))


def poison(weight: Matrix | Tensor) -> None:
    """Not-a-number whichever way it is read: a product with it would be seen even with a share of zero."""
    if isinstance(weight, Tensor):
        weight.fill_(float("nan"))
    else:
        assert weight._memory is not None
        weight._memory.fill_(0xFF)  # of a panel's scales and minima too


@pytest.mark.parametrize("chosen", [(0, 1), (4, 5)])
def test_of_equals_the_lower_index_and_nothing_of_the_others(ops: Ops, chosen: tuple[int, int]) -> None:
    """All experts from the first chosen one on are equally probable; nothing of the others is read."""
    network, x = mixture(ops, EIGHT), normal(20, WIDTH, seed=3).abs()
    router = torch.ones(8, WIDTH)
    router[chosen[0] :] += 0.1
    fill(ops, network, "router", router)
    before, want = run(ops, network, x), by_loop(ops, network, x)
    assert float((before - want).norm() / want.norm()) < 0.002
    weights = dict(network.parameters())
    for expert in set(range(8)) - set(chosen):
        for part in ("gate", "up", "down"):
            poison(weights[f"experts.{expert}.{part}"])
    assert torch.equal(run(ops, network, x), before)
    poison(weights[f"experts.{chosen[1]}.up"])
    assert run(ops, network, x).isnan().all(), "the chosen one is read"


def test_widths_that_panels_do_not_hold_are_named() -> None:
    """Those of all networks that there are: none is dense here."""
    for change in ({"intermediate_size": 48}, {"num_shared": 1, "shared_intermediate_size": 48}):
        reason = unfit(model_config(replace(EIGHT, **change), WIDTH))
        assert reason is not None
        assert "experts' intermediate_size 48" in reason
    assert unfit(replace(model_config(EIGHT, WIDTH), intermediate_size=33)) is None


@pytest.mark.parametrize("name", ["two of eight, normalised", "three of 37", "two shared"])
def test_a_row_has_the_same_bits_whoever_is_beside_it(native: Ops, name: str) -> None:
    """Alone, in batches of 2 to 64 and in other orders: few rows and many are cut into other tasks."""
    network, x = mixture(native, CASES[name]), normal(64, WIDTH, seed=7)
    want = torch.cat([run(native, network, x[row : row + 1].clone()) for row in range(64)])
    draw = random.Random(1)
    for count in (2, 3, 8, 9, 16, 31, 33, 64):
        order = draw.sample(range(64), count)
        assert torch.equal(run(native, network, x[order].contiguous()), want[order]), count


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(native: Ops, threads: int) -> None:
    assert isinstance(native, NativeOps)
    other, x = NativeOps(native._lib, threads), normal(64, WIDTH, seed=7)
    config = CASES["three of 37"]
    want, network = run(native, mixture(native, config), x), mixture(other, config)
    for count in (64, 64, 64, 9, 1):
        assert torch.equal(run(other, network, x[:count].contiguous()), want[:count]), count


@pytest.mark.alone
def test_few_experts_are_cheaper_than_all(ops: Ops) -> None:
    """64 rows on 2 of 8 experts do a quarter of the work of 8 of 8; half the time is allowed, and a bit."""
    width, times = 256, []
    x = normal(64, width, seed=1)
    shape = replace(EIGHT, intermediate_size=2048)
    networks = [mixture(ops, replace(shape, per_token=number), width) for number in (2, 8)]
    for network in networks:
        fill(ops, network, "router", torch.arange(8.0)[:, None].expand(8, width).contiguous())
        run(ops, network, x)
    for _ in range(40):
        for network in networks:
            start = time.perf_counter()
            run(ops, network, x)
            times.append(time.perf_counter() - start)
    assert min(times[::2]) < 0.6 * min(times[1::2])
