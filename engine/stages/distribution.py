"""Which part of an optimizer step trains on which sample of a rollout: the updates take the same groups whatever the number of ranks, and each part
about as much work.

Groups are sampled where their prompts were sent; how long their completions become is known only afterwards.  So the samples that a gradient needs
are spread over the parts of all ranks (`Ranks.parts`) by length, and move as tokens and log-probs (R1 sorts all samples by length in the same way,
arXiv 2501.12948 v2).  Where they share their prompt, those of a group stay together as far as there are enough others to even out the parts.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from athanor.batch import work_of
from athanor.parallel import Ranks, spread
from athanor.samples import Sample

PIECES = 4  # of work for each part, at least: then the largest first is within a few percent of even


@dataclass(frozen=True)
class Share:
    """What one rank does in one optimizer step."""

    samples: list[Sample]  # without problem and text, part after part
    sizes: list[int]  # samples of each part of this rank
    advantages: Tensor  # (S,) fp32
    num_tokens: int  # of the step's samples on all ranks, those without a gradient included
    num_sequences: int


def shares(
    groups: list[list[Sample]], places: list[int], advantages: Tensor, num_updates: int, ranks: Ranks, *, hidden_size: int, all_live: bool,
    shared_prompts: bool = False,
) -> list[Share]:  # fmt: skip
    """This rank's share of each of `num_updates` steps over the groups of all ranks, in the order of their places.

    Context or tensor parallel ranks have the same.  places, advantages: of this rank's groups, and (S,) of its samples.  all_live: those without an
    advantage have a gradient, too.  shared_prompts: those of a group that come to the same part compute their prompt once.
    """
    mine = []  # (place of the group, member, prompt tokens, completion tokens, live)
    for i, (sample, advantage) in enumerate(zip(sum(groups, []), advantages.tolist(), strict=True)):
        group, member = divmod(i, len(groups[0]))
        live = all_live or advantage != 0
        mine.append((places[group], member, len(sample.prompt_ids), sample.num_tokens, live))
    everyone, first = ranks.concatenate(mine)
    order = {group: position for position, group in enumerate(sorted({row[0] for row in everyone}))}
    bounds = np.linspace(0, len(order), num_updates + 1).round().astype(int)
    updates = [[i for i, row in enumerate(everyone) if begin <= order[row[0]] < end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    outgoing: list[list] = [[] for _ in range(ranks.world)]
    flat = sum(groups, [])
    peers = ranks.world // ranks.data.world  # ranks in a row that train on the same samples
    num_parts = ranks.data.world * ranks.num_parts
    for update, rows in enumerate(updates):
        live = sorted((i for i in rows if everyone[i][4]), key=lambda i: everyone[i][:2])
        pieces = _pieces(live, [row[0] for row in everyone], num_parts) if shared_prompts else [[i] for i in live]
        work = [_work([everyone[i][2:4] for i in piece], hidden_size) for piece in pieces]
        for part, share in enumerate(spread(work, num_parts)):
            for i in (i for j in share for i in pieces[j]):
                if first <= i < first + len(mine):
                    sample = replace(flat[i - first], problem=None, text="")
                    holder = part // ranks.num_parts
                    for rank in range(holder * peers, (holder + 1) * peers):
                        outgoing[rank].append((update, part, *everyone[i][:2], sample, float(advantages[i - first])))
    received = sorted(sum(ranks.exchange(outgoing), []), key=lambda row: row[:4])
    own_parts = range(num_parts)[ranks.data.rank * ranks.num_parts :][: ranks.num_parts]
    found = []
    for update, rows in enumerate(updates):
        own = [row for row in received if row[0] == update]
        sizes = [sum(row[1] == part for row in own) for part in own_parts]
        values = torch.tensor([row[5] for row in own], dtype=torch.float32)
        found.append(Share([row[4] for row in own], sizes, values, sum(everyone[i][3] for i in rows), len(rows)))
    return found


def _pieces(live: list[int], group: list[int], num_parts: int) -> list[list[int]]:
    """Samples that stay together: a group's, in PIECES num_parts pieces or more of all groups; where there is one part, whole groups."""
    groups: dict[int, list[int]] = {}
    for i in live:
        groups.setdefault(group[i], []).append(i)
    pieces = 1 if num_parts == 1 else -(-PIECES * num_parts // max(len(groups), 1))
    return [piece.tolist() for members in groups.values() for piece in np.array_split(members, min(pieces, len(members)))]


def _work(samples: list[tuple[int, int]], hidden_size: int) -> float:
    """Of samples (prompt tokens, completion tokens) with one prompt, which is computed once."""
    prompt = samples[0][0]
    return work_of(prompt, hidden_size) + sum(work_of(tokens, hidden_size, before=prompt) for _, tokens in samples)
