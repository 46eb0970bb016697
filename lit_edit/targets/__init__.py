"""Which state makes the model say the new object: contexts, problems, and the optimisation."""
