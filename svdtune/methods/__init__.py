"""SARA, Mo-SARA and SORSA as PEFT methods; importing this package registers them with PEFT."""

from svdtune.methods.loaders import fill_through_peft, read_as_ours, refuse_pickles
from svdtune.methods.mosara import MoSaraConfig, MoSaraModel
from svdtune.methods.registration import register
from svdtune.methods.sara import SaraConfig, SaraModel
from svdtune.methods.sorsa import SorsaConfig, SorsaModel

__all__ = ["MoSaraConfig", "MoSaraModel", "SaraConfig", "SaraModel", "SorsaConfig", "SorsaModel"]

register(SaraConfig, SaraModel)
register(MoSaraConfig, MoSaraModel)
register(SorsaConfig, SorsaModel)
refuse_pickles()
fill_through_peft()
read_as_ours()
