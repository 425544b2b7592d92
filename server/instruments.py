"""Counters and histograms that cost a token or a step next to nothing, to be read in two ways.

`collect` is for a registry of prometheus_client. `render` gives the same as text, at a twentieth of that
cost and under exactly the given name: prometheus_client would add `_total`, which TGI's counters lack.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class Counter:
    """Counts, by the values of a label if it has one; any thread may count.

    The values that are given are there from the start, at zero, and no others come; without them any may.
    """

    def __init__(self, name: str, text: str, label: str = "", values: Iterable[str] = ()) -> None:
        self._name = name
        self._text = text
        self._label = label
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(values if label else ("",), 0)
        self._closed = bool(self._counts)

    def count(self, value: str = "", by: int = 1) -> None:
        """So many more; `value` is the label's."""
        with self._lock:
            assert value in self._counts or not self._closed, f"{self._name}: {value} is not declared"
            self._counts[value] = self._counts.get(value, 0) + by

    def collect(self) -> Iterator[CounterMetricFamily]:
        """As a family, whose samples end in `_total`."""
        family = CounterMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, count in self._items():
            family.add_metric([value] if self._label else [], count)
        yield family

    def render(self) -> str:
        """As text."""
        lines = [header(self._name, self._text, "counter")]
        for value, count in self._items():
            label = f'{{{self._label}="{value}"}}' if self._label else ""
            lines.append(f"{self._name}{label} {float(count)}\n")
        return "".join(lines)

    def _items(self) -> list[tuple[str, int]]:
        with self._lock:
            return list(self._counts.items())


class Series:
    """Observations by bucket. One thread at a time observes; a reader may be one observation behind."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        """The sum of what was observed."""

    def observe(self, value: float) -> None:
        """Count a value in the first bucket that it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How much was observed."""
        return sum(self._counts)

    @property
    def cumulative(self) -> list[int]:
        """For each bound how many values are not above it, and how many there are."""
        return list(accumulate(self._counts))


class Histogram:
    """A family of series over the same bounds, one for each value of its label, or a single one."""

    def __init__(self, name: str, text: str, bounds: Iterable[float], label: str = "") -> None:
        self._name = name
        self._text = text
        self._label = label
        self._bounds = tuple(bounds)
        self._edges = [*map(floatToGoString, self._bounds), "+Inf"]
        self._series: dict[str, Series] = {}
        self._fronts: dict[str, list[str]] = {}  # of a series' lines, which only end in numbers

    def series(self, value: str = "") -> Series:
        """A new series, for this value of the label."""
        assert value not in self._series and bool(value) == bool(self._label)
        own = f'{self._label}="{value}"' if value else ""
        buckets = [f'{self._name}_bucket{{le="{edge}"{own and "," + own}}} ' for edge in self._edges]
        rest = f"{{{own}}} " if value else " "
        self._fronts[value] = [*buckets, f"{self._name}_count{rest}", f"{self._name}_sum{rest}"]
        self._series[value] = Series(self._bounds)
        return self._series[value]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As a family."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, series in self._series.items():
            buckets = list(zip(self._edges, map(float, series.cumulative), strict=True))
            family.add_metric([value] if value else [], buckets, series.total)
        yield family

    def render(self) -> str:
        """As text."""
        lines = [header(self._name, self._text, "histogram")]
        for value, series in self._series.items():
            counts = series.cumulative
            numbers = (*counts, counts[-1], series.total)
            lines += [
                f"{front}{float(number)}\n"
                for front, number in zip(self._fronts[value], numbers, strict=True)
            ]
        return "".join(lines)


def render_gauge(name: str, text: str, value: float) -> str:
    """One number as text."""
    return f"{header(name, text, 'gauge')}{name} {float(value)}\n"


def header(name: str, text: str, kind: str) -> str:
    """What stands before a family's lines."""
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
