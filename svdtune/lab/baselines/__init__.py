"""Methods that the papers compare with and PEFT lacks, as PEFT methods; importing this package
registers them with PEFT."""

from svdtune.lab.baselines.bottleneck import BottleneckConfig, BottleneckModel
from svdtune.lab.baselines.dylora import DyLoraConfig, DyLoraModel
from svdtune.methods.registration import register

__all__ = ["BottleneckConfig", "BottleneckModel", "DyLoraConfig", "DyLoraModel"]

register(BottleneckConfig, BottleneckModel)
register(DyLoraConfig, DyLoraModel)
