"""LiveCodeBench (arXiv 2403.07974):  make_task("livecodebench:test6.jsonl", start="2024-08-01", end="2025-01-31"), the R1 report's window.

Columns question_content, question_title, starter_code, difficulty, contest_date, metadata (JSON with func_name), public_test_cases (JSON) and
private_test_cases: JSON, or base64 of zlib of a pickled JSON text.  That pickle is read by a reader that refuses every class and function, so a data
file cannot run code here.  The problem's metadata: see _programs.py.
"""

import base64
import binascii
import io
import pickle
import zlib
from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.tasks._files import FileTask, Item, loader, rest, shown, text_column
from athanor.tasks._programs import check_language, json_column, program_metadata, program_question

MAX_TESTS_BYTES = 1 << 28  # of one problem, unpacked: the largest published ones take about a quarter of it


@dataclass(kw_only=True, eq=False)
class LiveCodeBench(FileTask):
    """Contest problems with hidden tests, dated."""

    kind: ClassVar[str] = "livecodebench"
    domain: ClassVar[str] = "code"
    template: str = "raw"
    start: str = ""
    """First contest date, YYYY-MM-DD; empty = all."""
    end: str = ""
    """Last contest date."""
    program_language: str = "python"
    """Language that the model is asked for: python or cpp (problems with a function to write stay Python)."""

    def __post_init__(self):
        check_language(self.kind, self.program_language)
        super().__post_init__()

    def item(self, row: dict) -> Item | None:
        date = text_column(row, "contest_date")[:10] if self.start or self.end else ""
        if date and not (self.start <= date and (not self.end or date <= self.end)):
            return None
        tests = [*json_column(row.get("public_test_cases"), "public_test_cases", list), *_private(row.get("private_test_cases"))]
        fn_name = json_column(row.get("metadata"), "metadata", dict).get("func_name") or None
        kinds = {test.get("testtype") for test in tests if isinstance(test, dict)}
        if "functional" in kinds and not fn_name:
            raise UserError("tests of a function, but column 'metadata' names no func_name")
        language = "python" if fn_name else self.program_language
        statement = text_column(row, "question_content")
        question = program_question(statement, fn_name, row.get("starter_code"), language)
        dropped = ("question_content", "public_test_cases", "private_test_cases", "metadata")
        return Item(question, None, rest(row, *dropped) | program_metadata(tests, fn_name, language), bare=statement)


class _DataOnly(pickle.Unpickler):
    def find_class(self, module, name):
        raise UserError(f"column 'private_test_cases' is a pickle that asks for {module}.{name}, wanted a pickled text")


def _private(value) -> list:
    if not isinstance(value, str) or value[:1] in ("", "["):
        return json_column(value, "private_test_cases", list)
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(value, validate=True), MAX_TESTS_BYTES)
        if unpacker.unconsumed_tail:
            raise UserError(f"column 'private_test_cases' unpacks to more than {MAX_TESTS_BYTES >> 20} MiB")
        return json_column(_DataOnly(io.BytesIO(data)).load(), "private_test_cases", list)
    except UserError:
        raise
    except (binascii.Error, zlib.error) as error:
        raise UserError(f"column 'private_test_cases' is {shown(value)}, wanted JSON or base64 of zlib ({error})") from None
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise UserError(f"column 'private_test_cases': damaged pickle ({type(error).__name__}: {error})") from None


make = loader(LiveCodeBench)
