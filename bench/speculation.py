"""Tokens a second with guesses and without, by the same weights in one process, in turn, round after round.

Both engines give the same tokens, which is checked. The texts: one that the prompt has already, greedy and
drawn stories, and words in no order. The last line is JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import loader
from model.backend import Wishes, choose_backend
from model.batch import SamplingParams
from model.source import locate
from model.weights import open_checkpoint
from server.bench_load import COMMON
from server.config import ModelSettings
from server.engine.admission import Admission
from server.engine.block_pool import BlockPool
from server.engine.engine import Engine
from server.engine.prompt_lookup import PromptLookup
from server.engine.records import StepRecord
from server.engine.request import Request
from server.engine.scheduler import Scheduler
from server.engine.speculator import MOST_GUESSES, Speculator
from server.startup import read_tokenizer

TOKENS = {1: 200, 8: 120, 32: 80}
"""By sequences side by side: tokens of each."""
WORDS = COMMON.split()
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def copy(words: list[str]) -> tuple[str, float]:
    """The answer began to repeat its prompt a second time."""
    text = " ".join(words)
    return CHAT.format(f"Repeat this text: {text}") + f"{text}\n\n{text[:40]}", 0.0


def story(words: list[str]) -> tuple[str, float]:
    """Prose, the likeliest: a small model comes to repeat itself."""
    return CHAT.format(f"Write a story about a {words[0]} and a {words[1]}."), 0.0


def drawn(words: list[str]) -> tuple[str, float]:
    """Prose that is drawn."""
    return story(words)[0], 1.0


def noise(words: list[str]) -> tuple[str, float]:
    """Words in no order, and tokens that hardly follow from them."""
    return " ".join(words), 3.0


TEXTS: tuple[Callable[[list[str]], tuple[str, float]], ...] = (copy, story, drawn, noise)
"""Words -> a prompt and the temperature of what follows it."""


class Side:
    """An engine with or without guesses, and what it counted."""

    def __init__(self, model: loader.Transformer, speculator: Speculator) -> None:
        runner = loader.make_runner(model, [1600], 512, 64, MOST_GUESSES)
        pool = BlockPool(1600, runner.graph.cache.block_size, prefix_cache=False)
        scheduler = Scheduler(pool, token_budget=512, max_running=64)
        admission = Admission(64, 64, 1 << 20)
        self.engine = Engine(scheduler, runner, admission, speculator=speculator, on_step=self.count)
        self.proposed = self.accepted = self.runs = 0
        self.speeds: list[float] = []

    def count(self, record: StepRecord) -> None:
        """A step ended."""
        self.proposed += record.proposed
        self.accepted += record.accepted

    async def run(self, jobs: list[tuple[tuple[int, ...], SamplingParams]], tokens: int) -> list[list[int]]:
        """All jobs at once; gives what each said."""
        self.runs += 1

        async def one(index: int, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
            submission = self.engine.submit([Request(f"{self.runs}-{index}", prompt, params, tokens)])
            return [output.token.id async for _, output in submission if output.token is not None]

        began = time.perf_counter()
        said = await asyncio.gather(*(one(index, *job) for index, job in enumerate(jobs)))
        self.speeds.append(sum(map(len, said)) / (time.perf_counter() - began))
        return said


async def measure(settings: ModelSettings, rounds: int, console: Console) -> list[dict[str, object]]:
    """Every text at every width, `rounds` times on each side."""
    path = locate(settings.model, settings.revision, settings.cache_folder, console.print)
    checkpoint = open_checkpoint(path)
    tokenizer = read_tokenizer(path, checkpoint)
    ops = choose_backend(Wishes(threads=settings.threads), checkpoint.config).ops
    model = loader.load_model(checkpoint, ops, min(2048, checkpoint.config.max_position_embeddings))
    sides = [Side(model, Speculator()), Side(model, Speculator(PromptLookup(settings.speculative_tokens)))]
    for side in sides:
        side.engine.start()
    found: list[dict[str, object]] = []
    for text in TEXTS:
        for width, tokens in TOKENS.items():
            jobs = []
            for index in range(width):
                prompt, temperature = text(random.Random(index).choices(WORDS, k=60))
                params = SamplingParams(temperature, seed=index)
                jobs.append((tuple(tokenizer.encode(prompt)), params))
            off, on = sides
            on.proposed = on.accepted = 0
            for turn in range(rounds + 1):
                if turn == 1:  # the first one warms up
                    off.speeds, on.speeds = [], []
                said = [await side.run(jobs, tokens) for side in (sides if turn % 2 else sides[::-1])]
                assert said[0] == said[1], "guesses changed the output"
            ratios = [b / a for a, b in zip(off.speeds, on.speeds, strict=True)]
            case: dict[str, object] = {"text": text.__name__, "sequences": width}
            case |= {"off": statistics.median(off.speeds), "on": statistics.median(on.speeds)}
            case |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            case |= {"best": max(on.speeds) / max(off.speeds)}
            case |= {"proposed": on.proposed, "accepted": on.accepted}
            found.append(case)
            console.print(f"{text.__name__} {width}: {case['ratio']:.2f}")
    for side in sides:
        await side.engine.stop()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=ModelSettings().model)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--speculative-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = vars(parser.parse_args())
    rounds = given.pop("rounds")
    found = asyncio.run(measure(ModelSettings(**given), rounds, Console(stderr=True)))
    table = Table(
        "text", "sequences", "off, tokens/s", "on", "ratio (least to most)", "of the best", "accepted"
    )
    for case in found:
        table.add_row(
            str(case["text"]),
            str(case["sequences"]),
            f"{case['off']:.0f}",
            f"{case['on']:.0f}",
            f"{case['ratio']:.2f} ({case['least']:.2f} to {case['most']:.2f})",
            f"{case['best']:.2f}",
            f"{case['accepted']} of {case['proposed']}",
        )
    Console().print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
