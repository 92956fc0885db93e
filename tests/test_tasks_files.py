"""Data files of tasks: kinds, columns, bad rows, and what junk does to every loader."""

import csv
import gzip
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from athanor.errors import UserError
from athanor.tasks import make_task

ROWS = json.loads(Path(__file__).with_name("published_rows.json").read_text())  # one invented row per set, in its published columns


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    rows = [{"question": f"q {i}, \"quoted\"\nand more", "answer": str(i)} for i in range(5)]
    write(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    write(tmp_path / "lines.json", rows)
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.DictWriter(file, ["question", "answer"]).writeheader()
        csv.DictWriter(file, ["question", "answer"]).writerows(rows)
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "a.csv"):
        task = make_task("jsonl", test=str(tmp_path / name))
        read = [task.problem("test", i) for i in range(5)]
        assert [(p.metadata["question"], p.answer) for p in read] == [(row["question"], row["answer"]) for row in rows]


def test_parquet_is_read_or_pyarrow_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(UserError, match=r"a\.parquet: a Parquet file needs the package pyarrow .*pip install pyarrow"):
            make_task(f"jsonl:{path}")
        return
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", "b", None], "choices": [["x", "y"]] * 3, "answer": [1, 0, 0]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:row 3: "):
        make_task(f"mmlu:{path}")
    with pytest.warns(UserWarning, match="1 of 3 rows left out"):
        task = make_task(f"mmlu:{path}", on_bad="skip")
    assert [task.problem("test", i).answer for i in range(2)] == ["B", "A"]
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        make_task(f"mmlu:{path}")


def test_columns_go_by_other_names(tmp_path):
    row = {"frage": "Zwei mal drei?", "loesung": "#### 6", "question": "not this one"}
    path = write(tmp_path / "a.jsonl", [row])
    problem = make_task(f"gsm8k:{path}", columns={"question": "frage", "answer": "loesung"}).problem("test", 0)
    assert (problem.metadata["question"], problem.answer) == ("Zwei mal drei?", "6")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no column 'fragen', which the setting columns names; did you mean frage"):
        make_task(f"gsm8k:{path}", columns={"question": "fragen"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: no column 'answer' \(or set columns\)"):
        make_task(f"gsm8k:{path}")


def test_bad_rows_are_skipped_on_request_and_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS["gsm8k"], "{", {"question": "x"}, ROWS["gsm8k"] | {"question": "y"}, '{"question": NaN}'])
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        make_task(f"gsm8k:{path}")
    with pytest.warns(UserWarning, match=r"3 of 5 rows left out: .*a\.jsonl:2: .*a\.jsonl:3: .*a\.jsonl:5: "):
        task = make_task(f"gsm8k:{path}", on_bad="skip")
    assert task.size("test") == 2 and [row.split(": ")[0] for row in task.bad_rows] == [f"{path}:{n}" for n in (2, 3, 5)]
    with pytest.raises(UserError, match="none of 1 rows can be used; the first: .*:1: "):
        make_task("gsm8k", on_bad="skip", test=write(tmp_path / "b.jsonl", ["{"]))
    with pytest.raises(UserError, match="on_bad is 'ignore'"):
        make_task(f"gsm8k:{path}", on_bad="ignore")


def test_csv_mistakes_have_their_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'question,answer\n"two\nlines",1\nshort\nx,2\ncaf\xe9,3\n')
    with pytest.raises(UserError, match=r"a\.csv:4: 1 cells, wanted 2 \(question, answer\)"):
        make_task("jsonl", test=f"{tmp_path}/a.csv")
    with pytest.warns(UserWarning, match=r"a\.csv:4: .*a\.csv:6: a text with half a surrogate pair"):
        assert make_task("jsonl", test=f"{tmp_path}/a.csv", on_bad="skip").size("test") == 2
    (tmp_path / "b.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match=r"b\.csv:1: column names"):
        make_task("jsonl", test=f"{tmp_path}/b.csv")


def test_wrong_names_list_near_misses():
    with pytest.raises(UserError, match="unknown task 'gsm8:x.jsonl': did you mean gsm8k"):
        make_task("gsm8:x.jsonl")
    with pytest.raises(UserError, match="unknown setting 'tempate': did you mean template"):
        make_task("gsm8k:x.jsonl", tempate="raw")
    with pytest.raises(UserError, match='task aime: no files, wanted "aime:<path>"'):
        make_task("aime")


# ---- property: any junk line is an error with file:line, and nothing is half read

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def check_line(folder, kind, line: bytes):
    """Put a line between two good rows: it is named, or it is one more problem."""
    path = folder / f"{kind}.jsonl"
    key = next(key for key in ROWS[kind] if key.lower() in ("question", "problem", "prompt", "text", "question_content"))
    rows = [ROWS[kind], ROWS[kind] | {key: f"{ROWS[kind][key]} once more"}]
    good = [json.dumps(row).encode() for row in rows]
    path.write_bytes(good[0] + b"\n" + line + b"\n" + good[1] + b"\n")
    try:
        make_task(kind, test=str(path))
        wrong = False
    except UserError as error:
        assert str(error).startswith(f"{path}:2: ") and "\n" not in str(error), str(error)
        wrong = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = make_task(kind, test=str(path), on_bad="skip")
    assert len(task.bad_rows) == wrong and task.size("test") + task.num_dropped == 3 - wrong - (not line.strip())
    for i in range(task.size("test")):
        problem = task.problem("test", i)
        assert problem.prompt.strip() and problem.prompt.encode() and problem.metadata["source"].startswith(f"{path}:")
        assert problem.answer is None or problem.answer.strip()


@PROPERTY
@given(line=st.binary(max_size=40).filter(lambda line: b"\n" not in line))
def test_junk_bytes(tmp_path_factory, line):
    for kind in ("jsonl", "livecodebench"):
        check_line(tmp_path_factory.getbasetemp(), kind, line)


@pytest.mark.parametrize("kind", sorted(ROWS))
@PROPERTY
@given(data=st.data())
def test_junk_in_a_column(tmp_path_factory, kind, data):
    row = dict(ROWS[kind])
    for key in data.draw(st.lists(st.sampled_from(sorted(row)), min_size=1, max_size=2)):
        value = data.draw(JSON)
        row[key] = json.dumps(value) if key in ("metadata", "input_output", "public_test_cases") and data.draw(st.booleans()) else value
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            del row[key]
    check_line(tmp_path_factory.getbasetemp(), kind, json.dumps(row).encode())
