"""What a run can be asked for: keys with help, unit, range and choices, from JSON, the command line or Python."""
