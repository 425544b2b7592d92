"""From settings to a Service: find the model, load it, size the cache; each phase timed and shown."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from model import loader
from model.backend import Wishes, choose_backend
from model.config import ModelConfig
from model.errors import ModelError
from model.runner import Runner
from model.source import locate, served_name
from model.weights import open_checkpoint
from model.weights.checkpoint import Checkpoint
from model.weights.gguf import GgufCheckpoint
from server.config import ModelSettings
from server.engine.admission import Admission
from server.engine.block_pool import BlockPool
from server.engine.engine import Engine, Fault
from server.engine.scheduler import Scheduler
from server.metrics import Metrics
from server.phases import Phases
from server.service import Limits, ModelInfo, Service
from server.text.chat_template import ChatTemplate, TemplateError
from server.text.grammar import GrammarCompiler
from server.text.renderer import Renderer
from server.text.tokenizer import Tokenizer

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


def load(
    settings: ModelSettings,
    console: Console,
    phases: Phases,
    limits: Limits,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
    on_fault: OnFault = lambda fault, reason: None,
) -> Loaded:
    """Everything but the HTTP side (ModelError with one sentence if the model cannot be served)."""
    renderer = Renderer()  # its process starts meanwhile
    with phases.measure("find the model"):
        path = locate(settings.model, settings.revision, settings.cache_folder, console.print)
    with phases.measure("read its files"):
        checkpoint = open_checkpoint(path)
        tokenizer = read_tokenizer(path, checkpoint)
        template = read_template(tokenizer, path, renderer)
    config = checkpoint.config
    max_model_len = check_length(settings.max_model_len, config)
    wishes = Wishes(settings.device, settings.dtype, settings.kernels, settings.quantize, settings.threads)
    backend = choose_backend(wishes, config)
    ops = backend.ops
    with phases.measure("load the weights"), weight_progress(console, phases) as progress:
        model = loader.load_model(checkpoint, ops, max_model_len, progress)
    with phases.measure("make the KV cache"):
        wanted = loader.CacheSize(settings.kv_cache_tokens, settings.kv_cache_memory)
        blocks, line = loader.size_cache(model, wanted, max_model_len, settings.max_running)
        runner = loader.make_runner(model, blocks, settings.token_budget, settings.max_running)
    cache_tokens = blocks * runner.graph.cache.block_size
    if cache_tokens < max_model_len:
        line += f"; requests are limited to {cache_tokens:,} tokens instead of the model's {max_model_len:,}"
        max_model_len = cache_tokens
    info = ModelInfo(
        name=name or served_name(settings.model),
        dtype=str(ops.dtype).removeprefix("torch."),
        device=ops.device.type,
        kernels=ops.name,
        max_model_len=max_model_len,
        cache_tokens=cache_tokens,
        max_running=settings.max_running,
        max_waiting=limits.max_waiting,
        loaded_at=int(time.time()),
        aliases=aliases,
    )
    about = {
        "version": version("rivulet"),
        "model": info.name,
        "kernels": info.kernels,
        "device": info.device,
    }
    metrics = Metrics(max_model_len, settings.max_running, about)
    engine = make_engine(runner, settings, limits, metrics, on_fault)
    grammars = GrammarCompiler(tokenizer)
    service = Service(info, engine, tokenizer, template, metrics, grammars, limits)
    return Loaded(service, backend.description, line, backend.note)


def make_engine(
    runner: Runner, settings: ModelSettings, limits: Limits, metrics: Metrics, on_fault: OnFault
) -> Engine:
    """Scheduler and engine over a runner's cache."""
    cache = runner.graph.cache
    pool = BlockPool(cache.num_blocks, cache.block_size, prefix_cache=settings.prefix_cache)
    scheduler = Scheduler(pool, token_budget=settings.token_budget, max_running=settings.max_running)
    admission = Admission(settings.max_running, limits.max_waiting, limits.max_waiting_tokens)
    return Engine(
        scheduler,
        runner,
        admission,
        step_timeout=settings.step_timeout,
        on_step=metrics.record_step,
        on_fault=on_fault,
    )


def read_tokenizer(path: Path, checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that comes with a checkpoint; it must not know more tokens than the model."""
    if isinstance(checkpoint, GgufCheckpoint):
        tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
    else:
        tokenizer = Tokenizer.from_folder(path)
    vocab_size = checkpoint.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model {vocab_size}; "
            "the two do not belong together"
        )
    return tokenizer


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
