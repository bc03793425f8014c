"""A look at data before anything is trained on them: what there is, what is broken, double or leaking."""
