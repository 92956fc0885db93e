"""A Decoder that has no weights of its own: its parameters are those of a transformers model, so that `Generator` samples what a trainer trains.

    from athanor.adapters.shared_decoder import shared_decoder
    generator = Generator(shared_decoder(model), eos_ids)

The Decoder keeps q, k, v and gate, up as one matrix each.  Such a matrix is allocated once, and the model's parameters become ranges of its rows: the
same Parameter objects with the same values in other memory, which an optimizer's in-place steps and load_state_dict write to.  Everything else is
the model's own memory.  What moves or casts the model (`model.to`) parts the two again, and `shares_weights` says so.

To undo it:  for parameter in model.parameters(): parameter.data = parameter.data.clone()
"""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import nn

from athanor.errors import UserError
from athanor.hf_config import model_config_from_hf
from athanor.hf_tensors import hf_tensors
from athanor.model.transformer import Decoder, rope_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def shared_decoder(model: "PreTrainedModel") -> Decoder:
    """Build the Decoder of a Llama, Qwen2 or Qwen3 model around the model's weights.  Peak extra memory is one fused matrix.

    Raises UserError for a config that the Decoder does not have, naming the key, or parameters that it does not know (adapters, shards).
    """
    config = model_config_from_hf(model.config.to_dict())
    theirs, sources = dict(model.named_parameters()), hf_tensors(config)
    shapes = ({name: tuple(part.shape) for name, part in named.items()} for named in (theirs, sources))
    if wrong := {name for name, _ in set.symmetric_difference(*(set(named.items()) for named in shapes))}:
        raise UserError(f"shared_decoder: {min(wrong)} and {len(wrong) - 1} other parameters are not as {type(model).__name__} has them; "
                        "wanted the whole weights, neither sharded nor wrapped")  # fmt: skip
    places = {(parameter.dtype, parameter.device) for parameter in theirs.values()}
    if len(places) > 1:
        raise UserError(f"shared_decoder: the parameters are in {len(places)} dtypes or devices; wanted one of each")
    with torch.device("meta"):
        decoder = Decoder(config)
    pieces = defaultdict(list)  # parameter of the Decoder -> (first row, parameter of the model)
    for name, source in sources.items():
        pieces[source.parameter].append((source.start, name))
    for ours, named in pieces.items():
        parts = [theirs[name] for _, name in sorted(named)]
        whole = parts[0].data if len(parts) == 1 else torch.cat([part.data for part in parts])
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = rows
        owner, _, leaf = ours.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(whole, requires_grad=False))
    decoder.inv_freq = rope_frequencies(config).to(whole.device)
    return decoder.eval()


def shares_weights(decoder: Decoder, model: "PreTrainedModel") -> bool:
    """Whether every parameter of the model still lies where the Decoder reads it."""
    ours, theirs = dict(decoder.named_parameters()), dict(model.named_parameters())
    return all(
        name in theirs and theirs[name].data_ptr() == source.of(ours).data_ptr() and theirs[name].dtype == ours[source.parameter].dtype
        for name, source in hf_tensors(decoder.config).items()
    )
