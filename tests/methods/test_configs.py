"""Configurations: defaults, and every bad value refused in one message that names the field, the
value and the range."""

import pydoc

import pytest

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from svdtune.methods.settings import settings


def test_defaults_are_the_papers():
    assert (SaraConfig().threshold, SaraConfig().r, SaraConfig().init) == (0.01, None, "kaiming")
    assert (MoSaraConfig().threshold, MoSaraConfig().num_heads, MoSaraConfig().v_position) == (0.5, 5, "after")
    sorsa = SorsaConfig()
    assert (sorsa.r, sorsa.layout, sorsa.gamma, sorsa.reduction) == (64, "delta", 4e-4, "mean")


@pytest.mark.parametrize("config", [SaraConfig, MoSaraConfig, SorsaConfig])
def test_help_has_every_setting_with_its_default(config):
    shown = pydoc.render_doc(config, renderer=pydoc.plaintext)
    for setting in settings(config):
        assert f"{setting.name} = {getattr(config(), setting.name)!r}: {setting.metadata['help']}" in shown
    assert {setting.name for setting in settings(config)} > {"r", "threshold", "compact", "dropout"}


def test_a_rank_replaces_the_default_threshold():
    assert SaraConfig(r=8).threshold is None
    assert SorsaConfig(threshold=0.1).r is None


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SaraConfig, {"threshold": 0}, r"`threshold` must lie in \(0, 1\].*got 0"),
        (SaraConfig, {"threshold": 1.5}, r"`threshold` must lie in \(0, 1\].*got 1.5"),
        (SaraConfig, {"threshold": float("nan")}, r"`threshold`.*got nan"),
        (SaraConfig, {"r": 0}, "`r` must be a whole number of at least 1; got 0"),
        (SaraConfig, {"r": 2.0}, "`r` must be a whole number of at least 1; got 2.0"),
        (SaraConfig, {"r": True}, "`r` must be a whole number"),
        (SaraConfig, {"r": 8, "threshold": 0.1}, "`r` .8. and `threshold` .0.1. both set the ranks"),
        (SaraConfig, {"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]"),
        (SaraConfig, {"dropout": 1.0}, r"`dropout` must lie in \[0, 1\); got 1.0"),
        (SaraConfig, {"init": "kaming"}, "`init` must be one of 'kaiming', 'zero_v', 'spectral'; got 'kaming'"),
        (SaraConfig, {"bias": "lora_only"}, "'none', 'all' or 'sara_only'; got 'lora_only'"),
        (SaraConfig, {"layers_pattern": "layers"}, "`layers_pattern` needs `layers_to_transform`"),
        (SaraConfig, {"target_modules": ".*q", "layers_to_transform": [0]}, "cannot be used when `target_modules`"),
        (MoSaraConfig, {"num_heads": 0}, "`num_heads` must be a whole number of at least 1; got 0"),
        (MoSaraConfig, {"v_position": "before"}, "'after', 'front'; got 'before'"),
        (SorsaConfig, {"layout": "both"}, "'delta', 'split'; got 'both'"),
        (SorsaConfig, {"gamma": -1}, "`gamma` must be a number of at least 0; got -1"),
        (SorsaConfig, {"smooth_eps": float("inf")}, "`smooth_eps`.*got inf"),
        (SorsaConfig, {"reduction": "none"}, "'mean', 'sum'; got 'none'"),
    ],
)
def test_bad_values_are_refused(config, settings, message):
    with pytest.raises(SvdtuneError, match=message):
        config(**settings)


def test_all_problems_come_at_once():
    with pytest.raises(SvdtuneError) as caught:
        SorsaConfig(r=-1, dropout=2, layout="x", gamma=-1)
    assert all(name in str(caught.value) for name in ("`r`", "`dropout`", "`layout`", "`gamma`"))


def test_a_saved_configuration_says_its_factors_exist_and_the_living_one_does_not(tmp_path):
    config = SorsaConfig(r=4, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    assert SorsaConfig.from_pretrained(tmp_path).initialized
    assert not config.initialized


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": "(("},
            r"`target_modules` must be a name or a regular expression; got '\(\(': missing \), unter",
        ),
        (
            {"exclude_modules": "*"},
            r"`exclude_modules` must be a name or a regular expression; got '\*': nothing to repeat",
        ),
        ({"rank_pattern": {"[": 2}}, r"`rank_pattern\['\['\]` must be a name or a regular expression; got '\['"),
        ({"rank_pattern": {3: 2}}, "`rank_pattern`: 3 is no name"),
        ({"target_modules": [["q"]]}, r"`target_modules` must be a list of names; got \[\['q'\]\]"),
        ({"modules_to_save": "head"}, "`modules_to_save` must be a list of names; got 'head'"),
        ({"modules_to_save": 3}, "`modules_to_save` must be a list of names; got 3"),
        ({"layers_to_transform": 0.5}, r"`layers_to_transform` must be an index or a list of indices; got 0\.5"),
    ],
)
def test_which_modules_is_settled_before_a_model_is_touched(settings, message):
    with pytest.raises(SvdtuneError, match=message):
        SorsaConfig(r=2, **settings)
