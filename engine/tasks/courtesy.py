"""An open-ended family: `User: thank tom ? Assistant:` wants a short reply, and which reply is better is a matter of taste.

The taste of simulated annotators is `utility`: it fits the request, names the person, adds something kind, closes politely, and does not repeat
itself.  Annotators compare two replies with Bradley-Terry noise; the reward model sees only their verdicts, never the utility.  The utility itself
is reported beside the reward model's score, so that gaming the reward model would show.
"""

import math
import random
from dataclasses import dataclass

from athanor.rewards import parse_response
from athanor.samples import Problem

NAMES = ("tom", "ann", "bob", "eve", "lin", "max", "mia", "leo")
OPENERS = {"greet": ("hello", "hi"), "thank": ("thanks", "cheers"), "invite": ("come", "join")}
KIND = {"greet": ("good", "day"), "thank": ("so", "kind"), "invite": ("for", "tea")}
CLOSERS = ("please", "friend")
RUDE = ("oi", "whatever")
SYMBOLS = ["User:", "Assistant:", "?", "<think>", "</think>", "<answer>", "</answer>", *NAMES, *OPENERS, *CLOSERS, *RUDE]
SYMBOLS += [word for words in (*OPENERS.values(), *KIND.values()) for word in words]


@dataclass(frozen=True, kw_only=True)
class CourtesyTask:
    """Requests to greet, thank or invite two people, with a plain reply as a judge's `reference`; a draw is a function of (seed, stream, index)."""

    name: str = "courtesy"
    seed: int = 0
    well_formed: float = 0.85
    """Share of corpus documents with both tag pairs."""
    domain: str = "general"
    symbols: tuple[str, ...] = tuple(dict.fromkeys(SYMBOLS))

    def size(self, split: str) -> int | None:
        return None

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of a split.  Requests are pairs of people; a pair belongs to one split only."""
        rng = random.Random(f"{self.name}/{split}/{self.seed if split == 'train' else ''}/{index}")
        while True:
            verb, people = rng.choice(sorted(OPENERS)), rng.sample(NAMES, 2)
            if split_of(people) == split:
                metadata = {"verb": verb, "people": people, "reference": f"{OPENERS[verb][0]} {' '.join(people)}"}
                return Problem(f"User: {verb} {' '.join(people)} ? Assistant:", None, index, self.name, "general", split=split, metadata=metadata)

    def corpus(self, index: int) -> tuple[str, str]:
        """Pre-training document `index`: a reply of any quality."""
        rng = random.Random(f"{self.name}/corpus/{self.seed}/{index}")
        problem = self.problem("train", rng.randrange(10**9))
        reply = self.reply(rng, problem)
        if rng.random() < self.well_formed:
            return problem.prompt, f"<think> {self.thought(problem)} </think> <answer> {reply} </answer>"
        return problem.prompt, f"<answer> {reply} </answer>" if rng.random() < 0.5 else reply

    def written(self, index: int) -> tuple[Problem, str]:
        """A well-formed example of ordinary quality, as older supervised data has it."""
        problem = self.problem("train", 10**9 + index)
        rng = random.Random(f"{self.name}/written/{self.seed}/{index}")
        return problem, f"<think> {self.thought(problem)} </think> <answer> {self.reply(rng, problem)} </answer>"

    def thought(self, problem: Problem) -> str:
        return f"{problem.metadata['verb']} {' '.join(problem.metadata['people'])}"

    def reply(self, rng: random.Random, problem: Problem) -> str:
        """A reply of mixed quality: each good habit is there about half of the time."""
        verb, people = problem.metadata["verb"], problem.metadata["people"]
        words = [rng.choice(OPENERS[verb] if rng.random() < 0.6 else RUDE if rng.random() < 0.5 else OPENERS[rng.choice(sorted(OPENERS))])]
        words += people if rng.random() < 0.5 else people[:1]
        if rng.random() < 0.4:
            words += KIND[verb if rng.random() < 0.7 else rng.choice(sorted(KIND))]
        if rng.random() < 0.3:
            words.append(rng.choice(CLOSERS))
        if rng.random() < 0.15:
            words.append(rng.choice(words))
        return " ".join(words)

    def utility(self, problem: Problem, text: str) -> float:
        """The annotators' taste in a whole response, from -2 to 5; they read the answer only, and no answer is the worst of all."""
        answer = parse_response(text).answer
        if answer is None:
            return -2.0
        words, verb = answer.split(), problem.metadata["verb"]
        score = 1.0 if words and words[0] in OPENERS[verb] else -0.5
        score += sum(1.0 for person in problem.metadata["people"] if person in words)
        score += 1.0 if " ".join(KIND[verb]) in answer else 0.0
        score += 1.0 if words and words[-1] in CLOSERS else 0.0
        score -= sum(1.0 for word in words if word in RUDE) + (len(words) - len(set(words)))
        return max(-2.0, score)

    def preferred(self, problem: Problem, a: str, b: str, *key: int | str) -> bool:
        """Does this annotator prefer `a` to `b`?  P = sigmoid(utility(a) - utility(b)), the Bradley-Terry model."""
        draw = random.Random(f"{self.name}/preference/{self.seed}/{'/'.join(map(str, key))}").random()
        return draw < 1 / (1 + math.exp(self.utility(problem, b) - self.utility(problem, a)))


make = CourtesyTask


def split_of(people: list[str]) -> str:
    """Split of an unordered pair of people: 28 pairs, 4 for test, 4 for validation, 20 for training."""
    first, second = sorted(NAMES.index(person) for person in people)
    return {0: "test", 1: "validation"}.get((3 * first + 5 * second) % 7, "train")
