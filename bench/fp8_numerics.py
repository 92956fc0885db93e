"""What FP8 experts cost in accuracy: a small mixture of experts, trained from the same weights on the same documents in each mode.

    OMP_NUM_THREADS=1 python bench/fp8_numerics.py [--documents language] [--steps 500] [--seed 0 ...] [--draws N] [--modes dgrad ...] [--json FILE]

On a CPU the products quantise and dequantise as the kernels do (their references); on CUDA they are the kernels.  `disturbed` is a second run without
FP8 whose first weights differ by one part in a million: how far two runs drift apart on their own.  Loss: nats per token on documents that no run
has trained on, each model in its own numerics, the weights that were trained without FP8 also in FP8 (held_out_in_fp8), and the mean of the last 50
training steps.  Where the loss falls steeply two runs are far apart whatever made them differ: a difference says something about FP8 only where
`disturbed` is well below it.  So the loss is compared on documents in which models learn evenly (`--documents language`, `fp8_language`), with a
learning rate that ends at 0; `fp8_loss` puts several seeds together.  The arithmetic of the recipe `tiny` has steep falls, and `--documents falling`
is a language with one, for which there are controls with noise of FP8's size (`noise`, `noise_wgrad`: `fp8_products`) and several runs of each kind:
run n > 0 of `--draws` begins from weights that are 2^-9 apart, a rounding to bf16, the same for all modes.

SQNR in dB = 10 log10(sum |exact|^2 / sum |exact - quantised|^2), on the model that was trained without FP8, for the operands of its experts' products
and for the experts' weight gradients of one batch: with the experts that it chooses (a choice that flips is part of the error), and with these held
fixed (the numerics of the products alone).
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fp8_language import Falling, Language
from fp8_products import Noisy, Watched
from torch import Tensor

from athanor.batch import PackedBatch, pack
from athanor.config import ModelConfig, OptimizerConfig, SFTConfig
from athanor.kernels.fp8_quantize import dequantize, fp8_quantize
from athanor.model.moe import Routes, mixtures, use_fp8_
from athanor.model.transformer import Decoder
from athanor.optim import Optimizer, learning_rate
from athanor.parallel import Ranks
from athanor.stages.routing import RouterBalance
from athanor.stages.training import completion_logprobs, cross_entropy_step
from athanor.tasks.arithmetic import ArithmeticTask
from athanor.tokenizer import symbol_tokenizer

SHAPE = dict(
    architecture="deepseek_v3", hidden_size=128, num_attention_heads=4, intermediate_size=256, num_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=128, n_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True, first_k_dense_replace=1,
    q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
)  # fmt: skip
HELD_OUT, TAIL, PIECE = 512, 50, 10  # documents; steps of the last mean; steps for each number of a curve
MODES = {"off": "off", "disturbed": "off", "dgrad": "dgrad", "wgrad": "wgrad", "noise": "off", "noise_wgrad": "off"}


def sqnr(exact: list[Tensor], quantised: list[Tensor]) -> float:
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(exact, quantised, strict=True))
    return 10 * math.log10(sum(float(a.double().square().sum()) for a in exact) / noise) if noise else math.inf


class Arithmetic:
    """Documents of the task, by number."""

    num_layers, per_step, final_lr_ratio = 3, 64, 0.1

    def __init__(self, seed: int, device: torch.device):
        self.task, self.device = ArithmeticTask(), device
        self.tokenizer = symbol_tokenizer(list(self.task.symbols))
        self.vocab_size = self.tokenizer.vocab_size

    def batches(self, first: int, count: int) -> list[PackedBatch]:
        pairs = [self.task.corpus(first + i) for i in range(count)]
        texts = [np.array(ids + [self.tokenizer.eos_id], np.int64) for ids in self.tokenizer.encode_batch([text for _, text in pairs])]
        return pack([np.array(self.tokenizer.encode_prompt(prompt), np.int64) for prompt, _ in pairs], texts, 4096, self.device)


DOCUMENTS = {"arithmetic": Arithmetic, "language": Language, "falling": Falling}


def train(mode: str, seed: int, draw: int, arguments: argparse.Namespace, documents, ranks: Ranks) -> tuple[Decoder, dict]:
    config = SFTConfig(kind="sft", data=["x"], init="x", steps=arguments.steps,
                       optimizer=OptimizerConfig(lr=arguments.lr, warmup_steps=20, schedule="cosine", weight_decay=0.01,
                                                 final_lr_ratio=documents.final_lr_ratio))  # fmt: skip
    shape = SHAPE | {"num_hidden_layers": documents.num_layers, "vocab_size": documents.vocab_size}
    model = Decoder(ModelConfig(**shape)).initialize_(seed).to(documents.device)
    if mode == "disturbed" or draw:
        generator = torch.Generator().manual_seed(draw or 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + (2**-9 if draw else 1e-6) * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    use_fp8_(model, MODES[mode])
    for moe in mixtures(model) if mode.startswith("noise") else ():
        moe.fp8 = Noisy(wgrad=mode == "noise_wgrad", seed=draw)
    optimizer, losses, start = Optimizer(model, config.optimizer, ranks), [], time.perf_counter()
    for step in range(arguments.steps):
        batches, balance = documents.batches(step * documents.per_step, documents.per_step), RouterBalance(model, config, ranks)
        rate = learning_rate(config.optimizer, step, config.steps)
        loss = cross_entropy_step(model, optimizer, [batches], sum(b.num_targets for b in batches), rate, balance)["loss"]
        balance.finish()
        losses.append(loss)
        if (step + 1) % 100 == 0:
            print(f"{mode}: step {step + 1}, loss {loss:.4f}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    held_out = documents.batches(arguments.steps * documents.per_step, HELD_OUT)
    curve = [round(float(np.mean(losses[i : i + PIECE])), 5) for i in range(0, len(losses), PIECE)]
    figures = {"held_out": held_out_loss(model, held_out), "last_steps": float(np.mean(losses[-TAIL:])), "curve": curve,
               "copies_per_step": max((w.num_made for m in mixtures(model) if m.fp8 for w in m.fp8.weights.values()), default=0) / arguments.steps}
    if mode == "off":
        figures["held_out_in_fp8"] = held_out_loss(use_fp8_(copy.deepcopy(model), "dgrad"), held_out)
        without = copy.deepcopy(model)
        for moe in mixtures(without):
            moe.routed = lambda x, ids, weights: torch.zeros_like(x)
        figures["held_out_without_experts"] = held_out_loss(without, held_out)  # whether they matter at all
    return model, figures


@torch.no_grad()
def held_out_loss(model: Decoder, batches: list[PackedBatch]) -> float:
    total = sum(float(completion_logprobs(model, batch).logps.double().sum()) for batch in batches)
    return -total / sum(batch.num_targets for batch in batches)


def gradients(model: Decoder, mode: str, batch: PackedBatch, replay: Tensor | None) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Weight gradients by kind of parameter, and the experts that were chosen."""
    model = use_fp8_(copy.deepcopy(model), mode)
    routes = Routes(replay)
    (-completion_logprobs(model, batch, routes=routes).logps.sum() / batch.num_targets).backward()
    experts = [p for m in mixtures(model) for p in (m.gate_up_proj, m.down_proj)]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not e for e in experts)]
    return {"experts": [p.grad for p in experts], "others": [p.grad for p in others]}, torch.stack(routes.ids)


def quality(model: Decoder, batch: PackedBatch) -> dict:
    """SQNR of every kind of tensor."""
    watched = use_fp8_(copy.deepcopy(model), "off")
    for moe in mixtures(watched):
        moe.fp8 = Watched()
    (-completion_logprobs(watched, batch).logps.sum() / batch.num_targets).backward()
    kinds = {"activations, 1 x 128": ("activations", (1, 128)), "activations, 128 x 1": ("activations", (128, 1)),
             "weights, 128 x 128": ("weights", (128, 128)), "gradients, 1 x 128": ("gradients", (1, 128)),
             "gradients, 128 x 1": ("gradients", (128, 1))}  # fmt: skip
    found = {}
    for kind, (name, block) in kinds.items():
        tensors = [t for moe in mixtures(watched) for t in moe.fp8.kept[name]]
        found[kind] = sqnr(tensors, [dequantize(fp8_quantize(t, block=block), block) for t in tensors])
    exact, ids = gradients(model, "off", batch, None)
    for mode in ("dgrad", "wgrad"):
        for held, replay in (("routes fixed", ids), ("routes free", None)):
            quantised, chosen = gradients(model, mode, batch, replay)
            for part in exact:
                found[f"weight gradient of {part}, {mode}, {held}"] = sqnr(exact[part], quantised[part])
            if replay is None:
                found[f"routes that differ, {mode}"] = float((ids.sort(2).values != chosen.sort(2).values).any(2).double().mean())
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps (default 500)")
    p.add_argument("--documents", choices=DOCUMENTS, default="arithmetic", help="what is learned (default arithmetic)")
    p.add_argument("--seed", type=int, nargs="+", default=[0], metavar="S", help="of weights and language, one after the other (default 0)")
    p.add_argument("--draws", type=int, default=1, metavar="N", help="runs of each mode and seed (default 1)")
    p.add_argument("--lr", type=float, default=2e-3, metavar="LR", help="peak of the learning rate (default 2e-3)")
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES)[:4], help="default: all but the noise")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--json", type=Path, metavar="FILE", help="append the figures, one line for each run")
    arguments = p.parse_args()
    ranks = Ranks(arguments.device, threads=torch.get_num_threads())  # as OMP_NUM_THREADS has them
    for seed in arguments.seed:
        documents, exact = DOCUMENTS[arguments.documents](seed, ranks.device), None
        modes = sorted(arguments.modes, key=lambda mode: mode != "off")  # the first is what the others are compared with
        for draw, mode in ((draw, mode) for draw in range(arguments.draws) for mode in modes):
            model, figures = train(mode, seed, draw, arguments, documents, ranks)
            exact = figures if mode == "off" else exact
            relative = "  ".join(f"{name} {figures[name] / exact[name] - 1:+.3%}" for name in ("held_out", "last_steps")) if exact else "off not run"
            numbers = "  ".join(f"{name} {value:.5g}" for name, value in figures.items() if name != "curve")
            print(f"seed {seed}, {draw}, {mode:11} {numbers}  relative: {relative}", flush=True)
            if mode == "off" and draw == 0:
                figures["sqnr_db"] = quality(model, documents.batches(arguments.steps * documents.per_step + HELD_OUT, 64)[0])
                if isinstance(documents, Language):
                    figures["best_loss"] = documents.best_loss(arguments.steps * documents.per_step, HELD_OUT)
                for kind, value in figures["sqnr_db"].items():
                    print(f"{kind:60} {value:.2%}" if kind.startswith("routes") else f"{kind:60} {value:.1f} dB", flush=True)
            if arguments.json:
                settings = {name: getattr(arguments, name) for name in ("documents", "steps", "lr", "device")}
                with arguments.json.open("a") as file:
                    file.write(json.dumps({"seed": seed, "draw": draw, "mode": mode, **settings, "torch": torch.__version__, **figures}) + "\n")


if __name__ == "__main__":
    main()
