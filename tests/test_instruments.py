"""Our counters and histograms against prometheus_client's own: the same observations give the same lines."""

import itertools
import threading

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.instruments import Counter, Histogram, render_gauge

BOUNDS = (0.001, 0.25, 1, 64, 1e7)
VALUES = (0, 0.0005, 0.001, 0.0010001, 0.25, 0.9, 1.0, 63, 64, 65, 1e7, 1e9)


def text_of(collector: prometheus_client.metrics.MetricWrapperBase | Counter | Histogram) -> list[str]:
    """Its lines, without the times of creation that only prometheus_client tells."""
    registry = CollectorRegistry()
    registry.register(collector)
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def meaning(text: str) -> list[tuple[object, ...]]:
    """What a reader gets of a text, however numbers and labels are written."""
    return [
        (
            family.name,
            family.type,
            family.documentation,
            sorted((s.name, sorted(s.labels.items()), s.value) for s in family.samples),
        )
        for family in text_string_to_metric_families(text)
    ]


@pytest.mark.parametrize("label", ["", "kind"])
def test_a_histogram_counts_as_theirs_does(label: str) -> None:
    ours = Histogram("size", "How large", BOUNDS, label)
    theirs = prometheus_client.Histogram(
        "size", "How large", [label] if label else [], buckets=BOUNDS, registry=None
    )
    for value in ("a", "b") if label else ("",):
        series = ours.series(value)
        child = theirs.labels(value) if label else theirs
        for size in VALUES:
            series.observe(size)
            child.observe(size)
        assert series.count == len(VALUES)
        assert series.total == sum(VALUES)
    assert text_of(ours) == text_of(theirs)


@pytest.mark.parametrize("label", ["", "kind"])
def test_a_counter_counts_as_theirs_does(label: str) -> None:
    ours = Counter("calls", "How many", label, ("a", "b"))
    theirs = prometheus_client.Counter("calls", "How many", [label] if label else [], registry=None)
    for value, times in (("a", 3), ("b", 0)) if label else (("", 3),):
        child = theirs.labels(value) if label else theirs
        for _ in range(times):
            ours.count(value)
            child.inc()
    assert text_of(ours) == text_of(theirs)


@pytest.mark.parametrize("label", ["", "kind"])
def test_both_ways_to_read_give_the_same(label: str) -> None:
    """But for the ending of a counter's name."""
    histogram = Histogram("size", "How large", BOUNDS, label)
    counter = Counter("calls", "How many", label, ("a", "b"))
    for value in ("a", "b") if label else ("",):
        series = histogram.series(value)
        for size in VALUES:
            series.observe(size)
        counter.count(value)
    assert meaning(histogram.render()) == meaning("\n".join(text_of(histogram)))
    assert counter.render().splitlines() == [line.replace("_total", "") for line in text_of(counter)]
    theirs = prometheus_client.Gauge("now", "At this time", registry=None)
    theirs.set(2.5)
    assert render_gauge("now", "At this time", 2.5).splitlines() == text_of(theirs)


def test_a_value_that_is_not_declared_is_our_fault() -> None:
    counter = Counter("calls", "How many", "kind", ("a",))
    with pytest.raises(AssertionError, match="calls: b is not declared"):
        counter.count("b")
    free = Counter("calls", "How many", "kind")
    free.count("b")
    assert free.render().endswith('calls{kind="b"} 1.0\n')


def test_no_count_of_any_thread_is_lost() -> None:
    counter = Counter("calls", "How many")
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in itertools.repeat(None, 5000):
            counter.count()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.render().endswith("calls 20000.0\n")
