"""Data as people have them: every layout becomes a sequence of records with random access."""
