"""The Flower ClientApp: carries messages to and from local training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from client.answers import answer
from client.batch_files import BatchLogError
from client.batch_log import NOT_LOGGED, BatchLog
from client.contexts import (
    config_of,
    examples_of,
    needed_keeping,
    partition_of,
    round_of,
    start_of,
    stream_of,
    training_settings,
    use_one_thread,
)
from client.forgetting import ffmu
from client.forgetting.amnesiac import amnesiac as take_back
from client.forgetting.marking import own_rows, report, train_and_mark
from client.forgetting.steps import STEPS
from client.keeping import keeping_of, own_options
from client.refusals import check_allowed, is_refusable, refusals
from client.scratch import scratch_for
from client.task import evaluation
from client.task.device import choose_device
from client.task.protocol import TaskOptions, load_task, size_of
from client.train import Job, do
from strategies import messages
from strategies.actions import Action, Amnesiac, Batches, Forget, Mark, Marks, Selection
from unlearning.errors import RefusedRequestError

LOG = "batches"
"""Folder of the batch logs in the client's own."""
MakeJob = Callable[[Message, Context, TaskOptions], Job]
"""Says what one client does with a ``train`` message."""


def build_app(
    config: Mapping[str, Any] | None = None,
    *,
    job: MakeJob | None = None,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """Return a ClientApp.

    Parameters
    ----------
    config
        Run configuration, where the engine has none of its own; otherwise Flower's is used.
    job
        Says what to train on; ``honest_job`` by default.
    mods
        Flower mods around every message.
    """
    fixed = TaskOptions.model_validate(config) if config is not None else None

    def options(context: Context) -> TaskOptions:
        run = fixed if fixed is not None else TaskOptions.model_validate(context.run_config)
        return own_options(run, context)

    app = ClientApp(mods=[forget_state, refusals(options), *mods])
    make_job = job or honest_job

    @app.train()
    def train(message: Message, context: Context) -> Message:
        use_one_thread()
        chosen = make_job(message, context, options(context))
        model, metrics = do(chosen, start_of(message))
        content = messages.train_reply(model, metrics, chosen.num_examples)
        return Message(content, reply_to=message)

    @app.train("ffmu")
    def train_ffmu(message: Message, context: Context) -> Message:
        use_one_thread()
        end_log(context, options(context))
        chosen = make_job(message, context, options(context))
        asked = ffmu.settings_of(message.content[messages.CONFIG])
        model, metrics = ffmu.do(chosen, start_of(message), asked)
        content = messages.train_reply(model, metrics, chosen.num_examples)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return evaluate_reply(message, context, options(context))

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        partition, _ = partition_of(context)
        content = RecordDict({messages.METRICS: MetricRecord({messages.PARTITION: partition})})
        return Message(content, reply_to=message)

    for kind in STEPS:
        _register(app, kind, options)

    _register_kept(app, make_job, options)
    return app


def _register_kept(
    app: ClientApp, make_job: MakeJob, options: Callable[[Context], TaskOptions]
) -> None:
    """Register what is answered with what the client keeps on its disk."""

    @app.query("forget")
    def forget(message: Message, context: Context) -> Message:
        own, config = options(context), config_of(message)
        keeping, examples = needed_keeping(own, context), examples_of(own, context)
        request = str(config.get(messages.REQUEST, ""))
        number = int(config.get(messages.SERVER_ROUND, 0))
        asked = Forget.model_validate(config)
        if asked.dry:
            count = keeping.count(asked, examples)
        else:
            count = keeping.forget(asked, examples, number, request)
        # Weights are compared, and who holds much more than others has done nothing wrong.
        told = {"rows": count, messages.ENTRIES: keeping.forgotten().length}
        return Message(messages.evaluate_reply(told, 1), reply_to=message)

    @app.query("batches")
    def batches(message: Message, context: Context) -> Message:
        rows, log = _logged(Batches, message, context, options(context))
        # Who holds nothing of what is asked for needs no log.
        left, first = (0, 0) if rows == frozenset() else _needed(log).check(rows)
        told = {"rows": left, "first-round": first}
        return Message(messages.evaluate_reply(told, 1), reply_to=message)

    @app.train("amnesiac")
    def amnesiac(message: Message, context: Context) -> Message:
        rows, log = _logged(Amnesiac, message, context, options(context))
        request = Amnesiac.model_validate(config_of(message)).request
        made = take_back(start_of(message), _needed(log), rows, request)
        content = messages.train_reply(made.arrays, made.metrics, 1)
        return Message(content, reply_to=message)

    @app.train("mark")
    def mark(message: Message, context: Context) -> Message:
        use_one_thread()
        own, asked = options(context), Mark.model_validate(config_of(message))
        keeping, chosen = needed_keeping(own, context), make_job(message, context, own)
        model, metrics = train_and_mark(chosen, start_of(message), asked, keeping)
        content = messages.train_reply(model, metrics, chosen.num_examples)
        return Message(content, reply_to=message)

    @app.query("marks")
    def marks(message: Message, context: Context) -> Message:
        use_one_thread()
        own, asked = options(context), Marks.model_validate(config_of(message))
        keeping, examples = needed_keeping(own, context), examples_of(own, context)
        rows = own_rows(load_task(own), examples, keeping, choose_device(own.device))
        found = report(rows, start_of(message), asked, round_of(message), keeping)
        return Message(messages.evaluate_reply(found, 1), reply_to=message)


def _register(
    app: ClientApp, kind: type[Action], options: Callable[[Context], TaskOptions]
) -> None:
    verb, _, name = kind.action.partition(".")

    def handle(message: Message, context: Context) -> Message:
        use_one_thread()
        own = options(context)
        if kind.trains:
            end_log(context, own)
        return answer(kind, message, context, own)

    (app.train if verb == messages.TRAIN else app.query)(name)(handle)


def _logged(
    kind: type[Selection], message: Message, context: Context, own: TaskOptions
) -> tuple[frozenset[str] | None, BatchLog | None]:
    """Return the contents of the rows that a message selects, and the log of batches.

    ``None`` for all rows, which are more than are there today.
    """
    log = log_of(message, context, own)
    asked = kind.model_validate(config_of(message))
    if asked.forget == "all":
        return None, log
    return needed_keeping(own, context).contents(asked, examples_of(own, context)), log


def _needed(log: BatchLog | None) -> BatchLog:
    if log is None:
        raise BatchLogError(NOT_LOGGED)
    return log


def forget_state(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clear this client's state when the federation has forgotten somebody; a Flower mod.

    What a client keeps between rounds (momentum, a model of its own) comes from global models that
    held the forgotten client's influence. The app made here has it built in; give it to your own.
    """
    config = message.content.get(messages.CONFIG) if message.has_content() else None
    times = config.get(messages.FORGETTINGS, 0) if isinstance(config, ConfigRecord) else 0
    known = context.state.get(messages.FORGETTINGS)
    if times and not (isinstance(known, ConfigRecord) and known.get("times") == times):
        for key in list(context.state):
            del context.state[key]
        context.state[messages.FORGETTINGS] = ConfigRecord({"times": times})
    return call_next(message, context)


def honest_job(message: Message, context: Context, options: TaskOptions) -> Job:
    """Train on this client's own data but what it forgot, as the server's message says.

    Raises
    ------
    RefusedRequestError
        If its owner does not allow what is asked, it forgot all it has, or its list of what is
        forgotten is shorter than it was.
    """
    task = load_task(options)
    examples = allowed = task.client_data(*partition_of(context)).train
    own = own_options(options, context)
    if is_refusable(message):  # engines that take jobs know no mods
        check_allowed(message, own.refuse)
    log = log_of(message, context, own)
    entries = int(config_of(message).get(messages.ENTRIES, 0))
    keeping = needed_keeping(own, context) if entries else keeping_of(own, context)
    if keeping is not None:
        keeping.check_length(entries)
        allowed = keeping.without_forgotten(examples)
    if allowed is not examples and not size_of(allowed):
        raise RefusedRequestError("every row of this client is forgotten; do not ask it to train")
    return Job(
        task,
        allowed,
        training_settings(message),
        (round_of(message), stream_of(context)),
        choose_device(options.device),
        log=log,
    )


def log_of(message: Message, context: Context, own: TaskOptions) -> BatchLog | None:
    """Return this client's batch log, told what came for it with a message; ``None`` if off.

    Parameters
    ----------
    own
        The client's ``own_options``.
    """
    if own.batch_log == "off":
        end_log(context, own)
        return None
    log = BatchLog(
        needed_keeping(own, context).folder / LOG,
        kind=own.batch_log,
        precision=own.batch_log_precision,
        limit=own.batch_log_limit * 10**6,
        run=str(context.run_id),
    )
    config = config_of(message)
    shares = config.get(messages.SHARE, []), config.get(messages.SHARE_ROUND, [])
    told = {number: share for share, number in zip(*shares, strict=True)}
    log.told(told, config.get(messages.TAKEN_BACK, []))
    return log


def end_log(context: Context, own: TaskOptions) -> None:
    """Give up this client's batch log where it trains, and steps are not logged."""
    if (keeping := keeping_of(own, context)) is not None:
        BatchLog(keeping.folder / LOG, run=str(context.run_id)).end()


def evaluate_reply(message: Message, context: Context, options: TaskOptions) -> Message:
    """Evaluate the model on this client's test data and reply with the metrics.

    Recovery may be judged by them, so what is forgotten is not missed: rows of forgotten classes do
    not count.

    Raises
    ------
    RefusedRequestError
        If there are no others.
    """
    use_one_thread()
    device = choose_device(options.device)
    task = load_task(options)
    everything = examples = task.client_data(*partition_of(context)).test
    if (keeping := keeping_of(options, context)) is not None:
        examples = keeping.without_forgotten(everything)
    if examples is not everything and not size_of(examples):
        raise RefusedRequestError("every test row of this client is forgotten; do not ask for it")
    scratch = scratch_for(task, device)
    scratch.load(start_of(message))
    metrics = evaluation.evaluate(task, scratch.model, examples, device=device)
    return Message(messages.evaluate_reply(metrics, size_of(examples)), reply_to=message)


app = build_app()
