"""How the bench judges what it measured, and how it tells it."""

import dataclasses
import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from bench import curves, plan, report, rows
from bench.acquire import Acquire
from bench.big_answer import BigAnswer
from bench.first_chunk import FirstChunk
from bench.log_memory import LogMemory
from bench.per_job import PerJob
from bench.plan import Results
from bench.rows import Row
from bench.steady import Case, Steady


def steady(case: str, streams: int, **changes: Any) -> Steady:
    values: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(Steady)}
    defaults = {"chunks": 1000, "events": 1000, "delivered": 1.0, "cpu_us": 600.0, "p50_us": 500, "p99_us": 4000}
    return Steady(**values | defaults | {"case": case, "streams": streams} | changes)


def results(*runs: Steady) -> Results:
    return Results(steady={run.case: run for run in runs}, rounds=1)


def row(found: Results, what: str) -> Row:
    [one] = [row for row in rows.table(found) if row.what.startswith(what)]
    return one


NAIVE = steady("naive 25", 25, cpu_us=600.0)


@pytest.mark.parametrize(("cpu_us", "met"), [(40.0, True), (40.1, False)])
def test_a_ratio_is_met_at_its_bound_and_missed_beyond(cpu_us: float, met: bool) -> None:
    """1/15 of the baseline at 25 streams is what 200 streams may cost."""
    found = row(results(NAIVE, steady("product 200", 200, cpu_us=cpu_us)), "worker CPU per chunk, 200")

    assert found.met is met


def test_without_the_baseline_there_is_no_verdict() -> None:
    """A ratio needs both of its sides from the same run."""
    assert row(results(steady("product 200", 200)), "worker CPU per chunk, 200").met is None


@pytest.mark.parametrize(
    ("p99_us_at_500", "delivered_at_500", "held", "met"),
    [(4000, 1.0, "700", True), (50_000, 1.0, "200", False), (4000, 0.97, "200", False)],
)
def test_a_count_is_held_only_with_every_smaller_one(
    p99_us_at_500: int, delivered_at_500: float, held: str, met: bool
) -> None:
    """A lucky large run does not outweigh a smaller one that was late or incomplete."""
    found = results(
        steady("product 200", 200),
        steady("product 500", 500, p99_us=p99_us_at_500, delivered=delivered_at_500),
        steady("product 700", 700),
        steady("product 1000", 1000, p99_us=900_000),
    )

    [plain, _] = [row for row in rows.table(found) if row.what.startswith("streams on one core")]
    assert (plain.product, plain.met) == (held, met)


def test_a_run_that_tried_too_few_streams_has_missed_nothing() -> None:
    """The quick run measures up to 200: no verdict on 700."""
    [plain, tls] = [
        row for row in rows.table(results(steady("product 200", 200))) if row.what.startswith("streams on one core")
    ]

    assert (plain.product, plain.met) == ("200 (all that was tried)", None)
    assert tls.met is None


def test_where_tls_cannot_be_built_its_row_says_what_it_needs() -> None:
    """No headers, no figure, and no silence."""
    found = Results(failures={"product 500 TLS": "cc could not build the stub; it needs OpenSSL 3's headers"})
    [_, tls] = [row for row in rows.table(found) if row.what.startswith("streams on one core")]

    assert "OpenSSL" in tls.verdict
    assert tls.met is None


@pytest.mark.parametrize("wrong", ["gaps", "duplicates", "odd", "unended"])
def test_a_single_gap_in_any_run_is_a_miss(wrong: str) -> None:
    """Fast and wrong is wrong; medians must not hide one bad round."""
    good, bad = steady("product 50", 50), steady("product 50", 50, **{wrong: 1})
    merged = plan.median([good, bad, good])

    assert getattr(merged, wrong) == 1
    assert row(results(merged), "gaps").met is False
    assert row(results(good), "gaps").met is True


def test_figures_are_medians_over_the_rounds() -> None:
    """One disturbed round does not move a figure."""
    merged = plan.median([steady("product 50", 50, cpu_us=us) for us in (30.0, 31.0, 400.0)])

    assert merged.cpu_us == 31.0


def test_the_request_itself_is_taken_off_a_jobs_cost() -> None:
    """What surrounds the request is what is judged; round trips are judged as they are."""
    found = Results(
        per_job={
            "product": PerJob("product", 2000, 2.5, 3.0, 4.5, 9.0),
            "floor": PerJob("floor", 2000, 1.1, 1.3, 0.0, 0.0),
        }
    )

    assert row(found, "CPU per job").met is True
    assert row(found, "round trips").met is False


def test_memory_after_the_end_may_be_the_text_and_eight_bytes_an_event() -> None:
    """Text + 8 B per event + 1 KB per job, and not repacked is said aloud."""
    log = LogMemory(1, 1002, 1002, 1000, 30_000, 4000 + 8 * 1002 + 1024, 1, repacked=True)
    fat = dataclasses.replace(log, after_bytes=log.after_bytes + 1, repacked=False)

    assert row(Results(log_memory=log), "log memory kept").met is True
    assert row(Results(log_memory=fat), "log memory kept").met is False
    assert "not repacked" in row(Results(log_memory=fat), "log memory kept").product


def full() -> Results:
    found = results(NAIVE, steady("naive 10", 10), steady("product 200 FLUSH_MS=0", 200, p50_us=2000))
    found.steady |= {f"product {n}": steady(f"product {n}", n, cpu_us=8000 / n) for n in plan.PRODUCT}
    found.first_chunk = {"product": FirstChunk("product", 30, 5.0, 9.0, 0.1)}
    found.per_job = {"product": PerJob("product", 2000, 1.0, 1.0, 1.0, 9.0)}
    found.big_answer = BigAnswer(100, 9.0, 80_000, 9 * 1024, [80_000])
    found.failures = {"floor 200": "no reason\nat all"}
    return found


def test_the_report_tells_every_row_case_and_failure() -> None:
    """What was measured, judged or missed is in the page."""
    found = full()
    page = report.markdown(found)

    for each in rows.table(found):
        assert " | ".join(report.cells(each)) in page
    for label in found.steady:
        assert f"| {label} | " in page
    assert "- floor 200: no reason\n" in page
    assert "worker memory over an answer of 100 MB | - | +9.0 MB in 9 s | flat within 8 MB | NO" in page


def test_a_missed_budget_says_where_to_look() -> None:
    """A machine busy with others, by case; how to find where the time goes. Nothing of it when all is met."""
    missed = results(NAIVE, steady("product 200", 200, cpu_us=500.0, foreign_load=0.4))
    assert "product 200 (40%)" in report.terminal(missed)
    assert "perf record" in report.terminal(missed)
    met = results(NAIVE, steady("product 200", 200, cpu_us=10.0, foreign_load=0.4))
    assert "perf record" not in report.terminal(met)


def test_results_are_json() -> None:
    """Whoever wants to plot more can."""
    read = json.loads(report.as_json(full()))

    assert read["steady"]["product 500"]["streams"] == 500
    assert {row["met"] for row in read["rows"]} == {True, False, None}


def test_the_curves_hold_plain_cases_only_and_are_well_formed() -> None:
    """A variant with other settings is another curve's business."""
    drawn = report.draw(full())

    assert set(drawn) == {"benchmarks-cpu.svg", "benchmarks-latency.svg"}
    for text in drawn.values():
        root = ET.fromstring(text)
        lines = root.findall("{*}polyline")
        assert [len(line.attrib["points"].split()) for line in lines] == [2, 6]
        for circle in root.findall("{*}circle"):
            assert 0 <= float(circle.attrib["cx"]) <= 640
            assert 0 <= float(circle.attrib["cy"]) <= 360


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(10, 1000, [10, 20, 50, 100, 200, 500, 1000]), (3, 4, [2, 5]), (7, 7, [5, 10]), (0.23, 0.9, [0.2, 0.5, 1])],
)
def test_an_axis_spans_its_values_in_round_steps(low: float, high: float, expected: list[float]) -> None:
    """1, 2, 5, 10 ...: no point falls off the chart."""
    assert curves.ticks(low, high) == pytest.approx(expected)


def test_a_label_names_what_differs_from_the_default() -> None:
    """Two cases that measure different things never share a median."""
    assert Case("product", 200, tls=True, settings={"MILLSTREAM_FLUSH_MS": "5"}).label == "product 200 TLS FLUSH_MS=5"
    assert len({case.label for case in plan.FULL}) == len(plan.FULL)


@pytest.mark.parametrize(("valkey_us", "met"), [(150.0, True), (150.1, False)])
def test_an_acquire_is_judged_by_both_sides_together(valkey_us: float, met: bool) -> None:
    """What the client spends counts as much as what the server does."""
    found = row(Results(acquire=Acquire(1000, 4000, 100.0, valkey_us)), "one acquire")

    assert found.met is met
    assert "100 client" in found.product
