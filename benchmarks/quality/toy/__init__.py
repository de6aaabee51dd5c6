"""The toy model's clips: how they are generated, and what they show, read from their pixels."""
