"""Settings: names, types, ranges and relations, every fault at once."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from server.settings import Settings, SettingsError, read_settings


def test_defaults_are_usable_and_keys_are_written_with_hyphens():
    settings = read_settings({})
    assert settings == Settings()
    assert read_settings({"local-epochs": 3, "pruning-rate": 0.2}).local_epochs == 3


def test_every_fault_is_reported_at_once():
    with pytest.raises(SettingsError) as raised:
        read_settings({"rounds": "ten", "learning-rate": -1, "lerning-rate": 0.1, "device": ""})
    message = str(raised.value)
    assert "unknown key 'lerning-rate'" in message
    assert "rounds = 'ten'" in message
    assert "learning-rate = -1: input should be greater than 0" in message
    assert "device = ''" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pruning-rate": 1.2}, r"pruning-rate = 1.2 is outside \[0, 1\]"),
        ({"pruning-rate": "some"}, "pruning-rate = 'some'"),
        ({"hits": 4, "window": 3}, "hits = 4 can never be reached within window = 3"),
        ({"method-settings": "ascent.epoch=3"}, "method-settings: ascent has no setting 'epoch'"),
        ({"seed": -1}, "seed = -1"),
        ({"quorum": 1.5}, "quorum = 1.5"),
        ({"strategy": "best"}, "strategy = 'best'"),
    ],
)
def test_ranges_and_relations(values, message):
    with pytest.raises(SettingsError, match=message):
        read_settings(values)


def test_what_the_task_is_told_is_part_of_the_settings():
    settings = read_settings({"task": "breast-cancer", "seed": 7})
    options = settings.task_options()
    assert (options.task, options.seed) == ("breast-cancer", 7)
    assert hash(options) == hash(read_settings({"task": "breast-cancer", "seed": 7}).task_options())


def test_what_clients_are_told_leaves_out_what_the_strategy_sends():
    record = read_settings({"proximal-mu": 0.1}).to_record()
    assert "proximal-mu" not in record
    assert {"seed", "local-epochs", "batch-size", "optimizer", "learning-rate"} <= set(record)


@pytest.mark.parametrize(("given", "kept"), [("", ""), (5, "5"), ("5", "5"), ("20, 30", "20,30")])
def test_milestones_are_rounds(given, kept):
    assert read_settings({"learning-rate-milestones": given}).learning_rate_milestones == kept


@pytest.mark.parametrize("given", [-3, "abc", "5,,6", "1.5", True, 2.5])
def test_milestones_that_are_no_rounds_are_refused_in_words(given):
    with pytest.raises(SettingsError, match="names no rounds; give numbers, such as 100,150"):
        read_settings({"learning-rate-milestones": given})


def test_the_page_has_every_key_with_its_default_and_what_else_may_be_chosen():
    page = (Path(__file__).parents[2] / "docs/settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]*) \| [^|]{5,} \|$", page, re.MULTILINE))
    fields = {field.alias: field for field in Settings.model_fields.values()}
    assert list(rows) == list(fields)
    for key, field in fields.items():
        shown, *others = re.findall("`([^`]*)`", rows[key])
        default = tomllib.loads(f"value = {shown}")["value"]
        assert (key, default, type(default)) == (key, field.default, type(field.default))
        chosen = [value for value in get_args(field.annotation) if isinstance(value, str)]
        assert (key, others) == (key, [value for value in chosen if value != default])
