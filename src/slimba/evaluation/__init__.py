"""How good a model is: perplexity and bits per byte from the engine that is deployed, comparison, standard tasks."""
