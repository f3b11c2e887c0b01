"""`python -m t3.bench`: how fast T3 is on this machine, beside the machine's limits and other people's attention."""
