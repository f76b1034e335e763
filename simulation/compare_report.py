"""``compare.json``, and what is written from it: the table as CSV and as Markdown.

Shares are in [0, 1]; ``null`` stands for what was not measured, never for a guess.
"""

import csv
import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from server.federation import TEST
from simulation.comparison import RETRAINED, Comparison, Trial, as_json, table
from simulation.page import counted, listed, number_word
from simulation.probes import BACKDOOR, FLIP, FORGET, RETAINED
from simulation.report import environment, settings_of

SCHEMA_VERSION = 1
DASH, PLUS_MINUS, SPACE = "\u2013", "\u00b1", "\u00a0"
NAMES = {
    TEST: "Test accuracy",
    RETAINED: "Accuracy on the other classes",
    BACKDOOR: "Backdoor success",
    FLIP: "Label-flip success",
    FORGET: "Forget accuracy",
}
PER_SEED = {"seed", "device", "data-dir"}
"""Settings that are told elsewhere, or say only where it was computed."""
MOST_SEEDS = 5
"""Seeds of which it is told in words who was forgotten; the document holds all."""
DEEDS = {"backdoor": "planted a backdoor", "label-flip": "swapped the labels of similar classes"}
NOT_SHOWN = (
    "What this is not: one scenario with one set of settings, which need not suit every method; "
    "another may order them otherwise. Who is to be forgotten was given, not found out. Where the "
    "guarantee is none, forgetting was measured, not proven: these measures do not find everything "
    "that a model may know of its former clients, and membership inference was not tried. Seconds "
    "are those of simulated clients on one machine."
)

Document = Mapping[str, Any]
"""What ``document`` returns, or ``compare.json`` read back."""
Row = Mapping[str, Any]


def describe(comparison: Comparison) -> dict[str, Any]:
    """Return what all seeds of a comparison have in common; equal values, equal experiments."""
    scenario = comparison.scenario
    told = settings_of(scenario)
    return {
        "schema_version": SCHEMA_VERSION,
        "secateur": metadata.version("secateur"),
        "scenario": scenario.name,
        "summary": scenario.summary,
        "methods": list(comparison.methods),
        "rounds_followed": comparison.rounds,
        "forget": _to_forget(comparison),
        "settings": {key: value for key, value in told.items() if key not in PER_SEED},
    }


def _to_forget(comparison: Comparison) -> list[int] | str:
    if comparison.asked is not None:
        return comparison.forgotten[0]
    return list(comparison.partitions) if comparison.named else "attackers"


def document(
    described: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    trials: Sequence[Trial],
) -> dict[str, Any]:
    """Return ``compare.json``: what ``docs/compare.md`` promises, as plain JSON values."""
    return {
        **described,
        "seeds": [comparison.seed for comparison in comparisons],
        "forgotten": {str(c.seed): list(c.forgotten) for c in comparisons},
        "environment": environment(comparisons[0].scenario.settings.device),
        "trials": [as_json(trial) for trial in trials],
        "table": table(trials),
    }


# ---------------------------------------------------------------- reading a document
def attack_of(document: Document) -> str | None:
    """Return the measure of the attack, if one was taken."""
    return next((name for name in (BACKDOOR, FLIP) if _measured(document, name)), None)


def accuracy_in(document: Document) -> str:
    """Return the measure of accuracy: where a class goes, that of the others."""
    return RETAINED if _measured(document, RETAINED) else TEST


def forgetting_of(document: Document) -> str | None:
    """Return the measure that tells best whether something is forgotten, if any was taken."""
    return attack_of(document) or (FORGET if _measured(document, FORGET) else None)


def baseline_of(document: Document) -> Row:
    """Return the row of retraining."""
    row: Row = next(row for row in document["table"] if row["method"] == RETRAINED)
    return row


def _measured(document: Document, measure: str) -> bool:
    return any(trial["before"].get(measure) is not None for trial in document["trials"])


# ---------------------------------------------------------------- columns
@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes
    ----------
    key
        Of the mean; ``KEY_sd`` is the deviation.
    group, title
        What is measured, and when or how; one of them may be empty.
    form
        Writes a mean and a deviation, which may be ``None``.
    unit
        As it is written, if there is one.
    """

    key: str
    group: str
    title: str
    form: Callable[[float, float | None], str]
    unit: str = ""

    @property
    def name(self) -> str:
        """Return group, title and unit in one line."""
        words = " ".join(filter(None, [self.group, self.title]))
        return f"{words}, {self.unit}" if self.unit else words

    def show(self, row: Row) -> str:
        """Return the cell: mean and deviation, or a dash for what was not measured."""
        mean = row[self.key]
        return DASH if mean is None else self.form(mean, row[f"{self.key}_sd"])


def results(document: Document) -> list[Column]:
    """Return the columns that say what is left of the forgotten clients, and of the model."""
    moments = {
        "unlearned": "right after",
        "after": "after recovery",
        "end": f"after {counted(document['rounds_followed'], 'round', spell=False)}",
    }
    full = [accuracy_in(document), *filter(None, [forgetting_of(document)])]
    columns = [
        Column(f"{moment}_{measure}", NAMES[measure], when, _percent, "%")
        for measure in full
        for moment, when in moments.items()
    ]
    if FORGET not in full and _measured(document, FORGET):
        columns.append(Column(f"after_{FORGET}", NAMES[FORGET], "after recovery", _percent, "%"))
    return columns


def costs() -> list[Column]:
    """Return the columns that say what forgetting took."""
    return [
        Column("rounds_asked", "Rounds", "of its own", number),
        Column("recovery_rounds", "Rounds", "of recovery", number),
        Column("seconds", "", "Seconds", number),
        Column("memory_bytes", "Megabytes", "stored", _megabytes),
        Column("bytes_sent", "Megabytes", "sent", _megabytes),
        Column("speedup_rounds", "Times faster than retraining", "in rounds", number),
        Column("speedup_seconds", "Times faster than retraining", "in seconds", number),
    ]


def halves(document: Document) -> list[tuple[str, list[Column]]]:
    """Return the two halves of the table, with their titles."""
    return [("What is left", results(document)), ("What it took", costs())]


def number(mean: float, deviation: float | None) -> str:
    """Return ``3.4 ± 0.2``: two digits that count at least; whole numbers without a fraction.

    A deviation of 0 is left out: all seeds agree.
    """
    if float(mean).is_integer() and not deviation:
        return f"{mean:.0f}"
    digits = 1 if mean >= 1 else 2 if mean >= 0.1 else 3
    return _with(f"{mean:.{digits}f}", f"{deviation or 0:.{digits}f}", deviation)


def _percent(mean: float, deviation: float | None) -> str:
    return _with(f"{100 * mean:.1f}", f"{100 * (deviation or 0):.1f}", deviation)


def _megabytes(mean: float, deviation: float | None) -> str:
    return number(mean / 1e6, None if deviation is None else deviation / 1e6)


def _with(mean: str, deviation: str, known: float | None) -> str:
    if not known or math.isclose(known, 0):
        return mean
    return f"{mean}{SPACE}{PLUS_MINUS}{SPACE}{deviation}"


# ---------------------------------------------------------------- words
def story(document: Document) -> list[str]:
    """Return what was done, where the models stood before, and what retraining took."""
    settings = document["settings"]
    clients, rounds = settings["clients"], settings["rounds"]
    text = (
        f"{counted(clients['total'], 'client').capitalize()} trained one model together for "
        f"{counted(rounds, 'round')}, each on its own data"
    )
    if attack := settings["attack"]:
        text += f"; {number_word(clients['malicious'])} of them {DEEDS[attack['kind']]}"
    text += (
        f", and nobody looked for attackers. After round {rounds}, {_whom(document)} to be "
        "forgotten. Every method started from a copy of the same federation (same model, same "
        "memory of past rounds, same random streams) and was followed for "
        f"{counted(document['rounds_followed'], 'round')}. "
    )
    seeds = [str(seed) for seed in document["seeds"]]
    text += (
        f"All this was done {counted(len(seeds), 'time')}, with seeds {listed(seeds, 10)}."
        if len(seeds) > 1
        else f"All this was done once, with seed {seeds[0]}: nothing here tells how much is chance."
    )
    return [text, *_before(document), _retraining(document), NOT_SHOWN]


def _whom(document: Document) -> str:
    forgotten: Mapping[str, Sequence[str]] = document["forgotten"]
    alike = len({tuple(clients) for clients in forgotten.values()}) == 1
    clients = next(iter(forgotten.values()))
    if document["forget"] != "attackers":
        return f"{listed(clients)} {'was' if _them(document) == 'it' else 'were'}"
    told = [f"seed {seed}: {listed(clients)}" for seed, clients in forgotten.items()]
    if len(told) > MOST_SEEDS:
        told[MOST_SEEDS:] = [f"and so on for {counted(len(told) - MOST_SEEDS, 'more seed')}"]
    return f"the attackers ({listed(clients) if alike else '; '.join(told)}) were"


def _them(document: Document) -> str:
    """Return the pronoun of what is to be forgotten: one client or class, or several of them."""
    forget = document["forget"]
    clients = next(iter(document["forgotten"].values()))
    one = len(clients) == 1 and not clients[0].partition(" ")[2].startswith("samples")
    return "it" if forget != "attackers" and one else "them"


def _before(document: Document) -> Iterator[str]:
    row = baseline_of(document)
    taken = (accuracy_in(document), attack_of(document), FORGET)
    names = {name: f"before_{name}" for name in taken if name}
    told = [
        f"{NAMES[name].lower()} was {_percent(row[key], row[f'{key}_sd'])}{SPACE}%"
        for name, key in names.items()
        if row[key] is not None
    ]
    if told:
        yield f"Before, {listed(told)}."


def _retraining(document: Document) -> str:
    row, tolerance = baseline_of(document), document["settings"]["recovery-tolerance"]
    own = [trial for trial in document["trials"] if trial["method"] == RETRAINED]
    never = sum(trial["rounds_needed"] is None for trial in own)
    accuracy = NAMES[accuracy_in(document)].lower()
    what = f"within {100 * tolerance:g} points of the {accuracy} before"
    if never == len(own):
        return f"Retraining never came {what}, so nothing is said of how much faster a method is."
    rounds = number(row["rounds_needed"], row["rounds_needed_sd"])
    text = (
        f"Retraining without {_them(document)} needed {rounds} of its "
        f"{document['settings']['rounds']} rounds to come {what}: that is what methods are called "
        "faster or slower than."
    )
    if never:
        text += f" With {counted(never, 'seed')} it never did; these are left out there."
    return text


def remarks(row: Row, document: Document) -> list[str]:
    """Return what must be known about a row besides its numbers."""
    found = []
    if row["refused"] is not None:
        some = "" if not row["served"] else f" with {row['seeds'] - row['served']} of the seeds"
        found.append(f"refused{some}: {row['refused']}")
    causes = {other["asked_as"] for other in document["table"]}
    if row["asked_as"] == "privacy" and "malicious" in causes:
        found.append("trusts those whom it forgets, so it was asked as if they had only left")
    if row["capped"]:
        found.append(
            f"with {row['capped']} of {counted(row['served'], 'seed', spell=False)} recovery was "
            "stopped at its cap: accuracy had not come back"
        )
    return found


# ---------------------------------------------------------------- other forms
def as_csv(document: Document) -> str:
    """Return the table with all its columns, one line per method."""
    rows = document["table"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_markdown(document: Document, figures: Collection[str] = ()) -> str:
    """Return a page with the story, the table in two halves, remarks, and figures by name."""
    lines = [
        f"# Methods compared: {_cell(document['scenario'])}",
        "",
        *_paragraphs(story(document)),
    ]
    for title, columns in halves(document):
        lines += [f"## {title}", "", *_grid(document["table"], columns), ""]
    noted = [(row["method"], note) for row in document["table"] for note in remarks(row, document)]
    lines += [f"- `{method}`: {_cell(note)}" for method, note in noted]
    if figures:
        lines += ["", *(f"![{name}](plots/{name}.svg)" for name in figures)]
    return "\n".join(lines).rstrip() + "\n"


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in (_cell(text), "")]


def _grid(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    head = ["Method", "Guarantee", *(column.name for column in columns)]
    body = [
        [f"`{row['method']}`", row["guarantee"], *(column.show(row) for column in columns)]
        for row in rows
    ]
    rule = ["---", "---", *("--:" for _ in columns)]
    return [f"| {' | '.join(_cell(cell) for cell in line)} |" for line in (head, rule, *body)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("\u00a0", " ")
