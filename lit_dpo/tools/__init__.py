"""Commands that look at data, models and finished runs, one file each."""
