"""Command lines, files, locks and the device."""
