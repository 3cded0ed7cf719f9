"""What the annotations of the public API promise to whoever checks types: mypy reads it in
`make lint`, nothing runs it."""

from typing import assert_type

import torch
from peft import PeftModel
from torch import Tensor, nn

import svdtune
from svdtune.export import MergeReport
from svdtune.export.lora import LoraReport
from svdtune.methods.sites import Count, Site, Sites
from svdtune.methods.sorsa.regularizer import RegularizerHook
from svdtune.methods.start.disk import Started
from svdtune.planning import Plan
from svdtune.training.run import RunResult


def configurations(folder: str) -> None:
    assert_type(svdtune.SaraConfig.from_pretrained(folder), svdtune.SaraConfig)
    assert_type(svdtune.MoSaraConfig.from_pretrained(folder), svdtune.MoSaraConfig)
    assert_type(svdtune.SorsaConfig.from_pretrained(folder), svdtune.SorsaConfig)
    assert_type(svdtune.SorsaConfig.from_pretrained(folder).layout, str)
    assert_type(svdtune.SaraConfig(threshold=0.01).r, int | None)


def adapters(model: nn.Module, folder: str) -> None:
    config = svdtune.SaraConfig(r=4)
    found = svdtune.sites(model, config)
    assert_type(found, Sites)
    assert_type(found[0], Site)
    assert_type(found[:2], tuple[Site, ...])
    assert_type([site.shape for site in found], list[tuple[int, int] | None])
    assert_type(found.ranks, dict[str, int])
    assert_type(found.count.trained, int)
    assert_type(found[0].weight(model), Tensor)
    assert_type(svdtune.count(model, {"name": "sorsa", "r": 64}), Count)
    assert_type(svdtune.plan(folder, config, budget="0.1%"), Plan)
    assert_type(svdtune.start(folder, config, "adapter"), Started)
    assert_type(svdtune.start(model, config), PeftModel)
    assert_type(svdtune.merge(folder, "merged"), MergeReport)
    assert_type(svdtune.export_lora(folder, "lora"), LoraReport)
    assert_type(svdtune.combine({folder: 0.5, "other": 0.5}, "lora"), LoraReport)


def training(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert_type(svdtune.train("recipe.yaml", {"method.r": 64}), RunResult)
    assert_type(svdtune.regularize(optimizer, model), RegularizerHook)
    assert_type(svdtune.add_regularizer_gradients(model, 1e-4), Tensor | None)
