"""The list of mutants."""

from tests.mutants.bundles import BUNDLES
from tests.mutants.catalogue import CATALOGUE
from tests.mutants.guards import GUARDS
from tests.mutants.lifecycle import LIFECYCLE
from tests.mutants.rules import RULES
from tests.mutants.transfers import TRANSFERS

MUTANTS = (*CATALOGUE, *LIFECYCLE, *RULES, *GUARDS, *TRANSFERS, *BUNDLES)
