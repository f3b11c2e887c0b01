"""From projected q, k or v to the rows of windows, in one pass: RMS norm, rotation, and a place in each grouping."""
