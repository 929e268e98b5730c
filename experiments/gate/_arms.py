"""The arms: optimizers that differ in the gate alone. All take learning rate and weight decay from the same grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import optax

from experiments.gate._controls import grokfast_ema, norm_of, random_mask
from transforms import (
    Alpha,
    HardMask,
    OpenShare,
    SnrMask,
    SoftMask,
    TStatistic,
    adam_statistic,
    algorithm_1,
    batch_statistic,
    ema_statistic,
    poprisk_adamw,
    poprisk_gate,
    popriskmin,
    snr_grad,
)


class Hyper(NamedTuple):
    """What is swept, traced: one compiled step serves a whole grid."""

    learning_rate: Any
    weight_decay: Any
    seed: Any


class Setting(NamedTuple):
    """What a problem fixes for all arms: steps, Adam's b2, and b/(n − b) where batches are redrawn from n examples."""

    num_steps: int
    b2: float = 0.999
    data_noise: float = 0.0


@dataclass(frozen=True)
class Arm:
    """An optimizer, by its name in tables.

    Attributes:
      title: for tables and figures.
      build: from hyper-parameters and the problem's setting.
      family: "plain", "published", "step", "before", "around", "control" or "other".
      exact: needs the moments of the batch's per-example gradients.
      replayed: differs from another arm on replayed data alone.
    """

    title: str
    build: Callable[[Hyper, Setting], optax.GradientTransformation]
    family: str
    exact: bool = False
    replayed: bool = False


def _adamw(hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
    return optax.adamw(hyper.learning_rate, b2=setting.b2, weight_decay=hyper.weight_decay)


def _scheduled(hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
    """A learning rate that falls to zero averages noise away as well."""
    rate = optax.linear_schedule(hyper.learning_rate, 0.0, setting.num_steps)
    return optax.adamw(rate, b2=setting.b2, weight_decay=hyper.weight_decay)


def _with_decay(direction: optax.GradientTransformation, hyper: Hyper) -> optax.GradientTransformation:
    """AdamW from Adam's direction: neither decay nor learning rate is gated."""
    return optax.chain(
        direction, optax.add_decayed_weights(hyper.weight_decay), optax.scale_by_learning_rate(hyper.learning_rate)
    )


@dataclass(frozen=True)
class Gate:
    """Threshold and mask of a gate, whatever its statistic; `corrected` for the noise of finite data."""

    threshold: Any
    mask: Any
    corrected: bool = True

    def options(self, statistic: Callable[..., Any], setting: Setting) -> dict[str, Any]:
        noise = setting.data_noise if self.corrected else 0.0
        return {"statistic": statistic(data_noise=noise), "threshold": self.threshold, "mask": self.mask}

    def on_step(self, hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        return poprisk_adamw(
            hyper.learning_rate,
            b2=setting.b2,
            weight_decay=hyper.weight_decay,
            **self.options(adam_statistic, setting),
        )

    def exact(self, hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        # The noise of finite data comes on top of the batch's own: t² > z² (1 + data noise).
        threshold = TStatistic(self.threshold.z * (1 + setting.data_noise) ** 0.5)
        adam = optax.scale_by_adam(b2=setting.b2)
        return _with_decay(poprisk_gate(adam, statistic=batch_statistic(), threshold=threshold, mask=self.mask), hyper)

    def before(self, hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        return optax.chain(poprisk_gate(**self.options(ema_statistic, setting)), _adamw(hyper, setting))

    def around(self, hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        return poprisk_gate(_adamw(hyper, setting), **self.options(ema_statistic, setting))

    def norm(self, hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(b2=setting.b2)
        return _with_decay(norm_of(adam, poprisk_gate(adam, **self.options(ema_statistic, setting))), hyper)

    def random(self, hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(b2=setting.b2)
        return _with_decay(random_mask(adam, hyper.seed, **self.options(ema_statistic, setting)), hyper)

    def norm_before(self, hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        # Adam forgets the norm of what it is given, so the norms compared are those of Adam's steps.
        options = self.options(ema_statistic, setting)
        adam = optax.scale_by_adam(b2=setting.b2)
        return _with_decay(norm_of(adam, optax.chain(poprisk_gate(**options), adam)), hyper)

    def random_before(self, hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        mask = random_mask(optax.identity(), hyper.seed, **self.options(ema_statistic, setting))
        return optax.chain(mask, _adamw(hyper, setting))


def _grokfast(hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
    return optax.chain(grokfast_ema(), _adamw(hyper, setting))


def _published(preset: Callable[..., optax.GradientTransformation], alpha: Callable[[Setting], float]) -> Callable:
    def build(hyper: Hyper, setting: Setting) -> optax.GradientTransformation:
        return preset(hyper.learning_rate, b2=setting.b2, weight_decay=hyper.weight_decay, alpha=alpha(setting))

    return build


def _fresh(setting: Setting) -> float:
    return 1.0


def _finite(setting: Setting) -> float:
    return setting.data_noise or 1.0


HARD = Gate(TStatistic(1.0), HardMask())
STRICT = Gate(TStatistic(2.0), HardMask())
STRICTER = Gate(TStatistic(3.0), HardMask())
SHARE = Gate(OpenShare(0.05), HardMask())
SOFT = Gate(TStatistic(1.0), SoftMask())
SNR = Gate(TStatistic(1.0), SnrMask())
SNR_ALPHA = Gate(Alpha(1.0), SnrMask(), corrected=False)
PAPER = Gate(Alpha(1.0), SoftMask(eps=1e-8), corrected=False)

ARMS = {
    "adamw": Arm("AdamW", _adamw, "plain"),
    "adamw-linear": Arm("AdamW, learning rate falling to 0", _scheduled, "plain"),
    "paper": Arm("Algorithm 1, soft, α = 1", _published(algorithm_1, _fresh), "published"),
    "paper-finite": Arm("Algorithm 1, soft, α = b/(n−b)", _published(algorithm_1, _finite), "published", replayed=True),
    "popriskmin": Arm("popriskmin's default, snr, α = 1", _published(popriskmin, _fresh), "published"),
    "snr-grad": Arm("snr-grad, snr, α = b/(n−b)", _published(snr_grad, _finite), "published", replayed=True),
    "hard-z1": Arm("step: hard, z = 1", HARD.on_step, "step"),
    "hard-5%": Arm("step: hard, 5 % of noise open", SHARE.on_step, "step"),
    "hard-z2": Arm("step: hard, z = 2", STRICT.on_step, "step"),
    "hard-z3": Arm("step: hard, z = 3", STRICTER.on_step, "step"),
    "soft-z1": Arm("step: soft, z = 1", SOFT.on_step, "step"),
    "snr-z1": Arm("step: snr, z = 1", SNR.on_step, "step"),
    "hard-z1-raw": Arm(
        "step: hard, z = 1, data noise ignored", Gate(TStatistic(1.0), HardMask(), False).on_step, "step", replayed=True
    ),
    "exact-hard-z1": Arm("step: hard, z = 1, exact batch moments", HARD.exact, "step", exact=True),
    "exact-snr-z1": Arm("step: snr, z = 1, exact batch moments", SNR.exact, "step", exact=True),
    "before-hard-z1": Arm("before Adam: hard, z = 1", HARD.before, "before"),
    "before-snr-z1": Arm("before Adam: snr, z = 1", SNR.before, "before"),
    "before-snr-a1": Arm("before Adam: snr, α = 1", SNR_ALPHA.before, "before"),
    "around-hard-z1": Arm("around AdamW, decay gated: hard, z = 1", HARD.around, "around"),
    "around-snr-z1": Arm("around AdamW, decay gated: snr, z = 1", SNR.around, "around"),
    "around-snr-a1": Arm("around AdamW, decay gated: snr, α = 1", SNR_ALPHA.around, "around"),
    "norm-hard-z2": Arm("control: norm of hard, z = 2", STRICT.norm, "control"),
    "random-hard-z2": Arm("control: random, share of hard, z = 2", STRICT.random, "control"),
    "norm-paper": Arm("control: norm of Algorithm 1", PAPER.norm, "control"),
    "random-paper": Arm("control: random, share of Algorithm 1", PAPER.random, "control"),
    "norm-before-snr-a1": Arm("control: norm of snr, α = 1, before Adam", SNR_ALPHA.norm_before, "control"),
    "random-before-snr-a1": Arm("control: random before Adam, share of snr, α = 1", SNR_ALPHA.random_before, "control"),
    "grokfast": Arm("Grokfast-EMA", _grokfast, "other"),
}
