"""Scenarios: those that come with Secateur, overrides and faults."""

import pytest

from server.settings import parse_overrides
from simulation.scenario import (
    ScenarioError,
    built_in,
    load_scenario,
    parse_scenario,
)

EXPECTED = {
    "clean", "clean-dirichlet", "demo", "demo-early", "fashion-backdoor", "fashion-label-flip",
    "ffmu", "flood", "forget-class", "forget-samples", "intermittent", "label-flip", "leave-marked",
}  # fmt: skip
MINIMAL = {"name": "mine", "summary": "mine", "clients": {"total": 4}}


def test_the_scenarios_are_there_and_valid():
    assert {name for name, _ in built_in()} == EXPECTED
    for name, summary in built_in():
        scenario = load_scenario(name)
        assert scenario.summary == summary
        assert scenario.settings.identity == "partition"


def test_what_each_scenario_is_about():
    demo, early = load_scenario("demo"), load_scenario("demo-early")
    assert (demo.clients.total, demo.clients.malicious, demo.settings.task) == (10, 3, "digits")
    assert early.settings.warm_up == 0 < demo.settings.warm_up
    assert early.attack == demo.attack
    assert early.settings.model_copy(update={"warm_up": demo.settings.warm_up}) == demo.settings
    assert load_scenario("clean").clients.malicious == 0
    assert load_scenario("clean").attack is None
    dirichlet = load_scenario("clean-dirichlet")
    assert (dirichlet.settings.partition, dirichlet.settings.alpha) == ("dirichlet", 0.3)
    assert load_scenario("flood").attack.stagger > 0
    assert load_scenario("intermittent").attack.every == 3


def test_overrides_reach_every_table_and_are_read_as_toml():
    pairs = ["rounds=3", "attack.share=0.25", "clients.total=20", "model=mlp", "settings.seed=4"]
    scenario = load_scenario("demo", parse_overrides(pairs))
    assert scenario.settings.rounds == 3
    assert scenario.attack.share == 0.25
    assert scenario.clients.total == 20
    assert scenario.settings.model == "mlp"
    assert scenario.settings.seed == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"clients": {"total": 0}}, "clients.total = 0"),
        ({"clients": {"total": 4, "malicious": 2}}, "at most 1"),
        ({"clients": {"total": 4, "malicious": 1}}, r"needs an \[attack\] table"),
        ({"settings": {"min-clients": 9}}, "is more than the 4 clients there are"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"settings": {"colour": "red"}}, "unknown key 'settings.colour'"),
        (
            {"clients": {"total": 4, "malicious": 1}, "attack": {"kind": "magic", "share": 0.1}},
            "attack.kind = 'magic'",
        ),
    ],
)
def test_faults_name_the_key_and_the_rule(more, message):
    with pytest.raises(ScenarioError, match=message):
        parse_scenario({**MINIMAL, **more}, {})


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('summary = "mine"\n[clients]\ntotal = 4\n', encoding="utf-8")
    assert load_scenario(str(path)).name == "mine"
    path.write_text("summary = ", encoding="utf-8")
    with pytest.raises(ScenarioError, match="not valid TOML"):
        load_scenario(str(path))


def test_a_scenario_may_extend_another_and_say_only_what_differs(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('summary = "mine"\nextends = "demo"\n[attack]\nshare = 0.1\n', encoding="utf-8")
    mine, demo = load_scenario(str(path)), load_scenario("demo")
    assert (mine.name, mine.summary) == ("mine", "mine")
    assert mine.attack == demo.attack.model_copy(update={"share": 0.1})
    assert mine.settings == demo.settings
    path.write_text('summary = "mine"\nextends = "clean"\n', encoding="utf-8")
    assert load_scenario(str(path)).settings == load_scenario("clean").settings
    path.write_text('summary = "mine"\nextends = "nosuch"\n', encoding="utf-8")
    with pytest.raises(ScenarioError, match="there is no scenario 'nosuch'"):
        load_scenario(str(path))
