"""Training what some editors need before they can edit: Lightning modules, and the data that they share."""
