"""What the engine tells of itself: its state after a step, and each step."""

from dataclasses import dataclass, field

from server.engine.scheduler import SchedulerStats


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing, as of the last finished step."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    """Of all cache groups together."""
    promised_tokens: int = 0
    """Tokens that the running requests may come to, prompts and outputs."""
    scheduler: SchedulerStats = field(default_factory=SchedulerStats)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, for the metrics."""

    seconds: float
    """Of the model alone."""
    rows: int
    sequences: int
    prefills: int = 0
    """Sequences of which the step computed prompt tokens."""
    whole_seconds: float = 0.0
    """With the scheduling before it and the bookkeeping after it."""
    update_seconds: float = 0.0
    """The bookkeeping: tokens appended, the finished taken out."""
    failed: bool = False
    shed: int = 0
    """Requests given up for want of memory."""
    proposed: int = 0
    """Tokens that were guessed ahead and computed."""
    accepted: int = 0
    """Those that came true."""
    proposer: str = ""
    """What guessed."""
