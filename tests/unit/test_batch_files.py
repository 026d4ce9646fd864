"""The producer's side of a batch: its input, its output and what it remembers of them; prices, figures, words."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from millstream.batch.answer import Answer
from millstream.batch.row import Reader, Row
from millstream.errors import SpecError
from producer import prices
from producer.batch_input import MAX_LINE, Input, Rows
from producer.batch_ledger import Lines
from producer.batch_output import Output, OutputBusyError
from producer.batch_progress import duration, in_words, summary
from producer.batch_tally import Tally
from tests.unit.producer_typed import standard, written


def line(custom_id: str, content: str = "Hi") -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    return json.dumps({"custom_id": custom_id, "body": body}).encode() + b"\n"


def given(tmp_path: Path, *lines: bytes) -> Input:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(lines))
    return Input(path.open("rb", buffering=0))


def everything(source: Input) -> list[tuple[int, bytes | None]]:
    found = []
    while (each := source.next()) is not None:
        found.append(each)
    assert source.ended
    source.close()
    return found


def test_lines_have_an_editors_numbers(tmp_path: Path) -> None:
    """Empty ones count and are left out; BOM, CRLF and a missing last newline are nothing special."""
    source = given(tmp_path, b"\xef\xbb\xbfone\n", b"\n", b"  \n", b"four\r\n", b"five")
    assert everything(source) == [(1, b"one"), (4, b"four\r"), (5, b"five")]


def test_a_line_that_is_too_long_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    """It has its number, and what follows is read as ever."""
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b"a\n" + b"x" * (MAX_LINE + 300_000) + b"\nb\n")
    assert everything(Input(path.open("rb", buffering=0))) == [(1, b"a"), (2, None), (3, b"b")]


def test_a_pipe_is_never_waited_for() -> None:
    """Half a line is none yet."""
    reading, writing = os.pipe()
    source = Input(os.fdopen(reading, "rb", buffering=0))
    assert source.next() is None
    os.write(writing, b"on")
    assert source.next() is None
    os.write(writing, b"e\ntwo")
    assert source.next() == (1, b"one")
    assert source.next() is None
    assert (source.ended, source.more) == (False, False)
    os.close(writing)
    assert source.next() == (2, b"two")
    assert source.next() is None
    assert source.ended
    source.close()


def rows_of(tmp_path: Path, lines: Lines | None = None, count: int = 100, **options: Any) -> list[str]:
    source = given(tmp_path, *(line(f"r{n}") for n in range(count)))
    rows = Rows(source, Reader("b"), lines or Lines(), **options)
    found = []
    while True:
        taken = rows.take(7)
        found += [str(row.custom_id) for row in taken.rows if isinstance(row, Row)]
        if taken.dry:
            source.close()
            return found


def test_a_limit_takes_the_first_rows_and_a_sample_the_same_ones_each_time(tmp_path: Path) -> None:
    """A sample keeps the order of the input, and is no larger than it."""
    assert rows_of(tmp_path, limit=9) == [f"r{n}" for n in range(9)]
    sample = rows_of(tmp_path, sample=9)
    assert len(set(sample)) == 9
    assert sample == sorted(sample, key=lambda each: int(each[1:]))
    assert sample == rows_of(tmp_path, sample=9) != rows_of(tmp_path, limit=9)
    assert len(rows_of(tmp_path, sample=500)) == 100
    assert set(rows_of(tmp_path, sample=3, limit=5)) <= {f"r{n}" for n in range(5)}


def answer(custom_id: str, status: str = "completed", content: str = "Hi") -> Answer:
    row = Reader("b").read(line(custom_id, content), 1)
    assert isinstance(row, Row)
    return Answer(custom_id=custom_id, job_id=row.job_id, number=1, status=status, completion={"model": "m"})


def begun(tmp_path: Path, *answers: Answer) -> Path:
    """An output with these lines."""
    path = tmp_path / "out.jsonl"
    output, lines = Output(str(path)), Lines()
    output.read(lines, lambda _: None)
    if answers:
        output.write(answers, lines)
    output.close()
    return path


def again(path: Path, **options: Any) -> tuple[Output, Lines, int]:
    output, lines = Output(str(path)), Lines()
    return output, lines, output.read(lines, lambda _: None, **options)


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path, cut: int) -> None:
    """Its row has no line then."""
    path = begun(tmp_path, answer("r0"), answer("r1"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    output, lines, torn = again(path)
    assert torn == len(whole.splitlines(keepends=True)[1]) - cut
    output.close()
    assert path.read_bytes() == whole.splitlines(keepends=True)[0]
    assert rows_of(tmp_path, lines, 2) == ["r1"]


def test_a_row_with_a_line_is_done_unless_it_was_edited(tmp_path: Path) -> None:
    """Failed ones too, unless they are asked again; a row that failed under another turn is recognised."""
    path = begun(tmp_path, answer("r0"), answer("r1", content="before"), answer("r2", "failed"))
    output, lines, _ = again(path)
    output.close()
    assert rows_of(tmp_path, lines, 4) == ["r1", "r3"]
    assert lines.before == {"answered": 1, "failed": 1}
    output, lines, _ = again(path, again=True)
    output.close()
    assert rows_of(tmp_path, lines, 4) == ["r1", "r2", "r3"]


def test_void_lines_are_left_out_at_the_end(tmp_path: Path) -> None:
    """Of each row the last line stays; a refusal goes when its line is not in the input any more."""
    reader = Reader("b")
    gone, there = reader.refusal(b"gone", 5, "c", "m"), reader.refusal(b"there", 6, "c", "m")
    path = begun(tmp_path, answer("r0", content="before"), answer("r1"), gone, there)
    path.chmod(0o640)
    output, lines, _ = again(path)
    rows_of(tmp_path, lines, 2)
    assert lines.met_refused(there)
    output.write([answer("r0")], lines)
    output.tidy(lines, whole=True)
    output.close()
    assert [json.loads(each)["custom_id"] for each in path.read_text().splitlines()] == ["r1", None, "r0"]
    assert path.stat().st_mode & 0o777 == 0o640
    assert not path.with_name("out.jsonl.tidy").exists()


def test_an_output_without_void_lines_is_not_rewritten(tmp_path: Path) -> None:
    """It may be large."""
    path = begun(tmp_path, answer("r0"))
    before = path.stat().st_ino
    output, lines, _ = again(path)
    output.tidy(lines, whole=True)
    output.close()
    assert path.stat().st_ino == before


def test_a_batch_keeps_its_id_and_admits_one_producer(tmp_path: Path) -> None:
    """Both are in the file beside the output."""
    path = tmp_path / "out.jsonl"
    first = Output(str(path))
    with pytest.raises(OutputBusyError, match="another producer"):
        Output(str(path))
    first.close()
    second = Output(str(path))
    assert second.batch_id == first.batch_id
    second.close()
    other = Output(str(tmp_path / "other.jsonl"))
    assert other.batch_id != first.batch_id
    other.close()


def test_a_file_beside_that_was_torn_begins_anew(tmp_path: Path) -> None:
    """It is whole before the first job, so an output without a line has none."""
    (tmp_path / "out.jsonl.batch").write_bytes(b'{"batch":"abc')
    output = Output(str(tmp_path / "out.jsonl"))
    assert len(output.batch_id) == 32
    output.close()


@pytest.mark.parametrize(
    "text",
    [
        '{"id":"batch_req_wnaDys","custom_id":"r0","response":{"status_code":200,"body":{"model":"m"}},"error":null}',
        '{"id":"batch_req_","custom_id":"r0"}', '{"id":"batch_line_x"}', '{"id":"batch_req_' + "\u0663" * 32 + '"}',
        "[" * 100_000, "\0", "", '{"id":5}',
    ],
)  # fmt: skip
def test_a_line_that_is_none_of_ours_answers_no_row(tmp_path: Path, text: str) -> None:
    """OpenAI's own results, or what an editor left: it is void, and no reason to stop."""
    path = begun(tmp_path, answer("r1"))
    path.write_text(text + "\n" + path.read_text())
    output, lines, torn = again(path)
    output.close()
    assert (lines.stale, torn) == (1, 0)
    assert rows_of(tmp_path, lines, 2) == ["r0"]


def test_a_full_disk_is_named_and_leaves_what_can_be_gone_on_from(tmp_path: Path) -> None:
    """The file, the reason and what to do; closing says it no second time."""
    output, lines = Output(str(tmp_path / "out.jsonl")), Lines()
    output.read(lines, lambda _: None)
    output.write([answer("r0")], lines)
    whole = output.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 10, before[1]))
    try:
        with pytest.raises(OSError, match=r"out\.jsonl: File too large; .* the same command goes on"):
            output.write([answer("r1")], lines)
        output.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output, lines, torn = again(tmp_path / "out.jsonl")
    output.close()
    assert torn == 10
    assert rows_of(tmp_path, lines, 2) == ["r1"]


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    """As any other name that cannot be written."""
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(SpecError, match=r"--out .*circle"):
        Output(str(tmp_path / "circle"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_an_input_that_cannot_be_read_to_its_end_says_so() -> None:
    """A broken disk is no fault of the output."""
    with Path("/proc/self/mem").open("rb", buffering=0) as file, pytest.raises(SpecError, match="the input cannot be"):
        Input(file).next()


def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    """Neither that nor anything beside it; a folder and a missing one are refused in words."""
    path = tmp_path / "precious"
    path.write_text("mine\n")
    for named in (path, tmp_path, tmp_path / "no" / "where"):
        with pytest.raises(SpecError, match=f"--out {named}"):
            Output(str(named))
    assert path.read_text() == "mine\n"
    assert [each.name for each in tmp_path.iterdir()] == ["precious"]


def table(tmp_path: Path, text: str) -> prices.Prices:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    return prices.read(str(path))


def test_a_price_is_that_of_the_longest_name(tmp_path: Path) -> None:
    """Cached tokens have their own, where the table says one."""
    found = table(tmp_path, '["m"]\ninput=1\noutput=2\n["m-mini"]\ninput=0.5\noutput=1\ncached_input=0.1\n')
    assert found.currency == "USD"
    details = {"cached_tokens": 500_000}
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 1_000_000, "prompt_tokens_details": details}
    for model, money in (("m-2026", 3.0), ("m-mini-2026", 1.3)):
        price = found.price(model)
        assert price is not None
        assert price.of(usage) == pytest.approx(money)
    assert found.price("other") is None


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "[m]\ninput=1\n",
        "[m]\ninput=-1\noutput=1\n",
        "[gpt-4.1]\ninput=1\noutput=1\n",
        "m=1\n",
        "[m]\ninput=inf\noutput=1\n",
    ],
)
def test_a_price_table_that_cannot_be_says_where(tmp_path: Path, text: str) -> None:
    """The file, and the model or the line."""
    with pytest.raises(SpecError, match="--prices"):
        table(tmp_path, text)


def test_a_tally_counts_rows_reasons_tokens_and_money(tmp_path: Path) -> None:
    """Earlier runs' tokens and money too; what has no price is named."""
    now = [0.0]
    tally = Tally(table(tmp_path, "[m]\ninput=1\noutput=2\n"), clock=lambda: now[0])
    tally.saw(None, "m", {"prompt_tokens": 10, "completion_tokens": 20})
    tally.saw("c", "", None)
    now[0] = 10.0
    usage = {"prompt_tokens": 100, "completion_tokens": 200}
    tally.take(Answer(custom_id="r", job_id="j", number=1, status="completed", completion={"model": "x"}, usage=usage))
    tally.take(Answer(custom_id="r", job_id="j", number=1, status="failed", error={"code": "c", "message": ""}))
    assert (tally.rows, tally.reasons) == ({"answered": 1, "failed": 1}, {"c": 2})
    assert (tally.tokens_in, tally.tokens_out, tally.unpriced) == (110, 220, {"x"})
    assert tally.money == pytest.approx(50e-6)
    assert tally.speed() == (0.2, 30.0)


STATE: dict[str, Any] = {
    "answered": 12_000, "failed": 3, "cancelled": 0, "before": 2_000, "open": 1000, "in_progress": 800, "queued": 200,
    "waiting": {"upstream a": 200}, "rows": 50_000, "rows_per_second": 512.3, "tokens_per_second": 10_200.4,
    "prompt_tokens": 1_000_000, "completion_tokens": 200_000, "elapsed": 20.0, "seconds_left": 74, "cost": 1.23456,
    "currency": "USD", "unpriced": [], "reasons": {"timeout": 2, "model_not_found": 1},
}  # fmt: skip


def test_progress_is_one_line() -> None:
    """What people look for first comes first."""
    assert in_words(STATE) == (
        "12,003 of 50,000 rows · 3 failed · 1,000 open (200 wait for upstream a) · 512.3 rows/s · 10,200 tokens/s · "
        "1 min 14 s left · 1,200,000 tokens · 1.2346 USD"
    )
    assert in_words({**STATE, "trouble": "Redis is full"}).startswith("Redis is full · 12,003")
    assert in_words({**STATE, "rows": None, "stopping": True}).startswith("stopping · 12,003 rows")


def test_a_summary_counts_the_reasons() -> None:
    """Rows, speed of this run, tokens and money, and why rows have no answer."""
    assert summary(STATE) == [
        "12,003 of 50,000 rows (2,000 of them before this run): 12,000 answered, 3 failed, 0 cancelled",
        "20 s, 500.1 rows/s; 1,000,000 prompt tokens, 200,000 completion tokens, 1.2346 USD",
        "  2 x timeout", "  1 x model_not_found",
    ]  # fmt: skip


def test_the_reasons_stand_below_what_they_explain() -> None:
    """A line that begins with blanks keeps them on its way to the terminal."""
    streams = standard()
    for line in summary(STATE):
        streams.say(line)
    assert written(streams)[1].splitlines()[2:] == ["  2 x timeout", "  1 x model_not_found"]


@pytest.mark.parametrize(("seconds", "words"), [(0.25, "0.2 s"), (59, "59 s"), (61, "1 min 1 s"), (3725, "1 h 2 min")])
def test_a_duration_has_two_units(seconds: float, words: str) -> None:
    """As people say it."""
    assert duration(seconds) == words
