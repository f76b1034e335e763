"""What a client answers to every action that has a step (``client.forgetting.steps``)."""

from flwr.app import Context, Message

from client.contexts import (
    config_of,
    needed_keeping,
    partition_of,
    round_of,
    start_of,
    stream_of,
    training_settings,
)
from client.forgetting.holding import holding_with
from client.forgetting.interface import Holding, Outcome, Rows
from client.forgetting.steps import do
from client.keeping import keeping_of
from client.rows import subset
from client.task.device import choose_device
from client.task.evaluation import gather
from client.task.protocol import Examples, TaskOptions, load_task
from strategies import messages
from strategies.actions import Action, Ascend, Selection, parted


def answer(kind: type[Action], message: Message, context: Context, own: TaskOptions) -> Message:
    """Do the step of an action on this client's rows, and reply with what came of it.

    A step that changes the model is answered with the model as it came where the client holds
    nothing of what is to be forgotten, and weighs as much as its other rows: answers are judged
    by the usual one. All such answers have the metrics of the step, 0 where it was not done, and
    ``rows``: how many rows are forgotten.
    """
    settings, start = kind.model_validate(config_of(message)), start_of(message)
    holding = _holding(settings, message, context, own)
    forgotten, remaining = len(holding.forget[1]), len(holding.remain[1])
    if kind.trains:
        outcome = do(settings, start, holding)
        content = messages.train_reply(outcome.arrays, outcome.metrics, max(1, remaining))
        return Message(content, reply_to=message)
    if not kind.action.startswith(messages.TRAIN):
        outcome = do(settings, start, holding)
        told = {**outcome.metrics, "rows": forgotten}
        content = messages.train_reply(outcome.arrays, told, max(1, forgotten + remaining))
        return Message(content, reply_to=message)
    if forgotten:
        outcome = do(settings, start, holding)
    else:
        outcome = Outcome(parted(start)["reference"] if kind is Ascend else start)
    told = {**dict.fromkeys(kind.told, 0), **outcome.metrics, "rows": forgotten}
    content = messages.train_reply(outcome.arrays, told, forgotten or max(1, remaining))
    return Message(content, reply_to=message)


def _holding(settings: Action, message: Message, context: Context, own: TaskOptions) -> Holding:
    data = load_task(own).client_data(*partition_of(context))
    selection = settings if isinstance(settings, Selection) else Selection(forget="none")
    forget, remain = _parts(selection, data.train, context, own)
    return holding_with(
        load_task(own),
        forget,
        remain,
        gather(data.test),
        training=training_settings(message),
        purpose=(round_of(message), stream_of(context)),
        device=choose_device(own.device),
    )


def _parts(
    selection: Selection, examples: Examples, context: Context, own: TaskOptions
) -> tuple[Rows, Rows]:
    """Return the rows to forget, and the others that may be trained on."""
    keeping = keeping_of(own, context)
    if keeping is not None:
        forget, remain = keeping.parts(selection, examples)
        return gather(forget), gather(remain)
    if selection.forget in ("class", "samples"):
        needed_keeping(own, context)  # refuses: without a folder nothing was dropped for good
    everything, nothing = gather(examples), gather(subset(examples, []))
    return (everything, nothing) if selection.forget == "all" else (nothing, everything)
