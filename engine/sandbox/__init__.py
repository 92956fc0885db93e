"""Run untrusted programs (Python, C++) on Linux behind kernel walls:  Sandbox().run("print(1)") -> Result("ok", "1\\n", ...).

    with Sandbox() as nothing needed: it holds no process between calls; every program gets a new sandbox and nothing outlives it.
"""

from athanor.sandbox.box import COMPILE_LIMITS, LANGUAGES, Box, Limits, Result
from athanor.sandbox.isolation import SandboxError
from athanor.sandbox.pool import Checked, Sandbox, why_not

__all__ = ["COMPILE_LIMITS", "LANGUAGES", "Box", "Checked", "Limits", "Result", "Sandbox", "SandboxError", "why_not"]
