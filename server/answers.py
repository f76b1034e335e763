"""Answers of clients as files: what a method asks them, question by question."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from server.offline import check_fits, check_values, listed, uncounted
from strategies.archive import GLOBAL, SUFFIX, SavedModel, narrowed, save_model, saved_clients
from unlearning.errors import MissingNeedError, SecateurError
from unlearning.parameters import Parameters
from unlearning.plan import Answer, Ask


class AnswerFiles:
    """Asks clients by files: a carrier of asks that a person carries on.

    The n-th ask of a plan is written to ``ask-000n/ask.json``, with the model that goes with it
    beside it, and answered by ``ask-000n/CLIENT.safetensors``, whose ``num_examples`` is the
    weight. Run again, a plan asks the same and is given the answers that are there, until it comes
    to an ask without.

    Parameters
    ----------
    folder
        ``None`` where nobody can be asked.
    enough
        Whether to go on once anybody has answered, instead of everybody.
    schema
        Names, shapes and dtypes that answers must have.
    """

    def __init__(self, folder: Path | None, enough: bool, schema: Parameters) -> None:
        self.folder, self.enough, self.schema = folder, enough, schema
        self.asked = 0
        self.warnings: list[str] = []
        """What a person should know of the answers."""

    def __call__(self, ask: Ask) -> Sequence[Answer]:
        """Return the answers to the next ask.

        Raises
        ------
        MissingNeedError
            If they are not there yet; the ask is, then.
        SecateurError
            If what is there answers another question.
        """
        self.asked += 1
        if self.folder is None:
            raise MissingNeedError(
                f"{', '.join(ask.to)} must train for this method; give --answers DIR, where it "
                "writes what to ask and reads what they answer"
            )
        place = self.folder / f"ask-{self.asked:04d}"
        question = {
            "ask": self.asked,
            "action": ask.action,
            "round": ask.config.get("round"),
            "config": dict(ask.config),
            "to": list(ask.to),
        }
        self._write(place, question, narrowed(ask.arrays or {}, self.schema))
        found = saved_clients(place, wide=True)
        if strangers := sorted(found.keys() - set(ask.to)):
            raise SecateurError(
                f"{found[strangers[0]].path} is of a client that was not asked; take it away"
            )
        missing = [client for client in ask.to if client not in found]
        if missing and not (self.enough and found):
            raise MissingNeedError(
                f"waiting for {listed(missing)} to answer ask {self.asked}: put CLIENT{SUFFIX}, "
                f"trained from {GLOBAL}{SUFFIX} as ask.json says, into {place}, and run the same "
                "command again"
            )
        for model in found.values():
            check_fits(self.schema, model, place / f"{GLOBAL}{SUFFIX}")
            check_values(model)
        self.warnings += [f"ask {self.asked}: {warning}" for warning in uncounted(found)]
        if missing:
            self.warnings.append(
                f"ask {self.asked}: {len(found)} of {len(ask.to)} clients answered; without "
                f"{listed(missing)} this is no whole training"
            )
        return [Answer(c, found[c], num_examples=found[c].weight) for c in sorted(found)]

    def _write(self, place: Path, question: Mapping[str, object], model: Parameters) -> None:
        """Write an ask, or see that the one that is there is the same."""
        text, path = json.dumps(question, indent=2).encode() + b"\n", place / "ask.json"
        try:
            if not path.exists():
                place.mkdir(parents=True, exist_ok=True)
                if left := saved_clients(place):
                    raise SecateurError(
                        f"{place} holds an answer of {listed(list(left))} and no question; take it "
                        "away, or start again with an empty folder"
                    )
                save_model(place / f"{GLOBAL}{SUFFIX}", model)
                staged = place / ".ask.json"
                staged.write_bytes(text)
                staged.replace(path)  # last: whoever sees it finds the model
                return
            written = path.read_bytes()
        except OSError as error:
            raise SecateurError(f"{path} cannot be used: {error.strerror}") from error
        sent = SavedModel(place / f"{GLOBAL}{SUFFIX}")
        if written != text or not (
            sent.keys() == model.keys()
            and all(torch.equal(sent[name], tensor) for name, tensor in model.items())
        ):
            raise SecateurError(
                f"{place} holds another question than the one to be asked now: models, settings or "
                "earlier answers changed; put them back, or start again with an empty folder"
            )
