"""The README's snippets, taken from there and run: a plain PyTorch loop around linear_grpo learns, and a stream of samples is aborted and resumed."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from athanor import Generator, SamplingConfig
from athanor.config import ModelConfig
from athanor.kernels import LossVariant, linear_grpo, linear_logprob
from athanor.model.transformer import Decoder

V, D, GROUPS, G, LENGTH = 12, 16, 4, 8, 6


def snippet(name: str = "embedding", lines: int = 8) -> str:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    found = re.findall(rf"<!-- {name}-snippet -->\n```python\n(.*?)```", text, re.S)
    assert len(found) == 1
    assert len([line for line in found[0].splitlines() if line.strip()]) == lines  # what the README promises to be short stays short
    return found[0]


class World:
    """A model that maps a token to a hidden state, and the reward: the share of even tokens in the answer."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, D), torch.nn.Tanh())
        self.lm_head = torch.nn.Linear(D, V, bias=False)
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.lm_head.parameters()], lr=0.02)

    def sample(self) -> SimpleNamespace:
        """Answers from the current policy: every token depends on the one before it."""
        with torch.no_grad():
            ids = [torch.randint(V, (GROUPS,)).repeat_interleave(G)]
            for _ in range(LENGTH):
                ids.append(torch.multinomial(self.lm_head(self.model(ids[-1])).softmax(-1), 1).squeeze(1))
            ids = torch.stack(ids, 1)
            inputs, targets = ids[:, :-1].flatten(), ids[:, 1:].flatten()
            old = linear_logprob(self.model(inputs), self.lm_head.weight, targets).logps
        return SimpleNamespace(input_ids=inputs, targets=targets, old_logps=old, cu_seqlens=torch.arange(0, len(inputs) + 1, LENGTH).int(),
                               rewards=(ids[:, 1:] % 2 == 0).float().mean(1), group_ids=torch.arange(GROUPS).repeat_interleave(G))  # fmt: skip

    def even(self) -> float:
        """Probability of an even token, over all tokens that may come before it."""
        with torch.no_grad():
            return self.lm_head(self.model(torch.arange(V))).softmax(-1)[:, ::2].sum(1).mean().item()


def test_rewarded_tokens_become_likely():
    world = World()
    before = world.even()
    scope = {"batches": (world.sample() for _ in range(40)), "model": world.model, "lm_head": world.lm_head, "optimizer": world.optimizer}
    exec(snippet(), scope)
    assert 0.3 < before < 0.7 and world.even() > 0.9
    assert scope["stats"]["num_tokens"] == GROUPS * G * LENGTH


def test_the_loss_of_one_batch_goes_down():
    world = World()
    batch = world.sample()

    def loss():
        args = batch.targets, batch.old_logps, None, batch.cu_seqlens
        return linear_grpo(world.model(batch.input_ids), world.lm_head.weight, *args, rewards=batch.rewards, group_ids=batch.group_ids,
                           variant=LossVariant(clip_high=0.28))[0].item()  # fmt: skip

    before = loss()
    assert abs(before) < 1e-6  # old = new: minus the mean advantage, which is 0
    exec(snippet(), {"batches": [batch] * 5, "model": world.model, "lm_head": world.lm_head, "optimizer": world.optimizer})
    assert loss() < before - 0.02


def test_samples_stream_are_aborted_and_go_on():
    shape = ModelConfig(vocab_size=19, hidden_size=32, num_hidden_layers=1, initializer_range=0.3)
    model, prompts = Decoder(shape).initialize_(0), [np.array([3, 4, 5]), np.array([6, 7])]
    rewarded = []

    def reward(request, token_ids):
        rewarded.append((request, len(token_ids)))

    scope = {"np": np, "model": model, "eos_ids": {1}, "prompts": prompts, "reward": reward, "enough": lambda: len(rewarded) == 20,
             "prompt_ids": prompts[1], "seeds": np.arange(16), "aborted": None}  # fmt: skip
    exec(snippet("generator", 9), scope)
    assert len(rewarded) == 32 and {request for request, _ in rewarded} == {0, 1}
    whole = Generator(model, {1}).generate([scope["requests"][1]], SamplingConfig(max_tokens=512, top_p=0.95))[0]
    with Generator(model, {1}).stream([scope["requests"][1]], SamplingConfig(max_tokens=512, top_p=0.95)) as stream:
        for _ in range(3):
            stream.step()
        stream.abort()
        aborted = {member: completion for _, member, completion in stream}
    left = [member for member in range(16) if member in aborted and aborted[member].finish == "abort"]
    scope |= {"seeds": np.array(left), "aborted": [aborted[member] for member in left]}
    exec(snippet("generator", 9).splitlines()[-1], scope)
    (resumed,) = Generator(model, {1}).generate([scope["resumed"]], SamplingConfig(max_tokens=512, top_p=0.95))
    assert len(left) > 5
    for member, completion in zip(left, resumed, strict=True):
        assert completion.token_ids.tolist() == whole[member].token_ids.tolist() and np.array_equal(completion.logps, whole[member].logps)
