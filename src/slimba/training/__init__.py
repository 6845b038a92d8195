"""One training loop for every method: losses, schedules, precision, resume, logs. Needs torch."""
