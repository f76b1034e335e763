"""FFMU as a Flower strategy: clients send gradients, and the server quantises their average.

The arithmetic is ``unlearning.ffmu``'s, ``methods`` 3.3. As other strategies with a step of their
own do, it extends ``FedAvg``, which chooses the clients; what they are asked is ``train.ffmu``.

Replies are models, ``w - Gbar_k``: an update is ``-Gbar_k``, so whatever screens, compares or
remembers updates needs to know nothing of gradients.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies import messages
from strategies.actions import CANCELLED, LARGEST, SAMPLES, Ffmu
from unlearning import certificates, ffmu, margins, pcmu
from unlearning.certificates import Closeness, Device, ExactCheck, Weights
from unlearning.errors import NotCertifiedError, ParametersError, SecateurError
from unlearning.margins import Margins
from unlearning.parameters import Parameters, trained_names, weighted_mean
from unlearning.randomness import generator

log = logging.getLogger("flwr")


@dataclass
class Course:
    """What is known of a training so far."""

    number: int = 0
    """Round that clients were asked to train in last."""
    start: Parameters = field(default_factory=dict)
    """The model that it started from."""
    asked: int = 0
    """Clients asked in it."""
    margins: Margins = field(default_factory=Margins)
    reasons: dict[int, str] = field(default_factory=dict)
    """Round -> why nothing of it is certified."""
    samples: dict[int, int] = field(default_factory=dict)
    """Node -> the fewest samples that it ever trained on."""
    gradient: Parameters | None = None
    """The server's average of the last round."""
    total: int = 0
    """Samples of all clients in it."""
    closeness: Closeness | None = None
    """Of the last round."""


class FFMU(FedAvg):
    """FFMU, its ablation FFMU-N, and, with one client, PCMU.

    Parameters
    ----------
    rounds
        Of the training; the learning rate falls to a tenth after half and again after three
        quarters of them, and stays where it is afterwards.
    action
        What clients are told; the round's learning rate is filled in.
    learning_rate
        Of the first round.
    alpha
        Scale of the server's step; a client's is the action's.
    weights
        Whether all clients count the same, as in the paper, or by their samples. FFMU-N averages
        models as FedAvg does.
    seed
        What the noise of mode ``sample`` is drawn from.
    settings
        ``FedAvg``'s: who takes part.
    """

    def __init__(
        self,
        *,
        rounds: int,
        action: Ffmu | None = None,
        learning_rate: float = ffmu.LEARNING_RATE,
        alpha: float = ffmu.ALPHA_SERVER,
        weights: Weights = "uniform",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.rounds = rounds
        self.action = action or Ffmu()
        self.learning_rate = learning_rate
        self.quantiser = replace(self.action.quantiser, alpha=alpha)
        self.weights = weights
        self.seed = seed
        # In one object, because those who ask everybody use a shallow copy of a strategy for it.
        self.course = Course()
        ffmu.learning_rate(1, rounds, learning_rate)  # raises where they are out of range
        if (warning := pcmu.dead_zone(self.quantiser)) is not None:
            log.warning(warning)

    def summary(self) -> None:
        """Log the settings."""
        quantiser, action = self.quantiser, self.action
        log.info(
            "\t├──> FFMU%s: sigma %g, lam %g, g* %.4g, mode %s, local %s, server alpha %g",
            "-N" if action.models else "",
            quantiser.sigma,
            quantiser.lam,
            quantiser.threshold,
            quantiser.mode,
            action.local,
            quantiser.alpha,
        )
        super().summary()

    # ------------------------------------------------------------ rounds
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the clients that FedAvg chooses for a gradient at this model."""
        told = self.action.model_copy(update={"ffmu_rate": self._rate(server_round)})
        asked = super().configure_train(
            server_round, arrays, ConfigRecord({**config, **cast(Any, told.config())}), grid
        )
        outgoing = [
            Message(
                content=message.content,
                dst_node_id=message.metadata.dst_node_id,
                message_type=told.action,
            )
            for message in asked
        ]
        course = self.course
        course.number, course.asked = server_round, len(outgoing)
        course.start = messages.parameters_from(arrays)
        return outgoing

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what clients sent, and take the server's step."""
        if self.action.models:
            return super().aggregate_train(server_round, replies)
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid:
            return None, None
        if self.course.number != server_round:
            raise SecateurError(
                f"round {server_round} was not begun here, so gradients have no model to start "
                "from; begin it with configure_train"
            )
        contents = [message.content for message in valid]
        sent = [
            messages.shared_parameters(cast(ArrayRecord, content[messages.ARRAYS]))
            for content in contents
        ]
        told = [cast(MetricRecord, content[messages.METRICS]) for content in contents]
        samples = [float(cast(float, metrics[self.weighted_by_key])) for metrics in told]
        start = self.course.start
        gradients = [ffmu.as_gradient(start, model) for model in sent]
        model = ffmu.server_step(
            start,
            gradients,
            self._rate(server_round),
            self.quantiser,
            samples=samples if self.weights == "samples" else None,
            generator=generator(self.seed, "server quantiser", server_round),
        )
        model |= self._buffers(start, sent, samples)
        self._note(server_round, valid, gradients, told)
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return messages.record_from(model), metrics

    def _rate(self, number: int) -> float:
        return ffmu.learning_rate(min(number, self.rounds), self.rounds, self.learning_rate)

    def _buffers(
        self, start: Parameters, sent: list[dict[str, Tensor]], samples: list[float]
    ) -> dict[str, Tensor]:
        """Return the average of what gradients say nothing of: statistics."""
        trained = set(trained_names(start))
        others = [{n: t for n, t in model.items() if n not in trained} for model in sent]
        return weighted_mean(others, samples if self.weights == "samples" else [1.0] * len(sent))

    # ------------------------------------------------------------ certificates
    def _note(
        self,
        number: int,
        replies: list[Message],
        gradients: list[dict[str, Tensor]],
        told: list[MetricRecord],
    ) -> None:
        """Note what certificates need of a round."""
        course = self.course
        if self.uncertifiable is None:
            course.margins = course.margins.after(self._reach(number, replies, gradients, told))
        if number < self.rounds:
            return
        samples = [float(cast(float, metrics[self.weighted_by_key])) for metrics in told]
        course.gradient = ffmu.average(gradients, samples if self.weights == "samples" else None)
        hard = replace(self.quantiser, mode="hard", alpha=1.0)
        steps = [pcmu.directions(gradient, hard) for gradient in gradients]
        course.total = int(sum(samples))
        course.closeness = certificates.closeness(gradients, steps, self.quantiser.sigma)
        log.info(course.closeness.statement)

    def _reach(
        self,
        number: int,
        replies: list[Message],
        gradients: list[dict[str, Tensor]],
        told: list[MetricRecord],
    ) -> Tensor:
        """Return the reach of every coordinate; 0 where the round cannot be certified."""
        course = self.course
        try:
            if len(replies) < course.asked:
                raise ParametersError(
                    f"{course.asked - len(replies)} of {course.asked} clients have no part in it"
                )
            needed = (LARGEST, CANCELLED, SAMPLES)
            if lacking := [key for key in needed if any(key not in metrics for metrics in told)]:
                raise ParametersError(f"clients do not tell {', '.join(lacking)}")
            devices = [
                Device(
                    gradient=gradient,
                    samples=int(cast(int, metrics[SAMPLES])),
                    largest=float(cast(float, metrics[LARGEST])),
                )
                for gradient, metrics in zip(gradients, told, strict=True)
            ]
            cancelled = any(metrics[CANCELLED] for metrics in told)
            found = margins.reach(course.start, devices, self.quantiser, cancelled=cancelled)
        except ParametersError as error:
            course.reasons[number] = str(error)
            log.warning("round %d: nothing is certified: %s", number, error)
            return torch.zeros(sum(tensor.numel() for tensor in gradients[0].values()))
        for reply, device in zip(replies, devices, strict=True):
            node = node_of(reply)
            course.samples[node] = min(device.samples, course.samples.get(node, device.samples))
        return found

    @property
    def uncertifiable(self) -> str | None:
        """Say why the exact check cannot hold for this training; ``None`` if it can."""
        if self.weights != "uniform":
            return "clients must count the same, and they are weighted by their samples"
        try:
            certificates.check_certifiable(
                self.course.start,
                self.quantiser,
                full=self.action.local == "full" and not self.action.models,
            )
        except NotCertifiedError as error:
            return str(error)
        return None

    def check(self, removed: Mapping[int, int]) -> ExactCheck:
        """Return the exact check of a request to forget samples (``methods`` 3.5b).

        Parameters
        ----------
        removed
            Node -> how many of its samples are to go.

        Raises
        ------
        NotCertifiedError
            If the check cannot hold for this training, a node would lose all its samples, or it
            never sent a gradient.
        """
        if (why := self.uncertifiable) is not None:
            raise NotCertifiedError(why)
        unknown = [node for node in removed if node not in self.course.samples]
        if unknown:
            raise NotCertifiedError(
                f"{certificates.EXACT}: node {unknown[0]} sent no gradient with what the check "
                "needs; use a method that forgets"
            )
        asked = margins.load((gone, self.course.samples[node]) for node, gone in removed.items())
        return self.course.margins.check(asked)

    def answer(self, model: Parameters, removed: Mapping[int, int]) -> dict[str, Tensor]:
        """Answer a request to forget samples: the model as it is, or a refusal (``methods`` 3.6).

        Parameters
        ----------
        model
            What the training gave.
        removed
            As for ``check``.

        Raises
        ------
        NotCertifiedError
            Unless every coordinate of every round is certified.
        """
        return certificates.answer(model, self.check(removed), self.course.number)


def node_of(reply: Message) -> int:
    """Return the node that sent a reply, or that a reply was encoded for again."""
    about = reply.metadata
    return about.src_node_id if about.reply_to_message_id else about.dst_node_id
