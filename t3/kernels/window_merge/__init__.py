"""From the results of both groupings' windows back to the order of the tokens: their mean, in one pass."""
