"""Generation with explicit groups, continuous batching and log-probs that come from the trainer's own forward.

A request is a prompt with n samples: the prompt is prefilled once, its members share its full KV blocks and decode in rows of their own.  Rows that
finish make room at once.  Every random number is a function of (sample seed, token index), so a sample does not depend on its neighbours, on the
order, on refills and pauses, or on being aborted and resumed.

    generator = Generator(model, tokenizer.eos_ids, tokenizer=tokenizer)
    for request, member, completion in generator.stream(requests, SamplingConfig(max_tokens=512)):
        ...                                    # while the others decode

Of a model that is split over ranks (tensor_parallel.py) each of them has a generator, makes the same calls and gets the same samples.

`stream` runs it, `_host.Scheduler` decides on samples, rows and blocks, `decode` holds the device's part.  `python -m athanor.generate` is the
command line.
"""

import os
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from athanor.config import SamplingConfig, SpeculationConfig
from athanor.decode import DecodeRows
from athanor.errors import UserError
from athanor.kv_cache import PagedKVCache
from athanor.model.moe import refresh_fp8_, routers
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks
from athanor.samples import Completion, Request
from athanor.stream import Stream
from athanor.tokenizer import Tokenizer


class Generator:
    """Decode with `model` as it is now: weights are read, never copied, so an optimizer step needs no synchronisation.

    max_rows: samples that decode at once.  kv_tokens: size of the KV pool; default what the requests need, within half of the free memory on a CPU
    and 85 % of it on CUDA.  policy: "reserve" admits a group when its worst case fits, "pause" by expected length; a row that finds no block then
    waits with its KV.  max_prefill_tokens: prompt tokens that run at a time; a longer prompt goes in pieces, with a window of the others between two.
    fused_sampling: draw with `linear_sample`, which needs no logits and takes no top_k, top_p or min_p; a seed then gives other tokens than without.
    window: steps between two looks of the host, default 1 on a CPU and 8 on CUDA, where a sample that has ended idles for half of it on average, and
    for the windows ahead.
    ahead: windows that are launched before the host has read one, default 0 on a CPU and 1 on CUDA.  The device then does not wait for the host, and
    what the host decides (a stop string, a refill, an abort, new weights) takes effect so many windows later.  The samples are the same.
    tokenizer: needed for stop strings alone.
    record_routes: completions say which experts each token went to (`Completion.routes`), at 2 bytes per token, sparse layer and choice.
    speculation: draft tokens where few samples decode and check several at a time, which gives the same samples; see `speculation.py`.  `drafting`
    counts the forwards of a sample that had drafts, and the tokens that they gave.
    `timings` adds up seconds: prefill_s, forward_s (on CUDA the whole step), sample_s, host_s; `num_prefill_tokens` counts what prefills ran over;
    `dispatched` adds up what `dispatch.Dispatch` says.
    """

    def __init__(
        self,
        model: Decoder,
        eos_ids: set[int] | frozenset[int],
        *,
        tokenizer: Tokenizer | None = None,
        max_rows: int = 512,
        kv_tokens: int | None = None,
        block_size: int | None = None,
        policy: str = "reserve",
        max_prefill_tokens: int = 16384,
        fused_sampling: bool = False,
        window: int | None = None,
        ahead: int | None = None,
        record_routes: bool = False,
        speculation: SpeculationConfig = SpeculationConfig(),
    ):
        if not eos_ids:
            raise ValueError("Generator: eos_ids is empty, wanted at least one token id that ends a sample")
        on_cpu = model.embed.weight.device.type == "cpu"
        window = (1 if on_cpu else 8) if window is None else window
        ahead = (0 if on_cpu else 1) if ahead is None else ahead
        numbers = {"max_rows": (max_rows, 1), "max_prefill_tokens": (max_prefill_tokens, 1), "window": (window, 1), "ahead": (ahead, 0)}
        for name, (value, least) in numbers.items():
            if value < least:
                raise ValueError(f"Generator: {name} is {value}, wanted at least {least}")
        self.model, self.eos_ids, self.tokenizer = model, frozenset(eos_ids), tokenizer
        self.device, self.dtype = model.embed.weight.device, model.embed.weight.dtype
        if record_routes and not routers(model):
            raise ValueError("Generator: record_routes is true, but the model has no experts")
        if speculation.tokens and speculation.draft == "mtp" and model.mtp is None:
            raise UserError("Generator: speculation.draft is mtp, but the model has no layer for multi-token prediction; wanted ngram")
        self.speculation, self.drafting = speculation, {"forwards": 0, "tokens": 0}
        self.num_layers = model.config.num_hidden_layers + (speculation.tokens > 0 and speculation.draft == "mtp")  # with keys and values
        self.peers: Ranks | None = getattr(model, "ranks", None)  # those that have the other parts of the model
        if fused_sampling and self.peers:
            raise ValueError("Generator: fused_sampling is true, but the model's head is split over ranks; wanted false")
        self.fused_sampling, self.record_routes = fused_sampling, record_routes
        self.max_rows, self.kv_tokens, self.policy, self.max_prefill_tokens = max_rows, kv_tokens, policy, max_prefill_tokens
        self.block_size, self.window, self.ahead = block_size or (16 if on_cpu else 64), window, ahead
        self.timings = dict.fromkeys(("prefill_s", "forward_s", "sample_s", "host_s"), 0.0)
        self.dispatched = {"busy_s": 0.0, "wall_s": 0.0, "handed_over": 0}
        self.num_prefill_tokens = 0
        self.cache: PagedKVCache | None = None
        self.rows: DecodeRows | None = None
        self._parameters, self._addresses = list(model.parameters()), []
        self._seen, self._version = self._weights(), 0
        self.running = lambda: None  # the open stream, by weak reference

    @property
    def version(self) -> int:
        """How often the weights were found changed since this generator was made."""
        if (seen := self._weights()) != self._seen:
            self._seen, self._version = seen, self._version + 1
        return self._version

    def _weights(self) -> int:
        return sum(parameter._version for parameter in self._parameters)  # in-place writes, see `optim`

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig = SamplingConfig(),
        progress: Callable[[int, int], None] | None = None,
        *,
        full_logps: bool = False,
    ) -> list[list[Completion]]:
        """Sample every request; the result has the requests' order and, within one, the seeds' order.

        `progress(done, total)` is called as samples finish.  Raises ValueError as `stream` does.
        """
        results: list[list] = [[None] * len(request.seeds) for request in requests]
        done, total = 0, sum(map(len, results))
        with self.stream(requests, sampling, full_logps=full_logps) as stream:
            for request, member, completion in stream:
                results[request][member] = completion
                done += 1
                if progress:
                    progress(done, total)
        return results

    def stream(
        self, requests: Sequence[Request], sampling: SamplingConfig = SamplingConfig(), *, full_logps: bool = False, on_demand: bool = False,
        max_rows: int | None = None,
    ) -> "Stream":  # fmt: skip
        """Iterate over samples in the order in which they finish.

        on_demand: decode what its `submit` names, samples of these requests, and be read by `step` until it is closed.  max_rows: fewer than the
        generator's.

        When the weights change between two steps, the KV of all running samples is dropped and computed again with the new ones; their tokens stay,
        those of windows that were launched before the change included.
        Raises ValueError for an empty prompt, a group larger than max_rows, a prompt that leaves no room below max_position_embeddings or in the KV
        pool, a parameter out of range, or while another stream of this generator is open.
        """
        if self.running() is not None:
            raise ValueError("Generator: another stream is open; read it to its end or close() it")
        stream = Stream(self, list(requests), sampling, full_logps, on_demand, max_rows)
        self.running = weakref.ref(stream)
        return stream

    def check(self, i: int, request: Request, sampling: SamplingConfig) -> None:
        limit = self.model.config.max_position_embeddings
        if not len(request.prompt_ids):
            raise ValueError(f"generate: request {i} has an empty prompt, wanted at least one token")
        low, high = int(np.min(request.prompt_ids)), int(np.max(request.prompt_ids))
        if low < 0 or high >= self.model.config.vocab_size:
            raise ValueError(f"generate: request {i} has prompt tokens from {low} to {high}, wanted [0, {self.model.config.vocab_size})")
        if len(request.seeds) > self.max_rows:
            raise ValueError(f"generate: request {i} has {len(request.seeds)} samples, more than max_rows = {self.max_rows}")
        if len(request.prompt_ids) + sampling.max_tokens > limit:
            raise ValueError(
                f"generate: request {i} has {len(request.prompt_ids)} prompt tokens and max_tokens is {sampling.max_tokens}, "
                f"more than max_position_embeddings = {limit}"
            )
        if self.fused_sampling and (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
            filters = f"top_k {sampling.top_k}, top_p {sampling.top_p}, min_p {sampling.min_p}"
            raise ValueError(f"generate: request {i} has {filters}, wanted none of them with fused_sampling")
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"generate: request {i} has stop strings, which need Generator(tokenizer=...)")
        if request.eos_ids is not None and not request.eos_ids:
            raise ValueError(f"generate: request {i} has empty eos_ids, wanted at least one token id or None")
        partial = request.partial
        if partial is None:
            return
        if len(partial) != len(request.seeds):
            raise ValueError(f"generate: request {i} has {len(partial)} partial samples and {len(request.seeds)} seeds, wanted as many")
        for member, sample in enumerate(partial):
            if sample is not None and (sample.finish != "abort" or len(sample.token_ids) >= sampling.max_tokens):
                raise ValueError(
                    f"generate: partial sample {member} of request {i} has finish {sample.finish!r} and {len(sample.token_ids)} tokens; "
                    f"wanted 'abort' and fewer than max_tokens = {sampling.max_tokens}"
                )

    def reserve(
        self, num_blocks: int, num_rows: int, max_blocks: int, num_eos: int, records: tuple[str, ...], texts: tuple[int, int]
    ) -> DecodeRows:
        """Cache and rows of at least that size for a stream; what is there is kept where it is large enough, with its captured graphs."""
        refresh_fp8_(self.model)
        if self.cache is None or self.cache.num_blocks < num_blocks:
            self.cache = self.rows = None  # free the old pool first
            self.cache = PagedKVCache(self.model.own_config, self.num_layers, num_blocks, self.block_size, self.dtype, self.device)
        self._parameters = list(self.model.parameters())
        addresses = [parameter.data_ptr() for parameter in self._parameters]
        if addresses != self._addresses:  # captured steps read the old ones
            self.rows, self._addresses = None, addresses
        if self.rows is None or not self.rows.holds(num_rows, max_blocks, num_eos, records, texts):
            self.rows = None
            options = {"window": self.window, "ahead": self.ahead, "fused": self.fused_sampling, "seconds": self.timings}
            options |= {"speculation": self.speculation, "texts": texts}
            self.rows = DecodeRows(self.model, self.cache, num_rows, max_blocks, num_eos, records, **options)
        return self.rows

    def pool_blocks(self, wanted: int) -> int:
        """Blocks of the KV pool: `wanted` of them and up to an eighth more, or what kv_tokens or the memory allow.

        More, so that the pool stays where it is when a later step wants a little more than all before.
        """
        if self.kv_tokens is not None:
            return max(1, self.kv_tokens // self.block_size)
        if self.device.type == "cpu":
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        else:
            free = int(0.85 * torch.cuda.mem_get_info(self.device)[0])
        have = self.cache.num_blocks if self.cache else 0
        unit = 2 ** max(0, wanted.bit_length() - 4)
        roomy = -(-wanted // unit) * unit
        token_bytes = PagedKVCache.bytes_per_token(self.model.own_config, self.num_layers, self.dtype, self.device)
        blocks = have + free // (self.block_size * token_bytes)
        if self.peers:  # the scheduler decides by it, and must decide the same everywhere
            blocks = -self.peers.max_int(-blocks)
        return max(1, min(roomy, blocks))
