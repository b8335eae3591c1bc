"""Files of a run that a crash cannot spoil and a stranger cannot misuse."""
