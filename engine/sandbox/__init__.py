"""Run untrusted programs (Python, C++) behind the kernel's walls:  Sandbox().run("print(6 * 7)").stdout == "42\\n".

Each program gets a sandbox of its own (isolation.py says what that is) that ends with it and takes about 20 ms of CPU time to make; nothing is kept
between programs, so nothing can pass from one to another.  Several inputs for one program share its sandbox:

    with Sandbox().open(program, language="cpp") as box:
        results = [box.run(text) for text in inputs]

`python -m athanor.sandbox --attack --bench` tries it out.
"""

from athanor.sandbox.box import COMPILE_LIMITS, LANGUAGES, Box, Limits, Result
from athanor.sandbox.isolation import SandboxError
from athanor.sandbox.pool import Checked, Sandbox, why_not

__all__ = ["COMPILE_LIMITS", "LANGUAGES", "Box", "Checked", "Limits", "Result", "Sandbox", "SandboxError", "why_not"]
