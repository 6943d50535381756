"""Publishing embedding sets, exporting trained weights, and their cards."""
