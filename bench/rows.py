"""The table of budgets: what was measured, set against what it may cost. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import AT_ONCE, NAIVE, PRODUCT, WINDOW, Results
from .steady import Case, Steady

HELD_P99_MS = 50
"""A stream count is held while p99 added latency stays under this ..."""
HELD_DELIVERED = 0.98
"""... and so much of the load arrives in time."""


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where there is no budget or no measurement to judge."""

    what: str
    naive: str
    product: str
    verdict: str
    met: bool | None


def table(results: Results) -> list[Row]:
    """The rows of budgets.md in its order, then the floor and the checks; rows without any measurement say so."""
    return [
        *(_cpu(results, streams, share) for streams, share in ((50, 8), (200, 15), (500, 20))),
        _streams(results, tls=False, budget=700),
        _streams(results, tls=True, budget=500),
        _latency(results, "added latency, 200 streams, p50 / p99", Case("product", 200), 5, 15),
        _latency(results, "the same, every chunk at once", Case("product", 200, settings=AT_ONCE), 1, 10),
        _latency(results, "the same, window of 5 ms", Case("product", 200, settings=WINDOW), 5, 15),
        _first_chunk(results),
        _memory(results),
        *_per_job(results),
        _big_answer(results),
        _valkey(results),
        *_log(results),
        _acquire(results),
        _floor(results),
        _jobs_per_second(results),
        _sound(results),
    ]


def _missing(what: str, budget: str) -> Row:
    return Row(what, "-", "not measured", budget, None)


def _naive(results: Results) -> Steady | None:
    """The baseline at 25 streams, by which every ratio divides: more overload its core."""
    return results.steady.get(Case("naive", NAIVE[-1]).label)


def _product(results: Results, streams: int) -> Steady | None:
    return results.steady.get(Case("product", streams).label)


def _cpu(results: Results, streams: int, share: int) -> Row:
    what, naive, product = f"worker CPU per chunk, {streams} streams", _naive(results), _product(results, streams)
    if not naive or not product:
        return _missing(what, f"at most 1/{share}")
    ratio = naive.cpu_us / product.cpu_us
    verdict = f"1/{ratio:.1f} (at most 1/{share})"
    return Row(what, f"{naive.cpu_us:.0f} us", f"{product.cpu_us:.1f} us", verdict, ratio >= share)


def holds(run: Steady) -> bool:
    return run.p99_us < HELD_P99_MS * 1000 and run.delivered >= HELD_DELIVERED


def _most_held(results: Results, cases: list[Case]) -> int:
    """The largest measured count that holds together with every smaller one; 0 if none does."""
    most = 0
    measured = [run for case in cases if (run := results.steady.get(case.label))]
    for run in sorted(measured, key=lambda run: run.streams):
        if not holds(run):
            break
        most = run.streams
    return most


def _streams(results: Results, *, tls: bool, budget: int) -> Row:
    what = f"streams on one core, p99 under {HELD_P99_MS} ms{', TLS' if tls else ''}"
    cases = [Case("product", streams, tls=tls) for streams in PRODUCT]
    if not any(case.label in results.steady for case in cases):
        if tls and (why := next((why for label, why in results.failures.items() if "TLS" in label), None)):
            return Row(what, "-", "not measured", why.splitlines()[0], None)
        return _missing(what, f"at least {budget}")
    held = _most_held(results, cases)
    tried = [results.steady[case.label].streams for case in cases if case.label in results.steady]
    naive = "-" if tls else _naive_held(results)
    # A run that never tried so many (the quick one) has not missed the budget.
    met = True if held >= budget else None if held == max(tried) else False
    found = f"{held}{' (all that was tried)' if held == max(tried) else ''}" if held else f"fewer than {min(tried)}"
    return Row(what, naive, found, f"at least {budget}", met)


def _naive_held(results: Results) -> str:
    cases = [Case("naive", streams) for streams in NAIVE]
    tried = [results.steady[case.label].streams for case in cases if case.label in results.steady]
    if not tried:
        return "-"
    return str(_most_held(results, cases) or f"fewer than {min(tried)}")


def _latency(results: Results, what: str, case: Case, p50_ms: float, p99_ms: float) -> Row:
    naive, product = _naive(results), results.steady.get(case.label)
    budget = f"at most {p50_ms:g} / {p99_ms:g} ms"
    if not product:
        return _missing(what, budget)
    met = product.p50_us <= p50_ms * 1000 and product.p99_us <= p99_ms * 1000
    beside = f"{_ms(naive.p50_us)} / {_ms(naive.p99_us)} ms at {naive.streams}" if naive else "-"
    return Row(what, beside, f"{_ms(product.p50_us)} / {_ms(product.p99_us)} ms", budget, met)


def _ms(us: float) -> str:
    return f"{us / 1000:.3g}"


def _first_chunk(results: Results) -> Row:
    what, budget = "enqueue to first chunk, idle system, median", 15
    naive, product = results.first_chunk.get("naive"), results.first_chunk.get("product")
    if not product:
        return _missing(what, f"at most {budget} ms")
    beside = f"{naive.median_ms:.0f} ms" if naive else "-"
    return Row(what, beside, f"{product.median_ms:.1f} ms", f"at most {budget} ms", product.median_ms <= budget)


def _memory(results: Results) -> Row:
    what, budget = "memory per live stream (PSS)", 100
    naive = _naive(results)
    product = _product(results, 500) or _product(results, 200)
    if not product:
        return _missing(what, f"at most {budget} KB")
    beside = f"{naive.pss_kb_per_stream / 1024:.0f} MB" if naive else "-"
    found = f"{product.pss_kb_per_stream:.0f} KB at {product.streams}"
    return Row(what, beside, found, f"at most {budget} KB", product.pss_kb_per_stream <= budget)


def _per_job(results: Results) -> list[Row]:
    cpu, trips = "CPU per job beside its request", "round trips to Redis per job"
    naive, product, floor = (results.per_job.get(name) for name in ("naive", "product", "floor"))
    if not product:
        return [_missing(cpu, "at most 1.5 ms"), _missing(trips, "at most 4")]
    bare = floor.cpu_ms if floor else 0.0
    rest = product.cpu_ms - bare
    found = f"{rest:.2f} ms ({product.cpu_ms:.2f} less {bare:.2f} for the request)"
    return [
        Row(cpu, f"{naive.cpu_ms:.1f} ms" if naive else "-", found, "at most 1.5 ms", rest <= 1.5),
        Row(trips, f"{naive.reads:.0f}" if naive else "-", f"{product.reads:.1f}", "at most 4", product.reads <= 4),
    ]


def _big_answer(results: Results) -> Row:
    what, budget_mb, found = "worker memory over an answer of 100 MB", 8, results.big_answer
    if not found:
        return _missing(what, f"flat within {budget_mb} MB")
    grown = found.growth_kb / 1024
    return Row(
        what, "-", f"{grown:+.1f} MB in {found.seconds:.0f} s", f"flat within {budget_mb} MB", grown <= budget_mb
    )


def _valkey(results: Results) -> Row:
    what, budget, naive, product = "Valkey CPU per chunk, 500 streams", 5, _naive(results), _product(results, 500)
    if not product:
        return _missing(what, f"at most {budget} us")
    beside = f"{naive.valkey_us:.0f} us at {naive.streams}" if naive else "-"
    return Row(what, beside, f"{product.valkey_us:.1f} us", f"at most {budget} us", product.valkey_us <= budget)


def _log(results: Results) -> list[Row]:
    live, after, found = "log memory per event, live", "log memory kept after the end", results.log_memory
    if not found:
        return [_missing(live, "at most 48 B"), _missing(after, "text + 8 B per event + 1 KB")]
    packed = f"{found.live_per_event:.1f} B at {found.events / max(found.packs, 1):.1f} events a pack"
    kept = f"{found.after_bytes / found.jobs:,.0f} B a job{'' if found.repacked else ', not repacked within 30 s'}"
    allowed = f"at most {found.allowed_after / found.jobs:,.0f} B: text + 8 B per event + 1 KB"
    return [
        Row(live, "-", packed, "at most 48 B", found.live_per_event <= 48),
        Row(after, "-", kept, allowed, found.after_bytes <= found.allowed_after),
    ]


def _acquire(results: Results) -> Row:
    what, budget, found = "one acquire of the limiter at 1,000 waiting jobs, CPU", 250, results.acquire
    if not found:
        return _missing(what, f"at most {budget} us")
    text = f"{found.both_us:.0f} us: {found.client_us:.0f} client, {found.valkey_us:.0f} Valkey"
    return Row(what, "-", text, f"at most {budget} us", found.both_us <= budget)


def _floor(results: Results) -> Row:
    found = [run for run in results.steady.values() if run.case.startswith("floor")]
    text = ", ".join(f"{run.cpu_us:.1f} us at {run.streams}" for run in found)
    return Row("floor: the same read by a bare loop, no Redis", "-", text or "not measured", "no budget", None)


def _jobs_per_second(results: Results) -> Row:
    naive, product = results.per_job.get("naive"), results.per_job.get("product")
    beside = f"{naive.jobs_per_second:.0f} (doing nothing)" if naive else "-"
    found = f"{product.jobs_per_second:,.0f}" if product else "not measured"
    return Row("jobs of one chunk per second, one process", beside, found, "no budget", None)


def _sound(results: Results) -> Row:
    """Gaps need no log here: a live consumer that keeps up sees every seq, or the product has lost one."""
    runs = [run for run in results.steady.values() if run.case.startswith("product")]
    if not runs:
        return _missing("gaps, duplicates, altered texts, unended streams", "none")
    counts = [sum(getattr(run, name) for run in runs) for name in ("gaps", "duplicates", "odd", "unended")]
    text = " / ".join(str(count) for count in counts)
    return Row("gaps / duplicates / altered texts / unended streams", "-", text, "none", not any(counts))
