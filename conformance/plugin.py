"""A pytest plugin that puts our configurations in the place of PEFT's in PEFT's tests, and counts what happened.

PEFT's tests take their configurations from lists that `parametrize` keeps by reference, so filling the lists with ours after a
test file was imported and before its tests are made is enough. Tests that build a `LoraConfig` themselves get ours under
that name, once for each method.
"""

from collections import Counter
from contextlib import suppress
from inspect import getmodule, isfunction
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from conformance import cases
from svdtune import MoSaraConfig

_FILLED = {"TEST_CASES": cases.custom_models, "ALL_CONFIGS": cases.decoders}
_FILLED |= {"MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": cases.active_adapters}
_NO_CALL = SimpleNamespace(params={})
_OTHER = "about another method of PEFT's: takes no configuration that could be replaced"


class Plugin:
    """Replaces, skips with a reason, and reports.

    Args:
        fast: one configuration of each method and one decoder.
    """

    def __init__(self, fast: bool):
        self.fast = fast
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        if isinstance(collector, pytest.Module):
            with suppress(pytest.Collector.CollectError):  # collecting the file meets it again and reports it
                self._replace(collector.obj)
        yield

    def _replace(self, module: ModuleType) -> None:
        for name, rows in _FILLED.items():
            if hasattr(module, name):
                getattr(module, name)[:] = rows(self.fast)
        if hasattr(module, "ALL_PEFT_CONFIG_CLASSES"):
            module.ALL_PEFT_CONFIG_CLASSES[:] = cases.METHODS.values()
        if self.fast and hasattr(module, "PEFT_DECODER_MODELS_TO_TEST"):
            del module.PEFT_DECODER_MODELS_TO_TEST[:-1]
        for holder in (module, getmodule(getattr(module, "PeftCommonTester", None))):
            for name in ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported"):
                if hasattr(holder, name):
                    setattr(holder, name, lambda *_, **__: None)  # ours adapt Conv1D
            if hasattr(holder, "_skip_if_merging_not_supported"):
                holder._skip_if_merging_not_supported = _skip_several_heads

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if _uses_our_lists(metafunc.definition) or not _names(metafunc, "LoraConfig"):
            return
        metafunc.fixturenames.append("method_like_lora")
        metafunc.parametrize("method_like_lora", cases.METHODS, indirect=True, scope="class")

    @pytest.fixture(scope="class")
    def method_like_lora(self, request: pytest.FixtureRequest) -> Any:
        module, cls = request.node.getparent(pytest.Module).obj, cases.METHODS[request.param]
        before = module.LoraConfig
        module.LoraConfig = lambda **settings: cases.like_lora(cls, **settings)
        yield
        module.LoraConfig = before

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            name = f"{item.path.name}::{item.nodeid.split('::', 1)[1]}"
            ours = _uses_our_lists(item) or "method_like_lora" in getattr(item, "callspec", _NO_CALL).params
            reason = cases.reason_to_skip(name) or (None if ours else _OTHER)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.skipped:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[text.removeprefix("Skipped: ")] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("conformance to PEFT")
        for reason, count in self.reasons.most_common():
            terminalreporter.line(f"skipped {count:5}  {reason}")
        totals = ", ".join(f"{self.counts[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
        terminalreporter.line(totals)


def _uses_our_lists(item: Any) -> bool:
    names = {
        name for mark in item.iter_markers("parametrize") for name in str(mark.args[0]).replace(" ", "").split(",")
    }
    return "config_cls" in names and any(
        row and any(part in cases.METHODS.values() for part in (row if isinstance(row, tuple) else (row,)))
        for mark in item.iter_markers("parametrize")
        for row in mark.args[1]
    )


def _names(metafunc: pytest.Metafunc, word: str) -> bool:
    """Whether the code of a test, or of what its class has besides tests (fixtures, helpers), speaks of `word`."""
    if not hasattr(metafunc.module, word):
        return False
    own = vars(metafunc.cls) if metafunc.cls else {}
    helpers = (part for name, part in own.items() if not name.startswith("test"))
    functions = (getattr(part, "_get_wrapped_function", lambda part=part: part)() for part in helpers)
    return any(
        word in function.__code__.co_names for function in (metafunc.function, *functions) if isfunction(function)
    )


def _skip_several_heads(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    if config_cls is MoSaraConfig and config_kwargs.get("num_heads", 5) > 1:
        pytest.skip("Mo-SARA with several heads depends on the token and has no merged weight")
