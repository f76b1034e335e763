"""Every method by the name that it has in ``unlearning.catalogue``, with its default settings."""

from collections.abc import Callable

from strategies.methods.certified import Certified
from strategies.methods.drift import Drift
from strategies.methods.fedup import FedUP
from strategies.methods.holders import TakeBack, ascending, climbing, flipping, macforget
from strategies.methods.interface import Method
from strategies.methods.jackknife import Jackknife
from strategies.methods.masks import ClassDiscriminative, Mask, Noise
from strategies.methods.negation import Negation
from strategies.methods.replay import FedEraser, FedRecover
from strategies.methods.retraining import NaturalForgetting, Retrain, noisy, rapid, rcad
from strategies.methods.subtraction import FAST, Distillation, NegativeGradients
from strategies.methods.verifi import ScaleToUnlearn

MAKE: dict[str, Callable[[], Method]] = {
    "fedup": FedUP,
    "drift": Drift,
    "not": Negation,
    "negative-gradients": NegativeGradients,
    "federaser": FedEraser,
    "fedrecover": FedRecover,
    "fast": FAST,
    "kd": Distillation,
    "verifi": ScaleToUnlearn,
    "rollback": lambda: Retrain(rollback=True, name="rollback"),
    "retrain": Retrain,
    "natural": NaturalForgetting,
    "random": lambda: FedUP(score="random", name="random"),
    "fisher-mask": Mask,
    "activation-mask": lambda: Mask(name="activation-mask"),
    "grad-mask": lambda: Mask(name="grad-mask"),
    "random-mask": lambda: Mask(name="random-mask"),
    "fisher-noise": Noise,
    "tfidf": ClassDiscriminative,
    "ascent": ascending,
    "label-flip": flipping,
    "amnesiac": TakeBack,
    "macforget": macforget,
    "pga": climbing,
    "rapid-retraining": rapid,
    "noisy-gd": noisy,
    "rcad": rcad,
    "ffmu": Certified,
    "ij": Jackknife,
}
