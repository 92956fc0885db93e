"""Command line:  python -m athanor.generate --model DIR --prompt TEXT [--prompt TEXT ...] [-n N] ...   or   --model DIR --chat

--chat without a prompt is a conversation (chat.py): on a terminal, or with the lines of a pipe as messages. One sample is shown token by token,
several as they finish. With --json every sample is one JSON object on stdout and nothing else is.
Exit codes: 0, 2 for what the user can fix (one line on stderr), 130 when interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from athanor.chat import HELP, THINK, Conversation, converse, typed_lines
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.samples import Completion, Request

__all__ = ["Completion", "Generator", "Request", "main"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m athanor.generate", description="Sample from a HuggingFace checkpoint folder.", allow_abbrev=False)
    p.add_argument("--model", required=True, metavar="DIR", help="folder with config.json, safetensors and tokenizer.json")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to go on from; may be given several times; - reads stdin")
    p.add_argument("--chat", action="store_true", help="take each prompt as a user's message and render the folder's chat template; without "
                   "--prompt a conversation: a line is a message, /reset begins anew, /quit ends")  # fmt: skip
    p.add_argument("--template", default="", metavar="T", help="of a conversation with a folder that has no chat template: raw, r1_zero, boxed or a "
                   "text with {prompt}; each message stands alone")  # fmt: skip
    p.add_argument("--system", default="", metavar="TEXT", help="system message of a conversation")
    p.add_argument("--think", choices=THINK, default="auto", help="chains of thought of a conversation: auto is dim on a terminal, else show")
    p.add_argument("-n", type=int, default=1, metavar="N", help="samples per prompt; they share its prefill (default 1)")
    p.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest sample (default 256)")
    p.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 = greedy (default 1)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens; 0 = all")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the smallest set of tokens with this probability; 1 = all")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below this fraction of the largest probability")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends a sample; may be given several times")
    p.add_argument("--speculate", type=int, default=0, metavar="K", help="draft K tokens at a time and check them in one forward; same samples "
                   "(default 0: off)")  # fmt: skip
    p.add_argument("--draft", choices=("ngram", "mtp"), default="ngram", help="from what was said before, or by the model's layer for multi-token "
                   "prediction (default ngram)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, metavar="S", help="key of the random numbers: the same seed gives the same samples (default 0)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: bfloat16 on CUDA, float32 on a CPU")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 = all cores")
    p.add_argument("--json", action="store_true", help="print prompt, text, token ids, log-probs and finish of each sample as one JSON object")
    return p


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        run(arguments, lambda text: print(text, end="", flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def run(arguments: argparse.Namespace, write: Callable[[str], None]) -> None:
    """Sample and write; UserError for what the user can fix."""
    import torch
    from pydantic import ValidationError

    from athanor.config import SamplingConfig, SpeculationConfig
    from athanor.parallel import Ranks
    from athanor.seeds import sample_seeds
    from athanor.tokenizer import Tokenizer
    from athanor.weights import load_model

    conversing = arguments.chat and not arguments.prompt
    if conversing and (arguments.json or arguments.n != 1):
        raise UserError("--chat: a conversation takes neither --json nor -n; wanted --prompt with them")
    if not conversing and (arguments.template or arguments.system):
        raise UserError("--template and --system belong to a conversation: --chat without --prompt")
    if not conversing and not arguments.prompt:
        raise UserError("--prompt is missing; wanted at least one text (--prompt '' starts from the beginning of a sequence)")
    if arguments.n < 1:
        raise UserError(f"-n {arguments.n}, wanted at least 1")
    fields = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "stop")
    try:
        sampling = SamplingConfig(**{name: getattr(arguments, name) for name in fields})
        speculation = SpeculationConfig(tokens=arguments.speculate, draft=arguments.draft)
    except ValidationError as error:
        first = error.errors()[0]
        option = "speculate" if first["loc"] == ("tokens",) else str(first["loc"][0] if first["loc"] else "stop").replace("_", "-")
        raise UserError(f"--{option}: {first['msg']}") from None
    ranks = Ranks(arguments.device, arguments.threads)
    dtype = getattr(torch, arguments.dtype if arguments.dtype != "auto" else "bfloat16" if ranks.device.type == "cuda" else "float32")
    tokenizer = Tokenizer.from_folder(arguments.model)
    model = load_model(arguments.model, dtype=dtype, device=ranks.device).requires_grad_(False)
    if conversing:
        generator = Generator(model, tokenizer.eos_ids, tokenizer=tokenizer, max_rows=1, speculation=speculation)
        talk = Conversation(generator, tokenizer, sampling, template=arguments.template, system=arguments.system, seed=arguments.seed)
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if terminal:
            write(f"{HELP}\n")
        converse(talk, typed_lines() if terminal else sys.stdin, write, think=arguments.think, terminal=terminal)
        return
    texts = [sys.stdin.read() if text == "-" else text for text in arguments.prompt]
    rendered = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) if arguments.chat else text for text in texts]
    prompts = [np.array(tokenizer.encode_prompt(text), np.int64) for text in rendered]
    requests = [Request(ids, sample_seeds(arguments.n, arguments.seed, i)) for i, ids in enumerate(prompts)]
    generator = Generator(model, tokenizer.eos_ids, tokenizer=tokenizer, max_rows=max(512, arguments.n), speculation=speculation)
    total, start, tokens = len(requests) * arguments.n, time.perf_counter(), 0
    live = _Live(tokenizer, write) if total == 1 and not arguments.json else None
    try:
        with generator.stream(requests, sampling) as stream:
            while not stream.finished:
                for i, member, completion in stream.step():
                    tokens += len(completion.token_ids)
                    text = tokenizer.decode([t for t in completion.token_ids.tolist() if t not in tokenizer.eos_ids])
                    if arguments.json:
                        row = {"prompt": texts[i], "sample": member, "text": text, "finish": completion.finish}
                        row |= {"token_ids": completion.token_ids.tolist(), "logps": [round(x, 6) for x in completion.logps.tolist()]}
                        write(json.dumps(row, ensure_ascii=False) + "\n")
                    elif live:
                        live.show(completion.token_ids)
                        write("\n")
                    else:
                        head = f"prompt {i + 1}/{len(requests)} sample {member + 1}/{arguments.n}"
                        facts = f"{len(completion.token_ids)} tokens, {completion.finish}, log-prob {completion.logps.sum():.2f}"
                        write(f"--- {head} ({facts})\n{text}\n")
                if live:
                    live.show(stream.tokens_of(0, 0))
    except ValueError as error:
        raise UserError(str(error)) from None
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens of {total} samples in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s", file=sys.stderr)


class _Live:
    """Writes a sample's text as it grows: what decodes to a whole character."""

    def __init__(self, tokenizer, write: Callable[[str], None]):
        self.tokenizer, self.write, self.shown = tokenizer, write, 0

    def show(self, token_ids: np.ndarray) -> None:
        text = self.tokenizer.decode([t for t in token_ids.tolist() if t not in self.tokenizer.eos_ids])
        whole = len(text.rstrip("\ufffd"))  # half a character decodes to this
        if whole > self.shown:
            self.write(text[self.shown : whole])
            self.shown = whole


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
