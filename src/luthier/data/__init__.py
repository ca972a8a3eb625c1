"""Any source of rows to typed rows with their origin."""
