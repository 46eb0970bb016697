"""The folder of a run: opening it, its files, results and answers."""
