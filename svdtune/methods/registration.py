"""Makes svdtune's methods known to PEFT: `PeftType` members, configurations and tuners. Importing
svdtune runs it, once.

PEFT has no plugin point: its registry takes only names that are members of the `PeftType` enum. So
the members are added to the enum. If a PEFT release brings a method of the same name, PEFT's own
stays and svdtune's is left out with a warning.
"""

import warnings
from typing import Any, cast

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from svdtune.errors import SvdtuneWarning
from svdtune.methods.settings import explain
from svdtune.registry import load


def register(config_cls: Any, tuner_cls: type[BaseTuner]) -> None:
    """Make a method available to `get_peft_model`, `PeftModel.from_pretrained` and everything
    behind them.

    The configuration's class attribute `method` is its name. Registering the same method twice does
    nothing.
    """
    name = config_cls.method
    member = name.upper()
    if member in PeftType.__members__:
        known = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(member))
        if known is not None:
            if known.__qualname__ != tuner_cls.__qualname__ or known.__module__ != tuner_cls.__module__:
                warnings.warn(
                    f"PEFT has a method named {name!r} of its own ({known.__module__}); svdtune's {config_cls.__name__} is "
                    "not registered. Use PEFT's, or an older PEFT",
                    SvdtuneWarning,
                    stacklevel=3,
                )
            return
    else:
        extend_enum(member)
    register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls, prefix=tuner_cls.prefix)
    explain(config_cls)


def config_class(peft_type: str) -> type[PeftConfig] | None:
    """The configuration class of a method by its name in `PeftType`: PEFT's, svdtune's or the
    laboratory's. None if there is no such method."""
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        load("baselines")
    return PEFT_TYPE_TO_CONFIG_MAPPING.get(cast(PeftType, peft_type))  # a member equals its name


def peft_types() -> list[str]:
    """Every name that `config_class` knows."""
    load("baselines")
    return [member.value for member in PEFT_TYPE_TO_CONFIG_MAPPING]


def extend_enum(name: str) -> None:
    """Add a member to `PeftType`. An enum with members cannot be subclassed."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    # since Python 3.12 `PeftType.NAME` is looked up as an attribute alone
    type.__setattr__(PeftType, name, member)
