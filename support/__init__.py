"""What the six files stand on, one concept a file; may be skipped at a first reading."""
