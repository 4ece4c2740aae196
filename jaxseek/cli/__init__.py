"""The command line: `main` parses and dispatches, a file for each group of verbs declares and runs them."""
