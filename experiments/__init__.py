"""The commands, and the rows: configurations that reproduce a result."""
