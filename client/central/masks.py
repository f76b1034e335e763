"""Masks and noise before fine-tuning (``methods`` 5), and pruning by class (2.11)."""

from torch import Tensor

from client.central.case import Case, Made, sums_of
from client.forgetting.statistics import structure_for
from strategies import actions
from strategies.methods.settings import Blur, Channels, Fisher, Share, TfIdf
from unlearning import tfidf
from unlearning.channel_masks import activation_scores, parameter_masks
from unlearning.errors import MissingNeedError
from unlearning.fedup import prune
from unlearning.fisher import (
    fisher_noise,
    fisher_scores,
    golatkar_noise,
    noise_scale,
)
from unlearning.masking import random_mask, says_nothing, top_share
from unlearning.parameters import Parameters, copied, trained_part
from unlearning.randomness import generator
from unlearning.sums import Statistics, means

TIES = "ties_decide: all scores are equal, so that the order of entries decides what is masked"


def statistics(kind: str, case: Case, most_samples: int) -> dict[str, Statistics]:
    """Return a holder's sums of one kind."""
    return sums_of(actions.Statistics, {"kind": kind, "most_samples": most_samples}, case)


def _both(found: dict[str, Statistics]) -> tuple[Statistics, Statistics | None]:
    return found["forget"], found["remain"] if found["remain"].count else None


def _zeroed(case: Case, masks: Parameters, scores: Parameters | None = None) -> Made:
    """Return the model with the masked entries zeroed; equal scores are worth a warning.

    What training does not move stays.
    """
    trained = trained_part(case.model, case.holding.trained)
    masks = {name: mask for name, mask in masks.items() if name in trained}
    warned = (TIES,) if scores is not None and says_nothing(scores) else ()
    zeroed = sum(int(mask.sum()) for mask in masks.values())
    return Made((prune(case.model, masks),), notes={"zeroed": zeroed}, warnings=warned)


def _of_trained(scores: Parameters, case: Case) -> dict[str, Tensor]:
    """Return the scores of layers that are not frozen."""
    trained = trained_part(case.model, case.holding.trained)
    return {layer: tensor for layer, tensor in scores.items() if f"{layer}.weight" in trained}


def fisher_mask(settings: Fisher, case: Case) -> Made:
    """Zero what matters most for the rows to forget beyond what matters for the others (5.1)."""
    forget, remain = _both(statistics("fisher", case, settings.most_samples))
    scores = fisher_scores(forget, remain if settings.remain == "all" else None, settings.form)
    return _zeroed(case, top_share(scores, settings.rate, settings.scope), scores)


def activation_mask(settings: Channels, case: Case) -> Made:
    """Silence the channels more active on the rows to forget than on the others (5.2)."""
    scores = activation_scores(*_both(statistics("activations", case, settings.most_samples)))
    channels = top_share(_of_trained(scores, case), settings.rate)
    convolutions = structure_for(case.holding).convolutions
    return _zeroed(case, parameter_masks(case.model, convolutions, channels), scores)


def grad_mask(settings: Channels, case: Case) -> Made:
    """Zero the filters that contribute most to recognising the rows to forget (5.3)."""
    scores = means(statistics("gradients", case, settings.most_samples)["forget"])
    channels = top_share(_of_trained(scores, case), settings.rate)
    masks = parameter_masks(
        case.model, structure_for(case.holding).convolutions, channels, bias=False
    )
    return _zeroed(case, masks, scores)


def random_masking(settings: Share, case: Case) -> Made:
    """Zero entries drawn uniformly (5.4)."""
    trained = trained_part(case.model, case.holding.trained)
    draw = generator(case.training.seed, "random mask")
    return _zeroed(case, random_mask(trained, settings.rate, draw))


def noise(settings: Blur, case: Case) -> Made:
    """Blur every weight by how little it matters for the rows that remain (5.6)."""
    fisher = means(statistics("fisher", case, settings.most_samples)["remain"])
    draw = generator(case.training.seed, "fisher noise")
    trained = trained_part(case.model, case.holding.trained)
    if settings.recipe == "eq2":
        scale = noise_scale(trained, fisher, settings.relative)
        blurred = fisher_noise(trained, fisher, scale, draw)
        return Made((copied(case.model) | blurred,), notes={"scale": scale})
    layer = structure_for(case.holding).head
    if layer is None:
        raise MissingNeedError(
            "the recipe golatkar treats the last linear layer apart, and the network has none; "
            "set recipe=eq2"
        )
    names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in trained]
    blurred = golatkar_noise(
        trained,
        fisher,
        draw,
        head=names,
        forgotten_class=case.forget_class,
        alpha=settings.alpha,
    )
    return Made((copied(case.model) | blurred,))


def pruning(settings: TfIdf, case: Case) -> Made:
    """Silence the channels that are most specific to the class (2.11).

    Raises
    ------
    MissingNeedError
        If no class is to be forgotten.
    """
    if case.forget_class is None:
        raise MissingNeedError("tfidf forgets a class; give --forget-class")
    found = statistics("classes", case, settings.most_samples)
    scores = tfidf.tfidf_scores([found[str(n)] for n in range(len(found))], case.forget_class)
    channels = top_share(_of_trained(scores, case), settings.rate, "tensor")
    convolutions = structure_for(case.holding).convolutions
    masks = parameter_masks(case.model, convolutions, channels, norm=settings.bn, following=True)
    return _zeroed(case, masks, scores)
