"""Which rank trains on which sample of a rollout: the updates take the same groups whatever the number of ranks, and each rank about as much work.

Groups are sampled where their prompts were sent; how long their completions become is known only afterwards.  So the samples that a gradient needs
are spread over all ranks by length, and move as tokens and log-probs (R1 sorts all samples by length in the same way, arXiv 2501.12948 v2).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from athanor.batch import work_of
from athanor.parallel import Ranks, spread
from athanor.samples import Sample


@dataclass(frozen=True)
class Share:
    """What one rank does in one optimizer step."""

    samples: list[Sample]  # without problem and text
    advantages: Tensor  # (S,) fp32
    num_tokens: int  # of the step's samples on all ranks, those without a gradient included
    num_sequences: int


def shares(groups: list[list[Sample]], advantages: Tensor, num_updates: int, ranks: Ranks, *, hidden_size: int, all_live: bool) -> list[Share]:
    """This rank's share of each of `num_updates` steps over the groups of all ranks, in the order of their prompts.

    advantages: (S,) of this rank's samples.  all_live: samples without an advantage have a gradient, too.
    """
    mine = []  # (group, member, inputs, completion tokens, live)
    for i, (sample, advantage) in enumerate(zip(sum(groups, []), advantages.tolist(), strict=True)):
        group, member = divmod(i, len(groups[0]))
        inputs = len(sample.prompt_ids) + sample.num_tokens
        mine.append((group * ranks.world + ranks.rank, member, inputs, sample.num_tokens, all_live or advantage != 0))
    everyone, first = ranks.concatenate(mine)
    order = {group: position for position, group in enumerate(sorted({row[0] for row in everyone}))}
    bounds = np.linspace(0, len(order), num_updates + 1).round().astype(int)
    updates = [[i for i, row in enumerate(everyone) if begin <= order[row[0]] < end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    outgoing: list[list] = [[] for _ in range(ranks.world)]
    flat = sum(groups, [])
    for update, rows in enumerate(updates):
        live = sorted((i for i in rows if everyone[i][4]), key=lambda i: everyone[i][:2])
        for rank, share in enumerate(spread([work_of(everyone[i][2], hidden_size) for i in live], ranks.world)):
            for i in (live[j] for j in share):
                if first <= i < first + len(mine):
                    sample = replace(flat[i - first], problem=None, text="")
                    outgoing[rank].append((update, *everyone[i][:2], sample, float(advantages[i - first])))
    received = sorted(sum(ranks.exchange(outgoing), []), key=lambda row: row[:3])
    found = []
    for update, rows in enumerate(updates):
        own = [row for row in received if row[0] == update]
        values = torch.tensor([row[4] for row in own], dtype=torch.float32)
        found.append(Share([row[3] for row in own], values, sum(everyone[i][3] for i in rows), len(rows)))
    return found
