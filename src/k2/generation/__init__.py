"""Text generation behind one protocol: the embedded model, any OpenAI-compatible endpoint, our own engine."""
