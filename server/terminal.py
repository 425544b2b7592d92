"""One answer to the terminal, through the same engine as the server's."""

import sys
import time

from rich.console import Console

from model.batch import SamplingParams
from server.config import GenerateSettings
from server.errors import VALIDATION, RequestError
from server.generation import Prompt
from server.service import Service


async def answer(service: Service, settings: GenerateSettings, console: Console) -> int:
    """Stream the answer to standard output and its speed to standard error; gives the exit status."""
    service.engine.start()
    try:
        if settings.raw or service.chat_template is None:
            token_ids = await service.encode(settings.text)
        else:
            token_ids = await service.encode_chat([{"role": "user", "content": settings.text}])
        if not token_ids:
            raise RequestError(VALIDATION, "the prompt has no tokens")
        limit = service.model.max_model_len
        room = limit - len(token_ids)
        if room < 1:
            raise RequestError(VALIDATION, f"the prompt has {len(token_ids)} tokens, the model takes {limit}")
        params = SamplingParams(temperature=settings.temperature, seed=settings.seed)
        started = time.perf_counter()
        first = None
        generation = service.generate([Prompt(token_ids, params, min(settings.max_tokens, room))])
        async for output in generation:
            first = first or time.perf_counter()
            sys.stdout.write(output.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        ended = time.perf_counter()
        count = generation.output_tokens
        speed = (count - 1) / (ended - first) if first and count > 1 else 0.0
        console.print(
            f"{len(token_ids)} tokens in, {count} out; first after {(first or ended) - started:.2f} s, "
            f"then {speed:.0f} tokens/s",
            style="dim",
            highlight=False,
        )
    except RequestError as error:
        print(f"rivulet: {error.message}", file=sys.stderr)
        return 1
    finally:
        await service.engine.stop()
    return 0
