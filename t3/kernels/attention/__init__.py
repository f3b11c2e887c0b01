"""The T3 attention operation."""
