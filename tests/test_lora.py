"""LoRA adapters in PEFT's form, written by the tests: beside each other in one batch, and what is refused.

The reference is transformers with W + scale * B A in the weights' place; the tolerance on torch's ops is ten
times the gap between the reference in float32 and in float64.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
from checkpoints import byte_tokenizer, make_gguf, make_llama
from families import make_family
from harness import Drive, make_ops
from live import LiveServer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from model import loader, lora
from model.backend import VARIANTS
from model.errors import ModelError
from model.transformer import Transformer
from model.weights import open_checkpoint
from server.config import InvalidSettings, ServeSettings, parse_settings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """What an adapter changes, and how."""

    targets: tuple[str, ...] = ALL
    rank: int = 8
    alpha: float = 16
    fields: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0

    def rank_of(self, module: str) -> int:
        pattern = self.fields.get("rank_pattern", {})
        return next((rank for key, rank in pattern.items() if module.endswith(key)), self.rank)

    def scale_of(self, module: str) -> float:
        pattern = self.fields.get("alpha_pattern", {})
        alpha = next((alpha for key, alpha in pattern.items() if module.endswith(key)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)


RECIPES = {
    "a": Recipe(seed=1),
    "b": Recipe(("q_proj", "v_proj"), rank=4, alpha=6, seed=2),
    "c": Recipe(
        rank=16,
        seed=3,
        fields={
            "use_rslora": True,
            "rank_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 40},
            "alpha_pattern": {"k_proj": 5},
        },
    ),
}


def write_adapter(folder: Path, model: PreTrainedModel, recipe: Recipe) -> dict[str, Tensor]:
    """Save a random adapter as PEFT does; gives what it adds to each module's weight."""
    generator = torch.Generator().manual_seed(recipe.seed)
    tensors, added = {}, {}
    for module, linear in model.named_modules():
        if module.rpartition(".")[2] not in recipe.targets:
            continue
        rank, (outputs, inputs) = recipe.rank_of(module), linear.weight.shape
        a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
        b = torch.randn(outputs, rank, generator=generator) * 0.2
        name = f"base_model.model.{module}.lora"
        tensors |= {f"{name}_A.weight": a, f"{name}_B.weight": b}
        added[module] = recipe.scale_of(module) * (b.double() @ a.double())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.05,
        "target_modules": list(recipe.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        **recipe.fields,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return added


@torch.no_grad()
def merged(model: PreTrainedModel, added: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with an adapter in its weights, in float64."""
    model = copy.deepcopy(model).double()
    for module, delta in added.items():
        model.get_submodule(module).weight += delta
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits.double()


def tokens_of(length: int, seed: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Case:
    """A model with adapters, and the reference of each; "" is the model itself."""

    path: Path
    folders: Mapping[str, Path]
    references: Mapping[str, PreTrainedModel]

    def load(self, op_set: str, adapters: bool = True, bits: int = 16) -> Transformer:
        checkpoint = open_checkpoint(self.path)
        read = lora.read_adapters(self.folders if adapters else {}, checkpoint)
        model = loader.load_model(checkpoint, make_ops(op_set, bits), 64)
        lora.attach(model, read)
        return model


def case_of(root: Path, model: PreTrainedModel, recipes: Mapping[str, Recipe]) -> Case:
    added = {name: write_adapter(root / name, model, recipe) for name, recipe in recipes.items()}
    plainly = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32, **plainly).eval()
    references = {name: merged(model, delta) for name, delta in added.items()}
    return Case(
        root / "model", {name: root / name for name in recipes}, {"": merged(model, {}), **references}
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("lora")
    model = make_llama(root / "model", tie=True, seed=5, head_dim=32, hidden_size=96)
    byte_tokenizer(root / "model")
    return case_of(root, model, RECIPES)


PROMPTS = {name: tokens_of(21 + 3 * i, seed=i) for i, name in enumerate(("", *RECIPES))}
OUTPUTS = {name: tokens_of(6, seed=10 + i) for i, name in enumerate(PROMPTS)}


def run(model: Transformer, names: Sequence[str], **options: object) -> dict[str, Tensor]:
    """The logits of every step of requests side by side, one an adapter."""
    drive, numbers = Drive(model, **options), {name: i for i, name in enumerate(("", *RECIPES))}
    traces = {
        name: drive.add(name or "none", PROMPTS[name], forced=OUTPUTS[name], adapter=numbers[name])
        for name in names
    }
    drive.run()
    return {name: torch.stack(trace.logits) for name, trace in traces.items()}


def wanted(reference: PreTrainedModel, name: str) -> Tensor:
    """What a request's steps ought to give."""
    return logits_of(reference, [*PROMPTS[name], *OUTPUTS[name]])[len(PROMPTS[name]) - 1 : -1]


def noise_floor(reference: PreTrainedModel, name: str) -> float:
    """The largest gap between the reference in float32 and in float64."""
    single = copy.deepcopy(reference).float()
    return float((wanted(single, name) - wanted(reference, name)).abs().max())


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Root of the mean square of the difference, in those of the reference."""
    return float((logits.double() - reference).norm() / reference.norm())


class TestTorch:
    def test_every_logit_of_every_step_is_the_references(self, case: Case) -> None:
        """All in one batch: three adapters and the model itself."""
        for name, logits in run(case.load("torch"), list(PROMPTS)).items():
            error = float((logits - wanted(case.references[name], name)).abs().max())
            assert error <= 10 * noise_floor(case.references[name], name), name

    def test_the_tolerance_sees_another_adapter(self, case: Case) -> None:
        for name in PROMPTS:
            logits = run(case.load("torch"), [name])[name]
            for other in PROMPTS.keys() - {name}:
                error = float((logits - wanted(case.references[other], name)).abs().max())
                assert error > 1000 * noise_floor(case.references[other], name), (name, other)

    def test_a_row_without_an_adapter_keeps_its_bits(self, case: Case) -> None:
        """Beside rows that have one; the other model has none to give."""
        beside = run(case.load("torch"), list(PROMPTS))[""]
        assert torch.equal(beside, run(case.load("torch", adapters=False), list(PROMPTS))[""])

    @pytest.mark.parametrize(
        ("family", "targets"),
        [
            ("qwen2", ALL),  # biases, several adapters of one product
            ("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),  # fused: several of our parameters
            ("phi3_long", ("qkv_proj", "down_proj")),  # with queries and keys in another order
            ("olmo2", ALL),  # norms after the products
            ("granite", ALL),  # multipliers
            ("mixtral", ATTENTION),
            ("gemma3_nested", ("o_proj", "up_proj", "down_proj")),  # its names in memory are not the file's
        ],
    )
    def test_other_families(self, family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
        model = make_family(family, tmp_path / "model", seed=3)
        case = case_of(tmp_path, model, {"a": Recipe(targets, seed=4), "b": Recipe(targets[:1], seed=5)})
        for name, logits in run(case.load("torch"), ["", "a", "b"]).items():
            error = float((logits - wanted(case.references[name], name)).abs().max())
            assert error <= 10 * noise_floor(case.references[name], name), name

    def test_a_gguf_takes_the_adapters_of_its_transformers_folder(self, case: Case, tmp_path: Path) -> None:
        """Although its names, and the order of its queries' and keys' rows, are others."""
        make_gguf(copy.deepcopy(case.references[""]).float(), tmp_path / "model.gguf")
        of_file = Case(tmp_path / "model.gguf", case.folders, case.references)
        for name, logits in run(of_file.load("torch"), ["", "a"]).items():
            error = float((logits - wanted(case.references[name], name)).abs().max())
            assert error <= 10 * noise_floor(case.references[name], name), name


class TestNative:
    @pytest.fixture(scope="class", params=VARIANTS)
    def variant(self, request: pytest.FixtureRequest) -> str:
        make_ops(request.param)  # skips where it cannot run
        return str(request.param)

    @pytest.fixture(scope="class", params=[8, 16])
    def bits(self, request: pytest.FixtureRequest) -> int:
        return int(request.param)

    @pytest.fixture(scope="class")
    def model(self, case: Case, variant: str, bits: int) -> Transformer:
        return case.load(variant, bits=bits)

    @pytest.fixture(scope="class")
    def together(self, model: Transformer) -> dict[str, Tensor]:
        return run(model, list(PROMPTS))

    def test_adapters_lose_no_more_than_the_model_itself(
        self, case: Case, together: dict[str, Tensor]
    ) -> None:
        errors, changes = {}, {}
        for name, logits in together.items():
            errors[name] = relative_error(logits, wanted(case.references[name], name))
            changes[name] = relative_error(logits, wanted(case.references[""], name))
        for name in RECIPES:
            # What a model with the adapter in its weights loses in bfloat16: strong ones make rounding count.
            merged = copy.deepcopy(case.references[name]).bfloat16()
            loss = relative_error(wanted(merged, name), wanted(case.references[name], name))
            assert errors[name] < max(2 * errors[""], 1.5 * loss), (errors, loss)
            assert changes[name] > 10 * errors[name], (changes, errors)

    def test_a_row_without_an_adapter_keeps_its_bits(
        self, case: Case, variant: str, bits: int, model: Transformer, together: dict[str, Tensor]
    ) -> None:
        """Beside rows that have one, and alone; the other model was loaded without any."""
        plain = run(case.load(variant, adapters=False, bits=bits), [""])[""]
        assert torch.equal(together[""], plain)
        assert torch.equal(run(model, [""])[""], plain)

    @pytest.mark.parametrize("name", RECIPES)
    def test_a_row_does_not_depend_on_its_neighbours(
        self, name: str, model: Transformer, together: dict[str, Tensor]
    ) -> None:
        """Alone, and in chunks of other sizes: whole blocks of rows, single rows, pieces of either."""
        assert torch.equal(run(model, [name])[name], together[name])
        assert torch.equal(run(model, [name], budget=5)[name], together[name])
        assert torch.equal(run(model, list(PROMPTS), budget=11)[name], together[name])

    @pytest.mark.parametrize("family", ["qwen2", "phi3", "olmo2", "granite"])
    def test_other_families(self, family: str, variant: str, tmp_path: Path) -> None:
        """What follows a product is another op in each of them."""
        model = make_family(family, tmp_path / "model", seed=3)
        targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") if family == "phi3" else ALL
        case = case_of(tmp_path, model, {"a": Recipe(targets, seed=4)})
        logits = run(case.load(variant), ["", "a"])
        plain = run(case.load(variant, adapters=False), [""])
        assert torch.equal(logits[""], plain[""])
        errors = {
            name: relative_error(got, wanted(case.references[name], name)) for name, got in logits.items()
        }
        assert errors["a"] < 2 * errors[""], errors


@pytest.mark.parametrize("op_set", ["torch", "avx2"])
def test_adapters_share_no_block_of_the_cache(case: Case, op_set: str) -> None:
    """The same prompt under each of them in turn: keys and values of another would change the logits."""
    model, prompt = case.load(op_set), tokens_of(40, seed=7)
    drive = Drive(model)
    first, again = {}, {}
    for found in (first, again):
        for number in range(4):
            name = f"{number}{len(again)}{found is again}"
            trace = drive.add(name, prompt, forced=[1], adapter=number)
            drive.run()
            found[number] = (trace.logits[0], trace.outputs[-1].cached_tokens)
    for number in range(4):
        alone = Drive(model)
        trace = alone.add("alone", prompt, forced=[1], adapter=number)
        alone.run()
        assert first[number][1] == 0 and again[number][1] == 32
        for logits, _ in (first[number], again[number]):
            assert float((logits - trace.logits[0]).abs().max()) <= alone.tolerance


# -- bad adapters -------------------------------------------------------------------------------------

PREFIX = "base_model.model.model.layers.0.self_attn"
Tensors = dict[str, Tensor]


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def reshape(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


BAD_CONFIGS = {
    "another kind": (
        {"peft_type": "IA3"},
        r"adapter_config\.json: field peft_type is 'IA3', it must be LORA",
    ),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "DoRA": ({"use_dora": True}, "use_dora is True, it must be False or absent"),
    "biases": ({"bias": "all"}, "bias is 'all', it must be 'none'"),
    "turned": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "experts": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    "rank 0": ({"r": 0}, "r is 0, it must be a whole number from 1 to 256"),
    "a large rank": ({"r": 257}, "r is 257"),
    "another rank": ({"r": 5}, r"q_proj\.lora_A\.weight has shape \[4, 96\], but model and .* say \[5, 96\]"),
    "ranks that are none": ({"rank_pattern": {"q_proj": "4"}}, r"\(rank_pattern\): field q_proj is '4'"),
    "no ranks": ({"rank_pattern": [1]}, "rank_pattern is a list of 1"),
    "a rank of another layer's": (
        {"rank_pattern": {"layers.0.self_attn.v_proj": 8}},
        r"v_proj.* say \[8, 96\]",
    ),
    "no expression": ({"alpha_pattern": {"(": 1}}, r"alpha_pattern .* valid expressions"),
    "alpha": ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    "a flag": ({"use_rslora": "yes"}, "use_rslora is 'yes', it must be true or false"),
    "no targets": ({"target_modules": 1}, "target_modules is 1"),
    "fewer targets": ({"target_modules": ["v_proj"]}, r"q_proj\.lora_A\.weight' adapts what target_modules"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "has no tensors for .*up_proj"),
    "other layers": ({"layers_to_transform": [0]}, r"layers\.1\..* adapts what target_modules"),
    "layers that are none": ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
}

BAD_TENSORS = {
    "not PEFT's": (rename(f"{PREFIX}.q_proj.lora_A.weight", "q_proj.A"), "'q_proj.A' is no part of a LoRA"),
    "an embedding": (
        rename(f"{PREFIX}.q_proj.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"),
        "embed_tokens.lora_embedding_A' is no part of a LoRA of linear modules",
    ),
    "the output": (
        rename(f"{PREFIX}.q_proj.lora_A.weight", "base_model.model.lm_head.lora_A.weight"),
        r"lm_head\.lora_A\.weight' adapts what this model lacks or adapters may not change",
    ),
    "a layer too many": (
        rename(f"{PREFIX}.q_proj.lora_A.weight", f"{PREFIX}.q_proj.lora_A.weight".replace(".0.", ".2.")),
        r"layers\.2\.self_attn\.q_proj\.lora_A\.weight' adapts what this model lacks",
    ),
    "one of two": (
        lambda tensors: tensors.pop(f"{PREFIX}.q_proj.lora_B.weight"),
        r"lora_B\.weight is missing",
    ),
    "a module too few": (
        lambda tensors: [tensors.pop(f"{PREFIX}.q_proj.lora_{side}.weight") for side in "AB"],
        r"has no tensors for model\.layers\.0\.self_attn\.q_proj",
    ),
    "A misshapen": (reshape(f"{PREFIX}.q_proj.lora_A.weight", 4, 64), r"has shape \[4, 64\], .* \[4, 96\]"),
    "B misshapen": (reshape(f"{PREFIX}.v_proj.lora_B.weight", 128, 4), r"has shape \[128, 4\], .* \[64, 4\]"),
    "integers": (
        lambda tensors: tensors.update(
            {name: tensor.to(torch.int8) for name, tensor in tensors.items() if "v_proj" in name}
        ),
        "is of type I8, only F32, F16 and BF16 are served",
    ),
}


class TestBadAdapters:
    @pytest.fixture
    def folder(self, case: Case, tmp_path: Path) -> Path:
        """A good one, to be made bad."""
        return Path(shutil.copytree(case.folders["b"], tmp_path / "b"))

    def refused(self, case: Case, folder: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message) as refusal:
            lora.read_adapters({"b": folder}, open_checkpoint(case.path))
        assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)

    @pytest.mark.parametrize("name", BAD_CONFIGS)
    def test_a_config(self, name: str, case: Case, folder: Path) -> None:
        fields, message = BAD_CONFIGS[name]
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        self.refused(case, folder, message)

    @pytest.mark.parametrize("name", BAD_TENSORS)
    def test_tensors(self, name: str, case: Case, folder: Path) -> None:
        change, message = BAD_TENSORS[name]
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        self.refused(case, folder, message)

    def test_files(self, case: Case, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        self.refused(case, folder, "no adapter_model.safetensors; pickled weights are never loaded")
        (folder / "adapter_model.safetensors").write_bytes(b"{}")
        self.refused(case, folder, "is not a whole safetensors file")
        (folder / "adapter_config.json").unlink()
        self.refused(case, folder, "has no adapter_config.json; give a folder that PEFT saved")

    def test_numbers_that_fp16_does_not_hold(self, case: Case, folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[f"{PREFIX}.q_proj.lora_A.weight"][1, 2] = 1e5
        save_file(tensors, path)
        with pytest.raises(ModelError, match=r"layers\.0\.attention: .* 1e\+05 .*--kernels torch"):
            Case(case.path, {"b": folder}, {}).load("avx2")
        Case(case.path, {"b": folder}, {}).load("torch")

    def test_other_layers_and_expressions_are_as_in_peft(self, case: Case, tmp_path: Path) -> None:
        """Half of the layers, by number; targets by one expression; ranks by another."""
        path = tmp_path / "x"
        shutil.copytree(case.folders["b"], path)
        tensors = load_file(path / "adapter_model.safetensors")
        save_file(
            {name: tensor for name, tensor in tensors.items() if "layers.1." in name},
            path / "adapter_model.safetensors",
        )
        config = json.loads((path / "adapter_config.json").read_text())
        config |= {
            "layers_to_transform": 1,
            "target_modules": r".*\.self_attn\.(q|k|v)_proj",
            "exclude_modules": ["k_proj"],
            "r": 9,
            "rank_pattern": {r"layers\.[12]\..*": 4},
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        (adapter,) = lora.read_adapters({"x": path}, open_checkpoint(case.path))
        assert set(adapter.pairs) == {f"layers.1.attention.{name}" for name in ("query", "value")}
        assert adapter.rank == 4


# -- the server ---------------------------------------------------------------------------------------


class TestServer:
    @pytest.fixture(scope="class")
    def server(self, case: Case, serve: Callable[..., LiveServer]) -> LiveServer:
        adapters = ",".join(f"{name}={case.folders[name]}" for name in ("a", "b"))
        return serve(case.path, dtype="float32", lora=adapters, served_model_aliases="other")

    @pytest.fixture(scope="class")
    def client(self, server: LiveServer) -> httpx.Client:
        return server.client()

    @pytest.fixture(scope="class")
    def texts(self, client: httpx.Client) -> dict[str, str]:
        """What each of them says after the same conversation, by /v1/completions."""
        prompt = client.post("/chat_tokenize", json={"messages": MESSAGES}).json()["templated_text"]
        ids = [token["id"] for token in client.post("/tokenize", json={"inputs": prompt}).json()]
        texts = {}
        for name in ("model", "a", "b"):
            body = {"model": name, "prompt": ids, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["model"] == name
            texts[name] = answer["choices"][0]["text"]
        assert len(set(texts.values())) == 3
        return texts

    @pytest.mark.parametrize("name", ["model", "a", "b"])
    def test_logprobs_are_the_references(self, name: str, client: httpx.Client, case: Case) -> None:
        prompt = tokens_of(30, seed=3)
        body = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        body |= {"echo": True}
        given = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
        reference = case.references["" if name == "model" else name]
        logprobs = logits_of(reference, prompt).log_softmax(-1)
        for place in range(1, len(prompt)):
            assert given[place] == pytest.approx(float(logprobs[place - 1, prompt[place]]), abs=1e-3)

    @pytest.mark.parametrize("name", ["model", "a", "b"])
    def test_every_route_computes_with_it(
        self, name: str, client: httpx.Client, texts: dict[str, str]
    ) -> None:
        greedy = {"model": name, "temperature": 0}
        chat = {**greedy, "messages": MESSAGES, "max_tokens": 12, "ignore_eos": True}
        answer = client.post("/v1/chat/completions", json=chat).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (name, texts[name])
        events = client.post("/v1/chat/completions", json={**chat, "stream": True}).text.split("\n\n")
        chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
        assert {chunk["model"] for chunk in chunks} == {name}
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert said == texts[name]
        # The others have no ignore_eos in their contracts, but every field of ours.
        body = {**greedy, "messages": MESSAGES, "max_tokens": 12, "ignore_eos": True}
        answer = client.post("/v1/messages", json=body).json()
        assert (answer["model"], answer["content"][0]["text"]) == (name, texts[name])
        body = {**greedy, "input": MESSAGES, "max_output_tokens": 12, "ignore_eos": True}
        answer = client.post("/v1/responses", json=body).json()
        assert (answer["model"], answer["output"][0]["content"][0]["text"]) == (name, texts[name])
        parameters = {"max_new_tokens": 12, "ignore_eos": True}
        parameters |= {} if name == "model" else {"adapter_id": name}
        prompt = client.post("/chat_tokenize", json={"messages": MESSAGES}).json()["templated_text"]
        body = {"inputs": prompt, "parameters": parameters}
        assert client.post("/generate", json=body).json()["generated_text"] == texts[name]
        last = client.post("/generate_stream", json=body).text.strip().rpartition("data:")[2]
        assert json.loads(last)["generated_text"] == texts[name]

    def test_the_list_of_models(self, client: httpx.Client) -> None:
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert list(cards) == ["model", "other", "a", "b"]
        assert [card.get("parent") for card in cards.values()] == [None, None, "model", "model"]
        assert client.get("/v1/models/b").json() == cards["b"]

    def test_unknown_names(self, client: httpx.Client) -> None:
        body = {"model": "c", "messages": MESSAGES, "max_tokens": 4, "input": MESSAGES, "prompt": "x"}
        for route in ("chat/completions", "completions", "responses", "messages"):
            answer = client.post(f"/v1/{route}", json=body)
            assert answer.status_code == 404, route
            assert "this server serves `model`, `a`, `b`" in answer.text
        for name in ("c", "", "model"):
            answer = client.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": name}})
            assert answer.status_code == 422
            assert answer.json()["error_type"] == "validation"
            error = answer.json()["error"]
            assert error.endswith("`adapter_id` names no adapter of this server. Loaded: `a`, `b`")

    @pytest.mark.parametrize("name", ["model", "other", "tgi"])
    def test_a_name_of_the_model(self, name: str, case: Case) -> None:
        with pytest.raises(ModelError, match=f"--lora {name}: the model itself answers to that name"):
            LiveServer(case.path, lora=f"{name}={case.folders['a']}", served_model_aliases="other")


MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.mark.parametrize(
    ("flags", "adapters"),
    [
        ((), ()),
        (("--lora", "a=/x"), (("a", Path("/x")),)),
        (("--lora", "a=/x", "--lora=b=y=z"), (("a", Path("/x")), ("b", Path("y=z")))),
        (("--lora", "a=/x, b=~/y"), (("a", Path("/x")), ("b", Path.home() / "y"))),
    ],
)
def test_the_flag(flags: tuple[str, ...], adapters: tuple[tuple[str, Path], ...]) -> None:
    assert parse_settings(ServeSettings, flags, "rivulet serve").lora == adapters


@pytest.mark.parametrize(
    ("value", "message"),
    [("a", "`a` is not NAME=FOLDER"), ("=x", "is not"), ("a=", "is not"), ("a=x,a=y", "`a` is given twice")],
)
def test_a_flag_that_cannot_be(value: str, message: str) -> None:
    with pytest.raises(InvalidSettings, match=f"lora: .*{message}"):
        parse_settings(ServeSettings, ("--lora", value), "rivulet serve")
