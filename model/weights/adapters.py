"""A folder of PEFT's (adapter_config.json, adapter_model.safetensors): a LoRA's pairs by our names.

It is strict: every tensor belongs to a module that the config targets and that adapters may change, every
such module has its two tensors, and their shapes are those of model and config, or reading fails by name.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.dialects.fields import Fields
from model.errors import ModelError
from model.weights.checkpoint import shown
from model.weights.names import NameTable, Place
from model.weights.safetensors import SafetensorsFiles, read_object

MOST_RANK = 256
_MOST_ALPHA = 1e6
_KINDS = ("F32", "F16", "BF16")
_WRAPPER = r"(model\.|language_model\.)*"
"""What stands before the layers: a model alone, or beside a tower that sees, in memory or as published."""
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

_NEUTRAL: Mapping[str, object] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}
"""Fields that change what an adapter computes in a way that is not implemented: absent, or without effect."""

_STARTS = ("gaussian", "eva", "orthogonal")
"""Ways to begin the training that leave the model's own weights as they are (PiSSA's and OLoRA's do not)."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What is added to one parameter: B A."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank], with the adapter's scale in it


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA (arXiv:2106.09685)."""

    name: str
    path: Path
    pairs: Mapping[str, Pair]
    """By our parameter's name."""

    @property
    def rank(self) -> int:
        """The largest of its pairs'."""
        return max(len(pair.a) for pair in self.pairs.values())


def read_adapter(name: str, folder: Path, names: NameTable, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read one folder (ModelError); `shapes` are of our parameters that adapters may change.

    `names` are those of the model that it was trained on. Fused modules are split as their tensors are.
    """
    config = _Config.read(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            f"{folder}: has no adapter_model.safetensors"
            + ("; pickled weights are never loaded, save the adapter again as safetensors" if pickled else "")
        )
    files = SafetensorsFiles(path)
    modules = _modules(names, shapes, _wrapper(files))
    found = _by_module(files, config, modules)
    missing = [module for module in modules if config.targets(module) and module not in found]
    if missing or not found:
        module = missing[0] if missing else "any module of this model"
        raise ModelError(
            f"{path}: has no tensors for {module}, which target_modules of adapter_config.json ask for; "
            "save the adapter again"
        )
    pairs: dict[str, Pair] = {}
    for module in found:
        pairs.update(_read_pairs(files, config, module, modules[module], shapes))
    return Adapter(name, folder, pairs)


@dataclass(frozen=True, slots=True)
class _Config:
    """adapter_config.json, as far as it changes what is computed."""

    fields: Fields
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> "_Config":
        if not path.is_file():
            raise ModelError(f"{path.parent}: has no adapter_config.json; give a folder that PEFT saved")
        values = {name: value for name, value in read_object(path).items() if value not in ([], {}, None)}
        fields = Fields(values, str(path))
        fields.word("peft_type", ("LORA",))
        fields.word("task_type", ("CAUSAL_LM",), "CAUSAL_LM")
        fields.neutral(_NEUTRAL)
        start = values.get("init_lora_weights", True)
        if not isinstance(start, bool) and start not in _STARTS:
            raise fields.refusal(
                "init_lora_weights", "true, or another start that leaves the model's weights as they are"
            )
        fields.count("r", MOST_RANK, 8)
        fields.number("lora_alpha", 0, _MOST_ALPHA, 8)
        fields.flag("use_rslora", False)
        ranks, alphas = (_pattern(fields, name) for name in ("rank_pattern", "alpha_pattern"))
        config = cls(
            fields,
            {key: ranks.count(key, MOST_RANK) for key in ranks.values},
            {key: alphas.number(key, 0, _MOST_ALPHA) for key in alphas.values},
        )
        for name in ("target_modules", "exclude_modules"):
            config.names(name, "")
        config.layers()
        return config

    def names(self, field: str, module: str) -> bool:
        """Whether `target_modules` or `exclude_modules` name a module."""
        given = self.fields.get(field)
        if isinstance(given, str):
            return _matched(self.fields, field, given, module, whole=True)
        if given is None:
            return False
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise self.fields.refusal(field, "a list of names of modules, or an expression")
        return any(module == name or module.endswith(f".{name}") for name in given)

    def layers(self) -> frozenset[int] | None:
        """The layers that have it; None: all."""
        given = self.fields.get("layers_to_transform")
        layers = given if isinstance(given, list) else [given]
        if not all(isinstance(layer, int) for layer in layers):
            if given is not None:
                raise self.fields.refusal("layers_to_transform", "the number of a layer, or several")
            return None
        return frozenset(layers)

    def targets(self, module: str) -> bool:
        """Whether a module of the model has it."""
        layers, number = self.layers(), re.search(r"\.(\d+)\.", module)
        within = layers is None or (number is not None and int(number[1]) in layers)
        return within and self.names("target_modules", module) and not self.names("exclude_modules", module)

    def rank(self, module: str) -> int:
        """Of a module's pair."""
        key = self._key(self.rank_pattern, "rank_pattern", module)
        return self.fields.count("r", MOST_RANK, 8) if key is None else self.rank_pattern[key]

    def scale(self, module: str) -> float:
        """What its B A is multiplied with: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
        key = self._key(self.alpha_pattern, "alpha_pattern", module)
        alpha = (
            self.fields.number("lora_alpha", 0, _MOST_ALPHA, 8) if key is None else self.alpha_pattern[key]
        )
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.fields.flag("use_rslora", False) else rank)

    def _key(self, pattern: Iterable[str], field: str, module: str) -> str | None:
        """The first key that means a module: the end of its name, as an expression, as in PEFT."""
        return next((key for key in pattern if _matched(self.fields, field, key, module)), None)


def _pattern(fields: Fields, name: str) -> Fields:
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise fields.refusal(name, "an object of names of modules")
    for key in value:
        _matched(fields, name, key, "")
    return Fields(value, f"{fields.where} ({name})")


def _matched(fields: Fields, field: str, expression: str, module: str, *, whole: bool = False) -> bool:
    """Whether an expression means a module: the whole of its name, or the end of it."""
    try:
        return re.fullmatch(expression if whole else rf"(.*\.)?({expression})", module) is not None
    except re.error:
        raise fields.refusal(field, "made of names of modules, or of valid expressions for them") from None


def _wrapper(files: SafetensorsFiles) -> str:
    """What the adapter's modules have before the layers, by the first that has any."""
    begins = (re.match(rf"base_model\.model\.({_WRAPPER})layers\.", tensor) for tensor in files.shapes)
    return next((begin[1] for begin in begins if begin is not None), "")


def _modules(names: NameTable, shapes: Iterable[str], wrapper: str) -> dict[str, dict[str, Place]]:
    """The foreign modules that adapters may change, with our parameters that stand in each, in order."""
    modules: dict[str, dict[str, Place]] = {}
    for ours in shapes:
        place = names.place(ours)
        module = wrapper + re.sub(f"^{_WRAPPER}", "", place.tensor.removesuffix(".weight"))
        modules[module] = {member: names.place(member) for member in place.members or (ours,)}
    return modules


def _by_module(
    files: SafetensorsFiles, config: _Config, modules: Mapping[str, object]
) -> Mapping[str, Mapping[str, str]]:
    """The file's tensors: of each module its sides, A and B, each checked to be known and complete."""
    found: dict[str, dict[str, str]] = {}
    for tensor, kind in files.kinds.items():
        where = f"{files.path}: the tensor {shown(tensor)}"
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            raise ModelError(f"{where} is no part of a LoRA of linear modules; others are not served")
        module = match["module"]
        if module not in modules:
            raise ModelError(
                f"{where} adapts what this model lacks or adapters may not change; they may change the "
                "projections of attention and of dense feed-forward networks"
            )
        if not config.targets(module):
            raise ModelError(f"{where} adapts what target_modules of adapter_config.json leave out")
        if kind not in _KINDS:
            raise ModelError(f"{where} is of type {kind}, only F32, F16 and BF16 are served; save it as one")
        found.setdefault(module, {})[match["side"]] = tensor
    for module, sides in found.items():
        if len(sides) < 2:
            side = "B" if "A" in sides else "A"
            raise ModelError(
                f"{files.path}: the tensor base_model.model.{module}.lora_{side}.weight is missing; "
                "save the adapter again"
            )
    return found


def _read_pairs(
    files: SafetensorsFiles,
    config: _Config,
    module: str,
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, Pair]]:
    """A module's pair, for each of our parameters in it."""
    rank, sizes = config.rank(module), [shapes[ours][0] for ours in places]
    inputs = shapes[next(iter(places))][1]
    sides = []
    for side, shape in (("A", (rank, inputs)), ("B", (sum(sizes), rank))):
        tensor = f"base_model.model.{module}.lora_{side}.weight"
        if files.shapes[tensor] != shape:
            raise ModelError(
                f"{files.path}: the tensor {tensor} has shape {list(files.shapes[tensor])}, but model and "
                f"adapter_config.json say {list(shape)}; check that the adapter is one of this model's"
            )
        sides.append(files.read(tensor).dequantise().to(torch.float32))
    a, b = sides[0].clone(), sides[1] * config.scale(module)
    for (ours, place), part in zip(places.items(), torch.split(b, sizes), strict=True):
        yield ours, Pair(a, part if place.order is None else part[place.order.rows(len(part))])
