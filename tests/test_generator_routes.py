"""What the sampler records of its routers against a forward over the finished sequence, however the sample came about."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor.config import SamplingConfig
from athanor.generator import Generator
from athanor.kernels import strict_mode
from athanor.model.moe import Routes, routers
from athanor.model.transformer import PackedAttention, fill_tokens
from athanor.samples import Request

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, random_decoder  # noqa: E402

EOS, NEVER = 1, 999  # the second is outside of the vocabulary
NAMES = ["qwen3_moe_unnormalised_some_dense_untied", "deepseek_v3"]


pytestmark = pytest.mark.usefixtures("threads")


def requests(num=4, samples=3, longest=30):
    rng = np.random.default_rng(0)
    return [Request(rng.integers(2, 67, size=rng.integers(1, longest)), rng.integers(0, 2**62, size=samples)) for _ in range(num)]


@torch.no_grad()
def routed(model, tokens) -> np.ndarray:
    """(n, L, k): the experts of each token, in a forward of its own."""
    ids, n = torch.from_numpy(tokens), len(tokens)
    routes, filled = Routes(), fill_tokens(ids, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
    model(filled[0], filled[1], PackedAttention(filled[2]), routes)
    return torch.stack(routes.ids)[:, :n].transpose(0, 1).numpy()


def check(model, request, completion):
    prompt, own = completion.routes
    assert prompt.dtype == own.dtype == np.int16 and len(prompt) == len(request.prompt_ids) and len(own) == len(completion.token_ids)
    want = routed(model, np.concatenate((request.prompt_ids, completion.token_ids[:-1])))
    assert prompt.shape[1:] == want.shape[1:] == (len(routers(model)), model.config.num_experts_per_tok)
    assert np.array_equal(np.concatenate((prompt, own[1:])), want) and np.array_equal(own[0], prompt[-1])


OPTIONS = [
    {},
    {"max_rows": 3},  # refills
    {"max_prefill_tokens": 7},  # prompts in pieces
    {"window": 3, "ahead": 1, "max_rows": 5},
    {"policy": "pause", "kv_tokens": 96, "max_rows": 8, "block_size": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_recorded_experts_are_those_of_a_forward_over_the_sequence(name, options):
    model, asked = random_decoder(FAMILIES[name]), requests()
    groups = Generator(model, {EOS}, record_routes=True, **options).generate(asked, SamplingConfig(max_tokens=14))
    plain = Generator(model, {EOS}, **options).generate(asked, SamplingConfig(max_tokens=14))
    for request, group, others in zip(asked, groups, plain, strict=True):
        for completion, other in zip(group, others, strict=True):
            check(model, request, completion)
            assert np.array_equal(completion.token_ids, other.token_ids) and np.array_equal(completion.logps, other.logps) and other.routes is None


@pytest.mark.parametrize("name", NAMES)
def test_an_aborted_sample_goes_on_with_its_experts(name):
    model, (request,) = random_decoder(FAMILIES[name]), requests(num=1, samples=4)
    sampling = SamplingConfig(max_tokens=16)
    with Generator(model, {NEVER}, record_routes=True).stream([request], sampling) as stream:
        for _ in range(5):
            stream.step()
        stream.abort()
        partial = sorted(stream, key=lambda finished: finished.member)
    assert all(f.completion.finish == "abort" and 0 < len(f.completion.token_ids) < 16 for f in partial)
    resumed = Request(request.prompt_ids, request.seeds, partial=[f.completion for f in partial])
    for completion in Generator(model, {NEVER}, record_routes=True, max_rows=4).generate([resumed], sampling)[0]:
        check(model, request, completion)
    with pytest.raises(ValueError, match="a partial sample has no routes"):
        cut = [type(f.completion)(**{**f.completion.__dict__, "routes": None}) for f in partial]
        Generator(model, {NEVER}, record_routes=True).generate([Request(request.prompt_ids, request.seeds, partial=cut)], sampling)


def test_new_weights_record_what_they_choose():
    model, (request,) = random_decoder(FAMILIES["deepseek_v3"]), requests(num=1)
    with Generator(model, {NEVER}, record_routes=True).stream([request], SamplingConfig(max_tokens=12)) as stream:
        for _ in range(4):
            stream.step()
        old = [routed(model, np.concatenate((request.prompt_ids, stream.tokens_of(0, m)[:-1])))[len(request.prompt_ids) :] for m in range(3)]
        with torch.no_grad():
            for router in routers(model):
                router.weight.neg_()
        done = sorted(stream, key=lambda finished: finished.member)
    for before, (_, _, c) in zip(old, done, strict=True):
        new = routed(model, np.concatenate((request.prompt_ids, c.token_ids[:-1])))
        first = int((c.versions == 0).sum())
        assert 1 < first < 12 and np.array_equal(c.routes[0], new[: len(request.prompt_ids)])
        assert np.array_equal(c.routes[1][1:first], before[: first - 1])
        assert np.array_equal(c.routes[1][first:], new[len(request.prompt_ids) + first - 1 :])
        assert not np.array_equal(before, new[len(request.prompt_ids) :][: len(before)])


@pytest.mark.gpu
def test_recorded_experts_replay_without_disagreement_in_strict_mode_on_cuda():
    config = FAMILIES["qwen3_moe"].model_copy(update={"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128})
    model, asked = random_decoder(config).to("cuda", torch.bfloat16), requests(num=8)
    with strict_mode(), torch.no_grad():
        groups = Generator(model, {EOS}, max_rows=20, record_routes=True).generate(asked, SamplingConfig(max_tokens=24))
        for request, group in zip(asked, groups, strict=True):
            for c in group:
                replay = torch.from_numpy(np.concatenate((c.routes[0], c.routes[1][1:]))).to("cuda", torch.int32).transpose(0, 1).contiguous()
                tokens = torch.from_numpy(np.concatenate((request.prompt_ids, c.token_ids[:-1])))
                n = len(tokens)
                filled = fill_tokens(tokens, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
                ids, positions, cu_seqlens = (t.cuda() for t in filled)
                routes = Routes(replay=replay)
                model(ids, positions, PackedAttention(cu_seqlens), routes)
                assert replay.shape == (3, n, 2) and float(routes.disagreement) == 0 and bool((replay >= 0).all())
