"""The papers' data sets, groups of them, prompts, row formats and a generator; importing it makes
them known by name."""

from svdtune.data.catalogue import CATALOGUE, GROUPS
from svdtune.data.formats import FORMATS
from svdtune.data.prompts import TEMPLATES
from svdtune.data.readers import GENERATORS
from svdtune.lab.data import gsm_symbolic
from svdtune.lab.data.catalogue import DATA_SETS, MEMBERS
from svdtune.lab.data.formats import ROW_FORMATS
from svdtune.lab.data.prompts import PROMPTS

for dataset in DATA_SETS:
    CATALOGUE.add(dataset.name, dataset)
for group, members in MEMBERS.items():
    GROUPS.add(group, members)
for prompt, text in PROMPTS.items():
    TEMPLATES.add(prompt, text)
for form in ROW_FORMATS:
    FORMATS.add(form.name, form)
GENERATORS.add("gsm_symbolic", gsm_symbolic.rows)
