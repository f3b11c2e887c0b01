"""What stands between a block's matrix products: a gated sum onto the residual, in place, and a layer norm of it."""
