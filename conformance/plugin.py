"""A pytest plugin that puts our configurations in the place of PEFT's in PEFT's tests, and counts
what happened.

PEFT's tests take their configurations from lists that `parametrize` keeps by reference, so filling
the lists with ours after a test file was imported and before its tests are made is enough. Tests
that build a `LoraConfig` themselves get ours under that name, in a session for each method.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from inspect import getmodule, isfunction
from types import CodeType, ModuleType
from typing import Any

import pytest

from conformance import cases
from svdtune import MoSaraConfig
from svdtune.evaluation.prompt_methods import refused_peft

_FILLED = {"TEST_CASES": cases.custom_models, "ALL_CONFIGS": cases.decoders}
_FILLED |= {"MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": cases.active_adapters}


class Plugin:
    """Replaces, skips with a reason, and reports.

    Args:
        fast: one configuration of each method and one decoder.
        method: run the tests that make a LoraConfig themselves, with this method in its place;
            None: all those that take their configurations from lists.
    """

    def __init__(self, fast: bool, method: str | None = None):
        self.fast, self.method = fast, method
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        if isinstance(collector, pytest.Module):
            # collecting the file meets it again and reports it
            with suppress(pytest.Collector.CollectError):
                self._replace(collector.obj)
        yield

    def _replace(self, module: ModuleType) -> None:
        if self.method is not None:
            cls = cases.METHODS[self.method]
            module.LoraConfig = lambda **settings: cases.like_lora(cls, **settings)
        for name, rows in _FILLED.items():
            if hasattr(module, name):
                getattr(module, name)[:] = rows(self.fast)
        if hasattr(module, "ALL_PEFT_CONFIG_CLASSES"):
            module.ALL_PEFT_CONFIG_CLASSES[:] = cases.METHODS.values()
        if self.fast and hasattr(module, "PEFT_DECODER_MODELS_TO_TEST"):
            del module.PEFT_DECODER_MODELS_TO_TEST[:-1]
        for holder in (module, getmodule(getattr(module, "PeftCommonTester", None))):
            if hasattr(holder, "hub_online_once"):
                # it would go online for the first use of each model
                holder.hub_online_once = nullcontext
            for name in ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported"):
                if hasattr(holder, name):
                    setattr(holder, name, lambda *_, **__: None)  # ours adapt Conv1D
            if hasattr(holder, "_skip_if_merging_not_supported"):
                holder._skip_if_merging_not_supported = _skip_several_heads

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item], config: pytest.Config) -> None:
        listed = [item for item in items if _uses_our_lists(item)]
        chosen = listed if self.method is None else [item for item in items if item not in listed and _of_lora(item)]
        for item in chosen:
            name = f"{item.path.name}::{item.nodeid.split('::', 1)[1]}"
            reason = cases.reason_to_skip(name if self.method is None else f"{name} as {self.method}")
            if self.method is not None and any("lora" in text.lower() for text in _texts(item.function.__code__)):
                reason = reason or "looks for LoRA's own tensors or settings by name"
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
        items[:] = chosen

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        report = (yield).get_result()
        text = _chain(call.excinfo.value) if report.failed and call.excinfo else ""
        excuses = dict(cases.EXCUSES)
        if text and (refusal := refused_peft()) is not None:  # stock LoRA fails there too
            excuses[refusal] = "transformers itself refuses this PEFT"
        reason = next((reason for part, reason in excuses.items() if part in text), None)
        if reason is not None:
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.skipped:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[text.removeprefix("Skipped: ")] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"conformance to PEFT: {self.method or 'our configurations in its tables'}")
        for reason, count in self.reasons.most_common():
            terminalreporter.line(f"skipped {count:5}  {reason}")
        terminalreporter.line(totals(self.counts))


def totals(counts: Counter[str]) -> str:
    """How many tests passed, were skipped and failed, in words."""
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))


def _uses_our_lists(item: Any) -> bool:
    names = {
        name for mark in item.iter_markers("parametrize") for name in str(mark.args[0]).replace(" ", "").split(",")
    }
    return "config_cls" in names and any(
        row and any(part in cases.METHODS.values() for part in (row if isinstance(row, tuple) else (row,)))
        for mark in item.iter_markers("parametrize")
        for row in mark.args[1]
    )


def _of_lora(item: Any) -> bool:
    """Whether a test, or what its class has besides tests (fixtures, helpers), makes a LoraConfig
    by that name."""
    own = vars(item.cls) if item.cls else {}
    helpers = (part for name, part in own.items() if not name.startswith("test"))
    functions = (getattr(part, "_get_wrapped_function", lambda part=part: part)() for part in helpers)
    return any("LoraConfig" in code.__code__.co_names for code in (item.function, *functions) if isfunction(code))


def _texts(code: CodeType) -> Iterator[str]:
    """The strings, names and attributes in a function and in those inside it, but for the
    configuration's name."""
    comment = next(iter(code.co_consts), None)
    for part in (*code.co_consts, *code.co_names):
        if isinstance(part, CodeType):
            yield from _texts(part)
        elif isinstance(part, str) and part not in cases.ONLY_LORAS and part != comment:
            yield part
        elif isinstance(part, tuple):
            yield from (text for text in part if isinstance(text, str) and text not in cases.ONLY_LORAS)


def _chain(error: BaseException | None) -> str:
    return "" if error is None else f"{error} {_chain(error.__cause__ or error.__context__)}"


def _skip_several_heads(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    if config_cls is MoSaraConfig and config_kwargs.get("num_heads", 5) > 1:
        pytest.skip("Mo-SARA with several heads depends on the token and has no merged weight")
