"""One command over several processes, each with a card of its own: who they are, how work is split, how they end."""
