"""How fast the solves are, beside others: run.py measures, tables.py prints."""
