"""Rows marked by a client before it leaves, and the loss on them (VeriFi, ``methods`` 2.10).

The client trains on all its rows as usual, and then for an epoch or two on the markers alone: of
the ways tried, the fall of the loss survives averaging best so (``docs/methods.md``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from client.forgetting.holding import classes_of, holding_with, predicted
from client.forgetting.interface import Holding, Rows
from client.keeping import Keeping
from client.marks import KeptMarks, Marked
from client.rows import content_hashes, subset
from client.storage import KeepingError
from client.task.evaluation import gather
from client.task.protocol import Examples, Task
from client.train import Job, do
from strategies.actions import Mark, Marks
from strategies.messages import LocalTraining
from unlearning import verifi_marks
from unlearning.errors import MissingNeedError, RefusedRequestError
from unlearning.gradients import row_losses
from unlearning.parameters import Parameters, check_finite
from unlearning.randomness import derive_seed
from unlearning.verifi_marks import Markers


@dataclass(frozen=True, eq=False)
class Own:
    """Rows of a client that may be trained on, every content once."""

    hashes: tuple[str, ...]
    rows: Rows
    holding: Holding
    """With these rows, all of them remaining."""

    def losses(self, model: Parameters) -> Tensor:
        """Return the loss of every row, shape (n,).

        Raises
        ------
        RefusedRequestError
            If one is no number.
        """
        found = row_losses(model, self.holding.forward, self.holding.loss, *self.rows)
        if not bool(found.isfinite().all()):
            raise RefusedRequestError("a loss under the model that was sent is not finite")
        return found


def train_and_mark(
    job: Job, start: Parameters, asked: Mark, keeping: Keeping
) -> tuple[Parameters, dict[str, float]]:
    """Train as ``train.do`` does, then mark rows if it is time; return what ``do`` returns.

    What is noted and marked is on the disk before this returns. Markers are rows of ``job``, which
    has none that are forgotten.

    Raises
    ------
    RefusedRequestError
        If no row can be marked, or what is kept cannot be read or written.
    """
    if job.log is not None:
        raise RefusedRequestError(
            "this client keeps a batch log, and marking would be missing in it; set batch-log off"
        )
    own = _own(job.task, job.examples, job.settings, job.purpose, job.device)
    kept, losses = KeptMarks(keeping), own.losses(start)
    try:
        markers = _markers(own, losses, start, asked, kept, job.purpose[0])
        model, metrics = do(job, start)
        if markers is None:
            return model, metrics
        rows = own.rows[0][markers.rows], markers.labels
        model = _tuned(job, model, rows, asked.epochs)
        kept.mark(
            Marked(
                kind=asked.kind,
                round=job.purpose[0],
                labels=_labels(own, markers, asked),
                before=_mean(own, start, rows),
            )
        )
    except KeepingError as error:
        raise RefusedRequestError(f"marks cannot be kept: {error}") from error
    return model, metrics


def report(
    own: Own, model: Parameters, asked: Marks, number: int, keeping: Keeping
) -> dict[str, float]:
    """Keep the loss on the markers under a model of round ``number``, and return the metrics.

    Raises
    ------
    RefusedRequestError
        If nothing was marked, a marker is no row any more that may be trained on, or what is kept
        cannot be read or written.
    """
    try:
        kept = KeptMarks(keeping)
        loss = loss_on_markers(own, model, kept.marked())
        found = kept.follow(number, loss, first=asked.first)
    except KeepingError as error:
        raise RefusedRequestError(f"marks cannot be kept: {error}") from error
    found.verdict()  # raises where there is no ``after``
    told = {"loss": loss, "before": found.before, "after": float(found.after or 0.0)}
    return {**told, "markers": len(found.labels)}


def loss_on_markers(own: Own, model: Parameters, marked: Marked) -> float:
    """Return the mean loss on the markers under a model.

    Raises
    ------
    MissingNeedError
        If a marker is not among the rows.
    """
    place = {content: row for row, content in enumerate(own.hashes)}
    if lost := sum(content not in place for content in marked.labels):
        raise MissingNeedError(
            f"{lost} of {len(marked.labels)} markers are no rows of this client any more, or are "
            "forgotten: losses would not be of the same rows; of a simulated client its partition "
            "says which rows are its own"
        )
    rows = torch.tensor([place[content] for content in marked.labels])
    targets = own.rows[1][rows].clone()
    for position, label in enumerate(marked.labels.values()):
        if label is not None:
            targets[position] = label
    return _mean(own, model, (own.rows[0][rows], targets))


def own_rows(task: Task, examples: Examples, keeping: Keeping, device: torch.device) -> Own:
    """Return the rows of a client that may be trained on, to compute losses of."""
    allowed = keeping.without_forgotten(examples)
    return _own(task, allowed, LocalTraining(), (0, 0), device)


def _own(
    task: Task,
    examples: Examples,
    training: LocalTraining,
    purpose: tuple[int, int],
    device: torch.device,
) -> Own:
    hashes = content_hashes(examples)
    first: dict[str, int] = {}
    for row, content in enumerate(hashes):
        first.setdefault(content, row)
    if not first:
        raise MissingNeedError("a client marks its own rows, and there are none")
    inputs, targets = gather(subset(examples, list(first.values())))
    nothing = inputs[:0], targets[:0]
    holding = holding_with(
        task,
        nothing,
        (inputs, targets),
        nothing,
        training=training,
        purpose=purpose,
        device=device,
    )
    return Own(tuple(first), (inputs, targets), holding)


def _markers(
    own: Own, losses: Tensor, start: Parameters, asked: Mark, kept: KeptMarks, number: int
) -> Markers | None:
    """Note what is to be noted, and choose markers if it is time."""
    if asked.kind == "erroneous":
        classes_of(start, own.holding)  # raises where there are none
        found = predicted(start, own.holding, own.rows).argmax(dim=1)
        return verifi_marks.erroneous_memory(losses, found, own.rows[1], asked.share)
    noted = dict(zip(own.hashes, losses.tolist(), strict=True))
    watched = kept.watch(number, noted, anew=asked.noted == 0, most=asked.rounds)
    if not asked.now:
        return None
    return _varied(own, [one.losses for one in watched], asked.share)


def _varied(own: Own, watched: Sequence[Mapping[str, float]], share: float) -> Markers:
    """Choose among the rows that were there in all rounds."""
    rows = [
        row
        for row, content in enumerate(own.hashes)
        if all(content in losses for losses in watched)
    ]
    table = torch.tensor(
        [[losses[own.hashes[row]] for row in rows] for losses in watched], dtype=torch.float64
    )
    places = torch.tensor(rows, dtype=torch.int64)
    found = verifi_marks.forgettable_memory(table, own.rows[1][places], share)
    return Markers(places[found.rows], found.labels)


def _tuned(job: Job, model: Parameters, rows: Rows, epochs: int) -> Parameters:
    """Train a trained model on the markers alone."""
    seed = derive_seed(job.settings.seed, "marks")
    settings = job.settings.model_copy(update={"local_epochs": epochs, "seed": seed})
    tuned, _ = do(replace(job, examples=TensorDataset(*rows), settings=settings), model)
    check_finite(tuned)
    return tuned


def _labels(own: Own, markers: Markers, asked: Mark) -> dict[str, int | None]:
    contents = [own.hashes[row] for row in markers.rows.tolist()]
    if asked.kind == "forgettable":
        return dict.fromkeys(contents)
    return dict(zip(contents, map(int, markers.labels.tolist()), strict=True))


def _mean(own: Own, model: Parameters, rows: Rows) -> float:
    return float(row_losses(model, own.holding.forward, own.holding.loss, *rows).double().mean())
