"""From settings to a Service: find the model, load it, size the cache; each phase timed and shown."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from model import loader, lora
from model.backend import Wishes, choose_backend, companion
from model.config import ModelConfig
from model.errors import ModelError
from model.kv_cache import KVCache
from model.ops.base import Ops
from model.runner import Runner
from model.source import locate, served_name
from model.weights import open_checkpoint
from model.weights.checkpoint import Checkpoint
from model.weights.gguf import GgufFiles
from server.config import ModelSettings
from server.engine.admission import Admission
from server.engine.block_pool import BlockPool
from server.engine.block_tables import BlockTables
from server.engine.draft_model import DraftModel
from server.engine.engine import Engine, Fault
from server.engine.prompt_lookup import PromptLookup
from server.engine.scheduler import Scheduler
from server.engine.speculator import MOST_GUESSES, Speculator
from server.metrics import Metrics
from server.phases import Phases
from server.service import NO_NAMES, Limits, ModelInfo, Service
from server.text.chat_template import ChatTemplate, TemplateError
from server.text.grammar import GrammarCompiler
from server.text.renderer import Renderer
from server.text.tokenizer import Tokenizer

MIB = 1 << 20

logger = logging.getLogger("rivulet.startup")

OnFault = Callable[[Fault, str], None]
"""Takes an end of the engine that nobody asked for, and the reason."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to run, and what to say of it."""

    service: Service
    device: str
    cache: str
    note: str | None
    """Why it is not as fast as it could be."""
    adapters: str | None = None


def load(
    settings: ModelSettings,
    console: Console,
    phases: Phases,
    limits: Limits,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
    adapters: Sequence[tuple[str, Path]] = (),
    on_fault: OnFault = lambda fault, reason: None,
) -> Loaded:
    """Everything but the HTTP side (ModelError with one sentence if the model cannot be served)."""
    name = name or served_name(settings.model)
    check_names([adapter for adapter, _ in adapters], (name, *aliases, *NO_NAMES))
    renderer = Renderer()  # its process starts meanwhile
    with phases.measure("find the model"):
        path = locate(settings.model, settings.revision, settings.cache_folder, console.print)
    with phases.measure("read its files"):
        checkpoint = open_checkpoint(path, dict(settings.config_fields))
        tokenizer = read_tokenizer(path, checkpoint, settings.tokenizer)
        template = read_template(tokenizer, path, renderer)
        loras = lora.read_adapters(dict(adapters), checkpoint)
    config = checkpoint.config
    max_model_len = check_length(settings.max_model_len, config)
    wishes = Wishes(settings.device, settings.dtype, settings.kernels, settings.quantize, settings.threads)
    backend = choose_backend(wishes, config)
    ops = backend.ops
    with phases.measure("load the weights"), weight_progress(console, phases) as progress:
        model = loader.load_model(checkpoint, ops, max_model_len, progress)
        lora_bytes = lora.attach(model, loras)
    speculator = make_speculator(settings, tokenizer, ops, max_model_len, console, phases)
    with phases.measure("make the KV cache"):
        wanted = loader.CacheSize(settings.kv_cache_tokens, settings.kv_cache_memory)
        blocks, line = loader.size_cache(
            model, wanted, max_model_len, settings.max_running, settings.token_budget
        )
        guesses = MOST_GUESSES if speculator.name else 0
        runner = loader.make_runner(model, blocks, settings.token_budget, settings.max_running, guesses)
    cache_tokens = blocks[0] * runner.graph.cache.block_size
    longest = loader.longest_sequence(model, blocks, max_model_len, settings.token_budget)
    if longest < max_model_len:
        line += f"; requests are limited to {longest:,} tokens instead of the model's {max_model_len:,}"
        max_model_len = longest
    info = ModelInfo(
        name=name,
        dtype=str(ops.dtype).removeprefix("torch."),
        device=ops.device.type,
        kernels=ops.name,
        max_model_len=max_model_len,
        cache_tokens=cache_tokens,
        max_running=settings.max_running,
        max_waiting=limits.max_waiting,
        loaded_at=int(time.time()),
        aliases=aliases,
        adapters=tuple(adapter.name for adapter in loras),
    )
    about = {
        "version": version("rivulet"),
        "model": info.name,
        "kernels": info.kernels,
        "device": info.device,
    }
    metrics = Metrics(max_model_len, settings.max_running, about)
    engine = make_engine(runner, speculator, settings, limits, metrics, on_fault)
    grammars = GrammarCompiler(tokenizer)
    service = Service(info, engine, tokenizer, template, metrics, grammars, limits)
    each = ", ".join(f"{adapter.name} (rank {adapter.rank})" for adapter in loras)
    adapted = f"{each}; {lora_bytes / MIB:.1f} MiB" if loras else None
    device = backend.description
    if speculator.name:
        device += f"; guesses by {speculator.name}"
    return Loaded(service, device, line, backend.note, adapted)


def check_names(adapters: Sequence[str], taken: Sequence[str]) -> None:
    """Refuse an adapter that is called as the model is (ModelError): no request could choose it."""
    for name in adapters:
        if name in taken:
            raise ModelError(
                f"--lora {name}: the model itself answers to that name; give the adapter another"
            )


def make_engine(
    runner: Runner,
    speculator: Speculator,
    settings: ModelSettings,
    limits: Limits,
    metrics: Metrics,
    on_fault: OnFault,
) -> Engine:
    """Scheduler and engine over a runner's cache."""
    pools = make_pools(runner.graph.cache, settings)
    scheduler = Scheduler(*pools, token_budget=settings.token_budget, max_running=settings.max_running)
    admission = Admission(settings.max_running, limits.max_waiting, limits.max_waiting_tokens)
    return Engine(
        scheduler,
        runner,
        admission,
        speculator=speculator,
        step_timeout=settings.step_timeout,
        on_step=metrics.record_step,
        on_fault=on_fault,
    )


def make_pools(cache: KVCache, settings: ModelSettings) -> list[BlockPool]:
    """The books of a cache's blocks, by group."""
    return [
        BlockPool(blocks, cache.block_size, window=group.window, prefix_cache=settings.prefix_cache)
        for group, blocks in zip(cache.groups, cache.num_blocks, strict=True)
    ]


def make_speculator(
    settings: ModelSettings,
    tokenizer: Tokenizer,
    ops: Ops,
    max_model_len: int,
    console: Console,
    phases: Phases,
) -> Speculator:
    """What guesses ahead, as asked for."""
    if settings.draft_model is not None:
        with phases.measure("load the draft model"):
            path = locate(settings.draft_model, None, settings.cache_folder, console.print)
            return Speculator(load_draft(path, settings, tokenizer, ops, max_model_len))
    wanted = settings.speculate == "prompt-lookup"
    if settings.speculate == "auto":
        wanted = ops.exact_rows
    return Speculator(PromptLookup(settings.speculative_tokens) if wanted else None)


def load_draft(
    path: Path, settings: ModelSettings, tokenizer: Tokenizer, ops: Ops, max_model_len: int
) -> DraftModel:
    """A second model beside the one that is served (ModelError, also if it does not know the same tokens)."""
    checkpoint = open_checkpoint(path)
    check_vocabulary(path, read_tokenizer(path, checkpoint), tokenizer)
    ops = companion(ops, checkpoint.config)
    length = min(max_model_len, checkpoint.config.max_position_embeddings)
    model = loader.load_model(checkpoint, ops, length)
    rows, running = settings.token_budget, settings.max_running
    wanted = loader.CacheSize(tokens=settings.kv_cache_tokens or max(2 * length, 1024 * running))
    blocks, line = loader.size_cache(model, wanted, length, running, rows)
    logger.info("draft model: %s", line)
    runner = loader.make_runner(model, blocks, rows, running)
    return DraftModel(
        runner,
        BlockTables(make_pools(runner.graph.cache, settings), most_rows=rows),
        most=settings.speculative_tokens,
        rows=rows,
        max_length=loader.longest_sequence(model, blocks, length, rows),
        vocab_size=tokenizer.vocab_size,
    )


def check_vocabulary(path: Path, draft: Tokenizer, served: Tokenizer) -> None:
    """Refuse a draft model whose tokens have other meanings than the served model's (ModelError)."""
    if draft.vocab_size != served.vocab_size:
        differs = f"has {draft.vocab_size} tokens, and the served model {served.vocab_size}"
    else:
        tokens = range(served.vocab_size)
        other = (i for i in tokens if draft.token_bytes(i) != served.token_bytes(i))
        if (first := next(other, None)) is None:
            return
        differs = f"has another token {first} ({draft.token_bytes(first)!r}) than the served model "
        differs += f"({served.token_bytes(first)!r})"
    raise ModelError(
        f"--draft-model {path}: it {differs}; a draft model has the vocabulary of the served one"
    )


def read_tokenizer(path: Path, checkpoint: Checkpoint, named: Path | None = None) -> Tokenizer:
    """The tokenizer that is `named`, else the checkpoint's; it must not know more tokens than the model.

    Either is in the model's own file, or in the folder of that file.
    """
    if named is not None:
        tokenizer = Tokenizer.from_folder(tokenizer_folder(named), checkpoint.config.eos_token_ids)
    elif isinstance(checkpoint.files, GgufFiles):
        tokenizer = Tokenizer.from_gguf(checkpoint.files.metadata)
    else:
        tokenizer = Tokenizer.from_folder(path if path.is_dir() else path.parent)
    vocab_size = checkpoint.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model {vocab_size}; "
            "the two do not belong together"
        )
    return tokenizer


def tokenizer_folder(named: Path) -> Path:
    """The folder of `--tokenizer` (ModelError)."""
    if named.is_dir():
        return named
    if named.name == "tokenizer.json" and named.is_file():
        return named.parent
    raise ModelError(f"--tokenizer {named}: is no folder that has a tokenizer.json, and no such file")


def read_template(tokenizer: Tokenizer, path: Path, renderer: Renderer) -> ChatTemplate | None:
    """The model's chat template, if it has one."""
    if tokenizer.chat_template is None:
        return None
    try:
        return ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, renderer)
    except TemplateError as error:
        raise ModelError(f"{path}: {error}") from None


def check_length(asked: int | None, config: ModelConfig) -> int:
    """Most tokens of a request: the model's limit, or less if asked for."""
    limit = config.max_position_embeddings
    if asked is not None and asked > limit:
        raise ModelError(f"--max-model-len {asked} is beyond the model's own limit of {limit} tokens")
    return asked or limit


@contextmanager
def weight_progress(console: Console, phases: Phases) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of weights, gone when it is done; /ready tells the same."""
    columns = (TextColumn("loading weights"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("weights", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            phases.fraction = done / total

        yield show
