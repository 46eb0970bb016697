"""The only writer of weights, its journal, and the history that the journal tells."""
