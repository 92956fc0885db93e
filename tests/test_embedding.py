"""The README's embedding snippet, taken from there and run: a plain PyTorch loop around linear_grpo learns."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from athanor.kernels import LossVariant, linear_grpo, linear_logprob

V, D, GROUPS, G, LENGTH = 12, 16, 4, 8, 6


def snippet() -> str:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    found = re.findall(r"<!-- embedding-snippet -->\n```python\n(.*?)```", text, re.S)
    assert len(found) == 1
    assert len([line for line in found[0].splitlines() if line.strip()]) == 8  # what the README promises to be short stays short
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
