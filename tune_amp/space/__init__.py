"""Search spaces: read from YAML, checked, and used to suggest the settings of a trial."""
