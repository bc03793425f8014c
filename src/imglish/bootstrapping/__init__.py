"""Cleaner data from noisy data: captions are written, scored and filtered (CapFilt, Li et al. 2022, section 3.3)."""
