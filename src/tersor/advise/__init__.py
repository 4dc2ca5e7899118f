"""Which method for this model, this machine and this budget: the advisor, the surveys' catalogue, the table of complexities."""

from tersor.advise.advisor import advise as advise
