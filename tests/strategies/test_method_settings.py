"""Settings of methods: what is given reaches the method, and what cannot be is told in one line."""

import pytest

from strategies.actions import Ascend, Ascent, LabelFlip, MacForget, Noisy, Rapid, Rcad
from strategies.methods.catalogue import MAKE
from strategies.methods.holders import Holders
from strategies.methods.interface import UNKNOWN, Network
from strategies.methods.settings import (
    CONFIGURABLE,
    MethodSettingsError,
    configured,
    defaults_of,
    read_method_settings,
)
from unlearning.channel_masks import Convolution

NETWORK = Network((Convolution("first"),), ("last.weight",), 2)


def test_without_settings_methods_are_as_they_are_by_default():
    for name, method in configured(UNKNOWN, "").items():
        assert method == MAKE[name](), name
        assert method.name == name


@pytest.mark.parametrize(
    ("text", "name", "field", "value"),
    [
        ("fisher-mask.rate=0.02", "fisher-mask", "rate", 0.02),
        ("fisher-mask.scope=layer", "fisher-mask", "scope", "layer"),
        ("fisher-mask.form=ratio", "fisher-mask", "form", "ratio"),
        ("fisher-mask.remain=none", "fisher-mask", "remain", "none"),
        ("fisher-mask.most-samples=50", "fisher-mask", "most_samples", 50),
        ("activation-mask.rate=0.1", "activation-mask", "rate", 0.1),
        ("grad-mask.most-samples=7", "grad-mask", "most_samples", 7),
        ("random-mask.rate=1", "random-mask", "rate", 1.0),
        ("fisher-noise.recipe=eq2", "fisher-noise", "recipe", "eq2"),
        ("fisher-noise.alpha=1e-5", "fisher-noise", "alpha", 1e-5),
        ("fisher-noise.relative=0.1", "fisher-noise", "relative", 0.1),
        ("tfidf.rate=0.3", "tfidf", "rate", 0.3),
        ("tfidf.bn=false", "tfidf", "norm", False),
        ("ij.scope=diag", "ij", "scope", "diag"),
        ("ij.longest=3", "ij", "longest", 3.0),
        ("label-flip.strength=2.5", "label-flip", "strength", 2.5),
        ("verifi.strong=true", "verifi", "strong", True),
        ("pga.radius=0.5", "pga", "radius", 0.5),
        ("rapid-retraining.share=0.75", "rapid-retraining", "share", 0.75),
    ],
)
def test_what_is_set_reaches_its_method_and_no_other(text, name, field, value):
    found = configured(NETWORK, text)
    assert getattr(found[name], field) == value
    usual = configured(NETWORK, "")
    assert {other for other in found if found[other] != usual[other]} == {name}


@pytest.mark.parametrize(
    ("text", "name", "step"),
    [
        ("ascent.epochs=3,ascent.pattern=comb", "ascent", Ascent),
        ("label-flip.first=0.5", "label-flip", LabelFlip),
        ("macforget.steps=4", "macforget", MacForget),
        ("pga.epochs=2", "pga", Ascend),
        ("rapid-retraining.rapid-rate=0.5", "rapid-retraining", Rapid),
        ("noisy-gd.clip=2", "noisy-gd", Noisy),
        ("rcad.strength=0.9", "rcad", Rcad),
    ],
)
def test_settings_of_a_step_are_sent_to_clients(text, name, step):
    method = configured(NETWORK, text)[name]
    given = read_method_settings(text)[name]
    if isinstance(method, Holders) or name == "pga":
        assert method.settings == {**configured(NETWORK, "")[name].settings, **given}
        radius = {"radius": 1.0} if name == "pga" else {}
        sent = step(forget="class", forget_class=1, **radius, **given)
    else:
        sent = method.step
    assert isinstance(sent, step)
    assert {key: getattr(sent, key) for key in given} == given


def test_what_a_request_decides_cannot_be_set():
    for name in ("ascent", "label-flip", "macforget", "pga"):
        assert not [key for key in defaults_of(name) if key.startswith("forget-")]
        assert "forget" not in defaults_of(name)
    assert defaults_of("fedup") == {}
    assert defaults_of("fisher-mask") == {
        "most-samples": 2000, "rate": 0.04, "form": "mean", "scope": "model", "remain": "all"
    }  # fmt: skip
    assert CONFIGURABLE.keys() <= MAKE.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate=0.02", r"takes METHOD\.KEY=VALUE pairs.*got 'rate=0\.02'"),
        ("fisher-mask.rate", r"got 'fisher-mask\.rate'"),
        ("fisher-mask.rate=0.1,", r"got ''"),
        (
            "fishermask.rate=0.1",
            r"no method 'fishermask' has settings.*fisher-mask, activation-mask",
        ),
        ("fedup.rate=0.1", r"no method 'fedup' has settings of its own"),
        ("ascent.epoch=3", r"ascent has no setting 'epoch'; it has .*epochs"),
        ("ascent.forget=all", r"ascent has no setting 'forget'"),
        ("fisher-mask.rate=2", r"fisher-mask\.rate = 2: .*less than or equal to 1; .*0\.04"),
        ("fisher-mask.scope=row", r"fisher-mask\.scope = 'row': .*'model', 'layer' or 'tensor'"),
        ("fisher-mask.rate=nan", r"fisher-mask\.rate = nan: "),
        ("ij.longest=inf", r"ij\.longest = inf: .*finite"),
        ("ascent.epochs=0", r"ascent\.epochs = 0: .*at least 1|greater than or equal to 1"),
        ("ascent.epochs=1,ascent.epochs=2", r"ascent\.epochs is set twice"),
    ],
)
def test_faults_say_the_rule_the_value_and_what_exists(text, message):
    with pytest.raises(MethodSettingsError, match=message) as raised:
        configured(UNKNOWN, text)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_blanks_around_pairs_do_not_matter():
    assert read_method_settings(" ascent.epochs = 3 , tfidf.bn = false ") == {
        "ascent": {"epochs": 3},
        "tfidf": {"bn": False},
    }
    assert read_method_settings("  ") == {}
