"""How good and how fast a model is: likelihood, scores, tasks, speed, and how sure a figure is."""
