"""Prompt templates by name.  R1-Zero's is Table 1 of arXiv 2501.12948: structure only, no hint at content, for base models.

`boxed` is the instruction that DeepSeek-R1's model card gives for mathematics; `choice` is that of simple-evals, whose prompts the report takes for
MMLU and GPQA.
"""

from athanor.errors import UserError

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)
BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before answering.\n\n{prompt}"
)
TEMPLATES = {"raw": "{prompt}", "r1_zero": R1_ZERO, "boxed": BOXED, "choice": CHOICE, "chat": "{prompt}"}


def check_template(template: str) -> None:
    """Raise UserError unless `template` is one of TEMPLATES, a text with {prompt} in it, or "chat:" and one of these."""
    text = template.removeprefix("chat:")
    if text not in TEMPLATES and "{prompt}" not in text:
        raise UserError(f"unknown template {template!r}, wanted {', '.join(TEMPLATES)}, chat:<one of these> or a text that contains {{prompt}}")


def render(question: str, template: str, *, system: str = "", letters: str = "") -> tuple[str, dict]:
    """Return the prompt of a question and what goes into the problem's metadata.

    raw: the question.  r1_zero: R1_ZERO to the letter, its full stop included.  boxed, choice: the instruction with it.  Any other text: {prompt}
    is replaced.  chat, or "chat:" before any of these: the same prompt as a user's message in `messages`, which generation renders by the
    tokenizer's chat template.  A template that asks for \\boxed{} sets `extract`.  letters: the options of a multiple-choice question.
    """
    is_chat = template == "chat" or template.startswith("chat:")
    text = template.removeprefix("chat:")
    before, _, after = TEMPLATES.get(text, text).replace("{letters}", letters).partition("{prompt}")
    prompt = before + question + after.replace("{prompt}", question)
    extra: dict = {"extract": "boxed"} if "\\boxed{" in before + after else {}
    if is_chat:
        messages = [{"role": "system", "content": system}] if system else []
        extra["messages"] = [*messages, {"role": "user", "content": prompt}]
    return prompt, extra
