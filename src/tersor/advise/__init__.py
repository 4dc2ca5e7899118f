"""Which method for this model, this machine and this budget: the advisor, the surveys' catalogue, the table of complexities."""

from tersor.advise.advisor import Advice as Advice
from tersor.advise.advisor import advise as advise
from tersor.advise.budget import Budget as Budget
