import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path.append(str(Path(__file__).parent))  # tests/kernels/ is no package
from test_advance_rows import check  # noqa: E402


@pytest.mark.parametrize("with_drawing", [False, True])
@pytest.mark.parametrize("with_streaks", [False, True])
def test_rows_move_by_the_rules(with_streaks, with_drawing, triton_device, generator):
    check("triton", triton_device, generator, with_streaks, with_drawing)
