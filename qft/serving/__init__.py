"""Engines that serve a model, in an environment of their own: asked what they make of it, and how they are started."""
