"""Engine stages, whose workers ask a model row by row: their plan, and what is checked before."""
