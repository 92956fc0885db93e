"""Prompt templates.  R1-Zero's is Table 1 of arXiv 2501.12948: structure only, no hint at content, for base models."""

from athanor.errors import UserError

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)


def check_template(template: str) -> None:
    """Raise UserError unless `template` is raw, r1_zero, chat or a text with {prompt} in it."""
    if template not in ("raw", "r1_zero", "chat") and "{prompt}" not in template:
        raise UserError(f"unknown template {template!r}, wanted raw, r1_zero, chat or a text that contains {{prompt}}")


def render(question: str, template: str, *, system: str = "") -> tuple[str, dict]:
    """Return the prompt of a question and what goes into the problem's metadata.

    raw: the question.  r1_zero: R1_ZERO to the letter, its full stop included.  chat: the question, with `messages` in the metadata, which generation
    renders by the tokenizer's chat template.  Any other text: {prompt} is replaced.
    """
    if template == "raw":
        return question, {}
    if template == "chat":
        messages = [{"role": "system", "content": system}] if system else []
        return question, {"messages": [*messages, {"role": "user", "content": question}]}
    return (R1_ZERO if template == "r1_zero" else template).replace("{prompt}", question), {}
