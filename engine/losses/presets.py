"""The presets of the GRPO family.  Seven systems ship seven objectives under the name GRPO, so a run prints the formula it resolved to.

grpo          DeepSeekMath (arXiv 2402.03300): group std, clip 0.2, mean over each sequence then over sequences, k3 KL with beta 0.04
r1            DeepSeek-R1 (Nature 645, 633): the same with clip 10 and beta 0.001; the reference model is renewed every 400 steps
dapo          arXiv 2503.14476: clip 0.2 / 0.28, mean over the tokens of the step, no KL, groups without contrast are drawn again
dr_grpo       arXiv 2503.20783: no division by std nor by length, a constant denominator (needs max_tokens), no KL
gspo          arXiv 2507.18071: sequence ratio, clip 3e-4 / 4e-4
cispo         MiniMax-M1 (arXiv 2506.13585): clipped weight on the log-prob, no lower bound, r at most 5 (TRL's recommended value)
rloo          arXiv 2402.14740: leave-one-out baseline, REINFORCE per sequence (summed over its tokens), no clip
reinforce_pp  REINFORCE++-baseline (arXiv 2501.03262): group mean as baseline, then whitened over the tokens of the batch, PPO clip, k2 KL
"""

from dataclasses import dataclass, field, fields, replace

from athanor.errors import UserError
from athanor.kernels import LossVariant
from athanor.kernels._dispatch import near_misses
from athanor.kernels.group_advantage import BASELINES, SCALES


@dataclass(frozen=True)
class Preset:
    """A loss with everything around it that its paper prescribes.  Frozen; checked when built."""

    name: str
    variant: LossVariant = field(default_factory=LossVariant)
    scale: str = "std"  # what the group advantage is divided by: std, none, batch
    baseline: str = "mean"  # mean or leave_one_out
    eps: float = 1e-6  # added to the standard deviation
    whiten: bool = False  # whiten the advantages over the tokens of the batch (REINFORCE++)
    dynamic_sampling: bool = False  # draw again the groups whose rewards are all equal (DAPO)
    reference_interval: int | None = None  # steps after which the reference becomes a copy of the policy (R1: 400); None = never

    def __post_init__(self):
        for name, known in (("scale", SCALES), ("baseline", BASELINES)):
            if getattr(self, name) not in known:
                raise UserError(f"loss {self.name}: {name} is {getattr(self, name)!r}; {near_misses(getattr(self, name), known)}")
        if self.eps < 0:
            raise UserError(f"loss {self.name}: eps is {self.eps}; wanted >= 0")
        if self.reference_interval is not None and self.reference_interval < 1:
            raise UserError(f"loss {self.name}: reference_interval is {self.reference_interval}; wanted >= 1, or None for a fixed reference")
        if self.reference_interval is not None and self.variant.kl == "none":
            raise UserError(f"loss {self.name}: reference_interval is {self.reference_interval}, but without KL there is no reference model")


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("grpo", LossVariant(aggregation="sequence_mean", kl="k3", beta=0.04)),
        Preset("r1", LossVariant(clip_low=10.0, clip_high=10.0, aggregation="sequence_mean", kl="k3", beta=0.001), reference_interval=400),
        Preset("dapo", LossVariant(clip_low=0.2, clip_high=0.28), dynamic_sampling=True),
        # max_tokens 1 stands for "must be given" here, resolve_preset insists; in rloo it is meant: the sum over a sequence's tokens
        Preset("dr_grpo", LossVariant(aggregation="constant", max_tokens=1), scale="none"),
        Preset("gspo", LossVariant(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean")),
        Preset("cispo", LossVariant(surrogate="cispo", clip_low=1.0, clip_high=4.0)),
        Preset("rloo", LossVariant(surrogate="reinforce", aggregation="constant", max_tokens=1), scale="none", baseline="leave_one_out"),
        Preset("reinforce_pp", LossVariant(kl="k2", beta=0.001), scale="none", whiten=True),
    )
}

_VARIANT_KEYS = tuple(f.name for f in fields(LossVariant))
_PRESET_KEYS = tuple(f.name for f in fields(Preset) if f.name not in ("name", "variant"))


def resolve_preset(name: str, **overrides) -> Preset:
    """Look up a preset and replace single settings of it.

    overrides: any field of LossVariant or of Preset; None = keep the preset's.  A new surrogate, aggregation or correction, or kl="none" or
    beta=0, also drops the preset's numbers that only the old one used.  Raises UserError on an unknown name or key and on a contradiction.
    """
    if name not in PRESETS:
        raise UserError(f"loss: unknown preset {name!r}; {near_misses(name, PRESETS)}")
    preset = PRESETS[name]
    for key in overrides:
        if key not in _VARIANT_KEYS and key not in _PRESET_KEYS:
            raise UserError(f"loss {name}: unknown setting {key!r}; {near_misses(key, _VARIANT_KEYS + _PRESET_KEYS)}")
    given = {key: value for key, value in overrides.items() if value is not None}
    if name == "dr_grpo" and given.get("aggregation", "constant") == "constant" and "max_tokens" not in given:
        raise UserError("loss dr_grpo: max_tokens is missing; wanted the completion limit, the constant that every sequence is divided by")
    variant = {key: getattr(preset.variant, key) for key in _VARIANT_KEYS} | {key: given[key] for key in given if key in _VARIANT_KEYS}
    own = {key: given[key] for key in given if key in _PRESET_KEYS}
    for choice, value, number in (
        ("surrogate", "dual_clip", "dual_clip"),
        ("surrogate", "two_sided", "delta"),
        ("aggregation", "constant", "max_tokens"),
    ):
        if variant[choice] != value and number not in given:
            variant[number] = None
    if "correction" in given:
        variant |= {key: default for key, default in (("correction_low", 0.0), ("correction_high", None)) if key not in given}
    if given.get("kl") == "none" and "beta" not in given:
        variant["beta"] = 0.0
    if given.get("beta") == 0 and "kl" not in given:
        variant["kl"] = "none"
    if given.get("beta") and variant["kl"] == "none" and "kl" not in given:
        variant["kl"] = "k3"
    if variant["kl"] == "none" and "reference_interval" not in given:
        own["reference_interval"] = None
    try:
        return replace(preset, variant=LossVariant(**variant), **own)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"loss {name}: {error}") from None


def formula(preset: Preset) -> str:
    """Write the complete objective on one line, every constant filled in, for the run card."""
    v = preset.variant
    lo, hi = f"{max(0.0, 1 - v.clip_low):g}", f"{1 + v.clip_high:g}"
    advantage = "r_i - mean_{j in group, j != i}(r_j)" if preset.baseline == "leave_one_out" else "r_i - mean_group(r)"
    if preset.scale != "none":
        advantage = f"({advantage}) / (std_{'group' if preset.scale == 'std' else 'batch'}(r) + {preset.eps:g})"
    if preset.whiten:
        advantage = f"whiten_tokens({advantage})"
    ratio = {"token": "exp(logp - old)", "sequence": "exp(mean_seq(logp - old))", "sequence_token": "exp(logp - sg(logp) + sg(mean_seq(logp - old)))"}
    clipped = f"clip(rho, {lo}, {hi})"
    surrogate = {
        "clip": f"-min(rho A, {clipped} A)",
        "dual_clip": f"[A >= 0: -min(rho A, {clipped} A); A < 0: min(-min(rho A, {clipped} A), -{v.dual_clip} A)]",
        "two_sided": f"-min(min(rho, {v.delta}) A, {clipped} A)",
        "cispo": f"-sg({clipped}) A logp",
        "sapo": f"-(4/tau) sigmoid(tau (rho - 1)) A, tau = {v.tau_positive:g} if A > 0 else {v.tau_negative:g}",
        "reinforce": "-A logp",
    }[v.surrogate]
    bounds = f"{v.correction_low:g}", f"{v.correction_high or 0:g}"
    weight = {
        "none": "",
        "tis": f"min(exp(old - rollout), {bounds[1]}) * ",
        "token_mask": f"w 1[{bounds[0]} <= w <= {bounds[1]}] * ",
        "sequence_mask": f"W 1[{bounds[0]} <= W <= {bounds[1]}] * ",
    }[v.correction]
    kl = {"none": "", "k1": "(logp - ref)", "k2": "(logp - ref)^2 / 2", "k3": "(exp(ref - logp) - (ref - logp) - 1)"}[v.kl]
    mean = {
        "token_mean": "sum_tokens / num_tokens of the step",
        "sequence_mean": "mean over sequences of the mean over tokens",
        "constant": f"sum_tokens / (num_sequences of the step * {v.max_tokens})",
    }[v.aggregation]
    parts = [f"loss = {mean} of {weight}{surrogate}" + (f" + {v.beta:g} * {kl}" if kl else ""), f"A = {advantage}"]
    if v.surrogate != "reinforce":
        parts.append(f"rho = {ratio[v.ratio]}")
    if v.correction == "token_mask":
        parts.append("w = exp(old - rollout)")
    if v.correction == "sequence_mask":
        parts.append("W = exp(sum_seq(old - rollout))")
    if preset.dynamic_sampling:
        parts.append("groups without contrast are drawn again")
    if preset.reference_interval:
        parts.append(f"ref = policy every {preset.reference_interval} steps")
    return f"{preset.name}: " + "; ".join(parts)
