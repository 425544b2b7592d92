"""`rivulet bench`: one load against one address; a table, a plot on request, and JSON as the last line."""

import asyncio
import json
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.bench_http import Address, Broken, Unreachable
from server.bench_load import Answer, BenchError, Dialect, Load, calibrate, find_dialect, read, run
from server.bench_report import plot, summarize, table
from server.config import BenchSettings


async def measure(settings: BenchSettings, console: Console, screen: Console) -> int:
    """Measure and print on `console`, progress and errors on `screen`; gives the exit status."""
    try:
        dialect, answers, cpu = await _load(settings, screen)
        figures = summarize(answers)
        load = f"{settings.clients} x ({settings.prompt_tokens} in, {settings.output_tokens} out)"
        title = f"{settings.url} ({dialect.name}): {load}, {len(answers)} requests"
        if settings.plot is not None:
            settings.plot.write_text(plot(title, answers))
    except BenchError as error:
        print(f"rivulet bench: {error}", file=screen.file)
        return 1
    except OSError as error:
        print(f"rivulet bench: cannot write {settings.plot}: {error.strerror}", file=screen.file)
        return 1
    console.print(table(title, figures))
    missing = settings.output_tokens * len(answers) - figures["output_tokens"]
    if missing > 0:
        console.print(f"answers were short of {missing} tokens: the server does not ignore the end of text")
    result = {
        "arguments": settings.model_dump(mode="json"),
        "api": dialect.name,
        "model": dialect.model,
        **figures,
        "client_cpu_us_per_token": round(cpu / figures["output_tokens"] * 1e6, 1),
    }
    print(json.dumps(result), file=console.file)
    return 0


async def _load(settings: BenchSettings, screen: Console) -> tuple[Dialect, list[Answer], float]:
    """The dialect found, the answers and the client's seconds of CPU while streams ran (BenchError)."""
    requests = settings.requests or max(8, 2 * settings.clients)
    load = Load(settings.clients, requests, settings.prompt_tokens, settings.output_tokens)
    done = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # The display is redrawn twice a second: it shares the processor with the server that is measured.
    bar = Progress(
        *columns, console=screen, transient=True, disable=not screen.is_terminal, refresh_per_second=2
    )
    try:
        address = Address.parse(settings.url)
        async with asyncio.timeout(settings.timeout):
            with bar:
                task = bar.add_task("warm up", total=None)
                dialect = await find_dialect(address, settings.api, settings.model)
                prompts = await calibrate(address, dialect, settings.prompt_tokens)
                if settings.warmup:
                    warmup = Load(load.clients, settings.warmup, load.prompt_tokens, load.output_tokens)
                    await run(address, dialect, warmup, prompts, lambda answered: None)

                def progress(answered: int) -> None:
                    nonlocal done
                    done = answered
                    bar.update(task, completed=answered)

                bar.update(task, description="measure", total=requests)
                spent = time.process_time()
                streams = await run(address, dialect, load, prompts, progress)
                spent = time.process_time() - spent
                return dialect, [read(dialect, stream) for stream in streams], spent
    except TimeoutError:
        raise BenchError(
            f"{done} of {requests} requests were answered within --timeout {settings.timeout:g} seconds"
        ) from None
    except Unreachable:
        raise BenchError(f"no server answers at {settings.url}") from None
    except Broken as error:
        raise BenchError(f"the connection to {settings.url} failed: {error}") from None
